"""Pictures of a folder of runs: `python -m tools.plot results/digits` writes curves.png and accuracy.png there.

curves.png: the test error of each epoch, a panel a table, a line a row: its mean over the seeds, with the span from the
lowest to the highest. accuracy.png: test top-1 against FLOPs and against parameters, mean and standard deviation, a
point a row; networks of several depths are joined, as in figure 5 of the paper.

Reads log.jsonl and the summaries only.
"""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING, Any

from sasa.analysis import figures
from sasa.console import USAGE_ERROR, Parser, as_path, print_error, printable, raise_if_reader_is_gone, run_main
from tools.paper import CONVOLUTION, Row, rows_for
from tools.runs import Folder, RunsError, length, read, read_rows, record, seeds_of
from tools.trials import TABLES, run_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, PANEL_HEIGHT, COST_HEIGHT = 1210, 430, 560  # pixels
FAMILIES = {CONVOLUTION: "#d55e00", "": "black", "--stem": "#0072b2"}  # of the paper's figure, by flags
NAIVE = "#cc79a7"  # the port's convolution networks
COLOURS = ("#009e73", "#e69f00", "#56b4e9", "#8c564b", "#9467bd", "#7f9a00", "#17becf", "#7f7f7f", "#b04a4a", "#4a5fb0",
           "#2f6b4f", "#c49c94")  # fmt: skip
MARKERS = "os^DvPX*<>p"  # one fewer than the colours, so that no pair comes twice
LOWEST = 0.05  # per cent: an error of 0 on a logarithmic axis
MILLION = 1e6


def label_of(row: Row, depths: int) -> str:
    """The row's name, with its depth where the picture has several."""
    if depths == 1 or row.model.lower() in row.label.lower().replace(" ", ""):
        return row.label
    return f"{row.label}, {row.model}"


def colour_of(row: Row, other: str) -> str:
    """The colour of the row's family, or `other` where it is of none."""
    return NAIVE if row.model != row.depth else FAMILIES.get(row.flags, other)


def title_of(folder: Folder) -> str:
    return f"{' '.join([folder.budget.dataset, *folder.budget.label()])}, {length(folder)}"


def add_legend(ax: Axes) -> None:
    """To the right of the axes, where it hides nothing."""
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, fontsize=8, frameon=False)


# ---- learning curves ------------------------------------------------------------------------------------------------


def errors(folder: Folder, row: Row) -> list[tuple[int, list[float]]]:
    """(epoch, error in % of each seed) of a row, up to the epoch that all of its runs have reached."""
    logs = [read_rows(folder.path / run_name(row, seed) / "log.jsonl") for seed in seeds_of(folder, row)]
    try:
        scored = [[line for line in log if line["val_top1_pct"] is not None] for log in logs]  # --val-every
        return [(at[0]["epoch"], [100 - line["val_top1_pct"] for line in at]) for at in zip(*scored, strict=False)]
    except (KeyError, TypeError) as error:
        raise RunsError(f"{printable(folder.path)}: logs of {row.model} without an accuracy ({error})") from error


def curves_figure(folder: Folder) -> Figure:
    """The test error by epoch, a panel a table."""
    panels = [(TABLES[table].title, [row for row in rows_for(TABLES[table], model) if seeds_of(folder, row)])
              for table, model in folder.tables]  # fmt: skip
    panels = [(title, shown) for title, shown in panels if shown]
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = figures.new_figure(WIDTH, PANEL_HEIGHT * lines, layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for ax, (title, shown) in zip(axes.flat, panels, strict=False):
        draw_curves(ax, folder, title, shown)
    of = "held-out training images" if folder.budget.given().get("holdout") else "test images"
    for ax in axes[:, 0]:
        ax.set_ylabel(f"error on the {of}, %")
    figure.suptitle(f"{title_of(folder)}: error by epoch, mean and span over the seeds", fontsize=11)
    return figure


def draw_curves(ax: Axes, folder: Folder, title: str, shown: list[Row]) -> None:
    """A line a row, the worst at the end first in the legend."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

    figures.plain_axes(ax)
    depths, curves = len({row.depth for row in shown}), []
    for i, row in enumerate(shown):
        epochs, values = zip(*errors(folder, row), strict=True)
        means = [max(sum(of) / len(of), LOWEST) for of in values]
        span = [[max(pick(of), LOWEST) for of in values] for pick in (min, max)]
        curves.append((means, span, epochs, row, colour_of(row, COLOURS[i % len(COLOURS)])))
    for means, span, epochs, row, colour in sorted(curves, key=lambda curve: -curve[0][-1]):
        base = (row.model, row.flags) == (row.depth, row.base)
        ax.plot(epochs, means, color=colour, linewidth=2.2 if base else 1.3, marker="o", markersize=2.5, zorder=3,
                label=f"{label_of(row, depths)}, {means[-1]:.1f}")  # fmt: skip
        ax.fill_between(epochs, *span, color=colour, alpha=0.10, linewidth=0)
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    steps = (1, 2, 5) if high > 3.2 * low else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
    ax.yaxis.set_major_locator(LogLocator(subs=steps))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.minorticks_off()
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("epoch")
    ax.set_title(title, fontsize=10, loc="left")
    add_legend(ax)


# ---- accuracy against cost ------------------------------------------------------------------------------------------


def accuracy_figure(folder: Folder) -> Figure | None:
    """Accuracy against cost. The recipe's rows, all of one network, are left out; None where there are no others."""
    found: dict[tuple[str, str], tuple[Row, dict[str, Any]]] = {}
    for table, model in folder.tables:
        for row in rows_for(TABLES[table], model) if table != "recipe" else ():
            if seeds_of(folder, row):
                found.setdefault((row.model, row.flags), (row, record(folder, table, row)))
    if not found:
        return None
    figure = figures.new_figure(WIDTH, COST_HEIGHT, layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    costs = (("flops_per_image", "MFLOPs an image"), ("parameters", "parameters, millions"))
    for ax, (key, text) in zip(axes, costs, strict=True):
        figures.plain_axes(ax)
        draw_points(ax, list(found.values()), key)
        ax.set_xlabel(text)
    axes[0].set_ylabel("test top-1, %")
    add_legend(axes[1])
    figure.suptitle(f"{title_of(folder)}: mean and standard deviation over the seeds", fontsize=11)
    return figure


def draw_points(ax: Axes, points: list[tuple[Row, dict[str, Any]]], key: str) -> None:
    """A point a row, the most accurate first in the legend; a line through the depths of each family."""
    depths, others = len({row.depth for row, _ in points}), zip(cycle(COLOURS), cycle(MARKERS), strict=True)
    for row, of in sorted(points, key=lambda point: -point[1]["test_top1_pct_mean"]):
        family = colour_of(row, "")
        colour, marker = (family, "o") if family else next(others)
        ax.errorbar(
            of[key] / MILLION, of["test_top1_pct_mean"], yerr=of["test_top1_pct_std"], fmt=marker, markersize=6,
            color=colour, elinewidth=0.9, capsize=2.5, zorder=3, label=label_of(row, depths),
        )  # fmt: skip
    for flags, colour in FAMILIES.items():
        line = sorted((of[key] / MILLION, of["test_top1_pct_mean"]) for row, of in points
                      if row.flags == flags and row.model == row.depth)  # fmt: skip
        if len(line) > 1:
            ax.plot(*zip(*line, strict=True), color=colour, linewidth=1.2, zorder=2)


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("python -m tools.plot", description="Pictures of folders of runs, as PNG beside the runs.")
    parser.add_argument("folders", nargs="+", type=as_path, metavar="DIR", help="such as results/digits")
    for path in parser.parse_args(arguments).folders:
        try:
            folder = read(path)
            if not folder.summaries:
                raise RunsError(f"{path}: no run in it is done")
            for name, figure in (("curves.png", curves_figure(folder)), ("accuracy.png", accuracy_figure(folder))):
                if figure is None:
                    (path / name).unlink(missing_ok=True)  # of rows that are not there any more
                    continue
                figures.save(figure, path / name)
                print(f"wrote {printable(path / name)}")
        except (RunsError, OSError) as error:
            raise_if_reader_is_gone(error)
            print_error("tools.plot", error)
            return USAGE_ERROR
    return 0


if __name__ == "__main__":
    run_main(main)
