"""Data sets and their batches, the same for whatever number of processes and workers reads them.

    info, train, holdout, test = load(dataset="DIGITS", data_dir="datasets", holdout=0.1, seed=0)
    for images, targets in train.batches(epoch, start_step, batch_size=32, seed=0, augment=default_augment("DIGITS")):
    for images, labels in test.eval_batches(256):

Images come out normalised, (B, 3, H, W) float32 on the device. Gray sets are stored with one channel and fed as three
equal ones: the network then has the shapes, the parameter counts and the attention stem of the paper for every set, and
weights move from one set to another; the price is a first layer that sees each pixel three times.

Order, augmentation and mixing are functions of (seed, epoch, step), each drawn for the whole global batch (batch_size *
accumulate * world_size images) and then cut: process `rank` trains on its own contiguous part, in `accumulate` pieces.
So any step of any epoch can be entered directly, and nothing reads a global random state.

Small sets are one uint8 tensor on the device (`TensorData`); image trees and tar shards are read by workers
(`FolderData`), which decode, crop and resize: all else is done on the device. As a command it packs trees into shards
and indexes shards: `python preprocess.py --help`.
"""

import atexit
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, tee
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from sasa.data.augment import (
    AugmentConfig,
    Draws,
    Mix,
    augment,
    cutout,
    draw,
    draw_crops,
    draw_mix,
    mix,
    rows,
    stream,
)
from sasa.data.datasets import (
    SMALL_SETS,
    DataError,
    Files,
    ImageFiles,
    Key,
    collate,
    download,
    ignore_signals,
    read_trees,
)
from sasa.data.shards import ShardFiles, read_shards
from sasa.data.shards import main as shards_main

_DEFAULT_TREE_SIZE = 224
_IMAGENET_STATS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class _Spec:
    """What is known of a data set before it is read.

    mean, std: of images in [0, 1], one number a stored channel. DIGITS and FashionMNIST: `channel_stats` of the
    training set, rounded to 4 places (tests/test_preprocess.py computes them again). MNIST and CIFAR: the figures in
    general use, which are that same statistic of their training sets (pytorch/examples; kuangliu/pytorch-cifar;
    weiaicunzai/pytorch-cifar100). IMAGENET: torchvision's; FOLDER and WEBDATASET take them over: photographs too.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    side: int | None  # pixels; None where images differ
    augment: AugmentConfig  # the default recipe's
    mirror: bool  # whether a mirrored image keeps its class


_DIGIT_MOVES = AugmentConfig(rotate=10, translate=0.1, zoom=0.1)
_SPECS = {
    "DIGITS": _Spec((0.3054,), (0.3753,), 8, _DIGIT_MOVES, False),
    "CIFAR10": _Spec((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), 32, AugmentConfig(4, True, cutout=8), True),
    "CIFAR100": _Spec((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), 32, AugmentConfig(4, True, cutout=8), True),
    "MNIST": _Spec((0.1307,), (0.3081,), 28, _DIGIT_MOVES, False),
    "FashionMNIST": _Spec((0.2860,), (0.3530,), 28, AugmentConfig(2, True), True),
    "IMAGENET": _Spec(*_IMAGENET_STATS, None, AugmentConfig(flip=True), True),
    "FOLDER": _Spec(*_IMAGENET_STATS, None, AugmentConfig(flip=True), True),
    "WEBDATASET": _Spec(*_IMAGENET_STATS, None, AugmentConfig(flip=True), True),
}
DATASETS = tuple(_SPECS)


@dataclass(frozen=True)
class DataInfo:
    """A data set as the network meets it. mean and std are of images in [0, 1]; image_size is the side as fed."""

    name: str
    num_classes: int
    class_names: tuple[str, ...]
    image_size: int
    channels: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    train_size: int
    test_size: int
    holdout_size: int


# ---- names and recipes ----------------------------------------------------------------------------------------------


def canonical_name(text: str) -> str:
    """The data set's name as it is written in DATASETS, from any case.

    Raises: ValueError for another name.
    """
    for name in DATASETS:
        if name.lower() == text.lower():
            return name
    raise ValueError(f"unknown data set {text!r}, expected one of {', '.join(DATASETS)}")


def default_augment(name: str, recipe: str = "default", img_size: int | None = None) -> AugmentConfig:
    """The augmentation of a recipe (default, seed, paper) for a data set fed at img_size (None: its own size).

    seed and paper: the CIFAR-10 family's crop with padding 4 at 32 pixels (an eighth of the side elsewhere) and flip;
    no flip where a mirror image is another class. Image trees: random resized crop (always) and flip in every recipe.
    """
    spec = _SPECS[canonical_name(name)]
    if recipe == "default" or spec.side is None:
        config = spec.augment
    else:
        config = AugmentConfig(pad=spec.side // 8, flip=spec.mirror)
    scale = 1 if img_size is None or spec.side is None else img_size / spec.side
    return AugmentConfig(**{**vars(config), "pad": round(config.pad * scale), "cutout": round(config.cutout * scale)})


def resolve_auto(data_dir: str | Path, has_gpu: bool) -> tuple[str, str]:
    """What `--dataset auto` stands for here, and why: (name, reason). Downloads CIFAR10 where there is a GPU."""
    if (Path(data_dir) / "cifar-10-batches-py").is_dir():
        return "CIFAR10", f"CIFAR-10 is in {data_dir}"
    if not has_gpu:
        return "DIGITS", f"no CIFAR-10 in {data_dir} and no GPU to train on it: the embedded DIGITS"
    try:
        from torchvision.datasets import CIFAR10

        download(CIFAR10, data_dir, otherwise="the embedded DIGITS instead")
    except DataError as error:
        return "DIGITS", str(error)
    return "CIFAR10", f"CIFAR-10 downloaded to {data_dir}"


# ---- what both kinds of data share ----------------------------------------------------------------------------------


def epoch_order(size: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch: a permutation of range(size), (size,) int64."""
    return torch.from_numpy(stream(seed, "order", epoch).permutation(size))


class _Piece(NamedTuple):
    """What one process takes of one global batch at a time."""

    index: Tensor  # (B,) int64 on the CPU; where mixed, (B + 1,) with the predecessor of the first in front
    draws: Draws  # of the same images
    mixing: Mix | None


class _Split:
    """The images of one purpose: training, holdout or test. Subclasses have __len__, _train and eval_batches."""

    def __init__(self, info: DataInfo, device: torch.device | str) -> None:
        self.info = info
        self.device = torch.device(device)
        self.bad_images: list[str] = []  # met so far by this process and skipped: "path: what is wrong"
        mean, std = (torch.tensor(v, device=self.device).view(-1, 1, 1) for v in (info.mean, info.std))  # (3, 1, 1)
        self._scale, self._shift = 1 / (255 * std), -mean / std

    def steps_per_epoch(self, batch_size: int, world_size: int = 1, accumulate: int = 1) -> int:
        """Optimizer steps in an epoch: whole global batches only, at least one.

        The images of the last and smaller batch would weigh more than others; each epoch leaves out other ones. A set
        smaller than one global batch makes one step of all its images.
        """
        return max(len(self) // (batch_size * world_size * accumulate), 1)

    def batches(
        self,
        epoch: int,
        start_step: int = 0,
        *,
        batch_size: int,
        accumulate: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        augment: AugmentConfig | None = None,
        global_batch: int | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch of this process from optimizer step start_step on: `accumulate` pairs a step.

        Yields images (B, 3, H, W) float32 and labels (B,) int64, or soft targets (B, classes) float32 where mixed. The
        global batch of a step has global_batch images, by default batch_size * accumulate * world_size, and all of the
        set where that is less. It is bitwise that of a single process; each process takes its own part in `accumulate`
        pieces, whose sizes B differ by one where it does not divide.
        Raises: DataError where a step has fewer images than accumulate * world_size.
        """
        pieces = accumulate * world_size
        total = min(global_batch or batch_size * pieces, len(self))
        if total < pieces:
            what = f"{total} training images" if total == len(self) else f"{total} images a step"
            raise DataError(f"{self.info.name}: {what} are too few for {pieces} batches at a time")
        steps = range(start_step, self.steps_per_epoch(total))
        bounds = [total * i // pieces for i in range(rank * accumulate, (rank + 1) * accumulate + 1)]
        config = augment or AugmentConfig()
        return self._train(self._pieces(epoch, steps, total, bounds, seed, config), config)

    def _pieces(
        self, epoch: int, steps: range, total: int, bounds: list[int], seed: int, config: AugmentConfig
    ) -> Iterator[_Piece]:
        """The pieces between the `bounds` in each step's global batch of `total` images."""
        order, side, mixed = epoch_order(len(self), seed, epoch), self.info.image_size, config.mixup or config.cutmix
        for step in steps:
            draws = self._draw(epoch, step, total, seed, config)
            mixing = draw_mix(stream(seed, "mix", epoch, step), side, side, config) if mixed else None
            for first, stop in pairwise(bounds):
                position = torch.arange(first - 1 if mixed else first, stop) % total
                yield _Piece(order[step * total + position], rows(draws, position), mixing)

    def _draw(self, epoch: int, step: int, total: int, seed: int, config: AugmentConfig) -> Draws:
        """The random numbers of the `total` images of one step."""
        side = self.info.image_size
        return draw(stream(seed, "augment", epoch, step), total, side, side, config)

    def _train(self, pieces: Iterator[_Piece], config: AugmentConfig) -> Iterator[tuple[Tensor, Tensor]]:
        raise NotImplementedError

    def _normalise(self, images: Tensor) -> Tensor:
        """(B, 1 or 3, H, W) in [0, 255] -> (B, 3, H, W) float32; one channel becomes three by broadcasting.

        Contiguous for every kind of data: the memory format is the training's choice.
        """
        images = images.to(torch.float32, memory_format=torch.contiguous_format)
        return images.mul(self._scale).add_(self._shift)

    def _finish(self, images: Tensor, labels: Tensor, piece: _Piece, config: AugmentConfig) -> tuple[Tensor, Tensor]:
        """Normalised, cut out and mixed: (B, 3, H, W), and labels (B,) or soft targets (B, classes)."""
        images = self._normalise(images)
        if piece.draws.cutout is not None:
            images = cutout(images, piece.draws.cutout, config.cutout)
        if piece.mixing is not None:
            return mix(images, labels, self.info.num_classes, piece.mixing)
        return images, labels

    def _own(self, batch_size: int, rank: int, world_size: int) -> Iterator[range]:
        """The positions that one of several processes evaluates, by batches: each belongs to exactly one process."""
        start, stop = len(self) * rank // world_size, len(self) * (rank + 1) // world_size
        for first in range(start, stop, batch_size):
            yield range(first, min(first + batch_size, stop))


class TensorData(_Split):
    """A small set on the device: images (n, C, H, W) uint8 with C = 1 or 3, and labels (n,) int64."""

    def __init__(self, images: Tensor, labels: Tensor, info: DataInfo, device: torch.device | str = "cpu") -> None:
        super().__init__(info, device)
        self.images, self.labels = images.to(self.device), labels.to(self.device)

    def __len__(self) -> int:
        return len(self.labels)

    def _train(self, pieces: Iterator[_Piece], config: AugmentConfig) -> Iterator[tuple[Tensor, Tensor]]:
        for piece in pieces:
            index = piece.index.to(self.device, non_blocking=True)
            images = augment(self.images[index], piece.draws, config)
            yield self._finish(images, self.labels[index], piece, config)

    def eval_batches(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Each image once over all ranks, in order, not augmented: (B, 3, H, W) float32 and labels (B,) int64."""
        for own in self._own(batch_size, rank, world_size):
            part = slice(own.start, own.stop)
            yield self._normalise(self.images[part]), self.labels[part]


class FolderData(_Split):
    """Image files, or images in shards, read by workers; the interface of TensorData.

    One pass at a time: starting another on the same object ends the first, as they share the persistent workers.
    """

    def __init__(
        self,
        files: Files | ShardFiles,
        labels: list[int],
        info: DataInfo,
        *,
        device: torch.device | str = "cpu",
        num_workers: int = 0,
        skip_bad_images: bool = False,
    ) -> None:
        super().__init__(info, device)
        self.skip_bad_images = skip_bad_images
        self._files = ImageFiles(files, labels, info.image_size, skip_bad_images)
        self._keys = _Refillable()
        self._loader = DataLoader(
            self._files,
            batch_sampler=self._keys,
            num_workers=num_workers,
            collate_fn=collate,
            pin_memory=self.device.type == "cuda",
            persistent_workers=num_workers > 0,
            worker_init_fn=ignore_signals,
            generator=torch.Generator(),  # DataLoader draws a seed for its workers: not from the global state
        )
        if num_workers:
            # Run before multiprocessing's own exit handler, as it is registered later. That one ends workers by
            # SIGTERM, which ours ignore, and waits for them without end.
            atexit.register(_close, weakref.ref(self))

    def __len__(self) -> int:
        return len(self._files)

    def batches(self, epoch: int, start_step: int = 0, **options) -> Iterator[tuple[Tensor, Tensor]]:
        """As TensorData.batches. Always a random resized crop; flip, randaugment, cutout and mixing as configured.

        A file that cannot be read is replaced by the next one that can (`ImageFiles`). Where images are mixed, each
        piece reads one file more, the partner of its first: so the mixture is what a single process makes.
        Raises: DataError for a file that cannot be read, unless skip_bad_images; ValueError for pad, rotate, translate
        or zoom, whose part the resized crop plays here.
        """
        if options.get("augment") and options["augment"].geometric:
            raise ValueError(f"{self.info.name}: pad, rotate, translate and zoom must be 0, the crop is a resized one")
        return super().batches(epoch, start_step, **options)

    def _draw(self, epoch: int, step: int, total: int, seed: int, config: AugmentConfig) -> Draws:
        crop = draw_crops(stream(seed, "sample", epoch, step), total)
        return super()._draw(epoch, step, total, seed, config)._replace(crop=crop)

    def _train(self, pieces: Iterator[_Piece], config: AugmentConfig) -> Iterator[tuple[Tensor, Tensor]]:
        pieces, ahead = tee(pieces)  # the workers are given work ahead of what is yielded
        keys = (list(map(Key, piece.index.tolist(), piece.draws.crop.numpy())) for piece in ahead)
        for (images, labels), piece in zip(self._read(keys), pieces, strict=True):
            yield self._finish(augment(images, piece.draws, config), labels, piece, config)

    def eval_batches(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """As TensorData.eval_batches: resized to 256/224 of the side, centre crop.

        With skip_bad_images the files that cannot be read are left out, so that nothing counts twice: the total over
        all ranks is len(self) less their bad_images.
        """
        for images, labels in self._read(
            [Key(i, None) for i in own] for own in self._own(batch_size, rank, world_size)
        ):
            if len(labels):
                yield self._normalise(images), labels

    def close(self) -> None:
        """Ends the workers. The next pass would need a new object; at the end of the process it is done by itself."""
        if self._loader._iterator is not None:
            self._loader._iterator._shutdown_workers()

    def _read(self, keys: Iterator[list[Key]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of uint8 images and labels on the device, in the order of the keys."""
        self._keys.batches = keys
        for images, labels, bad in self._loader:
            if bad and not self.skip_bad_images:
                raise DataError(f"cannot read image {bad[0]}; repair or remove it, or skip such with --skip-bad-images")
            self.bad_images.extend(line for line in dict.fromkeys(bad) if line not in self.bad_images)
            if len(self.bad_images) == len(self):
                raise DataError(f"cannot read any of the {len(self)} images, the first: {self.bad_images[0]}")
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


def _close(data: weakref.ref) -> None:
    if (data := data()) is not None:
        data.close()


class _Refillable:
    """A batch sampler that persistent workers can be given anew for every pass."""

    def __init__(self) -> None:
        self.batches: Iterator[list[Key]] = iter(())

    def __iter__(self) -> Iterator[list[Key]]:
        return self.batches


# ---- reading the sets -----------------------------------------------------------------------------------------------


def load(
    *,
    dataset: str,
    data_dir: str | Path = "datasets",
    img_size: int | None = None,
    train_images: int | None = None,
    holdout: int | float = 0,
    seed: int = 0,
    skip_bad_images: bool = False,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[DataInfo, TensorData | FolderData, TensorData | FolderData | None, TensorData | FolderData]:
    """(info, train, holdout or None, test) of a data set by its name, in any case.

    img_size: None is the set's own size, 224 for image trees. train_images: the training set is a part of that many
    images, drawn by the seed; None is all of it. holdout: that many images (int), or that share (float below 1), taken
    from the training set (or that part of it) by the seed and evaluated like the test set.
    Raises: ValueError for an unknown name; DataError for everything that is wrong with the data.
    """
    name = canonical_name(dataset)
    spec = _SPECS[name]
    if name == "WEBDATASET":
        classes, train, test = read_shards(str(data_dir))
    elif spec.side is None:
        classes, train, test = read_trees(name, Path(data_dir))
    else:
        classes, train, test = SMALL_SETS[name](Path(data_dir))
    part = _draw_part(len(train[1]), train_images, seed)
    kept, held = (part[index] for index in _hold_out(len(part), holdout, seed))
    info = DataInfo(
        name=name,
        num_classes=len(classes),
        class_names=tuple(classes),
        image_size=img_size or spec.side or _DEFAULT_TREE_SIZE,
        channels=3,
        mean=_three(spec.mean),
        std=_three(spec.std),
        train_size=len(kept),
        test_size=len(test[1]),
        holdout_size=len(held),
    )

    def split(source: tuple, index: Tensor | None = None) -> TensorData | FolderData:
        images, labels = source
        if spec.side is None:
            part = list(range(len(labels))) if index is None else index.tolist()
            options = {"num_workers": num_workers, "skip_bad_images": skip_bad_images, "device": device}
            return FolderData(images.take(part), [labels[i] for i in part], info, **options)
        if index is not None:
            images, labels = images[index], labels[index]
        return TensorData(_resize(images, info.image_size), labels, info, device)

    return info, split(train, kept), split(train, held) if len(held) else None, split(test)


def info_without_files(name: str, num_classes: int, image_size: int) -> DataInfo:
    """What is known of a data set when none of its files is at hand: its classes have numbers for names."""
    spec = _SPECS[canonical_name(name)]
    names = tuple(f"class {i}" for i in range(num_classes))
    return DataInfo(name, num_classes, names, image_size, 3, _three(spec.mean), _three(spec.std), 0, 0, 0)


def channel_stats(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over all pixels of all images, in [0, 1].

    images (n, C, H, W) uint8. Summed exactly, as integers; the deviation is the population's.
    """
    pixels = images.transpose(0, 1).flatten(1).long()  # (C, n * H * W)
    mean = pixels.sum(1).double() / pixels.shape[1]
    var = pixels.square().sum(1).double() / pixels.shape[1] - mean.square()
    return tuple((mean / 255).tolist()), tuple((var.sqrt() / 255).tolist())


def denormalise(images: Tensor, info: DataInfo) -> Tensor:
    """Pictures of a normalised batch: (B, 3, H, W) -> the same in [0, 1]."""
    mean, std = (torch.tensor(v, device=images.device).view(-1, 1, 1) for v in (info.mean, info.std))
    return images.float().mul(std).add(mean).clamp(0, 1)


def _three(values: tuple[float, ...]) -> tuple[float, float, float]:
    return values * 3 if len(values) == 1 else values


def _draw_part(size: int, count: int | None, seed: int) -> Tensor:
    """Sorted indices of `count` of the training images, the same for the same seed; all of them where it is None."""
    if count is None:
        return torch.arange(size)
    if count > size:
        raise DataError(f"--train-images {count}: the training set has {size} images")
    return torch.from_numpy(stream(seed, "part").permutation(size))[:count].sort().values


def _hold_out(size: int, holdout: int | float, seed: int) -> tuple[Tensor, Tensor]:
    """(kept, held): sorted indices of the training set, the same for the same seed."""
    count = round(size * holdout) if 0 < holdout < 1 else holdout
    if count != int(count) or not 0 <= count < size or (holdout and not count):
        raise DataError(f"--holdout {holdout:g}: must leave part of the {size} training images and hold at least one")
    order = torch.from_numpy(stream(seed, "holdout").permutation(size))
    return order[int(count) :].sort().values, order[: int(count)].sort().values


def _resize(images: Tensor, side: int) -> Tensor:
    """(n, C, H, W) uint8 -> (n, C, side, side) uint8, bilinear, antialiased where it shrinks. Once, at loading."""
    if images.shape[-2:] == (side, side):
        return images
    size = (side, side)
    parts = (F.interpolate(p.float(), size, mode="bilinear", antialias=True) for p in images.split(4096))
    return torch.cat([p.round().clamp(0, 255).byte() for p in parts])


if __name__ == "__main__":
    sys.exit(shards_main())
