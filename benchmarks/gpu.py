"""Measure a GPU: decoding, updates and ES at real sizes, against hardware limits and plain implementations.

    python benchmarks/gpu.py --model FOLDER              # at most 8 minutes on an 80 GB GPU; writes results/gpu_NAME.md
    python benchmarks/gpu.py --tiny --model tiny_model   # a quick try on a CPU

Models of 0.5B and 1.5B have the geometry of Qwen2.5 and random bf16 weights with a standard deviation of 0.05: with
less, greedy decoding repeats one token. No completion ends early, so that all methods decode the same number of tokens.

- Decoding: a step takes (time for all tokens - time for one token) / (tokens - 1). Its floor is the bytes of weights,
  keys and values over the measured copy rate. "graphs" is generation.generate, "eager" the same without CUDA graphs,
  "generate" model.generate. All use the adapter and autocast. Captures: CUDA graphs of the first rollout, of others.
- Update: one optimizer step on all completions. Its FLOP/s are compared with the measured rate of bf16 products. They
  count 4 FLOPs per weight and position (forward pass, and backward pass without the gradients of frozen weights) plus
  attention. Each prompt counts once, and lm_head counts for completion tokens only.
- ES: one step without scoring. "member after member" adds noise in place, calls model.generate and subtracts the noise:
  the time of one member, times the number of members.
- A GRPO step with the model in FOLDER, 32 x 16 completions of integer expressions: seconds of its phases.
"""

import argparse
import collections
import functools
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import es_train
import grpo_train
from generation import DecodeSettings, inner_model, shares_prompts
from utils import Problem, Setup, load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
DIMENSIONS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
SIZES = {"0.5B": (896, 4864, 24, 14, 151_936), "1.5B": (1536, 8960, 28, 12, 151_936), "tiny": (64, 128, 2, 4, 1_000)}
LINES = []  # of the report


def say(line=""):
    print(line, flush=True)
    LINES.append(line)


def print_table(columns, rows):
    say(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        say(f"| {' | '.join(row)} |")


def make_model(size, device):
    sizes = dict(zip(DIMENSIONS, SIZES[size], strict=True))
    config = Qwen2Config(**sizes, num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.05)
    torch.manual_seed(0)
    return Qwen2ForCausalLM(config).to(torch.bfloat16).to(device).eval().requires_grad_(False)


def make_problems(count, vocabulary, longest):
    """Return random prompts of half to all of `longest` tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(longest // 2, longest + 1, (count,), generator=generator)
    return [Problem({}, torch.randint(vocabulary, (int(n),), generator=generator).tolist()) for n in lengths]


def pad(problems, device):
    """Return the inputs of model.generate for these prompts."""
    rows, tokenizer = {"input_ids": [problem.ids for problem in problems]}, load_tokenizer(str(ROOT / "tiny_model"))
    return tokenizer.pad(rows, padding_side="left", return_tensors="pt").to(device)


def measure(ways, rounds):
    """Return {way: (seconds of each round, peak GiB on a GPU)}. Ways alternate, after one warmup round."""
    on_gpu, seconds, peaks = torch.cuda.is_available(), {way: [] for way in ways}, dict.fromkeys(ways, float("nan"))
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    for _ in range(rounds + 1):
        for way, function in ways.items():
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            wait()
            start = time.perf_counter()
            function()
            wait()
            seconds[way].append(time.perf_counter() - start)
            if on_gpu:
                peaks[way] = torch.cuda.max_memory_allocated() / 2**30
    return {way: (seconds[way][1:], peaks[way]) for way in ways}


def median(values):
    return f"{statistics.median(values):,.4g} ({min(values):,.4g} to {max(values):,.4g})"


def hardware(device):
    """Measure FLOP/s of bf16 matrix products and bytes/s of copying, reads plus writes."""
    n, size = (8192, 2**30) if device.type == "cuda" else (1024, 2**27)
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    x, y = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    times = measure({"product": lambda: a @ b, "copy": lambda: y.copy_(x)}, rounds=10)
    return 2 * n**3 / min(times["product"][0]), 2 * size / min(times["copy"][0])


def measure_es(model, problems, arguments, accelerator):
    N, P, device = arguments.members, len(problems), accelerator.device
    config = es_train.ESConfig(population_size=N, prompts_per_step=P, noise_scale=0.001)
    parameters = dict(model.named_parameters())
    master = {name: parameter.float() for name, parameter in parameters.items()}
    shapes = es_train.noise_shapes(parameters, "low_rank", config.rank)
    settings = DecodeSettings(arguments.new_tokens, [], batch_size=N * P)
    setup = Setup(accelerator, model, None, problems, problems, settings)

    def low_rank():
        es_train.rollout(setup, master, shapes, problems, range(N), config.noise_scale, 0, config)
        es_train.update(master, shapes, 0, [(-1.0) ** n for n in range(N)], 0.0, config)
        es_train.write_weights(model, master)

    inputs, how = pad(problems, device), {"do_sample": False, "max_new_tokens": arguments.new_tokens, "pad_token_id": 0}

    def add_noise(scale):
        generator = torch.Generator(device).manual_seed(0)
        for parameter in parameters.values():
            noise = torch.randn(parameter.shape, generator=generator, device=device, dtype=parameter.dtype)
            parameter.add_(noise, alpha=scale)

    def one_member():
        add_noise(config.noise_scale)
        model.generate(**inputs, generation_config=GenerationConfig(**how))
        add_noise(-config.noise_scale)

    times = measure({"low_rank, one batch": low_rank, "member after member": one_member}, arguments.rounds)
    (together, _), (one, peak) = times.values()
    times["member after member"] = [N * seconds for seconds in one], peak
    columns = [f"ES step, {N} members x {P} prompts x {arguments.new_tokens} tokens", "seconds", "peak GiB"]
    print_table(columns, [[way, median(seconds), f"{peak:.1f}"] for way, (seconds, peak) in times.items()])
    say(f"\nlow_rank is {N * statistics.median(one) / statistics.median(together):.1f} times as fast")


def measure_rollout(policy, problems, num_samples, arguments, accelerator, rate):
    """Return the completions of "graphs"."""
    G, T, B = num_samples, arguments.new_tokens, len(problems) * num_samples
    config, inputs = policy.config, pad(problems, accelerator.device)
    uniforms = torch.rand(len(problems), G, T, generator=torch.Generator().manual_seed(0))
    sampling = {"do_sample": True, "top_k": 0, "top_p": 1.0, "num_return_sequences": G, "pad_token_id": 0}
    completions, captures = {}, []
    kept = {way: DecodeSettings(T, [], batch_size=B, cuda_graphs=way == "graphs") for way in ("graphs", "eager")}

    def ours(way, tokens):
        settings = kept[way] if tokens == T else DecodeSettings(tokens, [], batch_size=B)
        before = len(settings.memory.graphs)
        completions[way] = grpo_train.rollout(policy, problems, uniforms[..., :tokens], settings, accelerator)
        if way == "graphs" and tokens == T:
            captures.append(len(settings.memory.graphs) - before)

    def theirs(way, tokens):
        with accelerator.autocast():
            out = policy.generate(**inputs, generation_config=GenerationConfig(**sampling, max_new_tokens=tokens))
        assert out.shape[1] == inputs["input_ids"].shape[1] + tokens, "a completion ended early"

    functions = {"graphs": ours, "eager": ours, "generate": theirs}
    both = ({way: functools.partial(function, way, n) for way, function in functions.items()} for n in (1, T))
    first, times = (measure(ways, arguments.rounds) for ways in both)
    head_size, mean = config.hidden_size // config.num_attention_heads, inputs["attention_mask"].sum(1).float().mean()
    position_bytes = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * head_size  # keys, values; bf16
    weight_bytes = sum(p.numel() * p.element_size() for p in policy.parameters())
    floor = (weight_bytes + B * (float(mean) + T / 2) * position_bytes) / rate  # at the middle step
    rows = []
    for way, (seconds, peak) in times.items():
        middle = statistics.median(seconds)
        step = (middle - statistics.median(first[way][0])) / (T - 1)
        cells = f"{B * T / middle:,.0f}", f"{step * 1e3:.2f}", f"{step / floor:.1f}", f"{peak:.1f}"
        rows.append([way, median(seconds), *cells])
    columns = [f"rollout, {B} rows x {T} tokens", "seconds", "tokens/s", "ms per step", "step / floor", "peak GiB"]
    print_table(columns, rows)
    same = (completions["graphs"].tokens == completions["eager"].tokens).float().mean()
    say(f"\nFloor of a decode step: {floor * 1e3:.2f} ms. Captures: {captures[0]}, then {captures[1]}.")
    say(f"graphs and eager have {same:.1%} of tokens in common")
    return completions["graphs"]


def measure_update(policy, problems, num_samples, completions, arguments, accelerator, rate):
    """Time one optimizer step on all completions: with padding, with gradient checkpointing, with flash attention."""
    config, network, C = policy.config, inner_model(policy), arguments.new_tokens
    prompts = [problem.ids for problem in problems]
    rows = [prompt for prompt in prompts for _ in range(num_samples)]
    lengths = torch.full((len(rows),), float(C), device=accelerator.device)
    weights, advantages = grpo_train.token_weights(lengths, "token", C), torch.randn_like(lengths)
    positions, mean = sum(len(problem.ids) for problem in problems) + len(rows) * C, statistics.mean(map(len, rows))
    head = config.vocab_size * config.hidden_size
    layers = sum(p.numel() for p in network.parameters() if not p.requires_grad) - head
    pairs = len(rows) * C * (mean + C / 2) + len(problems) * mean**2 / 2  # (query, key)
    attention = 4 * config.hidden_size * config.num_hidden_layers * pairs
    flops = 4 * (layers * positions + head * len(rows) * C) + 3 * attention  # backward: gradients of both operands
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=0.0)

    def step(attention, checkpointing):
        network.config._attn_implementation = attention
        grpo_train.checkpoint_layers(policy) if checkpointing else None
        can_share, size = shares_prompts(network, max(map(len, prompts)) + C), arguments.micro_batch
        batches = grpo_train.make_micro_batches(prompts, completions, advantages, weights, size, can_share)
        how, values = grpo_train.GRPOConfig(), collections.defaultdict(list)
        grpo_train.update(policy, optimizer, batches, how, None, accelerator, values)
        network.gradient_checkpointing_disable()
        policy.eval()

    ways = {"sdpa": ("sdpa", False), "sdpa, gradient checkpointing": ("sdpa", True)}
    ways |= {"flash": ("flash", False)} if torch.cuda.is_available() else {}
    times = measure({way: functools.partial(step, *how) for way, how in ways.items()}, arguments.rounds)
    table = []
    for way, (seconds, peak) in times.items():
        middle = statistics.median(seconds)
        cells = f"{len(rows) * C / middle:,.0f}", f"{flops / middle / rate:.0%}", f"{peak:.1f}"
        table.append([way, median(seconds), *cells])
    columns = ["seconds", "completion tokens/s", "share of the matmul rate", "peak GiB"]
    print_table([f"update of {positions:,} positions", *columns], table)


def measure_training(folder, arguments):
    """Run a few GRPO steps and tabulate the seconds of their phases."""
    with tempfile.TemporaryDirectory() as logs:
        keys = [f"model={folder}", f"log_dir={logs}", "run_name=run", "num_steps=6", "eval_size=64", "eval_every=99"]
        keys += ["dtype=bfloat16", "dataset_args={kinds: [evaluate], max_operators: 2}", "max_new_tokens=48"]
        keys += [f"prompts_per_step={arguments.prompts}", f"group_size={arguments.samples}"]
        subprocess.run([sys.executable, "grpo_train.py", *keys], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        events = EventAccumulator(f"{logs}/run").Reload()
        phases = {tag: [e.value for e in events.Scalars(f"time/{tag}")][2:] for tag in ("step", "rollout", "update")}
    columns = [f"GRPO step of {Path(folder).name}, {arguments.prompts} x {arguments.samples} completions", "seconds"]
    print_table(columns, [[name, median(seconds)] for name, seconds in phases.items()])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a model, for whole GRPO steps")
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a quick try on a CPU")
    arguments = parser.parse_args()
    names = "sizes prompts samples members new_tokens longest rounds micro_batch"  # 8,192 positions of 1.5B take 32 GB
    values = (["tiny"], 2, 4, 2, 4, 12, 1, 512) if arguments.tiny else (["0.5B", "1.5B"], 32, 16, 32, 256, 128, 2, 8192)
    vars(arguments).update(zip(names.split(), values, strict=True))
    accelerator = Accelerator(mixed_precision="bf16", cpu=not torch.cuda.is_available())
    products, copying = hardware(accelerator.device)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    say(f"# {name}\n\n`python benchmarks/gpu.py {' '.join(sys.argv[1:])}`, {time.strftime('%d %B %Y')}\n")
    rates = f"bf16 matmul {products / 1e12:.3g} TFLOP/s, copy {copying / 1e9:,.0f} GB/s"
    say(f"torch {torch.__version__}, transformers {transformers.__version__}; {rates}")
    for size in arguments.sizes:
        model = make_model(size, accelerator.device)
        say(f"\n## {size} geometry, {sum(p.numel() for p in model.parameters()):,} parameters")
        problems = make_problems(arguments.prompts, model.config.vocab_size, arguments.longest)
        with torch.no_grad():
            measure_es(model, problems, arguments, accelerator)
        policy = grpo_train.make_policy(model, grpo_train.LoRA(rank=32, alpha=64), False)
        for num_samples in (arguments.samples // 8 or 1, arguments.samples):
            completions = measure_rollout(policy, problems, num_samples, arguments, accelerator, copying)
        measure_update(policy, problems, num_samples, completions, arguments, accelerator, products)
        del model, policy, completions
        torch.cuda.empty_cache()
    measure_training(arguments.model, arguments)
    if not arguments.tiny:
        file = f"gpu_{re.sub(r'[^A-Za-z0-9]+', '_', name)}.md"
        (ROOT / "results" / file).write_text("\n".join(LINES) + "\n")


if __name__ == "__main__":
    main()
