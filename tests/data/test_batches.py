"""batches.py: order, augmentation and mixing as functions of (seed, epoch, step), whatever the number of processes."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import preprocess
from data_sets import (
    EVERYTHING,
    FOR_TREES,
    WITHOUT_RANDAUGMENT,
    batches,
    plain_set,
    same,
    small_set,
)
from preprocess import DataError, load
from sasa.data.augment import AugmentConfig


def test_order_is_a_permutation_by_seed_and_epoch():
    order = preprocess.epoch_order(100, 3, 7)
    assert sorted(order.tolist()) == list(range(100))
    torch.rand(5)  # the global generator's state plays no part
    assert torch.equal(order, preprocess.epoch_order(100, 3, 7))
    others = [preprocess.epoch_order(100, *key) for key in ((3, 8), (4, 7), (7, 3), (0, 0), (0, 1))]
    assert not any(torch.equal(order, other) for other in others)


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


@pytest.mark.gpu
def test_batches_on_a_gpu_are_those_of_the_cpu():
    on_cpu, on_gpu = (load(dataset="DIGITS", img_size=16, device=device)[1] for device in ("cpu", "cuda"))
    pairs = zip(*(batches(data, augment=WITHOUT_RANDAUGMENT) for data in (on_cpu, on_gpu)), strict=True)
    for (images, targets), (gpu_images, gpu_targets) in pairs:
        assert gpu_images.is_cuda and gpu_targets.is_cuda
        torch.testing.assert_close(gpu_images.cpu(), images, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(gpu_targets.cpu(), targets)
