"""GRPO and ES from the same base model on the same problems and rewards: accuracy over time and generated tokens.

    pip install matplotlib==3.11.2
    python benchmarks/grpo_and_es.py LOGS
    python benchmarks/grpo_and_es.py LOGS --steps 6 --seeds 1 --results /tmp        # a quick try

Run each script with its default config for 60 steps, and ES with `gaussian` noise for 40 steps, with three seeds each.
Runs go one at a time and evaluate every 5 steps. Complete runs in LOGS are reused; use a new folder after code changes.
Write grpo_and_es.png and grpo_and_es.md. Time is `progress/seconds`, which excludes startup and evaluation.
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch
import transformers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT, TARGET = Path(__file__).resolve().parent.parent, 0.9
WAYS = {  # script, maximum steps, overrides, color
    "GRPO": ("grpo_train.py", 60, "num_steps={}", "#4269d0"),
    "ES, low_rank": ("es_train.py", 60, "num_iterations={} perturbation=low_rank", "#d1495b"),
    "ES, gaussian": ("es_train.py", 40, "num_iterations={} perturbation=gaussian", "#3a7d44"),
}


def train(way, seed, num_steps, logs):
    """Run one method with one seed, unless `logs` has that run. Return its folder."""
    script, most_steps, overrides, _ = WAYS[way]
    folder = logs / f"{way.replace(', ', '-')}-{seed}"
    if not (folder / "model").exists():
        print(f"{way}, seed {seed}", flush=True)
        overrides = overrides.format(min(num_steps, most_steps)).split()
        overrides += [f"seed={seed}", "eval_every=5", f"log_dir={logs}", f"run_name={folder.name}"]
        subprocess.run([sys.executable, script, *overrides], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return folder


def read_curve(folder):
    """Return step, seconds, generated tokens and strict accuracy of each evaluation, as lists."""
    events = EventAccumulator(str(folder)).Reload()
    tags = ("eval/strict_accuracy", "progress/seconds", "progress/generated_tokens")
    accuracy, seconds, tokens = ({event.step: event.value for event in events.Scalars(tag)} for tag in tags)
    rows = [(step, seconds.get(step, 0.0), tokens.get(step, 0.0), y) for step, y in sorted(accuracy.items())]
    return dict(zip(("step", "seconds", "tokens", "accuracy"), map(list, zip(*rows, strict=True)), strict=True))


def cells(curves):
    """Yield the table cells for all runs of one method."""
    first = [next((i for i, y in enumerate(curve["accuracy"]) if y >= TARGET), None) for curve in curves]
    final = [curve["accuracy"][-1] for curve in curves]
    if None in first:
        yield from ["not reached"] * 3
    else:
        for axis, form in (("step", "{:.0f}"), ("seconds", "{:.0f} s"), ("tokens", "{:,.0f}")):
            values = [curve[axis][i] for curve, i in zip(curves, first, strict=True)]
            low, median, high = (form.format(x) for x in (min(values), statistics.median(values), max(values)))
            yield f"{median} ({low} to {high})"
    yield f"{statistics.mean(final):.1%} ({min(final):.1%} to {max(final):.1%})"
    later = [y for curve, i in zip(curves, first, strict=True) if i is not None for y in curve["accuracy"][i:]]
    yield f"{min(later):.1%}" if later else ""


def draw(curves, path):
    """Plot median and range over seeds. All runs of a method evaluate at the same steps."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    labels = {"seconds": f"seconds of training, {torch.get_num_threads()} threads", "tokens": "generated tokens"}
    for axis, (key, label) in zip(axes, labels.items(), strict=True):
        for way, runs in curves.items():
            x = [statistics.median(values) for values in zip(*(run[key] for run in runs), strict=True)]
            y = list(zip(*(run["accuracy"] for run in runs), strict=True))
            color = WAYS[way][-1]
            axis.plot(x, list(map(statistics.median, y)), color=color, label=way, marker="o", markersize=3)
            axis.fill_between(x, list(map(min, y)), list(map(max, y)), color=color, alpha=0.2, linewidth=0)
        axis.set_xlabel(label)
        axis.set_xscale("symlog", linthresh=5 if key == "seconds" else 5e4)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("strict accuracy, held-out problems")
    axes[0].yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
    axes[1].legend(loc="lower right")
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("logs", type=Path, help="folder for the runs")
    parser.add_argument("--steps", type=int, default=60, help="maximum steps per run (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs per method, with seeds 0, 1, ... (%(default)s)")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="output folder (%(default)s)")
    arguments = parser.parse_args()
    logs, seeds = arguments.logs.resolve(), range(arguments.seeds)
    curves = {way: [read_curve(train(way, seed, arguments.steps, logs)) for seed in seeds] for way in WAYS}
    matplotlib.use("Agg")
    draw(curves, arguments.results / "grpo_and_es.png")
    columns = f"steps to {TARGET:.0%} | training time | generated tokens | final, mean | minimum after {TARGET:.0%}"
    rows = [f"| {way} | {' | '.join(cells(runs))} |" for way, runs in curves.items()]
    table = "\n".join([f"| | {columns} |", "|---|---|---|---|---|---|", *rows])
    about = f"{torch.get_num_threads()} threads, torch {torch.__version__}, transformers {transformers.__version__}; "
    about += f"over {len(seeds)} seeds: median (range), mean (range), minimum"
    text = f"# GRPO and ES on the default task\n\n{__doc__.splitlines()[0]}\n\n{table}\n\n{about}\n"
    (arguments.results / "grpo_and_es.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
