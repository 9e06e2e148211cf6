"""Peak memory of one micro-batch of GRPO's update, forward and backward, against `micro_batch_tokens`.

    python benchmarks/update_memory.py --config recipes/grpo_math_expr_smollm2.yml model=FOLDER dtype=float32

Each cell is a process of its own: the config's model, adapter and prompts, 64 prompts x 8 completions of
`max_new_tokens` random tokens, of which the first micro-batch is computed. "Saved" is what the forward pass saves for
the backward pass, which does not depend on the machine. "Peak" is, on a CPU, the growth of the process's peak resident
size over its size before; on a GPU, the peak that PyTorch has allocated, less the weights.
"""

import argparse
import functools
import re
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import grpo_train
import utils
from generation import Completions, inner_model, shares_prompts

ROOT = Path(__file__).resolve().parent.parent


def resident_gib(field):
    """Memory of this process: now with VmRSS, at its peak with VmHWM. Linux only."""
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2**20


def measure(config):
    """Print rows, positions, saved and peak GiB of the first micro-batch."""
    setup = utils.set_up(config, config.dtype, autocast=config.dtype == "bfloat16")
    policy = grpo_train.make_policy(setup.model, config.lora, config.gradient_checkpointing)
    prompts, C, positions = [problem.ids for problem in setup.train_set[:64]], config.max_new_tokens, []
    size = (len(prompts) * 8, C)
    tokens = torch.randint(2, 100, size, generator=torch.Generator().manual_seed(0)).to(policy.device)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    completions = Completions(tokens, mask, torch.zeros(size, device=policy.device), mask[:, 0])
    ones, shares = torch.ones(size[0], device=policy.device), shares_prompts(inner_model(policy))
    batches = grpo_train.make_micro_batches(prompts, completions, ones, ones, config.micro_batch_tokens, shares)
    embedding, on_gpu = policy.get_input_embeddings(), policy.device.type == "cuda"
    embedding.register_forward_hook(lambda _, inputs, __: positions.append(inputs[0].numel()))
    before = torch.cuda.memory_allocated() / 2**30 if on_gpu else resident_gib("VmRSS")
    weights, saved = {p.untyped_storage().data_ptr() for p in policy.parameters()}, {}

    def note(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        loss, *_ = grpo_train.micro_batch_loss(policy, batches[0], config, None, setup.accelerator.autocast)
    loss.backward()
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else resident_gib("VmHWM")
    print(len(batches[0].ids), sum(positions), sum(saved.values()) / 2**30, peak - before)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=str(ROOT / "grpo_config.yml"), help="YAML file (%(default)s)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 8192, 16384], help="micro_batch_tokens")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the config")
    arguments = parser.parse_args()
    load = functools.partial(utils.load_config, grpo_train.GRPOConfig, arguments.config)
    if arguments.child:
        measure(load(["eval_size=1", *arguments.overrides]))
        return
    print(
        "| micro_batch_tokens | gradient_checkpointing | rows | positions | saved, GiB | MiB per position | peak, GiB |"
    )
    print("|---|---|---|---|---|---|---|")
    for checkpointing in ("false", "true"):
        for tokens in arguments.tokens:
            keys = [f"micro_batch_tokens={tokens}", f"gradient_checkpointing={checkpointing}"]
            command = [sys.executable, __file__, "--child", "--config", arguments.config, *arguments.overrides, *keys]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            cells = "not enough memory | | | |"
            if done.returncode == 0:
                rows, positions, saved, peak = map(float, done.stdout.split()[-4:])
                cells = f"{rows:.0f} | {positions:,.0f} | {saved:.2f} | {saved * 1024 / positions:.2f} | {peak:.2f}"
            print(f"| {tokens:,} | {checkpointing} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
