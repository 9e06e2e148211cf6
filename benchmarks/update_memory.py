"""Measure peak memory of one GRPO micro-batch, forward and backward, over `micro_batch_tokens`.

    python benchmarks/update_memory.py --config recipes/grpo_math_expr_smollm2.yml model=FOLDER dtype=float32

Each row runs in its own process, with the config's model, adapter and prompts. It packs 64 prompts x 8 completions of
`max_new_tokens` random tokens into micro-batches and computes the first one. "Saved" is what the forward pass saves for
the backward pass; it does not depend on the machine. "Peak" is, on a CPU, the growth of the process's peak resident
size; on a GPU, PyTorch's peak allocation minus the weights.
"""

import argparse
import functools
import subprocess
import sys
from pathlib import Path

import torch
from grpo_against_trl import resident_mib

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import grpo_train
import utils
from generation import Completions, inner_model, shares_prompts


def measure(config):
    """Print rows, positions, saved and peak GiB of the first micro-batch."""
    setup = utils.set_up(config, config.dtype, autocast=config.dtype == "bfloat16")
    policy = grpo_train.make_policy(setup.model, config.lora, config.gradient_checkpointing)
    prompts, C, positions = [problem.ids for problem in setup.train_set[:64]], config.max_new_tokens, []
    size = (len(prompts) * 8, C)
    tokens = torch.randint(2, 100, size, generator=torch.Generator().manual_seed(0)).to(policy.device)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    completions = Completions(tokens, mask, torch.zeros(size, device=policy.device), mask[:, 0])
    ones, num_slots = torch.ones(size[0], device=policy.device), max(map(len, prompts)) + C
    shares = shares_prompts(inner_model(policy), num_slots)
    batches = grpo_train.make_micro_batches(prompts, completions, ones, ones, config.micro_batch_tokens, shares)
    embedding, on_gpu = policy.get_input_embeddings(), policy.device.type == "cuda"
    embedding.register_forward_hook(lambda _, inputs, __: positions.append(inputs[0].numel()))
    before = torch.cuda.memory_allocated() / 2**30 if on_gpu else resident_mib("VmRSS") / 2**10
    weights, saved = {p.untyped_storage().data_ptr() for p in policy.parameters()}, {}

    def note(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        loss, *_ = grpo_train.micro_batch_loss(policy, batches[0], config, None, setup.accelerator.autocast)
    loss.backward()
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else resident_mib("VmHWM") / 2**10
    print(len(batches[0].ids), sum(positions), sum(saved.values()) / 2**30, peak - before)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=f"{sys.path[0]}/grpo_config.yml", help="YAML file (%(default)s)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 8192, 16384], help="micro_batch_tokens")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config keys to override")
    arguments = parser.parse_args()
    load = functools.partial(utils.load_config, grpo_train.GRPOConfig, arguments.config)
    if arguments.child:
        measure(load(["eval_size=1", *arguments.overrides]))
        return
    print("| micro_batch_tokens | gradient_checkpointing | rows | positions | saved, GiB | MiB per position ", end="")
    print("| peak, GiB |\n|---|---|---|---|---|---|---|")
    for checkpointing in ("false", "true"):
        for tokens in arguments.tokens:
            keys = [f"micro_batch_tokens={tokens}", f"gradient_checkpointing={checkpointing}"]
            command = [sys.executable, __file__, "--child", "--config", arguments.config, *arguments.overrides, *keys]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            cells = "out of memory | | | |"
            if done.returncode == 0:
                rows, positions, saved, peak = map(float, done.stdout.split()[-4:])
                cells = f"{rows:.0f} | {positions:,.0f} | {saved:.2f} | {saved * 1024 / positions:.2f} | {peak:.2f}"
            print(f"| {tokens:,} | {checkpointing} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
