"""Tests of the GPU path, skipped without a GPU."""

import math
from unittest.mock import Mock

import pytest
import torch
from conftest import EOS, make_model, random_prompts, scalars, settings

import generation
from es_train import Population, noise_generators, noise_shapes
from generation import completion_log_probs, generate
from grpo_train import LoRA, make_micro_batches, make_policy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
G, MAX_NEW = 8, 200  # more than one LENGTH_BUCKET
PROMPTS = [random_prompts([10], seed=5)[0] + rest for rest in random_prompts([3, 9, 5, 1])]


def model_on_gpu(lora=False, **model_settings):
    model = make_model(max_position_embeddings=1024, **model_settings)
    if lora:
        model = make_policy(model, LoRA(rank=4), False)
        for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
            torch.nn.init.normal_(parameter, std=0.1)
    return model.cuda()


def sample(model, **options):
    uniforms = torch.rand(len(PROMPTS) * G, MAX_NEW, generator=torch.Generator().manual_seed(1))
    return generate(model, PROMPTS, settings(MAX_NEW, [EOS, 7], **options), G, uniforms)


def compare(completions, others):
    """Return the share of tokens before rows diverge, and their log-prob gaps. Rounding can flip a borderline draw."""
    both = (completions.tokens == others.tokens).cumprod(1).bool() & completions.mask & others.mask
    return both.sum() / others.mask.sum(), (completions.log_probs - others.log_probs)[both].abs()


@pytest.fixture
def capture(monkeypatch):
    monkeypatch.setattr(torch.cuda, "graph", Mock(wraps=torch.cuda.graph))
    return torch.cuda.graph  # called once per graph


LORA_IN_BF16 = {"lora": True, "dtype": torch.bfloat16}


LARGE = {"vocab_size": 1000, "family": "gemma3", "sliding_window": 1024}  # more than one BLOCK of the vocabulary


@pytest.mark.parametrize("kind", [{}, {"family": "llama"}, LARGE, {"lora": True}, LORA_IN_BF16], ids=str)
def test_graphs_give_the_tokens_of_the_eager_loop(kind, capture):
    model, is_bf16 = model_on_gpu(**kind), kind == LORA_IN_BF16
    with torch.autocast("cuda", torch.bfloat16, enabled=is_bf16):
        graphs, num_captures = sample(model), capture.call_count
        share, gaps = compare(graphs, sample(model, cuda_graphs=False))
    assert capture.call_count == num_captures >= 2
    assert share > (0.2 if is_bf16 else 0.97)
    assert gaps.mean() < 0.02 if is_bf16 else gaps.max() < 1e-4


@pytest.mark.parametrize("rank", [1, 4])
def test_a_population_decodes_the_same_tokens_under_graphs(rank, capture):
    model, members = model_on_gpu(), 4
    shapes = noise_shapes(dict(model.named_parameters()), "low_rank", rank)

    def answers(cuda_graphs):
        generators = noise_generators(0, 0, range(members), members, model.device)
        how, scales = settings(MAX_NEW, [EOS, 7], cuda_graphs=cuda_graphs), torch.full((members,), 0.1).cuda()
        with Population(model, shapes, generators, scales, len(PROMPTS), how.memory) as on_rows:
            return generate(model, PROMPTS * members, how, on_rows=on_rows, block_size=len(PROMPTS))

    graphs = answers(cuda_graphs=True)
    assert capture.called
    share, gaps = compare(graphs, answers(cuda_graphs=False))
    assert share > 0.97 and gaps.max() < 1e-4


@pytest.mark.parametrize("overrides", [[], ["dtype=bfloat16"]], ids=["fp32", "bf16"])
def test_a_run_can_be_stopped_and_resumed(script, overrides, tmp_path, capture):
    # Not bit-identical: on a GPU, attention's backward pass sums in no fixed order.
    folder = script.train(tmp_path / "run", "device=cuda", *overrides, stop_after=2)
    script.train(folder, "device=cuda", *overrides)
    assert capture.called
    curves = scalars(folder)
    assert [step for step, _ in curves["reward/mean"]] == [1, 2, 3, 4]
    assert curves["memory/peak_gib"][0][1] > 0
    assert all(math.isfinite(value) for points in curves.values() for _, value in points), curves


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shared_prompts_change_neither_log_probs_nor_gradients(dtype, monkeypatch):
    model, results = model_on_gpu(lora=True, dtype=dtype, hidden_size=128), []
    prompts, ones = [prompt for prompt in PROMPTS for _ in range(G)], torch.ones(len(PROMPTS) * G, device="cuda")
    with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
        (batch,) = make_micro_batches(prompts, sample(model), ones, ones, 10**6, True)
    for min_spared in (2.0, -1.0):  # never share, always share
        monkeypatch.setattr(generation, "MIN_SPARED", min_spared)
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            log_probs = completion_log_probs(model, batch.ids, batch.mask, 1.0)[0][batch.mask]
        model.zero_grad()
        log_probs.mean().backward()
        results += [log_probs.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])]
    alone, gradient, shared, same_gradient = results
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    assert (alone - shared).abs().mean() < tolerance
    assert (gradient - same_gradient).norm() < 2 * tolerance * gradient.norm()
