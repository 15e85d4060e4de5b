"""COCO's figures on detections made by hand, crowds and empty images included."""

import importlib.util
import sys
from contextlib import nullcontext

import pytest
import torch
from test_coco import box, read

from sasa.detection import evaluation
from sasa.detection.coco import CocoSplit
from sasa.training.signals import StopRequest

needs_coco = pytest.mark.skipif(
    importlib.util.find_spec("pycocotools") is None, reason="pycocotools is not installed: no mAP"
)


def found(*rows):
    """Detections (label, score, x1, y1, x2, y2) as torchvision's detectors give them."""
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    return {"labels": table[:, 0].long(), "scores": table[:, 1], "boxes": table[:, 2:]}


def scored(split: CocoSplit, *images):
    return evaluation.score(
        split, [r for i, image in enumerate(images) for r in evaluation.as_results(split, i, image)]
    )


def test_results_have_coco_s_boxes_and_category_ids(tmp_path):
    split = read(tmp_path, [box(1)])
    (result,) = evaluation.as_results(split, 2, found((1, 0.5, 4, 6, 10, 30)))
    assert result == {"image_id": 3, "category_id": 7, "score": 0.5, "bbox": [4, 6, 6, 24]}


@needs_coco
def test_perfect_detections_score_100_and_none_score_0(tmp_path):
    split = read(tmp_path, [box(1, 1, 3), box(2, 2, 90, (5, 5, 10, 10), area=100)])
    figures = scored(split, found((0, 0.9, 1, 2, 11, 22)), found((2, 0.8, 5, 5, 15, 15)))
    assert all(figures[name] == pytest.approx(100) for name in ("map", "map_50", "map_75", "recall_100"))
    assert figures["map_small"] == pytest.approx(100) and figures["map_large"] is None  # there is no large object
    assert scored(split)["map"] == 0


@needs_coco
def test_the_right_box_of_the_wrong_class_or_image_is_wrong(tmp_path):
    split = read(tmp_path, [box(1)])
    assert scored(split, found((1, 0.9, 1, 2, 11, 22)))["map"] == 0
    assert scored(split, found(), found((0, 0.9, 1, 2, 11, 22)))["map"] == 0


@needs_coco
def test_precision_by_hand(tmp_path):
    """Overlap 0.8 counts up to IoU 0.80: 7 of 10 thresholds. A wrong detection above it halves the precision."""
    split = read(tmp_path, [box(1, bbox=(0, 0, 10, 20))])
    good, false = (0, 0.5, 0, 0, 10, 16), (0, 0.9, 20, 0, 30, 20)
    assert scored(split, found(good))["map"] == pytest.approx(70)
    assert scored(split, found(good, false))["map"] == pytest.approx(35)


@needs_coco
def test_images_without_objects_count_what_is_found_there_as_wrong(tmp_path):
    split = read(tmp_path, [box(1)])
    right = found((0, 0.5, 1, 2, 11, 22))
    assert scored(split, right, found((0, 0.9, 1, 2, 11, 22)))["map"] == pytest.approx(50)
    assert scored(split, right, found((0, 0.1, 1, 2, 11, 22)))["map"] == pytest.approx(100)  # ranked below


@needs_coco
def test_detections_inside_a_crowd_are_neither_right_nor_wrong(tmp_path):
    plain = [box(1), box(2, bbox=(20, 0, 20, 30), area=600)]
    crowd = [box(1), box(2, bbox=(20, 0, 20, 30), area=600, iscrowd=1)]
    detections = found((0, 0.5, 1, 2, 11, 22), (0, 0.9, 22, 2, 30, 10))
    assert scored(read(tmp_path, crowd), detections)["map"] == pytest.approx(100)
    assert scored(read(tmp_path, plain), detections)["map"] < 30


@needs_coco
def test_flat_boxes_are_objects_that_nobody_finds(tmp_path):
    split = read(tmp_path, [box(1), box(2, bbox=(5, 5, 0, 10), area=0)])
    figures = scored(split, found((0, 0.5, 1, 2, 11, 22)))
    assert figures["recall_100"] == pytest.approx(50)


@needs_coco
def test_a_set_without_objects_has_no_figure(tmp_path):
    split = read(tmp_path, [])
    assert set(scored(split, found((0, 0.5, 1, 2, 11, 22))).values()) == {None}
    assert list(scored(split)) == list(evaluation.FIGURES)


class Finder(torch.nn.Module):
    """Finds one box in each image, at the image's first pixel's brightness, if it is in eval mode."""

    def forward(self, images):
        assert not self.training
        return [found((0, float(image[0, 0, 0]), 1, 2, 11, 22)) for image in images]


@needs_coco
def test_evaluate_scores_every_image_once_and_puts_the_mode_back(tmp_path):
    split, model = read(tmp_path, [box(1), box(2, 2)]), Finder().train()
    images = [torch.full((3, 30, 40), value) for value in (0.9, 0.8, 0.1, 0.2)]
    batches = [([0, 1, 2], images[:3], None), ([3], images[3:], None)]
    done = evaluation.evaluate(model, split, batches, nullcontext)
    assert done.figures["map"] == pytest.approx(100) and model.training
    assert {number: found[0]["score"] for number, found in done.found.items()} == pytest.approx(
        {0: 0.9, 1: 0.8, 2: 0.1, 3: 0.2}
    )
    for wrong in (batches[:1], [*batches, ([0], images[:1], None)]):
        with pytest.raises(RuntimeError, match="images of a split of 4"):
            evaluation.evaluate(model, split, wrong, nullcontext)


def test_a_signal_ends_an_evaluation_at_the_next_batch(tmp_path):
    split, model, stop = read(tmp_path, [box(1)]), Finder().train(), StopRequest()

    def batches():
        yield [0], [torch.zeros(3, 30, 40)], None
        stop.received = "SIGTERM"
        yield [1], None, None

    assert evaluation.evaluate(model, split, batches(), nullcontext, stop) is None and model.training


def test_without_pycocotools_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools.cocoeval", None)
    with pytest.raises(evaluation.MissingEvaluator, match=r"pip install pycocotools$") as error:
        evaluation.require_pycocotools()
    assert "\n" not in str(error.value)
