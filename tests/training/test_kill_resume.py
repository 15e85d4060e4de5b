"""The short form of kill_resume.py: real processes, real SIGKILLs."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "kill_resume.py"


@pytest.mark.parametrize("kills", [2, pytest.param(30, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_ends_bitwise_equal(kills):
    size = ["--epochs", "2", "--train-images", "200"] if kills < 10 else []
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--kills", str(kills), *size],
        capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bitwise equal" in done.stdout
