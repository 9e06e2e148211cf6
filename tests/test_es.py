"""The maths of ES, and a population in one batch, against members written out one by one."""

import copy
import math

import pytest
import torch
from conftest import EOS, PAD, make_model, random_prompts, settings
from torch import nn
from transformers import GemmaConfig, GemmaForCausalLM, GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

from es_train import (
    ESConfig,
    Population,
    check_low_rank,
    draw,
    noise_generators,
    noise_of_member,
    noise_shapes,
    update,
    update_master,
    weighted_noise,
    write_member,
    write_weights,
    z_scores,
)
from generation import generate
from reward import UserError

MEMBERS, MAX_NEW, STOP = 5, 16, [EOS, 7, 9]
PROMPTS = random_prompts([3, 9, 5, 1])
FAMILIES = {
    "qwen2": {"family": "qwen2"},  # tied head, biases in attention
    "llama": {"family": "llama", "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
}


def random_biases_and_norms(model):
    """Fresh models have biases 0 and norm weights 1, which would hide mistakes."""
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.requires_grad_(False)


def make_qwen3():
    """A model with norms over the heads too, whose inputs have four dimensions."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.15,
        eos_token_id=EOS,
        pad_token_id=PAD,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config).eval()


def make_es_model(family):
    return random_biases_and_norms(make_qwen3() if family == "qwen3" else make_model(**FAMILIES[family]))


def master_of(model):
    return {name: parameter.float().clone() for name, parameter in model.named_parameters()}


def generators_of(iteration, noises, seed=0):
    return noise_generators(seed, iteration, noises, 1000, "cpu")


def dense_noise(model, rank, generator):
    """A member's noise by the definition: one stream, parameter after parameter, A B^T / sqrt(rank) for matrices."""
    noise = {}
    for name, parameter in model.named_parameters():
        if rank and parameter.ndim == 2:
            factors = torch.randn(sum(parameter.shape), rank, generator=generator)
            A, B = factors[: len(parameter)].double(), factors[len(parameter) :].double()
            noise[name] = A @ B.T / math.sqrt(rank)
        else:
            noise[name] = torch.randn(parameter.shape, generator=generator).double()
    return noise


def folded(model, noise, scale):
    """A copy of the model with `scale * noise` written into its weights."""
    member = copy.deepcopy(model)
    for name, parameter in member.named_parameters():
        parameter.data.copy_(parameter.double() + scale * noise[name])
    return member


def shapes_of(model, perturbation, rank=1):
    return noise_shapes(dict(model.named_parameters()), perturbation, rank)


def make_population(model, rank, noises, scales, prompts=PROMPTS, iteration=3):
    generators = generators_of(iteration, noises)
    return Population(model, shapes_of(model, "low_rank", rank), generators, torch.tensor(scales), len(prompts))


def texts(completions):
    return [tokens[mask].tolist() for tokens, mask in zip(completions.tokens, completions.mask, strict=True)]


# z-scores


def test_z_scores_by_hand():
    # mean 2, squared deviations 1, 1, 4, 4, 0: variance 10 / 5 = 2
    rewards = torch.tensor([1.0, 3.0, 0.0, 4.0, 2.0])
    expected = [-1 / math.sqrt(2), 1 / math.sqrt(2), -math.sqrt(2), math.sqrt(2), 0.0]
    assert z_scores(rewards).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("reward", [0.9, 0.7, -0.3, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_z_scores_of_exactly_zero(reward, dtype):
    # The mean of equal numbers is not always that number, in double precision neither: 30 x 0.9, for one.
    assert not z_scores(torch.full((30,), reward, dtype=dtype)).any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_reward_that_is_no_number_is_an_error_that_shows_it(bad):
    with pytest.raises(ValueError, match=f"rewards must be finite: .*1.* 2.* {bad}"):
        z_scores(torch.tensor([1.0, 2.0, bad, 0.0]))


# Noise


def test_noise_keys_are_unique_over_ten_thousand_iterations():
    # Of a seed, torch's generator on a CPU reads 32 bits: hashes of 63 collide there, ten times among so many.
    a, b = (torch.rand(4, generator=torch.Generator().manual_seed(5 + high)) for high in (0, 2**40))
    assert torch.equal(a, b)
    keys = {
        generator.initial_seed() % 2**32
        for iteration in range(10_000)
        for generator in noise_generators(0, iteration, range(30), 30, "cpu")
    }
    assert len(keys) == 300_000


@pytest.mark.parametrize("perturbation", ["gaussian", "low_rank"])
def test_noise_of_layers_members_iterations_and_seeds_is_uncorrelated(perturbation):
    model = make_model(num_hidden_layers=3, hidden_size=64)
    shapes, draws = shapes_of(model, perturbation, 4), []
    for seed, iteration, member in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]:
        (generator,) = generators_of(iteration, [member], seed)
        noise = {name: draw(shape, generator) for name, shape in shapes.items()}
        draws += [noise[f"model.layers.{layer}.mlp.up_proj.weight"].flatten() for layer in range(3)]
    correlation = torch.corrcoef(torch.stack(draws))
    correlation.fill_diagonal_(0)
    assert correlation.abs().max() < 5 / math.sqrt(len(draws[0]))


@pytest.mark.parametrize("rank", [1, 4])
def test_each_weights_noise_has_variance_one_a_tied_one_too(rank):
    # Mean square of products of normal numbers over 400 draws of 64 x 32 entries, as the update adds them up.
    weight, squares = torch.zeros(64, 32), []
    for generator in generators_of(0, range(400)):
        squares.append(weighted_noise(weight, (64 + 32, rank), [generator], [1.0]).square().mean())
    assert torch.stack(squares).mean() == pytest.approx(1, abs=0.1)

    model = make_es_model("qwen2")
    model.model.embed_tokens.weight.data.zero_()
    deviations = []
    for generator in generators_of(0, range(20)):
        write_member(model, {n: torch.zeros_like(p) for n, p in master_of(model).items()}, 0.1, generator)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        deviations.append(model.lm_head.weight.flatten().clone())
    assert torch.cat(deviations).std() == pytest.approx(0.1, rel=0.02)  # 0.14 if it were perturbed twice


# Updates


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("rank", [None, 1, 3])
def test_update_equals_the_sum_over_members_in_float64(rank, antithetic):
    model = make_es_model("qwen2")
    master, shapes = master_of(model), shapes_of(model, "low_rank" if rank else "gaussian", rank)
    z = [0.5, -1.5, 2.0, 0.25, -1.0, -0.25]
    expected = {name: weight.double() for name, weight in master.items()}
    for member, z_n in enumerate(z):
        number, sign = (member // 2, (1, -1)[member % 2]) if antithetic else (member, 1)
        noise = dense_noise(model, rank, generators_of(7, [number])[0])
        for name in expected:
            expected[name] += 0.1 / len(z) * z_n * sign * noise[name]

    generators = generators_of(7, range(3 if antithetic else 6))
    update_master(master, shapes, generators, z, 0.1, antithetic)
    for name in master:
        torch.testing.assert_close(master[name].double(), expected[name], atol=1e-6, rtol=0)
        assert not torch.equal(master[name], dict(model.named_parameters())[name]), name  # everything moves


def test_antithetic_members_are_pairs_of_opposite_sign():
    assert [noise_of_member(n, True) for n in range(4)] == [(0, 1), (0, -1), (1, 1), (1, -1)]
    assert [noise_of_member(n, False) for n in range(3)] == [(0, 1), (1, 1), (2, 1)]


@pytest.mark.parametrize("perturbation", ["gaussian", "low_rank"])
def test_equal_rewards_leave_every_bit_of_the_weights(perturbation):
    model = make_es_model("qwen2")
    master, before, shapes = master_of(model), master_of(model), shapes_of(model, perturbation)
    z = z_scores(torch.full((6,), 0.9)).tolist()
    update_master(master, shapes, generators_of(0, range(6)), z, 0.5, False)
    assert all(torch.equal(master[name], before[name]) for name in master)


@pytest.mark.parametrize("perturbation", ["gaussian", "low_rank"])
def test_small_updates_reach_bf16_weights_in_full_and_norm_weights_move(perturbation):
    # A hundred steps of 1e-4 a weight, all in one direction; bf16's spacing at norm weights of 1 is 0.004 to 0.008.
    model = make_model().bfloat16().requires_grad_(False)
    start, master, shapes = master_of(model), master_of(model), shapes_of(model, perturbation)
    in_place, intended = copy.deepcopy(model), {name: torch.zeros_like(w).double() for name, w in start.items()}
    noise = dense_noise(model, 1 if perturbation == "low_rank" else None, generators_of(0, [0])[0])
    opposite = dense_noise(model, 1 if perturbation == "low_rank" else None, generators_of(0, [1])[0])
    for _ in range(100):
        update_master(master, shapes, generators_of(0, range(2)), [1.0, -1.0], 1.4e-4, False)
        write_weights(model, master)
        for name, parameter in in_place.named_parameters():
            step = 0.7e-4 * (noise[name] - opposite[name])
            intended[name] += step
            parameter.add_(step.bfloat16())

    def slope(model):
        products = torch.zeros(2, dtype=torch.float64)
        for name, parameter in model.named_parameters():
            realised = parameter.double() - start[name]
            products += torch.stack([(intended[name] * realised).sum(), intended[name].square().sum()])
        return float(products[0] / products[1])

    assert slope(model) == pytest.approx(1, abs=0.01)
    assert slope(in_place) < 0.99  # what adding to bf16 weights makes of the same steps
    for name in start:
        if "norm" in name:
            moved, stuck = (dict(m.named_parameters())[name].float() != start[name] for m in (model, in_place))
            assert moved.float().mean() > 0.5 and not stuck.any()


def test_update_with_z_of_zero_keeps_even_the_sign_of_a_zero():
    master = {"bias": torch.tensor([-0.0, 1.0])}  # -0.0 + 0.0 would be 0.0
    update(master, {"bias": (2,)}, 0, [0.0] * 32, 0.1, ESConfig())
    assert torch.signbit(master["bias"]).tolist() == [True, False]


# Members one by one


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_after_a_population_of_members_written_out_every_weight_is_bitwise_what_it_was(dtype):
    model = make_es_model("qwen2").to(dtype)
    before, master = copy.deepcopy(model.state_dict()), master_of(model)
    for generator in generators_of(0, range(32)):
        write_member(model, master, 0.01, generator)
        assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())  # every one is perturbed
    fresh = copy.deepcopy(model)  # the last member does not depend on those before it
    write_weights(fresh, master)
    write_member(fresh, master, 0.01, generators_of(0, [31])[0])
    assert all(torch.equal(p, fresh.get_parameter(n)) for n, p in model.named_parameters())
    write_weights(model, master)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_member_written_out_is_master_plus_scaled_noise():
    model = make_es_model("llama")
    master = master_of(model)
    noise = dense_noise(model, None, generators_of(1, [2])[0])
    write_member(model, master, -0.02, generators_of(1, [2])[0])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.double(), master[name] - 0.02 * noise[name], atol=1e-6, rtol=0)


# Members in one batch


@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3"])
@pytest.mark.parametrize("rank", [1, 3])
def test_logits_of_each_row_are_those_of_its_member_folded_into_the_weights(family, rank):
    model = make_es_model(family)
    ids = torch.randint(2, 64, (MEMBERS * 2, 7), generator=torch.Generator().manual_seed(0))
    scales = [0.1, -0.1, 0.05, 0.2, -0.02]
    population = make_population(model, rank, range(MEMBERS), scales, prompts=[0, 1])
    with population as on_rows:
        on_rows(torch.arange(MEMBERS * 2))
        whole = model(input_ids=ids).logits
        rows = torch.tensor([9, 0, 4, 5, 7])  # some rows are gone, the rest in any order
        on_rows(rows)
        part = model(input_ids=ids[rows]).logits
    plain = model(input_ids=ids).logits
    for member, scale in enumerate(scales):
        noise = dense_noise(model, rank, generators_of(3, [member])[0])
        mine = slice(2 * member, 2 * member + 2)
        expected = folded(model.double(), noise, scale)(input_ids=ids[mine]).logits
        model.float()
        assert (expected - plain[mine]).abs().max() > 0.05
        torch.testing.assert_close(whole[mine].double(), expected, atol=2e-5, rtol=1e-4)
        for i, row in enumerate(rows.tolist()):
            if row // 2 == member:
                torch.testing.assert_close(part[i].double(), expected[row % 2], atol=2e-5, rtol=1e-4)


def complete(model, population, num_members, prompts=PROMPTS, batch_size=256):
    """Each member's completions, in one list: (num_members, prompts, tokens)."""
    with population as on_rows:
        rows = texts(
            generate(
                model,
                prompts * num_members,
                settings(MAX_NEW, STOP, batch_size=batch_size),
                on_rows=on_rows,
                block_size=len(prompts),
            )
        )
    return [rows[i : i + len(prompts)] for i in range(0, len(rows), len(prompts))]


@pytest.mark.parametrize("beginning", [0, 12], ids=["nothing-shared", "beginning-shared"])
@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3"])
@pytest.mark.parametrize("rank", [1, 2])
def test_population_in_one_batch_gives_the_tokens_of_member_after_member(family, rank, beginning):
    model, (start,) = make_es_model(family), random_prompts([beginning], seed=5)
    prompts, scales = [start + prompt for prompt in PROMPTS], [0.05, -0.05, 0.1, 0.2, -0.2]
    together = complete(model, make_population(model, rank, range(MEMBERS), scales), MEMBERS, prompts)
    lengths = [len(tokens) for member in together for tokens in member]
    assert min(lengths) < 12 and max(lengths) == MAX_NEW  # rows left on the way
    for member, scale in enumerate(scales):
        noise = dense_noise(model, rank, generators_of(3, [member])[0])
        assert together[member] == texts(generate(folded(model, noise, scale), prompts, settings(MAX_NEW, STOP)))
    assert len(set(map(str, together))) == MEMBERS  # members differ


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_population_in_one_batch_writes_nothing_to_the_model(dtype):
    model = make_es_model("qwen2").to(dtype)
    values, objects = copy.deepcopy(model.state_dict()), dict(model.named_parameters())
    with make_population(model, 1, range(MEMBERS), [0.5] * MEMBERS) as on_rows:
        generate(model, PROMPTS * MEMBERS, settings(MAX_NEW, STOP), on_rows=on_rows, block_size=len(PROMPTS))
    with pytest.raises(RuntimeError, match="interrupted"):
        with make_population(model, 1, range(MEMBERS), [0.5] * MEMBERS) as on_rows:
            on_rows(torch.arange(MEMBERS))
            model(input_ids=torch.ones(MEMBERS, 2, dtype=torch.long))
            raise RuntimeError("interrupted")
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert all(parameter is objects[name] for name, parameter in model.named_parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_same_member_twice_in_a_population_gives_the_same_text():
    model, noises = make_es_model("qwen2"), [4, 0, 1, 2, 4, 3, 4]
    members = complete(model, make_population(model, 1, noises, [0.1] * len(noises)), len(noises))
    assert members[0] == members[4] == members[6]
    assert members[0] != members[1]


def test_members_in_batches_of_any_size_give_the_same_tokens():
    model = make_es_model("qwen2")
    whole = complete(model, make_population(model, 1, range(MEMBERS), [0.1] * MEMBERS), MEMBERS)
    passes = []
    handle = model.register_forward_pre_hook(lambda module, args, kwargs: passes.append(kwargs), with_kwargs=True)
    split = complete(model, make_population(model, 1, range(MEMBERS), [0.1] * MEMBERS), MEMBERS, batch_size=9)
    handle.remove()
    assert [len(p["input_ids"]) for p in passes if p["input_ids"].shape[1] > 1] == [8, 8, 4]  # prompts prefilled
    halves = []
    for noises in (range(2), range(2, MEMBERS)):
        halves += complete(model, make_population(model, 1, noises, [0.1] * len(noises)), len(noises))
    assert whole == split == halves


def test_rows_that_hooks_treat_differently_need_their_blocks_named():
    with pytest.raises(AssertionError, match="rows that hooks treat differently must not share computation"):
        generate(make_model(), PROMPTS, settings(MAX_NEW, STOP), on_rows=print)


# What low_rank cannot do


class Biases(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))


def test_models_that_low_rank_cannot_perturb_whole_are_named():
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=8))
    with pytest.raises(UserError, match=r"perturbation: low_rank cannot perturb transformer.h.0.ln_1, a LayerNorm"):
        check_low_rank(gpt2, 1)
    gemma = GemmaForCausalLM(GemmaConfig(num_hidden_layers=1, hidden_size=8, vocab_size=16, num_attention_heads=1))
    with pytest.raises(UserError, match="cannot perturb model.embed_tokens, a GemmaTextScaledWordEmbedding"):
        check_low_rank(gemma, 1)
    with pytest.raises(UserError, match=r"perturbation: low_rank cannot perturb .*, a Biases; gaussian can"):
        check_low_rank(Biases(), 1)
    check_low_rank(make_model(), 16)
    with pytest.raises(UserError, match=r"rank: 17 is more than model.layers.0.self_attn.k_proj.weight, \(16, 32\)"):
        check_low_rank(make_model(), 17)
