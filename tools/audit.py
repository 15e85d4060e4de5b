"""The paper's tables beside these models: parameters and FLOPs, counted on the real modules without any arithmetic.

    python -m tools.audit               Tables 1 and 3 to 7
    python -m tools.audit --cifar       the port's networks, to the unit

The paper's figures are those of tools/paper.py; how FLOPs are counted stands in sasa/analysis/flops.py.
"""

import sys
from functools import cache

import torch
from torch.overrides import TorchFunctionMode

from config import resolve
from sasa.analysis.flops import RULE, Flops, count_flops, count_parameters
from sasa.console import Parser
from sasa.files import json_text
from sasa.training.cli import parse_command_line
from sasa.training.network import build_network
from tools.paper import CIFAR, TABLES, Figures, Row, Table, rows_for

AGREEMENT = (
    "Agreement: FLOPs within 0.17 B of the paper's figure. Its parameters, p million, stand for [p - 0.05, p + 0.1),",
    "as some of them are rounded and some (14.1, 16.7, 25.0) cut; ours are at most 0.05 M outside that.",
)
FLOPS_TOLERANCE = 170_000_000  # wide enough for "q.r only" (0.11 B) and for m = 4 (0.16 B)
PARAMETERS_TOLERANCE = 50_000
MIXTURES = (8, 4)  # the stem's value matrices that are counted
_M = "(the paper does not give m, the stem's value matrices: 8 fits its FLOPs best, 4 is the default here)"
REMARKS = {
    "1": f"full attention is the attention stem + attention\n{_M}",
    "4": "conv stem (the paper: no more parameters; here the embeddings grow a little)",
    "7": _M,
}
FORMS = {"imagenet": (1000, 224), "small": (10, 32)}  # form of the networks -> classes, image side in pixels


def audited(table: Table) -> list[Row]:
    """The table's rows on the network of its source; those whose stem mixes its values once for each of `MIXTURES`."""
    chosen = rows_for(table, None if table.rows[0].model else "ResNet50")
    mixing = [row for row in chosen if "--stem" in row.flags.split() and "--stem-values" not in row.flags]
    return [row for row in chosen if row not in mixing] + [
        row._replace(label=f"{row.label}, m = {m}", flags=f"{row.flags} --stem-mixtures {m}")
        for m in MIXTURES
        for row in mixing
    ]


class NoInitialisation(TorchFunctionMode):
    """Leaves the initialisers out: there is nothing to initialise on meta, and it takes half of the building."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        return func(*args, **(kwargs or {}))


@cache
def measure(model: str, flags: str, form: str) -> tuple[int, Flops]:
    """Parameters, and FLOPs an image, of the network that this train.py line builds; several tables share some.

    Args:
        model: name of the network.
        flags: further flags of train.py, which set the layers' options.
        form: key of `FORMS`.
    """
    given = parse_command_line(["--model-name", model, "--form", form, *flags.split()]).given
    config, (classes, side) = resolve(given, "IMAGENET"), FORMS[form]
    with torch.device("meta"), NoInitialisation():
        network = build_network(config, classes)
    return count_parameters(network), count_flops(network, side)


def audit_row(row: Row, form: str = "imagenet") -> dict:
    """Ours, the paper's, ours minus the paper's, and whether they agree: a JSON record with units in its keys."""
    parameters, flops = measure(row.model, row.flags, form)
    printed = row.printed
    theirs = printed.parameters if printed.mparams is None else round(printed.mparams * 1e6)
    gap = None if printed.gflops is None else flops.total - round(printed.gflops * 1e9)
    return {
        "model": row.model,
        "row": row.label,
        "flops": flops.total,
        "paper_gflops": printed.gflops,
        "difference_gflops": None if gap is None else gap / 1e9,
        "parameters": parameters,
        "paper_parameters": theirs,
        "difference_parameters": None if theirs is None else parameters - theirs,
        "agrees": parameters_agree(parameters, printed) and (gap is None or abs(gap) <= FLOPS_TOLERANCE),
        "flops_by_kind": flops.by_kind,
    }


def parameters_agree(ours: int, printed: Figures) -> bool:
    """A count must hold to the unit; p millions as `AGREEMENT` says: ours in [p - 0.1 M, p + 0.15 M]."""
    if printed.parameters is not None and ours != printed.parameters:
        return False
    if printed.mparams is None:
        return True
    millions = round(printed.mparams * 1e6)
    return millions - 50_000 - PARAMETERS_TOLERANCE <= ours <= millions + 100_000 + PARAMETERS_TOLERANCE


def print_table(title: str, image_size: int, records: list[dict]) -> None:
    """One line a row; differences are ours minus the paper's."""
    print(f"\n{title}\n{f'images of {image_size} pixels':38}{'FLOPs, billion':>18}{'parameters':>32}")
    print(f"{'':38}{'ours':>7}{'paper':>7}{'diff':>8}{'ours':>14}{'paper':>12}{'diff':>10}")
    for r in records:
        print(f"{r['model']:15}{r['row']:23}{r['flops'] / 1e9:7.3f}", end="")
        print(_cell(r["paper_gflops"], 7, ".1f") + _cell(r["difference_gflops"], 8, ".3f", "+"), end="")
        print(_cell(r["parameters"], 14, ",") + _cell(r["paper_parameters"], 12, ","), end="")
        print(_cell(r["difference_parameters"], 10, ",", "+"), " ok" if r["agrees"] else " OFF")


def _cell(value: float | None, width: int, form: str, sign: str = "") -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{sign}{width}{form}}"


def main(arguments: list[str] | None = None) -> int:
    """Prints the tables; 0 where every row agrees, 1 where one does not; wrong usage exits with 2."""
    parser = Parser(
        "python -m tools.audit",
        description="Parameters and FLOPs of the paper's tables beside those of the modules of this repository.",
        epilog="exit code: 0 every row agrees, 1 one does not, 2 wrong usage",
    )
    which = parser.add_mutually_exclusive_group()
    numbers = "one table only: 1, 3, 4, 5, 6 or 7 (2 is COCO detection, which is not counted here)"
    which.add_argument("--table", choices=TABLES, metavar="N", help=numbers)
    which.add_argument("--cifar", action="store_true", help="the port's CIFAR-10 networks, parameters to the unit")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of text, with FLOPs by kind")
    args = parser.parse_args(arguments)

    form = "small" if args.cifar else "imagenet"
    tables = {"": CIFAR} if args.cifar else {n: TABLES[n] for n in ([args.table] if args.table else TABLES)}
    documents = [
        {
            "title": "\n".join(filter(None, (table.title, REMARKS.get(name)))),
            "image_size": FORMS[form][1],
            "rows": [audit_row(row, form) for row in audited(table)],
        }
        for name, table in tables.items()
    ]
    agrees = [record["agrees"] for document in documents for record in document["rows"]]
    if args.json:
        print(json_text({"ok": all(agrees), "rule": (*RULE, *AGREEMENT), "tables": documents}, indent=2))
    else:
        print(*RULE, *AGREEMENT, sep="\n")
        for document in documents:
            print_table(document["title"], document["image_size"], document["rows"])
        print(f"\n{sum(agrees)} of {len(agrees)} rows agree")
    return 0 if all(agrees) else 1


if __name__ == "__main__":
    sys.exit(main())
