"""Tests of answer extraction, exact values and reward functions, with ordinary, adversarial and hostile completions."""

import itertools
import re
import sys
import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward import (
    TAGS,
    UserError,
    accuracy_reward,
    find_reward,
    format_reward,
    lenient_accuracy_reward,
    lenient_answer,
    lenient_correct,
    parse_value,
    same_answer,
    score,
    strict_answer,
    strict_correct,
    tag_count_reward,
)


def tagged(answer, thought="so"):
    return f"<think>{thought}</think><answer>{answer}</answer>"


# Values

NUMBERS = {"18": 18, "-7": -7, "−7": -7, "+7": 7, "18.0": 18, ".5": Fraction(1, 2), "0.1": Fraction(1, 10), "0": 0}
NUMBERS |= {"1,250": 1250, "1,250,000.50": Fraction(2500001, 2), "$18": 18, "-$1,250": -1250, "75%": 75, " 42 ": 42}
NUMBERS |= {"3/4": Fraction(3, 4), "-6/8": Fraction(-3, 4)}
POLYNOMIALS = {"x": {1: 1}, "-x": {1: -1}, "0x+3": {0: 3}, "3/4x": {1: Fraction(3, 4)}, "0.5x^3": {3: Fraction(1, 2)}}
POLYNOMIALS |= dict.fromkeys(["x^2-3x+2", "x**2 - 3*x + 2", "2 - 3X + X^2"], {2: 1, 1: -3, 0: 2})
VALUES = {text: {0: value} if value else {} for text, value in NUMBERS.items()} | POLYNOMIALS


@pytest.mark.parametrize("text", VALUES)
def test_numbers_and_polynomials_are_read_exactly(text):
    assert parse_value(text) == VALUES[text]


@given(
    number=st.fractions(max_denominator=10**6),
    decimal=st.decimals(allow_nan=False, allow_infinity=False, places=4, min_value=-(10**9), max_value=10**9),
    coefficients=st.dictionaries(st.integers(0, 9), st.integers(-99, 99).filter(bool), min_size=1),
)
def test_any_number_is_read_exactly_and_any_polynomial_in_any_order(number, decimal, coefficients):
    value = {0: number} if number else {}
    assert parse_value(str(number)) == parse_value(f" {number} ") == value
    if number.denominator == 1:
        integer = int(number)
        dollars = f"${integer}" if integer >= 0 else f"-${-integer}"
        assert all(parse_value(text) == value for text in (f"{integer:,}", f"{integer}.0", dollars))
        assert accuracy_reward([tagged(f"{integer:,}")] * 2, [str(integer), str(integer + 1)]) == [1.0, 0.0]
    assert parse_value(f"{decimal:f}") == ({0: Fraction(decimal)} if decimal else {})
    text = "+".join(f"{c}*x^{p}" for p, c in coefficients.items()).replace("+-", "-").replace("*x^0", "")
    assert parse_value(text) == parse_value(text.replace("^", "**").replace("*x", "x")) == coefficients


NO_VALUES = "|-|$|%|--7|+-7|e5|nan|inf|seven|7..|0x10|1_000|(7)(7)|3+4|2*3|9**9**9|x^-1|x^1001|2x+x|(x+1)*(x-2)|xx|y"
NO_VALUES += "| |2^3|x/2|1,25|1234,567|12,34,567|1.2.3|3/0|1/2/3|0,125|14/2|8/8|0/5|3%x|$x|24 or 25|24, 25|1 2|3, 100"
NO_VALUES += "|1, 250|1 .5|x(x-1)|3 / 4|7 apples|1\n2|1\t2|" + "9" * 201
NO_VALUES += "|٣|７|०|1.٣|1/٣|x^٣|٣x|1,٣٣٣"  # digits in other scripts
INVISIBLE = [f"1{character}2" for character in "\u200b\u200d\u2060\ufeff\u202e\u00ad\x00"]  # none of these is 12


@pytest.mark.parametrize("text", [*NO_VALUES.split("|"), *INVISIBLE])
def test_text_that_is_no_plain_answer_has_no_value(text):
    assert parse_value(text) is None


# Adversarial answers that other parsers get wrong, in both directions.
EQUAL = [("2x-1", "-1+2x"), ("1,250", "1250"), ("18.0", "18"), ("$18", "18"), ("x**2-3x+2", "x^2-3x+2")]
UNEQUAL = [("x**2-3x+2", "x**2+3x-2"), ("x^2-3x+2", "x^2-3x"), ("7", "-7"), ("-7", "7")]  # signs and terms
UNEQUAL += [("24 or 25", "24"), ("24 or 25", "25"), ("18 eggs", "18"), ("", "0")]
UNEQUAL += [("250", "1,250"), ("1", "18"), ("118", "18"), ("180", "18"), ("3", "3/4")]  # substrings
UNEQUAL += [("0.75", "75%"), ("0.3333333333333333", "1/3"), ("10000000000000001", "10000000000000000")]  # floats
UNEQUAL += [("٣", "3"), ("1\u200b2", "12"), ("\x00\x1b[31m7\u202e\u200b", "7")]


@pytest.mark.parametrize(("answer", "reference"), EQUAL + UNEQUAL)
def test_adversarial_answers_score_one_only_if_exactly_equal(answer, reference):
    is_equal = (answer, reference) in EQUAL
    assert accuracy_reward([tagged(answer)], [reference]) == [float(is_equal)]
    assert same_answer(reference, answer) == is_equal


WORDS = [  # reference, the same answers, others
    (
        "B",
        r"B|b|(B)|**B**|B.|B)|\text{B}|$\text{(B)}$|\boxed{\textbf{B}}|**(B)**.|\(B\)|'B'",
        "C|BB|AB|A, B|B or C|not B||42|B++",
    ),
    ("(C)", "C|(c)", "C#|C++|D"),
    ("A", "A|(A)", "dog|B"),
    ("yes", "yes|Yes|YES.|**yes**", "no|yes and no|not yes|yesterday"),
    ("New York", r"new york|New  York.|\text{New York}", "York|New York City"),
    ("Mr. Smith", "Mr. Smith|mr. Smith.", "Mr. Smithson|Smith"),
]


@pytest.mark.parametrize(("reference", "same", "others"), WORDS)
def test_word_or_choice_is_found_in_any_typesetting_and_in_a_sentence(reference, same, others):
    for text in same.split("|"):
        assert accuracy_reward([tagged(text), text], [reference] * 2) == [1.0, 0.0], text
        assert lenient_correct(f"I think.\n\n{text}\n", reference) and lenient_correct(rf"\boxed{{{text}}}", reference)
        assert lenient_correct(f"So the answer is {text}, as shown.", reference), text
        assert lenient_correct(f"**Final Answer**: option {text}, and here is why.", reference), text
        assert lenient_correct(f"**Answer:**\n{text}\nOr is it C?", reference)
    for text in others.split("|"):
        assert not strict_correct(tagged(text), reference), text
        if not text.startswith(reference + " C"):
            assert not lenient_correct(f"So the answer is {text}.", reference), text
            assert not lenient_correct(f"{reference}?\n{text}", reference), text


def test_a_letter_that_is_also_a_word_counts_as_a_choice_only_in_its_own_case():
    assert not lenient_correct("The answer is a dog.", "A") and not lenient_correct("The answer is i think 3.", "I")


# Format


@pytest.mark.parametrize("filler", ["", " ", "\n"])
def test_tags_in_any_other_order_or_number_are_no_form(filler):
    for count in range(6):
        for tags in itertools.product(TAGS, repeat=count):
            assert (strict_answer(filler.join(tags)) is None) == (tags != TAGS), tags


OTHER_FORMS = ["7", "<think>a</think>7", "<think>a</think>so<answer>7</answer>", f"so{tagged(7)}", f"{tagged(7)}."]


@pytest.mark.parametrize("text", [*OTHER_FORMS, "<answer>7</answer>", tagged(7).removesuffix(">"), tagged(7).upper()])
def test_any_other_form_has_no_strict_answer(text):
    assert strict_answer(text) is None
    assert accuracy_reward([text], ["7"]) == format_reward([text]) == [0.0]


def test_white_space_around_the_blocks_is_allowed():
    text = " <think>\na\n</think>\n<answer>\n7\n</answer>\n"
    assert strict_answer(text) == "7"
    assert accuracy_reward([text], ["7"]) == format_reward([text]) == [1.0]
    assert format_reward([tagged("nonsense")]) == [1.0]


LENIENT = {"The answer is 12.": "12", "3+4=7": "7", "so 4*(-3)=-12": "-12", "2-5": None, "about 1,250 eggs": "1,250"}
LENIENT |= {"it costs $18.50!": "$18.50", "75%": "75%", "3/4 of it": "3/4", "Answer: x^2-2x+1": "x^2-2x+1"}
LENIENT |= {"next exit": None, "none": None, "": None, "9" * 5000 + " apples": None, "٣ or ７": None}
LENIENT |= {tagged("-9", "1-10=-9"): "-9"}


@pytest.mark.parametrize("text", LENIENT)
def test_lenient_answer_is_the_last_value_of_the_text(text):
    assert lenient_answer(text) == LENIENT[text]


# Hostile completions


def assert_scored_in_10_ms(text, reference):
    for completion in (text, tagged(text), f"<think>{text}</think><answer>{text[:200]}</answer>"):
        seconds = []
        for _ in range(3):  # best of three: a busy machine may be slow once, a slow parser is slow every time
            start = time.process_time()
            assert accuracy_reward([completion], [reference]) == [0.0]
            assert format_reward([completion]) in ([0.0], [1.0])
            lenient_correct(completion, reference)
            seconds.append(time.process_time() - start)
        assert min(seconds) < 0.01


REPEATED = [" ", "\n ", "\\frac", "\\sqrt{", "(", "1", "-", "1 ", "1,", "1.", "1/", "x^", "+x", "−**X"]
HOSTILE = {f"{text} repeated": text * (400_000 // len(text)) for text in REPEATED}
HOSTILE |= {text: text for text in ("9**9**9", "__import__('os').system('true')")}
HOSTILE |= {"nested": "(" * 200_000 + ")" * 200_000, "tags": "<answer>" * 100_000, "long": "1" * 10_000_000}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_never_executed_and_scores_zero_in_under_10_ms(name):
    assert_scored_in_10_ms(HOSTILE[name], "7")


SPICE = [*TAGS, *"<answer answer> </ <think><think> 7 -7 1,250 3/4 0.5 x x^2 ** − $ % = ( ) ７ ٣ ² ½ ∞ 🧮 nan".split()]
SPICE += [*"1e999 9**9**9 __import__('os').system('true') <script>alert(1)</script>".split(), "e\u0301", "\ud7ff"]
SPICE += ["\n", "\r\n", "\t", "\x00", "\x1b[31m", "\u202e", "\u200b", "\ufeff"]
spicy_text = st.lists(st.sampled_from(SPICE) | st.text(max_size=8), max_size=30).map("".join)


@given(spicy_text | st.text(), st.sampled_from(["7", "x^2-1", "word", "3/4"]) | st.text())
def test_any_completion_is_scored_zero_or_one_and_strict_is_never_kinder(text, reference):
    (accuracy,), (form,) = accuracy_reward([text], [reference]), format_reward([text])
    assert accuracy in (0.0, 1.0) and form in (0.0, 1.0)
    assert accuracy <= form and accuracy <= lenient_correct(text, reference)
    answer = strict_answer(text)
    assert (answer is None) == (form == 0.0)
    if answer is not None:
        assert f"<answer>{answer}" in re.sub(r"<answer>\s+", "<answer>", text)
        assert not any(tag in answer for tag in TAGS)


@given(st.sampled_from(SPICE), st.sampled_from(SPICE), st.integers(1, 20_000))
def test_any_repetition_is_scored_in_under_10_ms(a, b, count):
    assert_scored_in_10_ms((a + b) * count, "7.5")


# Reward functions


def test_score_weighs_components_and_reports_them_unweighted():
    items = [{"prompt": "p", "answer": "7"}] * 3
    rows = score({"accuracy": 1.0, "format": 0.1}, [tagged("7"), tagged("8"), "7"], items)
    assert [row["reward"] for row in rows] == pytest.approx([1.1, 0.1, 0.0])
    assert [row["reward/accuracy"] for row in rows] == [1.0, 0.0, 0.0]
    assert [row["reward/format"] for row in rows] == [1.0, 1.0, 0.0]
    assert [row["accuracy/lenient"] for row in rows] == [1.0, 0.0, 1.0]


@pytest.fixture
def write_reward(monkeypatch, tmp_path):
    """Return a function that writes the module my_rewards."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    return (tmp_path / "my_rewards.py").write_text


def test_users_function_gets_every_column_and_is_named_by_module(write_reward):
    write_reward(
        "def graded(completions, answer, level, **columns):\n"
        "    assert columns.keys() == {'prompts'} and columns['prompts'] == ['p', 'q']\n"
        "    return [float(a) * l for a, l in zip(answer, level)]\n"
    )
    items = [{"prompt": "p", "answer": "2", "level": 3}, {"prompt": "q", "answer": "5", "level": 7}]
    rows = score({"my_rewards:graded": 2.0}, ["a", "b"], items)
    assert [row["reward"] for row in rows] == [12.0, 70.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("acuracy", "rewards: 'acuracy': expected one of accuracy, lenient_accuracy, format, tag_count, or my_module"),
        ("no_such_module:f", "there is no module no_such_module"),
        ("no_such_package.module:f", "there is no module no_such_package"),
        ("reward:", "rewards: 'reward:': expected one of"),
        ("reward:no_such_function", "reward has no function no_such_function"),
        ("reward:TAGS", "reward has no function TAGS"),
        ("folder/reward.py:f", "there is no file .*/folder/reward.py"),
    ],
)
def test_unknown_reward_is_named(name, message):
    with pytest.raises(UserError, match=message):
        find_reward(name)


def test_a_file_of_reward_functions_is_that_file_and_no_other_of_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path.copy())
    (tmp_path / "reward.py").write_text("def f(completions, **columns):\n    return [0.0] * len(completions)")
    (tmp_path / "own_rewards.py").write_text("def f(completions, **columns):\n    return [3.0] * len(completions)")
    with pytest.raises(UserError, match="/reward.py has the same name; rename the file"):
        find_reward(f"{tmp_path}/reward.py:f")
    before = sys.path.copy()
    assert find_reward(f"{tmp_path}/own_rewards.py:f") is find_reward(f"{tmp_path}/own_rewards.py:f")
    assert sys.path == before


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        ("raise KeyError('answers')", KeyError, "answers"),
        ("return [1j] * len(completions)", UserError, "rewards: my_rewards:f returned 1j, not a number, for '"),
        ("return [1.0]", UserError, r"rewards: my_rewards:f returned \[1.0\], expected a list of 2 numbers"),
        ("return ['1', '2']", UserError, "rewards: my_rewards:f returned '1', not a number"),
        ("...\nimport no_such_module", ModuleNotFoundError, "no_such_module"),
    ],
)
def test_bug_in_a_reward_function_stops_and_is_named(write_reward, body, error, message):
    write_reward(f"def f(completions, **columns):\n    {body}\n")
    with pytest.raises(error, match=message):
        score({"my_rewards:f": 1.0}, ["some text", "other"], [{"prompt": "p", "answer": "7"}] * 2)


# Answers as people write them: (completion's answer, reference, is correct)
TYPESET = [
    *[
        (text, "42", True)
        for text in ("42.", "**42**", r"\boxed{42}", "$42$", r"$\boxed{42}$.", r"\(42\)", "`42`", "(42)")
    ],
    *[(text, "-5", True) for text in ("(-5)", "x = -5", "−5", r"\boxed{-5}", "$x = -5$")],
    *[(text, "1500", True) for text in ("1.5e3", "1,500", r"1{,}500", r"1.5 \times 10^3", "$1,500", "1500%")],
    *[(text, "1/2", True) for text in (r"\frac{1}{2}", r"\dfrac12", "0.5", ".5", "5e-1")],
    *[(text, "1 1/4", True) for text in ("1 1/4", "1.25", r"1\frac{1}{4}", "5/4")],
    *[(text, "x^2-1", True) for text in ("x^{2} - 1", "f = x^2-1", "(x^2-1)")],
    *[("24 or 25", reference, False) for reference in ("24", "25")],
    *[(r"\boxed{1} \boxed{2}", "1", False), ("3+4", "7", False), ("x = y = 5", "5", False), ("42$", "42", False)],
    *[("(x+1)(x-1)", "x^2-1", False), ("2 5/3", "11/3", False), ("25 cm", "25", False), ("", "0", False)],
]


@pytest.mark.parametrize(("text", "reference", "right"), TYPESET)
def test_strict_answer_is_one_value_however_it_is_typeset(text, reference, right):
    assert strict_correct(tagged(text), reference) == right


@pytest.mark.parametrize(
    "reference", ["5", r"\boxed{5}", "5.", "5e0", r"\frac{15}{3} \#\#\#\#", "It is 5\n#### 5", "10/2"]
)
def test_reference_is_read_as_an_answer_is(reference):
    is_value = reference not in (r"\frac{15}{3} \#\#\#\#", "10/2")  # unevaluated expressions: compared as text
    assert strict_correct(tagged("5"), reference) == is_value


FINAL = [
    *[("7 tries: #### 42\nI checked 3 times.", "42", True), ("#### 42. It is even, as 7 is not.", "42", True)],
    *[("<answer>42</answer> in 10 steps", "42", True), ("<answer>25 cm</answer>", "25", True)],
    *[(r"so \boxed{5}, not 7", "5", True), ("The answer is 42 because 6*7=42 and 3.", "42", True)],
    *[("**Answer:** 42, as above", "42", True), ("2 2/3", "8/3", True), ("2 2/3", "2/3", False)],
    *[("The area is 25 cm^2.", "25", True), ("1.5e3", "1500", True), (".75", "3/4", True), ("- 42", "42", True)],
    *[("3 × 4", "4", False), ("The answer is 3 × 4 = 12.", "12", True), ("The answer is x = 5.", "5", True)],
    *[("1. First 3.\n2. Then 7", "7", True), ("10 - 5", "5", False), ("10-5 = 5", "5", True), ("14/2", "7", False)],
    *[("3 x 4", "4", False), ("12, 13, 14", "14", True), ("24 or 25", "24", False), ("Answer: 24 or 25", "24", False)],
    *[("<answer>24 or 25</answer>", "25", False), (r"so \frac{3}{4}.", "0.75", True), ("it is -7", "7", False)],
    *[
        ("it is 1,250", "250", False),
        (r"\boxed{42", "4", False),
        ("so x^2 - 3x + 2.", "x^2-3x+2", True),
        ("İ #### 42, not 7.", "42", True),
        *[(f"{marker}\n42. I added 40 and 2.", "42", True) for marker in ("Answer:", "####", "The answer is")],
        *[(rf"so \boxed{{60{unit}}}", "60", True) for unit in (r" \frac{km}{h}", r"\ \frac{m}{s^2}", "√")],
        *[
            (rf"\boxed{{{two}}}", "1", False)
            for two in ("1, 2+3", r"1, \sqrt{2}", "x=1, x=-√2", r"1 or 3\pi", "1 or √3")
        ],
        *[("Answer: 1 or √3", "1", False), (r"\frac123", "1/23", False), (r"\boxed{10-5 = 5}", "5", True)],
    ],
    *[(f"{marker} - 5", "-5", True) for marker in ("The answer is", "####")],  # a minus sign, not a bullet
    *[("The answer is:\n- 5", "5", True), ("The answer is 42, 6*7.", "42", True), ("1/2, 3/4", "3/4", True)],
    ("İ #### 42, not 7.", "42", True),
    *[(f"{marker}\n42. I added 40 and 2.", "42", True) for marker in ("Answer:", "####", "The answer is")],
    *[(rf"so \boxed{{60{unit}}}", "60", True) for unit in (r" \frac{km}{h}", r"\ \frac{m}{s^2}", "√")],
    *[(rf"\boxed{{{two}}}", "1", False) for two in ("1, 2+3", r"1, \sqrt{2}", "x=1, x=-√2", r"1 or 3\pi", "1 or √3")],
    *[("Answer: 1 or √3", "1", False), (r"\frac123", "1/23", False), (r"\boxed{10-5 = 5}", "5", True)],
    *[(rf"\boxed{{{root}}}", "2", False) for root in (r"\sqrt{2}", r"2\sqrt3", "√2", r"2\pi", r"\frac{\sqrt{3}}{2}")],
]


@pytest.mark.parametrize(("text", "reference", "right"), FINAL)
def test_lenient_answer_is_what_a_person_would_read_as_final(text, reference, right):
    assert lenient_correct(text, reference) == right


def test_tag_count_gives_partial_credit_and_lenient_accuracy_needs_no_format():
    texts = [tagged("7"), "<think>7</think>", "<answer>7<answer>", "it is 7", ""]
    assert tag_count_reward(texts) == [1.0, 0.5, 0.0, 0.0, 0.0]
    assert lenient_accuracy_reward(texts, ["7"] * 5) == [1.0, 1.0, 0.0, 1.0, 0.0]


def test_values_of_numpy_torch_and_none_are_read_and_no_function_changes_what_others_see(monkeypatch, tmp_path):
    (tmp_path / "kinds.py").write_text(
        "import numpy, torch\n"
        "def array(completions, **columns):\n"
        "    completions[:] = ['spoiled'] * 2\n"
        "    columns['answer'].clear()\n"
        "    return numpy.array([1.0, 2.0])\n"
        "def tensor(completions, answer, **columns):\n"
        "    assert completions == ['a', 'b'] and answer == ['7', '7']\n"
        "    return torch.tensor([3.0, 4.0])\n"
        "def mixed(**columns):\n"
        "    return [None, numpy.float32(5)]\n"
        "async def later(**columns):\n"
        "    return []\n"
        "class Later:\n"
        "    async def __call__(self, **columns):\n"
        "        return []\n"
        "judge = Later()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    items = [{"prompt": "p", "answer": "7"}] * 2
    rows = score({"kinds:array": 1.0, "kinds:tensor": 10.0, "kinds:mixed": 100.0}, ["a", "b"], items)
    assert [row["reward"] for row in rows] == [31.0, 542.0]
    for name in ("kinds:later", "kinds:judge"):
        with pytest.raises(UserError, match=f"rewards: '{name}': async functions are not supported"):
            find_reward(name)
