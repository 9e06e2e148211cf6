"""Config files: what is accepted, and the one line that everything else gets."""

import ast
import json
import re

import pytest
import yaml
from conftest import ROOT, SCRIPTS, TINY, scalars

from es_train import ESConfig
from grpo_train import GRPOConfig, LoRA
from reward import UserError
from utils import load_config

DEFAULT = ROOT / "grpo_config.yml"
CLASSES = {"grpo": GRPOConfig, "es": ESConfig}
RECIPES = sorted((ROOT / "recipes").glob("*.yml"))


@pytest.mark.parametrize("name", CLASSES)
def test_yaml_and_class_agree_on_defaults(name):
    assert load_config(CLASSES[name], ROOT / f"{name}_config.yml") == CLASSES[name]()


@pytest.mark.parametrize("path", [ROOT / f"{name}_config.yml" for name in CLASSES] + RECIPES, ids=lambda p: p.stem)
def test_every_key_is_set_in_the_yaml_and_has_a_comment(path):
    values = yaml.safe_load(path.read_text())
    assert values.keys() == CLASSES[path.stem.partition("_")[0]].model_fields.keys()
    assert "lora" not in values or values["lora"].keys() == LoRA.model_fields.keys()
    previous = ""
    for line in path.read_text().splitlines():
        if re.match(r" *\w+:", line):
            assert "  # " in line or previous.startswith("#"), line
        previous = line


@pytest.mark.parametrize("name", CLASSES)
def test_every_config_key_is_read(name):
    read = set()  # what is written as config.KEY, self.config.KEY or lora.KEY
    for path in (ROOT / f"{name}_train.py", ROOT / "utils.py", ROOT / "runs.py"):
        attributes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
        read |= {f"{ast.unparse(node.value).removeprefix('self.')}.{node.attr}" for node in attributes}
    assert {f"config.{key}" for key in CLASSES[name].model_fields} <= read
    if name == "grpo":
        assert {f"lora.{key}" for key in LoRA.model_fields} <= read


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_runs_two_steps_with_the_embedded_model_and_what_its_head_offers_loads(recipe, tmp_path):
    script = SCRIPTS[recipe.stem.partition("_")[0]]
    head = recipe.read_text().partition("\n\n")[0]
    offers = re.findall(r"\b\w+=[\w/-]+(?:\.[\w/-]+)*", head.replace("\n# ", " "))
    assert len([offer for offer in offers if offer.startswith("model=")]) == 3
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


def test_missing_keys_take_their_defaults(tmp_path):
    (tmp_path / "c.yml").write_text("lora: {rank: 4}\nnum_steps: 9\n")
    assert load_config(GRPOConfig, tmp_path / "c.yml") == GRPOConfig(lora=LoRA(rank=4), num_steps=9)
    (tmp_path / "c.yml").write_text("")
    assert load_config(GRPOConfig, tmp_path / "c.yml", ["seed=1"]) == GRPOConfig(seed=1)


BAD = [
    ("lerning_rate=1", "lerning_rate: 1: unknown key, did you mean learning_rate?"),
    ("zzz=1", "zzz: 1: unknown key, the keys are model, "),
    ("lora.rnk=8", "lora.rnk: 8: unknown key, did you mean rank?"),
    ("lora.dropout=0.1", "lora.dropout: 0.1: unknown key, the keys are rank, alpha, target_modules"),
    ("learning_rate=fast", "learning_rate: fast: should be a valid number"),
    ("learning_rate=-1", "learning_rate: -1: should be greater than 0"),
    ("learning_rate=.nan", "learning_rate: nan: should be a finite number"),
    ("learning_rate=.inf", "learning_rate: inf: should be a finite number"),
    ("learning_rate=", "learning_rate: None: should be a valid number"),
    ("group_size=1", "group_size: 1: should be greater than or equal to 2"),
    ("group_size=8.5", "group_size: 8.5: should be a valid integer"),
    ("group_size=[8]", "group_size: [8]: should be a valid integer"),
    ("temperature=0", "temperature: 0: should be greater than 0"),
    ("scale_advantages=std", "scale_advantages: std: should be 'group', 'batch' or 'none'"),
    ("loss_normalization=mean", "loss_normalization: mean: should be 'token', 'sequence' or 'constant'"),
    ("dtype=float16", "dtype: float16: should be 'float32' or 'bfloat16'"),
    ("device=tpu", "device: tpu: should be 'auto', 'cpu' or 'cuda'"),
    ("resume=runs/a", "resume: runs/a: should be 'auto' or 'never'"),
    ("mask_truncated=2", "mask_truncated: 2: should be a valid boolean"),
    ("model=3", "model: 3: should be a valid string"),
    ("rewards=accuracy", "rewards: accuracy: should be a valid dictionary"),
    ("rewards={3: 1}", "rewards.3.[key]: 3: should be a valid string"),
    ("dataset_args=5", "dataset_args: 5: should be a valid dictionary"),
    ("dataset_args=null", "dataset_args: None: should be a valid dictionary"),
    ("seed=5000000000", "seed: 5000000000: should be less than 4294967296"),
    ("rewards={}", "rewards: {}: Dictionary should have at least 1 item"),
    ("rewards={accuracy: high}", "rewards.accuracy: high: should be a valid number"),
    ("lora.rank=0", "lora.rank: 0: should be greater than 0"),
    ("lora.target_modules=q_proj", "lora.target_modules: q_proj: should be a valid list"),
    ("lora.target_modules=[]", "lora.target_modules: []: List should have at least 1 item"),
    ("lora=16", "lora: 16: should be a valid dictionary"),
    ("warmup_steps=60", "warmup_steps: 60: should be less than num_steps, 60"),
    ("clip_low=1.0", "clip_low: 1.0: should be less than 1"),
    ("num_steps=0", "num_steps: 0: should be greater than 0"),
]
BAD_ES = [
    ("population_size=1", "population_size: 1: should be greater than or equal to 2"),
    ("noise_scale=0", "noise_scale: 0: should be greater than 0"),
    ("noise_scale=-0.1", "noise_scale: -0.1: should be greater than 0"),
    ("learning_rate=0", "learning_rate: 0: should be greater than 0"),
    ("rank=0", "rank: 0: should be greater than 0"),
    ("population_batch=0", "population_batch: 0: should be greater than 0"),
    ("perturbation=lowrank", "perturbation: lowrank: should be 'low_rank' or 'gaussian'"),
    ("noise_schedule=step", "noise_schedule: step: should be 'constant', 'linear' or 'cosine'"),
    ("noise_std=1", "noise_std: 1: unknown key, did you mean noise_scale?"),
    ("group_size=8", "group_size: 8: unknown key"),
    ("antithetic=2", "antithetic: 2: should be a valid boolean"),
    ("num_iterations=0", "num_iterations: 0: should be greater than 0"),
    ("rewards={}", "rewards: {}: Dictionary should have at least 1 item"),
]
CASES = [("grpo", *case) for case in BAD] + [("es", *case) for case in BAD_ES]


def test_antithetic_members_are_even_in_number():
    with pytest.raises(UserError, match="population_size: 31: should be even: antithetic members are pairs"):
        load_config(ESConfig, ROOT / "es_config.yml", ["population_size=31", "antithetic=true"])
    load_config(ESConfig, ROOT / "es_config.yml", ["population_size=31"])


@pytest.mark.parametrize(("name", "override", "message"), CASES, ids=[f"{case[0]}-{case[1]}" for case in CASES])
def test_bad_value_gets_one_line_with_source_key_value_and_expectation(tmp_path, name, override, message):
    config_class, default = CLASSES[name], ROOT / f"{name}_config.yml"
    with pytest.raises(UserError) as error:
        load_config(config_class, default, [override])
    assert str(error.value).startswith(f"command line: {message}")
    assert "\n" not in str(error.value)

    # The same value in a file: the file is named.
    values, (key, _, text) = yaml.safe_load(default.read_text()), override.partition("=")
    *parents, last = key.split(".")
    (values[parents[0]] if parents else values)[last] = yaml.safe_load(text)
    (tmp_path / "edited.yml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError) as error:
        load_config(config_class, tmp_path / "edited.yml", ["eval_size=8", "dataset=gsm8k"])
    assert str(error.value).startswith(f"{tmp_path / 'edited.yml'}: {message}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("group_size", "command line: group_size: "),
        ("lora", "command line: lora: "),  # not the same as lora=null
        ("seed.x=1", "command line: seed.x=1: expected key=value"),
        ("rewards={", "command line: rewards={: "),
    ],
)
def test_bad_override_is_named(override, message):
    with pytest.raises(UserError) as error:
        load_config(GRPOConfig, DEFAULT, [override])
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- 1\n- 2\n", "expected a mapping of keys to values, not list"),
        (b"model: [", "while parsing"),
        (b"model:\ttiny\n\tx: 1", "while scanning"),
        (b"\xff\xfe\x00\x01", "'utf-8' codec can't decode"),
    ],
)
def test_bad_file_gets_one_line(tmp_path, content, message):
    (tmp_path / "edited.yml").write_bytes(content)
    with pytest.raises(UserError, match="edited.yml: ") as error:
        load_config(GRPOConfig, tmp_path / "edited.yml")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file_gets_one_line(tmp_path):
    with pytest.raises(UserError, match="nowhere.yml: .*No such file"):
        load_config(GRPOConfig, tmp_path / "nowhere.yml")
