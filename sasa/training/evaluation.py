"""A network's score on a split: loss, top-1, top-5, per class, the confusion matrix and some wrong predictions.

Several ranks score their own part of the split each, and all get the whole score.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sasa.training import distributed


@dataclass
class Evaluation:
    """Scores over `images` images, each counted once; accuracies in percent."""

    images: int
    loss: float
    top1_pct: float
    top5_pct: float
    confusion: Tensor  # (classes, classes): row the label, column the prediction
    wrong: list[tuple[Tensor, int, int]] = field(default_factory=list)  # (3, H, W) as fed, label, prediction

    def per_class_pct(self) -> list[float | None]:
        """Accuracy of each class in percent; None for a class without images."""
        counts, right = self.confusion.sum(1).tolist(), self.confusion.diagonal().tolist()
        return [100 * r / n if n else None for r, n in zip(right, counts, strict=True)]


@torch.no_grad()
def evaluate(model: nn.Module, split, num_classes: int, batch_size: int, autocast, keep_wrong: int = 0) -> Evaluation:
    """Score `model` in eval mode (its mode is put back) on every image of `split` (see preprocess.py) once.

    On several ranks every one must call it, with the same weights and buffers.

    `autocast` makes the context to compute in. Top-5 is top-`num_classes` where there are fewer than five.

    Raises:
        RuntimeError: the number of images seen is not the split's, less the unreadable ones that it skipped.
    """
    training = model.training
    model.eval()
    own = distributed.together(lambda: _score(model, split, num_classes, batch_size, autocast, keep_wrong))
    model.train(training)
    parts = distributed.gather(own)
    seen, loss_sum, top5, confusion = (sum(part[i] for part in parts) for i in range(4))
    wrong = [item for part in parts for item in part[4]][:keep_wrong]
    expected = len(split) - sum(part[5] for part in parts)
    if seen != expected:
        raise RuntimeError(f"evaluated {seen} images of a split of {expected}")
    right = confusion.diagonal().sum().item()
    return Evaluation(seen, loss_sum / seen, 100 * right / seen, 100 * top5 / seen, confusion, wrong)


def _score(model: nn.Module, split, num_classes: int, batch_size: int, autocast, keep_wrong: int) -> tuple:
    """This rank's part: images, sum of losses, top-5, confusion matrix, wrong predictions, images that were skipped."""
    confusion = torch.zeros(num_classes * num_classes, dtype=torch.int64)
    loss_sum, top5, seen, wrong = 0.0, 0, 0, []
    for images, labels in split.eval_batches(batch_size, distributed.rank(), distributed.world_size()):
        with autocast():
            logits = model(images)
        logits = logits.float()
        best = logits.topk(min(5, num_classes)).indices  # (B, 5)
        loss_sum += F.cross_entropy(logits, labels, reduction="sum").item()
        top5 += (best == labels[:, None]).any(1).sum().item()
        predicted = best[:, 0]
        confusion += torch.bincount((labels * num_classes + predicted).cpu(), minlength=num_classes**2)
        seen += len(labels)
        for i in (predicted != labels).nonzero().flatten().tolist()[: keep_wrong - len(wrong)]:
            wrong.append((images[i].cpu(), labels[i].item(), predicted[i].item()))
    return seen, loss_sum, top5, confusion.view(num_classes, num_classes), wrong, len(split.bad_images)
