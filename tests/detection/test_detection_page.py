"""docs/detection.md: its table is what is counted, its commands are taken."""

import re
import shlex
from pathlib import Path

from sasa.detection.config import DetectionConfig
from sasa.training.cli import parse_command_line
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
