"""tools.backends: the backend of each layer of a network."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.backends import main

ROOT = Path(__file__).resolve().parents[2]


def test_the_choice_for_each_layer_is_printed(capsys, monkeypatch):
    monkeypatch.setenv("SASA_BACKEND", "tiled")
    assert main(["--model-name", "resnet26", "--form", "small", "--stem"]) == 0
    lines = capsys.readouterr().out.splitlines()
    chosen = [line.split() for line in lines if "layer" in line and " K 7" in line]
    assert len(chosen) == 8
    assert all(line[-1] == "tiled" for line in chosen)
    assert "layer2.0.spatial B 1 N 8 D 16 H 32 W 32 K 7 tiled" in (" ".join(line) for line in chosen)
    assert any("stem.0" in line and "K 4" in line and "PyTorch (sasa/kernels/stem.py)" in line for line in lines)


def test_as_a_command():
    done = subprocess.run([sys.executable, "-m", "tools.backends", "--img-size", "64"], cwd=ROOT, capture_output=True,
                          text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120)  # fmt: skip
    assert done.returncode == 0 and "reference  usable" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "arguments",
    [["--img-size", "4"], ["--device", "magic"], ["--form", "large"], ["--model-name", "ResNet27"]],
    ids=" ".join,
)
def test_wrong_usage_is_one_line_and_exit_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert captured.err.startswith("tools.backends: error: ") and arguments[1] in captured.err
