"""Tests of GRPO's math: by hand where that fits in a comment, else against a plain loop over single rows."""

import contextlib
import copy
import shutil
from collections import defaultdict
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator
from conftest import EOS, VOCAB, make_model, random_prompts, settings
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import OPTConfig, OPTForCausalLM

import generation
import grpo_train
import utils
from generation import Completions, completion_log_probs, generate, sampling_mode, shares_prompts
from grpo_train import GRPOConfig, LoRA, group_advantages, kl_estimate, make_policy, policy_loss, token_weights
from reward import UserError

MAX_NEW = 20
ADVANTAGES = torch.randn(16, generator=torch.Generator().manual_seed(0))

# Advantages, weights and losses


def test_advantages_are_rewards_minus_the_group_mean_over_the_std_of_the_group_or_the_batch_or_nothing():
    rewards = torch.tensor([[1.0, 0.0, 1.0, 0.0], [2.0, 0.0, 1.0, 1.0]])
    centered = torch.tensor([[0.5, -0.5, 0.5, -0.5], [1.0, -1.0, 0.0, 0.0]])  # means 0.5 and 1
    for scale, std in {
        "group": [[0.57735], [0.81650]],  # sqrt(4 * 0.25 / 3) and sqrt((1 + 1) / 3)
        "batch": [[0.70711]],  # the mean of all eight is 0.75: sqrt((4 * 0.0625 + 3 * 0.5625 + 1.5625) / 7)
        "none": [[1.0]],
    }.items():
        torch.testing.assert_close(group_advantages(rewards, scale), centered / torch.tensor(std), atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("reward", [0.9, 0.7, -0.3])
@pytest.mark.parametrize("group_size", [2, 3, 8, 16])
def test_equal_rewards_give_zero_advantage(reward, scale, group_size):
    rewards = torch.full((2, group_size), reward)
    assert not group_advantages(rewards, scale).any()
    rewards[0, 0] += 1.0  # the first group now varies, the second must stay at exactly 0
    spread, equal = group_advantages(rewards, scale)
    assert spread[0] > 0 and not equal.any()


def test_token_weights_by_hand_and_zero_when_all_rows_are_truncated():
    lengths = torch.tensor([4.0, 1.0, 0.0, 5.0])  # the third row is left out of the loss
    for normalization, expected in {
        "token": [1 / 10, 1 / 10, 0, 1 / 10],
        "sequence": [1 / 12, 1 / 3, 0, 1 / 15],  # 3 rows, 1 / (3 * length) per token
        "constant": [1 / 80, 1 / 80, 0, 1 / 80],  # 4 rows of up to 20 tokens
    }.items():
        torch.testing.assert_close(token_weights(lengths, normalization, MAX_NEW), torch.tensor(expected))
        assert torch.equal(token_weights(torch.zeros(4), normalization, MAX_NEW), torch.zeros(4))


def test_clipped_surrogate_by_hand():
    ratios = torch.tensor([[0.5, 0.9, 1.0, 1.1, 1.5]])
    # A = 1: the objective is capped at ratio 1.3. A = -1: it is capped at ratio 0.8. The loss is its negative.
    for advantage, expected in [(1.0, [-0.5, -0.9, -1.0, -1.1, -1.3]), (-1.0, [0.8, 0.9, 1.0, 1.1, 1.5])]:
        loss, ratio = policy_loss(ratios.log(), torch.zeros(1, 5), torch.tensor([[advantage]]), 0.2, 0.3)
        torch.testing.assert_close((loss, ratio), (torch.tensor([expected]), ratios))


def test_sequence_ratio_is_the_exponential_of_the_mean_log_ratio_of_a_completions_tokens():
    # Completion 1: two tokens, log-ratios 0.3 and -0.1, mean 0.1: ratio e^0.1 = 1.1052 on both, not e^0.3 and e^-0.1.
    # Completion 2: one token, log-ratio 0.4: e^0.4 = 1.4918, clipped to 1.2. Positions outside the mask hold 0.
    log_probs = torch.tensor([[0.0, -0.7, -1.1], [0.0, 0.0, -0.6]], requires_grad=True)
    old = torch.tensor([[0.0, -1.0, -1.0], [0.0, 0.0, -1.0]])
    mask = torch.tensor([[False, True, True], [False, False, True]])
    loss, ratio = policy_loss(log_probs, old, torch.tensor([[2.0], [3.0]]), 0.2, 0.2, "sequence", mask)
    assert ratio[mask].tolist() == pytest.approx([1.1052, 1.1052, 1.4918], abs=1e-4)
    assert loss[mask].tolist() == pytest.approx([-2.2103, -2.2103, -3.6], abs=1e-4)
    # d loss / d log_prob of each token of completion 1, with the loss summed over both tokens: -2 * 2 * e^0.1 / 2.
    (loss * mask).sum().backward()
    assert log_probs.grad[mask].tolist() == pytest.approx([-2.2103, -2.2103, 0.0], abs=1e-4)


def test_kl_estimate_by_hand_is_never_negative_and_averages_to_the_kl_divergence():
    # d = log(0.2 / 0.1) = 0.6931: exp(d) - d - 1 = 2 - 0.6931 - 1
    assert kl_estimate(torch.tensor(0.1).log(), torch.tensor(0.2).log()).item() == pytest.approx(0.30685, abs=1e-5)
    assert (kl_estimate(torch.randn(1000), torch.randn(1000)) >= 0).all()
    p, q = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.3, 0.3, 0.4]).double()
    torch.testing.assert_close((p * kl_estimate(p.log(), q.log())).sum(), (p * (p / q).log()).sum())


@pytest.mark.parametrize("gap", [100.0, -100.0, 1000.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_log_ratio_of_100_stays_finite(gap, advantage):
    log_probs = torch.zeros(1, 1, requires_grad=True)
    loss, ratio = policy_loss(log_probs, log_probs.detach() + gap, torch.tensor([[advantage]]), 0.2, 0.2)
    loss = loss + kl_estimate(log_probs, log_probs.detach() + gap)
    loss.sum().backward()
    assert torch.isfinite(loss + ratio + log_probs.grad).all()


# Micro-batches and gradients


def trained(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def randomized(model, std):
    """Randomize the trained weights: a fresh adapter adds nothing, because its B is 0."""
    torch.manual_seed(0)
    for parameter in trained(model).values():
        torch.nn.init.normal_(parameter, std=std)
    return model


def rollout(model):
    prompts = [prompt for prompt in random_prompts([3, 11, 6, 2]) for _ in range(4)]
    uniforms = torch.rand(16, MAX_NEW, generator=torch.Generator().manual_seed(3))
    return prompts, generate(model, prompts, settings(MAX_NEW, [EOS, 5]), uniforms=uniforms)


def one_batch(prompts, completions, normalization="token", rows=slice(None)):
    """Make a micro-batch of some of the 16 rows, with the weights that they have in the whole step."""
    weights, chosen = token_weights(completions.mask.sum(1).float(), normalization, MAX_NEW), torch.zeros(16)
    chosen[rows] = weights[rows]
    (batch,) = grpo_train.make_micro_batches(prompts, completions, ADVANTAGES, chosen, 10**6, True)
    return batch


def step_gradient(model, config, rows_per_batch, prompts, completions, drift=0.0):
    """Return (gradient, losses, metrics) of one update with `rows_per_batch` rows per micro-batch."""
    model.zero_grad()
    slices = [slice(first, first + rows_per_batch) for first in range(0, 16, rows_per_batch)]
    batches = [one_batch(prompts, completions, config.loss_normalization, rows) for rows in slices]
    for batch in batches if drift else []:  # as in a later update: the policy has moved away from the old log-probs
        with torch.no_grad():
            log_probs, _ = completion_log_probs(model, batch.ids, batch.mask, config.temperature)
        batch.old_log_probs = log_probs + drift * torch.sin(10 * log_probs) * batch.mask
        batch.ref_log_probs = log_probs - drift * torch.cos(10 * log_probs) * batch.mask
    accelerator, values = Accelerator(cpu=True), defaultdict(list)
    losses, norm, _ = grpo_train.update(model, Mock(), batches, config, None, accelerator, values)
    gradient = torch.cat([p.grad.flatten() for p in trained(model).values()])  # the mock optimizer takes no step
    return gradient, losses, utils.summarize(values, {"ratio"}) | {"grad_norm": norm}


@pytest.mark.parametrize("normalization", ["token", "sequence", "constant"])
def test_gradient_and_metrics_do_not_depend_on_micro_batches(normalization):
    model = randomized(make_policy(make_model(), LoRA(rank=4), False), 0.1)
    config, (prompts, completions) = GRPOConfig(loss_normalization=normalization, kl_weight=0.1), rollout(model)
    assert completions.mask.sum(1).unique().numel() > 4
    whole, losses, summary = step_gradient(model, config, 16, prompts, completions, drift=0.3)
    assert summary["clip_low"] > 0 < summary["clip_high"] and summary["ratio_min"] < 0.9 < 1.1 < summary["ratio_max"]
    for rows in (1, 2, 8):
        gradient, part_losses, part = step_gradient(model, config, rows, prompts, completions, drift=0.3)
        torch.testing.assert_close(gradient, whole, atol=1e-6 * whole.abs().max().item(), rtol=1e-4)
        torch.testing.assert_close(part_losses, losses, atol=0, rtol=1e-5)
        assert part == {name: pytest.approx(value, rel=1e-4, abs=1e-6) for name, value in summary.items()}


def test_gradient_equals_a_plain_loop_over_unpadded_rows_and_is_clipped_to_max_grad_norm():
    model, config = make_model(), GRPOConfig(temperature=0.8, max_grad_norm=1e6)
    prompts, completions = rollout(model)
    gradient, losses, _ = step_gradient(model, config, 4, prompts, completions)

    model.zero_grad()
    num_tokens = completions.mask.sum()
    for A, prompt, tokens, mask in zip(ADVANTAGES, prompts, completions.tokens, completions.mask, strict=True):
        ids = torch.cat([torch.tensor(prompt), tokens[mask]])
        logits = model(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1] / 0.8
        log_probs = logits.log_softmax(-1).gather(-1, tokens[mask, None])[:, 0]
        (-A * log_probs.sum() / num_tokens).backward()  # the surrogate's gradient at ratio 1
    plain = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(gradient, plain, atol=1e-6, rtol=1e-4)
    expected = -float(ADVANTAGES @ completions.mask.sum(1).float() / num_tokens)
    assert losses[0].item() == pytest.approx(expected, rel=1e-5)

    config = GRPOConfig(temperature=0.8, max_grad_norm=0.1)
    gradient, _, metrics = step_gradient(model, config, 4, prompts, completions)
    torch.testing.assert_close(gradient, 0.1 * plain / plain.norm(), atol=1e-6, rtol=1e-3)
    assert metrics["grad_norm"] == pytest.approx(plain.norm().item(), rel=1e-4)  # before clipping


class CountOperations(TorchDispatchMode):
    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += not function.is_view
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_adapters_of_one_input_are_one_product_with_pefts_log_probs_and_gradients(family):
    ids, results, counts = torch.tensor(random_prompts([12, 12])), [], []
    for grouped in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if not grouped:
                patch.setattr(grpo_train, "group_adapters", lambda model: None)
            model = randomized(make_policy(make_model(family=family).double(), LoRA(rank=4), False), 0.1)
        with CountOperations() as count:
            logits = model(input_ids=ids).logits
        logits.log_softmax(-1)[..., 5].sum().backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        counts.append(count.number)
    assert len(model.adapter_groups) == 2 * 4  # q, k, v; o; gate, up; down in each of two layers
    assert counts[0] - counts[1] >= 2 * 7 * 2  # scaling and sum are part of the product, and 3 products of A are spared
    assert results[0].keys() == results[1].keys()
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, atol=1e-12, rtol=1e-9)


def test_number_of_copies_to_the_device_does_not_depend_on_the_number_of_rows():
    counts = []
    for num_samples in (2, 50):
        prompts, rows = random_prompts([3, 9]), 2 * num_samples
        tokens, mask = torch.ones(rows, 5, dtype=torch.long), torch.arange(5) < torch.arange(rows)[:, None] % 5 + 1
        completions = Completions(tokens, mask, tokens / 2.0, torch.zeros(rows, dtype=torch.bool))
        with CountOperations() as count:
            batches = grpo_train.make_micro_batches(prompts, completions, *torch.ones(2, rows), 10**6, True)
            generation._lay_out(prompts, 0, 32)
        assert len(batches) == 1
        counts.append(count.number)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_auto_sizes_fit_into_the_free_memory_and_do_not_exceed_a_step(dtype, checkpointing):
    policy = make_policy(make_model(), LoRA(rank=4), False)
    size, hidden, intermediate = {"float32": (4, 63, 16), "bfloat16": (2, 44, 8)}[dtype]
    config = GRPOConfig(dtype=dtype, gradient_checkpointing=checkpointing, max_new_tokens=40, eval_size=9)
    # Keys and values, layers, heads of 8, of 60 prompt tokens in prefill and of 100 slots, up to the next 128; logits;
    # the prefill's activations.
    per_row = 2 * 2 * 2 * 8 * size * (60 + 128) + 12 * VOCAB + 60 * size * (3 * 64 + 2 * 32)
    per_layer = 32 * hidden + 64 * intermediate
    per_position = 1.5 * (2 * 32 * size + per_layer if checkpointing else 2 * per_layer)
    fits = utils.fit_to_memory(config, policy, 60, 10**13)
    assert (fits.generation_batch_size, fits.micro_batch_tokens) == (32 * 8, 32 * 8 * 100)
    for free in (2**30, 2**29 * 1.4):
        fits = utils.fit_to_memory(config, policy, 60, free)
        needed = fits.generation_batch_size * per_row + fits.micro_batch_tokens * per_position
        assert needed <= 0.8 * free - 2**29
    with pytest.raises(UserError, match="micro_batch_tokens: auto: 0.6 GiB of free GPU memory are too little"):
        utils.fit_to_memory(config, policy, 60, 2**29 * 1.2)
    given = config.model_copy(update={"micro_batch_tokens": 7})
    assert utils.fit_to_memory(given, policy, 60, 2**30).micro_batch_tokens == 7


def test_micro_batches_hold_rows_with_weight_within_the_token_budget_longest_first():
    prompts, completions = rollout(make_model())
    for weights in (torch.ones(16), torch.tensor([0.0, 1.0] * 8), torch.zeros(16)):
        batches = grpo_train.make_micro_batches(prompts, completions, ADVANTAGES, weights, 64, True)
        shapes = [batch.ids.shape for batch in batches]
        assert shapes == sorted(shapes, key=lambda shape: shape[1], reverse=True)
        assert all(shape.numel() <= 64 or shape[0] == 1 for shape in shapes)
        assert sum(shape[0] for shape in shapes) == weights.sum()


def test_gradient_checkpointing_changes_no_gradient_and_leaves_generation_alone():
    results = []
    for checkpointing in (False, True):
        model, in_backward = randomized(make_policy(make_model(), LoRA(rank=4), checkpointing), 0.1), []
        prompts, completions = rollout(model)
        layer = model.get_base_model().model.layers[0].input_layernorm
        layer.register_forward_hook(lambda *_, calls=in_backward: calls.append(torch._C._current_graph_task_id() != -1))
        gradient, _, _ = step_gradient(model, GRPOConfig(), 16, prompts, completions)
        results.append((completions.tokens, gradient, sum(in_backward)))
    (tokens, gradient, never), (same_tokens, same_gradient, once) = results
    assert torch.equal(tokens, same_tokens) and (never, once) == (0, 1)  # the backward pass recomputed the layer
    torch.testing.assert_close(same_gradient, gradient, atol=1e-6, rtol=1e-5)


def test_gradient_checkpointing_is_refused_if_layers_have_dropout_of_their_own():
    size = {"vocab_size": VOCAB, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    for dropout in (0.0, 0.5):
        model = OPTForCausalLM(OPTConfig(**size, word_embed_proj_dim=32, dropout=dropout)).eval()
        with contextlib.nullcontext() if not dropout else pytest.raises(UserError, match="layers have dropout: set it"):
            make_policy(model, LoRA(rank=4, target_modules=["q_proj"]), True)


# Policy and reference


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["v_proj", "lm_head"]], ids=["inner", "head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampling_with_the_adapter_merged_is_the_same_policy_and_leaves_no_trace(dtype, targets):
    model = make_model(dtype=dtype, tie_word_embeddings=False)
    model = randomized(make_policy(model, LoRA(rank=4, target_modules=targets), False), 0.1)
    before = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    ids = torch.tensor(random_prompts([12]))

    def logits_of(model):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return model(ids).logits

    logits, embedding = logits_of(model), model.get_input_embeddings()(ids)
    with pytest.raises(KeyboardInterrupt), sampling_mode(model):
        inside = dict(model.named_parameters())
        changed = {name for name in inside if name not in before or not torch.equal(inside[name], before[name][1])}
        expected = {name for name in inside if name.endswith(".base_layer.weight")}
        assert changed == (expected if dtype == torch.float32 else set())  # merging would round in bf16
        assert torch.equal(model.get_input_embeddings()(ids), embedding)
        torch.testing.assert_close(logits_of(model), logits, atol=1e-4, rtol=0)
        raise KeyboardInterrupt
    assert dict(model.named_parameters()).keys() == before.keys()
    assert all(p is before[name][0] and torch.equal(p, before[name][1]) for name, p in model.named_parameters())
    assert torch.equal(logits_of(model), logits)


@pytest.mark.parametrize("lora", [LoRA(rank=4), None], ids=["adapter", "all weights"])
def test_first_update_has_ratio_1_and_kl_0_and_later_ones_keep_its_log_probs(lora):
    model, config = make_policy(make_model(), lora, False), GRPOConfig(kl_weight=1.0)
    batch, frozen_copy = one_batch(*rollout(model)), None if lora else copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.SGD(trained(model).values(), lr=10.0 if lora else 0.1)
    for number in range(3):
        loss, kl_term, values = grpo_train.micro_batch_loss(model, batch, config, frozen_copy, contextlib.nullcontext)
        loss.backward()
        optimizer.step()
        if number == 0:
            assert (values["ratio"] == 1).all() and values["kl_k3"].abs().max() == kl_term == 0
        else:
            assert (values["ratio"] - 1).abs().max() > 1e-3 and kl_term > 0
        assert ("sampler_gap" in values) == (number == 0)


def test_adapter_trains_and_nothing_else_does():
    model = make_policy(make_model(), LoRA(rank=4), False)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    step_gradient(model, GRPOConfig(), 16, *rollout(model))
    assert len(trained(model)) == 2 * 2 * 7  # A and B, 2 layers, 7 linear modules
    torch.optim.AdamW(trained(model).values(), lr=1e-3).step()
    for name, parameter in model.named_parameters():
        # the gradient of lora_A is 0 while lora_B is 0, but weight decay moves it
        assert torch.equal(parameter, before[name]) == ("lora_" not in name), name


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["q_proj", "embed_tokens"]], ids=["linear", "embedding"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_from_a_saved_adapter_with_dropout_starts_at_ratio_1_and_kl_0_with_that_adapter_as_reference(
    tmp_path, targets, checkpointing
):
    base, ids = make_model(attention_dropout=0.5, tie_word_embeddings=False), torch.arange(10)[None]
    base.save_pretrained(tmp_path / "base")
    shape = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=targets)
    elsewhere = get_peft_model(utils.load_model(str(tmp_path / "base"), "float32", "cpu"), shape)
    start = randomized(elsewhere, 0.3).eval()(input_ids=ids).logits
    assert not torch.allclose(start, base(input_ids=ids).logits, atol=1e-2)
    utils.save_model(elsewhere, Mock(), tmp_path / "adapter")

    model = utils.load_model(str(tmp_path / "adapter"), "float32", "cpu")
    assert isinstance(model, PeftModel) and torch.equal(model(input_ids=ids).logits, start)
    model = make_policy(model.train(), LoRA(rank=4, alpha=8, target_modules=targets), checkpointing)
    parameters = trained(model)
    assert parameters and all("lora_" in name and "reference" not in name for name in parameters)
    batch, config = one_batch(*rollout(model)), GRPOConfig(kl_weight=1.0)
    _, kl_term, values = grpo_train.micro_batch_loss(model, batch, config, None, contextlib.nullcontext)
    assert (values["ratio"] == 1).all() and values["sampler_gap"].max() < 1e-4
    assert values["kl_k3"].abs().max() == values["kl_k1"].abs().max() == kl_term == 0
    assert not any(m.training for m in model.modules() if isinstance(m, torch.nn.Dropout))

    for parameter in parameters.values():
        parameter.data.add_(0.1)
    with grpo_train.reference_policy(model, None) as reference:
        assert torch.equal(reference(input_ids=ids).logits, start)
    assert not torch.allclose(model(input_ids=ids).logits, start, atol=1e-2)
    assert trained(model).keys() == parameters.keys()


def test_a_models_own_adapter_is_trained_whatever_the_config_says_and_merged_if_it_says_none():
    model = randomized(make_policy(make_model(), LoRA(rank=4, target_modules=["q_proj"]), False), 0.1)
    ids, names = torch.arange(10)[None], set(trained(model))
    logits = model(input_ids=ids).logits
    model = make_policy(model, LoRA(rank=8, target_modules="all-linear"), False)
    assert set(trained(model)) == names and torch.equal(model(input_ids=ids).logits, logits)
    model = make_policy(model, None, False)
    assert not isinstance(model, PeftModel) and len(trained(model)) == len(list(model.parameters()))
    torch.testing.assert_close(model(input_ids=ids).logits, logits, atol=1e-5, rtol=0)


def test_target_that_is_no_linear_layer_is_named():
    for name in ("qq_proj", "mlp", "norm"):
        with pytest.raises(
            UserError, match=f"target_modules: {name}: the model's linear layers are down_proj, gate_proj, "
        ):
            make_policy(make_model(), LoRA(target_modules=["q_proj", name]), False)


@pytest.mark.parametrize("kind", ["prompts shared", "beginning shared", "gradient checkpointing", "sliding window"])
def test_micro_batches_hold_whole_groups_within_the_budget_of_positions_that_the_model_computes(kind):
    window = {"use_sliding_window": kind == "sliding window", "sliding_window": 8, "max_window_layers": 0}
    model = make_policy(make_model(**window), LoRA(rank=4), kind == "gradient checkpointing")
    network, prompts, G, positions = model.get_base_model(), random_prompts([40, 44, 38, 41]), 4, []
    if kind == "beginning shared":
        prompts = [prompts[0][:30] + prompt[30:] for prompt in prompts]
    uniforms = torch.rand(16, MAX_NEW, generator=torch.Generator().manual_seed(3))
    completions = generate(model, prompts, settings(MAX_NEW, [EOS, 5]), G, uniforms)
    weights, is_shared = torch.tensor([1.0, 1, 1, 0] * 4), kind.endswith(" shared")
    assert shares_prompts(network, 44 + MAX_NEW) == is_shared
    budget = 190 if kind == "beginning shared" else 260
    batches = grpo_train.make_micro_batches(prompts, completions, weights, weights, budget, is_shared)
    assert len(batches) == (2 if is_shared else 3) and sum(len(batch.ids) for batch in batches) == 12
    network.get_input_embeddings().register_forward_hook(lambda _, inputs, __: positions.append(inputs[0].numel()))
    for batch in batches:
        positions.clear()
        completion_log_probs(model, batch.ids, batch.mask, 1.0)
        assert 130 < sum(positions) <= budget
        starts = batch.mask.int().argmax(1)
        prompts_in = {tuple(row[:start].tolist()) for row, start in zip(batch.ids, starts, strict=True)}
        assert not is_shared or len(batch.ids) == 3 * len(prompts_in)  # whole groups, except rows without weight
    single = grpo_train.make_micro_batches(prompts, completions, weights, weights, 1, is_shared)
    assert [len(batch.ids) for batch in single] == [1] * 12


@pytest.mark.parametrize("odd", [{"target_modules": ".*q_proj"}, {"target_modules": ["q_proj"], "bias": "all"}])
def test_adapter_with_a_regular_expression_or_bias_and_one_without_its_base_are_named(tmp_path, odd):
    make_model().save_pretrained(tmp_path / "base")
    adapted = get_peft_model(
        utils.load_model(str(tmp_path / "base"), "float32", "cpu"), LoraConfig(task_type="CAUSAL_LM", **odd)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="adapter.: expected a LoRA adapter with a list of names"):
        utils.load_model(str(tmp_path / "adapter"), "float32", "cpu")
    odd = {"target_modules": ["q_proj"]}
    get_peft_model(adapted.unload(), LoraConfig(task_type="CAUSAL_LM", **odd)).save_pretrained(tmp_path / "lost")
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(UserError, match=f"model: '{tmp_path}/lost': its base model '{tmp_path}/base': "):
        utils.load_model(str(tmp_path / "lost"), "float32", "cpu")
