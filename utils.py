"""Code that both scripts share: config, setup, prompts, scores, evaluation, multiple processes.

    config and command line    RunConfig, load_config, run_from_command_line
    setup                      set_up: model, tokenizer, problems with their prompts; fit_to_memory: GRPO's batch sizes
    models and tokenizers      load_model and what it refuses, stop_ids, save_model, fingerprint
    prompts and completions    encode_prompts, completion_texts
    a step                     seeded_generator, draw_problems, schedule_factor; score_completions, non_finite; evaluate
    multiple processes         share, gather_scores, sum_gradients, summarize
To change prompts, edit `encode_prompts`. To add a metric of completions, edit `score_completions`, and
`completion_metrics` in runs.py, which logs it. Elsewhere: the decode loop (generation.py), checkpoints and logs
(runs.py), rewards (reward.py).
"""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import inspect
import math
import operator
import os
import re
import sys
import textwrap
import traceback
import warnings
import zlib
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pydantic
import torch
import transformers
import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from jinja2 import TemplateError
from peft import LoraConfig, PeftConfig, PeftModel
from pydantic import Field, JsonValue, PositiveInt, ValidationError
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from datasets import make_dataset
from generation import LENGTH_BUCKET, DecodeSettings, generate, inner_model
from reward import UserError, lenient_correct, reference_value, score, strict_correct

# Hide the bars of weight loading, and a deprecation warning that PEFT triggers.
transformers.utils.logging.disable_progress_bar()
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)


# --- Config and command line ------------------------------------------------------------------------------------------

HERE = Path(__file__).parent
for kind in (yaml.SafeLoader, yaml.SafeDumper):  # PyYAML takes 1e-5 for text
    number = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    kind.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))


def beside_script(path):
    """Return a path that exists where the user is, else in this folder, else unchanged."""
    path = os.path.expanduser(path)
    return path if os.path.exists(path) or not (HERE / path).exists() else str(HERE / path)


def is_run(folder):
    return (Path(folder) / "run.lock").exists()


class Config(pydantic.BaseModel):
    """Base of all configs. Unknown keys are errors."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


UserPath = Annotated[str, pydantic.AfterValidator(os.path.expanduser)]


class Example(Config):
    prompt: str
    answer: str  # the whole completion, in the format that the rewards check


class RunConfig(Config):
    """Keys of both scripts. grpo_config.yml and es_config.yml document them."""

    # Model
    model: UserPath = "tiny_model"
    cache_dir: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    cuda_graphs: bool = True
    # Task
    dataset: UserPath = "math_expr"
    dataset_args: dict[str, JsonValue] = {}
    system_prompt: str = "Think step by step in <think></think>, then answer in <answer></answer>."
    chat_template_kwargs: dict[str, JsonValue] = {}
    examples: list[Example] = []
    stop: list[Annotated[str, Field(min_length=1)]] = []
    rewards: Annotated[
        dict[str, float],
        Field(min_length=1),
        pydantic.BeforeValidator(lambda value: {value: 1.0} if isinstance(value, str) else value),
    ] = {"accuracy": 1.0, "format": 0.1}
    max_new_tokens: PositiveInt = 96
    # Evaluation, checkpoints, logs, seed
    eval_size: PositiveInt = 512
    eval_every: PositiveInt = 20
    checkpoint_every: PositiveInt = 20
    keep_checkpoints: PositiveInt = 2
    max_skipped_steps: PositiveInt = 10
    log_dir: UserPath
    run_name: str | None = None
    resume: Literal["auto", "never"] = "auto"
    seed: int = Field(0, ge=0, lt=2**32)


def config_text(config):
    return yaml.safe_dump(config.model_dump(), sort_keys=False)


def one_line(error):
    return textwrap.shorten(str(error), 600, placeholder=" ...")


def load_config(config_class, path, overrides=()):
    """Load a `config_class` from a YAML file, and apply "key=value" or "key.subkey=value" overrides.

    Missing keys take their defaults. The config.yml of a run resumes the run in its folder, wherever that was moved.
    Raise UserError with file, key, value and what was expected.
    """
    source, folder = path, Path(path).resolve().parent
    try:
        values = yaml.safe_load(Path(path).read_text("utf-8-sig"))
        values = {} if values is None else values
        if Path(path).name == "config.yml" and (is_run(folder) or (folder / "checkpoints").exists()):
            values |= {"log_dir": str(folder.parent), "run_name": folder.name}
        for override in overrides:
            source = f"command line: {override}"
            key, equals, text = override.partition("=")
            *parents, last = key.split(".")
            target = values
            for parent in parents:
                target = target.setdefault(parent, {})
            if not equals or not isinstance(target, dict):
                raise UserError(f"{source}: expected key=value, or key.subkey=value where key is a mapping")
            target[last] = override_value(text, config_class.model_fields.get(key))
    except (OSError, ValueError, RecursionError, AttributeError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"{source}: {one_line(error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of keys to values, not {type(values).__name__}")
    try:
        return config_class.model_validate(values)
    except ValidationError as error:
        message = _describe(error.errors()[0], config_class)
        is_override = any(re.match(rf"{re.escape(override.partition('=')[0])}[.:]", message) for override in overrides)
        raise UserError(f"{'command line' if is_override else path}: {message}") from None


def override_value(text, field):
    """Return the value that a text on the command line stands for. Keys with text values take it as it is."""
    if text in ("null", "None"):
        return None
    if field and field.annotation in (str, str | None) and text[:1] not in ("'", '"'):
        return text
    if not text:
        raise ValueError("expected a value after =; null stands for none")
    if re.fullmatch(r"0\d+|\d+(:\d+)+", text):  # YAML would take 010 for 8 and 1:30 for 90
        return text
    is_plain = text.startswith("{") and not {"'", '"'} & set(text)
    return yaml.safe_load(re.sub(r":(?=-?[.\d]|true|false)", ": ", text) if is_plain else text)


def _describe(error, config_class):
    """Format one of pydantic's errors as "key: value: what was expected"."""
    if error["type"] == "value_error":  # raised by one of our validators
        return str(error["ctx"]["error"])
    message = error["msg"].replace("Input should", "should")
    if error["type"] == "extra_forbidden":
        *parents, name = error["loc"]
        known = functools.reduce(operator.getitem, parents, config_class().model_dump())
        near = [key for key in known if "".join(word[0] for word in key.split("_")) == name]  # lr: learning_rate
        near = near[:1] or difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
        near = ".".join(map(str, [*parents, *near])) if near else None
        message = f"unknown key, did you mean {near}?" if near else f"unknown key, the keys are {', '.join(known)}"
    return one_line(f"{'.'.join(map(str, error['loc']))}: {str(error['input'])[:100]}: {message}")


def run_from_command_line(main, config_class, default_path):
    """Call `main(config)` with the config from the command line.

    UserError, a full disk and running out of GPU memory exit with a one-line error. Other exceptions show a traceback.
    """
    parser = argparse.ArgumentParser(description=(sys.modules["__main__"].__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", default=default_path, help="YAML file (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config keys to override, see the YAML file")
    # Accept --key=value, too.
    arguments = parser.parse_args([re.sub(r"^--(?!config\b|help\b)", "", argument) for argument in sys.argv[1:]])
    sys.stdout.reconfigure(line_buffering=True, errors="replace")  # a log file can be followed; any text can be printed
    sys.path.append(os.getcwd())  # for modules of reward functions, if the script is elsewhere
    try:
        main(load_config(config_class, beside_script(arguments.config), arguments.overrides))
    except UserError as error:
        sys.exit(f"error: {error}")
    except torch.OutOfMemoryError as error:
        sys.exit(f"error: out of GPU memory: lower max_new_tokens or the keys of Memory and speed ({one_line(error)})")
    except Exception as error:  # libraries raise different exceptions for a full disk
        is_full = re.search("No space left on device|Disk quota exceeded|File too large", str(error))
        if not is_full or score.__code__ in (frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)):
            raise  # not while this project writes: a bug, or an error in a reward function
        sys.exit(f"error: the disk is full: {one_line(error)}; earlier checkpoints are intact")


def say(text):
    """Print a line above the progress bar, if anyone reads the output."""
    with contextlib.suppress(OSError):  # the reader of a pipe may be gone
        tqdm.write(text)


@functools.cache
def say_once(text):
    """Print a line once, from the first process only."""
    if int(os.environ.get("RANK", 0)) == 0:
        say(text)


# --- Setup ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Problem:
    item: dict  # "prompt", "answer" and the dataset's other columns
    ids: list[int]  # the prompt's tokens


@dataclasses.dataclass
class Setup:
    accelerator: Accelerator
    model: torch.nn.Module
    tokenizer: object
    train_set: list[Problem]
    test_set: list[Problem]  # held out
    settings: DecodeSettings
    stop: list[str] = dataclasses.field(default_factory=list)  # the config's texts that end a completion


def set_up(config, weights_dtype, autocast=False, **settings):
    """Load dataset, tokenizer and model as configured. settings: further fields of DecodeSettings"""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda: PyTorch finds no GPU; use cpu or auto")
    # Without cpu=True, processes on a CPU would not form a group.
    on_cpu = config.device == "cpu" or not torch.cuda.is_available()
    for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "LOCAL_RANK"):
        is_set = os.environ.get(name, "1") != "1" or name == "LOCAL_RANK" and name in os.environ
        if is_set and not {"RANK", "MASTER_ADDR"} <= os.environ.keys():
            raise UserError(f"the environment has {name}={os.environ[name]}: start with torchrun, or unset {name}")
    accelerator = Accelerator(cpu=on_cpu, mixed_precision="bf16" if autocast else "no")
    try:
        splits = [make_dataset(config.dataset, split, config.dataset_args) for split in ("train", "test")]
    except ValidationError as error:
        raise UserError(f"dataset_args: {_describe(error.errors()[0], type(config))}") from None
    train_items, test_items = splits[0], splits[1][: config.eval_size]
    # Call the reward functions once, since a mistake in them should not show after minutes of loading.
    score(config.rewards, ["<think>1+1=2</think><answer>2</answer>", ""], [train_items[0]] * 2)
    known = {item["prompt"] for item in train_items}
    num_shared = sum(item["prompt"] in known for item in test_items)
    if num_shared:
        say_once(f"{num_shared:,} of {len(test_items):,} held-out problems are also in the training set")
    if len(test_items) < accelerator.num_processes:
        raise UserError(f"eval_size: {len(test_items)} held-out problems: expected at least 1 for each process")
    set_seed(config.seed)  # determines an adapter's initial weights in every process
    model = load_model(config.model, weights_dtype, accelerator.device, config.cache_dir)
    tokenizer = load_tokenizer(config.model, config.cache_dir, config.chat_template_kwargs)
    train_set, test_set = (
        list(map(Problem, items, encode_prompts(tokenizer, items, config.system_prompt, config.examples)))
        for items in (train_items, test_items)
    )
    check_problems(train_set + test_set, model, tokenizer, config)
    ends = stop_ids(model, tokenizer)
    if not ends:
        raise UserError(f"model: {config.model!r}: neither its tokenizer nor its generation config has an end token")
    texts = [*config.stop, *([NEXT_TURN] if tokenizer.chat_template is None else [])]
    size = model.get_input_embeddings().num_embeddings
    table = stop_table(tokenizer, texts, size).to(accelerator.device) if texts else None
    decoding = DecodeSettings(config.max_new_tokens, ends, table, cuda_graphs=config.cuda_graphs, **settings)
    return Setup(accelerator, model, tokenizer, train_set, test_set, decoding, config.stop)


def check_problems(problems, model, tokenizer, config):
    """Raise UserError if the model cannot process the prompts. Report reference answers that are not values."""
    longest = max(problems, key=lambda problem: len(problem.ids))
    if not all(problem.ids for problem in problems):
        raise UserError(f"model: {config.model!r}: its tokenizer finds no tokens in a prompt; are its files complete?")
    limit = getattr(inner_model(model).config.get_text_config(), "max_position_embeddings", None)
    if limit and len(longest.ids) + config.max_new_tokens > limit:
        prompt = f"a prompt of {len(longest.ids)} tokens, {one_line(longest.item['prompt'])[:60]!r},"
        too_long = f"{prompt} plus its completion exceeds the model's {limit} positions"
        raise UserError(f"max_new_tokens: {config.max_new_tokens}: {too_long}")
    size, largest = model.get_input_embeddings().num_embeddings, max(max(problem.ids) for problem in problems)
    if largest >= size:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise UserError(f"model: token {token!r} ({largest}) of its tokenizer exceeds its {size:,} embeddings")
    references = [problem.item["answer"] for problem in problems]
    texts = [reference for reference in references if reference_value(reference) is None]
    if texts:
        kind = "are not numbers or polynomials and are compared as text"
        say_once(f"{len(texts):,} of {len(references):,} reference answers {kind}, such as {texts[0][:80]!r}")


def fit_to_memory(config, policy, longest_prompt, free):
    """Return the GRPOConfig with numbers for `auto` in micro_batch_tokens and generation_batch_size.

    free: bytes of the GPU, or None on a CPU, where batches should fit its caches
    The sizes share four fifths of the free bytes, up to the size of a step. A position of the backward pass takes 1.5
    times the bytes in the comment of grpo_config.yml; a row has its cache, its logits and its prefill's activations.
    """
    auto = [key for key in ("micro_batch_tokens", "generation_batch_size") if getattr(config, key) == "auto"]
    found = {"micro_batch_tokens": 4096, "generation_batch_size": 256}
    if free is None or not auto:
        return config.model_copy(update={key: found[key] for key in auto})
    shape, size = policy.config.get_text_config(), {"float32": 4, "bfloat16": 2}[config.dtype]
    L, hidden = shape.num_hidden_layers, shape.hidden_size
    inner = getattr(shape, "intermediate_size", 4 * hidden)
    num_slots, num_rows = longest_prompt + config.max_new_tokens, config.prompts_per_step * config.group_size
    head_dim = getattr(shape, "head_dim", None) or hidden // shape.num_attention_heads
    kv_heads = getattr(shape, "num_key_value_heads", shape.num_attention_heads)
    cache = 2 * size * L * kv_heads * head_dim * (num_slots + LENGTH_BUCKET + longest_prompt)
    per_row = cache + 12 * shape.vocab_size + size * longest_prompt * (3 * inner + 2 * hidden)
    per_layer = 44 * hidden + 8 * inner if size == 2 else 63 * hidden + 16 * inner
    per_position = 1.5 * (L * size * hidden + per_layer if config.gradient_checkpointing else L * per_layer)
    num_trained = sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)
    budget = 0.8 * free - 12 * num_trained - 2**29  # gradient and AdamW's moments; chunks of logits
    rows = min(max(num_rows, config.eval_size), int(0.4 * budget / per_row))
    tokens = min(num_rows * num_slots, int((budget - rows * per_row) / per_position))
    if rows < 1 or tokens < 1:
        raise UserError(f"micro_batch_tokens: auto: {free / 2**30:.1f} GiB of free GPU memory are too little")
    found = {"micro_batch_tokens": tokens, "generation_batch_size": rows}
    config = config.model_copy(update={key: found[key] for key in auto})
    sizes = f"{config.micro_batch_tokens:,}, generation_batch_size {config.generation_batch_size:,}"
    say_once(f"memory  micro_batch_tokens {sizes}")
    return config


# --- Models and tokenizers --------------------------------------------------------------------------------------------


def load_model(name, dtype, device, cache_dir=None):
    """Load a causal language model or an adapter with its base model, from a folder or the Hugging Face hub.

    The model stays in eval mode: with dropout, the scored policy would not be the sampled one.
    """
    # cuDNN attention builds a plan for each shape, and decoding keeps changing shapes. Also, its gradients can be NaN.
    torch.backends.cuda.enable_cudnn_sdp(False)
    name = beside_script(name)
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) and not Path(name).is_dir():  # misspelled: do not query the hub
        raise UserError(f"model: {name!r}: no such folder; a name on the hub has the form owner/model")
    if is_run(name):
        raise UserError(f"model: {name!r} is a run; its model is {Path(name) / 'model'}")
    options = {"dtype": getattr(torch, dtype), "cache_dir": cache_dir, "output_loading_info": True}
    source = f"model: {name!r}: "
    try:
        is_adapter = (Path(name) / "adapter_config.json").is_file()
        adapter = PeftConfig.from_pretrained(name) if is_adapter else None
        is_list = isinstance(adapter, LoraConfig) and not isinstance(adapter.target_modules, str)
        if is_adapter and (not is_list or adapter.bias != "none"):
            raise ValueError("expected a LoRA adapter with a list of names as target_modules, and without bias")
        base_name = beside_script(adapter.base_model_name_or_path) if is_adapter else name
        source += f"its base model {base_name!r}: " if is_adapter else ""
        settings = AutoConfig.from_pretrained(base_name, cache_dir=cache_dir, trust_remote_code=False)
        if getattr(settings, "quantization_config", None):
            raise ValueError("its weights are quantized; expected the model in bf16 or fp32")
        settings._attn_implementation = None  # SDPA if the model supports it, whatever its config says
        model, info = AutoModelForCausalLM.from_pretrained(base_name, config=settings, **options)
        check_decodable(model)
        check_tied_head(model, adapter.target_modules if is_adapter else [])
        source = f"model: {name!r}: "
        if is_adapter:
            model = PeftModel.from_pretrained(model, name, is_trainable=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        needs_code = "trust_remote_code" in str(error)
        reason = "it needs Python code of its own, which this project does not run" if needs_code else one_line(error)
        raise UserError(f"{source}{reason}") from None
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(f"model: {name!r}: {len(missing)} of its weights are missing, such as {missing[0]}")
    return model.to(device).eval()


def check_decodable(model):
    """Raise ValueError if a layer is not full or sliding-window SDPA, or if forward() lacks a needed argument."""
    needed = {"input_ids", "attention_mask", "position_ids", "past_key_values", "logits_to_keep"}
    missing = sorted(needed - inspect.signature(model.forward).parameters.keys())
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or [])
    kinds = sorted(kinds - {"full_attention", "sliding_attention"})
    has_sdpa = model.config._attn_implementation == "sdpa"
    if missing or kinds or not has_sdpa:
        reason = f"forward() without {', '.join(missing)}" if missing else "no SDPA attention"
        reason = f"layers of kind {', '.join(kinds)}" if kinds else reason
        raise ValueError(f"{type(model).__name__} is not supported: {reason}")


def check_tied_head(model, targets):
    """Raise UserError if an adapter targets lm_head or the embedding and they share a weight: merging changes both."""
    pair = model.get_output_embeddings(), model.get_input_embeddings()
    names = [name for name, module in model.named_modules() if module in pair]
    for target in targets if pair[0].weight is pair[1].weight else []:
        if any(f".{name}".endswith(f".{target}") for name in names):
            raise UserError(f"lora.target_modules: {target}: the model's lm_head and embedding share their weight")


def load_tokenizer(name, cache_dir=None, template_kwargs=None):
    """Load the model's tokenizer, and bind `template_kwargs` to its chat template. Report unusual templates once."""
    name = beside_script(name)
    if (Path(name) / "adapter_config.json").is_file() and not (Path(name) / "tokenizer_config.json").is_file():
        name = beside_script(PeftConfig.from_pretrained(name).base_model_name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, cache_dir=cache_dir, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"model: {name!r} has no tokenizer: {one_line(error)}") from None
    for key in template_kwargs or {}:
        is_used = re.search(rf"\b{re.escape(key)}\b", tokenizer.chat_template or "")
        if not is_used or key in ("messages", "add_generation_prompt"):
            raise UserError(f"chat_template_kwargs: {key}: the model's chat template has no such argument")
    # Templates that insert today's date use date_string if given: a run that resumes tomorrow needs the same prompts.
    arguments = {"date_string": "26 Jul 2024", **(template_kwargs or {})}
    tokenizer.apply_chat_template = functools.partial(tokenizer.apply_chat_template, **arguments)
    if tokenizer.chat_template is None:
        say_once(f"{name} has no chat template: using plain-text prompts, {PLAIN_TURN!r}, until {NEXT_TURN!r}")
    elif answer_start(tokenizer):
        say_once(f"the chat template starts every answer with {answer_start(tokenizer)}, which counts as part of it")
    return tokenizer


def stop_ids(model, tokenizer):
    """Return all ids that end a completion.

    They are the end tokens of generation config and tokenizer, and the token with which the chat template ends a turn.
    """
    ids = model.generation_config.eos_token_id
    ids = {*(ids if isinstance(ids, list) else [ids]), tokenizer.eos_token_id}
    if tokenizer.chat_template is not None:
        answer = "(an answer)"
        chat = [{"role": "user", "content": "(a question)"}, {"role": "assistant", "content": answer}]
        try:
            text = _apply_template(tokenizer, [chat], add_generation_prompt=False)[0]
        except UserError:  # the template requires a question at the end
            text = ""
        after = tokenizer(text.partition(answer)[2], add_special_tokens=False).input_ids
        ids |= {id for id in after[:1] if id in tokenizer.added_tokens_decoder}
    return sorted(ids - {None})


def stop_table(tokenizer, texts, num_tokens):
    """Return the automaton that finds the first of `texts` in sampled tokens, however they are split: (S + 1, V) int16.

    Its S states are the beginnings of the texts: the longest one with which the tokens so far end. Entry (s, v) is the
    state that follows s after token v. State 0 is the start, state S has found a text. Raise UserError for texts that
    it cannot find: special tokens, which have no text, and characters that the tokenizer splits into bytes.
    """
    begun = sorted({text[:length] for text in texts for length in range(len(text))}, key=len)
    last, ends = len(begun), {text[-1] for text in texts}

    def state_after(text):
        if any(stop in text for stop in texts):
            return last
        return max(state for state, beginning in enumerate(begun) if text.endswith(beginning))

    # Decode each token after another one, since some tokenizers strip the space before the first.
    anchor = tokenizer("a", add_special_tokens=False).input_ids[-1]
    start = len(tokenizer.decode([anchor]))
    pairs = tokenizer.batch_decode([[anchor, token] for token in range(len(tokenizer))], skip_special_tokens=True)
    table = torch.zeros(last + 1, num_tokens, dtype=torch.int16)
    for token, pair in enumerate(pairs[:num_tokens]):
        piece = pair[start:]
        if piece.endswith(tuple(begun[1:])) or any(end in piece for end in ends) or any(piece in t for t in texts):
            table[:last, token] = torch.tensor([state_after(beginning + piece) for beginning in begun])
    for text in texts:
        state = 0
        for token in tokenizer(text, add_special_tokens=False).input_ids:
            state = last if state == last else int(table[state, token])
        if state != last:
            raise UserError(f"stop: {text!r}: the tokenizer has no tokens for this text; special tokens have no text")
    return table


@torch.no_grad()
def check_chunked_head(model):
    """Raise UserError if the model's logits are not lm_head(last hidden state), for example if they are scaled."""
    network = inner_model(model)
    ids = torch.arange(8, device=model.device)[None]
    logits = network(input_ids=ids, use_cache=False).logits.float()
    hidden = network.base_model(input_ids=ids, use_cache=False).last_hidden_state
    if not torch.allclose(network.get_output_embeddings()(hidden).float(), logits, atol=1e-3, rtol=1e-3):
        name = type(network).__name__
        raise UserError(f"model: {name} changes its logits after lm_head, so they cannot be computed in chunks")


def save_model(model, tokenizer, folder, weights=None):
    """Save model or adapter, and tokenizer, as a Hugging Face folder. weights: replace the model's own if given"""
    # Save only the trained adapter, not the reference. save_embedding_layers=False keeps PEFT from querying the hub.
    peft = {"selected_adapters": ["default"], "save_embedding_layers": False} if isinstance(model, PeftModel) else {}
    model.save_pretrained(folder, state_dict=weights, **peft)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def load_weights(folder, weights):
    """Load the weights that `save_model` wrote into {name: tensor}, in place."""
    saved = dict(load_model(str(folder), "float32", "cpu").named_parameters())
    for name, weight in weights.items():
        weight.copy_(saved[name])


def fingerprint(weights):
    """Return eight hex digits that depend on every bit of {name: tensor}: a checksum of row and column sums."""
    checksum = 0
    for weight in weights.values():
        bits = weight.detach().view({2: torch.int16, 4: torch.int32}[weight.element_size()]).reshape(len(weight), -1)
        for dim in (0, 1):
            checksum = zlib.crc32(bits.sum(dim, dtype=torch.int64).cpu().numpy().tobytes(), checksum)
    return f"{checksum:08x}"


# --- Prompts and completions ------------------------------------------------------------------------------------------

PLAIN_TURN = "User: {}\n\nAssistant:"  # for base models without a chat template
NEXT_TURN = "\n\n" + PLAIN_TURN.partition(" ")[0]  # where such a model's completion ends; not part of its text


def encode_prompts(tokenizer, items, system_prompt, examples=()):
    """Encode each item's prompt: system prompt, examples as earlier turns, problem, start of the answer.

    Use the chat template, or plain text if there is none. If the template has no system message, prepend the system
    prompt to the first user message. Raise UserError if the template drops a problem or an example.
    """
    prompts = [item["prompt"] for item in items]
    if tokenizer.chat_template is None:
        end = tokenizer.eos_token or ""  # teaches the model to end its answer
        turns = [f"{PLAIN_TURN.format(example.prompt)} {example.answer}{end}" for example in examples]
        turns = ([system_prompt] if system_prompt else []) + turns
        texts = ["\n\n".join([*turns, PLAIN_TURN.format(prompt)]) for prompt in prompts]
        return tokenizer(texts).input_ids  # the tokenizer adds its special tokens
    turns = [(("user", example.prompt), ("assistant", example.answer)) for example in examples]
    turns = [{"role": role, "content": content} for pair in turns for role, content in pair]
    chats = [[*turns, {"role": "user", "content": prompt}] for prompt in prompts]
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    try:
        texts = _apply_template(tokenizer, [system + chat for chat in chats])
        is_shown = all(system_prompt.strip() in text for text in texts)
    except UserError:
        if not system_prompt:
            raise
        is_shown = False
    if not is_shown:
        chats = [[{**first, "content": f"{system_prompt}\n\n{first['content']}"}, *rest] for first, *rest in chats]
        texts = _apply_template(tokenizer, chats)
        say_once("the chat template has no system message: prepending the system prompt to the first user message")
    shown = zip(([prompt, *(turn["content"] for turn in turns)] for prompt in prompts), texts, strict=True)
    lost = next((turn for contents, text in shown for turn in contents if turn.strip() not in text), None)
    if lost is not None:
        raise UserError(f"model: its chat template drops this text: {one_line(lost)[:80]!r}")
    return tokenizer(texts, add_special_tokens=False).input_ids  # the template has added them


def _apply_template(tokenizer, chats, add_generation_prompt=True):
    try:
        return tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        raise UserError(f"model: its chat template fails: {one_line(error)}") from None


def answer_start(tokenizer):
    """Return the think tags with which the chat template starts each answer.

    They are "<think>" for reasoning models, "<think></think>" with thinking disabled, else "". The completion does not
    include them, but the scored text does.
    """
    if tokenizer.chat_template is None:
        return ""
    text = _apply_template(tokenizer, [[{"role": "user", "content": "?"}]])[0]
    found = re.search(r"<think>\s*(</think>)?\s*$", text)
    return "".join(found[0].split()) if found else ""


def completion_texts(completions, tokenizer, stop=()):
    """Return the text of each completion: up to and including a text in `stop`, or up to the next plain-text turn."""
    columns = completions.tokens.cpu(), completions.mask.cpu()  # one transfer instead of one per row
    rows = [tokens[mask].tolist() for tokens, mask in zip(*columns, strict=True)]
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    if tokenizer.chat_template is None:
        texts = [text.partition(NEXT_TURN)[0] for text in texts]
    for end in stop:
        texts = ["".join(text.partition(end)[:2]) for text in texts]
    start = answer_start(tokenizer)
    return [start + text for text in texts]


# --- A step -----------------------------------------------------------------------------------------------------------


def seeded_generator(seed, stream, index=0, device="cpu"):
    """Return a generator that depends only on its arguments, so that checkpoints need no random state.

    stream: the purpose of the numbers; index: tells generators of one stream apart, for example the step
    """
    assert 0 <= index < 2**32, index
    low, high = map(int, np.random.SeedSequence([seed, zlib.crc32(stream.encode())]).generate_state(2))
    # torch's CPU generator reads only the low 32 bits of a seed. Adding the index gives each generator its own.
    return torch.Generator(device).manual_seed((high >> 1) << 32 | (low + index) % 2**32)


def draw_problems(problems, start, count, seed):
    """Return the next `count` problems after the first `start`. Each epoch passes over all problems in a new order."""
    drawn = []
    while len(drawn) < count:
        epoch, offset = divmod(start + len(drawn), len(problems))
        order = torch.randperm(len(problems), generator=seeded_generator(seed, "data", epoch)).tolist()
        drawn += [problems[i] for i in order[offset : offset + count - len(drawn)]]
    return drawn


def schedule_factor(schedule, step, num_steps, warmup_steps=0):
    """Return the schedule's factor at `step`: linear warmup, then "constant", or "linear" or "cosine" decay.

    Decay would reach 0 at num_steps, which is after the last step, so the factor is never 0.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    share_done = (step - warmup_steps) / (num_steps - warmup_steps)
    return {"constant": 1.0, "linear": 1 - share_done, "cosine": (1 + math.cos(math.pi * share_done)) / 2}[schedule]


def score_completions(rewards, completions, setup, problems):
    """Score the i-th completion for the i-th problem with the reward functions {name: weight}.

    Return the B dicts of `reward.score` plus "length" in tokens, "truncated" (0 or 1) and the sampler's "log_prob".
    """
    texts = completion_texts(completions, setup.tokenizer, setup.stop)
    rows = score(rewards, texts, [problem.item for problem in problems])
    columns = completions.mask.sum(1), completions.truncated, completions.log_probs.sum(1)
    for row, *values in zip(rows, *(column.tolist() for column in columns), strict=True):
        row |= zip(("length", "truncated", "log_prob"), map(float, values), strict=True)
    return rows


def non_finite(scores):
    """Describe the first non-finite score in {name: (B,)}, or return None."""
    for name, values in scores.items():
        if not values.isfinite().all():
            row = int((~values.isfinite()).nonzero()[0])
            return f"{name} of completion {row} is {float(values[row])}"
    return None


def evaluate(setup):
    """Evaluate the model on the held-out problems with greedy decoding, split among the processes.

    Return {name: mean over all problems} (strict and lenient accuracy and the truncated share in [0, 1], length in
    tokens), and the items of this process with their completions.
    """
    accelerator = setup.accelerator
    problems = setup.test_set[accelerator.process_index :: accelerator.num_processes]
    with accelerator.autocast():
        completions = generate(setup.model, [problem.ids for problem in problems], setup.settings)
    texts = completion_texts(completions, setup.tokenizer, setup.stop)
    items = [problem.item for problem in problems]
    answers = [item["answer"] for item in items]
    sums = {
        "strict_accuracy": sum(map(strict_correct, texts, answers)),
        "lenient_accuracy": sum(map(lenient_correct, texts, answers)),
        "length": int(completions.mask.sum()),
        "truncated": int(completions.truncated.sum()),
    }
    totals = torch.tensor(list(sums.values()), dtype=torch.float64, device=accelerator.device)
    means = (accelerator.reduce(totals) / len(setup.test_set)).tolist()
    return dict(zip(sums, means, strict=True)), items, texts


# --- Multiple processes -----------------------------------------------------------------------------------------------


def share(count, accelerator):
    """Return this process's slice of a step's `count` prompts or members."""
    world, process = accelerator.num_processes, accelerator.process_index
    if count < world:
        raise UserError(f"{count} prompts or members per step: expected at least 1 for each of {world} processes")
    return slice(process * count // world, (process + 1) * count // world)


def gather_scores(rows, device):
    """Return the scores of all processes, in rank order: {name: (B,) fp32}. rows: dicts of this process"""
    rows = gather_object(rows)
    return {name: torch.tensor([row[name] for row in rows], device=device) for name in rows[0]}


def sum_gradients(parameters, accelerator):
    """Sum the gradients of all processes in one all-reduce. A process without rows in the loss contributes zeros."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if accelerator.num_processes == 1:
        return
    flat = accelerator.reduce(torch.cat([p.grad.flatten() for p in parameters]), reduction="sum")
    for parameter, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = grad.view_as(parameter)


def summarize(values, extremes):
    """Return the means of {name: list of 1-D tensors} over all processes, and NAME_min and NAME_max of `extremes`.

    Omit names without values.
    """
    ours = {name: torch.cat(parts).float() for name, parts in values.items()}
    rows = [(name, float(x.sum()), len(x), *map(float, x.aminmax())) for name, x in ours.items() if len(x)]
    parts, summary = {}, {}
    for name, *row in gather_object(rows):
        parts.setdefault(name, []).append(row)
    for name, part in parts.items():
        totals, counts, lows, highs = zip(*part, strict=True)
        summary[name] = sum(totals) / sum(counts)
        if name in extremes:
            low, high = torch.tensor(lows).min().item(), torch.tensor(highs).max().item()  # NaN if any is
            summary |= {f"{name}_min": low, f"{name}_max": high}
    return summary
