"""README: what it shows is run as it is written there, and what it promises or names is there."""

import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, SCRIPTS, scalars

README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title):
    return re.search(rf"^## {title}\n(.*?)(?=^## )", README, re.DOTALL | re.MULTILINE)[1]


def blocks(title, language=""):
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", section(title), re.DOTALL | re.MULTILINE)
    return [text for kind, text in fenced if kind == language]


@pytest.fixture
def clone(tmp_path):
    """A folder with all that a clone has, to run commands in."""
    for path in ROOT.iterdir():
        if path.suffix in (".py", ".yml"):
            shutil.copy(path, tmp_path)
    (tmp_path / "tiny_model").symlink_to(ROOT / "tiny_model")
    return tmp_path


def run(command, folder):
    command = re.sub(r"^python ", f"{shlex.quote(sys.executable)} ", command)
    done = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_your_own_task_runs_as_written_and_is_learned(clone):
    for code in blocks("Your own task in ten lines", "python"):
        name = re.match(r"# (\w+\.py)\n", code)[1]
        (clone / name).write_text(code)
    make, train = blocks("Your own task in ten lines")[-1].splitlines()
    run(make, clone)
    run(train, clone)
    (folder,) = (clone / "grpo_logs").iterdir()
    curve = [accuracy for _, accuracy in scalars(folder)["eval/strict_accuracy"]]
    assert curve[0] < 0.1 and curve[-1] > 0.6


def test_result_is_loaded_merged_sampled_from_and_trained_on_as_written(clone):
    for name, script in SCRIPTS.items():
        script.train(clone / f"{name}_logs" / "NAME", "model=tiny_model")
    load, sample = blocks("Using the result", "python")
    merge, load_es = load.index("model = model.merge"), load.index('model = AutoModelForCausalLM.from_pretrained("es_')
    es, merged, adapter = (
        run(f"python -c {shlex.quote(code + sample)}", clone) for code in (load, load[:load_es], load[:merge])
    )
    compare = """
merged, base = model(ids).logits, AutoModelForCausalLM.from_pretrained("tiny_model")(ids).logits
assert (merged - adapter).abs().max() < 0.01 * (adapter - base).abs().max()
"""
    logits = "\nimport torch\nids = torch.arange(20)[None]\nadapter = model(ids).logits\n"
    run(f"python -c {shlex.quote(load[:merge] + logits + load[merge:load_es] + compare)}", clone)
    assert merged == adapter and all("<answer>" in output or "<think>" in output for output in (es, merged))

    commands = [line.partition("#")[0].strip() for line in blocks("Using the result")[-1].splitlines()]
    assert len(commands) == 4
    for i, command in enumerate(commands):
        name = re.match(r"python (\w+)_train.py", command)[1]
        folder = clone / f"{name}_logs" / f"again{i}"
        more = ["kl_weight=0.1"] if name == "grpo" else []
        run(f"{command} {' '.join([*SCRIPTS[name].small, *more])} run_name={folder.name}", clone)
        curves = scalars(folder)
        if name == "grpo":
            assert curves["policy/kl_k3"][0] == (1, 0.0)  # at the first step the reference is the policy itself
            assert curves["policy/kl_k3"][-1][1] > 0


def test_every_test_that_is_named_exists_and_every_promise_names_one():
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    guarantees = section("What is guaranteed")
    named = re.findall(r"`(test_\w+)`", guarantees)
    assert len(named) > 30
    for name in named:
        assert f"def {name}(" in tests, name
    assert all("`test_" in promise for promise in guarantees.split("\n- ")[1:])


def test_every_command_names_files_that_exist():
    files = re.findall(r"(?:python|--config|num_processes 2|nproc_per_node 2) ((?:\w+/)*[\w.-]+\.(?:py|yml))", README)
    assert len(files) > 15
    for name in files:
        assert (ROOT / name).is_file() or "/NAME/" in name or name == "make_problems.py", name
    for name in re.findall(r"^([\w./]+)", blocks("Files")[0], re.MULTILINE):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"\]\(((?!http|#)[^)#]+)", README):
        assert (ROOT / name).exists(), name


def test_every_key_of_both_configs_is_in_a_table():
    table = section("Configuration")
    for script in SCRIPTS.values():
        for key in script.config_class.model_fields:
            assert re.search(rf"^\|.*`{key}`.*\|", table, re.MULTILINE), key
    keys = {key for script in SCRIPTS.values() for key in script.config_class.model_fields}
    for cells in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE):
        assert set(re.findall(r"`(\w+)`", cells)) <= keys, cells
