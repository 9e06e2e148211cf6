"""What the time of a GRPO step and of an ES iteration goes to, and what the machine would need at least.

    python benchmarks/profile_step.py

The default configs on the embedded model, with the parts of a step as the scripts call them, all rows in the update.
Seconds are medians without the profiler. The floor of a part is the largest of three: its floating-point operations,
those of matrix products and attention without padding, over the measured rate of a large fp32 matrix product; the bytes
of weights, keys and values that its passes read over the measured rate of copying; and the normal numbers that it draws
over the measured rate of drawing them. Shares are those of torch.profiler's operations by their own time; "around" is
what is left of the profiled time: Python and the calls, which the profiler makes slower.
"""

import contextlib
import math
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from datasets import MathExprDataset  # noqa: E402
from es_train import ESConfig, Population, noise_generators, noise_shapes, update_master, write_weights  # noqa: E402
from grpo_train import (  # noqa: E402
    GRPOConfig,
    add_gradients,
    make_micro_batches,
    make_policy,
    merged_adapter,
    row_weights,
)
from utils import (  # noqa: E402
    HalvingSize,
    encode_prompts,
    generate,
    load_model,
    load_tokenizer,
    score_completions,
    stop_ids,
)

KINDS = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm_", "addcmul_"),
    "attention": ("_scaled_dot_product",),
    "copies": ("copy_", "cat", "index", "index_select", "index_copy_", "gather", "scatter", "fill_", "masked_scatter"),
}
ROUNDS = 9


def kind_of(operation):
    name = operation.removeprefix("aten::")
    for kind, prefixes in KINDS.items():
        if name in prefixes or (kind == "attention" and name.startswith(prefixes)):
            return kind
    return "other operations" if operation.startswith("aten::") else "around"


def shares(function):
    """{kind: share of the profiled time}."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        function()
        total = time.perf_counter() - start
    seconds = dict.fromkeys((*KINDS, "other operations"), 0.0)
    for event in profiler.key_averages():
        if event.key.startswith("aten::"):
            seconds[kind_of(event.key)] += event.self_cpu_time_total / 1e6
    return {**{kind: s / total for kind, s in seconds.items()}, "around": 1 - sum(seconds.values()) / total}


def hardware():
    """FLOP/s of fp32 matrix products, bytes/s of copying, read and written both counted, normal numbers/s: measured."""
    a, b, x, y = *(torch.randn(2048, 2048) for _ in range(2)), *(torch.randn(2**26) for _ in range(2))
    generator = torch.Generator()

    def best(function):
        seconds = []
        for _ in range(10):
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    products, copying = best(lambda: a @ b), best(lambda: y.copy_(x))
    drawing = best(lambda: torch.randn(2**20, generator=generator))
    return 2 * 2048**3 / products, 2 * x.numel() * 4 / copying, 2**20 / drawing


class Geometry:
    """Floating-point operations and bytes of forward passes over the model, no padding."""

    def __init__(self, model, adapter=0):
        config = model.config
        self.layers, self.width = config.num_hidden_layers, config.hidden_size
        head_size = config.hidden_size // config.num_attention_heads
        self.slot = 2 * config.num_hidden_layers * config.num_key_value_heads * head_size * 4  # bytes a position
        head = config.vocab_size * config.hidden_size
        self.weights, self.head = sum(p.numel() for p in model.parameters()) - head, head
        self.adapter = adapter

    def flops(self, positions, attended, scored):
        """positions: computed; attended: pairs of positions; scored: through lm_head"""
        products = 2 * (self.weights + self.adapter) * positions + 2 * self.head * scored
        return products + 4 * self.layers * self.width * attended

    def decode_bytes(self, prompts, lengths):
        """lengths: tokens of each row; all weights once a step, each row's cache once a token."""
        cache = sum(n * (p + n / 2) for p, n in zip(prompts, lengths, strict=True)) * self.slot
        return max(lengths) * (self.weights + self.head) * 4 + cache


def report(name, function, machine, rows, flops=0, bytes_read=0, drawn=0):
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    middle, needs = statistics.median(seconds), (flops, bytes_read, drawn)
    floor = max(need / rate for need, rate in zip(needs, machine, strict=True))
    floors = f"{floor:.3f} | {middle / floor:.1f}" if floor else "| "
    cells = [
        f"{middle:.3f} ({min(seconds):.3f} to {max(seconds):.3f})",
        f"{flops / 1e9:.1f}",
        f"{bytes_read / 1e9:.2f}",
    ]
    parts = [f"{share:.0%}" for share in shares(function).values()]
    rows.append(f"| {name} | {' | '.join([*cells, floors, *parts])} |")


def main():
    machine, rows = hardware(), []
    tokenizer = load_tokenizer(str(ROOT / "tiny_model"))
    items = list(MathExprDataset("train"))
    prompts = encode_prompts(tokenizer, [item["prompt"] for item in items], GRPOConfig().system_prompt)
    pad = tokenizer.pad_token_id

    # GRPO
    config = GRPOConfig(model=str(ROOT / "tiny_model"))
    P, G, T = config.prompts_per_step, config.group_size, config.max_new_tokens
    torch.manual_seed(0)
    model = load_model(config.model, "float32", "cpu")
    once, geometry = Geometry(model), Geometry(model)  # sampled from merged, without an adapter apart
    policy = make_policy(model, config.lora, False)
    geometry.adapter = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    stop = stop_ids(model, tokenizer)
    uniforms = torch.rand(P * G, T)

    def rollout():
        with merged_adapter(policy):
            return generate(policy, prompts[:P], T, stop, pad, num_samples=G, uniforms=uniforms)

    completions = rollout()
    lengths = completions.mask.sum(1)
    lists = [prompt for prompt in prompts[:P] for _ in range(G)]
    widths, tokens = list(map(len, lists)), lengths.tolist()
    in_prompts = sum(map(len, prompts[:P]))
    pairs = sum(n * (p + n / 2) for p, n in zip(widths, tokens, strict=True))
    in_pairs = sum(len(p) ** 2 / 2 for p in prompts[:P])
    needed = once.flops(in_prompts + sum(tokens) - P * G, in_pairs + pairs, sum(tokens))
    report("GRPO rollout", rollout, machine, rows, needed, once.decode_bytes(widths, tokens))

    row_items = [item for item in items[:P] for _ in range(G)]
    report(
        "GRPO reward",
        lambda: score_completions(config.rewards, completions, tokenizer, row_items),
        machine,
        rows,
    )
    weights, advantages = row_weights(lengths.float(), "token", T), torch.randn(P * G)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=0.0)

    def update():
        budget = config.micro_batch_tokens
        batches = make_micro_batches(lists, completions, advantages, weights, budget, pad)
        add_gradients(policy, batches, HalvingSize("", budget), config, None, contextlib.nullcontext)
        optimizer.step()
        optimizer.zero_grad()

    forward = geometry.flops(in_prompts + sum(tokens), in_pairs + pairs, sum(tokens))
    # Backward: the gradients of all inputs, as much as forward, and of attention's second operands, all of which depend
    # on what is trained, as much again; those of weights for the adapter alone.
    attention = geometry.flops(0, in_pairs + pairs, 0)
    needed = 2 * forward + attention + 2 * geometry.adapter * (in_prompts + sum(tokens))
    report("GRPO update", update, machine, rows, needed)

    # ES
    config = ESConfig(model=str(ROOT / "tiny_model"))
    N, P = config.population_size, config.prompts_per_iteration
    model = load_model(config.model, "float32", "cpu").requires_grad_(False)
    parameters = dict(model.named_parameters())
    master = {name: p.clone() for name, p in parameters.items()}
    shapes, device = noise_shapes(parameters, "low_rank", 1), torch.device("cpu")

    def population():
        generators = noise_generators(0, 0, range(N), N, device)
        scales = torch.full((N,), config.noise_scale)
        with Population(model, shapes, generators, scales, P) as on_rows:
            return generate(model, prompts[:P] * N, T, stop, pad, batch_size=N * P, on_rows=on_rows, block_size=P)

    def es_update():
        update_master(master, shapes, noise_generators(0, 0, range(N), N, device), [1.0, -1.0] * (N // 2), 0.0, False)
        write_weights(model, master)

    completions = population()
    lists, tokens = prompts[:P] * N, completions.mask.sum(1).tolist()
    widths = list(map(len, lists))
    pairs = sum(n * (p + n / 2) + p**2 / 2 for p, n in zip(widths, tokens, strict=True))
    needed = once.flops(sum(widths) + sum(tokens) - N * P, pairs, sum(tokens))
    report("ES generation", population, machine, rows, needed, once.decode_bytes(widths, tokens))
    row_items = items[:P] * N
    report(
        "ES reward",
        lambda: score_completions(config.rewards, completions, tokenizer, row_items),
        machine,
        rows,
    )
    size = sum(p.numel() for p in master.values())
    drawn = N * sum(math.prod(shape) for shape in shapes.values())
    report("ES update", es_update, machine, rows, 2 * N * size, 4 * 3 * size, drawn)

    print(f"{torch.get_num_threads()} threads of {platform.machine()}, torch {torch.__version__}, ", end="")
    print(f"transformers {transformers.__version__}: fp32 products {machine[0] / 1e9:.0f} GFLOP/s, ", end="")
    print(f"copying {machine[1] / 1e9:.0f} GB/s, drawing {machine[2] / 1e6:.0f} million normal numbers/s\n")
    kinds = " | ".join([*KINDS, "other operations", "around"])
    print(f"| part | seconds, median (range) of {ROUNDS} | GFLOP | GB | floor, s | x floor | {kinds} |")
    print(f"|---|---|---|---|---|---|{'---|' * (len(KINDS) + 2)}")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
