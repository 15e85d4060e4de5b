"""See what the heads of a trained network attend to and which of them count: pictures, and one HTML page.

    python -m tools.visualize CHECKPOINT [CHECKPOINT] [--images FILE ... | --dataset NAME --index I ...]

Without images it takes the first of the test split that the checkpoint was trained for. Files, beside the checkpoint in
`attention/` or in --output-dir: attention.html, which opens from the disk; maps.png (mean K x K maps), measures.png,
embeddings.png, and image-N.png for each image: what one of its pixels attends to in every layer and head, and the
rollout. Two checkpoints stand side by side on the page; the second one's pictures begin with "second-".
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from config import DATASETS, Config, ConfigError, resolve
from preprocess import DataInfo, FolderData, denormalise
from sasa import files
from sasa.analysis import causal, figures, page
from sasa.analysis.attention_maps import (
    LayerAttention,
    attention_layers,
    lattice,
    pixel_of,
    record_attention,
    rollout,
    rollout_layers,
)
from sasa.analysis.page import ImageAttention, NetworkAttention, StageProbe
from sasa.backbone import FEATURES
from sasa.console import Parser, as_path, as_path_text, one_line, print_error, printable, run_main
from sasa.data.errors import DataError, WorkerError
from sasa.data.images import Files
from sasa.training.checkpoint import CheckpointError
from sasa.training.device import pick_device, set_fp32_precision
from sasa.training.network import Trained, load_network
from sasa.training.run import load_data, without_parts
from tools.arguments import one_of
from tools.own_images import as_in_the_set, evaluated

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GUESSES = 3  # classes that the page names
PROBE_IMAGES, PROBE_TEST_IMAGES, PROBE_BATCH = 1000, 500, 50


class NamedImage(NamedTuple):
    """An image (3, H, W), normalised as the network takes it; label: "" where it is not known."""

    name: str
    label: str
    image: Tensor


def parse(arguments: list[str] | None) -> tuple[Parser, argparse.Namespace]:
    parser = Parser(
        "python -m tools.visualize",
        description="What the heads of a trained network attend to, and which of them count: pictures and one HTML "
        "page. Two checkpoints are compared side by side.",
        epilog="exit code: 0 done, 2 wrong usage or data",
    )
    parser.add_argument("checkpoints", type=as_path, nargs="+", metavar="CHECKPOINT",
                        help="best.pt or last.pt of a run; a second one to compare it with")  # fmt: skip
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--images", nargs="+", type=as_path_text, metavar="FILE", help="images of your own")
    which.add_argument("--dataset", type=one_of(DATASETS), choices=DATASETS, metavar="NAME",
                       help="a data set's test split (default: the checkpoint's own)")  # fmt: skip
    parser.add_argument("--data-dir", type=as_path_text, help="folder of the data set (default: the checkpoint's own)")
    parser.add_argument("--index", nargs="+", type=int, metavar="I",
                        help="images of the test split, from 0 (default: 0)")  # fmt: skip
    parser.add_argument("--pixel", nargs=2, type=int, metavar=("ROW", "COL"),
                        help="the pixel whose attention the pictures show (default: the centre)")  # fmt: skip
    parser.add_argument("--effects", action=argparse.BooleanOptionalAction, default=True,
                        help="silence each head and show what the decision loses (default: yes)")  # fmt: skip
    parser.add_argument("--probe-images", type=int, default=PROBE_IMAGES, metavar="N",
                        help="training images that the linear probes are fitted on, 0: no probes "
                        f"(default: {PROBE_IMAGES})")  # fmt: skip
    parser.add_argument(
        "--output-dir", type=as_path, help="folder of the files (default: attention/ by the checkpoint)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    args = parser.parse_args(arguments)
    if args.images and (args.index or args.data_dir):
        parser.error("--images does not go with --index or --data-dir")
    if len(args.checkpoints) > 2:
        parser.error(f"{len(args.checkpoints)} checkpoints: allowed are one, or two to compare")
    if args.probe_images < 0:
        parser.error(f"--probe-images {args.probe_images}: must be at least 0")
    return parser, args


def main(arguments: list[str] | None = None) -> int:
    parser, args = parse(arguments)
    try:
        trained, steps = zip(*(load(path, args.device) for path in args.checkpoints), strict=True)
        chosen = [read_images(args, one) for one in trained]
        check_pixel(args, chosen)
        folder = args.output_dir or args.checkpoints[0].parent / "attention"
        folder.mkdir(parents=True, exist_ok=True)
        written, networks = [], []
        for one, (info, images), path in zip(trained, chosen, args.checkpoints, strict=True):
            shown = network_attention(args, one, info, images, path)
            for name, figure in draw(one.network, images, shown.images, args.pixel).items():
                written.append(f"second-{name}" if networks else name)
                figures.save(figure, folder / written[-1])
            networks.append(shown)
        titles = [title_of(one.config) for one in trained]
        about = "; ".join(f"{title}: {shown.name}, step {step}" for title, shown, step in
                          zip(titles, networks, steps, strict=True))  # fmt: skip
        files.write_text(folder / "attention.html", page.render(" and ".join(dict.fromkeys(titles)), about, networks))
    except (ConfigError, DataError, WorkerError, CheckpointError, OSError) as error:
        parser.error(str(error))
    for name in (*written, "attention.html"):
        print(f"{(folder / name).stat().st_size:>10,} bytes  {printable(folder / name)}")
    return 0


def load(path: Path, device: str) -> tuple[Trained, int]:
    """The network of a checkpoint on the device, and the step that it was saved at.

    Raises:
        ConfigError, CheckpointError: a file that holds none, a network without attention, a device that is not there.
    """
    trained, state = load_network(path, backend="auto")  # not that of the machine it was trained on
    if not attention_layers(trained.network):
        raise ConfigError(f"{path}: {trained.config.model_name} has no attention layers, so there are no maps")
    trained.network.to(pick_device(device))
    set_fp32_precision(trained.config.matmul_precision)
    return trained, state["step"] if "step" in state else state["progress"]["step"]


def title_of(config: Config) -> str:
    return f"{config.model_name}{', attention stem' if config.stem else ''}, {config.dataset}"


def name_of(path: Path, others: list[Path]) -> str:
    """The file's name, with its folder's where another has the same."""
    return path.name if len(others) == 1 else f"{path.resolve().parent.name}/{path.name}"


def bar(steps: Iterable, what: str) -> Iterator:
    """A progress bar on a terminal, nothing elsewhere."""
    return tqdm(steps, desc=what, leave=False, disable=not sys.stderr.isatty())


# ---- images ---------------------------------------------------------------------------------------------------------


def read_images(args: argparse.Namespace, trained: Trained) -> tuple[DataInfo, list[NamedImage]]:
    """The data set as the network knows it, and the chosen images.

    Raises:
        ConfigError, DataError: an index beyond the split, a file that is no image, a data set that is not there.
    """
    config, known = trained.config, trained.info
    if args.images:
        own = FolderData(
            Files(args.images), [0] * len(args.images), known, evaluated=evaluated(config, known, given={})
        )
        fed = [as_in_the_set(own.image(i)[0][None], known)[0] for i in range(len(own))]
        return known, [NamedImage(Path(path).name, "", image) for path, image in zip(args.images, fed, strict=True)]
    dataset = args.dataset or config.dataset
    if dataset != config.dataset:
        config = resolve({"img_size": config.img_size}, dataset)
    folder = args.data_dir or config.data_dir
    data = load_data(dataclasses.replace(without_parts(config), data_dir=folder, num_workers=0), "cpu")
    size, chosen = len(data.test), []
    for index in args.index or [0]:
        if not 0 <= index < size:
            raise ConfigError(f"--index {index}: must be from 0 to {size - 1}, the test split's last image")
        image, label = data.test.image(index)
        chosen.append(NamedImage(f"{dataset} test {index}", data.info.class_names[label], image))
    return data.info if data.info.num_classes == known.num_classes else known, chosen


def check_pixel(args: argparse.Namespace, chosen: list[tuple[DataInfo, list[NamedImage]]]) -> None:
    """Raises ConfigError where --pixel is outside an image, or two networks would be shown different images."""
    names = [[image.name for image in images] for _, images in chosen]
    if names[0] != names[-1]:
        raise ConfigError(
            f"the checkpoints are of different data sets, {chosen[0][0].name} and {chosen[1][0].name}: --dataset or "
            "--images must name the images to compare them on"
        )
    last = min(image.image.shape[-1] for _, images in chosen for image in images) - 1
    if args.pixel and not all(0 <= place <= last for place in args.pixel):
        row, col = args.pixel
        raise ConfigError(f"--pixel {row} {col}: must be from 0 to {last}, the images' last pixel")


# ---- attention ------------------------------------------------------------------------------------------------------


def network_attention(
    args: argparse.Namespace, trained: Trained, info: DataInfo, images: list[NamedImage], path: Path
) -> NetworkAttention:
    """All that the page shows of one network."""
    not_finite = [name for name, value in trained.network.state_dict().items() if not value.isfinite().all()]
    if not_finite:
        print_error("tools.visualize", f"{path}: weights are not finite: {', '.join(not_finite[:3])}; the page says so")
    effects = args.effects and not not_finite
    shown = [image_attention(trained.network, image, info, effects) for image in bar(images, "images")]
    probes, note = [], "No linear probes: weights are not finite."
    if not not_finite:
        decided = [image.prediction for image in shown]
        probes, note = stage_probes(args, trained, torch.stack([image.image for image in images]), decided)
    return NetworkAttention(name_of(path, args.checkpoints), shown, probes, note, not_finite)


@torch.no_grad()
def image_attention(network: nn.Module, image: NamedImage, info: DataInfo, effects: bool = True) -> ImageAttention:
    """All that the page shows of one image."""
    batch = image.image[None].to(next(network.parameters()).device)
    with record_attention(network, mean_heads=True) as everywhere:
        best = network(batch)[0].float().softmax(0).cpu().topk(min(GUESSES, info.num_classes))
    limit = page.lattice_limit(everywhere)
    with record_attention(network, pixels=lattice(limit)) as layers:
        network(batch)
    guess = [(info.class_names[i], p) for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
    of_heads = causal.head_effects(network, batch, partial(bar, what="heads, by layer")) if effects else []
    picture = denormalise(image.image[None], info)[0]
    return ImageAttention(
        image.name, image.label, picture, layers, everywhere, guess, best.indices[0].item(), of_heads, info.class_names
    )


def stage_probes(
    args: argparse.Namespace, trained: Trained, images: Tensor, decided: list[int]
) -> tuple[list[StageProbe], str]:
    """Linear probes fitted on training images, and a note on them; without the training data no probes, and why.

    Args:
        images: (B, 3, H, W) of the page, normalised.
        decided: the class that the network predicts for each.
    """
    network, config, known = trained
    if args.probe_images == 0:
        return [], "No linear probes: --probe-images 0."
    own_folder = args.data_dir if args.dataset in (None, config.dataset) and args.data_dir else config.data_dir
    if own_folder != config.data_dir:
        config = without_parts(config)  # which are numbers of the run's own images
    try:
        data = load_data(dataclasses.replace(config, data_dir=own_folder, num_workers=0), "cpu")
    except (ConfigError, DataError, OSError) as error:
        return [], f"No linear probes: they need the training data ({one_line(error, 300)})."
    if data.info.num_classes != known.num_classes:
        return (
            [],
            f"No linear probes: {own_folder} has {data.info.num_classes} classes, the network {known.num_classes}.",
        )
    ours = causal.pooled_features(network, images.to(next(network.parameters()).device))
    try:
        features, labels = causal.gather_features(
            network, spread_batches(data.train, args.probe_images, "probes: training", config.skip_bad_images)
        )
        tests, test_labels = causal.gather_features(
            network, spread_batches(data.test, PROBE_TEST_IMAGES, "probes: test", config.skip_bad_images)
        )
    except (DataError, WorkerError) as error:
        return [], f"No linear probes: they need the training data ({one_line(error, 300)})."
    fitted = {stage: causal.fit_probe(features[stage], labels, known.num_classes) for stage in bar(FEATURES, "fit")}
    names, probes = data.info.class_names, []
    for stage, probe in fitted.items():
        shares = probe.probabilities(ours[stage])
        answers = [(names[share.argmax()], share[i].item()) for share, i in zip(shares, decided, strict=True)]
        probes.append(StageProbe(stage, causal.top1_pct(probe, tests[stage], test_labels), answers))
    return probes, (
        f"Each is a linear classifier (logistic regression) fitted on one stage's features, averaged over the map, of "
        f"{len(labels)} training images without augmentation, and scored on {len(test_labels)} test images. It shows "
        "what can be read off a stage, not what the network uses."
    )


def spread_batches(split, count: int, what: str, skip_bad_images: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """At most `count` images of a split, evenly spread over it, and their labels, in batches: trees lie class by class.

    Raises:
        DataError: an image that cannot be read, or with skip_bad_images none that can.
    """
    count = min(count, len(split))
    indices, bad = [i * len(split) // count for i in range(count)], []
    for first in bar(range(0, count, PROBE_BATCH), what):
        pairs = []
        for i in indices[first : first + PROBE_BATCH]:
            try:
                pairs.append(split.image(i))
            except DataError as error:
                if not skip_bad_images or len(bad) + 1 == count:
                    raise
                bad.append(error)
        if pairs:
            images, labels = zip(*pairs, strict=True)
            yield torch.stack(images), torch.tensor(labels)


# ---- pictures -------------------------------------------------------------------------------------------------------


def draw(
    network: nn.Module, images: list[NamedImage], shown: list[ImageAttention], pixel: list[int] | None
) -> dict[str, Figure]:
    """The pictures by their file names; image-N.png shows what `pixel` (row, column; None: the centre) attends to."""
    layers = [merge(of_layer) for of_layer in zip(*(attention.layers for attention in shown), strict=True)]
    maps = figures.sheet([figures.map_strip(layer) for layer in layers], "mean map of each head, and its mean entropy")
    drawn = {"maps.png": maps, "measures.png": figures.measures_figure(layers)}
    strips = [strip for layer in layers for strip in figures.embedding_strips(layer)]
    if strips:
        drawn["embeddings.png"] = figures.sheet(strips)
    for number, (image, attention) in enumerate(zip(images, shown, strict=True)):
        centre = (image.image.shape[-2] // 2, image.image.shape[-1] // 2)
        drawn[f"image-{number}.png"] = draw_pixel(network, image, attention, tuple(pixel or centre))
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
    run_main(main)
