"""A network's score on a split: loss, top-1, top-5, per class, the confusion matrix and some wrong predictions.

Several ranks score their own part of the split each, and all get the whole score. Shapes: B images of a batch.
"""

import math
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sasa.data.errors import DataError
from sasa.training import distributed
from sasa.training.distributed import SharedError
from sasa.training.signals import StopRequest

EVAL_BATCH = 256
CONFUSION_CLASSES = 1000  # with more, right and wrong are counted by class: the matrix would be gigabytes


@dataclass
class Evaluation:
    """Scores over `images` images, each counted once; accuracies in percent."""

    images: int
    loss: float
    top1_pct: float
    top5_pct: float
    counts: Tensor  # (classes,) int64, images of each class
    right: Tensor  # (classes,) int64, those of them that were predicted
    confusion: Tensor | None = None  # (classes, classes) int64: row the label, column the prediction
    wrong: list[tuple[Tensor, int, int]] = field(default_factory=list)  # (3, H, W) as fed, label, prediction

    @classmethod
    def none(cls) -> "Evaluation":
        """Of an epoch that is not validated: no image was scored."""
        return cls(0, math.nan, math.nan, math.nan, torch.zeros(0), torch.zeros(0))

    def per_class_pct(self) -> list[float | None]:
        """Accuracy of each class in percent; None for a class without images."""
        pairs = zip(self.right.tolist(), self.counts.tolist(), strict=True)
        return [100 * right / count if count else None for right, count in pairs]

    def balanced_pct(self) -> float:
        """Balanced accuracy in percent: the mean of the accuracies of the classes that have images; NaN without any."""
        known = [accuracy for accuracy in self.per_class_pct() if accuracy is not None]
        return statistics.fmean(known) if known else math.nan


def evaluate(
    model: nn.Module,
    split,
    num_classes: int,
    batch_size: int,
    autocast: Callable[[], AbstractContextManager],
    keep_wrong: int = 0,
    stop: StopRequest | None = None,
) -> Evaluation | None:
    """Score `model` in eval mode (its mode is put back) on every image of `split` once.

    On several ranks every one must call it, with the same weights and buffers. Nothing waits for the device before the
    last batch, but while wrong predictions are collected.

    Args:
        autocast: makes the context to compute in.
        keep_wrong: how many wrong predictions to keep, the first ones.
        stop: ends the evaluation at the next batch once a signal was received on this rank.

    Returns:
        The score, top-5 being top-`num_classes` where there are fewer than five; None where a rank was stopped.

    Raises:
        SharedError: an image that cannot be read, unless such are skipped; no image that can.
        RuntimeError: the number of images seen is not the split's, less the unreadable ones that this pass skipped.
    """
    training = model.training
    model.eval()
    try:
        own = distributed.on_all_ranks(
            lambda: _score(model, split, num_classes, batch_size, autocast, keep_wrong, stop)
        )
    finally:
        model.train(training)
    parts = distributed.all_gather_object(own)
    if any(part is None for part in parts):
        return None
    seen, loss_sum, top5, counts, right = (sum(part[i] for part in parts) for i in range(5))
    expected = len(split) - sum(part.skipped for part in parts)
    if seen != expected:
        raise RuntimeError(f"evaluated {seen} images of a split of {expected}")
    if not seen:
        raise SharedError(DataError(f"cannot read any of the {len(split)} images to evaluate on"))
    confusion = None if own.confusion is None else sum(part.confusion for part in parts)
    wrong = [item for part in parts for item in part.wrong][:keep_wrong]
    top1 = right.sum().item()
    return Evaluation(seen, loss_sum / seen, 100 * top1 / seen, 100 * top5 / seen, counts, right, confusion, wrong)


class _Part(NamedTuple):
    """One rank's sums, on the CPU."""

    seen: int
    loss_sum: float
    top5: int
    counts: Tensor
    right: Tensor
    confusion: Tensor | None
    wrong: list[tuple[Tensor, int, int]]
    skipped: int  # unreadable images, in this pass: in the next one a file may be whole again


@torch.inference_mode()
def _score(model, split, num_classes, batch_size, autocast, keep_wrong, stop) -> _Part | None:
    """This rank's part of `evaluate`; None where it was stopped."""
    sums, wrong, seen = None, [], 0
    for images, labels in split.eval_batches(batch_size, distributed.rank(), distributed.world_size()):
        if stop is not None and stop.received is not None:
            return None
        with autocast():
            logits = model(images)
        logits = logits.float()  # (B, classes)
        sums = _Sums(num_classes, logits.device) if sums is None else sums
        best = logits.topk(min(5, num_classes)).indices  # (B, 5)
        sums.add(F.cross_entropy(logits, labels, reduction="sum"), best, labels)
        seen += len(labels)
        if len(wrong) < keep_wrong:
            for i in (best[:, 0] != labels).nonzero().flatten().tolist()[: keep_wrong - len(wrong)]:
                wrong.append((images[i].cpu(), labels[i].item(), best[i, 0].item()))
    sums = _Sums(num_classes, torch.device("cpu")) if sums is None else sums  # a rank without images
    loss, top5, counts, right, confusion = sums.on_the_host()
    return _Part(seen, loss, top5, counts, right, confusion, wrong, split.skipped)


class _Sums:
    """Running sums on the device, which nothing reads before the end."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.num_classes = num_classes
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.top5 = torch.zeros((), dtype=torch.int64, device=device)
        self.counts = torch.zeros(num_classes, dtype=torch.int64, device=device)
        self.right = torch.zeros_like(self.counts)
        keeps = num_classes <= CONFUSION_CLASSES
        self.confusion = torch.zeros(num_classes**2, dtype=torch.int64, device=device) if keeps else None

    def on_the_host(self) -> tuple[float, int, Tensor, Tensor, Tensor | None]:
        """Loss, top-5, counts (classes,), right (classes,) and confusion (classes, classes), by one copy."""
        confusion = [] if self.confusion is None else [self.confusion]
        parts = [self.loss.view(1), self.top5.view(1), self.counts, self.right, *confusion]
        whole = torch.cat([part.double() for part in parts]).cpu()  # fp64 holds every count below 2^53 exactly
        loss, top5, counts, right, *confusion = whole.split([len(part) for part in parts])
        matrix = confusion[0].long().view(self.num_classes, self.num_classes) if confusion else None
        return loss.item(), int(top5.item()), counts.long(), right.long(), matrix

    def add(self, loss: Tensor, best: Tensor, labels: Tensor) -> None:
        """loss: sum over the batch; best (B, 5) the predicted classes, the first one first; labels (B,)."""
        predicted, one = best[:, 0], torch.ones_like(labels)
        self.loss += loss
        self.top5 += (best == labels[:, None]).sum()
        self.counts.index_add_(0, labels, one)
        self.right.index_add_(0, labels, (predicted == labels).long())
        if self.confusion is not None:
            self.confusion.index_add_(0, labels * self.num_classes + predicted, one)
