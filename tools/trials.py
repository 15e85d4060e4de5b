"""What `tools.ablate` trains and `tools.report` reads: a table's rows, with a seed and a budget, as runs of train.py.

Rows of several tables with the same network and flags are one run: a run's name is its network, flags and seed. Read
without torch.
"""

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from config import Config, flag_of, resolve
from sasa.training.cli import parse_command_line
from tools import paper
from tools.paper import Row, Table

# Ours. SGD's decay is the one whose product with its rate is AdamW's, 1e-3 * 0.05; 16 is the middle of ResNet26's head
# widths, 8 to 64.
RECIPE = Table(
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
)
STRONG = Table(
    "The recipe for 500 epochs on a GPU, beside `default`",
    (Row("default"), Row("strong", "--recipe strong")),
    source="",
)
TABLES = paper.TABLES | {"port": paper.PORT, "recipe": RECIPE, "strong": STRONG}
OLD_NAMES = {"seed": "port"}  # of tables; stored results have them


def table_name(text: str) -> str:
    """The name of a table in `TABLES` for one that a person or a stored file gives: "seed" was the name of "port"."""
    return OLD_NAMES.get(text, text)


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


# ---- trials ---------------------------------------------------------------------------------------------------------


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
        value = self.given()[name]
        values = value if isinstance(value, tuple) else () if isinstance(value, bool) else (value,)
        flag = flag_of(name).replace("--", "--no-", 1) if value is False else flag_of(name)
        return [flag, *(str(v).removesuffix(".0") for v in values)]


class Trial(NamedTuple):
    """One training of a row: what ablate runs."""

    row: Row
    seed: int

    @property
    def name(self) -> str:
        return run_name(self.row, self.seed)

    def flags(self, budget: Budget) -> list[str]:
        """What makes the run what it is, as train.py takes it; ablate refuses budgets that set what rows do."""
        own = ["--model-name", self.row.model, *self.row.flags.split(), "--seed", str(self.seed)]
        return ["--dataset", budget.dataset, *budget.flags, *own]

    def config(self, budget: Budget) -> Config:
        return resolve(parse_command_line(self.flags(budget)).given, budget.dataset)
