"""A short form of `benchmarks/fuzz.py`: one damaged input of every format, answered as promised."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SHORT = 32  # one of every kind


def test_damaged_inputs_are_answered_as_promised() -> None:
    command = [sys.executable, "fuzz.py", "--cases", str(SHORT), "--trust-whole"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=BENCHMARKS, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split(" | ")[1:3] for line in done.stdout.splitlines() if line.startswith("| ")][1:-1]
    assert rows == [["1", "1"]] * SHORT, done.stdout
