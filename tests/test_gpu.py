"""What only a GPU can show. Without one these tests are skipped."""

import math

import pytest
import torch
from conftest import EOS, PAD, make_model, random_prompts, scalars
from transformers.utils import is_flash_attn_2_available

import utils
from es_train import Population, noise_generators, noise_shapes
from grpo_train import LoRA, make_policy
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


def assert_same_but_for_rounding(completions, others):
    """fp32: other shapes of the same sums can turn a draw that is all but on the border of two tokens."""
    equal = (completions.tokens == others.tokens).cumprod(1).bool()  # up to where rows part
    both = equal & completions.mask & others.mask
    assert both.sum() > 0.97 * others.mask.sum()
    torch.testing.assert_close(completions.log_probs[both], others.log_probs[both], atol=1e-4, rtol=0)


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


@pytest.mark.parametrize("kind", ["plain", "lora", "llama", "top_p"])
def test_graphs_give_the_tokens_of_the_eager_loop_in_fp32(kind, monkeypatch, count_graphs):
    family = {"family": "llama"} if kind == "llama" else {}
    model = policy() if kind == "lora" else make_model(max_position_embeddings=1024, **family).cuda()
    options = {"top_p": 0.9} if kind == "top_p" else {}
    graphs = sample(model, **options)
    assert len(count_graphs) >= 2
    without_graphs(monkeypatch)
    assert_same_but_for_rounding(graphs, sample(model, drop_share=0.5, **options))


@pytest.mark.parametrize("rank", [1, 4])
def test_a_population_decodes_the_same_tokens_under_graphs(rank, monkeypatch, count_graphs):
    model, members = make_model(max_position_embeddings=1024).cuda(), 4
    shapes = noise_shapes(dict(model.named_parameters()), "low_rank", rank)

    def answers():
        generators = noise_generators(0, 0, range(members), members, model.device)
        scales = torch.full((members,), 0.1, device=model.device)
        with Population(model, shapes, generators, scales, len(PROMPTS)) as on_rows:
            prompts = PROMPTS * members
            return generate(model, prompts, MAX_NEW, [EOS, 7], PAD, on_rows=on_rows, block_size=len(PROMPTS))

    graphs = answers()
    assert count_graphs
    without_graphs(monkeypatch)
    assert_same_but_for_rounding(graphs, answers())


def test_graphs_agree_with_the_eager_loop_in_bf16(monkeypatch, capsys, count_graphs):
    model = policy(torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        graphs = sample(model)
        assert len(count_graphs) >= 2
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


def test_a_model_that_waits_for_the_gpu_is_decoded_without_graphs(count_graphs, capsys):
    model = make_model(max_position_embeddings=1024).cuda()
    expected = sample(model)
    count_graphs.clear()
    utils.say_once.cache_clear()
    handle = model.model.layers[0].register_forward_hook(lambda *inputs: print(end="" if inputs[2].sum() > 0 else ""))
    for _ in range(2):  # the second time, nothing of the first may be in the way
        assert_same_but_for_rounding(sample(model), expected)
    handle.remove()
    assert not count_graphs
    assert capsys.readouterr().out.count("decoding without CUDA graphs") == 1
    torch.cuda.empty_cache()
    assert_same_but_for_rounding(sample(model), expected)
    assert count_graphs


def rows_and_mask(completions):
    lists = [p for p in PROMPTS for _ in range(G)]
    rows = [p + t[m].tolist() for p, t, m in zip(lists, completions.tokens, completions.mask, strict=True)]
    T = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (T - len(row)) for row in rows], device="cuda")
    starts, ends = (torch.tensor([len(x) for x in xs], device="cuda")[:, None] for xs in (lists, rows))
    columns = torch.arange(T, device="cuda")
    return ids, (columns >= starts) & (columns < ends)


@pytest.mark.parametrize(
    "dtype, attention",
    [
        (torch.float32, "sdpa"),
        (torch.bfloat16, "sdpa"),
        pytest.param(
            torch.bfloat16,
            "flash_attention_2",
            marks=pytest.mark.skipif(not is_flash_attn_2_available(), reason="needs flash-attn"),
        ),
    ],
)
def test_shared_prompts_change_neither_log_probs_nor_gradients(dtype, attention, monkeypatch):
    model = policy(dtype, hidden_size=128)
    ids, mask = rows_and_mask(sample(model))
    results = []
    for spared, implementation in ((2.0, "sdpa"), (-1.0, attention)):  # never, and always
        monkeypatch.setattr(utils, "MIN_SPARED", spared)
        utils.inner_model(model).set_attn_implementation(implementation)
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


@pytest.mark.skipif(not is_flash_attn_2_available(), reason="needs flash-attn")
def test_a_model_with_flash_attention_decodes_by_sdpa(count_graphs):
    model = policy(torch.bfloat16, hidden_size=128)
    sdpa = sample(model)
    utils.inner_model(model).set_attn_implementation("flash_attention_2")
    flash = sample(model)
    assert len(count_graphs) >= 2
    both = flash.mask & sdpa.mask & (flash.tokens == sdpa.tokens).cumprod(1).bool()  # up to where rows part
    assert (flash.log_probs - sdpa.log_probs)[both].abs().mean() < 0.05
    assert utils.inner_model(model).config._attn_implementation == "flash_attention_2"
