"""Folders of finished runs, made up: what tools.ablate leaves, without training."""

import json
from pathlib import Path

from tools.paper import rows_for
from tools.runs import remember
from tools.trials import TABLES, Budget, Trial, run_name


def make_run(folder: Path, row, seed: int, top1: float, **changes) -> None:
    """A finished run of one epoch that scored top1."""
    path = folder / run_name(row, seed)
    path.mkdir(parents=True)
    config = Trial(row, seed).config(Budget("DIGITS")).to_dict()
    summary = {
        "test_top1_pct": top1,
        "test_images": 400,
        "epochs": 1,
        "seconds": 10.0 + seed,
        "parameters": 1234567,
        "flops_per_image": 2500000,
        "selected": "the last epoch (none held out)",
        "device": "cpu",
        "torch": "2",
    }
    (path / "config.json").write_text(json.dumps(config | {"data_dir": "/secret/data", "output_dir": "/secret/runs"}))
    (path / "summary.json").write_text(json.dumps(summary | changes))
    (path / "log.jsonl").write_text(json.dumps({"epoch": 1, "val_top1_pct": top1}) + "\n")


def make_table_5(folder: Path) -> None:
    """Table 5 on ResNet26: three seeds of "relative", two of "none", no "absolute"."""
    none, _, relative = rows_for(TABLES["5"], "ResNet26")
    for seed, top1 in enumerate((90.0, 92.0, 97.0)):
        make_run(folder, relative, seed, top1)
    for seed, top1 in enumerate((80.0, 83.0)):
        make_run(folder, none, seed, top1)
    remember(folder, Budget("DIGITS"), [("5", "ResNet26")])
