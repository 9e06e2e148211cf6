"""The scripts as a user runs them, and the helpers of a run: model loading, prompts, evaluation, logs."""

import ast
import math
import os
import re
import shutil
import subprocess
import sys
import types

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from conftest import ROOT, SCRIPTS, TINY, TWO_PROCESSES, make_model, run_script, scalars, settings, wait_until
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import grpo_train
import runs
import utils
from generation import Completions
from reward import UserError
from runs import completion_table, wilson_interval
from utils import (
    Problem,
    Setup,
    completion_texts,
    draw_problems,
    encode_prompts,
    evaluate,
    load_config,
    load_model,
    load_tokenizer,
    schedule_factor,
    score_completions,
    seeded_generator,
    stop_ids,
)

SMALL = [
    "num_steps=2",
    "prompts_per_step=4",
    "group_size=4",
    "max_new_tokens=32",
    "warmup_steps=0",
    "eval_size=8",
    "eval_every=1",
    "lora.rank=4",
]


def train(tmp_path, name, *overrides):
    """A small run in this process; returns its folder."""
    overrides = [*SMALL, f"model={TINY}", f"log_dir={tmp_path}", f"run_name={name}", *overrides]
    grpo_train.main(load_config(grpo_train.GRPOConfig, ROOT / "grpo_config.yml", overrides))
    return tmp_path / name


# Whole runs


def test_script_runs_two_steps_saves_an_adapter_and_says_how_to_load_it(tmp_path):
    done = run_script([*SMALL, f"log_dir={tmp_path}", "run_name=run"])
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    assert f'PeftModel.from_pretrained(base, "{tmp_path}/run/model")' in done.stdout
    assert "Held-out accuracy, greedy, 8 problems (95% interval)" in done.stdout
    assert "tiny_model, 835,712 parameters, 38,912 trained\n" in done.stdout

    base = AutoModelForCausalLM.from_pretrained(TINY)
    ids = torch.arange(20)[None]
    before = base(input_ids=ids).logits
    trained = PeftModel.from_pretrained(base, tmp_path / "run" / "model")
    assert not torch.equal(trained(input_ids=ids).logits, before)
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "model").chat_template
    assert all((w != 0).any() for n, w in load_file(tmp_path / "run/model/adapter_model.safetensors").items())

    curves = scalars(tmp_path / "run")
    assert [step for step, _ in curves["eval/strict_accuracy"]] == [0, 1, 2]
    assert [step for step, _ in curves["reward/mean"]] == [1, 2]  # two steps, each once
    assert [value for _, value in curves["progress/completions"]] == [16, 32]
    for tag in (
        "eval/lenient_accuracy",
        "reward/accuracy",
        "reward/format",
        "time/step",
        "time/rollout",
        "throughput/tokens_per_second",
        "progress/generated_tokens",
        "progress/seconds",
        "policy/entropy",
        "optim/grad_norm",
    ):
        assert tag in curves
    resolved = load_config(grpo_train.GRPOConfig, tmp_path / "run" / "config.yml")
    assert resolved.group_size == 4 and resolved.lora.rank == 4


def test_same_seed_gives_the_same_run_and_another_seed_another(tmp_path):
    folders = [train(tmp_path, "a"), train(tmp_path, "b"), train(tmp_path, "c", "seed=1")]
    weights = [load_file(folder / "model" / "adapter_model.safetensors") for folder in folders]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])
    curves = [scalars(folder) for folder in folders[:2]]
    for tag in curves[0]:
        if not tag.startswith(("time/", "throughput/", "progress/seconds")):
            assert curves[0][tag] == curves[1][tag], tag


@pytest.mark.parametrize(
    "overrides",
    [
        ["kl_weight=0.1", "updates_per_step=2", "gradient_checkpointing=true", "loss_normalization=sequence"],
        ["lora=null", "kl_weight=0.1", "scale_advantages=batch", "loss_normalization=constant"],
        ["dtype=bfloat16", "kl_weight=0.1", "scale_advantages=none"],
        ["lora=null", "dtype=bfloat16", "lr_schedule=cosine"],
        ["micro_batch_tokens=1", "generation_batch_size=1", "mask_truncated=true"],
    ],
    ids=["kl-two-updates", "full-kl", "bf16", "full-bf16", "smallest-batches"],
)
def test_each_way_of_training_runs_and_logs_finite_numbers(tmp_path, overrides):
    folder = train(tmp_path, "run", *overrides)
    curves = scalars(folder)
    assert all(math.isfinite(value) for points in curves.values() for _, value in points)
    if "kl_weight=0.1" in overrides:
        assert curves["policy/kl_k3"][0][1] == 0 or "updates_per_step=2" in overrides
        assert curves["policy/kl_k3"][1][1] > 0
    if "dtype=bfloat16" not in overrides:
        first_ratios = curves["policy/ratio_min"][0][1], curves["policy/ratio_max"][0][1]
        assert first_ratios == (1, 1) or "updates_per_step=2" in overrides
        assert curves["policy/sampler_gap_max"][0][1] < 1e-3
    if "lora=null" in overrides:
        loaded = AutoModelForCausalLM.from_pretrained(folder / "model")
        assert loaded.dtype == torch.float32
        assert any(
            not torch.equal(a, b)
            for a, b in zip(loaded.parameters(), AutoModelForCausalLM.from_pretrained(TINY).parameters(), strict=True)
        )
    if "lora=null" not in overrides:
        weights = load_file(folder / "model" / "adapter_model.safetensors").values()
        assert {weight.dtype for weight in weights} == {torch.float32}  # in bf16 most updates would round away


def test_training_goes_on_from_a_saved_adapter_and_its_kl_starts_at_zero(tmp_path, capsys):
    first = train(tmp_path, "first", "learning_rate=0.01")
    second = train(tmp_path, "second", f"model={first / 'model'}", "kl_weight=0.1")
    # The frozen second copy of the adapter, from which the KL is measured, is not counted.
    assert capsys.readouterr().out.count(", 835,712 parameters, 38,912 trained\n") == 2
    curves, before = scalars(second), scalars(first)
    assert curves["policy/kl_k3"][0][1] == 0
    assert curves["eval/strict_accuracy"][0][1] == before["eval/strict_accuracy"][-1][1]
    saved = load_file(second / "model" / "adapter_model.safetensors")
    assert saved.keys() == load_file(first / "model" / "adapter_model.safetensors").keys()


def test_step_without_any_gradient_is_a_no_op(tmp_path):
    # Two new tokens never complete an answer: every row is truncated, and masked out of the loss.
    folder = train(tmp_path, "run", "max_new_tokens=2", "mask_truncated=true", "kl_weight=0.1", "weight_decay=0.5")
    curves = scalars(folder)
    assert all(math.isfinite(value) for points in curves.values() for _, value in points)
    assert [value for _, value in curves["completion/truncated"]] == [1, 1]
    assert [value for _, value in curves["optim/loss"]] == [0, 0]
    set_seed(0)
    fresh = grpo_train.make_policy(load_model(TINY, "float32", "cpu"), grpo_train.LoRA(rank=4), False)
    fresh = {name.replace(".default", ""): parameter for name, parameter in fresh.named_parameters()}
    for name, weight in load_file(folder / "model" / "adapter_model.safetensors").items():
        assert torch.equal(weight, fresh[name]), name


@pytest.mark.parametrize("masked", [True, False])
def test_mask_truncated_takes_cut_rows_and_no_others_out_of_the_loss(tmp_path, monkeypatch, masked):
    seen = []
    honest = grpo_train.make_micro_batches

    def spy(prompts, completions, advantages, weights, *rest):
        seen.append((completions.truncated, weights, completions.mask.sum(1)))
        return honest(prompts, completions, advantages, weights, *rest)

    monkeypatch.setattr(grpo_train, "make_micro_batches", spy)
    train(tmp_path, "run", "prompts_per_step=12", "max_new_tokens=16", f"mask_truncated={masked}", "kl_weight=0.1")
    for truncated, weights, lengths in seen:
        assert truncated.any() and not truncated.all()
        counted = ~truncated if masked else torch.ones_like(truncated)
        assert torch.equal(weights > 0, counted)
        assert float((weights * lengths).sum()) == pytest.approx(1.0)


def test_non_finite_gradient_skips_the_step_and_is_counted(tmp_path, monkeypatch):
    honest = grpo_train.policy_loss

    def poisoned(*args):
        loss, ratio = honest(*args)
        return loss * torch.nan, ratio

    monkeypatch.setattr(grpo_train, "policy_loss", poisoned)
    folder = train(tmp_path, "run")
    assert [value for _, value in scalars(folder)["optim/skipped_steps"]] == [1, 2]
    weights = load_file(folder / "model" / "adapter_model.safetensors")
    assert all((w == 0).all() for name, w in weights.items() if "lora_B" in name)


def test_two_processes_take_the_step_of_one_with_hugging_face_datasets_installed(tmp_path, hugging_face_datasets):
    # Five prompts do not divide by two; the sequence normalization and the KL have denominators of their own.
    overrides = [
        *SMALL,
        f"log_dir={tmp_path}",
        "device=cpu",
        "prompts_per_step=5",
        "learning_rate=1e-3",
        "kl_weight=0.05",
        "loss_normalization=sequence",
    ]
    for name, launcher in {"one": [sys.executable], "two": TWO_PROCESSES}.items():
        done = run_script([*overrides, f"run_name={name}"], launcher=launcher, path=[hugging_face_datasets])
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Held-out accuracy") == 1
        assert f"device  {1 + (name == 'two')} x cpu" in done.stdout
    one, two = scalars(tmp_path / "one"), scalars(tmp_path / "two")
    assert one.keys() == two.keys()
    for tag in one:
        if not tag.startswith(("time/", "throughput/", "progress/seconds")):
            rounding = 1e-5 if "sampler_gap" in tag else 1e-6  # that tag is nothing but rounding
            assert [v for _, v in two[tag]] == pytest.approx([v for _, v in one[tag]], rel=1e-4, abs=rounding), tag
    weights = [load_file(tmp_path / name / "model" / "adapter_model.safetensors") for name in ("one", "two")]
    for name in weights[0]:
        torch.testing.assert_close(weights[1][name], weights[0][name], atol=2e-5, rtol=1e-3)


# Bad input, as a user sees it: one line, no traceback, nothing started


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["group_size=1"], "error: command line: group_size: 1: should be greater than or equal to 2"),
        (["learning_rate=fast"], "error: command line: learning_rate: fast: should be a valid number"),
        (["--config", "nowhere.yml"], "error: nowhere.yml: [Errno 2] No such file or directory"),
        (["dataset=math"], "error: dataset: 'math': expected one of math_expr, gsm8k, or a path that ends in .jsonl"),
        (["rewards={speed: 1}"], "error: rewards: 'speed': expected one of accuracy, format, or my_module"),
        (["model=nowhere/at_all"], "error: model: 'nowhere/at_all': We couldn't connect to 'https://huggingface.co'"),
        (["model=tinny"], "error: model: 'tinny': there is no such folder here; on the hub, owner/model is expected"),
        (["log_dir=README.md/logs", "run_name=run"], "error: log_dir: README.md/logs/run cannot be made: "),
        (["max_new_tokens=500"], "error: max_new_tokens: 500: a prompt of "),
        (["model=tests"], "error: model: 'tests': Unrecognized model in tests."),
        (["prompts_per_step=0"], "error: command line: prompts_per_step: 0: should be greater than 0"),
    ],
)
def test_bad_input_ends_with_one_line(arguments, line, tmp_path):
    if not any("log_dir" in argument or "--config" in argument for argument in arguments):
        arguments = [*arguments, f"log_dir={tmp_path / 'logs'}"]
    done = run_script(arguments)
    assert done.returncode == 1
    assert line in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("events*"))


def test_chat_template_that_fails_ends_with_one_line(tmp_path):
    shutil.copytree(TINY, tmp_path / "model")
    tokenizer = load_tokenizer(TINY)
    tokenizer.chat_template = "{{ raise_exception('Upgrade the library') }}"
    tokenizer.save_pretrained(tmp_path / "model")
    done = run_script([f"model={tmp_path / 'model'}", f"log_dir={tmp_path / 'logs'}"])
    assert done.returncode == 1
    assert done.stderr.strip() == "error: model: its chat template cannot be used: Upgrade the library"


def test_run_name_that_exists_is_named_and_nothing_in_it_touched(tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    done = run_script([f"log_dir={tmp_path}", "run_name=taken"])
    assert f"{tmp_path}/taken exists already; choose another name or delete it" in done.stderr
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("failure", "code"), [("1 / (2 - len(calls))", 1), ("1.0 if len(calls) < 2 else os._exit(9)", 9)]
)
def test_reward_function_that_fails_or_dies_shows_where_and_what_was_logged_before_is_on_disk(tmp_path, failure, code):
    (tmp_path / "my_reward.py").write_text(
        f"import os\ncalls = []\ndef f(completions, **columns):\n    calls.append(1)\n"
        f"    return [{failure} for _ in completions]\n"
    )
    arguments = [*SMALL, f"log_dir={tmp_path}", "run_name=run", "rewards={'my_reward:f': 1.0}"]
    done = run_script(arguments, path=[tmp_path])
    assert done.returncode == code
    if code == 1:
        assert "Traceback" in done.stderr and done.stderr.endswith("ZeroDivisionError: division by zero\n")
        assert f'File "{tmp_path}/my_reward.py", line 5, in ' in done.stderr and failure in done.stderr
    curves = scalars(tmp_path / "run")
    assert [step for step, _ in curves["eval/strict_accuracy"]] == [0, 1]
    logged = [tag for tag in curves if not tag.startswith(("eval/", "time/evaluate"))]
    assert len(logged) > 20 and all([step for step, _ in curves[tag]] == [1] for tag in logged)


# Code that a user edits


@pytest.fixture
def clone(tmp_path):
    """The folder of a copy of all that a run needs."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.yml")]:
        shutil.copy(path, tmp_path)
    shutil.copytree(TINY, tmp_path / "tiny_model")
    return tmp_path


@pytest.mark.parametrize(("name", "bug"), [("grpo", "P, G, extra = rewards.shape"), ("es", "N, extra = rewards.shape")])
def test_error_in_edited_code_shows_its_traceback_and_location(clone, name, bug):
    path = clone / f"{name}_train.py"
    code, train, body = path.read_text().partition("\ndef train(")
    body, count = re.subn(r"^( +)rewards = .*\n", rf"\g<0>\1{bug}\n", body, flags=re.MULTILINE)
    assert count == 1
    path.write_text(code + train + body)
    done = run_script(SCRIPTS[name].small, path, cwd=clone)
    assert done.returncode != 0
    assert "Traceback" in done.stderr and bug in done.stderr and f'"{path}", line ' in done.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_without_its_docstring_shows_its_help_and_importing_it_starts_nothing(clone, name):
    path = clone / f"{name}_train.py"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[ast.parse("".join(lines)).body[0].end_lineno :]))
    before = sorted(clone.iterdir())
    for arguments in ([path, "--help"], ["-c", f"import {name}_train"]):
        command = [sys.executable, "-B", *arguments]
        done = subprocess.run(command, cwd=clone, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert ("key=value" in done.stdout) == ("--help" in arguments) == bool(done.stdout)
    assert sorted(clone.iterdir()) == before


# Models and prompts


def test_folder_without_weights_or_with_some_missing_is_named(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(UserError, match="model: '.*empty': .*safetensors") as error:
        load_model(str(tmp_path / "empty"), "float32", "cpu")
    assert "\n" not in str(error.value)

    weights = load_file(tmp_path / "whole" / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "whole" / "model.safetensors", metadata={"format": "pt"})
    missing = "whole': 1 of its weights are missing, such as model.layers.1.mlp.up_proj.weight"
    with pytest.raises(UserError, match=missing):
        load_model(str(tmp_path / "whole"), "float32", "cpu")

    file = tmp_path / "whole" / "model.safetensors"
    for content in (file.read_bytes()[:1000], b"version https://git-lfs.github.com/spec/v1\n"):  # cut off; a pointer
        file.write_bytes(content)
        with pytest.raises(UserError, match="model: '.*whole': ") as error:
            load_model(str(tmp_path / "whole"), "float32", "cpu")
        assert "\n" not in str(error.value)


def test_end_ids_are_all_of_the_generation_config_and_the_tokenizers():
    model, tokenizer = make_model(), load_tokenizer(TINY)
    model.generation_config.eos_token_id = [5, 9]
    assert stop_ids(model, tokenizer) == sorted({5, 9, tokenizer.eos_token_id})


def test_prompts_follow_the_chat_template_or_plain_text():
    tokenizer = load_tokenizer(TINY)
    chat, alone = (tokenizer.decode(encode_prompts(tokenizer, [{"prompt": "2+2"}], s)[0]) for s in ("Be brief.", ""))
    assert chat == "<|system|>Be brief.<|user|>2+2<|assistant|>"
    assert alone == "<|user|>2+2<|assistant|>"
    tokenizer.chat_template = None
    plain, alone = (tokenizer.decode(encode_prompts(tokenizer, [{"prompt": "2+2"}], s)[0]) for s in ("Be brief.", ""))
    assert plain == "Be brief.\n\nUser: 2+2\n\nAssistant:"
    assert alone == "User: 2+2\n\nAssistant:"


def test_system_prompt_goes_to_the_user_where_the_template_takes_none():
    tokenizer = load_tokenizer(TINY)
    refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    tokenizer.chat_template = refuse + tokenizer.chat_template
    (ids,) = encode_prompts(tokenizer, [{"prompt": "2+2"}], "Be brief.")
    assert tokenizer.decode(ids) == "<|user|>Be brief.\n\n2+2<|assistant|>"
    tokenizer.chat_template = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    assert tokenizer.decode(encode_prompts(tokenizer, [{"prompt": "2+2"}], "Be brief.")[0]) == "Be brief.\n\n2+2"
    assert tokenizer.decode(encode_prompts(tokenizer, [{"prompt": "2+2"}], "")[0]) == "2+2"
    tokenizer.chat_template = "{{ raise_exception('Upgrade the library') }}"
    for system_prompt in ("Be brief.", ""):
        with pytest.raises(UserError, match="^model: its chat template cannot be used: Upgrade the library$"):
            encode_prompts(tokenizer, [{"prompt": "2+2"}], system_prompt)


def test_prompts_do_not_change_with_the_date():
    tokenizer = load_tokenizer(TINY)
    today = "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}"  # as Llama's templates do
    tokenizer.chat_template = today + tokenizer.chat_template
    assert (
        tokenizer.decode(encode_prompts(tokenizer, [{"prompt": "2+2"}], "")[0]) == "26 Jul 2024<|user|>2+2<|assistant|>"
    )


def test_think_tag_that_the_template_writes_is_scored_with_the_completion_and_not_asked_for_twice(capsys, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    ids = tokenizer(["1+1=2</think><answer>2</answer>", "2"]).input_ids
    length = max(map(len, ids))
    tokens = torch.tensor([row + [0] * (length - len(row)) for row in ids])
    mask = torch.arange(length) < torch.tensor([[len(row)] for row in ids])
    completions = Completions(tokens, mask, torch.zeros(2, length), torch.zeros(2, dtype=torch.bool))
    problems = [Problem({"prompt": "1+1", "answer": "2"}, [])] * 2
    scores = score_completions({"accuracy": 1.0}, completions, tokenizer, problems)
    assert [row["accuracy/strict"] for row in scores] == [0, 0]

    opened = "{% if add_generation_prompt %}{{ '<think>\n' }}{% endif %}"
    tokenizer.chat_template += opened
    tokenizer.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert "begins every answer with <think>, " in capsys.readouterr().out
    assert (
        tokenizer.decode(encode_prompts(tokenizer, [{"prompt": "1+1"}], "")[0]) == "<|user|>1+1<|assistant|><think>\n"
    )
    assert completion_texts(completions, tokenizer) == ["<think>1+1=2</think><answer>2</answer>", "<think>2"]
    scores = score_completions({"accuracy": 1.0}, completions, tokenizer, problems)
    assert [row["accuracy/strict"] for row in scores] == [1, 0]
    told_not_to = opened.replace("<think>\n", "<think>\n\n</think>\n\n")
    tokenizer.chat_template = tokenizer.chat_template.replace(opened, told_not_to)
    assert completion_texts(completions, tokenizer)[1] == "<think></think>2"


def test_model_without_chat_template_is_said_once(tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    load_tokenizer(str(tmp_path))
    assert capsys.readouterr().out.count("has no chat template") == 1


# Data order, schedules, statistics


def test_every_epoch_holds_every_item_once_in_an_order_of_its_own():
    items = list(range(10))
    whole = draw_problems(items, 0, 30, seed=0)
    epochs = [whole[i : i + 10] for i in (0, 10, 20)]
    assert all(sorted(epoch) == items for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [item for step in range(5) for item in draw_problems(items, step, 7, seed=0)][:30] == whole
    assert draw_problems(items, 0, 10, seed=1) != epochs[0]


def test_generators_of_different_streams_and_indices_differ():
    keys = [(seed, stream, index) for seed in (0, 1) for stream in ("data", "rollout") for index in (0, 1, 2**32 - 1)]
    draws = [tuple(torch.rand(4, generator=seeded_generator(*key)).tolist()) for key in keys]
    assert len(set(draws)) == len(keys)
    assert draws[0] == tuple(torch.rand(4, generator=seeded_generator(*keys[0])).tolist())


def test_schedule_warms_up_and_decays_and_no_step_is_wasted():
    factors = {s: [schedule_factor(s, step, 10, 3) for step in range(10)] for s in ("constant", "linear", "cosine")}
    for values in factors.values():
        assert values[:4] == [0.25, 0.5, 0.75, 1.0]
        assert min(values) > 0
    assert factors["constant"][4:] == [1.0] * 6
    assert factors["linear"][4:] == pytest.approx([6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7])
    assert factors["cosine"][-1] == pytest.approx((1 + math.cos(math.pi * 6 / 7)) / 2)


def test_wilson_interval_by_published_values():
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-3)
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-3)  # Newcombe 1998, table I


def test_evaluation_is_greedy_and_counts_strict_and_lenient():
    model, tokenizer = load_model(TINY, "float32", "cpu"), load_tokenizer(TINY)
    wordings = ("Compute", "Evaluate", "Multiply out")  # the last two mostly without tags
    items = [{"prompt": f"{w} {a}+4", "answer": str(a + 4)} for w in wordings for a in range(1, 7)]
    ids = encode_prompts(tokenizer, items, "")

    def metrics(items, batch_size):
        problems = [Problem(*pair) for pair in zip(items, ids, strict=True)]
        decoding = settings(48, stop_ids(model, tokenizer), tokenizer.pad_token_id, batch_size=batch_size)
        return evaluate(Setup(Accelerator(cpu=True), model, tokenizer, [], problems, decoding))[0]

    result = metrics(items, 3)
    assert result == metrics(items, 99)
    assert 0 < result["strict_accuracy"] < result["lenient_accuracy"] <= 1
    wrong = metrics([{**item, "answer": "1000"} for item in items], 99)
    assert wrong == {**result, "strict_accuracy": 0, "lenient_accuracy": 0}


def test_completions_in_the_log_are_text_and_never_markup():
    texts = ["<script>alert(1)</script>|\n<think>", "<think>.</think><answer>7</answer>", "it is 7"]
    table = completion_table([{"prompt": "<b>", "answer": "7"}] * 3, texts)
    assert "<script>" not in table and "<b>" not in table and "&lt;script&gt;" in table and "\n" not in table
    rows = table.split("<tr>")[2:]
    assert all(row.count("</td>") == 4 for row in rows)
    assert [re.match("<td>(.*?)</td>", row)[1] for row in rows] == ["✗", "✓", "✗ format"]


def test_hyperparameters_config_and_completions_are_logged_from_the_start(tmp_path):
    folder = SCRIPTS["grpo"].train(tmp_path / "run", stop_after=0)
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    events.Reload()
    assert {"config/text_summary", "completions/text_summary"} <= set(events.Tags()["tensors"])
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    logged = HParamsPluginData.FromString(content).session_start_info.hparams
    assert logged["group_size"].number_value == 4 and '"rank": 4' in logged["lora"].string_value
    assert logged["model"].string_value == TINY


def test_accuracy_is_logged_by_tokens_and_seconds_too(tmp_path):
    folder = train(tmp_path, "run", "eval_size=64")
    curves, by_tokens = scalars(folder), scalars(folder / "by_tokens")
    tokens, seconds = (
        [0, *(value for _, value in curves[f"progress/{name}"])] for name in ("generated_tokens", "seconds")
    )
    for name in ("strict_accuracy", "lenient_accuracy"):
        values = [value for _, value in curves[f"eval/{name}"]]
        assert by_tokens[f"by_tokens/{name}"] == [(n // 1000, value) for n, value in zip(tokens, values, strict=True)]
    assert by_tokens["by_tokens/strict_accuracy"] != by_tokens["by_tokens/lenient_accuracy"]
    events = EventAccumulator(str(folder / "by_tokens"))
    events.Reload()
    assert [e.wall_time for e in events.Scalars("by_tokens/strict_accuracy")] == pytest.approx(seconds, rel=1e-6)


# What a person sees in the terminal


@pytest.mark.parametrize(("num_steps", "hours"), [(60, 0), (1740, 100)])
def test_bar_shows_all_it_has_in_80_columns(num_steps, hours):
    run = runs.Run.__new__(runs.Run)
    run.progress, run.state = tqdm(total=num_steps, bar_format=runs.BAR, file=open(os.devnull, "w")), {"step": 1}
    metrics = {"reward/mean": 0.9876, "accuracy/strict": 1.0}
    run._show_progress(metrics | {"throughput/tokens_per_second": torch.tensor(123456.0)})
    values = run.progress.format_dict | {"n": num_steps - 1, "elapsed": 3600 * hours + 40, "prefix": "evaluate"}
    line = tqdm.format_meter(**values | {"ncols": 80})
    assert len(line) <= 80
    assert line.startswith(f"evaluate {num_steps - 1}/{num_steps} |")
    assert line.endswith(" left, reward 0.99, accuracy 100%, 123k tokens/s")


def test_output_can_be_followed_in_a_file(tmp_path):
    arguments = [f"log_dir={tmp_path}", "run_name=run", "num_steps=1000", f"model={TINY}"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open(tmp_path / "out", "w") as out:
        command = [sys.executable, ROOT / "grpo_train.py", *arguments]
        process = subprocess.Popen(command, stdout=out, cwd=ROOT, env=environment)
    try:
        wait_until(lambda: "held-out" in (tmp_path / "out").read_text(), process)
    finally:
        process.kill()
        process.wait()


def test_without_a_terminal_there_is_a_line_now_and_then(tmp_path, capsys, monkeypatch):
    now = [0.0]

    def takes(seconds, function):
        return lambda *args: (now.__setitem__(0, now[0] + seconds), function(*args))[1]

    monkeypatch.setattr(runs, "time", types.SimpleNamespace(monotonic=lambda: now[0], perf_counter=lambda: now[0]))
    monkeypatch.setattr(utils, "evaluate", takes(1000, utils.evaluate))
    monkeypatch.setattr(grpo_train, "rollout", takes(12, grpo_train.rollout))
    train(tmp_path, "run", "num_steps=8", "eval_every=8")
    output = capsys.readouterr()
    status = r"reward -?\d\.\d\d, accuracy \d+%, [\d.]+ tokens/s"
    lines = re.findall(rf"^ +(\d/8)  {status}, (\d\d:\d\d) left$", output.out, re.MULTILINE)
    assert lines == [("3/8", "01:00"), ("6/8", "00:24")]
    assert not output.err


def test_processes_other_than_the_first_say_nothing(capsys):
    run = runs.Run.__new__(runs.Run)
    run.is_main = False
    run.say("a line")
    assert not capsys.readouterr().out
