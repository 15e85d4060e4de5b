"""The page of tools.visualize: numbers into one HTML file that needs no other, `viewer.html` with its data filled in.

Maps are stored as bytes, each divided by its largest weight; the page makes their sum 1 again, so a weight is off by at
most 1/510 of its map's largest. All heads are stored for a lattice of pixels, as dense as the budget allows; the mean
over heads for every pixel, since a rollout passes through all of them.

Names come from strangers: they are made `printable`, reach the page as JSON in which no tag can end or begin, and are
put into it as text, never as markup.
"""

import base64
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

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
from sasa.analysis.causal import HeadEffect, Silenced
from sasa.console import printable

BUDGET = 2_700_000  # bytes of text for the maps of an image: with all else, a page of one image stays under 3 MB
LIMITS = (4096, 2048, 1024, 512, 256, 128, 64, 16)  # pixels of a lattice, densest first
_VIEWER = Path(__file__).with_name("viewer")


class StageProbe(NamedTuple):
    """What a linear probe of a stage reads: its score over test images, and its answer for each image of the page.

    top1_pct: of the test images; answers: for each image the most probable class, and the probability that the probe
    gives to the class that the network predicts.
    """

    stage: str
    top1_pct: float
    answers: list[tuple[str, float]]


@dataclass(frozen=True)
class ImageAttention:
    """One image and a network's attention in it.

    picture (3, H, W) in [0, 1]; layers: each head at a lattice of pixels; everywhere: the mean over heads at every
    pixel; guess: classes with their probabilities, the best first; prediction: the number of that class; effects: of
    all heads on it, or none; class_names: of all classes, for `effects`.
    """

    name: str
    label: str
    picture: Tensor
    layers: list[LayerAttention]
    everywhere: list[LayerAttention]
    guess: list[tuple[str, float]]
    prediction: int
    effects: list[HeadEffect] = field(default_factory=list)
    class_names: Sequence[str] = ()


@dataclass(frozen=True)
class NetworkAttention:
    """A network's attention in the images of a page, the same ones for every network.

    probe_note: what a reader should know of the probes, or why there are none; not_finite: weights that are not finite.
    """

    name: str
    images: list[ImageAttention]
    probes: list[StageProbe] = field(default_factory=list)
    probe_note: str = ""
    not_finite: list[str] = field(default_factory=list)


def lattice_limit(everywhere: list[LayerAttention]) -> int:
    """Pixels of a lattice such that the maps of an image keep to the budget; the sparsest where none does."""
    means = sum(attention.weights.numel() for attention in rollout_layers(everywhere))

    def heads(limit: int) -> int:
        return sum(
            len(lattice(limit)(*attention.size)) * attention.layer.num_heads * attention.kernel_size**2
            for attention in everywhere
        )

    return next((limit for limit in LIMITS if 4 * (means + heads(limit)) / 3 <= BUDGET), LIMITS[-1])


def render(title: str, about: str, networks: Sequence[NetworkAttention]) -> str:
    """The page as text. Two networks are shown side by side, and so can any two images be."""
    data = {
        "title": title,
        "about": about,
        "stored": _stored(networks),
        "notice": _notice(networks),
        "compare": len(networks[0].images) if len(networks) > 1 else -1,  # the second network's first image
        "networks": [_network(network) for network in networks],
        "images": [
            _image(image, i, number, [probe.answers[i] for probe in network.probes])
            for number, network in enumerate(networks)
            for i, image in enumerate(network.images)
        ],
    }
    text = json.dumps(_plain(data), separators=(",", ":"), allow_nan=False)
    parts = {"STYLE": _text_of(".css"), "SCRIPT": _text_of("_numbers.js") + "\n" + _text_of(".js")}
    page = _text_of(".html")
    for name, part in parts.items():
        page = page.replace(f"@{name}@", part)
    # Last, so that nothing in it is taken for one of the above. No "<": a name may hold the end of the script.
    return page.replace("@DATA@", text.replace("<", "\\u003c"))


def _text_of(ending: str) -> str:
    return _VIEWER.with_name(_VIEWER.name + ending).read_text(encoding="utf-8")


def _plain(value: Any) -> Any:
    """For JSON: numbers that are not finite become null, and text printable."""
    if isinstance(value, str):
        return value if value.isascii() and value.isprintable() else printable(value)  # maps are megabytes of ASCII
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _notice(networks: Sequence[NetworkAttention]) -> str:
    """A warning above all else, or ""."""
    lines = []
    for network in networks:
        if network.not_finite:
            more = f" and {len(network.not_finite) - 3} more" if len(network.not_finite) > 3 else ""
            names = ", ".join(network.not_finite[:3])
            lines.append(f"{network.name}: weights are not finite ({names}{more}): its maps and figures mean nothing.")
    return " ".join(lines)


def _network(network: NetworkAttention) -> dict[str, Any]:
    layers, everywhere = network.images[0].layers, network.images[0].everywhere
    return {
        "name": network.name,
        "rolloutFrom": len(everywhere) - len(rollout_layers(everywhere)),
        "layers": [_layer(attention) for attention in layers],
        "probes": {
            "stages": [[probe.stage, round(probe.top1_pct, 2)] for probe in network.probes],
            "note": network.probe_note,
        },
    }


def _stored(networks: Sequence[NetworkAttention]) -> str:
    """Which pixels the page holds, in words; of each network where they differ."""
    texts = {network.name: _stored_pixels(network.images[0].layers) for network in networks}
    if len(set(texts.values())) == 1:
        return texts[networks[0].name]
    return " ".join(f"{name}: {text}" for name, text in texts.items())


def _stored_pixels(layers: list[LayerAttention]) -> str:
    totals = [(layer.name, len(layer.pixels), layer.size[0] * layer.size[1]) for layer in layers]
    sparse = ", ".join(f"{name} {kept} of {total}" for name, kept, total in totals if kept < total)
    if not sparse:
        return "This page holds the map of every head at every pixel, each weight to 1/255 of its map's largest."
    return (
        "This page holds the map of every head at every pixel, each weight to 1/255 of its map's largest; where a "
        f"layer has many pixels, at an even grid of them, of which the nearest is shown ({sparse}). The mean over "
        "heads, which the rollout needs, is held at every pixel."
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
        "outside": layer.border == "zero",  # whether keys outside the map take part
        "rows": attention.pixels[:, 0].unique().tolist(),
        "cols": attention.pixels[:, 1].unique().tolist(),
        "tables": _tables(layer),
    }


def _tables(layer: torch.nn.Module) -> dict[str, Any] | None:
    tables = embeddings(layer)
    if tables is None:
        return None
    largest = max(table.abs().max().item() for table in tables)
    scale = 127 / max(largest, 1e-12)
    rows, columns = (_text((table * scale).nan_to_num(0.0, 0.0, 0.0).round().to(torch.int8)) for table in tables)
    count, channels, _ = tables[0].shape
    return {"count": count, "channels": channels, "largest": round(largest, 4), "rows": rows, "columns": columns}


def _image(image: ImageAttention, place: int, network: int, probes: list[tuple[str, float]]) -> dict[str, Any]:
    """place: of the image among its network's."""
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
    names = [attention.name for attention in image.layers]
    effects = [
        {
            "layer": names.index(effect.layer),
            "head": effect.head,
            "mean": _silenced(effect.by_mean, image),
            "zero": _silenced(effect.by_zero, image),
        }
        for effect in image.effects
    ]
    _, height, width = image.picture.shape
    return {
        "name": image.name, "label": image.label, "place": place, "network": network, "height": height, "width": width,
        "src": _source(image.picture), "guess": image.guess, "effects": effects,
        "probes": [[name, round(share, 5)] for name, share in probes], "layers": layers,
    }  # fmt: skip


def _silenced(answer: Silenced, image: ImageAttention) -> dict[str, Any]:
    return {
        "logit": round(answer.logit, 4),
        "drop": round(answer.drop, 4),
        "share": round(answer.probability, 5),
        "then": image.class_names[answer.prediction],
        "thenShare": round(answer.prediction_probability, 5),
        "same": answer.prediction == image.prediction,
    }


def to_bytes(weights: Tensor) -> Tensor:
    """Each map in steps of its largest weight / 255: (..., K, K) -> (..., K, K) uint8."""
    return (255 * weights / weights.amax((-2, -1), keepdim=True)).nan_to_num(0.0).round().byte()


def _text(values: Tensor) -> str:
    return base64.b64encode(values.contiguous().numpy().tobytes()).decode("ascii")


def _source(picture: Tensor) -> str:
    """The image as an address that holds it: small ones exactly, photographs as JPEG."""
    from torchvision.transforms.v2.functional import to_pil_image

    kind = "PNG" if max(picture.shape[-2:]) <= 64 else "JPEG"
    file = io.BytesIO()
    to_pil_image((picture * 255).round().byte()).save(file, kind, quality=90)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
