"""Checkpoints, resuming, damage and full disks, for both scripts: N steps, a stop, M steps are N + M steps."""

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
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

import runs
import utils
from reward import UserError
from runs import checkpoint_folders, newest_checkpoint, read_state, save_checkpoint, whole_folder

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
        assert f"stopped after step {2 * steps - 1}; to resume:" in capsys.readouterr().out
        assert not (parts / "model").exists()
    script.train(parts, *overrides)
    assert "resuming after step 3" in capsys.readouterr().out
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

    monkeypatch.setattr(runs, "save_checkpoint", dies(runs.save_checkpoint))
    monkeypatch.setattr(runs, "write_file", dies(runs.write_file))
    monkeypatch.setattr(runs.Run, "_write_scalars", dies(runs.Run._write_scalars))
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
        path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
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
    written = newest_checkpoint(tmp_path / "run")[0].stat().st_ino
    script.train(tmp_path / "run", *constant)
    assert newest_checkpoint(tmp_path / "run")[0].stat().st_ino == written
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
        with pytest.raises(UserError) as error:
            script.train(tmp_path / "run", "lr_schedule=linear", override)
        assert message in str(error.value)


def test_resuming_with_fewer_steps_than_were_done_is_refused_and_leaves_the_config(tmp_path, script):
    folder = script.train(tmp_path / "run", "lr_schedule=constant", stop_after=3)
    before = files_of(folder)
    with pytest.raises(UserError, match="resume: .*: 3 steps are done, more than the 2 to do"):
        script.train(folder, "lr_schedule=constant", f"{script.num_steps}=2")
    assert files_of(folder) == before


def test_resuming_with_other_problems_is_refused(tmp_path, script):
    lines = [json.dumps({"prompt": f"Compute {i}+{i}", "answer": str(2 * i)}) for i in range(30)]
    file = tmp_path / "problems.jsonl"
    file.write_text("\n".join(lines))
    overrides = [f"dataset={file}", "eval_size=2"]
    folder = script.train(tmp_path / "run", *overrides, stop_after=1)
    file.write_text("\n".join(lines).replace('"56"', '"57"'))
    with pytest.raises(UserError, match=r"resume: .*: problems: '\w{8}', but that run was started with '"):
        script.train(folder, *overrides)
    file.write_text("\n".join(lines))
    script.train(folder, *overrides)


def test_run_without_a_checkpoint_starts_anew(tmp_path, capsys, undisturbed):
    folder = SCRIPTS["grpo"].train(tmp_path / "run", stop_after=1)
    shutil.rmtree(folder / "checkpoints")
    SCRIPTS["grpo"].train(folder)
    assert "nothing was saved yet: starting from step 0" in capsys.readouterr().out
    assert_same_run(folder, undisturbed["grpo"])


def test_checkpoint_that_a_process_cannot_see_is_named(tmp_path, monkeypatch, script):
    folder = script.train(tmp_path / "run", stop_after=1)
    monkeypatch.setattr(runs, "find_progress", lambda *arguments: ({"step": 1}, tmp_path / "elsewhere", []))
    with pytest.raises((UserError, FileNotFoundError), match="elsewhere"):
        script.train(folder)


def test_master_from_a_checkpoint_takes_no_part_in_gradients(tmp_path, undisturbed):
    path, _ = newest_checkpoint(undisturbed["es"])
    master = {name: torch.zeros_like(p) for name, p in AutoModelForCausalLM.from_pretrained(TINY).named_parameters()}
    master = {name: weight.detach() for name, weight in master.items()}
    utils.load_weights(path / "model", master)
    assert all(weight.any() and not weight.requires_grad for weight in master.values())


@pytest.mark.parametrize("is_young", [False, True])
def test_folder_of_the_other_script_is_refused(tmp_path, script, undisturbed, is_young):
    other = "es" if name_of(script) == "grpo" else "grpo"
    folder = shutil.copytree(undisturbed[other], tmp_path / "run")
    if is_young:
        shutil.rmtree(folder / "checkpoints")
    before = files_of(folder)
    with pytest.raises(UserError, match="resume: .*run: script: '.*', but that run was started with '"):
        script.train(folder)
    assert files_of(folder) == before


def test_resuming_with_another_model_is_refused_and_a_moved_one_is_not(tmp_path, script, undisturbed):
    script.train(tmp_path / "run", stop_after=2)
    shutil.copytree(TINY, tmp_path / "moved")
    other = AutoModelForCausalLM.from_pretrained(TINY)
    other.model.norm.weight.data[0] += 1e-3
    shutil.copytree(TINY, tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"resume: .*: starting weights: '\w{8}', but that run was started with '"):
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

    save_checkpoint(folder, {"step": step}, keep, write)


def test_at_whatever_call_a_process_dies_the_newest_checkpoint_is_whole(tmp_path, monkeypatch):
    """Each call that moves or removes files is in turn the last: before it, and for rmtree in the middle of it."""
    for last in range(100):
        folder, calls = tmp_path / str(last), []
        save_small(folder, 1), save_small(folder, 2)

        def dies(honest, calls=calls, last=last):
            def call(moved, *args, **kwargs):
                if len(calls) == last and honest is shutil.rmtree and Path(moved).exists():
                    next(file for file in Path(moved).rglob("*") if file.is_file()).unlink()
                if len(calls) >= last:  # dead, it does not clean up either
                    calls.append("dead")
                    raise KeyboardInterrupt
                calls.append(honest.__name__)
                return honest(moved, *args, **kwargs)

            return call

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(shutil, "rmtree", dies(shutil.rmtree))
            patch.setattr(Path, "rename", dies(Path.rename))
            patch.setattr(Path, "replace", dies(Path.replace))
            save_small(folder, 3)
        path, state = newest_checkpoint(folder, 100)
        assert state["step"] in (2, 3) and read_state(path) == state
        assert all(read_state(path) for path in checkpoint_folders(folder).values())
        save_small(folder, 4)
        assert sorted(path.name for path in (folder / "checkpoints").iterdir())[-1] == "step_000004"
        assert not list((folder / "checkpoints").glob("*.partial"))
        if "dead" not in calls:
            break
    assert {"rename", "rmtree"} <= set(calls) and last >= 4


def test_what_a_kill_left_is_no_hindrance(tmp_path):
    save_small(tmp_path, 1)
    for name in ("step_000001.partial", "step_000003.partial"):
        (tmp_path / "checkpoints" / name / "model").mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "model" / "half").touch()
    for step in (1, 2, 3):
        save_small(tmp_path, step)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_000002", "step_000003"]


def test_checkpoint_is_saved_though_an_old_one_cannot_be_removed(tmp_path, monkeypatch, capsys):
    save_small(tmp_path, 1), save_small(tmp_path, 2)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, ignore_errors=False: None)
        save_small(tmp_path, 3)
    assert list(checkpoint_folders(tmp_path)) == [3, 2, 1]
    assert f"{tmp_path}/checkpoints/step_000001 cannot be removed" in capsys.readouterr().out
    save_small(tmp_path, 4)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step_000003", "step_000004"]


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
        flips = {f"bit {i}": lambda file: flip_a_bit(file, rng) for i in range(100 if "/" not in name else 10)}
        for damage in (DAMAGE | flips).values():
            damage(intact / name)
            path, state = newest_checkpoint(copy, 100)
            assert path == checkpoint_folders(copy)[newest - 2] and state["step"] == newest - 2
            named = "\\S*" if name == "sha256.json" else re.escape(name)
            assert re.match(rf"resume: {intact}/{named} is damaged or missing: trying", capsys.readouterr().out)
            (intact / name).write_bytes(whole)
            count += 1
    assert newest_checkpoint(copy, 100)[0] == intact
    assert count > 180


def test_content_of_checksums_that_are_none_is_damage(tmp_path):
    (tmp_path / "state.json").write_text("{}")
    for content in (b"", b"{}", bytes(100), b'{"state.json": 1}', b'{"state', b"\xff"):
        (tmp_path / "sha256.json").write_bytes(content)
        with pytest.raises(UserError, match=r"(sha256|state)\.json is damaged or missing"):
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
    assert f"resuming after step {2 if script is SCRIPTS['grpo'] else 3}" in out  # ES has its journal
    assert_same_run(tmp_path / "run", undisturbed[name_of(script)])


def test_without_a_whole_checkpoint_grpo_stops_and_es_replays_its_journal(tmp_path, capsys, undisturbed):
    for name, script in SCRIPTS.items():
        folder = tmp_path / name
        script.train(folder, stop_after=3)
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
    with pytest.raises(UserError, match="step_000002 does not give the weights"):
        script.train(tmp_path / "seed0", "seed=0")


def test_nothing_is_unpickled(tmp_path, monkeypatch, script):
    import pickle

    script.train(tmp_path / "run", stop_after=2)

    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(pickle, "load", refuse)
    script.train(tmp_path / "run")
    for source in ROOT.glob("*.py"):
        text = source.read_text()
        assert not re.search(r"torch\.load|pickle|trust_remote_code|unsafe|(?<![\w.])(eval|exec)\(", text)


# A run's folder


def test_folder_of_a_run(tmp_path, monkeypatch, script):
    def find(**values):
        overrides = (f"{key}={json.dumps(value)}" for key, value in values.items())
        folder, _, lock = runs.open_folder(script.config(tmp_path / "x", *overrides))
        lock.release()
        return folder

    for name, content in {"begun": "identity.json", "killed": "identity.json.partial", "foreign": "notes.txt"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / content).touch()
    (tmp_path / "empty").mkdir()
    for name in ("new", "new", "empty", "begun"):
        assert find(run_name=name) == tmp_path / name and (tmp_path / name).is_dir()
    monkeypatch.setattr(time, "strftime", lambda form: "begun")  # two unnamed runs of one second
    for values in ({"run_name": "begun", "resume": "never"}, {"run_name": None}, {"run_name": "foreign"}):
        with pytest.raises(UserError, match="(begun|foreign) exists already; choose another name or delete it"):
            find(**values)
    assert find(run_name="killed") == tmp_path / "killed"


def test_second_process_in_the_same_folder_is_refused(tmp_path, script):
    folder = script.train(tmp_path / "run", stop_after=1)
    code = (
        "import sys, runs, pathlib, conftest; script = conftest.SCRIPTS[sys.argv[2]];"
        "folder = pathlib.Path(sys.argv[1]);"
        "kept = runs.open_folder(script.config(folder)); print('locked', flush=True); sys.stdin.read()"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "-c", code, str(folder), name_of(script)]
    with subprocess.Popen(
        command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as holder:
        assert holder.stdout.readline() == "locked\n"
        before = files_of(folder)
        with pytest.raises(UserError, match=f"run_name: {folder} is being written by another process"):
            script.train(folder)
        assert files_of(folder) == before
        holder.kill()
    script.train(folder)  # the lock has died with its process


def test_folder_that_takes_anothers_place(tmp_path):
    for content in ("first", "second"):
        with whole_folder(tmp_path / "out") as path:
            (path / "file").write_text(content)
            assert not (tmp_path / "out").exists() or (tmp_path / "out" / "file").read_text() == "first"
    assert (tmp_path / "out" / "file").read_text() == "second"
    assert os.listdir(tmp_path) == ["out"]


# A full disk


def run_with_files_up_to(size, script, folder, *overrides):
    """A run whose files cannot grow beyond `size` bytes, as if the disk were full. It must end with one line."""
    where = [f"model={TINY}", f"log_dir={folder.parent}", f"run_name={folder.name}"]
    launcher = ["prlimit", f"--fsize={size}", sys.executable]
    done = run_script([*where, *script.small, *overrides], script=f"{script.name}.py", launcher=launcher)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: the disk is full: ")


@pytest.mark.parametrize("size", [500, 3_000, 100_000, 200_000])  # no room for config, log, model, optimizer
def test_full_disk_ends_the_run_with_one_line_and_it_goes_on_when_there_is_room(tmp_path, script, undisturbed, size):
    folder = script.train(tmp_path / "run", stop_after=1)
    before = files_of(folder / "checkpoints")
    run_with_files_up_to(size, script, folder)
    assert files_of(folder / "checkpoints") == before
    assert not list((folder / "checkpoints").glob("*.partial"))
    script.train(folder)
    assert_same_run(folder, undisturbed[name_of(script)])


def test_half_a_line_that_a_full_disk_left_of_the_journal_is_written_again(tmp_path, undisturbed):
    folder = SCRIPTS["es"].train(tmp_path / "run", stop_after=1)
    path = folder / "journal.jsonl"
    first, *lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([first.rstrip() + " " * 2**20 + "\n", *lines]))  # the largest file but for checkpoints
    run_with_files_up_to(path.stat().st_size + 100, SCRIPTS["es"], folder)
    assert not path.read_bytes().endswith(b"\n")
    SCRIPTS["es"].train(folder)
    assert_same_run(folder, undisturbed["es"])
    assert len(runs.read_journal(path)) == 5


def test_result_that_cannot_be_saved_is_an_error_and_the_old_one_stays(tmp_path, script):
    folder = script.train(tmp_path / "run")
    before = files_of(folder / "model")
    run_with_files_up_to(100_000, script, folder)
    assert files_of(folder / "model") == before and not (folder / "model.partial").exists()


def from_command_line(monkeypatch, script, main):
    """The line that the script ends with."""
    monkeypatch.setattr(sys, "argv", [f"{script.name}.py"])
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)  # the handlers here stay pytest's
    with pytest.raises(SystemExit) as error:
        utils.run_from_command_line(main, script.config_class, ROOT / f"{name_of(script)}_config.yml")
    return str(error.value)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Exception("File too large (os error 27)")])
def test_whatever_a_library_raises_for_a_full_disk_is_one_line(tmp_path, monkeypatch, script, error):
    def save(path):
        (path / "tokenizer.json").write_text("half")
        raise error

    line = from_command_line(monkeypatch, script, lambda config: save_checkpoint(tmp_path, {"step": 1}, 2, save))
    assert line == f"error: the disk is full: {error}; what was saved before is intact"
    assert not list((tmp_path / "checkpoints").iterdir())
    with pytest.raises(TypeError):  # a defect of ours is no full disk
        from_command_line(monkeypatch, script, lambda config: config + 1)


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
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert re.match("error: the disk is full: .*No space left on device", done.stderr.splitlines()[-1])
    assert newest_checkpoint(folder, 100)[0].name == "step_000001" and last_step(folder) == 1
    assert not list(folder.rglob("*.partial"))
    (small_disk / "ballast").unlink()
    script.train(folder)
    weights = [load_file(next((f / "model").glob("*.safetensors"))) for f in (folder, undisturbed[name_of(script)])]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
