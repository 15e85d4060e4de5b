"""The short form of kill_resume.py: real processes, real SIGKILLs."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "kill_resume.py"


@pytest.mark.parametrize("kills", [2, pytest.param(30, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_ends_bitwise_equal(kills):
    # Seed 1 kills in the run's first third and second half, wherever a loaded machine stretches it.
    size = ["--epochs", "3", "--train-images", "80", "--seed", "1"] if kills < 10 else []
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--kills", str(kills), *size],
        capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bitwise equal" in done.stdout
