"""What a kind of training does its own way; the loop around it is one (train.py)."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from sasa.training.checkpoint import Progress
from sasa.training.cli import Command
from sasa.training.lock import FolderLock
from sasa.training.resume import RunSpec
from sasa.training.run import Run
from sasa.training.step import Loss, Step


class Validation(NamedTuple):
    """What the validation at an epoch's end found out.

    Attributes:
        result: the scores, for the run's end; of the task's own kind.
        row: the epoch's row of log.jsonl.
        selects: the accuracy in percent by which held-out images select these weights as the best so far, else None.
    """

    result: Any
    row: dict[str, Any]
    selects: float | None = None


class Task(NamedTuple):
    """A kind of training: train.py's `CLASSIFICATION`, or detection.

    Attributes:
        prog: the command, in messages.
        specify, set_up, describe: from the command to a run that is ready.
        initial_weights: the weights of an --init-from checkpoint by the names that the network has.
        preview: pictures (B, 3, H, W) in [0, 1] of a first batch.
        loss: the mean loss of a micro-batch, and what is counted of it, summed over its images.
        figures: of a step, for TensorBoard. bar: of the open epoch, for the progress bar.
        validate: (run, monitor, stop, is_last) -> what the epoch's end found out; None after a signal.
        finish: (run, monitor, saver, stop, result) -> whether the run's last files are written; False after a signal.
            `result` is that of the last validation in this process, or None.
        evaluate: --evaluate; returns the exit code.
    """

    prog: str
    specify: Callable[[Command, FolderLock], RunSpec]
    set_up: Callable[[RunSpec, Callable[[], bool]], Run]
    describe: Callable[[Run], None]
    initial_weights: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    preview: Callable[..., Tensor]
    loss: Loss
    figures: Callable[[Step], dict[str, float]]
    bar: Callable[[Progress], dict[str, str]]
    validate: Callable[..., Validation | None]
    finish: Callable[..., bool]
    evaluate: Callable[[Command], int]
