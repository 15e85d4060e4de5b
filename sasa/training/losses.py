"""The losses of a classification run, as means over the images of a batch.

Shapes: B images of a batch, C classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def mean_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    kind: str = "ce",
    label_smoothing: float = 0.0,
    threshold: float = 0.0,
    weights: Tensor | None = None,
) -> Tensor:
    """The mean loss of logits (B, C) with labels (B,) or, where images are mixed, soft targets (B, C).

    Every image counts the same whatever batch it is in: the sum over classes is weighted, not the mean over images, so
    that the gradient of a step does not depend on how its images are dealt to ranks and pieces.

    Args:
        kind: ce, cross-entropy of the softmax; bce, binary cross-entropy of each class by itself, its mean over classes
            too.
        threshold: of bce: the classes of a mixed image whose share is above it are present.
        weights: (C,), a factor of each class's term; None: all are 1.
    """
    if kind == "bce":
        present = _one_hot(logits, targets) if targets.ndim == 1 else (targets > threshold).to(logits.dtype)
        wanted = present * (1 - label_smoothing) + label_smoothing / logits.shape[1]
        return F.binary_cross_entropy_with_logits(logits, wanted, weight=weights)
    if weights is None:
        return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
    total = F.cross_entropy(logits, targets, weights, label_smoothing=label_smoothing, reduction="sum")
    return total / len(logits)


def _one_hot(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, C); not F.one_hot, which on the CPU reads the labels' range."""
    return (labels[:, None] == torch.arange(logits.shape[1], device=labels.device)).to(logits.dtype)
