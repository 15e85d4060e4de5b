"""The recipes: what each gives to each data set, complete; docs/recipes.md shows them. Read without torch."""

from typing import Any

from sasa.data.specs import DATASETS, SPECS, TREE_EVAL_CROP

# What most recipes share: no regularisation, no augmentation, the rate as it stands. RandAugment's numbers are
# torchvision's defaults, the resized crop's the ImageNet family's, Adam's torch's.
_BASE = {
    "pad": 0, "flip": False, "rotate": 0.0, "translate": 0.0, "zoom": 0.0, "cutout": 0, "auto_augment": "none",
    "random_erase": 0.0, "repeats": 1, "loss": "ce", "min_lr": 0.0, "drop_path": 0.0,
    "rand_rounds": 2, "rand_magnitude": 9, "crop_area": 0.08, "crop_aspect": 4 / 3,
    "step_epochs": 30, "step_factor": 0.1, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_eps": 1e-8,
    "mixup": 0.0, "cutmix": 0.0, "reflect": False, "schedule": "cosine", "momentum": 0.9, "nesterov": True,
    "bn_momentum": 0.1, "label_smoothing": 0.0, "clip_grad": 0.0, "ema": 0.0, "zero_init_residual": False,
}  # fmt: skip
_ADAMW = _BASE | {
    "optimizer": "adamw", "lr": 1e-3, "lr_scaling": "sqrt", "weight_decay": 0.05, "label_smoothing": 0.1,
    "clip_grad": 1.0, "zero_init_residual": True,
}  # fmt: skip
_DIGITS = {"rotate": 10.0, "translate": 0.1, "zoom": 0.1}  # what leaves a digit the same digit
_CIFAR = {"pad": 4, "flip": True, "cutout": 8}
# The paper's ImageNet run (section 4.1); weight decay, label smoothing and augmentation are not given there.
_PAPER = _BASE | {
    "optimizer": "sgd", "epochs": 130, "batch_size": 256, "lr": 0.1, "lr_scaling": "linear", "lr_batch": 256,
    "warmup_epochs": 10.0, "weight_decay": 1e-4, "label_smoothing": 0.1, "ema": 0.9999, "bn_momentum": 1e-4,
}  # fmt: skip
_IMAGENET = _PAPER | {"clip_grad": 5.0, "bn_momentum": 0.1, "flip": True}
# The port's CIFAR-10 run: the rate divided by 10 every 30 epochs (README of the port, results table).
_PORT = _BASE | {
    "optimizer": "sgd", "epochs": 100, "batch_size": 25, "lr": 0.1, "lr_scaling": "none", "lr_batch": 25,
    "warmup_epochs": 0.0, "weight_decay": 1e-4, "schedule": "step", "nesterov": False,
}  # fmt: skip
# Procedure A2 of ResNet strikes back (Wightman et al., 2021, table 2), and what A3 does otherwise; value by value in
# docs/recipes.md. RandAugment's 7 and 6 of 10 are 21 and 18 of torchvision's 30.
_RSB = _BASE | {
    "optimizer": "lamb", "epochs": 300, "batch_size": 256, "lr": 5e-3, "lr_scaling": "sqrt", "lr_batch": 2048,
    "min_lr": 1e-6, "warmup_epochs": 5.0, "weight_decay": 0.02, "adam_eps": 1e-6, "clip_grad": 1.0, "loss": "bce",
    "auto_augment": "rand", "rand_magnitude": 21, "repeats": 3, "mixup": 0.1, "cutmix": 1.0, "drop_path": 0.05,
    "zero_init_residual": True,
}  # fmt: skip
_RSB_A3 = _RSB | {"epochs": 100, "lr": 8e-3, "rand_magnitude": 18, "repeats": 1, "drop_path": 0.0}
# For small images on a GPU, where there is time for 500 epochs: the CIFAR recipe of Compact Convolutional Transformers
# (Hassani et al., 2021), with our clipping, average and start of the residual branches.
_STRONG = _ADAMW | {
    "epochs": 500, "batch_size": 128, "lr": 5.5e-4, "lr_batch": 128, "min_lr": 1e-5, "warmup_epochs": 10.0,
    "weight_decay": 0.06, "auto_augment": "rand", "rand_magnitude": 27, "random_erase": 0.25, "mixup": 0.8,
    "cutmix": 1.0, "drop_path": 0.1, "ema": 0.999,
}  # fmt: skip


def _digits(epochs: int, batch: int, **more) -> dict[str, Any]:
    return _ADAMW | {"epochs": epochs, "batch_size": batch, "lr_batch": batch, "warmup_epochs": 2.0} | more


def _everywhere(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A recipe with one augmentation for all sets: the CIFAR family's crop, by an eighth of the side, and the flip.

    A mirrored digit is another picture, so digits are not flipped; trees have their resized crop instead of the pad.
    """
    mirrored = {name: name not in ("DIGITS", "MNIST") for name in DATASETS}
    return {name: values | {"pad": (SPECS[name].side or 0) // 8, "flip": mirrored[name]} for name in DATASETS}


# Every recipe of every data set, each complete. The default of DIGITS was found by trials (docs/recipes.md); the others
# follow it, or their family's practice.
_BY_DATA_SET: dict[str, dict[str, dict[str, Any]]] = {
    "default": {
        "DIGITS": _digits(12, 32, ema=0.98, **_DIGITS),
        "MNIST": _digits(20, 64, **_DIGITS),
        "FashionMNIST": _digits(30, 64, pad=2, flip=True),
        "CIFAR10": _digits(200, 128, ema=0.999, **_CIFAR) | {"warmup_epochs": 10.0},
        "CIFAR100": _digits(200, 128, ema=0.999, **_CIFAR) | {"warmup_epochs": 10.0},
        "IMAGENET": _IMAGENET,
        "WEBDATASET": _IMAGENET,  # which is what shards are for
        "FOLDER": _ADAMW | {"epochs": 90, "batch_size": 64, "lr_batch": 256, "warmup_epochs": 5.0, "flip": True},
    },
    "port": _everywhere(_PORT),
    "paper": _everywhere(_PAPER),
    "rsb": _everywhere(_RSB),
    "rsb-a3": _everywhere(_RSB_A3),
    "strong": _everywhere(_STRONG),
}


def _eval_crop(recipe: str, dataset: str) -> float:
    """The share of an image that evaluation feeds: small images whole; trees as their family, or as rsb does."""
    if SPECS[dataset].side is not None:
        return 1.0
    return 0.95 if recipe.startswith("rsb") else TREE_EVAL_CROP


RECIPES = {
    recipe: {dataset: values | {"eval_crop": _eval_crop(recipe, dataset)} for dataset, values in by_set.items()}
    for recipe, by_set in _BY_DATA_SET.items()
}
