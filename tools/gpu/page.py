"""The results of a device as a Markdown page."""

import re

from tools.gpu.predictions import PREDICTIONS, verdict
from tools.gpu.stage import line_of, number

STATES = ("error", "unmet", "not_reached")
TITLES = {
    "machine": "Machine and its ceilings",
    "tests": "Tests",
    "right": "Kernels against the definition in fp64",
    "times": "Times beside cuDNN's convolutions",
    "counters": "Hardware counters",
    "steps": "Training steps",
    "compiled": "Training steps with torch.compile",
    "runs": "Short runs",
}


def render(results: dict[str, dict], is_dry: bool) -> str:
    """results: stage -> {"units": {unit: result}, "seconds": its last run's}."""
    about = results.get("machine", {}).get("units", {}).get("versions", {})
    lines = [f"# {escape(str(about.get('gpu', 'Unknown device')))}", ""]
    if is_dry:
        lines += ["**A dry run: every time on this page is a stub's.**", ""]
    lines += ["Written by `python -m tools.gpu --write`.", "", "## Predictions", ""]
    lines += markdown_table(
        ["stage", "what", "figure", "predicted", "measured", "within"],
        [
            [row["stage"], row["unit"], row["key"], f"{row['low']:g} to {row['high']:g}", shown(row["measured"]),
             {None: "", True: "yes", False: "no"}[row["within"]]]
            for row in (verdict(prediction, results) for prediction in PREDICTIONS)
        ],
    )  # fmt: skip
    for stage, result in results.items():
        lines += ["", f"## {TITLES[stage]}", "", *units_table(result["units"])]
    return "\n".join(lines) + "\n"


def units_table(units: dict[str, dict]) -> list[str]:
    """A row a unit, a column a figure; what has none stands below, with the reason."""
    whole = {name: unit for name, unit in units.items() if not unit.keys() & set(STATES)}
    keys = list(dict.fromkeys(key for unit in whole.values() for key in unit if key != "seconds"))
    rows = [[name, *(shown(unit.get(key)) for key in keys)] for name, unit in whole.items()]
    lines = markdown_table(["", *keys], rows) if rows else []
    others = [f"- {escape(name)}: {escape(line_of(unit))}" for name, unit in units.items() if name not in whole]
    return [*lines, *([""] if lines and others else []), *others]


def markdown_table(head: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(escape(cell) for cell in line) + " |" for line in lines]


def shown(value: object) -> str:
    """A figure in a cell; nothing for None."""
    return "" if value is None else number(value)


def escape(text: str) -> str:
    """Text of other programs as plain text in a table."""
    return re.sub(r"([|<>`*_\[\]])", r"\\\1", text) if text != "---" else text
