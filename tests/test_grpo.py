"""The maths of grpo_train.py, by hand where it fits a comment, and against one row at a time where it does not."""

import contextlib
import copy
import math

import pytest
import torch
from accelerate import Accelerator
from conftest import EOS, PAD, make_model, random_prompts, settings
from peft import PeftModel

from generation import completion_log_probs, generate
from grpo_train import (
    GRPOConfig,
    LoRA,
    checkpointed_layers,
    group_advantages,
    kl_estimate,
    make_micro_batches,
    make_policy,
    merged_adapter,
    micro_batch_loss,
    policy_loss,
    reference_policy,
    token_weights,
)
from reward import UserError
from utils import load_model, save_model, summarize

MAX_NEW = 20


# Advantages


def test_advantages_are_rewards_standardized_within_the_group():
    # Group 1: mean 0.5, std sqrt(4 * 0.25 / 3) = 0.57735; group 2: mean 1, std sqrt((1 + 1) / 3) = 0.81650
    advantages = group_advantages(torch.tensor([[1.0, 0.0, 1.0, 0.0], [2.0, 0.0, 1.0, 1.0]]), "group")
    expected = [[0.86603, -0.86603, 0.86603, -0.86603], [1.22474, -1.22474, 0.0, 0.0]]
    torch.testing.assert_close(advantages, torch.tensor(expected), atol=1e-5, rtol=0)


def test_batch_scale_divides_by_the_std_of_all_rewards_and_none_by_nothing():
    rewards = torch.tensor([[1.0, 0.0], [4.0, 1.0]])
    # All four: mean 1.5, std sqrt((0.25 + 2.25 + 6.25 + 0.25) / 3) = sqrt(3)
    expected = torch.tensor([[0.5, -0.5], [1.5, -1.5]])
    torch.testing.assert_close(group_advantages(rewards, "none"), expected)
    torch.testing.assert_close(group_advantages(rewards, "batch"), expected / math.sqrt(3))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("reward", [0.9, 0.7, -0.3])
@pytest.mark.parametrize("group_size", [2, 3, 8, 16])
def test_equal_rewards_give_zero_advantage(reward, scale, group_size):
    rewards = torch.full((2, group_size), reward)
    assert torch.equal(group_advantages(rewards, scale), torch.zeros(2, group_size))
    rewards[0, 0] += 1.0  # one group has spread, the other one stays at exactly 0
    assert torch.equal(group_advantages(rewards, scale)[1], torch.zeros(group_size))
    assert group_advantages(rewards, scale)[0, 0] > 0


# Weights and losses


def test_token_weights_of_the_three_normalizations():
    lengths = torch.tensor([4.0, 1.0, 0.0, 5.0])  # the third row is left out of the loss
    for normalization, expected in {
        "token": [1 / 10, 1 / 10, 0, 1 / 10],
        "sequence": [1 / 12, 1 / 3, 0, 1 / 15],  # 3 rows, each 1 / (3 * length) a token
        "constant": [1 / 80, 1 / 80, 0, 1 / 80],  # 4 rows of up to 20
    }.items():
        torch.testing.assert_close(token_weights(lengths, normalization, MAX_NEW), torch.tensor(expected))


@pytest.mark.parametrize("normalization", ["token", "sequence", "constant"])
def test_all_rows_truncated_gives_weight_zero(normalization):
    assert torch.equal(token_weights(torch.zeros(4), normalization, MAX_NEW), torch.zeros(4))


def test_clipped_surrogate_by_hand():
    ratios = torch.tensor([[0.5, 0.9, 1.0, 1.1, 1.5]])
    # A = 1: the gain stops at 1.3; A = -1: the loss stops falling at ratio 0.8. The loss is the negative.
    for advantage, expected in [(1.0, [-0.5, -0.9, -1.0, -1.1, -1.3]), (-1.0, [0.8, 0.9, 1.0, 1.1, 1.5])]:
        loss, ratio = policy_loss(ratios.log(), torch.zeros(1, 5), torch.tensor([[advantage]]), 0.2, 0.3)
        torch.testing.assert_close(loss, torch.tensor([expected]))
        torch.testing.assert_close(ratio, ratios)


def test_gradient_of_the_first_update_is_minus_advantage_times_grad_log_prob():
    log_probs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    loss, ratio = policy_loss(log_probs, log_probs.detach(), torch.tensor([[0.7]]), 0.2, 0.2)
    loss.sum().backward()
    assert torch.equal(ratio, torch.ones(1, 2))
    torch.testing.assert_close(log_probs.grad, torch.full((1, 2), -0.7))


def test_kl_estimate_by_hand_and_never_negative():
    # d = log(0.2 / 0.1) = 0.6931: exp(d) - d - 1 = 2 - 0.6931 - 1
    assert kl_estimate(torch.tensor(0.1).log(), torch.tensor(0.2).log()).item() == pytest.approx(0.30685, abs=1e-5)
    assert (kl_estimate(torch.randn(1000), torch.randn(1000)) >= 0).all()
    assert kl_estimate(torch.tensor(-3.0), torch.tensor(-3.0)) == 0


def test_kl_estimate_averages_to_the_kl_divergence():
    p, q = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.3, 0.3, 0.4]).double()
    expected = (p * (p / q).log()).sum()
    torch.testing.assert_close((p * kl_estimate(p.log(), q.log())).sum(), expected)


@pytest.mark.parametrize("gap", [100.0, -100.0, 1000.0])
def test_log_ratio_of_100_stays_finite(gap):
    log_probs = torch.zeros(1, 1, requires_grad=True)
    other = log_probs.detach() + gap
    kl = kl_estimate(log_probs, other)
    for advantage in (1.0, -1.0):
        loss, ratio = policy_loss(log_probs, other, torch.tensor([[advantage]]), 0.2, 0.2)
        assert torch.isfinite(loss + ratio + kl).all()
        (grad,) = torch.autograd.grad((loss + kl).sum(), log_probs, retain_graph=True)
        assert torch.isfinite(grad).all()


# Micro-batches and gradients


def rollout(model, group_size=4, seed=3):
    prompts = [prompt for prompt in random_prompts([3, 11, 6, 2]) for _ in range(group_size)]
    uniforms = torch.rand(len(prompts), MAX_NEW, generator=torch.Generator().manual_seed(seed))
    return prompts, generate(model, prompts, settings(MAX_NEW, [EOS, 5]), uniforms=uniforms)


def step_gradient(model, config, rows_per_batch, prompts, completions, advantages, drift=0.0):
    """(gradient, loss, token summary) of one update with `rows_per_batch` rows a micro-batch."""
    lengths = completions.mask.sum(1).float()
    weights = token_weights(lengths, config.loss_normalization, MAX_NEW)
    batches = []
    for first in range(0, len(prompts), rows_per_batch):
        chosen = torch.zeros_like(weights)
        chosen[first : first + rows_per_batch] = weights[first : first + rows_per_batch]
        batches += make_micro_batches(prompts, completions, advantages, chosen, 10**6, PAD)
    assert [len(batch.ids) for batch in batches] == [rows_per_batch] * (16 // rows_per_batch)
    model.zero_grad()
    total, values = 0.0, {}
    for batch in batches:
        if drift:  # as in a later update: the policy has moved away from the old log-probs
            with torch.no_grad():
                log_probs, _ = completion_log_probs(model, batch.ids, batch.mask, config.temperature)
            batch.old_log_probs = log_probs + drift * torch.sin(10 * log_probs) * batch.mask
            batch.ref_log_probs = log_probs - drift * torch.cos(10 * log_probs) * batch.mask
        loss, _, token_values = micro_batch_loss(model, batch, config, None, contextlib.nullcontext)
        loss.backward()
        total += loss.item()
        for name, value in token_values.items():
            values.setdefault(name, []).append(value)
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    return gradient, total, summarize(values, Accelerator(cpu=True))


@pytest.mark.parametrize("normalization", ["token", "sequence", "constant"])
def test_gradient_and_metrics_do_not_depend_on_micro_batches(normalization):
    model = make_policy(make_model(), LoRA(rank=4), False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    config = GRPOConfig(loss_normalization=normalization, kl_weight=0.1)
    prompts, completions = rollout(model)
    lengths = completions.mask.sum(1)
    assert lengths.unique().numel() > 4
    advantages = torch.randn(len(prompts), generator=torch.Generator().manual_seed(0))
    whole, loss, summary = step_gradient(model, config, 16, prompts, completions, advantages, drift=0.3)
    assert summary["clip_low"][0] > 0 and summary["clip_high"][0] > 0 and summary["ratio"][2] > 1.1
    for rows in (1, 2, 8):
        gradient, part_loss, part = step_gradient(model, config, rows, prompts, completions, advantages, drift=0.3)
        torch.testing.assert_close(gradient, whole, atol=1e-6 * whole.abs().max().item(), rtol=1e-4)
        assert part_loss == pytest.approx(loss, rel=1e-5)
        assert part.keys() == summary.keys()
        for name in summary:
            assert part[name] == pytest.approx(summary[name], rel=1e-4, abs=1e-6), name


def test_gradient_equals_a_plain_loop_over_unpadded_rows():
    model = make_model()
    config = GRPOConfig(temperature=0.8)
    prompts, completions = rollout(model)
    advantages = torch.randn(len(prompts), generator=torch.Generator().manual_seed(0))
    gradient, loss, _ = step_gradient(model, config, 4, prompts, completions, advantages)

    model.zero_grad()
    expected, num_tokens = 0.0, int(completions.mask.sum())
    for row, prompt in enumerate(prompts):
        tokens = completions.tokens[row][completions.mask[row]]
        ids = torch.cat([torch.tensor(prompt), tokens])
        logits = model(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1] / 0.8
        log_probs = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        # At ratio 1 the surrogate's gradient is that of -A * log pi, and its value -A a token.
        (-advantages[row] * log_probs.sum() / num_tokens).backward()
        expected += -advantages[row].item() * len(tokens) / num_tokens
    plain = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(gradient, plain, atol=1e-6, rtol=1e-4)
    assert loss == pytest.approx(expected, rel=1e-5)


def test_rows_without_weight_are_not_computed_on():
    model = make_model()
    prompts, completions = rollout(model)
    weights = torch.tensor([0.0, 1.0] * 8)
    batches = make_micro_batches(prompts, completions, torch.zeros(16), weights, 1000, PAD)
    assert sum(len(batch.ids) for batch in batches) == 8
    assert make_micro_batches(prompts, completions, torch.zeros(16), torch.zeros(16), 1000, PAD) == []


def test_micro_batches_respect_the_token_budget_and_put_the_longest_first():
    prompts, completions = rollout(make_model())
    ones = torch.ones(len(prompts))
    batches = make_micro_batches(prompts, completions, ones, ones, 64, PAD)
    widths = [batch.ids.shape[1] for batch in batches]
    assert widths == sorted(widths, reverse=True)
    assert all(batch.ids.numel() <= 64 or len(batch.ids) == 1 for batch in batches)
    assert sum(len(batch.ids) for batch in batches) == len(prompts)


def test_gradient_checkpointing_changes_no_gradient_and_leaves_generation_alone():
    config, advantages = GRPOConfig(), torch.linspace(-1, 1, 16)
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = make_policy(make_model(), LoRA(rank=4), checkpointing)
        prompts, completions = rollout(model)
        calls = 0

        def count(*_):
            nonlocal calls
            calls += torch._C._current_graph_task_id() != -1  # in the backward pass

        handle = model.get_base_model().model.layers[0].input_layernorm.register_forward_hook(count)
        gradient, _, _ = step_gradient(model, config, 16, prompts, completions, advantages)
        handle.remove()
        results.append((completions.tokens, gradient, calls))
    (tokens, gradient, once), (same_tokens, same_gradient, twice) = results
    assert torch.equal(tokens, same_tokens)
    torch.testing.assert_close(same_gradient, gradient, atol=1e-6, rtol=1e-5)
    assert (once, twice) == (0, 1)  # the backward pass computed the layer again


# Policy and reference


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["v_proj", "lm_head"]], ids=["inner", "tied head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampling_with_the_adapter_merged_is_the_same_policy_and_leaves_no_trace(dtype, targets):
    torch.manual_seed(0)
    model = make_policy(make_model(dtype=dtype), LoRA(rank=4, target_modules=targets), False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    before = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    ids = torch.tensor(random_prompts([12]))
    logits = model(ids).logits
    embedding = model.get_input_embeddings()(ids)
    with pytest.raises(KeyboardInterrupt), merged_adapter(model):
        inside = dict(model.named_parameters())
        changed = {name for name in inside if name not in before or not torch.equal(inside[name], before[name][1])}
        expected = {name for name, _ in model.named_parameters() if name.endswith(".base_layer.weight")}
        assert changed == (expected if dtype == torch.float32 else set())  # merging would round in bf16
        assert torch.equal(model.get_input_embeddings()(ids), embedding)
        torch.testing.assert_close(model(ids).logits, logits, atol=1e-4, rtol=0)
        raise KeyboardInterrupt
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, parameter in after.items():
        assert parameter is before[name][0] and torch.equal(parameter, before[name][1])
    assert torch.equal(model(ids).logits, logits)


def loss_of(model, config, frozen_copy=None):
    prompts, completions = rollout(model)
    weights = token_weights(completions.mask.sum(1).float(), "token", MAX_NEW)
    (batch,) = make_micro_batches(prompts, completions, torch.linspace(-1, 1, 16), weights, 10**6, PAD)
    return micro_batch_loss(model, batch, config, frozen_copy, contextlib.nullcontext)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_never_enters_ratio_or_kl(tmp_path, checkpointing):
    # Dropout in the base model's attention and in an adapter that was trained elsewhere with dropout 0.1.
    from peft import LoraConfig, get_peft_model

    base = make_model(attention_dropout=0.5)
    adapted = get_peft_model(base, LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    adapted.train()
    model = make_policy(adapted, LoRA(rank=4, alpha=8, target_modules=["q_proj"]), checkpointing)
    loss, kl_term, values = loss_of(model, GRPOConfig(kl_weight=1.0))
    assert (values["ratio"] == 1).all()
    assert values["kl_k3"].abs().max() == values["kl_k1"].abs().max() == kl_term == 0
    assert values["sampler_gap"].max() < 1e-4
    with checkpointed_layers(model):
        assert not any(m.training for m in model.modules() if isinstance(m, torch.nn.Dropout))


def test_first_pass_ratio_is_exactly_one_and_kl_exactly_zero_at_step_0():
    for lora in (LoRA(rank=4), None):
        model = make_policy(make_model(), lora, False)
        frozen = None if lora else copy.deepcopy(model).requires_grad_(False)
        _, kl_term, values = loss_of(model, GRPOConfig(kl_weight=1.0), frozen)
        assert (values["ratio"] == 1).all()
        assert values["kl_k3"].abs().max() == kl_term == 0


def test_old_log_probs_stay_those_of_the_first_update():
    model = make_policy(make_model(), LoRA(rank=4), False)
    prompts, completions = rollout(model)
    weights = token_weights(completions.mask.sum(1).float(), "token", MAX_NEW)
    (batch,) = make_micro_batches(prompts, completions, torch.linspace(-1, 1, 16), weights, 10**6, PAD)
    config = GRPOConfig(kl_weight=1.0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=10.0)
    for update in range(3):
        loss, kl_term, values = micro_batch_loss(model, batch, config, None, contextlib.nullcontext)
        loss.backward()
        optimizer.step()
        assert ("sampler_gap" in values) == (update == 0)
        assert ((values["ratio"] - 1).abs().max() > 1e-3) == (update > 0)
        assert (kl_term > 0) == (update > 0)


def test_same_seed_gives_the_same_adapter_and_another_seed_another():
    adapters = []
    for seed in (0, 0, 1):
        model = make_model()
        torch.manual_seed(seed)
        model = make_policy(model, LoRA(rank=4), False)
        adapters.append(torch.cat([p.flatten() for n, p in model.named_parameters() if "lora_A" in n]))
    assert torch.equal(adapters[0], adapters[1])
    assert not torch.equal(adapters[0], adapters[2])


def test_adapter_trains_and_nothing_else_does():
    model = make_policy(make_model(), LoRA(rank=4), False)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 2 * 7 and all("lora_" in name for name in trained)  # A and B, 2 layers, 7 linears
    loss, _, _ = loss_of(model, GRPOConfig())
    loss.backward()
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3).step()
    for name, parameter in model.named_parameters():
        # lora_A has no gradient while lora_B is zero; weight decay alone would move it
        assert torch.equal(parameter, before[name]) == ("lora_" not in name), name


def test_training_on_from_an_adapter_has_kl_zero_at_step_0_and_that_adapter_as_reference(tmp_path):
    base = make_model()
    base.save_pretrained(tmp_path / "base")
    first = make_policy(load_model(str(tmp_path / "base"), "float32", "cpu"), LoRA(rank=4), False)
    for name, parameter in first.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    first.save_pretrained(tmp_path / "adapter")

    model = load_model(str(tmp_path / "adapter"), "float32", "cpu")
    assert isinstance(model, PeftModel)
    model = make_policy(model, LoRA(rank=4), False)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(".default." in name for name in trained)
    _, kl_term, values = loss_of(model, GRPOConfig(kl_weight=1.0))
    assert values["kl_k3"].abs().max() == kl_term == 0
    ids = torch.arange(10)[None]
    start = model(input_ids=ids).logits
    assert not torch.allclose(start, base(input_ids=ids).logits, atol=1e-2)  # the adapter is in force

    for name, parameter in model.named_parameters():
        if name in trained:
            parameter.data.add_(0.1)
    with reference_policy(model, None) as reference:
        assert torch.equal(reference(input_ids=ids).logits, start)
    assert not torch.allclose(model(input_ids=ids).logits, start, atol=1e-2)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained


def test_adapter_on_the_embeddings_is_copied_into_the_reference_too(tmp_path):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(
        make_model(tie_word_embeddings=False), LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"])
    )
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
    ids = torch.arange(10)[None]
    start = adapted.eval()(input_ids=ids).logits
    model = make_policy(adapted, LoRA(rank=4, alpha=8, target_modules=["q_proj", "embed_tokens"]), False)
    with reference_policy(model, None) as reference:
        assert torch.equal(reference(input_ids=ids).logits, start)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (LoRA(rank=8), "lora: rank=8 .*: expected rank=4 .*, as in the adapter that training starts from"),
        (LoRA(rank=4, alpha=7), "lora: .* alpha=7.0 .*: expected .* alpha=32.0 "),
        (LoRA(rank=4, target_modules=["q_proj"]), r"lora: .*=\['q_proj'\]: expected .*=\['down_proj', "),
        (None, "lora: None: expected rank=4 "),
    ],
)
def test_config_that_contradicts_the_adapter_is_refused(tmp_path, lora, message):
    make_model().save_pretrained(tmp_path / "base")
    base = load_model(str(tmp_path / "base"), "float32", "cpu")
    make_policy(base, LoRA(rank=4), False).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=message):
        make_policy(load_model(str(tmp_path / "adapter"), "float32", "cpu"), lora, False)


@pytest.mark.parametrize("target", ["qq_proj", "mlp", "norm"])
def test_target_that_is_no_linear_layer_is_named(target):
    with pytest.raises(UserError, match=f"lora.target_modules: {target}: the model has no linear layer of that name"):
        make_policy(make_model(), LoRA(rank=4, target_modules=["q_proj", target]), False)


def test_saved_adapter_gives_the_trained_models_logits(tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    model = make_policy(load_model(str(tmp_path / "base"), "float32", "cpu"), LoRA(rank=4), False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.2)

    class Tokenizer:
        def save_pretrained(self, folder):
            pass

    save_model(model, Tokenizer(), tmp_path / "out")
    ids = torch.arange(10)[None]
    loaded = PeftModel.from_pretrained(load_model(str(tmp_path / "base"), "float32", "cpu"), tmp_path / "out")
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_sequence_ratio_is_the_exponential_of_the_mean_log_ratio_of_a_completions_tokens():
    # Completion 1: two tokens, log-ratios 0.3 and -0.1, mean 0.1: ratio e^0.1 = 1.1052 on both, not e^0.3 and e^-0.1.
    # Completion 2: one token, log-ratio 0.4: e^0.4 = 1.4918, clipped to 1.2. Positions outside of the mask hold 0.
    log_probs = torch.tensor([[0.0, -0.7, -1.1], [0.0, 0.0, -0.6]], requires_grad=True)
    old = torch.tensor([[0.0, -1.0, -1.0], [0.0, 0.0, -1.0]])
    mask = torch.tensor([[False, True, True], [False, False, True]])
    advantages = torch.tensor([[2.0], [3.0]])
    loss, ratio = policy_loss(log_probs, old, advantages, 0.2, 0.2, "sequence", mask)
    assert ratio[mask].tolist() == pytest.approx([1.1052, 1.1052, 1.4918], abs=1e-4)
    assert loss[mask].tolist() == pytest.approx([-2.2103, -2.2103, -3.6], abs=1e-4)
    # d loss / d log_prob of each of completion 1's two tokens, the loss summed over both: -2 * 2 * e^0.1 / 2.
    (loss * mask).sum().backward()
    assert log_probs.grad[mask].tolist() == pytest.approx([-2.2103, -2.2103, 0.0], abs=1e-4)
    _, token_ratio = policy_loss(log_probs, old, advantages, 0.2, 0.2)
    assert token_ratio[mask].tolist() == pytest.approx([1.3499, 0.9048, 1.4918], abs=1e-4)
