"""Compare GRPO with TRL's GRPOTrainer: same model, problems, rewards, LoRA, optimizer and loss.

    python benchmarks/grpo_against_trl.py --trl-python TRL/bin/python

TRL needs its own environment, because it imports the Hugging Face package `datasets` and datasets.py has that name:

    python -m venv TRL && TRL/bin/pip install torch==2.13.0 trl==1.16.0 peft==0.21.2

Runs alternate, each in its own process, with the same config, a constant learning rate and the same prompts in the same
order. Neither project evaluates or saves during training. TRL uses the config's dtype and no gradient checkpointing,
as this project does. Set --trl-micro-batch to the fastest value for TRL. A real model with few-shot examples:

    python benchmarks/grpo_against_trl.py --trl-python TRL/bin/python --steps 3 --rounds 2 --trl-micro-batch 16 \
        --config recipes/grpo_math_expr_smollm2.yml model=FOLDER dtype=float32

One difference is deliberate: this project skips zero-variance groups in the update, because they have no gradient. TRL
computes all groups. The output has the share of zero-variance groups.

A step lasts from its start to the start of the next one, logging included; the first and the last do not count. Rollout
is `model.generate` and the code around it in TRL, and the rollout phase here. Memory is the resident size of a process.
All adapters answer the same held-out problems greedily. Without --trl-python, only this project runs. To compare what
is learned in the same training time, raise --steps and give --seconds:

    python benchmarks/grpo_against_trl.py --trl-python TRL/bin/python --steps 999 --seconds 1200 --saves 6 ...
"""

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def resident_mib(field):
    """Resident memory of this process in MiB: now (VmRSS) or at its peak (VmHWM). Linux only."""
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


# --- Training: each method runs in its own process and saves its adapter in folder/stepN -----------------------------


class Clock:
    """Notes when steps start, and saves the adapter at even intervals of training time and after the last step."""

    def __init__(self, folder, config):
        self.folder, self.limit, self.num_saves = folder, config.pop("seconds"), config.pop("saves")
        self.num_steps, self.trained, self.notes = config["num_steps"], 0.0, {"starts": [], "saved": []}

    def begin_step(self):
        self.notes["starts"].append(time.perf_counter())
        self.notes.setdefault("before", resident_mib("VmRSS"))

    def end_step(self, save):
        """Call save(path) if it is time. Return True if the training time is over."""
        starts, saved = self.notes["starts"], self.notes["saved"]
        self.trained += time.perf_counter() - starts[-1]
        is_last = self.trained >= self.limit or len(starts) == self.num_steps
        if is_last or self.trained >= self.limit * (len(saved) + 1) / self.num_saves:
            saved.append((str(self.folder / f"step{len(starts)}"), self.trained, len(starts)))
            save(saved[-1][0])
        return is_last


def train_with_trl(folder, config, micro_batch):
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from datasets import Dataset  # Hugging Face's

    sys.path.append(str(ROOT))  # last, so that `datasets` is still Hugging Face's
    from reward import REWARDS

    problems = [json.loads(line) for line in (folder / "problems.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(config["model"])
    assert all(tokenizer(p["prompt"]).input_ids == p["ids"] for p in problems), "prompt token ids differ"
    clock, rollout, lora = Clock(folder, config), [], config["lora"]

    class Steps(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            clock.begin_step()

        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop |= clock.end_step(trainer.save_model)

    class TimedTrainer(GRPOTrainer):
        def _generate_single_turn(self, *args, **kwargs):
            start = time.perf_counter()
            result = super()._generate_single_turn(*args, **kwargs)
            rollout.append(time.perf_counter() - start)
            return result

    trainer = TimedTrainer(
        model=AutoModelForCausalLM.from_pretrained(config["model"], dtype=getattr(torch, config["dtype"])),
        processing_class=tokenizer,
        reward_funcs=[REWARDS[name] for name in config["rewards"]],
        train_dataset=Dataset.from_list([{key: p[key] for key in ("prompt", "answer")} for p in problems]),
        peft_config=LoraConfig(
            r=lora["rank"], lora_alpha=lora["alpha"], target_modules=lora["target_modules"], task_type="CAUSAL_LM"
        ),
        callbacks=[Steps()],
        args=GRPOConfig(
            output_dir=str(folder / "trl"),
            use_cpu=True,
            bf16=config["dtype"] == "bfloat16",
            gradient_checkpointing=False,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=config["prompts_per_step"] * config["group_size"] // micro_batch,
            num_generations=config["group_size"],
            max_completion_length=config["max_new_tokens"],
            temperature=config["temperature"],
            max_steps=config["num_steps"],
            shuffle_dataset=False,
            beta=config["kl_weight"],
            loss_type="dapo",
            scale_rewards=config["scale_advantages"],
            reward_weights=list(config["rewards"].values()),
            learning_rate=config["learning_rate"],
            lr_scheduler_type="constant",
            weight_decay=config["weight_decay"],
            max_grad_norm=config["max_grad_norm"],
            seed=config["seed"],
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        ),
    )
    trainer.train()
    return clock.notes | {"rollout": rollout}


def train_here(folder, config):
    sys.path.insert(0, str(ROOT))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    import grpo_train
    from utils import save_model

    clock = Clock(folder, config)

    class TimedRun(grpo_train.Run):
        def steps(self):
            for step in super().steps():
                clock.begin_step()
                yield step
                if clock.end_step(lambda path: save_model(self.setup.model, self.setup.tokenizer, path)):
                    return

    grpo_train.Run = TimedRun
    grpo_train.main(grpo_train.GRPOConfig(**config | {"eval_size": 1, "log_dir": str(folder), "run_name": "run"}))
    events = EventAccumulator(str(folder / "run"), size_guidance={"scalars": 0}).Reload()
    tags = {"rollout": "time/rollout", "equal": "reward/zero_variance_groups"}
    return clock.notes | {name: [event.value for event in events.Scalars(tag)] for name, tag in tags.items()}


# --- Runs and report --------------------------------------------------------------------------------------------------


def run(way, python, config, micro_batch, seconds, saves):
    """Train in a separate process. Print the accuracy of its adapters over time. Return its measurements."""
    import utils

    setup, num_steps = utils.set_up(config, "float32", autocast=config.dtype == "bfloat16"), config.num_steps
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        problems = utils.draw_problems(setup.train_set, 0, num_steps * config.prompts_per_step, config.seed)
        tokenizer = setup.tokenizer
        rows = [{"prompt": tokenizer.decode(p.ids), "answer": p.item["answer"], "ids": p.ids} for p in problems]
        for row in rows:
            if tokenizer(row["prompt"]).input_ids != row["ids"]:  # it adds the first token by itself
                row["prompt"] = row["prompt"].removeprefix(tokenizer.bos_token)
        (folder / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (folder / "config.json").write_text(json.dumps({**config.model_dump(), "seconds": seconds, "saves": saves}))
        command = [python, __file__, "--child", way, name, "--trl-micro-batch", str(micro_batch)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{way} failed:\n{done.stderr[-3000:]}")
        result = json.loads((folder / "result.json").read_text())
        for path, trained, step in result["saved"]:
            setup.model = utils.load_model(path, config.dtype, "cpu")
            result["accuracy"] = utils.evaluate(setup)[0]["strict_accuracy"]
            print(
                f"{way}, seed {config.seed}: {result['accuracy']:.1%} after {trained:.0f} s, {step} steps", flush=True
            )
        return result


def spread(values, form):
    return f"{form.format(statistics.median(values))} ({form.format(min(values))} to {form.format(max(values))})"


def report(results):
    """Print the table. results: {way: runs}"""
    seconds = {}
    print("\n| median (range) | seconds per step | rollout | everything else | strict accuracy after training ", end="")
    print("| peak memory, MiB | added by training |\n|---|---|---|---|---|---|---|")
    for way, runs in results.items():
        steps = [b - a for run in runs for a, b in zip(run["starts"][1:], run["starts"][2:], strict=False)]
        rollouts = [second for run in runs for second in run["rollout"][1:-1]]
        seconds[way] = statistics.median(steps)
        cells = [
            spread(steps, "{:.2f}"),
            spread(rollouts, "{:.2f}"),
            spread([step - rollout for step, rollout in zip(steps, rollouts, strict=True)], "{:.2f}"),
            spread([run["accuracy"] for run in runs], "{:.1%}"),
            spread([run["peak"] for run in runs], "{:.0f}"),
            spread([run["peak"] - run["before"] for run in runs], "{:.0f}"),
        ]
        print(f"| {way} | {' | '.join(cells)} |")
    equal = statistics.mean(share for run in results["here"] for share in run["equal"])
    print(f"\nzero-variance groups here: {equal:.0%}")
    if "TRL" in seconds:
        print(f"steps per second: {seconds['TRL'] / seconds['here']:.1f} times TRL's")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl-python", help="Python of an environment with TRL")
    parser.add_argument("--steps", type=int, default=30, help="steps per run, at least 3 (%(default)s)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop a run after this training time")
    parser.add_argument(
        "--saves", type=int, default=1, help="evaluate at this many times within --seconds (%(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs per project, with seeds 0, 1, ... (%(default)s)")
    parser.add_argument("--trl-micro-batch", type=int, default=64, help="completions per backward pass (%(default)s)")
    parser.add_argument("--config", default=str(ROOT / "grpo_config.yml"), help="YAML file (%(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config keys to override")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        way, folder = arguments.child[0], Path(arguments.child[1])
        config = json.loads((folder / "config.json").read_text())
        out = train_with_trl(folder, config, arguments.trl_micro_batch) if way == "TRL" else train_here(folder, config)
        (folder / "result.json").write_text(json.dumps({**out, "peak": resident_mib("VmHWM")}))
        return

    sys.path.insert(0, str(ROOT))
    import torch
    import transformers

    from grpo_train import GRPOConfig
    from utils import load_config

    same = ["device=cpu", "lr_schedule=constant", "warmup_steps=0"]
    same += [f"{key}={arguments.steps}" for key in ("num_steps", "eval_every", "checkpoint_every")]
    config = load_config(GRPOConfig, arguments.config, [*arguments.overrides, *same])
    model = ROOT / config.model if (ROOT / config.model).is_dir() else config.model  # runs have another cwd
    config = config.model_copy(update={"model": str(model)})
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, transformers {transformers.__version__}")
    pythons = {"here": sys.executable}
    if arguments.trl_python:  # do not resolve this symlink: its target lacks the environment's packages
        pythons = {"TRL": str(Path(arguments.trl_python).absolute()), **pythons}
    results = {way: [] for way in pythons}
    for seed in range(arguments.rounds):
        seeded = config.model_copy(update={"seed": seed})
        more = arguments.trl_micro_batch, arguments.seconds, arguments.saves
        for way, python in pythons.items():
            results[way].append(run(way, python, seeded, *more))
    report(results)


if __name__ == "__main__":
    main()
