"""Two processes (gloo, CPU) beside one, with Hugging Face `datasets` installed as far as anybody can ask."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SCRIPTS, TINY, TWO_PROCESSES, assert_same_run, model_weights, scalars, wait_until
from test_resume import last_step

import runs
from reward import UserError
from runs import newest_checkpoint


def start(script, folder, *overrides, launcher=TWO_PROCESSES, path=()):
    """The script under tests/witness.py, which leaves pid0, pid1, seen0.json and seen1.json in `folder`'s parent."""
    where = [f"model={TINY}", f"log_dir={folder.parent}", f"run_name={folder.name}", "device=cpu"]
    witness = [str(ROOT / "tests" / "witness.py"), str(folder.parent), f"{script.name}.py"]
    return subprocess.Popen(
        [*launcher, *witness, *where, *script.small, *overrides],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [ROOT, *path]))},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def end(process, seconds=240):
    try:
        return process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def seen(folder, rank):
    return json.loads((folder.parent / f"seen{rank}.json").read_text())


@pytest.mark.parametrize("name", SCRIPTS)
def test_two_processes_do_what_one_does(tmp_path, name, hugging_face_datasets):
    script = SCRIPTS[name]
    # Neither five prompts nor seven problems to evaluate on divide by two.
    overrides = ["eval_size=7", *(["prompts_per_step=5", "learning_rate=1e-3"] if name == "grpo" else [])]
    overrides += ["population_size=5"] if name == "es" else []
    folders = {}
    for world, launcher in {"one": [sys.executable], "two": TWO_PROCESSES}.items():
        (tmp_path / world).mkdir()
        folders[world] = folder = tmp_path / world / "run"
        process = start(script, folder, *overrides, launcher=launcher, path=[hugging_face_datasets])
        out, err = end(process)
        assert process.returncode == 0, err
        assert f"device  {1 + (world == 'two')} x cpu" in out and out.count("Held-out accuracy") == 1
        assert len(list(folder.glob("events*"))) == 1  # one process logs
    one, first, second = seen(folders["one"], 0), seen(folders["two"], 0), seen(folders["two"], 1)

    # The weights of all processes are the same bits after every step; with ES, they are those of one process.
    assert first["weights"] == second["weights"] and len(set(first["weights"])) >= 4
    if name == "es":
        assert first["weights"] == one["weights"]
        assert_same_run(folders["two"], folders["one"])
    else:
        alone, together = (torch.tensor(run["gradients"][0], dtype=torch.float64) for run in (one, first))
        assert first["gradients"] == second["gradients"] and len(first["gradients"]) == 4
        assert float((alone - together).norm() / alone.norm()) < 1e-6
    # Nothing is evaluated twice.
    for whole, part, other in zip(one["evaluated"], first["evaluated"], second["evaluated"], strict=True):
        assert sorted([*part, *other]) == sorted(whole) and len(whole) == 7


@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_process_is_killed_the_others_end(tmp_path, script, victim):
    folder = tmp_path / "run"
    process = start(script, folder, f"{script.num_steps}=500", "lr_schedule=constant")
    wait_until(lambda: (last_step(folder) or 0) >= 2, process)
    os.kill(int((tmp_path / f"pid{victim}").read_text()), signal.SIGKILL)
    out, err = end(process, seconds=60)
    assert process.returncode != 0
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / f"pid{1 - victim}").read_text()), 0)
    assert newest_checkpoint(folder, 1000)[0].name == f"step_{last_step(folder):06d}"


def test_when_one_process_refuses_its_input_all_end(tmp_path, script):
    folder = script.train(tmp_path / "run", stop_after=1)
    process = start(script, folder, "seed=1")
    out, err = end(process, seconds=60)
    assert process.returncode != 0
    assert "seed: 1, but that run was started with 0" in err


def test_signal_to_one_process_stops_all_after_the_same_step(tmp_path, script):
    folder, overrides = tmp_path / "run", [f"{script.num_steps}=30", "checkpoint_every=4"]
    process = start(script, folder, *overrides)
    wait_until(lambda: last_step(folder) == 4, process)
    os.kill(int((tmp_path / "pid1").read_text()), signal.SIGTERM)
    out, err = end(process)
    assert process.returncode == 0, err
    step = last_step(folder)
    assert 4 <= step < 30 and f"stopped after step {step}; to resume:" in out
    assert re.search(r"torchrun --nproc_per_node 2 \S+ --config \S+/config.yml$", out.rstrip())
    assert len(seen(folder, 0)["weights"]) == len(seen(folder, 1)["weights"])
    assert [at for at, _ in scalars(folder)["reward/mean"]] == list(range(1, step + 1))


def test_resumed_in_two_processes_a_run_goes_on_as_in_one(tmp_path, script):
    whole = script.train(tmp_path / "whole" / "run")
    folder = script.train(tmp_path / "parts" / "run", stop_after=2)
    out, err = end(start(script, folder))
    assert "resuming after step 2" in out, err
    ours, theirs = model_weights(folder), model_weights(whole)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=2e-5, rtol=1e-3)


def test_processes_that_come_to_different_weights_stop(tmp_path, monkeypatch, script):
    monkeypatch.setattr(runs, "gather_object", lambda objects: objects * 2)
    script.train(tmp_path / "run", stop_after=1)
    monkeypatch.setattr(runs, "gather_object", lambda objects: [*objects, "00000000"])
    with pytest.raises(UserError, match="the processes have different weights"):
        script.train(tmp_path / "other", stop_after=1)
