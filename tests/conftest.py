import contextlib
import dataclasses
import functools
import hashlib
import math
import multiprocessing
import os
import random
import resource
import runpy
import signal
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import MagicMock

os.environ["HF_HUB_OFFLINE"] = "1"  # read at import: no test may wait for the network
os.environ["OMP_NUM_THREADS"] = "1"  # read at import, too: the number of threads changes the last bits of sums

import hypothesis
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import es_train
import grpo_train
import runs
from generation import DecodeSettings
from runs import checkpoint_folders, newest_checkpoint
from utils import load_config

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
for number in runs.STOP_SIGNALS[1:]:  # nohup makes processes ignore them
    signal.signal(number, signal.SIG_DFL)

ROOT = Path(__file__).resolve().parent.parent
GSM8K = ROOT.parent / "shared" / "gsm8k"
TINY = str(ROOT / "tiny_model")
EOS, PAD, VOCAB = 1, 0, 64
FORKSERVER = multiprocessing.get_context("forkserver")  # its processes start with torch already imported
FORKSERVER.set_forkserver_preload(["es_train", "grpo_train", "pytest"])

NUM_EXAMPLES = int(os.environ.get("HYPOTHESIS", 30))  # set HYPOTHESIS=10000 for more, random examples
checks = {"deadline": None, "database": None, "suppress_health_check": list(hypothesis.HealthCheck)}
hypothesis.settings.register_profile("tests", max_examples=NUM_EXAMPLES, derandomize=NUM_EXAMPLES == 30, **checks)
hypothesis.settings.load_profile("tests")


def make_model(seed=0, dtype=torch.float32, family="qwen2", **settings):
    """Make a random model with grouped-query attention and weights large enough that its samples do not collapse."""
    torch.manual_seed(seed)
    families = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}
    families["gemma3"] = (Gemma3TextConfig, Gemma3ForCausalLM)
    config_class, model_class = families[family]
    size = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    tokens = {"bos_token_id": None, "eos_token_id": EOS, "pad_token_id": PAD}
    more = {"initializer_range": 0.15, "tie_word_embeddings": True}
    if family == "gemma3":  # one layer of each kind
        more |= {"head_dim": 8, "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]}
    return model_class(config_class(**size | heads | tokens | more | settings)).to(dtype).eval()


def settings(max_new_tokens, stop_ids=(EOS,), **more):
    return DecodeSettings(max_new_tokens, list(stop_ids), **more)


@pytest.fixture
def model():
    return make_model()


@pytest.fixture(autouse=True)
def forget_accelerate():
    """Reset accelerate's global state: the next test would inherit precision and devices from it."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def random_prompts(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCAB, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def oracle_log_probs(model, ids, temperature=1.0):
    """Return log-probs of the next token at every position of one row, in float64 without padding, cache or mask."""
    model64 = make_like(model).double()
    logits = model64(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return (logits / temperature).log_softmax(-1)  # (T, V)


def make_like(model):
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.eval()


def run_as_main(path, arguments, output, environment=(), import_path=(), max_file_size=None, patch=None):
    """Run a script as `python PATH ARGUMENTS` does, with stdout and stderr redirected to two files."""
    for number, file in enumerate(output, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if max_file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_size, max_file_size))
    os.environ.update(environment)
    sys.path[:0] = map(str, import_path)
    sys.argv = [str(path), *arguments]
    if patch:
        patch()
    runpy.run_path(str(path), run_name="__main__")


class Process:
    """A script that runs in its own process, as a user would start it, but without the seconds of importing torch.

    path: the script's file, if it is a copy; rank: the process's rank, if there are several
    import_path: extra folders to import modules from
    max_file_size: maximum size of a file in bytes, to simulate a full disk
    patch: function that the process calls before it runs the script
    """

    def __init__(self, script, folder, *overrides, path=None, rank="", **options):
        self.output = [folder.parent / f"{folder.name}.{stream}{rank}" for stream in ("out", "err")]
        arguments = overrides if overrides[:1] == ("--config",) else [*script.where(folder), *overrides]
        arguments = path or ROOT / f"{script.name}.py", arguments, self.output
        self.process = FORKSERVER.Process(target=run_as_main, args=arguments, kwargs=options)
        self.process.start()

    @property
    def out(self):
        return self.output[0].read_text() if self.output[0].exists() else ""

    @property
    def err(self):
        return self.output[1].read_text() if self.output[1].exists() else ""

    def send_signal(self, number):
        os.kill(self.process.pid, number)

    def wait_until(self, condition, seconds=120):
        limit = time.monotonic() + seconds
        while not condition():
            assert self.process.is_alive() and time.monotonic() < limit, self.err
            time.sleep(0.01)

    def wait(self, seconds=120):
        """Return the exit code."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            raise TimeoutError(self.err)
        return self.process.exitcode


@dataclasses.dataclass
class Script:
    """A training script, with overrides for a run of a few seconds."""

    key: str
    module: object
    config_class: type
    small: list[str]

    @property
    def name(self):
        return self.module.__name__

    def where(self, folder):
        """Return overrides for a small run in `folder`."""
        return [f"model={TINY}", f"log_dir={folder.parent}", f"run_name={folder.name}", "device=cpu", *self.small]

    def config(self, folder, *overrides):
        return load_config(self.config_class, ROOT / f"{self.key}_config.yml", [*self.where(folder), *overrides])

    def train(self, folder, *overrides, stop_after=None):
        """Train in this process. With `stop_after`, stop after that many steps as if a signal had arrived."""
        AcceleratorState._reset_state(reset_partial_state=True)
        with pytest.MonkeyPatch.context() as patch:
            if stop_after is not None:
                received = MagicMock()  # mock of the list of received signals, of which a run takes the first
                received.__getitem__.side_effect = [[]] * stop_after + [[signal.SIGTERM]]
                patch.setattr(runs, "stop_signals", lambda: contextlib.nullcontext(received))
            with contextlib.nullcontext() if stop_after is None else pytest.raises(SystemExit, match="^143$"):
                self.module.main(self.config(folder, *overrides))
        return folder


GRPO = "num_steps=4 prompts_per_step=4 group_size=4 max_new_tokens=32 warmup_steps=0 lora.rank=4"
ES = "num_steps=4 prompts_per_step=4 population_size=6 population_batch=4 max_new_tokens=40 noise_scale=0.03"
EVERY = " dataset_args.size=100 eval_size=8 eval_every=2 checkpoint_every=2"
SCRIPTS = {
    "grpo": Script("grpo", grpo_train, grpo_train.GRPOConfig, (GRPO + EVERY).split()),
    "es": Script("es", es_train, es_train.ESConfig, (ES + EVERY).split()),
}


@pytest.fixture(params=SCRIPTS)
def script(request):
    return SCRIPTS[request.param]


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Train each script without interruption and return {key: folder}. Tests copy a folder before they modify it."""
    folder = tmp_path_factory.mktemp("finished")
    return {key: script.train(folder / key) for key, script in SCRIPTS.items()}


def model_weights(folder, name="model"):
    """Return the trained weights of a run, {name: tensor}."""
    (file,) = (folder / name).glob("*.safetensors")
    return load_file(file)


def assert_same_weights(folder, other, read=model_weights):
    ours, theirs = read(folder), read(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def last_step(folder):
    """Step of the newest checkpoint."""
    return max(checkpoint_folders(folder), default=0)


def files_of(folder):
    """Return {path: checksum} for all files in the folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def flip_a_bit(file, seed=0):
    rng, data = random.Random(seed), bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def assert_same_run(folder, other):
    """Assert that last and best weights, the last checkpoint and all scalars except times are bit-identical.

    Each step must be logged once. In by_tokens, a resumed run may repeat a point, because several evaluations fall
    within the same thousand tokens.
    """
    assert_same_weights(folder, other)
    best, other_best = (run / "best" / "evaluation.json" for run in (folder, other))
    assert best.exists() == other_best.exists()
    if best.exists():
        assert best.read_text() == other_best.read_text()
        assert_same_weights(folder, other, functools.partial(model_weights, name="best"))
    (path, state), (other_path, other_state) = (newest_checkpoint(run, 10**9) for run in (folder, other))
    assert path.name == other_path.name and state | {"seconds": 0} == other_state | {"seconds": 0}
    for file in path.rglob("*.safetensors"):
        assert_same_weights(file, other_path / file.relative_to(path), load_file)
    by_tokens, other_by_tokens = scalars(folder / "by_tokens"), scalars(other / "by_tokens")
    assert by_tokens.keys() == other_by_tokens.keys()
    assert all(list(dict.fromkeys(by_tokens[tag])) == list(dict.fromkeys(other_by_tokens[tag])) for tag in by_tokens)
    curves, other_curves = scalars(folder), scalars(other)
    assert curves.keys() == other_curves.keys()
    for tag, points in other_curves.items():
        assert [step for step, _ in curves[tag]] == [step for step, _ in points], tag
        if not tag.startswith(("time/", "throughput/", "progress/seconds")):
            assert curves[tag] == points or math.isnan(points[0][1]), tag


def read_events(folder):
    """Load a run's event files as TensorBoard does, but in the order of their exact start times.

    TensorBoard sorts them by name, and so by the second. In tests, several start within the same second.
    """
    with tempfile.TemporaryDirectory() as ordered:
        for path in folder.glob("*tfevents*"):
            began = next(EventFileLoader(str(path)).Load()).wall_time
            Path(ordered, f"tfevents.{began:.6f}").symlink_to(path)
        events = EventAccumulator(ordered, size_guidance={"tensors": 0})
        events.Reload()
        return events


def scalars(folder):
    events = read_events(folder)
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
