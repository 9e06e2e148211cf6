"""The scripts as a user runs them, and the helpers of a run: model loading, prompts, evaluation, logs."""

import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from accelerate.utils import set_seed
from conftest import ROOT, TINY, TWO_PROCESSES, make_model, run_script, scalars, wait_until
from peft import PeftModel
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import grpo_train
from utils import (
    Completions,
    Logger,
    ProgressBar,
    draw_indices,
    encode_prompts,
    evaluate,
    load_config,
    load_model,
    load_tokenizer,
    make_accelerator,
    schedule_factor,
    score_completions,
    seeded_generator,
    stop_ids,
    wilson_interval,
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
    assert "tiny_model, 835,712 parameters, 38,912 trained in an adapter\n" in done.stdout

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
        ["micro_batch_tokens=1", "generation_batch_size=1", "mask_truncated=true", "top_p=0.9"],
    ],
    ids=["kl-two-updates", "full-kl", "bf16", "full-bf16", "smallest-batches"],
)
def test_each_way_of_training_runs_and_logs_finite_numbers(tmp_path, capsys, overrides):
    folder = train(tmp_path, "run", *overrides)
    curves = scalars(folder)
    assert all(math.isfinite(value) for points in curves.values() for _, value in points)
    if "kl_weight=0.1" in overrides:
        assert curves["policy/kl_k3"][0][1] == 0 or "updates_per_step=2" in overrides
        assert curves["policy/kl_k3"][1][1] > 0
    if "dtype=bfloat16" not in overrides:
        assert curves["policy/ratio_error_max"][0][1] == 0
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
    assert ("ratios are biased" in capsys.readouterr().out) == ("top_p=0.9" in overrides)


def test_training_goes_on_from_a_saved_adapter_and_its_kl_starts_at_zero(tmp_path, capsys):
    first = train(tmp_path, "first", "learning_rate=0.01")
    second = train(tmp_path, "second", f"model={first / 'model'}", "kl_weight=0.1")
    # The frozen second copy of the adapter, from which the KL is measured, is not counted.
    assert capsys.readouterr().out.count(", 835,712 parameters, 38,912 trained in an adapter\n") == 2
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
        (["group_size=1"], "error: command line: group_size: 1, expected at least 2: a group of one has no spread"),
        (["learning_rate=fast"], "error: command line: learning_rate: 'fast', expected a number"),
        (["--config", "nowhere.yml"], "error: nowhere.yml: No such file or directory"),
        (["dataset=math"], "error: dataset: 'math', expected one of math_expr, gsm8k, or a path that ends in .jsonl"),
        (["rewards={speed: 1}"], "error: rewards: 'speed' is unknown, expected one of accuracy, format, or my_module"),
        (
            ["model=nowhere/at_all"],
            "error: model: 'nowhere/at_all': there is no such folder here, and from the Hugging Face hub: ",
        ),
        (["model=tinny"], "error: model: 'tinny': there is no such folder here; on the hub, owner/model is expected"),
        (["log_dir=README.md/logs"], "error: log_dir: 'README.md/logs' cannot be made: "),
        (["max_new_tokens=500"], "error: max_new_tokens: 500 after a prompt of "),
        (["model=tests"], "error: model: 'tests': this folder holds no model: it has no config.json"),
        (["prompts_per_step=0"], "error: command line: prompts_per_step: 0, expected at least 1"),
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


def test_failing_reward_function_shows_its_own_traceback_and_one_line(tmp_path):
    (tmp_path / "my_reward.py").write_text(
        "calls = []\n"
        "def f(completions, **columns):\n"
        "    calls.append(1)\n"
        "    return [1 / (2 - len(calls)) for _ in completions]\n"
    )
    done = run_script([*SMALL, f"log_dir={tmp_path}", "rewards={'my_reward:f': 1.0}"], path=[tmp_path])
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("error: rewards: my_reward:f raised ZeroDivisionError: division by zero")
    assert "my_reward.py" in done.stderr
    (folder,) = [path for path in tmp_path.iterdir() if path.is_dir() and path.name[0] == "2"]
    assert [step for step, _ in scalars(folder)["progress/seconds"]] == [1]  # what was logged before is on disk


def test_defect_of_our_own_keeps_its_traceback(tmp_path):
    (tmp_path / "x.py").write_text(
        "import utils\nwith utils.one_line_errors():\n    int('seven')\n"  # a ValueError from elsewhere
    )
    done = subprocess.run(
        [sys.executable, tmp_path / "x.py"], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert "Traceback" in done.stderr


# Models and prompts


def test_folder_without_weights_or_with_some_missing_is_named(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(
        ValueError, match="model: '.*empty': this folder holds no complete model: .*safetensors"
    ) as error:
        load_model(str(tmp_path / "empty"), "float32", "cpu")
    assert "\n" not in str(error.value)

    from safetensors.torch import save_file

    weights = load_file(tmp_path / "whole" / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "whole" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 of its weights, model.layers.1.mlp.up_proj.weight for one"):
        load_model(str(tmp_path / "whole"), "float32", "cpu")

    file = tmp_path / "whole" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])  # cut off
    with pytest.raises(ValueError, match="this folder holds no complete model"):
        load_model(str(tmp_path / "whole"), "float32", "cpu")
    file.write_text("version https://git-lfs.github.com/spec/v1\n")  # a pointer instead of the file
    with pytest.raises(ValueError, match="this folder holds no complete model"):
        load_model(str(tmp_path / "whole"), "float32", "cpu")


def test_end_ids_are_all_of_the_generation_config_and_the_tokenizers():
    model, tokenizer = make_model(), load_tokenizer(TINY)
    model.generation_config.eos_token_id = [5, 9]
    assert stop_ids(model, tokenizer) == sorted({5, 9, tokenizer.eos_token_id})


def test_prompts_follow_the_chat_template_or_plain_text():
    tokenizer = load_tokenizer(TINY)
    chat, alone = (tokenizer.decode(encode_prompts(tokenizer, ["2+2"], s)[0]) for s in ("Be brief.", ""))
    assert chat == "<|system|>Be brief.<|user|>2+2<|assistant|>"
    assert alone == "<|user|>2+2<|assistant|>"
    tokenizer.chat_template = None
    plain, alone = (tokenizer.decode(encode_prompts(tokenizer, ["2+2"], s)[0]) for s in ("Be brief.", ""))
    assert plain == "Be brief.\n\nUser: 2+2\n\nAssistant:"
    assert alone == "User: 2+2\n\nAssistant:"


def test_system_prompt_goes_to_the_user_where_the_template_takes_none():
    tokenizer = load_tokenizer(TINY)
    refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    tokenizer.chat_template = refuse + tokenizer.chat_template
    (ids,) = encode_prompts(tokenizer, ["2+2"], "Be brief.")
    assert tokenizer.decode(ids) == "<|user|>Be brief.\n\n2+2<|assistant|>"
    tokenizer.chat_template = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    assert tokenizer.decode(encode_prompts(tokenizer, ["2+2"], "Be brief.")[0]) == "Be brief.\n\n2+2"
    assert tokenizer.decode(encode_prompts(tokenizer, ["2+2"], "")[0]) == "2+2"
    tokenizer.chat_template = "{{ raise_exception('Upgrade the library') }}"
    for system_prompt in ("Be brief.", ""):
        with pytest.raises(ValueError, match="^model: its chat template cannot be used: Upgrade the library$"):
            encode_prompts(tokenizer, ["2+2"], system_prompt)


def test_prompts_do_not_change_with_the_date():
    tokenizer = load_tokenizer(TINY)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + tokenizer.chat_template
    assert tokenizer.decode(encode_prompts(tokenizer, ["2+2"], "")[0]) == "26 Jul 2024<|user|>2+2<|assistant|>"


def test_think_tag_that_the_template_writes_is_scored_with_the_completion_and_not_asked_for_twice(capsys, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    ids = tokenizer(["1+1=2</think><answer>2</answer>", "2"]).input_ids
    length = max(map(len, ids))
    tokens = torch.tensor([row + [0] * (length - len(row)) for row in ids])
    mask = torch.arange(length) < torch.tensor([[len(row)] for row in ids])
    completions = Completions(tokens, mask, torch.zeros(2, length), torch.zeros(2, dtype=torch.bool))
    scores = score_completions({"accuracy": 1.0}, completions, tokenizer, [{"prompt": "1+1", "answer": "2"}] * 2)
    assert [row["accuracy/strict"] for row in scores] == [0, 0]

    opened = "{% if add_generation_prompt %}{{ '<think>\n' }}{% endif %}"
    tokenizer.chat_template += opened
    tokenizer.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert "begins every answer with <think>, " in capsys.readouterr().out
    assert tokenizer.decode(encode_prompts(tokenizer, ["1+1"], "")[0]) == "<|user|>1+1<|assistant|><think>\n"
    assert completions.texts(tokenizer) == ["<think>1+1=2</think><answer>2</answer>", "<think>2"]
    scores = score_completions({"accuracy": 1.0}, completions, tokenizer, [{"prompt": "1+1", "answer": "2"}] * 2)
    assert [row["accuracy/strict"] for row in scores] == [1, 0]
    told_not_to = opened.replace("<think>\n", "<think>\n\n</think>\n\n")
    tokenizer.chat_template = tokenizer.chat_template.replace(opened, told_not_to)
    assert completions.texts(tokenizer)[1] == "<think></think>2"


def test_model_without_chat_template_is_said_once(tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    load_tokenizer(str(tmp_path))
    assert capsys.readouterr().out.count("has no chat template") == 1


# Data order, schedules, statistics


def test_every_epoch_holds_every_item_once_in_an_order_of_its_own():
    whole = draw_indices(10, 0, 30, seed=0)
    epochs = [whole[i : i + 10] for i in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [i for start in range(0, 30, 7) for i in draw_indices(10, start, 7, seed=0)][:30] == whole
    assert draw_indices(10, 0, 10, seed=1) != epochs[0]


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
    accelerator = make_accelerator("cpu", "float32")
    wordings = ("Compute", "Evaluate", "Multiply out")  # the last two mostly without tags
    items = [{"prompt": f"{w} {a}+4", "answer": str(a + 4)} for w in wordings for a in range(1, 7)]
    prompts = encode_prompts(tokenizer, [item["prompt"] for item in items], "")
    results = [evaluate(model, tokenizer, items, prompts, 48, size, accelerator) for size in (3, 99)]
    assert results[0] | {"seconds": 0} == results[1] | {"seconds": 0}
    assert 0 < results[0]["strict"] < results[0]["lenient"] <= 1
    wrong = [{**item, "answer": "1000"} for item in items]
    result = evaluate(model, tokenizer, wrong, prompts, 48, 99, accelerator)
    assert result["strict"] == result["lenient"] == 0


def test_scalars_are_on_disk_once_logged_however_the_run_ends(tmp_path):
    (tmp_path / "x.py").write_text(
        "import os, pathlib, grpo_train, utils\n"
        f"logger = utils.Logger(pathlib.Path({str(tmp_path)!r}), grpo_train.GRPOConfig())\n"
        "logger.scalars({f'reward/{i}': 0.5 for i in range(20)}, 1)\n"
        "os._exit(9)\n"  # as if killed
    )
    subprocess.run([sys.executable, tmp_path / "x.py"], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert scalars(tmp_path) == {f"reward/{i}": [(1, 0.5)] for i in range(20)}


def test_completions_in_the_log_are_text_and_never_markup(tmp_path):
    logger = Logger(tmp_path, grpo_train.GRPOConfig())
    hostile = "<script>alert(1)</script>|\n<think>"
    texts = [hostile, "<think>.</think><answer>7</answer>", "it is 7"]
    logger.completions("completions", [{"prompt": "<b>", "answer": "7"}] * 3, texts, 0)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (event,) = events.Tensors("completions/text_summary")
    table = event.tensor_proto.string_val[0].decode()
    assert "<script>" not in table and "<b>" not in table and "&#60;script&#62;" in table
    rows = table.splitlines()[2:]
    assert all(row.count("|") == 5 for row in rows)
    assert [row.split("|")[1] for row in rows] == [" ✗ ", " ✓ ", " ✗ form "]


def test_hyperparameters_and_config_are_logged_flat_and_from_the_start(tmp_path):
    config = load_config(grpo_train.GRPOConfig, ROOT / "grpo_config.yml", ["lora.rank=4"])
    assert Logger(tmp_path, config)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert "config/text_summary" in events.Tags()["tensors"]
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    logged = HParamsPluginData.FromString(content).session_start_info.hparams
    assert logged["lora.rank"].number_value == 4 and logged["rewards.accuracy"].number_value == 1
    assert logged["lora.target_modules"].string_value.startswith('["q_proj"')
    assert "log_dir" not in logged and logged["model"].string_value == "tiny_model"


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

METRICS = {"reward/mean": 0.9876, "accuracy/strict": 1.0, "throughput/tokens_per_second": torch.tensor(123456.0)}


@pytest.mark.parametrize(("num_steps", "hours"), [(60, 0), (1740, 100)])
def test_bar_shows_all_it_has_in_80_columns(num_steps, hours):
    bar = ProgressBar(num_steps, 0, is_main=False)
    bar.step_done(1, METRICS)
    values = {"n": num_steps - 1, "elapsed": 3600 * hours + 40, "prefix": "evaluate", "postfix": bar.postfix}
    line = tqdm.format_meter(total=num_steps, ncols=80, bar_format=ProgressBar.FORM, **values)
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


def test_without_a_terminal_there_is_a_line_now_and_then(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    bar = ProgressBar(20, 10, is_main=True)
    now[0] += 1000  # an evaluation
    bar.begin()
    for step in range(11, 16):
        now[0] += 12
        bar.step_done(step, METRICS)
    output = capsys.readouterr()
    assert output.out == "    13/20  reward 0.99, accuracy 100%, 123k tokens/s, 01:24 left\n"
    assert not output.err
    bar = ProgressBar(20, 10, is_main=False)  # of another process
    bar.begin()
    now[0] += 100
    bar.step_done(11, METRICS)
    assert not capsys.readouterr().out
