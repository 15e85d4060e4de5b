"""Pictures of attention, drawn with PIL: sheets of K x K maps, embeddings as heat maps, maps laid over their image.

PIL comes with torchvision and is all that cells, outlines and lines of text need; a plotting library would be one
dependency more. Pictures are PIL images; `to_tensor` makes them (3, H, W) in [0, 1] for TensorBoard.

Shapes: N heads, K window side, H x W image or map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from PIL.Image import Image

TILE, LOOK_TILE, GAP, MARGIN = 72, 84, 6, 10  # pixels
TEXT, LINE = 12, 16  # pixels: size of the letters, height of a line
INK, MUTED, PAPER, BETWEEN = (30, 36, 44), (105, 113, 125), (255, 255, 255), (226, 230, 235)
DEEP, WARM = (8, 48, 107), (178, 63, 10)  # the ends of the colour scales: much, or negative and positive
GLOW = (255, 122, 0)  # of a map laid over an image


# ---- colours: numbers -> (3, h, w) in [0, 1] ------------------------------------------------------------------------


def heat(values: Tensor) -> Tensor:
    """White for 0, deep blue for the largest value: (h, w), at least 0 -> (3, h, w)."""
    return _blend(values / values.max().clamp(min=1e-12), PAPER, DEEP)


def signed_heat(values: Tensor, largest: float) -> Tensor:
    """Blue for -largest, white for 0, orange for largest: (h, w) -> (3, h, w)."""
    share = (values / max(largest, 1e-12)).clamp(-1, 1)
    return torch.where(share < 0, _blend(-share, PAPER, DEEP), _blend(share, PAPER, WARM))


def _blend(share: Tensor, empty: tuple[int, int, int], full: tuple[int, int, int]) -> Tensor:
    empty, full = (torch.tensor(colour).view(3, 1, 1) / 255 for colour in (empty, full))
    return empty + share * (full - empty)


def to_picture(pixels: Tensor, width: int, height: int) -> Image:
    """(3, h, w) in [0, 1] as a picture of that size, each value a sharp-edged cell."""
    from PIL import Image
    from torchvision.transforms.v2.functional import to_pil_image

    return to_pil_image((pixels * 255).round().byte()).resize((width, height), Image.Resampling.NEAREST)


def to_tensor(picture: Image) -> Tensor:
    from torchvision.transforms.v2.functional import pil_to_tensor

    return pil_to_tensor(picture).float() / 255


# ---- tables of tiles ------------------------------------------------------------------------------------------------

Tile = tuple["Image", str]  # and what stands below it


def table(rows: Sequence[tuple[str, Sequence[Tile]]], heading: str = "") -> Image:
    """Rows of tiles behind their names, each tile above its caption; a heading on top."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(TEXT)
    left = MARGIN + round(max(font.getlength(name) for name, _ in rows)) + GAP
    heights = [max(tile.height for tile, _ in tiles) + LINE + GAP for _, tiles in rows]
    widths = [sum(max(tile.width, round(font.getlength(text))) + GAP for tile, text in tiles) for _, tiles in rows]
    top = MARGIN + (LINE + GAP if heading else 0)
    width = max(left + max(widths), 2 * MARGIN + round(font.getlength(heading)))
    picture = Image.new("RGB", (width + MARGIN - GAP, top + sum(heights) + MARGIN - GAP), PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((MARGIN, MARGIN), heading, fill=MUTED, font=font)
    for (name, tiles), height in zip(rows, heights, strict=True):
        draw.text((MARGIN, top + (height - LINE - GAP) // 2 - LINE // 2), name, fill=INK, font=font)
        x = left
        for tile, text in tiles:
            picture.paste(tile, (x, top))
            draw.rectangle((x - 1, top - 1, x + tile.width, top + tile.height), outline=BETWEEN)
            draw.text((x, top + tile.height + 2), text, fill=MUTED, font=font)
            x += max(tile.width, round(font.getlength(text))) + GAP
        top += height
    return picture


def map_row(attention: LayerAttention) -> tuple[str, list[Tile]]:
    """Each head's mean K x K map, dark where it looks most, above its mean entropy."""
    bits = entropy(attention.weights).mean((0, 2)).tolist()
    tiles = [to_picture(heat(m), TILE, TILE) for m in mean_maps(attention)]
    return attention.name, [(tile, f"{b:.2f} bit") for tile, b in zip(tiles, bits, strict=True)]


def embedding_rows(attention: LayerAttention) -> list[tuple[str, list[Tile]]]:
    """Row and column embeddings of each head (channels down, offsets across) and the cosine between offsets.

    Empty where the layer has none. One colour scale for the layer's tables.
    """
    tables = embeddings(attention.layer)
    if tables is None:
        return []
    rows = []
    largest = max(part.abs().max().item() for part in tables)
    for what, part in zip(("row", "column"), tables, strict=True):
        tiles = [(to_picture(signed_heat(head, largest), TILE, TILE), f"up to {head.abs().max():.2f}") for head in part]
        rows.append((f"{attention.name} {what}s", tiles))
    for what, part in zip(("row", "column"), tables, strict=True):
        tiles = [(to_picture(signed_heat(head, 1.0), TILE, TILE), "cosine") for head in similarity(part)]
        rows.append((f"{what}s, alike", tiles))
    return rows


# ---- over the image -------------------------------------------------------------------------------------------------


def overlay(image: Tensor, values: Tensor, side: int, pixel: tuple[int, int], size: tuple[int, int]) -> Image:
    """`values` laid over a grey `image` as a glow, full at the largest, and the pixel looked from as a frame.

    image (3, H, W) in [0, 1]; values (h, w), at least 0, of a map over the whole image; pixel: row and column on a map
    of that `size`.
    """
    from PIL import Image

    height = round(side * image.shape[-2] / image.shape[-1])
    grey = image.mean(0, keepdim=True).expand(3, -1, -1)
    base = to_picture(0.15 + 0.55 * grey, side, height)
    mask = to_picture((values / values.max().clamp(min=1e-12)).expand(3, -1, -1) * 0.92, side, height)
    picture = Image.composite(Image.new("RGB", base.size, GLOW), base, mask.convert("L"))
    frame(picture, pixel, 1, size, PAPER)
    return picture


def frame(
    picture: Image, corner: Sequence[int], cells: int, size: tuple[int, int], colour: tuple[int, int, int]
) -> None:
    """Draws the outline of `cells` x `cells` cells of a map of that size, at least 3 pixels wide, over its picture."""
    from PIL import ImageDraw

    ends = []
    for place, side, length in zip(corner, size, (picture.height, picture.width), strict=True):
        first, last = (round(edge * length / side) for edge in (place, place + cells))
        ends.append((first, max(last - 1, first + 2)))
    (top, bottom), (left, right) = ends
    ImageDraw.Draw(picture).rectangle((left, top, right, bottom), outline=colour)


def on_map(weights: Tensor, origin: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """A window's weights at their place on the layer's map, zero elsewhere: (K, K) -> (H, W)."""
    (top, left), (height, width), side = origin, size, len(weights)
    placed = weights.new_zeros(size)
    rows, cols = slice(max(top, 0), min(top + side, height)), slice(max(left, 0), min(left + side, width))
    placed[rows, cols] = weights[rows.start - top : rows.stop - top, cols.start - left : cols.stop - left]
    return placed


def look_row(picture: Tensor, attention: LayerAttention, share: Tensor | None) -> tuple[str, list[Tile]]:
    """What the first chosen pixel of the first image attends to, a tile a head, and its rollout where given."""
    pixel, origin = attention.pixels[0].tolist(), attention.origins[0].tolist()
    row = []
    for i, weights in enumerate(attention.weights[0, :, 0]):
        tile = overlay(picture, on_map(weights, origin, attention.size), LOOK_TILE, pixel, attention.size)
        frame(tile, origin, attention.kernel_size, attention.size, MUTED)
        row.append((tile, f"head {i + 1}"))
    if share is not None:
        # Its peak stays where the shortcuts leave it: the square root shows the rest.
        row.append((overlay(picture, share.sqrt(), LOOK_TILE, pixel, attention.size), "rollout, root"))
    return f"{attention.name}, {attention.size[0]}x{attention.size[1]}", row


# ---- measures -------------------------------------------------------------------------------------------------------

PLOT, ROW, FINE = 200, 24, 4  # pixels: width of a plot, height of a layer's row; oversampling for round dots


def round_up(value: float) -> float:
    """The next number that a person would end an axis with; 1 for 0."""
    power = 10 ** math.floor(math.log10(value)) if value > 0 else 1.0
    return next(step * power for step in (1, 2, 4, 6, 8, 10) if step * power >= value)


def measures_picture(layers: Sequence[LayerAttention]) -> Image:
    """Entropy, mean distance and share on the own pixel, a dot a head and a row a layer, averaged over pixels."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(TEXT * FINE)
    names = MARGIN + round(max(font.getlength(layer.name) for layer in layers) / FINE) + 2 * GAP
    top = MARGIN + 2 * LINE
    size = (names + 3 * (PLOT + 30), top + ROW * len(layers) + LINE + MARGIN)
    picture = Image.new("RGB", tuple(FINE * side for side in size), PAPER)
    draw = ImageDraw.Draw(picture)

    def text(x: float, y: float, words: str, fill: tuple[int, int, int], anchor: str = "la") -> None:
        draw.text((FINE * x, FINE * y), words, fill=fill, font=font, anchor=anchor)

    measures = (
        ("entropy, bit", lambda layer: entropy(layer.weights)),
        ("mean distance, pixels of the map", mean_distance),
        ("share on the own pixel, %", lambda layer: 100 * centre_share(layer)),
    )
    for i, layer in enumerate(layers):
        text(MARGIN, top + ROW * (i + 0.5), layer.name, INK, "lm")
    for column, (title, measure) in enumerate(measures):
        left, values = names + column * (PLOT + 30), [measure(layer).mean((0, 2)) for layer in layers]
        most = round_up(max(v.max().item() for v in values))
        text(left, MARGIN, title, INK)
        for share in (0, 0.5, 1):
            x = left + share * PLOT
            draw.line([FINE * c for c in (x, top, x, top + ROW * len(layers))], fill=BETWEEN, width=FINE)
            text(x, top + ROW * len(layers) + 4, f"{share * most:.3g}", MUTED, "ma")
        for i, heads in enumerate(values):
            y = top + ROW * (i + 0.5)
            for value in heads.tolist():
                x = left + value / most * PLOT
                draw.ellipse([FINE * c for c in (x - 4, y - 4, x + 4, y + 4)], fill=DEEP, outline=PAPER, width=FINE)
    return picture.resize(size, Image.Resampling.LANCZOS)
