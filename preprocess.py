"""Data sets and their batches, the same for whatever number of processes and workers reads them.

    info, train, holdout, test = load(dataset="DIGITS", data_dir="datasets", holdout=0.1, seed=0)
    for images, targets in train.batches(epoch, start_step, batch_size=32, seed=0, augment=AugmentConfig(rotate=10)):
    for images, labels in test.eval_batches(256):

The way of a batch, in sasa/data: `batches.plan` (which images, which random numbers: a function of seed, epoch and
step) -> `splits` (their pixels: `TensorData` from a tensor on the device, `FolderData` by workers that decode, crop and
resize) -> `batches.transform` (augmented, normalised and mixed, on the device). All is drawn for the whole global batch
(batch_size * accumulate * world_size images) and then cut: process `rank` trains on its own contiguous part, in
`accumulate` pieces. So any step of any epoch can be entered directly, and nothing reads a global random state.

As a command it packs trees into shards and indexes shards: `python preprocess.py --help`. docs/data.md: what is read,
from where and how.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sasa.data.augment import AugmentConfig, stream
from sasa.data.batches import DataInfo, denormalise, epoch_order
from sasa.data.datasets import SMALL_SETS
from sasa.data.download import resolve_auto
from sasa.data.errors import DataError, WorkerError
from sasa.data.fingerprint import list_tensors, of_tensors
from sasa.data.images import Evaluated, note_on_range, resize_tensor
from sasa.data.shards import main as shards_main
from sasa.data.shards import read_shards
from sasa.data.specs import DATASETS, SPECS, TREE_EVAL_CROP, TREE_SIZE, canonical_name
from sasa.data.splits import FolderData, Split, TensorData
from sasa.data.trees import read_trees
from sasa.data.workers import WORKER_TIMEOUT_S

__all__ = [
    "DATASETS", "AugmentConfig", "DataError", "DataInfo", "FolderData", "Split", "TensorData", "WorkerError",
    "canonical_name", "channel_stats", "data_identity", "denormalise", "epoch_order",
    "info_without_files", "load", "resolve_auto",
]  # fmt: skip


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
    eval_size: int | None = None,
    eval_crop: float | None = None,
    eval_interpolation: str = "bilinear",
    index_dir: str | Path | None = None,
    worker_timeout: float = WORKER_TIMEOUT_S,
    is_stopped: Callable[[], bool] = lambda: False,
    report: Callable[[str], None] = print,
    channels_last: bool = False,
) -> tuple[DataInfo, Split, Split | None, Split]:
    """(info, train, holdout or None, test) of a data set by its name, in any case.

    Args:
        img_size: side of the images fed, pixels; None is the set's own size, 224 for image trees.
        train_images: the training set is a part of that many images, drawn by the seed; None is all of it.
        holdout: that many images (int), or that share (float below 1), taken from the training set (or that part of
            it) by the seed and evaluated like the test set.
        skip_bad_images: files that cannot be read are skipped and counted.
        num_workers: processes that decode a tree's images; 0 is this one.
        eval_size: side of the images fed in evaluation; None is img_size.
        eval_crop: evaluation resizes an image's short side to eval_size / eval_crop and feeds the centre; None is
            224/256 for image trees, 1 for the small sets.
        eval_interpolation: bilinear or bicubic, antialiased, of evaluation.
        index_dir: folder of the shards' indexes; None is beside them, or the user's cache.
        worker_timeout: seconds after which decoding processes that are alive but hand nothing over end the run by a
            WorkerError; 0 waits without end.
        is_stopped: whether a signal stopped the run; then it waits no longer for a silent process.
        report: called with each line that a person should see, such as the files of a tree that are left out.
        channels_last: batches come out in the channels-last format, else contiguous.

    Raises:
        ValueError: an unknown data set or interpolation, a crop that is not above 0 and at most 1.
        DataError: everything that is wrong with the data.
    """
    name = canonical_name(dataset)
    spec = SPECS[name]
    if name == "WEBDATASET":
        classes, train, test = read_shards(str(data_dir), None if index_dir is None else Path(index_dir))
    elif spec.side is None:
        classes, train, test, notes = read_trees(name, Path(data_dir))
        for line in notes:
            report(line)
    else:
        classes, train, test = SMALL_SETS[name](Path(data_dir))
    if spec.side is None and (line := note_on_range(train[0])):
        report(line)
    part = _draw_part(len(train[1]), train_images, seed)
    kept, held = (part[index] for index in _hold_out(len(part), holdout, seed))
    side = img_size or spec.side or TREE_SIZE
    crop = eval_crop or (TREE_EVAL_CROP if spec.side is None else 1.0)
    evaluated = Evaluated(eval_size or side, round((eval_size or side) / crop), eval_interpolation)
    info = DataInfo(
        name=name,
        num_classes=len(classes),
        class_names=tuple(classes),
        image_size=side,
        channels=3,
        mean=_three(spec.mean),
        std=_three(spec.std),
        train_size=len(kept),
        test_size=len(test[1]),
        holdout_size=len(held),
        eval_size=evaluated.size,
    )

    memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def split(source: tuple, index: Tensor | None = None, fed: Evaluated | None = None) -> Split:
        """`fed`: how, where a small set's split is evaluated."""
        images, labels = source
        if spec.side is None:
            chosen = list(range(len(labels))) if index is None else index.tolist()
            return FolderData(
                images.take(chosen), [labels[i] for i in chosen], info, device=device, num_workers=num_workers,
                skip_bad_images=skip_bad_images, evaluated=evaluated, worker_timeout=worker_timeout,
                is_stopped=is_stopped, memory_format=memory_format,
            )  # fmt: skip
        names = [f"test image {i}" for i in range(len(labels))]
        if index is not None:
            images, labels, names = images[index], labels[index], [f"training image {i}" for i in index.tolist()]
        identity, listed = of_tensors(images, labels, info.num_classes), list_tensors(images, labels, names)
        fed_images = resize_tensor(images, fed or Evaluated(side, side))
        return TensorData(fed_images, labels, info, device, identity, listed, memory_format)

    held_out = split(train, held, evaluated) if len(held) else None
    return info, split(train, kept), held_out, split(test, None, evaluated)


def data_identity(info: DataInfo, train: Split, holdout: Split | None, test: Split) -> dict[str, Any]:
    """What a checkpoint keeps of its data, for `sasa.data.fingerprint.differences`: plain values only."""
    return {
        "dataset": info.name,
        "class_names": list(info.class_names),
        "mean": list(info.mean),
        "std": list(info.std),
        "train": train.fingerprint(),
        "holdout": None if holdout is None else holdout.fingerprint(),
        "test": test.fingerprint(),
    }


def info_without_files(name: str, num_classes: int, image_size: int) -> DataInfo:
    """What is known of a data set when none of its files is at hand: its classes have numbers for names."""
    spec = SPECS[canonical_name(name)]
    names = tuple(f"class {i}" for i in range(num_classes))
    return DataInfo(name, num_classes, names, image_size, 3, _three(spec.mean), _three(spec.std), 0, 0, 0)


def channel_stats(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over all pixels of all images, in [0, 1].

    Summed exactly, as integers; the deviation is the population's.

    Args:
        images: (n, C, H, W) uint8.
    """
    pixels = images.transpose(0, 1).flatten(1).long()  # (C, n * H * W)
    mean = pixels.sum(1).double() / pixels.shape[1]
    var = pixels.square().sum(1).double() / pixels.shape[1] - mean.square()
    return tuple((mean / 255).tolist()), tuple((var.sqrt() / 255).tolist())


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


if __name__ == "__main__":
    sys.exit(shards_main())
