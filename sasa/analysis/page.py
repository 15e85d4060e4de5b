"""The page of tools.visualize: numbers into one self-contained HTML file, `viewer.html` with its data filled in.

Maps are stored as bytes, each divided by its largest weight; the page makes their sum 1 again, so a weight is off by at
most 1/510 of its map's largest. All heads are stored for a lattice of pixels, as dense as the budget allows; the mean
over heads for every pixel, since a rollout passes through all of them.
"""

import base64
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attention import AttentionStem
from sasa.analysis.attention_maps import (
    LayerAttention,
    centre_share,
    embeddings,
    entropy,
    lattice,
    mean_distance,
    rollout_layers,
)

BUDGET = 2_700_000  # bytes of text for the maps of an image: with all else, a page of one image stays under 3 MB
LIMITS = (4096, 2048, 1024, 512, 256, 128, 64, 16)  # pixels of a lattice, densest first
_TEMPLATE = Path(__file__).with_name("viewer.html")


@dataclass(frozen=True)
class ImageAttention:
    """One image and the network's attention in it.

    picture (3, H, W) in [0, 1]; layers: each head at a lattice of pixels; everywhere: the mean over heads at every
    pixel; guess: classes with their probabilities, the best first.
    """

    name: str
    label: str
    picture: Tensor
    layers: list[LayerAttention]
    everywhere: list[LayerAttention]
    guess: list[tuple[str, float]]


def lattice_limit(everywhere: list[LayerAttention]) -> int:
    """Pixels of a lattice such that the maps of an image keep to the budget; the sparsest where none does."""
    means = sum(attention.weights.numel() for attention in rollout_layers(everywhere))

    def heads(limit: int) -> int:
        return sum(
            len(lattice(limit)(*attention.size)) * attention.layer.num_heads * attention.kernel_size**2
            for attention in everywhere
        )

    return next((limit for limit in LIMITS if 4 * (means + heads(limit)) / 3 <= BUDGET), LIMITS[-1])


def render(title: str, about: str, images: list[ImageAttention]) -> str:
    """The page as text."""
    layers, everywhere = images[0].layers, images[0].everywhere
    data = {
        "title": title,
        "about": about,
        "stored": _stored(layers),
        "rolloutFrom": len(everywhere) - len(rollout_layers(everywhere)),
        "layers": [_layer(attention) for attention in layers],
        "images": [_image(image) for image in images],
    }
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")  # names may hold anything, even a tag
    return _TEMPLATE.read_text(encoding="utf-8").replace("@DATA@", text)


def _stored(layers: list[LayerAttention]) -> str:
    """Which pixels the page holds, in words."""
    totals = [(layer.name, len(layer.pixels), layer.size[0] * layer.size[1]) for layer in layers]
    sparse = ", ".join(f"{name} {kept} of {total}" for name, kept, total in totals if kept < total)
    if not sparse:
        return "Stored, as bytes: every head of every layer at every pixel."
    return (
        "Stored, as bytes: the mean over heads, which the rollout goes by, at every pixel; each head at an even grid "
        f"of pixels where a layer has many ({sparse}; the nearest of them is shown), at every pixel elsewhere."
    )


def _layer(attention: LayerAttention) -> dict[str, Any]:
    layer, size = attention.layer, attention.kernel_size
    block = isinstance(layer, AttentionStem) and layer.window == "block"
    back = 0 if block else int(attention.pixels[0, 0] - attention.origins[0, 0])
    return {
        "name": attention.name,
        "height": attention.size[0],
        "width": attention.size[1],
        "size": size,
        "heads": attention.weights.shape[1],
        "stride": getattr(layer, "stride", 1),
        "block": block,
        "back": back,
        "rows": attention.pixels[:, 0].unique().tolist(),
        "cols": attention.pixels[:, 1].unique().tolist(),
        "tables": _tables(layer),
    }


def _tables(layer: torch.nn.Module) -> dict[str, Any] | None:
    tables = embeddings(layer)
    if tables is None:
        return None
    largest = max(table.abs().max().item() for table in tables)
    rows, columns = (_text((table * (127 / max(largest, 1e-12))).round().to(torch.int8)) for table in tables)
    count, channels, _ = tables[0].shape
    return {"count": count, "channels": channels, "largest": round(largest, 4), "rows": rows, "columns": columns}


def _image(image: ImageAttention) -> dict[str, Any]:
    first = len(image.everywhere) - len(rollout_layers(image.everywhere))
    layers = []
    for i, (attention, everywhere) in enumerate(zip(image.layers, image.everywhere, strict=True)):
        means = [f(attention) for f in (lambda a: entropy(a.weights), mean_distance, centre_share)]
        layers.append({
            "maps": _text(to_bytes(attention.weights[0].transpose(0, 1))),  # (P, N, K, K)
            "mean": _text(to_bytes(everywhere.weights[0, 0])) if i >= first else "",  # (H * W, K, K)
            "measures": torch.stack([m[0].mean(1) for m in means], 1).round(decimals=4).tolist(),  # (N, 3)
            "largest": round(attention.largest_logit, 3),
        })  # fmt: skip
    _, height, width = image.picture.shape
    return {
        "name": image.name, "label": image.label, "height": height, "width": width, "src": _source(image.picture),
        "guess": image.guess, "layers": layers,
    }  # fmt: skip


def to_bytes(weights: Tensor) -> Tensor:
    """Each map in steps of its largest weight / 255: (..., K, K) -> (..., K, K) uint8."""
    return (255 * weights / weights.amax((-2, -1), keepdim=True)).round().byte()


def _text(values: Tensor) -> str:
    return base64.b64encode(values.contiguous().numpy().tobytes()).decode("ascii")


def _source(picture: Tensor) -> str:
    """The image as an address that holds it: small ones exactly, photographs as JPEG."""
    from torchvision.transforms.v2.functional import to_pil_image

    kind = "PNG" if max(picture.shape[-2:]) <= 64 else "JPEG"
    file = io.BytesIO()
    to_pil_image((picture * 255).round().byte()).save(file, kind, quality=90)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
