"""What only a GPU can show. Without one these tests are skipped."""

import contextlib
import math

import pytest
import torch
from conftest import EOS, PAD, make_model, random_prompts, scalars
from transformers.utils import is_flash_attn_2_available

import utils
from es_train import Population, noise_generators, noise_shapes
from grpo_train import LoRA, make_policy, merged_adapter
from utils import completion_log_probs, generate

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
G, MAX_NEW = 8, 200  # more than one LENGTH_BUCKET
BEGINNING = random_prompts([10], seed=5)[0]
PROMPTS = [BEGINNING + rest for rest in random_prompts([3, 9, 5, 1])]


def policy(dtype=torch.float32, **settings):
    torch.manual_seed(3)
    model = make_policy(make_model(dtype=dtype, max_position_embeddings=1024, **settings), LoRA(rank=4), False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.cuda()


def sample(model, **options):
    uniforms = torch.rand(len(PROMPTS) * G, MAX_NEW, generator=torch.Generator().manual_seed(1))
    return generate(model, PROMPTS, MAX_NEW, [EOS, 7], PAD, num_samples=G, uniforms=uniforms, **options)


@pytest.fixture
def count_graphs(monkeypatch):
    counts, captured = [], utils.captured

    def counting(step):
        counts.append(1)
        return captured(step)

    monkeypatch.setattr(utils, "captured", counting)
    return counts


def without_graphs(monkeypatch):
    monkeypatch.setattr(utils, "captures", lambda device: False)


@pytest.mark.parametrize("kind", ["plain", "lora", "merged", "llama", "top_p"])
def test_graphs_give_the_tokens_of_the_eager_loop_in_fp32(kind, monkeypatch, count_graphs):
    family = {"family": "llama"} if kind == "llama" else {}
    model = policy() if kind in ("lora", "merged") else make_model(max_position_embeddings=1024, **family).cuda()
    options = {"top_p": 0.9} if kind == "top_p" else {}
    with merged_adapter(model) if kind == "merged" else contextlib.nullcontext():
        graphs = sample(model, **options)
        assert len(count_graphs) >= 2
        without_graphs(monkeypatch)
        eager = sample(model, **options)
    assert torch.equal(graphs.tokens, eager.tokens)
    torch.testing.assert_close(graphs.log_probs, eager.log_probs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("rank", [1, 4])
def test_a_population_decodes_the_same_tokens_under_graphs(rank, monkeypatch, count_graphs):
    model, members = make_model(max_position_embeddings=1024).cuda(), 4
    shapes = noise_shapes(dict(model.named_parameters()), "low_rank", rank)

    def answers():
        generators = noise_generators(0, 0, range(members), members, model.device)
        scales = torch.full((members,), 0.1, device=model.device)
        with Population(model, shapes, generators, scales, len(PROMPTS)) as on_rows:
            prompts = PROMPTS * members
            return generate(model, prompts, MAX_NEW, [EOS, 7], PAD, on_rows=on_rows, block_size=len(PROMPTS)).tokens

    graphs = answers()
    assert count_graphs
    without_graphs(monkeypatch)
    assert torch.equal(graphs, answers())


def test_graphs_agree_with_the_eager_loop_in_bf16(monkeypatch, capsys):
    model = policy(torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        graphs = sample(model)
        without_graphs(monkeypatch)
        eager = sample(model)
    same = (graphs.tokens == eager.tokens).float().mean().item()
    both = graphs.mask & eager.mask & (graphs.tokens == eager.tokens).cumprod(1).bool()  # up to where rows part
    gap = (graphs.log_probs - eager.log_probs)[both].abs()
    with capsys.disabled():
        print(f"\nbf16: {same:.1%} of tokens equal, log-prob gap mean {gap.mean():.2g}, largest {gap.max():.2g}")
    assert gap.mean() < 0.02
    assert both.sum() > 0.2 * eager.mask.sum()


def test_memory_that_runs_out_for_real_makes_the_batch_smaller(capsys):
    model = make_model(vocab_size=50_000, max_position_embeddings=1024).cuda()
    prompts = random_prompts([30] * 2048)
    whole = generate(model, prompts, 16, [EOS], PAD, batch_size=128)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 2**29) / total)  # 512 MiB more
    try:
        out = generate(model, prompts, 16, [EOS], PAD, batch_size=2048)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of GPU memory with 2048 at once" in capsys.readouterr().out
    assert (out.tokens == whole.tokens).float().mean() > 0.99  # other batch sizes, other rounding


@pytest.mark.parametrize("overrides", [[], ["dtype=bfloat16"]], ids=["fp32", "bf16"])
def test_a_run_can_be_stopped_and_resumed(script, overrides, tmp_path, count_graphs):
    # Not bit for bit: backward passes of attention on a GPU add up in any order.
    folder = script.train(tmp_path / "run", "device=cuda", *overrides, stop_after=2)
    script.train(folder, "device=cuda", *overrides)
    assert count_graphs
    curves = scalars(folder)
    assert [step for step, _ in curves["reward/mean"]] == [1, 2, 3, 4]
    assert curves["memory/peak_gib"][0][1] > 0
    for tag, points in curves.items():
        assert all(math.isfinite(value) for _, value in points), tag


@pytest.mark.skipif(not is_flash_attn_2_available(), reason="needs flash-attn")
def test_flash_attention_gives_the_log_probs_of_sdpa():
    model = policy(torch.bfloat16, hidden_size=128)
    out = sample(model)
    rows = [
        prompt + tokens[mask].tolist()
        for prompt, tokens, mask in zip([p for p in PROMPTS for _ in range(G)], out.tokens, out.mask, strict=True)
    ]
    T = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (T - len(row)) for row in rows], device="cuda")
    starts = torch.tensor([len(p) for p in PROMPTS for _ in range(G)], device="cuda")[:, None]
    ends = torch.tensor(list(map(len, rows)), device="cuda")[:, None]
    columns = torch.arange(T, device="cuda")
    mask = (columns >= starts) & (columns < ends)
    expected, _ = completion_log_probs(model, ids, mask, 1.0)
    utils.inner_model(model).set_attn_implementation("flash_attention_2")
    log_probs, _ = completion_log_probs(model, ids, mask, 1.0)
    assert (log_probs - expected)[mask].abs().mean() < 0.02
    assert (sample(model).tokens == out.tokens).float().mean() > 0.5
