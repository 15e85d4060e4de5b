"""Data sets of the tests: small ones in memory, and files in the forms that the real ones have."""

import gzip
import hashlib
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torchvision import datasets

from preprocess import DataInfo, TensorData
from sasa.data.augment import AugmentConfig

EVERYTHING = AugmentConfig(
    pad=2, flip=True, rotate=20, translate=0.1, zoom=0.2, cutout=3, auto_augment="rand", mixup=0.4, cutmix=1.0
)
WITHOUT_RANDAUGMENT = replace(EVERYTHING, auto_augment="none")  # which is slow
FOR_TREES = replace(EVERYTHING, pad=0, rotate=0, translate=0, zoom=0)


def batches(data, epoch=0, start_step=0, **options):
    return list(data.batches(epoch, start_step, **{"batch_size": 12, "seed": 5} | options))


def same(left, right) -> bool:
    """Two lists of (images, targets), bitwise."""
    return len(left) == len(right) and all(
        torch.equal(a, b) for pair in zip(left, right, strict=True) for a, b in zip(*pair, strict=True)
    )


def small_set(size=50, channels=3, side=12, classes=4):
    """Images whose content says which one they are, and a set of them."""
    images = torch.randint(0, 256, (size, channels, side, side), dtype=torch.uint8)
    images[:, :, 0, 0] = torch.arange(size, dtype=torch.uint8)[:, None]
    labels = torch.arange(size) % classes
    names = tuple(map(str, range(classes)))
    info = DataInfo("CIFAR10", classes, names, side, 3, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), size, 0, 0)
    return TensorData(images, labels, info)


def plain_set():
    """As small_set, without asking the global generator."""
    images = torch.arange(20 * 3 * 8 * 8).remainder(251).byte().view(20, 3, 8, 8)
    info = DataInfo("CIFAR10", 2, ("a", "b"), 8, 3, (0.5,) * 3, (0.5,) * 3, 20, 0, 0)
    return TensorData(images, torch.arange(20) % 2, info)


def write_cifar(root: Path, name: str, monkeypatch) -> tuple[torch.Tensor, torch.Tensor]:
    """A small set in CIFAR's own form, and torchvision's checksums set to its files'."""
    kind = getattr(datasets, name)
    classes, key = (10, b"labels") if name == "CIFAR10" else (100, b"fine_labels")
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    rng, written = np.random.default_rng(0), {}

    def dump(file, content):
        (folder / file).write_bytes(pickle.dumps(content))
        written[file] = hashlib.md5((folder / file).read_bytes()).hexdigest()

    parts = []
    for file, _ in [*kind.train_list, *kind.test_list]:
        data, labels = rng.integers(0, 256, (6, 3072), dtype=np.uint8), rng.integers(0, classes, 6).tolist()
        dump(file, {"data": data, key.decode(): labels})
        parts.append((torch.from_numpy(data).view(6, 3, 32, 32), torch.tensor(labels)))
    dump(kind.meta["filename"], {kind.meta["key"]: [f"class {i}" for i in range(classes)]})
    monkeypatch.setattr(kind, "train_list", [[file, written[file]] for file, _ in kind.train_list])
    monkeypatch.setattr(kind, "test_list", [[file, written[file]] for file, _ in kind.test_list])
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": written[kind.meta["filename"]]})
    return tuple(torch.cat(field) for field in zip(*parts, strict=True))


def write_idx(folder: Path, suffix: str, train: int = 20, test: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Four files in MNIST's own form: (images, labels) of the training set."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    first = None
    for split, size in (("train", train), ("t10k", test)):
        images, labels = rng.integers(0, 256, (size, 28, 28), dtype=np.uint8), np.arange(size, dtype=np.uint8) % 10
        contents = {
            f"{split}-images-idx3-ubyte": bytes((0, 0, 8, 3))
            + np.array([size, 28, 28], ">u4").tobytes()
            + images.tobytes(),
            f"{split}-labels-idx1-ubyte": bytes((0, 0, 8, 1)) + np.array([size], ">u4").tobytes() + labels.tobytes(),
        }
        for name, content in contents.items():
            (folder / (name + suffix)).write_bytes(gzip.compress(content) if suffix else content)
        first = first or (torch.from_numpy(images)[:, None], torch.from_numpy(labels).long())
    return first


def truncate(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-200])
    return path
