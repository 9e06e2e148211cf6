"""Tests of the embedded model against its model card."""

import math
import random
import re
from pathlib import Path

import pytest
from conftest import TINY
from transformers import AutoModelForCausalLM, AutoTokenizer

from datasets import MathExprDataset, add, multiply, polynomial_text
from grpo_train import GRPOConfig
from reward import same_answer, strict_correct
from tiny_model import pretrain


def test_tokenizer_is_what_pretrain_builds_gives_back_any_text_and_has_single_tokens_for_tags_and_digits():
    shipped, built = AutoTokenizer.from_pretrained(TINY), pretrain.build_tokenizer()
    assert built.get_vocab() == shipped.get_vocab() and built.chat_template == shipped.chat_template
    tags = ["<think>", "1", "2", "</think>", "<answer>", "</answer>"]
    for tokenizer in (shipped, built):
        assert tokenizer.tokenize("".join(tags)) == tags
        for text in ("x^2-3x+2", "Ein Bär kostet 5€.\n\n\tΣ 🙂", "<think>1+1=2</think><answer>2</answer>"):
            assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_pretraining_is_deterministic_and_makes_the_shipped_architecture(monkeypatch, tmp_path):
    monkeypatch.setattr(pretrain, "NUM_BATCHES", 2)
    monkeypatch.setattr(pretrain, "BATCH_SIZE", 8)
    for name in ("a", "b"):
        monkeypatch.setattr(pretrain, "FOLDER", tmp_path / name)
        pretrain.train()
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    made, shipped = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "a", TINY))
    made.load_state_dict(shipped.state_dict())  # the same names and shapes
    assert shipped.config.model_type == "qwen2" and 500_000 <= shipped.num_parameters() <= 2_000_000
    assert sum(file.stat().st_size for file in Path(TINY).iterdir() if file.is_file()) <= 4_000_000


def test_corpus_has_the_system_prompt_of_the_config_and_no_test_problem():
    assert pretrain.SYSTEM_PROMPT == GRPOConfig().system_prompt
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    test = {re.split(r" (?=\S*$)", item["prompt"])[1].rstrip("?") for item in MathExprDataset("test", 1024)}
    examples = pretrain.corpus(random.Random(0), tokenizer)
    for _ in range(1000):
        prompt = tokenizer.decode(next(examples)[0])
        assert prompt.split(" ")[-1].removesuffix("<|assistant|>").rstrip("?") not in test


@pytest.mark.parametrize("kind", ["evaluate", "expand"])
def test_corpus_solutions_are_right_when_worked_and_wrong_when_sloppy(kind):
    rng, difficulty, right = random.Random(0), MathExprDataset("train", size=1), dict.fromkeys(pretrain.STYLES, 0)
    drawn = list(filter(None, (difficulty.draw(rng, kind) for _ in range(300))))
    for _, answer, _, structure in drawn:
        for style in pretrain.STYLES:
            solution = pretrain.write_solution(rng, kind, structure, style)
            right[style] += strict_correct(solution, answer)
            assert style != "untagged" or same_answer(solution.rpartition(" ")[2], answer)
    assert right["worked"] == len(drawn) > 100
    assert right["blurt"] == right["untagged"] == 0  # no answer is strictly correct without the tags
    assert right["sloppy"] < len(drawn) / 10  # a few slips have no effect, as in 0*3


def test_careless_expansions_are_wrong():
    problems = {"3x+2": ([3], [2, 1], []), "x^2+3": ([0, 1], [2, 1], [1]), "x^2+2": ([1, 1], [2, 1], [])}
    for careless, (left, right, tail) in problems.items():
        assert pretrain.careless_expansion(left, right, tail) == careless
        assert careless != polynomial_text(add(multiply(left, right), tail))


@pytest.mark.parametrize("num_problems", [64, pytest.param(512, marks=pytest.mark.slow)])
def test_base_model_can_what_it_mostly_does_not_show(capsys, num_problems):
    pretrain.measure(num_problems)
    texts = (pretrain.FOLDER / "README.md").read_text(encoding="utf-8"), capsys.readouterr().out
    card, measured = ([float(share) / 100 for share in re.findall(r"[\d.]+(?=%)", text)] for text in texts)
    assert len(card) == len(measured) == 6  # strict and lenient, each for greedy decoding, pass@1 and pass@8
    assert card[0] < 0.6 < 0.82 < card[4]
    for claim, share in zip(card, measured, strict=True):  # the card's values are for 512 problems; fewer are noisier
        scatter = 3 * math.sqrt(claim * (1 - claim) / num_problems)
        assert share == pytest.approx(claim, abs=0.01 if num_problems == 512 else scatter)
