"""Code run in a Python process of its own, with torch and this checkout imported."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def python_command(code: str) -> list[str]:
    return [sys.executable, "-c", f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport torch\n{code}"]


def environment(changes: dict[str, str] | None = None) -> dict[str, str]:
    """This process's, without the caller's compiler and backend."""
    return {k: v for k, v in os.environ.items() if k not in ("CXX", "SASA_BACKEND")} | (changes or {})


def run_python(code: str, env: dict[str, str] | None = None, timeout: float = 120) -> subprocess.CompletedProcess:
    return subprocess.run(
        python_command(code), capture_output=True, text=True, timeout=timeout, env=environment(env), check=False
    )
