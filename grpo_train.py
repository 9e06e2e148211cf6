"""GRPO: group relative policy optimization of a language model with verifiable rewards.

Shao et al. 2024, "DeepSeekMath", arXiv:2402.03300, section 4. For each prompt q, sample G completions o_i from the
policy and score them. The advantage of a completion is how much better it is than its group:

    A_i = (r_i - mean(r)) / std(r)                                                   r: the group's G rewards

Then make K updates that raise the probability of the tokens of good completions; clipping limits the change:

    ratio_t = pi(o_t | q, o_<t) / pi_old(o_t | q, o_<t)
    loss_t  = -min(ratio_t A, clip(ratio_t, 1 - clip_low, 1 + clip_high) A) + kl_weight * KL_t(pi || pi_ref)

Departures from the paper:
- The reference is always the starting model; the paper replaces it periodically. By default, kl_weight is 0.
- loss_t is averaged over all completion tokens of the step (`loss_normalization: token`, DAPO, arXiv:2503.14476), not
  within each completion first (`sequence`). `constant` is Dr. GRPO, arXiv:2503.20783.
- pi_old comes from the first training pass, not from the sampler, so ratio_t is exactly 1 in the first update. With
  updates_per_step 1, the default, clipping and ratio_level therefore have no effect.
- Equal rewards in a group give advantages of exactly 0. Completions of advantage 0 are skipped when kl_weight is 0.
- With max_sampling_rounds above 1, a step draws P more prompts, up to this many times, until rewards differ within P
  groups (DAPO, section 3.2). It trains on all such groups, not on P of them, and still averages the loss over all
  groups: if most of them tie, the gradient is small.

    python grpo_train.py
    python grpo_train.py --config recipes/grpo_gsm8k.yml
    python grpo_train.py learning_rate=2e-5 group_size=16 lora.rank=32
    accelerate launch --num_processes 2 grpo_train.py      (on a CPU: torchrun --nproc_per_node 2 grpo_train.py)

Where to make changes: the advantage in `group_advantages`; the loss in `policy_loss` and `token_weights`, combined in
`micro_batch_loss`; the trained parameters in `make_policy`; the loop and metrics in `train`, per-token metrics in
`micro_batch_loss`. Elsewhere: sampling and log-probs (generation.py), rewards (reward.py), checkpoints and logs
(runs.py).

Shapes: P prompts, G completions per prompt, B rows of all groups, b rows in a micro-batch, T tokens.
"""

import collections
import contextlib
import copy
import dataclasses
import itertools
import math
import os
import signal
from typing import Annotated, Literal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback for Ctrl-C while imports and loading take their time

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_layers import GradientCheckpointingLayer

import utils
from generation import Completions, completion_log_probs, generate, group_adapters, inner_model, probe, shares_prompts
from reward import UserError
from runs import Run, check_folder, run_identity
from utils import draw_problems, gather_scores, non_finite, schedule_factor, score_completions, share

# --- Config: grpo_config.yml documents each key -----------------------------------------------------------------------


class LoRA(utils.Config):
    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    target_modules: Annotated[list[str], Field(min_length=1)] | Literal["all-linear"] = [
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    ]


class GRPOConfig(utils.RunConfig):
    lora: LoRA | None = LoRA()
    gradient_checkpointing: bool = False
    # Rollout
    num_steps: NonNegativeInt = 60
    prompts_per_step: PositiveInt = 32
    max_sampling_rounds: PositiveInt = 1
    group_size: int = Field(8, ge=2)  # a group of one has nothing to compare with
    temperature: PositiveFloat = 1.0
    # Objective
    scale_advantages: Literal["group", "batch", "none"] = "group"
    loss_normalization: Literal["token", "sequence", "constant"] = "token"
    ratio_level: Literal["token", "sequence"] = "token"
    clip_low: float = Field(0.2, gt=0, lt=1)
    clip_high: PositiveFloat = 0.2
    kl_weight: NonNegativeFloat = 0.0
    updates_per_step: PositiveInt = 1
    mask_truncated: bool = False
    # Optimizer
    learning_rate: PositiveFloat = 1e-3
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup_steps: NonNegativeInt = 5
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat = 1.0
    # Memory and speed, logs
    micro_batch_tokens: PositiveInt | Literal["auto"] = "auto"
    generation_batch_size: PositiveInt | Literal["auto"] = "auto"
    attention: Literal["sdpa", "flash"] = "sdpa"
    log_dir: utils.UserPath = "grpo_logs"


# --- The math ---------------------------------------------------------------------------------------------------------

MAX_LOG_RATIO = 20.0  # clamp log-ratios before exp, which would overflow; exp(20) is 5e8


def group_advantages(rewards, scale):
    """Return advantages (P, G): (reward - group mean) / standard deviation (section 4.1.2). rewards: (P, G)

    scale: "group" divides by the group's standard deviation (over G - 1), "batch" by that of all rewards, "none" by 1
    Equal rewards get exactly 0. Compare them instead of adding an epsilon: rounding can leave a tiny nonzero std.
    """
    rewards = rewards.double()
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    if scale == "group":
        advantages = advantages / rewards.std(dim=1, keepdim=True)
    elif scale == "batch":
        advantages = advantages / rewards.std()
    tied = rewards.amax(dim=1, keepdim=True) == rewards.amin(dim=1, keepdim=True)
    return torch.where(tied, 0.0, advantages).float()


def token_weights(lengths, normalization, max_new_tokens):
    """Return the loss weight of every token in each row, (B,). The step's loss is the weighted sum over all tokens.

    lengths: (B,) number of completion tokens in each row of all processes, 0 for a row that is excluded from the loss
    normalization: "token" is the mean over tokens, "sequence" the mean over rows of the mean over their tokens,
        "constant" the sum divided by B * max_new_tokens
    """
    kept = (lengths > 0).float()
    if normalization == "token":
        return kept / lengths.sum().clamp(min=1)
    if normalization == "sequence":
        return kept / (lengths.clamp(min=1) * kept.sum().clamp(min=1))
    return kept / (len(lengths) * max_new_tokens)


def policy_loss(log_probs, old_log_probs, advantages, clip_low, clip_high, ratio_level="token", mask=None):
    """Return the clipped loss per token (eq. 3, negated) and the ratio pi / pi_old, both (b, T).

    log_probs, old_log_probs: (b, T), 0 outside the mask; advantages: (b, 1); mask: (b, T), for ratio_level "sequence"
    """
    log_ratio = log_probs - old_log_probs  # (b, T), 0 outside the mask
    if ratio_level == "sequence":  # one ratio per completion, from the mean log-ratio (GSPO, arXiv:2507.18071, eq. 7)
        log_ratio = (log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True)).expand_as(log_ratio)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -torch.min(ratio * advantages, clipped * advantages), ratio


def kl_estimate(log_probs, ref_log_probs):
    """Per-token estimate of KL(pi || pi_ref), (b, T): exp(d) - d - 1 with d = log(pi_ref / pi) (eq. 4).

    It is never negative, and unbiased if the tokens were sampled from pi, as in the first update.
    """
    d = (ref_log_probs - log_probs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return d.exp() - d - 1


# --- The policy -------------------------------------------------------------------------------------------------------


def make_policy(model, lora, gradient_checkpointing):
    """Return the model with gradients enabled for a LoRA adapter, or for all parameters if `lora` is None.

    If the model was loaded with an adapter, train that one, with a frozen copy of it as the reference policy, or merge
    it if `lora` is None.
    """
    if isinstance(model, PeftModel) and lora is None:
        model = model.merge_and_unload().requires_grad_(True)
    elif isinstance(model, PeftModel):
        model.add_adapter("reference", model.peft_config["default"])
        weights = get_peft_model_state_dict(model, adapter_name="default", save_embedding_layers=False)
        set_peft_model_state_dict(model, weights, "reference")
        model.set_adapter("default")
    elif lora is not None:
        layers = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        targets = [] if lora.target_modules == "all-linear" else lora.target_modules
        for target in targets:
            if not any(f".{name}".endswith(f".{target}") for name in layers):
                names = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
                raise UserError(f"lora.target_modules: {target}: the model's linear layers are {names}")
        utils.check_tied_head(model, targets)
        shape = {"r": lora.rank, "lora_alpha": lora.alpha, "target_modules": lora.target_modules}
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **shape))
    model.eval()  # no dropout, even in a loaded adapter; gradients still flow
    group_adapters(model)  # for speed
    if gradient_checkpointing:
        checkpoint_layers(model)
    return model


def checkpoint_layers(model):
    """Let the backward pass recompute activations. transformers does that only for layers in train mode.

    Their submodules stay in eval mode. Raise UserError if a layer has dropout of its own.
    """
    logits = probe(model)
    inner_model(model).gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    for module in model.modules():
        module.training = isinstance(module, GradientCheckpointingLayer)
    if not torch.equal(probe(model), logits):
        raise UserError("gradient_checkpointing: the model's layers have dropout: set it to 0 in its config.json")


@contextlib.contextmanager
def reference_policy(model, frozen_copy):
    """Yield the reference policy: the model that training started from."""
    if frozen_copy is not None:
        yield frozen_copy
    elif "reference" in model.peft_config:
        model.set_adapter("reference")
        yield model
        model.set_adapter("default")
    else:
        with model.disable_adapter():
            yield model


# --- Rollout and update -----------------------------------------------------------------------------------------------


def rollout(policy, problems, uniforms, settings, accelerator):
    """Sample G completions of each problem. uniforms: (P, G, max_new_tokens)"""
    prompts, G = [problem.ids for problem in problems], uniforms.shape[1]
    with accelerator.autocast():
        return generate(policy, prompts, settings, num_samples=G, uniforms=uniforms.flatten(0, 1))


@dataclasses.dataclass
class MicroBatch:
    ids: torch.Tensor  # (b, T) prompts and completions as sampled, padded on the right
    mask: torch.Tensor  # (b, T) bool, True at completion tokens
    advantages: torch.Tensor  # (b, 1)
    weights: torch.Tensor  # (b, 1), see token_weights
    sampler_log_probs: torch.Tensor  # (b, T)
    old_log_probs: torch.Tensor | None = None  # (b, T), computed in the first update
    ref_log_probs: torch.Tensor | None = None  # (b, T), computed in the first update


def make_micro_batches(prompts, completions, advantages, weights, token_budget, shares_prompts):
    """Pack the rows of nonzero weight into micro-batches of whole groups, so that each prompt is computed once.

    Pack single rows of similar length instead if that computes fewer positions, as with short prompts and completions
    of very different lengths. A micro-batch computes about `token_budget` positions at most, padding included. If the
    model `shares_prompts`, it computes the common prefix of all prompts, the rest of each prompt, and the completions.
    A group that exceeds the budget is split into rows; a single row may exceed it.
    prompts: P lists of token ids; completions: P * G rows; advantages, weights: (P * G,)
    """
    G, lengths = len(weights) // len(prompts), completions.mask.sum(1).tolist()
    prefix = len(os.path.commonprefix(prompts)) if shares_prompts else 0

    def prompt_of(row):
        return prompts[row // G]

    def longest(rows):
        return max(lengths[row] + (0 if shares_prompts else len(prompt_of(row))) for row in rows)

    def num_positions(rows):
        rest = max(len(prompt_of(row)) for row in rows) - prefix if shares_prompts else 0
        return prefix + len({row // G for row in rows}) * rest + len(rows) * longest(rows)

    def pack(groups):
        batches = [[]]
        for group in sorted(groups, key=longest, reverse=True):
            for rows in [group] if num_positions(group) <= token_budget else [[row] for row in group]:
                if batches[-1] and num_positions(batches[-1] + rows) > token_budget:
                    batches.append([])
                batches[-1] += rows
        return list(filter(None, batches))

    kept = [row for row, weight in enumerate(weights.tolist()) if weight > 0]
    groups = [list(rows) for _, rows in itertools.groupby(kept, key=lambda row: row // G)]
    packings = pack(groups), pack([[row] for row in kept])
    batches = min(packings, key=lambda batches: sum(map(num_positions, batches)))

    # Lay out all rows in whole arrays, so that the number of copies to the device does not depend on their number.
    device, order = weights.device, list(itertools.chain.from_iterable(batches))
    starts = torch.tensor([[len(prompt_of(row))] for row in order], dtype=torch.long, device=device)
    padded = pad_sequence(list(map(torch.tensor, prompts)), batch_first=True).to(device)  # (P, L)
    rows = torch.tensor(order, dtype=torch.long, device=device)
    T = max((len(prompt_of(row)) + lengths[row] for row in order), default=0)
    offsets = torch.arange(T, device=device) - starts  # (rows, T) of each position in its completion
    columns = offsets.clamp(0, completions.mask.shape[1] - 1)
    mask = completions.mask[rows].gather(1, columns) & (offsets == columns)
    prompt_ids = F.pad(padded, (0, T - padded.shape[1]))[rows // G]
    ids = torch.where(mask, completions.tokens[rows].gather(1, columns), prompt_ids)
    log_probs = torch.where(mask, completions.log_probs[rows].gather(1, columns), 0.0)

    micro_batches, first = [], 0
    for batch in batches:
        part = slice(first, first := first + len(batch))
        T = max(len(prompt_of(row)) + lengths[row] for row in batch)
        of_rows = advantages[rows[part], None], weights[rows[part], None]
        micro_batches.append(MicroBatch(ids[part, :T], mask[part, :T], *of_rows, log_probs[part, :T]))
    return micro_batches


EXTREMES = ("ratio", "sampler_gap")  # metrics of `micro_batch_loss` of which the minimum and maximum are logged, too


def micro_batch_loss(model, batch, config, frozen_copy, autocast):
    """Return a micro-batch's share of the step's loss, its KL term (detached), and per-token metrics {name: (n,)}.

    In the first update, record the log-probs as pi_old in the batch, and compute those of the reference.
    """
    with autocast():
        log_probs, entropy = completion_log_probs(model, batch.ids, batch.mask, config.temperature)
    values = {"entropy": entropy}  # {name: (b, T)}
    if batch.old_log_probs is None:
        batch.old_log_probs = log_probs.detach()
        values["sampler_gap"] = (batch.old_log_probs - batch.sampler_log_probs).abs()
        if config.kl_weight > 0:
            with torch.no_grad(), reference_policy(model, frozen_copy) as reference, autocast():
                batch.ref_log_probs, _ = completion_log_probs(reference, batch.ids, batch.mask, config.temperature)

    old, A, clip_range = batch.old_log_probs, batch.advantages, (config.clip_low, config.clip_high)
    token_loss, ratio = policy_loss(log_probs, old, A, *clip_range, config.ratio_level, batch.mask)
    weights = batch.weights * batch.mask  # (b, T)
    loss, kl_term = (token_loss * weights).sum(), torch.zeros((), device=log_probs.device)
    if config.kl_weight > 0:
        kl = kl_estimate(log_probs, batch.ref_log_probs)
        kl_term = (config.kl_weight * kl * weights).sum()
        loss = loss + kl_term
        values |= {"kl_k1": log_probs - batch.ref_log_probs, "kl_k3": kl}

    ratio = ratio.detach()
    values |= {
        "ratio": ratio,
        "kl_old": ratio - 1 - ratio.log(),  # KL(pi_old || pi)
        # Clipped tokens, as in `policy_loss`: change both.
        "clip_low": (ratio < 1 - config.clip_low) & (A < 0),
        "clip_high": (ratio > 1 + config.clip_high) & (A > 0),
    }
    return loss, kl_term.detach(), {name: value.detach()[batch.mask].float() for name, value in values.items()}


def update(policy, optimizer, micro_batches, config, frozen_copy, accelerator, values):
    """Take one optimizer step on the gradient of the whole step's loss, summed over micro-batches and processes.

    values: {name: list of (n,)}, extended by the metrics of this update
    Return the loss and its KL term (2,), the gradient norm, and a failure: None, or a message if one of these is not
    finite and no step was taken.
    """
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    losses = torch.zeros(2, device=accelerator.device)
    for batch in micro_batches:
        loss, kl_term, batch_values = micro_batch_loss(policy, batch, config, frozen_copy, accelerator.autocast)
        loss.backward()
        losses += torch.stack([loss.detach(), kl_term])
        for name, value in batch_values.items():
            values[name].append(value)
    utils.sum_gradients(parameters, accelerator)
    losses = accelerator.reduce(losses)
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm).item()
    is_finite = math.isfinite(grad_norm) and losses.isfinite().all()
    if is_finite:
        optimizer.step()
    optimizer.zero_grad()
    failure = None if is_finite else f"the loss is {losses[0]:.3g} and the gradient norm {grad_norm:.3g}"
    return losses, grad_norm, failure


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def save_progress(path, setup, optimizer):
    """Write the trained weights as a Hugging Face folder, and AdamW's moments."""
    utils.save_model(setup.model, setup.tokenizer, path / "model")
    state = optimizer.state_dict()["state"]  # {index: {"step", "exp_avg", "exp_avg_sq"}}, empty before the first update
    moments = {f"{index}.{key}": value for index, values in state.items() for key, value in values.items()}
    save_file(moments, path / "optimizer.safetensors")


def load_progress(path, setup, optimizer, weights):
    """Restore the state that `save_progress` wrote. weights: {name: trained parameter}"""
    if isinstance(setup.model, PeftModel):
        set_peft_model_state_dict(setup.model, load_file(path / "model" / "adapter_model.safetensors"), "default")
    else:
        utils.load_weights(path / "model", weights)
    state = optimizer.state_dict()
    for name, moment in load_file(path / "optimizer.safetensors").items():
        index, key = name.split(".")
        state["state"].setdefault(int(index), {})[key] = moment
    optimizer.load_state_dict(state)


# --- Training ---------------------------------------------------------------------------------------------------------


def train(config, setup, run, optimizer, frozen_copy=None):
    """Run the paper's algorithm. frozen_copy: the reference policy, if there is no adapter to disable"""
    policy, accelerator = setup.model, setup.accelerator
    P, G, K = config.prompts_per_step, config.group_size, config.updates_per_step
    mine = share(P, accelerator)  # the slice of the prompts that this process completes
    for step in run.steps():
        generator = utils.seeded_generator(config.seed, "rollout", step)
        problems, rounds, rows = [], [], []  # of this process
        for _ in range(config.max_sampling_rounds):  # dynamic sampling: until rewards differ within P groups
            # 1. Draw P prompts, and sample G completions of each from the current policy. Each process takes its share.
            with run.phase("rollout"):
                start = run.state["prompts"] + len(rounds) * P
                drawn = draw_problems(setup.train_set, start, P, config.seed)[mine]
                uniforms = torch.rand(P, G, config.max_new_tokens, generator=generator)  # for `sample`
                rounds.append(rollout(policy, drawn, uniforms[mine], setup.settings, accelerator))
                problems += drawn

            # 2. Score every completion. Gather the scores of all processes: {name: (B,)}.
            with run.phase("reward"):
                problem_of_row = [problem for problem in drawn for _ in range(G)]
                rows += score_completions(config.rewards, rounds[-1], setup, problem_of_row)
                scores = gather_scores(rows, accelerator.device)
            rewards = scores["reward"].view(-1, G)
            tied = rewards.amax(1) == rewards.amin(1)  # (groups,)
            if (~tied).sum() >= P:
                break
        own = slice(len(rounds) * mine.start, len(rounds) * mine.stop)  # the groups of this process
        completions = Completions(*map(torch.cat, zip(*(vars(part).values() for part in rounds), strict=True)))
        skipped = non_finite(scores)  # the reason to skip the update, or None

        # 3. Compute advantages within each group, and the weight of each completion's tokens in the loss, (groups, G).
        advantages = group_advantages(rewards, config.scale_advantages)
        lengths = scores["length"]  # (B,)
        if config.mask_truncated:
            lengths = lengths * (1 - scores["truncated"])
        loss_weights = token_weights(lengths, config.loss_normalization, config.max_new_tokens).view(-1, G)
        has_signal = (loss_weights * advantages != 0).any(1)  # (groups,)
        if config.kl_weight == 0:  # zero-advantage completions contribute no gradient: skip their forward pass
            loss_weights = torch.where(advantages == 0, 0.0, loss_weights)

        # 4. Take K clipped policy-gradient updates. The first records pi_old. `losses` are those of the last.
        factor = schedule_factor(config.lr_schedule, step, config.num_steps, config.warmup_steps)
        learning_rate = optimizer.param_groups[0]["lr"] = config.learning_rate * factor
        losses, grad_norm, values = torch.zeros(2), 0.0, collections.defaultdict(list)
        with run.phase("update"):
            prompts = [problem.ids for problem in problems]
            local = prompts, completions, advantages[own].flatten(), loss_weights[own].flatten()
            can_share = shares_prompts(inner_model(policy), max(map(len, prompts)) + config.max_new_tokens)
            batches = make_micro_batches(*local, config.micro_batch_tokens, can_share)
            for _ in range(K if loss_weights.any() else 0):
                if not skipped:
                    losses, grad_norm, skipped = update(
                        policy, optimizer, batches, config, frozen_copy, accelerator, values
                    )

        # 5. Log.
        metrics = {
            "reward/group_std": rewards.std(dim=1).mean(),
            "reward/zero_variance_groups": tied.float().mean(),
            **{f"policy/{name}": value for name, value in utils.summarize(values, EXTREMES).items()},
            "optim/loss": losses[0],
            "optim/kl_term": losses[1],
            "optim/grad_norm": grad_norm,
            "optim/learning_rate": learning_rate,
        }
        run.log(step, scores, metrics, skipped, num_prompts=len(tied), signal_share=float(has_signal.sum() / P))


def main(config):
    check_folder(config)
    # Train fp32 weights, since bf16 would round most updates away. PEFT keeps adapters of a bf16 model in fp32.
    weights_dtype = "float32" if config.lora is None else config.dtype
    setup = utils.set_up(config, weights_dtype, autocast=config.dtype == "bfloat16", temperature=config.temperature)
    on_gpu = setup.accelerator.device.type == "cuda"
    if config.attention == "flash" and not (on_gpu and config.dtype == "bfloat16"):
        raise UserError("attention: flash: needs a GPU and dtype: bfloat16")
    share(config.prompts_per_step, setup.accelerator)  # raises if there are fewer prompts than processes
    utils.check_chunked_head(setup.model)
    if isinstance(setup.model, PeftModel) and config.lora:  # train the adapter that the model has
        own = setup.model.peft_config["default"]
        lora = LoRA(rank=own.r, alpha=own.lora_alpha, target_modules=sorted(own.target_modules))
        utils.say_once(f"lora    {lora}, the model's own")
        config = config.model_copy(update={"lora": lora})
    identity = run_identity(config, setup)  # of the model before it gets an adapter
    setup.model = policy = make_policy(setup.model, config.lora, config.gradient_checkpointing)
    if config.attention == "flash":  # in the update, see `completion_log_probs`
        inner_model(policy).config._attn_implementation = "flash"
    trained = {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}
    frozen_copy = copy.deepcopy(policy).requires_grad_(False) if config.lora is None and config.kl_weight else None
    longest = max(len(problem.ids) for problem in setup.train_set + setup.test_set)
    free = torch.cuda.mem_get_info(setup.accelerator.device)[0] if on_gpu else None
    config = utils.fit_to_memory(config, policy, longest, free)
    setup.settings.batch_size = config.generation_batch_size
    optimizer = torch.optim.AdamW(trained.values(), lr=config.learning_rate, weight_decay=config.weight_decay)

    run = Run(
        config,
        setup,
        identity,
        step_text=f"{config.prompts_per_step} prompts x {config.group_size} completions",
        weights=trained,
        evaluate=lambda: utils.evaluate(setup),
        save=lambda path: save_progress(path, setup, optimizer),
        load=lambda path, _: load_progress(path, setup, optimizer, trained),
    )
    train(config, setup, run, optimizer, frozen_copy)


if __name__ == "__main__":
    utils.run_from_command_line(main, GRPOConfig, "grpo_config.yml")
