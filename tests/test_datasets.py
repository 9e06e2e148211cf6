"""Datasets: what they hold, what they refuse, and that the name does not get in anybody's way."""

import hashlib
import json
import random
import re

import pytest
from conftest import GSM8K, ROOT
from pydantic import ValidationError

import datasets
from datasets import (
    GSM8KDataset,
    JSONLDataset,
    MathExprDataset,
    expression_steps,
    expression_text,
    make_dataset,
    product_text,
    random_expression,
    random_product,
)
from grpo_train import GRPOConfig
from reward import UserError, parse_value
from utils import set_up

needs_gsm8k = pytest.mark.skipif(not GSM8K.is_dir(), reason="needs the published GSM8K files in ../shared/gsm8k")


def test_datasets_module_is_ours():
    assert datasets.__file__ == str(ROOT / "datasets.py")


@pytest.mark.parametrize("name", ["load_dataset", "Dataset"])
def test_what_hugging_face_datasets_would_have_is_explained(name):
    message = f"{datasets.__file__} has no {name}: from this folder, Hugging Face datasets cannot be imported"
    with pytest.raises(ImportError, match=re.escape(message)):
        getattr(datasets, name)
    with pytest.raises(ImportError, match=re.escape(message)):
        exec(f"from datasets import {name}")


# MathExpr


def expression_of(item):
    for wordings in MathExprDataset.WORDINGS.values():
        for wording in wordings:
            before, after = wording.split("{}")
            if item["prompt"].startswith(before) and item["prompt"].endswith(after):
                return item["prompt"][len(before) : len(item["prompt"]) - len(after)]
    raise AssertionError(item)


def value_at(expression, x):
    """Python's own arithmetic as the oracle, on text that this project wrote itself."""
    python = re.sub(r"(?<=[0-9)])(?=x)", "*", expression).replace("^", "**")
    return eval(python, {"__builtins__": {}}, {"x": x})


@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_are_right_by_pythons_own_arithmetic(split):
    for item in MathExprDataset(split, 500, max_operators=4, max_integer=20, max_value=999):
        for x in (-3, 0, 2, 7):
            assert value_at(expression_of(item), x) == value_at(item["answer"], x), item
        assert parse_value(item["answer"]) is not None


def test_every_item_has_an_operator_and_both_kinds_occur_equally():
    items = list(MathExprDataset("train", 2000))
    expressions = [expression_of(item) for item in items]
    assert all(re.search(r"[0-9x)][+*-]", expression) for expression in expressions)
    assert sum("x" in expression for expression in expressions) == 1000
    assert len(set(expressions)) == len(expressions)


def test_train_and_test_are_disjoint_for_every_seed_and_size():
    train = {expression_of(item) for seed in range(5) for item in MathExprDataset("train", 2000, seed)}
    test = {expression_of(item) for seed in range(5) for item in MathExprDataset("test", 500, seed)}
    assert len(train) > 5000 and len(test) > 900
    assert not train & test


def test_same_seed_gives_the_same_items_and_another_seed_others():
    assert list(MathExprDataset("test", 50, 1)) == list(MathExprDataset("test", 50, 1))
    assert list(MathExprDataset("test", 50, 1)) != list(MathExprDataset("test", 50, 2))


def test_difficulty_is_kept():
    for item in MathExprDataset("train", 300, kinds=["evaluate"], max_operators=2, max_integer=5, max_value=30):
        numbers = [int(n) for n in re.findall(r"[0-9]+", expression_of(item))]
        assert max(numbers) <= 5 and len(numbers) <= 3 and abs(int(item["answer"])) <= 30
    for item in MathExprDataset("train", 300, kinds=["expand"], max_coefficient=3):
        assert all(int(n) <= 3 for n in re.findall(r"(?<!\^)[0-9]+", expression_of(item)))


@pytest.mark.parametrize("seed", range(20))
def test_expression_text_has_just_the_parentheses_it_needs(seed):
    tree = random_expression(random.Random(seed), 6, 9)
    text, (value, steps) = expression_text(tree), expression_steps(tree)
    assert eval(text) == value
    assert len(steps) == 6
    for match in re.finditer(r"\(", text):  # taking any pair away changes how the text is grouped
        depth, end = 0, match.start()
        while True:
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            if depth == 0:
                break
            end += 1
        without = text[: match.start()] + text[match.start() + 1 : end] + text[end + 1 :]
        import ast

        assert ast.dump(ast.parse(without)) != ast.dump(ast.parse(text))


def test_product_text_reads_as_what_it_is():
    assert product_text([-2, 1], [3, 2], []) == "(x-2)*(2x+3)"
    assert product_text([3], [-1, 1], [0, -4]) == "3*(x-1)-4x"
    assert product_text([0, 1], [1, 5], [2]) == "x*(5x+1)+2"
    assert all("+-" not in product_text(*random_product(random.Random(i), 5)) for i in range(300))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size: 0: should be greater than 0"),
        ({"size": 10**5, "kinds": ["evaluate"], "max_operators": 1}, "size: 100000: .* distinct train problems were "),
        ({"max_operators": 0}, "max_operators: 0: should be greater than 0"),
        ({"max_integer": "nine"}, "max_integer: nine: should be a valid integer"),
        ({"max_coefficient": 1}, "max_coefficient: 1: should be greater than or equal to 2"),
        ({"kinds": ["divide"]}, "kinds.0: divide: should be 'evaluate' or 'expand'"),
        ({"kinds": "expand"}, "kinds: expand: should be a valid list"),
        ({"kinds": 5}, "kinds: 5: should be a valid list"),
        ({"max_operator": 3}, "max_operator: 3: Unexpected keyword argument"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(UserError, match=f"dataset_args: {message}"):
        set_up(GRPOConfig(dataset_args=arguments), "float32")


# GSM8K


@needs_gsm8k
@pytest.mark.parametrize(("split", "size"), [("train", 7473), ("test", 1319)])
def test_every_published_gsm8k_problem_parses_to_an_answer(split, size):
    items = list(GSM8KDataset(split, str(GSM8K)))
    assert len(items) == size
    assert all(set(parse_value(item["answer"])) <= {0} for item in items)
    assert all("####" not in item["prompt"] + item["answer"] for item in items)


@needs_gsm8k
def test_published_file_in_the_cache_is_used_and_a_changed_one_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    (tmp_path / "gsm8k").mkdir()
    file = tmp_path / "gsm8k" / "test.jsonl"
    file.write_bytes((GSM8K / "test.jsonl").read_bytes())
    assert len(GSM8KDataset("test")) == 1319
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"test.jsonl is not the published file \(its sha256 differs\)"):
        GSM8KDataset("test")


def test_gsm8k_is_downloaded_once_and_its_checksum_verified(monkeypatch, tmp_path):
    content = b'{"question": "How many?", "answer": "Some.\\n#### 1,250"}\n'
    source = tmp_path / "source" / "train.jsonl"
    source.parent.mkdir()
    source.write_bytes(content)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(GSM8KDataset, "URL", f"{source.parent.as_uri()}/{{}}.jsonl")
    with pytest.raises(UserError, match="GSM8K: no download"):  # the wrong sum leaves nothing behind
        GSM8KDataset("train")
    assert not list((tmp_path / "hub").rglob("*.jsonl*"))
    monkeypatch.setattr(GSM8KDataset, "SHA256", {"train": hashlib.sha256(content).hexdigest()})
    assert list(GSM8KDataset("train")) == [{"prompt": "How many?", "answer": "1,250"}]
    source.unlink()
    assert len(GSM8KDataset("train")) == 1


def test_gsm8k_offline_and_not_cached_says_where_to_put_the_file(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(GSM8KDataset, "URL", "http://127.0.0.1:9/{}.jsonl")  # nothing listens there
    message = "put the file from http://127.0.0.1:9/test.jsonl at .*gsm8k/test.jsonl"
    with pytest.raises(UserError, match=message) as error:
        GSM8KDataset("test")
    assert "\n" not in str(error.value)


def test_gsm8k_line_without_an_answer_is_named(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"question": "q", "answer": "a #### 1"}\n{"question": "q", "answer": "1"}\n')
    with pytest.raises(UserError, match=r"train.jsonl, line 2: .*####"):
        GSM8KDataset("train", str(tmp_path))
    with pytest.raises(UserError, match="test.jsonl does not exist"):
        GSM8KDataset("test", str(tmp_path))
    with pytest.raises(ValidationError, match="path\n  Input should be a valid string"):
        make_dataset("gsm8k", "test", {"path": 5})


# JSONL


def write_jsonl(path, rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_jsonl_holds_out_every_tenth_line_or_takes_a_test_file(tmp_path):
    rows = [{"prompt": f"p{i}", "answer": str(i), "level": i} for i in range(25)]
    path = write_jsonl(tmp_path / "problems.jsonl", [*rows[:5], "\n", *rows[5:]])
    assert [item["level"] for item in make_dataset(path, "test", {})] == [9, 19]
    assert len(make_dataset(path, "train", {})) == 23
    write_jsonl(tmp_path / "problems.test.jsonl", rows[:3])
    assert len(make_dataset(path, "train", {})) == 25
    assert list(make_dataset(path, "test", {})) == rows[:3]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json}\n", "line 3: Expecting property name"),
        ('["a"]\n', "line 3: expected an object, not list"),
        ('{"prompt": "p"}\n', 'line 3: "answer" is None, expected text'),
        ('{"prompt": "p", "answer": 7}\n', 'line 3: "answer" is 7, expected text'),
        ('{"prompt": " ", "answer": "7"}\n', "line 3: \"prompt\" is ' ', expected text"),
        ('{"prompt": "p", "answer": "7", "level": 1}\n', "line 3: keys"),
        ('{"prompt": "p", "answer": "7", "completions": 1}\n', "line 3: prompts and completions cannot be names"),
        ("[" * 100_000 + "\n", "line 3: "),
        ('{"prompt": "\\ud800", "answer": "7"}\n', "surrogates not allowed"),
    ],
)
def test_bad_jsonl_line_is_named_by_number(tmp_path, line, message):
    good = {"prompt": "p", "answer": "7"}
    path = write_jsonl(tmp_path / "problems.jsonl", [good, good, line])
    with pytest.raises(UserError, match="problems.jsonl, line 3") as error:
        JSONLDataset(path, "train")
    assert message in str(error.value)


def test_missing_empty_and_binary_jsonl_files_are_named(tmp_path):
    with pytest.raises(UserError, match="dataset: .*nowhere.jsonl does not exist"):
        make_dataset(str(tmp_path / "nowhere.jsonl"), "train", {})
    with pytest.raises(UserError, match="empty.jsonl: no train problems"):
        JSONLDataset(write_jsonl(tmp_path / "empty.jsonl", []), "train")
    (tmp_path / "binary.jsonl").write_bytes(b'{"prompt": "p", "answer": "\xff"}\n')
    with pytest.raises(UserError, match="binary.jsonl, line 1: 'utf-8' codec can't decode"):
        JSONLDataset(tmp_path / "binary.jsonl", "train")


def test_unknown_dataset_and_split_are_named():
    with pytest.raises(UserError, match="dataset: 'math_expt': expected one of math_expr, gsm8k, or a path"):
        make_dataset("math_expt", "train", {})
    with pytest.raises(ValidationError, match="split\n  Input should be 'train' or 'test'"):
        make_dataset("math_expr", "dev", {})
