"""Break one line of the code at a time, and report the mutants that the default tests do not catch.

    python tests/mutants.py            all mutants
    python tests/mutants.py runs.py    those whose row contains this text

tests/README.md lists the mutants. Each one is applied to a copy of the project. The test file that should catch it runs
first. If that passes, all default tests run. The exit code is 1 if a mutant survives.
"""

import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROW = re.compile(r"^\| ([\w/]+\.py) \| `` ?(.+?) ?`` \| `` ?(.+?) ?`` \| (\w+\.py) \| (.+) \|$", re.MULTILINE)


def unescape(cell):
    return "" if cell == "(nothing)" else cell.replace("⏎", "\n").replace("\\|", "|")


def tests_fail(copy, *tests):
    command = [sys.executable, "-B", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    command += ["-k", "not every_mutant_breaks"]  # it fails for each mutant
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode in (0, 1, 2), done.stdout + done.stderr  # 2: importing the mutant fails
    return done.returncode != 0


def main(only=""):
    table = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    mutants = [tuple(map(unescape, row)) for row in ROW.findall(table) if only in " ".join(row)]
    num_survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "*_logs"))
        for file, old, new, tests, defect in mutants:
            text, start = (copy / file).read_text(encoding="utf-8"), time.monotonic()
            assert text.count(old) == 1, f"{file}: {text.count(old)} times: {old}"
            (copy / file).write_text(text.replace(old, new), encoding="utf-8")
            is_caught = tests_fail(copy, f"tests/{tests}") or tests_fail(copy)
            (copy / file).write_text(text, encoding="utf-8")
            num_survivors += not is_caught
            result = "caught" if is_caught else "SURVIVED"
            print(f"{result:8} {time.monotonic() - start:4.0f} s  {file}: {defect}", flush=True)
    print(f"{len(mutants)} mutants, {num_survivors} survivors")
    return 1 if num_survivors or not mutants else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
