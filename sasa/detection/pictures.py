"""Pictures of boxes: what is there and what was found."""

import torch
from torch import Tensor

from sasa.console import printable
from sasa.detection.coco import CocoSplit
from sasa.detection.data import Target

SHOWN_SCORE = 0.4  # of a detection in a picture
SIDE = 256  # pixels: smaller images are enlarged
TRUE_COLOUR, FOUND_COLOUR = "lime", "red"


def with_boxes(image: Tensor, boxes: Tensor, labels: list[str], colour: str) -> Tensor:
    """An image (3, H, W) in [0, 1] with boxes (n, 4) of x1, y1, x2, y2 and their labels: (3, H, W) in [0, 1]."""
    from torchvision.utils import draw_bounding_boxes

    if not len(boxes):
        return image
    return draw_bounding_boxes(image, boxes, labels, colour)


def enlarged(image: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """A small image (3, H, W) enlarged by a whole number, and its boxes with it."""
    factor = max(1, -(-SIDE // max(image.shape[-2:])))
    return image.repeat_interleave(factor, -1).repeat_interleave(factor, -2), boxes * factor


def sheet(images: list[Tensor]) -> Tensor:
    """Images of different sizes in rows of 4, padded right and below: (3, height, width) in [0, 1]."""
    from torchvision.utils import make_grid

    height, width = (max(image.shape[i] for image in images) for i in (-2, -1))
    padded = [
        torch.nn.functional.pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2])) for image in images
    ]
    return make_grid(padded, nrow=4, padding=2, pad_value=0.5)


def training_images(images: list[Tensor], targets: list[Target], names: tuple[str, ...]) -> Tensor:
    """A batch as it is trained on: (B, 3, H, W) in [0, 1], all images of one size."""
    drawn = []
    for image, target in zip(images, targets, strict=True):
        large, boxes = enlarged(image.cpu(), target["boxes"].cpu())
        drawn.append(
            with_boxes(large, boxes, [printable(names[label]) for label in target["labels"].tolist()], TRUE_COLOUR)
        )
    return torch.stack(drawn)


def detections(
    truth: CocoSplit, numbers: list[int], images: list[Tensor], targets: list[Target], found: dict[int, list[dict]]
) -> Tensor:
    """Images with what is there (green) and what was found with a score of at least `SHOWN_SCORE` (red).

    Args:
        found: by the number of an image, results as `evaluation.as_results` gives them.
    """
    names = dict(zip(truth.category_ids, truth.class_names, strict=True))
    drawn = []
    for number, image, target in zip(numbers, images, targets, strict=True):
        large, boxes = enlarged(image.cpu(), target["boxes"].cpu())
        large = with_boxes(large, boxes, [""] * len(boxes), TRUE_COLOUR)
        shown = [result for result in found[number] if result["score"] >= SHOWN_SCORE]
        corners = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in (r["bbox"] for r in shown)]).reshape(-1, 4)
        labels = [f"{printable(names[result['category_id']])} {result['score']:.2f}" for result in shown]
        drawn.append(with_boxes(large, enlarged(image, corners)[1], labels, FOUND_COLOUR))
    return sheet(drawn)
