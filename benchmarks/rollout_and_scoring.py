"""The decode loop and the chunked log-probs, compared with the plain way to write each.

    python benchmarks/rollout_and_scoring.py                                        # needs 12 GiB of memory
    python benchmarks/rollout_and_scoring.py --runs 1 --completion-tokens 32        # a quick try

1. Rollout: generation.generate and model.generate of transformers take turns, with the same model, prompts and sampling
   settings: 32 prompts x 8 samples of the embedded model. The rate counts tokens up to a completion's end token, not
   the padding after it.
2. Scoring: the forward and backward pass over 8 completions of 512 tokens at a vocabulary of 151,936. "Chunked" is
   generation.completion_log_probs. "All logits" computes the logits of every token at once. Each runs in a process of
   its own. Its memory is the peak resident size minus the size before the pass.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from generation import completion_log_probs, generate
from grpo_train import GRPOConfig, LoRA, make_policy

PROMPTS, SAMPLES = 32, 8
ROWS, PROMPT_TOKENS, VOCAB = 8, 64, 151_936
TINY = str(Path(__file__).resolve().parent.parent / "tiny_model")


def resident_gib(field):
    """Memory of this process: now with VmRSS, at its peak with VmHWM. Linux only."""
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2**20


def rollout(setup, runs):
    """Tokens per second of generate and of model.generate, `runs` values each, and the lengths of completions."""
    prompts, settings = [problem.ids for problem in setup.train_set[:PROMPTS]], setup.settings
    inputs = setup.tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "num_return_sequences": SAMPLES}
    limits = {"max_new_tokens": settings.max_new_tokens, "eos_token_id": settings.stop_ids}
    sampling = GenerationConfig(**sampling, **limits, pad_token_id=0)

    def ours(seed):
        generator = torch.Generator().manual_seed(seed)
        uniforms = torch.rand(PROMPTS * SAMPLES, settings.max_new_tokens, generator=generator)
        return generate(setup.model, prompts, settings, SAMPLES, uniforms).mask.sum(1)

    def theirs(seed):
        torch.manual_seed(seed)
        tokens = setup.model.generate(**inputs, generation_config=sampling)[:, inputs["input_ids"].shape[1] :]
        ended = torch.isin(tokens, torch.tensor(settings.stop_ids))
        return (ended.cumsum(1) <= ended).sum(1)  # up to the first end token

    rates = {ours: [], theirs: []}
    for seed in range(runs + 1):
        for function, values in rates.items():
            start = time.perf_counter()
            lengths = function(seed)
            values.append(int(lengths.sum()) / (time.perf_counter() - start))
    return rates[ours][1:], rates[theirs][1:], lengths  # the first run of each warms up


def score(way, completion_tokens):
    """GiB and seconds of one scoring pass, forward and backward, and the sum of its log-probs."""
    torch.manual_seed(0)  # the same weights and tokens for both ways
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    geometry = Qwen2Config(vocab_size=VOCAB, num_key_value_heads=2, tie_word_embeddings=True, **sizes)
    model = make_policy(Qwen2ForCausalLM(geometry), LoRA(rank=8), False)
    ids = torch.randint(VOCAB, (ROWS, PROMPT_TOKENS + completion_tokens))
    mask = (torch.arange(ids.shape[1]) >= PROMPT_TOKENS).expand(ids.shape)
    model(input_ids=ids[:1, :8], use_cache=False).logits.sum().backward()  # loads libraries, allocates gradients
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before, start = resident_gib("VmRSS"), time.perf_counter()
    if way == "chunked":
        log_probs, _ = completion_log_probs(model, ids, mask, 1.0)
    else:
        logits = model(input_ids=ids, use_cache=False).logits[:, PROMPT_TOKENS - 1 : -1]  # (B, T, V)
        log_probs = logits.log_softmax(-1).gather(-1, ids[:, PROMPT_TOKENS:, None])
    log_probs.sum().backward()
    seconds = time.perf_counter() - start
    return {"GiB": resident_gib("VmHWM") - before, "seconds": seconds, "sum": float(log_probs.detach().sum())}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7, help="timed runs of each rollout (%(default)s)")
    parser.add_argument("--completion-tokens", type=int, default=512, help="of a scored row (%(default)s)")
    parser.add_argument("--score", choices=["chunked", "all logits"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.score:
        print(json.dumps(score(arguments.score, arguments.completion_tokens)))
        return

    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, transformers {transformers.__version__}\n")
    print("| measurement | here | plain | here / plain |\n|---|---|---|---|")
    setup = utils.set_up(GRPOConfig(model=TINY, device="cpu"), "float32")
    *rates, lengths = rollout(setup, arguments.runs)
    cells = [f"{statistics.median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})" for values in rates]
    gain = statistics.median(ours / theirs for ours, theirs in zip(*rates, strict=True))
    print(f"| rollout, tokens/s, median (range) of {arguments.runs} | {cells[0]} | {cells[1]} | {gain:.1f} |")

    command = [sys.executable, __file__, "--completion-tokens", str(arguments.completion_tokens), "--score"]
    chunked, plain = (
        json.loads(subprocess.run([*command, way], check=True, capture_output=True, text=True).stdout)
        for way in ("chunked", "all logits")
    )
    assert abs(chunked["sum"] / plain["sum"] - 1) < 1e-4, "the two ways disagree"
    for name, key, form in (("peak memory added", "GiB", "{:.2f} GiB"), ("time", "seconds", "{:.1f} s")):
        cells = [form.format(way[key]) for way in (chunked, plain)]
        print(f"| scoring, {name} | {cells[0]} | {cells[1]} | {chunked[key] / plain[key]:.2f} |")

    print(f"\nlengths of completions: median {int(lengths.median())}, maximum {int(lengths.max())}")


if __name__ == "__main__":
    main()
