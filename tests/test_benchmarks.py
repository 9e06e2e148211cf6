"""The benchmark for a GPU runs at toy size, so that it does not fail on a GPU first."""

import json

from conftest import run_script


def test_real_sizes_runs_as_a_toy(tmp_path):
    problems = tmp_path / "train.jsonl"
    lines = [json.dumps({"question": f"Ann has {n} apples, eats {n // 2} and buys 3."}) for n in range(2, 6)]
    problems.write_text("\n".join(lines))
    sizes = "--sizes toy --prompts 2 --samples 2 --new-tokens 3 --members 2 --rounds 1".split()
    done = run_script(["--problems", str(problems), *sizes], script="benchmarks/real_sizes.py")
    assert done.returncode == 0, done.stderr
    for row in ("low_rank, one batch", "graphs", "eager", "generate", "with gradient checkpointing"):
        assert f"| {row} |" in done.stdout
    assert "graphs and eager have 100.0% of tokens in common" in done.stdout
