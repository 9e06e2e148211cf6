"""Tests of runs.py: signals, skipped steps, out of memory, run folders, checkpoints, TensorBoard, terminal output."""

import contextlib
import html
import json
import math
import multiprocessing
import os
import re
import runpy
import shlex
import shutil
import signal
import sys
import time
import types
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import (
    ROOT,
    SCRIPTS,
    Process,
    assert_same_run,
    assert_same_weights,
    files_of,
    flip_a_bit,
    model_weights,
    read_events,
    scalars,
)
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tensorboard.plugin_util import markdown_to_safe_html
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tqdm import tqdm

import generation
import grpo_train
import reward
import runs
import utils
from reward import REWARDS, UserError, score
from runs import checkpoint_folders, completion_table, newest_checkpoint, read_state, save_checkpoint

# Signals


def test_signal_stops_after_the_step_with_a_checkpoint_and_prints_the_command_that_resumes(tmp_path, script):
    folder, overrides = tmp_path / "run", ["num_steps=7", "checkpoint_every=2"]
    process = Process(script, folder, *overrides)
    process.wait_until(lambda: "held-out" in process.out)  # output to a file is flushed line by line
    process.wait_until(lambda: 2 in checkpoint_folders(folder))
    number = {"grpo": signal.SIGINT, "es": signal.SIGTERM}[script.key]
    process.send_signal(number)
    assert process.wait() == 128 + number, process.err
    assert "stopping after this step; a second signal stops at once" in process.err and "Traceback" not in process.err
    step = int(re.search(r"stopped after step (\d+); to resume:\n", process.out)[1])
    assert 2 <= step < 7 and max(checkpoint_folders(folder)) == step and not (folder / "model").exists()
    assert [at for at, _ in scalars(folder)["reward/mean"]] == list(range(1, step + 1))
    command = shlex.split(process.out.splitlines()[-1])
    assert command == ["python", str(ROOT / f"{script.name}.py"), "--config", str(folder / "config.yml")]
    process = Process(script, folder, *command[2:])
    assert process.wait() == 0 and f"resuming after step {step}" in process.out, process.err
    assert_same_run(folder, script.train(tmp_path / "uninterrupted", *overrides))


def test_first_signal_is_noted_the_second_is_not_caught_and_handlers_are_put_back(monkeypatch):
    before = list(map(signal.getsignal, runs.STOP_SIGNALS))
    for number in runs.STOP_SIGNALS:
        with runs.stop_signals() as received:
            assert not received
            signal.raise_signal(number)
            assert received == [number]
            assert {signal.getsignal(each) for each in runs.STOP_SIGNALS} == {signal.SIG_DFL}
            monkeypatch.setattr(os, "write", Mock(side_effect=OSError("Input/output error")))  # a closed terminal
        assert list(map(signal.getsignal, runs.STOP_SIGNALS)) == before
    monkeypatch.undo()
    monkeypatch.setattr(runs, "STOP_SIGNALS", [signal.SIGHUP])
    for ignored in (signal.SIG_IGN, signal.SIG_DFL):  # nohup, no nohup
        signal.signal(signal.SIGHUP, ignored)
        with runs.stop_signals() as received:
            assert (signal.getsignal(signal.SIGHUP) == signal.SIG_IGN) == (ignored == signal.SIG_IGN)


def test_ctrl_c_that_is_ignored_at_the_start_stays_ignored(monkeypatch, script):
    monkeypatch.setattr(sys, "argv", [script.name, "--help"])
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for `python ... &` in a script
    try:
        with pytest.raises(SystemExit):
            runpy.run_path(str(ROOT / f"{script.name}.py"), run_name="__main__")
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_without_a_reader_of_its_output_a_run_saves_its_model(monkeypatch, tmp_path, script):
    monkeypatch.setattr(runs.tqdm, "write", Mock(side_effect=BrokenPipeError))
    assert model_weights(script.train(tmp_path / "run", "num_steps=1"))


def sleepy(seconds):
    time.sleep(seconds)


def test_processes_of_a_reward_function_end_when_told_and_survive_what_a_terminal_sends(monkeypatch):
    monkeypatch.setattr(reward, "IN_CHILDREN", set(runs.STOP_SIGNALS))
    # A reward function may keep its pool, which then began before the training.
    with multiprocessing.get_context("fork").Pool(2) as pool, runs.stop_signals() as received:
        pids = [worker.pid for worker in multiprocessing.active_children()]
        result = pool.map_async(sleepy, [0.5, 0.5])
        time.sleep(0.2)
        for pid in pids:
            os.kill(pid, signal.SIGINT)
            os.kill(pid, signal.SIGHUP)
        assert result.get(timeout=20) == [None, None]
        pool.terminate()
        started = time.monotonic()
        pool.join()
        assert time.monotonic() - started < 20 and not received
        assert not multiprocessing.active_children()
        for _ in range(20):  # a signal that arrives while the process is still being forked is not lost
            pid = os.fork()
            if pid == 0:
                time.sleep(60)
                os._exit(0)
            os.kill(pid, signal.SIGTERM)
            limit = time.monotonic() + 10
            while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0 and time.monotonic() < limit:
                time.sleep(0.01)
            os.kill(pid, signal.SIGKILL) if ended[0] == 0 else None
            assert os.WTERMSIG(ended[1]) == signal.SIGTERM


# One-line errors for a full disk and out of memory


def last_line(monkeypatch, script, main):
    """Return the line that the script exits with if its main() is `main`."""
    monkeypatch.setattr(sys, "argv", [f"{script.name}.py"])
    monkeypatch.setattr(signal, "signal", Mock())  # keep pytest's handlers
    with pytest.raises(SystemExit) as error:
        utils.run_from_command_line(main, script.config_class, ROOT / f"{script.key}_config.yml")
    return str(error.value)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Exception("File too large (os error 27)")])
def test_any_exception_for_a_full_disk_is_one_line_unless_a_reward_function_raised_it(monkeypatch, error):
    line = last_line(monkeypatch, SCRIPTS["grpo"], Mock(side_effect=error))
    assert line == f"error: the disk is full: {error}; earlier checkpoints are intact"
    monkeypatch.setitem(REWARDS, "failing", Mock(side_effect=error))
    items = [{"prompt": "3+4", "answer": "7"}]
    with pytest.raises(type(error), match=re.escape(str(error))):
        last_line(monkeypatch, SCRIPTS["grpo"], lambda config: score({"failing": 1.0}, ["7"], items))


@pytest.mark.parametrize(("key", "where"), [("grpo", "rollout"), ("grpo", "update"), ("es", "rollout")])
def test_out_of_gpu_memory_ends_the_run_with_one_line_that_names_the_keys(tmp_path, monkeypatch, key, where):
    refuse = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 9 GiB."))
    monkeypatch.setattr(SCRIPTS[key].module, where, refuse)
    assert last_line(monkeypatch, SCRIPTS[key], lambda config: SCRIPTS[key].train(tmp_path / "run")) == (
        "error: out of GPU memory: lower max_new_tokens or the keys of Memory and speed "
        "(CUDA out of memory. Tried to allocate 9 GiB.)"
    )
    assert refuse.call_count == 1  # nothing is retried


# Steps with a non-finite reward, loss or gradient


SICK = []  # for each call of the reward function, the third completion's reward, or 0 for the usual one


def sick(completions, **columns):
    rewards, value = [float(len(text)) for text in completions], SICK.pop(0) if SICK else 0
    return [value or rewards[2] if i == 2 else reward for i, reward in enumerate(rewards)]


def test_non_finite_rewards_skip_steps_and_many_in_a_row_stop_the_run_with_the_reason(tmp_path, capsys, script):
    folder, overrides = tmp_path / "run", ["rewards={accuracy: 1.0, 'test_runs:sick': 1.0}", "lr_schedule=constant"]
    overrides += ["num_steps=8", "max_skipped_steps=3", "keep_checkpoints=1", "checkpoint_every=1"]
    overrides += ["population_batch=6"] * (script.key == "es")  # one call per step
    SICK[:] = [0, 0, math.nan, 0, math.inf, 0, math.nan, math.nan, math.nan]  # the first call is a check
    with pytest.raises(UserError) as error:
        script.train(folder, *overrides)
    assert str(error.value) == (
        "max_skipped_steps: 3 consecutive steps were skipped, the last because "
        "reward/test_runs:sick of completion 2 is nan; the last checkpoint before them: "
        f"{folder}/checkpoints/step_000005"  # although every step is saved
    )
    out = capsys.readouterr().out
    for step, value in {2: "nan", 4: "inf", 6: "nan", 7: "nan", 8: "nan"}.items():
        assert f"step {step} skipped: reward/test_runs:sick of completion 2 is {value}\n" in out
    assert [v for _, v in scalars(folder)["optim/skipped_steps"]] == [0, 1, 1, 2, 2, 3, 4, 5]
    skipped = {step: read_state(path)["weights"] for step, path in checkpoint_folders(folder).items()}
    assert list(skipped) == [7, 6, 5] and len(set(skipped.values())) == 1
    script.train(folder, *overrides)  # the rewards are finite again, and the run resumes
    assert scalars(folder)["optim/skipped_steps"][-1] == (8, 4)  # the third skipped step in a row was not saved
    assert newest_checkpoint(folder)[1]["weights"] != skipped[7]
    assert all(weight.isfinite().all() for weight in model_weights(folder).values())


def test_non_finite_log_prob_of_the_sampler_skips_the_step(tmp_path, capsys, monkeypatch, script):
    honest, calls = generation.sample, []

    def sample(logits, uniforms, temperature):
        tokens, log_probs = honest(logits, uniforms, temperature)
        calls.append(len(logits) > 8)  # a rollout: evaluation decodes 8 rows
        if calls[-1] and sum(calls) == 2:  # the second token: no completion has ended
            log_probs[1] = torch.nan
        return tokens, log_probs

    monkeypatch.setattr(generation, "sample", sample)
    folder = script.train(tmp_path / "run", "num_steps=2")
    assert "step 1 skipped: log_prob of completion 1 is nan" in capsys.readouterr().out
    assert [v for _, v in scalars(folder)["optim/skipped_steps"]] == [1, 1]


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_non_finite_loss_or_gradient_skips_the_step(tmp_path, capsys, monkeypatch, what):
    script, honest, calls = SCRIPTS["grpo"], grpo_train.policy_loss, []

    def policy_loss(log_probs, *args):
        loss, ratio = honest(log_probs, *args)
        calls.append(1)
        if len(calls) == 1 and what == "loss":
            loss = loss + torch.inf  # a constant leaves the gradient finite
        if len(calls) == 1 and what == "gradient":
            log_probs.register_hook(lambda grad: grad * torch.inf)
        return loss, ratio

    monkeypatch.setattr(grpo_train, "policy_loss", policy_loss)
    folder = script.train(tmp_path / "run", "num_steps=2", "checkpoint_every=1", "updates_per_step=2")
    message = r"step 1 skipped: the loss is (\S+) and the gradient norm (\S+)\n"
    loss, norm = re.search(message, capsys.readouterr().out).groups()
    assert (loss in ("inf", "nan"), norm == "nan") == (what == "loss", what == "gradient")
    assert [v for _, v in scalars(folder)["optim/skipped_steps"]] == [1, 1]
    assert len(calls) == 1 + 2  # the skipped step makes no second update
    first, second = (read_state(checkpoint_folders(folder)[step])["weights"] for step in (1, 2))
    assert first != second and all(weight.isfinite().all() for weight in model_weights(folder).values())


# The run's folder and its checkpoints


def test_folder_is_made_or_reopened_and_never_one_with_anything_else_in_it(tmp_path):
    def find(**values):
        overrides = (f"{key}={json.dumps(value)}" for key, value in values.items())
        folder, _, lock = runs.open_folder(SCRIPTS["es"].config(tmp_path / "x", *overrides))
        lock.release()
        return folder

    contents = {"killed": "run.lock", "begun": "run.lock config.yml", "foreign": "checkpoints", "other": "notes.txt"}
    for name, files in contents.items():
        (tmp_path / name).mkdir()
        for file in files.split():
            (tmp_path / name / file).touch()
    (tmp_path / "empty").mkdir()
    for name in ("new", "new", "empty", "killed", "begun"):
        assert find(run_name=name) == tmp_path / name and (tmp_path / name).is_dir()
    assert find(run_name=None) != find(run_name=None)  # in the same second
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="^log_dir: .*link/run cannot be created: .*File exists"):
        runs.open_folder(SCRIPTS["es"].config(tmp_path / "link" / "run"))
    for values in ({"run_name": "begun", "resume": "never"}, {"run_name": "foreign"}, {"run_name": "other"}):
        with pytest.raises(UserError, match="(begun|foreign|other) already exists; choose another name or delete it"):
            find(**values)


def save_small(folder, step, keep=2):
    def write(path):
        (path / "model").mkdir()
        (path / "model" / "weights").write_bytes(bytes([step]) * 100)

    save_checkpoint(folder, {"step": step}, keep, write)
    return folder / "checkpoints"


def test_at_whatever_call_a_process_dies_the_newest_checkpoint_is_whole(tmp_path, monkeypatch):
    """Die at each call that moves or removes files in turn: before the call, and for rmtree in the middle of it."""
    for last in range(100):
        folder, calls = tmp_path / str(last), []
        save_small(folder, 1), save_small(folder, 2)

        def dies(honest, calls=calls, last=last):
            def call(moved, *args, **kwargs):
                if len(calls) == last and honest is shutil.rmtree and Path(moved).exists():
                    next(file for file in Path(moved).rglob("*") if file.is_file()).unlink()
                if len(calls) >= last:  # a dead process does not clean up
                    calls.append("dead")
                    raise KeyboardInterrupt
                calls.append(honest.__name__)
                return honest(moved, *args, **kwargs)

            return call

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(shutil, "rmtree", dies(shutil.rmtree))
            patch.setattr(Path, "rename", dies(Path.rename))
            save_small(folder, 3)
        path, state = newest_checkpoint(folder)
        assert state["step"] in (2, 3) and read_state(path) == state
        assert sorted(os.listdir(save_small(folder, 4)))[-1] == "step_000004"
        assert not list((folder / "checkpoints").glob("*.partial"))
        if "dead" not in calls:
            break
    assert {"rename", "rmtree"} <= set(calls) and last >= 4


def test_leftovers_of_kills_and_damaged_or_lost_checkpoints_make_way_for_good_ones(tmp_path, monkeypatch, capsys):
    checkpoints = save_small(tmp_path, 1)
    for name in ("step_000002.partial", "step_000005"):  # half-written; damaged and from lost steps
        (checkpoints / name / "model").mkdir(parents=True)
        (checkpoints / name / "model" / "half").touch()
    save_small(tmp_path, 2)
    assert sorted(os.listdir(checkpoints)) == ["step_000001", "step_000002"]
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, ignore_errors=False: None)
        save_small(tmp_path, 3)
    assert list(checkpoint_folders(tmp_path)) == [3, 2, 1]
    assert f"{tmp_path}/checkpoints/step_000001 cannot be removed" in capsys.readouterr().out
    assert sorted(os.listdir(save_small(tmp_path, 4))) == ["step_000003", "step_000004"]


DAMAGE = {
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
    "emptied": lambda file: os.truncate(file, 0),
    "lengthened": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "other JSON": lambda file: file.write_text('{"state.json": 1}'),
    "no checksums": lambda file: file.write_text("{}"),
    "deleted": lambda file: file.unlink(),
    "a bit flipped": flip_a_bit,
    "another bit flipped": lambda file: flip_a_bit(file, seed=1),
}


def test_any_damage_to_any_file_of_a_checkpoint_is_found_and_the_file_named(tmp_path, capsys, script, finished):
    copy = shutil.copytree(finished[script.key], tmp_path / "run")
    newest, previous = checkpoint_folders(copy).values()
    files = sorted(files_of(newest))
    assert len(files) >= 6 and {"state.json", "sha256.json"} < set(files)
    for name in files:
        whole = (newest / name).read_bytes()
        for damage in DAMAGE.values():
            damage(newest / name)
            path, state = newest_checkpoint(copy)
            assert path == previous and state["step"] == 2
            named = "\\S*" if name == "sha256.json" else re.escape(name)
            assert re.match(rf"resume: {newest}/{named} is damaged or missing; trying", capsys.readouterr().out)
            (newest / name).write_bytes(whole)
    assert newest_checkpoint(copy)[0] == newest


journal_line = st.dictionaries(st.text(max_size=9), st.none() | st.floats() | st.lists(st.text(max_size=9), max_size=3))
journal_line = journal_line.map(lambda state: json.dumps(state).encode() + b"\n")


@given(st.lists(st.binary(max_size=40) | journal_line | st.just(b"\n"), max_size=6))
def test_any_journal_is_read_up_to_its_last_whole_line_or_named(tmp_path_factory, some):
    path, content = tmp_path_factory.getbasetemp() / "journal.jsonl", b"".join(some)
    path.write_bytes(content)
    try:
        states = runs.read_journal(path)
    except UserError as error:
        assert str(error) == f"resume: {path} is damaged"
        return
    whole = content[: content.rfind(b"\n") + 1]
    assert path.read_bytes() == whole and len(states) == whole.count(b"\n")
    assert json.dumps(runs.read_journal(path)) == json.dumps(states)


# TensorBoard and terminal output


def test_completions_in_the_log_are_marked_right_wrong_or_wrong_in_format():
    texts = ["7 eggs", "<think>.</think><answer>7</answer>", "it is 8"]
    table = completion_table([{"prompt": "<b>\n", "answer": "7"}] * 3, texts)
    rows = table.split("<tr>")[2:]
    assert [re.match("<td>(.*?)</td>", row)[1] for row in rows] == ["✗ format", "✓", "✗"]
    assert "\n" not in table and all("<td>&lt;b&gt;<br></td><td>7</td>" in row for row in rows)


def visible(text):
    return "".join(c for c in text if c.isprintable() and c not in " ?")  # TensorBoard shows "?" for control characters


@pytest.mark.filterwarnings("ignore:html5lib")
@given(st.text(alphabet="<>&\"'`*_|\\[]()#-1.! \n\r\tab=/:;\x02\x03\u2028"))
@example("`a` [link](javascript:alert(1)) ![image](http://x/y.png) <b>*_|\\ &amp; \x02amp\x03 # 1. -\r\u2028")
@example("</td></table>\r\n\r\n<script>alert(1)</script>\n\n# heading")
def test_completions_in_the_log_are_text_and_never_markup(text):
    table = completion_table([{"prompt": text, "answer": text}], [text])
    for shown in (table, markdown_to_safe_html(table)):  # as written, and as TensorBoard serves it
        assert "<" not in re.sub("</?(table|tbody|tr|th|td)>|<br>", "", shown)
        cells = re.findall("<td>(.*?)</td>", shown.replace("<br>", ""), re.DOTALL)
        assert [visible(html.unescape(cell)) for cell in cells[1:]] == [visible(text)] * 3


def test_config_hyperparameters_and_completions_are_logged(finished):
    events = read_events(finished["grpo"])
    assert {"config/text_summary", "completions/text_summary"} <= set(events.Tags()["tensors"])
    tags = ("_hparams_/session_start_info", "_hparams_/experiment")
    start, page = (HParamsPluginData.FromString(events.SummaryMetadata(tag).plugin_data.content) for tag in tags)
    assert [metric.name.tag for metric in page.experiment.metric_infos] == ["eval/strict_accuracy"]
    logged = start.session_start_info.hparams
    assert logged["group_size"].number_value == 4 and '"rank": 4' in logged["lora"].string_value
    assert logged["model"].string_value == str(ROOT / "tiny_model")


def test_accuracy_is_logged_by_tokens_and_by_seconds_of_training(finished, script):
    folder = finished[script.key]
    curves, by_tokens = scalars(folder), scalars(folder / "by_tokens")
    tokens, seconds = ([0, *dict(curves[f"progress/{x}"][1::2]).values()] for x in ("generated_tokens", "seconds"))
    for name in ("strict_accuracy", "lenient_accuracy"):
        values = [value for _, value in curves[f"eval/{name}"]]
        assert by_tokens[f"by_tokens/{name}"] == [(n // 1000, value) for n, value in zip(tokens, values, strict=True)]
    assert by_tokens["by_tokens/strict_accuracy"] != by_tokens["by_tokens/lenient_accuracy"]
    events = read_events(folder / "by_tokens")
    assert [e.wall_time for e in events.Scalars("by_tokens/strict_accuracy")] == pytest.approx(seconds, rel=1e-6)


def test_wilson_interval_by_published_values():
    assert runs.wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-3)
    assert runs.wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-3)  # Newcombe 1998, table I
    for trials in range(1, 600):  # no "-0.0%"
        assert str(runs.wilson_interval(0, trials)[0])[0] != "-" and runs.wilson_interval(trials, trials)[1] <= 1


@pytest.mark.parametrize(("num_steps", "hours"), [(60, 0), (1740, 100)])
def test_progress_bar_fits_80_columns(num_steps, hours):
    run = runs.Run.__new__(runs.Run)
    run.progress, run.state = tqdm(total=num_steps, bar_format=runs.BAR, file=open(os.devnull, "w")), {"step": 1}
    metrics = {"reward/mean": 0.9876, "accuracy/strict": 1.0}
    run._show_progress(metrics | {"throughput/tokens_per_second": torch.tensor(123456.0)})
    values = run.progress.format_dict | {"n": num_steps - 1, "elapsed": 3600 * hours + 40, "prefix": "evaluate"}
    line = tqdm.format_meter(**values | {"ncols": 80})
    assert len(line) <= 80
    assert line.startswith(f"evaluate {num_steps - 1}/{num_steps} |")
    assert line.endswith(" left, reward 0.99, accuracy 100%, 123k tokens/s")


def test_without_a_terminal_there_is_a_line_every_half_minute(tmp_path, capsys, monkeypatch):
    now = [0.0]

    def takes(seconds, function):
        return lambda *args: (now.__setitem__(0, now[0] + seconds), function(*args))[1]

    monkeypatch.setattr(runs, "time", types.SimpleNamespace(monotonic=lambda: now[0], perf_counter=lambda: now[0]))
    monkeypatch.setattr(utils, "evaluate", takes(1000, utils.evaluate))
    monkeypatch.setattr(grpo_train, "rollout", takes(12, grpo_train.rollout))
    SCRIPTS["grpo"].train(tmp_path / "run", "num_steps=8", "eval_every=8")
    output = capsys.readouterr()
    status = r"reward -?\d\.\d\d, accuracy \d+%, [\d.]+ tokens/s"
    lines = re.findall(rf"^ +(\d/8)  {status}, (\d\d:\d\d) left$", output.out, re.MULTILINE)
    assert lines == [("3/8", "01:00"), ("6/8", "00:24")]
    assert not output.err


# Warnings, and the best weights


WELL = {"accuracy/strict": 0.2, "accuracy/format": 0.9, "completion/truncated": 0.1, "policy/entropy": 1.0}
COLLAPSED = WELL | {"policy/entropy": 0.09}
UNLUCKY = {name: value for name, value in WELL.items() if name != "policy/entropy"}  # all groups tie: no entropy
SIGNALS = {  # what happens: a list of (metrics, signal), and the warnings
    "well": ([(WELL, 0.5)] * 50, []),
    "tied": ([(WELL, 0.49)] * 50, ["ties: for 10 steps"]),
    "tied, but correct": ([(WELL | {"accuracy/strict": 0.3}, 0.0)] * 50, []),
    "tied with interruptions": (([(WELL, 0.4)] * 9 + [(WELL, 0.6)]) * 5, []),
    "no signal later": ([(WELL, 0.6)] * 5 + [(UNLUCKY, 0)] * 3, ["no signal: for 3 steps"]),
    "no signal twice": (([(WELL, 0.6)] * 5 + [(UNLUCKY, 0)] * 3) * 2, ["no signal: for 3 steps"]),
    "collapsed": ([(WELL, 0.6)] + [(COLLAPSED, 0.6)] * 20, ["entropy: for 10 steps"]),
    "collapsed so that groups tie": (
        [(WELL, 0.6)] + [(COLLAPSED, 0.1), (UNLUCKY, 0.0)] * 5,
        ["ties: for 10 steps", "entropy: for 10 steps"],
    ),
    "ES, which has no entropy": ([(UNLUCKY, 0.6)] * 50, []),
}


@pytest.mark.parametrize("happens", SIGNALS)
def test_what_goes_wrong_for_many_steps_is_reported_once_and_nothing_else(happens):
    steps, warnings = SIGNALS[happens]
    counts = dict.fromkeys(runs.WARNINGS, 0)
    run = types.SimpleNamespace(state={"entropy": 0, "first_entropy": 0, "warnings": counts}, say=Mock())
    for metrics, signal_ in steps:
        run.state = json.loads(json.dumps(run.state))  # as after resuming
        runs.Run._warn(run, metrics, signal_)
    texts = [call.args[0] for call in run.say.call_args_list]
    assert [text[: len(warning)] for text, warning in zip(texts, warnings, strict=True)] == warnings
    last = "In the last step, 20% of the samples were correct, 90% had the format and 10% were truncated. Try "
    assert all(last in text for text in texts)


@pytest.mark.parametrize(("key", "cause"), [("grpo", "reward"), ("grpo", "mask_truncated"), ("es", "reward")])
def test_steps_without_any_signal_are_reported(tmp_path, capsys, key, cause):
    script = SCRIPTS[key]
    overrides = ["max_new_tokens=2", "rewards={accuracy: 1.0}"]  # no answer fits in two tokens
    if cause == "mask_truncated":  # all rows are truncated, although their rewards differ
        overrides = ["max_new_tokens=2", "rewards={'test_resume:draw': 1.0}", "mask_truncated=true"]
    script.train(tmp_path / "run", *overrides)
    out = capsys.readouterr().out
    assert out.count("no signal: for 3 steps, no completion had a nonzero advantage in the loss") == 1
    script.train(tmp_path / "other", "max_new_tokens=40")
    assert "no signal" not in capsys.readouterr().out


def test_weights_of_the_best_evaluation_are_kept_and_a_fall_below_it_is_reported(tmp_path, script, capsys, monkeypatch):
    # The run stops after 4 steps and resumes after 3.
    accuracies = iter([0.3, 0.2, 0.6, 0.55, 0.6, *(0.6, 0.3, 0.2)])
    metrics = {"lenient_accuracy": 0.5, "length": 1.0, "truncated": 0.0}
    monkeypatch.setattr(utils, "evaluate", lambda setup: (metrics | {"strict_accuracy": next(accuracies)}, [], []))
    folder = tmp_path / "run"
    overrides = ["num_steps=6", "eval_every=1", "eval_size=64", "keep_checkpoints=9", "checkpoint_every=1"]
    script.train(folder, *overrides, stop_after=4)
    assert json.loads((folder / "best" / "evaluation.json").read_text())["step"] == 2
    card = (folder / "best" / "README.md").read_text()
    assert (
        card.startswith("# run, step 2\n- Base model: ") and "strict 60.0%" in card and f"{folder}/config.yml" in card
    )
    best = files_of(folder / "best")
    if script.key == "es":
        path = folder / "journal.jsonl"
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:4]))
    shutil.rmtree(folder / "checkpoints" / "step_000004")
    script.train(folder, *overrides)
    out = capsys.readouterr().out
    assert files_of(folder / "best") == best  # an equal evaluation replaces nothing
    (file,), (reference,) = (
        path.glob("*.safetensors") for path in (folder / "best", checkpoint_folders(folder)[2] / "model")
    )
    assert_same_weights(file, reference, load_file)
    assert out.count("below best: strict accuracy is significantly lower than 60.0% after step 2. Try a new run ") == 1
    assert f"Best evaluation: strict 60.0% after step 2, saved in {folder}/best.\n" in out
    assert "The final model is significantly worse. Use best/.\n" in out


@pytest.mark.parametrize("later", [0.5, 0.1])
def test_run_that_never_beats_its_start_says_so_and_keeps_no_best(tmp_path, script, capsys, monkeypatch, later):
    accuracies = iter([0.5, later, later])
    metrics = {"lenient_accuracy": 0.5, "length": 1.0, "truncated": 0.0}
    monkeypatch.setattr(utils, "evaluate", lambda setup: (metrics | {"strict_accuracy": next(accuracies)}, [], []))
    folder = script.train(tmp_path / "run", "eval_size=64")
    out = capsys.readouterr().out
    assert "No evaluation was better than the one before training." in out
    assert ("below best: strict accuracy is significantly lower than 50.0% after step 0." in out) == (later == 0.1)
    assert "best/" not in out and not (folder / "best").exists()


def test_zero_steps_evaluate_once_and_save_no_model(tmp_path, script, capsys):
    folder = script.train(tmp_path / "run", "num_steps=0")
    out = capsys.readouterr().out
    script.train(folder, "num_steps=0")
    assert not (folder / "model").exists() and not checkpoint_folders(folder)
    assert out.count("held-out: strict") == 1 and "->  " not in out and "Saved" not in out
    assert re.search(r"^    strict +\d+\.\d% \(\d+\.\d% to \d+\.\d%\)$", out, re.MULTILINE)


def test_each_evaluation_shows_one_right_and_one_wrong_completion_in_a_line_each():
    right, wrong = "<think>1+1=2</think>\n<answer>2</answer>", "x\x1b" * 99 + "<answer>3</answer>"
    items = [{"prompt": f"Compute {text}", "answer": "2"} for text in ("1+1", "0+2", "2+0")]
    assert runs.examples(items, [wrong, right, "2"]).splitlines() == [
        "    right  Compute 0+2 -> <think>1+1=2</think> <answer>2</answer>",
        f"    wrong  Compute 1+1 -> {'x ' * 20} ...  {'x ' * 8}<answer>3</answer> (answer: 2)",
    ]
    assert runs.examples(items[:1], [right]).startswith("    right") and "wrong" in runs.examples(items[:1], [wrong])
