"""The decode loop against a slow oracle: one row at a time, float64, no cache, no padding."""

import contextlib
import types
from unittest.mock import Mock

import pytest
import torch
from conftest import EOS, PAD, TINY, VOCAB, make_model, oracle_generate, oracle_log_probs, random_prompts, settings
from transformers import PreTrainedModel

import generation
import utils
from es_train import Population, noise_generators, noise_shapes
from generation import GraphedStep, completion_log_probs, generate, sample
from grpo_train import GRPOConfig, LoRA, make_micro_batches, make_policy, merged_adapter
from reward import UserError

LENGTHS = [3, 9, 5, 1]
G, MAX_NEW = 6, 24
SLIDING = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0}


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
    out = generate(model, prompts, settings(MAX_NEW, stop, temperature=temperature), G, uniforms)
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
    out = generate(model, prompts, settings(MAX_NEW, [EOS, 7]), G, uniforms)
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
    model, (beginning,) = make_model(**SLIDING), random_prompts([12], seed=5)
    assert set(model.config.layer_types) == {"sliding_attention"}
    prompts = [beginning + rest for rest in random_prompts(LENGTHS)]
    out = generate(model, prompts, settings(MAX_NEW, [EOS, 7]), G, uniforms)
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

    def complete(prompts, uniforms, batch_size=256, **options):
        batch_settings = settings(MAX_NEW, [EOS, 7], batch_size=batch_size)
        return generate(model, prompts, batch_settings, num_samples, uniforms, **options)

    handle = model.lm_head.register_forward_hook(add_bias)
    together = complete(prompts, uniforms, on_rows=lambda rows: now.update(prompts=rows), block_size=2)
    split = complete(prompts, uniforms, 3, on_rows=lambda rows: now.update(prompts=rows), block_size=2)
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
        if isinstance(content, types.FunctionType) and content.__module__ == "generation":
            content = frozen(content, cursors)
        elif isinstance(content, types.SimpleNamespace):  # the cursor
            cursors.append((content, content.slot, content.end))
        cells.append(types.CellType(content))
    code, scope = function.__code__, function.__globals__
    return types.FunctionType(code, scope, function.__name__, function.__defaults__, tuple(cells))


class Twin:
    """A function in place of a CUDA graph."""

    def __init__(self, step, calls):
        self.cursors, self.calls = [], calls
        self.step = frozen(step, self.cursors)
        calls.append(0)

    def replay(self):
        assert self.cursors and all(cursor.slot is slot and cursor.end == end for cursor, slot, end in self.cursors)
        self.calls[-1] += 1
        self.step()


class GPU(str):
    """A device name that tensors accept as the CPU, and whose type says that it is a GPU."""

    type = "cuda"


@pytest.fixture
def twin(monkeypatch):
    """The loop as it is on a GPU, with twins in place of CUDA graphs. Returns the calls of each, in order.

    Memory that nobody has written holds NaN.
    """
    calls = []

    class TwinStep(GraphedStep):
        def __call__(self):
            if self.enabled and not self.is_first and self.graph is None:
                self.graph = Twin(self.step, calls)
            super().__call__()

    monkeypatch.setattr(generation, "GraphedStep", TwinStep)
    monkeypatch.setattr(PreTrainedModel, "device", GPU("cpu"))
    monkeypatch.setattr(generation, "LENGTH_BUCKET", 5)
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

    with merged_adapter(model) if kind == "merged" else contextlib.nullcontext():
        eager = generate(model, prompts, settings(MAX_NEW, [EOS, 7]), G, uniforms)
        calls = request.getfixturevalue("twin")
        graphs = generate(model, prompts, settings(MAX_NEW, [EOS, 7]), G, uniforms)
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
            return generate(model, prompts, settings(MAX_NEW, [EOS, 7]), on_rows=on_rows, block_size=len(LENGTHS))

    eager = rollout()
    calls = request.getfixturevalue("twin")
    assert torch.equal(rollout().tokens, eager.tokens)
    assert sum(calls) > 0
    assert len(set(map(tuple, eager.tokens.tolist()))) > len(LENGTHS)  # members answer differently


@pytest.mark.parametrize(
    ("model_settings", "device", "cuda_graphs"),
    [(SLIDING, GPU("cpu"), True), ({}, GPU("cpu"), False), ({}, torch.device("cpu"), True)],
    ids=["sliding window", "cuda_graphs: false", "cpu"],
)
def test_steps_that_cannot_or_should_not_be_captured_are_not(
    uniforms, request, monkeypatch, model_settings, device, cuda_graphs
):
    model, prompts = make_model(**model_settings), random_prompts(LENGTHS)
    eager = generate(model, prompts, settings(MAX_NEW, [EOS, 7]), G, uniforms)
    calls = request.getfixturevalue("twin")
    monkeypatch.setattr(PreTrainedModel, "device", device)
    out = generate(model, prompts, settings(MAX_NEW, [EOS, 7], cuda_graphs=cuda_graphs), G, uniforms)
    assert torch.equal(out.tokens, eager.tokens)
    assert not calls


@pytest.mark.parametrize(
    "error", [RuntimeError("operation not permitted"), torch.OutOfMemoryError("no memory")], ids=repr
)
def test_a_capture_that_fails_ends_with_its_error_and_with_what_to_do(monkeypatch, error):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: contextlib.nullcontext())
    run_step = GraphedStep(Mock(side_effect=[None, error]), enabled=True)  # the first step is not captured
    run_step()
    with pytest.raises(type(error), match=str(error)) as raised:
        run_step()
    assert "cannot be captured: set cuda_graphs: false" in " ".join(raised.value.__notes__)


def test_greedy_tokens_equal_the_oracle():
    model, prompts = make_model(), random_prompts(LENGTHS)
    out = generate(model, prompts, settings(MAX_NEW))
    for prompt, tokens in zip(prompts, rows_of(out), strict=True):
        assert tokens == oracle_generate(model, prompt, None, 1.0, [EOS], MAX_NEW)[0]


def test_mask_is_the_completion_with_its_end_token_even_when_pad_is_eos(model, uniforms):
    prompts = [[EOS, *prompt, EOS] for prompt in random_prompts(LENGTHS)]  # end-of-turn tokens in the prompt
    out = generate(model, prompts, settings(MAX_NEW, pad_id=EOS), G, uniforms)
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
    clean = generate(model, prompts, settings(MAX_NEW), G, uniforms)
    model.generation_config.update(
        do_sample=True, repetition_penalty=1.5, top_k=2, top_p=0.1, temperature=0.1, max_new_tokens=2, min_p=0.5
    )
    poisoned = generate(model, prompts, settings(MAX_NEW), G, uniforms)
    assert torch.equal(clean.tokens, poisoned.tokens)
    assert torch.equal(clean.log_probs, poisoned.log_probs)


@pytest.mark.parametrize("batch_size", [1, G, 3 * G, 1000])
def test_batch_size_changes_no_token(model, uniforms, batch_size):
    prompts = random_prompts(LENGTHS)
    reference = generate(model, prompts, settings(MAX_NEW), G, uniforms)
    out = generate(model, prompts, settings(MAX_NEW, batch_size=batch_size), G, uniforms)
    assert torch.equal(out.tokens, reference.tokens)


def test_sampled_log_prob_is_the_recomputed_log_prob(model, uniforms):
    prompts = random_prompts(LENGTHS)
    out = generate(model, prompts, settings(MAX_NEW, temperature=0.7), G, uniforms)
    rows = [prompt for prompt in prompts for _ in range(G)]
    ones = torch.ones(len(rows))
    for batch in make_micro_batches(rows, out, ones, ones, 10_000, PAD):
        log_probs, _ = completion_log_probs(model, batch.ids, batch.mask, 0.7)
        torch.testing.assert_close(log_probs, batch.sampler_log_probs, atol=2e-5, rtol=0)


def test_trained_ids_are_the_generated_ids(model, uniforms):
    prompts = random_prompts(LENGTHS)
    out = generate(model, prompts, settings(MAX_NEW), G, uniforms)
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
    alone = generate(model, [prompt], settings(MAX_NEW), uniforms=noise)
    for longest in (5, 20, 100):
        prompts = [prompt, random_prompts([longest], seed=9)[0]]
        padded = generate(model, prompts, settings(MAX_NEW), uniforms=noise.expand(2, -1))
        assert torch.equal(padded.tokens[0], alone.tokens[0])
        torch.testing.assert_close(padded.log_probs[0], alone.log_probs[0], atol=1e-5, rtol=0)


def test_a_prompt_too_long_for_the_model_is_named():
    def set_up(max_new_tokens):
        config = GRPOConfig(model=TINY, dataset_args={"size": 20}, max_new_tokens=max_new_tokens)
        return utils.set_up(config, "float32")

    setup = set_up(1)
    longest = max(len(problem.ids) for problem in setup.train_set + setup.test_set)
    room = setup.model.config.max_position_embeddings - longest
    set_up(room)
    message = rf"max_new_tokens: {room + 1}: a prompt of {longest} tokens and .* exceed the model's 512 positions"
    with pytest.raises(UserError, match=message):
        set_up(room + 1)


def test_greedy_samples_of_one_prompt_are_refused(model):
    with pytest.raises(AssertionError, match="greedy completions of one prompt are all the same"):
        generate(model, [[2]], settings(MAX_NEW), num_samples=2)


def test_sampling_never_draws_a_token_of_probability_zero():
    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf, 1.0, -torch.inf]])
    for u, expected in [(0.0, 1), (0.49999, 1), (0.5, 3), (1 - 2**-24, 3)]:
        tokens, log_probs = sample(logits, torch.tensor([u]), 1.0)
        assert tokens.tolist() == [expected]
        assert log_probs.item() == pytest.approx(-0.6931, abs=1e-4)


def test_sampling_frequencies_are_the_probabilities():
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(0)) * 2
    n = 200_000
    u = (torch.arange(n) + 0.5) / n  # evenly spread, so counts are exact to rounding
    tokens, _ = sample(logits.expand(n, -1), u, 0.5)
    frequencies = torch.bincount(tokens, minlength=VOCAB) / n
    torch.testing.assert_close(frequencies, (logits[0] / 0.5).softmax(-1), atol=2 / n, rtol=0)


@pytest.mark.parametrize("scale", [0.01, 1.0, 6.0])
def test_fp32_sampling_is_exact_enough_at_a_vocabulary_of_152k(scale):
    # The float64 cumulative distribution at the token that fp32 drew, and just before it, must enclose the draw but for
    # a few units of rounding: no token then gets a share that is off by more than that.
    n = 256
    logits = torch.randn(1, 151_936, generator=torch.Generator().manual_seed(0)) * scale
    u = (torch.arange(n) + 0.5) / n
    tokens, _ = sample(logits.expand(n, -1), u, 1.0)
    exact = logits[0].double().softmax(-1).cumsum(-1)
    assert (exact[tokens] >= u - 2e-6).all()
    assert ((exact[tokens] - logits[0].double().softmax(-1)[tokens]) <= u + 2e-6).all()


def test_bf16_model_reports_fp32_log_probs_close_to_the_oracle():
    model, prompt = make_model(dtype=torch.bfloat16), random_prompts([6])[0]
    noise = torch.rand(8, MAX_NEW, generator=torch.Generator().manual_seed(2))
    out = generate(model, [prompt], settings(MAX_NEW), 8, noise)
    assert out.log_probs.dtype == torch.float32
    for row, tokens in enumerate(rows_of(out)):
        exact = oracle_log_probs(model, prompt + tokens)
        expected = [float(exact[len(prompt) - 1 + t, token]) for t, token in enumerate(tokens)]
        assert out.log_probs[row, : len(tokens)].tolist() == pytest.approx(expected, abs=0.15)
