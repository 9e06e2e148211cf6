"""What the decode loop and the chunked log-probs gain over what one would write first.

    python benchmarks/rollout_and_scoring.py

1. Rollout: utils.generate against model.generate of transformers, the same sampling settings, 32 prompts x 8 samples of
   the embedded model, alternating; tokens are those of completions up to their end token, padding does not count.
2. Peak memory of a scoring pass, forward and backward, over 8 x 512 completion tokens at a vocabulary of 151,936: the
   resident size on top of what was there before, each way in a process of its own.
3. The first pass's |ratio - 1|, and the gap between sampler and trainer, in fp32.
"""

import argparse
import contextlib
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from datasets import MathExprDataset  # noqa: E402
from grpo_train import GRPOConfig, LoRA, make_micro_batches, make_policy, micro_batch_loss, row_weights  # noqa: E402
from utils import completion_log_probs, encode_prompts, generate, load_model, load_tokenizer, stop_ids  # noqa: E402

PROMPTS, SAMPLES, MAX_NEW_TOKENS = 32, 8, 96
ROWS, PROMPT_TOKENS, COMPLETION_TOKENS, VOCAB = 8, 64, 512, 151_936


def load():
    model, tokenizer = load_model(str(ROOT / "tiny_model"), "float32", "cpu"), load_tokenizer(str(ROOT / "tiny_model"))
    items = list(MathExprDataset("train"))[:PROMPTS]
    return model, tokenizer, encode_prompts(tokenizer, [item["prompt"] for item in items], GRPOConfig().system_prompt)


def rollout(runs):
    """Tokens per second of both, `runs` times, in turn; the model is the plain one for both."""
    model, tokenizer, prompts = load()
    stop, pad = stop_ids(model, tokenizer), tokenizer.pad_token_id
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    settings = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_return_sequences=SAMPLES,
        max_new_tokens=MAX_NEW_TOKENS,
        eos_token_id=stop,
        pad_token_id=pad,
    )

    def ours(seed):
        uniforms = torch.rand(PROMPTS * SAMPLES, MAX_NEW_TOKENS, generator=torch.Generator().manual_seed(seed))
        out = generate(model, prompts, MAX_NEW_TOKENS, stop, pad, num_samples=SAMPLES, uniforms=uniforms)
        return out.mask.sum(1)

    def theirs(seed):
        torch.manual_seed(seed)
        tokens = model.generate(ids, attention_mask=mask, generation_config=settings)[:, longest:]
        ended = torch.isin(tokens, torch.tensor(stop))
        return torch.where(ended.any(1), ended.int().argmax(1) + 1, tokens.shape[1])

    rates = {ours: [], theirs: []}
    for seed in range(-1, runs):  # the first pair warms up
        for function, results in rates.items():
            start = time.perf_counter()
            lengths = function(seed + 1)
            if seed >= 0:
                results.append(int(lengths.sum()) / (time.perf_counter() - start))
    quartiles = torch.quantile(lengths.float(), torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])).int().tolist()
    return rates[ours], rates[theirs], quartiles


def scoring_memory(way):
    """Bytes of resident memory that one scoring pass, forward and backward, adds at its peak."""
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)  # the same weights and tokens both ways
    model = make_policy(Qwen2ForCausalLM(config), LoRA(rank=8), False)
    ids = torch.randint(VOCAB, (ROWS, PROMPT_TOKENS + COMPLETION_TOKENS))
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    mask[:, PROMPT_TOKENS:] = True
    model(input_ids=ids[:1, :8], use_cache=False).logits.sum().backward()  # libraries, threads and gradients are there
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    start = time.perf_counter()
    if way == "chunked":
        log_probs, _ = completion_log_probs(model, ids, mask, 1.0)
    else:
        logits = model(input_ids=ids, use_cache=False).logits[:, PROMPT_TOKENS - 1 : -1]  # (B, C, V)
        log_probs = logits.log_softmax(-1).gather(-1, ids[:, PROMPT_TOKENS:, None])[..., 0]
    log_probs.sum().backward()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"bytes": peak - before, "seconds": seconds, "sum": float(log_probs.sum())}


def first_pass():
    """Largest |ratio - 1| and largest sampler gap over the first update's micro-batches."""
    model, tokenizer, prompts = load()
    model = make_policy(model, LoRA(), False)
    uniforms = torch.rand(PROMPTS * SAMPLES, MAX_NEW_TOKENS, generator=torch.Generator().manual_seed(0))
    pad = tokenizer.pad_token_id
    completions = generate(
        model, prompts, MAX_NEW_TOKENS, stop_ids(model, tokenizer), pad, num_samples=SAMPLES, uniforms=uniforms
    )
    weights = row_weights(completions.mask.sum(1).float(), "token", MAX_NEW_TOKENS)
    rows = [prompt for prompt in prompts for _ in range(SAMPLES)]
    errors = []
    for batch in make_micro_batches(rows, completions, torch.ones(len(rows)), weights, 2048, pad):
        _, _, values = micro_batch_loss(model, batch, GRPOConfig(), None, contextlib.nullcontext)
        errors.append((values["ratio_error"].max().item(), values["sampler_gap"].max().item()))
    return tuple(map(max, zip(*errors, strict=True)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7, help="timed runs of each rollout (%(default)s)")
    parser.add_argument("--memory-of", choices=["chunked", "materialized"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(json.dumps(scoring_memory(arguments.memory_of)))
        return

    print(f"{torch.get_num_threads()} threads of {platform.machine()}, torch {torch.__version__}, ", end="")
    print(f"transformers {transformers.__version__}\n")
    print("| what | utils | what one would write first | gain |\n|---|---|---|---|")
    ours, theirs, quartiles = rollout(arguments.runs)
    cells = [f"{statistics.median(r):,.0f} ({min(r):,.0f} to {max(r):,.0f})" for r in (ours, theirs)]
    gain = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    print(f"| rollout, tokens/s, median (range) of {len(ours)} | {cells[0]} | {cells[1]} | {gain:.1f}x |")

    memory = {}
    for way in ("chunked", "materialized"):
        command = [sys.executable, __file__, "--memory-of", way]
        memory[way] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    ours, theirs = memory["chunked"], memory["materialized"]
    assert abs(ours["sum"] / theirs["sum"] - 1) < 1e-4, "the two ways disagree"
    cells = [f"{m['bytes'] / 2**30:.2f} GiB" for m in (ours, theirs)]
    print(f"| scoring, peak extra memory | {cells[0]} | {cells[1]} | 1/{theirs['bytes'] / ours['bytes']:.0f} |")
    cells = [f"{m['seconds']:.1f} s" for m in (ours, theirs)]
    print(f"| scoring, time | {cells[0]} | {cells[1]} | {theirs['seconds'] / ours['seconds']:.1f}x |")

    error, gap = first_pass()
    print(f"| first pass, largest abs(ratio - 1), fp32 | {error:g} | | |")
    print(f"| sampler to trainer, largest log-prob gap, fp32 | {gap:.1g} | | |")
    print(f"\nlengths of completions: least, quartiles, most: {quartiles}")


if __name__ == "__main__":
    main()
