"""Chunked log-probs against float64, unpadded, single rows."""

import pytest
import torch
from conftest import PAD, make_model, oracle_log_probs, random_prompts
from torch.utils._python_dispatch import TorchDispatchMode

import generation
from generation import completion_log_probs
from reward import UserError
from utils import check_chunked_head, fingerprint


def right_padded(rows, prompt_lengths, extra=0):
    T = max(map(len, rows)) + extra
    ids, mask = torch.full((len(rows), T), PAD), torch.zeros(len(rows), T, dtype=torch.bool)
    for i, (row, start) in enumerate(zip(rows, prompt_lengths, strict=True)):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, start : len(row)] = True
    return ids, mask


ROWS, STARTS = random_prompts([12, 5, 9, 30]), [4, 2, 8, 1]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_log_probs_and_entropy_equal_the_oracle(model, monkeypatch, temperature, chunk):
    monkeypatch.setattr(generation, "MAX_LOGITS", chunk * model.config.vocab_size)
    ids, mask = right_padded(ROWS, STARTS)
    log_probs, entropy = (x.detach() for x in completion_log_probs(model, ids, mask, temperature))
    for i, (row, start) in enumerate(zip(ROWS, STARTS, strict=True)):
        exact = oracle_log_probs(model, row, temperature)
        for t in range(len(row)):
            if t < start:
                assert log_probs[i, t] == entropy[i, t] == 0
                continue
            assert float(log_probs[i, t]) == pytest.approx(float(exact[t - 1, row[t]]), abs=1e-4)
            assert float(entropy[i, t]) == pytest.approx(float(-(exact[t - 1].exp() * exact[t - 1]).sum()), abs=1e-4)


# Rows of three prompts: without its last token, the third is the second but for a token that is the padding's id.
PROMPTS = [[5, 9, 3, 7, 2], [5, 9, PAD, 4], [5, 9, 3]]
GROUPS = [
    [*PROMPTS[p], *rest] for p, rest in zip([0, 1, 2, 0, 1, 2, 1], random_prompts([3, 9, 5, 1, 6, 2, 8]), strict=True)
]
GROUP_STARTS = [len(PROMPTS[p]) for p in (0, 1, 2, 0, 1, 2, 1)]
SLIDING = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}


@pytest.mark.parametrize("settings", [{}, {"family": "llama"}, SLIDING], ids=["qwen2", "llama", "sliding"])
def test_rows_with_the_same_prompt_have_the_log_probs_that_each_has_alone(settings):
    model = make_model(**settings)
    ids, mask = right_padded(GROUPS, GROUP_STARTS)
    log_probs, entropy = (x.detach() for x in completion_log_probs(model, ids, mask, 0.7))
    assert not log_probs[~mask].any() and not entropy[~mask].any()
    for i, (row, start) in enumerate(zip(GROUPS, GROUP_STARTS, strict=True)):
        exact = oracle_log_probs(model, row, 0.7)[start - 1 : len(row) - 1]
        expected = exact.gather(1, torch.tensor(row[start:])[:, None])[:, 0]
        torch.testing.assert_close(log_probs[i, start : len(row)].double(), expected, atol=1e-5, rtol=0)
        expected = -(exact.exp() * exact).sum(1)
        torch.testing.assert_close(entropy[i, start : len(row)].double(), expected, atol=1e-5, rtol=0)


def test_a_prompt_is_computed_once_for_all_its_rows(model):
    positions = []
    model.model.layers[0].register_forward_hook(lambda _, __, output: positions.append(output.shape[:2]))
    ids, mask = right_padded(GROUPS, GROUP_STARTS)
    completion_log_probs(model, ids, mask, 1.0)
    assert positions == [(3, 4), (7, 9)]  # prompts without their last token; it predicts the first of a completion
    positions.clear()
    completion_log_probs(model, ids[:3], mask[:3], 1.0)
    assert positions == [(3, 13)]  # nothing to share


def test_prompts_of_one_token(model):
    ids, mask = right_padded([[5, 7, 8], [6, 9, 3]], [1, 1])
    log_probs, _ = completion_log_probs(model, ids, mask, 1.0)
    expected = model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(log_probs[:, 1:], expected, atol=1e-5, rtol=0)


def test_temperature_is_log_softmax_of_logits_over_t(model):
    ids, mask = right_padded(ROWS[:1], STARTS[:1])
    log_probs, _ = completion_log_probs(model, ids, mask, 0.7)
    expected = (model(input_ids=ids).logits / 0.7).log_softmax(-1)[0, 3:-1].gather(-1, ids[0, 4:, None])[:, 0]
    torch.testing.assert_close(log_probs[0, 4:], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("extra", [1, 40])
def test_amount_of_right_padding_changes_no_log_prob(model, extra):
    ids, mask = right_padded(ROWS, STARTS)
    padded_ids, padded_mask = right_padded(ROWS, STARTS, extra)
    log_probs, _ = completion_log_probs(model, ids, mask, 1.0)
    padded, _ = completion_log_probs(model, padded_ids, padded_mask, 1.0)
    torch.testing.assert_close(padded[:, : ids.shape[1]], log_probs, atol=1e-5, rtol=0)


def test_bf16_model_gives_fp32_log_probs_close_to_the_oracle():
    # bf16 log_softmax alone would be off by 2^-9 of values around -8, that is 0.016.
    model = make_model(dtype=torch.bfloat16, vocab_size=4096, initializer_range=0.02)
    ids, mask = right_padded(ROWS, STARTS)
    log_probs, entropy = (x.detach() for x in completion_log_probs(model, ids, mask, 1.0))
    assert log_probs.dtype == entropy.dtype == torch.float32
    for i, (row, start) in enumerate(zip(ROWS, STARTS, strict=True)):
        exact = oracle_log_probs(model, row)
        for t in range(start, len(row)):
            assert float(log_probs[i, t]) == pytest.approx(float(exact[t - 1, row[t]]), abs=0.005)


@pytest.mark.parametrize("rows, starts", [(ROWS, STARTS), (GROUPS, GROUP_STARTS)], ids=["alone", "shared prompts"])
def test_gradients_equal_those_of_plain_log_softmax(monkeypatch, rows, starts):
    monkeypatch.setattr(generation, "MAX_LOGITS", 5 * 64)
    ids, mask = right_padded(rows, starts)
    weights = torch.randn(ids.shape, generator=torch.Generator().manual_seed(0))
    gradients = []
    for chunked in (True, False):
        model = make_model().double()
        if chunked:
            log_probs, _ = completion_log_probs(model, ids, mask, 0.7)
        else:
            logits = model(input_ids=ids).logits[:, :-1] / 0.7
            log_probs = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
            log_probs = torch.nn.functional.pad(log_probs, (1, 0)) * mask
        (log_probs * weights).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    # The chunked head computes in fp32 whatever the model's dtype.
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-4, rtol=1e-4)


class LargestTensor(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_gradient_is_the_same_bit_for_bit_on_two_threads_every_time():
    model, num_threads = make_model(hidden_size=64), torch.get_num_threads()
    prompts = random_prompts([40, 40])
    rows = [[*prompts[i % 2], *rest] for i, rest in enumerate(random_prompts([4] * 32))]  # large enough for threads
    ids, mask = right_padded(rows, [40] * 32)
    seen = set()
    torch.set_num_threads(2)
    try:
        for _ in range(20):
            model.zero_grad()
            completion_log_probs(model, ids, mask, 1.0)[0].sum().backward()
            seen.add(fingerprint({name: p.grad for name, p in model.named_parameters()}))
    finally:
        torch.set_num_threads(num_threads)
    assert len(seen) == 1


def test_no_tensor_of_tokens_by_vocabulary_exists_forward_or_backward(monkeypatch):
    V, tokens_per_chunk = 5000, 8
    monkeypatch.setattr(generation, "MAX_LOGITS", tokens_per_chunk * V)
    model = make_model(vocab_size=V)
    ids, mask = right_padded(random_prompts([64] * 4), [8] * 4)
    with LargestTensor() as largest:
        completion_log_probs(model, ids, mask, 1.0)[0].sum().backward()
    weights = V * model.config.hidden_size  # lm_head's own weight and gradient
    assert largest.numel <= max(tokens_per_chunk * V, weights) < int(mask.sum()) * V


def test_model_that_caps_its_logits_is_refused():
    class Capped(type(make_model())):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = 0.5 * torch.tanh(out.logits / 0.5)
            return out

    with pytest.raises(UserError, match="does more to its logits than lm_head"):
        check_chunked_head(Capped(make_model().config).eval())
