"""Tests with a real pretrained model, SmolLM2-135M-Instruct: tokenizer, chat template, weights, and training.

python tests/make_smollm2.py FOLDER
SMOLLM2=FOLDER python -m pytest -m slow tests/test_real_model.py
"""

import os
import shutil

import pytest
import torch
from conftest import SCRIPTS, model_weights, scalars
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from generation import DecodeSettings, completion_log_probs, generate
from grpo_train import GRPOConfig, make_micro_batches
from utils import Example, completion_texts, encode_prompts, load_model, load_tokenizer, stop_ids

SMOLLM2 = os.environ.get("SMOLLM2", "")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not SMOLLM2, reason="needs SMOLLM2=FOLDER, see make_smollm2.py")]
ITEMS = [{"prompt": f"Compute {a}+{b}", "answer": str(a + b)} for a, b in [(3, 4), (9, 5), (2, 8), (7, 7)]]
EXAMPLES = [Example(prompt="Compute 1+2", answer="<think>1+2=3.</think><answer>3</answer>")]
SYSTEM_PROMPT = GRPOConfig().system_prompt
FORMAT = [f"examples=[{{prompt: {EXAMPLES[0].prompt}, answer: '{EXAMPLES[0].answer}'}}]"]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(SMOLLM2)


def settings(model, tokenizer, max_new_tokens):
    return DecodeSettings(max_new_tokens, stop_ids(model, tokenizer))


def test_prompts_are_as_the_template_writes_them(tokenizer):
    (ids,) = encode_prompts(tokenizer, ITEMS[:1], SYSTEM_PROMPT, EXAMPLES)
    turns = [
        ("system", SYSTEM_PROMPT),
        ("user", "Compute 1+2"),
        ("assistant", EXAMPLES[0].answer),
        ("user", "Compute 3+4"),
    ]
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    assert tokenizer.decode(ids) == f"{text}<|im_start|>assistant\n"
    assert ids == tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in turns], add_generation_prompt=True
    )["input_ids"]  # fmt: skip


def test_end_of_turn_stops_a_row_whatever_the_tokenizers_end_token_is(tokenizer, tmp_path):
    folder = shutil.copytree(SMOLLM2, tmp_path / "copy")
    AutoTokenizer.from_pretrained(SMOLLM2, eos_token="<|endoftext|>").save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    model, other = load_model(str(folder), "float32", "cpu"), load_tokenizer(str(folder))
    model.generation_config.eos_token_id = other.eos_token_id
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert other.eos_token_id != end and end in stop_ids(model, other)
    prompts = encode_prompts(other, ITEMS, SYSTEM_PROMPT, EXAMPLES)
    texts = completion_texts(generate(model, prompts, settings(model, other, 48)), other)
    assert sum(text.endswith("</answer>") for text in texts) >= 2 and not any("im_start" in text for text in texts)


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-3), ("bfloat16", 0.3)])
def test_sampled_log_probs_are_the_recomputed_ones(tokenizer, dtype, bound):
    model = load_model(SMOLLM2, dtype, "cpu")
    prompts = encode_prompts(tokenizer, ITEMS, SYSTEM_PROMPT, EXAMPLES)
    uniforms = torch.rand(8, 24, generator=torch.Generator().manual_seed(0))
    completions = generate(model, prompts, settings(model, tokenizer, 24), 2, uniforms)
    ones = torch.ones(8)
    for batch in make_micro_batches(prompts, completions, ones, ones, 400, True):
        with torch.no_grad():
            log_probs, _ = completion_log_probs(model, batch.ids, batch.mask, 1.0)
        assert (log_probs - batch.sampler_log_probs).abs().max() < bound


@pytest.mark.parametrize("name", SCRIPTS)
def test_training_raises_no_warning_and_other_libraries_read_the_result(tokenizer, tmp_path, capfd, name):
    script = SCRIPTS[name]
    overrides = [f"model={SMOLLM2}", f"num_steps={3 if name == 'grpo' else 2}", *FORMAT, "eval_size=4"]
    overrides += ["noise_scale=0.001"] if name == "es" else []
    folder = script.train(tmp_path / "run", *overrides)
    output = capfd.readouterr()
    assert "warning" not in (output.out + output.err).lower() and "no signal" not in output.out
    assert scalars(folder)["accuracy/format"][-1][1] > 0
    assert all(weight.isfinite().all() for weight in model_weights(folder).values())

    if name == "grpo":
        base = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32)
        plain = PeftModel.from_pretrained(base, folder / "model")
    else:
        plain = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    ours = load_model(str(folder / "model"), "float32", "cpu")
    prompts = encode_prompts(tokenizer, ITEMS, SYSTEM_PROMPT, EXAMPLES)
    texts = completion_texts(generate(ours, prompts, settings(ours, tokenizer, 24)), tokenizer)
    for ids, text in zip(prompts, texts, strict=True):
        theirs = plain.generate(input_ids=torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0, len(ids) :]
        assert tokenizer.decode(theirs, skip_special_tokens=True) == text
