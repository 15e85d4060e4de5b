"""What `tools.ablate` trains and `tools.report` reads: a table's rows, with a seed and a budget, as runs of train.py.

Rows of several tables with the same network and flags are one run: a run's name is its network, flags and seed. Read
without torch.
"""

import contextlib
import dataclasses
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from config import Config, ConfigError, resolve
from sasa.settings import as_typed
from sasa.training import class_weights
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
OLD_NAMES = {"seed": "port"}  # --table seed stays as an alias


def table_name(text: str) -> str:
    """The name of a table in `TABLES` for one that a person or a stored file gives; "seed" was once that of "port"."""
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

FREE = {f.name for f in dataclasses.fields(Config) if f.metadata["free"]} - {"max_steps"}  # which cuts a run


def given_by(flags: Iterable[str]) -> dict[str, Any]:
    """The fields that flags of train.py set, with the values that a run's configuration holds.

    Raises:
        ConfigError: a file of class weights that is none.
    """
    given = parse_command_line(list(flags)).given
    if "class_weights" in given:
        given["class_weights"] = class_weights.settle(given["class_weights"])
    return given


def in_words(given: dict[str, Any]) -> list[str]:
    """Fields as flags and values, in one spelling and order."""
    names = [f.name for f in dataclasses.fields(Config) if f.name in given]
    return [word for name in names for word in as_typed(name, given[name])]


@dataclass(frozen=True)
class Budget:
    """What all runs of a folder share: the data set and `flags`, as train.py takes them."""

    dataset: str
    flags: tuple[str, ...] = ()

    def for_rows(self, chosen: Iterable[Row]) -> "Budget":
        """The budget without the flags that change no run of these rows, nor of those that they are compared with.

        A flag that says what the data set's recipe does changes a row that takes another recipe. --lr counts always: a
        recipe's rate is lowered where the training set is smaller than a batch, a given one is not.

        Raises:
            ConfigError: values that do not go together.
        """
        compared = unique(r for row in chosen for r in (row, row._replace(model=row.depth, flags=row.base)))
        own = [given_by(["--model-name", row.model, *row.flags.split()]) for row in compared]

        def configs(shared: dict[str, Any]) -> list[Config]:
            return [resolve(shared | of_row, self.dataset) for of_row in own]

        given = given_by(self.flags)
        whole = configs(given)
        for name in [name for name in given if name not in FREE and name != "lr"]:
            rest = {k: v for k, v in given.items() if k != name}
            with contextlib.suppress(ConfigError):  # a flag that others need
                if configs(rest) == whole:
                    given = rest
        return Budget(self.dataset, tuple(in_words(given)))

    def given(self) -> dict[str, Any]:
        """The fields of `flags` that can change the result."""
        return {name: value for name, value in given_by(self.flags).items() if name not in FREE}

    def words(self) -> list[str]:
        """`given` as flags, in one spelling whatever the order and spelling of `flags`."""
        return in_words(self.given())

    def label(self) -> list[str]:
        """`words` for names and headings, where a digest stands for the weights of classes."""
        given = self.given()
        weights = given.get("class_weights", class_weights.NONE)
        if weights not in (class_weights.NONE, class_weights.BALANCED):
            given["class_weights"] = hashlib.sha256(weights.encode()).hexdigest()[:8]
        return in_words(given)

    def name(self) -> str:
        """The folder: digits, fashionmnist-epochs-3-train-images-10000."""
        return "-".join([self.dataset.lower(), *(word.strip("-") for word in self.label())])


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
        return resolve(given_by(self.flags(budget)), budget.dataset)
