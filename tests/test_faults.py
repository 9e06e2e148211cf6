"""Signals, memory that runs out, numbers that are not finite: for both scripts."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
import weakref

import pytest
import torch
from conftest import ROOT, SCRIPTS, TINY, assert_same_run, model_weights, run_script, scalars, wait_until
from test_resume import last_step, name_of

import utils
from utils import checkpoint_folders, newest_checkpoint

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
    assert "stopping after this step; once more stops at once" in err and "Traceback" not in err
    step = int(re.search(r"stopped after \w+ (\d+); to go on:\n", out)[1])
    assert 2 <= step < 16 and last_step(folder) == step and not (folder / "model").exists()
    assert [at for at, _ in scalars(folder)["reward/mean"]] == list(range(1, step + 1))
    command = shlex.split(out.splitlines()[-1])
    assert command == ["python", str(ROOT / f"{script.name}.py"), "--config", str(folder / "config.yml")]
    done = run_script(command[2:], script=f"{script.name}.py")
    assert (
        done.returncode == 0
        and f"going on after {'step' if name_of(script) == 'grpo' else 'iteration'} {step}" in done.stdout
    )
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
    assert done.returncode == 0 and "going on after" in done.stdout, done.stderr


def test_signal_before_the_first_step_ends_the_run_at_once(tmp_path):
    code = (
        "import sys, time, utils\n"
        "with utils.StopSignals() as stop:\n"
        "    if sys.argv[1] == 'asked': stop()\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(3)\n"
        "    print('asked to stop:', stop())\n"
    )
    for asked in ("asked", "not yet"):
        with subprocess.Popen(
            [sys.executable, "-c", code, asked], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGINT)
            out, _ = process.communicate(timeout=60)
        assert (process.returncode, out) == ((0, "asked to stop: True\n") if asked == "asked" else (-signal.SIGINT, ""))


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with utils.StopSignals():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


# Out of GPU memory: a model with room for so many rows, or so many tokens with gradients


@pytest.fixture
def small_memory(monkeypatch):
    """small_memory(rows, tokens): models loaded from now on have memory for so much; returns what was refused."""

    def limit(script, rows, tokens=10**9):
        refused, honest = [], utils.load_model

        def load_model(*args):
            model = honest(*args)

            def before(module, inputs, kwargs):
                ids = kwargs["input_ids"]
                if (not torch.is_grad_enabled() or torch.is_inference_mode_enabled()) and len(ids) > rows:
                    refused.append(("rollout", len(ids)))
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")
                kwargs["input_ids"] = ids

            def backward(module, inputs, outputs):
                size = outputs[0].shape[0] * outputs[0].shape[1]
                if size > tokens:
                    refused.append(("update", size))
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

            model.model.register_forward_pre_hook(before, with_kwargs=True)
            # In the middle of the backward pass: later layers have their gradients by then.
            model.model.layers[1].register_full_backward_hook(backward)
            return model

        monkeypatch.setattr(script.module, "load_model", load_model)
        return refused

    return limit


@pytest.mark.parametrize("overrides", [[], ["kl_weight=0.1", "updates_per_step=2", "gradient_checkpointing=true"]])
def test_grpo_halves_its_batches_when_memory_runs_out_and_learns_the_same(tmp_path, capsys, small_memory, overrides):
    script = SCRIPTS["grpo"]
    overrides = [*overrides, "learning_rate=1e-3"]
    whole = script.train(tmp_path / "whole", *overrides)
    refused = small_memory(script, rows=4, tokens=300)
    capsys.readouterr()
    run = script.train(tmp_path / "run", *overrides)
    out = capsys.readouterr().out
    said = re.findall(r"out of GPU memory with \d+ at once: going on with (\d+) \((\w+) is too large\)", out)
    sizes = {key: [int(size) for size, name in said if name == key] for _, key in said}
    # Evaluation's 8 rows at once are found too many, then 4 fit, for good. The update takes what it takes.
    assert sizes["generation_batch_size"] == [4] and len(refused) == len(said)
    assert 1 <= len(sizes["micro_batch_tokens"]) <= 4 and sizes["micro_batch_tokens"][-1] <= 600
    ours, theirs = scalars(run), scalars(whole)
    for tag in theirs:
        if not tag.startswith(("time/", "throughput/", "progress/seconds")):
            tolerance = 1e-5 if "sampler_gap" in tag else 1e-6
            assert [v for _, v in ours[tag]] == pytest.approx([v for _, v in theirs[tag]], rel=1e-3, abs=tolerance), tag
    ours, theirs = model_weights(run), model_weights(whole)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("call", [1, 2, 4])
def test_memory_that_runs_out_once_in_whatever_update_changes_nothing(tmp_path, monkeypatch, call):
    """Calls 1 and 2 are the two updates of the first step, 4 is the second update of the second step."""
    script, overrides = SCRIPTS["grpo"], ["updates_per_step=2", "learning_rate=0.01", "gradient_checkpointing=true"]
    whole = script.train(tmp_path / "whole", *overrides)
    honest, calls = script.module.completion_log_probs, []

    def completion_log_probs(model, *args):
        calls.append(1)
        if len(calls) == call:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return honest(model, *args)

    monkeypatch.setattr(script.module, "completion_log_probs", completion_log_probs)
    run = script.train(tmp_path / "run", *overrides)
    ours, theirs = scalars(run), scalars(whole)
    for tag in theirs:
        if tag.startswith(("policy/", "optim/")):
            assert [v for _, v in ours[tag]] == pytest.approx([v for _, v in theirs[tag]], rel=1e-3, abs=1e-5), tag
    assert theirs["policy/kl_old"][0][1] > 1e-5  # so the ratios of the second update are not 1, and would not be missed


@pytest.mark.parametrize(("population_batch", "key"), [(6, "population_batch"), (1, "prompts_per_iteration")])
def test_gaussian_members_are_halved_too(tmp_path, capsys, small_memory, population_batch, key):
    script, overrides = SCRIPTS["es"], ["perturbation=gaussian", f"population_batch={population_batch}"]
    whole = script.train(tmp_path / "whole", *overrides)
    small_memory(script, rows=2)
    capsys.readouterr()
    run = script.train(tmp_path / "run", *overrides)
    assert f"going on with 2 ({key} is too large)" in capsys.readouterr().out
    assert_same_run(run, whole)


def test_es_halves_its_batches_when_memory_runs_out_and_learns_the_same(tmp_path, capsys, small_memory):
    script = SCRIPTS["es"]
    whole = script.train(tmp_path / "whole", "population_batch=6")
    refused = small_memory(script, rows=10)
    capsys.readouterr()
    run = script.train(tmp_path / "run", "population_batch=6")
    # Evaluation has 8 rows; 6 members x 4 prompts are 24, 12 are 3 members, 6 rows are 1 member of 4.
    said = re.findall(
        r"out of GPU memory with (\d+) at once: going on with (\d+) \(population_b", capsys.readouterr().out
    )
    assert said == [("24", "12"), ("12", "6")] and len(refused) == 2
    assert_same_run(run, whole)


def test_graph_of_a_failed_update_is_gone_when_the_half_is_tried(tmp_path, monkeypatch):
    """Else there is no more memory for half of it than there was for the whole."""
    script, saved, alive = SCRIPTS["grpo"], [], []
    honest = script.module.micro_batch_loss

    def micro_batch_loss(*args):
        if saved:  # the retry: what the failed pass had saved for its backward pass
            alive.append(sum(reference() is not None for reference in saved))
            saved.clear()
            return honest(*args)
        if alive:
            return honest(*args)

        def pack(tensor):
            kept = tensor.detach().clone()
            saved.append(weakref.ref(kept))
            return kept

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
            loss, *rest = honest(*args)
        loss.register_hook(fail)
        return (loss, *rest)

    def fail(grad):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(script.module, "micro_batch_loss", micro_batch_loss)
    script.train(tmp_path / "run")
    assert alive == [0]


def test_memory_for_less_than_the_smallest_batch_is_one_line_that_names_the_keys(
    tmp_path, capsys, small_memory, script
):
    for rows, tokens in ((0, 10**9), (10**9, 10)):
        if name_of(script) == "es" and rows:
            continue
        small_memory(script, rows, tokens)
        with pytest.raises(SystemExit) as error, utils.one_line_errors("max_new_tokens or group_size"):
            script.train(tmp_path / f"run{rows}")
        line = str(error.value)
        assert line.startswith("error: out of GPU memory: lower max_new_tokens or group_size (CUDA out of memory.")
        assert "Tried to allocate 9 GiB" in line and "\n" not in line


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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**400])
def test_reward_that_is_not_finite_skips_the_step_and_is_said_counted_and_logged(
    tmp_path, capsys, script, sick_reward, value
):
    overrides = [*ONE_CALL_A_STEP, *(["population_batch=6"] if name_of(script) == "es" else [])]
    # ES asks for rewards once more in its first iteration, of the model as it is.
    sick_reward.sick_calls, sick_reward.value = [2 if name_of(script) == "es" else 1], value
    folder = script.train(tmp_path / "run", *overrides)
    word = "iteration" if name_of(script) == "es" else "step"
    said = f"{word} 2 skipped: reward/sick_reward:f of completion 2 is {'nan' if value != value else 'inf'}"
    assert said in capsys.readouterr().out
    assert [v for _, v in scalars(folder)["optim/skipped_steps"]] == [0, 1, 1, 1]
    states = {step: utils.read_state(path)["weights"] for step, path in checkpoint_folders(folder).items()}
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
    with pytest.raises(ValueError) as error:
        script.train(tmp_path / "run", *overrides)
    last = 3 if name_of(script) == "es" else 4  # what was saved before the skipped steps, though each step is saved
    assert str(error.value) == (
        "max_skipped_steps: 3 steps in a row were skipped, the last because "
        "reward/sick_reward:f of completion 2 is nan; the last good checkpoint, from before them: "
        f"{tmp_path}/run/checkpoints/step_{last:06d}"
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
    honest, calls = utils.sample, []

    def sample(logits, uniforms, temperature, top_p):
        tokens, log_probs = honest(logits, uniforms, temperature, top_p)
        calls.append(1)
        if len(calls) == 5:
            log_probs[1] = torch.nan
        return tokens, log_probs

    monkeypatch.setattr(utils, "sample", sample)
    nothing = {"strict": 0.0, "lenient": 0.0, "length": 0.0, "truncated": 0.0, "items": [], "texts": [], "seconds": 0.0}
    monkeypatch.setattr(script.module, "evaluate", lambda *arguments: nothing)  # only rollouts count as calls
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
