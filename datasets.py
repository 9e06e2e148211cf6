"""Datasets: lists of problems. Each problem is a dict with a "prompt" and the reference "answer", both text.

    MathExprDataset   generated from a seed: integer expressions to evaluate, products of polynomials to expand
    GSM8KDataset      grade-school word problems, Cobbe et al. 2021, arXiv:2110.14168
    JSONLDataset      your own problems, one JSON object per line
To add a dataset, write a subclass of list like these and add it to DATASETS. `dataset_args` in the config are its
arguments; pydantic checks their types. Elsewhere: prompts (utils.py) and the scoring of answers (reward.py).
"""

import hashlib
import itertools
import json
import math
import random
import textwrap
import zlib
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt, validate_call

from reward import UserError

Split = Literal["train", "test"]


PRECEDENCE = {"+": 1, "-": 1, "*": 2}


def random_expression(rng, num_operators, max_integer):
    """Return a random tree with `num_operators` operators over the integers 0 to max_integer."""
    if num_operators == 0:
        return rng.randint(0, max_integer)
    num_left = rng.randrange(num_operators)
    left = random_expression(rng, num_left, max_integer)
    right = random_expression(rng, num_operators - 1 - num_left, max_integer)
    return (rng.choice("+-*"), left, right)


def expression_text(tree):
    """Format a tree with only the parentheses that precedence requires: ("*", ("+", 1, 2), 3) is "(1+2)*3"."""
    if isinstance(tree, int):
        return str(tree)
    operator, left, right = tree
    precedence = PRECEDENCE[operator]
    left_text, right_text = expression_text(left), expression_text(right)
    if not isinstance(left, int) and PRECEDENCE[left[0]] < precedence:
        left_text = f"({left_text})"
    # Operators group to the left, so a-(b+c) needs parentheses, and so does a+(b+c) to keep the tree's structure.
    if not isinstance(right, int) and PRECEDENCE[right[0]] <= precedence:
        right_text = f"({right_text})"
    return f"{left_text}{operator}{right_text}"


def apply_operator(operator, left, right):
    return {"+": left + right, "-": left - right, "*": left * right}[operator]


def expression_steps(tree, apply=apply_operator):
    """Return the value, and the steps (operator, left, right, result) to it, innermost first."""
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
    """Format a polynomial, highest power first, without zero terms: [0, -2, 1] is "x^2-2x", [0] is "0"."""
    terms = [monomial_text(c, power) for power, c in enumerate(coefficients) if c][::-1]
    return "+".join(terms).replace("+-", "-") or "0"


def random_product(rng, max_coefficient):
    """Return (left, right, tail) of left * right + tail.

    Either multiply two linear polynomials, with an empty tail, or multiply a number or x by a linear polynomial and
    optionally add a monomial as the tail.
    """
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


class MathExprDataset(list):
    """Arithmetic of two kinds: "evaluate" integer expressions, "expand" products of polynomials and collect like terms.

    Items depend only on the arguments. A hash of the expression's text, never the seed, decides its split, so that
    train and test are disjoint for all seeds and sizes.

    Every prefix of either split has the same mix, so that a larger held-out set is more precise, not harder: the kinds
    in equal shares, "evaluate" with 1 to max_operators operators in equal shares, "expand" with its three forms in
    equal shares (a product of two linear polynomials; a number or x times one; the same plus a monomial). There are
    few easy expressions, such as some 340 with one operator. When all of a form are used, they are repeated, the first
    three times with other wordings.

    split: "train" (nine of ten expressions) or "test"
    size: number of items; 4096 for train and 1024 for test by default
    seed: selects another sample of the same split
    kinds: the kinds to draw from
    max_operators: evaluate: the most operators (+ - *) in an expression
    max_integer: evaluate: the largest operand; the smallest is 0
    max_value: evaluate: the largest absolute value of an operation's result
    max_coefficient: expand: the largest absolute coefficient in the problem; the answer's may be larger
    """

    WORDINGS = {
        "evaluate": ("Compute {}", "Evaluate {}", "Work out {}", "What is {}?"),
        "expand": ("Expand {}", "Multiply out {}", "Simplify {}", "Remove the brackets: {}"),
    }
    PATIENCE = 20_000  # a kind has no more expressions after this many draws without a new one

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
        kinds_in_turn = []
        for kind in kinds:
            forms = range(1, max_operators + 1) if kind == "evaluate" else [(1, 0), (1, 1), (2, 0)]
            found = self.collect(kind, forms, math.ceil(size / len(kinds) / len(forms)), seed)
            kinds_in_turn.append(itertools.cycle([self.worded(kind, expressions) for expressions in found]))
        self.extend(next(next(forms)) for forms in itertools.islice(itertools.cycle(kinds_in_turn), size))

    def worded(self, kind, expressions):
        """Yield items forever, all expressions once in each turn. The wordings rotate."""
        for turn in itertools.count():
            for number, (text, answer) in enumerate(expressions.items(), start=turn):
                yield {"prompt": self.WORDINGS[kind][number % 4].format(text), "answer": answer}

    def collect(self, kind, forms, count, seed):
        """Return `count` distinct expressions of each form, or all of them: dicts {text: answer}."""
        rng = random.Random(f"{self.split} {seed} {kind}")
        found, num_idle = {form: {} for form in forms}, 0
        while num_idle < self.PATIENCE and any(len(expressions) < count for expressions in found.values()):
            drawn, num_idle = self.draw(rng, kind), num_idle + 1
            if drawn:
                text, answer, form, _ = drawn
                if text not in found[form] and len(found[form]) < count:
                    found[form][text], num_idle = answer, 0
        missing = [form for form, expressions in found.items() if not expressions]
        if missing:
            message = f"found no {self.split} expression of kind {kind} with {missing[0]} operators"
            raise UserError(f"dataset_args: {message}; raise max_value, lower max_operators, or change max_integer")
        return list(found.values())

    def draw(self, rng, kind):
        """Draw (text, answer, form, structure), or None if it violates a limit or is in the other split.

        form: the number of operators to evaluate, or the numbers of terms in left factor and tail to expand
        """
        if kind == "evaluate":
            structure = random_expression(rng, rng.randint(1, self.max_operators), self.max_integer)
            value, steps = expression_steps(structure)
            if max(abs(result) for *_, result in steps) > self.max_value:
                return None
            text, answer, form = expression_text(structure), str(value), len(steps)
        else:
            structure = left, right, tail = random_product(rng, self.max_coefficient)
            text, answer = product_text(*structure), polynomial_text(add(multiply(left, right), tail))
            form = sum(map(bool, left)), sum(map(bool, tail))
        if (zlib.crc32(text.encode()) % 10 == 0) != (self.split == "test"):
            return None
        return text, answer, form, structure


class GSM8KDataset(list):
    """The 7,473 training or 1,319 test problems of GSM8K; the answer is the number after "####".

    path: a folder with the published train.jsonl and test.jsonl. If None, the files are downloaded once to torch.hub's
    folder, and their checksums verified.
    """

    URL = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/{}.jsonl"
    SHA256 = {
        "train": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
        "test": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
    }

    @validate_call
    def __init__(self, split: Split, path: str | None = None):
        file = Path(path).expanduser() / f"{split}.jsonl" if path else self.download(split)
        for number, row in read_jsonl(file):
            question, (_, marker, answer) = row.get("question"), str(row.get("answer")).rpartition("####")
            if not question or not marker or not answer.strip():
                expected = 'expected "question" and an "answer" that ends in "#### number"'
                raise UserError(f"{file}, line {number}: {expected}")
            self.append({"prompt": question, "answer": answer.strip()})

    @classmethod
    def download(cls, split):
        file = Path(torch.hub.get_dir()) / "gsm8k" / f"{split}.jsonl"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            url = cls.URL.format(split)
            print(f"GSM8K: {url} -> {file}")
            try:  # writes to a temporary file and moves it into place if the checksum is correct
                torch.hub.download_url_to_file(url, str(file), hash_prefix=cls.SHA256[split])
            except (OSError, RuntimeError) as error:
                raise UserError(f"GSM8K: download failed ({error}); put the file from {url} at {file}") from None
        if hashlib.sha256(file.read_bytes()).hexdigest() != cls.SHA256[split]:
            raise UserError(f"GSM8K: {file} is not the published file (its SHA-256 differs); delete it")
        return file


class JSONLDataset(list):
    """Your own problems, one JSON object per line: "prompt" is text, "answer" is text or a number. Reward functions
    receive all other keys.

    path: the file of split "train". Split "test" is `name.test.jsonl` beside `name.jsonl`, or test.jsonl beside
    train.jsonl, if it exists; otherwise a random tenth of the lines, always the same, which "train" omits.
    """

    @validate_call
    def __init__(self, path: str | Path, split: Split):
        path = Path(path)
        test_path = path.with_name(f"{path.stem}.test.jsonl")
        if path.name == "train.jsonl" and not test_path.is_file():
            test_path = path.with_name("test.jsonl")
        file = test_path if split == "test" and test_path.is_file() else path
        for number, row in read_jsonl(file):
            if type(row.get("answer")) in (int, float):
                row["answer"] = str(row["answer"])
            for key in ("prompt", "answer"):
                if not isinstance(row.get(key), str) or not row[key].strip():
                    found = f"is {row.get(key)!r}, expected text; the keys are {', '.join(row)}"
                    raise UserError(f'{file}, line {number}: "{key}" {textwrap.shorten(found, 300)}')
            if row.keys() & {"prompts", "completions"}:  # names of other arguments of reward functions
                raise UserError(f"{file}, line {number}: prompts and completions are reserved names")
            if self and row.keys() != self[0].keys():
                raise UserError(f"{file}, line {number}: keys {sorted(row)}, but line 1 has {sorted(self[0])}")
            self.append(row)
        if not test_path.is_file():
            order = range(len(self))
            held_out = random.Random(0).sample(order, len(order) // 10)  # in random order, for a smaller eval_size
            kept = held_out if split == "test" else sorted(set(order) - set(held_out))
            self[:] = [self[i] for i in kept]
        if not self:
            raise UserError(f"{file} has no {split} problems; without {test_path.name}, a tenth is held out")


def read_jsonl(file):
    """Yield (line number, object) for each nonblank line of the file. Raise UserError that names a bad line."""
    if not Path(file).is_file():
        raise UserError(f"dataset: {file} does not exist")
    content = Path(file).read_bytes()
    if content[:99].strip().startswith(b"["):
        raise UserError(f"{file}, line 1: a JSON array, expected one object per line")
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"))
            json.dumps(row, ensure_ascii=False).encode()  # JSON can contain lone surrogates, which are not valid text
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}, line {number}: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{file}, line {number}: expected an object, not {type(row).__name__}")
        yield number, row


DATASETS = {"math_expr": MathExprDataset, "gsm8k": GSM8KDataset}


def make_dataset(name, split, arguments):
    """Create a dataset from a name in DATASETS or the path of a .jsonl file. arguments: the config's dataset_args

    Raise pydantic.ValidationError for unknown or invalid arguments.
    """
    if name in DATASETS:
        return DATASETS[name](split, **arguments)
    if name.endswith(".jsonl"):
        return JSONLDataset(name, split, **arguments)
    raise UserError(f"dataset: {name!r}: expected one of {', '.join(DATASETS)}, or a path that ends in .jsonl")


def __getattr__(name):
    """Explain the name clash to code that expects Hugging Face's `datasets`."""
    kind = AttributeError if name.startswith("__") else ImportError  # `from ... import` shows its message
    raise kind(f"{__file__} has no {name}: Hugging Face datasets cannot be imported from this folder")
