"""Config files and the command line; models, prompts, scores, evaluation; the order of the data and schedules."""

import ast
import itertools
import json
import math
import re
import time

import pytest
import torch
import yaml
from accelerate import Accelerator
from conftest import ROOT, TINY, make_model, settings
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import utils
from es_train import ESConfig
from generation import Completions
from grpo_train import GRPOConfig, LoRA
from reward import UserError
from utils import Problem, completion_texts, draw_problems, encode_prompts, load_config, load_model, load_tokenizer

CLASSES = {"grpo": GRPOConfig, "es": ESConfig}
DEFAULTS = {key: ROOT / f"{key}_config.yml" for key in CLASSES}

# Configs


@pytest.mark.parametrize("path", [*DEFAULTS.values(), *sorted(ROOT.glob("recipes/*.yml"))], ids=lambda path: path.stem)
def test_every_key_is_set_in_the_yaml_and_has_a_comment(path):
    values = yaml.safe_load(path.read_text())
    assert values.keys() == CLASSES[path.stem.partition("_")[0]].model_fields.keys()
    assert "lora" not in values or values["lora"].keys() == LoRA.model_fields.keys()
    lines = path.read_text().splitlines()
    for previous, line in itertools.pairwise(lines):
        assert not re.match(r" *\w+:", line) or "  # " in line or previous.startswith("#"), line


@pytest.mark.parametrize("key", CLASSES)
def test_yaml_and_class_agree_on_defaults_and_every_key_is_read(key):
    assert load_config(CLASSES[key], DEFAULTS[key]) == CLASSES[key]()
    read = set()  # what is written as config.KEY, self.config.KEY or lora.KEY
    for path in (ROOT / f"{key}_train.py", ROOT / "utils.py", ROOT / "runs.py"):
        attributes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
        read |= {f"{ast.unparse(node.value).removeprefix('self.')}.{node.attr}" for node in attributes}
    assert {f"config.{name}" for name in CLASSES[key].model_fields} <= read
    assert key == "es" or {f"lora.{name}" for name in LoRA.model_fields} <= read


def test_overrides_reach_nested_keys_and_replace_mappings():
    overrides = ["lora.rank=4", "learning_rate=1e-5", "rewards={accuracy: 2}", "run_name=a", "seed=3"]
    expected = {"lora": LoRA(rank=4), "learning_rate": 1e-5, "rewards": {"accuracy": 2.0}, "run_name": "a", "seed": 3}
    assert load_config(GRPOConfig, DEFAULTS["grpo"], overrides) == GRPOConfig(**expected)
    assert load_config(GRPOConfig, DEFAULTS["grpo"], ["lora=null"]).lora is None


def test_missing_keys_take_their_defaults_and_1e5_is_a_number(tmp_path):
    files = {"lora: {rank: 4}\nnum_steps: 9\n": GRPOConfig(lora=LoRA(rank=4), num_steps=9, seed=1)}
    files |= {"learning_rate: 1e-5": GRPOConfig(learning_rate=1e-5, seed=1), "": GRPOConfig(seed=1)}
    for text, expected in files.items():
        (tmp_path / "config.yml").write_text(f"\ufeff{text}", encoding="utf-8")  # as some editors begin a file
        assert load_config(GRPOConfig, tmp_path / "config.yml", ["seed=1"]) == expected


BAD_VALUES = {  # {expectation: overrides}, for each script that has the key
    "should be greater than 0": "temperature=0 num_steps=0 learning_rate=0 learning_rate=-1 lora.rank=0 noise_scale=0 "
    "noise_scale=-0.1 rank=0 num_iterations=0 population_batch=0 eval_every=0",
    "should be greater than or equal to 2": "group_size=1 population_size=1",
    "should be less than 1": "clip_low=1.0",
    "should be less than 4294967296": "seed=5000000000",
    "should be less than num_steps, 60": "warmup_steps=60",
    "should be a finite number": "learning_rate=.nan learning_rate=.inf",
    "should be a valid number": "learning_rate=fast learning_rate=",
    "should be a valid integer": "group_size=8.5 group_size=[8]",
    "should be a valid boolean": "mask_truncated=2 antithetic=2",
    "should be a valid string": "model=3",
    "should be a valid list": "lora.target_modules=q_proj",
    "should be a valid dictionary": "rewards=accuracy dataset_args=5 dataset_args=null lora=16",
    "List should have at least 1 item": "lora.target_modules=[]",
    "Dictionary should have at least 1 item": "rewards={}",
    "should be 'group', 'batch' or 'none'": "scale_advantages=std",
    "should be 'token', 'sequence' or 'constant'": "loss_normalization=mean",
    "should be 'float32' or 'bfloat16'": "dtype=float16",
    "should be 'auto', 'cpu' or 'cuda'": "device=tpu",
    "should be 'auto' or 'never'": "resume=runs/a",
    "should be 'low_rank' or 'gaussian'": "perturbation=lowrank",
    "should be 'constant', 'linear' or 'cosine'": "noise_schedule=step lr_schedule=step",
    "unknown key, did you mean rank?": "lora.rnk=8",
    "unknown key, the keys are rank, alpha, target_modules": "lora.dropout=0.1",
}
CASES = [
    (key, override, expected)
    for expected, overrides in BAD_VALUES.items()
    for key, override in itertools.product(CLASSES, overrides.split())
    if re.match(r"\w+", override)[0] in CLASSES[key].model_fields
]


@pytest.mark.parametrize(("key", "override", "expected"), CASES)
def test_bad_value_gets_one_line_with_source_key_value_and_expectation(tmp_path, key, override, expected):
    name, _, text = override.partition("=")
    value = yaml.safe_load(text)
    message = f"{name}: {value}: {expected}"
    with pytest.raises(UserError, match=f"^command line: {re.escape(message)}[^\n]*$"):
        load_config(CLASSES[key], DEFAULTS[key], [override])
    for parent in name.split(".")[::-1]:  # the same value in a file: the file is named
        value = {parent: value}
    file = tmp_path / "edited.yml"
    file.write_text(yaml.safe_dump(value))
    with pytest.raises(UserError, match=f"^{re.escape(f'{file}: {message}')}[^\n]*$"):
        load_config(CLASSES[key], file, ["eval_size=8", "dataset=gsm8k"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lora"], "lora: expected key=value"),  # not the same as lora=null
        (["seed.x=1"], "seed.x=1: expected key=value"),
        (["seed.x.y=1"], "seed.x.y=1: 'int' object has no attribute"),
        (["rewards={"], "rewards={: while parsing"),
        (["rewards={3: 1}"], "rewards.3.[key]: 3: should be a valid string"),
        (["rewards={accuracy: high}"], "rewards.accuracy: high: should be a valid number"),
        (["lerning_rate=1"], "lerning_rate: 1: unknown key, did you mean learning_rate?"),
        (["zzz=1"], "zzz: 1: unknown key, the keys are model, "),
        (["population_size=31", "antithetic=true"], "population_size: 31: should be even: antithetic members"),
    ],
)
def test_bad_override_is_named(overrides, message):
    load_config(ESConfig, DEFAULTS["es"], overrides[:-1])
    with pytest.raises(UserError, match=f"^command line: {re.escape(message)}"):
        load_config(ESConfig, DEFAULTS["es"], overrides)


def refusal(config_class, path, content):
    """The one line that a config file gets; None if it is loaded, with values that have their types."""
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
    b"seed:\t1\n\tx: 2\n": "found character '\\t' that cannot start any token",
    b"\x7fELF\x02\x01\x00\xff": "'utf-8' codec can't decode byte",
    b"\x00" * 100: "special characters are not allowed",
    b"[" * 5_000: "recursion",
    b"".join(b"k%d: 1\n" % i for i in range(2_000)): "k0: 1: unknown key",
    b"!!python/object/apply:os.system ['true']": "could not determine a constructor",
    b"seed: 2026-99-99": "month must be in 1..12",
    b"seed: " + b"1" * 5_000: "Exceeds the limit",
    b"seed: 1" + b"0" * 400: "seed: 1000",
    b"learning_rate: 1" + b"0" * 400: "learning_rate: 1000",
}


@pytest.mark.parametrize(("content", "message"), HOSTILE_FILES.items(), ids=[str(name)[:20] for name in HOSTILE_FILES])
def test_hostile_config_is_refused_in_one_line(tmp_path, content, message):
    start = time.process_time()
    assert message in refusal(ESConfig, tmp_path / "config.yml", content)
    assert time.process_time() - start < 20


yaml_like = st.text(alphabet="a:[]{}&*!|>-?#%@`\"' \t\n1<,~", max_size=60) | st.text(max_size=300)
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.binary(max_size=9)
any_value = st.recursive(
    leaves | st.dates() | st.datetimes(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=9,
)


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

    def message():
        with pytest.raises(UserError, match=r"^model: '.*saved': [^\n]+$") as error:
            load_model(str(file.parent), "float32", "cpu")
        return str(error.value)

    make_model().save_pretrained(file.parent)
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    assert "1 of its weights are missing, such as model.layers.1.mlp.up_proj.weight" in message()
    for content in (file.read_bytes()[:1000], b"version https://git-lfs.github.com/spec/v1\n"):  # cut off; a pointer
        file.write_bytes(content)
        message()
    file.unlink()
    assert "safetensors" in message()


def test_end_ids_are_all_of_the_generation_config_and_the_tokenizers():
    model, tokenizer = make_model(), load_tokenizer(TINY)
    model.generation_config.eos_token_id = [5, 9]
    assert utils.stop_ids(model, tokenizer) == sorted({5, 9, tokenizer.eos_token_id})


def test_prompt_too_long_for_the_model_is_named():
    config = GRPOConfig(model=TINY, dataset_args={"size": 20}, max_new_tokens=1, device="cpu")
    setup = utils.set_up(config, "float32")
    longest = max(len(problem.ids) for problem in setup.train_set + setup.test_set)
    room = 512 - longest
    utils.set_up(config.model_copy(update={"max_new_tokens": room}), "float32")
    message = f"max_new_tokens: {room + 1}: a prompt of {longest} tokens and .* exceed the model's 512 positions"
    with pytest.raises(UserError, match=message):
        utils.set_up(config.model_copy(update={"max_new_tokens": room + 1}), "float32")


REFUSES_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
IGNORES_SYSTEM = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
WRITES_TODAY = "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}"  # as Llama's templates do
WRITES_THINK = "{% if add_generation_prompt %}{{ '<think>\n' }}{% endif %}"


@pytest.mark.parametrize(
    ("template", "system_prompt", "expected"),
    [
        ("TINY", "Be brief.", "<|system|>Be brief.<|user|>2+2<|assistant|>"),
        ("TINY", "", "<|user|>2+2<|assistant|>"),
        (None, "Be brief.", "Be brief.\n\nUser: 2+2\n\nAssistant:"),
        (None, "", "User: 2+2\n\nAssistant:"),
        (f"{REFUSES_SYSTEM}TINY", "Be brief.", "<|user|>Be brief.\n\n2+2<|assistant|>"),
        (IGNORES_SYSTEM, "Be brief.", "Be brief.\n\n2+2"),
        (IGNORES_SYSTEM, "", "2+2"),
        (f"{WRITES_TODAY}TINY", "", "26 Jul 2024<|user|>2+2<|assistant|>"),  # a resumed run has the same prompts
        (f"TINY{WRITES_THINK}", "", "<|user|>2+2<|assistant|><think>\n"),
    ],
)
def test_prompts_follow_the_chat_template_or_plain_text(template, system_prompt, expected):
    tokenizer = load_tokenizer(TINY)
    tokenizer.chat_template = template and template.replace("TINY", tokenizer.chat_template)
    (ids,) = encode_prompts(tokenizer, [{"prompt": "2+2"}], system_prompt)
    assert tokenizer.decode(ids) == expected


def test_chat_template_that_fails_is_named():
    tokenizer = load_tokenizer(TINY)
    tokenizer.chat_template = "{{ raise_exception('Upgrade the library') }}"
    for system_prompt in ("Be brief.", ""):
        with pytest.raises(UserError, match="^model: its chat template cannot be used: Upgrade the library$"):
            encode_prompts(tokenizer, [{"prompt": "2+2"}], system_prompt)


def test_only_unusual_chat_templates_are_reported_once_and_a_missing_pad_token_is_the_end_token(tmp_path, capsys):
    utils.say_once.cache_clear()
    tokenizer = load_tokenizer(TINY)
    assert not capsys.readouterr().out
    tokenizer.pad_token = None
    messages = {None: "has no chat template: ", WRITES_THINK: "the chat template begins every answer with <think>, "}
    for template, message in messages.items():
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / message[:8])
        loaded = [load_tokenizer(str(tmp_path / message[:8])) for _ in range(2)]
        assert capsys.readouterr().out.count(message) == 1
        assert loaded[0].pad_token_id == tokenizer.eos_token_id


def test_think_tag_that_the_template_writes_is_scored_with_the_completion():
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    texts = ["1+1=2</think><answer>2</answer>", "2"]
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    mask = batch.attention_mask.bool()
    completions = Completions(batch.input_ids, mask, mask * -0.5, torch.tensor([False, True]))
    first, second = mask.sum(1).tolist()

    def scores():
        problems = [Problem({"prompt": "1+1", "answer": "2"}, [])] * 2
        return utils.score_completions({"accuracy": 1.0}, completions, tokenizer, problems)

    assert [row["accuracy/strict"] for row in scores()] == [0, 0]
    tokenizer.chat_template += WRITES_THINK
    assert completion_texts(completions, tokenizer) == [f"<think>{text}" for text in texts]
    assert [row["accuracy/strict"] for row in scores()] == [1, 0]
    described = [(row["length"], row["truncated"], row["log_prob"]) for row in scores()]
    assert described == [(first, 0, -first / 2), (second, 1, -second / 2)]
    told_not_to_think = WRITES_THINK.replace("<think>\n", "<think>\n\n</think>\n\n")
    tokenizer.chat_template = tokenizer.chat_template.replace(WRITES_THINK, told_not_to_think)
    assert completion_texts(completions, tokenizer)[1] == "<think></think>2"


def test_evaluation_is_greedy_and_counts_strict_and_lenient():
    model, tokenizer = load_model(TINY, "float32", "cpu"), load_tokenizer(TINY)
    wordings = ("Compute", "Evaluate", "Multiply out")  # the last two mostly without tags
    items = [{"prompt": f"{w} {a}+4", "answer": str(a + 4)} for w in wordings for a in range(1, 7)]
    ids = encode_prompts(tokenizer, items, "")

    def metrics(items, batch_size):
        problems = [Problem(*pair) for pair in zip(items, ids, strict=True)]
        decoding = settings(48, utils.stop_ids(model, tokenizer), tokenizer.pad_token_id, batch_size=batch_size)
        return utils.evaluate(utils.Setup(Accelerator(cpu=True), model, tokenizer, [], problems, decoding))[0]

    result = metrics(items, 3)
    assert result == metrics(items, 99)
    assert 0 < result["strict_accuracy"] < result["lenient_accuracy"] <= 1
    wrong = metrics([{**item, "answer": "1000"} for item in items], 99)
    assert wrong == {**result, "strict_accuracy": 0, "lenient_accuracy": 0}


def test_any_changed_bit_changes_the_fingerprint():
    generator = torch.Generator().manual_seed(0)
    weights = {"matrix": torch.randn(3, 4, generator=generator), "vector": torch.randn(5, generator=generator)}
    variants = [weights, {"matrix": weights["matrix"]}, {**weights, "matrix": weights["matrix"].flip(1)}]
    for name, weight in weights.items():
        for i, bit in itertools.product(range(weight.numel()), (0, 13, 30)):
            changed = weight.clone()
            changed.view(torch.int32).view(-1)[i] ^= 1 << bit
            variants.append({**weights, name: changed})
    assert len(set(map(utils.fingerprint, variants))) == len(variants)


# The order of the data, random numbers and schedules


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
    draws = [tuple(torch.rand(4, generator=utils.seeded_generator(*key)).tolist()) for key in keys]
    assert len(set(draws)) == len(keys)
    assert draws[0] == tuple(torch.rand(4, generator=utils.seeded_generator(*keys[0])).tolist())


def test_schedule_warms_up_and_decays_and_no_step_is_wasted():
    schedules = ("constant", "linear", "cosine")
    factors = {name: [utils.schedule_factor(name, step, 10, 3) for step in range(10)] for name in schedules}
    for values in factors.values():
        assert values[:4] == [0.25, 0.5, 0.75, 1.0] and min(values) > 0
    assert factors["constant"][4:] == [1.0] * 6
    assert factors["linear"][4:] == pytest.approx([6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7])
    assert factors["cosine"][-1] == pytest.approx((1 + math.cos(math.pi * 6 / 7)) / 2)
