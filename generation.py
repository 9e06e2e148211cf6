"""Sampling and scoring: the decode loop, and the log-probs of completions.

    generate               one decode loop for rollouts, ES populations and evaluation; `sample` draws the tokens
    completion_log_probs   log-probs and entropy of completion tokens, with gradients, for GRPO's loss
To change the sampling rule, edit `sample` and both passes of `TokenLogProbs` together; otherwise, the trained policy is
not the sampled one. Elsewhere: prompts and scores (utils.py), GRPO's loss, and the hooks that add ES's noise.

Shapes: P prompts, G completions per prompt, B = P * G rows, T tokens, V vocabulary, D hidden size.
"""

import dataclasses
import math
import os
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


@dataclasses.dataclass
class Completions:
    """Completions of B rows, prompt by prompt: rows p*G to p*G+G-1 belong to prompt p."""

    tokens: torch.Tensor  # (B, max_new_tokens) ids as sampled, then zeros
    mask: torch.Tensor  # (B, max_new_tokens) bool: True up to and including the token that ends the completion
    log_probs: torch.Tensor  # (B, max_new_tokens) fp32: the sampler's, 0 outside the mask
    truncated: torch.Tensor  # (B,) bool: reached max_new_tokens without an end


def inner_model(model):
    """Return the transformers model without its PEFT wrapper. Adapters are modules inside it and stay active."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def new_cache(network, num_slots):
    """Return an empty KV cache, and True if its layers keep all of `num_slots` positions.

    A sliding-window layer does if they fit into its window. Then it is a full layer, for which padding does not count.
    """
    cache = DynamicCache(config=network.config)
    keeps_all = all(
        type(layer) is DynamicLayer or getattr(layer, "sliding_window", 0) >= num_slots for layer in cache.layers
    )
    if keeps_all:
        cache.layers = [DynamicLayer() for _ in cache.layers]
    return cache, keeps_all


def shares_prompts(network, num_slots):
    """Return True if `completion_log_probs` can compute a prompt once for all of its rows.

    It cannot with gradient checkpointing, because transformers then drops the cache, nor if the longest prompt and
    completion, `num_slots` together, exceed a sliding window, because padding would use it up.
    """
    checkpoints = any(getattr(module, "gradient_checkpointing", False) for module in network.modules())
    return not checkpoints and new_cache(network, num_slots)[1]


class PreallocatedLayer(DynamicLayer):
    """A KV cache layer with a preallocated buffer for decoding, so that a CUDA graph can replay a step.

    Prefill works as in DynamicLayer. Then `batch_repeat_interleave` allocates the buffer. After that, each `update`
    writes to the slot `cursor.slot`, a tensor (1,) on the device, and returns the slots before `cursor.end`.
    """

    def __init__(self, num_slots, cursor):
        super().__init__()
        self.num_slots, self.cursor = num_slots, cursor

    def batch_repeat_interleave(self, repeats):
        self.buffers = []
        for x in (self.keys, self.values):
            B, H, T, D = x.shape
            # Zeros, since attention reads masked slots before they are written, and garbage could be NaN. In autocast's
            # dtype, to which attention would otherwise cast the buffer in every step.
            device = x.device.type
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
            buffer = x.new_zeros(B * repeats, H, self.num_slots, D, dtype=dtype)
            buffer[:, :, :T].unflatten(0, (B, repeats)).copy_(x[:, None])
            self.buffers.append(buffer)
        self.keys, self.values = (buffer[:, :, :T] for buffer in self.buffers)

    def update(self, key_states, value_states, *args, **kwargs):
        if not hasattr(self, "buffers"):
            return super().update(key_states, value_states, *args, **kwargs)
        for buffer, x in zip(self.buffers, (key_states, value_states), strict=True):
            buffer.index_copy_(2, self.cursor.slot, x.to(buffer.dtype))  # under autocast, rotary keys can be fp32
        self.keys, self.values = (buffer[:, :, : self.cursor.end] for buffer in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices):
        if not hasattr(self, "buffers"):
            super().batch_select_indices(indices)
            return
        B, end = len(indices), self.keys.shape[2]
        for buffer, x in zip(self.buffers, (self.keys, self.values), strict=True):
            buffer[:B, :, :end] = x[indices]
        self.buffers = [buffer[:B] for buffer in self.buffers]
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)


MIN_SHARED = 8  # a shorter common prefix is not worth a forward pass of its own
BLOCK = 512  # tokens of the vocabulary whose probabilities are summed first
CACHED_LOGITS = 2**20  # logits processed at once on a CPU, so that they stay in its cache
LENGTH_BUCKET = 128  # a captured step reads the cache up to a multiple of this many slots


def invert_cdf(weights, uniforms):
    """Draw an index from each row of unnormalized probabilities. weights: (B, n); uniforms: (B, 1) in [0, 1)

    Return the indices (B, 1), and for each the position of the draw inside its index's share, (B, 1) in [0, 1), which
    serves as the draw of the next level.
    """
    cdf = weights.cumsum(-1)
    # Scaling by the last entry compensates for rounding in the sum. right=True finds the first index whose cdf exceeds
    # the draw, which skips weights of 0. With NaN there is none: take the last index.
    draws = uniforms * cdf[:, -1:]
    index = torch.searchsorted(cdf, draws, right=True).clamp(max=cdf.shape[1] - 1)
    weight = weights.gather(-1, index)
    rest = 1 - (cdf.gather(-1, index) - draws) / weight
    return index, rest.clamp(0, 1 - 2**-24)  # in [0, 1) in spite of rounding


def sample(logits, uniforms, temperature):
    """Draw one token per row by inverting the cumulative distribution at `uniforms`, or the most likely one if None.

    logits: (B, V), any float dtype; uniforms: (B,) in [0, 1)
    Return tokens (B,) and their fp32 log-probs (B,) under softmax(logits / temperature).
    A draw selects a block of the vocabulary and then a token in it, so that the sums are short.
    """
    B, V = logits.shape
    chunk = B if logits.is_cuda else max(1, CACHED_LOGITS // V)
    if B > chunk:
        rows = [slice(start, start + chunk) for start in range(0, B, chunk)]
        parts = [sample(logits[i], uniforms if uniforms is None else uniforms[i], temperature) for i in rows]
        tokens, log_probs = (torch.cat(part) for part in zip(*parts, strict=True))
        return tokens, log_probs
    logits = logits.float() / temperature
    probs = logits.softmax(-1)
    if uniforms is None:
        tokens = logits.argmax(-1, keepdim=True)
    elif V <= BLOCK:
        tokens, _ = invert_cdf(probs, uniforms[:, None])
    else:
        blocks = F.pad(probs, (0, -V % BLOCK)) if V % BLOCK else probs
        blocks = blocks.view(B, -1, BLOCK)
        block, rest = invert_cdf(blocks.sum(-1), uniforms[:, None])
        token, _ = invert_cdf(blocks[torch.arange(B, device=block.device), block[:, 0]], rest)
        tokens = (block * BLOCK + token).clamp(max=V - 1)  # NaN would select the padding
    smallest = torch.finfo(probs.dtype).tiny  # in rare cases, rounding in the sum selects a token with probability 0
    return tokens[:, 0], probs.gather(-1, tokens)[:, 0].clamp(min=smallest).log()


@dataclasses.dataclass
class DecodeSettings:
    """Settings of all generation in a run. The model's generation_config only adds end tokens, see `utils.stop_ids`."""

    max_new_tokens: int
    stop_ids: list[int]  # tokens that end a completion
    stop_table: torch.Tensor | None = None  # texts that end a completion, see `utils.stop_table`; on the model's device
    temperature: float = 1.0  # for sampling; without `uniforms`, decoding is greedy
    batch_size: int = 256  # completions decoded at once, at least those of one prompt or block
    cuda_graphs: bool = True  # on a GPU, replay decode steps from a CUDA graph


def generate(model, prompts, settings, num_samples=1, uniforms=None, on_rows=None, block_size=None):
    """Generate `num_samples` completions per prompt, sampled with `uniforms`, or greedily if it is None.

    prompts: P lists of token ids
    uniforms: (P * num_samples, max_new_tokens) in [0, 1), one number per token. Up to rounding, a row's tokens depend
        only on its prompt and its numbers, not on the other rows of the batch
    on_rows: called with the prompt index of each row in the batch, (rows,), whenever the rows change, so that forward
        hooks can tell rows apart. It requires block_size, the number of consecutive prompts that hooks treat alike
    The common prefix of a batch's prompts is computed once per block. Return Completions on the model's device.
    """
    assert num_samples == 1 or uniforms is not None, "greedy completions of a prompt are identical"
    assert on_rows is None or block_size, "on_rows needs block_size: blocks must not share computation"
    on_rows = on_rows or (lambda prompt_of_row: None)
    device, size = model.device, (len(prompts) * num_samples, settings.max_new_tokens)
    completions = Completions(
        tokens=torch.zeros(size, dtype=torch.long, device=device),
        mask=torch.zeros(size, dtype=torch.bool, device=device),
        log_probs=torch.zeros(size, device=device),
        truncated=torch.ones(size[0], dtype=torch.bool, device=device),
    )
    uniforms = None if uniforms is None else uniforms.to(device)
    block = block_size or 1
    chunk = max(1, settings.batch_size // (num_samples * block)) * block  # whole blocks
    # Inference mode is faster, but autocast does not cache weight casts in it and would repeat them in every step.
    with torch.no_grad() if torch.is_autocast_enabled(device.type) else torch.inference_mode():
        for first in range(0, len(prompts), chunk):
            part = range(first, min(first + chunk, len(prompts)))
            more = num_samples, uniforms, on_rows, block_size or len(part)
            _decode(model, prompts, part, settings, *more, completions)
    return completions


def _lay_out(prompts, shared, max_new_tokens):
    """Assign cache slots: the `shared` prefix of all prompts, padding, the rest of the prompt, the completion.

    Return prompt ids (P, L), padded to the longest, and attention_mask (P, S). The number of slots S is a multiple of
    8, since GPUs would otherwise pad the mask in every layer.
    """
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    num_slots = math.ceil((longest + max_new_tokens) / 8) * 8
    attention_mask = torch.ones(len(prompts), num_slots, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        padding = longest - len(prompt)
        ids[row, :shared] = torch.tensor(prompt[:shared])
        ids[row, shared + padding :] = torch.tensor(prompt[shared:])
        attention_mask[row, shared : shared + padding] = False
    return ids, attention_mask


def _decode(model, prompts, part, settings, num_samples, uniforms, on_rows, block_size, out):
    """Run the decode loop for the prompts in the range `part`, and write to the Completions `out`."""
    device, network, P = model.device, inner_model(model), len(part)
    prompts = prompts[part.start : part.stop]
    cache, keeps_all = new_cache(network, max(map(len, prompts)) + settings.max_new_tokens)
    shared = min(len(os.path.commonprefix(prompts)), min(map(len, prompts)) - 1)
    if shared < MIN_SHARED or min(block_size, P) == 1 or not keeps_all:
        shared = 0
    ids, attention_mask = (x.to(device) for x in _lay_out(prompts, shared, settings.max_new_tokens))
    longest = ids.shape[1]
    positions = (attention_mask[:, :longest].cumsum(-1) - 1).clamp(min=0)
    cursor = SimpleNamespace(slot=torch.full((1,), longest, device=device), end=longest)
    has_mask = keeps_all and network.config._attn_implementation == "sdpa"  # eager attention needs an additive mask
    if keeps_all:
        cache.layers = [PreallocatedLayer(attention_mask.shape[1], cursor) for _ in cache.layers]

    def forward(ids, mask, positions, **options):
        options |= {"past_key_values": cache, "use_cache": True}
        return model(input_ids=ids, attention_mask=mask, position_ids=positions, **options).logits[:, -1]

    # Prefill the shared prefix once per block and the rest of each prompt once. Then repeat the cache for the samples.
    # logits_to_keep is a tensor, since the integer 1 selects a non-contiguous slice, on which lm_head is slow.
    prompt_of_row, last = torch.arange(P, device=device), torch.tensor([-1], device=device)
    if shared:
        firsts = prompt_of_row[::block_size]
        on_rows(part.start + firsts)
        forward(ids[firsts, :shared], None, positions[firsts, :shared], logits_to_keep=last)
        cache.batch_select_indices(prompt_of_row // block_size)
    on_rows(part.start + prompt_of_row)
    logits = forward(ids[:, shared:], attention_mask[:, :longest], positions[:, shared:], logits_to_keep=last)
    cache.batch_repeat_interleave(num_samples)
    logits, position, attention_mask = (
        x.repeat_interleave(num_samples, 0) for x in (logits, positions[:, -1:], attention_mask)
    )
    rows = part.start * num_samples + torch.arange(P * num_samples, device=device)  # the rows in the batch
    on_rows(rows // num_samples)

    # A step updates tensors in place and reads its position from tensors, so that a CUDA graph can replay it.
    column = torch.zeros(1, dtype=torch.long, device=device)
    slots = torch.arange(attention_mask.shape[1], device=device)
    stop_ids, newest = torch.tensor(settings.stop_ids, device=device), torch.empty_like(position)
    stop_table, text_state = settings.stop_table, torch.zeros_like(rows)

    def append_tokens(logits):
        noise = None if uniforms is None else uniforms[rows, column]
        token, log_prob = sample(logits, noise, settings.temperature)
        running = out.truncated[rows]
        out.tokens[rows, column] = torch.where(running, token, 0)
        out.log_probs[rows, column] = torch.where(running, log_prob, 0.0)
        out.mask[rows, column] = running
        has_ended = (token[:, None] == stop_ids).any(1)
        if stop_table is not None:
            text_state.copy_(stop_table[text_state, token])
            has_ended |= text_state == len(stop_table) - 1
        out.truncated[rows] = running & ~has_ended
        newest.copy_(token[:, None])
        column.add_(1)

    def step():
        position.add_(1)
        visible = attention_mask[:, : cursor.end]
        if has_mask:  # as the model would build it, except that the end may lie beyond the slot
            visible = (visible & (slots[: cursor.end] <= cursor.slot))[:, None, None]
        append_tokens(forward(newest, visible, position))
        cursor.slot.add_(1)

    append_tokens(logits)
    del logits  # (B, V) is large
    run_step = GraphedStep(step, enabled=settings.cuda_graphs and has_mask and device.type == "cuda")
    bucket = LENGTH_BUCKET if run_step.enabled else 1
    for end in range(longest + 1, longest + settings.max_new_tokens):
        num_finished = int((~out.truncated[rows]).sum())  # the only synchronization with the device in a step
        if num_finished == len(rows):
            break
        if num_finished >= (0.5 if run_step.enabled else 0.25) * len(rows):  # dropping rows requires a new capture
            keep = out.truncated[rows].nonzero()[:, 0]
            cache.batch_select_indices(keep)
            rows, newest, text_state = (x[keep] for x in (rows, newest, text_state))
            position, attention_mask = position[keep], attention_mask[keep]
            on_rows(rows // num_samples)
            run_step.reset()
        if end > cursor.end:
            cursor.end = min(math.ceil(end / bucket) * bucket, len(slots))
            run_step.reset()
        run_step()


class GraphedStep:
    """Run a decode step. On a GPU, replay it from a CUDA graph, which avoids the launch overhead of each kernel.

    Call `reset` when shapes change. The first call after it runs eagerly, so that hooks and libraries can initialize;
    the second captures a graph, and later calls replay it. Unless `enabled`, every call runs eagerly.
    """

    def __init__(self, step, enabled):
        self.step, self.enabled = step, enabled
        self.reset()

    def reset(self):
        self.is_first, self.graph = True, None  # frees the old graph's memory

    def __call__(self):
        if not self.enabled or self.is_first:
            self.is_first = False
            self.step()
            return
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                    self.step()
            except RuntimeError as error:
                error.add_note("The decode step of this model cannot be captured: set cuda_graphs: false")
                raise
        self.graph.replay()


MIN_SPARED = 0.1  # compute prompts separately if that saves at least this share of all positions
# Logits per chunk in the scoring pass, 32 MiB in fp32 on CPUs, since malloc returns larger tensors to the system each
# time. But at least MIN_ROWS rows, since each chunk reads all weights of lm_head.
MAX_LOGITS, MIN_ROWS = {"cpu": 2**23, "cuda": 2**25}, 128


class TokenLogProbs(torch.autograd.Function):
    """Log-probs of tokens under softmax(logits / temperature), and its entropy, which has no gradient: fp32, (n,).

    logits: (n, V), any float dtype; tokens: (n,)
    `backward` must stay the derivative of `forward`. On a CPU, both process a few rows at a time, which stay in its
    cache.
    """

    @staticmethod
    def parts(*tensors):
        logits = tensors[0]
        chunk = len(logits) if logits.is_cuda else max(1, CACHED_LOGITS // logits.shape[1])
        return zip(*(x.split(chunk) for x in tensors), strict=True)

    @staticmethod
    def forward(ctx, logits, tokens, temperature):
        log_probs, entropy = torch.empty(2, len(tokens), device=logits.device)
        for part, token, log_prob, H in TokenLogProbs.parts(logits, tokens, log_probs, entropy):
            x = (part.float() / temperature).log_softmax(-1)
            log_prob.copy_(x.gather(-1, token[:, None])[:, 0])
            H.copy_(-(x.exp() * x).sum(-1))
        ctx.save_for_backward(logits, tokens)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    def backward(ctx, grad, _):
        logits, tokens = ctx.saved_tensors
        result, grad = torch.empty_like(logits), grad[:, None] / ctx.temperature
        for part, token, g, out in TokenLogProbs.parts(logits, tokens[:, None], grad, result):
            x = (part.float() / ctx.temperature).softmax(-1).mul_(-g)
            out.copy_(x.scatter_add_(-1, token, g))  # d log p(token) / d logit_v = ((v == token) - p(v)) / temperature
        return result, None, None


def completion_log_probs(model, ids, completion_mask, temperature):
    """Return log-probs of completion tokens under softmax(logits / temperature), and its entropy in nats.

    ids: (B, T) prompts and completions, padded on the right
    completion_mask: (B, T) bool, True at completion tokens. Column t refers to the token at position t, predicted from
        the tokens before it
    Both results are fp32, (B, T), and 0 outside the mask; the entropy has no gradient. Only completion tokens pass
    through lm_head, in chunks that the backward pass recomputes, so that no (B, T, V) tensor ever exists.
    """
    network = inner_model(model)
    hidden = _states_before(network, ids, completion_mask)  # (N, D)
    targets, head = ids[completion_mask], network.get_output_embeddings()  # (N,)

    def score(hidden, targets):
        return TokenLogProbs.apply(head(hidden), targets, temperature)

    chunk = max(MIN_ROWS, MAX_LOGITS[ids.device.type] // head.weight.shape[0])
    scored = [
        checkpoint(score, *part, use_reentrant=False, preserve_rng_state=False)
        for part in zip(hidden.split(chunk), targets.split(chunk), strict=True)
    ]
    log_probs, entropy = (torch.cat(parts) for parts in zip(*scored, strict=True))
    empty = torch.zeros(ids.shape, device=ids.device)
    return empty.masked_scatter(completion_mask, log_probs), empty.masked_scatter(completion_mask, entropy)


def _states_before(network, ids, completion_mask):
    """Return the last hidden state at the position before each completion token, (N, D), row by row.

    If that saves enough positions, each prompt (without its last token) is computed once for all of its rows, and the
    common prefix of all prompts once. Completions attend to these keys and values, and gradients flow back through
    them. See `shares_prompts`.
    """
    last, lengths = completion_mask.int().argmax(1) - 1, completion_mask.sum(1)  # (B,)
    L = max(1, int(last.max()))  # length of the longest prompt without its last token
    in_prompt = torch.arange(L, device=ids.device) < last[:, None]
    prompts, prompt_of_row = torch.where(in_prompt, ids[:, :L], -1).unique(dim=0, return_inverse=True)  # (P, L)
    offsets = torch.arange(int(lengths.max()), device=ids.device)
    positions = last[:, None] + offsets  # (B, C) from a prompt's last position, which predicts the first token
    prefix = 0 if len(prompts) == 1 else int((prompts == prompts[0]).all(0).cumprod(0).sum())
    prefix = 0 if prefix < MIN_SHARED else prefix
    spared = 1 - (prefix + prompts[:, prefix:].numel() + positions.numel()) / ids.numel()
    num_slots = L + positions.shape[1]
    if not shares_prompts(network, num_slots) or not in_prompt.any() or spared < MIN_SPARED:
        # Causal attention never sees the padding on the right, so no mask or position ids are needed.
        hidden = network.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, D)
        return hidden[:, :-1][completion_mask[:, 1:]]
    cache, _ = new_cache(network, num_slots)
    steps = [(prompts[:1, :prefix], torch.zeros_like(prompts[:, 0]))] if prefix else []
    for part, rows in [*steps, (prompts[:, prefix:].clamp(min=0), prompt_of_row)]:
        network.base_model(input_ids=part, past_key_values=cache, use_cache=True)
        for layer in cache.layers:  # index_select, since the backward pass of keys[rows] is not deterministic
            layer.keys, layer.values = (x.index_select(0, rows) for x in (layer.keys, layer.values))
    hidden = network.base_model(
        input_ids=ids.gather(1, positions.clamp(max=ids.shape[1] - 1)),
        attention_mask=torch.cat([in_prompt, torch.ones_like(positions, dtype=torch.bool)], dim=1),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state  # (B, C, D)
    return hidden[offsets < lengths[:, None]]
