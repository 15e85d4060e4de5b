"""Training runs small enough for tests, in this process, and what two runs must have in common to be the same."""

import json
import os
import random
import signal
from pathlib import Path

import torch

import model
import preprocess
import train
from sasa.data import datasets as sources
from sasa.training import checkpoint
from sasa.training.cli import parse_command_line
from sasa.training.signals import STOP_SIGNALS

# A run of 2 epochs of 4 steps: everything that has a state is on, in-memory digits cut down to 32 + 8 images.
# Every regularisation on.
EVERYTHING = (
    "--drop-path 0.5 --repeats 2 --random-erase 0.5 --auto-augment trivial --loss bce --class-weights balanced "
)
EVERYTHING += "--optimizer lamb --min-lr 1e-4 --layer-decay 0.9 --mixup 0.2 --weight-decay 0.02 "
FLAGS = "--dataset DIGITS --device cpu --epochs 2 --batch-size 4 --accumulate 2 --optimizer adamw --ema 0.9 "
FLAGS += "--mixup 0.2 --holdout 8 --no-progress --save-every 1 --save-minutes 0 --stem --name run"


def small_network(monkeypatch):
    """ResNet26 with five narrow blocks instead of eight: what a test does with a network takes a fraction of the time.

    It has every kind of layer that the real one has: strides, shortcuts of both kinds, heads of width 8.
    """
    block, _, stages = model.VARIANTS["ResNet26"]
    monkeypatch.setitem(model.VARIANTS, "ResNet26", (block, (1, 2, 1, 1), stages))
    monkeypatch.setattr(model, "PLANES", (64, 64, 64, 64))


def few_digits(monkeypatch, train_images=40, test_images=12):
    """DIGITS with its first images only, and the small network."""
    small_network(monkeypatch)
    read = sources.SMALL_SETS["DIGITS"]

    def read_few(data_dir: Path):
        classes, (images, labels), (test, test_labels) = read(data_dir)
        kept, scored = slice(train_images), slice(test_images)
        return classes, (images[kept], labels[kept]), (test[scored], test_labels[scored])

    monkeypatch.setitem(preprocess.SMALL_SETS, "DIGITS", read_few)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # it guards against a power cut; test_checkpoint holds it


def run(output_dir: Path, *flags: str) -> int:
    """`python train.py` with these flags, in this process; the exit code. Signal handlers are put back."""
    torch.set_num_threads(1)  # these maps are too small for two
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        return train.main(parse_command_line(["--output-dir", str(output_dir), *flags]))
    except SystemExit as error:
        return error.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def identity(dataset: str, num_classes: int) -> checkpoint.Identity:
    """What a checkpoint of a run on so many classes says of its data: their names are "class 0", "class 1", ..."""
    info = preprocess.info_without_files(dataset, num_classes, 8)
    about = {"dataset": dataset, "class_names": list(info.class_names), "mean": list(info.mean), "std": list(info.std)}
    split = {"images": 1, "hash": "00", "classes": []}
    return checkpoint.Identity("00ff", about | {"train": split, "holdout": None, "test": split})


def scramble_generators() -> None:
    """What another process would have in its global generators."""
    torch.manual_seed(random.randrange(2**31))
    random.seed()


TIMES = ("images_per_s", "epoch_s", "peak_mem_mib")  # rows differ in these from run to run


def log_rows(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def state_without_times(folder: Path, name: str = "last.pt") -> dict:
    """A checkpoint's content but for seconds, paths and the run's id: equal for equal runs."""
    state = torch.load(folder / name, weights_only=True)
    state.pop("config")
    state.pop("run_id")
    if "progress" in state:
        progress = state["progress"]
        for key in ("seconds", "epoch_seconds"):
            progress.pop(key)
        progress["rows"] = [{k: v for k, v in row.items() if k not in TIMES} for row in progress["rows"]]
    return state


def differences(a, b, path="") -> list[str]:
    """The places where two nested states differ, bit for bit."""
    if isinstance(a, torch.Tensor):
        same = isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
        return [] if same else [path]
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted(a.keys() | b.keys(), key=str)
        return [d for key in keys for d in differences(a.get(key), b.get(key), f"{path}.{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{path}[{i}]")]
    return [] if a == b else [path]
