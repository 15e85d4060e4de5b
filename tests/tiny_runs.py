"""Runs of train.py with a network of 300 weights in place of ResNet26, for what is about the loop around it."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

import small_runs

BASE = "--dataset DIGITS --epochs 2 --batch-size 4 --name run --no-progress --device cpu --ema 0"


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the product catches it."""


def refused(capsys, output: Path, *flags: str) -> str:
    """The one line that such a run ends with."""
    capsys.readouterr()
    assert small_runs.run(output, *BASE.split(), *" ".join(flags).split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("train.py: error: ") and error.count("\n") == 1
    return error


class Tiny(nn.Sequential):
    """A convolution, perhaps a norm, and a classifier; `spoil` may change the logits of a training step."""

    norm = False

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)
        self.bn = nn.BatchNorm2d(8) if self.norm else nn.Identity()
        self.relu, self.pool = nn.ReLU(), nn.AdaptiveAvgPool2d(2)
        self.fc = nn.Linear(32, num_classes)
        self.calls = 0

    def forward(self, x):
        logits = self.fc(self.pool(self.relu(self.bn(self.conv(x)))).flatten(1))
        if self.training:
            self.calls += 1
            logits = self.spoil(logits, self.calls)
        return logits

    @staticmethod
    def spoil(logits, call):
        return logits


class TinyWithNorm(Tiny):
    norm = True


def go(output: Path, *flags: str) -> Path:
    """A run that ends well; its folder."""
    assert small_runs.run(output, *BASE.split(), *" ".join(flags).split()) == 0
    return output / "run"


def read(folder: Path, name: str = "summary.json") -> dict:
    return json.loads((folder / name).read_text())


def model_of(folder: Path, name: str = "last.pt") -> dict:
    return torch.load(folder / name, weights_only=True)["model"]


def evaluated(capsys, path: Path, *flags: str) -> tuple[float, float, float, float, list[tuple[float, int]]]:
    """Top-1, top-5, loss, balanced accuracy and (accuracy, images) of each class, as --evaluate prints them."""
    capsys.readouterr()
    assert small_runs.run(path.parent / "nowhere", "--evaluate", str(path), *flags) == 0
    out, error = capsys.readouterr()
    assert error == "" and not (path.parent / "nowhere").exists()
    *head, mean, last = out.splitlines()
    assert mean.startswith("balanced accuracy ")
    words = last.replace("%", " ").replace(",", " ").split()
    assert words[:2] == ["test", "top-1"] and words[3] == "top-5" and words[5] == "loss"
    rows = [line.split() for line in head if line.startswith("  ")]
    classes = [(0.0 if row[1] == "-%" or row[1] == "-" else float(row[1].rstrip("%")), int(row[-1])) for row in rows]
    return float(words[2]), float(words[4]), float(words[6]), float(mean.split()[2].rstrip("%,")), classes


def make_tree(root: Path, classes=("ant", "bee", "cow"), train_images=8, val_images=3) -> Path:
    """An image tree of real JPEGs, each class with its own colour."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train_images), ("val", val_images)):
        for i, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for j in range(count):
                pixels = rng.integers(0, 80, (20 + j, 26, 3), dtype=np.uint8)
                pixels[..., i % 3] += 150
                Image.fromarray(pixels).save(root / split / name / f"{j}.jpg", quality=90)
    return root


def tree_flags(root: Path, workers: int = 2) -> str:
    return f"--dataset FOLDER --data-dir {root} --img-size 16 --num-workers {workers} --optimizer adamw --lr 0.02"


def spoiled_loss(logits, call):
    return logits * float("nan") if call == 3 else logits


def spoiled_gradient(logits, call):
    if call == 3:
        logits.register_hook(lambda grad: grad * float("inf"))
    return logits
