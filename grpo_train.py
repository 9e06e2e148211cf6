"""GRPO: group relative policy optimization of a language model, with verifiable rewards.

Shao et al. 2024, "DeepSeekMath", arXiv:2402.03300, section 4. For each prompt q, draw G completions o_i from the
policy, score them, and take as advantage how much better than its group each one is:

    A_i = (r_i - mean(r)) / std(r)                                                   r: the group's G rewards

Then make K updates that raise the probability of the tokens of good completions, within a trust region:

    ratio_t = pi(o_t | q, o_<t) / pi_old(o_t | q, o_<t)
    loss_t  = -min(ratio_t A, clip(ratio_t, 1 - clip_low, 1 + clip_high) A) + kl_weight * KL_t(pi || pi_ref)

Where this departs from the paper:
- The reference policy is the starting point, throughout: the model with its adapter switched off. The paper replaces it
  now and then.
- loss_t is averaged over all completion tokens of the step (`loss_normalization: token`, DAPO, arXiv:2503.14476); the
  paper averages within each completion first (`sequence`). `constant` is Dr. GRPO, arXiv:2503.20783.
- pi_old is computed by the training forward pass, not taken from the sampler, so that ratio_t is exactly 1 in the first
  of the K updates. By how much the sampler differs is logged (`policy/sampler_gap`).
- Groups whose rewards are all equal have advantage 0, exactly, and are not computed on when kl_weight is 0.

    python grpo_train.py
    python grpo_train.py --config recipes/grpo_gsm8k.yml
    python grpo_train.py learning_rate=2e-5 group_size=16 lora.rank=32
    accelerate launch --num_processes 2 grpo_train.py      (on a CPU: torchrun --nproc_per_node 2 grpo_train.py)

Letters in shapes: P prompts, G completions per prompt, B = P * G rows, b rows of a micro-batch, T tokens.
"""

import contextlib
import copy
import dataclasses
import math
import time
from typing import Literal

import torch
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers.modeling_layers import GradientCheckpointingLayer

from utils import (
    HalvingSize,
    Logger,
    PhaseTimer,
    ProgressBar,
    check,
    check_chunked_head,
    check_processes_agree,
    check_prompt_lengths,
    check_same_run,
    check_skipped,
    checkpoint_folders,
    completion_log_probs,
    completion_metrics,
    config_text,
    draw_indices,
    encode_prompts,
    evaluate,
    fingerprint,
    gather_scores,
    generate,
    inner_model,
    load_model,
    load_problems,
    load_tokenizer,
    make_accelerator,
    newest_checkpoint,
    non_finite,
    open_run_folder,
    print_banner,
    print_summary,
    resume_command,
    run_folder,
    run_from_command_line,
    run_identity,
    save_checkpoint,
    say,
    schedule_factor,
    score_completions,
    seed_libraries,
    seeded_generator,
    stop_ids,
    whole_folder,
    write_file,
    write_model,
)

# ----------------------------------------------------------------------------------------------------------------------
# Config: what each key means stands in grpo_config.yml
# ----------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class LoRA:
    rank: int = 16
    alpha: float = 32.0
    target_modules: list[str] = dataclasses.field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )

    def __post_init__(self):
        check(self.rank >= 1, "rank", self.rank, "at least 1")
        check(self.alpha > 0, "alpha", self.alpha, "more than 0")
        check(self.target_modules, "target_modules", self.target_modules, "at least one name of a linear layer")


@dataclasses.dataclass
class GRPOConfig:
    # Model
    model: str = "tiny_model"
    cache_dir: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    lora: LoRA | None = dataclasses.field(default_factory=LoRA)
    gradient_checkpointing: bool = False
    # Task
    dataset: str = "math_expr"
    dataset_args: dict = dataclasses.field(default_factory=dict)
    system_prompt: str = "Think step by step in <think></think>, then answer in <answer></answer>."
    rewards: dict[str, float] = dataclasses.field(default_factory=lambda: {"accuracy": 1.0, "format": 0.1})
    # Rollout
    num_steps: int = 60
    prompts_per_step: int = 32
    group_size: int = 8
    max_new_tokens: int = 96
    temperature: float = 1.0
    top_p: float = 1.0
    # Objective
    scale_advantages: Literal["group", "batch", "none"] = "group"
    loss_normalization: Literal["token", "sequence", "constant"] = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_weight: float = 0.0
    updates_per_step: int = 1
    mask_truncated: bool = False
    # Optimizer
    learning_rate: float = 1e-3
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup_steps: int = 5
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_skipped_steps: int = 10
    # Memory and speed
    micro_batch_tokens: int = 4096
    generation_batch_size: int = 256
    # Evaluation, checkpoints, logs, seed
    eval_size: int = 512
    eval_every: int = 20
    checkpoint_every: int = 20
    keep_checkpoints: int = 2
    log_dir: str = "grpo_logs"
    run_name: str | None = None
    resume: str = "auto"
    seed: int = 0

    def __post_init__(self):
        for key, low in {
            "num_steps": 1,
            "prompts_per_step": 1,
            "max_new_tokens": 1,
            "updates_per_step": 1,
            "warmup_steps": 0,
            "max_skipped_steps": 1,
            "micro_batch_tokens": 1,
            "generation_batch_size": 1,
            "eval_size": 1,
            "eval_every": 1,
            "checkpoint_every": 1,
            "keep_checkpoints": 1,
        }.items():
            check(getattr(self, key) >= low, key, getattr(self, key), f"at least {low}")
        check(
            self.group_size >= 2, "group_size", self.group_size, "at least 2: a group of one has no spread to compare"
        )
        check(self.temperature > 0, "temperature", self.temperature, "more than 0 (evaluation is always greedy)")
        check(0 < self.top_p <= 1, "top_p", self.top_p, "more than 0, at most 1")
        check(0 < self.clip_low < 1, "clip_low", self.clip_low, "between 0 and 1")
        check(self.clip_high > 0, "clip_high", self.clip_high, "more than 0")
        check(self.kl_weight >= 0, "kl_weight", self.kl_weight, "at least 0")
        check(self.learning_rate > 0, "learning_rate", self.learning_rate, "more than 0")
        check(self.weight_decay >= 0, "weight_decay", self.weight_decay, "at least 0")
        check(self.max_grad_norm > 0, "max_grad_norm", self.max_grad_norm, "more than 0")
        check(
            self.warmup_steps < self.num_steps,
            "warmup_steps",
            self.warmup_steps,
            f"less than num_steps, {self.num_steps}",
        )
        check(0 <= self.seed < 2**32, "seed", self.seed, "at least 0 and less than 2^32")
        check(self.rewards, "rewards", self.rewards, "at least one reward function with its weight")


# ----------------------------------------------------------------------------------------------------------------------
# The maths
# ----------------------------------------------------------------------------------------------------------------------

MAX_LOG_RATIO = 20.0  # exp(20) is 5e8: beyond this a ratio says nothing more, and exp would overflow


def group_advantages(rewards, scale):
    """Advantages (P, G) of rewards (P, G): reward minus its group's mean, over a standard deviation (eq. in 4.1.2).

    scale: "group" divides by the group's standard deviation, "batch" by that of all rewards, "none" by nothing
    A group of equal rewards gets exactly 0: that is asked of the rewards, not of a standard deviation, whose rounding
    error an epsilon would blow up to advantages near 1.
    """
    rewards = rewards.double()
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    if scale == "group":
        advantages = advantages / rewards.std(dim=1, keepdim=True)
    elif scale == "batch":
        advantages = advantages / rewards.std()
    tied = rewards.amax(dim=1, keepdim=True) == rewards.amin(dim=1, keepdim=True)
    return torch.where(tied, 0.0, advantages).float()


def row_weights(lengths, normalization, max_new_tokens):
    """What each token of a row counts in the step's loss, (B,); the loss is the weighted sum over all tokens.

    lengths: (B,) completion tokens of all rows of all processes, 0 for a row that is left out of the loss. So no weight
    depends on how rows are split into micro-batches or over processes.
    normalization: "token" is the mean over tokens, "sequence" the mean over rows of the mean over their tokens,
        "constant" the sum over B * max_new_tokens
    """
    kept = (lengths > 0).float()
    if normalization == "token":
        return kept / lengths.sum().clamp(min=1)
    if normalization == "sequence":
        return kept / (lengths.clamp(min=1) * kept.sum().clamp(min=1))
    return kept / (len(lengths) * max_new_tokens)


def policy_loss(log_probs, old_log_probs, advantages, clip_low, clip_high):
    """The clipped surrogate per token (eq. 3, negated) and the ratio pi / pi_old, both (b, T). advantages: (b, 1)."""
    ratio = (log_probs - old_log_probs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -torch.min(ratio * advantages, clipped * advantages), ratio


def kl_estimate(log_probs, ref_log_probs):
    """KL(pi || pi_ref) per token, (b, T), unbiased and never negative: exp(d) - d - 1, d = log(pi_ref / pi) (eq. 4)."""
    d = (ref_log_probs - log_probs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return d.exp() - d - 1


# ----------------------------------------------------------------------------------------------------------------------
# Policy and reference
# ----------------------------------------------------------------------------------------------------------------------


def make_policy(model, lora, gradient_checkpointing):
    """The model with what is to be trained requiring gradients: its adapter, or with `lora: null` all of it.

    A model that came with an adapter goes on training that adapter, and a frozen second copy of it, named "reference",
    is the reference policy.
    """
    if isinstance(model, PeftModel):
        check(lora is not None, "lora", None, "an adapter, as the model has one (merge it to train all weights)")
        settings = model.peft_config["default"]
        own = {"rank": settings.r, "alpha": settings.lora_alpha, "target_modules": sorted(settings.target_modules)}
        for key, value in own.items():
            wanted = sorted(lora.target_modules) if key == "target_modules" else getattr(lora, key)
            check(wanted == value, f"lora.{key}", wanted, f"{value}, as in the adapter that training starts from")
        model.add_adapter("reference", settings)
        parameters = dict(model.named_parameters())
        for name, parameter in parameters.items():
            path = name.split(".")
            if "reference" in path:
                original = ".".join("default" if part == "reference" else part for part in path)
                parameter.data.copy_(parameters[original].data)
        model.set_adapter("default")
    elif lora is not None:
        linears = [f".{name}" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        for target in lora.target_modules:
            found = any(name.endswith(f".{target}") for name in linears)
            check(found, "lora.target_modules", target, "the name of linear layers that the model has")
        settings = LoraConfig(
            r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.target_modules, task_type="CAUSAL_LM"
        )
        model = get_peft_model(model, settings)
    model.eval()  # no dropout, in an adapter from elsewhere either; gradients flow all the same
    if gradient_checkpointing:
        inner_model(model).gradient_checkpointing_enable({"use_reentrant": False})
    return model


@contextlib.contextmanager
def merged_adapter(model):
    """The model with its adapter added to a copy of the weights: the same policy by far fewer operations, to sample.

    On CPUs, where each operation costs, and in fp32: in bf16 the sum would be rounded, and another policy be sampled
    than is trained. Not an adapter with biases, made elsewhere, which PEFT cannot always merge.
    """
    fp32 = all(parameter.dtype == torch.float32 for parameter in model.parameters())
    has_adapter = isinstance(model, PeftModel) and not model.peft_config["default"].lora_bias
    if not has_adapter or model.device.type != "cpu" or not fp32:
        yield
        return
    layers = [layer for name, layer in model.named_modules() if name.endswith(".base_layer")]
    originals = [dict(layer.named_parameters(recurse=False)) for layer in layers]
    try:
        for layer, parameters in zip(layers, originals, strict=True):
            for name, parameter in parameters.items():
                setattr(layer, name, torch.nn.Parameter(parameter.detach().clone(), requires_grad=False))
        model.merge_adapter(["default"])
        yield
    finally:
        try:
            model.unmerge_adapter()
        finally:
            for layer, parameters in zip(layers, originals, strict=True):
                for name, parameter in parameters.items():
                    setattr(layer, name, parameter)


@contextlib.contextmanager
def reference_policy(model, frozen_copy):
    """The model to compute reference log-probs with: the weights that training started from."""
    if frozen_copy is not None:
        yield frozen_copy
    elif "reference" in model.peft_config:
        model.set_adapter("reference")
        try:
            yield model
        finally:
            model.set_adapter("default")
    else:
        with model.disable_adapter():
            yield model


@contextlib.contextmanager
def checkpointed_layers(model):
    """Layers recompute their activations in the backward pass; transformers asks for train mode, here of them alone."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    layers = [layer for layer in layers if layer.gradient_checkpointing]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False


# ----------------------------------------------------------------------------------------------------------------------
# Micro-batches and gradients
# ----------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class MicroBatch:
    ids: torch.Tensor  # (b, T) prompts and completions as sampled, padded on the right
    mask: torch.Tensor  # (b, T) bool, True at completion tokens
    advantages: torch.Tensor  # (b, 1)
    weights: torch.Tensor  # (b, 1), see row_weights
    sampler_log_probs: torch.Tensor  # (b, T)
    old_log_probs: torch.Tensor | None = None  # (b, T), found in the first update
    ref_log_probs: torch.Tensor | None = None  # (b, T), likewise


def make_micro_batches(prompts, completions, advantages, weights, token_budget, pad_id):
    """Rows of weight > 0, longest first, in micro-batches of at most `token_budget` positions (but at least one row).

    prompts: B lists of ids; completions: utils.Completions of B rows; advantages, weights: (B,)
    """
    lengths = completions.mask.sum(1).tolist()
    rows = [row for row, weight in enumerate(weights.tolist()) if weight > 0]
    rows.sort(key=lambda row: len(prompts[row]) + lengths[row], reverse=True)
    micro_batches = []
    while rows:
        T = len(prompts[rows[0]]) + lengths[rows[0]]
        b = max(1, token_budget // T)
        batch, rows = rows[:b], rows[b:]
        ids = torch.full((len(batch), T), pad_id, device=weights.device)
        mask = torch.zeros(ids.shape, dtype=torch.bool, device=weights.device)
        sampler_log_probs = torch.zeros(ids.shape, device=weights.device)
        for i, row in enumerate(batch):
            start, end = len(prompts[row]), len(prompts[row]) + lengths[row]
            ids[i, :start] = torch.tensor(prompts[row])
            ids[i, start:end] = completions.tokens[row, : lengths[row]]
            mask[i, start:end] = True
            sampler_log_probs[i, start:end] = completions.log_probs[row, : lengths[row]]
        micro_batches.append(MicroBatch(ids, mask, advantages[batch, None], weights[batch, None], sampler_log_probs))
    return micro_batches


def halves(batch):
    """A micro-batch as two, of half its rows each."""
    half = (len(batch.ids) + 1) // 2
    parts = [
        {k: None if v is None else v[rows] for k, v in vars(batch).items()} for rows in (slice(half), slice(half, None))
    ]
    return [MicroBatch(**part) for part in parts]


def sum_gradients(parameters, accelerator):
    """Add up the gradients of all processes, in one message. A process without rows in the loss adds zeros."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if accelerator.num_processes == 1:
        return
    flat = accelerator.reduce(torch.cat([p.grad.flatten() for p in parameters]), reduction="sum")
    for parameter, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = grad.view_as(parameter)


TOKEN_METRICS = ("ratio", "ratio_error", "kl_old", "kl_k1", "kl_k3", "clip_low", "clip_high", "entropy", "sampler_gap")


def micro_batch_loss(model, batch, config, frozen_copy, autocast):
    """One micro-batch's part of the step's loss.

    Finds the batch's old and reference log-probs on the first call, which is that of the first update. Returns the
    loss, its KL part without gradient, and values for the log, one a completion token, under names of TOKEN_METRICS.
    """
    with checkpointed_layers(model), autocast():
        log_probs, entropy = completion_log_probs(model, batch.ids, batch.mask, config.temperature)
    is_first = batch.old_log_probs is None
    if is_first:
        batch.old_log_probs = log_probs.detach()
        if config.kl_weight > 0:
            with torch.no_grad(), reference_policy(model, frozen_copy) as reference, autocast():
                batch.ref_log_probs, _ = completion_log_probs(reference, batch.ids, batch.mask, config.temperature)

    token_loss, ratio = policy_loss(log_probs, batch.old_log_probs, batch.advantages, config.clip_low, config.clip_high)
    token_weights = batch.weights * batch.mask  # (b, T)
    loss, kl_term = (token_loss * token_weights).sum(), torch.zeros((), device=log_probs.device)
    if config.kl_weight > 0:
        kl = kl_estimate(log_probs, batch.ref_log_probs)
        kl_term = (config.kl_weight * kl * token_weights).sum()
        loss = loss + kl_term

    with torch.no_grad():
        advantages = batch.advantages.expand_as(ratio)
        values = {
            "ratio": ratio,
            "kl_old": ratio - 1 - ratio.log(),
            "clip_low": (ratio < 1 - config.clip_low) & (advantages < 0),
            "clip_high": (ratio > 1 + config.clip_high) & (advantages > 0),
            "entropy": entropy,
        }
        if is_first:
            values["ratio_error"] = (ratio - 1).abs()
            values["sampler_gap"] = (log_probs - batch.sampler_log_probs).abs()
        if config.kl_weight > 0:
            values["kl_k1"] = log_probs - batch.ref_log_probs
            values["kl_k3"] = kl
        values = {name: value[batch.mask].float() for name, value in values.items()}
    return loss, kl_term.detach(), values


def add_gradients(model, micro_batches, budget, config, frozen_copy, autocast):
    """The gradient of the whole step's loss, added up in the parameters' .grad, micro-batch after micro-batch.

    micro_batches: a list; when the GPU's memory runs out, their halves take their places, `budget`, a HalvingSize, is
        told, and all begins anew, as nobody knows how much of the last one's gradient was added.
    Returns the loss and its KL part, (2,), and {name of TOKEN_METRICS: list of values}.
    """
    is_first = all(batch.old_log_probs is None for batch in micro_batches)
    while True:
        losses, values = torch.zeros(2, device=model.device), {name: [] for name in TOKEN_METRICS}
        try:
            for batch in micro_batches:
                loss, kl_term, batch_values = micro_batch_loss(model, batch, config, frozen_copy, autocast)
                loss.backward()
                losses += torch.stack([loss.detach(), kl_term])
                for name, value in batch_values.items():
                    values[name].append(value)
            return losses, values
        except torch.OutOfMemoryError:
            if all(len(batch.ids) == 1 for batch in micro_batches):
                raise
        loss = None  # and with it the graph of the failed pass, which is most of what the memory is full of
        model.zero_grad()
        budget.halve(max(batch.ids.numel() for batch in micro_batches))
        if is_first:
            for batch in micro_batches:
                batch.old_log_probs = batch.ref_log_probs = None
        micro_batches[:] = [half for batch in micro_batches for half in halves(batch) if len(half.ids)]


def summarize_tokens(values, accelerator):
    """{name: (mean, min, max)} of per-token values {name: 1-D tensors}, over all micro-batches and processes.

    Names without any value, on any process, are left out. Rows that are not computed on, for want of an advantage or a
    place in the loss, are not in it.
    """
    summary = {}
    for name, parts in values.items():
        x = torch.cat([torch.zeros(0, device=accelerator.device), *parts]).float()
        extremes = torch.stack([x.min(), x.max()]) if len(x) else x.new_tensor([torch.inf, -torch.inf])
        total, count = accelerator.reduce(x.new_tensor([x.sum(), len(x)])).tolist()
        extremes = accelerator.gather(extremes[None])  # (processes, 2)
        if count:
            summary[name] = (total / count, extremes[:, 0].min().item(), extremes[:, 1].max().item())
    return summary


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


def save_progress(path, model, tokenizer, optimizer, names):
    """What a checkpoint holds besides its state: the trained weights as a Hugging Face folder, AdamW's moments."""
    write_model(model, tokenizer, path / "model")
    state = optimizer.state_dict()["state"].values()  # of all parameters, or of none before the first update
    moments = {
        f"{name}.{key}": value
        for name, values in zip(names if state else [], state, strict=True)
        for key, value in values.items()
    }
    save_file(moments, path / "optimizer.safetensors")


def load_progress(path, model, optimizer, parameters):
    """Make model and optimizer what they were when `save_progress` wrote `path`. parameters: {name: trained one}"""
    check(path.is_dir(), "resume", str(path), "a folder that all processes can see")
    if isinstance(model, PeftModel):
        set_peft_model_state_dict(model, load_file(path / "model" / "adapter_model.safetensors"), "default")
    else:
        saved = dict(load_model(str(path / "model"), "float32", "cpu").named_parameters())
        for name, parameter in parameters.items():
            parameter.data.copy_(saved[name])
    moments = load_file(path / "optimizer.safetensors")
    state = {
        i: {key: moments[f"{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        for i, name in enumerate(parameters if moments else [])
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def main(config, stop_requested=lambda: False):
    """Train. stop_requested: asked before every step; True ends the run there, with a checkpoint to resume it from."""
    start = time.perf_counter()
    # Set-up: everything that can be wrong with the input is found before the model is loaded.
    accelerator = make_accelerator(config.device, config.dtype)
    world, process, device = accelerator.num_processes, accelerator.process_index, accelerator.device
    train_set, test_items = load_problems(config, world)
    P, G = config.prompts_per_step, config.group_size
    check(P >= world, "prompts_per_step", P, f"at least {world}, one for each process")
    is_main = accelerator.is_main_process
    folder = run_folder(config, "config.yml") if is_main else None

    set_seed(config.seed)  # before the adapter is made: its initial weights follow from the seed, on every process
    # Trained weights are fp32, whatever the rest is computed in: bf16 would round most updates away.
    load_dtype = "float32" if config.lora is None else config.dtype
    model = load_model(config.model, load_dtype, device, config.cache_dir)
    tokenizer = load_tokenizer(config.model, config.cache_dir)
    check_chunked_head(model)
    train_prompts, test_prompts = (
        encode_prompts(tokenizer, [item["prompt"] for item in items], config.system_prompt)
        for items in (train_set, test_items)
    )
    check_prompt_lengths(model, train_prompts + test_prompts, config.max_new_tokens)
    free_keys = {"gradient_checkpointing", "micro_batch_tokens", "generation_batch_size"}
    if config.lr_schedule == "constant":  # else the learning rate depends on where the run ends
        free_keys.add("num_steps")
    identity = run_identity(config, model, train_prompts + test_prompts, [*train_set, *test_items], free_keys)
    model = make_policy(model, config.lora, config.gradient_checkpointing)
    named_parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    parameters = list(named_parameters.values())
    assert parameters, "nothing to train"
    frozen_copy = None
    if config.lora is None and config.kl_weight > 0:
        frozen_copy = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)

    # Go on from the newest checkpoint that is whole.
    checkpoint = state = None
    if is_main:
        config, lock = open_run_folder(folder, config)
        is_es = (folder / "journal.jsonl").exists()
        check(not is_es, "resume", str(folder), "a run of grpo_train.py; this one has a journal.jsonl")
        checkpoint = newest_checkpoint(folder)
        if checkpoint:
            check_same_run(identity, checkpoint[1].get("run", {}), checkpoint[0])
        elif checkpoint_folders(folder):
            raise ValueError(f"resume: no checkpoint in {folder / 'checkpoints'} is whole")
        elif (folder / "config.yml").exists():
            print(f"resume: {folder} has no checkpoint: starting from step 0")
    folder, checkpoint = broadcast_object_list([folder, checkpoint])
    if checkpoint:
        path, state = checkpoint
        num_done = state["step"]
        check(config.num_steps >= num_done, "num_steps", config.num_steps, f"at least the {num_done} done")
        load_progress(path, model, optimizer, named_parameters)
        if fingerprint(named_parameters) != state["weights"]:
            raise ValueError(f"resume: {path / 'model'} does not give the weights that were saved")
    if is_main:
        write_file(folder / "config.yml", config_text(config).encode())  # with which --config resumes the run

    last = (state["step"], state["generated_tokens"]) if state else (-1, -1)
    logger = Logger(folder if is_main else None, config, *last)
    print_banner(
        config,
        model,
        accelerator,
        sum(parameter.numel() for parameter in parameters),
        train_set,
        test_items,
        step=f"{P} prompts x {G} = {P * G:,} completions, up to {P * G * config.max_new_tokens:,} tokens",
        run=f"{config.num_steps:,} steps -> {folder}",
    )
    if state:
        accelerator.print(f"going on after step {state['step']}")
    if config.top_p < 1:
        accelerator.print(f"top_p: {config.top_p} truncates what is sampled, not what is scored: ratios are biased")

    progress = ProgressBar(config.num_steps, state["step"] if state else 0, is_main)
    log = say if is_main else lambda text: None
    generation_batch = HalvingSize("generation_batch_size", config.generation_batch_size)
    update_batch = HalvingSize("micro_batch_tokens", config.micro_batch_tokens)

    def evaluate_policy(state):
        progress.set_description_str("evaluate")
        max_new_tokens = config.max_new_tokens
        with merged_adapter(model):
            result = evaluate(model, tokenizer, test_items, test_prompts, max_new_tokens, generation_batch, accelerator)
        logger.evaluation(result, state["step"], state["generated_tokens"], state["seconds"])
        step, strict, lenient = state["step"], result["strict"], result["lenient"]
        log(f"step {step:4d}  held-out: strict {strict:.1%}, lenient {lenient:.1%}")
        return {"strict": strict, "lenient": lenient}

    def save(state):
        """A checkpoint of the run as it is now; returns what is wrong if it cannot be saved."""
        progress.set_description_str("save")
        if not is_main:
            return None
        state = {**state, "run": identity, "weights": fingerprint(named_parameters)}
        return save_checkpoint(
            folder,
            state["step"],
            state,
            # What skipped steps save must not take the place of good ones: their weights may be why they are skipped.
            config.keep_checkpoints + state["skipped_in_a_row"],
            lambda path: save_progress(path, model, tokenizer, optimizer, named_parameters),
        )

    unsaved = None
    if not state:
        state = {"step": 0, "seconds": 0.0, "generated_tokens": 0, "skipped_steps": 0, "skipped_in_a_row": 0}
        state["before"] = evaluate_policy(state)
        unsaved = save(state)

    progress.begin()
    for step in range(state["step"], config.num_steps):
        if any(gather_object([stop_requested()])):
            break
        phase = PhaseTimer(progress)
        step_start = time.perf_counter()
        seed_libraries(config.seed, step, process)

        # 1. Sample P prompts; this process completes its share of them, G times each.
        with phase("rollout"):
            share = slice(process * P // world, (process + 1) * P // world)
            indices = draw_indices(len(train_set), step * P, P, config.seed)[share]
            uniforms = torch.rand(
                P * G, config.max_new_tokens, generator=seeded_generator(config.seed, "rollout", step)
            )
            prompts = [train_prompts[i] for i in indices]
            with merged_adapter(model), accelerator.autocast():
                completions = generate(
                    model,
                    prompts,
                    config.max_new_tokens,
                    stop_ids(model, tokenizer),
                    tokenizer.pad_token_id,
                    num_samples=G,
                    uniforms=uniforms[share.start * G : share.stop * G],
                    temperature=config.temperature,
                    top_p=config.top_p,
                    batch_size=generation_batch,
                )

        # 2. Score them. From here on every process knows the scores of all B = P * G rows.
        with phase("reward"):
            row_items = [train_set[i] for i in indices for _ in range(G)]
            scores = gather_scores(score_completions(config.rewards, completions, tokenizer, row_items), device)

        skipped = non_finite(scores)  # why this step makes no update

        # 3. Advantages within each group, and what every row weighs in the loss.
        rewards = scores["reward"].view(P, G)
        advantages = group_advantages(rewards, config.scale_advantages).flatten()  # (B,)
        loss_lengths = scores["length"] * (1 - scores["truncated"]) if config.mask_truncated else scores["length"]
        weights = row_weights(loss_lengths, config.loss_normalization, config.max_new_tokens)  # (B,)
        if config.kl_weight == 0:  # rows without advantage have no gradient: they count, but need no computing
            weights = torch.where(advantages == 0, 0.0, weights)

        # 4. K updates on these completions.
        losses, grad_norm = torch.zeros(2, device=device), 0.0
        decay = schedule_factor(config.lr_schedule, step, config.num_steps, config.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * decay
        token_values = {name: [] for name in TOKEN_METRICS}
        with phase("update"):
            rows = slice(share.start * G, share.stop * G)
            micro_batches = make_micro_batches(
                [prompt for prompt in prompts for _ in range(G)],
                completions,
                advantages[rows],
                weights[rows],
                update_batch.size,
                tokenizer.pad_token_id,
            )
            for _ in range(config.updates_per_step if (weights > 0).any() else 0):
                if skipped:
                    break
                losses, values = add_gradients(
                    model, micro_batches, update_batch, config, frozen_copy, accelerator.autocast
                )
                for name, value in values.items():
                    token_values[name] += value
                sum_gradients(parameters, accelerator)
                losses = accelerator.reduce(losses)
                grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm).item()
                if math.isfinite(grad_norm) and losses.isfinite().all():
                    optimizer.step()
                else:
                    skipped = f"the loss is {losses[0]:.3g}, the norm of its gradient {grad_norm:.3g}"
                optimizer.zero_grad()
        if world > 1:
            check_processes_agree(fingerprint(named_parameters), accelerator)

        # 5. Log, evaluate now and then, and save a checkpoint now and then.
        step_seconds = time.perf_counter() - step_start
        state = {
            **state,
            "step": step + 1,
            "seconds": state["seconds"] + step_seconds,
            "generated_tokens": state["generated_tokens"] + int(scores["length"].sum()),
            "skipped_steps": state["skipped_steps"] + bool(skipped),
            "skipped_in_a_row": state["skipped_in_a_row"] + 1 if skipped else 0,
            "after": None,
        }
        tokens = summarize_tokens(token_values, accelerator)
        metrics = {
            **completion_metrics(scores),
            "reward/group_std": rewards.std(dim=1).mean(),
            "reward/equal_groups": (rewards.amax(1) == rewards.amin(1)).float().mean(),
            **{f"policy/{name}": mean for name, (mean, _, _) in tokens.items()},
            "optim/loss": losses[0],
            "optim/kl_term": losses[1],
            "optim/grad_norm": grad_norm,
            "optim/learning_rate": config.learning_rate * decay,
            "optim/skipped_steps": state["skipped_steps"],
            "time/step": step_seconds,
            **{f"time/{name}": seconds for name, seconds in phase.seconds.items()},
            "throughput/tokens_per_second": scores["length"].sum() / step_seconds,
            "throughput/rollout_tokens_per_second": scores["length"].sum() / phase.seconds["rollout"],
            "progress/prompts": (step + 1) * P,
            "progress/completions": (step + 1) * P * G,
            "progress/generated_tokens": state["generated_tokens"],
            "progress/seconds": state["seconds"],
        }
        for name in ("ratio", "ratio_error", "sampler_gap"):
            if name in tokens:
                metrics[f"policy/{name}_min"], metrics[f"policy/{name}_max"] = tokens[name][1:]
        if device.type == "cuda":
            metrics["memory/peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        logger.scalars(metrics, step + 1)
        progress.step_done(step + 1, metrics)

        if skipped:
            log(f"step {step + 1} skipped: {skipped}")
            check_skipped(step + 1, state["skipped_in_a_row"], config.max_skipped_steps, skipped, folder)
        if (step + 1) % config.eval_every == 0 or step + 1 == config.num_steps:
            state["after"] = evaluate_policy(state)
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.num_steps:
            unsaved = save(state)

    if state["step"] < config.num_steps:  # asked to stop
        unsaved = save(state)
        progress.close()
        missing = ", which could not be saved" if unsaved else ""
        accelerator.print(f"stopped after step {state['step']}{missing}; to go on:\n    {resume_command(folder)}")
    else:
        before, after = state["before"], state["after"] or evaluate_policy(state)
        progress.close()
    if is_main and state["step"] == config.num_steps:
        logger.finished()
        print_summary(before, after, len(test_items), state["seconds"], time.perf_counter() - start)
        with whole_folder(folder / "model") as path:
            write_model(model, tokenizer, path)
        print(f"TensorBoard: tensorboard --logdir={config.log_dir}\nThe result is {folder / 'model'}; to load it:")
        if config.lora is None:
            print(f'    AutoModelForCausalLM.from_pretrained("{folder / "model"}")')
        else:
            base_name = model.peft_config["default"].base_model_name_or_path
            print(f'    base = AutoModelForCausalLM.from_pretrained("{base_name}")')
            print(f'    PeftModel.from_pretrained(base, "{folder / "model"}")')
    is_behind = False
    if is_main:
        is_behind = logger.is_behind()
        lock.close()
    accelerator.end_training()
    if unsaved or is_behind:
        raise OSError(unsaved or f"{folder}: the TensorBoard log lacks its last records")


if __name__ == "__main__":
    run_from_command_line(
        main,
        GRPOConfig,
        "grpo_config.yml",
        example="lora.rank=32",
        memory_keys="max_new_tokens or group_size, or set gradient_checkpointing: true, or dtype: bfloat16",
    )
