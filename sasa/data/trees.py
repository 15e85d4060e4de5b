"""Image trees: train/ and val/, each with a folder a class, as torchvision's ImageFolder lists them."""

from pathlib import Path

from sasa.data.errors import DataError
from sasa.data.images import Files


def read_trees(name: str, data_dir: Path) -> tuple[list[str], tuple[Files, list[int]], tuple[Files, list[int]]]:
    """Classes, and (files, labels) of data_dir/train and data_dir/val.

    Raises:
        DataError: a folder that is not there, or classes that differ.
    """
    if not data_dir.is_dir():
        raise DataError(f"{data_dir}: no such folder; --data-dir must hold train/ and val/, each with a folder a class")
    classes, train = _read_tree(data_dir, "train")
    val_classes, val = _read_tree(data_dir, "val")
    if classes != val_classes:
        odd = sorted(set(classes) ^ set(val_classes))
        raise DataError(f"{data_dir}: train/ and val/ have different class folders, {odd[0]} is in one of them only")
    if name == "IMAGENET" and len(classes) != 1000:
        raise DataError(f"{data_dir}: IMAGENET has 1000 class folders, here are {len(classes)}; try --dataset FOLDER")
    return classes, train, val


def _read_tree(data_dir: Path, split: str) -> tuple[list[str], tuple[Files, list[int]]]:
    from torchvision.datasets import ImageFolder

    root = data_dir / split
    try:
        tree = ImageFolder(str(root), allow_empty=True)
    except OSError as error:
        what = "no class folders in it" if root.is_dir() else "no such folder"
        raise DataError(f"{root}: {what}; put one folder of images for each class there") from error
    empty = sorted(set(range(len(tree.classes))) - set(tree.targets))
    if empty:
        raise DataError(f"{root / tree.classes[empty[0]]}: class folder without images; fill it or remove it")
    return tree.classes, (Files([path for path, _ in tree.samples], str(data_dir)), tree.targets)
