"""Pictures drawn with matplotlib: sheets of attention maps, maps over their image, measures, confusion matrices.

Each function returns a `Figure` of its own; pyplot and its global state are never used. matplotlib is imported where
something is drawn, so a command that draws nothing does not wait for it. A sheet is one array of pixels, which
`Figure.figimage` puts in place unscaled, with lines of text over it: a pixel of a map is a whole number of the
picture's, and a sheet takes some hundredths of a second.

Shapes: N heads, K window side, H x W image or map. A picture is (height, width, 3) uint8.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sasa.analysis.attention_maps import (
    LayerAttention,
    centre_share,
    embeddings,
    entropy,
    mean_distance,
    mean_maps,
    similarity,
)
from sasa.console import printable
from sasa.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 100
MAP_SIDE, OVERLAY_SIDE, IMAGE_SIDE = 72, 84, 96  # pixels: side of a map, of a map over its image, of an image
GAP, MARGIN, LINE = 6, 10, 16  # pixels: between cells, around a sheet, height of a line of text
POINTS, CHARACTER = 9, 7.4  # size of the letters; pixels of a character of that size, on the safe side
CARD_MAPS, CARD_IMAGES = 4, 3  # cells beside each other on one of TensorBoard's cards, about 330 pixels wide
INK, MUTED, WRONG = "#1e242c", "#69717d", "#b23f0a"
GLOW, FRAME, WINDOW = (255, 122, 0), (255, 255, 255), (105, 113, 125)  # over an image: weights, the pixel, its window
PROGRESS_MISTAKES = 8
LABELLED_CLASSES = 20  # a larger confusion matrix has no names and no counts


def new_figure(width: float, height: float, **options) -> Figure:
    """An empty figure of `width` x `height` pixels; `options` are of matplotlib's `Figure`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, **options)
    FigureCanvasAgg(figure)  # becomes the figure's canvas
    return figure


def to_tensor(figure: Figure) -> Tensor:
    """The drawn figure, (3, height, width) in [0, 1]: what TensorBoard's writer takes."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # a letter that the font lacks is drawn as a box
        figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]  # (height, width, 3) uint8
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def save(figure: Figure, path: Path) -> None:
    """The drawn figure as a PNG file, written whole or not at all.

    Raises:
        OSError: the folder or the disk refuses.
    """
    from PIL import Image

    pixels = (to_tensor(figure) * 255).round().byte().permute(1, 2, 0).numpy()
    with replacing(path) as file:
        Image.fromarray(pixels).save(file, "PNG", optimize=True)


# ---- sheets ---------------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """A picture of a sheet and the lines of text below it; all lines but the first are in the colour of mistakes."""

    picture: np.ndarray
    caption: str


class Strip(NamedTuple):
    """Cells beside each other under a name; they go on below where a sheet has fewer columns."""

    name: str
    cells: list[Cell]


def sheet(strips: Sequence[Strip], heading: str = "", columns: int = 9) -> Figure:
    """Strips one below the other, `columns` cells wide at most."""
    side = max(cell.picture.shape[1] for strip in strips for cell in strip.cells)
    columns = min(columns, max(len(strip.cells) for strip in strips))
    width = 2 * MARGIN + columns * (side + GAP) - GAP
    pictures, texts = [], []  # (left, top, picture), (left, top, text, colour, width)
    top = MARGIN
    if heading:
        texts.append((MARGIN, top, heading, MUTED, width - 2 * MARGIN))
        top += LINE + GAP
    for name, cells in strips:
        if name:
            texts.append((MARGIN, top, name, INK, width - 2 * MARGIN))
            top += LINE + 2
        for first in range(0, len(cells), columns):
            part = cells[first : first + columns]
            height, lines = max(cell.picture.shape[0] for cell in part), 0
            for i, (picture, caption) in enumerate(part):
                left = MARGIN + i * (side + GAP)
                pictures.append((left, top, picture))
                for line, text in enumerate(caption.split("\n") if caption else ()):
                    texts.append((left, top + height + 2 + line * LINE, text, WRONG if line else MUTED, side))
                    lines = max(lines, line + 1)
            top += height + lines * LINE + GAP
    height = top + MARGIN - GAP
    canvas = np.full((height, width, 3), 255, np.uint8)
    for left, top, picture in pictures:
        canvas[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    figure = new_figure(width, height)
    figure.figimage(canvas, origin="upper")
    for left, top, text, colour, room in texts:
        shown = fit(text, room)
        figure.text(left / width, 1 - top / height, shown, color=colour, fontsize=POINTS, va="top", parse_math=False)
    return figure


def card(strips: Sequence[Strip]) -> Figure:
    """A sheet of maps that fits one of TensorBoard's cards unscaled."""
    return sheet(strips, columns=CARD_MAPS)


def fit(text: str, width: float) -> str:
    """`text` as one printable line, cut with an ellipsis where it is wider than `width` pixels."""
    room, text = int(width / CHARACTER), printable(text)
    wide = [2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text]
    if sum(wide) <= room:
        return text
    kept = next(i for i in range(len(text) + 1) if sum(wide[: i + 1]) > room - 1)
    return text[:kept] + "\u2026"


def scaled(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Nearest-neighbour scaling: (h, w, ...) -> (height, width, ...)."""
    rows, cols = (np.arange(new) * old // new for new, old in zip((height, width), picture.shape, strict=False))
    return picture[rows[:, None], cols]


def heat(maps: Tensor, largest: float | None = None) -> list[np.ndarray]:
    """Maps as pictures of cells: (N, h, w) -> N times (MAP_SIDE, MAP_SIDE, 3) uint8.

    White for 0 and deep blue for the largest value of each map; or, with `largest`, blue for -largest and red for it.
    """
    from matplotlib import colormaps

    values = maps.float().nan_to_num(0.0, 0.0, 0.0).numpy()
    if largest is None:
        colours = colormaps["Blues"](values / values.max((1, 2), keepdims=True).clip(1e-12), bytes=True)
    else:
        colours = colormaps["RdBu_r"](0.5 + 0.5 * values / max(largest, 1e-12), bytes=True)
    return [scaled(picture, MAP_SIDE, MAP_SIDE) for picture in colours[..., :3]]


def map_strip(attention: LayerAttention) -> Strip:
    """Each head's mean K x K map, dark where most weight lies, above its mean entropy."""
    bits = entropy(attention.weights).mean((0, 2)).tolist()
    pictures = heat(mean_maps(attention))
    return Strip(attention.name, [Cell(picture, f"{b:.2f} bit") for picture, b in zip(pictures, bits, strict=True)])


def embedding_strips(attention: LayerAttention) -> list[Strip]:
    """Row and column embeddings of each head (channels down, offsets across) and the cosine between offsets.

    Empty where the layer has none. One colour scale for the layer's tables.
    """
    tables = embeddings(attention.layer)
    if tables is None:
        return []
    largest = max(part.abs().max().item() for part in tables)
    strips = []
    for title, shown, most in (("", tables, largest), (", cosine", map(similarity, tables), 1.0)):
        for axis, part in zip(("rows", "columns"), shown, strict=True):
            name = f"{attention.name}, {axis}{title}, {most:.2f} at most"
            strips.append(Strip(name, [Cell(picture, "") for picture in heat(part, most)]))
    return strips


# ---- images ---------------------------------------------------------------------------------------------------------


def to_bytes(image: Tensor) -> np.ndarray:
    """(3, H, W) in [0, 1] -> (H, W, 3) uint8."""
    return (image.float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def image_cell(image: Tensor, side: int = IMAGE_SIDE) -> np.ndarray:
    """An image (3, H, W) in [0, 1] as a picture `side` pixels wide."""
    return scaled(to_bytes(image), max(1, round(side * image.shape[-2] / image.shape[-1])), side)


def image_grid(images: Tensor, side: int = 64) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] in rows of 8, small ones enlarged: (3, height, width) in [0, 1].

    Without matplotlib, as there is no text: it is drawn at the start of a run, which need not wait for the import.
    """
    from torchvision.utils import make_grid

    factor = max(1, -(-side // images.shape[-1]))
    images = images.float().cpu().repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    return make_grid(images, nrow=8, padding=2, pad_value=0.5)


def mistakes_figure(images: Sequence[Tensor], names: Sequence[tuple[str, str]]) -> Figure:
    """Images (3, H, W) in [0, 1], below each its label and what it was taken for."""
    captions = [f"{printable(label)}\n> {printable(guess)}" for label, guess in names]
    cells = [Cell(image_cell(image), text) for image, text in zip(images, captions, strict=True)]
    return sheet([Strip("", cells)], columns=CARD_IMAGES)


def overlay(image: Tensor, values: Tensor, side: int) -> np.ndarray:
    """`values` laid over a grey `image` as a glow, full at the largest: a picture `side` pixels wide.

    image (3, H, W) in [0, 1]; values (h, w), at least 0, of a map over the whole image.
    """
    picture = image_cell(image.mean(0, keepdim=True).expand(3, -1, -1), side)  # (height, side, 3)
    values = values.float().nan_to_num(0.0, 0.0, 0.0)
    share = 0.92 * values.numpy() / max(values.max().item(), 1e-12)
    share = scaled(share, *picture.shape[:2])[..., None]
    base = 38 + 0.55 * picture  # darker, and never black, so that the glow shows
    return (base + share * (np.array(GLOW) - base)).round().astype(np.uint8)


def frame(picture: np.ndarray, corner: Sequence[int], cells: int, size: tuple[int, int], colour: Sequence[int]) -> None:
    """Draws the outline of `cells` x `cells` cells of a map of that size over its picture, at least 3 pixels wide.

    What lies outside the picture is left out.
    """
    ends = []
    for place, side, length in zip(corner, size, picture.shape, strict=False):
        first, last = (round(edge * length / side) for edge in (place, place + cells))
        ends.append((first, max(last - 1, first + 2)))
    (top, bottom), (left, right) = ends
    rows, cols = slice(max(top, 0), max(bottom + 1, 0)), slice(max(left, 0), max(right + 1, 0))
    for row in (top, bottom):
        if 0 <= row < picture.shape[0]:
            picture[row, cols] = colour
    for col in (left, right):
        if 0 <= col < picture.shape[1]:
            picture[rows, col] = colour


def on_map(weights: Tensor, origin: Sequence[int], size: tuple[int, int]) -> Tensor:
    """A window's weights at their place on the layer's map, zero elsewhere: (K, K) -> (H, W)."""
    (top, left), (height, width), side = origin, size, len(weights)
    placed = weights.new_zeros(size)
    rows, cols = slice(max(top, 0), min(top + side, height)), slice(max(left, 0), min(left + side, width))
    placed[rows, cols] = weights[rows.start - top : rows.stop - top, cols.start - left : cols.stop - left]
    return placed


def overlay_strip(image: Tensor, attention: LayerAttention, share: Tensor | None) -> Strip:
    """What the first chosen pixel of the first image attends to, a cell a head, and its rollout where given.

    image (3, H, W) in [0, 1]; share: a rollout's, on the map of the first layer.
    """
    pixel, origin, size = attention.pixels[0].tolist(), attention.origins[0].tolist(), attention.size
    cells = []
    for i, weights in enumerate(attention.weights[0, :, 0]):
        picture = overlay(image, on_map(weights, origin, size), OVERLAY_SIDE)
        frame(picture, origin, attention.kernel_size, size, WINDOW)
        frame(picture, pixel, 1, size, FRAME)
        cells.append(Cell(picture, f"head {i + 1}"))
    if share is not None:
        picture = overlay(image, share.sqrt(), OVERLAY_SIDE)  # its peak stays at the pixel: the root shows the rest
        frame(picture, pixel, 1, size, FRAME)
        cells.append(Cell(picture, "\u221a rollout"))
    return Strip(f"{attention.name}, {size[0]}x{size[1]}", cells)


# ---- charts ---------------------------------------------------------------------------------------------------------


def plain_axes(ax: Axes) -> None:
    """Two spines and a light grid below what is drawn."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, which="major", color="#e4e4e4", linewidth=0.6)
    ax.set_axisbelow(True)


def measures_figure(layers: Sequence[LayerAttention]) -> Figure:
    """Entropy, mean distance and share on the own pixel, a dot a head and a row a layer, averaged over pixels."""
    figure = new_figure(900, 90 + 26 * len(layers), layout="constrained")
    measures = (
        ("entropy, bit", lambda layer: entropy(layer.weights)),
        ("mean distance, pixels of the map", mean_distance),
        ("share on the own pixel, %", lambda layer: 100 * centre_share(layer)),
    )
    for ax, (title, measure) in zip(figure.subplots(1, 3, sharey=True), measures, strict=True):
        plain_axes(ax)
        for row, layer in enumerate(layers):
            heads = measure(layer).mean((0, 2)).tolist()
            ax.scatter(heads, [row] * len(heads), s=34, color="#08306b", alpha=0.75, linewidth=0)
        ax.set_title(title, fontsize=POINTS + 1, loc="left")
        ax.set_xlim(left=0)
    ax.set_yticks(range(len(layers)), [layer.name for layer in layers])
    ax.set_ylim(len(layers) - 0.5, -0.5)  # the first layer on top
    return figure


def confusion_figure(confusion: Tensor, class_names: Sequence[str]) -> Figure:
    """Rows the label, columns the prediction, coloured by the share of the row; names and counts up to 20 classes.

    confusion (classes, classes), counts.
    """
    classes = len(confusion)
    side = min(max(27 * classes, 180), 620)  # ten classes and their names fit a card
    figure = new_figure(side + 60, side + 60, layout="constrained")
    ax = figure.subplots()
    shares = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    ax.imshow(100 * shares.numpy(), cmap="Blues", vmin=0, vmax=100)
    ax.set(xlabel="prediction", ylabel="label")
    if classes > LABELLED_CLASSES:
        return figure
    names = [fit(name, 14 * CHARACTER) for name in class_names]
    upright = max(map(len, names)) * CHARACTER <= 26
    ax.set_xticks(range(classes), names, parse_math=False, rotation=0 if upright else 90)
    ax.set_yticks(range(classes), names, parse_math=False)
    for row, col in confusion.nonzero().tolist():
        colour = "white" if shares[row, col] > 0.5 else INK
        text = str(confusion[row, col].item())
        ax.text(col, row, text, ha="center", va="center", color=colour, fontsize=POINTS - 1)
    return figure


def progress_figure(rows: Sequence[dict], mistakes: Sequence[tuple[Tensor, str, str]]) -> Figure:
    """How a run stands: loss and top-1 by epoch, below them the first wrong predictions of the last validation.

    Args:
        rows: of log.jsonl.
        mistakes: image (3, H, W) in [0, 1], label, prediction; the first PROGRESS_MISTAKES are shown.
    """
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(1000, 560 if mistakes else 400, layout="constrained")
    grid = figure.add_gridspec(2 if mistakes else 1, PROGRESS_MISTAKES, height_ratios=(3, 1) if mistakes else (1,))
    half = PROGRESS_MISTAKES // 2
    for columns, key, title in ((slice(half), "loss", "loss"), (slice(half, None), "top1_pct", "top-1, %")):
        ax = figure.add_subplot(grid[0, columns])
        plain_axes(ax)
        for part, name, colour in (("train", "training", "#0072b2"), ("val", "validation", "#d55e00")):
            found = [(row["epoch"], row[f"{part}_{key}"]) for row in rows]
            found = [(epoch, value) for epoch, value in found if value is not None]  # --val-every
            epochs, values = [epoch for epoch, _ in found], [value for _, value in found]
            label = f"{name}, {values[-1]:.4g}" if values else name
            ax.plot(epochs, values, marker="o", markersize=3, color=colour, label=label)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_title(title, fontsize=POINTS + 2, loc="left")
        ax.set_xlabel("epoch")
        ax.legend(frameon=False, fontsize=POINTS)
    for column, (image, label, guess) in enumerate(mistakes[:PROGRESS_MISTAKES]):
        ax = figure.add_subplot(grid[1, column])
        ax.imshow(to_bytes(image), interpolation="nearest")
        ax.set_axis_off()
        title = f"{fit(label, IMAGE_SIDE)}\n> {fit(guess, IMAGE_SIDE - 2 * CHARACTER)}"
        ax.set_title(title, fontsize=POINTS, color=WRONG, parse_math=False)
    return figure
