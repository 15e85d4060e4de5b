"""Whether a file is a checkpoint: every field of it is checked as a command line's values are, before it is used.

A file may come from anywhere. Reading it never runs code, takes no more memory than the file is long, and whatever is
wrong with it is one line.
"""

import math
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sasa.settings import MAX_INT

PICKLE_LIMIT = 256 * 2**20  # bytes of the member that is not tensors


class Invalid(Exception):
    """What is wrong, without the file's name."""


def check_archive(path: Path) -> None:
    """Every member stored as it is, within the file's size, and with its CRC: a flipped bit would load silently.

    Raises:
        Invalid, OSError, zipfile.BadZipFile: it is not so.
    """
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if len({member.filename for member in members}) < len(members):  # of which zipfile verifies the last alone
            raise Invalid("two members of the same name")
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise Invalid("a compressed member, which no checkpoint has")
        if sum(member.file_size for member in members) > path.stat().st_size:
            raise Invalid("its members are longer than the file")
        if any(member.file_size > PICKLE_LIMIT for member in members if member.filename.endswith(".pkl")):
            raise Invalid("its description of the state is too long")
        damaged = archive.testzip()
    if damaged is not None:
        raise Invalid(f"wrong checksum of {damaged}")


def check_state(state: Any, format_number: int, older: int) -> None:
    """The form of a checkpoint of these two formats; its configuration is checked where it becomes a Config.

    Raises:
        Invalid: a field is missing, or is what no run writes.
    """
    if not isinstance(state, dict) or "format" not in state:
        raise Invalid("not a checkpoint of train.py")
    if type(state["format"]) is not int or state["format"] not in (older, format_number):
        raise Invalid(f"format {str(state['format'])[:20]}, this version reads formats {older} and {format_number}")
    kind = state.get("kind")
    if kind not in ("run", "weights"):
        raise Invalid("lacks its kind")
    now = state["format"] == format_number
    wanted = ["torch", "config", "model", *(["run_id", "data"] if now else [])]
    if kind == "run":
        wanted += ["optimizer", "scaler", "ema", "best", "progress", "generators", *(["recipe"] if now else [])]
    missing = [key for key in wanted if key not in state]
    if missing:
        raise Invalid(f"lacks {', '.join(missing)}")
    _want(isinstance(state["torch"], str), "torch")
    _want(isinstance(state["config"], dict) and all(isinstance(key, str) for key in state["config"]), "config")
    _check_tensors(state["model"], "model")
    if now:
        _want(isinstance(state["run_id"], str), "run_id")
        _want(isinstance(state.get("init_from"), str | None), "init_from")
        _check_data(state["data"])
    if kind == "run":
        for name in ("ema", "best"):
            if state[name] is not None:
                _check_tensors(state[name], name)
        _want(isinstance(state["optimizer"], dict), "optimizer")
        _want(state["scaler"] is None or isinstance(state["scaler"], dict), "scaler")
        _check_progress(state["progress"])
        _check_generators(state["generators"])
        if now:
            _want(isinstance(state["recipe"], dict) and all(isinstance(key, str) for key in state["recipe"]), "recipe")


def _want(holds: bool, name: str) -> None:
    if not holds:
        raise Invalid(f"its {name} is not what a run writes")


def _check_tensors(values: Any, name: str) -> None:
    """Names of parameters and plain tensors that hold as many numbers as they show."""
    _want(isinstance(values, dict) and bool(values), name)
    for key, value in values.items():
        _want(isinstance(key, str) and isinstance(value, Tensor), name)
        _want(value.device.type == "cpu" and value.layout is torch.strided, name)
        _want(value.numel() * value.element_size() <= value.untyped_storage().nbytes(), name)


def _check_data(data: Any) -> None:
    _want(isinstance(data, dict), "data")
    _want(data.keys() >= {"dataset", "class_names", "mean", "std", "train", "holdout", "test"}, "data")
    names = data["class_names"]
    _want(isinstance(data["dataset"], str) and isinstance(names, list), "data")
    _want(bool(names) and all(isinstance(name, str) for name in names), "data")
    for key in ("mean", "std"):
        numbers = data[key]
        _want(isinstance(numbers, list) and len(numbers) == 3, "data")
        _want(all(isinstance(number, float) and math.isfinite(number) for number in numbers), "data")
    for key in ("train", "holdout", "test"):
        split = data[key]
        if split is None and key == "holdout":
            continue
        _want(isinstance(split, dict) and split.keys() >= {"images", "hash", "classes"}, "data")
        _want(type(split["images"]) is int and isinstance(split["hash"], str), "data")
        _want(isinstance(split["classes"], list), "data")
        for entry in split["classes"]:
            _want(isinstance(entry, list | tuple) and len(entry) == 2 and type(entry[0]) is int, "data")


def _check_progress(progress: Any) -> None:
    _want(isinstance(progress, dict), "progress")
    counts = ("epoch", "batch", "step", "images", "global_batch", "skipped")
    for key in counts:
        value = progress.get(key)
        limit = MAX_INT if key != "global_batch" else 2**62
        _want(type(value) is int and 0 <= value <= limit, f"progress ({key})")
    _want(progress["global_batch"] > 0, "progress (global_batch)")
    for key in ("loss_sum", "correct", "seconds", "epoch_seconds"):
        value = progress.get(key)
        _want(isinstance(value, int | float) and math.isfinite(value), f"progress ({key})")
    is_open = progress["batch"] > 0  # then its figures are divided by images and seconds
    _want(not is_open or (progress["images"] > 0 and progress["epoch_seconds"] > 0), "progress (open epoch)")
    for key in ("best_top1", "last_loss"):
        value = progress.get(key)
        _want(value is None or (isinstance(value, int | float) and math.isfinite(value)), f"progress ({key})")
    value = progress.get("best_epoch")
    _want(value is None or type(value) is int, "progress (best_epoch)")
    changes = progress.get("data_changes", [])
    _want(isinstance(changes, list) and all(isinstance(line, str) for line in changes), "progress (data_changes)")
    figures = progress.get("figures", {})
    _want(isinstance(figures, dict) and all(isinstance(v, int | float) for v in figures.values()), "progress (figures)")
    rows = progress.get("rows")
    _want(isinstance(rows, list) and all(isinstance(row, dict) for row in rows), "progress (rows)")


def _check_generators(generators: Any) -> None:
    _want(isinstance(generators, list) and bool(generators), "generators")
    for states in generators:
        _want(isinstance(states, dict) and states.keys() == {"python", "torch", "cuda"}, "generators")
        _want(isinstance(states["torch"], Tensor) and isinstance(states["cuda"], list), "generators")
        python = states["python"]
        _want(isinstance(python, list | tuple) and len(python) == 3 and isinstance(python[1], list), "generators")
