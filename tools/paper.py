"""The tables of the paper as data, each row flags of train.py beside the figures that the paper printed; their runs.

Read without torch. Rows of several tables with the same network and flags are one run: a run's name is its network,
flags and seed.

Source: tables 1 and 3 to 7 of Ramachandran et al. 2019, arXiv 1906.05909 (ImageNet; Table 2 is COCO detection, which
this repository has not); "seed" is the results table of the README of leaderj1001/Stand-Alone-Self-Attention
(CIFAR-10); "recipe" is ours. What the rows count on the real modules: audit.py.
"""

import dataclasses
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from config import Config, flag_of, parse_command_line, resolve


class Paper(NamedTuple):
    """What a row is printed with in its source: top-1 in %, FLOPs in billions, parameters in millions."""

    top1_pct: float | None
    gflops: float | None
    mparams: float | None


class Row(NamedTuple):
    """A row of a table.

    flags: of train.py, apart from --model-name. model: None where the table fits any network. base: the flags of the
    row, on the same depth, that this one is compared with.
    """

    label: str
    flags: str = ""
    paper: Paper = Paper(None, None, None)
    model: str | None = None
    base: str = ""

    @property
    def depth(self) -> str:
        return self.model.removeprefix("Naive")


class Table(NamedTuple):
    """source: whose figures the rows carry, and of what."""

    title: str
    rows: tuple[Row, ...]
    source: str = "paper, ResNet50 on ImageNet"


TWIN = "--attention-stages"  # no stage: the network with its 3x3 convolutions
DEPTHS = ("ResNet26", "ResNet38", "ResNet50")


def _depths(label: str, flags: str, *figures: tuple) -> tuple[Row, ...]:
    return tuple(Row(label, flags, Paper(*paper), model) for model, paper in zip(DEPTHS, figures, strict=True))


TABLES = {
    "1": Table(
        "Table 1: convolution, attention, attention stem",
        _depths("convolution", TWIN, (74.5, 4.7, 13.7), (76.2, 6.5, 19.6), (76.9, 8.2, 25.6))
        + _depths("conv stem + attention", "", (75.8, 4.5, 10.3), (77.1, 5.7, 14.1), (77.4, 7.0, 18.0))
        + _depths("full attention", "--stem", (74.8, 4.7, 10.3), (76.9, 6.0, 14.1), (77.6, 7.2, 18.0)),
        source="paper, ImageNet",
    ),
    "3": Table(
        "Table 3: which groups are convolution",
        (
            Row("conv groups none", "", Paper(80.2, 7.0, 18.0)),
            Row("conv groups 1", "--attention-stages 2 3 4", Paper(80.7, 7.3, 18.1)),
            Row("conv groups 1 2", "--attention-stages 3 4", Paper(80.7, 7.5, 18.5)),
            Row("conv groups 1 2 3", "--attention-stages 4", Paper(80.2, 8.0, 20.8)),
            Row("conv groups 1 2 3 4", TWIN, Paper(79.5, 8.2, 25.6)),
            Row("conv groups 2 3 4", "--attention-stages 1", Paper(79.7, 7.9, 25.5)),
            Row("conv groups 3 4", "--attention-stages 1 2", Paper(79.6, 7.8, 25.0)),
            Row("conv groups 4", "--attention-stages 1 2 3", Paper(79.9, 7.2, 22.7)),
        ),
        source="paper, ResNet50 on a held-out part of ImageNet's training set",
    ),
    "4": Table(
        "Table 4: side of the window",
        (
            Row("k = 3", "--kernel-size 3", Paper(76.4, 6.6, 18.0)),
            Row("k = 5", "--kernel-size 5", Paper(77.2, 6.7, 18.0)),
            Row("k = 7", "", Paper(77.4, 7.0, 18.0)),
            Row("k = 9", "--kernel-size 9", Paper(77.7, 7.3, 18.0)),
            Row("k = 11", "--kernel-size 11", Paper(77.6, 7.7, 18.0)),
        ),
    ),
    "5": Table(
        "Table 5: position",
        (
            Row("none", "--position none", Paper(77.6, 6.9, 18.0)),
            Row("absolute", "--position absolute", Paper(78.2, 6.9, 18.0)),
            Row("relative", "", Paper(80.2, 7.0, 18.0)),
        ),
        source="paper, ResNet50 on a held-out part of ImageNet's training set",
    ),
    "6": Table(
        "Table 6: content",
        (
            Row("q.r only", "--no-content", Paper(76.9, 6.1, 16.7)),
            Row("q.k + q.r", "", Paper(77.4, 7.0, 18.0)),
        ),
    ),
    "7": Table(
        "Table 7: values of the attention stem",
        (
            Row("plain", "--stem --stem-values plain", Paper(76.2, 7.1, None), base="--stem"),
            Row("spatial convolution", "--stem --stem-values conv", Paper(77.2, 7.4, None), base="--stem"),
            Row("spatially aware", "--stem", Paper(77.6, 7.2, None), base="--stem"),
        ),
    ),
    "seed": Table(
        "The port's networks",
        (
            Row("ResNet 26", "", Paper(90.94, None, 8.30), "ResNet26"),
            Row("naive ResNet 26", "", Paper(94.29, None, 8.74), "NaiveResNet26"),
            Row("ResNet 26 + stem", "--stem", Paper(90.22, None, 8.30), "ResNet26"),
            Row("ResNet 38", "", Paper(89.46, None, 12.1), "ResNet38"),
            Row("naive ResNet 38", "", Paper(94.93, None, 15.0), "NaiveResNet38"),
            Row("ResNet 50", "", Paper(None, None, 16.0), "ResNet50"),
        ),
        source="port, CIFAR-10",
    ),
    # SGD's decay is the one whose product with its rate is AdamW's, 1e-3 * 0.05; 16 is the middle of ResNet26's head
    # widths, 8 to 64.
    "recipe": Table(
        "The recipe, one change at a time",
        (
            Row("default"),
            Row("SGD, rate 0.1", "--optimizer sgd --lr 0.1 --weight-decay 5e-4"),
            Row("SGD, rate 0.03", "--optimizer sgd --lr 0.03 --weight-decay 1.7e-3"),
            Row("rate 3e-4", "--lr 3e-4"),
            Row("rate 3e-3", "--lr 3e-3"),
            Row("embeddings start at 0", "--embedding-std 0"),
            Row("embeddings start at 1", "--embedding-std 1"),
            Row("logits / sqrt(16)", "--scale 0.25"),
            Row("embeddings decay too", "--embedding-weight-decay 0.05"),
            Row("no zero-init of the last norm", "--no-zero-init-residual"),
            Row("attention stem, sliding", "--stem"),
            Row("attention stem, blocks", "--stem --stem-window block", base="--stem"),
        ),
        source="",
    ),
}


def rows(table: Table, model: str | None) -> list[Row]:
    """The table's rows on the network `model`.

    A table whose rows name their networks (1 and seed) is cut to that depth, or whole where `model` is None.
    """
    if table.rows[0].model is None:
        return [row._replace(model=model) for row in table.rows]
    return [row for row in table.rows if model in (None, row.depth)]


def unique(chosen: Iterable[Row]) -> list[Row]:
    """One row for each network and flags, in order."""
    return list({(row.model, row.flags): row for row in chosen}.values())


def varied(chosen: Iterable[Row]) -> set[str]:
    """The fields that the rows, or the rows that they are compared with, set themselves."""
    return {
        name for row in chosen for flags in (row.flags, row.base) for name in parse_command_line(flags.split()).given
    }


def run_name(row: Row, seed: int) -> str:
    """A run's folder: resnet26-kernel-size-3-seed0."""
    words = re.sub(r"[^a-z0-9.]+", "-", row.flags.lower()).strip("-")
    return "-".join(part for part in (row.model.lower(), words, f"seed{seed}") if part)


# ---- runs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """What all runs of a folder share: the data set and `flags`, as train.py takes them."""

    dataset: str
    flags: tuple[str, ...] = ()

    def given(self) -> dict[str, Any]:
        """The flags that can change the result and say more than the recipe does."""
        free = {f.name for f in dataclasses.fields(Config) if f.metadata["free"]} - {"max_steps"}  # which cuts a run
        given = {k: v for k, v in parse_command_line(list(self.flags)).given.items() if k not in free}
        for key in list(given):
            rest = {k: v for k, v in given.items() if k != key}
            if resolve(rest, self.dataset) == resolve(given, self.dataset):
                given = rest
        return given

    def name(self) -> str:
        """The folder: digits, fashionmnist-epochs-3-train-images-10000."""
        return "-".join([self.dataset.lower(), *(word.strip("-") for word in self.words())])

    def words(self) -> list[str]:
        """`given` as flags, in one spelling whatever the order and spelling of `flags`."""
        given = self.given()
        return [word for f in dataclasses.fields(Config) if f.name in given for word in self.spelled(f.name)]

    def spelled(self, name: str) -> list[str]:
        """A field of `given` as its flag and values."""
        f, value = next(f for f in dataclasses.fields(Config) if f.name == name), self.given()[name]
        values = value if isinstance(value, tuple) else () if isinstance(value, bool) else (value,)
        flag = flag_of(f).replace("--", "--no-", 1) if f.default is None and value is False else flag_of(f)
        return [flag, *(str(v).removesuffix(".0") for v in values)]


class Run(NamedTuple):
    """One training of a row."""

    row: Row
    seed: int

    @property
    def name(self) -> str:
        return run_name(self.row, self.seed)

    def flags(self, budget: Budget) -> list[str]:
        """What makes the run what it is, as train.py takes it; ablate.py refuses budgets that set what rows do."""
        own = ["--model-name", self.row.model, *self.row.flags.split(), "--seed", str(self.seed)]
        return ["--dataset", budget.dataset, *budget.flags, *own]

    def config(self, budget: Budget) -> Config:
        return resolve(parse_command_line(self.flags(budget)).given, budget.dataset)


def read_json(path: Path) -> dict[str, Any] | None:
    """None where the file is missing or not whole."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None
