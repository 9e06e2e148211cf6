"""Everything about a training run except the algorithm: the loop over `run.steps()` trains; Run does the rest.

    Run           evaluates, logs and saves when due; stops on a signal; resumes; synchronizes processes
    folder        log_dir/run_name/{run.lock, config.yml, journal.jsonl (ES), checkpoints/, best/, model/, events}
    checkpoints   written atomically, with a checksum per file; damaged ones are reported and skipped
To add a metric, add it to `metrics` in a script's train(). Elsewhere: the content of a checkpoint (`save_progress` in
each script), evaluation (utils.evaluate), the algorithms.
"""

import contextlib
import datetime
import hashlib
import html
import json
import math
import os
import shlex
import shutil
import signal
import sys
import threading
import time
import zlib
from pathlib import Path

import filelock
import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from reward import STOP_SIGNALS, UserError, lenient_correct, strict_correct
from utils import config_text, fingerprint, is_run, one_line, save_model, say

# Keys that may change when a run resumes. The model may have moved, so its weights are compared instead.
FREE_KEYS = {"model", "cache_dir", "device", "cuda_graphs", "gradient_checkpointing", "micro_batch_tokens"}
FREE_KEYS |= {"generation_batch_size", "population_batch", "eval_every", "checkpoint_every", "keep_checkpoints"}
FREE_KEYS |= {"max_skipped_steps", "log_dir", "run_name", "resume"}

# Each warning is printed once, after its number of consecutive steps with strict accuracy below LOW_ACCURACY: what was
# wrong in them, and what to try. See `Run._warn` for the rules.
LOW_ACCURACY = 0.3
WARNINGS = {
    "no signal": (
        3,
        "no completion had a nonzero advantage in the loss: all rewards tied, or truncated completions were masked",
        "examples, the rewards lenient_accuracy and tag_count, or a larger max_new_tokens or noise_scale (ES)",
    ),
    "ties": (
        10,
        "rewards tied in most groups or pairs of members, so that few completions determined the updates",
        "max_sampling_rounds or a larger group_size (GRPO), a larger noise_scale (ES), or easier problems",
    ),
    "entropy": (
        10,
        "the entropy was below a tenth of its first value, so that the samples hardly differed",
        "a new run with a lower or decaying learning_rate, more completions per step, or kl_weight",
    ),
}

BAR = "{desc:8} {n_fmt}/{total_fmt} |{bar}| {remaining} left{postfix}"  # fits into 80 columns
SECONDS_BETWEEN_LINES = 30  # without a terminal for the progress bar
EVALUATION = "evaluation.json"  # in best/ and model/: step and accuracy of their weights
PROGRESS = ("prompts", "completions", "generated_tokens", "seconds")  # counted over the whole run


class Run:
    """A training run: iterate over `run.steps()`, time parts with `run.phase`, call `run.log` once per step.

    identity: see `run_identity`; step_text: describes a step in the banner
    weights: {name: tensor} to train; evaluate(): see `utils.evaluate`
    save(path): write the files of a checkpoint into a folder
    load(path, states): restore them, then replay the updates of `states`, the journal's lines after that checkpoint;
        `path` is None without a checkpoint
    journal: append the state after every step to journal.jsonl, so that no finished step is lost
    """

    def __init__(self, config, setup, identity, step_text, weights, evaluate, save, load, journal=False):
        self.setup, self.accelerator, self.is_main = setup, setup.accelerator, setup.accelerator.is_main_process
        self.num_steps, self.weights, self.evaluate, self.save = config.num_steps, weights, evaluate, save
        self.identity, self.say = identity, say if self.is_main else lambda text: None
        self.start, self.journal, found = time.perf_counter(), None, None
        if self.is_main:
            self.folder, self.config, self.lock = open_folder(config)
            found = self.folder, self.config, *find_progress(self.folder, identity, journal)
        self.folder, self.config, self.state, path, states = broadcast_object_list([found])[0]
        done = self.state.get("step", 0)
        if done > self.num_steps:
            raise UserError(f"resume: {self.folder}: {done} steps are done, more than num_steps, {self.num_steps}")
        if self.state:
            load(path, states)
        if self.state and fingerprint(weights) != self.state["weights"]:
            reason = "it is damaged, or another device or version computes differently"
            source = self.folder / "journal.jsonl" if states else path
            raise UserError(f"resume: {source} does not restore the weights of step {done}: {reason}")
        self.saved_step = done if path and not states else None
        disable = None if self.is_main else True  # None: unless stderr is a terminal
        self.progress = tqdm(total=self.num_steps, initial=done, disable=disable, bar_format=BAR, dynamic_ncols=True)
        if self.is_main:
            write_file(self.folder / "config.yml", config_text(self.config))  # --config with this file resumes the run
            if journal:
                self.journal = open(self.folder / "journal.jsonl", "a")
            self._open_tensorboard()
            self._print_banner(step_text)

    def _open_tensorboard(self):
        """Open the event files. Purge what was logged after the state to resume from.

        A second TensorBoard run, `by_tokens`, plots accuracy against cost: its steps are thousands of generated tokens,
        and its clock is seconds of training.
        """

        def print_unless_writer(args):  # a full disk raises here and again in `flush`: once is enough
            if type(args.thread).__name__ != "_AsyncWriterThread":
                threading.__excepthook__(args)

        threading.excepthook = print_unless_writer
        last_step, last_thousand = self.state.get("step", -1), self.state.get("generated_tokens", -1000) // 1000
        self.tensorboard = SummaryWriter(self.folder, purge_step=last_step + 1, flush_secs=10**9)
        self.by_tokens = SummaryWriter(self.folder / "by_tokens", purge_step=last_thousand + 1, flush_secs=10**9)
        values = self.config.model_dump()
        values = {key: v if isinstance(v, (int, float, str)) else json.dumps(v) for key, v in values.items()}
        for part in hparams(values, {"eval/strict_accuracy": 0.0})[:2]:  # the metric of HPARAMS, and the settings
            self.tensorboard.file_writer.add_summary(part)
        self.tensorboard.add_text("config", f"<pre>{html.escape(config_text(self.config))}</pre>", 0)

    def _print_banner(self, step_text):
        config, setup, device = self.config, self.setup, self.accelerator.device
        num_base = sum(p.numel() for name, p in setup.model.named_parameters() if "lora_" not in name)
        num_trained = sum(weight.numel() for weight in self.weights.values())
        gpu = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
        self.say(f"model   {config.model}, {num_base:,} parameters, {num_trained:,} trained")
        self.say(f"device  {self.accelerator.num_processes} x {device.type}{gpu}, {config.dtype}")
        self.say(f"data    {config.dataset}, {len(setup.train_set):,} problems, {len(setup.test_set):,} held out")
        self.say(f"step    {step_text}, up to {config.max_new_tokens} tokens each")
        self.say(f"run     {self.num_steps:,} steps -> {self.folder}")
        if self.state:
            is_finished = self.state["step"] == self.num_steps
            note = ", the last: nothing is left to train; another run needs another run_name" if is_finished else ""
            self.say(f"resuming after step {self.state['step']}{note}")

    def steps(self):
        """Yield the remaining steps. After each one, evaluate, write the journal and save when due.

        At the end, save the trained model and print the result. After a signal, save a checkpoint, print the command
        that resumes the run, and exit with 128 plus the signal's number.
        """
        if not self.state:
            counts = ["step", *PROGRESS, "skipped_steps", "skipped_in_a_row", "entropy", "first_entropy"]
            self.state = dict.fromkeys(counts, 0) | {"warnings": dict.fromkeys([*WARNINGS, "below best"], 0)}
            self.state["before"] = self._evaluate()
            self._commit(save=self.num_steps > 0 and self.journal is None)
        self.progress.unpause()  # start its clock
        self.last_line = time.monotonic()
        with stop_signals() as received:
            stops = []
            for step in range(self.state["step"], self.num_steps):
                stops = gather_object(received[:1])  # of all processes
                if stops:
                    break
                self.seconds, self.step_start = {}, time.perf_counter()
                # For reward functions that draw random numbers. All other random numbers follow from seed and step.
                key = [self.config.seed, zlib.crc32(b"libraries"), step, self.accelerator.process_index]
                set_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
                yield step
                assert self.state["step"] == step + 1, "run.log must be called once per step"
                is_last = step + 1 == self.num_steps
                if is_last or (step + 1) % self.config.eval_every == 0:
                    self.state["after"] = self._evaluate()
                self._commit(save=is_last or (step + 1) % self.config.checkpoint_every == 0)
            self._finish()
        if stops:
            sys.exit(128 + stops[0])  # as if the signal had ended the process, so that schedulers requeue the run

    @contextlib.contextmanager
    def phase(self, name):
        """Time a phase of the step, including the GPU's work, and show it on the progress bar."""
        self.progress.set_description_str(name)
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def log(self, step, scores, metrics, skipped=None, *, num_prompts, signal_share, **record):
        """Log a finished step: `metrics`, and metrics of its completions.

        scores: {name: (B,)}; skipped: the reason if the update was skipped, else None; num_prompts: drawn in this step
        signal_share: the number of groups with a nonzero advantage in the loss, divided by prompts_per_step; for ES,
            the share of pairs of members whose rewards differ
        record: JSON values to keep in the state
        """
        seconds, num_tokens, state = time.perf_counter() - self.step_start, scores["length"].sum(), self.state
        added = {"step": 1, "seconds": seconds, "prompts": num_prompts, "completions": len(scores["length"])}
        added |= {"generated_tokens": int(num_tokens), "skipped_steps": bool(skipped)}
        in_a_row = state["skipped_in_a_row"] + 1 if skipped else 0
        self.state = state | record | {key: state[key] + number for key, number in added.items()}
        self.state |= {"skipped_in_a_row": in_a_row, "after": None}
        metrics = {
            **completion_metrics(scores),
            **metrics,
            "optim/skipped_steps": self.state["skipped_steps"],
            "time/step": seconds,
            **{f"time/{name}": value for name, value in self.seconds.items()},
            "throughput/tokens_per_second": num_tokens / seconds,
            "throughput/rollout_tokens_per_second": num_tokens / self.seconds.get("rollout", seconds),
            **{f"progress/{name}": self.state[name] for name in PROGRESS},
        }
        if torch.cuda.is_available():
            metrics["memory/peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self._write_scalars(metrics, step + 1)
        self._show_progress(metrics)
        if not skipped:
            self._warn(metrics, signal_share)
        else:
            self.say(f"step {step + 1} skipped: {skipped}")
            if in_a_row >= self.config.max_skipped_steps:
                good = [path for saved, path in checkpoint_folders(self.folder).items() if saved <= step + 1 - in_a_row]
                raise UserError(
                    f"max_skipped_steps: {in_a_row} consecutive steps were skipped, the last because {skipped}; "
                    f"the last checkpoint before them: {good[0] if good else 'none'}"
                )

    def _warn(self, metrics, signal_share):
        """Warn once when a rule of WARNINGS has applied for its number of consecutive steps."""
        counts, first = self.state["warnings"], self.state["first_entropy"]
        entropy = self.state["entropy"] = float(metrics.get("policy/entropy", self.state["entropy"]))
        self.state["first_entropy"] = first or entropy
        applies = {"no signal": signal_share == 0, "ties": signal_share < 0.5, "entropy": entropy < first / 10}
        for name, (num_steps, what, advice) in WARNINGS.items():
            if counts[name] < num_steps:
                is_low = metrics["accuracy/strict"] < LOW_ACCURACY
                counts[name] = counts[name] + 1 if applies[name] and is_low else 0
                if counts[name] == num_steps:
                    self.say(
                        f"{name}: for {num_steps} steps, {what}. In the last step, {metrics['accuracy/strict']:.0%} of "
                        f"the samples were correct, {metrics['accuracy/format']:.0%} had the format and "
                        f"{metrics['completion/truncated']:.0%} were truncated. Try {advice}."
                    )

    def _show_progress(self, metrics):
        rate = tqdm.format_sizeof(float(metrics["throughput/tokens_per_second"]))
        status = f"reward {metrics['reward/mean']:.2f}, accuracy {metrics['accuracy/strict']:.0%}, {rate} tokens/s"
        self.progress.set_postfix_str(status, refresh=False)
        self.progress.update()
        now, step = time.monotonic(), self.state["step"]
        if self.progress.disable and now - self.last_line > SECONDS_BETWEEN_LINES:
            self.last_line = now
            left = self.state["seconds"] / step * (self.num_steps - step)
            self.say(f"{step:6d}/{self.num_steps}  {status}, {tqdm.format_interval(left)} left")

    def _evaluate(self):
        """Evaluate and log the result. Save the weights in best/ if strict accuracy is the highest so far."""
        self.progress.set_description_str("evaluate")
        start, step = time.perf_counter(), self.state["step"]
        metrics, items, texts = self.evaluate()
        strict, lenient = metrics["strict_accuracy"], metrics["lenient_accuracy"]
        if self.is_main:
            self.tensorboard.add_text("completions", completion_table(items[:8], texts[:8]), step)
            thousands, clock = self.state["generated_tokens"] // 1000, self.state["seconds"]
            self.by_tokens.add_scalar("by_tokens/strict_accuracy", strict, thousands, walltime=clock)
            self.by_tokens.add_scalar("by_tokens/lenient_accuracy", lenient, thousands, walltime=clock)
            self.by_tokens.flush()
            self.say(f"step {step:4d}  held-out: strict {strict:.1%}, lenient {lenient:.1%}\n{examples(items, texts)}")
        scalars = {f"eval/{name}": value for name, value in metrics.items()}
        self._write_scalars({**scalars, "time/evaluate": time.perf_counter() - start}, step)
        result, best = {"step": step, "strict": strict, "lenient": lenient}, self.state.get("best")
        if not best or strict > best["strict"]:
            self.state["best"] = result
            if step and self.is_main:
                self._save_model(self.folder / "best", result)
        elif self._is_below_best(result) and not self.state["warnings"]["below best"]:
            self.state["warnings"]["below best"] = 1
            reached = f"{best['strict']:.1%} after step {best['step']}"
            self.say(
                f"below best: strict accuracy is significantly lower than {reached}. "
                "Try a new run with a lower or decaying learning_rate, or more completions per step."
            )
        return result

    def _is_below_best(self, result):
        """Return True if accuracy has fallen by more than the 95% interval of a difference of two shares."""
        now, best = result["strict"], self.state["best"]["strict"]
        variance = (now * (1 - now) + best * (1 - best)) / len(self.setup.test_set)
        return best - now > 1.96 * math.sqrt(variance)

    def _save_model(self, folder, result):
        """Save the model with the result of its evaluation, and a README instead of PEFT's empty one."""
        config, num_problems = self.config, len(self.setup.test_set)
        accuracy = f"strict {result['strict']:.1%}, lenient {result['lenient']:.1%}"
        card = [
            f"# {config.run_name}, step {result['step']}",
            f"- Base model: {config.model}",
            f"- Task: {config.dataset} {json.dumps(config.dataset_args)}",
            f"- Accuracy on {num_problems} held-out problems, greedy decoding: {accuracy}",
            f"- Command: {resume_command(self.folder)}",
        ]
        with whole_folder(folder) as partial:
            save_model(self.setup.model, self.setup.tokenizer, partial)
            (partial / "README.md").write_text("\n".join(card) + "\n", encoding="utf-8")
            (partial / EVALUATION).write_text(json.dumps(result))

    def _write_scalars(self, metrics, step):
        if self.is_main:
            for tag, value in metrics.items():
                self.tensorboard.add_scalar(tag, value, step)
            self.tensorboard.flush()

    def _commit(self, save):
        """Record the finished step. A killed run resumes after it if there is a journal or `save` is True."""
        self.state |= {"identity": self.identity, "weights": fingerprint(self.weights)}
        if len(set(gather_object([self.state["weights"]]))) > 1:
            raise UserError("the processes have different weights; use devices of the same kind")
        if self.journal:
            self.journal.write(json.dumps(self.state) + "\n")
            self.journal.flush()
        if save:
            self._save()

    def _save(self):
        if self.is_main and self.saved_step != self.state["step"]:
            self.progress.set_description_str("save")
            # Checkpoints of skipped steps must not displace good ones: their weights may be the cause.
            keep = self.config.keep_checkpoints + self.state["skipped_in_a_row"]
            save_checkpoint(self.folder, self.state, keep, self.save)
        self.saved_step = self.state["step"]

    def _finish(self):
        if self.num_steps:
            self._save()
        if self.state["step"] < self.num_steps:
            self.progress.close()
            self.say(f"stopped after step {self.state['step']}; to resume:\n    {resume_command(self.folder)}")
        else:
            after = self.state.get("after") or (self._evaluate() if self.num_steps else self.state["before"])
            self.progress.close()
            if self.is_main:
                self._print_result(after)
        self.accelerator.end_training()
        if self.is_main:
            self.lock.release()

    def _print_result(self, after):
        """Save the trained model. Print the result, how to load it, and which evaluation was the best."""
        self.tensorboard.file_writer.add_summary(hparams({}, {})[2])  # marks the run as finished in HPARAMS
        model, path, best = self.setup.model, self.folder / "model", self.state["best"]
        if self.num_steps:
            self._save_model(path, after)
        self.say(summary([self.state["before"], after][: 1 + bool(self.num_steps)], len(self.setup.test_set)))
        if self.num_steps == 0:
            return
        if best["step"] == 0:
            self.say("No evaluation was better than the one before training.")
        elif best["step"] < self.num_steps:
            reached = f"{best['strict']:.1%} after step {best['step']}"
            self.say(f"Best evaluation: strict {reached}, saved in {self.folder / 'best'}.")
            self.say("It was selected on the held-out problems, so its accuracy is optimistic.")
            if self._is_below_best(after):
                self.say("The final model is significantly worse. Use best/.")
        seconds, total = self.state["seconds"], time.perf_counter() - self.start
        self.say(f"The training steps took {seconds:.0f} s in total. This process ran for {total:.0f} s.")
        self.say(f"TensorBoard: tensorboard --logdir={self.config.log_dir}\nSaved the model to {path}. To load it:")
        if hasattr(model, "peft_config"):
            base = model.peft_config["default"].base_model_name_or_path
            self.say(f'    base = AutoModelForCausalLM.from_pretrained("{base}")')
            self.say(f'    PeftModel.from_pretrained(base, "{path}")')
        else:
            self.say(f'    AutoModelForCausalLM.from_pretrained("{path}")')


# --- Signals ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def stop_signals():
    """Yield a list that receives STOP_SIGNALS. A second signal ends a run of one process at once.

    With several processes, further signals are ignored: launchers forward the signal that the terminal has already sent
    to each process. They kill processes that do not end in time. Signals that are ignored already, as with nohup, stay
    ignored.
    """
    received, is_alone = [], int(os.environ.get("WORLD_SIZE", 1)) == 1

    def handle(number, frame):
        received.append(number)
        for each in handlers:
            signal.signal(each, signal.SIG_DFL if is_alone else signal.SIG_IGN)
        with contextlib.suppress(OSError):  # the terminal may be closed
            os.write(2, b"\nstopping after this step" + b"; a second signal stops at once" * is_alone + b"\n")

    heeded = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    handlers = {number: signal.signal(number, handle) for number in heeded}
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# --- Logs -------------------------------------------------------------------------------------------------------------


def completion_metrics(scores):
    """Return means and extremes of the scores {name: (B,)} of a step's completions."""
    return {
        "reward/mean": scores["reward"].mean(),
        "reward/std": scores["reward"].std(),
        **{tag: values.mean() for tag, values in scores.items() if tag.startswith(("reward/", "accuracy/"))},
        **{f"completion/length_{how}": getattr(scores["length"], how)() for how in ("mean", "min", "max")},
        "completion/truncated": scores["truncated"].mean(),
    }


def completion_table(items, texts):
    """Return an HTML table of prompts, answers and completions. Escape everything, since completions are untrusted."""
    rows = ["<tr><th></th><th>prompt</th><th>answer</th><th>completion</th></tr>"]
    for item, text in zip(items, texts, strict=True):
        wrong = "✗ format" if lenient_correct(text, item["answer"]) else "✗"
        cells = ["✓" if strict_correct(text, item["answer"]) else wrong, item["prompt"], item["answer"], text]
        cells = [html.escape(cell).replace("\n", "<br>") for cell in cells]
        rows.append(f"<tr><td>{'</td><td>'.join(cells)}</td></tr>")
    return f"<table>{''.join(rows)}</table>"


def examples(items, texts):
    """Format the first correct and the first wrong completion, one line each, shortened in the middle."""
    lines = {}
    for item, text in zip(items, texts, strict=True):
        name = "right" if strict_correct(text, item["answer"]) else "wrong"
        if name not in lines:
            shown = (item["prompt"], text, item["answer"])
            prompt, text, answer = ("".join(c if c.isprintable() else " " for c in x) for x in shown)
            text = text if len(text) <= 80 else f"{text[:40]} ... {text[-35:]}"
            lines[name] = f"    {name}  {prompt[-40:]} -> {text}{f' (answer: {answer[:40]})' * (name == 'wrong')}"
    return "\n".join(lines[name] for name in sorted(lines))


def wilson_interval(successes, trials):
    """Return the 95% confidence interval of a proportion (Wilson 1927), which stays within [0, 1]."""
    z, share = 1.96, successes / trials
    center = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return max(0.0, (center - spread) / (1 + z * z / trials)), min(1.0, (center + spread) / (1 + z * z / trials))


def summary(results, num_problems):
    """Format held-out accuracy with its 95% interval. results: [{"strict": share, "lenient": share}], in order"""
    lines = [f"\nHeld-out accuracy, greedy decoding, {num_problems} problems (95% interval)"]
    for name in ("strict", "lenient"):
        cells = []
        for share in (result[name] for result in results):
            low, high = wilson_interval(round(share * num_problems), num_problems)
            cells.append(f"{share:6.1%} ({low:.1%} to {high:.1%})")
        lines.append(f"    {name:8}{'  ->  '.join(cells)}")
    return "\n".join(lines)


# --- The run's folder -------------------------------------------------------------------------------------------------


def resume_command(folder):
    processes = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"))
    launcher = "python" if processes == "1" else f"torchrun --nproc_per_node {processes}"
    return f"{launcher} {shlex.quote(sys.argv[0])} --config {shlex.quote(str(folder / 'config.yml'))}"


def check_folder(config):
    """Return the path of the run's folder. Raise UserError if it holds anything but a run that may resume."""
    folder = Path(config.log_dir) / (config.run_name or f"{datetime.datetime.now():%Y-%m-%d_%H-%M-%S_%f}")
    try:
        existing = next(path for path in [folder, *folder.parents] if path.exists())
        found = set(os.listdir(existing)) - {"run.lock"} if existing == folder else None
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise PermissionError(f"{existing} is not a folder that can be written to")
    except (OSError, ValueError) as error:
        raise UserError(f"log_dir: {folder} cannot be created: {one_line(error)}") from None
    if found and not (is_run(folder) and config.resume == "auto"):
        raise UserError(f"run_name: {folder} already exists; choose another name or delete it")
    return folder


def open_folder(config):
    """Create or reopen the run's folder and lock it.

    Return the folder, the config that resumes the run, and the lock.
    """
    folder = check_folder(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"log_dir: {folder} cannot be created: {one_line(error)}") from None
    lock = filelock.FileLock(folder / "run.lock", timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise UserError(f"run_name: {folder} is in use by another process") from None
    except OSError as error:  # a file system without locks
        say(f"warning: {folder} cannot be locked: {error}; do not start a second run in it")
    (folder / "run.lock").touch()  # marks the folder as a run
    paths = {"log_dir": str(folder.parent), "run_name": folder.name, "resume": "auto"}
    return folder, config.model_copy(update=paths), lock


def run_identity(config, setup):
    """Return {key: value} of the config, problems and model that must not change when a run resumes."""
    values = {key: value for key, value in config.model_dump().items() if key not in FREE_KEYS}
    if all(value == "constant" for key, value in values.items() if key.endswith("_schedule")):
        del values["num_steps"]
    problems = json.dumps(
        [[p.ids, p.item] for p in setup.train_set + setup.test_set], default=lambda x: type(x).__name__
    )
    return {
        "script": type(config).__name__,
        **values,
        "problems": f"{zlib.crc32(problems.encode()):08x}",
        "starting weights": fingerprint(dict(setup.model.named_parameters())),
    }


def find_progress(folder, identity, journal):
    """Return the state to resume from, its checkpoint's path, and the journal's states after that checkpoint.

    Return ({}, None, []) if nothing is saved yet. Raise UserError if the folder holds a run with another `identity`.
    """
    states = read_journal(folder / "journal.jsonl")
    path, saved = newest_checkpoint(folder, len(states) - 1 if states else math.inf)
    state = states[-1] if states else saved
    if state:
        check_identity(folder, identity, state["identity"])
    if path and journal and not states:
        raise UserError(f"resume: {folder / 'journal.jsonl'} is empty or missing, but the run has checkpoints")
    if not state and (checkpoint_folders(folder) or (folder / "best").exists()):
        raise UserError(f"resume: {folder / 'checkpoints'} has no undamaged checkpoint")
    check_model(folder, state.get("step", -1))
    return state, path, states[saved.get("step", 0) + 1 :]


def check_identity(folder, ours, theirs):
    """Raise UserError for the first key in which the identities of the config and of the run in the folder differ."""
    if ours["problems"] == theirs.get("problems"):  # their files may have moved
        theirs = theirs | {key: ours[key] for key in ("dataset", "dataset_args") if key in theirs}
    for key in ours | theirs:
        if ours.get(key) != theirs.get(key):
            started = f"with {theirs[key]!r}" if key in theirs else "without this key"
            can_train_on = key.startswith("num_") and (folder / "model").is_dir()
            advice = "use another run_name" + f" and model={folder / 'model'} to train on" * can_train_on
            raise UserError(f"resume: {folder}: {key}: {ours.get(key)!r}: the run was started {started}; {advice}")


def check_model(folder, step):
    """Raise UserError if resuming after `step` would overwrite the trained model of a later step."""
    file = folder / "model" / EVALUATION
    saved = json.loads(file.read_text())["step"] if file.exists() else math.inf
    if (folder / "model").exists() and saved > step:
        lost = f"the run's state after step {max(step, 0)} is lost"
        raise UserError(f"resume: {folder / 'model'} is complete, but {lost}; move it away to train again")


# --- Checkpoints and journal ------------------------------------------------------------------------------------------


def write_file(path, text):
    """Write a file atomically."""
    Path(f"{path}.partial").write_text(text)
    Path(f"{path}.partial").replace(path)


@contextlib.contextmanager
def whole_folder(folder):
    """Yield a new folder that replaces `folder` once it is complete. After an error, remove it."""
    partial = Path(f"{folder}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def checkpoint_folders(folder):
    """Return {step: path} of a run's checkpoints, newest first."""
    paths = {int(path.name[5:]): path for path in (folder / "checkpoints").glob("step_*") if path.name[5:].isdigit()}
    return dict(sorted(paths.items(), reverse=True))


def save_checkpoint(folder, state, keep, write):
    """Save the state and the files of `write(path)` in checkpoints/step_NNNNNN. Keep the newest `keep` checkpoints."""
    step = state["step"]
    with whole_folder(folder / "checkpoints" / f"step_{step:06d}") as path:
        write(path)
        (path / "state.json").write_text(json.dumps(state))
        (path / "sha256.json").write_text(json.dumps(digests(path)))
    saved = checkpoint_folders(folder)
    later = [path for other, path in saved.items() if other > step]  # damaged, or of steps that were lost
    old = [path for other, path in saved.items() if other <= step][keep:]
    for path in [*later, *old, *folder.glob("checkpoints/*.partial")]:
        shutil.rmtree(path, ignore_errors=True)  # a partly removed one counts as damaged, and the next save removes it
        if path.exists():
            say(f"warning: {path} cannot be removed")


def digests(folder):
    """Return {path: SHA-256} of the files in a checkpoint."""
    result = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "sha256.json":
            with open(path, "rb") as file:
                result[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return result


def read_state(path):
    """Return the state in a checkpoint. Raise UserError for the first file that is damaged or missing."""
    try:
        saved, found = dict(json.loads((path / "sha256.json").read_text())), digests(path)
    except (OSError, ValueError, TypeError):
        raise UserError(f"{path / 'sha256.json'} is damaged or missing") from None
    for name in saved | {"state.json": None}:
        if name not in saved or saved[name] != found.get(name):
            raise UserError(f"{path / name} is damaged or missing")
    return json.loads((path / "state.json").read_text())


def newest_checkpoint(folder, last_step=math.inf):
    """Return (path, state) of the newest undamaged checkpoint up to `last_step`, or (None, {}). Report damaged ones."""
    for step, path in checkpoint_folders(folder).items():
        if step <= last_step:
            try:
                return path, read_state(path)
            except UserError as error:
                say(f"resume: {error}; trying the previous checkpoint")
    return None, {}


def read_journal(path):
    """Return the states in a journal, one per step from 0. Remove an incomplete last line."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    if lines and not lines[-1].endswith(b"\n"):
        os.truncate(path, sum(map(len, lines[:-1])))
        lines.pop()
    try:
        states = [json.loads(line) for line in lines]
    except ValueError:
        states = [None]
    if not all(isinstance(state, dict) and state.get("step") == step for step, state in enumerate(states)):
        raise UserError(f"resume: {path} is damaged")
    return states
