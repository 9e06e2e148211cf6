"""A training run apart from its algorithm: `for step in run.steps()` trains, and Run does the rest.

    Run           evaluates, logs and saves when due, stops on a signal, resumes, keeps several processes together
    folder        log_dir/run_name/{config.yml, identity.json, checkpoints/, model/, TensorBoard events}
    checkpoints   complete on disk or not there at all, a checksum per file; damaged ones are named and passed over
A new metric: `metrics` in a script's train(). A new chart on TensorBoard's first page: CHARTS. Not here: what the
files of a checkpoint are (`save_progress` in each script), how accuracy is measured (utils.evaluate).
"""

import contextlib
import hashlib
import html
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
import zlib
from pathlib import Path

import filelock
import numpy as np
import torch
import yaml
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from safetensors import SafetensorError
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from generation import inner_model
from reward import UserError, lenient_correct, strict_correct
from utils import fingerprint, one_line, save_model

# Keys that may change when a run is resumed. The model may have moved: its weights are compared instead.
FREE_KEYS = {"model", "cache_dir", "device", "cuda_graphs", "gradient_checkpointing", "micro_batch_tokens"}
FREE_KEYS |= {"generation_batch_size", "population_batch", "eval_every", "checkpoint_every", "keep_checkpoints"}
FREE_KEYS |= {"max_skipped_steps", "log_dir", "run_name", "resume"}

# TensorBoard's CUSTOM SCALARS page: {category: {chart: tags, as regular expressions}}
CHARTS = {
    "Is it learning?": {
        "held-out accuracy": ["eval/strict_accuracy", "eval/lenient_accuracy"],
        "reward": ["reward/mean"],
        "rewards, unweighted": ["reward/(?!(mean|std|group_std|equal_groups)$)"],
    },
    "Is there something to learn from?": {
        "groups, or pairs of members, of equal reward": ["reward/equal_groups", "es/tie_rate"],
        "truncated completions": ["completion/truncated", "eval/truncated"],
        "length of completions": ["completion/length"],
    },
    "GRPO: is the policy sound?": {
        "entropy": ["policy/entropy"],
        "KL to the policy before, and to the starting model": ["policy/kl"],
        "clipped ratios": ["policy/clip"],
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


class Run:
    """One training run: `for step in run.steps()` trains, `run.phase` times, `run.log` logs. Use it in a `with` block.

    save(path): write the files of a checkpoint into a folder
    load(path, states): restore them, then repeat the updates of `states`, which the journal has after that checkpoint;
        without a checkpoint, `path` is None
    weights: {name: tensor}, what is trained; identity: see `run_identity`
    step_text: what one step consists of, for the banner; evaluate(): accuracy on the held-out problems, `utils.evaluate`
    journal: write the state after every step to journal.jsonl, so that no finished step is ever lost
    """

    def __init__(self, config, setup, identity, num_steps, step_text, weights, evaluate, save, load, journal=False):
        self.setup, self.accelerator, self.num_steps = setup, setup.accelerator, num_steps
        self.weights, self.evaluate, self.save_files, self.start = weights, evaluate, save, time.perf_counter()
        self.is_main, self.resources = self.accelerator.is_main_process, contextlib.ExitStack()
        try:
            found = None
            if self.is_main:
                folder, config = open_folder(config, self.resources)
                found = folder, config, *find_progress(folder, identity, journal)
            self.folder, self.config, self.state, path, states = broadcast_object_list([found])[0]
            if self.state:
                self._resume(load, path, states)
            self.saved_step = self.state["step"] if path and not states else None
            self.progress = ProgressBar(num_steps, self.state.get("step", 0), self.is_main)
            self.resources.callback(self.progress.close)
            if self.is_main:
                write_file(self.folder / "config.yml", config_text(self.config).encode())  # --config resumes the run
                self.journal = (
                    self.resources.enter_context(open(self.folder / "journal.jsonl", "a")) if journal else None
                )
                self._open_tensorboard()
                self._print_banner(step_text)
        except BaseException:
            self.resources.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.resources.close()
        self.accelerator.end_training()

    def _resume(self, load, path, states):
        done = self.state["step"]
        if done > self.num_steps:
            raise UserError(f"resume: {self.folder}: {done} steps are done, more than the {self.num_steps} to do")
        if path and not path.is_dir():
            raise UserError(f"resume: {path}: expected a folder that all processes can see")
        load(path, states)
        if fingerprint(self.weights) != self.state["weights"]:
            source = self.folder / "journal.jsonl" if states else path
            raise UserError(
                f"resume: {source} does not give the weights that the run had after step {done}: the file is damaged, "
                "or this device or these versions compute differently"
            )

    def steps(self):
        """Yield the steps that are left. After each one: evaluate, write the journal and save, when due. When all are
        done, or a signal asked to stop, save and say what comes next."""
        if not self.state:
            self.state = {"step": 0, "seconds": 0.0, "generated_tokens": 0, "skipped_steps": 0, "skipped_in_a_row": 0}
            self.state["before"] = self._evaluate()
            self._commit(save=self.journal is None)
        self.progress.begin()
        with StopSignals() as signals:
            for step in range(self.state["step"], self.num_steps):
                if any(gather_object([self.stop_requested(signals)])):
                    break
                self.seconds, self.step_start = {}, time.perf_counter()
                # For reward functions that draw random numbers; this project's own follow from seed and step.
                key = [self.config.seed, zlib.crc32(b"libraries"), step, self.accelerator.process_index]
                set_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
                yield step
                assert self.state["step"] == step + 1, "run.log must be called once in each step"
                is_last = step + 1 == self.num_steps
                if is_last or (step + 1) % self.config.eval_every == 0:
                    self.state["after"] = self._evaluate()
                self._commit(save=is_last or (step + 1) % self.config.checkpoint_every == 0)
        self._finish()

    def stop_requested(self, signals):
        return signals.received

    @contextlib.contextmanager
    def phase(self, name):
        """Time a phase of the step, the GPU's work included, and show it on the progress bar."""
        self.progress.set_description_str(name)
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def log(self, step, scores, metrics, skipped=None, **record):
        """Log a step that is done: `metrics` and, from the scores of all completions, rewards, lengths and throughput.

        scores: {name: (B,)}; skipped: why the step made no update, or None; record: JSON values for the state
        """
        seconds, num_tokens = time.perf_counter() - self.step_start, scores["length"].sum()
        self.state = {
            **self.state,
            **record,
            "step": step + 1,
            "seconds": self.state["seconds"] + seconds,
            "generated_tokens": self.state["generated_tokens"] + int(num_tokens),
            "skipped_steps": self.state["skipped_steps"] + bool(skipped),
            "skipped_in_a_row": self.state["skipped_in_a_row"] + 1 if skipped else 0,
            "after": None,
        }
        metrics = {
            **completion_metrics(scores),
            **metrics,
            "optim/skipped_steps": self.state["skipped_steps"],
            "time/step": seconds,
            **{f"time/{name}": value for name, value in self.seconds.items()},
            "throughput/tokens_per_second": num_tokens / seconds,
            "throughput/rollout_tokens_per_second": num_tokens / self.seconds["rollout"],
            "progress/completions": (step + 1) * len(scores["length"]),
            "progress/generated_tokens": self.state["generated_tokens"],
            "progress/seconds": self.state["seconds"],
        }
        if torch.cuda.is_available():
            metrics["memory/peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self._write_scalars(metrics, step + 1)
        self.progress.step_done(step + 1, metrics)
        if skipped:
            self.say(f"step {step + 1} skipped: {skipped}")
            in_a_row = self.state["skipped_in_a_row"]
            if in_a_row >= self.config.max_skipped_steps:
                good = [path for saved, path in checkpoint_folders(self.folder).items() if saved <= step + 1 - in_a_row]
                raise UserError(
                    f"max_skipped_steps: {in_a_row} steps in a row were skipped, the last because {skipped}; "
                    f"the last checkpoint from before them: {good[0] if good else 'none yet'}"
                )

    def say(self, text):
        """Print a line above the progress bar, from the first process only."""
        if self.is_main:
            tqdm.write(text)

    def _evaluate(self):
        self.progress.set_description_str("evaluate")
        start = time.perf_counter()
        result = self.evaluate()
        accuracy = {name: result[name] for name in ("strict", "lenient")}
        tags = {f"{name}_accuracy": value for name, value in accuracy.items()}
        step, seconds = self.state["step"], time.perf_counter() - start
        scalars = {**tags, "length": result["length"], "truncated": result["truncated"]}
        self._write_scalars({f"eval/{tag}": value for tag, value in scalars.items()} | {"time/evaluate": seconds}, step)
        if self.is_main:
            for tag, value in tags.items():
                thousands, clock = self.state["generated_tokens"] // 1000, self.state["seconds"]
                self.by_tokens.add_scalar(f"by_tokens/{tag}", value, thousands, walltime=clock)
            self.by_tokens.flush()
            self.tensorboard.add_text("completions", completion_table(result["items"][:8], result["texts"][:8]), step)
        self.say(f"step {step:4d}  held-out: strict {accuracy['strict']:.1%}, lenient {accuracy['lenient']:.1%}")
        return accuracy

    def _commit(self, save):
        """The step is done: from here on a killed run resumes after it, if it has a journal or saves now."""
        self.state["weights"] = fingerprint(self.weights)
        if self.accelerator.num_processes > 1 and len(set(gather_object([self.state["weights"]]))) > 1:
            raise UserError("the processes have different weights: they compute differently, as different GPUs do")
        if self.is_main and self.journal:
            with one_clear_message(self.journal.name):
                self.journal.write(json.dumps(self.state) + "\n")
                self.journal.flush()
                os.fsync(self.journal.fileno())
        if save:
            self._save()

    def _save(self):
        if self.is_main and self.saved_step != self.state["step"]:
            self.progress.set_description_str("save")
            # Checkpoints of skipped steps must not push out good ones: their weights may be why steps are skipped.
            keep = self.config.keep_checkpoints + self.state["skipped_in_a_row"]
            save_checkpoint(self.folder, self.state, keep, self.save_files)
        self.saved_step = self.state["step"]

    def _finish(self):
        self._save()
        if self.state["step"] < self.num_steps:
            self.progress.close()
            self.say(f"stopped after step {self.state['step']}; to resume:\n    {resume_command(self.folder)}")
            return
        after = self.state["after"] or self._evaluate()
        self.progress.close()
        if not self.is_main:
            return
        self.tensorboard.file_writer.add_summary(hparams({}, {})[2])  # tells the HPARAMS page that the run is finished
        print_summary(self.state["before"], after, len(self.setup.test_set))
        print(f"The steps took {self.state['seconds']:.0f} s; this start, {time.perf_counter() - self.start:.0f} s.")
        model, path = self.setup.model, self.folder / "model"
        with whole_folder(path) as partial:
            save_model(model, self.setup.tokenizer, partial)
        print(f"TensorBoard: tensorboard --logdir={self.config.log_dir}\nThe result is {path}; to load it:")
        if hasattr(model, "peft_config"):
            base = model.peft_config["default"].base_model_name_or_path
            print(f'    base = AutoModelForCausalLM.from_pretrained("{base}")')
            print(f'    PeftModel.from_pretrained(base, "{path}")')
        else:
            print(f'    AutoModelForCausalLM.from_pretrained("{path}")')

    def _open_tensorboard(self):
        """A second TensorBoard run, `by_tokens`, has accuracy over its cost: thousands of generated tokens as steps,
        seconds of training as clock. What an earlier process logged after the state it saved is purged."""
        done = self.state.get("step", -1), self.state.get("generated_tokens", -1000) // 1000
        self.tensorboard, self.by_tokens = (
            self.resources.enter_context(SummaryWriter(folder, purge_step=last + 1, flush_secs=10**9))
            for folder, last in zip((self.folder, self.folder / "by_tokens"), done, strict=True)
        )
        values = {
            key: value for key, value in self.config.model_dump().items() if key == "model" or key not in FREE_KEYS
        }
        self.tensorboard.file_writer.add_summary(hparams(flat(values), {})[1])
        self.tensorboard.add_custom_scalars(
            {
                category: {chart: ["Multiline", tags] for chart, tags in charts.items()}
                for category, charts in CHARTS.items()
            }
        )
        self.tensorboard.add_text("config", f"<pre>{html.escape(config_text(self.config))}</pre>", 0)

    def _write_scalars(self, metrics, step):
        if self.is_main:
            with one_clear_message(f"{self.folder}, TensorBoard events"):
                for tag, value in metrics.items():
                    self.tensorboard.add_scalar(tag, value, step)
                self.tensorboard.flush()

    def _print_banner(self, step_text):
        model, device = self.setup.model, self.accelerator.device
        num_base = sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name)
        num_trained = sum(weight.numel() for weight in self.weights.values())
        device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        attention, in_adapter = inner_model(model).config._attn_implementation, hasattr(model, "peft_config")
        num_train, num_test = len(self.setup.train_set), len(self.setup.test_set)
        print(
            f"model   {self.config.model}, {num_base:,} parameters, {num_trained:,} trained{' in an adapter' * in_adapter}\n"
            f"device  {self.accelerator.num_processes} x {device_name}, {self.config.dtype}, {attention} attention\n"
            f"data    {self.config.dataset}, {num_train:,} problems, evaluated on {num_test:,} held-out ones\n"
            f"step    {step_text}\n"
            f"run     {self.num_steps:,} steps -> {self.folder}"
        )
        if self.state:
            print(f"resuming after step {self.state['step']}")


# ----------------------------------------------------------------------------------------------------------------------
# Stop signals, progress bar, summary
# ----------------------------------------------------------------------------------------------------------------------


class StopSignals:
    """`received` becomes True on SIGINT or SIGTERM. A second signal ends the process at once.

    One of several processes ignores further signals: launchers send their own in addition to the terminal's, and kill
    what has not ended after a while.
    """

    received = False

    def __enter__(self):
        self.previous = {number: signal.signal(number, self.handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def handle(self, number, frame):
        self.received, is_alone = True, int(os.environ.get("WORLD_SIZE", 1)) == 1
        for each in self.previous:
            signal.signal(each, signal.SIG_DFL if is_alone else signal.SIG_IGN)
        os.write(2, b"\nstopping after this step" + b"; a second signal stops at once" * is_alone + b"\n")


class ProgressBar(tqdm):
    """The steps of a run and the phase of the present one: a bar on a terminal, elsewhere a line every half minute."""

    FORM = "{desc:8} {n_fmt}/{total_fmt} |{bar}| {remaining} left{postfix}"  # fits into 80 columns
    SECONDS_BETWEEN_LINES = 30

    def __init__(self, num_steps, num_done, is_main):
        disable = None if is_main else True  # None: where standard error is no terminal
        super().__init__(total=num_steps, initial=num_done, disable=disable, bar_format=self.FORM, dynamic_ncols=True)
        self.num_done, self.writes_lines = num_done, is_main and self.disable

    def begin(self):
        """The first step begins. Time before that says nothing about how long steps take."""
        self.unpause()
        self.start = self.last_line = time.monotonic()

    def step_done(self, step, metrics):
        """step: how many are done; metrics: the scalars logged for the last one"""
        rate = tqdm.format_sizeof(float(metrics["throughput/tokens_per_second"]))
        state = f"reward {metrics['reward/mean']:.2f}, accuracy {metrics['accuracy/strict']:.0%}, {rate} tokens/s"
        self.set_postfix_str(state, refresh=False)
        self.update()
        now = time.monotonic()
        if self.writes_lines and now - self.last_line > self.SECONDS_BETWEEN_LINES:
            self.last_line = now
            seconds_left = (now - self.start) / (step - self.num_done) * (self.total - step)
            tqdm.write(f"{step:6d}/{self.total}  {state}, {tqdm.format_interval(seconds_left)} left")


def wilson_interval(successes, trials):
    """The 95% interval of a proportion (Wilson 1927), which stays within [0, 1] for small counts too."""
    z, share = 1.96, successes / trials
    center = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return (center - spread) / (1 + z * z / trials), (center + spread) / (1 + z * z / trials)


def print_summary(before, after, num_problems):
    """before, after: {"strict": accuracy, "lenient": accuracy}"""
    print(f"\nHeld-out accuracy, greedy, {num_problems} problems (95% interval)")
    for name in before:
        cells = []
        for share in (before[name], after[name]):
            low, high = wilson_interval(round(share * num_problems), num_problems)
            cells.append(f"{share:6.1%} ({low:.1%} to {high:.1%})")
        print(f"    {name:8}{'  ->  '.join(cells)}")


# ----------------------------------------------------------------------------------------------------------------------
# What is logged
# ----------------------------------------------------------------------------------------------------------------------


def completion_metrics(scores):
    """Means and extremes of the scores {name: (B,)} of a step's completions."""
    return {
        "reward/mean": scores["reward"].mean(),
        "reward/std": scores["reward"].std(),
        **{tag: values.mean() for tag, values in scores.items() if tag.startswith(("reward/", "accuracy/"))},
        "completion/length_mean": scores["length"].mean(),
        "completion/length_min": scores["length"].min(),
        "completion/length_max": scores["length"].max(),
        "completion/truncated": scores["truncated"].mean(),
    }


def completion_table(items, texts):
    """An HTML table of prompts, answers and completions. Model output is text, never markup."""
    rows = ["<table><tr><th></th><th>prompt</th><th>answer</th><th>completion</th></tr>"]
    for item, text in zip(items, texts, strict=True):
        wrong = "✗ format" if lenient_correct(text, item["answer"]) else "✗"
        cells = ["✓" if strict_correct(text, item["answer"]) else wrong, item["prompt"], item["answer"], text]
        cells = [html.escape(cell).replace("\n", "<br>") for cell in cells]
        rows.append(f"<tr><td>{'</td><td>'.join(cells)}</td></tr>")
    return "".join([*rows, "</table>"])


def flat(config):
    """{"lora.rank": 16, ...} of a nested config."""
    values = {}
    for key, value in config.items():
        nested = value if isinstance(value, dict) and value else {"": value}
        for name, part in nested.items():
            values[f"{key}.{name}".rstrip(".")] = part if isinstance(part, (int, float, str)) else json.dumps(part)
    return values


# ----------------------------------------------------------------------------------------------------------------------
# The folder
# ----------------------------------------------------------------------------------------------------------------------


def config_text(config):
    return yaml.safe_dump(config.model_dump(), sort_keys=False)


def open_folder(config, resources):
    """Make or reopen the run's folder, and lock it against other processes until `resources` close.

    It is `log_dir/run_name`, the time without a run_name, or for `resume: PATH` that folder. "auto" with a run_name, and
    a path, reopen a run. Returns the folder, and the config that resumes the run later.
    """
    if config.resume in ("never", "auto"):
        folder = Path(config.log_dir) / (config.run_name or time.strftime("%Y-%m-%d_%H-%M-%S"))
    else:
        folder = Path(config.resume).resolve()
        if not (folder / "identity.json").is_file():
            raise UserError(f"resume: {config.resume}: expected auto, never, or the folder of a run")
        if config.run_name not in (None, folder.name):
            raise UserError(f"run_name: {config.run_name}: expected null or {folder.name}, the run to resume")
    if folder.exists() and not (folder / "identity.json").is_file() and set(os.listdir(folder)) - {"lock"}:
        raise UserError(f"run_name: {folder} exists already and holds no run; choose another name or delete it")
    if folder.exists() and (config.resume == "never" or config.resume == "auto" and not config.run_name):
        raise UserError(f"run_name: {folder} exists already; choose another name or delete it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        resources.enter_context(filelock.FileLock(folder / "lock", timeout=0))
    except filelock.Timeout:
        raise UserError(f"run_name: {folder} is being written by another process") from None
    except OSError as error:
        raise UserError(f"log_dir: {folder} cannot be made: {one_line(error)}") from None
    return folder, config.model_copy(update={"log_dir": str(folder.parent), "run_name": folder.name, "resume": "auto"})


def run_identity(config, setup):
    """What must stay the same when a run is resumed: {key: value} of the config and of what the run starts from."""
    values = {key: value for key, value in config.model_dump().items() if key not in FREE_KEYS}
    if all(value == "constant" for key, value in values.items() if key.endswith("_schedule")):
        values = {key: value for key, value in values.items() if key not in ("num_steps", "num_iterations")}
    problems = [[problem.ids, problem.item] for problem in setup.train_set + setup.test_set]
    problems = json.dumps(problems, default=lambda value: type(value).__name__).encode()
    starting_weights = fingerprint(dict(setup.model.named_parameters()))
    values |= {"starting weights": starting_weights, "problems": f"{zlib.crc32(problems):08x}"}
    return {"script": type(config).__name__, **values}


def find_progress(folder, identity, journal):
    """The state to resume from, the path of its checkpoint, and the journal's states after that checkpoint.

    ({}, None, []) if there is nothing to resume. UserError if it is another run than `identity` says.
    """
    path = folder / "identity.json"
    if path.is_file():
        theirs = json.loads(path.read_text())
        for key in identity | theirs:
            if identity.get(key) != theirs.get(key):
                raise UserError(
                    f"resume: {folder}: {key}: {identity.get(key)!r}, but that run was started with "
                    f"{theirs.get(key)!r}; another run needs another run_name"
                )
        print(f"resume: {folder}")
    else:
        write_file(path, json.dumps(identity).encode())
    states = read_journal(folder / "journal.jsonl") if journal else []
    checkpoint = newest_checkpoint(folder, len(states) - 1 if journal else math.inf)
    if not checkpoint and not states:
        if checkpoint_folders(folder):
            raise UserError(f"resume: no checkpoint in {folder / 'checkpoints'} is undamaged")
        return {}, None, []
    path, state = checkpoint or (None, {"step": 0})
    return (states or [state])[-1], path, states[state["step"] + 1 :]


def resume_command(folder):
    processes = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"))
    launcher = "python" if processes == "1" else f"torchrun --nproc_per_node {processes}"
    return f"{launcher} {shlex.quote(sys.argv[0])} --config {shlex.quote(str(folder / 'config.yml'))}"


@contextlib.contextmanager
def one_clear_message(path):
    """UserError, naming `path`, for what a full disk or a file system without permission raises."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, (OSError, SafetensorError)) and type(error) is not Exception:  # as tokenizers raises
            raise
        raise UserError(f"{path} cannot be written: {one_line(error)}") from None


def _sync(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path, data):
    """Write bytes into a file that is complete and on disk, or as it was before."""
    partial = Path(f"{path}.partial")
    with one_clear_message(path):
        partial.write_bytes(data)
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)


@contextlib.contextmanager
def whole_folder(folder):
    """A new folder to write into. It replaces `folder` once it is complete and on disk, else nothing of it is left."""
    partial = Path(f"{folder}.partial")
    with one_clear_message(folder):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            yield partial
            for path in [*partial.rglob("*"), partial]:
                _sync(path)
            remove_folder(folder)
            os.replace(partial, folder)
            _sync(folder.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def remove_folder(folder):
    """Remove a folder so that half of it is never taken for the whole."""
    if folder.exists():
        old = Path(f"{folder}.old.partial")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
        shutil.rmtree(old)


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints and journal
# ----------------------------------------------------------------------------------------------------------------------


def checkpoint_folders(folder):
    """{step: path} of a run's checkpoints, newest first."""
    paths = {int(path.name[5:]): path for path in (folder / "checkpoints").glob("step_*") if path.name[5:].isdigit()}
    return dict(sorted(paths.items(), reverse=True))


def save_checkpoint(folder, state, keep, write):
    """Save `folder/checkpoints/step_000020`: what `write(path)` writes there, and `state`. Keep the newest `keep`."""
    step = state["step"]
    with whole_folder(folder / "checkpoints" / f"step_{step:06d}") as path:
        write(path)
        (path / "state.json").write_text(json.dumps(state))
        (path / "sha256.json").write_text(json.dumps(digests(path)))
    paths = checkpoint_folders(folder)
    later = [path for saved, path in paths.items() if saved > step]  # damaged, or of steps that were lost
    for path in later + [path for saved, path in paths.items() if saved <= step][keep:]:
        remove_folder(path)
    for path in (folder / "checkpoints").glob("*.partial"):  # left by a kill
        shutil.rmtree(path)


def digests(folder):
    """{path: SHA-256} of the files in a checkpoint."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "sha256.json":
            with open(path, "rb") as file:
                digests[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def read_state(path):
    """The state in a checkpoint. UserError, naming the file, if any of its files is not as it was saved."""
    try:
        saved = json.loads((path / "sha256.json").read_text())
    except (OSError, ValueError):
        raise UserError(f"{path / 'sha256.json'} is damaged or missing") from None
    found = digests(path)
    for name in saved | found:
        if saved.get(name) != found.get(name):
            raise UserError(f"{path / name} is damaged or missing")
    return json.loads((path / "state.json").read_text())


def newest_checkpoint(folder, last_step=math.inf):
    """(path, state) of the newest undamaged checkpoint up to `last_step`, or None. Damaged ones are named."""
    for step, path in checkpoint_folders(folder).items():
        if step <= last_step:
            try:
                return path, read_state(path)
            except UserError as error:
                print(f"resume: {error}: trying the checkpoint before it")
    return None


def read_journal(path):
    """The states in a journal, one per step from 0 on. A last line that was cut off is removed from the file."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    if lines and not lines[-1].endswith(b"\n"):
        os.truncate(path, sum(map(len, lines[:-1])))
        lines.pop()
    states = []
    for number, line in enumerate(lines):
        try:
            states.append(json.loads(line))
            assert states[-1]["step"] == number
        except (ValueError, TypeError, KeyError, AssertionError):
            raise UserError(f"resume: {path}, line {number + 1}: damaged, or the line before it is missing") from None
    return states
