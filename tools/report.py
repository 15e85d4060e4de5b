"""From finished runs to tables: Markdown and CSV of a folder of tools.ablate, and docs/results.md of results/.

    python -m tools.report --add runs/ablate/digits    copy its runs' small files to results/, then as without flags
    python -m tools.report                             write the tables of results/ and docs/results.md anew
    python -m tools.report --check                     exit 1 where one of them is not what the runs say

The tables are written beside the runs; notes.md, where a person wrote one, is shown below them in docs/results.md, and
results/notes.md at its head.
"""

import csv
import io
import os
import re
import shlex
from pathlib import Path
from urllib.parse import quote

from sasa.console import USAGE_ERROR, Parser, as_path, print_error, printable, raise_if_reader_is_gone, run_main
from sasa.data.specs import SPECS
from sasa.files import json_text, write_text
from tools.runs import ABOUT, Folder, RunsError, length, read, read_rows, records, remember
from tools.trials import TABLES, Budget

PROG = "tools.report"
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
TABLES_FILE, NOTES = "tables.md", "notes.md"
PICTURES = {"curves.png": "learning curves", "accuracy.png": "accuracy against FLOPs and parameters"}  # by tools.plot
PATHS = ("data_dir", "output_dir", "name")  # fields of a configuration that say where, not what
PAGE = ROOT / "docs" / "results.md"
MARK = "<!-- Written by python -m tools.report; edit results/notes.md and results/*/notes.md instead. -->"


# ---- as text --------------------------------------------------------------------------------------------------------


def markdown(folder: Folder, table: str, model: str | None) -> str:
    """A table with its title above and, where runs are missing, the command that makes them below."""
    title, source = TABLES[table].title, TABLES[table].source
    of = records(folder, table, model)
    named = len({r["model"] for r in of}) > 1
    has_balanced = any(r.get("test_balanced_pct_mean") is not None for r in of)
    head = [
        "",
        "parameters",
        "MFLOPs",
        "top-1, %",
        *(["balanced, %"] if has_balanced else []),
        "n",
        "minus base, points",
        "s a run",
    ]
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
            show(r["test_top1_pct_mean"], ".2f") + about(r["test_top1_pct_std"]),
            *([show(r["test_balanced_pct_mean"], ".2f") + about(r["test_balanced_pct_std"])] if has_balanced else []),
            str(r["n"]), difference, show(r["seconds_mean"], ".0f"),
        ]  # fmt: skip
        if source:
            cells += [show(r["paper_top1_pct"], "g"), show(r["paper_gflops"], ".1f"), printed(r["paper_mparams"])]
        lines.append("| " + " | ".join(cells) + " |")
    seeds = max(r["n"] for r in of) or 1
    if any(r["n"] < seeds for r in of):
        lines += ["", f"Missing runs: `{command(folder.budget, table, model, seeds)}`"]
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    """Text of a file as it stands, inside a line of Markdown: no markup, no tag, no line break."""
    return re.sub(r"([\\`*_\[\]<>|&~])", r"\\\1", printable(text))


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
    words += ["--data-dir", "DIR"] if SPECS[budget.dataset].side is None else []  # of trees: there is no usual place
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
    images = summaries[0]["test_images"]
    selected = re.sub(r"best top-1 .* on (.*), epoch .*", r"the epoch that was best on \1", summaries[0]["selected"])
    selected = escaped(selected.partition(" (")[0])
    machine = ", ".join(sorted({escaped(f"{s['device']} with torch {s['torch']}") for s in summaries}))
    flags = " ".join(folder.budget.label())
    return (
        f"{len(summaries)} runs of {folder.budget.dataset}{f', `{flags}`' if flags else ''}, {length(folder)} each, on "
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
        parts.append(text_of(results / NOTES))
    for folder in folders:
        where = quote(os.fsencode(Path(os.path.relpath(folder.path, path.parent)).as_posix()))
        parts.append(f"## {' '.join([folder.budget.dataset, *folder.budget.label()])}\n")
        parts.append(texts(folder)[TABLES_FILE])
        if (folder.path / NOTES).exists():
            parts.append(text_of(folder.path / NOTES))
        for name, what in PICTURES.items():
            if (folder.path / name).exists():
                parts.append(f"![{folder.budget.dataset}: {what}]({where}/{name})\n")
        parts.append(f"Runs, logs and the tables as CSV: [results/{escaped(folder.path.name)}/]({where}/).\n")
    return "\n".join(parts)


def text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RunsError(f"{printable(path)}: not UTF-8 ({error.reason} at byte {error.start})") from None


# ---- results/ -------------------------------------------------------------------------------------------------------


def add(source: Path, results: Path) -> Path:
    """Copy the small files of the folder's finished runs to results/<the same name>, without where they were made.

    Raises:
        RunsError: the source is no folder of runs, a log is none, or the target holds something else.
        OSError: a file cannot be read, or is a link or no file.
    """
    folder, target = read(source), results / source.resolve().name
    logs = {name: log_of(source / name / "log.jsonl") for name in folder.configs}
    remember(target, folder.budget, folder.tables)
    for name, config in folder.configs.items():
        (target / name).mkdir(exist_ok=True)
        kept = {key: value for key, value in config.items() if key not in PATHS}
        write_text(target / name / "config.json", json_text(kept, indent=2) + "\n")
        write_text(target / name / "summary.json", json_text(folder.summaries[name], indent=2) + "\n")
        write_text(target / name / "log.jsonl", logs[name])
    return target


def log_of(path: Path) -> str:
    """A run's log, line by line. Raises RunsError where a line is no dictionary."""
    return "".join(json_text(line) + "\n" for line in read_rows(path))


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
        if not file.exists() or file.read_bytes() != text.encode()
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
    parser.add_argument(
        "--add", type=as_path, metavar="DIR", action="append", default=[], help="first take in a folder of ablate"
    )
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 where something is not up to date")
    parser.add_argument("--results", default=RESULTS, type=as_path, metavar="DIR", help="default: results")
    parser.add_argument("--page", default=PAGE, type=as_path, metavar="FILE", help="default: docs/results.md")
    args = parser.parse_args(arguments)
    if args.check and args.add:
        parser.error("--check writes nothing: it does not go with --add")
    try:
        if args.check:
            lines = stale(args.results, args.page)
            lines = [*map(printable, lines), "python -m tools.report writes them"] if lines else []
            print("\n".join(lines or ["results are up to date"]))
            return 1 if lines else 0
        if args.page.exists() and MARK.encode() not in args.page.read_bytes():
            raise RunsError(f"{printable(args.page)}: {PROG} has not written it, and does not replace it")
        for source in args.add:
            add(source, args.results)
        for path, text in generated(args.results, args.page).items():
            write_text(path, text)
            print(f"wrote {printable(path)}")
    except (RunsError, OSError) as error:
        raise_if_reader_is_gone(error)
        print_error(PROG, error)
        return USAGE_ERROR
    return 0


if __name__ == "__main__":
    run_main(main)
