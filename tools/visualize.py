"""See what the heads of a trained network attend to: pictures, and one HTML page that opens from the disk.

    python -m tools.visualize CHECKPOINT [--images FILE ... | --dataset NAME --index I ...] [--pixel ROW COL]

Without images it takes the first of the test split that the checkpoint was trained for. Files, beside the checkpoint in
`attention/` or in --output-dir: attention.html, maps.png (mean K x K maps), measures.png, embeddings.png, and
image-N.png for each image: what one of its pixels attends to in every layer and head, and the rollout.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from config import DATASETS, Config, ConfigError, resolve
from preprocess import DataInfo, FolderData, denormalise
from sasa import files
from sasa.analysis import figures, page
from sasa.analysis.attention_maps import (
    LayerAttention,
    attention_layers,
    lattice,
    pixel_of,
    record_attention,
    rollout,
    rollout_layers,
)
from sasa.analysis.page import ImageAttention
from sasa.console import Parser, printable
from sasa.data.errors import DataError
from sasa.data.images import Files
from sasa.training import checkpoint
from sasa.training.checkpoint import CheckpointError
from sasa.training.device import pick_device
from sasa.training.network import network_of
from sasa.training.run import load_data

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GUESSES = 3  # classes that the page names


class NamedImage(NamedTuple):
    """An image (3, H, W), normalised as the network takes it; label: "" where it is not known."""

    name: str
    label: str
    image: Tensor


def parse(arguments: list[str] | None) -> tuple[Parser, argparse.Namespace]:
    parser = Parser(
        "python -m tools.visualize",
        description="What the heads of a trained network attend to: pictures and one HTML page.",
        epilog="exit code: 0 done, 2 wrong usage or data",
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="best.pt or last.pt of a run")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--images", nargs="+", metavar="FILE", help="images of your own")
    names = {name.lower(): name for name in DATASETS}
    which.add_argument("--dataset", type=lambda text: names.get(text.lower(), text), choices=DATASETS,
                       metavar="NAME", help="a data set's test split (default: the checkpoint's own)")  # fmt: skip
    parser.add_argument("--data-dir", help="folder of the data set (default: the checkpoint's own)")
    parser.add_argument("--index", nargs="+", type=int, metavar="I",
                        help="images of the test split, from 0 (default: 0)")  # fmt: skip
    parser.add_argument("--pixel", nargs=2, type=int, metavar=("ROW", "COL"),
                        help="the pixel whose attention the pictures show (default: the centre)")  # fmt: skip
    parser.add_argument("--output-dir", type=Path, help="folder of the files (default: attention/ by the checkpoint)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    args = parser.parse_args(arguments)
    if args.images and (args.index or args.data_dir):
        parser.error("--images does not go with --index or --data-dir")
    return parser, args


def main(arguments: list[str] | None = None) -> int:
    parser, args = parse(arguments)
    try:
        state = checkpoint.load(args.checkpoint)
        network, config, known = network_of(state, backend="auto")  # not that of the machine it was trained on
        network = network.to(pick_device(args.device))
        if not attention_layers(network):
            raise ConfigError(f"{args.checkpoint}: {config.model_name} has no attention layers, so there are no maps")
        info, images = read_images(args, config, known)
        if args.pixel and not all(0 <= place < info.image_size for place in args.pixel):
            row, col = args.pixel
            raise ConfigError(f"--pixel {row} {col}: must be from 0 to {info.image_size - 1}, the images' last pixel")
        folder = args.output_dir or args.checkpoint.parent / "attention"
        folder.mkdir(parents=True, exist_ok=True)
        shown = [attention_of(network, image, info) for image in images]
        pixel = tuple(args.pixel or (info.image_size // 2, info.image_size // 2))
        drawn = draw(network, images, shown, pixel)
        for name, figure in drawn.items():
            figures.save(figure, folder / name)
        step = state["step"] if "step" in state else state["progress"]["step"]
        title = f"{config.model_name}{', attention stem' if config.stem else ''}, {config.dataset}"
        text = page.render(title, f"{title}; {args.checkpoint.name}, step {step}", shown)
        files.write_text(folder / "attention.html", text)
    except (ConfigError, DataError, CheckpointError, OSError) as error:
        parser.error(str(error))
    for name in (*drawn, "attention.html"):
        print(f"{(folder / name).stat().st_size:>10,} bytes  {printable(folder / name)}")
    return 0


# ---- images ---------------------------------------------------------------------------------------------------------


def read_images(args: argparse.Namespace, config: Config, known: DataInfo) -> tuple[DataInfo, list[NamedImage]]:
    """The data set as the network knows it, and the chosen images.

    Raises:
        ConfigError, DataError: an index beyond the split, a file that is no image, a data set that is not there.
    """
    if args.images:
        own = FolderData(Files(args.images), [0] * len(args.images), known)
        return known, [NamedImage(Path(path).name, "", own.image(i)[0]) for i, path in enumerate(args.images)]
    dataset, data_dir = args.dataset or config.dataset, args.data_dir or config.data_dir
    if dataset != config.dataset:
        config = resolve({"img_size": config.img_size}, dataset)
    data = load_data(dataclasses.replace(config, data_dir=data_dir, holdout=0.0, num_workers=0), "cpu")
    size, chosen = len(data.test), []
    for index in args.index or [0]:
        if not 0 <= index < size:
            raise ConfigError(f"--index {index}: must be from 0 to {size - 1}, the test split's last image")
        image, label = data.test.image(index)
        chosen.append(NamedImage(f"{dataset} test {index}", data.info.class_names[label], image))
    return data.info if data.info.num_classes == known.num_classes else known, chosen


# ---- attention ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def attention_of(network: nn.Module, image: NamedImage, info: DataInfo) -> ImageAttention:
    """All that the page shows of one image."""
    batch = image.image[None].to(next(network.parameters()).device)
    with record_attention(network, mean_heads=True) as everywhere:
        best = network(batch)[0].float().softmax(0).cpu().topk(min(GUESSES, info.num_classes))
    limit = page.lattice_limit(everywhere)
    with record_attention(network, pixels=lattice(limit)) as layers:
        network(batch)
    guess = [(info.class_names[i], p) for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
    return ImageAttention(image.name, image.label, denormalise(image.image[None], info)[0], layers, everywhere, guess)


def draw(
    network: nn.Module, images: list[NamedImage], shown: list[ImageAttention], pixel: tuple[int, int]
) -> dict[str, Figure]:
    """The pictures by their file names; the image-N.png show what the `pixel` of the images attends to."""
    layers = [merge(of_layer) for of_layer in zip(*(attention.layers for attention in shown), strict=True)]
    maps = figures.sheet([figures.map_strip(layer) for layer in layers], "mean map of each head, and its mean entropy")
    drawn = {"maps.png": maps, "measures.png": figures.measures_figure(layers)}
    strips = [strip for layer in layers for strip in figures.embedding_strips(layer)]
    if strips:
        drawn["embeddings.png"] = figures.sheet(strips)
    for number, (image, attention) in enumerate(zip(images, shown, strict=True)):
        drawn[f"image-{number}.png"] = draw_pixel(network, image, attention, pixel)
    return drawn


@torch.no_grad()
def draw_pixel(network: nn.Module, image: NamedImage, shown: ImageAttention, pixel: tuple[int, int]) -> Figure:
    """What one pixel of an image attends to, a strip a layer: each head, and the rollout from there down."""
    with record_attention(network, pixels=pixel_of(*pixel, image.image.shape[-2:])) as here:
        network(image.image[None].to(next(network.parameters()).device))
    passed = rollout_layers(shown.everywhere)
    first = len(here) - len(passed)
    shares: list[Tensor | None] = [None] * first
    for i, attention in enumerate(here[first:], start=1):
        shares.append(rollout(passed[:i], 0, *attention.pixels[0].tolist()))
    label = f", label {shown.label}" if shown.label else ""
    strips = [figures.overlay_strip(shown.picture, attention, s) for attention, s in zip(here, shares, strict=True)]
    return figures.sheet(strips, f"{shown.name}{label}, from pixel {pixel}")


def merge(layers: tuple[LayerAttention, ...]) -> LayerAttention:
    """One layer's attention over several images as one."""
    weights = torch.cat([layer.weights for layer in layers])
    return dataclasses.replace(layers[0], weights=weights, largest_logit=max(layer.largest_logit for layer in layers))


if __name__ == "__main__":
    sys.exit(main())
