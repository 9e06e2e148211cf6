"""GRPO and ES from the same base model on the same problems and rewards: accuracy against time and generated tokens.

    pip install matplotlib==3.11.2
    python benchmarks/grpo_and_es.py LOGS

Runs each script with its default config over three seeds, ES with both perturbations (gaussian for 40 iterations only),
one run at a time, evaluating every 5 steps; a run that LOGS holds already is not made again, so give it a new folder
after a change. Writes results/grpo_and_es.png and results/grpo_and_es.md. Time is that of training, as logged in
`progress/seconds`: without start-up and evaluation.
"""

import platform
import statistics
import subprocess
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch
import transformers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
RESULTS, SEEDS, TARGET = ROOT / "results", (0, 1, 2), 0.9
RUNS = {
    "GRPO": ["grpo_train.py", "num_steps=60"],
    "ES, low_rank": ["es_train.py", "num_iterations=60", "perturbation=low_rank"],
    "ES, gaussian": ["es_train.py", "num_iterations=40", "perturbation=gaussian"],
}
COLORS = {"GRPO": "#4269d0", "ES, low_rank": "#d1495b", "ES, gaussian": "#3a7d44"}


def train(logs):
    for name, (script, *overrides) in RUNS.items():
        for seed in SEEDS:
            folder = logs / f"{name.replace(', ', '-')}-{seed}"
            if not (folder / "model").exists():
                print(f"{name}, seed {seed}", flush=True)
                overrides_here = [
                    *overrides,
                    f"seed={seed}",
                    "eval_every=5",
                    f"log_dir={logs}",
                    f"run_name={folder.name}",
                ]
                subprocess.run(
                    [sys.executable, script, *overrides_here], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
                )


def curve(folder):
    """Steps, seconds, generated tokens and strict accuracy at each evaluation."""
    events = EventAccumulator(str(folder))
    events.Reload()
    accuracy, seconds, tokens = (
        {event.step: event.value for event in events.Scalars(tag)}
        for tag in ("eval/strict_accuracy", "progress/seconds", "progress/generated_tokens")
    )
    seconds[0] = tokens[0] = 0.0
    steps = sorted(accuracy)
    return {
        "step": steps,
        "seconds": [seconds[step] for step in steps],
        "tokens": [tokens[step] for step in steps],
        "accuracy": [accuracy[step] for step in steps],
    }


def first_reached(curve, axis):
    """The value on an axis at the first evaluation that reaches the target, None if there is none."""
    return next((x for x, y in zip(curve[axis], curve["accuracy"], strict=True) if y >= TARGET), None)


def cells(curves):
    reached = {axis: [first_reached(curve, axis) for curve in curves] for axis in ("step", "seconds", "tokens")}
    assert all(None not in values for values in reached.values()), "a run that never reached the target"
    final = [curve["accuracy"][-1] for curve in curves]
    held = min(
        y for c in curves for x, y in zip(c["step"], c["accuracy"], strict=True) if x >= first_reached(c, "step")
    )
    for axis, form in (("step", "{:.0f}"), ("seconds", "{:.0f} s"), ("tokens", "{:,.0f}")):
        values = sorted(reached[axis])
        low, median, high = (form.format(x) for x in (values[0], statistics.median(values), values[-1]))
        yield f"{median} ({low} to {high})"
    yield f"{statistics.mean(final):.1%} ({min(final):.1%} to {max(final):.1%})"
    yield f"{held:.1%}"


def table(curves):
    lines = [
        f"| | steps to {TARGET:.0%} | training time | tokens generated | at the end, mean | least after {TARGET:.0%} |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join(lines + [f"| {name} | {' | '.join(cells(runs))} |" for name, runs in curves.items()])


def draw(curves, path):
    matplotlib.use("Agg")
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    labels = {"seconds": f"seconds of training, {torch.get_num_threads()} threads", "tokens": "generated tokens"}
    for axis, (key, label) in zip(axes, labels.items(), strict=True):
        for name, runs in curves.items():
            # All runs of a way evaluate at the same steps: median and range over seeds at each of them.
            x = [statistics.median(values) for values in zip(*(run[key] for run in runs), strict=True)]
            y = list(zip(*(run["accuracy"] for run in runs), strict=True))
            axis.plot(x, [statistics.median(v) for v in y], color=COLORS[name], label=name, marker="o", markersize=3)
            axis.fill_between(x, list(map(min, y)), list(map(max, y)), color=COLORS[name], alpha=0.2, linewidth=0)
        axis.set_xlabel(label)
        axis.set_xscale("symlog", linthresh=5 if key == "seconds" else 5e4)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("strict accuracy, 512 held-out problems")
    axes[0].yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
    axes[1].legend(loc="lower right")
    figure.savefig(path, dpi=150)


def main():
    logs = Path(sys.argv[1]).resolve()
    train(logs)
    curves = {name: [curve(logs / f"{name.replace(', ', '-')}-{seed}") for seed in SEEDS] for name in RUNS}
    RESULTS.mkdir(exist_ok=True)
    draw(curves, RESULTS / "grpo_and_es.png")
    text = table(curves)
    about = f"{torch.get_num_threads()} threads of {platform.machine()}, torch {torch.__version__}, "
    about += f"transformers {transformers.__version__}; over {len(SEEDS)} seeds: median (range), mean (range), minimum"
    (RESULTS / "grpo_and_es.md").write_text(
        f"# GRPO and ES on the default task\n\n{__doc__.splitlines()[0]}\n\n{text}\n\n{about}\n"
    )
    print(text, about, sep="\n\n")


if __name__ == "__main__":
    main()
