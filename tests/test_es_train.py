"""Tests of ES: its math, and populations in one batch against members written into the weights one by one."""

import contextlib
import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import EOS, SCRIPTS, TINY, make_model, random_prompts, scalars, settings
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

import es_train
from es_train import ESConfig, Population, check_low_rank, noise_generators, update_master, write_weights, z_scores
from generation import DecodeMemory, generate
from reward import UserError
from utils import load_model

MAX_NEW, STOP, PERTURBATIONS = 16, [EOS, 7, 9], ["gaussian", "low_rank"]
PROMPTS = random_prompts([3, 9, 5, 1])


def make_es_model(family="qwen2"):
    """Make a model: qwen2 has a tied head and attention biases, llama biases everywhere, qwen3 norms over the heads.

    gemma3 has a scaled embedding and norms that multiply by 1 + weight.
    Randomize biases and norm weights, because their initial values, 0 and 1, would hide mistakes.
    """
    llama = {"family": "llama", "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}
    model = make_model(**llama if family == "llama" else {"family": "gemma3"} if family == "gemma3" else {})
    if family == "qwen3":
        config = model.config.to_dict() | {"model_type": "qwen3", "head_dim": 8}
        model = Qwen3ForCausalLM(Qwen3Config(**config)).eval()
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.requires_grad_(False)


def master_of(model):
    return {name: parameter.float().clone() for name, parameter in model.named_parameters()}


def shapes_of(model, perturbation, rank=1):
    return es_train.noise_shapes(dict(model.named_parameters()), perturbation, rank)


def generators_of(step, noises, seed=0):
    return noise_generators(seed, step, noises, 1000, "cpu")


def dense_noise(model, rank, generator):
    """Return a member's noise by definition: one stream for all parameters, A B^T / sqrt(rank) for matrices."""
    noise = {}
    for name, parameter in model.named_parameters():
        if rank and parameter.ndim == 2:
            factors = torch.randn(sum(parameter.shape), rank, generator=generator)
            A, B = factors[: len(parameter)].double(), factors[len(parameter) :].double()
            noise[name] = A @ B.T / math.sqrt(rank)
        else:
            noise[name] = torch.randn(parameter.shape, generator=generator).double()
    return noise


def make_population(model, noises, scale):
    scales = torch.full((len(noises),), scale)
    return Population(
        model, shapes_of(model, "low_rank"), generators_of(3, noises), scales, len(PROMPTS), DecodeMemory()
    )


def texts(completions):
    return [tokens[mask].tolist() for tokens, mask in zip(completions.tokens, completions.mask, strict=True)]


# z-scores and noise


def test_z_scores_by_hand_and_an_error_that_shows_a_non_finite_reward():
    # mean 2, squared deviations 1, 1, 4, 4, 0: variance 10 / 5 = 2
    z = z_scores(torch.tensor([1.0, 3.0, 0.0, 4.0, 2.0]))
    assert z.tolist() == pytest.approx([-1 / math.sqrt(2), 1 / math.sqrt(2), -math.sqrt(2), math.sqrt(2), 0.0])
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"rewards must be finite: .*1.* 2.* {bad}"):
            z_scores(torch.tensor([1.0, 2.0, bad, 0.0]))


@pytest.mark.parametrize("reward", [0.9, 0.7, -0.3, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_z_scores_of_exactly_zero(reward, dtype):
    # The mean of equal numbers can differ from them even in double precision, as for 30 x 0.9.
    assert not z_scores(torch.full((30,), reward, dtype=dtype)).any()


def test_noise_keys_are_unique_over_ten_thousand_steps():
    # On CPU, torch uses only 32 bits of a seed. 300,000 hashed seeds would collide about ten times.
    generators = (noise_generators(0, step, range(30), 30, "cpu") for step in range(10_000))
    assert len({generator.initial_seed() % 2**32 for each in generators for generator in each}) == 300_000


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
def test_noise_of_layers_members_steps_and_seeds_is_uncorrelated(perturbation):
    shapes, draws = shapes_of(make_model(num_hidden_layers=3, hidden_size=64), perturbation, 4), []
    for seed, step, member in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]:
        (generator,) = generators_of(step, [member], seed)
        noise = {name: es_train.draw(shape, generator) for name, shape in shapes.items()}
        draws += [noise[f"model.layers.{layer}.mlp.up_proj.weight"].flatten() for layer in range(3)]
    correlation = torch.corrcoef(torch.stack(draws)).fill_diagonal_(0)
    assert correlation.abs().max() < 5 / math.sqrt(len(draws[0]))


@pytest.mark.parametrize("rank", [1, 4])
def test_noise_of_a_weight_has_variance_1(rank):
    # Mean square of the update's noise over 400 draws of 64 x 32 entries.
    generators, weight = generators_of(0, range(400)), torch.zeros(64, 32)
    noises = [es_train.weighted_noise(weight, (64 + 32, rank), [generator], [1.0]) for generator in generators]
    assert torch.stack(noises).square().mean() == pytest.approx(1, abs=0.1)


# Updates


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("rank", [None, 1, 3])
def test_update_equals_the_sum_over_members_in_float64(rank, antithetic):
    model, z = make_es_model(), [0.5, -1.5, 2.0, 0.25, -1.0, -0.25]
    master, shapes = master_of(model), shapes_of(model, "low_rank" if rank else "gaussian", rank)
    expected = {name: weight.double() for name, weight in master.items()}
    for member, z_n in enumerate(z):
        number, sign = (member // 2, (1, -1)[member % 2]) if antithetic else (member, 1)
        for name, noise in dense_noise(model, rank, generators_of(7, [number])[0]).items():
            expected[name] += 0.1 / len(z) * z_n * sign * noise

    update_master(master, shapes, generators_of(7, range(3 if antithetic else 6)), z, 0.1, antithetic)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(master[name].double(), expected[name], atol=1e-6, rtol=0)
        assert not torch.equal(master[name], parameter), name  # every parameter moves


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
def test_equal_rewards_leave_every_bit_of_the_weights(perturbation):
    model = make_es_model()
    model.model.norm.weight[0] = -0.0  # -0.0 + 0.0 would be 0.0
    master, z = master_of(model), z_scores(torch.full((30,), 0.9, dtype=torch.float64)).tolist()
    es_train.update(master, shapes_of(model, perturbation), 0, z, 0.5, ESConfig(population_size=30))
    for name, parameter in model.named_parameters():
        assert torch.equal(master[name].view(torch.int32), parameter.view(torch.int32)), name


@pytest.mark.parametrize("max_new_tokens", [2, 40])
def test_run_logs_rewards_and_ties_and_equal_rewards_change_no_bit_of_the_model(tmp_path, max_new_tokens):
    # No answer fits in two tokens, so all rewards are equal.
    folder = SCRIPTS["es"].train(tmp_path / "run", f"max_new_tokens={max_new_tokens}", "num_steps=2")
    lines, curves = (folder / "journal.jsonl").read_text().splitlines()[1:], scalars(folder)
    for step, rewards in enumerate((torch.tensor(json.loads(line)["rewards"]) for line in lines), start=1):
        pairs = [rewards[i] == rewards[j] for i in range(6) for j in range(6) if i != j]
        expected = {"es/tie_rate": sum(pairs) / 30, "es/reward_std": rewards.std(correction=0)}
        expected |= {f"es/reward_{name}": getattr(rewards, name)() for name in ("min", "mean", "max")}
        for tag, value in expected.items():
            assert dict(curves[tag])[step] == pytest.approx(float(value), rel=1e-6, abs=1e-7)
        assert (len(rewards.unique()) == 1) == (max_new_tokens == 2)
    base, result = (load_model(path, "float32", "cpu") for path in (TINY, str(folder / "model")))
    is_same = {torch.equal(parameter, base.get_parameter(name)) for name, parameter in result.named_parameters()}
    assert is_same == {max_new_tokens == 2}


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
def test_small_updates_reach_bf16_weights_in_full_and_norm_weights_move(perturbation):
    # 100 steps of about 1e-4 per weight, all in one direction. The spacing of bf16 around 1 is 0.004 to 0.008.
    model, rank = make_model().bfloat16().requires_grad_(False), 1 if perturbation == "low_rank" else None
    start, master = master_of(model), master_of(model)
    noise, opposite = (dense_noise(model, rank, generator) for generator in generators_of(0, range(2)))
    for _ in range(100):
        update_master(master, shapes_of(model, perturbation), generators_of(0, range(2)), [1.0, -1.0], 1.4e-4, False)
        write_weights(model, master)
    realized = torch.cat([(p.double() - start[name]).flatten() for name, p in model.named_parameters()])
    intended = torch.cat([100 * 0.7e-4 * (noise[name] - opposite[name]).flatten() for name in start])
    assert float(intended @ realized / intended.square().sum()) == pytest.approx(1, abs=0.01)  # regression slope
    for name, parameter in model.named_parameters():
        assert "norm" not in name or (parameter.float() != start[name]).float().mean() > 0.5


# Members one by one, and in one batch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_member_is_master_plus_noise_tied_weights_once_and_afterwards_every_weight_is_bitwise_what_it_was(
    family, dtype
):
    model = make_es_model(family).to(dtype)
    before, master = copy.deepcopy(model.state_dict()), master_of(model)
    for member in range(4):
        es_train.write_member(model, master, -0.02, generators_of(1, [member])[0])
        noise = dense_noise(model, None, generators_of(1, [member])[0])
        for name, parameter in model.named_parameters():  # regardless of earlier members
            expected = (master[name] - 0.02 * noise[name].float()).to(dtype)
            assert torch.equal(parameter, expected) and not torch.equal(parameter, before[name]), name
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == (family == "qwen2")
    write_weights(model, master)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("beginning", "antithetic", "batch_size"), [(0, True, 256), (12, False, 256), (12, True, 9)])
@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("rank", [None, 1, 3])
def test_rollout_gives_the_tokens_of_members_folded_into_the_weights(family, rank, beginning, antithetic, batch_size):
    model, (start,), scale = make_es_model(family), random_prompts([beginning], seed=5), 0.1
    prompts = [start + prompt for prompt in PROMPTS]  # each member computes the shared prefix once
    config = ESConfig(perturbation="low_rank" if rank else "gaussian", antithetic=antithetic, population_size=6, seed=9)
    setup = SimpleNamespace(model=copy.deepcopy(model), settings=settings(MAX_NEW, STOP, batch_size=batch_size))
    problems = [SimpleNamespace(ids=ids) for ids in prompts]
    master, shapes, rollouts = master_of(model), shapes_of(model, config.perturbation, rank), []
    for members in [range(4), range(4, 6)] if rank else [[n] for n in range(6)]:
        rollouts += texts(es_train.rollout(setup, master, shapes, problems, members, scale, 7, config))
    for member in range(6):
        number, sign = (member // 2, (1, -1)[member % 2]) if antithetic else (member, 1)
        noise = dense_noise(model, rank, noise_generators(9, 7, [number], config.num_noises, "cpu")[0])
        folded = copy.deepcopy(model).double()
        for name, parameter in folded.named_parameters():
            parameter += sign * scale * noise[name]
        assert rollouts[4 * member : 4 * member + 4] == texts(generate(folded, prompts, settings(MAX_NEW, STOP)))
    assert min(map(len, rollouts)) < 12 and max(map(len, rollouts)) == MAX_NEW  # some rows finish early
    assert len({str(rollouts[i : i + 4]) for i in range(0, 24, 4)}) == 6  # members differ


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_population_in_one_batch_writes_nothing_to_the_model(dtype):
    model = make_es_model().to(dtype)
    values, objects = copy.deepcopy(model.state_dict()), dict(model.named_parameters())
    for is_interrupted in (False, True):
        with contextlib.suppress(InterruptedError), make_population(model, range(5), 0.5) as on_rows:
            generate(model, PROMPTS * 5, settings(MAX_NEW, STOP), on_rows=on_rows, block_size=4)
            if is_interrupted:
                raise InterruptedError
        assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
        assert all(parameter is objects[name] for name, parameter in model.named_parameters())
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_same_member_twice_in_a_population_gives_the_same_text():
    model = make_es_model()
    with make_population(model, [4, 0, 1, 2, 4, 3, 4], 0.1) as on_rows:
        rows = texts(generate(model, PROMPTS * 7, settings(MAX_NEW, STOP), on_rows=on_rows, block_size=4))
    assert rows[:4] == rows[16:20] == rows[24:] != rows[4:8]


def test_model_that_low_rank_cannot_perturb_whole_is_named():
    doubled = type("DoubledEmbedding", (nn.Embedding,), {"forward": lambda self, ids: 2 * super().forward(ids)})
    for model, rank, message in [
        (nn.Sequential(doubled(8, 8)), 1, "cannot perturb 0, a DoubledEmbedding"),
        (nn.Sequential(nn.LayerNorm(8)), 1, "perturbation: low_rank cannot perturb 0, a LayerNorm; gaussian can"),
        (make_model(), 17, r"rank: 17: exceeds the rank of model.layers.0.self_attn.k_proj.weight, \(16, 32\)"),
    ]:
        with pytest.raises(UserError, match=message):
            check_low_rank(model, rank)
    check_low_rank(make_model(), 16)
