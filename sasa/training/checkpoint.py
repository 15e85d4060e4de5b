"""What a run's state is, and how it reaches the disk whole.

Files of a run's folder: last.pt (the newest whole state), previous.pt (the whole one before it), best.pt (weights to
keep). Each is written to a temporary file in the same folder, flushed to the disk and moved over the old one, so that a
name always means a whole file. Reading verifies every member's CRC first (torch's own reader does not), then loads
with weights_only=True: nothing is ever unpickled.
"""

import dataclasses
import os
import random
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config
from sasa.console import one_line, printable
from sasa.files import replacing
from sasa.training import distributed, format2
from sasa.training.files import LAST, PREVIOUS
from sasa.training.validation import Invalid, check_archive, check_state

FORMAT = 3  # 3: the whole configuration, what the recipe provided of it, the run's id and the data's identity
READ_ONLY_FORMAT = 2  # weights can be read from it, a run cannot be resumed from it


class CheckpointError(Exception):
    """A checkpoint that cannot be read or does not fit; the message says which and why, in one line."""


@dataclass
class Progress:
    """Where a run stands: the next epoch and batch, what the open epoch has summed up so far, and its history."""

    epoch: int = 0  # the epoch that the next step belongs to
    batch: int = 0  # steps of that epoch already done
    step: int = 0  # steps done in all
    loss_sum: float = 0.0  # of the open epoch, over its images
    correct: float = 0.0
    images: int = 0
    epoch_seconds: float = 0.0
    seconds: float = 0.0  # trained, over all resumes
    global_batch: int = 0  # images of a step over all ranks: of the run, not of the ranks that happen to do it
    skipped: int = 0  # steps that fp16's scaler has skipped in a row
    last_loss: float | None = None  # the last finite one
    figures: dict[str, float] = field(default_factory=dict)  # of the last step, as TensorBoard has them
    best_top1: float | None = None
    best_epoch: int | None = None
    data_changes: list[str] = field(default_factory=list)  # of the data set, with which a resume went on all the same
    rows: list[dict[str, Any]] = field(default_factory=list)  # of log.jsonl: the file is rebuilt from them on resume

    def add(self, loss: float, correct: float, images: int, seconds: float) -> None:
        """A step was done: its mean loss over so many images, the right predictions among them, and its time."""
        self.batch += 1
        self.step += 1
        self.last_loss = loss
        self.loss_sum += loss * images
        self.correct += correct
        self.images += images
        self.seconds += seconds
        self.epoch_seconds += seconds

    def close_epoch(self, row: dict[str, Any]) -> None:
        """The open epoch ends, with its row of log.jsonl; the next one begins."""
        self.rows.append(row)
        self.open_epoch()

    def open_epoch(self) -> None:
        """The next epoch begins."""
        self.epoch += 1
        self.batch, self.images, self.loss_sum, self.correct, self.epoch_seconds = 0, 0, 0.0, 0.0, 0.0


def generator_states(device: torch.device) -> dict[str, Any]:
    """The state of the global generators that a run on this device can draw from: Python's, torch's, the device's.

    Not of other GPUs: how many a process sees is no part of the run.
    """
    version, numbers, gauss = random.getstate()
    cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return {"python": [version, list(numbers), gauss], "torch": torch.get_rng_state(), "cuda": cuda}


def set_generator_states(states: dict[str, Any], device: torch.device) -> None:
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and states["cuda"]:
        saved = states["cuda"]  # older files have one of each GPU
        torch.cuda.set_rng_state(saved[(device.index or 0) % len(saved)], device)


class Identity(NamedTuple):
    """What a checkpoint says of its run, beside the configuration."""

    run_id: str
    data: dict[str, Any]  # preprocess.data_identity
    init_from: str | None = None  # the checkpoint whose weights it began with, as --init-from named it


def run_state(
    config: Config,
    identity: Identity,
    recipe: dict[str, Any],
    model: nn.Module,
    optimizer,
    scaler,
    ema,
    best: dict[str, Tensor] | None,
    progress: Progress,
) -> dict[str, Any]:
    """Everything that a run needs to go on exactly; tensors, numbers, strings, lists and dicts only.

    Called on every rank, as each has its own generators; the rest is the same on all, or the caller's own times.

    Args:
        recipe: what the recipe provided of the configuration; an edited one is noticed by it.
        best: the weights selected so far, or None: a file of its own could be of another moment than this one.
    """
    return _header(config, identity, "run") | {
        "recipe": recipe,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else None,
        "ema": ema.state_dict() if ema is not None else None,
        "best": best,
        "progress": dataclasses.asdict(progress),
        "generators": distributed.all_gather_object(generator_states(next(model.parameters()).device)),
    }


def weights_state(
    config: Config, identity: Identity, weights: dict[str, Tensor], epoch: int, step: int, about: str
) -> dict[str, Any]:
    """Weights to keep: best.pt. `about` tells how they were selected."""
    more = {"model": weights, "epoch": epoch, "step": step, "selected": about}
    return _header(config, identity, "weights") | more


def _header(config: Config, identity: Identity, kind: str) -> dict[str, Any]:
    about = {"format": FORMAT, "kind": kind, "torch": str(torch.__version__), "config": config.to_dict()}
    return about | identity._asdict()


def all_finite(states: Iterable[dict[str, Tensor]]) -> bool:
    """Whether every number of these weights is finite."""
    finite = [value.isfinite().all() for state in states for value in state.values() if value.is_floating_point()]
    return not finite or bool(torch.stack([one.cpu() for one in finite]).all())


def restore(state: dict[str, Any], model: nn.Module, optimizer, scaler, ema) -> Progress:
    """Put a run's state back, strictly; generators last, since building things draws from them.

    Each rank gets its own generators; a rank that the saved run had not gets another's.

    Raises:
        CheckpointError: the state is of another network, or lacks a part.
    """
    load_weights(model, state["model"])
    if state["best"] is not None:
        _check_fit(model, state["best"])
    try:
        optimizer.load_state_dict(state["optimizer"])
        for name, part in (("scaler", scaler), ("ema", ema)):
            if (part is None) != (state[name] is None):
                raise CheckpointError(f"the checkpoint {'has' if part is None else 'lacks'} a state of: {name}")
            if part is not None:
                part.load_state_dict(state[name])
        progress = Progress(**state["progress"])
        generators = state["generators"][distributed.rank() % len(state["generators"])]
        set_generator_states(generators, next(model.parameters()).device)
    except CheckpointError:
        raise
    except Exception as error:  # torch's own parts check little of what they are given
        raise CheckpointError(f"the checkpoint does not fit this version: {one_line(error, 200)}") from error
    return progress


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Strict `load_state_dict` whose error names what differs.

    Raises:
        CheckpointError: missing or unexpected names, or other shapes.
    """
    _check_fit(model, weights)
    model.load_state_dict(weights)


def _check_fit(model: nn.Module, weights: dict[str, Tensor]) -> None:
    differences = list(weight_differences(model.state_dict(), weights))
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise CheckpointError(f"the checkpoint is of another network: {'; '.join(differences[:3])}{more}")


def weight_differences(wanted: dict[str, Tensor], got: dict[str, Tensor]) -> Iterator[str]:
    for name in wanted.keys() - got.keys():
        yield f"{name} is missing"
    for name in got.keys() - wanted.keys():
        yield f"{printable(name[:100])} is not in this network"
    for name in wanted.keys() & got.keys():
        if wanted[name].shape != got[name].shape:
            yield f"{name} is {tuple(got[name].shape)} there and {tuple(wanted[name].shape)} here"


# ---- on the disk ----------------------------------------------------------------------------------------------------


def save(state: dict[str, Any], folder: Path, name: str = LAST) -> None:
    """Write `state` as folder/name, whole or not at all; an old last.pt becomes previous.pt.

    Raises:
        OSError: the disk is full or refuses; the old files are as they were.
    """
    path = folder / name
    try:
        with replacing(path) as file:
            torch.save(state, file)
            if name == LAST and path.exists():
                file.flush()
                os.fsync(file.fileno())
                os.replace(path, folder / PREVIOUS)
    except (OSError, RuntimeError) as error:  # torch's writer turns a failed write into a RuntimeError
        raise OSError(f"{path} was not written: {one_line(error, 200)}") from error


def load(path: Path) -> dict[str, Any]:
    """A checkpoint, verified, on the CPU.

    Raises:
        CheckpointError: missing, truncated, corrupted, of another format, or not a checkpoint.
    """
    name = printable(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{name}: is {'a folder' if path.is_dir() else 'no regular file'}, not a checkpoint")
        check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        check_state(state, FORMAT, READ_ONLY_FORMAT)
        if state["format"] == READ_ONLY_FORMAT:
            state["config"] = format2.complete(state["config"])
    except FileNotFoundError:
        raise CheckpointError(f"{name}: no such file") from None
    except Invalid as error:
        raise CheckpointError(f"{name}: {error}") from error
    except CheckpointError:
        raise
    except Exception as error:  # whatever damaged bytes make the readers raise, it is a damaged file
        what = one_line(error, 200)
        raise CheckpointError(f"{name}: truncated, corrupted or not a checkpoint ({what})") from error
    return state


def newest(folder: Path) -> tuple[dict[str, Any], Path, list[str]] | None:
    """The newest whole run state of a folder, its path, and what was wrong with the newer ones; None: none was written.

    Raises:
        CheckpointError: there are files, but none is whole.
    """
    problems = []
    for name in (LAST, PREVIOUS):
        path = folder / name
        if not os.path.lexists(path):  # a link to nowhere is a file that is there and not whole
            continue
        try:
            return load_run(path), path, problems
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError("; ".join(problems))
    return None


def load_run(path: Path) -> dict[str, Any]:
    """A checkpoint that a run can go on from.

    Raises:
        CheckpointError: as `load`, or the file holds weights only.
    """
    state = load(path)
    if state["kind"] != "run":
        raise CheckpointError(f"{path}: holds weights only, a run cannot go on from it; --init-from can use it")
    if state["format"] != FORMAT:
        raise CheckpointError(
            f"{path}: a run of format {state['format']} cannot go on under this version, whose format is {FORMAT}; "
            "--evaluate and --init-from can use it"
        )
    return state


# ---- weights from elsewhere -----------------------------------------------------------------------------------------


def transfer_weights(model: nn.Module, weights: dict[str, Tensor]) -> list[str]:
    """Take what fits of another network's weights; returns one line for each thing that was not taken as it is.

    Relative embeddings of another window side are interpolated linearly over the window's extent. A classifier for
    another number of classes stays new.

    Raises:
        CheckpointError: nothing fits.
    """
    own, taken, lines = model.state_dict(), {}, []
    for name, target in own.items():
        source = weights.get(name)
        if source is None:
            lines.append(f"{name}: not in the checkpoint, stays new")
        elif source.shape == target.shape:
            taken[name] = source
        elif name.rsplit(".", 1)[-1] in ("rel_row", "rel_col") and source.shape[:-1] == target.shape[:-1]:
            resized = F.interpolate(source.float(), size=target.shape[-1], mode="linear", align_corners=True)
            taken[name] = resized.to(target.dtype)
            lines.append(f"{name}: interpolated from {source.shape[-1]} to {target.shape[-1]} offsets")
        else:
            lines.append(f"{name}: {tuple(source.shape)} there, {tuple(target.shape)} here, stays new")
    lines += [f"{name}: not in this network, left" for name in weights.keys() - own.keys()]
    if not any(own[name].ndim > 1 for name in taken):
        raise CheckpointError("no weight of the checkpoint fits this network")
    model.load_state_dict(own | taken)
    return sorted(lines)


def weights_of(state: dict[str, Any]) -> dict[str, Tensor]:
    """The weights to evaluate: the moving average where the run keeps one, else the network's own."""
    if state["kind"] != "run" or state["ema"] is None:
        return state["model"]
    prefix = "module."  # torch's AveragedModel
    return {name.removeprefix(prefix): value for name, value in state["ema"].items() if name.startswith(prefix)}


def classes_of(weights: dict[str, Tensor]) -> int:
    """How many classes these weights tell apart. Raises CheckpointError where they lack a classifier."""
    weight = weights.get("fc.weight")
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise CheckpointError("the checkpoint is of another network: fc.weight is missing")
    return weight.shape[0]
