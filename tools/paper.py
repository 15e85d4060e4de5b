"""The tables of the paper as data: each row is flags of train.py beside the figures that its source prints. No torch.

`tools.audit` counts the rows on the real modules, `tools.ablate` trains them.

Source: tables 1 to 7 of Ramachandran et al. 2019, arXiv 1906.05909 (ImageNet; Table 2, `DETECTION`, is COCO);
`PORT` is the results table of the README of leaderj1001/Stand-Alone-Self-Attention (CIFAR-10).
"""

from typing import NamedTuple


class Figures(NamedTuple):
    """What a row is printed with; None where its source prints nothing.

    top1_pct in %, gflops in billions, mparams in millions as printed, parameters to the unit, map_pct of COCO in %.
    """

    top1_pct: float | None = None
    gflops: float | None = None
    mparams: float | None = None
    parameters: int | None = None
    map_pct: float | None = None


class Row(NamedTuple):
    """A row of a table.

    flags: of train.py, apart from --model-name. model: None where the table fits any network. base: the flags of the
    row, on the same depth, that this one is compared with.
    """

    label: str
    flags: str = ""
    printed: Figures = Figures()
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


CONVOLUTION = "--attention-stages"  # attention in no stage: the convolution baseline
DEPTHS = ("ResNet26", "ResNet38", "ResNet50")


def _depths(label: str, flags: str, *figures: tuple, family: str = "") -> tuple[Row, ...]:
    """A row for each depth that figures are given of, from ResNet26 on."""
    return tuple(Row(label, flags, Figures(*of), family + name) for name, of in zip(DEPTHS, figures, strict=False))


TABLES = {
    "1": Table(
        "Table 1: convolution, attention, attention stem",
        _depths("convolution", CONVOLUTION, (74.5, 4.7, 13.7), (76.2, 6.5, 19.6), (76.9, 8.2, 25.6))
        + _depths("conv stem + attention", "", (75.8, 4.5, 10.3), (77.1, 5.7, 14.1), (77.4, 7.0, 18.0))
        + _depths("full attention", "--stem", (74.8, 4.7, 10.3), (76.9, 6.0, 14.1), (77.6, 7.2, 18.0)),
        source="paper, ImageNet",
    ),
    "3": Table(
        "Table 3: which groups are convolution",
        (
            Row("conv groups none", "", Figures(80.2, 7.0, 18.0)),
            Row("conv groups 1", "--attention-stages 2 3 4", Figures(80.7, 7.3, 18.1)),
            Row("conv groups 1 2", "--attention-stages 3 4", Figures(80.7, 7.5, 18.5)),
            Row("conv groups 1 2 3", "--attention-stages 4", Figures(80.2, 8.0, 20.8)),
            Row("conv groups 1 2 3 4", CONVOLUTION, Figures(79.5, 8.2, 25.6)),
            Row("conv groups 2 3 4", "--attention-stages 1", Figures(79.7, 7.9, 25.5)),
            Row("conv groups 3 4", "--attention-stages 1 2", Figures(79.6, 7.8, 25.0)),
            Row("conv groups 4", "--attention-stages 1 2 3", Figures(79.9, 7.2, 22.7)),
        ),
        source="paper, ResNet50 on a held-out part of ImageNet's training set",
    ),
    "4": Table(
        "Table 4: side of the window",
        (
            Row("k = 3", "--kernel-size 3", Figures(76.4, 6.6, 18.0)),
            Row("k = 5", "--kernel-size 5", Figures(77.2, 6.7, 18.0)),
            Row("k = 7", "", Figures(77.4, 7.0, 18.0)),
            Row("k = 9", "--kernel-size 9", Figures(77.7, 7.3, 18.0)),
            Row("k = 11", "--kernel-size 11", Figures(77.6, 7.7, 18.0)),
        ),
    ),
    "5": Table(
        "Table 5: position",
        (
            Row("none", "--position none", Figures(77.6, 6.9, 18.0)),
            Row("absolute", "--position absolute", Figures(78.2, 6.9, 18.0)),
            Row("relative", "", Figures(80.2, 7.0, 18.0)),
        ),
        source="paper, ResNet50 on a held-out part of ImageNet's training set",
    ),
    "6": Table(
        "Table 6: content",
        (
            Row("q.r only", "--no-content", Figures(76.9, 6.1, 16.7)),
            Row("q.k + q.r", "", Figures(77.4, 7.0, 18.0)),
        ),
    ),
    "7": Table(
        "Table 7: values of the attention stem",
        (
            Row("plain", "--stem --stem-values plain", Figures(76.2, 7.1, None), base="--stem"),
            Row("spatial convolution", "--stem --stem-values conv", Figures(77.2, 7.4, None), base="--stem"),
            Row("spatially aware", "--stem", Figures(77.6, 7.2, None), base="--stem"),
        ),
    ),
}
PORT = Table(
    "The port's networks",
    (
        Row("ResNet 26", "", Figures(90.94, None, 8.30), "ResNet26"),
        Row("naive ResNet 26", "", Figures(94.29, None, 8.74), "NaiveResNet26"),
        Row("ResNet 26 + stem", "--stem", Figures(90.22, None, 8.30), "ResNet26"),
        Row("ResNet 38", "", Figures(89.46, None, 12.1), "ResNet38"),
        Row("naive ResNet 38", "", Figures(94.93, None, 15.0), "NaiveResNet38"),
        Row("ResNet 50", "", Figures(None, None, 16.0), "ResNet50"),
    ),
    source="port, CIFAR-10",
)


def _counts(*parameters: int) -> list[tuple]:
    return [(None, None, None, count) for count in parameters]


# Computed apart from this repository, from the port's widths and depths.
CIFAR = Table(
    "CIFAR-10: the port's networks (leaderj1001/Stand-Alone-Self-Attention); parameters to the unit",
    _depths("conv stem + attention", "", *_counts(8_306_442, 12_154_442, 16_002_442))
    + _depths("BasicBlock convolution", "", *_counts(8_740_682, 15_011_402), family="Naive")
    + _depths("convolution", CONVOLUTION, *_counts(11_660_362, 17_590_602, 23_520_842)),
    source="port, CIFAR-10",
)


def _detector(label: str, flags: str, gflops: int, mparams: float, map_pct: float) -> Row:
    return Row(label, f"--dataset COCO {flags}".strip(), Figures(None, gflops, mparams, None, map_pct), "ResNet50")


# Flags of python -m sasa.detection.train. `DETECTION_TEXT` is what the appendix describes: every 3x3 convolution of
# heads and pyramid replaced; the table prints nothing for it but the figures of the rows with attention heads.
DETECTION = Table(
    "Table 2: RetinaNet; the pyramid stays convolution",
    (
        _detector("convolution", CONVOLUTION, 182, 33.4, 36.5),
        _detector("conv stem + attention", "", 173, 25.9, 36.8),
        _detector("full attention", "--stem", 173, 25.9, 36.2),
        _detector("conv stem, heads too", "--heads attention", 111, 22.0, 36.6),
        _detector("full attention, heads", "--stem --heads attention", 110, 22.0, 36.6),
    ),
    source="paper, COCO",
)
DETECTION_TEXT = Table(
    "Table 2 by the appendix's text: attention in the pyramid too",
    (
        _detector("conv stem, heads too", "--heads attention --fpn attention", 111, 22.0, 36.6),
        _detector("full attention, heads", "--stem --heads attention --fpn attention", 110, 22.0, 36.6),
    ),
    source="paper, COCO",
)


def rows_for(table: Table, model: str | None) -> list[Row]:
    """The table's rows on the network `model`.

    A table whose rows name their networks (1 and port) is cut to that depth, or whole where `model` is None.
    """
    if table.rows[0].model is None:
        return [row._replace(model=model) for row in table.rows]
    return [row for row in table.rows if model in (None, row.depth)]
