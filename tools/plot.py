"""Pictures of a folder of runs: `python -m tools.plot results/digits` writes curves.png and accuracy.png there.

curves.png: the test error of each epoch, a panel a table, a line a row: its mean over the seeds, with the span from the
lowest to the highest. accuracy.png: test top-1 against FLOPs and against parameters, mean and standard deviation, a
point a row; networks of several depths are joined, as in figure 5 of the paper.

Reads log.jsonl and the summaries only. Needs matplotlib (requirements-plot.txt).
"""

import argparse
import json
import math
import sys
from pathlib import Path

from sasa.console import USAGE_ERROR
from tools.paper import CONVOLUTION, Row, rows_for
from tools.report import Folder, ReportError, read, record, seeds_of
from tools.trials import TABLES, run_name

WIDTH, PANEL_HEIGHT = 11.0, 3.9  # inches
DPI = 110
FAMILIES = {CONVOLUTION: "#d55e00", "": "black", "--stem": "#0072b2"}  # of the paper's figure, by flags
NAIVE = "#cc79a7"  # the port's convolution networks
OTHER = "#8a8a8a"  # rows that are none of these
COLOURS = ("#009e73", "#e69f00", "#56b4e9", "#8c564b", "#9467bd", "#7f9a00", "#17becf", "#7f7f7f", "#b04a4a", "#4a5fb0",
           "#2f6b4f", "#c49c94")  # fmt: skip
LABEL_POINTS = 8.0
# Where a point's label may stand, in points from it, the first free one: beside, above, below, further away.
PLACES = [(sx * d, sy * d) for d in (8, 16, 28, 42, 58, 76) for sx, sy in
          ((1, 0), (1, 1), (1, -1), (-1, 0), (-1, 1), (-1, -1), (0, 1), (0, -1))]  # fmt: skip


def style(ax) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, which="major", color="#e4e4e4", linewidth=0.6)
    ax.set_axisbelow(True)


def label_of(row: Row, depths: int) -> str:
    """The row's name, with its depth where the picture has several."""
    return row.label if depths == 1 or row.model.lower() in row.label.lower().replace(" ", "") else (
        f"{row.label}, {row.model}"
    )  # fmt: skip


# ---- learning curves ------------------------------------------------------------------------------------------------


def errors(folder: Folder, row: Row) -> list[tuple[int, list[float]]]:
    """(epoch, error in % of each seed) of a row, up to the epoch that all of its runs have reached."""
    logs = []
    for seed in seeds_of(folder, row):
        text = (folder.path / run_name(row, seed) / "log.jsonl").read_text(encoding="utf-8")
        logs.append([json.loads(line) for line in text.splitlines()])
    return [(at[0]["epoch"], [100 - line["val_top1_pct"] for line in at]) for at in zip(*logs, strict=False)]


def apart(values: list[float], gap: float, low: float, high: float) -> list[float]:
    """The values moved to stand at least `gap` apart within [low, high], in their order and near where they were.

    Pushing up and pushing down each keep the gaps, and so does their mean, which stays in the middle.
    """
    order = sorted(range(len(values)), key=lambda i: values[i])
    at = [values[i] for i in order]
    at = [(up + down) / 2 for up, down in zip(pushed(at, gap, -math.inf), fallen(at, gap, math.inf), strict=True)]
    at = fallen(pushed(at, gap, low), gap, high)
    return [at[order.index(i)] for i in range(len(values))]


def pushed(values: list[float], gap: float, low: float) -> list[float]:
    """Ascending values raised where they are below `low` or less than `gap` above the one before."""
    out = []
    for value in values:
        out.append(max(value, out[-1] + gap if out else low))
    return out


def fallen(values: list[float], gap: float, high: float) -> list[float]:
    """The same from above."""
    return [-value for value in reversed(pushed([-value for value in reversed(values)], gap, -high))]


def draw_curves(plt, folder: Folder, path: Path) -> None:
    panels = [(table, [row for row in rows_for(TABLES[table], model) if seeds_of(folder, row)])
              for table, model in folder.tables]  # fmt: skip
    panels = [(table, shown) for table, shown in panels if shown]
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(WIDTH, PANEL_HEIGHT * lines), squeeze=False, layout="constrained"
    )
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for ax, (table, shown) in zip(axes.flat, panels, strict=False):
        draw_panel(ax, folder, TABLES[table].title, shown)
    of = "held-out training images" if folder.budget.given().get("holdout") else "test images"
    axes.flat[0].set_ylabel(f"error on the {of}, %")
    figure.suptitle(f"{title_of(folder)}: error by epoch, mean and span over the seeds", fontsize=11)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def draw_panel(ax, folder: Folder, title: str, shown: list[Row]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    style(ax)
    depths, ends = len({row.depth for row in shown}), []
    for i, row in enumerate(shown):
        base = (row.model, row.flags) == (row.depth, row.base)
        colour = colour_of(row, COLOURS[i % len(COLOURS)])
        points = errors(folder, row)
        epochs = [epoch for epoch, _ in points]
        means = [max(sum(of) / len(of), 0.05) for _, of in points]  # a logarithmic axis has no zero
        ax.plot(epochs, means, color=colour, linewidth=2.0 if base else 1.3, marker="o", markersize=2.5, zorder=3)
        low, high = ([max(pick(of), 0.05) for _, of in points] for pick in (min, max))
        ax.fill_between(epochs, low, high, color=colour, alpha=0.10, linewidth=0)
        ends.append((means[-1], epochs[-1], f"{label_of(row, depths)}  {means[-1]:.1f}", colour))
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    low, high = ax.get_ylim()
    fine = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)  # where less than half a decade is shown
    steps = (1, 2, 5) if high > 3.2 * low else fine
    ax.set_yticks([t * ten for ten in (0.1, 1, 10, 100) for t in steps if low <= t * ten <= high])
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("epoch")
    ax.set_title(title, fontsize=10, loc="left")
    to_axes = ax.transScale + ax.transLimits
    heights = [to_axes.transform((0, mean))[1] for mean, *_ in ends]
    for (mean, epoch, text, colour), height in zip(ends, apart(heights, 0.062, 0.02, 0.98), strict=True):
        ax.annotate(
            text, (epoch, mean), xytext=(1.05, height), textcoords="axes fraction", fontsize=LABEL_POINTS, color=colour,
            va="center", arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2,
                                     "relpos": (0, 0.5)},
            annotation_clip=False,
        )  # fmt: skip


# ---- accuracy against cost ------------------------------------------------------------------------------------------


def draw_accuracy(plt, folder: Folder, path: Path) -> None:
    """The recipe's rows, all of one network, are left out; where there are no others nothing is drawn."""
    found = {}
    for table, model in folder.tables:
        for row in rows_for(TABLES[table], model) if table != "recipe" else ():
            if seeds_of(folder, row):
                found.setdefault((row.model, row.flags), (row, record(folder, table, row)))
    if not found:
        return
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 5.2), layout="constrained", sharey=True)
    for ax, key, unit, text in (
        (axes[0], "flops_per_image", 1e6, "MFLOPs an image"), (axes[1], "parameters", 1e6, "parameters, millions"),
    ):  # fmt: skip
        style(ax)
        draw_points(ax, list(found.values()), key, unit)
        ax.set_xlabel(text)
    axes[0].set_ylabel("test top-1, %")
    figure.suptitle(f"{title_of(folder)}: mean and standard deviation over the seeds", fontsize=11)
    figure.canvas.draw()
    for ax, key in zip(axes, ("flops_per_image", "parameters"), strict=True):
        label_points(figure, ax, list(found.values()), key)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def colour_of(row: Row, other: str = OTHER) -> str:
    return NAIVE if row.model != row.depth else FAMILIES.get(row.flags, other)


def draw_points(ax, points: list[tuple[Row, dict]], key: str, unit: float) -> None:
    for row, of in points:
        ax.errorbar(
            of[key] / unit, of["test_top1_pct_mean"], yerr=of["test_top1_pct_std"], fmt="o", markersize=5.5,
            color=colour_of(row), elinewidth=0.9, capsize=2.5, zorder=3,
        )  # fmt: skip
    for flags, colour in FAMILIES.items():
        line = sorted((of[key] / unit, of["test_top1_pct_mean"]) for row, of in points
                      if row.flags == flags and row.model == row.depth)  # fmt: skip
        ax.plot(*zip(*line, strict=True), color=colour, linewidth=1.2, zorder=2) if len(line) > 1 else None
    ax.margins(x=0.22, y=0.12)


def label_points(figure, ax, points: list[tuple[Row, dict]], key: str) -> None:
    """Each label in the first of `PLACES` that is free of points and other labels, with a line to its point."""
    renderer, depths = figure.canvas.get_renderer(), len({row.depth for row, _ in points})
    scale, inside = figure.dpi / 72, ax.get_window_extent(renderer)
    spots = [(ax.transData.transform((of[key] / 1e6, of["test_top1_pct_mean"])), row) for row, of in points]
    taken = [(x - 4 * scale, y - 4 * scale, x + 4 * scale, y + 4 * scale) for (x, y), _ in spots]
    # the families first: they should stand nearest
    for (x, y), row in sorted(spots, key=lambda spot: colour_of(spot[1]) == OTHER):
        label = ax.annotate(label_of(row, depths), (x, y), xycoords="figure pixels", fontsize=LABEL_POINTS,
                            color="#555555" if colour_of(row) == OTHER else colour_of(row))  # fmt: skip
        size = label.get_window_extent(renderer)
        label.remove()
        dx, dy, box = next(
            ((dx, dy, box) for dx, dy in PLACES
             if (box := place(x, y, dx * scale, dy * scale, size.width, size.height))
             and inside.x0 <= box[0] and box[2] <= inside.x1 and inside.y0 <= box[1] and box[3] <= inside.y1
             and not any(overlap(box, other) for other in taken)),
            (*PLACES[0], place(x, y, PLACES[0][0] * scale, 0, size.width, size.height)),
        )  # fmt: skip
        taken.append(box)
        ax.annotate(
            label.get_text(), ax.transData.inverted().transform((x, y)), xytext=(dx, dy), textcoords="offset points",
            fontsize=LABEL_POINTS, color=label.get_color(), va="center",
            ha={1: "left", -1: "right", 0: "center"}[(dx > 0) - (dx < 0)],
            arrowprops={"arrowstyle": "-", "color": "#aaaaaa", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3},
        )  # fmt: skip


def place(x: float, y: float, dx: float, dy: float, width: float, height: float) -> tuple[float, float, float, float]:
    """The box of a label (dx, dy) from its point, in pixels: left, low, right, high."""
    left = x + dx - (0 if dx > 0 else width if dx < 0 else width / 2)
    return left, y + dy - height / 2, left + width, y + dy + height / 2


def overlap(a: tuple, b: tuple) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def title_of(folder: Folder) -> str:
    epochs = next(iter(folder.summaries.values()))["epochs"]
    return f"{' '.join([folder.budget.dataset, *folder.budget.words()])}, {epochs} epochs"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="plot.py", description="Pictures of folders of runs, as PNG beside the runs.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="such as results/digits")
    args = parser.parse_args(arguments)
    try:
        import matplotlib

        matplotlib.use("Agg")  # files only: no display is needed
        from matplotlib import pyplot
    except ImportError:
        print("plot.py: error: matplotlib is missing: pip install -r requirements-plot.txt", file=sys.stderr)
        return 1
    for path in args.folders:
        try:
            folder = read(path)
            if not folder.summaries:
                raise ReportError(f"{path}: no run in it is done")
        except ReportError as error:
            print(f"plot.py: error: {error}", file=sys.stderr)
            return USAGE_ERROR
        for name, draw in (("curves.png", draw_curves), ("accuracy.png", draw_accuracy)):
            (path / name).unlink(missing_ok=True)  # also where there is nothing to draw any more
            draw(pyplot, folder, path / name)
            if (path / name).exists():
                print(f"wrote {path / name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
