"""Rewards: from completions and reference answers, both text, to numbers in [0, 1]. No torch here.

Completions are hostile input. Nothing in them is executed, sizes are bounded before any arithmetic, and what cannot be
read as an answer is simply wrong. A bug in a reward function, on the other hand, stops the run.

A reward function has the signature that TRL's GRPOTrainer uses, `f(completions, answer, **columns) -> list[float]`:
it gets every column of the dataset as a list with one entry a completion, and the prompts as `prompts`. Add yours to
REWARDS, or name it in the config as `my_module:my_function`.
"""

import importlib
import numbers
import re
from fractions import Fraction


class UserError(Exception):
    """An error in what the user gave: the program prints it as one line. Every other exception shows its traceback."""


MAX_ANSWER_CHARS = 200  # a longer answer is wrong, unread
MAX_TEXT_CHARS = 1_000_000  # likewise a longer completion
MAX_TAIL_CHARS = 1_000  # how far from its end the last number of a text is looked for
MAX_POWER = 1_000
TAGS = ("<think>", "</think>", "<answer>", "</answer>")

_FORMAT = re.compile(r"\s*<think>.*</think>\s*<answer>(.*)</answer>\s*", re.DOTALL)


def strict_answer(text):
    """Return the answer in a text of the format "<think>…</think><answer>…</answer>", or None for any other text.

    Each tag occurs exactly once, in this order, with nothing but white space before, between and after the two blocks.
    """
    if len(text) > MAX_TEXT_CHARS or any(text.count(tag) != 1 for tag in TAGS):
        return None
    match = _FORMAT.fullmatch(text)
    return match and match[1].strip()


# Runs of characters that values are written with; = and everything else separate them. One character class repeated:
# these patterns cannot backtrack.
_RUN = re.compile(r"[0-9xX^*+\-./,$% ]+")
_WORD = re.compile(r"[A-Za-z]+")
_NUMBER = re.compile(r"(?<![0-9xX.,)])-?\$?[0-9]+(?:,[0-9]+)*(?:\.[0-9]+)?(?:/[0-9]+)?%?|[0-9]+(?:\.[0-9]+)?")


def lenient_answer(text):
    """The last number or polynomial of the text as written there, tags or not, or None if there is none."""
    tail = text[-MAX_TAIL_CHARS:]
    if len(tail) < len(text):  # what the cut went through is no number of the text
        tail = tail.lstrip("0123456789xX^*+-−./,$% ")
    tail = tail.replace("−", "-")
    # Words are not values: the x of "next" is no variable. (A lone x is one.)
    tail = _WORD.sub(lambda match: match[0] if match[0] in "xX" else "|", tail)
    runs = [run.strip(" .,+*/^") for run in _RUN.findall(tail)]
    runs = [run for run in runs if any(c.isdigit() or c in "xX" for c in run)]
    if not runs:
        return None
    if parse_value(runs[-1]) is not None:
        return runs[-1]
    numbers = _NUMBER.findall(runs[-1])
    return numbers[-1] if numbers else None


# An optional sign, coefficient and power of x. Quantified groups start with characters that cannot end what stands
# before them, so matching is linear in the length.
_TERM = re.compile(
    r"(?P<sign>[+-]?)(?P<dollar>\$?)(?P<number>[0-9]+(?:,[0-9]{3})*)?(?P<decimals>\.[0-9]+)?"
    r"(?:/(?P<denominator>[0-9]+))?(?P<percent>%?)"
    r"(?:\*?(?P<variable>x)(?:\^(?P<power>[0-9]+))?)?"
)


def parse_value(text):
    """A number or an expanded polynomial in x as {power: coefficient}, exact and without zeros; None if it is neither.

    Numbers are integers, decimals and fractions; thousands may be set off by commas. "$" and "%" are units and say
    nothing: "$18" is 18 and "75%" is 75. A polynomial is a sum in which each power occurs once, as in "x^2-2x+1" or
    "x**2 - 2*x + 1". What is still to be worked out is no answer: "3+4", "2x+x", "14/2", anything with brackets.
    """
    if len(text) > MAX_ANSWER_CHARS:
        return None
    text = text.strip().replace("−", "-").replace("**", "^").replace("X", "x")
    text = re.sub(r"\s*([-+*^])\s*", r"\1", text)  # white space around operators means nothing; "1 2" is not 12
    coefficients, position = {}, 0
    while position < len(text) or not coefficients:
        term = _TERM.match(text, position)
        number, decimals, denominator, variable = term.group("number", "decimals", "denominator", "variable")
        has_coefficient = bool(number or decimals)
        if (
            (position > 0 and not term["sign"])
            or not (has_coefficient or variable)
            or ((term["dollar"] or term["percent"]) and (variable or not has_coefficient))
            or (number and "," in number and (number[0] == "0" or len(number.partition(",")[0]) > 3))
        ):
            return None
        coefficient = Fraction((number or "0").replace(",", "") + (decimals or "")) if has_coefficient else Fraction(1)
        if denominator:
            if not has_coefficient or int(denominator) == 0:
                return None
            coefficient /= int(denominator)
            if coefficient.denominator == 1:
                return None
        power = int(term["power"] or 1) if variable else 0
        if power in coefficients or power > MAX_POWER:
            return None
        coefficients[power] = -coefficient if term["sign"] == "-" else coefficient
        position = term.end()
    return {power: coefficient for power, coefficient in coefficients.items() if coefficient}


def same_answer(answer, reference):
    """True if both are the same exact value, or, for references that are no value (a word, say), the same text."""
    if answer is None:
        return False
    value = parse_value(reference)
    if value is None:
        return answer.strip() == reference.strip()
    return parse_value(answer) == value


def strict_correct(text, reference):
    return same_answer(strict_answer(text), reference)


def lenient_correct(text, reference):
    """True for what is strictly correct too: an answer in words is not among the numbers of the text."""
    return strict_correct(text, reference) or same_answer(lenient_answer(text), reference)


def accuracy_reward(completions, answer, **columns):
    """1.0 for each completion whose strict answer equals the reference, else 0.0."""
    return [float(strict_correct(text, reference)) for text, reference in zip(completions, answer, strict=True)]


def format_reward(completions, **columns):
    """1.0 for each completion of the form "<think>…</think><answer>…</answer>", whatever the answer, else 0.0."""
    return [float(strict_answer(text) is not None) for text in completions]


REWARDS = {"accuracy": accuracy_reward, "format": format_reward}


def find_reward(name):
    """The function behind a name in REWARDS or behind "my_module:my_function". A module that fails on import raises."""
    if name in REWARDS:
        return REWARDS[name]
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise UserError(f"rewards: {name!r}: expected one of {', '.join(REWARDS)}, or my_module:my_function")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):  # the module is there and lacks something itself
            raise
        raise UserError(f"rewards: {name!r}: there is no module {error.name} on the path") from None
    if not callable(getattr(module, function_name, None)):
        raise UserError(f"rewards: {name!r}: {module_name} has no function {function_name}")
    return getattr(module, function_name)


def score(weights, completions, items):
    """Score completions with each reward function of the config.

    weights: {name: weight}; completions: B texts; items: B dataset items, the one that each completion answers
    Returns B dicts: "reward" is the weighted sum, "reward/<name>" each function's own, unweighted; "accuracy/strict"
    and "accuracy/lenient" are there whatever is rewarded. Values need not be finite.
    """
    columns = {key: [item[key] for item in items] for key in items[0] if key != "prompt"}
    columns |= {"prompts": [item["prompt"] for item in items], "completions": completions}
    scores = {
        "accuracy/strict": list(map(strict_correct, completions, columns["answer"])),
        "accuracy/lenient": list(map(lenient_correct, completions, columns["answer"])),
    }
    for name in weights:
        values = scores[f"reward/{name}"] = find_reward(name)(**columns)
        if not isinstance(values, (list, tuple)) or len(values) != len(completions):
            raise UserError(
                f"rewards: {name} returned {str(values)[:100]}, expected a list of {len(completions)} numbers"
            )
        for text, value in zip(completions, values, strict=True):
            if not isinstance(value, numbers.Real):
                raise UserError(f"rewards: {name} returned {value!r}, no number, for {text[:80]!r}")
    rows = [dict(zip(scores, map(float, row), strict=True)) for row in zip(*scores.values(), strict=True)]
    for row in rows:
        row["reward"] = sum(weight * row[f"reward/{name}"] for name, weight in weights.items())
    return rows
