"""Answer extraction, exact values and reward functions."""

import time
from fractions import Fraction

import pytest

from reward import (
    UserError,
    accuracy_reward,
    find_reward,
    format_reward,
    lenient_answer,
    lenient_correct,
    parse_value,
    same_answer,
    score,
    strict_answer,
)


def tagged(answer, thought="so"):
    return f"<think>{thought}</think><answer>{answer}</answer>"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18", 18),
        ("-7", -7),
        ("−7", -7),  # U+2212
        ("+7", 7),
        ("18.0", 18),
        (".5", Fraction(1, 2)),
        ("0.1", Fraction(1, 10)),
        ("3/4", Fraction(3, 4)),
        ("-6/8", Fraction(-3, 4)),
        ("1,250", 1250),
        ("1,250,000.50", Fraction(2500001, 2)),
        ("$18", 18),
        ("-$1,250", -1250),
        ("75%", 75),
        (" 42 ", 42),
        ("0", 0),
    ],
)
def test_numbers_are_read_exactly(text, value):
    assert parse_value(text) == ({0: value} if value else {})


@pytest.mark.parametrize(
    "text",
    ["", " ", "-", "$", "%", "24 or 25", "24, 25", "1 2", "1,25", "1234,567", "12,34,567", "1.2.3", "3/0", "1/2/3"]
    + ["1\n2", "1\t2", "3, 100", "1, 250", "0,125", "14/2", "8/8", "0/5", "3%x", "$x", "1 .5", "3 / 4"]
    + ["--7", "+-7", "1e5", "nan", "inf", "seven", "7 apples", "7.", "٣", "７", "0x10", "1_000", "(7)", "3+4", "2*3"]
    + ["9**9**9", "x^-1", "x^1001", "2x+x", "(x+1)*(x-2)", "x(x-1)", "xx", "y", "2^3", "x/2", "9" * 201],
)
def test_what_is_no_plain_answer_is_none(text):
    assert parse_value(text) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("x", {1: 1}),
        ("-x", {1: -1}),
        ("x^2-3x+2", {2: 1, 1: -3, 0: 2}),
        ("x**2 - 3*x + 2", {2: 1, 1: -3, 0: 2}),
        ("2 - 3X + X^2", {2: 1, 1: -3, 0: 2}),
        ("3/4x", {1: Fraction(3, 4)}),
        ("0.5x^3", {3: Fraction(1, 2)}),
        ("0x+3", {0: 3}),
    ],
)
def test_polynomials_are_read_exactly(text, value):
    assert parse_value(text) == value


# The adversarial table: what other parsers let pass, in both directions.
EQUAL = [("2x-1", "-1+2x"), ("1,250", "1250"), ("18.0", "18"), ("$18", "18"), ("x**2-3x+2", "x^2-3x+2")]
UNEQUAL = [
    ("x**2-3x+2", "x**2+3x-2"),  # the same terms, other signs
    ("x^2-3x+2", "x^2-3x"),
    ("24 or 25", "24"),
    ("24 or 25", "25"),
    ("250", "1,250"),
    ("7", "-7"),
    ("-7", "7"),
    ("1", "18"),
    ("118", "18"),
    ("180", "18"),
    ("3", "3/4"),
    ("0.75", "75%"),
    ("0.33", "1/3"),
    ("0.3333333333333333", "1/3"),
    ("18 eggs", "18"),
    ("10000000000000001", "10000000000000000"),  # equal as floats
    ("", "0"),
]


@pytest.mark.parametrize(("answer", "reference"), EQUAL)
def test_equal_answers_score_one(answer, reference):
    assert accuracy_reward([tagged(answer)], [reference]) == [1.0]
    assert same_answer(reference, answer)


@pytest.mark.parametrize(("answer", "reference"), UNEQUAL)
def test_unequal_answers_score_zero(answer, reference):
    assert accuracy_reward([tagged(answer)], [reference]) == [0.0]


def test_reference_that_is_a_word_is_compared_as_text():
    assert accuracy_reward([tagged(" Paris "), tagged("paris"), "Paris"], ["Paris"] * 3) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "text",
    [
        "7",
        "<answer>7</answer>",
        "<think>a</think>7",
        "<think>a</think><answer>7",
        "<think>a</think><answer>7</answer><answer>7</answer>",
        "<think>a</think><answer>8</answer><answer>7</answer>",
        "<think>a</think>so<answer>7</answer>",
        "so<think>a</think><answer>7</answer>",
        "<think>a</think><answer>7</answer>.",
        "<answer>7</answer><think>a</think>",
        "<think><answer>7</answer></think>",
        "<think>a<think>b</think></think><answer>7</answer>",
        "<think>a<think>b</think><answer>7</answer>",
        "<think>a</think><answer><answer>7</answer>",
        "<think>a</think><answer>7</answer></answer>",
        "<THINK>a</THINK><ANSWER>7</ANSWER>",
        "</think><think><answer>7</answer>",
    ],
)
def test_any_other_form_has_no_strict_answer(text):
    assert strict_answer(text) is None
    assert accuracy_reward([text], ["7"]) == format_reward([text]) == [0.0]


def test_white_space_around_the_blocks_is_allowed():
    text = " <think>\na\n</think>\n<answer>\n7\n</answer>\n"
    assert strict_answer(text) == "7"
    assert accuracy_reward([text], ["7"]) == format_reward([text]) == [1.0]
    assert format_reward([tagged("nonsense")]) == [1.0]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is 12.", "12"),
        ("3+4=7", "7"),
        ("so 4*(-3)=-12", "-12"),
        ("2-5", "5"),
        ("about 1,250 eggs", "1,250"),
        ("it costs $18.50!", "$18.50"),
        ("75%", "75%"),
        ("3/4 of it", "3/4"),
        ("Answer: x^2-2x+1", "x^2-2x+1"),
        ("next exit", None),
        ("none", None),
        ("", None),
        (tagged("-9", "1-10=-9"), "-9"),
        ("9" * 5000 + " apples", None),
    ],
)
def test_lenient_answer_is_the_last_value_of_the_text(text, answer):
    assert lenient_answer(text) == answer


def test_lenient_is_never_stricter_than_strict():
    for answer in ("7", "x^2-1", "3/4", "Paris"):
        assert lenient_correct(tagged(answer), answer)


HOSTILE = {
    "power tower": "9**9**9",
    "brackets": "(" * 1_000_000,
    "nested": "(" * 500_000 + ")" * 500_000,
    "digits": "1" * 10_000_000,
    "signs": "-" * 1_000_000,
    "spaces": "1 " * 500_000,
    "commas": "1," * 500_000,
    "points": "1." * 500_000,
    "slashes": "1/" * 500_000,
    "powers": "x^" * 500_000,
    "terms": "+x" * 500_000,
    "tags": "<answer>" * 100_000,
    "code": "__import__('os').system('true')",
    "minus signs": "−**X" * 250_000,
    "controls": "\x00\x1b[31m7\u202e\u200b",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_scores_zero_in_under_10_ms(name):
    text = HOSTILE[name]
    for completion in (text, tagged(text), f"<think>{text}</think><answer>{text[:200]}</answer>"):
        seconds = []
        for _ in range(3):  # the best of three: the machine may be busy, a slow parser is slow every time
            start = time.perf_counter()
            assert accuracy_reward([completion], ["7"]) == [0.0]
            assert format_reward([completion]) in ([0.0], [1.0])
            lenient_correct(completion, "7")
            seconds.append(time.perf_counter() - start)
        assert min(seconds) < 0.01


def test_score_weighs_components_and_reports_them_unweighted():
    items = [{"prompt": "p", "answer": "7"}] * 3
    rows = score({"accuracy": 1.0, "format": 0.1}, [tagged("7"), tagged("8"), "7"], items)
    assert [row["reward"] for row in rows] == pytest.approx([1.1, 0.1, 0.0])
    assert [row["reward/accuracy"] for row in rows] == [1.0, 0.0, 0.0]
    assert [row["reward/format"] for row in rows] == [1.0, 1.0, 0.0]
    assert [row["accuracy/lenient"] for row in rows] == [1.0, 0.0, 1.0]


def test_users_function_gets_every_column_and_is_named_by_module(monkeypatch, tmp_path):
    (tmp_path / "my_rewards.py").write_text(
        "def graded(completions, answer, level, **columns):\n"
        "    assert columns.keys() == {'prompts'} and columns['prompts'] == ['p', 'q']\n"
        "    return [float(a) * l for a, l in zip(answer, level)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    items = [{"prompt": "p", "answer": "2", "level": 3}, {"prompt": "q", "answer": "5", "level": 7}]
    rows = score({"my_rewards:graded": 2.0}, ["a", "b"], items)
    assert [row["reward"] for row in rows] == [12.0, 70.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("acuracy", "rewards: 'acuracy': expected one of accuracy, format, or my_module:my_function"),
        ("no_such_module:f", "there is no module no_such_module on the path"),
        ("no_such_package.module:f", "there is no module no_such_package on the path"),
        (":f", "rewards: ':f': expected one of"),
        ("reward:", "rewards: 'reward:': expected one of"),
        ("reward:no_such_function", "reward has no function no_such_function"),
        ("reward:TAGS", "reward has no function TAGS"),
    ],
)
def test_unknown_reward_is_named(name, message):
    with pytest.raises(UserError, match=message):
        find_reward(name)


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        ("raise KeyError('answers')", KeyError, "answers"),
        ("return [1j] * len(completions)", UserError, "rewards: bad_rewards:f returned 1j, no number, for 'some text'"),
        ("return [1.0]", UserError, r"rewards: bad_rewards:f returned \[1.0\], expected a list of 2 numbers"),
        ("return None", UserError, "rewards: bad_rewards:f returned None, expected a list of 2 numbers"),
        ("return ['1', '2']", UserError, "rewards: bad_rewards:f returned '1', no number"),
    ],
)
def test_bug_in_a_reward_function_stops_and_is_named(monkeypatch, tmp_path, body, error, message):
    (tmp_path / "bad_rewards.py").write_text(f"def f(completions, **columns):\n    {body}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "bad_rewards", raising=False)
    items = [{"prompt": "p", "answer": "7"}] * 2
    with pytest.raises(error, match=message):
        score({"bad_rewards:f": 1.0}, ["some text", "other"], items)
