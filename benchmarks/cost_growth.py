"""How the time of a step grows with group size, completion length, population and prompts per member.

    pip install matplotlib && python benchmarks/cost_growth.py        # writes results/cost_growth.png, prints the table

The embedded model and the scripts' defaults but for what a panel varies. Completions do not end by themselves, so that
all have the length that is asked for (48 tokens where nothing else is said). Every part of a step is timed several
times. Its work is what it would take at the machine's measured rates: floating-point operations without padding, in a
rollout the bytes of weights, keys and values read, in ES's update the normal numbers drawn. What matters is time over
work, in the table relative to the smallest setting: it falls while small operations fill up, and where it rose, time
would grow faster than work.
"""

import contextlib
import math
import platform
import statistics
import time

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import transformers
from profile_step import ROOT, Geometry, hardware

from datasets import MathExprDataset
from es_train import ESConfig, Population, noise_generators, noise_shapes, update_master, write_weights
from grpo_train import GRPOConfig, add_gradients, make_micro_batches, make_policy, merged_adapter, row_weights
from utils import HalvingSize, encode_prompts, generate, load_model, load_tokenizer

ROUNDS, TOKENS = 5, 48
SWEEPS = {
    "completions per prompt (GRPO, 8 prompts)": [4, 8, 16, 32, 64],
    "tokens per completion (GRPO, 8 prompts x 8)": [32, 64, 128, 256, 512],
    "members (ES, 8 prompts each)": [8, 16, 32, 64, 128, 256],
    "prompts per member (ES, 32 members)": [1, 2, 4, 8, 16, 32],
}


def timed(parts):
    """{part: seconds, ROUNDS times each} of {part: function}; a first round warms up."""
    seconds = {part: [] for part in parts}
    for number in range(-1, ROUNDS):
        for part, function in parts.items():
            start = time.perf_counter()
            function()
            if number >= 0:
                seconds[part].append(time.perf_counter() - start)
    return seconds


def grpo(tokenizer, prompts, group_size, new_tokens, machine):
    """{part: (function, work)} of a GRPO step over `prompts`. machine: see hardware"""
    torch.manual_seed(0)
    config = GRPOConfig()
    model = load_model(str(ROOT / "tiny_model"), "float32", "cpu")
    geometry, B, pad = Geometry(model), len(prompts) * group_size, tokenizer.pad_token_id
    policy = make_policy(model, config.lora, False)
    uniforms = torch.rand(B, new_tokens)

    def rollout():
        with merged_adapter(policy):
            return generate(policy, prompts, new_tokens, [], pad, num_samples=group_size, uniforms=uniforms)

    completions = rollout()
    rows, advantages = [p for p in prompts for _ in range(group_size)], torch.randn(B)
    weights = row_weights(completions.mask.sum(1).float(), "token", new_tokens)

    def update():
        batches = make_micro_batches(rows, completions, advantages, weights, config.micro_batch_tokens, pad)
        size = HalvingSize("", config.micro_batch_tokens)
        add_gradients(policy, batches, size, config, None, contextlib.nullcontext)
        policy.zero_grad()

    in_prompts, in_pairs = sum(map(len, prompts)), sum(len(p) ** 2 / 2 for p in prompts)
    pairs = sum(new_tokens * (len(row) + new_tokens / 2) for row in rows)
    products = geometry.flops(in_prompts + B * new_tokens, in_pairs + pairs, B * new_tokens) / machine[0]
    reading = geometry.decode_bytes(list(map(len, rows)), [new_tokens] * B) / machine[1]
    attention = geometry.flops(0, in_pairs + pairs, 0) / machine[0]
    return {"rollout": (rollout, products + reading), "update": (update, 2 * products + attention)}


def es(tokenizer, prompts, members, machine):
    """{part: (function, work)} of an ES iteration over `prompts`. machine: see hardware"""
    config, device = ESConfig(), torch.device("cpu")
    model = load_model(str(ROOT / "tiny_model"), "float32", "cpu").requires_grad_(False)
    parameters = dict(model.named_parameters())
    master = {name: p.clone() for name, p in parameters.items()}
    shapes, geometry, P = noise_shapes(parameters, "low_rank", 1), Geometry(model), len(prompts)

    def rollout():
        for first in range(0, members, config.population_batch):
            batch = range(first, min(first + config.population_batch, members))
            generators = noise_generators(0, 0, batch, members, device)
            scales = torch.full((len(batch),), config.noise_scale)
            with Population(model, shapes, generators, scales, P) as on_rows:
                rows, pad = prompts * len(batch), tokenizer.pad_token_id
                generate(model, rows, TOKENS, [], pad, batch_size=len(rows), on_rows=on_rows, block_size=P)

    def update():
        generators = noise_generators(0, 0, range(members), members, device)
        update_master(master, shapes, generators, [1.0, -1.0] * (members // 2), 0.0, False)
        write_weights(model, master)

    B, positions = P * members, members * (sum(map(len, prompts)) + P * TOKENS)
    pairs = members * sum(len(p) ** 2 / 2 + TOKENS * (len(p) + TOKENS / 2) for p in prompts)
    weights, drawn = sum(p.numel() for p in master.values()), members * sum(map(math.prod, shapes.values()))
    batches, lengths = -(-members // config.population_batch), list(map(len, prompts)) * members
    reading = geometry.decode_bytes(lengths, [TOKENS] * B) + (batches - 1) * TOKENS * 4 * weights
    return {
        "rollout": (rollout, geometry.flops(positions, pairs, B * TOKENS) / machine[0] + reading / machine[1]),
        "update": (update, 2 * weights * members / machine[0] + 4 * 3 * weights / machine[1] + drawn / machine[2]),
    }


def main():
    machine, tokenizer = hardware(), load_tokenizer(str(ROOT / "tiny_model"))
    items = list(MathExprDataset("train"))[:64]
    prompts = encode_prompts(tokenizer, [item["prompt"] for item in items], GRPOConfig().system_prompt)
    make = [
        lambda size: grpo(tokenizer, prompts[:8], size, TOKENS, machine),
        lambda size: grpo(tokenizer, prompts[:8], 8, size, machine),
        lambda size: es(tokenizer, prompts[:8], size, machine),
        lambda size: es(tokenizer, prompts[:size], 32, machine),
    ]
    print(f"{torch.get_num_threads()} threads of {platform.machine()}, torch {torch.__version__}, ", end="")
    print(f"transformers {transformers.__version__}; seconds are medians of {ROUNDS}\n")
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), constrained_layout=True)
    for axis, (name, sizes), make_parts in zip(axes.flat, SWEEPS.items(), make, strict=True):
        measured = {}
        for size in sizes:
            parts = make_parts(size)
            seconds = timed({part: function for part, (function, _) in parts.items()})
            for part, (_, work) in parts.items():
                measured.setdefault(part, []).append((seconds[part], work))
        print(f"| {name} | {' | '.join(map(str, sizes))} |\n|---|{'---|' * len(sizes)}")
        for part, color in (("rollout", "tab:blue"), ("update", "tab:orange")):
            medians = [statistics.median(seconds) for seconds, _ in measured[part]]
            works = [work for _, work in measured[part]]
            relative = [m / w / (medians[0] / works[0]) for m, w in zip(medians, works, strict=True)]
            print(f"| {part}, seconds | {' | '.join(f'{m:.3f}' for m in medians)} |")
            print(f"| {part}, time over work | {' | '.join(f'{r:.2f}' for r in relative)} |")
            low, high = ([extreme(seconds) for seconds, _ in measured[part]] for extreme in (min, max))
            axis.plot(sizes, medians, "o-", color=color, label=part)
            axis.fill_between(sizes, low, high, color=color, alpha=0.2)
            scaled = [medians[-1] * work / works[-1] for work in works]
            axis.plot(sizes, scaled, ":", color=color, label=f"{part}, as its work grows")
        print()
        axis.set(xscale="log", yscale="log", xlabel=name, ylabel="seconds", xticks=sizes, xticklabels=sizes)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0, 0].legend()
    figure.savefig(ROOT / "results" / "cost_growth.png", dpi=110)


if __name__ == "__main__":
    main()
