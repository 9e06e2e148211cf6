"""Tests of the GPU path. Without a GPU they are skipped."""

import math

import pytest
import torch
from conftest import EOS, PAD, make_model, random_prompts, scalars, settings

import generation
from es_train import Population, noise_generators, noise_shapes
from generation import completion_log_probs, generate
from grpo_train import LoRA, make_policy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
G, MAX_NEW = 8, 200  # more than one LENGTH_BUCKET
BEGINNING = random_prompts([10], seed=5)[0]
PROMPTS = [BEGINNING + rest for rest in random_prompts([3, 9, 5, 1])]


def policy(dtype=torch.float32, **model_settings):
    torch.manual_seed(3)
    model = make_policy(make_model(dtype=dtype, max_position_embeddings=1024, **model_settings), LoRA(rank=4), False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.cuda()


def sample(model, **options):
    uniforms = torch.rand(len(PROMPTS) * G, MAX_NEW, generator=torch.Generator().manual_seed(1))
    return generate(model, PROMPTS, settings(MAX_NEW, [EOS, 7], **options), G, uniforms)


def assert_same_but_for_rounding(completions, others):
    """fp32: other shapes of the same sums can turn a draw that is all but on the border of two tokens."""
    equal = (completions.tokens == others.tokens).cumprod(1).bool()  # up to where rows part
    both = equal & completions.mask & others.mask
    assert both.sum() > 0.97 * others.mask.sum()
    torch.testing.assert_close(completions.log_probs[both], others.log_probs[both], atol=1e-4, rtol=0)


@pytest.fixture
def captures(monkeypatch):
    """One entry for each graph that is captured."""
    entries, graph = [], torch.cuda.graph

    def counting(*args, **kwargs):
        entries.append(1)
        return graph(*args, **kwargs)

    monkeypatch.setattr(torch.cuda, "graph", counting)
    return entries


@pytest.mark.parametrize("kind", ["plain", "lora", "llama"])
def test_graphs_give_the_tokens_of_the_eager_loop_in_fp32(kind, captures):
    family = {"family": "llama"} if kind == "llama" else {}
    model = policy() if kind == "lora" else make_model(max_position_embeddings=1024, **family).cuda()
    graphs = sample(model)
    num_captures = len(captures)
    assert num_captures >= 2
    assert_same_but_for_rounding(graphs, sample(model, cuda_graphs=False))
    assert len(captures) == num_captures


@pytest.mark.parametrize("rank", [1, 4])
def test_a_population_decodes_the_same_tokens_under_graphs(rank, captures):
    model, members = make_model(max_position_embeddings=1024).cuda(), 4
    shapes = noise_shapes(dict(model.named_parameters()), "low_rank", rank)

    def answers(cuda_graphs):
        generators = noise_generators(0, 0, range(members), members, model.device)
        scales = torch.full((members,), 0.1, device=model.device)
        with Population(model, shapes, generators, scales, len(PROMPTS)) as on_rows:
            how = settings(MAX_NEW, [EOS, 7], cuda_graphs=cuda_graphs)
            return generate(model, PROMPTS * members, how, on_rows=on_rows, block_size=len(PROMPTS))

    graphs = answers(cuda_graphs=True)
    assert captures
    assert_same_but_for_rounding(graphs, answers(cuda_graphs=False))


def test_graphs_agree_with_the_eager_loop_in_bf16(capsys, captures):
    model = policy(torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        graphs = sample(model)
        assert len(captures) >= 2
        eager = sample(model, cuda_graphs=False)
    same = (graphs.tokens == eager.tokens).float().mean().item()
    both = graphs.mask & eager.mask & (graphs.tokens == eager.tokens).cumprod(1).bool()  # up to where rows part
    gap = (graphs.log_probs - eager.log_probs)[both].abs()
    with capsys.disabled():
        print(f"\nbf16: {same:.1%} of tokens equal, log-prob gap mean {gap.mean():.2g}, largest {gap.max():.2g}")
    assert gap.mean() < 0.02
    assert both.sum() > 0.2 * eager.mask.sum()


@pytest.mark.parametrize("overrides", [[], ["dtype=bfloat16"]], ids=["fp32", "bf16"])
def test_a_run_can_be_stopped_and_resumed(script, overrides, tmp_path, captures):
    # Not bit for bit: backward passes of attention on a GPU add up in any order.
    folder = script.train(tmp_path / "run", "device=cuda", *overrides, stop_after=2)
    script.train(folder, "device=cuda", *overrides)
    assert captures
    curves = scalars(folder)
    assert [step for step, _ in curves["reward/mean"]] == [1, 2, 3, 4]
    assert curves["memory/peak_gib"][0][1] > 0
    for tag, points in curves.items():
        assert all(math.isfinite(value) for _, value in points), tag


def rows_and_mask(completions):
    lists = [p for p in PROMPTS for _ in range(G)]
    rows = [p + t[m].tolist() for p, t, m in zip(lists, completions.tokens, completions.mask, strict=True)]
    T = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (T - len(row)) for row in rows], device="cuda")
    starts, ends = (torch.tensor([len(x) for x in xs], device="cuda")[:, None] for xs in (lists, rows))
    columns = torch.arange(T, device="cuda")
    return ids, (columns >= starts) & (columns < ends)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shared_prompts_change_neither_log_probs_nor_gradients(dtype, monkeypatch):
    model = policy(dtype, hidden_size=128)
    ids, mask = rows_and_mask(sample(model))
    results = []
    for min_spared in (2.0, -1.0):  # never, and always
        monkeypatch.setattr(generation, "MIN_SPARED", min_spared)
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            log_probs, _ = completion_log_probs(model, ids, mask, 1.0)
        model.zero_grad()
        log_probs[mask].mean().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
        results.append((log_probs[mask].detach(), gradient))
    (alone, gradient), (shared, same_gradient) = results
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    assert (alone - shared).abs().mean() < tolerance
    assert (gradient - same_gradient).norm() < 2 * tolerance * gradient.norm()
