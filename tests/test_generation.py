"""Tests of sampling and scoring against a slow oracle: one row at a time, float64, no cache, no padding."""

import contextlib
import itertools
import re
import types
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from conftest import EOS, PAD, VOCAB, make_like, make_model, oracle_log_probs, random_prompts, settings
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

import generation
from es_train import Population, noise_generators, noise_shapes
from generation import PreallocatedLayer, completion_log_probs, generate, inner_model, sample
from grpo_train import LoRA, checkpoint_layers, make_micro_batches, make_policy
from reward import UserError
from utils import check_chunked_head, completion_texts, fingerprint, stop_table

PROMPTS = random_prompts([3, 9, 5, 1])
G, MAX_NEW = 6, 24
STOP = [EOS, 7]  # two end tokens, as in Qwen and Llama
SLIDING = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}
GEMMA = {"family": "gemma3", "sliding_window": 200}
KINDS = {"qwen2": {}, "llama": {"family": "llama"}, "gemma3": GEMMA, "sliding window": SLIDING}
KINDS["gemma3, a narrow window"] = GEMMA | {"sliding_window": 16}
GPU = type("GPU", (str,), {"type": "cuda"})("cpu")  # torch takes it for the CPU, but its type is "cuda"


def prompts_after(beginning, lengths=(3, 9, 5, 1)):
    """Return random prompts that share their first `beginning` tokens."""
    (start,) = random_prompts([beginning], seed=5)
    return [start + rest for rest in random_prompts(lengths)]


def draws(num_rows):
    return torch.rand(num_rows, MAX_NEW, generator=torch.Generator().manual_seed(1))


def rollout(model, prompts=PROMPTS, stop_ids=STOP, **options):
    return generate(model, prompts, settings(MAX_NEW, stop_ids, **options), G, draws(len(prompts) * G))


def rows_of(completions):
    return [tokens[mask].tolist() for tokens, mask in zip(completions.tokens, completions.mask, strict=True)]


def assert_as_the_oracle(out, model, prompts, stop_ids=STOP, temperature=1.0, greedy=False, ends=None):
    """Assert that each token is the one that the oracle draws at its position, up to an end or the limit.

    ends(tokens): True if a completion of these tokens has ended, by default if the last one is in `stop_ids`
    """
    ends = ends or (lambda tokens: tokens[-1] in stop_ids)
    num_samples, uniforms = len(out.tokens) // len(prompts), draws(len(out.tokens))
    for row, tokens in enumerate(rows_of(out)):
        prompt, count = prompts[row // num_samples], len(tokens)
        exact = oracle_log_probs(model, prompt + tokens, temperature)[len(prompt) - 1 : -1]  # (count, V)
        first_above_draw = (exact.exp().cumsum(1) <= uniforms[row, :count, None]).sum(1)
        assert tokens == (exact.argmax(1) if greedy else first_above_draw).tolist()
        expected = exact.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        torch.testing.assert_close(out.log_probs[row, :count].double(), expected, atol=1e-5, rtol=0)
        assert out.mask[row, :count].all() and not out.log_probs[row, count:].any()
        assert (out.tokens[row, count:] == PAD).all()
        *before, last = [ends(tokens[: n + 1]) for n in range(count)]
        assert not any(before) and (last or count == MAX_NEW)
        assert out.truncated[row] == (not last)


@pytest.mark.parametrize("family", ["qwen2", "llama"])
@pytest.mark.parametrize(("temperature", "batch_size"), [(1.0, 1000), (0.7, 1), (0.7, 3 * G)])
@pytest.mark.parametrize("lengths", [[3, 9, 5, 1], [4, 20], [4, 100]], ids=str)
def test_samples_equal_the_oracle_row_by_row_at_any_temperature_batch_size_and_padding(
    family, temperature, batch_size, lengths
):
    model, prompts = make_model(family=family), random_prompts(lengths)
    out = rollout(model, prompts, temperature=temperature, batch_size=batch_size)
    assert_as_the_oracle(out, model, prompts, temperature=temperature)
    greedy = generate(model, prompts, settings(MAX_NEW, STOP, batch_size=batch_size))
    assert_as_the_oracle(greedy, model, prompts, greedy=True)
    counts = out.mask.sum(1)
    assert counts.min() < MAX_NEW / 2 and counts.max() == MAX_NEW  # some rows finish early, some reach the limit


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [[3, 9, 5, 1], [4, 4, 4, 4], [0, 6, 2, 1], [3]], ids=str)
def test_a_shared_beginning_is_computed_once_but_for_narrow_windows_and_changes_no_token(lengths, kind):
    model, prompts, seen = make_model(**KINDS[kind]), prompts_after(12, lengths), []
    model.register_forward_pre_hook(lambda _, __, inputs: seen.append(inputs["input_ids"].shape), with_kwargs=True)
    assert_as_the_oracle(rollout(model, prompts), model, prompts)
    shared, P = min(12, 11 + min(lengths)), len(prompts)  # each prompt keeps at least one token of its own
    if P == 1 or "window" in kind:  # padding inside a prompt would use up window slots
        assert seen[0] == (P, 12 + max(lengths))
    else:
        assert seen[:2] == [(1, shared), (P, 12 + max(lengths) - shared)]


@pytest.mark.parametrize("excess", [0, 1, 2, 9])
@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_a_sliding_layer_is_a_full_one_just_while_prompt_and_completion_fit_its_window(family, excess):
    prompts, num_slots, seen = prompts_after(12, [9, 9]), 12 + 9 + MAX_NEW, []
    window = {"use_sliding_window": True, "max_window_layers": 0} if family == "qwen2" else {}
    model = make_model(family=family, sliding_window=num_slots - excess, **window)
    handle = model.register_forward_pre_hook(lambda *inputs: seen.append(len(inputs[2]["input_ids"])), with_kwargs=True)
    out = rollout(model, prompts, [])  # all rows reach the limit
    assert_as_the_oracle(out, model, prompts, [])
    assert seen[0] == (2 if excess else 1)
    seen.clear()
    rows = [prompts[row // G] + tokens for row, tokens in enumerate(rows_of(out))]
    handle.remove()
    model.model.register_forward_pre_hook(lambda *inputs: seen.append(len(inputs[2]["input_ids"])), with_kwargs=True)
    log_probs, _ = completion_log_probs(model, *right_padded(rows, [21] * len(rows)), 1.0)
    torch.testing.assert_close(log_probs[:, 21:], out.log_probs, atol=1e-5, rtol=0)
    assert seen == ([2 * G] if excess > 1 else [1, 2, 2 * G])  # the newest token is never a key


class FakeTokenizer:
    """Tokens 0 and 1 are special, the others texts of a and b, some with line breaks or a space before them.

    Like Llama 2's, it drops a space at the start of what it decodes.
    """

    def __init__(self):
        letters = [["".join(text) for text in itertools.product("ab", repeat=n)] for n in range(1, 5)]
        pieces = [
            *sum(letters, []),
            *map("\n".__add__, sum(letters[:3], [])),
            "\n",
            "\n\n",
            *map(" ".__add__, letters[1]),
        ]
        self.pieces, self.chat_template = ["", "", *pieces, *"c" * (VOCAB - 2 - len(pieces))], None

    def __len__(self):
        return VOCAB

    def __call__(self, text, **_):
        """Split the text into its characters, with a space as part of the one that follows it."""
        parts = re.findall(r" ..|[^ ]", text)
        return types.SimpleNamespace(
            input_ids=[self.pieces.index(part) if part in self.pieces else 0 for part in parts]
        )

    def decode(self, tokens):
        return "".join(self.pieces[token] for token in tokens).removeprefix(" ")

    def batch_decode(self, rows, **_):
        return list(map(self.decode, rows))


@pytest.mark.parametrize("stop", [["aba"], ["abba", "b\na"], ["\n\n", "bb"], ["a ab", "aba"]], ids=str)
@pytest.mark.parametrize("graphs", [False, True])
def test_a_completion_ends_with_the_token_that_completes_a_stop_text_however_it_is_split(model, stop, graphs):
    tokenizer = FakeTokenizer()
    options = {"stop_table": stop_table(tokenizer, stop, VOCAB)}
    for num_tokens in (VOCAB - 1, VOCAB + 8):  # the model has fewer embeddings than the tokenizer, or more
        other = stop_table(tokenizer, stop, num_tokens)
        assert other.shape[1] == num_tokens and torch.equal(
            other[:, : VOCAB - 1], options["stop_table"][:, : VOCAB - 1]
        )
    with pytest.raises(UserError, match="^stop: 'az': the tokenizer has no tokens for this text"):
        stop_table(tokenizer, [*stop, "az"], VOCAB)

    def is_complete(tokens):
        return tokens[-1] in STOP or any(text in tokenizer.decode(tokens) for text in stop)

    def decode(how):
        how.stop_table = options["stop_table"]
        return generate(model, PROMPTS, how, G, draws(len(PROMPTS) * G))

    out = captured_as_eager(decode)[0] if graphs else rollout(model, **options)
    assert_as_the_oracle(out, model, PROMPTS, ends=is_complete)
    found = [row for row in rows_of(out) if row[-1] not in STOP and is_complete(row)]
    assert len(found) >= 3 and any(not any(text in tokenizer.pieces[row[-1]] for text in stop) for row in found)
    # The scored text ends with the stop text. The loss covers the tokens as sampled, up to the one that completes it.
    for text, row in zip(completion_texts(out, tokenizer, stop), rows_of(out), strict=True):
        ends = [tokenizer.decode(row).find(each) + len(each) for each in stop if each in tokenizer.decode(row)]
        assert text == tokenizer.decode(row)[: min(ends, default=None)]
    rows, ones = [prompt for prompt in PROMPTS for _ in range(G)], torch.ones(len(PROMPTS) * G)
    batches = make_micro_batches(rows, out, ones, ones, 10**6, True)
    assert sum(batch.mask.sum() for batch in batches) == sum(map(len, rows_of(out)))
    for batch in batches:
        log_probs, _ = completion_log_probs(model, batch.ids, batch.mask, 1.0)
        torch.testing.assert_close(log_probs, batch.sampler_log_probs, atol=2e-5, rtol=0)


def test_mask_is_the_completion_with_its_end_token_even_when_pad_is_eos(model):
    prompts = [[PAD, *prompt, PAD] for prompt in PROMPTS]  # end-of-turn tokens in the prompt
    out = rollout(model, prompts, [PAD])
    assert_as_the_oracle(out, model, prompts, [PAD])
    assert (~out.truncated).sum() >= 2


def test_under_autocast_each_weight_is_cast_once_and_the_cache_has_a_multiple_of_8_slots_in_bf16(model, monkeypatch):
    weights, casts, buffers = {weight.data_ptr() for weight in model.parameters()}, [], []
    repeat = PreallocatedLayer.batch_repeat_interleave

    class CountCasts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default and args[0].data_ptr() in weights:
                casts.append(args[0].data_ptr())
            return function(*args, **(kwargs or {}))

    def spy(layer, repeats):
        repeat(layer, repeats)
        buffers.extend(layer.buffers)

    monkeypatch.setattr(PreallocatedLayer, "batch_repeat_interleave", spy)
    with torch.autocast("cpu", torch.bfloat16), CountCasts():
        rollout(model)
    assert casts and len(casts) == len(set(casts))
    assert buffers and all(x.dtype == torch.bfloat16 and x.shape[2] % 8 == 0 for x in buffers)


def test_a_model_that_trains_with_flash_attention_and_checkpointing_decodes_with_neither(model):
    expected = rollout(model)
    checkpoint_layers(model)
    model.config._attn_implementation = "flash"
    assert torch.equal(rollout(model).tokens, expected.tokens)
    assert model.config._attn_implementation == "flash" and [m.training for m in model.model.layers] == [True, True]


def test_poisoned_generation_config_changes_no_sampled_token(model):
    clean = rollout(model)
    poison = {"repetition_penalty": 1.5, "top_k": 2, "top_p": 0.1, "min_p": 0.5, "temperature": 0.1}
    model.generation_config.update(do_sample=True, max_new_tokens=2, **poison)
    poisoned = rollout(model)
    assert torch.equal(clean.tokens, poisoned.tokens) and torch.equal(clean.log_probs, poisoned.log_probs)


def test_trained_ids_are_the_generated_ids_and_recomputed_log_probs_the_sampled_ones(model):
    out, rows = rollout(model, temperature=0.7), [prompt for prompt in PROMPTS for _ in range(G)]
    ones, trained = torch.ones(len(rows)), []
    for batch in make_micro_batches(rows, out, ones, ones, 100, True):
        log_probs, _ = completion_log_probs(model, batch.ids, batch.mask, 0.7)
        torch.testing.assert_close(log_probs, batch.sampler_log_probs, atol=2e-5, rtol=0)
        ends = (batch.mask * torch.arange(batch.mask.shape[1])).argmax(1) + 1
        trained += [ids[:end].tolist() for ids, end in zip(batch.ids, ends, strict=True)]
    assert sorted(trained) == sorted(prompt + tokens for prompt, tokens in zip(rows, rows_of(out), strict=True))


@pytest.mark.parametrize("spread", [1, 300, 5000])
def test_sampling_never_draws_a_token_of_probability_zero(spread):
    # The two possible tokens are in one block of the vocabulary, or in two.
    logits = torch.full((5 * spread,), -torch.inf)
    logits[[spread, 3 * spread]] = 1.0
    draws = torch.tensor([0.0, 0.49999, 0.5, 1 - 2**-24])
    tokens, log_probs = sample(logits.expand(4, -1), draws, 1.0)
    assert tokens.tolist() == [spread, spread, 3 * spread, 3 * spread]
    assert log_probs.tolist() == pytest.approx([-0.6931] * 4, abs=1e-4)
    for gap in (14.0, 14.6, 15.2, 15.8):  # blocks of so little weight that the rounding of the sums is large beside it
        few = torch.full((1, 2000), -torch.inf).index_fill(1, torch.tensor([5, 700, 1400]), -gap)
        few[0, 5] = 0.0
        tokens, _ = sample(few.expand(100, -1), 1 - torch.arange(1, 101) * 2.0**-24, 1.0)
        assert set(tokens.tolist()) == {5, 700, 1400}


@pytest.mark.parametrize("vocab_size", [64, 512, 1000, 2048])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_token_does_not_depend_on_the_other_rows_and_is_that_of_the_float64_distribution(
    monkeypatch, vocab_size, temperature
):
    logits = torch.randn(50, vocab_size, generator=torch.Generator().manual_seed(0)) * 3
    draws = torch.rand(50, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(generation, "CACHED_LOGITS", 3 * vocab_size)  # 3 rows at a time
    exact = (logits.double() / temperature).log_softmax(-1)
    for uniforms, expected in [(draws, (exact.exp().cumsum(1) <= draws[:, None]).sum(1)), (None, logits.argmax(1))]:
        tokens, log_probs = sample(logits, uniforms, temperature)
        assert torch.equal(tokens, expected)
        torch.testing.assert_close(log_probs.double(), exact.gather(1, tokens[:, None])[:, 0], atol=1e-5, rtol=0)
        for row in (0, 7, 49):
            alone = sample(
                logits[row : row + 1], uniforms if uniforms is None else uniforms[row : row + 1], temperature
            )
            assert [*alone] == [tokens[row : row + 1], log_probs[row : row + 1]]


@pytest.mark.parametrize("vocab_size", [64, 1000])
def test_a_row_of_nan_gives_a_token_of_the_vocabulary_with_log_prob_nan_and_leaves_the_others(vocab_size):
    logits, draws = (
        torch.randn(3, vocab_size, generator=torch.Generator().manual_seed(0)),
        torch.tensor([0.1, 0.5, 0.9]),
    )
    expected, _ = sample(logits, draws, 1.0)
    logits[1] = torch.nan
    tokens, log_probs = sample(logits, draws, 1.0)
    assert tokens[1] < vocab_size and log_probs.isnan().tolist() == [False, True, False]
    assert tokens[[0, 2]].tolist() == expected[[0, 2]].tolist()


@pytest.mark.parametrize("scale", [0.01, 1.0, 6.0])
def test_fp32_sampling_frequencies_are_the_probabilities_at_a_vocabulary_of_152k(scale):
    # The float64 cumulative distribution before and at the token that fp32 drew must enclose the draw, up to rounding.
    # The probability of a token is then wrong by no more than that.
    logits = torch.randn(1, 151_936, generator=torch.Generator().manual_seed(0)) * scale
    u = (torch.arange(256) + 0.5) / 256
    tokens, _ = sample(logits.expand(256, -1), u, 1.0)
    probs = logits[0].double().softmax(-1)
    above = probs.cumsum(-1)[tokens]
    assert (above >= u - 2e-6).all() and (above - probs[tokens] <= u + 2e-6).all()


class Recorder(TorchDispatchMode):
    """Record the operations of a step, and address, shape and strides of the tensors that existed before it."""

    def __init__(self):
        super().__init__()
        self.reads, self.own = [], {}  # own: by address, tensors of the step, kept so that no address is used twice

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        new = [x for x in given if x.untyped_storage().data_ptr() not in self.own]
        self.reads.append((str(function), [(x.data_ptr(), x.shape, x.stride()) for x in new]))
        result = function(*args, **(kwargs or {}))
        addresses = {x.untyped_storage().data_ptr() for x in given}
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in addresses:
                self.own[x.untyped_storage().data_ptr()] = x
        return result


def captured_as_eager(decode, device=GPU):
    """Assert that captured steps give the same result as eager ones, in three rollouts with the same settings.

    decode(settings): completions. A stand-in for CUDA graphs runs each step, and fails if a replay would read another
    address or shape than the captured step. Return the completions and, for each rollout, [captures, replays].
    """
    eager, kept, counts = decode(settings(MAX_NEW, STOP, cuda_graphs=False)), settings(MAX_NEW, STOP), []

    def run(memory, key, step):
        with Recorder() as recorder, pytest.MonkeyPatch.context() as patch:
            if key in memory.graphs:
                patch.setattr(PreallocatedLayer, "update", replayed_update)
            step()
        counts[-1][key in memory.graphs] += 1
        assert recorder.reads == memory.graphs.setdefault(key, recorder.reads)

    def replayed_update(layer, *args, update=PreallocatedLayer.update):  # a replay runs no Python
        before = layer.keys, layer.values
        result = update(layer, *args)
        layer.keys, layer.values = before
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation.DecodeMemory, "run", run)
        patch.setattr(generation, "LENGTH_BUCKET", 8)
        patch.setattr(PreTrainedModel, "device", device)
        for _ in range(3):
            counts.append([0, 0])
            captured = decode(kept)
            assert torch.equal(captured.tokens, eager.tokens) and torch.equal(captured.mask, eager.mask)
            assert torch.equal(captured.truncated, eager.truncated)
            torch.testing.assert_close(captured.log_probs, eager.log_probs, atol=1e-5, rtol=0)
    return eager, counts


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gemma3", "lora"])
def test_captured_steps_give_the_tokens_of_the_eager_loop(kind):
    model = make_model(**KINDS.get(kind, {}))
    if kind == "lora":
        model = make_policy(model, LoRA(rank=4), False)
        for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
            torch.nn.init.normal_(parameter, std=0.1)

    def decode(how):
        how.stop_ids = [EOS, *range(7, 10)]
        return generate(model, PROMPTS, how, G, draws(len(PROMPTS) * G))

    completions, ((captures, replays), *later) = captured_as_eager(decode)
    # Most rows finish early. A smaller batch needs a new capture, and so does a longer cache.
    assert completions.mask.sum(1).median() < MAX_NEW / 2
    assert captures >= 3 and replays > MAX_NEW / 2
    assert later == [[0, captures + replays]] * 2


@pytest.mark.parametrize("rank", [1, 2])
def test_a_population_decodes_the_same_tokens_in_captured_steps(model, rank):
    members, prompts = 4, prompts_after(10)
    shapes = noise_shapes(dict(model.named_parameters()), "low_rank", rank)

    def decode(how):
        generators = noise_generators(0, 0, range(members), members, torch.device("cpu"))
        more = torch.full((members,), 0.1), len(prompts), how.memory
        with Population(model, shapes, generators, *more) as on_rows:
            return generate(model, prompts * members, how, on_rows=on_rows, block_size=len(prompts))

    completions, ((captures, replays), *later) = captured_as_eager(decode)
    assert replays > 0 and later == [[0, captures + replays]] * 2
    assert len(completions.tokens.unique(dim=0)) > len(prompts)  # members answer differently


def test_graphs_are_captured_again_once_their_memory_has_moved():
    model = make_model()

    def decode(how):
        generate(model, PROMPTS[:1], how, G, draws(G))
        return generate(model, PROMPTS, how, G, draws(len(PROMPTS) * G))

    _, ((first, _), (second, _), (third, _)) = captured_as_eager(decode)
    assert first > second > third == 0  # those of the small batch, after the large one has moved its memory


def test_a_single_row_is_not_compacted_again_and_again():
    model, sizes = make_model(), []

    def decode(how):
        sizes.clear()
        return generate(model, PROMPTS[:1], how, on_rows=lambda rows: sizes.append(len(rows)), block_size=1)

    assert captured_as_eager(decode)[0].mask.sum() > 3
    assert sizes == [1, 1]  # prefill and decode steps


def test_a_population_of_one_member_and_an_evaluation_of_as_many_rows_have_graphs_of_their_own(model):
    shapes = noise_shapes(dict(model.named_parameters()), "low_rank", 1)

    def decode(how):
        generators = noise_generators(0, 0, range(1), 4, torch.device("cpu"))
        with Population(model, shapes, generators, torch.full((1,), 0.1), len(PROMPTS), how.memory) as on_rows:
            generate(model, PROMPTS, how, on_rows=on_rows, block_size=len(PROMPTS))
        return generate(model, PROMPTS, how)

    assert captured_as_eager(decode)[1][-1][0] == 0


@pytest.mark.parametrize("reason", ["sliding window", "cuda_graphs: false", "cpu"])
def test_steps_that_cannot_or_should_not_be_captured_are_not(reason):
    model, cuda_graphs = make_model(**KINDS.get(reason, {})), reason != "cuda_graphs: false"
    device = torch.device("cpu") if reason == "cpu" else GPU

    def decode(how):
        how.cuda_graphs = cuda_graphs and how.cuda_graphs
        return generate(model, PROMPTS, how, G, draws(len(PROMPTS) * G))

    assert captured_as_eager(decode, device)[1] == [[0, 0]] * 3


@pytest.mark.parametrize("error", [RuntimeError("not permitted"), torch.OutOfMemoryError("no memory")], ids=repr)
def test_a_failed_capture_ends_with_its_error_and_with_what_to_do(monkeypatch, error):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: contextlib.nullcontext())
    step = Mock(side_effect=[None, error])  # the first step is not captured
    with pytest.raises(type(error), match=str(error)) as raised:
        generation.DecodeMemory().run("key", step)
    assert "cannot be captured: set cuda_graphs: false" in " ".join(raised.value.__notes__)


def right_padded(rows, starts, padding=0):
    T = max(map(len, rows)) + padding
    ids = torch.tensor([row + [PAD] * (T - len(row)) for row in rows])
    mask = torch.tensor([[start <= t < len(row) for t in range(T)] for row, start in zip(rows, starts, strict=True)])
    return ids, mask


# Rows of three prompts. Without the last tokens, the second is the third plus a token with the padding's id.
SHARED = [[[5, 9, 3, 7, 2], [5, 9, PAD, 4], [5, 9, 3]][prompt] for prompt in (0, 1, 2, 0, 1, 2, 1)]
BEGUN = [prompts_after(12, [3, 0, 5])[prompt] for prompt in (0, 1, 2, 0, 1, 2, 1)]  # the others begin with the second
BATCHES = {  # rows and the lengths of their prompts
    "alone": (random_prompts([12, 5, 9, 30]), [4, 2, 8, 1]),
    "shared prompts": ([*map(list.__add__, SHARED, random_prompts([3, 9, 5, 1, 6, 2, 8]))], [*map(len, SHARED)]),
    "shared beginning": ([*map(list.__add__, BEGUN, random_prompts([3, 9, 5, 1, 6, 2, 8]))], [*map(len, BEGUN)]),
    "prompts of one token": ([[5, 7, 8], [6, 9, 3]], [1, 1]),
}


@pytest.mark.parametrize(("temperature", "chunk", "padding"), [(1.0, 10_000, 0), (0.7, 1, 1), (0.7, 7, 40)])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_gradients_are_those_of_log_softmax_over_temperature_whatever_the_chunk_and_right_padding(
    monkeypatch, kind, batch, temperature, chunk, padding
):
    monkeypatch.setitem(generation.MAX_LOGITS, "cpu", chunk * VOCAB)
    monkeypatch.setattr(generation, "MIN_ROWS", 1)
    monkeypatch.setattr(generation, "CACHED_LOGITS", 3 * VOCAB)
    model, (ids, mask) = make_model(**KINDS[kind]), right_padded(*BATCHES[batch], padding)
    oracle = make_like(model).double()
    weights = torch.randn(ids.shape, generator=torch.Generator().manual_seed(0))
    log_probs, entropy = completion_log_probs(model, ids, mask, temperature)
    assert not entropy.requires_grad
    assert not log_probs[~mask].any() and not entropy[~mask].any()
    for i, (row, start) in enumerate(zip(*BATCHES[batch], strict=True)):
        logits = oracle(input_ids=torch.tensor([row]), use_cache=False).logits[0, start - 1 : -1]
        exact, completion = (logits / temperature).log_softmax(-1), slice(start, len(row))
        expected = exact.gather(1, torch.tensor(row[start:])[:, None])[:, 0]
        torch.testing.assert_close(log_probs[i, completion].double(), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(entropy[i, completion].double(), -(exact.exp() * exact).sum(1), atol=1e-5, rtol=0)
        (expected * weights[i, completion]).sum().backward()
    (log_probs * weights).sum().backward()
    gradient, expected = (torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (model, oracle))
    torch.testing.assert_close(gradient.double(), expected, atol=1e-4, rtol=1e-4)


def test_a_prompt_is_computed_once_for_all_its_rows_and_a_long_common_beginning_once_for_all_prompts(model):
    positions, (ids, mask) = [], right_padded(*BATCHES["shared prompts"])
    model.model.layers[0].register_forward_hook(lambda _, __, output: positions.append(output.shape[:2]))
    completion_log_probs(model, ids, mask, 1.0)
    completion_log_probs(model, ids[:3], mask[:3], 1.0)
    completion_log_probs(model, *right_padded(*BATCHES["shared beginning"]), 1.0)
    # First call: 3 prompts without their last tokens, which belong to the rows, then 7 rows.
    # Second call: 3 rows that share nothing. Third call: the common prefix, the rest of 3 prompts, 7 rows.
    assert positions == [(3, 4), (7, 9), (3, 13), (1, 11), (3, 5), (7, 9)]


def test_bf16_model_gives_fp32_log_probs_close_to_the_oracle_in_sampling_and_scoring():
    # A log_softmax in bf16 would have an error of 2^-9 * 8 = 0.016 at values around -8.
    model, (prompt,) = make_model(dtype=torch.bfloat16, vocab_size=4096, initializer_range=0.02), random_prompts([6])
    out = generate(model, [prompt], settings(MAX_NEW), 8, draws(8))
    rows = [prompt + tokens for tokens in rows_of(out)]
    log_probs, entropy = completion_log_probs(model, *right_padded(rows, [6] * 8), 1.0)
    assert out.log_probs.dtype == log_probs.dtype == entropy.dtype == torch.float32
    for sampled, scored, row in zip(out.log_probs, log_probs, rows, strict=True):
        exact = oracle_log_probs(model, row)[5:-1].gather(1, torch.tensor(row[6:])[:, None])[:, 0]
        for ours in (sampled[: len(exact)], scored[6 : len(row)]):
            torch.testing.assert_close(ours.double(), exact, atol=0.005, rtol=0)


@pytest.mark.parametrize("beginning", [0, 20])
def test_gradient_is_the_same_bit_for_bit_on_two_threads_every_time(request, beginning):
    request.addfinalizer(lambda: torch.set_num_threads(1))  # as in conftest.py
    model, seen = make_model(hidden_size=64, num_hidden_layers=1), set()
    prompts = prompts_after(beginning, [40 - beginning] * 2)
    rows = map(list.__add__, prompts * 32, random_prompts([4] * 64))  # large enough for several threads
    ids, mask = right_padded(list(rows), [40] * 64)
    torch.set_num_threads(2)
    for _ in range(3):
        model.zero_grad()
        completion_log_probs(model, ids, mask, 1.0)[0].sum().backward()
        seen.add(fingerprint({name: p.grad for name, p in model.named_parameters()}))
    assert len(seen) == 1


def test_no_logits_of_all_tokens_exist_forward_or_backward(monkeypatch):
    V, tokens_per_chunk, seen, saved = 5000, 8, [], []
    monkeypatch.setitem(generation.MAX_LOGITS, "cpu", tokens_per_chunk * V)
    monkeypatch.setattr(generation, "MIN_ROWS", 1)
    model, (ids, mask) = make_model(vocab_size=V), right_padded(random_prompts([64] * 4), [8] * 4)
    model.lm_head.register_forward_hook(lambda _, __, logits: seen.append(logits.numel()))
    with saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x):
        completion_log_probs(model, ids, mask, 1.0)[0].sum().backward()
    assert max(seen) == tokens_per_chunk * V and sum(seen) == 2 * mask.sum() * V  # once forward, once backward
    assert saved and not any(V in shape[1:] for shape in saved)  # logits are recomputed, not saved


def test_model_that_caps_its_logits_is_refused(model):
    def cap(module, inputs, out):
        out.logits = 0.5 * torch.tanh(out.logits / 0.5)

    model.register_forward_hook(cap)
    with pytest.raises(UserError, match="changes its logits after lm_head"):
        check_chunked_head(model)


def plain_varlen_attention(query, key, value, query_ends, key_ends, max_q, max_k, *, scale, window_size, enable_gqa):
    """Variable-length attention in plain PyTorch: one segment at a time. query, key, value: (N, heads, D)"""
    parts = []
    for (q0, q1), (k0, k1) in zip(*(itertools.pairwise(ends.tolist()) for ends in (query_ends, key_ends)), strict=True):
        assert q1 - q0 <= max_q and k1 - k0 <= max_k and enable_gqa
        q, k, v = (x.transpose(0, 1) for x in (query[q0:q1], key[k0:k1], value[k0:k1]))
        distance = torch.arange(k1 - k0 - (q1 - q0), k1 - k0)[:, None] - torch.arange(k1 - k0)
        mask = (distance >= 0) & ((window_size[0] < 0) | (distance <= window_size[0]))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
        parts.append(out.transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("beginning", [0, 10])
@pytest.mark.parametrize("kind", ["qwen2", "llama", "gemma3", "gemma3, a narrow window", "sliding window", "lora"])
def test_rows_without_padding_have_the_log_probs_and_gradients_of_padded_ones(monkeypatch, kind, beginning):
    monkeypatch.setattr(generation.varlen, "varlen_attn", plain_varlen_attention)
    model = make_model(**KINDS.get(kind, {})).double()
    if kind == "lora":
        model = make_policy(model, LoRA(rank=4), False)
        for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
            torch.nn.init.normal_(parameter, std=0.1)
    prompts = prompts_after(beginning, (3, 9, 0, 1)) if beginning else PROMPTS  # with one that is the whole beginning
    rows = [prompt for prompt in prompts for _ in range(G)]
    lengths = torch.randint(1, MAX_NEW, (len(rows),), generator=torch.Generator().manual_seed(0)).tolist()
    lengths[3] = 1
    tokens = random_prompts(lengths, seed=9)
    ids, mask = right_padded([row + end for row, end in zip(rows, tokens, strict=True)], list(map(len, rows)))
    for part in (slice(0, len(rows)), slice(2, 5), slice(3, 4)):  # all rows; one prompt; one token
        results = []
        for attention in ("sdpa", "flash"):
            inner_model(model).config._attn_implementation = attention
            log_probs, entropy = completion_log_probs(model, ids[part], mask[part], 0.7)  # rounded to fp32
            hidden = (generation._states_without_padding if attention == "flash" else generation._states_before)(
                inner_model(model), ids[part], mask[part]
            )
            model.zero_grad()
            (hidden * torch.arange(1.0, 33) / hidden.shape[1]).sin().sum().backward()
            gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            results.append((hidden.detach(), gradient, log_probs.detach(), entropy))
        for ours, exact in zip(results[1], results[0], strict=True):  # norms compute in fp32, whatever the dtype
            torch.testing.assert_close(ours, exact, atol=2e-6 * max(1, exact.abs().max()), rtol=0)
