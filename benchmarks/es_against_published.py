"""ES as it is here against the algorithm as it was published, on the embedded model.

    python benchmarks/es_against_published.py            # seconds per iteration, what they go to, memory
    python benchmarks/es_against_published.py --curves   # and how the accuracy rises with time

1. Seconds per iteration at 32 members x 16 prompts. The published algorithm is written here as
   countdown/es_fine-tuning_countdown.py of github.com/VsonicV/es-fine-tuning-paper does it: add noise to the weights in
   place, `model.generate` over all prompts in one batch, subtract the noise, and after the last member update in place.
   Ours are runs of es_train.py: `low_rank`, and `gaussian`, which has the same noise distribution as the published one.
   They take turns, each from the same weights, on the same prompts and rewards. Rewards count on both sides; loading,
   encoding, logging and evaluation on neither.
2. The share of a `low_rank` iteration that is not generation, by its own log.
3. Peak memory of one `low_rank` generation over that of a plain batch with as many rows, each in a process of its own.
4. With --curves: held-out accuracy against training time, evaluation left out.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import es_train  # noqa: E402
from reward import score  # noqa: E402
from utils import (  # noqa: E402
    draw_indices,
    encode_prompts,
    evaluate,
    generate,
    load_config,
    load_model,
    load_problems,
    load_tokenizer,
    make_accelerator,
    stop_ids,
)

DEFAULTS = ROOT / "es_config.yml"


def default_config(*overrides):
    return load_config(es_train.ESConfig, DEFAULTS, [f"model={ROOT / 'tiny_model'}", "device=cpu", *overrides])


class Published:
    """Algorithm 2 of arXiv:2509.24372 as its authors' code has it, noise that repeats across layers and all."""

    def __init__(self, config):
        self.config = config
        self.model = load_model(config.model, "float32", "cpu").requires_grad_(False)
        self.tokenizer = load_tokenizer(config.model)
        self.items, self.test_items = load_problems(config, 1)
        self.prompts = encode_prompts(self.tokenizer, [item["prompt"] for item in self.items], config.system_prompt)
        self.rng = np.random.RandomState(config.seed)

    def add_noise(self, seed, scale):
        for parameter in self.model.parameters():
            generator = torch.Generator().manual_seed(seed)
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))

    def iterate(self, iteration):
        """One iteration; returns the number of tokens generated, up to end tokens."""
        config, stop = self.config, torch.tensor(stop_ids(self.model, self.tokenizer))
        count = config.prompts_per_iteration
        indices = draw_indices(len(self.items), iteration * count, count, config.seed)
        items = [self.items[i] for i in indices]
        batch = self.tokenizer.pad(
            {"input_ids": [self.prompts[i] for i in indices]}, padding_side="left", return_tensors="pt"
        )
        length = batch["input_ids"].shape[1]
        seeds, rewards, num_tokens = self.rng.randint(0, 2**30, size=config.population_size).tolist(), [], 0
        for seed in seeds:
            self.add_noise(seed, config.noise_scale)
            with torch.inference_mode():
                tokens = self.model.generate(**batch, max_new_tokens=config.max_new_tokens, do_sample=False)[:, length:]
            texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            rewards.append(statistics.fmean(row["reward"] for row in score(config.rewards, texts, items)))
            ended = torch.isin(tokens, stop)
            num_tokens += int(torch.where(ended.any(1), ended.int().argmax(1) + 1, tokens.shape[1]).sum())
            self.add_noise(seed, -config.noise_scale)
        rewards = np.array(rewards, dtype=np.float32)
        z = (rewards - rewards.mean()) / (rewards.std() + 1e-8)
        for parameter in self.model.parameters():
            update = torch.zeros_like(parameter)
            for seed, z_n in zip(seeds, z, strict=True):
                generator = torch.Generator().manual_seed(seed)
                update.add_(torch.randn(parameter.shape, generator=generator) * float(z_n))
            parameter.add_(config.learning_rate * update / config.population_size)
        return num_tokens

    def accuracy(self):
        prompts = encode_prompts(
            self.tokenizer, [item["prompt"] for item in self.test_items], self.config.system_prompt
        )
        accelerator = make_accelerator("cpu", "float32")
        tokens = self.config.max_new_tokens
        return evaluate(self.model, self.tokenizer, self.test_items, prompts, tokens, 512, accelerator)["strict"]


def run_ours(*overrides):
    """The scalars of a run of es_train.py in this process: {tag: {step: value}}."""
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nothing:
        with contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
            es_train.main(default_config(f"log_dir={folder}", "run_name=run", *overrides))
        events = EventAccumulator(str(Path(folder) / "run"))
        events.Reload()
        return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def seconds_per_iteration(rounds):
    """{way: seconds of iterations}, {way: their tokens}, and the median shares of low_rank's phases.

    In each round all ways make two iterations from the same weights, of which the second is timed.
    """
    seconds, tokens = ({"published": [], "gaussian": [], "low_rank": []} for _ in range(2))
    shares = []
    for seed in range(rounds):
        for way in ("low_rank", "gaussian"):
            log = run_ours("num_iterations=2", "eval_size=8", f"seed={seed}", f"perturbation={way}")
            seconds[way].append(log["time/step"][2])
            tokens[way].append(log["progress/generated_tokens"][2] - log["progress/generated_tokens"][1])
            if way == "low_rank":
                shares.append({phase: log[f"time/{phase}"][2] / log["time/step"][2] for phase in PHASES})
        published = Published(default_config(f"seed={seed}"))
        published.iterate(0)
        start = time.perf_counter()
        tokens["published"].append(published.iterate(1))
        seconds["published"].append(time.perf_counter() - start)
    return seconds, tokens, {phase: statistics.median(share[phase] for share in shares) for phase in PHASES}


PHASES = ("rollout", "perturb", "update", "reward")


def generation_memory(way):
    """Bytes of resident memory that generating for 32 members x 16 prompts adds at its peak. Linux only."""
    config = default_config()
    N, P = config.population_size, config.prompts_per_iteration
    model, tokenizer = load_model(config.model, "float32", "cpu").requires_grad_(False), load_tokenizer(config.model)
    train_set, _ = load_problems(config, 1)
    prompts = encode_prompts(tokenizer, [train_set[i]["prompt"] for i in range(P)], config.system_prompt)
    settings = (config.max_new_tokens, stop_ids(model, tokenizer), tokenizer.pad_token_id)
    generate(model, prompts[:2], *settings)  # libraries and threads are there
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far, which is that of loading or the parent's
    before = resident_bytes("VmRSS")
    if way == "population":
        shapes = es_train.noise_shapes(dict(model.named_parameters()), "low_rank", config.rank)
        generators = es_train.noise_generators(0, 0, range(N), N, "cpu")
        with es_train.Population(model, shapes, generators, torch.full((N,), config.noise_scale), P) as on_rows:
            generate(model, prompts * N, *settings, batch_size=N * P, on_rows=on_rows, block_size=P)
    else:
        generate(model, prompts * N, *settings, batch_size=N * P)
    return resident_bytes("VmHWM") - before


def resident_bytes(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def curves(iterations, every):
    """(seconds of training, held-out accuracy) of each way, evaluation left out of the clock."""
    points = {}
    for way in ("low_rank", "gaussian"):
        log = run_ours(f"num_iterations={iterations}", f"eval_every={every}", f"perturbation={way}")
        accuracy, seconds = log["eval/strict_accuracy"], {0: 0.0, **log["progress/seconds"]}
        points[way] = [(seconds[step], accuracy[step]) for step in sorted(accuracy)]
    published, clock = Published(default_config()), 0.0
    points["published"] = [(0.0, published.accuracy())]
    for iteration in range(iterations):
        start = time.perf_counter()
        published.iterate(iteration)
        clock += time.perf_counter() - start
        if (iteration + 1) % every == 0:
            points["published"].append((clock, published.accuracy()))
    return points


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="timed iterations of each way (%(default)s)")
    parser.add_argument("--curves", action="store_true", help="also train with each way")
    parser.add_argument("--memory-of", choices=["population", "plain"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    if arguments.memory_of:
        print(generation_memory(arguments.memory_of))
        return

    print(f"{torch.get_num_threads()} threads of {platform.machine()}, torch {torch.__version__}, ", end="")
    print(f"transformers {transformers.__version__}\n")
    seconds, tokens, shares = seconds_per_iteration(arguments.rounds)
    print("| 32 members x 16 prompts | seconds an iteration, median (range) | published / this | tokens |")
    print("|---|---|---|---|")
    for way, values in seconds.items():
        gain = statistics.median(p / v for p, v in zip(seconds["published"], values, strict=True))
        median, low, high = statistics.median(values), min(values), max(values)
        print(
            f"| {way} | {median:.2f} ({low:.2f} to {high:.2f}) | {gain:.1f}x | {statistics.median(tokens[way]):,.0f} |"
        )
    print("\nlow_rank, share of an iteration: ", end="")
    print(", ".join(f"{phase} {share:.1%}" for phase, share in shares.items()))

    memory = {}
    for way in ("population", "plain"):
        command = [sys.executable, __file__, "--memory-of", way]
        runs = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(3)]
        memory[way] = statistics.median(json.loads(run) for run in runs)
    print(f"\npeak memory of generation: {memory['population'] / 2**20:.0f} MiB for the population, ", end="")
    print(f"{memory['plain'] / 2**20:.0f} MiB for a plain batch: {memory['population'] / memory['plain']:.2f}x")

    if arguments.curves:
        print("\n| way | strict accuracy (after seconds of training) |\n|---|---|")
        for way, points in curves(iterations=30, every=5).items():
            print(f"| {way} | {', '.join(f'{value:.1%} ({clock:.0f} s)' for clock, value in points)} |", flush=True)


if __name__ == "__main__":
    main()
