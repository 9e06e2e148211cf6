"""Plot the held-out accuracy of runs over training time and over generated tokens, and print a table.

    pip install matplotlib==3.11.2
    python benchmarks/draw_runs.py curves.png "GRPO=LOGS/grpo-0 LOGS/grpo-1" "ES=LOGS/es-0 LOGS/es-1" --target 0.9

Folders behind one name are runs with different seeds that evaluate at the same steps: the figure shows their median and
range. Time is `progress/seconds`, which excludes startup and evaluation. results/grpo_and_es.md shows these runs:

    for seed in 0 1 2; do
        python grpo_train.py seed=$seed eval_every=5 log_dir=LOGS run_name=grpo-$seed
        python es_train.py seed=$seed eval_every=5 log_dir=LOGS run_name=low_rank-$seed
        python es_train.py seed=$seed eval_every=5 log_dir=LOGS run_name=gaussian-$seed perturbation=gaussian \
            num_steps=40
    done
"""

import argparse
import statistics

import matplotlib
import matplotlib.pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("Agg")
COLUMNS = {"steps": "{:.0f}", "seconds": "{:.0f}", "tokens": "{:,.0f}"}


def read_curve(folder):
    """Return steps, seconds, generated tokens and strict accuracy of each evaluation, as lists."""
    events = EventAccumulator(folder).Reload()
    tags = ("eval/strict_accuracy", "progress/seconds", "progress/generated_tokens")
    accuracy, seconds, tokens = ({event.step: event.value for event in events.Scalars(tag)} for tag in tags)
    rows = [(step, seconds.get(step, 0.0), tokens.get(step, 0.0), y) for step, y in sorted(accuracy.items())]
    return dict(zip((*COLUMNS, "accuracy"), map(list, zip(*rows, strict=True)), strict=True))


def spread(values, form):
    low, middle, high = (form.format(value) for value in (min(values), statistics.median(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def print_table(curves, target):
    """Print the cost of reaching the target accuracy, the accuracy at the end, and the lowest accuracy in between."""
    columns = " | ".join(f"{column} to {target:.0%}" for column in COLUMNS)
    print(f"| | {columns} | accuracy before | at the end | lowest after {target:.0%} |\n|{'---|' * 7}")
    for name, runs in curves.items():
        first = [next((i for i, y in enumerate(run["accuracy"]) if y >= target), None) for run in runs]
        reached = [(run, i) for run, i in zip(runs, first, strict=True) if i is not None]
        cells = [f"{len(reached)} of {len(runs)} runs"] * 3 + [""]
        if len(reached) == len(runs):
            cells = [spread([run[key][i] for run, i in reached], form) for key, form in COLUMNS.items()]
            cells.append(f"{min(min(run['accuracy'][i:]) for run, i in reached):.1%}")
        ends = [spread([run["accuracy"][i] for run in runs], "{:.1%}") for i in (0, -1)]
        print(f"| {' | '.join([name, *cells[:3], *ends, cells[3]])} |")


def draw(curves, path):
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    for name, runs in curves.items():
        y = list(zip(*(run["accuracy"] for run in runs), strict=True))
        for axis, key, unit in zip(axes, ("seconds", "tokens"), (60, 1000), strict=True):
            x = [statistics.median(values) / unit for values in zip(*(run[key] for run in runs), strict=True)]
            line = axis.plot(x, list(map(statistics.median, y)), marker="o", markersize=3, label=name)
            axis.fill_between(x, list(map(min, y)), list(map(max, y)), color=line[0].get_color(), alpha=0.2, lw=0)
    for axis, label in zip(axes, ("minutes of training", "thousands of generated tokens"), strict=True):
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("strict accuracy, held-out problems")
    axes[0].yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
    axes[0].set_ylim(bottom=0)
    axes[1].legend(loc="lower right")
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("figure", help="path of the PNG to write")
    parser.add_argument("runs", nargs="+", metavar="NAME=FOLDERS", help="a name in the legend, and folders of its runs")
    parser.add_argument("--target", type=float, default=0.9, help="accuracy that the table is about (%(default)s)")
    arguments = parser.parse_args()
    named = dict(run.split("=", 1) for run in arguments.runs)
    curves = {name: [read_curve(folder) for folder in folders.split()] for name, folders in named.items()}
    draw(curves, arguments.figure)
    print_table(curves, arguments.target)


if __name__ == "__main__":
    main()
