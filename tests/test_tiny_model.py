"""The embedded model is what its card says."""

import importlib.util
import random
import re

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from datasets import MathExprDataset, add, multiply, polynomial_text
from generation import DecodeSettings, generate
from grpo_train import GRPOConfig
from reward import same_answer, strict_correct
from utils import completion_texts, encode_prompts, load_model, load_tokenizer, stop_ids

TINY = ROOT / "tiny_model"


@pytest.fixture(scope="module")
def pretrain():
    spec = importlib.util.spec_from_file_location("pretrain", TINY / "pretrain.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_is_a_small_qwen2_that_the_usual_classes_load():
    model = AutoModelForCausalLM.from_pretrained(TINY)
    assert model.config.model_type == "qwen2"
    assert 500_000 <= model.num_parameters() <= 2_000_000
    size = sum(file.stat().st_size for file in TINY.iterdir() if file.is_file())
    assert size <= 4_000_000


@pytest.mark.parametrize("text", ["x^2-3x+2", "Ein Bär kostet 5€.\n\n\tΣ 🙂", "<think>1+1=2</think><answer>2</answer>"])
def test_tokenizer_gives_back_any_text(text):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_tags_and_digits_are_single_tokens_and_tags_survive_decoding():
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    assert tokenizer.tokenize("<think>12</think>") == ["<think>", "1", "2", "</think>"]
    ids = tokenizer("<think></think><answer></answer>").input_ids
    assert len(ids) == 4
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think></think><answer></answer>"


def test_tokenizer_is_the_one_that_pretrain_builds(pretrain):
    built, shipped = pretrain.build_tokenizer(), AutoTokenizer.from_pretrained(TINY)
    assert built.get_vocab() == shipped.get_vocab()
    assert built.chat_template == shipped.chat_template


def test_pretraining_is_deterministic(pretrain, monkeypatch, tmp_path):
    monkeypatch.setattr(pretrain, "NUM_BATCHES", 2)
    monkeypatch.setattr(pretrain, "BATCH_SIZE", 8)
    threads, weights = torch.get_num_threads(), []
    for name in ("a", "b"):
        monkeypatch.setattr(pretrain, "FOLDER", tmp_path / name)
        pretrain.train()
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    torch.set_num_threads(threads)
    assert weights[0] == weights[1]
    made, shipped = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "a", TINY))
    assert {n: p.shape for n, p in made.named_parameters()} == {n: p.shape for n, p in shipped.named_parameters()}


def test_base_model_was_trained_on_the_system_prompt_of_the_config(pretrain):
    assert pretrain.SYSTEM_PROMPT == GRPOConfig().system_prompt


def test_corpus_solutions_are_right_when_worked_and_wrong_when_sloppy(pretrain):
    rng = random.Random(0)
    difficulty = MathExprDataset("train", size=1)
    for kind in ("evaluate", "expand"):
        right = dict.fromkeys(pretrain.STYLES, 0)
        for _ in range(300):
            text = None
            while text is None:
                text, answer, structure = difficulty.draw(rng, kind)
            for style in pretrain.STYLES:
                solution = pretrain.write_solution(rng, kind, structure, style)
                right[style] += strict_correct(solution, answer)
                if style == "untagged":
                    assert same_answer(solution.rpartition(" ")[2], answer)
        assert right["worked"] == 300
        assert right["blurt"] == right["untagged"] == 0  # without both tags nothing is strictly right
        assert right["sloppy"] < 30  # a slip now and then cancels out, as in 0*3


def test_corpus_holds_no_test_problem(pretrain):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    test = {re.split(r" (?=\S*$)", item["prompt"])[1].rstrip("?") for item in MathExprDataset("test", 1024)}
    examples = pretrain.corpus(random.Random(0), tokenizer)
    for _ in range(3000):
        prompt = tokenizer.decode(next(examples)[0])
        assert prompt.split(" ")[-1].removesuffix("<|assistant|>").rstrip("?") not in test


def test_careless_expansions(pretrain):
    for (left, right, tail), careless in {
        ((3,), (2, 1), ()): "3x+2",
        ((0, 1), (2, 1), (1,)): "x^2+3",
        ((1, 1), (2, 1), ()): "x^2+2",
    }.items():
        assert pretrain.careless_expansion(list(left), list(right), list(tail)) == careless
        assert careless != polynomial_text(add(multiply(list(left), list(right)), list(tail)))


def test_base_model_can_what_it_mostly_does_not_show():
    # The card's figures are over 512 problems; 128 of them here, so the bounds are three standard errors wider.
    model, tokenizer = load_model(str(TINY), "float32", "cpu"), load_tokenizer(str(TINY))
    items = list(MathExprDataset("test"))[:128]
    prompts = encode_prompts(tokenizer, items, GRPOConfig().system_prompt)
    settings = DecodeSettings(96, stop_ids(model, tokenizer), tokenizer.pad_token_id)
    texts = completion_texts(generate(model, prompts, settings), tokenizer)
    greedy = sum(strict_correct(t, item["answer"]) for t, item in zip(texts, items, strict=True)) / 128
    uniforms = torch.rand(128 * 8, 96, generator=torch.Generator().manual_seed(0))
    sampled = completion_texts(generate(model, prompts, settings, 8, uniforms), tokenizer)
    solved = sum(any(strict_correct(t, items[i]["answer"]) for t in sampled[8 * i : 8 * i + 8]) for i in range(128))
    assert 0.10 < greedy < 0.60
    assert solved / 128 > 0.82
