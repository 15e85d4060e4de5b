"""What is known of each data set before it is read. No torch: config.py reads it too."""

from dataclasses import dataclass

TREE_SIZE = 224  # side of the images fed from trees and shards, pixels, where none is given
TREE_EVAL_CROP = 224 / 256  # share of the resized image's side that evaluation feeds of them: the ImageNet family's
_IMAGENET_STATS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Spec:
    """What is known of a data set before it is read.

    mean, std: of images in [0, 1], one number a stored channel. DIGITS and FashionMNIST: `preprocess.channel_stats` of
    the training set, rounded to 4 places (tests/data/test_datasets.py computes them again). MNIST and CIFAR: the
    figures in general use, which are that same statistic of their training sets (pytorch/examples;
    kuangliu/pytorch-cifar; weiaicunzai/pytorch-cifar100). IMAGENET: torchvision's; FOLDER and WEBDATASET take them
    over: photographs too.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    side: int | None  # pixels; None where images differ


SPECS = {
    "DIGITS": Spec((0.3054,), (0.3753,), 8),
    "CIFAR10": Spec((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), 32),
    "CIFAR100": Spec((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), 32),
    "MNIST": Spec((0.1307,), (0.3081,), 28),
    "FashionMNIST": Spec((0.2860,), (0.3530,), 28),
    "IMAGENET": Spec(*_IMAGENET_STATS, None),
    "FOLDER": Spec(*_IMAGENET_STATS, None),
    "WEBDATASET": Spec(*_IMAGENET_STATS, None),
}
DATASETS = tuple(SPECS)
SIDES = {name: spec.side for name, spec in SPECS.items()}


def canonical_name(text: str) -> str:
    """The data set's name as SPECS writes it, from any case.

    Raises:
        ValueError: another name.
    """
    for name in SPECS:
        if name.lower() == text.lower():
            return name
    raise ValueError(f"unknown data set {text!r}, expected one of {', '.join(SPECS)}")
