"""Hostile input, by the thousand: completions, rewards, configs, JSONL files, journals, and what is shown of them.

HYPOTHESIS=10000 python -m pytest tests/test_hostile.py tries more than the test suite does.
"""

import json
import os
import re
import time
from fractions import Fraction
from html.parser import HTMLParser

import pytest
import yaml
from conftest import ROOT, SCRIPTS
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from datasets import JSONLDataset
from reward import (
    TAGS,
    UserError,
    accuracy_reward,
    format_reward,
    lenient_answer,
    lenient_correct,
    parse_value,
    strict_answer,
)
from runs import completion_table, read_journal
from utils import load_config

EXAMPLES = int(os.environ.get("HYPOTHESIS", 300))
settings.register_profile(
    "hostile",
    max_examples=EXAMPLES,
    derandomize=EXAMPLES == 300,  # the same in every run of the suite, others by hand
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("hostile")

# Completions

SPICE = [
    *TAGS,
    "<answer",
    "answer>",
    "</",
    "<think><think>",
    "7",
    "-7",
    "1,250",
    "3/4",
    "0.5",
    "x",
    "x^2",
    "**",
    "−",
    "$",
]
SPICE += [
    "%",
    "=",
    "(",
    ")",
    "\n",
    "\t",
    "\x00",
    "\x1b[31m",
    "\u202e",
    "\u200b",
    "\ufeff",
    "７",
    "٣",
    "²",
    "½",
    "∞",
    "nan",
]
SPICE += [
    "<script>alert(1)</script>",
    "__import__('os').system('true')",
    "9**9**9",
    "🧮",
    "e\u0301",
    "\ud7ff",
    "1e999",
    "\r\n",
]
completions = st.lists(st.one_of(st.sampled_from(SPICE), st.text(max_size=8)), max_size=30).map("".join)
anything = st.text()


@given(st.one_of(completions, anything), st.one_of(st.sampled_from(["7", "x^2-1", "word", "3/4"]), anything))
def test_any_completion_is_scored_zero_or_one_and_strict_is_never_kinder(text, reference):
    (accuracy,), (form,) = accuracy_reward([text], [reference]), format_reward([text])
    assert accuracy in (0.0, 1.0) and form in (0.0, 1.0) and accuracy <= form
    assert accuracy <= lenient_correct(text, reference)
    answer = strict_answer(text)
    assert (answer is None) == (form == 0.0)
    if answer is not None:
        assert f"<answer>{answer}" in re.sub(r"<answer>\s+", "<answer>", text)
        assert not any(tag in answer for tag in TAGS)


extra_tag = st.tuples(st.integers(0, 4), st.sampled_from(TAGS)).map(
    lambda extra: [*TAGS[: extra[0]], extra[1], *TAGS[extra[0] :]]
)


@given(st.permutations(TAGS) | extra_tag | st.lists(st.sampled_from(TAGS)), st.sampled_from(["", " ", "\n"]))
def test_tags_in_any_other_order_or_number_are_no_form(tags, filler):
    assert (strict_answer(filler.join(tags)) is None) == (list(tags) != list(TAGS))


@given(st.sampled_from(SPICE), st.sampled_from(SPICE), st.integers(1, 100_000))
@settings(max_examples=60)
def test_no_repetition_takes_longer_than_10_ms(a, b, count):
    text = (a + b) * count
    for completion in (text, f"<think>{text}</think><answer>{text[:300]}</answer>"):
        seconds = []
        for _ in range(5):  # the best of five: the machine may be busy, a slow parser is slow every time
            start = time.process_time()
            accuracy_reward([completion], ["7"]), format_reward([completion]), lenient_correct(completion, "7")
            seconds.append(time.process_time() - start)
        assert min(seconds) < 0.01, (a, b, count)


@given(st.fractions(max_denominator=10**6))
def test_every_number_is_read_exactly(number):
    assert parse_value(str(number)) == ({0: number} if number else {})
    assert parse_value(f" {number} ") == parse_value(str(number))
    if number.denominator == 1:
        assert parse_value(f"{int(number):,}") == parse_value(str(number)) == parse_value(f"{int(number)}.0")
        assert parse_value(f"${int(number)}" if number >= 0 else f"-${-int(number)}") == parse_value(str(number))
        text = f"<think>so {int(number):,}</think><answer>{int(number):,}</answer>"
        assert accuracy_reward([text], [str(number)]) == [1.0]
        assert accuracy_reward([text], [str(number + 1)]) == [0.0]


@given(st.decimals(allow_nan=False, allow_infinity=False, places=4, min_value=-(10**9), max_value=10**9))
def test_every_decimal_is_read_exactly(number):
    assert parse_value(f"{number:f}") == ({0: Fraction(number)} if number else {})


@given(st.dictionaries(st.integers(0, 9), st.integers(-99, 99).filter(bool), min_size=1))
def test_every_polynomial_is_read_exactly_in_any_order(coefficients):
    text = "+".join(f"{c}*x^{p}" for p, c in coefficients.items()).replace("+-", "-").replace("*x^0", "")
    assert parse_value(text) == coefficients
    assert parse_value(text.replace("^", "**").replace("*x", "x")) == coefficients


@given(st.text(alphabet="0123456789", min_size=1), st.sampled_from("０٠०"))
def test_digits_of_other_scripts_are_no_numbers(digits, zero):
    foreign = "".join(chr(ord(zero) + int(digit)) for digit in digits)
    assert parse_value(foreign) is None and lenient_answer(foreign) is None
    assert accuracy_reward([f"<think></think><answer>{foreign}</answer>"], [digits]) == [0.0]


@given(
    st.text(alphabet="0123456789", min_size=2, max_size=6), st.sampled_from("\u200b\u200d\u2060\ufeff\u202e\u00ad\x00")
)
def test_invisible_characters_do_not_make_another_number(digits, invisible):
    broken = digits[:1] + invisible + digits[1:]
    assert parse_value(broken) is None
    assert accuracy_reward([f"<think></think><answer>{broken}</answer>"], [digits]) == [0.0]


# What TensorBoard shows


class Table(HTMLParser):
    """The tags of a table, and its cells as they read. Characters that cannot be seen are left out."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.cells = set(), []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.add((tag, *attributes))
        self.cells += [""] * (tag in ("td", "th"))

    def handle_data(self, data):
        if self.cells:
            self.cells[-1] += visible(data)


def visible(text):
    return "".join(c for c in text if c.isprintable() and c not in " ?")  # TensorBoard shows "?" for control characters


@pytest.mark.filterwarnings("ignore:html5lib")
@pytest.mark.filterwarnings("ignore:html5lib")
@given(st.one_of(completions, anything, st.text(alphabet="<>&\"'`*_|\\[]()#-1.! \n\r\tab=/:;\x02\x03\u2028")))
@example("`a` [link](javascript:alert(1)) ![image](http://x/y.png) <b>*_|\\ &amp; \x02amp\x03 # 1. -\r\u2028")
@example("</td></table>\r\n\r\n<script>alert(1)</script>\n\n# heading")
def test_shown_text_has_no_markup_and_reads_as_it_was(text):
    from tensorboard.plugin_util import markdown_to_safe_html

    table = completion_table([{"prompt": text, "answer": text}], [text])
    for shown in (table, markdown_to_safe_html(table)):  # as written, and as TensorBoard serves it
        parsed = Table(shown)
        assert parsed.tags <= {(tag,) for tag in ("table", "tbody", "tr", "th", "td", "br")}
        assert parsed.cells[5:] == [visible(text)] * 3


# Configs

leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
values = st.recursive(
    leaves | st.dates() | st.datetimes() | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=9,
)


def assert_refused_in_one_line(script, text, path):
    """Or loaded: then every value has its type."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode(errors="surrogatepass"))
    try:
        config = load_config(script.config_class, path)
    except UserError as error:
        assert str(error).startswith(str(path)) and len(str(error).splitlines()) == 1 and len(str(error)) < 1000
        return
    json.dumps(config.model_dump())
    assert yaml.safe_load(yaml.safe_dump(config.dataset_args)) is not None


def defaults(script):
    return yaml.safe_load((ROOT / f"{script.name.removesuffix('_train')}_config.yml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", SCRIPTS)
@given(data=st.data())
def test_any_value_of_any_key_is_loaded_or_refused_in_one_line(tmp_path_factory, name, data):
    script = SCRIPTS[name]
    content = defaults(script)
    keys = data.draw(st.lists(st.sampled_from(sorted(content)), min_size=1, max_size=3))
    for key in keys:
        content[key] = data.draw(values)
    assert_refused_in_one_line(
        script, yaml.safe_dump(content, allow_unicode=True), tmp_path_factory.getbasetemp() / "c.yml"
    )


@given(st.binary(max_size=300) | st.text(max_size=300) | st.text(alphabet="a:[]{}&*!|>-?#%@`\"' \t\n1<,~", max_size=60))
def test_any_file_is_refused_in_one_line(tmp_path_factory, content):
    assert_refused_in_one_line(SCRIPTS["grpo"], content, tmp_path_factory.getbasetemp() / "c.yml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("seed:\t1\n\tx: 2\n", "found character '\\t' that cannot start any token"),
        (b"\x7fELF\x02\x01\x00\xff", "'utf-8' codec can't decode byte"),
        (b"\x00" * 100, "special characters are not allowed"),
        ("[" * 5_000, "recursion"),
        ("{" * 5_000, "recursion"),
        ("- " * 20_000, "recursion"),
        ("".join(f"k{i}: 1\n" for i in range(8_000)), "k0: 1: unknown key"),
        ("? [a, b]\n: 1\n", "unhashable key"),
        ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("!!python/name:os.system ''", "could not determine a constructor"),
        ("seed: 2026-99-99", "month must be in 1..12"),
        ("seed: " + "1" * 5_000, "Exceeds the limit"),
        ("seed: 1" + "0" * 400, "seed: 1000"),
        ("learning_rate: 1" + "0" * 400, "learning_rate: 1000"),
        ("--- 1\n--- 2\n", "expected a single document"),
    ],
    ids=lambda value: repr(value)[:20] if isinstance(value, (str, bytes)) else None,
)
def test_hostile_config_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "config.yml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    start = time.process_time()
    with pytest.raises(UserError) as error:
        load_config(SCRIPTS["es"].config_class, path)
    assert time.process_time() - start < 20
    assert message in str(error.value) and len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 1000


# JSONL files

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
rows = st.fixed_dictionaries({"prompt": json_values | st.text(min_size=1), "answer": json_values | st.text(min_size=1)})
rows |= st.dictionaries(st.sampled_from(["prompt", "answer", "level", "prompts"]), json_values)
good_line = b'{"prompt": "1+1", "answer": "2"}'
lines = st.one_of(
    rows.map(lambda row: json.dumps(row, ensure_ascii=True).encode()),
    rows.map(lambda row: json.dumps(row, ensure_ascii=False).encode(errors="surrogatepass")),
    st.binary(max_size=60),
    st.just(good_line),
)


@given(st.lists(lines, max_size=5), st.sampled_from([b"\n", b"\r\n", b"\n\n"]), st.sampled_from([b"", b"\xef\xbb\xbf"]))
def test_any_jsonl_file_is_read_as_text_or_its_bad_line_named(tmp_path_factory, some, end, mark):
    path = tmp_path_factory.getbasetemp() / "p.jsonl"
    path.write_bytes(mark + end.join([*some, *[good_line] * 10]))
    try:
        items = [*JSONLDataset(path, "train").items, *JSONLDataset(path, "test").items]
    except UserError as error:
        assert re.match(rf"{re.escape(str(path))}, line \d+: ", str(error)) and len(str(error)) < 1000, error
        assert "\n" not in str(error)
        return
    for item in items:
        assert all(isinstance(item[key], str) and item[key].strip() for key in ("prompt", "answer"))
        item["prompt"].encode(), item["answer"].encode()
        assert item.keys() == items[0].keys()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "\\ud800", "answer": "2"}', "surrogates not allowed"),
        (b'{"prompt": "a", "answer": "2", "x": ["\\udfff"]}', "surrogates not allowed"),
        (b'{"prompt": "a", "answer": 2}', '"answer" is 2, expected text'),
        (b'{"prompt": "a"}', '"answer" is None, expected text'),
        (b'{"prompt": "a", "answer": null}', '"answer" is None, expected text'),
        (b'{"prompt": "a", "answer": "2", "level": 3}', "keys ['answer', 'level', 'prompt'], but line 1 has"),
        (b'{"prompt": "a", "answer": "2"} trailing', "Extra data"),
        (b"[" * 1_000_000, "recursion"),
        (b'{"prompt": "a", "answer": ' + b"1" * 5_000 + b"}", "Exceeds the limit"),
        (b"\xff\xfe{", "'utf-8' codec can't decode byte"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_hostile_jsonl_line_is_named(tmp_path, line, message):
    path = tmp_path / "p.jsonl"
    path.write_bytes(good_line + b"\n" + line + b"\n")
    with pytest.raises(UserError) as error:
        JSONLDataset(path, "train")
    assert str(error.value).startswith(f"{path}, line 2: ") and message in str(error.value)
    assert len(str(error.value)) < 1000


def test_huge_line_is_read(tmp_path):
    path = tmp_path / "p.jsonl"
    long = json.dumps({"prompt": "1+" * 5_000_000 + "1", "answer": "5000001"}).encode()
    path.write_bytes(b"\n".join([long, *[good_line] * 10]))
    assert len(JSONLDataset(path, "train").items[0]["prompt"]) == 10_000_001


# Journals

journal_line = st.dictionaries(st.text(max_size=9), json_values).map(lambda state: json.dumps(state).encode() + b"\n")


@given(st.lists(st.binary(max_size=40) | journal_line | st.just(b"\n"), max_size=6))
def test_any_journal_is_read_up_to_its_last_whole_line_or_named(tmp_path_factory, some):
    path, content = tmp_path_factory.getbasetemp() / "journal.jsonl", b"".join(some)
    path.write_bytes(content)
    try:
        states = read_journal(path)
    except UserError as error:
        assert str(error) == f"resume: {path} is damaged"
        return
    whole = content[: content.rfind(b"\n") + 1]
    assert path.read_bytes() == whole and len(states) == whole.count(b"\n")
    assert json.dumps(read_journal(path)) == json.dumps(states)
