"""The paper's tables beside these models: parameters and FLOPs, counted on the real modules without any arithmetic.

Source: tables 1 and 3 to 7 of Ramachandran et al. 2019, arXiv 1906.05909; how FLOPs are counted stands in
sasa/analysis/flops.py. Table 2 is COCO detection, which this repository has not.
"""

import json
import sys
from functools import cache
from typing import NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from model import build
from sasa.analysis.flops import RULE, Flops, count_flops, count_parameters
from sasa.console import Parser

AGREEMENT = (
    "Agreement: FLOPs within 0.17 B of the paper's figure. Its parameters, p million, stand for [p - 0.05, p + 0.1),",
    "as some of them are rounded and some (14.1, 16.7, 25.0) cut; ours are at most 0.05 M outside that.",
)
FLOPS_TOLERANCE = 170_000_000  # wide enough for "q.r only" (0.11 B) and for m = 4 (0.16 B), see `TABLES`
PARAMETERS_TOLERANCE = 50_000


class Row(NamedTuple):
    """One row of a table: `model.build(name, **options)` and the figures that it is held against.

    gflops: billions as printed, or None. params: millions as printed (float), a count to the unit (int), or None.
    """

    name: str
    label: str
    gflops: float | None
    params: float | int | None
    options: dict


class Table(NamedTuple):
    title: str
    rows: tuple[Row, ...]
    image_size: int = 224  # pixels, both sides


def _nets(label: str, *figures: tuple, family: str = "ResNet", **options) -> tuple[Row, ...]:
    return tuple(Row(f"{family}{depth}", label, *of, options) for depth, of in zip((26, 38, 50), figures, strict=False))


def _r50(title: str, *rows: tuple) -> Table:
    return Table(title, tuple(Row("ResNet50", *row) for row in rows))


_M = "(the paper does not give m, the stem's value matrices: 8 fits its FLOPs best, 4 is the default here)"
_M8, _M4 = ({"stem": True, "stem_num_mixtures": m} for m in (8, 4))
_SMALL = {"num_classes": 10, "small_images": True}

TABLES = {
    1: Table(
        f"Table 1: ImageNet; full attention is the attention stem + attention\n{_M}",
        _nets("convolution", (4.7, 13.7), (6.5, 19.6), (8.2, 25.6), attention_stages=())
        + _nets("conv stem + attention", (4.5, 10.3), (5.7, 14.1), (7.0, 18.0))
        + _nets("full attention, m = 8", (4.7, 10.3), (6.0, 14.1), (7.2, 18.0), **_M8)
        + _nets("full attention, m = 4", (4.7, 10.3), (6.0, 14.1), (7.2, 18.0), **_M4),
    ),
    3: _r50(
        "Table 3: which groups are convolution; conv stem",
        ("conv groups none", 7.0, 18.0, {}),
        ("conv groups 1", 7.3, 18.1, {"attention_stages": (2, 3, 4)}),
        ("conv groups 1 2", 7.5, 18.5, {"attention_stages": (3, 4)}),
        ("conv groups 1 2 3", 8.0, 20.8, {"attention_stages": (4,)}),
        ("conv groups 1 2 3 4", 8.2, 25.6, {"attention_stages": ()}),
        ("conv groups 2 3 4", 7.9, 25.5, {"attention_stages": (1,)}),
        ("conv groups 3 4", 7.8, 25.0, {"attention_stages": (1, 2)}),
        ("conv groups 4", 7.2, 22.7, {"attention_stages": (1, 2, 3)}),
    ),
    4: _r50(
        "Table 4: side k of the window; conv stem\n(the paper: no more parameters; here the embeddings grow a little)",
        ("k = 3", 6.6, 18.0, {"kernel_size": 3}),
        ("k = 5", 6.7, 18.0, {"kernel_size": 5}),
        ("k = 7", 7.0, 18.0, {}),
        ("k = 9", 7.3, 18.0, {"kernel_size": 9}),
        ("k = 11", 7.7, 18.0, {"kernel_size": 11}),
    ),
    5: _r50(
        "Table 5: position; conv stem",
        ("none", 6.9, 18.0, {"position": "none"}),
        ("absolute", 6.9, 18.0, {"position": "absolute"}),
        ("relative", 7.0, 18.0, {}),
    ),
    6: _r50("Table 6: content; conv stem", ("q.r only", 6.1, 16.7, {"content": False}), ("q.k + q.r", 7.0, 18.0, {})),
    7: _r50(
        f"Table 7: values of the attention stem\n{_M}",
        ("plain", 7.1, None, {"stem": True, "stem_values": "plain"}),
        ("spatial convolution", 7.4, None, {"stem": True, "stem_values": "conv"}),
        ("spatially aware, m = 8", 7.2, None, _M8),
        ("spatially aware, m = 4", 7.2, None, _M4),
    ),
}
CIFAR = Table(
    "CIFAR-10: the seed's networks (leaderj1001/Stand-Alone-Self-Attention); parameters to the unit",
    _nets("conv stem + attention", (None, 8_306_442), (None, 12_154_442), (None, 16_002_442), **_SMALL)
    + _nets("BasicBlock convolution", (None, 8_740_682), (None, 15_011_402), family="NaiveResNet", **_SMALL)
    + _nets("convolution", (None, 11_660_362), (None, 17_590_602), (None, 23_520_842), attention_stages=(), **_SMALL),
    image_size=32,
)


class _NoInitialisation(TorchFunctionMode):
    """Leaves the initialisers out: there is nothing to initialise on meta, and it takes half of the building."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        return func(*args, **(kwargs or {}))


@cache
def _measure(name: str, options: tuple, image_size: int) -> tuple[int, Flops]:
    """Parameters and FLOPs of a network; several tables share some."""
    with torch.device("meta"), _NoInitialisation():
        model = build(name, **dict(options))
    return count_parameters(model), count_flops(model, image_size)


def audit_row(row: Row, image_size: int) -> dict:
    """Ours, the paper's, ours minus the paper's, and whether they agree: a JSON record with units in its keys."""
    params, flops = _measure(row.name, tuple(sorted(row.options.items())), image_size)
    paper = row.params if row.params is None or isinstance(row.params, int) else round(row.params * 1e6)
    gap = None if row.gflops is None else flops.total - round(row.gflops * 1e9)
    agrees = row.params is None or parameters_agree(params, row.params)
    return {
        "model": row.name,
        "row": row.label,
        "flops": flops.total,
        "paper_gflops": row.gflops,
        "difference_gflops": None if gap is None else gap / 1e9,
        "parameters": params,
        "paper_parameters": paper,
        "difference_parameters": None if paper is None else params - paper,
        "agrees": agrees and (gap is None or abs(gap) <= FLOPS_TOLERANCE),
        "flops_by_kind": flops.by_kind,
    }


def parameters_agree(ours: int, paper: float | int) -> bool:
    """An int must hold to the unit; a float, in millions, as `AGREEMENT` says: ours in [p - 0.1 M, p + 0.15 M]."""
    if isinstance(paper, int):
        return ours == paper
    printed = round(paper * 1e6)
    return printed - 50_000 - PARAMETERS_TOLERANCE <= ours <= printed + 100_000 + PARAMETERS_TOLERANCE


def print_table(table: Table, records: list[dict]) -> None:
    """One line a row; differences are ours minus the paper's."""
    print(f"\n{table.title}\n{f'images of {table.image_size} pixels':38}{'FLOPs, billion':>18}{'parameters':>32}")
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
    numbers = "one table only: 1, 3, 4, 5, 6 or 7 (2 is COCO detection, which is not built here)"
    which.add_argument("--table", type=int, choices=TABLES, metavar="N", help=numbers)
    which.add_argument("--cifar", action="store_true", help="the seed's CIFAR-10 networks, parameters to the unit")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of text, with FLOPs by kind")
    args = parser.parse_args(arguments)

    tables = [CIFAR] if args.cifar else [TABLES[n] for n in ([args.table] if args.table else TABLES)]
    results = [[audit_row(row, table.image_size) for row in table.rows] for table in tables]
    agrees = [r["agrees"] for records in results for r in records]
    if args.json:
        document = [t._asdict() | {"rows": records} for t, records in zip(tables, results, strict=True)]
        print(json.dumps({"ok": all(agrees), "rule": (*RULE, *AGREEMENT), "tables": document}, indent=2))
    else:
        print(*RULE, *AGREEMENT, sep="\n")
        for table, records in zip(tables, results, strict=True):
            print_table(table, records)
        print(f"\n{sum(agrees)} of {len(agrees)} rows agree")
    return 0 if all(agrees) else 1


if __name__ == "__main__":
    sys.exit(main())
