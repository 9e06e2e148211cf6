"""GRPO and ES at the sizes of real models, beside what one would write first and beside what the hardware allows.

    python benchmarks/real_sizes.py --problems train.jsonl                                    # needs a GPU of 80 GB
    python benchmarks/real_sizes.py --problems train.jsonl --sizes toy --prompts 4 --samples 4 --new-tokens 16 \
        --members 4 --member-prompts 2                                                        # tries it out on a CPU

Qwen2.5's geometry, random weights, bf16. No completion ends by itself, so that every way decodes the same number of
tokens; weights are spread out (standard deviation 0.05), or greedy answers would repeat one token. Prompts are those of
GSM8K's published file: each word or sign is one token of the vocabulary, which makes them about as long as Qwen's own.

Rollout: graphs is utils.generate as it is on a GPU, eager the same without CUDA graphs, generate is model.generate of
transformers. The floor of a decode step is what has to be read, weights and keys and values, over the measured rate of
copying; a step's time is what more tokens than one take, over their number. Update: completion tokens a second, and
model FLOPs over the measured rate of bf16 matrix products: 4 a weight and token (one forward pass, one backward pass to
what is trained) and attention, each prompt counted once and lm_head for completions only. ES: one iteration without
scoring, low_rank in one batch, against a population whose members answer one after the other by model.generate, of
which two are timed.
"""

import argparse
import contextlib
import json
import re
import statistics
import sys
import time
import zlib
from pathlib import Path
from unittest import mock

import torch
import transformers
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import utils  # noqa: E402
from es_train import Population, noise_generators, noise_shapes, update_master, write_weights  # noqa: E402
from grpo_train import GRPOConfig, LoRA, add_gradients, make_micro_batches, make_policy, row_weights  # noqa: E402
from utils import HalvingSize, generate, inner_model  # noqa: E402

SIZES = {  # hidden size, that of the MLP, layers, heads, vocabulary
    "toy": (64, 128, 2, 4, 1_000),
    "0.5B": (896, 4864, 24, 14, 151_936),
    "1.5B": (1536, 8960, 28, 12, 151_936),
}


def make_model(size, device):
    hidden, mlp, layers, heads, vocabulary = SIZES[size]
    config = Qwen2Config(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=2,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
        initializer_range=0.05,
    )
    torch.manual_seed(0)
    return Qwen2ForCausalLM(config).to(torch.bfloat16).to(device).eval()


def read_prompts(path, count, vocabulary):
    lines = Path(path).read_text().splitlines()[:count]
    words = [re.findall(r"\w+|[^\w\s]", json.loads(line)["question"]) for line in lines]
    return [[zlib.crc32(word.encode()) % vocabulary for word in row] for row in words]


def timed(function):
    """Seconds that it takes, those of the GPU included, and what it returns."""
    synchronize()
    start = time.perf_counter()
    result = function()
    synchronize()
    return time.perf_counter() - start, result


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_gib(device):
    """Most memory allocated since the last call."""
    if device.type != "cuda":
        return float("nan")
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return peak


def median(values):
    return f"{statistics.median(values):,.4g} ({min(values):,.4g} to {max(values):,.4g})"


def hardware(device):
    """FLOP/s of bf16 matrix products and bytes/s of copying, read and written both counted, as measured."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    x = torch.empty(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)

    def best(function):
        return min(timed(function)[0] for _ in range(10))

    return 2 * n**3 / best(lambda: a @ b), 2 * x.numel() / best(lambda: y.copy_(x))


def rollouts(model, prompts, samples, new_tokens, rounds, rate):
    """A table of the ways to complete each prompt `samples` times, `rounds` times each, in turn."""
    device, vocabulary, B = model.device, model.config.vocab_size, len(prompts) * samples
    uniforms = torch.rand(B, new_tokens, generator=torch.Generator().manual_seed(0))
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    settings = {"do_sample": True, "top_k": 0, "top_p": 1.0, "num_return_sequences": samples, "pad_token_id": 0}
    policy = make_policy(model, LoRA(rank=32, alpha=64), False)

    def ours(graphs, tokens):
        with mock.patch.object(utils, "captures", lambda device: graphs and device.type == "cuda"):
            with torch.autocast(device.type, torch.bfloat16):
                numbers = uniforms[:, :tokens]
                return generate(policy, prompts, tokens, [], 0, num_samples=samples, uniforms=numbers, batch_size=B)

    def theirs(tokens):
        with torch.autocast(device.type, torch.bfloat16):
            config = GenerationConfig(**settings, max_new_tokens=tokens)
            return policy.generate(input_ids=ids, attention_mask=mask, generation_config=config)

    ways = {
        "graphs": lambda tokens: ours(True, tokens),
        "eager": lambda tokens: ours(False, tokens),
        "generate": theirs,
    }
    seconds, first, results, peaks = {way: [] for way in ways}, {way: [] for way in ways}, {}, {}
    for number in range(-1, rounds):
        for way, function in ways.items():
            peak_gib(device)
            duration, results[way] = timed(lambda function=function: function(new_tokens))
            peaks[way] = peak_gib(device)
            if number >= 0:
                seconds[way].append(duration)
                first[way].append(timed(lambda function=function: function(1))[0])
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    config = model.config
    slot = (
        2 * config.num_hidden_layers * config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    )
    mean = sum(map(len, prompts)) / len(prompts)
    cache = B * (mean + new_tokens / 2) * slot * 2  # bytes read at the middle step
    floor = (weights + cache) / rate
    print(f"\n| rollout, {B} rows x {new_tokens} tokens | seconds | tokens/s | ms a step | step / floor | peak GiB |")
    print("|---|---|---|---|---|---|")
    for way, values in seconds.items():
        middle = statistics.median(values)
        step = (middle - statistics.median(first[way])) / (new_tokens - 1)
        rate_of_tokens = f"{B * new_tokens / middle:,.0f}"
        cells = [median(values), rate_of_tokens, f"{step * 1e3:.2f}", f"{step / floor:.1f}", f"{peaks[way]:.1f}"]
        print(f"| {way} | {' | '.join(cells)} |")
    same = (results["graphs"].tokens == results["eager"].tokens).float().mean()
    print(f"\nfloor of a decode step: {floor * 1e3:.2f} ms; graphs and eager have {same:.1%} of tokens in common")
    print(f"distinct tokens: {results['graphs'].tokens.unique().numel():,} of {vocabulary:,}")
    return policy, results["graphs"]


def updates(policy, prompts, completions, samples, budget, rounds, rate):
    """Gradients of one step over all completions, without and with gradient checkpointing."""
    device, model = policy.device, inner_model(policy)
    lengths = completions.mask.sum(1)
    weights = row_weights(lengths.float(), "token", completions.tokens.shape[1])
    advantages = torch.randn(len(lengths), device=device, generator=torch.Generator(device).manual_seed(0))
    rows = [prompt for prompt in prompts for _ in range(samples)]
    positions, C = sum(map(len, prompts)) + int(lengths.sum()), completions.tokens.shape[1]
    config, mean = model.config, sum(map(len, prompts)) / len(prompts)
    head = config.vocab_size * config.hidden_size
    layers = sum(p.numel() for p in model.base_model.parameters() if not p.requires_grad) - head
    attended = len(rows) * C * (mean + C / 2) + len(prompts) * mean**2 / 2  # pairs of positions
    attention = 4 * config.hidden_size * config.num_hidden_layers * attended
    flops = 4 * layers * positions + 4 * head * int(lengths.sum()) + 3 * attention
    print(f"\n| update of {positions:,} positions | seconds | completion tokens/s | of the GEMM rate | peak GiB |")
    print("|---|---|---|---|---|")
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})

        def step():
            batches = make_micro_batches(rows, completions, advantages, weights, budget, 0)

            def autocast():
                return torch.autocast(device.type, torch.bfloat16)

            add_gradients(policy, batches, HalvingSize("--micro-batch", budget), GRPOConfig(), None, autocast)
            policy.zero_grad()

        step()
        peak_gib(device)
        seconds = [timed(step)[0] for _ in range(rounds)]
        middle = statistics.median(seconds)
        cells = [median(seconds), f"{int(lengths.sum()) / middle:,.0f}", f"{flops / middle / rate:.0%}"]
        name = "with" if checkpointing else "without"
        print(f"| {name} gradient checkpointing | {' | '.join(cells)} | {peak_gib(device):.1f} |")
    model.gradient_checkpointing_disable()


@torch.no_grad()
def iterations(model, prompts, members, new_tokens, rounds):
    """One ES iteration without scoring: a low-rank population in one batch, and members one after the other."""
    device, parameters = model.device, dict(model.named_parameters())
    master = {name: p.float() for name, p in parameters.items()}
    shapes = noise_shapes(parameters, "low_rank", 1)
    z, scale = [(-1.0) ** n for n in range(members)], 0.001

    def low_rank():
        generators = noise_generators(0, 0, range(members), members, device)
        scales = torch.full((members,), scale, device=device)
        with Population(model, shapes, generators, scales, len(prompts)) as on_rows:
            everything, P = prompts * members, len(prompts)
            out = generate(model, everything, new_tokens, [], 0, batch_size=members * P, on_rows=on_rows, block_size=P)
        generators = noise_generators(0, 0, range(members), members, device)
        update_master(master, shapes, generators, z, 0.0, False)
        write_weights(model, master)
        return out

    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    settings = GenerationConfig(do_sample=False, max_new_tokens=new_tokens, pad_token_id=0)

    def one_member():
        for sign in (1, -1):  # as published: noise is added in place and subtracted again
            generator = torch.Generator(device).manual_seed(0)
            for parameter in parameters.values():
                noise = torch.randn(parameter.shape, generator=generator, device=device, dtype=parameter.dtype)
                parameter.add_(noise, alpha=sign * scale)
            if sign == 1:
                model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)

    low_rank(), one_member(), peak_gib(device)
    together, peaks = [timed(low_rank)[0] for _ in range(rounds)], [peak_gib(device)]
    alone = [timed(one_member)[0] * members for _ in range(2)]
    peaks.append(peak_gib(device))
    print(f"\n| ES iteration, {members} members x {len(prompts)} prompts x {new_tokens} tokens | seconds | peak GiB |")
    print("|---|---|---|")
    print(f"| low_rank, one batch | {median(together)} | {peaks[0]:.1f} |")
    print(f"| member after member, model.generate | {median(alone)} | {peaks[1]:.1f} |")
    print(f"\nlow_rank is {statistics.median(alone) / statistics.median(together):.1f} times as fast")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", required=True, help="GSM8K's train.jsonl")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["0.5B", "1.5B"])
    parser.add_argument("--prompts", type=int, default=64, help="of a rollout (%(default)s)")
    parser.add_argument("--samples", type=int, default=8, help="of each prompt (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=512, help="(%(default)s)")
    parser.add_argument("--micro-batch", type=int, default=16384, help="micro_batch_tokens (%(default)s)")
    parser.add_argument("--members", type=int, default=32, help="of a population (%(default)s)")
    parser.add_argument("--member-prompts", type=int, default=64, help="that each answers (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each (%(default)s)")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gemm, copying = hardware(device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}: ", end="")
    print(f"bf16 products {gemm / 1e12:.3g} TFLOP/s, copying {copying / 1e9:,.0f} GB/s")
    for size in arguments.sizes:
        model = make_model(size, device)
        print(f"\n{size} geometry, {sum(p.numel() for p in model.parameters()):,} parameters")
        prompts = read_prompts(arguments.problems, arguments.prompts, model.config.vocab_size)
        few = read_prompts(arguments.problems, arguments.member_prompts, model.config.vocab_size)
        iterations(model, few, arguments.members, arguments.new_tokens, arguments.rounds)
        policy, completions = rollouts(
            model, prompts, arguments.samples, arguments.new_tokens, arguments.rounds, copying
        )
        updates(policy, prompts, completions, arguments.samples, arguments.micro_batch, arguments.rounds, gemm)
        del model, policy
        with contextlib.suppress(AssertionError):
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
