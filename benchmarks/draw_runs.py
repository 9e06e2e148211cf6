"""Plot the held-out accuracy of runs over minutes of training and over generated tokens.

    pip install matplotlib==3.11.2
    python benchmarks/draw_runs.py runs.png grpo_logs/first "grpo_logs/second=learning rate 1e-4"

Each run is a folder, optionally followed by "=" and its name in the legend.
"""

import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from grpo_and_es import read_curve

matplotlib.use("Agg")
path, *runs = sys.argv[1:]
figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), sharey=True, layout="constrained")
for run in runs:
    folder, _, label = run.partition("=")
    curve = read_curve(folder)
    axes[0].plot([seconds / 60 for seconds in curve["seconds"]], curve["accuracy"], marker="o", markersize=3)
    thousands = [tokens / 1000 for tokens in curve["tokens"]]
    axes[1].plot(thousands, curve["accuracy"], marker="o", markersize=3, label=label or Path(folder).name)
for axis, label in zip(axes, ("minutes of training", "thousands of generated tokens"), strict=True):
    axis.set_xlabel(label)
    axis.grid(alpha=0.3)
axes[0].set_ylabel("strict accuracy, held-out problems")
axes[0].yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
axes[0].set_ylim(bottom=0)
figure.legend(loc="outside lower center", ncols=2)
figure.savefig(path, dpi=150)
