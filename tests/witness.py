"""A training script in one of several processes, with what it did there written down.

PYTHONPATH=. python tests/witness.py FOLDER grpo_train.py key=value ...
"""

import json
import os
import runpy
import sys
from pathlib import Path

import torch

import runs
import utils

folder, script, *arguments = sys.argv[1:]
rank = os.environ.get("RANK", "0")
seen = {"gradients": [], "weights": [], "evaluated": []}
(Path(folder) / f"pid{rank}").write_text(str(os.getpid()))
clip, commit, evaluate = torch.nn.utils.clip_grad_norm_, runs.Run._commit, utils.evaluate


def witness_gradient(parameters, max_norm):
    seen["gradients"].append(torch.cat([p.grad.flatten() for p in parameters]).tolist())
    return clip(parameters, max_norm)


def witness_weights(run, save):
    commit(run, save)
    seen["weights"].append(run.state["weights"])


def witness_evaluation(setup):
    metrics, items, texts = evaluate(setup)
    seen["evaluated"].append([item["prompt"] for item in items])
    return metrics, items, texts


torch.nn.utils.clip_grad_norm_ = witness_gradient
runs.Run._commit, utils.evaluate = witness_weights, witness_evaluation
sys.argv = [script, *arguments]
runpy.run_path(str(Path(utils.__file__).parent / script), run_name="__main__")
(Path(folder) / f"seen{rank}.json").write_text(json.dumps(seen))
