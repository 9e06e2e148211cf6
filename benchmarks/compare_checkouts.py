"""Compare the speed of two checkouts of this project: seconds of rollout and update, and generated tokens, per step.

    git worktree add ../before COMMIT
    python benchmarks/compare_checkouts.py ../before --config recipes/grpo_math_expr_smollm2.yml model=/ABSOLUTE/FOLDER

Runs alternate, each in its own process and with a new seed in every round. The first step of a run does not count. Both
checkouts must know the config's keys. An es_*.yml config runs es_train.py.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
TAGS = {"step": "time/step", "rollout": "time/rollout", "update": "time/update", "tokens": "completion/length_mean"}
TAGS |= {"largest sampler_gap": "policy/sampler_gap_max"}

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("other", type=Path, help="folder of the other checkout")
parser.add_argument("--config", default=ROOT / "grpo_config.yml", help="YAML file (default: %(default)s)")
parser.add_argument("--steps", type=int, default=4, help="steps per run, at least 2 (%(default)s)")
parser.add_argument("--rounds", type=int, default=3, help="runs per checkout (%(default)s)")
parser.add_argument("overrides", nargs="*", metavar="key=value", help="config keys to override")
arguments = parser.parse_intermixed_args()
config, num_steps = Path(arguments.config).resolve(), arguments.steps
script = "es_train.py" if config.name.startswith("es_") else "grpo_train.py"
length = [f"num_steps={num_steps}"] + ["warmup_steps=0"] * (script == "grpo_train.py")
values = {checkout: {name: [] for name in TAGS} for checkout in (arguments.other.resolve(), ROOT)}
with tempfile.TemporaryDirectory() as logs:
    for seed in range(arguments.rounds):
        for number, (checkout, found) in enumerate(values.items()):
            run = [f"log_dir={logs}", f"run_name={number}-{seed}", f"seed={seed}", f"eval_every={num_steps}"]
            command = [sys.executable, script, "--config", config, *length, "eval_size=1", *run, *arguments.overrides]
            subprocess.run(command, cwd=checkout, check=True, stdout=subprocess.DEVNULL)
            events = EventAccumulator(f"{logs}/{number}-{seed}", size_guidance={"scalars": 0}).Reload()
            for name, tag in TAGS.items():
                logged = events.Scalars(tag) if tag in events.Tags()["scalars"] else []
                found[name] += [event.value for event in logged if event.step > 1]
print(f"| median (range) | {' | '.join(TAGS)} |\n|---|{'---|' * len(TAGS)}")
for checkout, found in values.items():
    cells = [f"{statistics.median(x):.3g} ({min(x):.3g} to {max(x):.3g})" if x else "" for x in found.values()]
    print(f"| {'here' if checkout == ROOT else 'other'} | {' | '.join(cells)} |")
