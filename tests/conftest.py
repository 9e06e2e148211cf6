import contextlib
import dataclasses
import math
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read on import: no test may wait for a network
os.environ["OMP_NUM_THREADS"] = "1"  # likewise: sums are bit for bit the same for the same number of threads

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import es_train
import grpo_train
import runs
from generation import DecodeSettings
from runs import newest_checkpoint
from utils import load_config

ROOT = Path(__file__).resolve().parent.parent
GSM8K = ROOT.parent / "shared" / "gsm8k"
TINY = str(ROOT / "tiny_model")
EOS, PAD, VOCAB = 1, 0, 64
# --multi_gpu: without it, accelerate starts one process on a CPU, whatever the number asked for.
TWO_PROCESSES = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
TWO_PROCESSES += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]


def pytest_addoption(parser):
    parser.addoption("--screenshots", metavar="FOLDER", help="where test_tensorboard.py leaves pictures of the pages")


def make_model(seed=0, dtype=torch.float32, family="qwen2", **settings):
    """A random model with grouped key-value heads, spread out enough that its samples do not collapse."""
    torch.manual_seed(seed)
    config_class, model_class = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}[
        family
    ]
    config = config_class(
        **{
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "initializer_range": 0.15,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
            **settings,
        }
    )
    return model_class(config).to(dtype).eval()


def settings(max_new_tokens, stop_ids=(EOS,), pad_id=PAD, **more):
    return DecodeSettings(max_new_tokens, list(stop_ids), pad_id, **more)


@pytest.fixture
def model():
    return make_model()


@pytest.fixture(autouse=True)
def forget_accelerate():
    """accelerate keeps one state a process: precision and devices of one test would be those of the next."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def random_prompts(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCAB, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def oracle_log_probs(model, ids, temperature=1.0):
    """Log-probs over the vocabulary after every position of one row: float64, no padding, no cache, no mask."""
    model64 = make_like(model).double()
    logits = model64(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return (logits / temperature).log_softmax(-1)  # (T, V)


def make_like(model):
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.eval()


def oracle_generate(model, prompt, uniforms, temperature, stop, max_new_tokens):
    """One row, a whole forward pass a token, inverse-CDF sampling by a plain loop. uniforms None is greedy."""
    ids, log_probs = list(prompt), []
    for t in range(max_new_tokens):
        row = oracle_log_probs(model, ids, temperature)[-1]
        if uniforms is None:
            token = int(row.argmax())
        else:
            total, token = 0.0, None
            for candidate, probability in enumerate(row.exp().tolist()):
                total += probability
                if total > float(uniforms[t]):
                    token = candidate
                    break
        ids.append(token)
        log_probs.append(float(row[token]))
        if token in stop:
            break
    return ids[len(prompt) :], log_probs


def run_script(arguments, script="grpo_train.py", cwd=ROOT, launcher=(sys.executable,), path=()):
    """A script as a user runs it, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run(
        [*launcher, str(ROOT / script), *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@dataclasses.dataclass
class Script:
    """A training script, with the overrides of a run of seconds."""

    module: object
    config_class: type
    small: list[str]
    num_steps: str  # the key

    @property
    def name(self):
        return self.module.__name__

    def config(self, folder, *overrides):
        """That of a run to be kept in `folder`."""
        path = ROOT / f"{self.name.removesuffix('_train')}_config.yml"
        where = [f"model={TINY}", f"log_dir={folder.parent}", f"run_name={folder.name}"]
        return load_config(self.config_class, path, [*where, *self.small, *overrides])

    def train(self, folder, *overrides, stop_after=None):
        """A run in this process, asked to stop after so many steps."""
        with pytest.MonkeyPatch.context() as patch:
            if stop_after is not None:
                patch.setattr(runs, "stop_signals", lambda: contextlib.nullcontext(Countdown(stop_after)))
            self.module.main(self.config(folder, *overrides))
        return folder


class Countdown:
    """In place of the list of signals received: not empty when it is asked for the n-th time."""

    def __init__(self, n):
        self.left = n + 1

    def __bool__(self):
        self.left -= 1
        return self.left == 0


SCRIPTS = {
    "grpo": Script(
        grpo_train,
        grpo_train.GRPOConfig,
        "num_steps=4 prompts_per_step=4 group_size=4 max_new_tokens=32 warmup_steps=0 eval_size=8 eval_every=2 "
        "lora.rank=4 checkpoint_every=2".split(),
        "num_steps",
    ),
    "es": Script(
        es_train,
        es_train.ESConfig,
        "num_iterations=4 prompts_per_iteration=4 population_size=6 max_new_tokens=40 noise_scale=0.03 "
        "population_batch=4 eval_size=8 eval_every=2 checkpoint_every=2".split(),
        "num_iterations",
    ),
}


@pytest.fixture(params=SCRIPTS)
def script(request):
    return SCRIPTS[request.param]


def model_weights(folder):
    """Of a run's result."""
    (file,) = (folder / "model").glob("*.safetensors")
    return load_file(file)


def assert_same_run(folder, other):
    """Bit for bit: weights, optimizer, counters of the last checkpoint, and every scalar but times, each step once.

    Of accuracy by tokens a resumed run may repeat a point here, as there are several evaluations in a thousand tokens.
    """
    ours, theirs = model_weights(folder), model_weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    (path, state), (other_path, other_state) = (newest_checkpoint(run, 10**9) for run in (folder, other))
    assert path.name == other_path.name
    assert state | {"seconds": 0} == other_state | {"seconds": 0}
    for file in path.rglob("*.safetensors"):
        ours, theirs = load_file(file), load_file(other_path / file.relative_to(path))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    by_tokens, other_by_tokens = scalars(folder / "by_tokens"), scalars(other / "by_tokens")
    assert by_tokens.keys() == other_by_tokens.keys()
    assert all(list(dict.fromkeys(by_tokens[tag])) == list(dict.fromkeys(other_by_tokens[tag])) for tag in by_tokens)
    curves, other_curves = scalars(folder), scalars(other)
    assert curves.keys() == other_curves.keys()
    for tag, points in other_curves.items():
        assert [step for step, _ in curves[tag]] == [step for step, _ in points], tag
        if not tag.startswith(("time/", "throughput/", "progress/seconds")):
            assert curves[tag] == points or math.isnan(points[0][1]), tag


def wait_until(condition, process, seconds=120):
    limit = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.01)


def scalars(folder):
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.fixture
def hugging_face_datasets(tmp_path):
    """A folder that, on the path, has Hugging Face `datasets` installed as far as anybody can ask."""
    site = tmp_path / "site"
    (site / "datasets").mkdir(parents=True)
    (site / "datasets" / "__init__.py").write_text("raise ImportError('Hugging Face datasets was imported')\n")
    (site / "datasets-4.0.0.dist-info").mkdir()
    (site / "datasets-4.0.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: datasets\nVersion: 4.0.0\n"
    )
    return site
