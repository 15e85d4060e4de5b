"""Configurations of checkpoint format 2, whose fields were fewer: the rest stood in that version's code. No torch.

The table below is what that code did and never changes, whatever becomes of today's recipes.
"""

from typing import Any

# In every recipe.
_ALWAYS = {
    "rotate": 0.0, "translate": 0.0, "zoom": 0.0, "reflect": False,
    "train_images": None, "sync_bn": False, "preview": False, "eval_size": None, "eval_interpolation": "bilinear",
    "worker_timeout": 600.0, "index_dir": None,
}  # fmt: skip
_TRAINING = {
    "default": {"schedule": "cosine", "nesterov": True, "bn_momentum": 0.1},
    "seed": {"schedule": "step", "nesterov": False, "bn_momentum": 0.1, "lr_scaling": "none", "lr_batch": 25},
    "paper": {"schedule": "cosine", "nesterov": True, "bn_momentum": 1e-4, "lr_scaling": "linear", "lr_batch": 256},
}
_MOVES = {"pad": 0, "flip": False, "cutout": 0, "rotate": 10.0, "translate": 0.1, "zoom": 0.1}
_CROP = {"pad": 4, "flip": True, "cutout": 8}
_FLIP = {"pad": 0, "flip": True, "cutout": 0}
_DEFAULT = {
    "DIGITS": _MOVES, "MNIST": _MOVES, "FashionMNIST": {"pad": 2, "flip": True, "cutout": 0},
    "CIFAR10": _CROP, "CIFAR100": _CROP, "IMAGENET": _FLIP, "FOLDER": _FLIP, "WEBDATASET": _FLIP,
}  # fmt: skip
_SIDES = {"DIGITS": 8, "CIFAR10": 32, "CIFAR100": 32, "MNIST": 28, "FashionMNIST": 28}
_NO_FLIP = ("DIGITS", "MNIST")
_LR_BATCH = {"DIGITS": 32, "MNIST": 64, "FashionMNIST": 64, "CIFAR10": 128, "CIFAR100": 128}  # else 256


def complete(values: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a format 2 run with every field of today, as that version trained and evaluated.

    Its rate is the scaled one.

    Raises:
        KeyError, TypeError: `values` is not a configuration of format 2.
    """
    recipe, dataset, side = values["recipe"], values["dataset"], _SIDES.get(values["dataset"])
    if recipe == "default":
        augment = _DEFAULT[dataset]
    else:
        augment = {"pad": (side or 0) // 8, "flip": dataset not in _NO_FLIP, "cutout": 0}
    added = _ALWAYS | _TRAINING[recipe] | augment | {"eval_crop": 0.875 if side is None else 1.0}
    if recipe == "default":
        linear = dataset in ("IMAGENET", "WEBDATASET")
        added |= {"lr_scaling": "linear" if linear else "sqrt", "lr_batch": _LR_BATCH.get(dataset, 256)}
    if side is not None and values.get("img_size"):
        for key in ("pad", "cutout"):
            added[key] = round(added[key] * values["img_size"] / side)
    return added | values | {"recipe": "port" if recipe == "seed" else recipe}
