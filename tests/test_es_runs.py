"""ES as a user runs it: whole runs, the journal, and a run that is killed again and again."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY, TWO_PROCESSES, run_script, scalars
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import es_train
import runs
from reward import UserError
from utils import fingerprint, load_config, load_model, load_tokenizer

SMALL = [
    "num_iterations=3",
    "prompts_per_iteration=4",
    "population_size=6",
    "max_new_tokens=40",
    "noise_scale=0.03",
    "population_batch=4",
    "eval_size=8",
    "eval_every=2",
]


def train(tmp_path, name, *overrides):
    """A small run in this process; returns its folder."""
    overrides = [*SMALL, f"model={TINY}", f"log_dir={tmp_path}", f"run_name={name}", *overrides]
    es_train.main(load_config(es_train.ESConfig, ROOT / "es_config.yml", overrides))
    return tmp_path / name


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def journal(folder):
    """The state after every step, from step 0 on."""
    return [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]


def assert_same_weights(folder, other):
    ours, theirs = weights(folder), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# Whole runs


def test_script_leaves_an_ordinary_model_and_says_how_to_load_it(tmp_path):
    done = run_script([*SMALL, f"log_dir={tmp_path}", "run_name=run"], script="es_train.py")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    assert f'AutoModelForCausalLM.from_pretrained("{tmp_path}/run/model")' in done.stdout
    assert "Held-out accuracy, greedy, 8 problems (95% interval)" in done.stdout

    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    base = dict(AutoModelForCausalLM.from_pretrained(TINY).named_parameters())
    assert trained.dtype == torch.float32
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "model").chat_template
    assert not (tmp_path / "run" / "model" / "adapter_config.json").exists()
    for name, parameter in trained.named_parameters():
        assert (parameter != base[name]).any(), name  # every tensor was trained

    curves = scalars(tmp_path / "run")
    assert [step for step, _ in curves["eval/strict_accuracy"]] == [0, 2, 3]
    assert [step for step, _ in curves["reward/mean"]] == [1, 2, 3]
    assert [value for _, value in curves["progress/completions"]] == [24, 48, 72]
    assert [value for _, value in curves["progress/prompts"]] == [4, 8, 12]
    for tag in (
        "eval/lenient_accuracy",
        "reward/accuracy",
        "reward/format",
        "accuracy/strict",
        "completion/length_mean",
        "es/reward_min",
        "es/reward_mean",
        "es/reward_max",
        "es/reward_std",
        "es/tie_rate",
        "optim/learning_rate",
        "time/step",
        "time/rollout",
        "time/reward",
        "time/update",
        "throughput/tokens_per_second",
        "progress/generated_tokens",
        "progress/seconds",
    ):
        assert tag in curves and all(math.isfinite(value) for _, value in curves[tag]), tag
    assert len(journal(tmp_path / "run")) == 1 + 3
    resolved = load_config(es_train.ESConfig, tmp_path / "run" / "config.yml")
    assert (resolved.population_size, resolved.run_name, resolved.log_dir) == (6, "run", str(tmp_path))


def test_same_seed_gives_the_same_run_and_another_seed_another(tmp_path):
    folders = [train(tmp_path, "a"), train(tmp_path, "b"), train(tmp_path, "c", "seed=1")]
    assert_same_weights(folders[0], folders[1])
    assert not torch.equal(*(weights(folder)["model.norm.weight"] for folder in (folders[0], folders[2])))
    curves = [scalars(folder) for folder in folders[:2]]
    for tag in curves[0]:
        if not tag.startswith(("time/", "throughput/", "progress/seconds")):
            assert curves[0][tag] == curves[1][tag], tag


@pytest.mark.parametrize("perturbation", ["low_rank", "gaussian"])
@pytest.mark.parametrize("more", [[], ["antithetic=true"]], ids=["plain", "antithetic"])
def test_logged_rewards_are_those_of_the_journal_and_every_parameter_moves(tmp_path, perturbation, more):
    folder = train(tmp_path, "run", f"perturbation={perturbation}", *more)
    curves, states = scalars(folder), journal(folder)[1:]
    for step, state in enumerate(states, start=1):
        assert state["step"] == step and len(state["rewards"]) == 6
        assert dict(curves["es/reward_max"])[step] == pytest.approx(max(state["rewards"]))
        assert dict(curves["reward/mean"])[step] == pytest.approx(sum(state["rewards"]) / 6, abs=1e-6)
        assert sum(state["z"]) == pytest.approx(0, abs=1e-9)
    base = AutoModelForCausalLM.from_pretrained(TINY).state_dict()
    assert all(not torch.equal(value, base[name]) for name, value in weights(folder).items())


def test_batches_of_members_change_no_reward_and_no_weight(tmp_path):
    folders = [train(tmp_path, f"batch{n}", f"population_batch={n}") for n in (1, 4, 32)]
    for folder in folders[1:]:
        assert [state.get("rewards") for state in journal(folder)] == [s.get("rewards") for s in journal(folders[0])]
        assert_same_weights(folder, folders[0])


def test_schedules_decay_noise_and_learning_rate(tmp_path):
    states = journal(train(tmp_path, "run", "lr_schedule=linear", "noise_schedule=cosine", "learning_rate=0.03"))[1:]
    assert [state["learning_rate"] for state in states] == pytest.approx([0.03, 0.02, 0.01])
    expected = [0.03 * (1 + math.cos(math.pi * step / 3)) / 2 for step in range(3)]
    assert [state["noise_scale"] for state in states] == pytest.approx(expected)


@pytest.mark.parametrize("perturbation", ["low_rank", "gaussian"])
def test_bfloat16_run_leaves_a_bfloat16_model_that_loses_no_update(tmp_path, perturbation):
    folder = train(tmp_path, "run", "dtype=bfloat16", f"perturbation={perturbation}", "learning_rate=0.001")
    assert {value.dtype for value in weights(folder).values()} == {torch.bfloat16}
    # The model is displaced by as much as the fp32 master, which the last checkpoint holds: the slope is 1.
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.bfloat16).state_dict()
    master = load_file(folder / "checkpoints" / "step_000003" / "model" / "model.safetensors")
    intended = torch.cat([(master[name].double() - base[name].double()).flatten() for name in master])
    realised = torch.cat([(value.double() - base[name].double()).flatten() for name, value in weights(folder).items()])
    assert float(intended @ realised / intended.square().sum()) == pytest.approx(1, abs=0.05)


def test_training_goes_on_from_a_saved_model_and_from_an_adapter(tmp_path):
    import grpo_train

    first = train(tmp_path, "first")
    second = train(tmp_path, "second", f"model={first / 'model'}")
    assert scalars(second)["eval/strict_accuracy"][0][1] == scalars(first)["eval/strict_accuracy"][-1][1]

    overrides = ["num_steps=1", "warmup_steps=0", "prompts_per_step=2", "group_size=4", "max_new_tokens=40"]
    overrides += ["eval_size=8", f"model={TINY}", f"log_dir={tmp_path}", "run_name=grpo", "learning_rate=0.01"]
    grpo_train.main(load_config(grpo_train.GRPOConfig, ROOT / "grpo_config.yml", overrides))
    third = train(tmp_path, "third", f"model={tmp_path / 'grpo' / 'model'}")
    before = scalars(tmp_path / "grpo")["eval/lenient_accuracy"][-1][1]
    assert scalars(third)["eval/lenient_accuracy"][0][1] == before
    assert weights(third).keys() == weights(first).keys()  # merged: no adapter is left


def test_equal_rewards_change_no_bit_of_the_model(tmp_path, monkeypatch):
    (tmp_path / "es_test_rewards.py").write_text(
        "def same(completions, **columns):\n    return [0.9] * len(completions)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    folder = train(tmp_path, "run", "rewards={'es_test_rewards:same': 1.0}")
    base = dict(AutoModelForCausalLM.from_pretrained(TINY).named_parameters())
    for name, value in weights(folder).items():
        assert torch.equal(value, base[name]), name
    assert [value for _, value in scalars(folder)["es/tie_rate"]] == [1, 1, 1]


def test_two_processes_end_with_the_very_weights_of_one(tmp_path, hugging_face_datasets):
    # Five members and seven problems do not divide by two, and antithetic pairs are split between the processes.
    for more in (["population_size=5"], ["antithetic=true", "perturbation=gaussian"]):
        overrides = [*SMALL, f"log_dir={tmp_path / more[0]}", "device=cpu", "eval_size=7", *more]
        for name, launcher in {"one": None, "two": TWO_PROCESSES}.items():
            options = {"launcher": launcher} if launcher else {}
            arguments = [*overrides, f"run_name={name}"]
            done = run_script(arguments, script="es_train.py", path=[hugging_face_datasets], **options)
            assert done.returncode == 0, done.stderr
            assert done.stdout.count("Held-out accuracy") == 1
            assert f"device  {1 + (name == 'two')} x cpu" in done.stdout
        one, two = tmp_path / more[0] / "one", tmp_path / more[0] / "two"
        assert_same_weights(one, two)
        assert [state.get("weights") for state in journal(one)] == [state.get("weights") for state in journal(two)]
        curves = scalars(one), scalars(two)
        assert curves[0].keys() == curves[1].keys()
        for tag in curves[0]:
            if not tag.startswith(("time/", "throughput/", "progress/seconds")):
                assert [v for _, v in curves[1][tag]] == pytest.approx([v for _, v in curves[0][tag]]), tag


# The journal


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return train(tmp_path_factory.mktemp("finished"), "run", "num_iterations=5", "lr_schedule=linear")


def copy_of(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # so that the whole journal is replayed
    return tmp_path / "run" / "journal.jsonl"


RESUME = ["num_iterations=5", "lr_schedule=linear"]


@pytest.mark.parametrize("perturbation", ["low_rank", "gaussian"])
def test_replay_from_the_base_model_gives_the_weights_of_every_step_bit_for_bit(tmp_path, perturbation):
    folder = train(tmp_path, "run", f"perturbation={perturbation}", "antithetic=true", "dtype=bfloat16")
    config = load_config(es_train.ESConfig, folder / "config.yml")
    model = load_model(TINY, "bfloat16", "cpu")
    parameters = dict(model.named_parameters())
    master = {name: parameter.detach().float().clone() for name, parameter in parameters.items()}
    shapes = es_train.noise_shapes(parameters, perturbation, config.rank)
    for state in journal(folder):
        states = [state] if state["step"] else []
        es_train.load_progress(None, states, SimpleNamespace(model=model), master, shapes, config)
        assert fingerprint(master) == state["weights"]
    for name, value in weights(folder).items():
        assert torch.equal(master[name].bfloat16(), value) and torch.equal(parameters[name], value), name
    assert len({state["weights"] for state in journal(folder)}) == 4


@pytest.mark.parametrize("num_lines", [0, 1, 3, 5])
@pytest.mark.parametrize("torn", [b"", b'{"step": 4, "rewa', b'{"step": 4}'], ids=["whole", "torn", "no-end"])
def test_run_goes_on_after_the_last_whole_line(finished, tmp_path, num_lines, torn):
    path = copy_of(finished, tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:num_lines]) + torn)
    train(tmp_path, "run", *RESUME)
    assert_same_weights(tmp_path / "run", finished)
    for state, expected in zip(journal(tmp_path / "run"), journal(finished), strict=True):
        assert state | {"seconds": 0} == expected | {"seconds": 0}


@pytest.mark.parametrize("num_committed", [0, 1, 2, 5])
def test_step_that_was_logged_but_not_committed_is_logged_once(finished, tmp_path, monkeypatch, num_committed):
    honest, count = runs.Run._commit, []

    def commit(*args, **kwargs):
        count.append(1)
        if len(count) > num_committed:
            raise KeyboardInterrupt
        honest(*args, **kwargs)

    monkeypatch.setattr(runs.Run, "_commit", commit)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, "run", *RESUME)
    monkeypatch.undo()
    assert len(journal(tmp_path / "run")) == num_committed
    train(tmp_path, "run", *RESUME)
    ours, theirs = scalars(tmp_path / "run"), scalars(finished)
    assert ours.keys() == theirs.keys()
    for tag in theirs:
        if not tag.startswith(("time/", "throughput/", "progress/seconds")):
            assert ours[tag] == theirs[tag], tag
        assert len(ours[tag]) == len(theirs[tag]), tag


def test_finished_run_is_left_as_it_is_or_made_longer(finished, tmp_path):
    path = copy_of(finished, tmp_path)
    before = path.read_bytes()
    train(tmp_path, "run", *RESUME)
    assert path.read_bytes() == before
    assert_same_weights(tmp_path / "run", finished)

    first = train(tmp_path, "longer", "num_iterations=3")
    before = (first / "journal.jsonl").read_bytes()
    train(tmp_path, "longer", "num_iterations=5")
    assert (first / "journal.jsonl").read_bytes().startswith(before)
    assert_same_weights(first, train(tmp_path, "at once", "num_iterations=5"))


def test_run_may_end_where_it_was_stopped(tmp_path, capsys):
    folder = train(tmp_path, "run", "num_iterations=4", "eval_every=4")
    path = folder / "journal.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))  # step 3 was not evaluated
    shutil.rmtree(folder / "model")
    train(tmp_path, "run", "num_iterations=3", "eval_every=4")
    assert "step    3  held-out" in capsys.readouterr().out
    assert_same_weights(folder, train(tmp_path, "other", "num_iterations=3"))


def test_saved_config_resumes_the_run(finished, tmp_path):
    path = copy_of(finished, tmp_path)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    config = tmp_path / "run" / "config.yml"
    config.write_text(config.read_text().replace(str(finished.parent), str(tmp_path)))
    done = run_script(["--config", str(config)], script="es_train.py")
    assert done.returncode == 0, done.stderr
    assert "resuming after step 4" in done.stdout
    assert_same_weights(tmp_path / "run", finished)
    assert not (ROOT / "es_logs" / "run").exists()


def edit_line(number, change):
    def edit(lines):
        line = json.loads(lines[number])
        change(line)
        return lines[:number] + [json.dumps(line).encode() + b"\n"] + lines[number + 1 :]

    return edit


BAD_JOURNALS = {
    "line removed": (lambda lines: lines[:2] + lines[3:], "does not give the weights"),
    "first line removed": (lambda lines: lines[1:], "does not give the weights"),
    "line twice": (lambda lines: lines[:2] + lines[1:], "does not give the weights"),
    "damaged": (lambda lines: lines[:2] + [b'{"step": 2, "rew\n'] + lines[3:], "is damaged"),
    "not json": (lambda lines: [b"\xff\x00\n"] + lines[1:], "is damaged"),
    "other z": (edit_line(2, lambda line: line["z"].reverse()), "does not give the weights"),
    "other rate": (edit_line(1, lambda line: line.update(learning_rate=1)), "does not give the weights"),
}


@pytest.mark.parametrize("case", BAD_JOURNALS)
def test_damaged_journal_is_named_and_left_alone(finished, tmp_path, case):
    path = copy_of(finished, tmp_path)
    edit, message = BAD_JOURNALS[case]
    path.write_bytes(b"".join(edit(path.read_bytes().splitlines(keepends=True))))
    before = path.read_bytes()
    with pytest.raises(UserError, match="resume: ") as error:
        train(tmp_path, "run", *RESUME)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["noise_scale=0.02"], "noise_scale: 0.02, but that run was started with 0.03"),
        (["seed=1"], "seed: 1, but that run was started with 0"),
        (["dataset_args={max_operators: 2}"], "dataset_args: {'max_operators': 2}, but that run was started with {}"),
        (["num_iterations=6"], "num_iterations: 6, but that run was started with 5"),  # its schedule ends there
        (["resume=never"], "exists already; choose another name or delete it"),
    ],
)
def test_journal_of_another_config_is_refused_and_the_key_named(finished, tmp_path, overrides, message):
    copy_of(finished, tmp_path)
    with pytest.raises(UserError) as error:
        train(tmp_path, "run", *RESUME, *overrides)
    assert message in str(error.value)


def test_fewer_iterations_than_were_done_are_refused(tmp_path):
    train(tmp_path, "run")
    with pytest.raises(UserError, match="resume: .*: 3 steps are done, more than the 2 to do"):
        train(tmp_path, "run", "num_iterations=2")


def test_journal_of_another_model_is_refused(finished, tmp_path):
    copy_of(finished, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(TINY)
    model.model.norm.weight.data[0] += 1e-3
    model.save_pretrained(tmp_path / "other")
    load_tokenizer(TINY).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"resume: .*: starting weights: '\w{8}', but that run was started with '"):
        train(tmp_path, "run", *RESUME, f"model={tmp_path / 'other'}")


def test_any_changed_bit_changes_the_fingerprint():
    generator = torch.Generator().manual_seed(0)
    master = {"matrix": torch.randn(5, 7, generator=generator), "vector": torch.randn(9, generator=generator)}
    prints = {fingerprint(master)}
    changes = 0
    for name, weight in master.items():
        for i in range(weight.numel()):
            for bit in (0, 13, 30):
                changed = weight.clone()
                changed.view(torch.int32).view(-1)[i] ^= 1 << bit
                prints.add(fingerprint({**master, name: changed}))
                changes += 1
    swapped = master["matrix"].clone()
    swapped[0, :2] = swapped[0, :2].flip(0)
    prints |= {fingerprint({**master, "matrix": swapped}), fingerprint({"matrix": master["matrix"]})}
    assert len(prints) == 1 + changes + 2
