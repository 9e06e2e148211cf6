"""What both training scripts call, in the order in which a run meets it.

config and command line, set-up (seeds, model, tokenizer), problems and prompts, generation, log-probs, scores and
evaluation, logging, a run's folder with its checkpoints, stopping

Letters in shapes: P prompts, G completions per prompt, B = P * G rows, T tokens, V vocabulary, D hidden size.
"""

import argparse
import contextlib
import dataclasses
import difflib
import fcntl
import functools
import hashlib
import html
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import time
import traceback
import types
import typing
import unicodedata
import warnings
import zlib
from collections.abc import Hashable
from pathlib import Path

import numpy as np
import torch
import transformers
import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from jinja2 import TemplateError
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.checkpoint import checkpoint
from torch.utils.tensorboard import summary
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.utils import is_flash_attn_2_available

from datasets import load_dataset
from reward import find_reward, lenient_correct, score, strict_correct

# What libraries say for themselves and not to the user: weight-loading bars, the renaming of a method that PEFT calls.
transformers.utils.logging.disable_progress_bar()
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)

# ----------------------------------------------------------------------------------------------------------------------
# Config and command line: a dataclass is the list of keys, types and defaults; a YAML file sets every one of them
# ----------------------------------------------------------------------------------------------------------------------


MAX_CONFIG_BYTES = 100_000


class _Loader(yaml.SafeLoader):
    """YAML whose mappings may not repeat a key (plain YAML takes the last one and says nothing), and without aliases,
    of which a few lines can make more than fits into memory."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise ValueError("aliases (*name) are not read")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node)
            if isinstance(key, Hashable):  # what is not, the next line refuses
                if key in seen:
                    raise ValueError(f"{str(key)[:100]} is set twice")
                seen.add(key)
        return super().construct_mapping(node, deep)


def _read_yaml(text):
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(_one_line(error)) from None


def _shown(value):
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        text = "a huge number"
    return text if len(text) <= 100 else f"{text[:100]}..."


def load_config(config_class, path, overrides=()):
    """The `config_class` that a YAML file describes, with "key=value" or "key.subkey=value" overrides on top.

    ValueError, in one line with file, key, value and what was expected, if a key is unknown, missing or mistyped, or if
    the dataclass's own `__post_init__` rejects a value.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_CONFIG_BYTES + 1)
        if len(text) > MAX_CONFIG_BYTES:
            raise ValueError(f"longer than {MAX_CONFIG_BYTES:,} bytes, which no config is")
        values = _read_yaml(text.decode("utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {_one_line(error)}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping of keys to values, not {type(values).__name__}")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"command line: {override!r}, expected key=value")
        *parents, last = key.split(".")
        target = values
        for parent in parents:
            target = target.get(parent)
            if not isinstance(target, dict):
                raise ValueError(f"command line: {override}: {parent} holds {_shown(target)}, not a mapping")
        try:
            target[last] = _read_yaml(text)
        except ValueError as error:
            raise ValueError(f"command line: {override}: {error}") from None
    try:
        return _convert(values, config_class, "")
    except ValueError as error:
        set_there = any(str(error).startswith(override.partition("=")[0]) for override in overrides)
        raise ValueError(f"{'command line' if set_there else path}: {_one_line(error)}") from None


def run_from_command_line(main, config_class, default_path, example, memory_keys):
    """`main(config, stop_requested)` with the config of the command line; wrong input ends it with one line.

    example: an override; memory_keys: what to lower when memory runs out; both for messages
    """
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__.splitlines()[0])
    parser.add_argument("--config", default=default_path, help="YAML file that sets every key (%(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"keys to set otherwise, e.g. {example}")
    arguments = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # so that a log file can be followed
    with one_line_errors(memory_keys), StopSignals() as stop_requested:
        main(load_config(config_class, arguments.config, arguments.overrides), stop_requested)


def check(condition, key, value, expected):
    """What a config's `__post_init__` states its bounds with."""
    if not condition:
        raise ValueError(f"{key}: {_shown(value)}, expected {expected}")


def _convert(value, kind, key):
    """The YAML value as the annotated type, or ValueError. 1e-5, text to YAML 1.1, is the number it looks like."""
    if dataclasses.is_dataclass(kind):
        check(isinstance(value, dict), key, value, "a mapping of keys to values")
        fields = {field.name: field.type for field in dataclasses.fields(kind)}
        prefix = f"{key}." if key else ""
        for name in value:
            if name not in fields:
                near = difflib.get_close_matches(str(name), fields, n=1, cutoff=0.5)
                hint = f"did you mean {prefix}{near[0]}?" if near else f"the keys are {', '.join(fields)}"
                raise ValueError(f"{prefix}{str(name)[:100]}: {_shown(value[name])}: unknown key, {hint}")
        for name in fields:
            if name not in value:
                raise ValueError(f"{prefix}{name}: missing; every key is to be set")
        try:
            return kind(**{name: _convert(value[name], fields[name], prefix + name) for name in fields})
        except ValueError as error:
            message = str(error)
            raise ValueError(message if message.startswith(prefix) else prefix + message) from None
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:  # X | None
        return None if value is None else _convert(value, arguments[0], key)
    if origin is typing.Literal:
        check(value in arguments, key, value, f"one of {', '.join(map(str, arguments))}")
        return value
    if origin is list:
        check(isinstance(value, list), key, value, "a list")
        return [_convert(item, arguments[0], f"{key}[{i}]") for i, item in enumerate(value)]
    if kind is dict or origin is dict:
        check(isinstance(value, dict), key, value, "a mapping of keys to values")
        check(all(isinstance(name, str) for name in value), key, value, "keys that are text")
        if kind is dict:
            try:
                json.dumps(value)
            except (TypeError, ValueError):
                check(False, key, value, "plain values: no dates, sets or bytes")
        if origin is dict:
            value = {name: _convert(item, arguments[1], f"{key}.{name}") for name, item in value.items()}
        return value
    if kind in (int, float):
        expected = "a whole number" if kind is int else "a number"
        check(not isinstance(value, bool) and isinstance(value, (int, float, str)), key, value, expected)
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        check(math.isfinite(number) and kind(number) == number, key, value, expected)
        return kind(number)
    if kind in (str, bool):
        check(isinstance(value, kind), key, value, "text" if kind is str else "true or false")
    return value


@contextlib.contextmanager
def one_line_errors(memory_keys):
    """End the program with one line where this project's own code raised ValueError or OSError for what a user gave,
    where the GPU's memory is too small, and where another process of the run has ended.

    Any other exception is a defect of ours and keeps its traceback. An error with a cause in a user's code (a reward
    function) shows the cause's traceback above the line.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        sys.exit(f"error: out of GPU memory: lower {memory_keys} ({_one_line(error)})")
    except (ValueError, OSError, RuntimeError) as error:
        frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        frames = [Path(name).resolve() for name in frames if not name.startswith("<frozen ")]
        while frames[-1].is_relative_to(STDLIB) and "site-packages" not in frames[-1].parts:  # open, say
            frames.pop()
        if isinstance(error, RuntimeError) and any(frame.name == "distributed_c10d.py" for frame in frames):
            sys.exit(f"error: another process of this run has ended; its message says why ({_one_line(error)})")
        if isinstance(error, RuntimeError) or frames[-1].parent != Path(__file__).resolve().parent:
            raise
        if error.__cause__ is not None:
            traceback.print_exception(error.__cause__)
        sys.exit(f"error: {error}")


STDLIB = Path(os.__file__).resolve().parent


def _one_line(error):
    return " ".join(str(error).split())[:600]


class StopSignals:
    """Whether SIGINT or SIGTERM has asked the run to stop, once the step that it is in is done.

    A second signal ends the process at once, and so does the first before the run has asked for the first time, when
    no step was begun. One of several processes takes no second signal: launchers send their own on top of the
    terminal's, and kill what has not ended some time after it.
    """

    def __enter__(self):
        self.requested = self.has_asked = False
        self.handlers = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        if self.requested and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            return
        if self.requested or not self.has_asked:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.requested = True
        once_more = b"" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else b"; once more stops at once"
        os.write(2, b"\nstopping after this step" + once_more + b"\n")  # print could be interrupted by itself

    def __call__(self):
        self.has_asked = True
        return self.requested


# ----------------------------------------------------------------------------------------------------------------------
# Set-up: seeds, model, tokenizer
# ----------------------------------------------------------------------------------------------------------------------


def seeded_generator(seed, stream, index=0, device="cpu"):
    """A generator that follows from its arguments alone, so that a run's random numbers need no stored state.

    stream: what the numbers are for, a word; index: which of them, such as the step, less than 2^32
    """
    assert 0 <= index < 2**32, index
    low, high = map(int, np.random.SeedSequence([seed, zlib.crc32(stream.encode())]).generate_state(2))
    # torch's CPU generator reads the low 32 bits of a seed only. The index counts them up: no two are the same.
    return torch.Generator(device).manual_seed((high >> 1) << 32 | (low + index) % 2**32)


def seed_libraries(seed, step, process):
    """Seed Python's, numpy's and torch's own generators, which this project draws nothing from, but reward functions
    may: what they draw in a step follows from these arguments, so that it is the same after a run was resumed."""
    set_seed(int(np.random.SeedSequence([seed, zlib.crc32(b"libraries"), step, process]).generate_state(1)[0]))


def make_accelerator(device, dtype):
    """accelerate's view of devices and processes. device: "auto", "cpu" or "cuda"; dtype "bfloat16" means autocast."""
    check(device != "cuda" or torch.cuda.is_available(), "device", device, "cpu or auto: PyTorch finds no GPU here")
    # Without this, processes on a CPU would not find each other, and each would take itself for the only one.
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    return Accelerator(cpu=on_cpu, mixed_precision="bf16" if dtype == "bfloat16" else "no")


def load_model(name, dtype, device, cache_dir=None):
    """A causal language model from a folder or the Hugging Face hub, in eval mode, on `device`.

    name: a model, or a folder with a LoRA adapter, which is loaded onto the base model that it names
    dtype: "float32" or "bfloat16"
    Attention is flash-attention 2 where that is installed and applies, else SDPA. Dropout stays off for good: a policy
    that is scored under dropout is not the policy that was sampled. ValueError, in one line, for a name that gives no
    complete model.
    """
    if "/" not in name and not Path(name).is_dir():  # a misspelled folder; do not look for it in the network
        raise ValueError(f"model: {name!r}: there is no such folder here; on the hub, owner/model is expected")
    on_gpu = torch.device(device).type == "cuda"
    attention = "flash_attention_2" if on_gpu and dtype == "bfloat16" and is_flash_attn_2_available() else "sdpa"
    try:
        base_name = name
        if (Path(name) / "adapter_config.json").is_file():
            base_name = PeftConfig.from_pretrained(name).base_model_name_or_path
        model, info = AutoModelForCausalLM.from_pretrained(
            base_name,
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
            cache_dir=cache_dir,
            output_loading_info=True,
        )
        if base_name != name:
            model = PeftModel.from_pretrained(model, name, is_trainable=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"model: {name!r}: {_model_problem(name, error)}") from None
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(f"model: {name!r} lacks {len(missing)} of its weights, {missing[0]} for one")
    return model.to(device).eval()


def _model_problem(name, error):
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
            return "this folder holds no model: it has no config.json"
        return f"this folder holds no complete model: {' '.join(str(error).split())}"
    return f"there is no such folder here, and from the Hugging Face hub: {' '.join(str(error).split())[:300]}"


def load_tokenizer(name, cache_dir=None):
    """The model's tokenizer. What is unusual about its prompts is said, by the first process."""
    if (Path(name) / "adapter_config.json").is_file() and not (Path(name) / "tokenizer_config.json").is_file():
        name = PeftConfig.from_pretrained(name).base_model_name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, cache_dir=cache_dir)
    except (OSError, ValueError) as error:
        raise ValueError(f"model: {name!r} has no tokenizer: {_model_problem(name, error)}") from None
    if tokenizer.pad_token_id is None:  # never looked for in ids: masks come from lengths
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        say_once(f"{name} has no chat template: prompts are plain text, {PLAIN_TEMPLATE!r}")
    elif answer_start(tokenizer):
        say_once(f"the chat template begins every answer with {answer_start(tokenizer)}, which is scored as part of it")
    return tokenizer


def inner_model(model):
    """The transformers model itself, out of its PEFT wrapper. Adapters are modules inside it and stay in force."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def stop_ids(model, tokenizer):
    """Every id that ends a completion: all that the model's generation config names, and the tokenizer's."""
    ids = model.generation_config.eos_token_id
    ids = ids if isinstance(ids, list) else [ids]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})


# ----------------------------------------------------------------------------------------------------------------------
# Problems and prompts
# ----------------------------------------------------------------------------------------------------------------------


def load_problems(config, num_processes):
    """The training set, and the held-out items to evaluate on. ValueError also for a reward that there is not."""
    for name in config.rewards:
        find_reward(name)
    train_set = load_dataset(config.dataset, "train", config.dataset_args)
    test_set = load_dataset(config.dataset, "test", config.dataset_args)
    test_items = [test_set[i] for i in range(min(config.eval_size, len(test_set)))]
    enough = len(test_items) >= num_processes
    check(enough, "eval_size", len(test_items), f"at least {num_processes} problems, one for each process")
    return train_set, test_items


PLAIN_TEMPLATE = "{system}\n\nUser: {prompt}\n\nAssistant:"  # for base models, which have no chat template


def encode_prompts(tokenizer, prompts, system_prompt):
    """Token ids of each prompt as the model is to see it: chat template, system prompt, start of the answer.

    Where a chat template takes no system message, the system prompt stands before the user's. ValueError if the
    template fails.
    """
    if tokenizer.chat_template is None:
        texts = [PLAIN_TEMPLATE.format(system=system_prompt, prompt=prompt).lstrip() for prompt in prompts]
        return tokenizer(texts).input_ids  # the tokenizer adds its own special tokens
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    try:
        texts = _in_template(tokenizer, [[*system, {"role": "user", "content": prompt}] for prompt in prompts])
        is_shown = all(system_prompt.strip() in text for text in texts)
    except ValueError:
        if not system_prompt:
            raise
        is_shown = False
    if not is_shown:
        chats = [[{"role": "user", "content": f"{system_prompt}\n\n{prompt}"}] for prompt in prompts]
        texts = _in_template(tokenizer, chats)
        say_once("the chat template takes no system prompt: it stands before each problem")
    return tokenizer(texts, add_special_tokens=False).input_ids  # the template wrote them


def _in_template(tokenizer, chats):
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:  # it writes today's date; a run that is resumed tomorrow must have the same prompts
        template = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}" + template
    try:
        return tokenizer.apply_chat_template(chats, chat_template=template, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        raise ValueError(f"model: its chat template cannot be used: {_one_line(error)}") from None


def answer_start(tokenizer):
    """What the chat template writes at the start of each answer: "<think>" with reasoning models, those that are told
    not to think have "<think></think>", others "". Completions begin after it, and it belongs to what is scored.
    """
    if tokenizer.chat_template is None:
        return ""
    text = _in_template(tokenizer, [[{"role": "user", "content": "?"}]])[0]
    found = re.search(r"<think>\s*(</think>)?\s*$", text)
    return "".join(found[0].split()) if found else ""


def check_prompt_lengths(model, prompts, max_new_tokens):
    """ValueError if a prompt (token ids) and its completion might not fit into the model."""
    longest = max(map(len, prompts))
    limit = getattr(inner_model(model).config.get_text_config(), "max_position_embeddings", None)
    if limit and longest + max_new_tokens > limit:
        raise ValueError(
            f"max_new_tokens: {max_new_tokens} after a prompt of {longest} tokens exceeds the model's {limit} positions"
        )


def draw_indices(size, start, count, seed):
    """Items start..start+count of an endless shuffled pass over range(size), each epoch in an order of its own."""
    indices = []
    while len(indices) < count:
        epoch, offset = divmod(start + len(indices), size)
        order = torch.randperm(size, generator=seeded_generator(seed, "data", epoch)).tolist()
        indices += order[offset : offset + count - len(indices)]
    return indices


def schedule_factor(schedule, step, num_steps, warmup_steps):
    """What the learning rate is multiplied with at `step`: linear warm-up, then "constant", or "linear" or "cosine"
    decay that would reach 0 at num_steps. No step has factor 0.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    share_done = (step - warmup_steps) / (num_steps - warmup_steps)
    return {
        "constant": 1.0,
        "linear": 1 - share_done,
        "cosine": (1 + math.cos(math.pi * share_done)) / 2,
    }[schedule]


# ----------------------------------------------------------------------------------------------------------------------
# Generation
# ----------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Completions:
    """Completions of B rows, prompt by prompt: rows p*G to p*G+G-1 belong to prompt p."""

    tokens: torch.Tensor  # (B, max_new_tokens) ids as sampled, padded
    mask: torch.Tensor  # (B, max_new_tokens) bool: the completion, its end token included, nothing after it
    log_probs: torch.Tensor  # (B, max_new_tokens) fp32: the sampler's, 0 where the mask is False
    truncated: torch.Tensor  # (B,) bool: cut at max_new_tokens, without an end token

    def texts(self, tokenizer):
        """With the beginning that the chat template gave them, see `answer_start`."""
        rows = [tokens[mask].tolist() for tokens, mask in zip(self.tokens, self.mask, strict=True)]
        start = answer_start(tokenizer)
        return [start + text for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]


class HalvingSize:
    """How much is computed at once, in rows or tokens: `size`, which is halved when the GPU's memory runs out."""

    def __init__(self, key, size):
        """key: what is said to be too large, a key of the config"""
        self.key, self.size = key, size

    def halve(self, tried):
        """tried: how much there was when memory ran out"""
        self.size = max(1, min(self.size, tried) // 2)
        say(f"out of GPU memory with {tried} at once: going on with {self.size} ({self.key} is too large)")
        torch.cuda.empty_cache()


def new_cache(network):
    """An empty cache of keys and values, and whether it keeps all positions: a sliding window does not, and counts
    padding besides."""
    cache = DynamicCache(config=network.config)
    return cache, all(type(layer) is DynamicLayer for layer in cache.layers)


@dataclasses.dataclass
class Cursor:
    """Where a decode step writes into the cache, and how much of it is read."""

    slot: torch.Tensor  # (1,) the slot that is written
    end: int  # slots that are read, more than `slot`


class PreallocatedLayer(DynamicLayer):
    """A cache layer that, after `batch_repeat_interleave`, writes one position at a time into a buffer that stays where
    it is, at a slot that is a tensor: neither concatenates, and a CUDA graph can replay it."""

    def __init__(self, max_new_tokens, cursor):
        super().__init__()
        self.max_new_tokens, self.cursor = max_new_tokens, cursor

    def batch_repeat_interleave(self, repeats):
        self.buffers = []
        for x in (self.keys, self.values):
            B, H, T, D = x.shape
            # Zeros, since slots may be read, masked, before they are written: anything else might be NaN.
            buffer = x.new_zeros(B * repeats, H, T + self.max_new_tokens, D)
            buffer[:, :, :T].unflatten(0, (B, repeats)).copy_(x[:, None])
            self.buffers.append(buffer)
        self.keys, self.values = (buffer[:, :, :T] for buffer in self.buffers)

    def update(self, key_states, value_states, *args, **kwargs):
        if not hasattr(self, "buffers"):
            return super().update(key_states, value_states, *args, **kwargs)
        for buffer, x in zip(self.buffers, (key_states, value_states), strict=True):
            buffer.index_copy_(2, self.cursor.slot, x.to(buffer.dtype))  # under autocast, prefill promotes values
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


def sample(logits, uniforms, temperature, top_p):
    """One token a row by inverting the cumulative distribution at `uniforms`; with None, the likeliest token.

    logits: (B, V), any float dtype; uniforms: (B,) in [0, 1)
    Returns tokens (B,) and their fp32 log-probs (B,) under the temperature, before any top-p truncation.
    """
    probs = kept = (logits.float() / temperature).softmax(-1)
    if uniforms is None:
        tokens = logits.argmax(-1, keepdim=True)
    else:
        if top_p < 1:  # keep the likeliest tokens up to and including the one that reaches top_p
            sorted_probs, order = probs.sort(-1, descending=True)
            dropped = sorted_probs.cumsum(-1) - sorted_probs >= top_p
            kept = probs.masked_fill(dropped.gather(-1, order.argsort(-1)), 0)
        cdf = kept.cumsum(-1)
        # right=True: the first token whose cdf exceeds the draw, so never one of probability 0. Scaling by the last
        # entry makes up for the sum's rounding.
        draws = uniforms[:, None] * cdf[:, -1:]
        tokens = torch.searchsorted(cdf, draws, right=True).clamp(max=logits.shape[1] - 1)
    smallest = torch.finfo(probs.dtype).tiny  # rounding of the sum can draw, ever so rarely, what has no probability
    return tokens[:, 0], probs.gather(-1, tokens)[:, 0].clamp(min=smallest).log()


@torch.no_grad()
def generate(
    model,
    prompts,
    max_new_tokens,
    stop_ids,
    pad_id,
    num_samples=1,
    uniforms=None,
    temperature=1.0,
    top_p=1.0,
    batch_size=256,
    drop_share=None,
    on_rows=None,
    block_size=None,
):
    """Complete prompts: `num_samples` completions each, sampled with `uniforms`, or greedily without.

    prompts: P lists of token ids
    uniforms: (P * num_samples, max_new_tokens) in [0, 1), one number a token; a row's tokens follow from its prompt and
        its numbers, whichever rows it shares a batch with
    batch_size: completions decoded at once (at least one prompt's, or one block's), a number or a HalvingSize, which
        remembers when fewer fitted into memory
    drop_share: finished rows leave the batch once they are this share of it; None: a quarter, or half with CUDA graphs
    on_rows: called with the index of the prompt that each row of the batch belongs to, (rows,), whenever that changes;
        so that forward hooks can tell rows apart
    block_size: how many prompts in a row the hooks treat alike. What prompts begin with is computed once a block
    The distribution sampled is softmax(logits / temperature), nothing else: the model's generation_config is not
    consulted but for its end tokens, which the caller passes as `stop_ids`. Returns Completions, on the model's device.
    """
    if num_samples > 1 and uniforms is None:
        raise ValueError("num_samples: greedy completions of a prompt are all the same; pass uniforms to sample")
    device = model.device
    if on_rows is not None and block_size is None:
        raise ValueError("block_size: needed with on_rows, so that rows that differ share no computation")
    if isinstance(batch_size, int):
        batch_size = HalvingSize("batch_size", batch_size)
    block = block_size or 1
    parts, first = [], 0
    while first < len(prompts):
        chunk = max(1, batch_size.size // (num_samples * block)) * block  # whole blocks
        ids = prompts[first : first + chunk]
        rows = slice(first * num_samples, (first + len(ids)) * num_samples)
        noise = None if uniforms is None else uniforms[rows].to(device)

        def tell_rows(prompt_indices, first=first):
            if on_rows is not None:
                on_rows(first + prompt_indices)

        settings = (max_new_tokens, stop_ids, pad_id, num_samples, noise, temperature, top_p, drop_share)
        try:
            parts.append(_decode(model, ids, *settings, tell_rows, block_size or len(ids)))
            first += len(ids)
            continue
        except torch.OutOfMemoryError:
            if len(ids) <= block:
                raise
        batch_size.halve(len(ids) * num_samples)  # out here the exception holds no tensors any more
    return Completions(*(torch.cat(part) for part in zip(*parts, strict=True)))


MIN_SHARED = 8  # a shorter beginning of all prompts is not worth a forward pass of its own
LENGTH_BUCKET = 128  # by so many slots grows what a captured step reads of the cache


def captures(device):
    """Whether decode steps are to be replayed from CUDA graphs, which spares the launch of each kernel."""
    return device.type == "cuda" and os.environ.get("CUDA_GRAPHS") != "0"


def captured(step):
    """What replays `step`, recorded as a CUDA graph. It must have been taken once before, and `can_be_captured`."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            step()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ValueError("model: its decode step cannot be recorded as a CUDA graph; run with CUDA_GRAPHS=0") from error
    return graph.replay


def can_be_captured(step):
    """Take the step as it is, and tell whether it did so without making the host wait for the GPU, as a graph must.

    It is not left to a capture that fails: after one, torch's allocator is of no use any more.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [_one_line(warning.message) for warning in caught if "called a synchronizing" in str(warning.message)]
    if waits:
        say_once(f"decoding without CUDA graphs, as this model waits for the GPU in every step: {waits[0]}")
    return not waits


@contextlib.contextmanager
def _sdpa_attention(network):
    """Attention by SDPA, which takes masks; flash-attention would gather the unpadded cache anew at every step."""
    original = network.config._attn_implementation
    if original != "sdpa":
        network.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if original != "sdpa":
            network.set_attn_implementation(original)


@torch.inference_mode()
def _decode(
    model,
    prompts,
    max_new_tokens,
    stop_ids,
    pad_id,
    num_samples,
    uniforms,
    temperature,
    top_p,
    drop_share,
    tell_rows,
    block_size,
):
    """The decode loop behind `generate`, for one batch. Returns the fields of Completions."""
    device, network = model.device, inner_model(model)
    P, B, longest = len(prompts), len(prompts) * num_samples, max(map(len, prompts))
    cache, keeps_all = new_cache(network)
    cursor = Cursor(torch.full((1,), longest, device=device), longest)
    if keeps_all:
        cache.layers = [PreallocatedLayer(max_new_tokens, cursor) for _ in cache.layers]
    use_graphs = keeps_all and captures(device)
    if drop_share is None:
        drop_share = 0.5 if use_graphs else 0.25  # with every drop, a step is to be captured anew

    # The slots of a row: what all prompts begin with, padding, the rest of its prompt, its completion.
    shared = min(len(os.path.commonprefix(prompts)), min(map(len, prompts)) - 1)
    if shared < MIN_SHARED or min(block_size, P) == 1 or not keeps_all:
        shared = 0
    ids = torch.full((P, longest), pad_id)
    attention_mask = torch.ones(P, longest + max_new_tokens, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        padding = longest - len(prompt)
        ids[row, :shared] = torch.tensor(prompt[:shared])
        ids[row, shared + padding :] = torch.tensor(prompt[shared:])
        attention_mask[row, shared : shared + padding] = False
    ids, attention_mask = ids.to(device), attention_mask.to(device)
    positions = (attention_mask[:, :longest].cumsum(-1) - 1).clamp(min=0)

    def forward(input_ids, attention_mask, position_ids, **options):
        return model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            **options,
        ).logits[:, -1]

    # Prefill what is shared once a block, the rest of every prompt once, and repeat the cache for its completions.
    # logits_to_keep is a tensor, not 1: a slice is not contiguous and turns lm_head into a batched product, far slower.
    last = torch.tensor([-1], device=device)
    prompt_of_row = torch.arange(P, device=device)
    if shared:
        firsts = prompt_of_row[::block_size]
        tell_rows(firsts)
        forward(ids[firsts, :shared], None, positions[firsts, :shared], logits_to_keep=last)
        cache.batch_select_indices(prompt_of_row // block_size)
    tell_rows(prompt_of_row)
    logits = forward(ids[:, shared:], attention_mask[:, :longest], positions[:, shared:], logits_to_keep=last)
    cache.batch_repeat_interleave(num_samples)
    logits, position, attention_mask, prompt_of_row = (
        x.repeat_interleave(num_samples, 0) for x in (logits, positions[:, -1:], attention_mask, prompt_of_row)
    )
    if num_samples > 1:
        tell_rows(prompt_of_row)

    tokens = torch.full((B, max_new_tokens), pad_id, device=device)
    mask = torch.zeros(B, max_new_tokens, dtype=torch.bool, device=device)
    log_probs = torch.zeros(B, max_new_tokens, device=device)
    finished = torch.zeros(B, dtype=torch.bool, device=device)  # of all rows; `rows` are those in the batch
    rows, token = torch.arange(B, device=device), torch.empty(B, 1, dtype=torch.long, device=device)
    column, stop = torch.zeros(1, dtype=torch.long, device=device), torch.tensor(stop_ids, device=device)
    slots = torch.arange(longest + max_new_tokens, device=device)

    # A step changes tensors in place and knows its place from tensors: a CUDA graph of it can be replayed as the next.
    def choose(logits):
        new, log_prob = sample(logits, None if uniforms is None else uniforms[rows, column], temperature, top_p)
        running = ~finished[rows]
        tokens[rows, column] = torch.where(running, new, pad_id)
        log_probs[rows, column] = torch.where(running, log_prob, 0.0)
        mask[rows, column] = running
        finished[rows] = ~running | (new[:, None] == stop).any(1)
        token.copy_(new[:, None])
        column.add_(1)

    def step():
        position.add_(1)
        visible = attention_mask[:, : cursor.end]
        if keeps_all:  # as the model would make it, but that the end may lie beyond the slot
            visible = (visible & (slots[: cursor.end] <= cursor.slot))[:, None, None]
        choose(forward(token, visible, position))
        cursor.slot.add_(1)

    choose(logits)
    del logits  # as large as B * V
    steps_alike = 0  # steps taken with the rows and the end as they are
    with _sdpa_attention(network) if keeps_all else contextlib.nullcontext():
        for t in range(1, max_new_tokens):
            num_finished = int(finished[rows].sum())  # where the loop waits for the device, once a step
            if num_finished == len(rows):
                break
            if num_finished >= drop_share * len(rows):
                keep = (~finished[rows]).nonzero()[:, 0]
                cache.batch_select_indices(keep)
                rows, token, position, attention_mask = (x[keep] for x in (rows, token, position, attention_mask))
                tell_rows(prompt_of_row[rows])
                steps_alike = 0
            if longest + t > cursor.end:
                cursor.end = min(longest + t + (LENGTH_BUCKET - 1 if use_graphs else 0), len(slots))
                steps_alike = 0
            if use_graphs and steps_alike == 0:  # first as it is: hooks prepare things, and libraries are loaded
                replay = None  # and with it the memory of the graph before
                use_graphs = can_be_captured(step)
            elif use_graphs:
                if steps_alike == 1:
                    replay = captured(step)
                replay()
            else:
                step()
            steps_alike += 1
    return tokens, mask, log_probs, ~finished


# ----------------------------------------------------------------------------------------------------------------------
# Log-probs of completions
# ----------------------------------------------------------------------------------------------------------------------

MIN_SPARED = 0.1  # prompts are computed apart if that spares this share of positions; it takes attention with a mask
MAX_LOGITS = 2**25  # logits alive at once in the scoring pass: 128 MiB in fp32, 220 tokens at a vocabulary of 152k


def completion_log_probs(model, ids, completion_mask, temperature):
    """Log-probs of completion tokens under softmax(logits / temperature), and that distribution's entropy, in nats.

    ids: (B, T) prompt and completion side by side, padded on the right
    completion_mask: (B, T) bool, True at the tokens of each row's completion; column t is the token at t, predicted
        from those before it
    Returns two fp32 tensors (B, T), 0 outside the mask; the entropy carries no gradient. Only completion tokens pass
    through lm_head, in chunks that the backward pass computes again: no (B, T, V) tensor exists at any time.
    """
    network = inner_model(model)
    hidden = _states_before(network, ids, completion_mask)  # (N, D)
    targets, head = ids[completion_mask], network.get_output_embeddings()  # (N,)

    def score(hidden, targets):
        logits = head(hidden).float() / temperature  # (n, V)
        log_normalizer = logits.logsumexp(-1)
        log_probs = logits.gather(-1, targets[:, None])[:, 0] - log_normalizer
        with torch.no_grad():
            entropy = log_normalizer - (logits.softmax(-1) * logits).sum(-1)
        return log_probs, entropy

    chunk = max(1, MAX_LOGITS // head.weight.shape[0])
    scored = [
        checkpoint(score, *part, use_reentrant=False, preserve_rng_state=False)
        for part in zip(hidden.split(chunk), targets.split(chunk), strict=True)
    ]
    log_probs, entropy = (torch.cat(parts) for parts in zip(*scored, strict=True))
    empty = torch.zeros(ids.shape, device=ids.device)
    return empty.masked_scatter(completion_mask, log_probs), empty.masked_scatter(completion_mask, entropy)


def _states_before(network, ids, completion_mask):
    """The last hidden state at the position before each completion token, (N, D), row by row.

    What prompts are, but for their last token, is computed once for all rows that have it, where that spares enough
    positions: completions attend to its keys and values, and gradients flow back through these. Not with gradient
    checkpointing, which transformers does only without a cache, and not with sliding windows, which count padding.
    """

    def states_of_whole_rows():
        # Causal attention sees none of the padding on the right: it needs neither mask nor position ids.
        hidden = network.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, D)
        return hidden[:, :-1][completion_mask[:, 1:]]

    cache, keeps_all = new_cache(network)
    checkpoints = any(getattr(module, "gradient_checkpointing", False) for module in network.modules())
    last, lengths = completion_mask.int().argmax(1) - 1, completion_mask.sum(1)  # (B,)
    L = int(last.max())  # length of the longest prompt without its last token
    if L == 0 or checkpoints or not keeps_all:
        return states_of_whole_rows()
    offsets = torch.arange(int(lengths.max()), device=ids.device)
    positions = last[:, None] + offsets  # (B, C) from a prompt's last position, which predicts a completion's first
    in_prompt = torch.arange(L, device=ids.device) < last[:, None]
    prompts, prompt_of_row = torch.where(in_prompt, ids[:, :L], -1).unique(dim=0, return_inverse=True)  # (P, L)
    if 1 - (prompts.numel() + positions.numel()) / ids.numel() < MIN_SPARED:
        return states_of_whole_rows()
    network.base_model(input_ids=prompts.clamp(min=0), past_key_values=cache, use_cache=True)
    for layer in cache.layers:  # not by keys[rows], whose gradient is summed in another order each time
        layer.keys, layer.values = (x.index_select(0, prompt_of_row) for x in (layer.keys, layer.values))
    hidden = network.base_model(
        input_ids=ids.gather(1, positions.clamp(max=ids.shape[1] - 1)),
        attention_mask=torch.cat([in_prompt, torch.ones_like(positions, dtype=torch.bool)], dim=1),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state  # (B, C, D)
    return hidden[offsets < lengths[:, None]]


@torch.no_grad()
def check_chunked_head(model):
    """ValueError if lm_head over the last hidden state is not the model's logits (a scaled or capped head, say)."""
    network = inner_model(model)
    ids = torch.arange(8, device=model.device)[None]
    logits = network(input_ids=ids, use_cache=False).logits.float()
    hidden = network.base_model(input_ids=ids, use_cache=False).last_hidden_state
    if not torch.allclose(network.get_output_embeddings()(hidden).float(), logits, atol=1e-3, rtol=1e-3):
        name = type(network).__name__
        raise ValueError(f"model: {name} does more to its logits than lm_head; they cannot be computed in chunks")


# ----------------------------------------------------------------------------------------------------------------------
# Scores and evaluation
# ----------------------------------------------------------------------------------------------------------------------


def score_completions(rewards, completions, tokenizer, items):
    """What `reward.score` says of each completion, its "length" in tokens, whether it was "truncated" (0, 1), and the
    sampler's "log_prob" of it.

    rewards: {name: weight}; completions: Completions of B rows; items: B dataset items. Returns B dicts of numbers.
    """
    rows = score(rewards, completions.texts(tokenizer), items)
    columns = {
        "length": completions.mask.sum(1),
        "truncated": completions.truncated,
        "log_prob": completions.log_probs.sum(1),
    }
    for name, values in columns.items():
        for row, value in zip(rows, values.tolist(), strict=True):
            row[name] = float(value)
    return rows


def gather_scores(rows, device):
    """{name: (B,) fp32} of the rows of all processes, in the order of the processes. rows: dicts of this one."""
    rows = gather_object(rows)
    return {name: torch.tensor([row[name] for row in rows], device=device) for name in rows[0]}


def non_finite(scores):
    """What in the scores {name: (B,)} of a step is not finite, in words, or None."""
    for name, values in scores.items():
        if not values.isfinite().all():
            row = int((~values.isfinite()).nonzero()[0])
            return f"{name} of completion {row} is {float(values[row])}"
    return None


def check_skipped(step, in_a_row, limit, reason, folder):
    """ValueError, saying why, once the last `limit` steps up to `step` were skipped."""
    if in_a_row >= limit:
        before = [path for saved, path in checkpoint_folders(folder).items() if saved <= step - in_a_row]
        last = before[0] if before else "none yet"
        raise ValueError(
            f"max_skipped_steps: {in_a_row} steps in a row were skipped, the last because {reason}; "
            f"the last good checkpoint, from before them: {last}"
        )


def wilson_interval(successes, trials):
    """The 95% interval of a proportion (Wilson 1927), which stays within [0, 1] for small counts too."""
    z, share = 1.96, successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return (centre - spread) / (1 + z * z / trials), (centre + spread) / (1 + z * z / trials)


def evaluate(model, tokenizer, items, prompts, max_new_tokens, batch_size, accelerator):
    """Greedy accuracy over all items, shared among the processes.

    items: dataset items, at least one a process; prompts: their token ids
    Returns strict and lenient accuracy in [0, 1], the mean length in tokens, the truncated share, the items of this
    process with their completions, and the seconds that it took.
    """
    start = time.perf_counter()
    share = slice(accelerator.process_index, None, accelerator.num_processes)
    items_here, prompts_here = items[share], prompts[share]
    with accelerator.autocast():
        completions = generate(
            model,
            prompts_here,
            max_new_tokens,
            stop_ids(model, tokenizer),
            tokenizer.pad_token_id,
            batch_size=batch_size,
        )
    texts = completions.texts(tokenizer)
    answers = [item["answer"] for item in items_here]
    sums = torch.tensor(
        [
            sum(map(strict_correct, texts, answers)),
            sum(map(lenient_correct, texts, answers)),
            int(completions.mask.sum()),
            int(completions.truncated.sum()),
        ],
        dtype=torch.float64,
        device=model.device,
    )
    strict, lenient, length, truncated = (accelerator.reduce(sums) / len(items)).tolist()
    return {
        "strict": strict,
        "lenient": lenient,
        "length": length,
        "truncated": truncated,
        "items": items_here,
        "texts": texts,
        "seconds": time.perf_counter() - start,
    }


def print_summary(before, after, num_items, training_seconds, total_seconds):
    """Accuracy by `evaluate` before and after training, and what it took.

    training_seconds: of all steps, those before the run was resumed included; total_seconds: since `main` began
    """
    print(f"\nHeld-out accuracy, greedy, {num_items} problems (95% interval)")
    for name in ("strict", "lenient"):
        shares = [before[name], after[name]]
        intervals = [wilson_interval(round(share * num_items), num_items) for share in shares]
        cells = [
            f"{share:6.1%} ({low:.1%} to {high:.1%})" for share, (low, high) in zip(shares, intervals, strict=True)
        ]
        print(f"    {name:8}{'  ->  '.join(cells)}")
    print(f"All steps took {training_seconds:.0f} s; from loading the model to here, {total_seconds:.0f} s.")


# ----------------------------------------------------------------------------------------------------------------------
# Logging
# ----------------------------------------------------------------------------------------------------------------------


def say(text):
    """Print above the progress bar, if there is where to: standard output may be a file on the disk that is full."""
    with contextlib.suppress(OSError):
        tqdm.write(text)


@functools.cache
def say_once(text):
    """Once a run: by the first process alone."""
    if int(os.environ.get("RANK", 0)) == 0:
        say(text)


def print_banner(config, model, accelerator, num_trained, train_set, test_items, step, run):
    """What is about to run. num_trained: parameters; step, run: what one step is, and the whole"""
    device, sizes = accelerator.device, {name: parameter.numel() for name, parameter in model.named_parameters()}
    num_base = sum(size for name, size in sizes.items() if "lora_" not in name)
    trained = f"{num_trained:,} trained{' in an adapter' if num_base < sum(sizes.values()) else ''}"
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    attention = inner_model(model).config._attn_implementation
    lines = {
        "model": f"{config.model}, {num_base:,} parameters, {trained}",
        "device": f"{accelerator.num_processes} x {device_name}, {config.dtype}, {attention} attention",
        "data": f"{config.dataset}, {len(train_set):,} problems, evaluated on {len(test_items):,} held-out ones",
        "step": step,
        "run": run,
    }
    for name, text in lines.items():
        accelerator.print(f"{name:8}{text}")


class ProgressBar(tqdm):
    """The steps of a run and the phase of the present one: a bar on a terminal, elsewhere a line every half minute."""

    FORM = "{desc:8} {n_fmt}/{total_fmt} |{bar}| {remaining} left{postfix}"  # fits into 80 columns
    SECONDS_BETWEEN_LINES = 30

    def __init__(self, num_steps, num_done, is_main):
        super().__init__(
            total=num_steps,
            initial=num_done,
            disable=None if is_main else True,  # None: where standard error is no terminal
            bar_format=self.FORM,
            dynamic_ncols=True,
        )
        self.num_done, self.writes_lines = num_done, is_main and self.disable

    def begin(self):
        """The first step begins: only from now on does time tell how long steps take."""
        self.unpause()
        self.start = self.last_line = time.monotonic()

    def step_done(self, step, metrics):
        """step: how many are done; metrics: the scalars that were logged for the last one"""
        rate = tqdm.format_sizeof(float(metrics["throughput/tokens_per_second"]))
        state = f"reward {metrics['reward/mean']:.2f}, accuracy {metrics['accuracy/strict']:.0%}, {rate} tokens/s"
        self.set_postfix_str(state, refresh=False)
        self.update()
        now = time.monotonic()
        if self.writes_lines and now - self.last_line > self.SECONDS_BETWEEN_LINES:
            self.last_line = now
            seconds_left = (now - self.start) / (step - self.num_done) * (self.total - step)
            say(f"{step:6d}/{self.total}  {state}, {tqdm.format_interval(seconds_left)} left")


class AppendedFile:
    """A file that grows by whole records. What a full disk does not take waits for the next time, and is said to."""

    def __init__(self, path):
        self.file, self.waiting = open(path, "ab", buffering=0), b""
        self.length = os.path.getsize(path)

    def append(self, data, sync=False):
        """sync: return when it is not only out of this process's hands, but on the disk."""
        self.waiting += data
        written = 0
        try:
            self.file.truncate(self.length)  # half a record may be left if the disk was full
            while written < len(self.waiting):
                written += self.file.write(self.waiting[written:])
            if sync:
                os.fsync(self.file.fileno())
            self.waiting, self.length = b"", self.length + written
        except OSError as error:
            with contextlib.suppress(OSError):
                self.file.truncate(self.length)
            say(f"warning: {self.file.name} cannot be written for now: {error}; training goes on")


def as_text(text):
    """Any text as Markdown that shows it as it is, in one line: no markup works, and what is invisible can be seen."""

    def shown(c):
        if c.isalnum() or c == " ":
            return c
        if unicodedata.category(c)[0] == "C":  # controls, zero-width characters, changes of direction
            return "<br>" if c == "\n" else f"&#92;u{ord(c):04x}"
        return f"&#{ord(c)};"

    return "".join(map(shown, text))


# TensorBoard's CUSTOM SCALARS page: {category: {chart: tags, as regular expressions}}
CHARTS = {
    "Is it learning?": {
        "held-out accuracy": ["eval/strict_accuracy", "eval/lenient_accuracy"],
        "reward": ["reward/mean"],
        "rewards, unweighted": ["reward/(?!(mean|std|group_std|equal_groups)$)"],
    },
    "Is there something to learn from?": {
        "groups, or pairs of members, of equal reward": ["reward/equal_groups", "es/tie_rate"],
        "completions that were cut": ["completion/truncated", "eval/truncated"],
        "length of completions": ["completion/length"],
    },
    "GRPO: is the policy sound?": {
        "entropy": ["policy/entropy"],
        "KL to the policy before, and to the starting model": ["policy/kl"],
        "ratios that were clipped": ["policy/clip"],
    },
    "ES: is the noise of the right size?": {
        "rewards of the members": ["es/reward_(min|mean|max)"],
        "their standard deviation": ["es/reward_std"],
        "distance from the starting weights": ["es/distance"],
    },
    "Where does the time go?": {
        "seconds of a step, by phase": ["time/(?!evaluate$)"],
        "tokens per second": ["throughput/"],
    },
}


class Logger:
    """TensorBoard scalars, texts and hyperparameters of one run, in one folder.

    The folder `by_tokens` in it is a second run to TensorBoard, with what evaluations found over what it cost: its
    steps are thousands of generated tokens, its clock (the RELATIVE axis) counts seconds of training.
    """

    def __init__(self, folder, config, last_step=-1, last_token=-1):
        """folder: where to write; None writes nothing.

        last_step, last_token: what was logged there earlier for later steps, or more tokens, is void (but for points
        of the same thousand tokens, which a resumed run can repeat in `by_tokens`)
        """
        self.file = self.file_by_tokens = None
        if folder is not None:
            self.file = self._open(folder, last_step + 1)
            self.file_by_tokens = self._open(folder / "by_tokens", last_token // 1000 + 1)
            self._append(self.file, Event(summary=summary.hparams(hyperparameters(config), {})[1]))
            layout = {category: {k: ["Multiline", tags] for k, tags in v.items()} for category, v in CHARTS.items()}
            self._append(self.file, Event(summary=summary.custom_scalars(layout)))
            self.text("config", f"<pre>{html.escape(config_text(config))}</pre>", 0)

    def _open(self, folder, first_step):
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        file, start = AppendedFile(folder / name), SessionLog(status=SessionLog.START)
        self._append(file, Event(file_version="brain.Event:2"), Event(step=first_step, session_log=start))
        return file

    def _append(self, file, *events, seconds=None):
        """Not by SummaryWriter, whose thread does not survive a full disk: at once, so that no kill loses a step."""
        if file:
            records = io.BytesIO()
            for event in events:
                event.wall_time = time.time() if seconds is None else seconds
                RecordWriter(records).write(event.SerializeToString())
            file.append(records.getvalue())

    def is_behind(self):
        """Whether records wait for room on the disk, once it was tried again to write them."""
        files = [file for file in (self.file, self.file_by_tokens) if file]
        for file in files:
            file.append(b"")
        return any(file.waiting for file in files)

    def scalars(self, values, step):
        self._append(
            self.file, *(Event(step=step, summary=summary.scalar(tag, value)) for tag, value in values.items())
        )

    def text(self, tag, markdown, step):
        self._append(self.file, Event(step=step, summary=summary.text(tag, markdown)))

    def completions(self, tag, items, texts, step):
        """A table of prompts, answers and completions. Model output is text, never markup."""
        rows = ["| | prompt | answer | completion |", "|---|---|---|---|"]
        for item, text in zip(items, texts, strict=True):
            if strict_correct(text, item["answer"]):
                verdict = "✓"
            else:
                verdict = "✗ form" if lenient_correct(text, item["answer"]) else "✗"
            cells = [as_text(cell) for cell in (item["prompt"], item["answer"], text)]
            rows.append(f"| {verdict} | {' | '.join(cells)} |")
        self.text(tag, "\n".join(rows), step)

    def evaluation(self, result, step, generated_tokens, seconds):
        """What `evaluate` returned: curves, and a table of the first completions."""
        accuracy = {"strict_accuracy": result["strict"], "lenient_accuracy": result["lenient"]}
        self.scalars(
            {
                **{f"eval/{name}": value for name, value in accuracy.items()},
                "eval/length": result["length"],
                "eval/truncated": result["truncated"],
                "time/evaluate": result["seconds"],
            },
            step,
        )
        self._append(
            self.file_by_tokens,
            *(
                Event(step=generated_tokens // 1000, summary=summary.scalar(f"by_tokens/{name}", value))
                for name, value in accuracy.items()
            ),
            seconds=seconds,
        )
        self.completions("completions", result["items"][:8], result["texts"][:8], step)

    def finished(self):
        """Tell TensorBoard's HPARAMS page."""
        self._append(self.file, Event(summary=summary.hparams({}, {})[2]))


def hyperparameters(config):
    """What a config has that runs are compared by, flat: {"lora.rank": 16, ...}."""
    flat = {}
    for key, value in dataclasses.asdict(config).items():
        if key == "model" or key not in FREE_KEYS:
            nested = value if isinstance(value, dict) and value else {"": value}
            for name, part in nested.items():
                plain = isinstance(part, (int, float, str, bool))
                flat[f"{key}.{name}".rstrip(".")] = part if plain else json.dumps(part)
    return flat


def completion_metrics(scores):
    """Scalars for the log from what is known of each completion: {"reward", "reward/...", ...: (B,) tensors}."""
    return {
        "reward/mean": scores["reward"].mean(),
        "reward/std": scores["reward"].std(),
        **{tag: values.mean() for tag, values in scores.items() if tag.startswith(("reward/", "accuracy/"))},
        "completion/length_mean": scores["length"].mean(),
        "completion/length_min": scores["length"].min(),
        "completion/length_max": scores["length"].max(),
        "completion/truncated": scores["truncated"].mean(),
    }


class PhaseTimer:
    """Seconds by phase of a step, those of the GPU included, shown on the progress bar while they pass."""

    def __init__(self, progress):
        self.progress, self.seconds = progress, {}

    @contextlib.contextmanager
    def __call__(self, phase):
        self.progress.set_description_str(phase)
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


# ----------------------------------------------------------------------------------------------------------------------
# A run's folder: config.yml, TensorBoard events, checkpoints/, model/
# ----------------------------------------------------------------------------------------------------------------------

# Keys that a run may be resumed with other values of. The model may have moved: its weights are what is compared.
FREE_KEYS = {"model", "cache_dir", "device", "eval_every", "checkpoint_every", "keep_checkpoints", "max_skipped_steps"}
FREE_KEYS |= {"log_dir", "run_name", "resume"}


def config_text(config):
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def run_folder(config, marker):
    """The folder of a run that is to begin or to be resumed; nothing is made yet. ValueError if there cannot be one.

    It is `log_dir/run_name`, the time without a run_name, or for `resume: PATH` that folder. "never" takes no folder
    that is there already; "auto", with a run_name, and a path take one that holds the file `marker`, as any run does
    that has begun.
    """
    if config.resume not in ("never", "auto"):
        folder = Path(config.resume).resolve()
        check((folder / marker).is_file(), "resume", config.resume, f"auto, never, or a run's folder with its {marker}")
        same = config.run_name in (None, folder.name)
        check(same, "run_name", config.run_name, f"null or {folder.name}, the run to resume")
        return folder
    folder = Path(config.log_dir) / (config.run_name or time.strftime("%Y-%m-%d_%H-%M-%S"))
    if folder.exists():
        again = f"{folder} exists already; choose another name or delete it"
        check(config.resume == "auto" and config.run_name, "run_name", config.run_name, f"a new name: {again}")
        # A run that was killed when it had hardly begun has left its lock, or half a file.
        traces = all(path.name == "lock" or path.suffix == ".partial" for path in folder.iterdir())
        begun = (folder / marker).is_file() or traces
        check(begun, "run_name", config.run_name, f"a new name, or a run with its {marker}: {again}")
    return folder


def open_run_folder(folder, config):
    """Make the folder, and keep other processes from writing there. Returns the config with which `--config` resumes
    the run, and the lock, an open file: closed, by the end of the process at the latest, it lets others in again."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"log_dir: {str(folder.parent)!r} cannot be made: {error}") from None
    lock = open(folder / "lock", "a")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"run_name: {folder} is being written by another process") from None
    except OSError as error:  # a file system without locks
        print(f"warning: {folder} cannot be locked against a second run in it: {error}")
    return dataclasses.replace(config, log_dir=str(folder.parent), run_name=folder.name, resume="auto"), lock


def resume_command(folder):
    processes = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"))
    launcher = "python" if processes == "1" else f"torchrun --nproc_per_node {processes}"
    return f"{launcher} {shlex.quote(sys.argv[0])} --config {shlex.quote(str(folder / 'config.yml'))}"


def write_file(path, data):
    """Bytes into a file that is complete and on disk, or as it was before."""
    partial = Path(f"{path}.partial")
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    _sync(path.parent)


@contextlib.contextmanager
def whole_folder(folder):
    """A new folder to write into, which takes the place of `folder` once it is complete and on disk.

    OSError, in one line, if anything in it cannot be written; then nothing is left of it.
    """
    folder = Path(folder)
    partial, old = Path(f"{folder}.partial"), Path(f"{folder}.old.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for path in partial.rglob("*"):
            _sync(path)
        _sync(partial)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.replace(folder, old)
        os.replace(partial, folder)
        _sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        if not isinstance(error, (OSError, SafetensorError)) and type(error) is not Exception:  # as tokenizers raises
            raise
        raise OSError(f"{folder} cannot be saved: {_one_line(error)}") from None


def _sync(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_model(model, tokenizer, folder, weights=None):
    """Model or adapter, and tokenizer, as an ordinary Hugging Face folder. weights: instead of the model's own."""
    # Of a PEFT model, only the adapter that was trained: a second one may serve as reference. Embeddings are never
    # resized; to find that out PEFT would ask the hub.
    peft = {"selected_adapters": ["default"], "save_embedding_layers": False} if isinstance(model, PeftModel) else {}
    model.save_pretrained(folder, state_dict=weights, **peft)
    tokenizer.save_pretrained(folder)


def fingerprint(parameters):
    """Eight hex digits that follow from every bit of {name: parameter}: a checksum of sums over rows and columns."""
    checksum = 0
    for weight in parameters.values():
        bits = weight.detach().view({2: torch.int16, 4: torch.int32}[weight.element_size()]).reshape(len(weight), -1)
        for dim in (0, 1):
            checksum = zlib.crc32(bits.sum(dim, dtype=torch.int64).cpu().numpy().tobytes(), checksum)
    return f"{checksum:08x}"


def check_processes_agree(weights, accelerator):
    """ValueError if processes have come to different weights. weights: the fingerprint of this one's."""
    if accelerator.num_processes > 1 and len(set(gather_object([weights]))) > 1:
        raise ValueError("processes have come to different weights: they compute otherwise, as other GPUs do")


def run_identity(config, model, prompts, items, free_keys):
    """What must not change when a run is resumed: {key: value} of the config and of what it starts from.

    prompts: token ids of all problems; items: the problems
    """
    values = {key: value for key, value in dataclasses.asdict(config).items() if key not in FREE_KEYS | free_keys}
    problems = json.dumps([prompts, items], default=lambda value: type(value).__name__).encode()
    weights = fingerprint(dict(model.named_parameters()))
    return {**values, "starting weights": weights, "problems": f"{zlib.crc32(problems):08x}"}


def check_same_run(ours, theirs, file):
    """ValueError if a run with the identity `ours` cannot go on from a file of one with the identity `theirs`."""
    for key in ours | theirs:
        a, b = ours.get(key), theirs.get(key)
        if a != b:
            raise ValueError(
                f"resume: {file}: {key}: {a!r}, but that run was started with {b!r}; another run needs another run_name"
            )


def seal(content):
    """A dict of JSON values as one line of bytes that holds a digest of itself."""
    return json.dumps({**content, "sha256": _digest(content)}).encode() + b"\n"


def unseal(line):
    """What was sealed; ValueError if it is not what it was."""
    try:
        content = json.loads(line)
        if content.pop("sha256") == _digest(content):
            return content
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError):  # anything but a sealed line
        pass
    raise ValueError("damaged")


def _digest(content):
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def checkpoint_folders(folder):
    """{step: path} of a run's checkpoints, newest first."""
    paths = {int(match[1]): path for path in (folder / "checkpoints").glob("*") if (match := STEP.fullmatch(path.name))}
    return dict(sorted(paths.items(), reverse=True))


STEP = re.compile(r"step_(\d+)")


def save_checkpoint(folder, step, state, keep, write):
    """`folder/checkpoints/step_000020`: what `write(path)` writes there, and `state`, {name: JSON value}.

    It is complete and on disk or not there at all; then all go but the newest `keep` up to this one. Returns what is
    wrong if it cannot be saved, as when the disk is full, or None.
    """
    path = folder / "checkpoints" / f"step_{step:06d}"
    with contextlib.suppress(ValueError):
        if read_state(path) == state:  # it is there already: what is whole is not written again
            return None
    try:
        with whole_folder(path) as partial:
            write(partial)
            digests = {}
            for file in sorted(file for file in partial.rglob("*") if file.is_file()):
                with open(file, "rb") as data:
                    digests[str(file.relative_to(partial))] = hashlib.file_digest(data, "sha256").hexdigest()
            (partial / "state.json").write_bytes(seal({"state": state, "sha256 of files": digests}))
    except OSError as error:
        say(f"warning: {error}; training goes on")
        return str(error)
    paths = checkpoint_folders(folder)
    later = [path for other, path in paths.items() if other > step]  # damaged, or of steps that the log has lost
    earlier = [path for other, path in paths.items() if other <= step][keep:]
    for old in [*(folder / "checkpoints").glob("*.partial"), *later, *earlier]:  # partial: left by a kill
        partial = old if old.suffix == ".partial" else Path(f"{old}.partial")  # so that half of it is no checkpoint
        try:
            os.replace(old, partial)
            shutil.rmtree(partial)
        except OSError as error:
            say(f"warning: {old} cannot be removed: {error}")
    return None


def read_state(path):
    """The state in a checkpoint. ValueError, naming the file, if any of its files is not as it was saved."""
    try:
        content = unseal((path / "state.json").read_bytes())
    except (OSError, ValueError):
        raise ValueError(f"{path / 'state.json'} is damaged or missing") from None
    for name, digest in content["sha256 of files"].items():
        try:
            with open(path / name, "rb") as data:
                whole = hashlib.file_digest(data, "sha256").hexdigest() == digest
        except OSError:
            whole = False
        if not whole:
            raise ValueError(f"{path / name} is damaged or missing")
    return content["state"]


def newest_checkpoint(folder, last_step=math.inf):
    """(path, state) of the newest undamaged checkpoint up to `last_step`, or None. Damaged ones are named."""
    for step, path in checkpoint_folders(folder).items():
        if step <= last_step:
            try:
                return path, read_state(path)
            except ValueError as error:
                print(f"resume: {error}: trying the checkpoint before it")
    return None
