"""preprocess.py, augment.py, sources.py: every set read from files of its own form, the order and the augmentation as
functions of (seed, epoch, step), the mathematics of the augmentation, and what wrong data says."""

import gzip
import hashlib
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import datasets
from torchvision.transforms import v2

import preprocess
from preprocess import DataError, DataInfo, TensorData, load
from sasa.data import augment as aug
from sasa.data import datasets as sources
from sasa.data import download, randaugment
from sasa.data.augment import AugmentConfig, Draws
from sasa.data.images import Key

ROOT = Path(__file__).resolve().parents[1]
DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")
EVERYTHING = AugmentConfig(
    pad=2, flip=True, rotate=20, translate=0.1, zoom=0.2, cutout=3, randaugment=True, mixup=0.4, cutmix=1.0
)
WITHOUT_RANDAUGMENT = replace(EVERYTHING, randaugment=False)  # which is slow
FOR_TREES = replace(EVERYTHING, pad=0, rotate=0, translate=0, zoom=0)


def batches(data, epoch=0, start_step=0, **options):
    return list(data.batches(epoch, start_step, **{"batch_size": 12, "seed": 5} | options))


def same(left, right) -> bool:
    """Two lists of (images, targets), bitwise."""
    return len(left) == len(right) and all(
        torch.equal(a, b) for pair in zip(left, right, strict=True) for a, b in zip(*pair, strict=True)
    )


def small_set(size=50, channels=3, side=12, classes=4):
    """Images whose content says which one they are, and a set of them."""
    images = torch.randint(0, 256, (size, channels, side, side), dtype=torch.uint8)
    images[:, :, 0, 0] = torch.arange(size, dtype=torch.uint8)[:, None]
    labels = torch.arange(size) % classes
    names = tuple(map(str, range(classes)))
    info = DataInfo("CIFAR10", classes, names, side, 3, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), size, 0, 0)
    return TensorData(images, labels, info)


def plain_set():
    """As small_set, without asking the global generator."""
    images = torch.arange(20 * 3 * 8 * 8).remainder(251).byte().view(20, 3, 8, 8)
    info = DataInfo("CIFAR10", 2, ("a", "b"), 8, 3, (0.5,) * 3, (0.5,) * 3, 20, 0, 0)
    return TensorData(images, torch.arange(20) % 2, info)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Images of a few pixels gain nothing from more, and other work on the machine is left alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits():
    return load(dataset="digits")


# ---- DIGITS and names -----------------------------------------------------------------------------------------------


def test_digits_is_the_published_set(digits):
    info, train, holdout, test = digits
    assert (len(train), holdout, len(test)) == (1437, None, 360)
    assert (info.name, info.num_classes, info.image_size, info.channels) == ("DIGITS", 10, 8, 3)
    assert (info.train_size, info.test_size, info.holdout_size) == (1437, 360, 0)
    images, labels = torch.cat((train.images, test.images)), torch.cat((train.labels, test.labels))
    assert images.shape == (1797, 1, 8, 8) and images.dtype == torch.uint8
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert images.unique().tolist() == [(255 * v + 8) // 16 for v in range(17)]
    # the first image as sklearn.datasets.load_digits documents it: a zero
    assert labels[0] == 0
    assert ((images[0, 0, 0].int() * 16 + 127) // 255).tolist() == [0, 0, 5, 13, 9, 1, 0, 0]


def test_digits_file_is_small_whole_and_attributed():
    content = (ROOT / "sasa" / "data" / "digits.csv.gz").read_bytes()
    readme = (ROOT / "sasa" / "data" / "README.md").read_text()
    assert len(content) < 200_000
    assert hashlib.sha256(content).hexdigest() in readme
    assert all(word in readme for word in ("Alpaydin", "Kaynak", "CC BY 4.0", "10.24432/C50P49"))


def test_damaged_digits_file_is_named(monkeypatch, tmp_path):
    content = (ROOT / "sasa" / "data" / "digits.csv.gz").read_bytes()
    monkeypatch.setattr(sources, "_DIGITS_FILE", tmp_path / "digits.csv.gz")
    for damaged in (content[:20_000], b"nonsense", gzip.compress(b"1,2,3\n4,5,6\n")):
        (tmp_path / "digits.csv.gz").write_bytes(damaged)
        with pytest.raises(DataError, match=r"digits\.csv\.gz"):
            load(dataset="DIGITS")


def test_names_in_any_case():
    assert [preprocess.canonical_name(n) for n in ("digits", "CIFAR10", "fashionmnist", "Folder")] == [
        "DIGITS",
        "CIFAR10",
        "FashionMNIST",
        "FOLDER",
    ]
    with pytest.raises(ValueError, match=r"SVHN.*DIGITS, CIFAR10, CIFAR100, MNIST, FashionMNIST, IMAGENET, FOLDER"):
        preprocess.canonical_name("SVHN")


def test_channel_stats_by_numpy():
    images = torch.randint(0, 256, (7, 3, 5, 4), dtype=torch.uint8)
    mean, std = preprocess.channel_stats(images)
    pixels = images.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(mean, pixels.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, pixels.std((0, 2, 3)), rtol=1e-12)


def test_digits_constants_are_its_statistics(digits):
    info, train, _, _ = digits
    mean, std = preprocess.channel_stats(train.images)
    assert info.mean == (round(mean[0], 4),) * 3 and info.std == (round(std[0], 4),) * 3


@pytest.mark.skipif(not DEBIAN_FASHION.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed here")
def test_real_fashion_mnist():
    info, train, _, test = load(dataset="FashionMNIST", data_dir=DEBIAN_FASHION)
    assert (len(train), len(test)) == (60_000, 10_000)
    assert train.labels.bincount().tolist() == [6000] * 10
    mean, std = preprocess.channel_stats(train.images)
    assert info.mean == (round(mean[0], 4),) * 3 and info.std == (round(std[0], 4),) * 3


def test_normalised_and_back(digits):
    info, train, _, test = digits
    images = torch.cat([x for x, _ in train.eval_batches(500)])
    assert images.shape == (1437, 3, 8, 8) and images.dtype == torch.float32
    assert torch.equal(images[:, 0], images[:, 1]) and torch.equal(images[:, 0], images[:, 2])
    assert abs(images.mean()) < 1e-3 and abs(images.std() - 1) < 1e-3
    images, _ = next(test.eval_batches(100))
    torch.testing.assert_close(preprocess.denormalise(images, info)[:, :1] * 255, test.images[:100].float())
    assert preprocess.denormalise(images + 100, info).max() == 1


def test_feeding_size(digits):
    _, native, _, _ = digits
    info, train, _, _ = load(dataset="DIGITS", img_size=16)
    assert info.image_size == 16 and train.images.shape == (1437, 1, 16, 16) and train.images.dtype == torch.uint8
    expected = F.interpolate(native.images.float(), (16, 16), mode="bilinear")
    assert (train.images.float() - expected).abs().max() <= 0.5
    assert batches(train)[0][0].shape == (12, 3, 16, 16)


# ---- order, steps, processes ----------------------------------------------------------------------------------------


def test_order_is_a_permutation_by_seed_and_epoch():
    order = preprocess.epoch_order(100, 3, 7)
    assert sorted(order.tolist()) == list(range(100))
    torch.rand(5)  # the global generator's state plays no part
    assert torch.equal(order, preprocess.epoch_order(100, 3, 7))
    others = [preprocess.epoch_order(100, *key) for key in ((3, 8), (4, 7), (7, 3), (0, 0), (0, 1))]
    assert not any(torch.equal(order, other) for other in others)


def test_streams_of_different_keys_differ():
    keys = [(0, "order", 0), (0, "augment", 0), (0, "order", 0, 0), (0, "order", 0, 1), (1, "order", 0)]
    keys += [(0, "mix", 1, 0), (0, "mix", 0, 1), (2**31 - 1, "order", 0)]
    draws = [tuple(aug.stream(*key).integers(2**60, size=2)) for key in keys]
    assert len(set(draws)) == len(keys)


def test_an_epoch_shows_whole_batches_of_different_images():
    data = small_set(50)
    assert data.steps_per_epoch(12) == 4
    epoch = batches(data)
    shown = [
        i for x, _ in epoch for i in (preprocess.denormalise(x, data.info)[:, 0, 0, 0] * 255).round().int().tolist()
    ]
    assert [len(x) for x, _ in epoch] == [12] * 4 and len(set(shown)) == 48
    assert shown == preprocess.epoch_order(50, 5, 0)[:48].tolist()
    labels = torch.cat([y for _, y in epoch])
    assert labels.tolist() == [i % 4 for i in shown] and labels.dtype == torch.int64


@pytest.mark.parametrize(
    "config", [None, EVERYTHING, replace(WITHOUT_RANDAUGMENT, mixup=0.0), replace(WITHOUT_RANDAUGMENT, cutmix=0.0)]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_global_batch_does_not_depend_on_the_number_of_processes(config, channels):
    data = small_set(30, channels)
    whole = batches(data, epoch=2, batch_size=12, augment=config)
    for world_size, accumulate in ((2, 1), (3, 1), (1, 4), (3, 2)):
        part = 12 // world_size // accumulate
        by_rank = [
            batches(
                data,
                epoch=2,
                batch_size=part,
                augment=config,
                rank=rank,
                world_size=world_size,
                accumulate=accumulate,
            )
            for rank in range(world_size)
        ]
        assert all(len(own) == len(whole) * accumulate for own in by_rank)
        joined = []
        for step in range(len(whole)):
            pieces = [own[step * accumulate + k] for own in by_rank for k in range(accumulate)]
            joined.append(tuple(torch.cat(field) for field in zip(*pieces, strict=True)))
        assert same(joined, whole)


def test_augmentation_changes_with_epoch_step_and_seed():
    data = small_set(48)
    data.images[:] = data.images[0]  # so that the order cannot be what makes the difference
    assert same(batches(data, augment=WITHOUT_RANDAUGMENT), batches(data, augment=WITHOUT_RANDAUGMENT))
    seen = [x for e, s in ((0, 5), (1, 5), (0, 6)) for x, _ in batches(data, e, seed=s, augment=AugmentConfig(pad=2))]
    assert len({bytes(x.numpy()) for x in seen}) == len(seen) == 12


def test_mixing_changes_with_epoch_step_and_seed():
    data = small_set(48, classes=48)
    targets = [
        y for e, s in ((0, 5), (1, 5), (0, 6)) for _, y in batches(data, e, seed=s, augment=AugmentConfig(mixup=1))
    ]
    assert len({y.max().item() for y in targets}) == len(targets) == 12


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_epoch_can_be_entered_in_the_middle(accumulate):
    data = small_set(50)
    options = {"batch_size": 6, "accumulate": accumulate, "augment": WITHOUT_RANDAUGMENT}
    whole = batches(data, epoch=3, **options)
    for step in (0, 1, 3, data.steps_per_epoch(6, 1, accumulate)):
        assert same(batches(data, 3, step, **options), whole[step * accumulate :])
    assert not same(batches(data, 3, 1, **options)[:1], whole[:1])


def test_nothing_reads_or_writes_the_global_generators(tree):
    np.random.seed(0)  # noqa: NPY002 - it is the global state that is watched
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    batches(plain_set(), augment=EVERYTHING)
    for workers in (0, 1):
        _, train, _, test = load(dataset="FOLDER", data_dir=tree, img_size=16, num_workers=workers, holdout=2)
        batches(train, batch_size=5, augment=FOR_TREES)
        list(test.eval_batches(4))
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(numpy_before, np.random.get_state()[1])  # noqa: NPY002


def test_a_set_smaller_than_a_global_batch_makes_one_step_of_all_its_images():
    data = small_set(10)
    assert data.steps_per_epoch(32) == 1 and [len(x) for x, _ in batches(data, batch_size=32)] == [10]
    by_rank = [batches(data, batch_size=32, rank=rank, world_size=3) for rank in range(3)]
    assert [len(x) for own in by_rank for x, _ in own] == [3, 3, 4]
    with pytest.raises(DataError, match=r"10 training images.*12"):
        batches(data, world_size=4, accumulate=3)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 60])
def test_evaluation_counts_each_image_once(world_size):
    data = small_set(50)
    parts = [pair for rank in range(world_size) for pair in data.eval_batches(8, rank, world_size)]
    images, labels = (torch.cat(field) for field in zip(*parts, strict=True))
    assert all(0 < len(x) <= 8 for x, _ in parts)
    shown = (preprocess.denormalise(images, data.info)[:, 0, 0, 0] * 255).round().int()
    assert shown.tolist() == list(range(50)) and torch.equal(labels, data.labels)


def test_holdout_is_a_seeded_part_of_train(digits):
    _, everything, _, _ = digits
    info, train, held, test = load(dataset="DIGITS", holdout=0.1, seed=4)
    assert (len(train), len(held), len(test)) == (1293, 144, 360)
    assert (info.train_size, info.holdout_size) == (1293, 144)
    rows = sorted(map(bytes, torch.cat((train.images, held.images)).flatten(1).numpy()))
    assert rows == sorted(map(bytes, everything.images.flatten(1).numpy()))
    assert torch.equal(held.images, load(dataset="DIGITS", holdout=144.0, seed=4)[2].images)
    assert not torch.equal(held.images, load(dataset="DIGITS", holdout=144, seed=5)[2].images)
    for wrong in (1437, 5000, 1e-6, 2.5, -1):
        with pytest.raises(DataError, match="--holdout"):
            load(dataset="DIGITS", holdout=wrong)


def test_train_images_is_a_seeded_part_of_train_that_the_holdout_is_taken_from(digits):
    everything = {bytes(image) for image in digits[1].images.flatten(1).numpy()}
    info, part, held, test = load(dataset="DIGITS", train_images=300, holdout=0.1, seed=4)
    assert (len(part), len(held), len(test), info.train_size, info.holdout_size) == (270, 30, 360, 270, 30)
    _, whole, none, _ = load(dataset="DIGITS", train_images=300, seed=4)
    assert (len(whole), none) == (300, None)
    rows = sorted(map(bytes, torch.cat((part.images, held.images)).flatten(1).numpy()))
    assert rows == sorted(map(bytes, whole.images.flatten(1).numpy())) and everything.issuperset(rows)
    assert torch.bincount(whole.labels).min() >= 15  # of all classes: not the first 300 of a sorted set
    assert torch.equal(whole.images, load(dataset="DIGITS", train_images=300, seed=4)[1].images)
    assert not torch.equal(whole.images, load(dataset="DIGITS", train_images=300, seed=5)[1].images)
    assert len(load(dataset="DIGITS", train_images=1437)[1]) == 1437
    with pytest.raises(DataError, match="--train-images 1438: the training set has 1437"):
        load(dataset="DIGITS", train_images=1438)


# ---- the mathematics of augmentation --------------------------------------------------------------------------------


def test_no_strength_is_no_change():
    data = small_set(30)
    images = data.images
    draws = aug.draw(aug.stream(0, "augment"), 30, 12, 12, AugmentConfig())
    assert draws == Draws(None, None, None, None, None, None)
    assert aug.augment_images(images, draws, AugmentConfig()) is images
    still = AugmentConfig(rotate=1e-12)  # the resampling itself moves nothing
    moved = aug.augment_images(images, aug.draw(aug.stream(0, "augment"), 30, 12, 12, still), still)
    torch.testing.assert_close(moved, images.float(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("reflect", [False, True])
def test_crop_and_flip_by_padding_and_slicing(reflect):
    images = torch.randint(1, 256, (25, 2, 5, 7), dtype=torch.uint8)
    shift = torch.tensor([(y, x) for y in range(-2, 3) for x in range(-2, 3)])
    flip = torch.arange(25) % 3 == 0
    out = aug.crop_flip(images, shift, flip, reflect)
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)), mode="reflect" if reflect else "constant")
    for i, (dy, dx) in enumerate(shift.tolist()):
        crop = padded[i, :, 2 + dy : 7 + dy, 2 + dx : 9 + dx]
        assert np.array_equal(out[i].numpy(), crop[:, :, ::-1] if flip[i] else crop)
    assert torch.equal(aug.crop_flip(images, None, torch.ones(25, dtype=torch.bool)), images.flip(-1))


def test_resampling_turns_moves_and_enlarges():
    def apply(images, angle=0.0, shift=(0.0, 0.0), scale=1.0, reflect=False):
        theta = aug._theta(np.array([angle]), np.array([shift]), np.array([scale]), images.shape[-2] / images.shape[-1])
        return aug.resample(images, theta, reflect)

    square = torch.rand(1, 2, 6, 6)
    torch.testing.assert_close(apply(square), square)
    torch.testing.assert_close(apply(square, np.pi / 2), torch.rot90(square, 1, (2, 3)), atol=1e-5, rtol=0)
    down_right = apply(square, shift=(2 / 6, 1 / 6))
    torch.testing.assert_close(down_right[:, :, 2:, 1:], square[:, :, :4, :5], atol=1e-5, rtol=0)
    assert down_right[:, :, :2].abs().max() < 1e-5 and down_right[:, :, :, :1].abs().max() < 1e-5
    # H and W differ: a dot one pixel right of the centre comes to stand one pixel above it, then two with scale 2
    wide = torch.zeros(1, 1, 5, 9)
    wide[0, 0, 2, 5] = 1
    for scale, row in ((1.0, 1), (2.0, 0)):
        turned = apply(wide, np.pi / 2, scale=scale)
        assert turned[0, 0, row, 4] > 0.999 and turned[0, 0].argmax() == row * 9 + 4
    # turned first, then moved
    both = apply(wide, np.pi / 2, shift=(2 / 5, 3 / 9))
    assert both[0, 0, 3, 7] > 0.999
    constant = torch.ones(1, 1, 6, 6)
    torch.testing.assert_close(apply(constant, 0.3, (0.2, 0.1), reflect=True), constant)
    assert apply(constant, 0.3, (0.2, 0.1))[0, 0, 0, 0] == 0


def test_cutout_is_a_clipped_square_of_the_mean():
    images = torch.ones(3, 2, 6, 8)
    out = aug.cutout(images, torch.tensor([[1, 2], [-2, -1], [5, 6]]), 3)
    expected = torch.ones(3, 2, 6, 8)
    expected[0, :, 1:4, 2:5] = 0
    expected[1, :, 0:1, 0:2] = 0
    expected[2, :, 5:6, 6:8] = 0
    assert torch.equal(out, expected)
    data = small_set(48)
    data.images.fill_(255)
    holes = torch.cat([(x == 0).sum((2, 3)) for x, _ in batches(data, augment=AugmentConfig(cutout=4))])  # (48, 3)
    assert holes.max() == 16 and holes.min() > 0 and torch.equal(holes[:, 0], holes[:, 2])


def test_draws_stay_in_their_ranges_and_apart():
    config = AugmentConfig(pad=2, flip=True, rotate=30, translate=0.2, zoom=0.3, cutout=5, randaugment=True)
    draws = aug.draw(aug.stream(1, "augment"), 4000, 10, 20, config)
    assert draws.shift[:, 0].unique().tolist() == draws.shift[:, 1].unique().tolist() == [-2, -1, 0, 1, 2]
    assert 0.45 < draws.flip.float().mean() < 0.55
    cos, sin = draws.theta[:, 0, 0], draws.theta[:, 0, 1] * -2  # H / W is 1/2
    scale, angle = 1 / torch.hypot(cos, sin), torch.rad2deg(torch.atan2(sin, cos))
    assert 0.7 <= scale.min() < 0.71 and 1.29 < scale.max() <= 1.3001
    assert -30.001 <= angle.min() < -29.5 and 29.5 < angle.max() <= 30.001
    moves = aug.draw(aug.stream(1, "augment"), 4000, 10, 20, AugmentConfig(translate=0.2)).theta[:, :, 2]
    assert 0.39 < moves.abs().max() <= 0.4 and abs(moves.mean()) < 0.02
    centres = draws.cutout + 2
    assert centres.min() == 0 and centres.amax(0).tolist() == [9, 19]
    assert draws.ops.unique().tolist() == list(range(28))
    for name, part in (("shift", AugmentConfig(pad=2)), ("flip", AugmentConfig(flip=True))):
        alone = aug.draw(aug.stream(1, "augment"), 4000, 10, 20, part)
        assert torch.equal(getattr(alone, name), getattr(draws, name))
    alone = aug.draw(aug.stream(1, "augment"), 4000, 10, 20, AugmentConfig(cutout=5, randaugment=True))
    assert torch.equal(alone.cutout, draws.cutout) and torch.equal(alone.ops, draws.ops)
    assert torch.equal(draws.take(torch.tensor([7, 3])).theta, draws.theta[[7, 3]])


@pytest.mark.parametrize(("height", "width"), [(375, 500), (60, 40), (1, 1), (3, 900), (900, 3)])
def test_crops_are_distributed_as_torchvisions(height, width, monkeypatch):
    uniform = aug.draw_crops(aug.stream(2, "sample"), 4000)
    assert uniform.shape == (4000, aug.CROP_TRIES, 4) and uniform.min() >= 0 and uniform.max() < 1
    ours = torch.tensor([aug.crop_box(numbers, height, width) for numbers in uniform.numpy()])
    top, left, crop_height, crop_width = ours.unbind(1)
    assert ours[:, :2].min() >= 0 and ours[:, 2:].min() >= 1
    assert (top + crop_height).max() <= height and (left + crop_width).max() <= width
    blank = torch.empty(3, height, width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = [v2.RandomResizedCrop(1).make_params([blank]) for _ in range(4000)]
    theirs = torch.tensor([[p["top"], p["left"], p["height"], p["width"]] for p in theirs])
    if min(height, width) > 1 and max(height, width) < 900:  # else no try fits, and both take the centre
        kinds = (ours.double(), theirs.double())
        for quantity in (lambda b: b, lambda b: b[:, 2:3] * b[:, 3:4], lambda b: (b[:, 3:4] / b[:, 2:3]).log()):
            left, right = map(quantity, kinds)
            error = ((left.var(0) + right.var(0)) / 4000).sqrt()
            assert ((left.mean(0) - right.mean(0)).abs() < 4 * error).all()
            torch.testing.assert_close(left.std(0), right.std(0), atol=0, rtol=0.08)
    else:
        assert torch.equal(ours.unique(dim=0), theirs.unique(dim=0)) and len(ours.unique(dim=0)) == 1


def test_crops_reach_every_border():
    for down, right in ((0.0, 0.9999), (0.9999, 0.0)):
        top, left, height, width = aug.crop_box(np.array([[0.5, 0.5, down, right]]), 375, 500)
        assert (top, top + height == 375) == ((0, False) if down == 0 else (375 - height, True))
        assert (left, left + width == 500) == ((0, False) if right == 0 else (500 - width, True))


@pytest.mark.parametrize("channels", [1, 3])
def test_randaugment_is_torchvisions_image_by_image(channels):
    image = torch.randint(0, 256, (channels, 16, 16), dtype=torch.uint8)
    ops = torch.arange(28)[:, None]
    ours = randaugment.apply(image.expand(28, -1, -1, -1), ops)
    theirs = set()
    for seed in range(300):
        torch.manual_seed(seed)
        theirs.add(bytes(v2.RandAugment(num_ops=1)(image).numpy()))
    assert {bytes(out.numpy()) for out in ours} == theirs
    images = torch.randint(0, 256, (20, channels, 16, 16), dtype=torch.uint8)
    ops = torch.randint(0, 28, (20, 2))
    whole = randaugment.apply(images, ops)
    assert torch.equal(whole, randaugment.apply(randaugment.apply(images, ops[:, :1]), ops[:, 1:]))
    for i in range(20):  # batch mates change nothing
        assert torch.equal(whole[i : i + 1], randaugment.apply(images[i : i + 1], ops[i : i + 1]))


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixing_is_torchvisions(kind, monkeypatch):
    images, labels = torch.rand(6, 3, 9, 11), torch.tensor([0, 3, 1, 1, 2, 0])
    drawn = aug.draw_mix(aug.stream(3, "mix"), 9, 11, AugmentConfig(**{kind: 1.0}))
    assert 0 < drawn.weight < 1 and (drawn.box is None) == (kind == "mixup")
    theirs = v2.MixUp(num_classes=4) if kind == "mixup" else v2.CutMix(num_classes=4)
    top, left, bottom, right = drawn.box or (0, 0, 0, 0)
    params = {"lam": drawn.weight, "lam_adjusted": drawn.weight, "box": (left, top, right, bottom)}
    monkeypatch.setattr(theirs, "make_params", lambda _: params)
    expected, targets = theirs(images, labels)
    ring = torch.tensor([5, 0, 1, 2, 3, 4, 5])
    out, soft = aug.mix(images[ring], labels[ring], 4, drawn)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(soft, targets)


def test_soft_targets_sum_to_one_and_match_the_share_of_pixels():
    images = torch.arange(5.0)[:, None, None, None].expand(5, 3, 8, 8)  # each image shows its own label
    for step in range(40):
        config = AugmentConfig(mixup=0.5, cutmix=0.5)
        mixed, soft = aug.mix(images, torch.arange(5), 5, aug.draw_mix(aug.stream(0, "mix", step), 8, 8, config))
        torch.testing.assert_close(soft.sum(1), torch.ones(4))
        torch.testing.assert_close(mixed.mean((1, 2, 3)), soft @ torch.arange(5.0))


def test_mixing_is_drawn_as_asked():
    def draws(**alphas):
        return [aug.draw_mix(aug.stream(0, "mix", step), 32, 32, AugmentConfig(**alphas)) for step in range(300)]

    assert draws() == [None] * 300
    assert all(d.box is None for d in draws(mixup=0.2))
    assert all(d.box is not None for d in draws(cutmix=0.2))
    assert 110 < sum(d.box is None for d in draws(mixup=0.2, cutmix=1.0)) < 190
    # Beta(a, a): mean 1/2, variance 1 / (4 (2 a + 1))
    weights = torch.tensor([d.weight for d in draws(mixup=0.2)])
    assert abs(weights.mean() - 0.5) < 0.07 and abs(weights.var() - 1 / 5.6) < 0.03
    assert len({d.box for d in draws(cutmix=1.0)}) > 250
    # the box has the image's shape, where the border does not clip it
    boxes = [aug.draw_mix(aug.stream(0, "mix", s), 100, 400, AugmentConfig(cutmix=1.0)).box for s in range(300)]
    inside = [(low - top, right - left) for top, left, low, right in boxes if top * left and low < 100 and right < 400]
    assert len(inside) > 30 and all(abs(4 * height - width) <= 8 for height, width in inside)


def test_augmentation_settings_are_checked():
    for wrong in ({"pad": -1}, {"zoom": 1.0}, {"translate": 1.5}, {"mixup": float("nan")}, {"rotate": float("inf")}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            AugmentConfig(**wrong)


# ---- CIFAR and MNIST files ------------------------------------------------------------------------------------------


def write_cifar(root: Path, name: str, monkeypatch) -> tuple[torch.Tensor, torch.Tensor]:
    """A small set in CIFAR's own form, and torchvision's checksums set to its files'."""
    kind = getattr(datasets, name)
    classes, key = (10, b"labels") if name == "CIFAR10" else (100, b"fine_labels")
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    rng, written = np.random.default_rng(0), {}

    def dump(file, content):
        (folder / file).write_bytes(pickle.dumps(content))
        written[file] = hashlib.md5((folder / file).read_bytes()).hexdigest()

    parts = []
    for file, _ in [*kind.train_list, *kind.test_list]:
        data, labels = rng.integers(0, 256, (6, 3072), dtype=np.uint8), rng.integers(0, classes, 6).tolist()
        dump(file, {"data": data, key.decode(): labels})
        parts.append((torch.from_numpy(data).view(6, 3, 32, 32), torch.tensor(labels)))
    dump(kind.meta["filename"], {kind.meta["key"]: [f"class {i}" for i in range(classes)]})
    monkeypatch.setattr(kind, "train_list", [[file, written[file]] for file, _ in kind.train_list])
    monkeypatch.setattr(kind, "test_list", [[file, written[file]] for file, _ in kind.test_list])
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": written[kind.meta["filename"]]})
    return tuple(torch.cat(field) for field in zip(*parts, strict=True))


def write_idx(folder: Path, suffix: str, train: int = 20, test: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Four files in MNIST's own form: (images, labels) of the training set."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    first = None
    for split, size in (("train", train), ("t10k", test)):
        images, labels = rng.integers(0, 256, (size, 28, 28), dtype=np.uint8), np.arange(size, dtype=np.uint8) % 10
        contents = {
            f"{split}-images-idx3-ubyte": bytes((0, 0, 8, 3))
            + np.array([size, 28, 28], ">u4").tobytes()
            + images.tobytes(),
            f"{split}-labels-idx1-ubyte": bytes((0, 0, 8, 1)) + np.array([size], ">u4").tobytes() + labels.tobytes(),
        }
        for name, content in contents.items():
            (folder / (name + suffix)).write_bytes(gzip.compress(content) if suffix else content)
        first = first or (torch.from_numpy(images)[:, None], torch.from_numpy(labels).long())
    return first


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
def test_cifar_from_its_files(name, tmp_path, monkeypatch):
    images, labels = write_cifar(tmp_path, name, monkeypatch)
    info, train, _, test = load(dataset=name.lower(), data_dir=tmp_path)
    assert torch.equal(torch.cat((train.images, test.images)), images)
    assert torch.equal(torch.cat((train.labels, test.labels)), labels)
    assert len(test) == 6 and (info.name, info.num_classes, info.image_size) == (name, int(name[5:]), 32)
    assert info.class_names[3] == "class 3" and len(set(info.mean)) == 3


def test_damaged_cifar_is_named(tmp_path, monkeypatch):
    write_cifar(tmp_path, "CIFAR10", monkeypatch)
    file = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match="data_batch_3: damaged; delete"):
        load(dataset="CIFAR10", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("name", "folder", "suffix"),
    [
        ("FashionMNIST", "", ".gz"),
        ("MNIST", "", ".gz"),
        ("FashionMNIST", "FashionMNIST/raw", ""),
        ("MNIST", "MNIST/raw", ""),
        ("MNIST", "MNIST/raw", ".gz"),
    ],
)
def test_mnist_from_its_files(name, folder, suffix, tmp_path):
    images, labels = write_idx(tmp_path / folder, suffix)
    info, train, _, test = load(dataset=name, data_dir=tmp_path)
    assert torch.equal(train.images, images) and torch.equal(train.labels, labels) and len(test) == 8
    assert (info.name, info.num_classes, info.image_size) == (name, 10, 28)
    assert info.class_names[9] == ("Ankle boot" if name == "FashionMNIST" else "9 - nine")
    assert batches(train)[0][0].shape == (12, 3, 28, 28)


def test_damaged_idx_files_are_named(tmp_path):
    def expect(words):
        with pytest.raises(DataError, match=words):
            load(dataset="MNIST", data_dir=tmp_path)

    name = "train-images-idx3-ubyte.gz"
    write_idx(tmp_path, ".gz")
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    expect(f"{name}: damaged")
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0x55
    (tmp_path / name).write_bytes(bytes(flipped))
    expect(f"{name}: damaged")
    (tmp_path / name).write_bytes(gzip.compress(gzip.decompress(whole)[:-1]))
    expect(f"{name}: damaged .*do not hold shape")
    (tmp_path / name).write_bytes((tmp_path / "train-labels-idx1-ubyte.gz").read_bytes())
    expect(f"{name}: damaged .*not an IDX file of 3")
    (tmp_path / name).write_bytes(whole)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes((tmp_path / "t10k-labels-idx1-ubyte.gz").read_bytes())
    expect("train-labels-idx1-ubyte.gz: not the labels of train-images")


# ---- the network ----------------------------------------------------------------------------------------------------


def no_network(*_args, **_options):
    raise urllib.error.URLError("Name or service not known")


def silent_network(*_args, **_options):
    time.sleep(5)
    raise urllib.error.URLError("timed out at last")


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100", "MNIST", "FashionMNIST"])
def test_no_network_is_one_clear_line(name, tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(DataError, match=f"{name} is not in .*cannot be downloaded.*Name or service") as error:
        load(dataset=name, data_dir=tmp_path / "nothing")
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    assert ("dataset-fashion-mnist" in str(error.value)) == (name == "FashionMNIST")


def test_a_silent_network_is_waited_for_only_so_long(tmp_path, monkeypatch):
    assert download.NETWORK_WAIT_S <= 10
    monkeypatch.setattr(download, "NETWORK_WAIT_S", 0.3)
    monkeypatch.setattr("urllib.request.urlopen", silent_network)
    begin = time.monotonic()
    with pytest.raises(DataError, match=r"no answer within 0\.3 s"):
        load(dataset="MNIST", data_dir=tmp_path)  # two mirrors: they share the wait
    assert time.monotonic() - begin < 2


class Portal:
    """Answers everything with its own page."""

    length, url = 5, None

    def __init__(self, *_args, **_options):
        self.left = [b"login"]

    def read(self, _size):
        return self.left.pop() if self.left else b""

    def close(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_a_failed_download_is_one_clear_line(tmp_path, monkeypatch):
    def expect(words, dataset):
        with pytest.raises(DataError, match=words) as error:
            load(dataset=dataset, data_dir=tmp_path)
        assert "\n" not in str(error.value)

    monkeypatch.setattr("urllib.request.urlopen", Portal)
    expect(r"the download failed .*corrupted", "CIFAR10")

    def lost_later(*args, **_options):  # the first question is asked in a thread, the download is not
        return Portal() if threading.current_thread() is not threading.main_thread() else no_network()

    monkeypatch.setattr("urllib.request.urlopen", lost_later)
    expect(r"the download failed \(Error downloading train-images.* Tried", "MNIST")


def test_auto(tmp_path, monkeypatch):
    asked = []

    def network(*_args, **_options):
        asked.append(1)
        no_network()

    monkeypatch.setattr("urllib.request.urlopen", network)
    name, reason = preprocess.resolve_auto(tmp_path, has_gpu=False)
    assert name == "DIGITS" and "no GPU" in reason and not asked
    name, reason = preprocess.resolve_auto(tmp_path, has_gpu=True)
    assert name == "DIGITS" and "Name or service" in reason and asked
    write_cifar(tmp_path, "CIFAR10", monkeypatch)
    asked.clear()
    assert [preprocess.resolve_auto(tmp_path, has_gpu=gpu)[0] for gpu in (False, True)] == ["CIFAR10"] * 2 and not asked


# ---- image trees ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tree_source(tmp_path_factory):
    """train/ and val/ with two classes of real JPEGs of several sizes, one of them gray."""
    root = tmp_path_factory.mktemp("tree")
    rng = np.random.default_rng(0)
    for split, size in (("train", 11), ("val", 7)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(size):
                coarse = rng.integers(0, 256, (5, 4, 3), dtype=np.uint8)
                image = Image.fromarray(coarse).resize((24 + i, 40 - i), Image.Resampling.BICUBIC)
                (image.convert("L") if i == 3 else image).save(root / split / name / f"{i:02}.jpg", quality=90)
    return root


@pytest.fixture
def tree(tree_source, tmp_path):
    """A copy that the test may damage."""
    return Path(shutil.copytree(tree_source, tmp_path / "tree"))


def truncate(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-200])
    return path


def test_folder_of_jpegs(tree):
    info, train, held, test = load(dataset="folder", data_dir=tree, img_size=16, holdout=2, seed=1)
    assert (info.name, info.num_classes, info.class_names) == ("FOLDER", 2, ("cat", "dog"))
    assert (info.image_size, info.train_size, info.holdout_size, info.test_size) == (16, 20, 2, 14)
    assert load(dataset="FOLDER", data_dir=tree)[0].image_size == 224
    epoch = batches(train, batch_size=6, augment=AugmentConfig(flip=True))
    assert [x.shape for x, _ in epoch] == [(6, 3, 16, 16)] * 3 and epoch[0][0].dtype == torch.float32
    assert all(x.is_contiguous() for x, _ in epoch)
    # evaluation by hand: shorter side to 18 (16 * 256 / 224), centre 16 x 16, normalised
    images, labels = (torch.cat(field) for field in zip(*test.eval_batches(4), strict=True))
    assert labels.tolist() == [0] * 7 + [1] * 7 and next(iter(test.eval_batches(4)))[0].is_contiguous()
    with Image.open(tree / "val" / "cat" / "05.jpg") as file:
        pixels = v2.functional.pil_to_tensor(file.convert("RGB"))
    by_hand = v2.functional.center_crop(v2.functional.resize(pixels, 18, antialias=True), [16, 16]).float() / 255
    by_hand = (by_hand - torch.tensor(info.mean)[:, None, None]) / torch.tensor(info.std)[:, None, None]
    torch.testing.assert_close(images[5], by_hand, atol=1e-5, rtol=1e-5)
    held_images = torch.cat([x for x, _ in held.eval_batches(8)])
    assert len(held_images) == 2


def test_a_trees_sample_is_drawn_by_seed_epoch_and_place(tree):
    for path in tree.glob("train/*/*.jpg"):  # one image everywhere: what differs is the draw
        if path.name != "00.jpg":
            shutil.copy(tree / "train" / "cat" / "00.jpg", path)
    train = load(dataset="FOLDER", data_dir=tree, img_size=16)[1]

    def images(config=None, **options):
        return torch.cat([x for x, _ in batches(train, batch_size=22, augment=config, **options)])

    plain = images()
    assert torch.equal(plain, images())
    for other in (plain.roll(1, 0), images(epoch=1), images(seed=6)):
        assert sum(map(torch.equal, plain, other)) < 4
    flipped = images(AugmentConfig(flip=True))
    mirrored = sum(map(torch.equal, plain.flip(-1), flipped))
    assert 4 < mirrored < 18 and mirrored + sum(map(torch.equal, plain, flipped)) == 22
    assert sum(map(torch.equal, plain, images(AugmentConfig(randaugment=True)))) < 6


def test_trees_are_cut_among_processes_without_a_trace(tree):
    _, train, _, test = load(dataset="FOLDER", data_dir=tree, img_size=16)
    whole = batches(train, epoch=1, batch_size=6, augment=FOR_TREES)
    by_rank = [batches(train, epoch=1, batch_size=3, augment=FOR_TREES, rank=r, world_size=2) for r in (0, 1)]
    joined = [tuple(map(torch.cat, zip(*pair, strict=True))) for pair in zip(*by_rank, strict=True)]
    assert same(joined, whole)
    assert same(batches(train, 1, 2, batch_size=6, augment=FOR_TREES), whole[2:])
    assert not same(batches(train, epoch=2, batch_size=6, augment=FOR_TREES), whole)
    alone = list(test.eval_batches(5))
    for world_size in (2, 3):
        parts = [pair for rank in range(world_size) for pair in test.eval_batches(5, rank, world_size)]
        for left, right in zip(zip(*parts, strict=True), zip(*alone, strict=True), strict=True):
            assert torch.equal(torch.cat(left), torch.cat(right))


def test_workers_change_nothing(tree):
    truncate(tree / "train" / "cat" / "04.jpg")
    loaded = [
        load(dataset="FOLDER", data_dir=tree, img_size=16, num_workers=workers, skip_bad_images=True)
        for workers in (0, 2)
    ]
    (_, alone, _, alone_test), (_, shared, _, shared_test) = loaded
    for epoch in (0, 1):
        assert same(*(batches(t, epoch, batch_size=6, augment=FOR_TREES) for t in (alone, shared)))
    for _ in shared.batches(2, batch_size=6, seed=5):  # an epoch left in the middle does not leak into the next
        break
    assert same(*(batches(t, 3, 1, batch_size=6, augment=FOR_TREES) for t in (alone, shared)))
    assert same(list(alone_test.eval_batches(4)), list(shared_test.eval_batches(4)))
    assert alone.bad_images == shared.bad_images and len(alone.bad_images) == 1


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="this system has no SIGUSR1")
def test_workers_ignore_the_launchers_signals(tree):
    _, train, _, _ = load(dataset="FOLDER", data_dir=tree, img_size=16, num_workers=1)
    epoch = train.batches(0, batch_size=2, seed=5)
    first = next(epoch)
    (worker,) = train._reader._loader._iterator._workers
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(worker.pid, number)
    assert same([first, *epoch], batches(load(dataset="FOLDER", data_dir=tree, img_size=16)[1], batch_size=2))
    assert worker.is_alive()


def test_workers_that_ignore_signals_do_not_keep_the_process(tree):
    """An error in the middle of an epoch, with the workers still at work and something still holding on to them."""
    code = f"""
import preprocess
_, train, _, _ = preprocess.load(dataset="FOLDER", data_dir={str(tree)!r}, img_size=16, num_workers=2)
epoch = train.batches(0, batch_size=2)
next(epoch)
raise SystemExit(3)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_jpeg_ends_the_run_with_its_name(tree, workers):
    path = truncate(tree / "train" / "dog" / "02.jpg")
    truncate(tree / "val" / "dog" / "02.jpg")
    _, train, _, test = load(dataset="FOLDER", data_dir=tree, img_size=16, num_workers=workers)
    for read in (lambda: batches(train, batch_size=11), lambda: list(test.eval_batches(4))):
        with pytest.raises(DataError, match=r"02\.jpg: .*truncated.*--skip-bad-images") as error:
            read()
        assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=str(path)):
        batches(train, batch_size=11)
    image, _, bad = train._files[Key(13, np.zeros((10, 4)))]  # nothing more is read to find a substitute
    assert image is None and len(bad) == 1


def test_a_truncated_jpeg_can_be_skipped_and_is_counted(tree):
    options = {"dataset": "FOLDER", "data_dir": tree, "img_size": 16, "skip_bad_images": True}
    images_before = torch.cat([x for x, _ in batches(load(**options)[1], batch_size=11)])
    truncate(tree / "train" / "cat" / "10.jpg")
    truncate(tree / "val" / "cat" / "06.jpg")
    _, train, _, test = load(**options)
    epoch = batches(train, batch_size=11)
    batches(train, epoch=1, batch_size=11)  # met again, counted once
    assert len(train.bad_images) == 1 and "train/cat/10.jpg: " in train.bad_images[0]
    # the next file in the list, a dog, takes its place; every other image is what it was
    assert [len(x) for x, _ in epoch] == [11, 11]
    order = preprocess.epoch_order(22, 5, 0)
    images, labels = (torch.cat(field) for field in zip(*epoch, strict=True))
    assert torch.equal(labels, (order >= 10).long())
    assert torch.equal(images[order != 10], images_before[order != 10])
    # in evaluation nothing takes its place, so nothing counts twice
    assert [len(y) for _, y in test.eval_batches(1)] == [1] * 13 and "val/cat/06.jpg" in test.bad_images[0]


def test_nothing_readable_is_an_error_even_when_skipping(tree):
    for path in tree.glob("train/*/*.jpg"):
        path.write_bytes(b"not an image")
    _, train, _, _ = load(dataset="FOLDER", data_dir=tree, img_size=16, skip_bad_images=True)
    with pytest.raises(DataError, match="cannot read any of the 22 images"):
        batches(train)


def test_broken_trees_are_named(tree, tmp_path):
    def expect(words, dataset="FOLDER", data_dir=tree):
        with pytest.raises(DataError, match=words) as error:
            load(dataset=dataset, data_dir=data_dir)
        assert "\n" not in str(error.value)

    expect("nowhere: no such folder", data_dir=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    expect("empty/train: no such folder", data_dir=tmp_path / "empty")
    (tmp_path / "empty" / "train").mkdir()
    expect("empty/train: no class folders", data_dir=tmp_path / "empty")
    expect("1000 class folders, here are 2", dataset="IMAGENET")
    (tree / "train" / "bird").mkdir()
    expect("train/bird: class folder without images")
    (tree / "train" / "bird" / "notes.txt").write_text("no image")
    expect("train/bird: class folder without images")
    shutil.copy(tree / "train" / "cat" / "00.jpg", tree / "train" / "bird" / "00.jpg")
    expect("different class folders, bird")
    shutil.rmtree(tree / "train" / "bird")
    shutil.rmtree(tree / "val")
    expect("tree/val: no such folder")


def test_imagenet_has_a_thousand_classes(tree, tmp_path):
    for split in ("train", "val"):
        for i in range(1000):
            folder = tmp_path / "imagenet" / split / f"n{i:08}"
            folder.mkdir(parents=True)
            (folder / "0.jpg").hardlink_to(tree / "train" / "cat" / "00.jpg")
    info, train, _, _ = load(dataset="ImageNet", data_dir=tmp_path / "imagenet")
    assert (info.name, info.num_classes, len(train), info.image_size) == ("IMAGENET", 1000, 1000, 224)


def test_trees_refuse_what_the_resized_crop_replaces(tree):
    _, train, _, _ = load(dataset="FOLDER", data_dir=tree, img_size=16)
    with pytest.raises(ValueError, match="pad, rotate, translate and zoom"):
        train.batches(0, batch_size=4, augment=AugmentConfig(pad=4))


@pytest.mark.gpu
def test_batches_on_a_gpu_are_those_of_the_cpu():
    on_cpu, on_gpu = (load(dataset="DIGITS", img_size=16, device=device)[1] for device in ("cpu", "cuda"))
    pairs = zip(*(batches(data, augment=WITHOUT_RANDAUGMENT) for data in (on_cpu, on_gpu)), strict=True)
    for (images, targets), (gpu_images, gpu_targets) in pairs:
        assert gpu_images.is_cuda and gpu_targets.is_cuda
        torch.testing.assert_close(gpu_images.cpu(), images, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(gpu_targets.cpu(), targets)
