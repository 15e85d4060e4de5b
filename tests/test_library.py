"""Each block of docs/library.md runs, in its order, each section with the names of those before; and visualize.md's."""

import re
import warnings
from pathlib import Path

import pytest
import torch

from tools.export import torch_can_export

ROOT = Path(__file__).resolve().parents[1]


PAGE = (ROOT / "docs" / "library.md").read_text()
BLOCKS = re.findall(r"(<!-- not run[^\n]*-->\n)?```python\n(.*?)```", PAGE, flags=re.S)
OPTIONAL = ("peft", "onnxruntime", "thop")


def needs(code: str) -> list[str]:
    return [name for name in OPTIONAL if re.search(rf"^(from|import) {name}\b", code, flags=re.M)]


def test_every_block_that_is_not_marked_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, ran, skipped = {}, 0, []
    for mark, code in BLOCKS:
        if mark:
            continue
        absent = [name for name in needs(code) if not installed(name)]
        if "torch.export.export(" in code and not torch_can_export():
            absent.append("a newer torch")
        if absent:
            skipped += absent
            continue
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(compile(code, "docs/library.md", "exec"), names)
        ran += 1
    assert ran + skipped.count("a newer torch") >= 9
    assert names["gradients"]["query.weight"].shape == (4, 8, 8, 1, 1)
    assert names["flops"] > 4e9
    if skipped:
        pytest.skip(f"the blocks of {', '.join(skipped)} were not run: not installed")


def test_the_block_on_attention_maps_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "visualize.md").read_text(), flags=re.S)
    names = {}
    exec(compile(code, "docs/visualize.md", "exec"), names)
    assert names["weights"].shape == (1, 8, 16, 16, 7, 7) and len(names["layers"]) == 8
    assert len(capsys.readouterr().out.splitlines()) == 6


def installed(name: str) -> bool:
    try:
        __import__(name)
    except ImportError:
        return False
    return True
