"""Stop, resume, damage and full disks, for both scripts: N steps, a stop and M steps are N + M steps."""

import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    FORKSERVER,
    ROOT,
    SCRIPTS,
    TINY,
    Process,
    assert_same_run,
    assert_same_weights,
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

CHECKPOINTING = "gradient_checkpointing=true"
WAYS = {
    "grpo": ("grpo", ["loss_normalization=constant", "scale_advantages=batch"]),
    "grpo-kl-two-updates": ("grpo", ["kl_weight=0.1", "updates_per_step=2", CHECKPOINTING, "scale_advantages=none"]),
    "grpo-bf16": ("grpo", ["dtype=bfloat16", "weight_decay=0.1", "loss_normalization=sequence"]),
    "grpo-full-bf16": ("grpo", ["lora=null", "dtype=bfloat16", "kl_weight=0.1", "learning_rate=1e-4"]),
    "es": ("es", ["population_size=5"]),
    "es-antithetic-decay": ("es", ["antithetic=true", "noise_schedule=linear", "lr_schedule=cosine"]),
    "es-gaussian-bf16": ("es", ["perturbation=gaussian", "dtype=bfloat16"]),
}


def journal(folder):
    """The state after every step, from step 0 on."""
    return [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("way", WAYS)
def test_resumed_run_is_bit_identical_to_an_uninterrupted_one(tmp_path, capsys, way):
    name, overrides = WAYS[way]
    script = SCRIPTS[name]
    whole, parts = script.train(tmp_path / "whole", *overrides), tmp_path / "parts"
    for steps in (1, 2):
        script.train(parts, *overrides, stop_after=steps)
        assert f"stopped after step {2 * steps - 1}; to resume:" in capsys.readouterr().out
        assert not (parts / "model").exists()
    script.train(parts, *overrides)
    assert "resuming after step 3" in capsys.readouterr().out
    assert_same_run(parts, whole)

    # Each way of training does what its keys say.
    curves, weights = scalars(whole), model_weights(whole)
    assert all(math.isfinite(value) for points in curves.values() for _, value in points)
    base = AutoModelForCausalLM.from_pretrained(TINY).state_dict()
    if weights.keys() == base.keys():
        assert all(not torch.equal(weight, base[name]) for name, weight in weights.items())
    if name == "grpo":  # what is trained is fp32: bf16 would round most updates away
        assert {weight.dtype for weight in weights.values()} == {torch.float32}
        if "updates_per_step=2" not in overrides and "dtype=bfloat16" not in overrides:
            assert {v for tag in ("ratio_min", "ratio_max") for _, v in curves[f"policy/{tag}"]} == {1.0}
            assert curves["policy/sampler_gap_max"][0][1] < 1e-3
        if "kl_weight=0.1" in overrides:
            assert curves["policy/kl_k3"][0][1] == 0 or "updates_per_step=2" in overrides
            assert curves["policy/kl_k3"][1][1] > 0
    else:
        if "noise_schedule=linear" in overrides:
            assert [v for _, v in curves["es/noise_scale"]] == pytest.approx([0.03, 0.0225, 0.015, 0.0075])
            expected = [6e-3 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
            assert [v for _, v in curves["optim/learning_rate"]] == pytest.approx(expected)
        for step, state in enumerate(journal(whole)[1:], start=1):
            assert state["step"] == step and len(state["rewards"]) == script.config(whole, *overrides).population_size
            assert dict(curves["es/reward_max"])[step] == pytest.approx(max(state["rewards"]))
            assert sum(state["z"]) == pytest.approx(0, abs=1e-9)


def test_run_from_an_adapter_resumes_with_its_reference(tmp_path, finished, capsys):
    script, first = SCRIPTS["grpo"], finished["grpo"]
    overrides = ["kl_weight=0.1", "learning_rate=0.01", f"model={first / 'model'}"]
    whole = script.train(tmp_path / "whole", *overrides)
    script.train(tmp_path / "parts", *overrides, stop_after=2)
    script.train(tmp_path / "parts", *overrides)
    assert_same_run(tmp_path / "parts", whole)
    # The frozen second copy of the adapter, from which the KL is measured, is neither counted nor saved.
    assert capsys.readouterr().out.count(", 835,712 parameters, 38,912 trained\n") == 3
    assert model_weights(whole).keys() == model_weights(first).keys()
    curves, before = scalars(whole), scalars(first)
    assert curves["policy/kl_k3"][0][1] == 0 < curves["policy/kl_k3"][1][1]
    assert curves["eval/strict_accuracy"][0][1] == before["eval/strict_accuracy"][-1][1]


def test_reward_functions_draw_the_same_random_numbers_after_resuming(tmp_path, monkeypatch, script):
    (tmp_path / "drawing_reward.py").write_text(
        "import random, numpy, torch\n"
        "def f(completions, **columns):\n"
        "    return [random.random() + numpy.random.rand() + float(torch.rand(())) for _ in completions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    overrides = ["rewards={'drawing_reward:f': 1.0}"]
    whole = script.train(tmp_path / "whole", *overrides)
    script.train(tmp_path / "parts", *overrides, stop_after=0)
    random.seed(0), torch.manual_seed(0)
    script.train(tmp_path / "parts", *overrides)
    assert_same_run(tmp_path / "parts", whole)
    values = [value for _, value in scalars(whole)["reward/mean"]]
    assert len(set(values)) == len(values)  # another step draws other numbers


@pytest.mark.parametrize("moment", [pytest.param(m, marks=[] if m in (3, 5) else pytest.mark.slow) for m in range(9)])
def test_run_that_dies_between_logging_and_saving_logs_no_step_twice(tmp_path, monkeypatch, script, finished, moment):
    """Die in the moment-th call that writes something lasting."""
    calls = []

    def dies(function):
        def wrapper(*args, **kwargs):
            calls.append(function.__name__)
            if len(calls) > moment:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return wrapper

    for owner, name in [(runs, "save_checkpoint"), (runs, "write_file"), (runs.Run, "_write_scalars")]:
        monkeypatch.setattr(owner, name, dies(getattr(owner, name)))
    monkeypatch.setattr(runs.Run, "_commit", dies(runs.Run._commit))
    with pytest.raises(KeyboardInterrupt):
        script.train(tmp_path / "run")
    monkeypatch.undo()
    script.train(tmp_path / "run")
    assert_same_run(tmp_path / "run", finished[script.key])


def test_accuracy_by_tokens_of_lost_steps_is_purged(tmp_path, script):
    size = "group_size" if script.key == "grpo" else "population_size"
    overrides = [f"{size}=24", "eval_every=1", f"{script.num_steps}=3", "lr_schedule=constant"]
    folder = script.train(tmp_path / "run", *overrides)
    uninterrupted = scalars(folder / "by_tokens")
    shutil.rmtree(folder / "checkpoints" / "step_000003")
    if script.key == "es":
        path = folder / "journal.jsonl"
        path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    script.train(folder, *overrides)
    by_tokens = scalars(folder / "by_tokens")
    assert by_tokens == uninterrupted and len({step for step, _ in by_tokens["by_tokens/strict_accuracy"]}) == 4


def test_finished_run_is_left_alone_and_a_constant_rate_extends_it(tmp_path, script):
    constant, longer = ["lr_schedule=constant"], f"{script.num_steps}=5"
    folder = script.train(tmp_path / "run", *constant)
    before = files_of(folder / "checkpoints")
    script.train(folder, *constant)
    assert files_of(folder / "checkpoints") == before
    assert [step for step, _ in scalars(folder)["reward/mean"]] == [1, 2, 3, 4]
    script.train(folder, *constant, longer)
    # How often a run is evaluated and saved may change, and changes no weight.
    script.train(tmp_path / "at once", *constant, longer, "eval_every=5", "checkpoint_every=1", "keep_checkpoints=3")
    assert_same_weights(folder, tmp_path / "at once")
    assert sorted(os.listdir(tmp_path / "at once" / "checkpoints")) == [f"step_00000{n}" for n in (3, 4, 5)]


def test_run_may_be_shortened_to_where_it_was_stopped(tmp_path, capsys):
    script = SCRIPTS["es"]
    folder = script.train(tmp_path / "run", "eval_every=4", stop_after=3)
    script.train(folder, "num_iterations=3", "eval_every=4")
    assert "step    3  held-out" in capsys.readouterr().out
    assert (folder / "model").is_dir()


# Refused


def test_resuming_with_another_config_model_or_dataset_names_the_key(tmp_path, script):
    lines = [json.dumps({"prompt": f"Compute {i}+{i}", "answer": str(2 * i)}) for i in range(30)]
    file = tmp_path / "problems.jsonl"
    file.write_text("\n".join(lines))
    overrides = ["lr_schedule=linear", f"dataset={file}", "eval_size=2"]
    folder = script.train(tmp_path / "run", *overrides, stop_after=2)
    for name in ("moved", "other"):
        shutil.copytree(TINY, tmp_path / name)
    model = AutoModelForCausalLM.from_pretrained(TINY)
    model.model.norm.weight.data[0] += 1e-3
    model.save_pretrained(tmp_path / "other")
    before = files_of(folder)
    for override, message in {
        "seed=1": "seed: 1, but that run was started with 0; another run needs another run_name",
        "learning_rate=0.5": "learning_rate: 0.5, but that run was started with",
        "rewards={accuracy: 1.0}": "rewards: {'accuracy': 1.0}, but that run was started with",
        "dtype=bfloat16": "dtype: 'bfloat16', but that run was started with 'float32'",
        f"{script.num_steps}=9": f"{script.num_steps}: 9, but that run was started with 4",  # its schedule ends there
        "resume=never": "exists already; choose another name or delete it",
        f"model={tmp_path / 'other'}": "starting weights: '",
        "device=cpu": "problems: '",  # of a file that has changed
    }.items():
        changed = "\n".join(lines).replace('"56"', '"57"') if override == "device=cpu" else "\n".join(lines)
        file.write_text(changed)
        with pytest.raises(UserError) as error:
            script.train(folder, *overrides, override)
        assert message in str(error.value) and files_of(folder) == before
    file.write_text("\n".join(lines))
    script.train(folder, *overrides, f"model={tmp_path / 'moved'}", "eval_every=1")
    assert_same_weights(folder, script.train(tmp_path / "uninterrupted", *overrides))


def test_fewer_steps_than_were_done_are_refused(tmp_path, script):
    folder = script.train(tmp_path / "run", "lr_schedule=constant", stop_after=3)
    before = files_of(folder)
    with pytest.raises(UserError, match="resume: .*: 3 steps are done, more than the 2 to do"):
        script.train(folder, "lr_schedule=constant", f"{script.num_steps}=2")
    assert files_of(folder) == before


def test_folder_of_the_other_script_is_refused(tmp_path, script, finished):
    other = {"grpo": "es", "es": "grpo"}[script.key]
    folder = shutil.copytree(finished[other], tmp_path / "run")
    for is_young in (False, True):
        if is_young:
            shutil.rmtree(folder / "checkpoints")
        before = files_of(folder)
        with pytest.raises(UserError, match="resume: .*run: script: '.*', but that run was started with '"):
            script.train(folder)
        assert files_of(folder) == before


def test_checkpoint_of_another_run_is_refused(tmp_path):
    script = SCRIPTS["es"]
    for seed in (0, 1):
        script.train(tmp_path / f"seed{seed}", f"seed={seed}", stop_after=2)
    ours = checkpoint_folders(tmp_path / "seed0")[2]
    shutil.rmtree(ours)
    shutil.copytree(checkpoint_folders(tmp_path / "seed1")[2], ours)
    with pytest.raises(UserError, match="step_000002 does not give the weights"):
        script.train(tmp_path / "seed0", "seed=0")


# Damage


def test_run_without_a_checkpoint_starts_anew(tmp_path, capsys, finished):
    folder = SCRIPTS["grpo"].train(tmp_path / "run", stop_after=1)
    shutil.rmtree(folder / "checkpoints")
    SCRIPTS["grpo"].train(folder)
    assert "nothing was saved yet: starting from step 0" in capsys.readouterr().out
    assert_same_run(folder, finished["grpo"])


def test_run_resumes_from_the_checkpoint_before_a_damaged_one_and_unpickles_nothing(
    tmp_path, capsys, monkeypatch, script, finished
):
    script.train(tmp_path / "run", "checkpoint_every=1", stop_after=3)
    path = next((checkpoint_folders(tmp_path / "run")[3] / "model").glob("*.safetensors"))
    flip_a_bit(path)

    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(pickle, "load", refuse)
    capsys.readouterr()
    script.train(tmp_path / "run")
    out = capsys.readouterr().out
    assert f"resume: {path} is damaged or missing: trying the checkpoint before it" in out
    assert f"resuming after step {2 if script.key == 'grpo' else 3}" in out  # ES has its journal
    assert_same_run(tmp_path / "run", finished[script.key])
    for source in ROOT.glob("*.py"):
        forbidden = r"torch\.load|pickle|trust_remote_code|unsafe|(?<![\w.])(eval|exec)\("
        assert not re.search(forbidden, source.read_text()), source


def test_without_an_undamaged_checkpoint_grpo_stops_and_es_replays_its_journal(tmp_path, capsys, finished):
    for name, script in SCRIPTS.items():
        folder = script.train(tmp_path / name, stop_after=3)
        for path in checkpoint_folders(folder).values():
            (path / "state.json").unlink()
        before = files_of(folder)
        if name == "grpo":
            with pytest.raises(UserError, match="resume: .*grpo/checkpoints: there is no undamaged checkpoint"):
                script.train(folder)
            assert files_of(folder) == before
        else:
            script.train(folder)
            assert capsys.readouterr().out.count("is damaged or missing: trying the checkpoint before it") >= 2
            assert_same_run(folder, finished[name])


@pytest.mark.parametrize("perturbation", ["low_rank", "gaussian"])
def test_journal_replays_the_weights_of_every_step_bit_for_bit(tmp_path, perturbation):
    overrides = [f"perturbation={perturbation}", "antithetic=true", "dtype=bfloat16"]
    folder = SCRIPTS["es"].train(tmp_path / "run", *overrides)
    config, model = load_config(es_train.ESConfig, folder / "config.yml"), load_model(TINY, "bfloat16", "cpu")
    parameters = dict(model.named_parameters())
    master = {name: parameter.detach().float().clone() for name, parameter in parameters.items()}
    shapes = es_train.noise_shapes(parameters, perturbation, config.rank)
    for state in journal(folder):
        es_train.load_progress(
            None, [state] * bool(state["step"]), SimpleNamespace(model=model), master, shapes, config
        )
        assert fingerprint(master) == state["weights"]
    for name, value in model_weights(folder).items():
        assert torch.equal(master[name].bfloat16(), value) and torch.equal(parameters[name], value), name
    assert len({state["weights"] for state in journal(folder)}) == 5


def copy_without_checkpoints(finished, tmp_path):
    """The journal of a copy of the ES run, of which all is replayed."""
    shutil.copytree(finished["es"], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    return tmp_path / "run" / "journal.jsonl"


TORN = [(5, b""), (3, b'{"step": 4, "rewa'), (1, b'{"step": 4}'), (0, b"{"), (0, b"")]


@pytest.mark.parametrize(("num_lines", "torn"), TORN)
def test_run_resumes_after_the_last_whole_line_of_the_journal(finished, tmp_path, num_lines, torn):
    path = copy_without_checkpoints(finished, tmp_path)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:num_lines]) + torn)
    SCRIPTS["es"].train(tmp_path / "run")
    assert_same_run(tmp_path / "run", finished["es"])
    for state, expected in zip(journal(tmp_path / "run"), journal(finished["es"]), strict=True):
        assert state | {"seconds": 0} == expected | {"seconds": 0}


def test_journal_shorter_than_a_checkpoint_is_resumed_from_the_journal(tmp_path, finished):
    folder = shutil.copytree(finished["es"], tmp_path / "run")
    path = folder / "journal.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))  # checkpoint 4, but journal to 3
    SCRIPTS["es"].train(folder)
    assert_same_run(folder, finished["es"])


def edit_line(number, change):
    def edit(lines):
        line = json.loads(lines[number])
        change(line)
        return lines[:number] + [json.dumps(line).encode() + b"\n"] + lines[number + 1 :]

    return edit


DAMAGED_JOURNALS = {
    "line removed": (lambda lines: lines[:2] + lines[3:], "does not give the weights"),
    "line twice": (lambda lines: lines[:2] + lines[1:], "does not give the weights"),
    "not JSON": (lambda lines: lines[:2] + [b'{"step": 2, "rew\n'] + lines[3:], "is damaged"),
    "not text": (lambda lines: [b"\xff\x00\n"] + lines[1:], "is damaged"),
    "other z": (edit_line(2, lambda line: line["z"].reverse()), "does not give the weights"),
    "other rate": (edit_line(1, lambda line: line.update(learning_rate=1)), "does not give the weights"),
}


@pytest.mark.parametrize("case", DAMAGED_JOURNALS)
def test_damaged_journal_is_named_and_left_alone(finished, tmp_path, case):
    path = copy_without_checkpoints(finished, tmp_path)
    edit, message = DAMAGED_JOURNALS[case]
    path.write_bytes(b"".join(edit(path.read_bytes().splitlines(keepends=True))))
    before = path.read_bytes()
    with pytest.raises(UserError, match=f"resume: {path} .*{message}") as error:
        SCRIPTS["es"].train(tmp_path / "run")
    assert "\n" not in str(error.value) and path.read_bytes() == before


# A full disk


SIZES = {"config": 500, "log": 3_000, "model": 100_000, "optimizer": 200_000}  # the file for which there is no room


@pytest.mark.parametrize("file", ["config", pytest.param("log", marks=pytest.mark.slow), "model", "optimizer"])
def test_full_disk_ends_the_run_with_one_line_and_it_resumes_when_there_is_room(tmp_path, script, finished, file):
    folder = script.train(tmp_path / "run", stop_after=1)
    before = files_of(folder / "checkpoints")
    process = Process(script, folder, max_file_size=SIZES[file])
    assert process.wait() == 1 and "Traceback" not in process.err, process.err
    assert process.err.splitlines()[-1].startswith("error: the disk is full: ")
    assert files_of(folder / "checkpoints") == before
    assert not list((folder / "checkpoints").glob("*.partial"))
    script.train(folder)
    assert_same_run(folder, finished[script.key])


def test_line_of_the_journal_that_a_full_disk_cut_off_is_written_again(tmp_path, finished):
    script = SCRIPTS["es"]
    folder = script.train(tmp_path / "run", stop_after=1)
    path = folder / "journal.jsonl"
    first, *lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([first.rstrip() + " " * 2**22 + "\n", *lines]))  # the largest file
    process = Process(script, folder, max_file_size=path.stat().st_size + 100)
    assert process.wait() == 1 and process.err.splitlines()[-1].startswith("error: the disk is full: ")
    assert not path.read_bytes().endswith(b"\n")
    script.train(folder)
    assert_same_run(folder, finished["es"])
    assert len(journal(folder)) == 5


def test_result_that_cannot_be_saved_is_an_error_and_the_old_one_stays(tmp_path, script, finished):
    folder = shutil.copytree(finished[script.key], tmp_path / "run")
    before = files_of(folder / "model")
    process = Process(script, folder, max_file_size=100_000)
    assert process.wait() == 1 and process.err.splitlines()[-1].startswith("error: the disk is full: ")
    assert files_of(folder / "model") == before and not (folder / "model.partial").exists()


@pytest.mark.slow
def test_run_on_a_disk_that_fills_up_ends_with_one_line_and_resumes_when_there_is_room(tmp_path, script, finished):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("only root may mount a file system")
    try:
        folder = tmp_path / "run"
        (disk / "run").mkdir()
        folder.symlink_to(disk / "run")
        script.train(folder, "checkpoint_every=1", stop_after=1)
        (disk / "ballast").write_bytes(bytes(os.statvfs(disk).f_bavail * 4096 - 8192))
        process = Process(script, folder, "checkpoint_every=1")
        assert process.wait() == 1 and "Traceback" not in process.err, process.err
        assert re.match("error: the disk is full: .*No space left on device", process.err.splitlines()[-1])
        assert newest_checkpoint(folder)[0].name == "step_000001" and last_step(folder) == 1
        assert not list((folder / "checkpoints").glob("*.partial"))
        (disk / "ballast").unlink()
        script.train(folder)
        assert_same_weights(folder, finished[script.key])
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


# SIGKILL at random moments


def work_done(script, folder):
    """Steps that no kill may take away."""
    if script.key == "es":
        path = folder / "journal.jsonl"
        return max(0, path.read_bytes().count(b"\n") - 1) if path.exists() else 0
    return last_step(folder)


@pytest.mark.parametrize("num_kills", [3, pytest.param(int(os.environ.get("KILLS", 30)), marks=pytest.mark.slow)])
def test_run_killed_again_and_again_ends_as_an_uninterrupted_one(tmp_path, script, num_kills):
    """KILLS=300 in the environment kills more often."""
    rng = random.Random(0)
    overrides = [f"{script.num_steps}={num_kills + 8}", "checkpoint_every=3", "eval_every=3"]
    started = time.monotonic()
    process = Process(script, tmp_path / "uninterrupted", *overrides)
    process.wait_until(lambda: checkpoint_folders(tmp_path / "uninterrupted"))
    start_up = time.monotonic() - started
    assert process.wait() == 0, process.err
    training = time.monotonic() - started - start_up

    folder, done = tmp_path / "killed", []
    for _ in range(num_kills):
        before, process = work_done(script, folder), Process(script, folder, *overrides)
        # Before anything is written, or some steps further on, so that the kills spread over the run.
        if rng.random() < 0.5:
            process.process.join(rng.uniform(0.0, start_up))
        else:
            while process.process.is_alive() and work_done(script, folder) == before:
                time.sleep(0.001)
            process.process.join(rng.uniform(0.0, 0.05 * training))
        process.process.kill()
        assert process.wait() in (-signal.SIGKILL, 0)  # an error would be 1: every run started, or was killed before
        done.append(work_done(script, folder))
        found = newest_checkpoint(folder) if folder.exists() else None
        assert bool(found) == bool(checkpoint_folders(folder))  # no kill damages a checkpoint
    assert done == sorted(done) and len(set(done)) > num_kills // 6, done  # what was done is never lost
    process = Process(script, folder, *overrides)
    assert process.wait() == 0, process.err
    assert_same_run(folder, tmp_path / "uninterrupted")


# Two processes and one folder


def hold_the_lock(config, locked):
    kept = runs.open_folder(config)
    locked.set()
    time.sleep(300)
    del kept


def test_second_process_in_the_same_folder_is_refused(tmp_path, script):
    folder, locked = script.train(tmp_path / "run", stop_after=1), FORKSERVER.Event()
    holder = FORKSERVER.Process(target=hold_the_lock, args=(script.config(folder), locked))
    holder.start()
    assert locked.wait(60)
    before = files_of(folder)
    with pytest.raises(UserError, match=f"run_name: {folder} is being written by another process"):
        script.train(folder)
    assert files_of(folder) == before
    holder.kill()
    holder.join()
    script.train(folder)  # the lock has died with its process


def test_checkpoint_of_either_script_holds_a_model_to_start_from(tmp_path, script, finished):
    for key, folder in finished.items():
        model = checkpoint_folders(folder)[4] / "model"
        overrides = [f"model={model}", f"max_new_tokens={SCRIPTS[key].config(folder).max_new_tokens}"]
        start = script.train(tmp_path / key, *overrides, stop_after=0)
        for name in ("eval/strict_accuracy", "eval/lenient_accuracy"):
            assert scalars(start)[name] == [(0, scalars(folder)[name][-1][1])]
        is_adapter = (checkpoint_folders(start)[0] / "model" / "adapter_config.json").exists()
        assert is_adapter == (script.key == "grpo")  # ES merges an adapter
