"""The digits on canvases: a function of the seed, boxes of the ink, and a folder that appears whole."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from preprocess import DataError
from sasa.detection import digits
from sasa.detection.coco import read_split


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(digits, "COUNTS", {"train": 12, "val": 6})
    monkeypatch.setattr(digits, "ABOUT", digits.ABOUT | {"canvases": digits.COUNTS})


def canvas(seed, images=None):
    torch.manual_seed(0)
    images = torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8) if images is None else images
    return digits.draw_canvas(images, torch.arange(len(images)) % 10, np.random.default_rng(seed))


def test_a_canvas_is_a_function_of_the_seed():
    first, again, other = canvas(3), canvas(3), canvas(4)
    assert np.array_equal(first.pixels, again.pixels) and first[1:] == again[1:]
    assert not np.array_equal(first.pixels, other.pixels)


def test_boxes_are_those_of_the_ink():
    """A digit of one bright bar: its box is where it is bright, and nothing is bright elsewhere."""
    bar = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    bar[..., 2:6, 3] = 255
    seen = 0
    for seed in range(40):
        drawn = canvas(seed, bar)
        covered = np.zeros(drawn.pixels.shape, bool)
        for x, y, width, height in drawn.boxes:
            assert x >= 0 and y >= 0 and x + width <= digits.CANVAS and y + height <= digits.CANVAS
            assert height > width
            covered[y : y + height, x : x + width] = True
            edges = drawn.pixels[y, x : x + width], drawn.pixels[y + height - 1, x : x + width]
            assert all((edge >= digits.INK * digits.CONTRAST[0] - 1).any() for edge in edges)
            seen += 1
        assert not drawn.pixels[~covered].any()
    assert seen > 80


def test_boxes_overlap_no_more_than_they_may():
    for seed in range(60):
        boxes = canvas(seed).boxes
        for i, a in enumerate(boxes):
            for b in boxes[:i]:
                width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
                height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
                overlap = max(width, 0) * max(height, 0)
                assert overlap <= digits.LARGEST_OVERLAP * min(a[2] * a[3], b[2] * b[3])


def test_the_set_is_made_once_and_reads_as_coco(tmp_path, few):
    folder = digits.make(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [digits.FOLDER]  # nothing temporary is left
    stamp = (folder / "about.json").stat().st_mtime_ns
    assert digits.make(tmp_path) == folder and (folder / "about.json").stat().st_mtime_ns == stamp
    for name, count in digits.COUNTS.items():
        split = read_split(folder, f"{name}2017")
        assert len(split) == count and split.class_names == tuple("0123456789")
        assert split.empty == split.crowds == 0 and len(split.labels) >= count
        image = Image.open(folder / f"{name}2017" / split.files[0])
        assert image.size == (digits.CANVAS, digits.CANVAS)
    again = digits.make(tmp_path / "other")
    files = ["annotations/instances_val2017.json", "val2017/000000000001.png", "train2017/000000000012.png"]
    assert all((folder / file).read_bytes() == (again / file).read_bytes() for file in files)


def test_training_and_validation_show_different_images_of_digits(tmp_path, few, monkeypatch):
    """The splits of DIGITS are kept apart: each draws from its own."""
    drawn_from, drawn = [], canvas(0)
    monkeypatch.setattr(digits, "draw_canvas", lambda images, labels, random: drawn_from.append(len(labels)) or drawn)
    digits.make(tmp_path)
    assert drawn_from == [1437] * 12 + [360] * 6


def test_another_version_s_folder_is_refused(tmp_path, few):
    folder = digits.make(tmp_path)
    (folder / "about.json").write_text(json.dumps(digits.ABOUT | {"version": 0}))
    with pytest.raises(DataError, match="drawn by another version; delete it"):
        digits.make(tmp_path)
    (folder / "about.json").write_text("{")
    with pytest.raises(DataError, match="damaged; delete"):
        digits.make(tmp_path)
    (folder / "about.json").unlink()
    with pytest.raises(DataError, match=r"about\.json: No such file"):
        digits.make(tmp_path)


def test_a_failed_drawing_leaves_nothing(tmp_path, few, monkeypatch):
    def full_disk(*_):
        raise OSError(28, "No space left on device", "x")

    monkeypatch.setattr(digits, "draw_canvas", full_disk)
    with pytest.raises(DataError, match="No space left"):
        digits.make(tmp_path)
    assert list(tmp_path.iterdir()) == []
