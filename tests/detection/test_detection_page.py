"""docs/detection.md: its tables are what is counted and what the runs scored, its commands are taken."""

import dataclasses
import json
import re
import shlex
import statistics
from pathlib import Path

import pytest
import torch

from sasa.analysis.flops import count_parameters
from sasa.detection.config import DetectionConfig, resolve
from sasa.detection.flops import detector_flops
from sasa.detection.run import build_detector
from sasa.training.cli import parse_command_line
from sasa.training.files import read_config
from tools import audit

ROOT = Path(audit.__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "detection.md").read_text(encoding="utf-8")


def test_the_table_is_the_audit_s():
    lines = PAGE[PAGE.index("| backbone |") :].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    printed = [row.printed for row in audit.DETECTION.rows]
    wanted = []
    for made, theirs in zip(audit.detection_documents(), (printed, [None, None]), strict=True):
        for record, paper in zip(made["rows"], theirs, strict=True):
            ours = f"{record['flops'] / 1e9:.1f}", f"{record['parameters'] / 1e6:.3f}"
            held = ("-", "-", "-") if paper is None else (paper.gflops, paper.mparams, paper.map_pct)
            wanted.append([f"{ours[0]} ({held[0]})", f"{ours[1]} ({held[1]})", str(held[2])])
    assert [row[2:] for row in cells] == wanted


def test_the_commands_are_taken():
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.S)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    ours = [words[words.index("sasa.detection.train") + 1 :] for words in lines if "sasa.detection.train" in words]
    assert len(ours) == 6
    for words in ours:
        parse_command_line(words, DetectionConfig)  # a wrong flag ends the process


# ---- the digits -----------------------------------------------------------------------------------------------------

KINDS = {"convolution": ["convolution", "convolution"], "attention": ["attention", "convolution"],
         "heads": ["attention", "attention"]}  # fmt: skip
FLAGS = {"convolution": {"attention_stages": ()}, "attention": {}, "heads": {"heads": "attention"}}


def runs_of(kind: str) -> list[Path]:
    return sorted((ROOT / "results" / "detection-digits").glob(f"{kind}-seed?"))


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def rows_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def shown(values: list[float]) -> str:
    """Mean and, of several, standard deviation; "-" of none."""
    if not values:
        return "-"
    text = f"{statistics.fmean(values):.1f}"
    return text + (f" +- {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def counts_of(run: Path) -> list[str]:
    """Parameters in millions and FLOPs in MFLOPs of a run's detector."""
    config = DetectionConfig.from_dict(read_config(run)[0])
    with torch.device("meta"):
        detector = build_detector(config, 10)
    flops = detector_flops(detector, config.img_size).total
    return [f"{count_parameters(detector) / 1e6:.2f}", f"{flops / 1e6:.0f}"]


def test_the_digits_table_is_what_the_runs_scored():
    wanted = []
    for kind in filter(runs_of, KINDS):
        logs = [rows_of(run) for run in runs_of(kind)]
        epochs = [[log[epoch]["val_map_pct"] for log in logs if len(log) > epoch] for epoch in (0, 1)]
        last = [log[-1] for log in logs]
        at = [shown([row[f"val_map_{iou}_pct"] for row in last]) for iou in (50, 75)]
        counts = counts_of(runs_of(kind)[0])
        wanted.append([*KINDS[kind], *counts, *map(shown, epochs), *at, "/".join(str(len(e)) for e in epochs)])
    lines = PAGE[PAGE.index("| backbone | heads | M parameters") :].split("\n\n")[0].splitlines()[2:]
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in lines] == wanted


@pytest.mark.parametrize("run", [run for kind in KINDS for run in runs_of(kind)], ids=lambda run: run.name)
def test_a_run_of_the_digits_has_the_recipe_of_its_command(run):
    """Its configuration is what the page's command gives now: the table is of this recipe."""
    kind, seed = run.name.split("-seed")
    saved = DetectionConfig.from_dict(read_config(run)[0])
    now = resolve(FLAGS[kind] | {"seed": int(seed)}, "DIGITS")
    assert not saved.stem  # so that the number of its mixtures says nothing
    same = {key: getattr(saved, key) for key in ("amp", "name", "progress", "save_minutes", "stem_mixtures")}
    assert dataclasses.replace(now, **same) == saved
    rows = rows_of(run)
    assert [row["step"] for row in rows] == [500, 1000][: len(rows)]
    if (run / "summary.json").exists():
        summary = read(run / "summary.json")
        assert summary["steps"] == 1000 and summary["val_map_pct"] == rows[-1]["val_map_pct"]
