"""The decode loop against a slow oracle: one row at a time, float64, no cache, no padding."""

import contextlib
import types
import warnings

import pytest
import torch
from conftest import EOS, PAD, VOCAB, make_model, oracle_generate, oracle_log_probs, random_prompts

import utils
from es_train import Population, noise_generators, noise_shapes
from grpo_train import LoRA, make_micro_batches, make_policy, merged_adapter
from utils import check_prompt_lengths, completion_log_probs, generate, sample

LENGTHS = [3, 9, 5, 1]
G, MAX_NEW = 6, 24


@pytest.fixture(scope="module")
def uniforms():
    return torch.rand(len(LENGTHS) * G, MAX_NEW, generator=torch.Generator().manual_seed(1))


def rows_of(completions):
    return [tokens[mask].tolist() for tokens, mask in zip(completions.tokens, completions.mask, strict=True)]


@pytest.mark.parametrize("family", ["qwen2", "llama"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_tokens_and_log_probs_equal_the_oracle_row_by_row(uniforms, temperature, family):
    model, prompts = make_model(family=family), random_prompts(LENGTHS)
    stop = [EOS, 7]  # two end tokens, as Qwen and Llama have
    out = generate(model, prompts, MAX_NEW, stop, PAD, num_samples=G, uniforms=uniforms, temperature=temperature)
    lengths = out.mask.sum(1)
    assert lengths.min() < MAX_NEW / 2 and lengths.max() == MAX_NEW  # some rows drop out early, some run to the end
    for row, tokens in enumerate(rows_of(out)):
        expected, log_probs = oracle_generate(model, prompts[row // G], uniforms[row], temperature, stop, MAX_NEW)
        assert tokens == expected
        assert out.log_probs[row, : len(tokens)].tolist() == pytest.approx(log_probs, abs=1e-4)
        assert not out.log_probs[row, len(tokens) :].any()


@pytest.mark.parametrize("lengths", [[3, 9, 5, 1], [4, 4, 4, 4], [0, 6, 2, 1], [3]], ids=str)
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_what_prompts_begin_with_alike_is_computed_once_and_changes_no_token(lengths, family):
    model, (beginning,) = make_model(family=family), random_prompts([12], seed=5)
    prompts = [beginning + rest for rest in random_prompts(lengths)]
    uniforms = torch.rand(len(prompts) * G, MAX_NEW, generator=torch.Generator().manual_seed(1))
    seen = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    out = generate(model, prompts, MAX_NEW, [EOS, 7], PAD, num_samples=G, uniforms=uniforms)
    handle.remove()
    shared = min(12, 11 + min(lengths))  # every prompt has at least one token of its own left
    passes = [(1, shared), (len(prompts), 12 + max(lengths) - shared)] if len(prompts) > 1 else [(1, 15)]
    assert seen[: len(passes)] == passes
    for row, tokens in enumerate(rows_of(out)):
        expected, log_probs = oracle_generate(model, prompts[row // G], uniforms[row], 1.0, [EOS, 7], MAX_NEW)
        assert tokens == expected
        assert out.log_probs[row, : len(tokens)].tolist() == pytest.approx(log_probs, abs=1e-4)


def test_sliding_windows_see_as_far_back_as_they_should(uniforms):
    # Padding between the tokens of a prompt would use up a window that is counted in slots.
    settings = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0}
    model, (beginning,) = make_model(**settings), random_prompts([12], seed=5)
    assert set(model.config.layer_types) == {"sliding_attention"}
    prompts = [beginning + rest for rest in random_prompts(LENGTHS)]
    out = generate(model, prompts, MAX_NEW, [EOS, 7], PAD, num_samples=G, uniforms=uniforms)
    for row, tokens in enumerate(rows_of(out)):
        assert tokens == oracle_generate(model, prompts[row // G], uniforms[row], 1.0, [EOS, 7], MAX_NEW)[0]


@pytest.mark.parametrize("beginning", [0, 12])
@pytest.mark.parametrize("num_samples", [1, 3])
def test_hooks_are_told_which_prompt_each_row_of_every_forward_pass_belongs_to(beginning, num_samples):
    # A hook that gives each block of two prompts its own bias on the logits: rows come out as alone under that bias.
    model, (start,) = make_model(), random_prompts([beginning], seed=5)
    prompts = [start + rest for rest in random_prompts([3, 9, 5, 1, 2, 6])]
    uniforms = torch.rand(6 * num_samples, MAX_NEW, generator=torch.Generator().manual_seed(1))
    biases = 3 * torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
    biases[:, EOS] = biases.amax(1)
    now = {}

    def add_bias(module, inputs, output):
        assert len(output) == len(now["prompts"])
        return output + biases[now["prompts"] // 2][:, None]

    def complete(prompts, uniforms, **options):
        return generate(model, prompts, MAX_NEW, [EOS, 7], PAD, num_samples=num_samples, uniforms=uniforms, **options)

    handle = model.lm_head.register_forward_hook(add_bias)
    together = complete(prompts, uniforms, on_rows=lambda rows: now.update(prompts=rows), block_size=2)
    split = complete(prompts, uniforms, on_rows=lambda rows: now.update(prompts=rows), block_size=2, batch_size=3)
    handle.remove()
    assert torch.equal(together.tokens, split.tokens)
    lengths = together.mask.sum(1)
    assert lengths.min() < lengths.max() / 2  # rows left on the way
    for prompt in range(6):
        rows = slice(prompt * num_samples, (prompt + 1) * num_samples)
        handle = model.lm_head.register_forward_hook(lambda m, i, output, b=biases[prompt // 2]: output + b)
        alone = complete(prompts[prompt : prompt + 1], uniforms[rows])
        handle.remove()
        assert rows_of(together)[rows] == rows_of(alone)


def frozen(function, cursors):
    """A function that goes on with the variables of its scope as they are now, as a CUDA graph does with tensors."""
    cells = []
    for cell in function.__closure__ or ():
        content = cell.cell_contents
        if isinstance(content, types.FunctionType) and content.__module__ == "utils":
            content = frozen(content, cursors)
        elif isinstance(content, utils.Cursor):
            cursors.append((content, content.slot, content.end))
        cells.append(types.CellType(content))
    code, scope = function.__code__, function.__globals__
    return types.FunctionType(code, scope, function.__name__, function.__defaults__, tuple(cells))


@pytest.fixture
def twin(monkeypatch):
    """The loop as it is on a GPU, with functions in place of CUDA graphs. Returns the calls of each, in order.

    Memory that nobody has written holds NaN.
    """
    calls = []

    def captured(step):
        cursors = []
        step = frozen(step, cursors)
        calls.append(0)

        def replay():
            assert cursors and all(cursor.slot is slot and cursor.end == end for cursor, slot, end in cursors)
            calls[-1] += 1
            step()

        return replay

    monkeypatch.setattr(utils, "captures", lambda device: True)
    monkeypatch.setattr(utils, "captured", captured)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    monkeypatch.setattr(utils, "LENGTH_BUCKET", 5)
    torch.use_deterministic_algorithms(True)
    yield calls
    torch.use_deterministic_algorithms(False)


def lora_model():
    torch.manual_seed(3)
    model = make_policy(make_model(), LoRA(rank=4), False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("kind", ["plain", "llama", "lora", "merged"])
def test_steps_that_are_captured_give_the_same_tokens(uniforms, request, kind):
    model = lora_model() if kind in ("lora", "merged") else make_model(family="llama" if kind == "llama" else "qwen2")
    prompts = random_prompts(LENGTHS)

    def rollout():
        with merged_adapter(model) if kind == "merged" else torch.no_grad():
            return generate(model, prompts, MAX_NEW, [EOS, 7], PAD, num_samples=G, uniforms=uniforms)

    eager = rollout()
    calls = request.getfixturevalue("twin")
    graphs = rollout()
    assert torch.equal(graphs.tokens, eager.tokens)
    assert torch.equal(graphs.mask, eager.mask)
    torch.testing.assert_close(graphs.log_probs, eager.log_probs, atol=1e-5, rtol=0)
    assert len(calls) >= 3 and sum(calls) > MAX_NEW / 2  # captured anew when rows leave and when the end is reached
    assert max(calls) == 4  # of five steps with the same end, the first is not captured


@pytest.mark.parametrize("rank", [1, 2])
def test_a_population_decodes_the_same_tokens_in_captured_steps(request, rank):
    model, members, (beginning,) = make_model(), 4, random_prompts([10], seed=5)
    prompts = [beginning + rest for rest in random_prompts(LENGTHS)] * members
    shapes = noise_shapes(dict(model.named_parameters()), "low_rank", rank)

    def rollout():
        generators = noise_generators(0, 0, range(members), members, torch.device("cpu"))
        with Population(model, shapes, generators, torch.full((members,), 0.1), len(LENGTHS)) as on_rows:
            return generate(model, prompts, MAX_NEW, [EOS, 7], PAD, on_rows=on_rows, block_size=len(LENGTHS))

    eager = rollout()
    calls = request.getfixturevalue("twin")
    assert torch.equal(rollout().tokens, eager.tokens)
    assert sum(calls) > 0
    assert len(set(map(tuple, eager.tokens.tolist()))) > len(LENGTHS)  # members answer differently


def test_steps_of_a_model_with_sliding_windows_are_not_captured(uniforms, request):
    model = make_model(use_sliding_window=True, sliding_window=6, max_window_layers=0)
    eager = generate(model, random_prompts(LENGTHS), MAX_NEW, [EOS, 7], PAD, num_samples=G, uniforms=uniforms)
    calls = request.getfixturevalue("twin")
    out = generate(model, random_prompts(LENGTHS), MAX_NEW, [EOS, 7], PAD, num_samples=G, uniforms=uniforms)
    assert torch.equal(out.tokens, eager.tokens)
    assert not calls


def test_steps_that_wait_for_the_gpu_are_taken_as_they_are(model, uniforms, request, monkeypatch, capsys):
    prompts = random_prompts(LENGTHS)
    eager = generate(model, prompts, MAX_NEW, [EOS], PAD, num_samples=G, uniforms=uniforms)
    calls, modes = request.getfixturevalue("twin"), []
    utils.say_once.cache_clear()
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    handle = model.register_forward_hook(
        lambda *_: warnings.warn("called a synchronizing CUDA operation", stacklevel=1) if modes == ["warn"] else None
    )
    out = generate(model, prompts, MAX_NEW, [EOS], PAD, num_samples=G, uniforms=uniforms)
    handle.remove()
    assert torch.equal(out.tokens, eager.tokens)
    assert not calls and modes == ["warn", "default"]
    assert capsys.readouterr().out.count("decoding without CUDA graphs") == 1


def test_a_capture_that_fails_ends_with_what_to_do(model, monkeypatch):
    class Graph:
        pass

    @contextlib.contextmanager
    def graph(*args, **kwargs):
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    with pytest.raises(ValueError, match="decode step cannot be recorded as a CUDA graph; run with CUDA_GRAPHS=0"):
        utils.captured(lambda: torch.zeros(2).expand(3))
    with pytest.raises(torch.OutOfMemoryError):
        utils.captured(lambda: raise_out_of_memory())
    assert utils.captures(torch.device("cuda")) and not utils.captures(torch.device("cpu"))
    monkeypatch.setenv("CUDA_GRAPHS", "0")
    assert not utils.captures(torch.device("cuda"))


def raise_out_of_memory():
    raise torch.OutOfMemoryError("no memory")


def test_no_memory_for_a_graph_makes_the_batch_smaller(model, uniforms, request, monkeypatch, capsys):
    prompts = random_prompts(LENGTHS)
    eager = generate(model, prompts, MAX_NEW, [EOS], PAD, num_samples=G, uniforms=uniforms)
    request.getfixturevalue("twin")
    captured, calls = utils.captured, []

    def fails_at_first(step):
        calls.append(step)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("no memory")
        return captured(step)

    monkeypatch.setattr(utils, "captured", fails_at_first)
    out = generate(model, prompts, MAX_NEW, [EOS], PAD, num_samples=G, uniforms=uniforms)
    assert torch.equal(out.tokens, eager.tokens)
    assert "out of GPU memory with 24 at once: going on with 12" in capsys.readouterr().out


def test_decoding_masks_its_own_way_whatever_the_attention_of_the_model(model, uniforms):
    prompts = random_prompts(LENGTHS)
    reference = generate(model, prompts, MAX_NEW, [EOS], PAD, num_samples=G, uniforms=uniforms)
    model.set_attn_implementation("eager")  # would add a mask of True and False to the scores
    out = generate(model, prompts, MAX_NEW, [EOS], PAD, num_samples=G, uniforms=uniforms)
    assert torch.equal(out.tokens, reference.tokens)
    assert model.config._attn_implementation == "eager"


def test_greedy_tokens_equal_the_oracle():
    model, prompts = make_model(), random_prompts(LENGTHS)
    out = generate(model, prompts, MAX_NEW, [EOS], PAD)
    for prompt, tokens in zip(prompts, rows_of(out), strict=True):
        assert tokens == oracle_generate(model, prompt, None, 1.0, [EOS], MAX_NEW)[0]


def test_mask_is_the_completion_with_its_end_token_even_when_pad_is_eos(model, uniforms):
    prompts = [[EOS, *prompt, EOS] for prompt in random_prompts(LENGTHS)]  # end-of-turn tokens in the prompt
    out = generate(model, prompts, MAX_NEW, [EOS], EOS, num_samples=G, uniforms=uniforms)
    ended = 0
    for row, tokens in enumerate(rows_of(out)):
        expected, _ = oracle_generate(model, prompts[row // G], uniforms[row], 1.0, [EOS], MAX_NEW)
        assert tokens == expected
        assert bool(out.truncated[row]) == (tokens[-1] != EOS)
        assert EOS not in tokens[:-1]
        ended += tokens[-1] == EOS
    assert ended >= 2


def test_poisoned_generation_config_changes_no_sampled_token(model, uniforms):
    prompts = random_prompts(LENGTHS)
    clean = generate(model, prompts, MAX_NEW, [EOS], PAD, num_samples=G, uniforms=uniforms)
    model.generation_config.update(
        do_sample=True, repetition_penalty=1.5, top_k=2, top_p=0.1, temperature=0.1, max_new_tokens=2, min_p=0.5
    )
    poisoned = generate(model, prompts, MAX_NEW, [EOS], PAD, num_samples=G, uniforms=uniforms)
    assert torch.equal(clean.tokens, poisoned.tokens)
    assert torch.equal(clean.log_probs, poisoned.log_probs)


@pytest.mark.parametrize("drop_share", [0.01, 0.25, 2.0])
def test_a_rows_tokens_do_not_depend_on_which_rows_are_dropped(model, uniforms, drop_share):
    prompts = random_prompts(LENGTHS)
    reference = generate(model, prompts, MAX_NEW, [EOS], PAD, num_samples=G, uniforms=uniforms)
    out = generate(model, prompts, MAX_NEW, [EOS], PAD, num_samples=G, uniforms=uniforms, drop_share=drop_share)
    assert torch.equal(out.tokens, reference.tokens)


@pytest.mark.parametrize("batch_size", [1, G, 3 * G, 1000])
def test_batch_size_changes_no_token(model, uniforms, batch_size):
    prompts = random_prompts(LENGTHS)
    reference = generate(model, prompts, MAX_NEW, [EOS], PAD, num_samples=G, uniforms=uniforms)
    out = generate(model, prompts, MAX_NEW, [EOS], PAD, num_samples=G, uniforms=uniforms, batch_size=batch_size)
    assert torch.equal(out.tokens, reference.tokens)


def test_sampled_log_prob_is_the_recomputed_log_prob(model, uniforms):
    prompts = random_prompts(LENGTHS)
    out = generate(model, prompts, MAX_NEW, [EOS], PAD, num_samples=G, uniforms=uniforms, temperature=0.7)
    rows = [prompt for prompt in prompts for _ in range(G)]
    ones = torch.ones(len(rows))
    for batch in make_micro_batches(rows, out, ones, ones, 10_000, PAD):
        log_probs, _ = completion_log_probs(model, batch.ids, batch.mask, 0.7)
        torch.testing.assert_close(log_probs, batch.sampler_log_probs, atol=2e-5, rtol=0)


def test_trained_ids_are_the_generated_ids(model, uniforms):
    prompts = random_prompts(LENGTHS)
    out = generate(model, prompts, MAX_NEW, [EOS], PAD, num_samples=G, uniforms=uniforms)
    rows = [prompt for prompt in prompts for _ in range(G)]
    generated = sorted(prompt + tokens for prompt, tokens in zip(rows, rows_of(out), strict=True))
    ones = torch.ones(len(rows))
    trained = []
    for batch in make_micro_batches(rows, out, ones, ones, 100, PAD):
        for ids, mask in zip(batch.ids.tolist(), batch.mask.tolist(), strict=True):
            end = max(i for i, is_completion in enumerate(mask) if is_completion) + 1
            trained.append(ids[:end])
    assert sorted(trained) == generated


def test_amount_of_left_padding_changes_no_log_prob(model):
    prompt, noise = random_prompts([4])[0], torch.full((1, MAX_NEW), 0.5)
    alone = generate(model, [prompt], MAX_NEW, [EOS], PAD, uniforms=noise)
    for longest in (5, 20, 100):
        prompts = [prompt, random_prompts([longest], seed=9)[0]]
        padded = generate(model, prompts, MAX_NEW, [EOS], PAD, uniforms=noise.expand(2, -1))
        assert torch.equal(padded.tokens[0], alone.tokens[0])
        torch.testing.assert_close(padded.log_probs[0], alone.log_probs[0], atol=1e-5, rtol=0)


def test_a_prompt_too_long_for_the_model_is_named(model):
    check_prompt_lengths(model, random_prompts([3, 232]), MAX_NEW)
    with pytest.raises(ValueError, match=r"max_new_tokens: 24 after a prompt of 233 tokens exceeds .* 256 positions"):
        check_prompt_lengths(model, random_prompts([3, 233]), MAX_NEW)


def test_greedy_samples_of_one_prompt_are_refused(model):
    with pytest.raises(ValueError, match="num_samples"):
        generate(model, [[2]], MAX_NEW, [EOS], PAD, num_samples=2)


def test_sampling_never_draws_a_token_of_probability_zero():
    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf, 1.0, -torch.inf]])
    for u, expected in [(0.0, 1), (0.49999, 1), (0.5, 3), (1 - 2**-24, 3)]:
        tokens, log_probs = sample(logits, torch.tensor([u]), 1.0, 1.0)
        assert tokens.tolist() == [expected]
        assert log_probs.item() == pytest.approx(-0.6931, abs=1e-4)


def test_sampling_frequencies_are_the_probabilities():
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(0)) * 2
    n = 200_000
    u = (torch.arange(n) + 0.5) / n  # evenly spread, so counts are exact to rounding
    tokens, _ = sample(logits.expand(n, -1), u, 0.5, 1.0)
    frequencies = torch.bincount(tokens, minlength=VOCAB) / n
    torch.testing.assert_close(frequencies, (logits[0] / 0.5).softmax(-1), atol=2 / n, rtol=0)


@pytest.mark.parametrize("scale", [0.01, 1.0, 6.0])
def test_fp32_sampling_is_exact_enough_at_a_vocabulary_of_152k(scale):
    # The float64 cumulative distribution at the token that fp32 drew, and just before it, must enclose the draw but for
    # a few units of rounding: no token then gets a share that is off by more than that.
    n = 256
    logits = torch.randn(1, 151_936, generator=torch.Generator().manual_seed(0)) * scale
    u = (torch.arange(n) + 0.5) / n
    tokens, _ = sample(logits.expand(n, -1), u, 1.0, 1.0)
    exact = logits[0].double().softmax(-1).cumsum(-1)
    assert (exact[tokens] >= u - 2e-6).all()
    assert ((exact[tokens] - logits[0].double().softmax(-1)[tokens]) <= u + 2e-6).all()


def test_top_p_keeps_the_nucleus_and_reports_log_probs_of_the_whole_distribution():
    probs = torch.tensor([[0.1, 0.5, 0.3, 0.1]])
    n = 10_000
    u = (torch.arange(n) + 0.5) / n
    tokens, log_probs = sample(probs.log().expand(n, -1), u, 1.0, 0.7)  # 0.5 and 0.3 reach 0.7
    assert torch.bincount(tokens, minlength=4).tolist() == [0, 6250, 3750, 0]
    assert set(log_probs.exp().mul(10).round().int().tolist()) == {5, 3}


def test_bf16_model_reports_fp32_log_probs_close_to_the_oracle():
    model, prompt = make_model(dtype=torch.bfloat16), random_prompts([6])[0]
    noise = torch.rand(8, MAX_NEW, generator=torch.Generator().manual_seed(2))
    out = generate(model, [prompt], MAX_NEW, [EOS], PAD, num_samples=8, uniforms=noise)
    assert out.log_probs.dtype == torch.float32
    for row, tokens in enumerate(rows_of(out)):
        exact = oracle_log_probs(model, prompt + tokens)
        expected = [float(exact[len(prompt) - 1 + t, token]) for t, token in enumerate(tokens)]
        assert out.log_probs[row, : len(tokens)].tolist() == pytest.approx(expected, abs=0.15)
