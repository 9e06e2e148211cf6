"""Reward functions: compare completions with reference answers, both text, and return numbers (here 0 to 1).

Completions are untrusted input. Nothing in them is executed, sizes are bounded before any arithmetic, and anything that
cannot be parsed as an answer is wrong. An exception in a reward function, in contrast, stops the run.

A reward function has the signature of TRL's GRPOTrainer, `f(completions, answer, **columns) -> list[float]`. It gets
every column of the dataset as a list with one entry per completion, and the prompts as `prompts`, in plain text. It may
return NumPy or torch values, and None for completions that it does not apply to, which counts as 0. Add yours to
REWARDS, or name it in the config as `my_module:my_function`. Async functions, and TRL's `completion_ids`,
`trainer_state` and conversational completions are not supported.
"""

import copy
import importlib
import inspect
import numbers
import os
import re
import signal
import sys
import threading
import time
from fractions import Fraction


class UserError(Exception):
    """An error in the user's input, printed as one line. Every other exception shows its traceback."""


MAX_ANSWER_CHARS = 200  # longer answers are wrong
MAX_TEXT_CHARS = 200_000  # longer completions fail the format; lenient scoring reads their end
MAX_TAIL_CHARS = 1_000  # search this many characters at the end for the last value
MAX_POWER = 1_000
TAGS = ("<think>", "</think>", "<answer>", "</answer>")

_FORMAT = re.compile(r"\s*<think>.*</think>\s*<answer>(.*)</answer>\s*", re.DOTALL)


def strict_answer(text):
    """Return the answer in a text of the format "<think>…</think><answer>…</answer>", or None for any other text.

    Each tag must occur exactly once, in this order, with only whitespace before, between and after the blocks.
    """
    if len(text) > MAX_TEXT_CHARS or any(text.count(tag) != 1 for tag in TAGS):
        return None
    match = _FORMAT.fullmatch(text)
    return match and match[1].strip()


# --- Values: the notation of numbers and polynomials ------------------------------------------------------------------

# LaTeX and Unicode to plain characters. Backtracking is bounded: each pattern repeats only character classes.
_SPELLINGS = [
    (re.compile("[−–‐‑]"), "-"),
    (re.compile(r"\\(?:left|right|displaystyle|[,!;: ])|\\(?=[$%])"), ""),
    (re.compile(r"(?<=[0-9])\{,\}(?=[0-9])"), ","),
    (
        re.compile(r"\\[dt]?frac *(?:\{ *(-?[0-9]{1,50}) *\}|([0-9])) *(?:\{ *([0-9]{1,50}) *\}|([0-9])(?![0-9]))"),
        r" \1\2/\3\4",
    ),
    (re.compile(r"(?:√|\\sqrt(?:\[[0-9a-z]\])?) *(?:\{[^{}]{0,50}\}|[0-9]+)|π|\\pi"), "(x)(x)"),  # not evaluated
    (re.compile(r"\\[dt]?frac *\{([^{}]{0,50})\} *\{([^{}]{0,50})\}"), r"(\1)/(\2)"),
    (re.compile(r"(?<=[0-9]) *(?:×|\\times) *10 *\^ *\{?(-?[0-9]{1,3})\}?"), r"e\1"),
    (re.compile(r"\^\{([0-9]{1,9})\}"), r"^\1"),
    (re.compile(r"\\[()\[\]]"), "$"),
    (re.compile(r"\\cdot|\\times|\\div|[×÷·]"), "*"),  # expressions, which are not evaluated
]
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf) *\{([^{}]*)\}")
_WRAPPERS = {"**": "**", "__": "__", "$$": "$$", "$": "$", "`": "`", "*": "*", "\\boxed{": "}", "(": ")"}
_ASSIGNMENT = re.compile(r"[A-Za-z] *= *([^=]+)")


def plain_spelling(text):
    """Rewrite a text in plain characters: \\frac{1}{2} is 1/2, 1.5 \\times 10^3 is 1.5e3, − is -."""
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    return text


def unwrapped(text):
    """Remove the typesetting around one value: **42**, $42$, \\boxed{42}, (42), x = 42, 42."""
    before = None
    while text != before:
        before = text = text.strip().removesuffix(".").strip()
        for opening, closing in _WRAPPERS.items():
            inside = text[len(opening) : len(text) - len(closing)]
            if not inside or not text.startswith(opening) or not text.endswith(closing):
                continue
            if opening[-1] not in "({" or _closing(text, len(opening) - 1) == len(text) - 1:
                text = inside
                break
        assignment = _ASSIGNMENT.fullmatch(text)
        text = assignment[1] if assignment else text
    return text


def _closing(text, start):
    """Return the index of the bracket that closes the one at `start`, or -1."""
    depth, pair = 0, text[start] + {"(": ")", "{": "}"}[text[start]]
    for index in range(start, min(len(text), start + MAX_ANSWER_CHARS)):
        depth += (text[index] == pair[0]) - (text[index] == pair[1])
        if depth == 0:
            return index
    return -1


# An optional sign, coefficient and power of x. Quantified groups start with characters that cannot end the preceding
# group, so matching takes linear time.
_TERM = re.compile(
    r"(?P<sign>[+-]?)(?P<dollar>\$?)(?P<number>[0-9]+(?:,[0-9]{3})*)?(?P<decimals>\.[0-9]+)?"
    r"(?:[eE](?P<exponent>[+-]?[0-9]{1,3}))?(?:/(?P<denominator>[0-9]+))?(?P<percent>%?)"
    r"(?:\*?(?P<variable>x)(?:\^(?P<power>[0-9]+))?)?"
)
_MIXED = re.compile(r"(-?)([0-9]+) +([0-9]+)/([0-9]+)")


def parse_value(text):
    """Parse a number or an expanded polynomial in x as exact {power: nonzero coefficient}. Return None otherwise.

    Numbers are integers, decimals, fractions, mixed numbers and 1.5e3. Commas may separate thousands, and "$" and "%"
    are units: "75%" is 75. A polynomial is a sum in which each power occurs once, as in "x^2-2x+1" or "x**2 - 2*x + 1".
    Typesetting is ignored, see `unwrapped`. An unevaluated expression is not a value: "3+4", "2x+x", "14/2", a product
    of brackets.
    """
    if len(text) > MAX_ANSWER_CHARS:
        return None
    text = unwrapped(plain_spelling(text)).replace("**", "^").replace("X", "x")
    mixed = _MIXED.fullmatch(text)
    if mixed and int(mixed[3]) < int(mixed[4]):
        value = int(mixed[2]) + Fraction(int(mixed[3]), int(mixed[4]))
        return {0: -value if mixed[1] else value} if value else {}
    text = re.sub(r"\s*([-+*^])\s*", r"\1", text)  # ignore whitespace around operators; "1 2" is not 12
    coefficients, position = {}, 0
    while position < len(text) or not coefficients:
        term = _TERM.match(text, position)
        number, decimals, denominator, variable = term.group("number", "decimals", "denominator", "variable")
        has_coefficient = bool(number or decimals)
        if (
            (position > 0 and not term["sign"])
            or not (has_coefficient or variable)
            or ((term["dollar"] or term["percent"]) and (variable or not has_coefficient))
            or (term["exponent"] and not has_coefficient)
            or (number and "," in number and (number[0] == "0" or len(number.partition(",")[0]) > 3))
        ):
            return None
        coefficient = Fraction((number or "0").replace(",", "") + (decimals or "")) if has_coefficient else Fraction(1)
        coefficient *= Fraction(10) ** int(term["exponent"] or 0)
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


# --- Values in free text ----------------------------------------------------------------------------------------------

# Runs of characters that occur in values. Words, = and everything else separate them.
_RUN = re.compile(r"[0-9eExX^*+\-./,$% ()]+")
_WORD = re.compile(r"((?<=[0-9])[eE](?=[+-]?[0-9]))|[A-Za-z]+")  # the e in 1.5e3 is part of a number
_BULLET = re.compile(r"(?<=\n)[ \t]*(?:[-*•]|[0-9]{1,3}[.)])[ \t]+(?=\S)")
_LIST = re.compile(r"(?<=\S) +(?=[-$.]?[0-9])")


def values_in(text):
    """Return the values in a text, in order, as text; None for an unevaluated expression, unless "=" follows. A "- " or
    "1. " after a line break is a bullet."""
    text = re.sub(r"\.{2,}", " ", plain_spelling(_BULLET.sub("", text)))
    text = _WORD.sub(lambda match: match[0] if match[1] or match[0] in "xX" else "|", text)
    text, found = text.replace("\\", "|"), []
    for match in _RUN.finditer(text):
        for run in re.split("[,.] +", match[0]):
            run = run.lstrip(" ,+*/)").rstrip(" .,+*/^$(-")
            if run.startswith("^"):
                continue  # the exponent of a unit
            if re.search(r"[0-9xX)] *[-+*/^xX] *[0-9xX(]|[xX)] *[(]", run) and parse_value(run) is None:
                found += [None] if text[match.end() : match.end() + 1] != "=" else []
            elif any(map(str.isdigit, run)):
                parts = [run] if parse_value(run) is not None else _LIST.split(run)
                found += [part for part in parts if parse_value(part) is not None]
    return found


def final_part(text):
    """Return the part of a text that a person would look at for the final answer, and its kind.

    "field": the last answer tag, else the last \\boxed{}; "line": what follows the last "####", else the last "answer
    is" or "Answer:"; "text": all of it
    """
    start, end = text.rfind("<answer>"), text.rfind("</answer>")
    if start >= 0:
        return text[start + len("<answer>") : end if end > start else None], "field"
    start = text.rfind("\\boxed{")
    end = _closing(text, start + len("\\boxed")) if start >= 0 else -1
    if end >= 0:
        return text[start + len("\\boxed{") : end], "field"
    found = list(re.finditer("####", text)) or list(re.finditer(r"answer is|answer[*_]*:", text, re.IGNORECASE))
    if not found:
        return text, "text"
    after = re.sub(r"(?<=\n)[ \t]*(?:[-*•]|1[.)])[ \t]+", "", text[found[-1].end() :][:MAX_ANSWER_CHARS])
    return after.strip(" :*_\n").partition("\n")[0], "line"


_CHOICE = re.compile(r"\W{0,3}(or|and)\W")  # "5 or 6" is not an answer


def lenient_answer(text):
    """Return the value that a person would read as the final answer, as text, or None.

    It is the only value of the `final_part` if that is a field, the first one of a line's first sentence. Without a
    field and without a value in the sentence, it is the last value of the text.
    """
    text = text[-MAX_TEXT_CHARS:]
    part, kind = final_part(text)
    if kind == "field":
        return single_value(part)
    if kind == "line":
        sentence = re.split(r"\.\s", part, maxsplit=1)[0]
        values = values_in(sentence)
        first = next(filter(None, values), None)
        if first:
            return None if len(values) > 1 and _CHOICE.match(sentence.partition(first)[2]) else first
    tail = text[-MAX_TAIL_CHARS:]
    if len(tail) < len(text):  # the first value may be incomplete
        tail = tail.lstrip("0123456789xX^*+-−./,$% ")
    return next(filter(None, reversed(values_in("\n" + tail))), None)


def single_value(text):
    """Return the only value in a text, which may have a unit word; None if there are none or several."""
    if len(text) > MAX_ANSWER_CHARS:
        return None
    values = [text] if parse_value(text) is not None else values_in(text)
    return values[0] if len(values) == 1 else None


def reference_value(reference):
    """Parse a reference answer, or the part of it after "####"."""
    value = parse_value(reference)
    return value if value is not None else parse_value(reference.rpartition("####")[2])


def plain_word(text):
    """Return a word or choice without typesetting: (B), **B**, \\text{B}, "B", B. and B) are B."""
    text = unwrapped(_TEXT.sub(r"\1", text[:MAX_ANSWER_CHARS]).replace("\\(", "").replace("\\)", "")).strip("\"'")
    return " ".join(text.removesuffix("" if "(" in text else ")").split())


def same_answer(answer, reference):
    """Return True for the same exact value, or the same word or choice if the reference is not a value."""
    if answer is None:
        return False
    value = reference_value(reference)
    if value is None:
        return plain_word(answer).casefold() == plain_word(reference).casefold()
    return parse_value(answer) == value


def strict_correct(text, reference):
    return same_answer(strict_answer(text), reference)


def lenient_correct(text, reference):
    """Return True for a correct final answer in any format, and for every strictly correct text.

    A word or choice must be the whole field or last line, or begin the line of the `final_part`.
    """
    if reference_value(reference) is not None:
        return same_answer(lenient_answer(text), reference)
    part, kind = final_part(text[-MAX_TEXT_CHARS:])
    if kind != "line":
        return same_answer(part if kind == "field" else part.strip().rpartition("\n")[2], reference)
    word, line = r"\s+".join(map(re.escape, plain_word(reference).split())), _TEXT.sub(r"\1", part)
    case = 0 if word in "AaIi" else re.IGNORECASE  # "the answer is a dog"
    start = re.match(rf"[\W_]*(?:(?:the|option|choice)\b[\W_]*)?{word}(?![\w+#])", line, case)
    return bool(start) and not re.match(r"\W{0,3}or\W|[^\w,]{0,3}and\W", line[start.end() :])


def accuracy_reward(completions, answer, **columns):
    """1.0 for each completion whose strict answer equals the reference, else 0.0."""
    return [float(strict_correct(text, reference)) for text, reference in zip(completions, answer, strict=True)]


def format_reward(completions, **columns):
    """1.0 for each completion of the format "<think>…</think><answer>…</answer>", whatever the answer, else 0.0."""
    return [float(strict_answer(text) is not None) for text in completions]


def lenient_accuracy_reward(completions, answer, **columns):
    """1.0 for each completion whose final answer, in any format, equals the reference, else 0.0."""
    return [float(lenient_correct(text, reference)) for text, reference in zip(completions, answer, strict=True)]


def tag_count_reward(completions, **columns):
    """A quarter for each of the four tags that occurs exactly once: partial credit on the way to the format."""
    return [sum(text.count(tag) == 1 for tag in TAGS) / len(TAGS) for text in completions]


REWARDS = {
    "accuracy": accuracy_reward,
    "lenient_accuracy": lenient_accuracy_reward,
    "format": format_reward,
    "tag_count": tag_count_reward,
}


def find_reward(name):
    """Return the function for a name in REWARDS or "my_module:my_function". Errors inside the module propagate."""
    if name in REWARDS:
        return REWARDS[name]
    module_name, _, function_name = name.rpartition(":")
    if not module_name or not function_name:
        raise UserError(f"rewards: {name!r}: expected one of {', '.join(REWARDS)}, or my_module:my_function")
    file = os.path.abspath(os.path.expanduser(module_name)) if module_name.endswith(".py") else None
    if file:
        folder, module_name = os.path.split(file.removesuffix(".py"))
        if not os.path.isfile(file):
            raise UserError(f"rewards: {name!r}: there is no file {file}")
        if folder not in sys.path:
            sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):  # the module exists, but one of its imports does not
            raise
        raise UserError(f"rewards: {name!r}: there is no module {error.name}") from None
    if file and module.__file__ != file:
        raise UserError(f"rewards: {name!r}: {module.__file__} has the same name; rename the file")
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"rewards: {name!r}: {module_name} has no function {function_name}")
    if any(map(inspect.iscoroutinefunction, (function, function.__call__))):
        raise UserError(f"rewards: {name!r}: async functions are not supported")
    return function


# Ctrl-C; a scheduler or `kill`; a closed terminal; a scheduler's early notice
STOP_SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1
IN_CHILDREN = set()  # those that are handled in children of this process, once it has called `score`


def start_child():
    """In a process that a reward function forks: end on SIGTERM and with the run, even if that is killed.

    Ignore what a terminal sends to all processes, so that the step can finish. While Python forks, it loses signals for
    which it has a handler, so they are blocked meanwhile.
    """
    for number in IN_CHILDREN:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IN_CHILDREN)
    if IN_CHILDREN:
        threading.Thread(target=end_with, args=[os.getppid()], daemon=True).start()


def end_with(parent):
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


os.register_at_fork(
    before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, IN_CHILDREN),
    after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, IN_CHILDREN),
    after_in_child=start_child,
)


def score(weights, completions, items):
    """Score completions with the reward functions of the config.

    weights: {name: weight}; completions: B texts; items: B dataset items, one per completion
    Return B dicts: "reward" is the weighted sum, "reward/<name>" the unweighted value of each function;
    "accuracy/strict", "accuracy/lenient" and "accuracy/format" are always present. Values may be non-finite.
    """
    IN_CHILDREN.update(STOP_SIGNALS)
    columns = {key: [item[key] for item in items] for key in items[0] if key != "prompt"}
    columns |= {"prompts": [item["prompt"] for item in items], "completions": completions}
    scores = {
        "accuracy/strict": list(map(strict_correct, completions, columns["answer"])),
        "accuracy/lenient": list(map(lenient_correct, completions, columns["answer"])),
        "accuracy/format": format_reward(completions),
    }
    for name in weights:
        function = find_reward(name)
        try:
            inspect.signature(function).bind(**columns)
        except TypeError as error:
            raise UserError(f"rewards: {name}: {error}; the columns are {', '.join(columns)}") from None
        values = function(**copy.deepcopy(columns))  # functions may modify their arguments
        values = values.tolist() if hasattr(values, "tolist") else values  # NumPy and torch
        if not isinstance(values, (list, tuple)) or len(values) != len(completions):
            expected = f"expected a list of {len(completions)} numbers"
            raise UserError(f"rewards: {name} returned {str(values)[:100]}, {expected}")
        values = [value.item() if hasattr(value, "item") else 0.0 if value is None else value for value in values]
        for text, value in zip(completions, values, strict=True):
            if not isinstance(value, numbers.Real):
                raise UserError(f"rewards: {name} returned {value!r}, not a number, for {text[:80]!r}")
        scores[f"reward/{name}"] = values
    rows = [dict(zip(scores, map(float, row), strict=True)) for row in zip(*scores.values(), strict=True)]
    for row in rows:
        row["reward"] = sum(weight * row[f"reward/{name}"] for name, weight in weights.items())
    return rows
