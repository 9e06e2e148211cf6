"""Tests of both scripts as a user runs them: whole runs, errors, edited code, multiple processes, README."""

import functools
import itertools
import json
import math
import os
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import mutants
import pytest
import torch
from accelerate.utils import set_seed
from conftest import ROOT, SCRIPTS, TINY, Process, assert_same_run, last_step, model_weights, scalars
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import generation
import grpo_train
import runs
import utils
from utils import load_config

README = (ROOT / "README.md").read_text(encoding="utf-8")
RECIPES = sorted((ROOT / "recipes").glob("*.yml"))
TAGS = (
    "eval/lenient_accuracy reward/accuracy reward/format accuracy/strict completion/length_mean completion/truncated "
    "time/rollout time/reward time/update throughput/tokens_per_second progress/prompts optim/learning_rate "
)
MORE_TAGS = {
    "grpo": "reward/group_std reward/zero_variance_groups policy/entropy policy/ratio_max optim/loss optim/grad_norm",
    "es": "es/reward_min es/reward_mean es/reward_max es/reward_std es/tie_rate es/noise_scale",
}


def run(command, folder=ROOT, path=""):
    """Run a command as a user would, with a new Python interpreter. Return its output."""
    command = re.sub(r"^python ", f"{shlex.quote(sys.executable)} ", command)
    environment = {**os.environ, "PYTHONPATH": str(path)}
    done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return done.stdout


# Whole runs


def test_script_trains_where_the_user_is_and_prints_how_to_load_the_result(tmp_path, script):
    """Make Hugging Face `datasets` appear installed to other libraries. It must not get in the way."""
    site, folder = tmp_path / "site", tmp_path / f"{script.key}_logs" / "run"
    (site / "datasets-4.0.0.dist-info").mkdir(parents=True)
    (site / "datasets").mkdir()
    (site / "datasets" / "__init__.py").write_text("raise ImportError('Hugging Face datasets was imported')\n")
    metadata = "Metadata-Version: 2.1\nName: datasets\nVersion: 4.0.0\n"
    (site / "datasets-4.0.0.dist-info" / "METADATA").write_text(metadata)
    own = "def brevity(completions, **columns): return [-len(text) for text in completions]\n"
    (tmp_path / "my_rewards.py").write_text(own)
    for name, numbers in (("sums", range(100)), ("sums.test", range(100, 164))):
        lines = [json.dumps({"prompt": f"Compute {i}+1", "answer": str(i + 1)}) for i in numbers]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    rewards = "rewards={accuracy: 1, format: 0.1, my_rewards:brevity: 1e-3}"
    more = ["dataset=sums.jsonl", "dataset_args={}", "eval_size=64", rewards, "lr_schedule=constant"]
    where = ["run_name=run", "device=cpu"]  # the model lies beside the script, the logs here
    command = shlex.join([str(ROOT / f"{script.name}.py"), "--num_steps=4", *where, *script.small[1:], *more])
    out = run(f"python {command} 2>&1", tmp_path, path=site)
    assert "Traceback" not in out and "Warning" not in out and out.startswith("model   ")
    assert "Held-out accuracy, greedy decoding, 64 problems (95% interval)" in out
    num_trained = {"grpo": "38,912", "es": "835,712"}[script.key]
    assert f"model   tiny_model, 835,712 parameters, {num_trained} trained\n" in out
    assert f'from_pretrained({"base, " * (script.key == "grpo")}"{script.key}_logs/run/model")' in out

    base = AutoModelForCausalLM.from_pretrained(TINY)
    ids = torch.arange(20)[None]
    before, weights_before = base(input_ids=ids).logits, dict(base.named_parameters())
    if script.key == "grpo":
        assert all((weight != 0).any() for weight in model_weights(folder).values())
        result = PeftModel.from_pretrained(base, folder / "model")
    else:
        result = AutoModelForCausalLM.from_pretrained(folder / "model")
        assert all((weight != weights_before[name]).any() for name, weight in result.named_parameters())
        assert result.dtype == torch.float32 and not (folder / "model" / "adapter_config.json").exists()
    assert not torch.equal(result(input_ids=ids).logits, before)
    assert AutoTokenizer.from_pretrained(folder / "model").chat_template

    curves = scalars(folder)
    assert [step for step, _ in curves["eval/strict_accuracy"]] == [0, 2, 4]
    completions = {"grpo": 16, "es": 24}[script.key]
    assert curves["progress/completions"] == [(step, completions * step) for step in (1, 2, 3, 4)]
    assert curves.keys() >= set((TAGS + MORE_TAGS[script.key]).split())
    assert all(math.isfinite(value) for points in curves.values() for _, value in points)
    resolved = load_config(script.config_class, folder / "config.yml")
    sizes = ["micro_batch_tokens=4096", "generation_batch_size=256"] if script.key == "grpo" else []  # auto on a CPU
    assert resolved == script.config(folder, "model=tiny_model", *more, *sizes)
    there = f"{script.key}_logs/run/config.yml"
    process = Process(script, folder, "--config", there, "num_steps=5", patch=functools.partial(os.chdir, tmp_path))
    assert process.wait() == 0 and "resuming after step 4" in process.out and last_step(folder) == 5, process.err


def test_same_seed_gives_the_same_run_and_another_seed_another(tmp_path, script, finished):
    assert_same_run(script.train(tmp_path / "again"), finished[script.key])
    other, ours = model_weights(script.train(tmp_path / "other", "seed=1")), model_weights(finished[script.key])
    assert not any(torch.equal(other[name], ours[name]) for name in ours)


@pytest.mark.parametrize("overrides", [["mask_truncated=true", "weight_decay=0.5", "kl_weight=0.1"], ["kl_weight=0"]])
def test_step_without_any_gradient_is_a_no_op(tmp_path, overrides):
    # No answer fits in two tokens, so all rewards are equal and every row is truncated.
    folder = SCRIPTS["grpo"].train(tmp_path / "run", "max_new_tokens=2", *overrides)
    curves = scalars(folder)
    assert all(math.isfinite(value) for points in curves.values() for _, value in points)
    assert [value for _, value in curves["completion/truncated"]] == [1, 1, 1, 1]
    assert [value for _, value in curves["optim/loss"]] == [0, 0, 0, 0]
    set_seed(0)  # the seed alone determines the adapter's initial weights
    fresh = grpo_train.make_policy(utils.load_model(TINY, "float32", "cpu"), grpo_train.LoRA(rank=4), False)
    fresh = {name.replace(".default", ""): parameter for name, parameter in fresh.named_parameters()}
    assert all(torch.equal(weight, fresh[name]) for name, weight in model_weights(folder).items())


def test_mask_truncated_takes_truncated_rows_and_no_others_out_of_the_loss(tmp_path, monkeypatch):
    spy = Mock(wraps=grpo_train.make_micro_batches)
    monkeypatch.setattr(grpo_train, "make_micro_batches", spy)
    overrides = ["num_steps=2", "prompts_per_step=12", "max_new_tokens=16", "kl_weight=0.1", "mask_truncated=true"]
    SCRIPTS["grpo"].train(tmp_path / "run", *overrides)
    for _, completions, _, weights, *_ in (call.args for call in spy.call_args_list):
        assert completions.truncated.any() and torch.equal(weights > 0, ~completions.truncated)
        assert float((weights * completions.mask.sum(1)).sum()) == pytest.approx(1.0)


def only_even_sums(completions, prompts, **columns):
    """Reward function for which groups of four differ if the first number of their prompt is even."""
    return [float(i % 4) * (int(prompt.split()[1]) % 2 == 0) for i, prompt in enumerate(prompts)]


@pytest.mark.parametrize("max_rounds", [1, 3])
def test_dynamic_sampling_draws_on_until_enough_groups_differ_and_trains_on_these(tmp_path, monkeypatch, max_rounds):
    data = tmp_path / "sums.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": f"Compute {i} + 1", "answer": "0"}) for i in range(40)))
    spy, drawn = Mock(wraps=grpo_train.make_micro_batches), Mock(wraps=grpo_train.rollout)
    monkeypatch.setattr(grpo_train, "make_micro_batches", spy)
    monkeypatch.setattr(grpo_train, "rollout", drawn)
    overrides = [f"dataset={data}", "dataset_args={}", f"max_sampling_rounds={max_rounds}", "prompts_per_step=3"]
    overrides += ["max_new_tokens=8", "rewards={'test_scripts:only_even_sums': 1.0}"]
    folder = SCRIPTS["grpo"].train(tmp_path / "run", *overrides)
    rounds = [[problem.item["prompt"] for problem in call.args[1]] for call in drawn.call_args_list]
    epoch = [prompt for prompts in rounds for prompt in prompts][:40]
    assert len(set(epoch)) == len(epoch)

    expected, num_prompts, steps = [], [], iter(rounds)  # draw again by the rule
    for _ in range(4):
        prompts = []
        for _ in range(max_rounds):
            prompts += next(steps)
            if sum(int(prompt.split()[1]) % 2 == 0 for prompt in prompts) >= 3:
                break
        expected.append([int(prompt.split()[1]) % 2 == 0 for prompt in prompts for _ in range(4)])
        num_prompts.append(len(prompts))
    assert not list(steps)
    curves = scalars(folder)
    assert [v for _, v in curves["progress/prompts"]] == list(itertools.accumulate(num_prompts))
    assert [v for _, v in curves["progress/completions"]] == list(itertools.accumulate(4 * n for n in num_prompts))
    assert (max(num_prompts) > 3) == (max_rounds > 1) and sum(num_prompts) > 3 * 4 * (max_rounds > 1)
    for call, differs, n in zip(spy.call_args_list, expected, num_prompts, strict=True):
        prompts, completions, advantages, weights = call.args[:4]
        assert len(prompts) == n and (weights > 0).tolist() == (advantages != 0).tolist() == differs
        lengths = completions.mask.sum(1)
        torch.testing.assert_close(weights[weights > 0], (1 / lengths.sum()).expand(sum(differs)))


def test_batch_sizes_of_the_rollout_change_no_weight(tmp_path, finished):
    # The `finished` run has population_batch=4.
    batches, saved = {"population_batch=1": "es", "population_batch=6": "es"}, "checkpoints/step_000002/model"
    for override, key in {**batches, "micro_batch_tokens=1 generation_batch_size=1": "grpo"}.items():
        folder = SCRIPTS[key].train(tmp_path / override, *override.split(), stop_after=2)
        ours, theirs = (model_weights(run, saved) for run in (folder, finished[key]))
        for name, weight in theirs.items():
            tolerance = 1e-3 if key == "grpo" else 0  # different summation order
            assert (ours[name] - weight).norm() <= tolerance * weight.norm()


@pytest.mark.parametrize("stop", ["[]", "['</answer>']"])
def test_plain_text_completion_ends_before_the_next_turn_in_rollouts_es_and_evaluation(
    tmp_path, monkeypatch, script, stop
):
    # A base model: no chat template, and after its answer it writes the next turn.
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    written = tokenizer("<think>3+4=7</think><answer>7</answer>\n\nUser: Compute 1+1").input_ids
    tokenizer.chat_template = None
    shutil.copytree(TINY, tmp_path / "base", ignore=shutil.ignore_patterns("chat_template*"))
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "sevens.jsonl").write_text('{"prompt": "Compute 3+4", "answer": "7"}\n' * 20)
    decode, columns = generation._decode, []

    def begin(*arguments):
        columns[:] = written
        decode(*arguments)

    def write(logits, uniforms, temperature):
        return torch.full((len(logits),), columns.pop(0)), torch.zeros(len(logits))

    monkeypatch.setattr(generation, "_decode", begin)
    monkeypatch.setattr(generation, "sample", write)
    data = [f"dataset={tmp_path / 'sevens.jsonl'}", "dataset_args={}", "eval_size=2"]
    curves = scalars(script.train(tmp_path / "run", f"model={tmp_path / 'base'}", f"stop={stop}", *data))
    length = next(
        n for n in range(99) if tokenizer.decode(written[:n]).endswith("User:" if stop == "[]" else "</answer>")
    )
    assert {value for _, value in curves["eval/strict_accuracy"]} == {1} and dict(curves["accuracy/strict"])[1] == 1
    assert {value for _, value in curves["eval/length"]} == {length} == {dict(curves["completion/length_mean"])[1]}
    assert dict(curves["completion/truncated"])[1] == 0


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_trains_the_embedded_model_and_its_suggested_models_load(recipe, tmp_path):
    script = SCRIPTS[recipe.stem.partition("_")[0]]
    head = recipe.read_text().partition("\n\n")[0]
    offers = re.findall(r"\b\w+=[\w/-]+(?:\.[\w/-]+)*", head.replace("\n# ", " "))
    assert len([offer for offer in offers if offer.startswith("model=")]) == 3
    for offer in offers:
        assert load_config(script.config_class, recipe, [offer]) != load_config(script.config_class, recipe), offer

    for split in ("train", "test"):
        problems = [{"question": f"What is {i} plus 2?", "answer": f"It is {i}+2.\n#### {i + 2}"} for i in range(9)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, problems)))
    sizes = "num_steps=2 eval_size=4 max_new_tokens=16 device=cpu" + " dataset_args.size=40" * ("math" in recipe.stem)
    more = {"grpo": " prompts_per_step=4 warmup_steps=1", "es": " prompts_per_step=4 population_size=4"}
    sizes += more[script.key]
    where = [f"model={TINY}", f"log_dir={tmp_path}", "run_name=run"]
    where += [f"dataset_args={{path: {tmp_path}}}"] if "gsm8k" in recipe.stem else []
    script.module.main(load_config(script.config_class, recipe, [*sizes.split(), *where]))
    assert [step for step, _ in scalars(tmp_path / "run")["reward/mean"]] == [1, 2]
    assert (tmp_path / "run" / "model" / "tokenizer.json").is_file()


def test_ctrl_c_while_libraries_are_imported_shows_no_traceback(script):
    command = [sys.executable, f"{script.name}.py"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while "torch" not in Path(f"/proc/{process.pid}/maps").read_text():
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60) == (b"", b"") and process.returncode == -signal.SIGINT


# Errors: bad input gives one line and starts nothing, a bug in code gives a traceback


BAD_INPUT = [
    ("group_size=1", "command line: group_size: 1: should be greater than or equal to 2"),
    ("--config=nowhere.yml", "nowhere.yml: [Errno 2] No such file or directory"),
    ("dataset=math", "dataset: 'math': expected one of math_expr, gsm8k, or a path that ends in .jsonl"),
    ("rewards={speed: 1}", "rewards: 'speed': expected one of accuracy, lenient_accuracy, format, "),
    ("model=nowhere/at_all", "model: 'nowhere/at_all': We couldn't connect to 'https://huggingface.co'"),
    ("model=tinny", "model: 'tinny': no such folder; a name on the hub has the form owner/model"),
    ("model=tests", "model: 'tests': Unrecognized model in tests."),
    ("log_dir=README.md/logs", "log_dir: README.md/logs/run cannot be created: "),
    ("run_name=taken", "taken already exists; choose another name or delete it"),
    ("max_new_tokens=500", "max_new_tokens: 500: a prompt of "),
    ("device=cuda", "device: cuda: PyTorch finds no GPU; use cpu or auto"),
    ("attention=flash", "attention: flash: needs a GPU and dtype: bfloat16"),
    ("--group_size=1", "command line: group_size: 1: should be greater than or equal to 2"),
    ("--lr=1e-4", "command line: lr: 0.0001: unknown key, did you mean learning_rate?"),
    ("--lr", "command line: lr: expected key=value"),
]


@pytest.mark.parametrize(("argument", "message"), BAD_INPUT, ids=[argument for argument, _ in BAD_INPUT])
def test_bad_input_ends_with_one_line(tmp_path, capfd, monkeypatch, argument, message):
    (tmp_path / "logs" / "taken").mkdir(parents=True)
    (tmp_path / "logs" / "taken" / "notes.txt").write_text("mine")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)  # keep pytest's handlers
    arguments = ["grpo_train.py", f"log_dir={tmp_path / 'logs'}", "run_name=run", "dataset_args.size=20", argument]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as error:
        utils.run_from_command_line(grpo_train.main, grpo_train.GRPOConfig, "grpo_config.yml")
    line = str(error.value)
    assert line.startswith("error: ") and message in line and len(line.splitlines()) == 1
    assert not capfd.readouterr().err
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["notes.txt"]


@pytest.mark.parametrize(("key", "bug"), [("grpo", "P, G, extra = rewards.shape"), ("es", "raise OSError('no file')")])
def test_error_in_edited_code_shows_its_traceback_and_location_and_keeps_the_log(tmp_path, key, bug):
    path = tmp_path / f"{key}_train.py"
    code, train, body = (ROOT / path.name).read_text().partition("\ndef train(")
    body, count = re.subn(r"^( +)(rewards = .*)\n", rf"\1\2\n\1if step == 1:\n\1    {bug}\n", body, flags=re.MULTILINE)
    assert count == 1
    path.write_text(code + train + body)
    process = Process(SCRIPTS[key], tmp_path / "run", path=path)
    assert process.wait() == 1
    assert "Traceback" in process.err and bug in process.err and f'"{path}", line ' in process.err
    steps = {tag: [step for step, _ in points] for tag, points in scalars(tmp_path / "run").items()}
    assert len(steps) > 20 and steps.pop("eval/strict_accuracy") == [0]
    assert all(logged == [1] for tag, logged in steps.items() if not tag.startswith(("eval/", "time/evaluate")))


def test_script_without_its_docstring_shows_its_help(tmp_path, script):
    path = tmp_path / f"{script.name}.py"
    path.write_text((ROOT / path.name).read_text().split('"""', 2)[2])
    process = Process(script, tmp_path / "run", "--help", path=path)
    assert process.wait() == 0 and "key=value" in process.out and not process.err


def test_importing_a_script_starts_nothing(script, capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", Mock())
    runpy.run_path(str(ROOT / f"{script.name}.py"))
    assert not any(capfd.readouterr()) and not list(tmp_path.iterdir()) and not signal.signal.called


# Multiple processes (gloo, CPU)


def record(file):
    """Record a process's gradients, weight fingerprints and evaluation problems in `file`."""
    seen = {"gradients": [], "weights": [], "evaluated": []}
    clip, commit, evaluate = torch.nn.utils.clip_grad_norm_, runs.Run._commit, utils.evaluate

    def clip_grad_norm_(parameters, max_norm):
        seen["gradients"].append(torch.cat([p.grad.flatten() for p in parameters]).tolist())
        return clip(parameters, max_norm)

    def _commit(run, save):
        commit(run, save)
        seen["weights"].append(run.state["weights"])
        file.write_text(json.dumps(seen))

    def evaluate_(setup):
        result = evaluate(setup)
        seen["evaluated"].append([item["prompt"] for item in result[1]])
        return result

    torch.nn.utils.clip_grad_norm_, runs.Run._commit, utils.evaluate = clip_grad_norm_, _commit, evaluate_


def start_processes(number, script, folder, *overrides):
    """Start a run as torchrun does. Each process writes a record next to the run's folder."""
    folder.parent.mkdir(exist_ok=True)
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    world = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    world |= {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number)}
    processes = []
    for rank in range(number):
        options = {"patch": functools.partial(record, folder.parent / f"seen{rank}.json")}
        if number > 1:
            options |= {"rank": rank, "environment": world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}}
        processes.append(Process(script, folder, *overrides, **options))
    return processes


def seen(folder, rank):
    return json.loads((folder.parent / f"seen{rank}.json").read_text())


SEQUENCE = ["kl_weight=0.05", "loss_normalization=sequence"]
MULTI_PROCESS = {
    # Five prompts and seven evaluation problems do not divide by two. Sequence means and the KL have their own sums.
    "grpo": ["prompts_per_step=5"],
    "grpo-dynamic": ["prompts_per_step=5", "max_sampling_rounds=3", "rewards={accuracy: 1}", "seed=3", *SEQUENCE],
    "es": ["population_size=5"],
    "es-gaussian": ["perturbation=gaussian", "antithetic=true"],
}


@pytest.mark.parametrize("way", MULTI_PROCESS)
def test_two_processes_take_the_same_steps_as_one(tmp_path, way):
    script, folders = SCRIPTS[way.partition("-")[0]], {}
    for number in (1, 2):
        folders[number] = folder = tmp_path / str(number) / "run"
        processes = start_processes(number, script, folder, "num_steps=2", "eval_size=7", *MULTI_PROCESS[way])
        assert [process.wait() for process in processes] == [0] * number, processes[0].err
        assert f"device  {number} x cpu" in processes[0].out
        assert "Held-out accuracy" in processes[0].out and all(not process.out for process in processes[1:])
        assert len(list(folder.glob("events*"))) == 1  # only one process logs
    alone, first, second = seen(folders[1], 0), seen(folders[2], 0), seen(folders[2], 1)

    # All processes have the same weights after every step. With ES, so does a single process.
    assert first["weights"] == second["weights"] and len(set(first["weights"])) == 3
    if script.key == "es":
        assert first["weights"] == alone["weights"]
        assert_same_run(folders[2], folders[1])
    else:
        one, two = (torch.tensor(run["gradients"][0], dtype=torch.float64) for run in (alone, first))
        assert first["gradients"] == second["gradients"] and len(first["gradients"]) == 2
        assert float((one - two).norm() / one.norm()) < 2e-6
        curves, other_curves = scalars(folders[1]), scalars(folders[2])
        assert curves.keys() == other_curves.keys()
        for tag in curves:
            if not tag.startswith(("time/", "throughput/", "progress/seconds")):
                rounding = 1e-5 if "sampler_gap" in tag else 1e-6  # this metric is pure rounding error
                expected = pytest.approx([v for _, v in curves[tag]], rel=1e-4, abs=rounding)
                assert [v for _, v in other_curves[tag]] == expected, tag
    if way == "grpo-dynamic":  # a second round, with the same gradient
        assert curves["progress/prompts"][0][1] > 5
    # No problem is evaluated twice.
    for whole, part, other in zip(alone["evaluated"], first["evaluated"], second["evaluated"], strict=True):
        assert sorted([*part, *other]) == sorted(whole) and len(whole) == 7


def test_processes_with_different_weights_stop(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "gather_object", lambda objects: [*objects, "00000000"])
    with pytest.raises(runs.UserError, match="the processes have different weights"):
        SCRIPTS["es"].train(tmp_path / "run", stop_after=1)


@pytest.mark.slow
def test_signal_to_one_process_stops_all_after_the_same_step_and_two_resume_as_one(tmp_path, script):
    folder, overrides = tmp_path / "two" / "run", ["num_steps=30", "checkpoint_every=4"]
    processes = start_processes(2, script, folder, *overrides)
    processes[0].wait_until(lambda: last_step(folder) == 4)
    processes[1].send_signal(signal.SIGTERM)
    assert [process.wait() for process in processes] == [143, 143]
    step, out = last_step(folder), processes[0].out
    assert 4 <= step < 30 and f"stopped after step {step}; to resume:" in out
    assert re.search(r"torchrun --nproc_per_node 2 \S+ --config \S+/config.yml$", out.rstrip())
    assert len(seen(folder, 0)["weights"]) == len(seen(folder, 1)["weights"])
    assert [at for at, _ in scalars(folder)["reward/mean"]] == list(range(1, step + 1))

    more = "num_steps=30", "checkpoint_every=30"  # two resumed processes must match one process
    processes = start_processes(2, script, folder, *more)
    assert [process.wait() for process in processes] == [0, 0] and f"resuming after step {step}" in processes[0].out
    theirs = model_weights(script.train(tmp_path / "one" / "run", *more))
    for name, weight in model_weights(folder).items():
        torch.testing.assert_close(weight, theirs[name], atol=0 if script.key == "es" else 1e-3, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_process_is_killed_the_others_end(tmp_path, script, victim):
    folder = tmp_path / "run"
    # Without --multi_gpu, accelerate starts a single process on a CPU, whatever --num_processes is.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    command += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    command += [f"{script.name}.py", *script.where(folder), "num_steps=500", "lr_schedule=constant"]
    launcher = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while last_step(folder) < 2:
        assert launcher.poll() is None
        time.sleep(0.05)
    workers = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True).stdout.split()
    assert len(workers) == 2
    os.kill(int(workers[victim]), signal.SIGKILL)
    assert launcher.wait(timeout=60) != 0
    with pytest.raises(ProcessLookupError):
        os.kill(int(workers[1 - victim]), 0)
    assert runs.newest_checkpoint(folder)[0].name == f"step_{last_step(folder):06d}"


def test_when_one_process_refuses_its_input_all_end(tmp_path, finished):
    folder = shutil.copytree(finished["es"], tmp_path / "run")
    processes = start_processes(2, SCRIPTS["es"], folder, "seed=1")
    assert all(process.wait(60) for process in processes)  # exit codes
    assert "seed: 1: the run was started with 0" in processes[0].err


# README


def section(title):
    return re.search(rf"^## {title}\n(.*?)(?=^## )", README, re.DOTALL | re.MULTILINE)[1]


def blocks(title, language=""):
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", section(title), re.DOTALL | re.MULTILINE)
    return [text for kind, text in fenced if kind == language]


@pytest.fixture
def clone(tmp_path):
    """Make a folder with the files of a clone, to run commands in."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.yml")]:
        shutil.copy(path, tmp_path)
    (tmp_path / "tiny_model").symlink_to(TINY)
    return tmp_path


@pytest.mark.slow
def test_your_own_task_runs_as_written_and_is_learned(clone):
    for code in blocks("Your own task", "python"):
        (clone / re.match(r"# (\w+\.py)\n", code)[1]).write_text(code)
    make, train = blocks("Your own task")[-1].splitlines()
    run(make, clone)
    run(train, clone)
    (folder,) = (clone / "grpo_logs").iterdir()
    curve = [accuracy for _, accuracy in scalars(folder)["eval/strict_accuracy"]]
    assert curve[0] < 0.1 and curve[-1] > 0.6


@pytest.mark.slow
def test_result_is_loaded_merged_sampled_from_and_trained_on_as_written(clone):
    for name, script in SCRIPTS.items():
        script.train(clone / f"{name}_logs" / "NAME", "model=tiny_model")
    (code,) = blocks("Use the result", "python")
    load, sample = code.split("\n\n", 2)[1:]
    parts = re.findall(r"^(?:# )?(model = .*)$", load, re.MULTILINE)
    assert len(parts) == 3
    each = "".join(f"{part}\n{sample}\nlogits.append(model(torch.arange(20)[None]).logits)\n" for part in parts)
    code = "import torch\nlogits = []\n" + code.partition("model = ")[0] + each
    code += "assert (logits[1] - logits[0]).abs().max() < 0.01 * (logits[2] - logits[0]).abs().max()"
    adapter, merged, es, _ = run(f"python -c {shlex.quote(code)}", clone).split("</answer>\n")
    assert adapter == merged and "<answer>" in adapter and "<answer>" in es
    for name, script in SCRIPTS.items():
        overrides = [*script.small, "run_name=again"] + ["kl_weight=0.1"] * (name == "grpo")
        run(f"python {name}_train.py model=grpo_logs/NAME/model {' '.join(overrides)}", clone)
    kl = scalars(clone / "grpo_logs" / "again")["policy/kl_k3"]
    assert kl[0] == (1, 0.0) and kl[-1][1] > 0  # the policy is its own reference at first


def test_every_promise_names_a_test_that_exists():
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    promises = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+)`", promises)
    assert len(named) > 60
    assert [name for name in named if f"def {name}(" not in tests] == []


def test_every_mutant_breaks_one_place_in_the_code():
    rows = mutants.ROW.findall((ROOT / "tests" / "README.md").read_text(encoding="utf-8"))
    assert len(rows) > 180
    for row in rows:
        file, old, *_ = map(mutants.unescape, row)
        assert (ROOT / file).read_text(encoding="utf-8").count(old) == 1, row


def test_every_file_that_readme_names_exists():
    files = re.findall(r"(?:python|--config|num_processes 2|nproc_per_node 2) ((?:\w+/)*[\w.-]+\.(?:py|yml))", README)
    assert len(files) > 8
    for name in files:
        assert (ROOT / name).is_file() or "/NAME/" in name or name == "make_problems.py", name
    linked = re.findall(r"\]\(((?!http|#)[^)#]+)", README)
    for name in re.findall(r"^([\w./]+)", blocks("Files")[0], re.MULTILINE) + linked:
        assert (ROOT / name).exists(), name


@pytest.mark.slow
def test_benchmark_for_a_gpu_runs_at_toy_size():
    out = run("python benchmarks/gpu.py --tiny --model tiny_model")
    for row in ("low_rank, one batch", "graphs", "eager", "generate", "sdpa, gradient checkpointing", "rollout"):
        assert f"| {row} |" in out
    assert "graphs and eager have 100.0% of tokens in common" in out
