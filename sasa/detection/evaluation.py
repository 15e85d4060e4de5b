"""Detections scored by COCO's own evaluator, pycocotools, an optional requirement."""

import contextlib
import io
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from sasa.detection.coco import CocoSplit
from sasa.training import distributed

# The 12 figures of COCO's evaluator in its order: mean average precision over IoU 0.50 to 0.95, at 0.50, at 0.75, of
# small, medium and large objects; then mean recall with 1, 10 and 100 detections an image, and again by size.
FIGURES = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large",
           "recall_1", "recall_10", "recall_100", "recall_small", "recall_medium", "recall_large")  # fmt: skip


class MissingEvaluator(Exception):
    """pycocotools is not there."""


def require_pycocotools() -> None:
    """Raises MissingEvaluator, in one line that says what to install."""
    try:
        import pycocotools.cocoeval  # noqa: F401
    except ImportError as error:
        raise MissingEvaluator(
            f"detections are scored by COCO's own evaluator, which is not there ({error}): pip install pycocotools"
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


@torch.inference_mode()
def evaluate(
    model, split: CocoSplit, batches: Iterable[tuple[list[int], list[Tensor]]], autocast
) -> tuple[dict[str, float | None], list[dict[str, Any]]]:
    """The model's score on a split, in eval mode (its mode is put back), and this rank's detections.

    Args:
        batches: this rank's part: numbers of images and the images, (3, H, W) float32 in [0, 1] on the model's device.
        autocast: makes the context to compute in.

    Raises:
        RuntimeError: the images seen by all ranks are not the split's, each once.
    """
    training = model.training
    model.eval()

    def own() -> tuple[list[int], list[dict[str, Any]]]:
        seen, results = [], []
        for numbers, images in batches:
            with autocast():
                found = model(images)
            seen += numbers
            for number, one in zip(numbers, found, strict=True):
                results += as_results(split, number, one)
        return seen, results

    seen, results = distributed.on_all_ranks(own)
    model.train(training)
    parts = distributed.all_gather_object((seen, results))
    everything = sorted(number for part in parts for number in part[0])
    if everything != list(range(len(split))):
        raise RuntimeError(f"evaluated {len(everything)} images of a split of {len(split)}")
    figures = distributed.on_main_rank(lambda: score(split, [result for part in parts for result in part[1]]))
    return figures, results
