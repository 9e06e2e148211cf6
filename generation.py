"""Sampling and scoring: the decode loop, and the log-probs of completions.

    generate               one decode loop for rollouts, ES populations and evaluation; `sample` draws the tokens
    completion_log_probs   log-probs and entropy of completion tokens, with gradients, for GRPO's loss
    AdapterGroup           LoRA in fewer operations than PEFT's; `sampling_mode` prepares it for `generate`
To change the sampling rule, edit `sample` and both passes of `TokenLogProbs` together; otherwise, the trained policy is
not the sampled one. Elsewhere: prompts and scores (utils.py), GRPO's loss, and the hooks that add ES's noise.

Shapes: P prompts, G completions per prompt, B = P * G rows, T tokens, V vocabulary, D hidden size.
"""

import contextlib
import dataclasses
import functools
import math
import os
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch.nn.attention import varlen
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, DynamicCache
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

    With flash attention, it always can. Otherwise, it cannot with gradient checkpointing, because transformers then
    drops the cache, nor if the longest prompt and completion, `num_slots` together, exceed a sliding window, because
    padding would use it up.
    """
    if network.config._attn_implementation == "flash":
        return True
    checkpoints = any(getattr(module, "gradient_checkpointing", False) for module in network.modules())
    return not checkpoints and new_cache(network, num_slots)[1]


# --- Adapters ---------------------------------------------------------------------------------------------------------


class AdapterGroup:
    """LoRA adapters of layers that read the same input, such as q, k and v: their A in one matrix product.

    y = W x + scaling * B (A x), in fewer operations than PEFT's own forward pass.
    """

    def __init__(self, layers):
        self.layers, self.input, self.packed, self.is_sampling, self.originals = layers, None, None, False, {}
        for layer in layers:
            layer.forward = functools.partial(self.forward, layer)
            layer.lora_A["default"].weight.is_packed = layer.lora_B["default"].weight.is_packed = True

    def weights(self, name):
        """Return the A of all layers as one matrix (sum of r, in), and the B of each, (out, r), in one list."""
        A = [layer.lora_A[name].weight for layer in self.layers]
        return [torch.cat(A) if len(A) > 1 else A[0], *(layer.lora_B[name].weight for layer in self.layers)]

    @torch.no_grad()
    def start_sampling(self, merge):
        """Merge the adapters into copies of W, or copy them to fixed addresses in W's dtype to save casts."""
        assert not self.originals, "the adapters are merged already"
        for layer in self.layers if merge else []:
            base = layer.base_layer
            self.originals[base] = base.weight
            merged = base.weight + layer.get_delta_weight("default")
            base.weight = torch.nn.Parameter(merged, requires_grad=False)
        if not merge:
            weights, dtype = self.weights("default"), self.layers[0].weight.dtype
            self.packed = self.packed or [torch.empty_like(x, dtype=dtype) for x in weights]
            for packed, x in zip(self.packed, weights, strict=True):
                packed.copy_(x)
            self.is_sampling = True

    def stop_sampling(self):
        for base, weight in self.originals.items():
            base.weight = weight
        self.originals, self.is_sampling = {}, False

    def forward(self, layer, x):
        y = layer.base_layer(x)
        if self.originals or layer.merged or layer.disable_adapters:
            return y
        (name,) = layer.active_adapters
        if self.input is not x:  # the first of the layers: compute A x for all
            A, *B = self.packed if self.is_sampling else self.weights(name)
            self.input, sizes = x, [layer.r[name] for layer in self.layers]
            inner = F.linear(x, A).split(sizes, -1)
            self.inner = {layer: pair for layer, *pair in zip(self.layers, inner, B, strict=True)}
        inner, B = self.inner.pop(layer)  # (..., r), (out, r)
        self.input = x if self.inner else None
        return torch.addmm(y.flatten(0, -2), inner.flatten(0, -2), B.T, alpha=layer.scaling[name]).view_as(y)


def probe(model):
    """Return the logits of eight tokens, (1, 8, V), as the policy computes them."""
    ids, is_bf16 = torch.arange(8, device=model.device)[None], model.dtype == torch.bfloat16
    with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=is_bf16):
        return model(input_ids=ids, use_cache=False).logits


def group_adapters(model):
    """Replace the forward pass of plain LoRA layers. One pass through the model shows which ones share their input."""
    groups = {}  # {id of an input: (the input, kept alive so that ids differ, [its layers])}
    layers = [m for m in model.modules() if type(m) is LoraLinear and not (m.lora_variant or any(m.lora_bias.values()))]

    def note_input(layer, args):
        groups.setdefault(id(args[0]), (args[0], []))[1].append(layer)

    hooks = [layer.register_forward_pre_hook(note_input) for layer in layers]
    probe(model)
    for hook in hooks:
        hook.remove()
    model.adapter_groups = [AdapterGroup(group) for _, group in groups.values()]  # for `sampling_mode`


@contextlib.contextmanager
def sampling_mode(model):
    """Decode with SDPA attention, without gradient checkpointing, and with the adapter in fewer operations.

    In fp32 on a CPU, merge the adapter into the weights; in bf16, rounding the sum would change the policy.
    """
    config, groups = inner_model(model).config, getattr(model, "adapter_groups", [])
    attention, in_training = config._attn_implementation, [module for module in model.modules() if module.training]
    merge = model.dtype == torch.float32 and model.device.type == "cpu"
    try:
        model.eval()
        config._attn_implementation = "sdpa" if attention == "flash" else attention
        for group in groups:
            group.start_sampling(merge)
        yield
    finally:
        config._attn_implementation = attention
        for module in in_training:
            module.training = True
        for group in groups:
            group.stop_sampling()


# --- KV cache and CUDA graphs -----------------------------------------------------------------------------------------


class DecodeMemory:
    """Tensors that decode steps read and write, and the CUDA graphs of the steps.

    A graph reads the addresses that it was captured with. Kept for a whole run, tensors and graphs serve every rollout.
    """

    def __init__(self):
        self.tensors, self.graphs, self.num_slots = {}, {}, 0

    def get(self, name, shape, dtype, device):
        """Return uninitialized memory: the first rows of a tensor that stays in place while it is large enough."""
        found = self.tensors.get(name)
        if found is None or len(found) < shape[0] or (found.shape[1:], found.dtype) != (shape[1:], dtype):
            self.graphs.clear()
            self.tensors[name] = found = torch.empty(shape, dtype=dtype, device=device)
        return found[: shape[0]]

    def keep(self, name, x, num_rows=0, *, device):
        """Copy x to memory that stays in place, with room for `num_rows` rows."""
        room = torch.Size([max(len(x), num_rows), *x.shape[1:]])
        return self.get(name, room, x.dtype, device)[: len(x)].copy_(x)

    def run(self, key, step):
        """Run a step. The first one of each key is captured in a CUDA graph, which later ones replay."""
        if key in self.graphs:
            self.graphs[key].replay()
            return
        step()  # initializes hooks and libraries, which may allocate memory and synchronize
        pool = next((graph.pool() for graph in self.graphs.values()), None)  # all graphs share memory between kernels
        self.graphs[key] = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self.graphs[key], pool, capture_error_mode="thread_local"):
                step()
        except RuntimeError as error:
            error.add_note("The decode step of this model cannot be captured: set cuda_graphs: false")
            raise


class PreallocatedLayer(DynamicLayer):
    """A KV cache layer whose steps write to a preallocated buffer, so that a CUDA graph can replay a step.

    Prefill works as in DynamicLayer. Then `batch_repeat_interleave` copies to the buffers in `memory`. After that, each
    `update` writes to the slot `cursor.slot`, a tensor (1,) on the device, and returns the slots before `cursor.end`.
    """

    def __init__(self, number, memory, cursor):
        super().__init__()
        self.number, self.memory, self.cursor, self.buffers = number, memory, cursor, None

    def batch_repeat_interleave(self, repeats):
        B, H, T, D = self.keys.shape
        # In autocast's dtype, to which attention would otherwise cast the buffer in every step.
        device = self.keys.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.keys.dtype
        self.buffers = []
        for name, x in (("keys", self.keys), ("values", self.values)):
            # Zeros, since attention reads masked slots before they are written, and garbage could be NaN.
            shape = torch.Size([B * repeats, H, self.memory.num_slots, D])
            buffer = self.memory.get((name, self.number), shape, dtype, x.device).zero_()
            buffer[:, :, :T].unflatten(0, (B, repeats)).copy_(x[:, None])
            self.buffers.append(buffer)
        self.keys, self.values = (buffer[:, :, :T] for buffer in self.buffers)

    def update(self, key_states, value_states, *args, **kwargs):
        if self.buffers is None:
            return super().update(key_states, value_states, *args, **kwargs)
        for buffer, x in zip(self.buffers, (key_states, value_states), strict=True):
            buffer.index_copy_(2, self.cursor.slot, x.to(buffer.dtype))  # under autocast, rotary keys can be fp32
        self.keys, self.values = (buffer[:, :, : self.cursor.end] for buffer in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices):
        if self.buffers is None:
            super().batch_select_indices(indices)
            return
        B, end = len(indices), self.cursor.end  # not that of self.keys, which a replayed step leaves as it is
        for buffer in self.buffers:
            buffer[:B, :, :end] = buffer[indices, :, :end]
        self.buffers = [buffer[:B] for buffer in self.buffers]
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)


# --- Sampling ---------------------------------------------------------------------------------------------------------

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
    cuda_graphs: bool = True  # on a GPU, replay decode steps from CUDA graphs
    memory: DecodeMemory = dataclasses.field(default_factory=DecodeMemory, repr=False, compare=False)


def generate(model, prompts, settings, num_samples=1, uniforms=None, on_rows=None, block_size=None):
    """Generate `num_samples` completions per prompt, sampled with `uniforms`, or greedily if it is None.

    prompts: P lists of token ids
    uniforms: (P * num_samples, max_new_tokens) in [0, 1), one number per token. Up to rounding, a row's tokens depend
        only on its prompt and its numbers, not on the other rows of the batch
    on_rows: called with the prompt index of each row in the batch, (rows,), whenever the rows change, so that forward
        hooks can tell rows apart. It requires block_size, the number of consecutive prompts that hooks treat alike
    The common prefix of a batch's prompts is computed once per block. Meanwhile, the model is in `sampling_mode`.
    Return Completions on the model's device.
    """
    assert num_samples == 1 or uniforms is not None, "greedy completions of a prompt are identical"
    assert on_rows is None or block_size, "on_rows needs block_size: blocks must not share computation"
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
    grad_mode = torch.no_grad() if torch.is_autocast_enabled(device.type) else torch.inference_mode()
    with sampling_mode(model), grad_mode:
        for first in range(0, len(prompts), chunk):
            part = range(first, min(first + chunk, len(prompts)))
            more = num_samples, uniforms, on_rows, block_size or len(part)
            _decode(model, prompts, part, settings, *more, completions)
        if torch.is_autocast_enabled(device.type) and any(map(is_cast, model.parameters())):
            settings.memory.graphs.clear()  # they read casts of weights, which autocast is about to free
    return completions


def is_cast(parameter):
    """Return True if autocast keeps a cast of this weight. While sampling, it casts none of an AdapterGroup."""
    return parameter.requires_grad and parameter.dtype == torch.float32 and not hasattr(parameter, "is_packed")


def _lay_out(prompts, shared, num_slots):
    """Assign cache slots: the `shared` prefix of all prompts, padding, the rest of the prompt, the completion.

    Return prompt ids (P, L), padded to the longest, and attention_mask (P, num_slots).
    """
    longest = max(map(len, prompts))
    ids = torch.tensor([prompt[:shared] + [0] * (longest - len(prompt)) + prompt[shared:] for prompt in prompts])
    padding = torch.tensor([[longest - len(prompt)] for prompt in prompts])
    slots = torch.arange(num_slots)
    attention_mask = (slots < shared) | (slots >= shared + padding)
    return ids, attention_mask


def _next_size(num_started, num_rows, num_running, has_graphs):
    """Return the number of rows that a batch goes on with, of which some may have ended.

    Graphs need few sizes: there, halve the batch three times at most.
    """
    size = math.ceil(num_rows / 2) if has_graphs else num_running
    is_worth_it = num_started <= 8 * size if has_graphs else size <= 0.75 * num_rows
    return size if num_running <= size and is_worth_it else num_rows


def _prefill(forward, select, cache, ids, attention_mask, positions, shared, block_size):
    """Compute P prompts: their shared prefix once per block, and the rest of each. Return the last logits, (P, V)."""
    # logits_to_keep is a tensor, since the integer 1 selects a non-contiguous slice, on which lm_head is slow.
    rows, last = torch.arange(len(ids), device=ids.device), torch.tensor([-1], device=ids.device)
    if shared:
        firsts = rows[::block_size]
        select(firsts)
        forward(ids[firsts, :shared], None, positions[firsts, :shared], logits_to_keep=last)
        cache.batch_select_indices(rows // block_size)
    select(rows)
    return forward(ids[:, shared:], attention_mask, positions[:, shared:], logits_to_keep=last)


def _decode(model, prompts, part, settings, num_samples, uniforms, on_rows, block_size, out):
    """Run the decode loop for the prompts in the range `part`, and write to the Completions `out`."""
    device, network, P = model.device, inner_model(model), len(part)
    prompts, B, first = prompts[part.start : part.stop], P * num_samples, part.start * num_samples
    kind = uniforms is None, on_rows is None, block_size  # graphs of other kinds compute something else
    longest = max(map(len, prompts))
    cache, keeps_all = new_cache(network, longest + settings.max_new_tokens)
    has_graphs = settings.cuda_graphs and keeps_all and device.type == "cuda"
    memory = settings.memory if has_graphs else DecodeMemory()
    shared = min(len(os.path.commonprefix(prompts)), min(map(len, prompts)) - 1)
    if shared < MIN_SHARED or min(block_size, P) == 1 or not keeps_all:
        shared = 0
    bucket = LENGTH_BUCKET if has_graphs else 8  # unless it is a multiple of 8, GPUs pad the mask in every layer
    memory.num_slots = max(memory.num_slots, math.ceil((longest + settings.max_new_tokens) / bucket) * bucket)
    ids, attention_mask = (x.to(device) for x in _lay_out(prompts, shared, memory.num_slots))
    positions = (attention_mask[:, :longest].cumsum(-1) - 1).clamp(min=0)
    keep = functools.partial(memory.keep, device=device)
    cursor = SimpleNamespace(slot=keep("slot", torch.tensor([longest])), end=longest)
    if keeps_all:
        cache.layers = [PreallocatedLayer(number, memory, cursor) for number in range(len(cache.layers))]

    def forward(ids, mask, positions, **options):
        options |= {"past_key_values": cache, "use_cache": True}
        return model(input_ids=ids, attention_mask=mask, position_ids=positions, **options).logits[:, -1]

    def select(prompt_of_row):
        if on_rows:
            on_rows(part.start + prompt_of_row)

    logits = _prefill(forward, select, cache, ids, attention_mask[:, :longest], positions, shared, block_size)
    cache.batch_repeat_interleave(num_samples)
    logits = logits.repeat_interleave(num_samples, 0)

    # A step reads and writes only these tensors, in place, so that a CUDA graph can replay it.
    completions = Completions(*(keep(name, x[first : first + B]) for name, x in vars(out).items()))
    uniforms = None if uniforms is None else keep("uniforms", uniforms[first : first + B])
    position = keep("position", positions[:, -1:].repeat_interleave(num_samples, 0))
    visible = keep("visible", attention_mask.repeat_interleave(num_samples, 0))
    rows = keep("rows", torch.arange(B))  # the rows of `completions` in the batch
    newest, text_state = keep("newest", torch.zeros(B, 1, dtype=torch.long)), keep("text_state", torch.zeros_like(rows))
    column, slots = keep("column", torch.zeros(1, dtype=torch.long)), keep("slots", torch.arange(memory.num_slots))
    stop_ids, stop_table = keep("stop_ids", torch.tensor(settings.stop_ids)), settings.stop_table
    select(rows // num_samples)

    def append_tokens(logits):
        noise = None if uniforms is None else uniforms[rows, column]
        token, log_prob = sample(logits, noise, settings.temperature)
        running = completions.truncated[rows]
        completions.tokens[rows, column] = torch.where(running, token, 0)
        completions.log_probs[rows, column] = torch.where(running, log_prob, 0.0)
        completions.mask[rows, column] = running
        has_ended = (token[:, None] == stop_ids).any(1)
        if stop_table is not None:
            text_state.copy_(stop_table[text_state, token])
            has_ended |= text_state == len(stop_table) - 1
        completions.truncated[rows] = running & ~has_ended
        newest.copy_(token[:, None])
        column.add_(1)

    def step():
        position.add_(1)
        mask = visible[:, : cursor.end]
        if keeps_all:  # as the model would build it, except that the end may lie beyond the slot
            mask = (mask & (slots[: cursor.end] <= cursor.slot))[:, None, None]
        append_tokens(forward(newest, mask, position))
        cursor.slot.add_(1)

    append_tokens(logits)
    del logits  # (B, V) is large
    for end in range(longest + 1, longest + settings.max_new_tokens):
        running = completions.truncated[rows]
        num_running = int(running.sum())  # the only synchronization with the device in a step
        if num_running == 0:
            break
        size = _next_size(B, len(rows), num_running, has_graphs)
        if size < len(rows):  # drop rows that have ended
            kept = running.int().argsort(descending=True, stable=True)[:size]
            cache.batch_select_indices(kept)
            batch = rows, newest, text_state, position, visible
            rows, newest, text_state, position, visible = (x[:size].copy_(x[kept]) for x in batch)
            select(rows // num_samples)
        cursor.end = min(end + -end % LENGTH_BUCKET, memory.num_slots) if has_graphs else end
        memory.run((kind, B, len(rows), cursor.end), step) if has_graphs else step()
    for name, x in vars(out).items():
        x[first : first + B] = getattr(completions, name)


# --- Scoring ----------------------------------------------------------------------------------------------------------

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
    states = _states_before if network.config._attn_implementation != "flash" else _states_without_padding
    hidden = states(network, ids, completion_mask)  # (N, D)
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


def flash_attention(module, query, key, value, attention_mask, scaling, segments, sliding_window=None, **kwargs):
    """Attend within segments, as an attention function of transformers: (1, H, N, D) in, (1, N, H, D) out."""
    (keys, *ends), dtype = segments, value.dtype  # under autocast, rotary queries and keys can be fp32
    exact = torch.promote_types(dtype, torch.float32)  # the backward pass adds up gradients of all segments
    key, value = (x[0].transpose(0, 1).to(exact).index_select(0, keys).to(dtype) for x in (key, value))
    window = (sliding_window - 1 if sliding_window else -1, 0)  # causal
    how = {"scale": scaling, "window_size": window, "enable_gqa": True}
    return varlen.varlen_attn(query[0].transpose(0, 1).to(dtype), key, value, *ends, **how)[None], None


AttentionInterface.register("flash", flash_attention)


def _states_without_padding(network, ids, completion_mask):
    """Return what `_states_before` does, from one row without padding: each prompt is in it once.

    The row consists of segments: the common prefix of all prompts, their rests, the completions. A segment attends
    causally to itself, the rest of a prompt also to the prefix, a completion to its prompt.
    """
    device, tokens, positions, keys, num_queries, num_keys = ids.device, [], [], [], [], []

    def add(segment, before):
        """Append a segment of tokens. Return the indices of all that its successors attend to."""
        visible = [*before, *range(len(tokens), len(tokens) + len(segment))]
        tokens.extend(segment)
        positions.extend(range(len(before), len(visible)))
        keys.extend(visible)
        num_queries.append(len(segment))
        num_keys.append(len(visible))
        return visible

    starts, ends = completion_mask.int().argmax(1).tolist(), completion_mask.int().cumsum(1).argmax(1).tolist()
    rows = [(tuple(row[:start]), row[start:end]) for row, start, end in zip(ids.tolist(), starts, ends, strict=True)]
    prompts = dict.fromkeys(prompt for prompt, _ in rows)
    shared = min(len(os.path.commonprefix(list(prompts))), min(map(len, prompts)) - 1)
    prefix = add(next(iter(prompts))[:shared], [])
    prompts = {prompt: add(prompt[shared:], prefix) for prompt in prompts}
    index = []  # of the state before each completion token; the last token itself predicts nothing
    for prompt, completion in rows:
        visible = add(completion, prompts[prompt])
        index += visible[len(prompt) - 1 :]

    ends = (F.pad(torch.tensor(n).cumsum(0), (1, 0)).int().to(device) for n in (num_queries, num_keys))
    segments = torch.tensor(keys, device=device), *ends, max(num_queries), max(num_keys)
    row, positions = torch.tensor([[tokens], [positions]], device=device)
    hidden = network.base_model(input_ids=row, position_ids=positions, segments=segments, use_cache=False)
    return hidden.last_hidden_state[0, torch.tensor(index, device=device)]  # (N, D)
