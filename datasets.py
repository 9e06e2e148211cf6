"""Problems to train on: every item is a dict with a "prompt" and the reference "answer", both text.

    MathExprDataset   made from a seed: integer expressions to evaluate, products of polynomials to expand
    GSM8KDataset      grade-school word problems, Cobbe et al. 2021, arXiv:2110.14168
    JSONLDataset      your own problems, one JSON object per line
A new dataset is a class here with an entry in DATASETS; `dataset_args` in the config are its arguments, whose types
pydantic checks. Not here: how a problem becomes a prompt (utils.py), how an answer is judged (reward.py).
"""

import hashlib
import itertools
import json
import random
import zlib
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt, validate_call
from torch.utils import data

from reward import UserError

Split = Literal["train", "test"]


PRECEDENCE = {"+": 1, "-": 1, "*": 2}


def random_expression(rng, num_operators, max_integer):
    """A random tree with `num_operators` operators over the integers 0..max_integer."""
    if num_operators == 0:
        return rng.randint(0, max_integer)
    num_left = rng.randrange(num_operators)
    left = random_expression(rng, num_left, max_integer)
    right = random_expression(rng, num_operators - 1 - num_left, max_integer)
    return (rng.choice("+-*"), left, right)


def expression_text(tree):
    """The tree in writing, with only the parentheses that precedence asks for: ("*", ("+", 1, 2), 3) is "(1+2)*3"."""
    if isinstance(tree, int):
        return str(tree)
    operator, left, right = tree
    precedence = PRECEDENCE[operator]
    left_text, right_text = expression_text(left), expression_text(right)
    if not isinstance(left, int) and PRECEDENCE[left[0]] < precedence:
        left_text = f"({left_text})"
    # a-(b+c) needs its parentheses and so, to be read as the tree it is, does a+(b+c): operators group to the left.
    if not isinstance(right, int) and PRECEDENCE[right[0]] <= precedence:
        right_text = f"({right_text})"
    return f"{left_text}{operator}{right_text}"


def apply_operator(operator, left, right):
    return {"+": left + right, "-": left - right, "*": left * right}[operator]


def expression_steps(tree, apply=apply_operator):
    """The value, and the steps (operator, left, right, result) that lead to it, innermost first."""
    if isinstance(tree, int):
        return tree, []
    operator, left, right = tree
    left, left_steps = expression_steps(left, apply)
    right, right_steps = expression_steps(right, apply)
    value = apply(operator, left, right)
    return value, [*left_steps, *right_steps, (operator, left, right, value)]


def multiply(a, b):
    product = [0] * (len(a) + len(b) - 1)
    for i, a_i in enumerate(a):
        for j, b_j in enumerate(b):
            product[i + j] += a_i * b_j
    return product


def add(a, b):
    return [x + y for x, y in itertools.zip_longest(a, b, fillvalue=0)]


def monomial_text(coefficient, power):
    variable = {0: "", 1: "x"}.get(power, f"x^{power}")
    if power and abs(coefficient) == 1:
        return f"{'-' if coefficient < 0 else ''}{variable}"
    return f"{coefficient}{variable}"


def polynomial_text(coefficients):
    """Highest power first, zero terms left out: [0, -2, 1] is "x^2-2x", [0] is "0"."""
    terms = [monomial_text(c, power) for power, c in enumerate(coefficients) if c][::-1]
    return "+".join(terms).replace("+-", "-") or "0"


def random_product(rng, max_coefficient):
    """(left, right, tail), read left * right + tail: a number or x times a linear polynomial, plus a monomial or
    nothing ([]), or the product of two linear polynomials."""
    signed = [c for c in range(-max_coefficient, max_coefficient + 1) if c]

    def linear():
        return [rng.choice(signed), rng.randint(1, max_coefficient)]

    if rng.random() < 0.4:
        return linear(), linear(), []
    left = rng.choice([[rng.randint(2, max_coefficient)], [0, 1]])
    tail = rng.choice([[], [rng.choice(signed)], [0, rng.choice(signed)]])
    return left, linear(), tail


def product_text(left, right, tail):
    left_text = polynomial_text(left)
    if sum(c != 0 for c in left) > 1:
        left_text = f"({left_text})"
    text = f"{left_text}*({polynomial_text(right)})"
    return f"{text}+{polynomial_text(tail)}".replace("+-", "-") if tail else text


class Problems(data.Dataset):
    """A list of items, which a subclass makes."""

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


class MathExprDataset(Problems):
    """Arithmetic of two kinds: "evaluate" integer expressions, "expand" products of polynomials and collect like terms.

    Items are distinct and follow from the arguments alone. A hash of an expression's text, never the seed, decides its
    split: train and test are disjoint whatever seeds and sizes they were made with.

    split: "train" (nine expressions in ten) or "test"
    size: number of items; by default 4096 to train on and 1024 to test with
    seed: another seed is another sample of the same split
    kinds: which kinds to draw from, in equal shares
    max_operators: evaluate: 1 to this many of + - *
    max_integer: evaluate: operands are 0 to this
    max_value: evaluate: no intermediate value is larger than this, sign aside
    max_coefficient: expand: coefficients are at most this, sign aside
    """

    WORDINGS = {
        "evaluate": ("Compute {}", "Evaluate {}", "Work out {}", "What is {}?"),
        "expand": ("Expand {}", "Multiply out {}", "Simplify {}", "Remove the brackets: {}"),
    }

    @validate_call
    def __init__(
        self,
        split: Split,
        size: PositiveInt | None = None,
        seed: int = 0,
        kinds: Annotated[list[Literal["evaluate", "expand"]], Field(min_length=1)] = ("evaluate", "expand"),
        max_operators: PositiveInt = 3,
        max_integer: PositiveInt = 10,
        max_value: PositiveInt = 50,
        max_coefficient: Annotated[int, Field(ge=2)] = 5,
    ):
        size = size or {"train": 4096, "test": 1024}[split]
        self.split, self.max_operators, self.max_integer = split, max_operators, max_integer
        self.max_value, self.max_coefficient = max_value, max_coefficient
        rng, seen, self.items = random.Random(f"{split} {seed}"), set(), []
        for _ in range(100 * size):
            kind = kinds[len(self.items) % len(kinds)]
            text, answer, _ = self.draw(rng, kind)
            if text is not None and text not in seen:
                seen.add(text)
                self.items.append({"prompt": rng.choice(self.WORDINGS[kind]).format(text), "answer": answer})
            if len(self.items) == size:
                return
        raise UserError(
            f"dataset_args: size: {size}: only {len(self.items)} distinct {split} problems were found; ask for fewer, "
            "or raise max_operators, max_integer, max_value or max_coefficient"
        )

    def draw(self, rng, kind):
        """One (text, answer, structure) of this difficulty and split; (None, None, None) if the draw falls outside."""
        if kind == "evaluate":
            structure = random_expression(rng, rng.randint(1, self.max_operators), self.max_integer)
            value, steps = expression_steps(structure)
            if max(abs(result) for *_, result in steps) > self.max_value:
                return None, None, None
            text, answer = expression_text(structure), str(value)
        else:
            structure = left, right, tail = random_product(rng, self.max_coefficient)
            text, answer = product_text(*structure), polynomial_text(add(multiply(left, right), tail))
        if (zlib.crc32(text.encode()) % 10 == 0) != (self.split == "test"):
            return None, None, None
        return text, answer, structure


class GSM8KDataset(Problems):
    """The 7,473 training or 1,319 test problems of GSM8K; the answer is the number after "####".

    path: a folder that holds train.jsonl and test.jsonl as published. Without one they come from the cache, torch.hub's
    folder, and on first use from the published address into the cache, with their checksums verified.
    """

    URL = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/{}.jsonl"
    SHA256 = {
        "train": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
        "test": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
    }

    @validate_call
    def __init__(self, split: Split, path: str | None = None):
        file = Path(path) / f"{split}.jsonl" if path else self.download(split)
        self.items = []
        for number, row in read_jsonl(file):
            question, (_, marker, answer) = row.get("question"), str(row.get("answer")).rpartition("####")
            if not question or not marker or not answer.strip():
                expected = 'expected "question" and an "answer" that ends in "#### number"'
                raise UserError(f"{file}, line {number}: {expected}")
            self.items.append({"prompt": question, "answer": answer.strip()})

    @classmethod
    def download(cls, split):
        file = Path(torch.hub.get_dir()) / "gsm8k" / f"{split}.jsonl"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            url = cls.URL.format(split)
            print(f"GSM8K: {url} -> {file}")
            try:  # into a temporary file, moved into place once the sum is right
                torch.hub.download_url_to_file(url, str(file), hash_prefix=cls.SHA256[split])
            except (OSError, RuntimeError) as error:
                raise UserError(f"GSM8K: no download ({error}); put the file from {url} at {file}") from None
        if hashlib.sha256(file.read_bytes()).hexdigest() != cls.SHA256[split]:
            raise UserError(f"GSM8K: {file} is not the published file (its sha256 differs): delete it")
        return file


class JSONLDataset(Problems):
    """Your own problems: one JSON object per line with "prompt" and "answer", text or a number; further keys go to the
    reward functions.

    path: for split "train" the file itself; for "test" `name.test.jsonl` beside `name.jsonl` when that exists, else
    every tenth line of the file, which "train" then leaves out.
    """

    @validate_call
    def __init__(self, path: str | Path, split: Split):
        path = Path(path)
        test_path = path.with_suffix(f".test{path.suffix}")
        file = test_path if split == "test" and test_path.is_file() else path
        self.items = []
        for number, row in read_jsonl(file):
            if type(row.get("answer")) in (int, float):
                row["answer"] = str(row["answer"])
            for key in ("prompt", "answer"):
                if not isinstance(row.get(key), str) or not row[key].strip():
                    raise UserError(f'{file}, line {number}: "{key}" is {row.get(key)!r}, expected text')
            if row.keys() & {"prompts", "completions"}:  # what reward functions get besides the columns
                raise UserError(f"{file}, line {number}: prompts and completions cannot be names of columns")
            if self.items and row.keys() != self.items[0].keys():
                raise UserError(f"{file}, line {number}: keys {sorted(row)}, but line 1 has {sorted(self.items[0])}")
            self.items.append(row)
        if not test_path.is_file():
            self.items = [item for i, item in enumerate(self.items) if (i % 10 == 9) == (split == "test")]
        if not self.items:
            raise UserError(f"{file}: no {split} problems in it; without {test_path.name}, every tenth line is one")


def read_jsonl(file):
    """(line number, object) for each line of the file that is not blank; UserError, naming the line, for a bad one."""
    if not Path(file).is_file():
        raise UserError(f"dataset: {file} does not exist")
    for number, line in enumerate(Path(file).read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"))
            json.dumps(row, ensure_ascii=False).encode()  # JSON can spell halves of characters, which are no text
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}, line {number}: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{file}, line {number}: expected an object, not {type(row).__name__}")
        yield number, row


DATASETS = {"math_expr": MathExprDataset, "gsm8k": GSM8KDataset}


def make_dataset(name, split, arguments):
    """The dataset called `name` in DATASETS, or behind a path to .jsonl, made with `arguments` from the config.

    pydantic.ValidationError for arguments that the dataset does not take.
    """
    if name in DATASETS:
        return DATASETS[name](split=split, **arguments)
    if name.endswith(".jsonl"):
        return JSONLDataset(name, split, **arguments)
    raise UserError(f"dataset: {name!r}: expected one of {', '.join(DATASETS)}, or a path that ends in .jsonl")


def __getattr__(name):
    """Explain the clash to code that expected Hugging Face's `datasets`, whose name this module has."""
    kind = AttributeError if name.startswith("__") else ImportError  # which `from datasets import` shows as it is
    raise kind(f"{__file__} has no {name}: from this folder, Hugging Face datasets cannot be imported")
