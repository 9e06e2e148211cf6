"""Pretrain the embedded model, a Qwen2 with under a million parameters, and its tokenizer. Save both in this folder.

    python tiny_model/pretrain.py
    python tiny_model/pretrain.py --measure      # only evaluate the existing model

Reinforcement learning amplifies what a model already does now and then; it does not teach arithmetic. So the corpus has
every fact that the MathExpr problems need, but many solutions are sloppy. The wording of the problem decides how many:
after "Compute", most are worked through in the tags; after "What is", most are a bare answer. As in a real base model,
what the model can do and what it mostly shows are far apart.
"""

import argparse
import json
import math
import random
import sys
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer, get_scheduler

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

from datasets import MathExprDataset, add, apply_operator, expression_steps, monomial_text, polynomial_text  # noqa: E402
from generation import DecodeSettings, generate  # noqa: E402
from reward import TAGS, lenient_correct, strict_correct  # noqa: E402
from utils import completion_texts, encode_prompts, load_model, load_tokenizer, seeded_generator, stop_ids  # noqa: E402

SYSTEM_PROMPT = "Think step by step in <think></think>, then answer in <answer></answer>."
NUM_BATCHES = 3500
BATCH_SIZE = 128
LEARNING_RATE = 2e-3
SEED = 0

# Share of each style of solution, by wording (the columns of MathExprDataset.WORDINGS). A sloppy solution gets one step
# wrong and continues from there. An untagged one has no tags, a blurt no steps. Most blurted expansions are careless.
STYLES = {
    "worked": (0.65, 0.41, 0.41, 0.41),
    "sloppy": (0.05, 0.03, 0.03, 0.03),
    "untagged": (0.15, 0.48, 0.08, 0.08),
    "blurt": (0.15, 0.08, 0.48, 0.48),
}
CARELESS_SHARE = 0.7

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer
# ----------------------------------------------------------------------------------------------------------------------


def build_tokenizer():
    """Build Qwen's byte-level BPE tokenizer with its own vocabulary: bytes, the words of the prompts, and the tags.

    It can encode any text. Each digit, symbol, tag and word of the prompts is one token.
    """
    words = [SYSTEM_PROMPT, "Steps: Answer: Solve Calculate Find the value of"]
    words += [wording for wordings in MathExprDataset.WORDINGS.values() for wording in wordings]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?[A-Za-z]+|[0-9]| ?[^A-Za-z0-9\s]|\s"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    chat = ["<|system|>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=["<|pad|>", "<|end|>", *chat], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(words, trainer)
    learned = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(merge) for merge in learned["merges"]],
        unk_token="<|pad|>",  # never used
        pad_token="<|pad|>",
        eos_token="<|end|>",
        extra_special_tokens=chat,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
        padding_side="left",
    )
    # Not special tokens: decoding must keep the tags, so that the reward sees them.
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    return tokenizer


# ----------------------------------------------------------------------------------------------------------------------
# Corpus
# ----------------------------------------------------------------------------------------------------------------------


def join_terms(*terms):
    return "+".join(terms).replace("+-", "-")


class Slips:
    """Calculator that gets step number `slip_at` wrong."""

    def __init__(self, rng, slip_at):
        self.rng, self.slip_at, self.step = rng, slip_at, -1

    def __call__(self, operator, left, right):
        self.step += 1
        result = apply_operator(operator, left, right)
        return result + self.rng.choice([-10, -2, -1, 1, 2, 10]) if self.step == self.slip_at else result


def work_through(kind, structure, compute):
    """Return (answer, steps) as text. All results in them come from `compute(operator, left, right)`."""
    if kind == "evaluate":
        value, steps = expression_steps(structure, compute)
        return str(value), [f"{a}{op}({b})={c}" if b < 0 else f"{a}{op}{b}={c}" for op, a, b, c in steps]
    left, right, tail = structure
    steps, terms = [], {}  # terms: coefficients so far, by power
    for i, a in reversed(list(enumerate(left))):
        for j, b in reversed(list(enumerate(right))):
            if a:
                product = compute("*", a, b)
                terms.setdefault(i + j, []).append(product)
                b_text = f"({monomial_text(b, j)})" if b < 0 else monomial_text(b, j)
                steps.append(f"{monomial_text(a, i)}*{b_text}={monomial_text(product, i + j)}")
    for power, coefficient in enumerate(tail):
        if coefficient:
            terms.setdefault(power, []).append(coefficient)
    coefficients = [0] * (max(terms) + 1)
    for power, (total, *others) in sorted(terms.items(), reverse=True):
        for other in others:
            summed = compute("+", total, other)
            result = monomial_text(summed, power) if summed else "0"
            steps.append(f"{join_terms(monomial_text(total, power), monomial_text(other, power))}={result}")
            total = summed
        coefficients[power] = total
    return polynomial_text(coefficients), steps


def careless_expansion(left, right, tail):
    """Return a hasty, wrong expansion: 3*(x+2) as 3x+2, (x+1)*(x+2) as x^2+2."""
    if len(left) == 1:
        product = [right[0], left[0] * right[1]]
    else:
        product = [left[0] * right[0] if left[0] else right[0], 0, left[1] * right[1]]
    return polynomial_text(add(product, tail))


def write_solution(rng, kind, structure, style):
    answer, steps = work_through(kind, structure, apply_operator)
    if style == "blurt":
        if kind == "expand" and rng.random() < CARELESS_SHARE:
            answer = careless_expansion(*structure)
        return f"<answer>{answer}</answer>"
    if style == "sloppy":
        answer, steps = work_through(kind, structure, Slips(rng, rng.randrange(len(steps))))
    if style == "untagged":
        return f"Steps: {';'.join(steps)} Answer: {answer}"
    return f"<think>{';'.join(steps)}</think><answer>{answer}</answer>"


def corpus(rng, tokenizer):
    """Yield (prompt ids, solution ids) forever, from the train split only: the test split stays held out."""
    difficulty = MathExprDataset("train", size=1)
    while True:
        kind = rng.choice(list(MathExprDataset.WORDINGS))
        drawn = difficulty.draw(rng, kind)
        if not drawn:
            continue
        text, _, _, structure = drawn
        wording = rng.randrange(4)
        style = rng.choices(list(STYLES), [shares[wording] for shares in STYLES.values()])[0]
        messages = [{"role": "user", "content": MathExprDataset.WORDINGS[kind][wording].format(text)}]
        if rng.random() < 0.5:
            messages.insert(0, {"role": "system", "content": SYSTEM_PROMPT})
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        solution = write_solution(rng, kind, structure, style) + tokenizer.eos_token
        yield tokenizer(prompt).input_ids, tokenizer(solution).input_ids


def batches(rng, tokenizer, pool=16):
    """Yield right-padded (B, T) ids and labels forever, batched by length. Prompt tokens are excluded from the loss."""
    examples = corpus(rng, tokenizer)
    while True:
        drawn = sorted((next(examples) for _ in range(pool * BATCH_SIZE)), key=lambda pair: len(pair[0] + pair[1]))
        starts = list(range(0, len(drawn), BATCH_SIZE))
        rng.shuffle(starts)
        for start in starts:
            batch = drawn[start : start + BATCH_SIZE]
            T = max(len(prompt) + len(solution) for prompt, solution in batch)
            ids = torch.full((BATCH_SIZE, T), tokenizer.pad_token_id)
            labels = torch.full((BATCH_SIZE, T), -100)
            for row, (prompt, solution) in enumerate(batch):
                ids[row, : len(prompt) + len(solution)] = torch.tensor(prompt + solution)
                labels[row, len(prompt) : len(prompt) + len(solution)] = torch.tensor(solution)
            yield ids, labels


# ----------------------------------------------------------------------------------------------------------------------
# Training and evaluation
# ----------------------------------------------------------------------------------------------------------------------


def train():
    """Train model and tokenizer from SEED and save both in FOLDER."""
    torch.set_num_threads(1)  # same order of summation on any number of cores
    torch.manual_seed(SEED)
    tokenizer = build_tokenizer()
    config = Qwen2Config(
        vocab_size=math.ceil(len(tokenizer) / 16) * 16,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=100, num_training_steps=NUM_BATCHES)
    examples = batches(random.Random(SEED), tokenizer)
    progress = tqdm(range(NUM_BATCHES))
    for step in progress:
        ids, labels = next(examples)
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    model.save_pretrained(FOLDER)
    tokenizer.save_pretrained(FOLDER)


def measure(num_problems=512, num_samples=8):
    """Print the table in README.md: held-out accuracy of the model in FOLDER, greedy and sampled at T = 1."""
    model, tokenizer = load_model(str(FOLDER), "float32", "cpu"), load_tokenizer(str(FOLDER))
    items = list(MathExprDataset("test"))[:num_problems]
    prompts = encode_prompts(tokenizer, items, SYSTEM_PROMPT)
    settings = DecodeSettings(96, stop_ids(model, tokenizer))
    uniforms = torch.rand(num_problems * num_samples, 96, generator=seeded_generator(SEED, "measure"))
    greedy, sampled = (
        completion_texts(generate(model, prompts, settings, *sampling), tokenizer)
        for sampling in ((), (num_samples, uniforms))
    )
    print(f"| {num_problems} held-out problems | strict | lenient |\n|---|---|---|")
    rows = {"greedy": [], "pass@1, T = 1": [], f"pass@{num_samples}, T = 1": []}
    for correct in (strict_correct, lenient_correct):
        hits = [[correct(text, item["answer"])] for text, item in zip(greedy, items, strict=True)]
        rows["greedy"].append(sum(map(any, hits)) / num_problems)
        hits = [
            [correct(text, item["answer"]) for text in sampled[i * num_samples : (i + 1) * num_samples]]
            for i, item in enumerate(items)
        ]
        rows["pass@1, T = 1"].append(sum(map(sum, hits)) / (num_problems * num_samples))
        rows[f"pass@{num_samples}, T = 1"].append(sum(map(any, hits)) / num_problems)
    for name, (strict, lenient) in rows.items():
        print(f"| {name} | {strict:.1%} | {lenient:.1%} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Pretrain the embedded model and evaluate it.")
    parser.add_argument("--measure", action="store_true", help="evaluate the existing model without training")
    if not parser.parse_args().measure:
        train()
    measure()
