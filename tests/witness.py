"""A training script in one of several processes, with what it did there written down.

PYTHONPATH=. python tests/witness.py FOLDER grpo_train.py key=value ...
"""

import json
import os
import runpy
import sys
from pathlib import Path

import torch

import utils

folder, script, *arguments = sys.argv[1:]
rank = os.environ.get("RANK", "0")
seen = {"gradients": [], "weights": [], "evaluated": []}
(Path(folder) / f"pid{rank}").write_text(str(os.getpid()))
clip, agree, evaluate = torch.nn.utils.clip_grad_norm_, utils.check_processes_agree, utils.evaluate


def witness_gradient(parameters, max_norm):
    seen["gradients"].append(torch.cat([p.grad.flatten() for p in parameters]).tolist())
    return clip(parameters, max_norm)


def witness_weights(weights, accelerator):
    seen["weights"].append(weights)
    agree(weights, accelerator)


def witness_evaluation(*arguments):
    result = evaluate(*arguments)
    seen["evaluated"].append([item["prompt"] for item in result["items"]])
    return result


# Before the script imports them.
torch.nn.utils.clip_grad_norm_ = witness_gradient
utils.check_processes_agree, utils.evaluate = witness_weights, witness_evaluation
sys.argv = [script, *arguments]
runpy.run_path(str(Path(utils.__file__).parent / script), run_name="__main__")
(Path(folder) / f"seen{rank}.json").write_text(json.dumps(seen))
