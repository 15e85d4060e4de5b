"""Folders of finished runs, as tools.ablate makes them, and the figures of a table's rows there. Read without torch.

A folder of runs holds ablation.json (data set, shared flags, the tables wanted) and a folder a run with
config.json, log.jsonl and summary.json: every figure comes from the summaries.

Spread: mean and standard deviation (n - 1) over the seeds that are there. Difference: the mean over the seeds of row
minus base, paired by seed, with Student's 95% interval.
"""

import contextlib
import errno
import io
import json
import math
import os
import re
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from config import DATASETS, MODELS
from sasa.console import one_line, printable
from sasa.data.specs import SPECS
from sasa.files import json_text, open_regular, write_text
from tools.paper import Row, rows_for
from tools.trials import TABLES, Budget, run_name, table_name, varied

ABOUT = "ablation.json"
LARGEST_FILE = 64 << 20  # bytes of a configuration, a summary or a log
# Student's t, 0.975, for n = 2 to 10 seeds; for more the last serves, a little too wide.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class RunsError(Exception):
    """Runs that make no table; one line."""


class Folder(NamedTuple):
    """The finished runs of one folder: `summaries` by run name, `configs` likewise; `tables` as (table, network)."""

    path: Path
    budget: Budget
    tables: list[tuple[str, str | None]]
    summaries: dict[str, dict[str, Any]]
    configs: dict[str, dict[str, Any]]


def remember(path: Path, budget: Budget, tables: list[tuple[str, str | None]]) -> None:
    """Write ablation.json, the folder's mark: the tables asked for now beside those of before.

    Raises:
        RunsError: the folder holds tables without that mark, or another file of its name.
    """
    before = []
    if os.path.lexists(path / ABOUT):
        before = read_about(path)[1]
    elif any(path.glob("table*.*")):
        raise RunsError(f"{printable(path)}: holds tables that tools.report has not written: another --output-dir")
    wanted = before + [table for table in tables if table not in before]
    about = {"dataset": budget.dataset, "flags": budget.words(), "tables": wanted}
    path.mkdir(parents=True, exist_ok=True)
    write_text(path / ABOUT, json_text(about, indent=2) + "\n")


def read_about(path: Path) -> tuple[Budget, list[tuple[str, str | None]]]:
    """What ablation.json says: what the folder's runs share, and its tables as (table, network).

    Raises:
        RunsError: there is none, or its content is not what `remember` writes.
    """
    about = read_json(path / ABOUT)
    if about is None:
        raise RunsError(f"{printable(path)}: no {ABOUT} in it: not a folder that tools.ablate has written")
    try:
        budget = Budget(about["dataset"], tuple(about["flags"]))
        tables = [(table_name(name), model) for name, model in about["tables"]]
        fitting = [model in (MODELS if TABLES[name].rows[0].model is None else (None,)) for name, model in tables]
        # A flag that train.py does not take ends the process with a line about a command line that nobody gave.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            known = budget.dataset in DATASETS and budget.words() is not None
    except (KeyError, TypeError, ValueError, AttributeError, SystemExit) as error:
        raise RunsError(f"{printable(path / ABOUT)}: not what tools.report writes ({one_line(error, 200)})") from None
    if not (known and all(fitting)):
        raise RunsError(f"{printable(path / ABOUT)}: a data set, table or network that does not exist")
    return budget, tables


def is_whole(summary: dict[str, Any]) -> bool:
    """Whether a summary has what tables show; a run whose weights went bad has no score."""
    numbers = ("test_top1_pct", "test_images", "epochs", "seconds", "parameters", "flops_per_image")
    words = ("selected", "device", "torch")
    return (
        all(type(summary.get(key)) in (int, float) and abs(summary[key]) < 1e18 for key in numbers)
        and all(isinstance(summary.get(key), str) for key in words)
        and summary["test_images"] > 0
    )


def read(path: Path) -> Folder:
    """Raises RunsError: not a folder of runs, or its runs were not of one length and test set.

    Nor of one moving average, unless the rows of its tables set that, or the recipe that says it. Where --early-stop
    ends each run by its own figures, their length is the one that they may have.
    """
    budget, tables = read_about(path)
    summaries, configs = {}, {}
    for folder in sorted(p for p in path.iterdir() if p.is_dir()):
        summary, config = read_json(folder / "summary.json"), read_json(folder / "config.json")
        if summary is not None and config is not None and is_whole(summary):
            summaries[folder.name], configs[folder.name] = summary, config
    lengths = configs if budget.given().get("early_stop") else summaries
    compared = [("epochs", lengths), ("test_images", summaries)]
    if not varied(row for name, model in tables for row in rows_for(TABLES[name], model)) & {"ema", "recipe"}:
        compared.append(("ema", configs))
    for key, of in compared:
        kinds = {str(record.get(key)): name for name, record in of.items()}
        if len(kinds) > 1:
            what = ", ".join(f"{value} in {printable(name)}" for value, name in kinds.items())
            raise RunsError(f"{printable(path)}: runs that cannot be compared, {key}: {what}")
    return Folder(path, budget, tables, summaries, configs)


def length(folder: Folder) -> str:
    """How long its runs trained, in words."""
    if folder.budget.given().get("early_stop"):
        return f"at most {next(iter(folder.configs.values()))['epochs']} epochs"
    return f"{next(iter(folder.summaries.values()))['epochs']} epochs"


# ---- files of runs --------------------------------------------------------------------------------------------------


def read_bytes(path: Path) -> bytes:
    """The content of a small file that a run has written; no link is followed.

    Raises:
        OSError: it cannot be read, or is no file of at most `LARGEST_FILE` bytes.
    """
    with os.fdopen(open_regular(path, os.O_RDONLY), "rb") as file:
        content = file.read(LARGEST_FILE + 1)
    if len(content) > LARGEST_FILE:
        raise OSError(errno.EFBIG, f"more than {LARGEST_FILE >> 20} MiB", str(path))
    return content


def read_json(path: Path) -> dict[str, Any] | None:
    """The dictionary in a file of a run; None where it is missing or not whole. A number that is not finite is None."""
    try:
        values = json.loads(read_bytes(path), parse_constant=lambda _: None)
    except (OSError, ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's log. Raises RunsError where one is no dictionary, or the file cannot be read."""
    try:
        rows = [json.loads(line) for line in read_bytes(path).splitlines()]
    except (OSError, ValueError, RecursionError):
        rows = [None]
    if not all(isinstance(row, dict) for row in rows):
        raise RunsError(f"{printable(path)}: not a log, whose lines are JSON")
    return rows


# ---- figures of rows ------------------------------------------------------------------------------------------------


def deviation(values: list[float]) -> float | None:
    """Standard deviation (n - 1); None for fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else None


def interval(values: list[float]) -> float | None:
    """Half of the 95% interval of the mean; None for one value."""
    if len(values) < 2:
        return None
    return STUDENT[min(len(values) - 2, len(STUDENT) - 1)] * statistics.stdev(values) / math.sqrt(len(values))


def seeds_of(folder: Folder, row: Row) -> list[int]:
    """The seeds that the row was run with."""
    found = (re.fullmatch(re.escape(run_name(row, 0)[:-1]) + r"(\d+)", name) for name in folder.summaries)
    return sorted(int(match[1]) for match in found if match)


def balanced(folder: Folder, of: list[dict[str, Any]]) -> dict[str, Any]:
    """Balanced accuracy, for a data set whose classes may be of any size; runs of before it was kept have none."""
    if SPECS[folder.budget.dataset].side is not None:
        return {}
    scores = [summary.get("test_balanced_pct") for summary in of]
    known = bool(scores) and all(type(score) in (int, float) and math.isfinite(score) for score in scores)
    return {
        "test_balanced_pct_mean": statistics.fmean(scores) if known else None,
        "test_balanced_pct_std": deviation(scores) if known else None,
    }


def record(folder: Folder, table: str, row: Row) -> dict[str, Any]:
    """A row's figures, with their units in the keys; None where there is no run or no figure."""
    seeds = seeds_of(folder, row)
    of = [folder.summaries[run_name(row, seed)] for seed in seeds]
    base = row._replace(model=row.depth, flags=row.base)
    shared = sorted({*seeds} & {*seeds_of(folder, base)}) if base != row else []

    def top1(which: Row, seed: int) -> float:
        return folder.summaries[run_name(which, seed)]["test_top1_pct"]

    differences = [top1(row, seed) - top1(base, seed) for seed in shared]
    scores = [summary["test_top1_pct"] for summary in of]
    return {
        "table": table,
        "row": row.label,
        "model": row.model,
        "flags": row.flags,
        "base": "" if base == row else run_name(base, 0).removesuffix("-seed0"),
        "n": len(of),
        "seeds": " ".join(map(str, seeds)),
        "parameters": of[0]["parameters"] if of else None,
        "flops_per_image": of[0]["flops_per_image"] if of else None,
        "test_top1_pct_mean": statistics.fmean(scores) if scores else None,
        "test_top1_pct_std": deviation(scores),
        **balanced(folder, of),
        "difference_points": statistics.fmean(differences) if differences else None,
        "difference_interval_points": interval(differences),
        "difference_n": len(differences),
        "seconds_mean": statistics.fmean(summary["seconds"] for summary in of) if of else None,
        "paper_top1_pct": row.printed.top1_pct,
        "paper_gflops": row.printed.gflops,
        "paper_mparams": row.printed.mparams,
        "runs": " ".join(run_name(row, seed) for seed in seeds),
    }


def records(folder: Folder, table: str, model: str | None) -> list[dict[str, Any]]:
    return [record(folder, table, row) for row in rows_for(TABLES[table], model)]
