"""See what the heads of a trained network look at: pictures and one HTML page that opens from the disk.

    python -m tools.visualize CHECKPOINT [--images FILE ... | --dataset NAME --index I ...] [--pixel ROW COL]

Without images it takes the first of the test split that the checkpoint was trained for. Files, beside the checkpoint in
`attention/` or in --output-dir: attention.html, maps.png (mean K x K maps), measures.png, embeddings.png, and
image-N.png for each image: what one of its pixels attends to in every layer and head, and the rollout.
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import NoReturn

import torch
from PIL.Image import Image
from torch import Tensor, nn

from config import DATASETS, Config, ConfigError, resolve
from preprocess import DataInfo, FolderData, denormalise
from sasa.analysis import figures as sheets
from sasa.analysis import page
from sasa.analysis.attention_maps import (
    LayerAttention,
    attention_layers,
    collect,
    lattice,
    pixel_of,
    rollout,
    rollout_layers,
)
from sasa.analysis.page import Looked
from sasa.data.datasets import DataError, Files
from sasa.training import checkpoint
from sasa.training.checkpoint import CheckpointError
from sasa.training.monitor import printable
from sasa.training.network import network_of
from sasa.training.run import load_data, pick_device

GUESSES = 3  # classes that the page names

Named = tuple[str, str, Tensor]  # name, label ("" where there is none), image (3, H, W) normalised


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:  # one line, without the usage
        message = " ".join(message.removeprefix("argument ").split())
        self.exit(2, f"visualize.py: error: {message}\n")


def parse(arguments: list[str] | None) -> tuple[_Parser, argparse.Namespace]:
    parser = _Parser(
        prog="visualize.py",
        description="What the heads of a trained network look at: pictures and one HTML page.",
        epilog="exit code: 0 done, 2 wrong usage or data",
        allow_abbrev=False,
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
                        help="the pixel that the pictures look from (default: the centre)")  # fmt: skip
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
            raise ConfigError(f"{args.checkpoint}: {config.model_name} without attention layers: nothing to look at")
        info, images = read_images(args, config, known)
        if args.pixel and not all(0 <= place < info.image_size for place in args.pixel):
            row, col = args.pixel
            raise ConfigError(f"--pixel {row} {col}: must be from 0 to {info.image_size - 1}, the images' last pixel")
        folder = args.output_dir or args.checkpoint.parent / "attention"
        folder.mkdir(parents=True, exist_ok=True)
    except (ConfigError, DataError, CheckpointError, OSError) as error:
        parser.error(str(error))
    looked = [look(network, image, info, name, label) for name, label, image in images]
    pixel = tuple(args.pixel or (info.image_size // 2, info.image_size // 2))
    pictures = draw(network, [image for *_, image in images], looked, pixel)
    for name, picture in pictures.items():
        picture.save(folder / name, optimize=True)
    step = f", step {state['step'] if 'step' in state else state['progress']['step']}"
    title = f"{config.model_name}{', attention stem' if config.stem else ''}, {config.dataset}"
    text = page.render(title, f"{title}; {args.checkpoint.name}{step}", looked)
    (folder / "attention.html").write_text(text, encoding="utf-8")
    for name in (*pictures, "attention.html"):
        print(f"{(folder / name).stat().st_size:>10,} bytes  {folder / name}")
    return 0


# ---- what to look at ------------------------------------------------------------------------------------------------


def read_images(
    args: argparse.Namespace, config: Config, known: DataInfo
) -> tuple[DataInfo, list[tuple[str, str, Tensor]]]:
    """The data set as the network knows it, and (name, label, image (3, H, W) normalised) of each chosen image.

    Raises:
        ConfigError, DataError: an index beyond the split, a file that is no image, a data set that is not there.
    """
    if args.images:
        files = FolderData(Files(args.images), [0] * len(args.images), known)
        ((images, _),) = files.eval_batches(len(files))
        return known, [(Path(path).name, "", image) for path, image in zip(args.images, images, strict=True)]
    dataset, data_dir = args.dataset or config.dataset, args.data_dir or config.data_dir
    if dataset != config.dataset:
        config = resolve({"img_size": config.img_size}, dataset)
    data = load_data(dataclasses.replace(config, data_dir=data_dir, holdout=0.0, num_workers=0), "cpu")
    size, chosen = len(data.test), []
    for index in args.index or [0]:
        if not 0 <= index < size:
            raise ConfigError(f"--index {index}: must be from 0 to {size - 1}, the test split's last image")
        ((image, label),) = data.test.eval_batches(1, rank=index, world_size=size)  # that one image alone
        chosen.append((f"{dataset} test {index}", data.info.class_names[label], image[0]))
    return data.info if data.info.num_classes == known.num_classes else known, chosen


# ---- looking --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def look(network: nn.Module, image: Tensor, info: DataInfo, name: str, label: str) -> Looked:
    """All that the page shows of one image, normalised as the network takes it."""
    batch = image[None].to(next(network.parameters()).device)
    with collect(network, mean_heads=True) as everywhere:
        best = network(batch)[0].float().softmax(0).cpu().topk(min(GUESSES, info.num_classes))
    limit = page.lattice_limit(everywhere)
    with collect(network, pixels=lattice(limit)) as layers:
        network(batch)
    guess = [(info.class_names[i], p) for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
    return Looked(name, label, denormalise(image[None], info)[0], layers, everywhere, guess)


def draw(network: nn.Module, images: list[Tensor], looked: list[Looked], pixel: tuple[int, int]) -> dict[str, Image]:
    """The pictures by their file names; `pixel` of the images is what the image-N.png look from."""
    layers = [merge(of_layer) for of_layer in zip(*(seen.layers for seen in looked), strict=True)]
    maps = sheets.table([sheets.map_row(layer) for layer in layers], "mean map of each head, and its mean entropy")
    pictures = {"maps.png": maps, "measures.png": sheets.measures_picture(layers)}
    rows = [row for layer in layers for row in sheets.embedding_rows(layer)]
    if rows:
        pictures["embeddings.png"] = sheets.table(rows)
    for number, (image, seen) in enumerate(zip(images, looked, strict=True)):
        pictures[f"image-{number}.png"] = draw_look(network, image, seen, pixel)
    return pictures


@torch.no_grad()
def draw_look(network: nn.Module, image: Tensor, seen: Looked, pixel: tuple[int, int]) -> Image:
    """What one pixel of an image attends to, a row a layer: each head, and the rollout from there down."""
    with collect(network, pixels=pixel_of(*pixel, image.shape[-2:])) as here:
        network(image[None].to(next(network.parameters()).device))
    passed = rollout_layers(seen.everywhere)
    first = len(here) - len(passed)
    shares: list[Tensor | None] = [None] * first
    for i, attention in enumerate(here[first:], start=1):
        shares.append(rollout(passed[:i], 0, *attention.pixels[0].tolist()))
    label = f", label {seen.label}" if seen.label else ""
    rows = [sheets.look_row(seen.picture, attention, share) for attention, share in zip(here, shares, strict=True)]
    return sheets.table(rows, printable(f"{seen.name}{label}, from pixel {pixel}"))


def merge(layers: tuple[LayerAttention, ...]) -> LayerAttention:
    """One layer's attention over several images as one."""
    weights = torch.cat([layer.weights for layer in layers])
    return dataclasses.replace(layers[0], weights=weights, largest_logit=max(layer.largest_logit for layer in layers))


if __name__ == "__main__":
    sys.exit(main())
