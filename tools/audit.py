"""The paper's tables beside these models: parameters and FLOPs, counted on the real modules without any arithmetic.

    python -m tools.audit               Tables 1 to 7
    python -m tools.audit --cifar       the port's networks, to the unit

The paper's figures are those of tools/paper.py; how FLOPs are counted stands in sasa/analysis/flops.py.
"""

from functools import cache

import torch
from torch.overrides import TorchFunctionMode

from config import resolve
from sasa.analysis.flops import RULE, Flops, count_flops, count_parameters
from sasa.console import Parser, run_main
from sasa.files import json_text
from sasa.training.cli import parse_command_line
from sasa.training.network import build_network
from tools.paper import CIFAR, DETECTION, DETECTION_TEXT, TABLES, Figures, Row, Table, rows_for

AGREEMENT = (
    "Agreement: FLOPs within 0.17 B of the paper's figure. Its parameters, p million, stand for [p - 0.05, p + 0.1),",
    "as some of them are rounded and some (14.1, 16.7, 25.0) cut; ours are at most 0.05 M outside that.",
)
AGREEMENT_DETECTION = (
    "Table 2: the same for the parameters, FLOPs within 3 B (its figures are whole billions, and the attention stem",
    "counts 2.3 B more here); the appendix's reading is another network than the table's, so it need not agree.",
)
DETECTION_TOLERANCE = 3_000_000_000
DETECTION_SIDE, DETECTION_CLASSES = 640, 90  # inferred: docs/detection.md
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


def measure_detector(model: str, flags: str) -> tuple[int, Flops]:
    """Parameters, and FLOPs an image, of the detector that this line of sasa.detection.train builds."""
    # Imported here: torchvision's detectors take a second, which the other tables need not wait for.
    from sasa.detection.config import DetectionConfig, resolve
    from sasa.detection.flops import detector_flops
    from sasa.detection.run import build_detector

    given = parse_command_line(["--model-name", model, *flags.split()], DetectionConfig).given
    with torch.device("meta"), NoInitialisation():
        detector = build_detector(resolve(given, given["dataset"]), DETECTION_CLASSES)
    return count_parameters(detector), detector_flops(detector, DETECTION_SIDE)


def audit_row(row: Row, form: str = "imagenet") -> dict:
    """`compared` with what the row's network counts in this form."""
    return compared(row, *measure(row.model, row.flags, form))


def compared(row: Row, parameters: int, flops: Flops, tolerance: int = FLOPS_TOLERANCE) -> dict:
    """Ours, the paper's, ours minus the paper's, and whether they agree: a JSON record with units in its keys."""
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
        "agrees": parameters_agree(parameters, printed) and (gap is None or abs(gap) <= tolerance),
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


def document(name: str, table: Table, form: str = "imagenet") -> dict:
    """A table with its records, as --json prints it."""
    title = "\n".join(filter(None, (table.title, REMARKS.get(name))))
    return {"title": title, "image_size": FORMS[form][1], "rows": [audit_row(row, form) for row in audited(table)]}


def detection_documents() -> list[dict]:
    """Table 2, and the same by the appendix's text, which is held against nothing."""
    made = []
    for table, held in ((DETECTION, True), (DETECTION_TEXT, False)):
        rows = [compared(row, *measure_detector(row.model, row.flags), DETECTION_TOLERANCE) for row in table.rows]
        rows = rows if held else [record | {"agrees": None} for record in rows]
        made.append({"title": table.title, "image_size": DETECTION_SIDE, "rows": rows})
    return made


def print_table(title: str, image_size: int, records: list[dict]) -> None:
    """One line a row; differences are ours minus the paper's."""
    print(f"\n{title}\n{f'images of {image_size} pixels':38}{'FLOPs, billion':>18}{'parameters':>32}")
    print(f"{'':38}{'ours':>7}{'paper':>7}{'diff':>8}{'ours':>14}{'paper':>12}{'diff':>10}")
    for r in records:
        print(f"{r['model']:15}{r['row']:23}{r['flops'] / 1e9:7.3f}", end="")
        print(_cell(r["paper_gflops"], 7, ".1f") + _cell(r["difference_gflops"], 8, ".3f", "+"), end="")
        print(_cell(r["parameters"], 14, ",") + _cell(r["paper_parameters"], 12, ","), end="")
        difference = _cell(r["difference_parameters"], 10, ",", "+")
        print(
            difference if difference.startswith(" ") else f" {difference}",
            {True: " ok", False: " OFF", None: " -"}[r["agrees"]],
        )


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
    names = sorted([*TABLES, "2"])
    which.add_argument("--table", choices=names, metavar="N", help="one table only: 1 to 7; 2 is COCO detection")
    which.add_argument("--cifar", action="store_true", help="the port's CIFAR-10 networks, parameters to the unit")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of text, with FLOPs by kind")
    args = parser.parse_args(arguments)

    if args.cifar:
        documents = [document("", CIFAR, "small")]
    else:
        chosen = [args.table] if args.table else names
        documents = [made for n in chosen for made in (detection_documents() if n == "2" else [document(n, TABLES[n])])]
    agrees = [r["agrees"] for made in documents for r in made["rows"] if r["agrees"] is not None]
    agreement = (*AGREEMENT, *(AGREEMENT_DETECTION if args.table == "2" or not (args.table or args.cifar) else ()))
    if args.json:
        print(json_text({"ok": all(agrees), "rule": (*RULE, *agreement), "tables": documents}, indent=2))
    else:
        print(*RULE, *agreement, sep="\n")
        for made in documents:
            print_table(made["title"], made["image_size"], made["rows"])
        print(f"\n{sum(agrees)} of {len(agrees)} rows agree")
    return 0 if all(agrees) else 1


if __name__ == "__main__":
    run_main(main)
