"""Keys of a step as functions of seed, epoch and step; boxes that go with their pixels."""

import os

import numpy as np
import pytest
import torch
from PIL import Image
from test_coco import box, read

from preprocess import DataError, WorkerError
from sasa.data import workers
from sasa.detection.data import CocoImages, DetectionSplit, Jitter, Key, place, plan, to_device

STILL = np.array([0.0, 0.0, 0.0, 0.9])  # lowest scale, no shift, no flip


def marked(width, height, boxes):
    """A black image whose boxes are filled with 255, so that pixels tell where a box is."""
    pixels = np.zeros((height, width, 3), np.uint8)
    for x1, y1, x2, y2 in boxes:
        pixels[int(y1) : int(y2), int(x1) : int(x2)] = 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize("flip", [0.1, 0.9])
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(64, 64), (80, 40), (30, 50)])
def test_boxes_go_with_their_pixels(shape, scale, flip):
    width, height = shape
    boxes = np.array([[width * 0.25, height * 0.25, width * 0.75, height * 0.5]], np.float32).round()
    for row, column in ((0.0, 0.0), (0.3, 0.9)):
        draws = np.array([scale, row, column, flip])
        image, moved, kept = place(marked(width, height, boxes), boxes, 64, (9, 9, 9), Jitter(0.5, 2.0, True), draws)
        assert image.size == (64, 64) and kept.tolist() == [0]
        bright = np.asarray(image)[..., 0] > 127
        rows, columns = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
        seen = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        assert np.abs(moved[0] - seen).max() <= 1.0 * max(64 * (0.5 + 1.5 * scale) / max(shape), 1)


def test_padding_is_of_the_given_colour_and_right_and_below():
    image, boxes, _ = place(marked(64, 32, []), np.zeros((0, 4), np.float32), 64, (9, 8, 7), Jitter(), STILL)
    pixels = np.asarray(image)
    assert not pixels[:32].any() and (pixels[32:] == (9, 8, 7)).all() and boxes.shape == (0, 4)


def test_flip_only_where_it_is_allowed():
    boxes = np.array([[0, 0, 16, 64]], np.float32)
    draws = np.array([0, 0, 0, 0.1])
    kept = place(marked(64, 64, boxes), boxes, 64, (0, 0, 0), Jitter(flip=False), draws)[1]
    flipped = place(marked(64, 64, boxes), boxes, 64, (0, 0, 0), Jitter(flip=True), draws)[1]
    assert kept.tolist() == [[0, 0, 16, 64]] and flipped.tolist() == [[48, 0, 64, 64]]


def test_boxes_outside_the_crop_are_left_out_with_their_labels(tmp_path):
    split = read(tmp_path, [box(1, bbox=(0, 0, 4, 4)), box(2, category=7, bbox=(30, 20, 8, 8))])
    images = CocoImages(split, 32, (0, 0, 0), Jitter(2.0, 2.0))
    _, target = images[Key(0, np.array([0, 0.999, 0.999, 0.9]))]  # the lower right of 64 x 48
    assert target["labels"].tolist() == [1] and target["boxes"].shape == (1, 4)
    assert target["boxes"].dtype == torch.float32 and target["labels"].dtype == torch.int64


def test_evaluation_feeds_images_as_they_are(tmp_path):
    split = read(tmp_path, [box(1)])
    pixels, target = CocoImages(split, 32, (0, 0, 0), Jitter(2.0, 2.0))[Key(0, None)]
    assert pixels.shape == (3, 30, 40) and target["boxes"].tolist() == [[1, 2, 11, 22]]
    (image,), _ = to_device([pixels + 255], [target], torch.device("cpu"))
    assert image.dtype == torch.float32 and image.max() == 1


def test_images_that_cannot_be_read_or_differ_in_size_are_refused(tmp_path):
    split = read(tmp_path, [box(1)])
    images = CocoImages(split, 32, (0, 0, 0), Jitter())
    Image.new("RGB", (30, 40)).save(tmp_path / "val" / "0.png")
    with pytest.raises(DataError, match=r"0\.png: 30x40 pixels, 40x30 in the annotations"):
        images[Key(0, None)]
    (tmp_path / "val" / "1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"cannot read image .*1\.png"):
        images[Key(1, None)]
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\nshowpage\n%%EOF\n"  # Pillow would run Ghostscript
    (tmp_path / "val" / "1.png").write_bytes(eps)
    with pytest.raises(DataError, match="no image of a kind that is read"):
        images[Key(1, None)]
    (tmp_path / "val" / "1.png").unlink()
    os.mkfifo(tmp_path / "val" / "1.png")  # opened, it would wait for ever
    with pytest.raises(DataError, match=r"1\.png: not a regular file"):
        images[Key(1, None)]


def test_pixels_are_decoded_as_in_classification_but_not_turned(tmp_path):
    """16-bit gray by its high byte, not cut at white; boxes are of the picture as it is stored."""
    images = CocoImages(read(tmp_path, [box(1)]), 32, (0, 0, 0), Jitter())
    Image.fromarray(np.full((30, 40), 0x1234, np.uint16)).save(tmp_path / "val" / "0.png")
    assert images[Key(0, None)][0].unique().tolist() == [0x12]
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (40, 30)).save(tmp_path / "val" / "0.png", exif=exif)
    assert images[Key(0, None)][0].shape == (3, 30, 40)


def test_a_worker_that_dies_ends_the_pass_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "_POLL_S", 1)
    monkeypatch.setattr(CocoImages, "__getitem__", lambda images, key: os._exit(3))
    split = DetectionSplit(CocoImages(read(tmp_path, [box(1)]), 32, (0, 0, 0), Jitter()), torch.device("cpu"), 1)
    with pytest.raises(WorkerError, match=r"ended by itself, exit code 3: a restart can help$"):
        next(split.eval_batches(2))


OPTIONS = {"global_batch": 12, "accumulate": 1, "rank": 0, "world_size": 1, "seed": 5}


def flat(keys):
    return [(key.index, *key.draws) for piece in keys for key in piece]


def test_a_step_is_the_same_however_it_is_cut_and_wherever_one_enters():
    whole = flat(plan(40, 2, 0, **OPTIONS))
    assert len(whole) == 36 and len({index for index, *_ in whole}) == 36
    assert flat(plan(40, 2, 2, **OPTIONS)) == whole[24:]
    assert flat(plan(40, 2, 0, **OPTIONS | {"accumulate": 3})) == whole
    ranks = [list(plan(40, 2, 0, **OPTIONS | {"world_size": 2, "rank": r, "accumulate": 2})) for r in (0, 1)]
    steps = [ranks[r][2 * s + i] for s in range(3) for r in (0, 1) for i in (0, 1)]
    assert flat(steps) == whole


def test_epochs_and_seeds_differ():
    assert flat(plan(40, 3, 0, **OPTIONS)) != flat(plan(40, 2, 0, **OPTIONS))
    assert flat(plan(40, 2, 0, **OPTIONS | {"seed": 6})) != flat(plan(40, 2, 0, **OPTIONS))


def test_a_set_smaller_than_a_batch_is_one_step_and_too_few_are_refused():
    assert len(flat(plan(5, 0, 0, **OPTIONS))) == 5
    with pytest.raises(DataError, match="2 images a step are too few for 3 batches"):
        plan(2, 0, 0, **OPTIONS | {"accumulate": 3})


def test_workers_read_what_one_process_reads(tmp_path):
    """Two epochs with jitter and an evaluation, after a pass that was left in the middle."""
    split = read(tmp_path, [box(1), box(2, image=2, bbox=(5, 6, 20, 8))])
    found = []
    for count in (0, 2):
        images = CocoImages(split, 32, (0, 0, 0), Jitter(0.5, 2.0, True))
        part = DetectionSplit(images, torch.device("cpu"), count)
        next(part.batches(0, **OPTIONS | {"global_batch": 2}))
        passes = [*(part.batches(epoch, **OPTIONS | {"global_batch": 1}) for epoch in (0, 1)), part.eval_batches(2)]
        found.append([batch[-2:] for batches in passes for batch in batches])
        part.close()
    alone, shared = found
    assert len(alone) == len(shared) == 10
    for (images, targets), (others, other_targets) in zip(alone, shared, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(images, others, strict=True))
        for target, other in zip(targets, other_targets, strict=True):
            assert all(torch.equal(target[key], other[key]) for key in ("boxes", "labels"))
