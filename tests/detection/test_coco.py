"""COCO annotations: what is read, what is dropped as COCO does, and what is refused in one line."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from preprocess import DataError
from sasa.detection.coco import read_split, relabelled

# 4 images of 40 x 30, categories 3, 7 and 90, boxes in rising order of images.
CATEGORIES = [{"id": 90, "name": "c"}, {"id": 3, "name": "a"}, {"id": 7, "name": "b"}]


def box(number, image=1, category=3, bbox=(1, 2, 10, 20), **rest):
    record = {"id": number, "image_id": image, "category_id": category, "bbox": list(bbox)}
    return record | {"area": 200, "iscrowd": 0} | rest


def write(folder, annotations, images=4, text=None, **rest):
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "val").mkdir(exist_ok=True)
    records = []
    for i in range(images):
        Image.new("RGB", (40, 30), (i, 0, 0)).save(folder / "val" / f"{i}.png")
        records.append({"id": i + 1, "file_name": f"{i}.png", "width": 40, "height": 30})
    document = {"images": records, "annotations": annotations, "categories": CATEGORIES} | rest
    content = json.dumps(document) if text is None else text(json.dumps(document))
    (folder / "annotations" / "instances_val.json").write_text(content)
    return document


def read(folder, annotations, **rest):
    write(folder, annotations, **rest)
    return read_split(folder, "val")


def refusal(folder, annotations, **rest):
    write(folder, annotations, **rest)
    with pytest.raises(DataError) as error:
        read_split(folder, "val")
    text = str(error.value)
    assert "\n" not in text and "instances_val.json" in text
    return text


def test_boxes_become_corners_and_categories_labels_without_gaps(tmp_path):
    split = read(tmp_path, [box(1, 2, 90), box(2, 1, 3, (0, 0, 5, 6)), box(3, 2, 7, (2.5, 1, 4, 4))])
    assert split.category_ids == (3, 7, 90) and split.class_names == ("a", "b", "c")
    boxes, labels = split.targets(1)
    assert boxes.tolist() == [[1, 2, 11, 22], [2.5, 1, 6.5, 5]] and labels.tolist() == [2, 1]
    assert split.targets(0)[0].tolist() == [[0, 0, 5, 6]] and split.targets(0)[1].tolist() == [0]
    assert boxes.dtype == np.float32 and labels.dtype == np.int64


def test_labels_in_the_order_of_other_names(tmp_path):
    """Each box keeps its category, by label as by id."""
    split = read(tmp_path, [box(1, 2, 90), box(2, 1, 3), box(3, 2, 7)])
    other = relabelled(split, ("c", "a", "b"))
    assert other.class_names == ("c", "a", "b") and other.category_ids == (90, 3, 7)
    for part in (split, other):
        assert [part.class_names[label] for label in part.labels] == ["a", "c", "b"]
        assert [part.category_ids[label] for label in part.labels] == [3, 90, 7]
    assert relabelled(split, split.class_names) is split
    with pytest.raises(DataError, match="class 2 is c, was d"):
        relabelled(split, ("a", "b", "d"))


def test_images_without_boxes_stay(tmp_path):
    split = read(tmp_path, [box(1, 3)])
    assert len(split) == 4 and [len(split.targets(i)[0]) for i in range(4)] == [0, 0, 1, 0]
    assert split.targets(0)[0].shape == (0, 4)
    assert len(read(tmp_path, [])) == 4


def test_boxes_that_reach_out_are_cut_and_those_outside_or_flat_are_not_trained_on(tmp_path):
    annotations = [
        box(1, bbox=(-5, -5, 100, 100)), box(2, bbox=(50, 5, 10, 10)), box(3, bbox=(5, 5, 0, 10)),
        box(4, bbox=(5, 5, 10, 0)), box(5, bbox=(39.5, 0, 10, 30)),
    ]  # fmt: skip
    split = read(tmp_path, annotations)
    assert split.targets(0)[0].tolist() == [[0, 0, 40, 30], [39.5, 0, 40, 30]]
    assert split.empty == 3 and split.crowds == 0
    assert len(split.document["annotations"]) == 5  # the evaluator sees them as they are


def test_crowds_are_not_trained_on_and_reach_the_evaluator(tmp_path):
    split = read(tmp_path, [box(1), box(2, iscrowd=1, bbox=(0, 0, 40, 30))])
    assert len(split.targets(0)[0]) == 1 and split.crowds == 1
    assert [a["iscrowd"] for a in split.document["annotations"]] == [0, 1]


def test_what_the_evaluator_needs_is_put_in_where_it_is_missing(tmp_path):
    short = {key: value for key, value in box(1).items() if key not in ("id", "area", "iscrowd")}
    record = read(tmp_path, [short]).document["annotations"][0]
    assert (record["id"], record["area"], record["iscrowd"]) == (1, 200, 0)


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        ([box(1, image=9)], "annotation 1 is of image 9, which is not among the images"),
        ([box(1, category=4)], "annotation 1 is of category 4, which is not among the categories"),
        ([box(5, bbox=(1, 1, -3, 4))], r"annotation 5: bbox \[1, 1, -3, 4\] has a negative width or height"),
        ([box(5, bbox=(1, 1, 3))], "annotation 5: bbox .* must be four finite numbers"),
        ([box(5, bbox=(1, 1, 3, float("nan")))], "four finite numbers"),
        ([box(5, bbox=(1, 1, float("inf"), 3))], "four finite numbers"),
        ([box(5, bbox=(1, 1, "3", 3))], "four finite numbers"),
        ([box(5) | {"bbox": None}], "four finite numbers"),
        ([box(5, area=-1)], "annotation 5: area -1"), ([box(5, iscrowd=2)], "annotation 5: iscrowd 2"),
        ([box(1), box(1)], "annotation id 1 is there twice"),
        ([box("1")], "id 1 must be a whole number"), ([box(1, image=1.5)], "image_id 1.5 must be a whole number"),
        ([3], "no list of objects called annotations"),
    ],
)  # fmt: skip
def test_wrong_annotations_are_refused(tmp_path, annotations, message):
    assert re.search(message, refusal(tmp_path, annotations))


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ({"images": []}, "images"), ({"categories": []}, "it names no category"),
        ({"categories": [{"id": 1}, {"id": 1}]}, "category id 1 is there twice"),
        ({"categories": {"id": 1}}, "no list of objects called categories"),
    ],
)  # fmt: skip
def test_a_document_that_lacks_a_part_is_refused(tmp_path, rest, message):
    document = write(tmp_path, [])
    document |= rest
    (tmp_path / "annotations" / "instances_val.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match=message if message != "images" else "it names no image"):
        read_split(tmp_path, "val")


def test_a_truncated_file_is_refused(tmp_path):
    for cut in (lambda text: text[: len(text) // 2], lambda text: "", lambda text: "[]", lambda text: "[" * 100_000):
        assert "COCO" in refusal(tmp_path, [box(1)], text=cut) or "not JSON" in refusal(tmp_path, [box(1)], text=cut)
    (tmp_path / "annotations" / "instances_val.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(DataError, match="truncated or not JSON"):
        read_split(tmp_path, "val")


def test_missing_files_are_refused_by_name_and_number(tmp_path):
    write(tmp_path, [box(1)])
    (tmp_path / "val" / "2.png").unlink()
    (tmp_path / "val" / "3.png").unlink()
    with pytest.raises(DataError, match=r"2 of 4 images are missing, the first: .*2\.png"):
        read_split(tmp_path, "val")
    with pytest.raises(DataError, match=r"instances_train\.json: No such file"):
        read_split(tmp_path, "train")


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "", None, 3, "a/../../b.png"])
def test_images_outside_the_folder_are_refused(tmp_path, name):
    document = write(tmp_path, [])
    document["images"][0]["file_name"] = name
    (tmp_path / "annotations" / "instances_val.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match="must be a path below the images' folder"):
        read_split(tmp_path, "val")


@pytest.mark.parametrize("size", [0, -1, 10**9, 1.5, None])
def test_image_sizes_that_cannot_be_are_refused(tmp_path, size):
    document = write(tmp_path, [])
    document["images"][0]["width"] = size
    (tmp_path / "annotations" / "instances_val.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match=r"image 1: .*width"):
        read_split(tmp_path, "val")
