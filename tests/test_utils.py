"""Tests of utils.py: config files, command line, models, prompts, scores, evaluation, data order, schedules."""

import ast
import datetime
import itertools
import json
import math
import os
import re
import shutil
from unittest.mock import Mock

import peft
import pytest
import torch
import transformers
import yaml
from accelerate import Accelerator
from conftest import ROOT, TINY, make_model, settings
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig

import grpo_train
import utils
from es_train import ESConfig
from generation import Completions
from grpo_train import GRPOConfig, LoRA
from reward import UserError
from utils import (
    Example,
    Problem,
    completion_texts,
    draw_problems,
    encode_prompts,
    load_config,
    load_model,
    load_tokenizer,
    set_up,
)

CLASSES = {"grpo": GRPOConfig, "es": ESConfig}
DEFAULTS = {key: ROOT / f"{key}_config.yml" for key in CLASSES}

# Configs


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/*.yml")), ids=lambda path: path.stem)
def test_a_recipe_sets_only_what_differs_from_the_defaults(path):
    defaults = CLASSES[path.stem.partition("_")[0]]()
    values = load_config(type(defaults), path)
    assert [key for key in yaml.safe_load(path.read_text()) if getattr(values, key) == getattr(defaults, key)] == []


@pytest.mark.parametrize("key", CLASSES)
def test_every_key_is_set_in_the_yaml_and_has_a_comment(key):
    path = DEFAULTS[key]
    values = yaml.safe_load(path.read_text())
    assert values.keys() == CLASSES[key].model_fields.keys()
    assert "lora" not in values or values["lora"].keys() == LoRA.model_fields.keys()
    for previous, line in itertools.pairwise(path.read_text().splitlines()):
        assert not re.match(r" *\w+:", line) or "  # " in line or previous.startswith("#"), line


@pytest.mark.parametrize("key", CLASSES)
def test_yaml_and_class_agree_on_defaults_and_every_key_is_read(key):
    assert load_config(CLASSES[key], DEFAULTS[key]) == CLASSES[key]()
    read = set()  # keys that occur as config.KEY, self.config.KEY or lora.KEY
    for path in (ROOT / f"{key}_train.py", ROOT / "utils.py", ROOT / "runs.py"):
        attributes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
        read |= {f"{ast.unparse(node.value).removeprefix('self.')}.{node.attr}" for node in attributes}
    assert {f"config.{name}" for name in CLASSES[key].model_fields} <= read
    assert key == "es" or {f"lora.{name}" for name in LoRA.model_fields} <= read


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("lora: {rank: 4}\nnum_steps: 9\n", [], {"lora": LoRA(rank=4), "num_steps": 9}),
        ("learning_rate: 1e-5", ["rewards={accuracy: 2}"], {"learning_rate": 1e-5, "rewards": {"accuracy": 2.0}}),
        ("", ["lora.rank=4", "learning_rate=1e-5", "seed=3"], {"lora": LoRA(rank=4), "learning_rate": 1e-5, "seed": 3}),
        ("seed: 5", ["lora=null", "seed=3"], {"lora": None, "seed": 3}),
    ],
)
def test_overrides_replace_keys_of_the_file_missing_keys_take_defaults_and_1e5_is_a_number(
    tmp_path, text, overrides, expected
):
    (tmp_path / "config.yml").write_text(f"\ufeff{text}", encoding="utf-8")  # some editors write a byte order mark
    assert load_config(GRPOConfig, tmp_path / "config.yml", overrides) == GRPOConfig(**expected)


TYPED = [
    ("run_name=123456", "run_name", "123456"),
    ("run_name=0x10", "run_name", "0x10"),
    ("run_name=1:30", "run_name", "1:30"),
    ("run_name=2026-11-28", "run_name", "2026-11-28"),
    ("run_name=null", "run_name", None),
    ("system_prompt=Answer: x  # y", "system_prompt", "Answer: x  # y"),
    ("system_prompt='Answer: x'", "system_prompt", "Answer: x"),
    ("system_prompt=", "system_prompt", ""),
    ("seed=010", "seed", 10),
    ("dataset=~/p.jsonl", "dataset", os.path.expanduser("~/p.jsonl")),
    ("log_dir=~/logs", "log_dir", os.path.expanduser("~/logs")),
    ("rewards={'~/a:1.py:f': 1}", "rewards", {"~/a:1.py:f": 1.0}),
    ("num_steps=1e1", "num_steps", 10),
    ("num_steps=1_000", "num_steps", 1000),
    ("learning_rate=1e-4", "learning_rate", 1e-4),
    ("lora=None", "lora", None),
    ("rewards=accuracy", "rewards", {"accuracy": 1.0}),
    ("rewards={accuracy:1,format:.5}", "rewards", {"accuracy": 1.0, "format": 0.5}),
    ("rewards={my_rewards:f:0.5, accuracy: 1}", "rewards", {"my_rewards:f": 0.5, "accuracy": 1.0}),
    ("dataset_args={max_operators:2}", "dataset_args", {"max_operators": 2}),
    ("chat_template_kwargs={enable_thinking:false}", "chat_template_kwargs", {"enable_thinking": False}),
]


@pytest.mark.parametrize(("override", "key", "value"), TYPED)
def test_values_are_read_as_people_type_them_and_survive_being_saved(tmp_path, override, key, value):
    config = load_config(GRPOConfig, DEFAULTS["grpo"], [override])
    assert getattr(config, key) == value and type(getattr(config, key)) is type(value)
    (tmp_path / "config.yml").write_text(utils.config_text(config))
    assert load_config(GRPOConfig, tmp_path / "config.yml") == config


def test_config_of_a_run_names_the_folder_it_lies_in_unless_told_otherwise(tmp_path):
    (tmp_path / "moved").mkdir()
    file = tmp_path / "moved" / "config.yml"
    file.write_text("log_dir: elsewhere\nrun_name: before\n")
    assert load_config(GRPOConfig, file).run_name == "before"
    (tmp_path / "moved" / "run.lock").touch()
    config = load_config(GRPOConfig, file)
    assert (config.log_dir, config.run_name) == (str(tmp_path), "moved")
    assert load_config(GRPOConfig, file, ["run_name=other"]).run_name == "other"


BAD_VALUES = {  # {expectation: overrides}, for each script that has the key
    "should be greater than 0": "temperature=0 learning_rate=-1 lora.rank=0 noise_scale=0",
    "should be greater than or equal to 2": "group_size=1 population_size=1",
    "should be a finite number": "learning_rate=.nan learning_rate=.inf",
    "should be a valid integer": "group_size=8.5 population_size=8.5",
    "should be a valid dictionary": "rewards=7 lora=16",
    "should be 'auto' or 'never'": "resume=runs/a",
    "unknown key, did you mean lora.rank?": "lora.rnk=8",
    "unknown key, the keys are rank, alpha, target_modules": "lora.dropout=0.1",
    "unknown key, did you mean learning_rate?": "lerning_rate=1 lr=1",
    "unknown key, the keys are model, ": "zzz=1",
}


@pytest.mark.parametrize("expected", BAD_VALUES)
def test_bad_value_gets_one_line_with_source_key_value_and_expectation(tmp_path, expected):
    file = tmp_path / "edited.yml"
    for override, (key, config_class) in itertools.product(BAD_VALUES[expected].split(), CLASSES.items()):
        name, _, text = override.partition("=")
        if name.partition(".")[0] not in {*config_class.model_fields, "lerning_rate", "lr", "zzz"}:
            continue
        value = yaml.safe_load(text)
        message = re.escape(f"{name}: {value}: {expected}") + r"[^\n]*$"
        with pytest.raises(UserError, match=f"^command line: {message}"):
            load_config(config_class, DEFAULTS[key], [override])
        for parent in name.split(".")[::-1]:  # the same value in a file: the error names the file
            value = {parent: value}
        file.write_text(yaml.safe_dump(value))
        with pytest.raises(UserError, match=f"^{re.escape(str(file))}: {message}"):
            load_config(config_class, file, ["eval_size=8", "dataset=gsm8k"])


BAD_OVERRIDES = {  # no value is guessed
    "lora=": "lora=: expected a value after =; null stands",
    "eval_size=1:30": "eval_size: 1:30: should be a valid",
    "lora": "lora: expected key=value",  # not the same as lora=null
    "seed.x=1": "seed.x=1: expected key=value",
    "seed.x.y=1": "seed.x.y=1: 'int' object has no attribute",
    "rewards={": "rewards={: while parsing",
    "population_size=31": "population_size: 31: should be even: antithetic members",
}


@pytest.mark.parametrize("override", BAD_OVERRIDES)
def test_bad_override_is_named(override):
    with pytest.raises(UserError, match=f"^command line: {re.escape(BAD_OVERRIDES[override])}"):
        load_config(ESConfig, DEFAULTS["es"], ["antithetic=true", override])


def refusal(config_class, path, content):
    """Return the one-line error for a config file, or None if it loads with values that can be saved again."""
    path.write_bytes(content)
    try:
        config = load_config(config_class, path)
    except UserError as error:
        assert str(error).startswith(f"{path}: ") and len(str(error).splitlines()) == 1 and len(str(error)) < 1000
        return str(error)
    assert json.dumps(config.model_dump()) and yaml.safe_load(yaml.safe_dump(config.dataset_args)) is not None
    return None


HOSTILE_FILES = {
    b'cache_dir: ["\\r"]\n': "cache_dir: ",
    b"- 1\n- 2\n": "expected a mapping of keys to values, not list",
    b"\x7fELF\x02\x01\x00\xff": "'utf-8' codec can't decode byte",
    b"[" * 5_000: "recursion",
    b"".join(b"k%d: 1\n" % i for i in range(2_000)): "k0: 1: unknown key",
    b"zzz: 1": "cuda_graphs, dataset, dataset_args, system_prompt, ",
    b"!!python/object/apply:os.system ['true']": "could not determine a constructor",
    b"seed: " + b"1" * 5_000: "Exceeds the limit",
}


@pytest.mark.parametrize(("content", "message"), HOSTILE_FILES.items(), ids=[str(name)[:20] for name in HOSTILE_FILES])
def test_hostile_config_is_refused_in_one_line(tmp_path, content, message):
    assert message in refusal(ESConfig, tmp_path / "config.yml", content)


yaml_like = st.text(alphabet="a:[]{}&*!|>-?#%@`\"' \t\n1<,~", max_size=60) | st.text(max_size=300)
kinds = (type(None), bool, int, float, str, bytes, datetime.date, datetime.datetime)
leaves = st.one_of(map(st.from_type, kinds))
any_value = st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=9)


@pytest.mark.parametrize("config_class", CLASSES.values())
@given(data=st.data(), any_file=st.binary(max_size=300) | yaml_like.map(str.encode))
def test_any_file_and_any_value_is_loaded_or_refused_in_one_line(tmp_path_factory, config_class, data, any_file):
    path = tmp_path_factory.getbasetemp() / "config.yml"
    refusal(config_class, path, any_file)
    values = data.draw(st.dictionaries(st.sampled_from(sorted(config_class.model_fields)), any_value, max_size=3))
    refusal(config_class, path, yaml.safe_dump(values, allow_unicode=True).encode())


# Models and prompts


def test_folder_without_weights_or_with_missing_or_damaged_ones_is_named(tmp_path):
    file = tmp_path / "saved" / "model.safetensors"

    def assert_refused(message="."):
        with pytest.raises(UserError, match=rf"^model: '.*saved': [^\n]*{message}[^\n]*$"):
            load_model(str(file.parent), "float32", "cpu")

    make_model().save_pretrained(file.parent)
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    assert_refused("1 of its weights are missing, such as model.layers.1.mlp.up_proj.weight")
    for content in (file.read_bytes()[:1000], b"version https://git-lfs.github.com/spec/v1\n"):  # truncated; Git LFS
        file.write_bytes(content)
        assert_refused()
    file.unlink()
    assert_refused("safetensors")


def test_end_ids_are_all_of_the_generation_config_and_the_tokenizers():
    model, tokenizer = make_model(), load_tokenizer(TINY)
    model.generation_config.eos_token_id = [5, 9]
    assert utils.stop_ids(model, tokenizer) == sorted({5, 9, tokenizer.eos_token_id})


def test_prompt_too_long_for_the_model_is_named():
    def set_up(max_new_tokens):
        config = GRPOConfig(model=TINY, dataset_args={"size": 20}, max_new_tokens=max_new_tokens, device="cpu")
        return utils.set_up(config, "float32")

    longest = max(len(problem.ids) for problem in set_up(1).train_set + set_up(1).test_set)
    room = 512 - longest
    set_up(room)
    message = f"max_new_tokens: {room + 1}: a prompt of {longest} tokens, '.+', plus .* exceeds .* 512 positions"
    with pytest.raises(UserError, match=message):
        set_up(room + 1)


REFUSES_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
IGNORES_SYSTEM = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
WRITES_TODAY = "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}"  # as in Llama's templates
WRITES_THINK = "{% if add_generation_prompt %}{{ '<think>\n' }}{% endif %}"
PROMPTS = {  # by template and system prompt
    ("TINY", "Be brief."): "<|system|>Be brief.<|user|>2+2<|assistant|>",
    (None, "Be brief."): "Be brief.\n\nUser: 2+2\n\nAssistant:",
    (None, ""): "User: 2+2\n\nAssistant:",
    (f"{REFUSES_SYSTEM}TINY", "Be brief."): "<|user|>Be brief.\n\n2+2<|assistant|>",
    (IGNORES_SYSTEM, "Be brief."): "Be brief.\n\n2+2",
    (f"{WRITES_TODAY}TINY", ""): "26 Jul 2024<|user|>2+2<|assistant|>",  # a resumed run must have the same prompts
    (f"TINY{WRITES_THINK}", ""): "<|user|>2+2<|assistant|><think>\n",
}


@pytest.mark.parametrize(("template", "system_prompt"), PROMPTS)
def test_prompts_follow_the_chat_template_or_plain_text(template, system_prompt):
    tokenizer = load_tokenizer(TINY)
    tokenizer.chat_template = template and template.replace("TINY", tokenizer.chat_template)
    (ids,) = encode_prompts(tokenizer, [{"prompt": "2+2"}], system_prompt)
    assert tokenizer.decode(ids) == PROMPTS[template, system_prompt]


def test_arguments_of_the_chat_template_reach_it_and_unknown_ones_are_named(tmp_path):
    tokenizer = load_tokenizer(TINY)
    has_to_answer = "add_generation_prompt and enable_thinking is defined and not enable_thinking"
    tokenizer.chat_template += f"{{% if {has_to_answer} %}}<think></think>{{% endif %}}"
    tokenizer.save_pretrained(tmp_path)
    for arguments, end in [({}, ""), ({"enable_thinking": False}, "<think></think>")]:
        tokenizer = load_tokenizer(str(tmp_path), template_kwargs=arguments)
        (ids,) = encode_prompts(tokenizer, [{"prompt": "2+2"}], "")
        assert tokenizer.decode(ids) == f"<|user|>2+2<|assistant|>{end}"
        assert utils.answer_start(tokenizer) == end  # also where completions are scored
    for name in ("enable", "messages", "add_generation_prompt"):
        with pytest.raises(UserError, match=f"^chat_template_kwargs: {name}: the model's chat template has no such"):
            load_tokenizer(str(tmp_path), template_kwargs={name: False})
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(
        UserError, match="^chat_template_kwargs: enable_thinking: the model's chat template has no such"
    ):
        load_tokenizer(str(tmp_path), template_kwargs={"enable_thinking": False})


def test_chat_template_that_fails_is_named():
    tokenizer = load_tokenizer(TINY)
    tokenizer.chat_template = "{{ raise_exception('Upgrade the library') }}"
    with pytest.raises(UserError, match="^model: its chat template fails: Upgrade the library$"):
        encode_prompts(tokenizer, [{"prompt": "2+2"}], "Be brief.")


def test_only_unusual_chat_templates_are_reported_once(tmp_path, capsys):
    utils.say_once.cache_clear()
    tokenizer = load_tokenizer(TINY)
    assert not capsys.readouterr().out
    messages = {None: "has no chat template: ", WRITES_THINK: "the chat template starts every answer with <think>, "}
    for template, message in messages.items():
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path)
        for _ in range(2):
            load_tokenizer(str(tmp_path))
        assert capsys.readouterr().out.count(message) == 1


def test_think_tag_that_the_template_writes_is_scored_with_the_completion():
    tokenizer, texts = AutoTokenizer.from_pretrained(TINY), ["1+1=2</think><answer>2</answer>", "2"]
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    mask, problems = batch.attention_mask.bool(), [Problem({"prompt": "1+1", "answer": "2"}, [])] * 2
    completions = Completions(batch.input_ids, mask, mask * -0.5, torch.tensor([False, True]))
    (first, second), setup = mask.sum(1).tolist(), utils.Setup(None, None, tokenizer, [], problems, None)
    ordinary, told_not_to_think = tokenizer.chat_template, WRITES_THINK.replace("\n", "\n\n</think>\n\n")
    for added, start, strict in [("", "", 0), (WRITES_THINK, "<think>", 1), (told_not_to_think, "<think></think>", 0)]:
        tokenizer.chat_template = ordinary + added
        assert completion_texts(completions, tokenizer) == [start + text for text in texts]
        rows = utils.score_completions({"accuracy": 1.0}, completions, setup, problems)
        described = [(row["length"], row["truncated"], row["log_prob"], row["accuracy/strict"]) for row in rows]
        assert described == [(first, 0, -first / 2, strict), (second, 1, -second / 2, 0)]


def test_evaluation_is_greedy_and_counts_strict_and_lenient():
    model, tokenizer = load_model(TINY, "float32", "cpu"), load_tokenizer(TINY)
    wordings = ("Compute", "Evaluate", "Multiply out")  # the model mostly omits the tags for the last two
    items = [{"prompt": f"{w} {a}+4", "answer": str(a + 4)} for w in wordings for a in range(1, 7)]

    def metrics(batch_size, **changes):
        ids = encode_prompts(tokenizer, items, "")
        problems = [Problem(item | changes, prompt) for item, prompt in zip(items, ids, strict=True)]
        decoding = settings(48, utils.stop_ids(model, tokenizer), batch_size=batch_size)
        return utils.evaluate(utils.Setup(Accelerator(cpu=True), model, tokenizer, [], problems, decoding))[0]

    result = metrics(3)
    assert result == metrics(99) and 0 < result["strict_accuracy"] < result["lenient_accuracy"] <= 1
    assert metrics(99, answer="1000") == {**result, "strict_accuracy": 0, "lenient_accuracy": 0}


def test_any_changed_bit_changes_the_fingerprint():
    torch.manual_seed(0)
    weights = {"matrix": torch.randn(3, 4), "vector": torch.randn(5)}
    variants = [weights, {"matrix": weights["matrix"]}, {**weights, "matrix": weights["matrix"].flip(1)}]
    for name, weight in weights.items():
        for i, bit in itertools.product(range(weight.numel()), (0, 13, 30)):
            changed = weight.clone()
            changed.view(torch.int32).view(-1)[i] ^= 1 << bit
            variants.append({**weights, name: changed})
    assert len(set(map(utils.fingerprint, variants))) == len(variants)


# Data order, random numbers and schedules


def test_every_epoch_holds_every_item_once_in_an_order_of_its_own():
    items = list(range(10))
    whole = draw_problems(items, 0, 30, seed=0)
    epochs = [whole[i : i + 10] for i in (0, 10, 20)]
    assert all(sorted(epoch) == items for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [item for step in range(5) for item in draw_problems(items, 7 * step, 7, seed=0)][:30] == whole
    assert draw_problems(items, 0, 10, seed=1) != epochs[0]


def test_generators_of_different_streams_and_indices_differ():
    keys = [(seed, stream, index) for seed in (0, 1) for stream in ("data", "rollout") for index in (0, 1, 2**32 - 1)]
    draws = [tuple(torch.rand(4, generator=utils.seeded_generator(*key)).tolist()) for key in keys]
    assert len(set(draws)) == len(keys)
    assert draws[0] == tuple(torch.rand(4, generator=utils.seeded_generator(*keys[0])).tolist())


def test_schedule_warms_up_and_decays_and_no_step_is_wasted():
    names = ("constant", "linear", "cosine")
    factors = {name: [utils.schedule_factor(name, step, 10, 3) for step in range(10)] for name in names}
    assert all(values[:4] == [0.25, 0.5, 0.75, 1.0] and min(values) > 0 for values in factors.values())
    assert factors["constant"][4:] == [1.0] * 6
    assert factors["linear"][4:] == pytest.approx([6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7])
    assert factors["cosine"][-1] == pytest.approx((1 + math.cos(math.pi * 6 / 7)) / 2)


def test_examples_are_earlier_turns_and_a_template_that_loses_text_is_named():
    tokenizer, examples = load_tokenizer(TINY), [Example(prompt="1+1", answer="<answer>2</answer>")]
    (ids,) = encode_prompts(tokenizer, [{"prompt": "2+2"}], "Be brief.", examples)
    shot = "<|user|>1+1<|assistant|><answer>2</answer><|end|>"
    assert tokenizer.decode(ids) == f"<|system|>Be brief.{shot}<|user|>2+2<|assistant|>"
    template, tokenizer.chat_template = tokenizer.chat_template, None
    (ids,) = encode_prompts(tokenizer, [{"prompt": "2+2"}], "Be brief.", examples)
    turn = f"User: 1+1\n\nAssistant: <answer>2</answer>{tokenizer.eos_token}"
    assert tokenizer.decode(ids) == f"Be brief.\n\n{turn}\n\nUser: 2+2\n\nAssistant:"
    for lost, text in {"user": "2\\+2|1\\+1", "assistant": "<answer>2</answer>"}.items():
        tokenizer.chat_template = template.replace(
            "message['content']", f"(message['content'] if message['role'] != '{lost}' else '')"
        )
        with pytest.raises(UserError, match=f"model: its chat template drops this text: '({text})'"):
            encode_prompts(tokenizer, [{"prompt": "2+2"}], "Be brief.", examples)


def test_only_what_ends_the_last_answer_stops_a_row_and_other_templates_add_no_token():
    model, tokenizer = load_model(TINY, "float32", "cpu"), load_tokenizer(TINY)
    (end,), template = utils.stop_ids(model, tokenizer), tokenizer.chat_template
    tokenizer.add_tokens(["<|more|>", "<|last|>"])
    last, content = tokenizer.convert_tokens_to_ids("<|last|>"), "message['content']"
    for change, expected in {
        "{% if messages[-1]['role'] != 'user' %}{{ raise_exception('no question') }}{% endif %}" + template: {end},
        template.replace(content, f"({content} if message['role'] != 'assistant' else '')"): {end},
        template.replace("'<|end|>'", "'<|last|>' if loop.last else '<|more|>'"): {end, last},
    }.items():
        tokenizer.chat_template = change
        assert set(utils.stop_ids(model, tokenizer)) == expected


def test_token_that_ends_a_turn_stops_a_row_and_odd_special_tokens_are_named_or_work(tmp_path, monkeypatch):
    def folder(**tokens):
        shutil.copytree(TINY, tmp_path / "model", dirs_exist_ok=True)
        tokenizer = AutoTokenizer.from_pretrained(TINY)
        tokenizer.add_tokens([f"<|{i}|>" for i in range(100)])  # more tokens than the model has embeddings
        tokenizer.add_special_tokens(tokens)
        tokenizer.save_pretrained(tmp_path / "model")
        GenerationConfig(eos_token_id=tokenizer.eos_token_id).save_pretrained(tmp_path / "model")
        return GRPOConfig(model=str(tmp_path / "model"), dataset_args={"size": 20}, device="cpu", max_new_tokens=8)

    end = load_tokenizer(TINY).convert_tokens_to_ids("<|end|>")
    setup = set_up(folder(eos_token="<|user|>"), "float32")
    assert end in setup.settings.stop_ids and len(setup.settings.stop_ids) == 2
    config = folder(pad_token="<|beyond|>")
    set_up(config, "float32")  # prompts are never padded with it
    with pytest.raises(UserError, match=r"token '<\|beyond\|>' \(\d+\) of its tokenizer exceeds its \d+ embeddings"):
        set_up(config.model_copy(update={"system_prompt": "<|beyond|>"}), "float32")
    monkeypatch.setattr(utils, "stop_ids", lambda model, tokenizer: [])
    with pytest.raises(UserError, match="neither its tokenizer nor its generation config has an end token"):
        set_up(config, "float32")


def test_everything_that_needs_no_model_is_checked_before_one_is_loaded(tmp_path, monkeypatch, capsys):
    """Reward functions are called, runs are recognized, and problems that are in both sets are counted."""
    monkeypatch.setattr(utils, "load_model", Mock(side_effect=ZeroDivisionError))  # reached only without an error

    def refuse(message, **values):
        values = {"device": "cpu", "log_dir": str(tmp_path), "dataset_args": {"size": 20}, **values}
        config = GRPOConfig(**values)
        with pytest.raises(UserError, match=message):
            grpo_train.main(config)

    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").touch()
    refuse("run_name: .*taken already exists", run_name="taken")
    (tmp_path / "checked.py").write_text(
        "def wrong(completions, **columns): return 0\n"
        "def hard(completions, level, **columns): return [0.0] * len(completions)\n"
        "def right(completions, **columns): return [0.0] * len(completions)\n"
    )
    refuse("checked.py:wrong returned 0, expected a list of 2", rewards={f"{tmp_path}/checked.py:wrong": 1.0})
    refuse("hard: missing a required argument: 'level'; the columns are answer", rewards={"checked:hard": 1.0})
    for name in ("WORLD_SIZE", "PMI_SIZE", "LOCAL_RANK"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "2")
            refuse(f"the environment has {name}=2: start with torchrun, or unset {name}")
    for split in ("train", "test"):
        problems = [{"prompt": f"{i}?", "answer": "1"} for i in range(9 if split == "train" else 3)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, problems)))
    data = str(tmp_path / "train.jsonl")
    with pytest.raises(ZeroDivisionError):
        more = {"dataset": data, "rewards": {"checked:right": 1.0}}
        grpo_train.main(GRPOConfig(device="cpu", log_dir=str(tmp_path), **more))
    assert capsys.readouterr().out == "3 of 3 held-out problems are also in the training set\n"


def test_folders_that_are_no_model_to_train_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))

    def refuse(name, message):
        with pytest.raises(UserError, match=f"^model: '{name.replace('~', str(tmp_path))}'.*{message}"):
            load_model(name, "float32", "cpu")

    for name in ("./typo", "~/typo", "../typo", "/typo", "typo", "logs/typo/model"):
        refuse(name, "no such folder")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.lock").touch()
    refuse("~/run", f"is a run; its model is {tmp_path}/run/model")
    settings = json.loads((ROOT / "tiny_model" / "config.json").read_text())
    for number, (more, message) in enumerate(
        [
            ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "its weights are quantized"),
            ({"model_type": "new", "auto_map": {"AutoConfig": "code.New"}}, "it needs Python code of its own"),
        ]
    ):
        (tmp_path / f"model{number}").mkdir()
        (tmp_path / f"model{number}" / "config.json").write_text(json.dumps(settings | more))
        refuse(f"~/model{number}", message)


def test_adapter_on_a_weight_that_two_layers_share_is_refused(tmp_path):
    for targets in (["q_proj", "lm_head"], ["lm_head"]):
        with pytest.raises(UserError, match="lora.target_modules: lm_head: the model's lm_head and embedding share"):
            grpo_train.make_policy(make_model(), LoRA(rank=2, target_modules=targets), False)
        make_model().save_pretrained(tmp_path / "base")
        adapted = peft.get_peft_model(make_model(), peft.LoraConfig(r=2, target_modules=targets))
        adapted.save_pretrained(tmp_path / "lora", save_embedding_layers=False)
        file = tmp_path / "lora" / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}))
        with pytest.raises(UserError, match="lora.target_modules: lm_head: the model's lm_head and embedding share"):
            load_model(str(tmp_path / "lora"), "float32", "cpu")
    assert grpo_train.make_policy(
        make_model(tie_word_embeddings=False), LoRA(rank=2, target_modules=["lm_head"]), False
    )


SIZE = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4, "vocab_size": 64, "pad_token_id": 0}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
UNSUPPORTED = {
    "Mamba": ({}, "layers of kind linear_attention"),
    "Lfm2": (HEADS | {"full_attn_idxs": [1]}, "layers of kind conv"),
    "Llama4": (HEADS | {"num_local_experts": 2, "intermediate_size_mlp": 32}, "layers of kind chunked_attention"),
    "Bloom": ({"n_layer": 2, "n_head": 4}, r"forward\(\) without position_ids"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_model_that_the_decode_loop_cannot_serve_is_named(tmp_path, name):
    values, reason = UNSUPPORTED[name]
    config_class = getattr(transformers, "Llama4TextConfig" if name == "Llama4" else f"{name}Config")
    getattr(transformers, f"{name}ForCausalLM")(config_class(**SIZE | values)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"model: '{tmp_path}': {name}ForCausalLM is not supported: {reason}"):
        load_model(str(tmp_path), "float32", "cpu")


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_attention_is_sdpa_whatever_the_models_config_asks_for(tmp_path, key):
    shutil.copytree(TINY, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: "flash_attention_2"}))
    assert load_model(str(tmp_path / "model"), "float32", "cpu").config._attn_implementation == "sdpa"


def test_model_without_sdpa_is_refused(tmp_path, monkeypatch):
    shutil.copytree(TINY, tmp_path / "model")
    monkeypatch.setattr(transformers.Qwen2ForCausalLM, "_supports_sdpa", False)
    with pytest.raises(UserError, match="model: '.*': Qwen2ForCausalLM is not supported: no SDPA"):
        load_model(str(tmp_path / "model"), "float32", "cpu")
