"""The photographs of solar cells of the package elpv-dataset as a tree that `--dataset FOLDER` reads.

    pip install elpv-dataset          (90 MB; CC BY-NC-SA 4.0: used, never stored here)
    python -m tools.elpv solar-cells
    python train.py --model-name ResNet26 --dataset FOLDER --data-dir solar-cells --img-size 128 --holdout 0.1

2,624 gray pictures of 300x300, each with the probability of a defect as an expert gave it (0, 1/3, 2/3 or 1) and the
kind of its module (mono- or polycrystalline). A picture counts as defective from 0.5 on. Three quarters of each pair of
label and kind are for training, chosen by the seed; the split is stored in DIR/split.csv. Pictures of one module may
lie on both sides of it, as the data do not name the modules.

Source: Buerhop-Lutz et al. 2018; Deitsch et al. 2019; Deitsch et al. 2021 (docs/elpv.md).
"""

import csv
import hashlib
import importlib.util
import math
import os
import secrets
import shutil
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from sasa.console import USAGE_ERROR, Parser, as_path, print_error, printable, run_main
from sasa.files import open_regular
from tools.arguments import natural

PROG = "tools.elpv"
DEFECTIVE_FROM = 0.5  # probability of a defect
TRAIN_SHARE = 0.75
LARGEST_PICTURE = 1 << 20  # bytes; the real ones have about 35,000
KINDS = ("mono", "poly")


class ElpvError(Exception):
    """Data that are not of the package's form; one line."""


class Cell(NamedTuple):
    """A picture: its path below the data's folder, the probability of a defect, and the kind of its module."""

    path: str
    probability: float
    kind: str

    @property
    def label(self) -> str:
        return "defective" if self.probability >= DEFECTIVE_FROM else "functional"


def package_folder() -> Path:
    """The folder of labels.csv in the installed package. Raises ElpvError where it is not installed."""
    found = importlib.util.find_spec("elpv_dataset")
    if found is None or not found.submodule_search_locations:
        raise ElpvError("needs the package elpv-dataset: pip install elpv-dataset (90 MB), or --source its data folder")
    return Path(found.submodule_search_locations[0], "data")


def read_labels(source: Path) -> list[Cell]:
    """The pictures that labels.csv lists, a line each: path, probability, kind, separated by spaces.

    Raises:
        ElpvError: a line of another form, or a picture that is listed twice.
        OSError: the file cannot be read.
    """
    cells = []
    for number, line in enumerate((source / "labels.csv").read_bytes().split(b"\n"), start=1):
        words = line.split()
        if not words:
            continue
        where = f"{printable(source / 'labels.csv')}, line {number}"
        if len(words) != 3 or words[2].decode(errors="replace") not in KINDS:
            raise ElpvError(f"{where}: not a path, a probability and {' or '.join(KINDS)}")
        path = os.fsdecode(words[0])
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise ElpvError(f"{where}: {printable(path)} leads out of the folder")
        try:
            probability = float(words[1])
        except ValueError:
            probability = math.nan
        if not 0 <= probability <= 1:
            raise ElpvError(f"{where}: {printable(words[1].decode(errors='replace'))} is no probability")
        cells.append(Cell(path, probability, words[2].decode()))
    names = Counter(Path(cell.path).name for cell in cells)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise ElpvError(f"{printable(source / 'labels.csv')}: {printable(twice[0])} is listed {names[twice[0]]} times")
    if not cells:
        raise ElpvError(f"{printable(source / 'labels.csv')}: lists no pictures")
    return cells


def split(cells: list[Cell], seed: int) -> dict[Cell, str]:
    """The part, train or val, of each picture: a pure function of the seed and the pictures' names.

    `TRAIN_SHARE` of each stratum (label and kind) is for training, rounded so that the whole has that share too.
    """
    strata: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        strata.setdefault((cell.label, cell.kind), []).append(cell)
    sizes = {key: int(TRAIN_SHARE * len(of)) for key, of in strata.items()}
    missing = round(TRAIN_SHARE * len(cells)) - sum(sizes.values())
    for key in sorted(strata, key=lambda key: (-(TRAIN_SHARE * len(strata[key]) % 1), key))[:missing]:
        sizes[key] += 1

    def drawn(cell: Cell) -> bytes:
        return hashlib.sha256(f"{seed} ".encode() + os.fsencode(cell.path)).digest()

    parts = {}
    for key, of in strata.items():
        for place, cell in enumerate(sorted(of, key=drawn)):
            parts[cell] = "train" if place < sizes[key] else "val"
    return parts


def write_tree(source: Path, target: Path, parts: dict[Cell, str]) -> None:
    """target/train and target/val with a folder a label, and target/split.csv: all of it or nothing.

    Raises:
        ElpvError: the target holds something, or a picture is too large for one.
        OSError: a picture cannot be read or is a link, or the disk is full.
    """
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise ElpvError(f"{printable(target)}: is not an empty folder: choose another one, or delete it")
    target = Path(os.path.abspath(target))
    made = target.with_name(f".{target.name[:100]}.{secrets.token_hex(8)}.tmp")
    made.mkdir(parents=True)
    try:
        for cell, part in parts.items():
            folder = made / part / cell.label
            folder.mkdir(parents=True, exist_ok=True)
            (folder / Path(cell.path).name).write_bytes(read_picture(source / cell.path))
        with open(made / "split.csv", "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("path", "split", "label", "kind", "probability"))
            for cell, part in sorted(parts.items()):
                writer.writerow((cell.path, part, cell.label, cell.kind, cell.probability))
        made.rename(target)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def read_picture(path: Path) -> bytes:
    with os.fdopen(open_regular(path, os.O_RDONLY), "rb") as file:
        content = file.read(LARGEST_PICTURE + 1)
    if len(content) > LARGEST_PICTURE:
        raise ElpvError(f"{printable(path)}: larger than {LARGEST_PICTURE >> 20} MiB: not a picture of this set")
    return content


def describe(parts: dict[Cell, str]) -> list[str]:
    """A line for each part: how many of what, and what an answer that never looks at the picture scores."""
    lines = []
    for part in ("train", "val"):
        of = [cell for cell, where in parts.items() if where == part]
        labels = Counter(cell.label for cell in of)
        kinds = Counter((cell.label, cell.kind) for cell in of)
        counts = ", ".join(
            f"{labels[label]} {label} ({', '.join(f'{kinds[label, kind]} {kind}' for kind in KINDS)})"
            for label in ("functional", "defective")
        )
        constant = 100 * max(labels.values(), default=0) / max(len(of), 1)
        lines.append(f"{part}: {len(of)} pictures, {counts}; a constant answer scores {constant:.1f}%")
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        f"python -m {PROG}",
        description="Make a tree of the package elpv-dataset that train.py reads with --dataset FOLDER.",
        epilog="exit code: 0 done, 2 wrong usage or data",
    )
    parser.add_argument(
        "target", type=as_path, metavar="DIR", help="a new or empty folder; gets train/, val/, split.csv"
    )
    parser.add_argument("--seed", type=natural, default=0, metavar="N", help="of the split (default: 0)")
    parser.add_argument("--source", type=as_path, metavar="DIR",
                        help="folder with labels.csv and images/ (default: that of the installed package)")  # fmt: skip
    args = parser.parse_args(arguments)
    try:
        source = args.source or package_folder()
        parts = split(read_labels(source), args.seed)
        write_tree(source, args.target, parts)
    except (ElpvError, OSError) as error:
        print_error(PROG, error)
        return USAGE_ERROR
    print(*describe(parts), sep="\n")
    print(f"wrote {printable(args.target)}: python train.py --dataset FOLDER --data-dir {printable(args.target)}")
    return 0


if __name__ == "__main__":
    run_main(main)
