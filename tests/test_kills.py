"""SIGKILL at random moments: the run always starts again, loses no more than it may, and ends as if left alone.

KILLS=300 python -m pytest tests/test_kills.py kills more often than the test suite does.
"""

import contextlib
import multiprocessing
import os
import random
import signal
import time

from conftest import SCRIPTS, assert_same_run

from runs import checkpoint_folders, newest_checkpoint

KILLS = int(os.environ.get("KILLS", 30))
LONG = {"grpo": ["num_steps=40", "checkpoint_every=3"], "es": ["num_iterations=40", "checkpoint_every=3"]}


def run_quietly(name, folder):
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
        SCRIPTS[name].train(folder, *LONG[name], "eval_every=3")


def work_done(name, folder):
    """Steps that no kill may take away."""
    if name == "es":
        path = folder / "journal.jsonl"
        return max(0, path.read_bytes().count(b"\n") - 1) if path.exists() else 0
    return max(checkpoint_folders(folder), default=0)


def test_run_that_is_killed_again_and_again_ends_as_an_undisturbed_one(tmp_path, script):
    name, rng = script.name.removesuffix("_train"), random.Random(0)
    context = multiprocessing.get_context("forkserver")  # a fresh process without the seconds of importing torch
    context.set_forkserver_preload(["es_train", "grpo_train"])

    def start(run):
        process = context.Process(target=run_quietly, args=(name, tmp_path / run))
        process.start()
        return process

    first = context.Process(target=int)  # with it the server starts, and imports
    first.start()
    first.join()
    started = time.monotonic()
    process = start("undisturbed")
    while not checkpoint_folders(tmp_path / "undisturbed"):
        assert process.is_alive()
        time.sleep(0.01)
    start_up = time.monotonic() - started
    process.join(180)
    assert process.exitcode == 0
    training = time.monotonic() - started - start_up

    done = []
    for _ in range(KILLS):
        process, before = start("killed"), work_done(name, tmp_path / "killed")
        # Before anything is written, or some steps further on, so that the kills spread over the run.
        if rng.random() < 0.5:
            process.join(rng.uniform(0.0, start_up))
        else:
            while process.is_alive() and work_done(name, tmp_path / "killed") == before:
                time.sleep(0.001)
            process.join(rng.uniform(0.0, 0.05 * training))
        process.kill()
        process.join()
        assert process.exitcode in (-signal.SIGKILL, 0)  # an error would be 1: every run started, or was killed before
        done.append(work_done(name, tmp_path / "killed"))
        found = newest_checkpoint(tmp_path / "killed", 10**9)
        assert bool(found) == bool(checkpoint_folders(tmp_path / "killed"))  # no kill damages a checkpoint
    assert done == sorted(done)  # what was done is never lost
    process = start("killed")
    process.join(180)
    assert process.exitcode == 0
    assert_same_run(tmp_path / "killed", tmp_path / "undisturbed")
    print(f"{name}: {KILLS} kills, after steps {done}")
    assert len(set(done)) > 5, f"the kills fell on few steps: {done}"
