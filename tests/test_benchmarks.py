"""The benchmarks run and print their tables; no test looks at a time."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "step.py"


def test_the_step_benchmark_compares_the_same_step_of_all_contenders() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--case", "demo", "--rounds", "2"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for contender in ("ours", "timm", "engine"):
        assert contender in done.stdout
    assert "share of peak" in done.stdout
