"""Detections scored by COCO's own evaluator, pycocotools, an optional requirement."""

import contextlib
import io
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from config import ConfigError
from sasa.detection.coco import CocoSplit
from sasa.training import distributed
from sasa.training.signals import StopRequest

# The 12 figures of COCO's evaluator in its order: mean average precision over IoU 0.50 to 0.95, at 0.50, at 0.75, of
# small, medium and large objects; then mean recall with 1, 10 and 100 detections an image, and again by size.
FIGURES = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large",
           "recall_1", "recall_10", "recall_100", "recall_small", "recall_medium", "recall_large")  # fmt: skip


class MissingEvaluator(ConfigError):
    """pycocotools is not installed."""


def require_pycocotools() -> None:
    """Checks that COCO's evaluator can be imported.

    Raises:
        MissingEvaluator: it cannot; one line that names the package to install.
    """
    try:
        import pycocotools.cocoeval  # noqa: F401
    except ImportError as error:
        raise MissingEvaluator(
            f"COCO's own evaluator scores detections and cannot be imported ({error}): pip install pycocotools"
        ) from error


def as_results(split: CocoSplit, index: int, found: dict[str, Tensor]) -> list[dict[str, Any]]:
    """The detections of one image, as torchvision's detectors give them, as COCO's results."""
    boxes = found["boxes"].float().cpu()
    corners = torch.cat((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), dim=1)  # x, y, width, height
    image = int(split.image_ids[index])
    rows = zip(found["labels"].tolist(), found["scores"].tolist(), corners.tolist(), strict=True)
    return [
        {"image_id": image, "category_id": split.category_ids[label], "score": score, "bbox": box}
        for label, score, box in rows
    ]


def score(split: CocoSplit, results: list[dict[str, Any]]) -> dict[str, float | None]:
    """COCO's 12 figures, `FIGURES`, in percent; None where there is no object to find.

    Args:
        results: of every image of the split, as `as_results` gives them; an image may have none.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        truth = COCO()
        truth.dataset = split.document
        truth.createIndex()
        found = COCO()
        found.dataset = {key: split.document[key] for key in ("images", "categories")}
        # As COCO.loadRes does, which refuses an empty list.
        found.dataset["annotations"] = [
            result | {"id": i + 1, "area": result["bbox"][2] * result["bbox"][3], "iscrowd": 0}
            for i, result in enumerate(results)
        ]
        found.createIndex()
        evaluator = COCOeval(truth, found, "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return {
        name: None if value < 0 else 100 * float(value) for name, value in zip(FIGURES, evaluator.stats, strict=True)
    }


class Detections(NamedTuple):
    """COCO's figures over all ranks, in percent, and this rank's detections by the number of their image."""

    figures: dict[str, float | None]
    found: dict[int, list[dict[str, Any]]]


def evaluate(
    model: nn.Module,
    truth: CocoSplit,
    batches: Iterable[tuple[list[int], list[Tensor], Any]],
    autocast: Callable[[], AbstractContextManager],
    stop: StopRequest | None = None,
) -> Detections | None:
    """The model's score on a split, in eval mode (its mode is put back). On several ranks every one must call it.

    Args:
        batches: this rank's part: numbers of images and the images, (3, H, W) float32 in [0, 1] on the model's device.
        autocast: makes the context to compute in.
        stop: ends it at the next batch once a signal was received on this rank.

    Returns:
        None where a rank was stopped.

    Raises:
        RuntimeError: the images seen by all ranks are not the split's, each once.
    """
    training = model.training
    model.eval()
    try:
        own = distributed.on_all_ranks(lambda: _detect(model, truth, batches, autocast, stop))
    finally:
        model.train(training)
    parts = distributed.all_gather_object(own)
    if any(part is None for part in parts):
        return None
    everything = sorted(number for part in parts for number in part[0])
    if everything != list(range(len(truth))):
        raise RuntimeError(f"evaluated {len(everything)} images of a split of {len(truth)}")
    results = [result for _, found in parts for one in found.values() for result in one]
    return Detections(distributed.on_main_rank(lambda: score(truth, results)), own[1])


@torch.inference_mode()
def _detect(model, truth, batches, autocast, stop) -> tuple[list[int], dict[int, list[dict[str, Any]]]] | None:
    """This rank's images and what was found in each; None where it was stopped."""
    seen, found = [], {}
    for numbers, images, _ in batches:
        if stop is not None and stop.received is not None:
            return None
        with autocast():
            detections = model(images)
        seen += numbers
        for number, one in zip(numbers, detections, strict=True):
            found[number] = as_results(truth, number, one)
    return seen, found
