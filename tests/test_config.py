"""Config files: what is accepted, and the one line that everything else gets."""

import ast
import dataclasses
import json
import re
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT, SCRIPTS, TINY, scalars

from benchmarks.recipe_memory import FOR_24_GB
from es_train import ESConfig
from grpo_train import GRPOConfig, LoRA
from utils import load_config

DEFAULT = ROOT / "grpo_config.yml"
CLASSES = {"grpo": GRPOConfig, "es": ESConfig}
RECIPES = sorted((ROOT / "recipes").glob("*.yml"))


@pytest.mark.parametrize("name", CLASSES)
def test_yaml_and_dataclass_agree_on_keys_order_and_defaults(name):
    path, config_class = ROOT / f"{name}_config.yml", CLASSES[name]
    values = yaml.safe_load(path.read_text())
    assert list(values) == [field.name for field in dataclasses.fields(config_class)]
    assert load_config(config_class, path) == config_class()
    if "lora" in values:
        assert list(values["lora"]) == [field.name for field in dataclasses.fields(LoRA)]


@pytest.mark.parametrize("path", [ROOT / f"{name}_config.yml" for name in CLASSES] + RECIPES, ids=lambda p: p.stem)
def test_every_key_of_the_yaml_has_a_comment(path):
    previous = ""
    for line in path.read_text().splitlines():
        if re.match(r" *\w+:", line):
            assert "  # " in line or previous.startswith("#"), line
        previous = line


@pytest.mark.parametrize("name", CLASSES)
def test_every_config_key_is_read(name):
    read = set()
    for path in (ROOT / f"{name}_train.py", ROOT / "utils.py"):
        for function in ast.parse(path.read_text()).body:  # not the class, whose __post_init__ only checks
            if isinstance(function, ast.FunctionDef):
                attributes = [node for node in ast.walk(function) if isinstance(node, ast.Attribute)]
                read |= {(node.value.id, node.attr) for node in attributes if isinstance(node.value, ast.Name)}
    assert {("config", field.name) for field in dataclasses.fields(CLASSES[name])} <= read
    if name == "grpo":
        assert {("lora", field.name) for field in dataclasses.fields(LoRA)} <= read


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_runs_two_steps_with_the_embedded_model_and_what_its_head_offers_loads(recipe, tmp_path):
    script = SCRIPTS[recipe.stem.partition("_")[0]]
    head = recipe.read_text().partition("\n\n")[0]
    offers = re.findall(r"\b\w+=[\w/-]+(?:\.[\w/-]+)*", head.replace("\n# ", " "))
    assert len([offer for offer in offers if offer.startswith("model=")]) == 3
    assert [offer for offer in offers if not offer.startswith("model=")] == FOR_24_GB[recipe.stem]
    for offer in offers:
        assert load_config(script.config_class, recipe, [offer]) != load_config(script.config_class, recipe), offer

    for split in ("train", "test"):
        problems = [{"question": f"What is {i} plus 2?", "answer": f"It is {i}+2.\n#### {i + 2}"} for i in range(9)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, problems)))
    sizes = f"{script.num_steps}=2 eval_size=4 max_new_tokens=16 device=cpu"
    sizes += {"grpo": " prompts_per_step=4", "es": " prompts_per_iteration=4 population_size=4"}[script.name[:-6]]
    where = [f"model={TINY}", f"log_dir={tmp_path}", "run_name=run"]
    where += [f"dataset_args={{path: {tmp_path}}}"] if "gsm8k" in recipe.stem else []
    script.module.main(load_config(script.config_class, recipe, [*sizes.split(), *where]))
    assert [step for step, _ in scalars(tmp_path / "run")["reward/mean"]] == [1, 2]
    assert (tmp_path / "run" / "model" / "tokenizer.json").is_file()


def test_memory_of_every_recipe_is_in_readme():
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "recipe_memory.py"], capture_output=True, text=True, check=True
    )
    table = done.stdout.strip().splitlines()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {row.split("`")[1] for row in table[2:]} == {path.stem for path in RECIPES}
    assert all(row in readme for row in table)


def test_overrides_reach_nested_keys_and_replace_mappings():
    config = load_config(
        GRPOConfig, DEFAULT, ["lora.rank=4", "learning_rate=1e-5", "rewards={accuracy: 2}", "run_name=a", "seed=3"]
    )
    assert (config.lora.rank, config.learning_rate, config.rewards, config.run_name, config.seed) == (
        (4, 1e-5, {"accuracy": 2.0}, "a", 3)
    )
    assert load_config(GRPOConfig, DEFAULT, ["lora=null"]).lora is None


def test_scientific_notation_without_a_point_is_a_number(tmp_path):
    assert yaml.safe_load("1e-5") == "1e-5"  # why this needs a test
    path = tmp_path / "c.yml"
    path.write_text(DEFAULT.read_text().replace("learning_rate: 1.0e-3", "learning_rate: 1e-5"))
    assert load_config(GRPOConfig, path).learning_rate == 1e-5


BAD = [
    ("lerning_rate=1", "lerning_rate: 1: unknown key, did you mean learning_rate?"),
    ("zzz=1", "zzz: 1: unknown key, the keys are model, "),
    ("lora.rnk=8", "lora.rnk: 8: unknown key, did you mean lora.rank?"),
    ("lora.dropout=0.1", "lora.dropout: 0.1: unknown key, the keys are rank, alpha, target_modules"),
    ("learning_rate=fast", "learning_rate: 'fast', expected a number"),
    ("learning_rate=-1", "learning_rate: -1.0, expected more than 0"),
    ("learning_rate=.nan", "learning_rate: nan, expected a number"),
    ("learning_rate=.inf", "learning_rate: inf, expected a number"),
    ("learning_rate=true", "learning_rate: True, expected a number"),
    ("learning_rate=", "learning_rate: None, expected a number"),
    ("group_size=1", "group_size: 1, expected at least 2"),
    ("group_size=8.5", "group_size: 8.5, expected a whole number"),
    ("group_size=[8]", "group_size: [8], expected a whole number"),
    ("temperature=0", "temperature: 0.0, expected more than 0"),
    ("top_p=1.5", "top_p: 1.5, expected more than 0, at most 1"),
    ("scale_advantages=std", "scale_advantages: 'std', expected one of group, batch, none"),
    ("loss_normalization=mean", "loss_normalization: 'mean', expected one of token, sequence, constant"),
    ("dtype=float16", "dtype: 'float16', expected one of float32, bfloat16"),
    ("device=tpu", "device: 'tpu', expected one of auto, cpu, cuda"),
    ("mask_truncated=1", "mask_truncated: 1, expected true or false"),
    ("model=3", "model: 3, expected text"),
    ("rewards=accuracy", "rewards: 'accuracy', expected a mapping"),
    ("rewards={3: 1}", "rewards: {3: 1}, expected keys that are text"),
    ("dataset_args=5", "dataset_args: 5, expected a mapping"),
    ("dataset_args=null", "dataset_args: None, expected a mapping"),
    ("seed=5000000000", "seed: 5000000000, expected at least 0 and less than 2^32"),
    ("rewards={}", "rewards: {}, expected at least one reward function"),
    ("rewards={accuracy: high}", "rewards.accuracy: 'high', expected a number"),
    ("lora.rank=0", "lora.rank: 0, expected at least 1"),
    ("lora.target_modules=q_proj", "lora.target_modules: 'q_proj', expected a list"),
    ("lora=16", "lora: 16, expected a mapping"),
    ("warmup_steps=60", "warmup_steps: 60, expected less than num_steps, 60"),
    ("clip_low=1.0", "clip_low: 1.0, expected between 0 and 1"),
    ("num_steps=0", "num_steps: 0, expected at least 1"),
]


BAD_ES = [
    ("population_size=1", "population_size: 1, expected at least 2"),
    ("noise_scale=0", "noise_scale: 0.0, expected more than 0"),
    ("noise_scale=-0.1", "noise_scale: -0.1, expected more than 0"),
    ("learning_rate=0", "learning_rate: 0.0, expected more than 0"),
    ("rank=0", "rank: 0, expected at least 1"),
    ("population_batch=0", "population_batch: 0, expected at least 1"),
    ("perturbation=lowrank", "perturbation: 'lowrank', expected one of low_rank, gaussian"),
    ("noise_schedule=step", "noise_schedule: 'step', expected one of constant, linear, cosine"),
    ("noise_std=1", "noise_std: 1: unknown key, did you mean noise_scale?"),
    ("group_size=8", "group_size: 8: unknown key"),
    ("antithetic=1", "antithetic: 1, expected true or false"),
    ("num_iterations=0", "num_iterations: 0, expected at least 1"),
    ("rewards={}", "rewards: {}, expected at least one reward function"),
]
CASES = [("grpo", *case) for case in BAD] + [("es", *case) for case in BAD_ES]


def test_antithetic_members_are_even_in_number():
    with pytest.raises(
        ValueError, match="population_size: 31, expected an even number, as antithetic members are pairs"
    ):
        load_config(ESConfig, ROOT / "es_config.yml", ["population_size=31", "antithetic=true"])
    load_config(ESConfig, ROOT / "es_config.yml", ["population_size=31"])


@pytest.mark.parametrize(("name", "override", "message"), CASES, ids=[f"{case[0]}-{case[1]}" for case in CASES])
def test_bad_value_gets_one_line_with_source_key_value_and_expectation(tmp_path, name, override, message):
    config_class, default = CLASSES[name], ROOT / f"{name}_config.yml"
    with pytest.raises(ValueError, match="command line: ") as error:
        load_config(config_class, default, [override])
    assert str(error.value).startswith(f"command line: {message}")
    assert "\n" not in str(error.value)

    # The same value in a file: the file is named.
    values, (key, _, text) = yaml.safe_load(default.read_text()), override.partition("=")
    *parents, last = key.split(".")
    (values[parents[0]] if parents else values)[last] = yaml.safe_load(text)
    (tmp_path / "edited.yml").write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match="edited.yml: ") as error:
        load_config(config_class, tmp_path / "edited.yml", ["eval_size=8"])
    assert str(error.value).startswith(f"{tmp_path / 'edited.yml'}: {message}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("group_size", "command line: 'group_size', expected key=value"),
        ("seed.x=1", "command line: seed.x=1: seed holds 0, not a mapping"),
        ("rewards={", "command line: rewards={: "),
        ("rewards={a: 1, a: 2}", "command line: rewards={a: 1, a: 2}: a is set twice"),
    ],
)
def test_bad_override_is_named(override, message):
    with pytest.raises(ValueError, match="command line") as error:
        load_config(GRPOConfig, DEFAULT, [override])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda text: text.replace("seed: 0", ""), "seed: missing; every key is to be set"),
        (lambda text: text.replace("  rank: 16", "  #"), "lora.rank: missing; every key is to be set"),
        (lambda text: text + "\nseed: 1\n", "seed is set twice"),
        (lambda text: "- 1\n- 2\n", "expected a mapping of keys to values, not list"),
        (lambda text: "", "expected a mapping of keys to values, not NoneType"),
        (lambda text: "model: [", "while parsing"),
        (lambda text: "model:\ttiny\n\tx: 1", "while scanning"),
    ],
)
def test_bad_file_gets_one_line(tmp_path, edit, message):
    path = tmp_path / "edited.yml"
    path.write_text(edit(DEFAULT.read_text()))
    with pytest.raises(ValueError, match="edited.yml: ") as error:
        load_config(GRPOConfig, path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file_and_binary_file_get_one_line(tmp_path):
    with pytest.raises(ValueError, match="nowhere.yml: .*No such file"):
        load_config(GRPOConfig, tmp_path / "nowhere.yml")
    (tmp_path / "binary.yml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ValueError, match="binary.yml: "):
        load_config(GRPOConfig, tmp_path / "binary.yml")
