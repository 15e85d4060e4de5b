"""preprocess.py: sets by their names, their sizes, parts and held-out images."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import preprocess
from data_sets import batches
from preprocess import DataError, load

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def digits():
    return load(dataset="digits")


def test_channel_stats_by_numpy():
    images = torch.randint(0, 256, (7, 3, 5, 4), dtype=torch.uint8)
    mean, std = preprocess.channel_stats(images)
    pixels = images.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(mean, pixels.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, pixels.std((0, 2, 3)), rtol=1e-12)


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


def test_the_command_packs_and_indexes(tree, tmp_path, capsys, monkeypatch):
    """As a process, and without docstrings (-OO), which its help is written from; its errors are one line."""

    def run(*arguments):
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)

    shards = tmp_path / "shards"
    packed = run(ROOT / "preprocess.py", "pack", tree, shards)
    assert packed.returncode == 0 and "22 images of 2 classes in 1 shards" in packed.stdout and packed.stderr == ""
    monkeypatch.setattr(sys, "argv", ["preprocess.py", "pack", str(tree), str(shards)])
    with pytest.raises(SystemExit) as end:
        raise SystemExit(preprocess.shards_main())
    error = capsys.readouterr().err
    assert end.value.code == 2 and "already holds" in error and error.count("\n") == 1
    (shards / "train-index.npz").unlink()
    indexed = run("-OO", ROOT / "preprocess.py", "index", shards / "train-000000.tar")
    assert indexed.returncode == 0 and "22 images" in indexed.stdout
