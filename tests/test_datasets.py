"""Tests of datasets.py: contents, splits, bad arguments and files, and the name clash with Hugging Face's package."""

import ast
import hashlib
import itertools
import json
import random
import re
import zlib

import pytest
from conftest import GSM8K, ROOT
from hypothesis import given
from hypothesis import strategies as st

import datasets
from datasets import GSM8KDataset, JSONLDataset, MathExprDataset, make_dataset
from grpo_train import GRPOConfig
from reward import UserError, parse_value
from utils import set_up


def test_names_of_hugging_face_datasets_are_explained():
    message = "datasets.py has no load_dataset: Hugging Face datasets cannot be imported from this folder"
    for statement in ("datasets.load_dataset", "from datasets import load_dataset"):
        with pytest.raises(ImportError, match=f"^{re.escape(str(ROOT))}/{message}"):
            exec(statement)


def test_unknown_dataset_and_missing_and_empty_file_are_named(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    messages = {"math_expt": "dataset: 'math_expt': expected one of math_expr, gsm8k, or a path that ends in .jsonl"}
    messages |= {"nowhere.jsonl": "dataset: nowhere.jsonl does not exist"}
    messages |= {f"{tmp_path}/empty.jsonl": "empty.jsonl has no train problems"}
    for name, message in messages.items():
        with pytest.raises(UserError, match=message):
            make_dataset(name, "train", {})


# MathExpr


def expressions(*arguments, **settings):
    """Return {expression: answer} for the items of a MathExprDataset."""
    return {expression_in(item["prompt"]): item["answer"] for item in MathExprDataset(*arguments, **settings)}


def expression_in(prompt):
    return re.sub(r"^[A-Z][a-z: ]* |\?$", "", prompt)


def form_of(prompt):
    """Return what the mix is about: the number of operators, or what is multiplied and whether something is added."""
    expression = expression_in(prompt)
    if "x" not in expression:
        return sum(isinstance(node, ast.BinOp) for node in ast.walk(ast.parse(expression)))
    left, _, right = expression.partition("*(")
    return "two polynomials" if left.endswith(")") else "multiple" if right.endswith(")") else "multiple plus a term"


def value_at(expression, x):
    """Evaluate with Python's own arithmetic, as an oracle. The project generated the text, so `eval` is safe."""
    python = re.sub(r"(?<=[0-9)])(?=x)", "*", expression).replace("^", "**")
    return eval(python, {"__builtins__": {}}, {"x": x})


MIXES = [{}, {"kinds": ["evaluate"], "max_operators": 2}, {"kinds": ["expand"], "max_coefficient": 9, "size": 900}]
MIXES += [{"max_operators": 5, "max_integer": 20, "max_value": 500, "seed": 3}, {"kinds": ["evaluate"], "size": 700}]


@pytest.mark.parametrize("arguments", MIXES, ids=str)
def test_train_and_every_prefix_of_test_have_the_same_shares_of_kinds_and_operators(arguments):
    train, test = (MathExprDataset(split, **arguments) for split in ("train", "test"))
    kinds, forms = arguments.get("kinds", ["evaluate", "expand"]), [form_of(item["prompt"]) for item in train]
    shares = {form: 1 / len(kinds) / 3 for form in ("two polynomials", "multiple", "multiple plus a term")}
    shares = {form: share for form, share in shares.items() if "expand" in kinds}
    if "evaluate" in kinds:
        most = arguments.get("max_operators", 3)
        shares |= {number: 1 / len(kinds) / most for number in range(1, most + 1)}
    for items in (forms, [form_of(item["prompt"]) for item in test]):
        counts = dict.fromkeys(shares, 0)
        for size, form in enumerate(items, start=1):
            counts[form] += 1
            assert all(abs(counts[form] - share * size) <= 1 for form, share in shares.items()), size
    assert list(MathExprDataset("test", **arguments | {"size": 100})) == list(test)[:100]


def test_a_form_with_few_expressions_repeats_them_all_in_turn_with_other_wordings():
    items = list(MathExprDataset("train", kinds=["evaluate"], max_operators=1))
    expressions = [expression_in(item["prompt"]) for item in items]
    count = len(set(expressions))
    in_train = {
        f"{a}{op}{b}" for a, b, op in itertools.product(range(11), range(11), "+-*") if op != "*" or a * b <= 50
    }
    assert set(expressions) == {text for text in in_train if zlib.crc32(text.encode()) % 10}
    assert all(expressions[i] == expressions[i % count] for i in range(len(items)))
    assert len({item["prompt"] for item in items[: 4 * count]}) == 4 * count


@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_are_right_by_pythons_own_arithmetic(split):
    for expression, answer in expressions(split, 300, max_operators=4, max_integer=20, max_value=999).items():
        assert all(value_at(expression, x) == value_at(answer, x) for x in (-3, 0, 2, 7)), expression
        assert parse_value(answer) is not None


def test_every_expression_has_an_operator_and_train_and_test_are_disjoint_for_every_seed_and_size():
    train, test = expressions("train", 1000), expressions("test", 300)
    assert len(train) > 700 and len(test) > 200
    train, test = train | expressions("train", 500, seed=1), test | expressions("test", 200, seed=1)
    assert not train.keys() & test.keys() and len(train) > 1000  # another seed gives other expressions
    assert all(re.search(r"[0-9x)][+*-]", expression) for expression in train | test)


def test_difficulty_is_kept():
    made = expressions("train", 300, kinds=["evaluate"], max_operators=2, max_integer=5, max_value=30)
    for expression, answer in made.items():
        numbers = [int(n) for n in re.findall(r"[0-9]+", expression)]
        assert max(numbers) <= 5 and len(numbers) <= 3 and abs(int(answer)) <= 30
    for expression in expressions("train", 300, kinds=["expand"], max_coefficient=3):
        assert all(int(n) <= 3 for n in re.findall(r"(?<!\^)[0-9]+", expression))


@pytest.mark.parametrize("seed", range(30))
def test_expression_text_has_just_the_parentheses_it_needs(seed):
    tree = datasets.random_expression(random.Random(seed), 6, 9)
    text, (value, steps) = datasets.expression_text(tree), datasets.expression_steps(tree)
    assert eval(text) == value and len(steps) == 6
    for match in re.finditer(r"\(([^()]+)\)", text):  # removing any pair changes the parse tree
        without = text[: match.start()] + match[1] + text[match.end() :]
        assert ast.dump(ast.parse(without)) != ast.dump(ast.parse(text))


BAD_ARGUMENTS = [
    (
        {"max_operators": 9, "max_integer": 99, "max_value": 1},
        "found no train expression of kind evaluate with . operators; raise max_value, lower ",
    ),
    ({"max_operators": 0}, "max_operators: 0: should be greater than 0"),
    ({"kinds": ["divide"]}, "kinds.0: divide: should be 'evaluate' or 'expand'"),
    ({"max_operator": 3}, "max_operator: 3: Unexpected keyword argument"),
    ({"split": "test"}, "split: test: Got multiple values for argument"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS)
def test_bad_arguments_are_named(monkeypatch, arguments, message):
    monkeypatch.setattr(MathExprDataset, "PATIENCE", 1000)
    with pytest.raises(UserError, match=f"^dataset_args: {message}"):
        set_up(GRPOConfig(dataset_args=arguments, device="cpu"), "float32")


# GSM8K


@pytest.mark.skipif(not GSM8K.is_dir(), reason="needs the published GSM8K files in ../shared/gsm8k")
@pytest.mark.parametrize(("split", "size"), [("train", 7473), ("test", 1319)])
def test_every_published_gsm8k_problem_parses_to_an_answer(monkeypatch, tmp_path, split, size):
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    (tmp_path / "gsm8k").symlink_to(GSM8K)
    items = list(GSM8KDataset(split))  # from the cache, which verifies checksums
    assert items == list(GSM8KDataset(split, str(GSM8K))) and len(items) == size
    assert all(set(parse_value(item["answer"])) <= {0} for item in items)
    assert all("####" not in item["prompt"] + item["answer"] for item in items)


def test_gsm8k_is_downloaded_once_and_its_checksum_verified(monkeypatch, tmp_path):
    source, cached = tmp_path / "train.jsonl", tmp_path / "hub" / "gsm8k" / "train.jsonl"
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(GSM8KDataset, "URL", f"{tmp_path.as_uri()}/{{}}.jsonl")

    def assert_refused(message):
        with pytest.raises(UserError, match=message):
            GSM8KDataset("train")

    put_it_there = f"GSM8K: download failed (.*); put the file from {source.as_uri()} at {cached}$"
    assert_refused(put_it_there)  # the download fails
    content = b'{"question": "How many?", "answer": "Some.\\n#### 1,250"}\n'
    source.write_bytes(content)
    assert_refused(put_it_there)  # a wrong checksum leaves no file behind
    assert not list(cached.parent.iterdir())
    monkeypatch.setattr(GSM8KDataset, "SHA256", {"train": hashlib.sha256(content).hexdigest()})
    assert list(GSM8KDataset("train")) == [{"prompt": "How many?", "answer": "1,250"}]
    source.unlink()
    assert len(GSM8KDataset("train")) == 1
    cached.write_bytes(content * 2)
    assert_refused(r"train.jsonl is not the published file \(its SHA-256 differs\)")


def test_gsm8k_line_without_an_answer_is_named(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"question": "q", "answer": "a #### 1"}\n{"question": "q", "answer": "1"}\n')
    with pytest.raises(UserError, match=r"train.jsonl, line 2: .*####"):
        GSM8KDataset("train", str(tmp_path))


# JSONL

GOOD = b'{"prompt": "1+1", "answer": "2"}'


def test_jsonl_holds_out_a_random_tenth_of_the_lines_or_takes_a_test_file(tmp_path):
    rows = [{"prompt": f"p{i}", "answer": str(i), "level": i} for i in range(25)]
    rows[3]["prompt"] = "1+" * 5_000_000 + "1"  # lines may be long
    lines, path = [json.dumps(row) for row in rows], tmp_path / "problems.jsonl"
    path.write_text("\ufeff" + "\n".join([*lines[:5], "", *lines[5:]]), encoding="utf-8")
    held_out = list(make_dataset(str(path), "test", {}))
    assert len(held_out) == 2 and held_out == list(make_dataset(str(path), "test", {}))
    assert list(make_dataset(str(path), "train", {})) == [row for row in rows if row not in held_out]
    for name, test_name in (("problems", "problems.test"), ("train", "test"), ("train", "train.test")):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        (tmp_path / f"{test_name}.jsonl").write_text("\n".join(lines[: len(test_name)]))
        assert list(make_dataset(str(tmp_path / f"{name}.jsonl"), "train", {})) == rows
        assert list(make_dataset(str(tmp_path / f"{name}.jsonl"), "test", {})) == rows[: len(test_name)]
    # A regular order does not matter: here, every tenth line asks another question. Nor does a sorted one, if eval_size
    # is small.
    path = tmp_path / "regular.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"{i % 10}?", "answer": str(i)}) for i in range(500)))
    items = list(make_dataset(str(path), "test", {}))
    assert len({item["prompt"] for item in items}) > 5 and max(int(item["answer"]) for item in items[:10]) > 250


BAD_LINES = {
    b"{not json}": "Expecting property name",
    b'["a"]': "expected an object, not list",
    b'{"question": "p", "answer": "7"}': '"prompt" is None, expected text; the keys are question, answer',
    b'{"prompt": " ", "answer": "7"}': "\"prompt\" is ' ', expected text",
    b'{"prompt": "p", "answer": "7", "level": 3}': "keys ['answer', 'level', 'prompt'], but line 1 has",
    b'{"prompt": "p", "answer": "7", "completions": 1}': "prompts and completions are reserved names",
    b'{"prompt": "p", "answer": "7", "x": ["\\udfff"]}': "'utf-8' codec can't encode character '\\udfff'",
    b"[" * 1_000_000: "maximum recursion depth exceeded",
    b"\xff\xfe{": "'utf-8' codec can't decode byte",
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.items(), ids=BAD_LINES.values())
def test_bad_jsonl_line_is_named_by_number_in_one_line(tmp_path, line, message):
    path = tmp_path / "problems.jsonl"
    path.write_bytes(GOOD + b"\n\n" + line)  # the blank line counts
    with pytest.raises(UserError) as error:
        JSONLDataset(path, "train")
    assert str(error.value).startswith(f"{path}, line 3: {message}")
    assert len(str(error.value)) < 1000 and "\n" not in str(error.value)


def test_json_array_is_named(tmp_path):
    (tmp_path / "problems.jsonl").write_text('[\n{"prompt": "1+1", "answer": "2"}]')
    with pytest.raises(UserError, match="problems.jsonl, line 1: a JSON array, expected one object per line$"):
        JSONLDataset(tmp_path / "problems.jsonl", "train")


values = st.none() | st.integers() | st.floats() | st.text(max_size=9) | st.lists(st.text(max_size=9), max_size=3)
rows = st.dictionaries(st.sampled_from(["prompt", "answer", "level", "prompts"]), values)
lines = st.lists(rows.map(json.dumps).map(str.encode) | st.binary(max_size=60) | st.just(GOOD), max_size=5)


@given(st.sampled_from([b"", b"\xef\xbb\xbf"]), lines, st.sampled_from([b"\n", b"\r\n", b"\n\n"]))
def test_any_jsonl_file_is_read_as_text_or_its_bad_line_named(tmp_path_factory, mark, some, end):
    path = tmp_path_factory.getbasetemp() / "problems.jsonl"
    path.write_bytes(mark + end.join([*some, *[GOOD] * 10]))
    try:
        items = [*JSONLDataset(path, "train"), *JSONLDataset(path, "test")]
    except UserError as error:
        assert re.fullmatch(rf"{re.escape(str(path))}, line \d+: .{{1,900}}", str(error))
        return
    for item in items:
        assert all(isinstance(item[key], str) and item[key].strip() for key in ("prompt", "answer"))
        assert (item["prompt"] + item["answer"]).encode() and item.keys() == items[0].keys()
