"""Tests of both scripts: stopping, resuming, damaged files, full disks, kills. No interruption changes the result."""

import functools
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy
import pytest
import torch
from conftest import (
    ROOT,
    SCRIPTS,
    TINY,
    Process,
    assert_same_run,
    files_of,
    flip_a_bit,
    last_step,
    model_weights,
    scalars,
)
from transformers import AutoModelForCausalLM

import es_train
import runs
from reward import UserError
from runs import checkpoint_folders, newest_checkpoint
from utils import fingerprint, load_config, load_model

DRAW = "rewards={accuracy: 1.0, 'test_resume:draw': 1.0}"
UNSCALED, DYNAMIC = "scale_advantages=none", ["max_sampling_rounds=3", "rewards={accuracy: 1.0}"]
WAYS = {
    "grpo": ("grpo", ["loss_normalization=constant", "scale_advantages=batch"]),
    "grpo-dynamic": ("grpo", [*DYNAMIC, "kl_weight=0.1", "updates_per_step=2", "weight_decay=0.1", "group_size=2"]),
    "grpo-bf16": ("grpo", ["dtype=bfloat16", "gradient_checkpointing=true", "loss_normalization=sequence", DRAW]),
    "grpo-full-bf16": ("grpo", ["lora=null", "dtype=bfloat16", "kl_weight=0.1", "learning_rate=1e-4", UNSCALED]),
    "grpo-adapter": ("grpo", ["model=ADAPTER", "lora.rank=8", "kl_weight=0.1", "learning_rate=0.01"]),
    "es": ("es", ["population_size=5"]),
    "es-antithetic-decay": ("es", ["antithetic=true", "noise_schedule=linear", "lr_schedule=cosine", DRAW]),
    "es-gaussian-bf16": ("es", ["perturbation=gaussian", "dtype=bfloat16", "population_size=4"]),
}


def draw(completions, **columns):
    """Reward function that returns random numbers."""
    return [random.random() + numpy.random.rand() + float(torch.rand(())) for _ in completions]


def journal(folder):
    """Return the state after every step, starting with step 0."""
    return [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("way", WAYS)
def test_resumed_run_is_bit_identical_to_an_uninterrupted_one(tmp_path, capsys, finished, way):
    name, overrides = WAYS[way]
    overrides = [text.replace("ADAPTER", f"{finished['grpo']}/model") for text in overrides]
    script = SCRIPTS[name]
    whole, parts = script.train(tmp_path / "whole", *overrides), tmp_path / "parts"
    script.train(parts, *overrides, stop_after=1)
    assert "stopped after step 1; to resume:" in capsys.readouterr().out and not (parts / "model").exists()
    script.train(parts, *overrides)
    out = capsys.readouterr().out
    assert "resuming after step 1" in out
    assert_same_run(parts, whole)

    # Check that the overrides take effect.
    curves, weights = scalars(whole), model_weights(whole)
    assert all(math.isfinite(value) for points in curves.values() for _, value in points)
    if DRAW in overrides:  # every step draws new numbers
        assert len({value for _, value in curves["reward/test_resume:draw"]}) == 4
    base = AutoModelForCausalLM.from_pretrained(TINY).state_dict()
    if weights.keys() == base.keys():
        assert all(not torch.equal(weight, base[name]) for name, weight in weights.items())
    if name == "grpo":  # trained weights are fp32: bf16 would round most updates away
        assert {weight.dtype for weight in weights.values()} == {torch.float32}
        if "updates_per_step=2" not in overrides and "dtype=bfloat16" not in overrides:
            assert {v for tag in ("ratio_min", "ratio_max") for _, v in curves[f"policy/{tag}"]} == {1.0}
            assert curves["policy/sampler_gap_max"][0][1] < 1e-3
        if "kl_weight=0.1" in overrides:
            assert curves["policy/kl_k3"][0][1] == 0 or "updates_per_step=2" in overrides
            assert curves["policy/kl_k3"][1][1] > 0
        if way == "grpo-dynamic":
            assert curves["progress/prompts"][-1][1] > 4 * 4
        if way == "grpo-adapter":  # the reference, a frozen copy of the adapter, is neither counted nor saved
            assert ", 835,712 parameters, 38,912 trained\n" in out
            assert load_config(script.config_class, whole / "config.yml").lora.rank == 4
            assert weights.keys() == model_weights(finished["grpo"]).keys()
            assert curves["eval/strict_accuracy"][0][1] == scalars(finished["grpo"])["eval/strict_accuracy"][-1][1]
    else:
        if "noise_schedule=linear" in overrides:
            assert [v for _, v in curves["es/noise_scale"]] == pytest.approx([0.03, 0.0225, 0.015, 0.0075])
            expected = [6e-3 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
            assert [v for _, v in curves["optim/learning_rate"]] == pytest.approx(expected)
        for step, state in enumerate(journal(whole)[1:], start=1):
            assert state["step"] == step and len(state["rewards"]) == script.config(whole, *overrides).population_size
            assert dict(curves["es/reward_max"])[step] == pytest.approx(max(state["rewards"]))
            assert sum(state["z"]) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("moment", [pytest.param(m, marks=[] if m in (2, 4) else pytest.mark.slow) for m in range(8)])
def test_run_that_dies_between_logging_and_saving_logs_no_step_twice(tmp_path, monkeypatch, script, finished, moment):
    """Die in the `moment`-th call that writes to disk."""
    folder, calls, run = tmp_path / "run", itertools.count(), runs.Run

    def dies(function):
        def wrapper(*args, **kwargs):
            if next(calls) >= moment:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return wrapper

    for owner, name in [(runs, "save_checkpoint"), (runs, "write_file"), (run, "_write_scalars"), (run, "_commit")]:
        monkeypatch.setattr(owner, name, dies(getattr(owner, name)))
    with pytest.raises(KeyboardInterrupt):
        script.train(folder, f"seed={int(moment == 2)}")  # then nothing is saved yet, and keys may change
    monkeypatch.undo()
    script.train(folder)
    assert_same_run(folder, finished[script.key])


def test_accuracy_by_tokens_of_lost_steps_is_purged(tmp_path, script):
    size = "group_size" if script.key == "grpo" else "population_size"
    overrides = [f"{size}=20", "eval_every=1", "num_steps=2", "lr_schedule=constant"]  # over 1,000 tokens per step
    folder = script.train(tmp_path / "run", *overrides)
    uninterrupted = scalars(folder / "by_tokens")
    shutil.rmtree(folder / "checkpoints" / "step_000002")
    shutil.rmtree(folder / "model")
    if script.key == "es":
        path = folder / "journal.jsonl"
        path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    script.train(folder, *overrides)
    by_tokens = scalars(folder / "by_tokens")
    assert by_tokens == uninterrupted and len({step for step, _ in by_tokens["by_tokens/strict_accuracy"]}) == 3


def test_run_may_be_shortened_to_what_is_done_and_extended_at_a_constant_rate(tmp_path, capsys, script):
    folder, overrides = tmp_path / "run", ["lr_schedule=constant", "eval_every=4"]
    script.train(folder, *overrides, stop_after=3)
    before, saved = files_of(folder), files_of(folder / "checkpoints")
    with pytest.raises(UserError, match="resume: .*: 3 steps are done, more than num_steps, 2"):
        script.train(folder, *overrides, "num_steps=2")
    assert files_of(folder) == before
    for _ in range(2):  # the second time, the run is already finished and stays unchanged
        script.train(folder, *overrides, "num_steps=3")
        assert files_of(folder / "checkpoints") == saved
    assert "step    3  held-out" in capsys.readouterr().out and (folder / "model").is_dir()
    with pytest.raises(UserError, match=f"use another run_name and model={folder}/model to train on"):
        script.train(folder, *overrides, "num_steps=9", "lr_schedule=linear")
    script.train(folder, *overrides, "num_steps=5")
    assert [step for step, _ in scalars(folder)["reward/mean"]] == [1, 2, 3, 4, 5]
    # The evaluation and checkpoint intervals may change and do not affect the weights.
    others = ["num_steps=5", "eval_every=5", "checkpoint_every=1", "keep_checkpoints=3"]
    script.train(tmp_path / "at once", *overrides, *others)
    models = [files_of(run / "model") for run in (folder, tmp_path / "at once")]
    assert {name for name, _ in models[0].items() ^ models[1].items()} == {"README.md"}  # it has the run's name
    assert list(checkpoint_folders(tmp_path / "at once")) == [5, 4, 3]


# Refusals


def test_resuming_with_another_config_model_dataset_or_script_names_the_key(tmp_path, script):
    lines = [json.dumps({"prompt": f"Compute {i}+{i}", "answer": str(2 * i)}) for i in range(30)]
    file = tmp_path / "problems.jsonl"
    file.write_text("\n".join(lines))
    overrides = ["lr_schedule=linear", f"dataset={file}", "dataset_args={}", "eval_size=2"]
    folder = script.train(tmp_path / "run", *overrides, stop_after=2)
    for name in ("moved", "other"):
        shutil.copytree(TINY, tmp_path / name)
    model = AutoModelForCausalLM.from_pretrained(TINY)
    model.model.norm.weight.data[0] += 1e-3
    model.save_pretrained(tmp_path / "other")
    before = files_of(folder)
    for override, message in {
        "seed=1": "seed: 1: the run was started with 0; use another run_name",
        "learning_rate=0.5": "learning_rate: 0.5: the run was started with",
        "rewards={accuracy: 1.0}": "rewards: {'accuracy': 1.0}: the run was started with",
        "dtype=bfloat16": "dtype: 'bfloat16': the run was started with 'float32'",
        "num_steps=9": "9: the run was started with 4; use another run_name",  # it sets the schedule
        "resume=never": "already exists; choose another name or delete it",
        f"model={tmp_path / 'other'}": "starting weights: '",
        "device=cpu": "problems: '",  # the file has changed
    }.items():
        changed = "\n".join(lines).replace('"56"', '"57"') if override == "device=cpu" else "\n".join(lines)
        file.write_text(changed)
        with pytest.raises(UserError) as error:
            script.train(folder, *overrides, override)
        assert message in str(error.value) and files_of(folder) == before
    file.write_text("\n".join(lines))
    other = SCRIPTS["es" if script.key == "grpo" else "grpo"]
    with pytest.raises(UserError, match="resume: .*run: script: '.*': the run was started with '"):
        other.train(folder)
    assert files_of(folder) == before
    script.train(folder, *overrides, f"model={tmp_path / 'moved'}", "eval_every=1")
    ours, theirs = model_weights(folder), model_weights(script.train(tmp_path / "uninterrupted", *overrides))
    torch.testing.assert_close(ours, theirs, atol=0, rtol=0)


def test_moved_and_copied_runs_resume_where_their_config_lies(tmp_path, script, finished):
    script.train(tmp_path / "logs" / "run", stop_after=2)
    shutil.copytree(tmp_path / "logs" / "run", tmp_path / "copies" / "copy")
    original = files_of(tmp_path / "logs")
    script.module.main(load_config(script.config_class, tmp_path / "copies" / "copy" / "config.yml"))
    assert_same_run(tmp_path / "copies" / "copy", finished[script.key])
    assert files_of(tmp_path / "logs") == original and len(list(tmp_path.iterdir())) == 2


def test_a_run_whose_problems_moved_resumes_with_their_new_path_but_not_with_other_problems(tmp_path, script):
    lines = [json.dumps({"prompt": f"{n}+1?", "answer": str(n + 1)}) for n in range(40)]
    for name, kept in (("before", lines), ("moved", lines), ("other", lines[1:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(kept))
    folder = script.train(tmp_path / "run", f"dataset={tmp_path}/before.jsonl", "dataset_args={}", stop_after=2)
    with pytest.raises(UserError, match="dataset: .*other.jsonl': the run was started with '.*before.jsonl'"):
        script.train(folder, f"dataset={tmp_path}/other.jsonl", "dataset_args={}")
    (tmp_path / "before.jsonl").unlink()
    assert last_step(script.train(folder, f"dataset={tmp_path}/moved.jsonl", "dataset_args={}")) == 4


# Damage


@pytest.mark.parametrize("lost", ["checkpoints", "newest", "journal", "evaluation", "all but best"])
def test_finished_model_is_never_overwritten_after_its_state_is_lost(tmp_path, script, finished, lost):
    folder = shutil.copytree(finished[script.key], tmp_path / "run")
    if lost == "journal":
        (folder / "journal.jsonl").unlink(missing_ok=True)
    elif lost == "all but best":
        for name in ("checkpoints", "model", "journal.jsonl"):
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        (folder / "best").mkdir(exist_ok=True)
    elif lost == "evaluation":
        (folder / "model" / "evaluation.json").unlink()
    else:
        shutil.rmtree(folder / "checkpoints" if lost == "checkpoints" else checkpoint_folders(folder)[4])
    if script.key == "es" and lost == "newest":  # the journal still has the last step
        path = folder / "journal.jsonl"
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    before = files_of(folder)
    if (script.key, lost) in [("grpo", "journal"), ("es", "checkpoints")]:  # nothing is lost
        script.train(folder)
        return
    with pytest.raises(UserError, match="resume: .*(no undamaged|is lost; move it away|is empty or missing)"):
        script.train(folder)
    assert files_of(folder) == before


def test_run_resumes_from_the_last_undamaged_checkpoint_and_without_one_only_es_from_its_journal(
    tmp_path, capsys, monkeypatch, script, finished
):
    folder = script.train(tmp_path / "run", "checkpoint_every=1", stop_after=3)
    path = next((checkpoint_folders(folder)[3] / "model").glob("*.safetensors"))
    flip_a_bit(path)
    for module in (torch, pickle):
        monkeypatch.setattr(module, "load", Mock(side_effect=AssertionError("unpickled")))
    capsys.readouterr()
    script.train(folder)
    out = capsys.readouterr().out
    assert f"resume: {path} is damaged or missing; trying the previous checkpoint" in out
    assert f"resuming after step {2 if script.key == 'grpo' else 3}" in out  # ES replays its journal
    assert_same_run(folder, finished[script.key])
    for source in ROOT.glob("*.py"):
        forbidden = r"torch\.load|pickle|trust_remote_code=(?!False)|unsafe|(?<![\w.])(eval|exec)\("
        assert not re.search(forbidden, source.read_text()), source

    for path in checkpoint_folders(folder).values():
        (path / "state.json").unlink()
    before = files_of(folder)
    if script.key == "grpo":
        with pytest.raises(UserError, match="resume: .*run/checkpoints has no undamaged checkpoint"):
            script.train(folder)
        assert files_of(folder) == before
    else:
        script.train(folder)
        assert capsys.readouterr().out.count("is damaged or missing; trying the previous checkpoint") >= 2
        assert_same_run(folder, finished[script.key])


@pytest.mark.parametrize("perturbation", ["low_rank", "gaussian"])
def test_journal_replays_the_weights_of_every_step_bit_for_bit(tmp_path, perturbation):
    overrides = [f"perturbation={perturbation}", "antithetic=true", "dtype=bfloat16"]
    folder = SCRIPTS["es"].train(tmp_path / "run", *overrides)
    config, model = load_config(es_train.ESConfig, folder / "config.yml"), load_model(TINY, "bfloat16", "cpu")
    parameters = dict(model.named_parameters())
    master = {name: parameter.detach().float().clone() for name, parameter in parameters.items()}
    shapes = es_train.noise_shapes(parameters, perturbation, config.rank)
    setup = SimpleNamespace(model=model)
    for state in journal(folder):
        es_train.load_progress(None, [state] * bool(state["step"]), setup, master, shapes, config)
        assert fingerprint(master) == state["weights"]
    for name, value in model_weights(folder).items():
        assert torch.equal(master[name].bfloat16(), value) and torch.equal(parameters[name], value), name
    assert len({state["weights"] for state in journal(folder)}) == 5


def copy_of_journal(finished, tmp_path, keeps_checkpoints=False):
    """Copy the ES run and return the path and lines of its journal. Without checkpoints, resuming replays all of it."""
    folder = shutil.copytree(finished["es"], tmp_path / "run")
    shutil.rmtree(folder / "model")  # it would not be overwritten
    if not keeps_checkpoints:
        shutil.rmtree(folder / "checkpoints")
    path = folder / "journal.jsonl"
    return path, path.read_bytes().splitlines(keepends=True)


TORN = [(5, b"", False), (3, b'{"step": 4}', False), (0, b"{", False), (4, b"", True)]


@pytest.mark.parametrize(("num_lines", "torn", "keeps_checkpoints"), TORN)
def test_run_resumes_after_the_last_whole_line_of_the_journal(finished, tmp_path, num_lines, torn, keeps_checkpoints):
    path, lines = copy_of_journal(finished, tmp_path, keeps_checkpoints)
    path.write_bytes(b"".join(lines[:num_lines]) + torn)
    if num_lines == 0:  # then there was no best evaluation yet
        shutil.rmtree(tmp_path / "run" / "best", ignore_errors=True)
    SCRIPTS["es"].train(tmp_path / "run")
    assert_same_run(tmp_path / "run", finished["es"])
    for state, expected in zip(journal(tmp_path / "run"), journal(finished["es"]), strict=True):
        assert state | {"seconds": 0} == expected | {"seconds": 0}


DAMAGED_JOURNALS = {
    "line removed": (2, b"", "is damaged"),
    "not JSON": (2, b'{"step": 2, "rew\n', "is damaged"),
    "other rate": (1, None, "does not restore the weights"),
}


@pytest.mark.parametrize("case", DAMAGED_JOURNALS)
def test_damaged_journal_is_named_and_left_alone(finished, tmp_path, case):
    path, lines = copy_of_journal(finished, tmp_path)
    number, damaged, message = DAMAGED_JOURNALS[case]
    lines[number] = re.sub(rb'("learning_rate": )[^,]+', rb"\g<1>1", lines[number]) if damaged is None else damaged
    path.write_bytes(b"".join(lines))
    with pytest.raises(UserError, match=f"resume: {path} .*{message}") as error:
        SCRIPTS["es"].train(tmp_path / "run")
    assert "\n" not in str(error.value) and path.read_bytes() == b"".join(lines)


# A full disk


SIZES = {"config": 500, "log": 3_000, "model": 100_000, "optimizer": 200_000, "result": 100_000}  # file size limits
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("log", "optimizer", "whole disk")]


@pytest.mark.parametrize("file", ["config", "model", "result", *SLOW])
def test_full_disk_ends_the_run_with_one_line_and_it_resumes_when_there_is_room(
    tmp_path, request, script, finished, file
):
    folder = tmp_path / "run"
    if file == "whole disk":
        folder.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], capture_output=True).returncode:
            pytest.skip("only root may mount a file system")
        request.addfinalizer(lambda: subprocess.run(["umount", "-l", folder], check=True))
    if file == "result":
        shutil.copytree(finished[script.key], folder)
    else:
        script.train(folder, stop_after=1)
    before = files_of(folder / "checkpoints"), files_of(folder / "model")
    if file == "whole disk":
        (folder / "ballast").write_bytes(bytes(os.statvfs(folder).f_bavail * 4096 - 8192))
    process = Process(script, folder, max_file_size=SIZES.get(file))
    assert process.wait() == 1 and "Traceback" not in process.err, process.err
    reason = "No space left on device" if file == "whole disk" else "File too large|os error 27"
    assert re.match(f"error: the disk is full: .*({reason})", process.err.splitlines()[-1])
    assert (files_of(folder / "checkpoints"), files_of(folder / "model")) == before  # no *.partial either
    assert not (folder / "model.partial").exists()
    (folder / "ballast").unlink(missing_ok=True)
    script.train(folder)
    assert_same_run(folder, finished[script.key])


# Kills, a second process, and a second signal


def work_done(script, folder):
    """Return the number of steps that a kill must not lose."""
    if script.key == "es":
        path = folder / "journal.jsonl"
        return max(0, path.read_bytes().count(b"\n") - 1) if path.exists() else 0
    return max(checkpoint_folders(folder), default=0)


@pytest.mark.parametrize("num_kills", [2, pytest.param(int(os.environ.get("KILLS", 30)), marks=pytest.mark.slow)])
def test_run_killed_again_and_again_ends_as_an_uninterrupted_one(tmp_path, script, num_kills):
    """Kill at random moments. Set KILLS=300 in the environment for more kills."""
    rng = random.Random(0)
    overrides = [f"num_steps={num_kills + 8}", "checkpoint_every=3", "eval_every=2"]
    started = time.monotonic()
    process = Process(script, tmp_path / "uninterrupted", *overrides)
    process.wait_until(lambda: checkpoint_folders(tmp_path / "uninterrupted"))
    start_up = time.monotonic() - started
    assert process.wait() == 0, process.err
    training = time.monotonic() - started - start_up
    folder, done = tmp_path / "killed", []
    for _ in range(num_kills):
        before, process = work_done(script, folder), Process(script, folder, *overrides)
        # Kill before anything is written, or a few steps later, so that the kills spread over the run.
        if rng.random() < 0.5:
            process.process.join(rng.uniform(0.0, start_up))
        else:
            while process.process.is_alive() and work_done(script, folder) == before:
                time.sleep(0.001)
            process.process.join(rng.uniform(0.0, 0.05 * training))
        process.process.kill()
        assert process.wait() in (-signal.SIGKILL, 0)  # 1 would be an error
        done.append(work_done(script, folder))
        assert bool(newest_checkpoint(folder)[0]) == bool(checkpoint_folders(folder))  # no kill damages a checkpoint
    assert done == sorted(done) and len(set(done)) > num_kills // 6, done  # no kill loses finished steps
    process = Process(script, folder, *overrides)
    assert process.wait() == 0, process.err
    assert_same_run(folder, tmp_path / "uninterrupted")


def pooled(completions, **columns):
    """Reward function that works in child processes."""
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return pool.map(len, completions)


def processes_of(session):
    stats = [path.read_text().rpartition(")")[2].split() for path in Path("/proc").glob("[0-9]*/stat")]
    return [stat for stat in stats if stat[3] == str(session) and stat[0] not in "ZX"]


def test_killed_run_leaves_no_children_behind_and_a_stopped_one_scores_its_step(tmp_path, script):
    folder = tmp_path / "run"
    overrides = ["rewards={accuracy: 1.0, 'test_resume:pooled': 0.01}", "checkpoint_every=1", "num_steps=9"]
    for number in (signal.SIGKILL, signal.SIGINT):
        before = work_done(script, folder)
        process = Process(script, folder, *overrides, patch=os.setsid, import_path=[ROOT / "tests"])
        session = process.process.pid
        at_work = functools.partial(processes_of, session)
        process.wait_until(lambda done=before, at_work=at_work: work_done(script, folder) > done and len(at_work()) > 1)
        kill = os.kill if number == signal.SIGKILL else os.killpg  # a terminal signals all processes
        kill(session, number)
        assert process.wait() == (-number if number == signal.SIGKILL else 128 + number), process.err
        limit = time.monotonic() + 10
        while at_work() and time.monotonic() < limit:
            time.sleep(0.05)
        assert not at_work()
    step = int(re.search(r"stopped after step (\d+)", process.out)[1])
    assert newest_checkpoint(folder)[1]["step"] == step == len(scalars(folder)["reward/mean"])


def test_second_process_is_refused_and_a_second_signal_ends_the_first_at_once(tmp_path, script):
    (tmp_path / "slow_reward.py").write_text(
        "import time\ncalls = []\ndef f(completions, **columns):\n    calls.append(print('scoring', flush=True))\n"
        "    time.sleep(60 * (len(calls) == 4))\n    return [float(len(text)) for text in completions]\n"
    )
    folder, overrides = tmp_path / "run", ["rewards={'slow_reward:f': 1.0}", "checkpoint_every=1"]
    overrides += ["population_batch=6"] * (script.key == "es")  # one call per step, after one before the run
    process = Process(script, folder, *overrides, import_path=[tmp_path])
    process.wait_until(lambda: process.out.count("scoring") == 4)
    before = files_of(folder)
    with pytest.raises(UserError, match=f"run_name: {folder} is in use by another process"):
        script.train(folder)
    assert files_of(folder) == before
    process.send_signal(signal.SIGTERM)
    process.wait_until(lambda: "stopping after this step" in process.err)
    assert process.process.is_alive()
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == -signal.SIGTERM
    process = Process(script, folder, *overrides, import_path=[tmp_path])  # the lock is gone with its process
    assert process.wait() == 0 and "resuming after step 2" in process.out, process.err


def test_checkpoint_of_either_script_holds_a_model_to_start_from(tmp_path, script, finished):
    for key, folder in finished.items():
        model = checkpoint_folders(folder)[4] / "model"
        overrides = [f"model={model}", f"max_new_tokens={SCRIPTS[key].config(folder).max_new_tokens}"]
        start = script.train(tmp_path / key, *overrides, stop_after=0)
        for name in ("eval/strict_accuracy", "eval/lenient_accuracy"):
            assert scalars(start)[name] == [(0, scalars(folder)[name][-1][1])]
        is_adapter = (checkpoint_folders(start)[0] / "model" / "adapter_config.json").exists()
        assert is_adapter == (script.key == "grpo")  # ES merges the adapter
