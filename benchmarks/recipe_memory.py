"""GPU memory that each recipe needs with each model, computed from the model's geometry. Nothing is measured.

    python benchmarks/recipe_memory.py

Counted are, in GiB: weights, with the LoRA adapter, its gradient and AdamW's moments, or ES's fp32 master and starting
point; and the larger of two peaks, which do not occur together:

- generation: keys and values of all rows that are decoded at once, each of `PROMPT_TOKENS` and max_new_tokens; those of
  one layer once more, repeated for all heads; three copies of the logits, in fp32; and with low-rank noise that of
  every row, as it is gathered once the first rows have ended
- update, GRPO: per position the inputs of all layers (with gradient_checkpointing) and what one layer keeps for its
  backward pass, and a chunk of logits; ES: four copies of the largest matrix in fp32, to find how far it has moved

What PyTorch, the GPU's libraries and CUDA graphs hold besides is not counted.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from es_train import ESConfig  # noqa: E402
from grpo_train import GRPOConfig, make_policy  # noqa: E402
from utils import MAX_LOGITS, load_config  # noqa: E402

PROMPT_TOKENS = 300  # the longest of GSM8K have about as many, with the system prompt
FOR_24_GB = {
    "grpo_gsm8k": ["generation_batch_size=128", "micro_batch_tokens=8192"],
    "grpo_math_expr": [],
    "es_gsm8k_low_rank": ["population_batch=8"],
    "es_math_expr_low_rank": ["population_batch=8"],
    "es_gsm8k_gaussian": [],
    "es_math_expr_gaussian": [],
}


def geometry(kind, **sizes):
    return kind(tie_word_embeddings=True, **sizes)


def qwen(hidden, mlp, layers, heads):
    return geometry(
        Qwen2Config,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=2,
        vocab_size=151_936,
    )


MODELS = {
    "Qwen2.5-0.5B": qwen(896, 4864, 24, 14),
    "Qwen2.5-1.5B": qwen(1536, 8960, 28, 12),
    "Qwen2.5-3B": qwen(2048, 11008, 36, 16),
    "Llama-3.2-1B": geometry(
        LlamaConfig,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128_256,
    ),
}


def gib(recipe, geometry, overrides):
    is_es = recipe.name.startswith("es_")
    config = load_config(ESConfig if is_es else GRPOConfig, recipe, overrides)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(geometry)
        num_base = sum(parameter.numel() for parameter in model.parameters())
        noise_size = sum(sum(p.shape) if p.ndim == 2 else p.numel() for p in model.model.layers.parameters())
        noise_size += geometry.vocab_size  # of the head, which is the embedding; rank 1
        largest = max(parameter.numel() for parameter in model.parameters())
        if not is_es:
            model = make_policy(model, config.lora, False)
    head_size = geometry.hidden_size // geometry.num_attention_heads
    token_bytes = 2 * 2 * geometry.num_hidden_layers * geometry.num_key_value_heads * head_size  # keys, values; bf16
    if is_es:
        weights = num_base * (2 + 2 + 4)  # to compute with, as at the start, fp32 master
        members = config.population_batch if config.perturbation == "low_rank" else 1
        rows = min(members, config.population_size) * config.prompts_per_iteration
        update = 4 * 4 * largest
        noise = 2 * noise_size * config.rank if config.perturbation == "low_rank" else 0
    else:
        num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        weights = num_base * 2 + num_trained * (4 + 4 + 8)
        rows = min(config.generation_batch_size, config.prompts_per_step * config.group_size)
        layer = 10 * geometry.intermediate_size + 40 * geometry.hidden_size  # bytes a position, bf16 and some fp32
        inputs = 2 * geometry.hidden_size * geometry.num_hidden_layers
        assert config.gradient_checkpointing
        update = config.micro_batch_tokens * (inputs + layer) + 3 * 4 * MAX_LOGITS
        noise = 0
    repeated = 2 * 2 * geometry.num_attention_heads * head_size
    slots = PROMPT_TOKENS + config.max_new_tokens
    generation = rows * (slots * (token_bytes + repeated) + 3 * 4 * geometry.vocab_size + noise)
    return (weights + max(generation, update)) / 2**30


def main():
    print(f"| recipe | {' | '.join(MODELS)} |\n|---|{'---|' * len(MODELS)}")
    for name, overrides in FOR_24_GB.items():
        recipe = ROOT / "recipes" / f"{name}.yml"
        for more in [[], overrides] if overrides else [[]]:
            cells = [f"{gib(recipe, geometry, more):.0f}" for geometry in MODELS.values()]
            print(f"| {' '.join([f'`{name}`', *(f'`{override}`' for override in more)])} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
