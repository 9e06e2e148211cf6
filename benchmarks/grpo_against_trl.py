"""GRPO as it is here against TRL's GRPOTrainer: the same model, problems, rewards, LoRA, optimizer and loss.

    python benchmarks/grpo_against_trl.py --trl-python TRL/bin/python

TRL is in an environment of its own, made by

    python -m venv TRL && TRL/bin/pip install torch==2.13.0 trl==1.16.0 peft==0.21.2

because it imports the Hugging Face package `datasets`, whose name datasets.py has here. Both train the embedded model
in a process of their own, alternating, on the same prompts in the same order, with a constant learning rate; nothing is
evaluated or saved meanwhile. TRL gets gradient checkpointing and bf16 switched off, as here, and the number of
completions per backward pass with which it was fastest (--trl-micro-batch), of which the gradients are accumulated.

One difference is meant: completions of a group with equal rewards have no gradient, and are left out of the backward
pass here. The more is solved, the more that saves; how many groups there were is printed. TRL computes on all of them.

A step's seconds run from its beginning to that of the next one, logging included; the first is left out. Rollout is
`model.generate` with what surrounds it in TRL, and the rollout phase here. Memory is the resident size of the process.
Both final adapters are evaluated alike, greedily on 512 held-out problems.
"""

import argparse
import importlib.util
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
P, G, MAX_NEW_TOKENS, LEARNING_RATE, RANK, ALPHA = 32, 8, 96, 1e-3, 16, 32
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
REWARDS = {"accuracy": 1.0, "format": 0.1}


def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# ----------------------------------------------------------------------------------------------------------------------
# The two ways, each in a process of its own: starts of steps, seconds of rollout and mean rewards, all a step
# ----------------------------------------------------------------------------------------------------------------------


def train_with_trl(folder, steps, seed, micro_batch):
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from datasets import Dataset  # Hugging Face's, in that environment

    description = importlib.util.spec_from_file_location("rewards", ROOT / "reward.py")
    rewards = importlib.util.module_from_spec(description)
    description.loader.exec_module(rewards)
    problems = [json.loads(line) for line in (folder / "problems.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(str(ROOT / "tiny_model"))
    assert all(tokenizer(p["prompt"]).input_ids == p["ids"] for p in problems), "other prompts than here"
    starts, memory, rollout = [], [], []

    class Starts(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            starts.append(time.perf_counter())
            memory.append(resident_mib())

    class TimedTrainer(GRPOTrainer):
        def _generate_single_turn(self, *args, **kwargs):
            start = time.perf_counter()
            result = super()._generate_single_turn(*args, **kwargs)
            rollout.append(time.perf_counter() - start)
            return result

    trainer = TimedTrainer(
        model=AutoModelForCausalLM.from_pretrained(str(ROOT / "tiny_model"), dtype=torch.float32),
        processing_class=tokenizer,
        reward_funcs=[rewards.REWARDS[name] for name in REWARDS],
        train_dataset=Dataset.from_list([{key: p[key] for key in ("prompt", "answer")} for p in problems]),
        peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM"),
        callbacks=[Starts()],
        args=GRPOConfig(
            output_dir=str(folder / "trl"),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=P * G // micro_batch,
            num_generations=G,
            max_completion_length=MAX_NEW_TOKENS,
            max_steps=steps,
            shuffle_dataset=False,
            beta=0.0,
            loss_type="dapo",
            scale_rewards="group",
            reward_weights=list(REWARDS.values()),
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            seed=seed,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        ),
    )
    trainer.train()
    trainer.save_model(str(folder / "model"))
    history = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    return {"starts": starts, "rollout": rollout, "rewards": history, "before": memory[0], "peak": peak_mib()}


def train_here(folder, steps, seed):
    sys.path.insert(0, str(ROOT))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from grpo_train import GRPOConfig, LoRA, main

    starts, memory = [], []

    def at_the_start_of_each_step():
        starts.append(time.perf_counter())
        memory.append(resident_mib())
        return False

    config = GRPOConfig(
        model=str(ROOT / "tiny_model"),
        device="cpu",
        lora=LoRA(RANK, ALPHA, TARGETS),
        rewards=REWARDS,
        num_steps=steps,
        prompts_per_step=P,
        group_size=G,
        max_new_tokens=MAX_NEW_TOKENS,
        learning_rate=LEARNING_RATE,
        lr_schedule="constant",
        warmup_steps=0,
        eval_size=1,
        eval_every=steps,
        checkpoint_every=steps,
        log_dir=str(folder),
        run_name="run",
        seed=seed,
    )
    main(config, at_the_start_of_each_step)
    events = EventAccumulator(str(folder / "run"), size_guidance={"scalars": 0}).Reload()
    rollout, rewards, equal = (
        [event.value for event in events.Scalars(tag)] for tag in ("time/rollout", "reward/mean", "reward/equal_groups")
    )
    (folder / "run" / "model").rename(folder / "model")
    return {
        "starts": starts,
        "rollout": rollout,
        "rewards": rewards,
        "equal": equal,
        "before": memory[0],
        "peak": peak_mib(),
    }


# ----------------------------------------------------------------------------------------------------------------------
# Both in turn
# ----------------------------------------------------------------------------------------------------------------------


def write_problems(path, steps, seed):
    """The prompts that a run here draws, in its order, as text and as token ids."""
    from datasets import MathExprDataset
    from grpo_train import GRPOConfig
    from utils import draw_indices, encode_prompts, load_tokenizer

    tokenizer, items = load_tokenizer(str(ROOT / "tiny_model")), list(MathExprDataset("train"))
    items = [items[i] for i in draw_indices(len(items), 0, steps * P, seed)]
    ids = encode_prompts(tokenizer, [item["prompt"] for item in items], GRPOConfig().system_prompt)
    texts = tokenizer.batch_decode(ids)
    lines = [
        json.dumps({"prompt": text, "answer": item["answer"], "ids": row})
        for text, item, row in zip(texts, items, ids, strict=True)
    ]
    path.write_text("\n".join(lines))


def accuracy(adapter):
    """Strict greedy accuracy on 512 held-out problems."""
    from accelerate import Accelerator

    from datasets import MathExprDataset
    from grpo_train import GRPOConfig
    from utils import encode_prompts, evaluate, load_model, load_tokenizer

    tokenizer, items = load_tokenizer(str(ROOT / "tiny_model")), list(MathExprDataset("test"))[:512]
    prompts = encode_prompts(tokenizer, [item["prompt"] for item in items], GRPOConfig().system_prompt)
    model = load_model(str(adapter), "float32", "cpu")
    return evaluate(model, tokenizer, items, prompts, MAX_NEW_TOKENS, 256, Accelerator(cpu=True))["strict"]


def run(way, python, steps, seed, micro_batch):
    """One run in a process of its own: what it measured, and the accuracy it reached."""
    with tempfile.TemporaryDirectory() as folder:
        write_problems(Path(folder) / "problems.jsonl", steps, seed)
        options = ["--steps", steps, "--seed", seed, "--trl-micro-batch", micro_batch]
        command = [python, __file__, "--child", way, folder, *map(str, options)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{way} failed:\n{done.stderr[-3000:]}")
        result = json.loads((Path(folder) / "result.json").read_text())
        return {**result, "accuracy": accuracy(Path(folder) / "model")}


def spread(values, form):
    return f"{form.format(statistics.median(values))} ({form.format(min(values))} to {form.format(max(values))})"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl-python", help="the Python of an environment with TRL")
    parser.add_argument("--steps", type=int, default=30, help="steps of each run (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, with seeds 0, 1, ... (%(default)s)")
    parser.add_argument("--trl-micro-batch", type=int, default=64, help="completions a backward pass (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--child", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        way, folder = arguments.child[0], Path(arguments.child[1])
        if way == "TRL":
            result = train_with_trl(folder, arguments.steps, arguments.seed, arguments.trl_micro_batch)
        else:
            result = train_here(folder, arguments.steps, arguments.seed)
        (folder / "result.json").write_text(json.dumps(result))
        return
    if not arguments.trl_python:
        parser.error("--trl-python is needed; how to make that environment stands at the top of this file")
    sys.path.insert(0, str(ROOT))
    import torch
    import transformers

    print(f"{torch.get_num_threads()} threads of {platform.machine()}, torch {torch.__version__}, ", end="")
    print(f"transformers {transformers.__version__}; {P} prompts x {G} completions of up to {MAX_NEW_TOKENS} tokens\n")
    # Not resolved: an environment's python is a link, and what it links to has other packages.
    pythons = {"TRL": str(Path(arguments.trl_python).absolute()), "here": sys.executable}
    results = {way: [] for way in pythons}
    for seed in range(arguments.rounds):
        for way, python in pythons.items():
            results[way].append(run(way, python, arguments.steps, seed, arguments.trl_micro_batch))

    print("| median (range) of all steps | seconds a step | of it rollout | the rest |")
    print("|---|---|---|---|")
    seconds = {}
    for way, runs in results.items():
        steps = [b - a for run in runs for a, b in zip(run["starts"][1:], run["starts"][2:], strict=False)]
        rollouts = [second for run in runs for second in run["rollout"][1:-1]]
        rest = [step - rollout for step, rollout in zip(steps, rollouts, strict=True)]
        seconds[way] = statistics.median(steps)
        print(f"| {way} | {' | '.join(spread(values, '{:.2f}') for values in (steps, rollouts, rest))} |")
    equal = statistics.mean(share for run in results["here"] for share in run["equal"])
    print(f"\nsteps per second: {seconds['TRL'] / seconds['here']:.1f} times TRL's")
    print(f"groups with equal rewards: {equal:.0%}\n")
    print(f"| after {arguments.steps} steps | strict accuracy | reward, last 5 steps | peak memory | training adds |")
    print("|---|---|---|---|---|")
    for way, runs in results.items():
        accuracies, rewards = [run["accuracy"] for run in runs], [statistics.mean(run["rewards"][-5:]) for run in runs]
        peaks, added = [run["peak"] for run in runs], [run["peak"] - run["before"] for run in runs]
        cells = [spread(accuracies, "{:.1%}"), spread(rewards, "{:.3f}")]
        print(f"| {way} | {' | '.join([*cells, spread(peaks, '{:.0f} MiB'), spread(added, '{:.0f} MiB')])} |")
    marks = [step for step in (5, 10, 15, 20, 25, 30, 40, 50, 60) if step < arguments.steps]
    print(f"\n| mean reward of 5 steps, all seeds | {' | '.join(f'up to step {step}' for step in marks)} |")
    print(f"|---|{'---|' * len(marks)}")
    for way, runs in results.items():
        cells = []
        for step in marks:
            reward = statistics.mean(reward for run in runs for reward in run["rewards"][step - 5 : step])
            second = statistics.mean(run["starts"][step] - run["starts"][0] for run in runs)
            cells.append(f"{reward:.3f} ({second:.0f} s)")
        print(f"| {way} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
