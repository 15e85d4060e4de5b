"""Pictures of attention, drawn with PIL: sheets of K x K maps, embeddings as heat maps, maps laid over their image.

PIL comes with torchvision and is all that cells, outlines and lines of text need; a plotting library would be one
dependency more. Pictures are PIL images; `to_tensor` makes them (3, H, W) in [0, 1] for TensorBoard.

Shapes: N heads, K window side, H x W image or map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from heads import LayerAttention, embeddings, entropy, mean_maps, similarity

if TYPE_CHECKING:
    from PIL.Image import Image

TILE, GAP, MARGIN = 72, 6, 10  # pixels
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
    """`values` laid over a grey `image` in the colour of embers, and the pixel looked from as a frame.

    image (3, H, W) in [0, 1]; values (h, w), at least 0, of a map over the whole image; pixel: row and column on a map
    of that `size`.
    """
    from PIL import Image, ImageDraw

    height = round(side * image.shape[-2] / image.shape[-1])
    grey = image.mean(0, keepdim=True).expand(3, -1, -1)
    base = to_picture(0.15 + 0.55 * grey, side, height)
    mask = to_picture((values / values.max().clamp(min=1e-12)).sqrt().expand(3, -1, -1) * 0.9, side, height)
    picture = Image.composite(Image.new("RGB", base.size, GLOW), base, mask.convert("L"))
    top, bottom = (round(height * (pixel[0] + more) / size[0]) for more in (0, 1))
    left, right = (round(side * (pixel[1] + more) / size[1]) for more in (0, 1))
    ImageDraw.Draw(picture).rectangle((left, top, right - 1, bottom - 1), outline=PAPER)
    return picture


def on_map(weights: Tensor, origin: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """A window's weights at their place on the layer's map, zero elsewhere: (K, K) -> (H, W)."""
    (top, left), (height, width), side = origin, size, len(weights)
    placed = weights.new_zeros(size)
    rows, cols = slice(max(top, 0), min(top + side, height)), slice(max(left, 0), min(left + side, width))
    placed[rows, cols] = weights[rows.start - top : rows.stop - top, cols.start - left : cols.stop - left]
    return placed
