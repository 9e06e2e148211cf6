"""Checkpoints, resuming, damage and full disks, for both scripts: N steps, a stop, M steps are N + M steps."""

import contextlib
import hashlib
import itertools
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import ROOT, SCRIPTS, TINY, assert_same_run, run_script, scalars
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import utils
from utils import (
    AppendedFile,
    checkpoint_folders,
    newest_checkpoint,
    read_state,
    run_folder,
    save_checkpoint,
    seal,
    whole_folder,
)

WAYS = {
    "grpo": ("grpo", []),
    "grpo-kl-two-updates": ("grpo", ["kl_weight=0.1", "updates_per_step=2", "gradient_checkpointing=true"]),
    "grpo-bf16": ("grpo", ["dtype=bfloat16", "weight_decay=0.1"]),
    "grpo-full": ("grpo", ["lora=null", "kl_weight=0.1", "lr_schedule=cosine", "learning_rate=1e-4"]),
    "es": ("es", ["population_size=5"]),
    "es-antithetic-decay": ("es", ["antithetic=true", "noise_schedule=linear", "lr_schedule=cosine"]),
    "es-gaussian-bf16": ("es", ["perturbation=gaussian", "dtype=bfloat16"]),
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run of each script, never stopped."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return {name: script.train(folder / name) for name, script in SCRIPTS.items()}


def name_of(script):
    return script.name.removesuffix("_train")


def last_step(folder):
    return max(checkpoint_folders(folder), default=None)


# N + M


@pytest.mark.parametrize("way", WAYS)
def test_stopped_and_resumed_run_is_the_undisturbed_one_bit_for_bit(tmp_path, capsys, way):
    name, overrides = WAYS[way]
    script = SCRIPTS[name]
    whole = script.train(tmp_path / "whole", *overrides)
    parts = tmp_path / "parts"
    for steps in (1, 2):
        script.train(parts, *overrides, stop_after=steps)
        out = capsys.readouterr().out
        assert f"stopped after {'step' if name == 'grpo' else 'iteration'} {2 * steps - 1}; to go on:" in out
        assert not (parts / "model").exists()
    script.train(parts, *overrides)
    assert f"going on after {'step' if name == 'grpo' else 'iteration'} 3" in capsys.readouterr().out
    assert_same_run(parts, whole)


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_run_may_be_stopped_before_any_step(tmp_path, script, undisturbed, steps):
    script.train(tmp_path / "run", stop_after=steps)
    assert last_step(tmp_path / "run") == steps
    script.train(tmp_path / "run")
    assert_same_run(tmp_path / "run", undisturbed[name_of(script)])


def test_run_from_an_adapter_resumes_with_its_reference(tmp_path):
    script, overrides = SCRIPTS["grpo"], ["kl_weight=0.1", "learning_rate=0.01"]
    first = script.train(tmp_path / "first", *overrides)
    overrides.append(f"model={first / 'model'}")
    whole = script.train(tmp_path / "whole", *overrides)
    script.train(tmp_path / "parts", *overrides, stop_after=2)
    script.train(tmp_path / "parts", *overrides)
    assert_same_run(tmp_path / "parts", whole)


def test_random_numbers_of_reward_functions_are_the_same_after_resuming(tmp_path, monkeypatch, script):
    (tmp_path / "drawing_reward.py").write_text(
        "import random, numpy, torch\n"
        "def f(completions, **columns):\n"
        "    return [random.random() + numpy.random.rand() + float(torch.rand(())) for _ in completions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    overrides = ["rewards={'drawing_reward:f': 1.0}"]
    whole = script.train(tmp_path / "whole", *overrides)
    script.train(tmp_path / "parts", *overrides, stop_after=3)
    random.seed(0), torch.manual_seed(0)
    script.train(tmp_path / "parts", *overrides)
    assert_same_run(tmp_path / "parts", whole)
    values = [value for _, value in scalars(whole)["reward/mean"]]
    assert len(set(values)) == len(values)  # another step draws other numbers


@pytest.mark.parametrize("moment", range(8))
def test_run_that_dies_between_logging_and_saving_logs_no_step_twice(
    tmp_path, monkeypatch, script, undisturbed, moment
):
    """Dies in the moment-th call of those that write something that lasts."""
    calls = []

    def dies(function):
        def wrapper(*args, **kwargs):
            calls.append(function.__name__)
            if len(calls) > moment:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return wrapper

    monkeypatch.setattr(script.module, "save_checkpoint", dies(utils.save_checkpoint))
    monkeypatch.setattr(script.module, "write_file", dies(utils.write_file))
    monkeypatch.setattr(utils.Logger, "scalars", dies(utils.Logger.scalars))
    with pytest.raises(KeyboardInterrupt):
        script.train(tmp_path / "run")
    monkeypatch.undo()
    script.train(tmp_path / "run")
    assert_same_run(tmp_path / "run", undisturbed[name_of(script)])


def test_accuracy_by_tokens_of_steps_that_were_lost_is_void(tmp_path, script):
    size = "group_size" if script is SCRIPTS["grpo"] else "population_size"
    folder = script.train(tmp_path / "run", f"{size}=100", "eval_every=1")
    undisturbed = scalars(folder / "by_tokens")
    shutil.rmtree(folder / "checkpoints" / "step_000004")
    if script is SCRIPTS["es"]:
        path = folder / "journal.jsonl"
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    script.train(folder, f"{size}=100", "eval_every=1")
    by_tokens = scalars(folder / "by_tokens")
    assert by_tokens == undisturbed and len({step for step, _ in by_tokens["by_tokens/strict_accuracy"]}) == 5


def test_saved_config_resumes_the_run_from_the_command_line(tmp_path, script, undisturbed):
    script.train(tmp_path / "run", stop_after=3)
    done = run_script(["--config", str(tmp_path / "run" / "config.yml")], script=f"{script.name}.py")
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "run", undisturbed[name_of(script)])


def test_finished_run_is_left_as_it_is_and_a_constant_rate_makes_it_longer(tmp_path, script):
    constant, longer = ["lr_schedule=constant"], f"{script.num_steps}=5"
    script.train(tmp_path / "run", *constant)
    script.train(tmp_path / "run", *constant)
    assert [step for step, _ in scalars(tmp_path / "run")["reward/mean"]] == [1, 2, 3, 4]
    script.train(tmp_path / "run", *constant, longer)
    script.train(tmp_path / "at once", *constant, longer, "eval_every=1", "checkpoint_every=1")
    weights = [load_file(next((tmp_path / name / "model").glob("*.safetensors"))) for name in ("run", "at once")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_resuming_with_another_config_names_the_key(tmp_path, script):
    script.train(tmp_path / "run", "lr_schedule=linear", stop_after=2)
    for override, message in {
        "seed=1": "seed: 1, but that run was started with 0; another run needs another run_name",
        "learning_rate=0.5": "learning_rate: 0.5, but that run was started with",
        "rewards={accuracy: 1.0}": "rewards: {'accuracy': 1.0}, but that run was started with",
        "dtype=bfloat16": "dtype: 'bfloat16', but that run was started with 'float32'",
        f"{script.num_steps}=9": f"{script.num_steps}: 9, but that run was started with 4",
        "resume=never": "exists already; choose another name or delete it",
    }.items():
        AcceleratorState._reset_state(reset_partial_state=True)  # as in a process of its own
        with pytest.raises(ValueError) as error:
            script.train(tmp_path / "run", "lr_schedule=linear", override)
        assert message in str(error.value)


def test_resuming_with_fewer_steps_than_were_done_is_refused_and_leaves_the_config(tmp_path, script):
    folder = script.train(tmp_path / "run", "lr_schedule=constant", stop_after=3)
    before = files_of(folder)
    with pytest.raises(ValueError, match=f"{script.num_steps}: 2, expected at least the 3 done"):
        script.train(folder, "lr_schedule=constant", f"{script.num_steps}=2")
    assert files_of(folder) == before


def test_resuming_with_other_problems_is_refused(tmp_path, script):
    lines = [json.dumps({"prompt": f"Compute {i}+{i}", "answer": str(2 * i)}) for i in range(30)]
    file = tmp_path / "problems.jsonl"
    file.write_text("\n".join(lines))
    overrides = [f"dataset={file}", "eval_size=2"]
    folder = script.train(tmp_path / "run", *overrides, stop_after=1)
    file.write_text("\n".join(lines).replace('"56"', '"57"'))
    with pytest.raises(ValueError, match=r"resume: .*: problems: '\w{8}', but that run was started with '"):
        script.train(folder, *overrides)
    file.write_text("\n".join(lines))
    script.train(folder, *overrides)


def test_run_without_a_checkpoint_starts_anew_and_says_so(tmp_path, capsys, undisturbed):
    folder = SCRIPTS["grpo"].train(tmp_path / "run", stop_after=1)
    shutil.rmtree(folder / "checkpoints")
    SCRIPTS["grpo"].train(folder)
    assert f"resume: {folder} has no checkpoint: starting from step 0" in capsys.readouterr().out
    assert_same_run(folder, undisturbed["grpo"])


def test_checkpoint_that_a_process_cannot_see_is_named(tmp_path):
    for load in (
        lambda: SCRIPTS["grpo"].module.load_progress(tmp_path / "elsewhere", None, None, {}),
        lambda: SCRIPTS["es"].module.load_master(tmp_path / "elsewhere", {}),
    ):
        with pytest.raises(ValueError, match="resume: .*elsewhere', expected a folder that all processes can see"):
            load()


def test_master_from_a_checkpoint_takes_no_part_in_gradients(tmp_path, undisturbed):
    path, _ = newest_checkpoint(undisturbed["es"])
    master = {name: torch.zeros_like(p) for name, p in AutoModelForCausalLM.from_pretrained(TINY).named_parameters()}
    master = {name: weight.detach() for name, weight in master.items()}
    SCRIPTS["es"].module.load_master(path / "model", master)
    assert all(weight.any() and not weight.requires_grad for weight in master.values())


def test_young_run_of_the_other_script_is_refused(tmp_path):
    folder = SCRIPTS["es"].train(tmp_path / "run", stop_after=1)
    shutil.rmtree(folder / "checkpoints")
    before = files_of(folder)
    with pytest.raises(
        ValueError, match="resume: .*run', expected a run of grpo_train.py; this one has a journal.jsonl"
    ):
        SCRIPTS["grpo"].train(folder)
    assert files_of(folder) == before


def test_folder_of_the_other_script_is_refused(tmp_path, undisturbed):
    for name, other in (("grpo", "es"), ("es", "grpo")):
        shutil.copytree(undisturbed[other], tmp_path / other)
        before = files_of(tmp_path / other)
        with pytest.raises(ValueError, match="resume: |run_name: "):
            SCRIPTS[name].train(tmp_path / other)
        assert {k: v for k, v in files_of(tmp_path / other).items() if k != "lock"} == {
            k: v for k, v in before.items() if k != "lock"
        }


def test_resuming_with_another_model_is_refused_and_a_moved_one_is_not(tmp_path, script, undisturbed):
    script.train(tmp_path / "run", stop_after=2)
    shutil.copytree(TINY, tmp_path / "moved")
    other = AutoModelForCausalLM.from_pretrained(TINY)
    other.model.norm.weight.data[0] += 1e-3
    shutil.copytree(TINY, tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"resume: .*: starting weights: '\w{8}', but that run was started with '"):
        script.train(tmp_path / "run", f"model={tmp_path / 'other'}")
    script.train(tmp_path / "run", f"model={tmp_path / 'moved'}")
    weights = [
        load_file(next((f / "model").glob("*.safetensors"))) for f in (tmp_path / "run", undisturbed[name_of(script)])
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_checkpoint_holds_a_model_to_start_another_run_from(tmp_path, script, undisturbed):
    path, _ = newest_checkpoint(undisturbed[name_of(script)], 2)
    script.train(tmp_path / "run", f"model={path / 'model'}")
    before = dict(scalars(undisturbed[name_of(script)])["eval/lenient_accuracy"])
    assert scalars(tmp_path / "run")["eval/lenient_accuracy"][0] == (0, before[2])


# Checkpoint folders


def files_of(path):
    return {
        str(f.relative_to(path)): hashlib.sha256(f.read_bytes()).hexdigest() for f in path.rglob("*") if f.is_file()
    }


def test_newest_checkpoints_stay_and_nothing_half_done(tmp_path, script):
    script.train(tmp_path / "run", "checkpoint_every=1", "keep_checkpoints=3")
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "step_000002",
        "step_000003",
        "step_000004",
    ]


def save_small(folder, step, keep=2):
    def write(path):
        (path / "model").mkdir()
        (path / "model" / "weights").write_bytes(bytes([step]) * 100)

    return save_checkpoint(folder, step, {"step": step}, keep, write)


@pytest.mark.parametrize("call", ["fsync", "replace", "rmtree"])
def test_at_whatever_call_a_process_dies_the_newest_checkpoint_is_whole(tmp_path, monkeypatch, call):
    """Each call in turn is the last: before it, and for rmtree in the middle of it."""
    survived = 0
    for last in range(100):
        folder = tmp_path / str(last)
        save_small(folder, 1), save_small(folder, 2)
        honest, calls = getattr(shutil if call == "rmtree" else os, call), []

        def dies(*args, honest=honest, calls=calls, last=last, **kwargs):
            if len(calls) == last:
                if call == "rmtree" and Path(args[0]).exists():
                    next(file for file in Path(args[0]).rglob("*") if file.is_file()).unlink()
                raise KeyboardInterrupt
            calls.append(args)
            return honest(*args, **kwargs)

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(shutil if call == "rmtree" else os, call, dies)
            save_small(folder, 3)
            survived = last
        path, state = newest_checkpoint(folder, 100)
        assert state["step"] in (2, 3) and read_state(path) == state
        assert all(read_state(path) for path in checkpoint_folders(folder).values())
        save_small(folder, 4)
        assert sorted(path.name for path in (folder / "checkpoints").iterdir())[-1] == "step_000004"
        assert not list((folder / "checkpoints").glob("*.partial"))
        if survived:
            break
    assert survived >= 2, survived


def test_whole_checkpoint_is_not_written_again_and_what_a_kill_left_is_no_hindrance(tmp_path):
    save_small(tmp_path, 1)
    before = (tmp_path / "checkpoints" / "step_000001").stat().st_ino
    save_small(tmp_path, 1)
    assert (tmp_path / "checkpoints" / "step_000001").stat().st_ino == before
    for name in ("step_000001.partial", "step_000001.old.partial", "step_000003.partial"):
        (tmp_path / "checkpoints" / name / "model").mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "model" / "half").touch()
    for step in (2, 3):
        assert save_small(tmp_path, step) is None
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_000002", "step_000003"]


def test_what_cannot_be_removed_is_said_and_the_checkpoint_counts_as_saved(tmp_path, capsys, monkeypatch):
    save_small(tmp_path, 1), save_small(tmp_path, 2)

    def refuse(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        assert save_small(tmp_path, 3) is None
    assert "step_000001 cannot be removed: [Errno 13] Permission denied" in capsys.readouterr().out
    assert list(checkpoint_folders(tmp_path)) == [3, 2]
    assert save_small(tmp_path, 4) is None
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step_000003", "step_000004"]


def test_half_record_that_could_not_be_removed_is_removed_before_the_next(tmp_path, capsys):
    file = AppendedFile(tmp_path / "records")
    file.append(b"a" * 10)
    with open(tmp_path / "records", "ab") as half:
        half.write(b"b" * 5)
    file.append(b"b" * 10)
    assert (tmp_path / "records").read_bytes() == b"a" * 10 + b"b" * 10


@pytest.mark.parametrize("error", [OSError(28, "No space left"), Exception("No space left on device (os error 28)")])
def test_whatever_a_library_raises_for_a_full_disk_is_a_warning(tmp_path, capsys, error):
    def write(path):
        (path / "tokenizer.json").write_text("half")
        raise error

    assert "step_000001 cannot be saved: " in save_checkpoint(tmp_path, 1, {}, 2, write)
    assert "; training goes on" in capsys.readouterr().out
    assert not list((tmp_path / "checkpoints").iterdir())
    with pytest.raises(TypeError):  # a defect of ours is no full disk
        save_checkpoint(tmp_path, 1, {}, 2, lambda path: path + 1)


def test_messages_to_a_full_disk_do_not_end_the_run(monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(utils.tqdm, "write", full)
    utils.say("warning")


DAMAGE = {
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
    "emptied": lambda file: os.truncate(file, 0),
    "lengthened": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "deleted": lambda file: file.unlink(),
}


def flip_a_bit(file, rng):
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def test_every_kind_of_damage_to_every_file_is_found_and_the_file_named(tmp_path, capsys, script, undisturbed):
    rng, newest, count = random.Random(0), last_step(undisturbed[name_of(script)]), 0
    copy = tmp_path / "run"
    shutil.copytree(undisturbed[name_of(script)], copy)
    intact = checkpoint_folders(copy)[newest]
    for name in files_of(intact):
        whole = (intact / name).read_bytes()
        flips = {f"bit {i}": lambda file: flip_a_bit(file, rng) for i in range(100 if name == "state.json" else 10)}
        for damage in (DAMAGE | flips).values():
            damage(intact / name)
            path, state = newest_checkpoint(copy, 100)
            assert path == checkpoint_folders(copy)[newest - 2] and newest not in (
                state.get("step"),
                state.get("iteration"),
            )
            assert capsys.readouterr().out.startswith(f"resume: {intact / name} is damaged or missing: trying")
            (intact / name).write_bytes(whole)
            count += 1
    assert newest_checkpoint(copy, 100)[0] == intact
    assert count > 180


def test_content_of_state_that_is_no_state_is_damage(tmp_path):
    for content in (b"[]", b"{}", b"null", b"7", b'{"sha256": 1}', seal({})[:-3], b"\xff", b"[" * 100_000):
        (tmp_path / "state.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"state.json is damaged or missing"):
            read_state(tmp_path)


@pytest.mark.parametrize("file", ["model", "optimizer.safetensors", "state.json"])
def test_run_goes_on_from_the_checkpoint_before_a_damaged_one(tmp_path, capsys, script, undisturbed, file):
    script.train(tmp_path / "run", "checkpoint_every=1", stop_after=3)
    path = checkpoint_folders(tmp_path / "run")[3]
    if file == "model":
        file = str(next((path / "model").glob("*.safetensors")).relative_to(path))
    if not (path / file).exists():
        pytest.skip("ES has no optimizer")
    flip_a_bit(path / file, random.Random(0))
    capsys.readouterr()
    script.train(tmp_path / "run")
    out = capsys.readouterr().out
    assert f"resume: {path / file} is damaged or missing: trying the checkpoint before it" in out
    assert f"going on after {'step 2' if script is SCRIPTS['grpo'] else 'iteration 3'}" in out  # ES has its journal
    assert_same_run(tmp_path / "run", undisturbed[name_of(script)])


def test_without_a_whole_checkpoint_grpo_stops_and_es_replays_its_journal(tmp_path, capsys, undisturbed):
    for name, script in SCRIPTS.items():
        folder = tmp_path / name
        script.train(folder, stop_after=3)
        for path in checkpoint_folders(folder).values():
            (path / "state.json").unlink()
        before = files_of(folder)
        if name == "grpo":
            with pytest.raises(ValueError, match="resume: no checkpoint in .*grpo/checkpoints is whole"):
                script.train(folder)
            assert files_of(folder) == before
        else:
            script.train(folder)
            assert capsys.readouterr().out.count("is damaged or missing: trying the checkpoint before it") >= 2
            assert_same_run(folder, undisturbed[name])


def test_damaged_checkpoints_do_not_push_out_good_ones(tmp_path, script, undisturbed):
    overrides = ["keep_checkpoints=1", "checkpoint_every=100"]
    folder = script.train(tmp_path / "run", *overrides, stop_after=1)
    shutil.copytree(checkpoint_folders(folder)[1], folder / "checkpoints" / "step_000003")  # of a future that is lost
    (folder / "checkpoints" / "step_000003" / "state.json").unlink()
    script.train(folder, *overrides, stop_after=1)
    assert list(checkpoint_folders(folder)) == [2] and newest_checkpoint(folder, 100)
    script.train(folder, *overrides)
    assert_same_run(folder, undisturbed[name_of(script)])


def test_journal_shorter_than_a_checkpoint_goes_on_from_the_journal(tmp_path, undisturbed):
    script, folder = SCRIPTS["es"], tmp_path / "run"
    shutil.copytree(undisturbed["es"], folder)
    path = folder / "journal.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))  # checkpoint 4, but journal to 3
    script.train(folder)
    assert_same_run(folder, undisturbed["es"])


def test_checkpoint_of_another_run_is_not_taken_for_this_ones(tmp_path):
    script = SCRIPTS["es"]
    for seed in (0, 1):
        script.train(tmp_path / f"seed{seed}", f"seed={seed}", stop_after=2)
    stranger = checkpoint_folders(tmp_path / "seed1")[2]
    ours = checkpoint_folders(tmp_path / "seed0")[2]
    shutil.rmtree(ours)
    shutil.copytree(stranger, ours)
    with pytest.raises(ValueError, match="does not hold the weights that the run had at iteration 2"):
        script.train(tmp_path / "seed0", "seed=0")


def test_nothing_is_unpickled(tmp_path, monkeypatch, script):
    import pickle

    script.train(tmp_path / "run", stop_after=2)

    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(pickle, "load", refuse)
    script.train(tmp_path / "run")
    sources = [ROOT / f for f in ("grpo_train.py", "es_train.py", "utils.py", "datasets.py", "reward.py")]
    for source in sources:
        text = source.read_text()
        assert not re.search(r"torch\.load|pickle|trust_remote_code|unsafe|(?<![\w.])(eval|exec)\(", text)


# A run's folder


def folder_config(tmp_path, script, **values):
    return script.config(tmp_path / "x", *(f"{key}={json.dumps(value)}" for key, value in values.items()))


def test_folder_of_a_run(tmp_path, monkeypatch, script):
    def find(**values):
        return run_folder(folder_config(tmp_path, script, **values), "marker")

    assert find(run_name="new") == tmp_path / "new"
    assert not (tmp_path / "new").exists()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "marker").touch()
    assert find(run_name="begun") == tmp_path / "begun"
    assert find(run_name=None, resume=str(tmp_path / "begun")) == tmp_path / "begun"
    (tmp_path / "empty").mkdir()
    assert find(run_name="empty") == tmp_path / "empty"
    (tmp_path / "empty" / "config.yml.partial").touch()
    assert find(run_name="empty") == tmp_path / "empty"
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").touch()
    monkeypatch.setattr(time, "strftime", lambda form: "begun")  # two unnamed runs of one second
    for values, message in [
        ({"run_name": "begun", "resume": "never"}, "begun exists already; choose another name or delete it"),
        ({"run_name": None}, "begun exists already; choose another name or delete it"),
        ({"run_name": "foreign"}, "run_name: 'foreign', expected a new name, or a run with its marker: "),
        ({"run_name": "a", "resume": str(tmp_path / "begun")}, "run_name: 'a', expected null or begun, the run to res"),
        ({"run_name": None, "resume": str(tmp_path / "nowhere")}, "nowhere', expected auto, never, or a run's folder"),
    ]:
        with pytest.raises(ValueError) as error:
            find(**values)
        assert message in str(error.value)


def test_second_process_in_the_same_folder_is_refused(tmp_path, script):
    folder = script.train(tmp_path / "run", stop_after=1)
    code = (
        "import sys, utils, pathlib, conftest; script = conftest.SCRIPTS[sys.argv[2]];"
        "folder = pathlib.Path(sys.argv[1]);"
        "kept = utils.open_run_folder(folder, script.config(folder)); print('locked', flush=True); sys.stdin.read()"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "-c", code, str(folder), name_of(script)]
    with subprocess.Popen(
        command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as holder:
        assert holder.stdout.readline() == "locked\n"
        before = files_of(folder)
        with pytest.raises(ValueError, match=f"run_name: {folder} is being written by another process"):
            script.train(folder)
        assert files_of(folder) == before
        holder.kill()
    script.train(folder)  # the lock has died with its process


# A full disk


@contextlib.contextmanager
def largest_file(size):
    """Files cannot grow beyond `size` bytes in this process: for them the disk is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_checkpoint_that_does_not_fit_leaves_no_half_and_keeps_the_old_ones(tmp_path, capsys, script, undisturbed):
    folder = script.train(tmp_path / "run", stop_after=1)
    before = files_of(folder / "checkpoints")
    with largest_file(100_000), pytest.raises(OSError, match=r"step_000003 cannot be saved: .*File too large"):
        script.train(folder, stop_after=2)
    out = capsys.readouterr().out
    assert f"warning: {folder}/checkpoints/step_000002 cannot be saved: " in out and "; training goes on" in out
    assert files_of(folder / "checkpoints") == before
    assert [step for step, _ in scalars(folder)["reward/mean"]] == [1, 2, 3]
    script.train(folder)
    assert_same_run(folder, undisturbed[name_of(script)])


def test_what_a_full_disk_did_not_take_is_written_later_and_no_half_record_stays(tmp_path, capsys):
    file = AppendedFile(tmp_path / "records")
    file.append(b"a" * 10)
    with largest_file(25):
        file.append(b"b" * 10)
        file.append(b"c" * 10)  # 5 bytes of it fit
        assert (tmp_path / "records").read_bytes() == b"a" * 10 + b"b" * 10
        file.append(b"d" * 10, sync=True)
        assert (tmp_path / "records").read_bytes() == b"a" * 10 + b"b" * 10
    assert capsys.readouterr().out.count("records cannot be written for now: [Errno 27] File too large; training") == 2
    file.append(b"e" * 10, sync=True)
    assert (tmp_path / "records").read_bytes() == b"".join(c * 10 for c in (b"a", b"b", b"c", b"d", b"e"))


def test_journal_and_scalars_outlast_a_disk_that_is_full_for_a_while(tmp_path, capsys, script, undisturbed):
    """Files may not grow for the second and third step: neither checkpoints nor log nor journal."""
    polls = itertools.count(1)

    def poll():
        step = next(polls)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000 if step in (2, 3) else limits[1], limits[1]))
        return False

    try:
        script.module.main(script.config(tmp_path / "run"), poll)
    finally:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits[1], limits[1]))
    assert list(checkpoint_folders(tmp_path / "run")) == ([4, 0] if script is SCRIPTS["grpo"] else [4])
    assert_same_run(tmp_path / "run", undisturbed[name_of(script)])
    if script is SCRIPTS["es"]:
        lines = [(f / "journal.jsonl").read_text().splitlines() for f in (tmp_path / "run", undisturbed["es"])]
        assert [json.loads(a)["weights"] for a in lines[0][1:]] == [json.loads(a)["weights"] for a in lines[1][1:]]


def test_result_that_cannot_be_saved_is_an_error_and_the_old_one_stays(tmp_path, script):
    folder = script.train(tmp_path / "run")
    before = files_of(folder / "model")
    with largest_file(100_000), pytest.raises(OSError, match="run/model cannot be saved: "):
        script.train(folder)
    assert files_of(folder / "model") == before and not (folder / "model.partial").exists()


def test_folder_that_takes_anothers_place(tmp_path):
    for content in ("first", "second"):
        with whole_folder(tmp_path / "out") as path:
            (path / "file").write_text(content)
            assert not (tmp_path / "out").exists() or (tmp_path / "out" / "file").read_text() == "first"
    assert (tmp_path / "out" / "file").read_text() == "second"
    assert os.listdir(tmp_path) == ["out"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 MB that is mounted for one test."""
    path = tmp_path / "disk"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", path], capture_output=True).returncode:
        pytest.skip("only root may mount a file system")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def test_run_on_a_disk_that_fills_up_ends_with_an_error_and_goes_on_when_there_is_room(small_disk, script, undisturbed):
    folder = small_disk / "run"
    script.train(folder, "checkpoint_every=1", stop_after=1)
    where = [f"model={TINY}", f"log_dir={folder.parent}", f"run_name={folder.name}", "checkpoint_every=1"]
    (small_disk / "ballast").write_bytes(bytes(os.statvfs(small_disk).f_bavail * 4096 - 4096))
    done = run_script([*script.small, *where], script=f"{script.name}.py")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr, done.stderr
    assert "cannot be saved: " in done.stderr.splitlines()[-1] and "No space left on device" in done.stderr
    assert "training goes on" in done.stdout
    assert newest_checkpoint(folder, 100)[0].name == "step_000001" and last_step(folder) == 1
    assert not list(folder.rglob("*.partial"))
    (small_disk / "ballast").unlink()
    script.train(folder)
    weights = [load_file(next((f / "model").glob("*.safetensors"))) for f in (folder, undisturbed[name_of(script)])]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
