"""Compare ES with the published algorithm.

    python benchmarks/es_against_published.py                             # seconds per step, memory
    python benchmarks/es_against_published.py --curves                    # also accuracy over training time
    python benchmarks/es_against_published.py --rounds 1 --curves 2       # a quick try
    python benchmarks/es_against_published.py --config recipes/es_math_expr_smollm2.yml model=FOLDER \
        population_size=16 prompts_per_step=8 population_batch=16    # a real model

`Published` follows countdown/es_fine-tuning_countdown.py of github.com/VsonicV/es-fine-tuning-paper. For each member,
it adds noise to the weights in place, calls `model.generate` on all prompts in one batch, and subtracts the noise. Then
it updates the weights in place. es_train.py runs with `low_rank` and with `gaussian` (the published noise).

1. Seconds per step, by default with 32 members x 16 prompts of the embedded model. In each round, each method makes two
   steps from the same weights with the same reward functions. The second step is timed. The time includes scoring, but
   not loading, encoding, logging and evaluation.
2. The share of each phase in a `low_rank` step, from the log of es_train.py.
3. Peak memory of one `low_rank` generation and of a plain batch with as many rows, each in its own process.
4. With --curves: held-out accuracy over training time, evaluation excluded.
"""

import argparse
import contextlib
import io
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from grpo_against_trl import resident_mib
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import es_train
import utils
from generation import generate
from reward import score

ROOT = Path(__file__).resolve().parent.parent
WAYS, PHASES = ("low_rank", "gaussian", "published"), ("rollout", "update", "reward")


class Published:
    """Algorithm 2 of arXiv:2509.24372 as its authors implement it: the noise stream restarts at every tensor."""

    def __init__(self, config):
        self.config, self.setup = config, utils.set_up(config, config.dtype, batch_size=512)
        self.model, self.rng = self.setup.model.requires_grad_(False), np.random.RandomState(config.seed)

    def noise(self, parameter, seed):
        return torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))

    def add_noise(self, seed, scale):
        for parameter in self.model.parameters():
            parameter.add_(scale * self.noise(parameter, seed))

    def take_step(self, step):
        """Make one step. Return its seconds and the number of generated tokens."""
        start = time.perf_counter()
        config, tokenizer, P = self.config, self.setup.tokenizer, self.config.prompts_per_step
        problems = utils.draw_problems(self.setup.train_set, step * P, P, config.seed)
        prompts = {"input_ids": [problem.ids for problem in problems]}
        inputs = tokenizer.pad(prompts, padding_side="left", return_tensors="pt")
        seeds, rewards, num_tokens = self.rng.randint(0, 2**30, size=config.population_size).tolist(), [], 0
        for seed in seeds:
            self.add_noise(seed, config.noise_scale)
            tokens = self.model.generate(**inputs, max_new_tokens=config.max_new_tokens, do_sample=False)
            tokens = tokens[:, inputs["input_ids"].shape[1] :]
            texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
            rows = score(config.rewards, texts, [problem.item for problem in problems])
            rewards.append(statistics.fmean(row["reward"] for row in rows))
            ended = torch.isin(tokens, torch.tensor(self.setup.settings.stop_ids))
            num_tokens += int((ended.cumsum(1) <= ended).sum())  # up to the first end token
            self.add_noise(seed, -config.noise_scale)
        rewards = np.array(rewards, dtype=np.float32)
        z = (rewards - rewards.mean()) / (rewards.std() + 1e-8)
        for parameter in self.model.parameters():
            update = torch.zeros_like(parameter)
            for seed, z_n in zip(seeds, z.tolist(), strict=True):
                update.add_(self.noise(parameter, seed) * z_n)
            parameter.add_(config.learning_rate * update / config.population_size)
        return time.perf_counter() - start, num_tokens


def run_here(config, **more):
    """Run es_train.py in this process and return its scalars, {tag: {step: value}}."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        es_train.main(config.model_copy(update={"log_dir": folder, "run_name": "run", **more}))
        events = EventAccumulator(str(Path(folder) / "run")).Reload()
        return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def time_steps(config, rounds):
    """Return {way: [(seconds, tokens) of each timed step]} and the logs of low_rank."""
    steps, logs = {way: [] for way in WAYS}, {way: [] for way in WAYS}
    for seed in range(rounds):
        for way in ("low_rank", "gaussian"):
            log = run_here(config, num_steps=2, eval_size=8, seed=seed, perturbation=way)
            tokens = log["progress/generated_tokens"]
            steps[way].append((log["time/step"][2], tokens[2] - tokens[1]))
            logs[way].append(log)
        published = Published(config.model_copy(update={"seed": seed, "eval_size": 8}))
        steps["published"].append([published.take_step(step) for step in (0, 1)][1])
    return steps, logs["low_rank"]


def generation_memory(config, way):
    """Peak resident memory in MiB that generation for all members adds."""
    N, P = config.population_size, config.prompts_per_step
    setup = utils.set_up(config, config.dtype, batch_size=N * P)
    parameters = dict(setup.model.requires_grad_(False).named_parameters())
    shapes, problems = es_train.noise_shapes(parameters, "low_rank", config.rank), setup.train_set[:P]
    prompts = [problem.ids for problem in problems]
    generate(setup.model, prompts[:2], setup.settings)  # load libraries and start threads
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident_mib("VmRSS")
    if way == "population":
        es_train.rollout(setup, parameters, shapes, problems, range(N), config.noise_scale, 0, config)
    else:
        generate(setup.model, prompts * N, setup.settings)
    return resident_mib("VmHWM") - before


def curves(config, num_steps, every):
    """Return {way: [(seconds of training, held-out accuracy), ...]}."""
    points = {}
    for way in ("low_rank", "gaussian"):
        log = run_here(config, num_steps=num_steps, eval_every=every, perturbation=way)
        seconds = {0: 0.0, **log["progress/seconds"]}
        points[way] = [(seconds[step], accuracy) for step, accuracy in log["eval/strict_accuracy"].items()]
    published, clock = Published(config), 0.0
    points["published"] = [(0.0, utils.evaluate(published.setup)[0]["strict_accuracy"])]
    for step in range(1, num_steps + 1):
        clock += published.take_step(step - 1)[0]
        if step % every == 0:
            points["published"].append((clock, utils.evaluate(published.setup)[0]["strict_accuracy"]))
    return points


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="timed steps per method (%(default)s)")
    parser.add_argument("--curves", type=int, nargs="?", const=30, metavar="STEPS", help="also train (%(const)s steps)")
    parser.add_argument("--config", default=str(ROOT / "es_config.yml"), help="YAML file (%(default)s)")
    parser.add_argument("--memory-of", choices=["population", "plain"], help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config keys to override")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    config = utils.load_config(es_train.ESConfig, arguments.config, [*arguments.overrides, "device=cpu"])
    model = ROOT / config.model if (ROOT / config.model).is_dir() else config.model
    config = config.model_copy(update={"model": str(model)})
    if arguments.memory_of:
        print(generation_memory(config, arguments.memory_of))
        return

    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, transformers {transformers.__version__}\n")
    steps, logs = time_steps(config, arguments.rounds)
    size = f"{config.population_size} members x {config.prompts_per_step} prompts"
    print(f"| {size} | seconds per step, median (range) | published / this | tokens |\n|---|---|---|---|")
    for way, values in steps.items():
        seconds, tokens = zip(*values, strict=True)
        gain = statistics.median(p / s for (p, _), s in zip(steps["published"], seconds, strict=True))
        cell = f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
        print(f"| {way} | {cell} | {gain:.1f} | {statistics.median(tokens):,.0f} |")
    shares = {p: statistics.median(log[f"time/{p}"][2] / log["time/step"][2] for log in logs) for p in PHASES}
    print(f"\nshares of a low_rank step: {', '.join(f'{phase} {share:.1%}' for phase, share in shares.items())}")

    memory = {}
    for way in ("population", "plain"):
        command = [sys.executable, __file__, "--memory-of", way, "--config", arguments.config, *arguments.overrides]
        runs = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(3)]
        memory[way] = statistics.median(map(float, runs))
    print(f"\npeak memory of generation: {memory['population']:.0f} MiB for the population, ", end="")
    print(f"{memory['plain']:.0f} MiB for a plain batch ({memory['population'] / memory['plain']:.2f}x)")

    if arguments.curves:
        print("\n| method | strict accuracy (after seconds of training) |\n|---|---|")
        for way, points in curves(config, arguments.curves, every=min(5, arguments.curves)).items():
            print(f"| {way} | {', '.join(f'{value:.1%} ({clock:.0f} s)' for clock, value in points)} |")


if __name__ == "__main__":
    main()
