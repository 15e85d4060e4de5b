"""One optimizer step over the global batch, and what keeps a step that is not finite from changing anything.

On a CPU a step's figures are read before its update. On CUDA the host would then wait in every step while the device
has nothing to do: there the update is queued at once, with a flag on the device that skips it, and the figures are read
when the next step is queued. The flag stays set until the host has read it, so that no later step updates either.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sasa.training import distributed
from sasa.training.optim import obeys_flag, set_rate
from sasa.training.run import Run
from sasa.training.saving import TrainingError

SKIPPED_STEPS = 10  # in a row, by fp16's scaler: then the run has diverged
Loss = Callable[[Run, Tensor, Tensor], tuple[Tensor, Tensor]]


class Requests(NamedTuple):
    """What is to be done after a step: one rank's wish, or what all ranks do."""

    stop: bool = False
    save: bool = False

    def __or__(self, other: "Requests") -> "Requests":
        return Requests(self.stop or other.stop, self.save or other.save)


class Step(NamedTuple):
    """A step that was done: its number from 0, mean loss, what the task counts (right predictions), images, rate, the
    gradient's norm, and the requests of any rank by its end."""

    index: int
    loss: float
    counted: float
    images: int
    lr: float
    grad_norm: float
    requests: Requests


class QueuedStep(NamedTuple):
    """A step whose figures may still be on their way to the host.

    Attributes:
        figures: (5,) loss, what is counted, stop and save requests, summed over the ranks, and the gradient's norm.
        arrived: recorded behind their copy; None where there was none.
        is_guarded: its update was queued before its figures were read.
    """

    index: int
    images: int
    lr: float
    figures: Tensor
    arrived: torch.cuda.Event | None
    is_guarded: bool

    def read(self) -> Step:
        """Wait for the figures: the step's one wait for the device."""
        if self.arrived is not None:
            self.arrived.synchronize()
        loss, counted, stops, saves, norm = self.figures.tolist()
        requests = Requests(stops > 0, saves > 0)
        return Step(self.index, loss / distributed.world_size(), counted, self.images, self.lr, norm, requests)


def reads_late(run: Run) -> bool:
    """Whether a step's figures are read after its update is queued: on CUDA, by an optimizer that obeys the flag."""
    return run.device.type != "cpu" and obeys_flag(run.optimizer)


def train_step(
    run: Run, pairs: Iterator[tuple], index: int, wishes: Callable[[], Requests], loss_of: Loss
) -> QueuedStep:
    """Step `index` of the run over the pairs, this rank's micro-batches.

    The gradient and every figure are of the global batch: the mean over its images, whatever rank has how many. A step
    whose loss or gradient is not finite, on whatever rank, updates nothing on any: `check_finite` ends the run then.

    Args:
        wishes: this rank's requests, as late as they can be known.
        loss_of: the mean loss of a micro-batch, and what is counted of it, summed over its images.
    """
    rate = run.rate(index)
    set_rate(run.optimizer, rate)
    # The average's first update copies, which no flag can soften.
    is_guarded = reads_late(run) and (run.ema is None or run.ema.has_begun)
    run.guard.keep()
    try:
        loss, counted = accumulate_gradients(run, pairs, index, loss_of)
    except Exception:  # a batch that did not come: the state is that before the step
        run.guard.put_back()
        raise
    flags = [loss.new_full((), float(flag)) for flag in wishes()]  # filled on the device: no copy
    figures = distributed.all_reduce_sum(torch.stack((loss, counted, *flags)))
    if run.scaler is not None:
        if is_guarded:
            run.guard.set(figures[0])
            poison(run, run.guard.flag)
        run.scaler.unscale_(run.optimizer)
    parameters = [p for p in run.model.parameters() if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(parameters, run.config.clip_grad or math.inf)  # the same on all ranks
    figures = torch.cat((figures, norm.view(1)))
    if is_guarded:
        if run.scaler is None:
            run.guard.set(figures[::4])  # loss and norm
        update(run, run.guard.flag)
    figures, arrived = to_host(figures)
    queued = QueuedStep(index, run.global_batch, rate, figures, arrived, is_guarded)
    if not is_guarded:
        step = queued.read()
        if what_is_wrong(step, run.scaler is not None, run.progress.skipped) is None:
            update(run, None)
        else:
            run.guard.put_back()
    return queued


def accumulate_gradients(run: Run, pairs: Iterator[tuple], index: int, loss_of: Loss) -> tuple[Tensor, Tensor]:
    """Forward and backward of every micro-batch of this rank; its share of the mean loss, and what is counted."""
    run.optimizer.zero_grad(set_to_none=True)
    loss = counted = torch.zeros((), device=run.device)
    ranks, total, count = distributed.world_size(), run.global_batch, run.micro_batches
    for i, (images, targets) in enumerate(pairs):
        with no_sync(run.network) if i + 1 < count else nullcontext():
            run.draw_drop_path(index, i)
            part, ours = loss_of(run, images, targets)
            part = part / (total / (len(images) * ranks))  # DDP divides by the ranks
            (part if run.scaler is None else run.scaler.scale(part)).backward()
        loss = loss + part.detach()
        counted = counted + ours
    return loss, counted


def no_sync(network: nn.Module):
    """The context of a micro-batch before the step's last: DDP sums the gradients over the ranks once a step."""
    return network.no_sync() if distributed.is_distributed() else nullcontext()


def update(run: Run, flag: Tensor | None) -> None:
    """Optimizer, scaler and moving average; nothing of it changes anything where `flag` is 1 (None: it is 0)."""
    if run.scaler is None:
        if flag is not None:
            run.optimizer.found_inf = flag
        run.optimizer.step()
    else:
        run.scaler.step(run.optimizer)
        run.scaler.update()
    if flag is not None:
        run.guard.put_back(flag)
    if run.ema is not None:
        run.ema.update_parameters(run.model, flag)


def poison(run: Run, flag: Tensor) -> None:
    """NaN in a gradient where `flag` is 1: what fp16's scaler skips a step by."""
    gradient = next(p.grad for p in run.model.parameters() if p.grad is not None)
    gradient.add_(torch.where(flag > 0, math.nan, 0.0).to(gradient.dtype))


def to_host(figures: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """The figures on their way to the host, without a wait, and the event behind their copy."""
    if figures.device.type == "cpu":
        return figures, None
    copied, arrived = figures.to("cpu", non_blocking=True), torch.cuda.Event()
    arrived.record()
    return copied, arrived


def what_is_wrong(step: Step, has_scaler: bool, skipped: int) -> str | None:
    """Why a step must not update anything; None where it may.

    fp16's scaler meets an infinite gradient now and then, lowers its scale and skips the step: only many in a row, or a
    loss that is not finite, stop such a run.

    Args:
        skipped: how many steps before this one it has skipped in a row.
    """
    if not math.isfinite(step.loss):
        return f"the loss is {step.loss}"
    if not math.isfinite(step.grad_norm) and (not has_scaler or skipped + 1 >= SKIPPED_STEPS):
        return f"the gradient's norm is {step.grad_norm}"
    return None


def check_finite(run: Run, step: Step) -> int:
    """How many steps fp16's scaler has skipped in a row by this one's end.

    Raises:
        TrainingError: on every rank, where the step's loss or gradient was not finite: it has updated nothing.
    """
    progress, has_scaler = run.progress, run.scaler is not None
    what = what_is_wrong(step, has_scaler, progress.skipped)
    if what is not None:
        last = "none" if progress.last_loss is None else f"{progress.last_loss:.4f}"
        raise TrainingError(
            f"{what} at step {step.index + 1}, epoch {progress.epoch + 1}, rate {step.lr:.3g}; "
            f"last finite loss {last}. Nothing was updated, the checkpoints of {run.folder} are as they were. "
            "Try a lower --lr, a longer --warmup-epochs, --clip-grad 1, or --amp off"
        )
    return progress.skipped + 1 if has_scaler and not math.isfinite(step.grad_norm) else 0
