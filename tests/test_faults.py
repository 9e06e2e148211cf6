"""Signals, memory that runs out, numbers that are not finite: for both scripts."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, SCRIPTS, TINY, assert_same_run, model_weights, run_script, scalars, wait_until
from test_resume import from_command_line, last_step, name_of

import generation
import runs
import utils
from reward import UserError
from runs import checkpoint_folders, newest_checkpoint

# Signals


def start(script, folder, *overrides, path=()):
    where = [f"model={TINY}", f"log_dir={folder.parent}", f"run_name={folder.name}"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.Popen(
        [sys.executable, str(ROOT / f"{script.name}.py"), *where, *script.small, *overrides],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_the_run_after_its_step_with_a_checkpoint_and_the_line_that_resumes_it(tmp_path, script, number):
    folder, overrides = tmp_path / "run", [f"{script.num_steps}=16", "checkpoint_every=2"]
    process = start(script, folder, *overrides)
    wait_until(lambda: (last_step(folder) or 0) >= 2, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "stopping after this step; a second signal stops at once" in err and "Traceback" not in err
    step = int(re.search(r"stopped after step (\d+); to resume:\n", out)[1])
    assert 2 <= step < 16 and last_step(folder) == step and not (folder / "model").exists()
    assert [at for at, _ in scalars(folder)["reward/mean"]] == list(range(1, step + 1))
    command = shlex.split(out.splitlines()[-1])
    assert command == ["python", str(ROOT / f"{script.name}.py"), "--config", str(folder / "config.yml")]
    done = run_script(command[2:], script=f"{script.name}.py")
    assert done.returncode == 0 and f"resuming after step {step}" in done.stdout
    assert_same_run(folder, script.train(tmp_path / "undisturbed", *overrides))


@pytest.fixture
def slow_reward(tmp_path):
    """A reward function that, from its third call on, takes minutes, and a file that says that it is waited for."""
    (tmp_path / "slow_reward.py").write_text(
        "import pathlib, time\n"
        "calls = []\n"
        "def f(completions, **columns):\n"
        "    calls.append(1)\n"
        "    if len(calls) > 2:\n"
        f"        pathlib.Path({str(tmp_path)!r}, 'waiting').touch()\n"
        "        time.sleep(300)\n"
        "    return [float(len(text)) for text in completions]\n"
    )
    return tmp_path


def test_second_signal_ends_the_run_at_once_and_it_resumes(tmp_path, script, slow_reward):
    folder, overrides = tmp_path / "run", ["rewards={'slow_reward:f': 1.0}", "checkpoint_every=1", "population_batch=6"]
    overrides = overrides[: 3 if name_of(script) == "es" else 2]
    process = start(script, folder, *overrides, path=[slow_reward])
    wait_until((slow_reward / "waiting").exists, process)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None  # it is in its step still
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == -signal.SIGTERM
    assert newest_checkpoint(folder, 100)[0].name == f"step_{last_step(folder):06d}"
    (slow_reward / "slow_reward.py").write_text(
        "def f(completions, **c):\n    return [float(len(x)) for x in completions]\n"
    )
    where = [f"model={TINY}", f"log_dir={folder.parent}", f"run_name={folder.name}"]
    done = run_script([*where, *script.small, *overrides], script=f"{script.name}.py", path=[slow_reward])
    assert done.returncode == 0 and "resuming after" in done.stdout, done.stderr


def test_signal_during_the_set_up_ends_the_run_at_once(tmp_path, script):
    (tmp_path / "slow_import.py").write_text(
        f"import pathlib, time\npathlib.Path({str(tmp_path)!r}, 'waiting').touch()\ntime.sleep(300)\n"
    )
    process = start(script, tmp_path / "run", "rewards={'slow_import:f': 1.0}", path=[tmp_path])
    wait_until((tmp_path / "waiting").exists, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode == -signal.SIGINT and "Traceback" not in err


def test_first_signal_is_noted_the_second_is_not_caught_and_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with runs.stop_signals() as received:
        assert not received
        signal.raise_signal(signal.SIGINT)
        assert received == [signal.SIGINT]
        assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


# Out of GPU memory


@pytest.mark.parametrize("where", ["rollout", "update"])
def test_memory_that_runs_out_ends_the_run_with_one_line_that_names_the_keys(tmp_path, monkeypatch, script, where):
    if where == "update" and name_of(script) == "es":
        pytest.skip("ES has no backward pass")
    refused, honest = [], utils.load_model

    def refuse(module, inputs, *outputs):
        if where == "update" or len(inputs[0]) > 8:  # there is room for evaluation, but not for a rollout
            refused.append(module)
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 9 GiB.")

    def load_model(*arguments):
        model = honest(*arguments)
        layer = model.model.layers[1]
        layer.register_full_backward_hook(refuse) if where == "update" else layer.register_forward_pre_hook(refuse)
        return model

    monkeypatch.setattr(utils, "load_model", load_model)
    assert from_command_line(monkeypatch, script, lambda config: script.train(tmp_path / "run")) == (
        "error: out of GPU memory: lower max_new_tokens or the keys of Memory and speed "
        "(CUDA out of memory. Tried to allocate 9 GiB.)"
    )
    assert len(refused) == 1  # nothing is tried again


# Numbers that are not finite


@pytest.fixture
def sick_reward(tmp_path, monkeypatch):
    """A reward that is not finite in the calls of `sick_calls`."""
    (tmp_path / "sick_reward.py").write_text(
        "calls, sick_calls, value = [], [], float('nan')\n"
        "def f(completions, **columns):\n"
        "    calls.append(1)\n"
        "    bad = len(calls) - 1 in sick_calls\n"
        "    return [value if bad and i == 2 else float(len(text)) for i, text in enumerate(completions)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "sick_reward", raising=False)
    import sick_reward

    return sick_reward


ONE_CALL_A_STEP = ["rewards={accuracy: 1.0, 'sick_reward:f': 1.0}", "checkpoint_every=1", "keep_checkpoints=9"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_reward_that_is_not_finite_skips_the_step_and_is_said_counted_and_logged(
    tmp_path, capsys, script, sick_reward, value
):
    overrides = [*ONE_CALL_A_STEP, *(["population_batch=6"] if name_of(script) == "es" else [])]
    sick_reward.sick_calls, sick_reward.value = [1], value
    folder = script.train(tmp_path / "run", *overrides)
    said = f"step 2 skipped: reward/sick_reward:f of completion 2 is {'nan' if value != value else 'inf'}"
    assert said in capsys.readouterr().out
    assert [v for _, v in scalars(folder)["optim/skipped_steps"]] == [0, 1, 1, 1]
    states = {step: runs.read_state(path)["weights"] for step, path in checkpoint_folders(folder).items()}
    assert states[1] == states[2] and len({states[1], states[3], states[4]}) == 3
    assert all(weight.isfinite().all() for weight in model_weights(folder).values())


def test_many_skipped_steps_in_a_row_stop_the_run_with_the_reason(tmp_path, script, sick_reward):
    sick_reward.sick_calls = range(4, 100)
    overrides = [
        *ONE_CALL_A_STEP,
        f"{script.num_steps}=9",
        "max_skipped_steps=3",
        "lr_schedule=constant",
        "keep_checkpoints=1",
    ]
    overrides += ["population_batch=6"] if name_of(script) == "es" else []
    with pytest.raises(UserError) as error:
        script.train(tmp_path / "run", *overrides)
    assert str(error.value) == (
        "max_skipped_steps: 3 steps in a row were skipped, the last because "
        "reward/sick_reward:f of completion 2 is nan; the last checkpoint from before them: "
        f"{tmp_path}/run/checkpoints/step_000004"  # though each step is saved
    )
    sick_reward.sick_calls = []
    script.train(tmp_path / "run", *overrides)  # mended, it goes on
    assert scalars(tmp_path / "run")["optim/skipped_steps"][-1][1] == 2  # the third was not saved


def test_skipped_steps_that_are_not_in_a_row_do_not_stop_the_run(tmp_path, script, sick_reward):
    sick_reward.sick_calls = [1, 3, 5]
    overrides = [*ONE_CALL_A_STEP, f"{script.num_steps}=6", "max_skipped_steps=2"]
    overrides += ["population_batch=6"] if name_of(script) == "es" else []
    folder = script.train(tmp_path / "run", *overrides)
    assert scalars(folder)["optim/skipped_steps"][-1][1] >= 2


def test_sampler_without_finite_log_probs_skips_the_step(tmp_path, capsys, monkeypatch, script):
    honest, calls = generation.sample, []

    def sample(*arguments):
        tokens, log_probs = honest(*arguments)
        calls.append(1)
        if len(calls) == 5:
            log_probs[1] = torch.nan
        return tokens, log_probs

    monkeypatch.setattr(generation, "sample", sample)
    accuracy = {"strict_accuracy": 0.0, "lenient_accuracy": 0.0}
    monkeypatch.setattr(utils, "evaluate", lambda setup: (accuracy, [], []))  # only rollouts count as calls
    folder = script.train(tmp_path / "run")
    assert "skipped: log_prob of completion 1 is nan" in capsys.readouterr().out
    assert [v for _, v in scalars(folder)["optim/skipped_steps"]] == [1, 1, 1, 1]


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_loss_or_gradient_that_is_not_finite_skips_the_step(tmp_path, capsys, monkeypatch, what):
    script, honest, calls = SCRIPTS["grpo"], SCRIPTS["grpo"].module.policy_loss, []

    def policy_loss(log_probs, *args):
        loss, ratio = honest(log_probs, *args)
        calls.append(1)
        if len(calls) == 1 and what == "loss":
            loss = loss + torch.inf  # a constant: its gradient is finite
        if len(calls) == 1 and what == "gradient":
            log_probs.register_hook(lambda grad: grad * torch.inf)
        return loss, ratio

    monkeypatch.setattr(script.module, "policy_loss", policy_loss)
    folder = script.train(tmp_path / "run", "checkpoint_every=1", "updates_per_step=2")
    out = capsys.readouterr().out
    loss, norm = re.search(r"step 1 skipped: the loss is (\S+), the norm of its gradient (\S+)\n", out).groups()
    assert (loss in ("inf", "nan"), norm == "nan") == (what == "loss", what == "gradient")
    assert [v for _, v in scalars(folder)["optim/skipped_steps"]] == [1, 1, 1, 1]
    assert len(calls) == 1 + 3 * 2  # the skipped step makes no second update
