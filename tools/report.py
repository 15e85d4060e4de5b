"""From finished runs to tables: Markdown and CSV of a folder of tools.ablate, and docs/results.md of results/.

    python -m tools.report --add runs/ablate/digits    copy its runs' small files to results/, then as without flags
    python -m tools.report                             write the tables of results/ and docs/results.md anew
    python -m tools.report --check                     exit 1 where one of them is not what the runs say

A folder of runs holds ablation.json (data set, shared flags, the tables that were asked for) and a folder a run with
config.json, log.jsonl and summary.json. The tables are written beside them; notes.md, where a person wrote one, is
shown below them in docs/results.md, and results/notes.md at its head. Read without torch: every figure comes from the
summaries.

Spread: mean and standard deviation (n - 1) over the seeds that are there. Difference: the mean over the seeds of row
minus base, paired by seed, with Student's 95% interval.
"""

import csv
import io
import json
import math
import os
import re
import shlex
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

from sasa.console import USAGE_ERROR, Parser, print_error
from sasa.files import write_text
from tools.paper import Row, rows_for
from tools.trials import TABLES, Budget, read_json, run_name, table_name

PROG = "tools.report"
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
ABOUT, TABLES_FILE, NOTES = "ablation.json", "tables.md", "notes.md"
PICTURES = {"curves.png": "learning curves", "accuracy.png": "accuracy against FLOPs and parameters"}  # by plot.py
PATHS = ("data_dir", "output_dir", "name")  # fields of a configuration that say where, not what
PAGE = ROOT / "docs" / "results.md"
MARK = "<!-- Written by python -m tools.report; edit results/notes.md and results/*/notes.md instead. -->"
# Student's t, 0.975, for n = 2 to 10 seeds; for more the last serves, a little too wide.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class ReportError(Exception):
    """Runs that make no table; one line."""


def deviation(values: list[float]) -> float | None:
    """Standard deviation (n - 1); None for fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else None


def interval(values: list[float]) -> float | None:
    """Half of the 95% interval of the mean; None for one value."""
    if len(values) < 2:
        return None
    return STUDENT[min(len(values) - 2, len(STUDENT) - 1)] * statistics.stdev(values) / math.sqrt(len(values))


# ---- a folder of runs -----------------------------------------------------------------------------------------------


class Folder(NamedTuple):
    """The finished runs of one folder: `summaries` by run name, `configs` likewise; `tables` as (table, network)."""

    path: Path
    budget: Budget
    tables: list[tuple[str, str | None]]
    summaries: dict[str, dict[str, Any]]
    configs: dict[str, dict[str, Any]]


def remember(path: Path, budget: Budget, tables: list[tuple[str, str | None]]) -> None:
    """Write ablation.json: the tables asked for now beside those of before."""
    before = [[table_name(name), model] for name, model in (read_json(path / ABOUT) or {}).get("tables", [])]
    asked = before + [list(table) for table in tables if list(table) not in before]
    about = {"dataset": budget.dataset, "flags": budget.words(), "tables": asked}
    path.mkdir(parents=True, exist_ok=True)
    write_text(path / ABOUT, json.dumps(about, indent=2) + "\n")


def read(path: Path) -> Folder:
    """Raises ReportError: not a folder of runs, or its runs were not of one length, average and test set."""
    about = read_json(path / ABOUT)
    if about is None:
        raise ReportError(f"{path}: no {ABOUT} in it: not a folder that tools.ablate has written")
    summaries, configs = {}, {}
    for folder in sorted(p for p in path.iterdir() if p.is_dir()):
        summary, config = read_json(folder / "summary.json"), read_json(folder / "config.json")
        if summary is not None and config is not None:
            summaries[folder.name], configs[folder.name] = summary, config
    for key, of in (("epochs", summaries), ("test_images", summaries), ("ema", configs)):
        kinds = {record.get(key): name for name, record in of.items()}
        if len(kinds) > 1:
            what = ", ".join(f"{value} in {name}" for value, name in kinds.items())
            raise ReportError(f"{path}: runs that cannot be compared, {key}: {what}")
    budget = Budget(about["dataset"], tuple(about["flags"]))
    return Folder(path, budget, [(table_name(name), model) for name, model in about["tables"]], summaries, configs)


def seeds_of(folder: Folder, row: Row) -> list[int]:
    """The seeds that the row was run with."""
    found = (re.fullmatch(re.escape(run_name(row, 0)[:-1]) + r"(\d+)", name) for name in folder.summaries)
    return sorted(int(match[1]) for match in found if match)


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


# ---- as text --------------------------------------------------------------------------------------------------------


def markdown(folder: Folder, table: str, model: str | None) -> str:
    """A table with its title above and, where runs are missing, the command that makes them below."""
    title, source = TABLES[table].title, TABLES[table].source
    of = records(folder, table, model)
    named = len({r["model"] for r in of}) > 1
    head = ["", "parameters", "MFLOPs", "top-1, %", "n", "minus base, points", "s a run"]
    lines = [f"**{title}**" + ("" if named else f", {of[0]['model']}"), ""]
    if source:
        lines[0] += f"; on the right the {source}"
        head += [f"{figure} ({source.partition(',')[0]})" for figure in ("top-1, %", "GFLOPs", "M parameters")]
    lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for r in of:
        label = f"{r['row']}, {r['model']}" if named and r["model"].lower() not in r["row"].lower() else r["row"]
        difference = "base" if r["n"] and not r["base"] else show(r["difference_points"], "+.2f")
        half = r["difference_interval_points"]
        difference += about(half)
        if half is not None and abs(r["difference_points"]) > half:
            difference = f"**{difference}**"
        cells = [
            label, show(r["parameters"], ","), show(r["flops_per_image"] and r["flops_per_image"] / 1e6, ".1f"),
            show(r["test_top1_pct_mean"], ".2f") + about(r["test_top1_pct_std"]), str(r["n"]),
            difference, show(r["seconds_mean"], ".0f"),
        ]  # fmt: skip
        if source:
            cells += [show(r["paper_top1_pct"], "g"), show(r["paper_gflops"], ".1f"), printed(r["paper_mparams"])]
        lines.append("| " + " | ".join(cells) + " |")
    seeds = max(r["n"] for r in of) or 1
    if any(r["n"] < seeds for r in of):
        lines += ["", f"Missing runs: `{command(folder.budget, table, model, seeds)}`"]
    return "\n".join(lines) + "\n"


def show(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def printed(value: float | None) -> str:
    """Millions as the sources print them: one decimal, or two."""
    return "-" if value is None else f"{value:.2f}".removesuffix("0")


def about(value: float | None) -> str:
    return "" if value is None else f" +- {value:.2f}"


def command(budget: Budget, table: str, model: str | None, seeds: int) -> str:
    """The line that makes a table's runs."""
    words = ["python", "-m", "tools.ablate", "--table", table, "--dataset", budget.dataset, "--seeds", str(seeds)]
    words += ["--model-name", model] if model else []
    shared = budget.words()
    if "--epochs" in shared:  # tools.ablate's own flag
        i = shared.index("--epochs")
        words, shared = words + shared[i : i + 2], shared[:i] + shared[i + 2 :]
    return shlex.join(words + (["--", *shared] if shared else []))


def caption(folder: Folder) -> str:
    """What the figures are and what they can say."""
    summaries = list(folder.summaries.values())
    if not summaries:
        return "No run is done yet.\n"
    images, epochs = summaries[0]["test_images"], summaries[0]["epochs"]
    selected = re.sub(r"best top-1 .* on (.*), epoch .*", r"the epoch that was best on \1", summaries[0]["selected"])
    selected = selected.partition(" (")[0]
    machine = ", ".join(sorted({f"{s['device']} with torch {s['torch']}" for s in summaries}))
    flags = " ".join(folder.budget.words())
    return (
        f"{len(summaries)} runs of {folder.budget.dataset}{f', `{flags}`' if flags else ''}, {epochs} epochs each, on "
        f"{machine}. Top-1 on the {images:,} test images (one is {100 / images:.2f} points) of {selected}; mean and "
        "standard deviation over n seeds. *Minus base*: difference to the base row (of the same depth), paired by "
        "seed, with its 95% interval (Student), in bold where that leaves out 0: elsewhere these runs show no "
        "difference. Seconds are of the training steps alone, and depend on what else the machine did.\n"
    )


def texts(folder: Folder) -> dict[str, str]:
    """The files that are written beside the runs, by name."""
    parts = [caption(folder), *(markdown(folder, *table) for table in folder.tables)]
    files = {TABLES_FILE: "\n".join(parts)}
    for table, model in folder.tables:
        of = records(folder, table, model)
        out = io.StringIO()
        writer = csv.DictWriter(out, list(of[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(of)
        files["-".join(("table", table, *([model.lower()] if model else []))) + ".csv"] = out.getvalue()
    return files


def page(folders: list[Folder], results: Path, path: Path) -> str:
    """docs/results.md at `path`: every folder's tables, notes and pictures."""
    parts = [f"# Results\n\n{MARK}\n"]
    if (results / NOTES).exists():
        parts.append((results / NOTES).read_text(encoding="utf-8"))
    for folder in folders:
        where = Path(os.path.relpath(folder.path, path.parent)).as_posix()
        parts.append(f"## {' '.join([folder.budget.dataset, *folder.budget.words()])}\n")
        parts.append(texts(folder)[TABLES_FILE])
        if (folder.path / NOTES).exists():
            parts.append((folder.path / NOTES).read_text(encoding="utf-8"))
        for name, what in PICTURES.items():
            if (folder.path / name).exists():
                parts.append(f"![{folder.budget.dataset}: {what}]({where}/{name})\n")
        parts.append(f"Runs, logs and the tables as CSV: [`results/{folder.path.name}/`]({where}/).\n")
    return "\n".join(parts)


# ---- results/ -------------------------------------------------------------------------------------------------------


def add(source: Path, results: Path) -> Path:
    """Copy the small files of the folder's finished runs to results/<the same name>, without where they were made."""
    folder, target = read(source), results / source.resolve().name
    target.mkdir(parents=True, exist_ok=True)
    remember(target, folder.budget, folder.tables)
    for name, config in folder.configs.items():
        (target / name).mkdir(exist_ok=True)
        kept = {key: value for key, value in config.items() if key not in PATHS}
        (target / name / "config.json").write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
        for file in ("log.jsonl", "summary.json"):
            shutil.copyfile(source / name / file, target / name / file)
    return target


def generated(results: Path, path: Path) -> dict[Path, str]:
    """Every file that this program writes, with the text that it should have; `path` is that of docs/results.md."""
    folders = [read(about.parent) for about in sorted(results.glob(f"*/{ABOUT}"))]
    files = {folder.path / name: text for folder in folders for name, text in texts(folder).items()}
    return files | {path: page(folders, results, path)}


def stale(results: Path, path: Path) -> list[str]:
    """What is not as the runs say, one line each."""
    files = generated(results, path)
    lines = [
        f"{file}: not up to date"
        for file, text in files.items()
        if not file.exists() or file.read_text(encoding="utf-8") != text
    ]
    return lines + [f"{file}: no table" for file in sorted(results.glob("*/table*.*")) if file not in files]


def write_beside(path: Path) -> Folder:
    """Write the tables of a folder of runs into it."""
    folder = read(path)
    for name, text in texts(folder).items():
        write_text(path / name, text)
    return folder


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        f"python -m {PROG}",
        description="Write the tables of results/ and docs/results.md from the runs in results/.",
        epilog="exit code: 0 done, 1 --check found something that is not up to date, 2 wrong usage or runs",
    )
    parser.add_argument("--add", metavar="DIR", action="append", default=[], help="first take in a folder of ablate")
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 where something is not up to date")
    parser.add_argument("--results", default=RESULTS, type=Path, metavar="DIR", help="default: results")
    parser.add_argument("--page", default=PAGE, type=Path, metavar="FILE", help="default: docs/results.md")
    args = parser.parse_args(arguments)
    if args.check and args.add:
        parser.error("--check writes nothing: it does not go with --add")
    try:
        if args.check:
            lines = stale(args.results, args.page)
            print("\n".join([*lines, "python -m tools.report writes them"] if lines else ["results are up to date"]))
            return 1 if lines else 0
        if args.page.exists() and MARK not in args.page.read_text(encoding="utf-8"):
            raise ReportError(f"{args.page}: was not written by {PROG}, so it is not replaced")
        for source in args.add:
            add(Path(source), args.results)
        for path, text in generated(args.results, args.page).items():
            write_text(path, text)
            print(f"wrote {path}")
    except ReportError as error:
        print_error(PROG, error)
        return USAGE_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
