"""The recipes rsb, rsb-a3 and strong: their schedules by hand, and what they turn on."""

import math
import re

import pytest
import torch

from config import resolve
from preprocess import TensorData, info_without_files
from sasa.training.optim import learning_rate
from sasa.training.run import augmentation
from tools import pipeline


@pytest.mark.parametrize(("name", "dataset", "ranks", "epochs", "peak", "lowest", "warm_up"), [
    ("rsb", "IMAGENET", 8, 300, 5e-3, 1e-6, 5),
    ("rsb", "WEBDATASET", 1, 300, 5e-3 / math.sqrt(8), 1e-6, 5),
    ("rsb-a3", "IMAGENET", 8, 100, 8e-3, 1e-6, 5),
    ("strong", "CIFAR10", 1, 500, 5.5e-4, 1e-5, 10),
    ("strong", "CIFAR100", 4, 500, 1.1e-3, 1e-5, 10),
])  # fmt: skip
def test_the_schedule_by_hand(name, dataset, ranks, epochs, peak, lowest, warm_up):
    """10 steps an epoch: a tenth of the warm-up, its end, the middle of the cosine and its end."""
    config = resolve({"recipe": name}, dataset, ranks)
    assert (config.epochs, config.schedule) == (epochs, "cosine")
    middle = warm_up + (epochs - warm_up) / 2
    by_hand = {warm_up - 1: peak / 10, 10 * warm_up - 1: peak, 10 * warm_up: peak,
               round(10 * middle): (peak + lowest) / 2, 10 * epochs: lowest}  # fmt: skip
    assert {step: learning_rate(config, step, 10) for step in by_hand} == pytest.approx(by_hand)
    rates = [learning_rate(config, step, 1) for step in range(epochs)]
    assert rates[warm_up:] == sorted(rates[warm_up:], reverse=True) and rates[-1] > lowest


def test_what_rsb_turns_on():
    a2, a3 = resolve({"recipe": "rsb"}, "IMAGENET", 8), resolve({"recipe": "rsb-a3"}, "IMAGENET", 8)
    assert (a2.optimizer, a2.loss, a2.bce_threshold, a2.label_smoothing) == ("lamb", "bce", 0.2, 0.0)
    assert (a2.weight_decay, a2.mixup, a2.cutmix, a2.eval_crop) == (0.02, 0.1, 1.0, 0.95)
    assert (a2.repeats, a2.drop_path, a2.auto_augment, a2.rand_magnitude) == (3, 0.05, "rand", 21)
    assert (a3.repeats, a3.drop_path, a3.rand_magnitude, a3.eval_crop) == (1, 0.0, 18, 0.95)
    assert resolve({"recipe": "rsb", "eval_crop": 0.8}, "IMAGENET").eval_crop == 0.8


@pytest.mark.parametrize("dataset", ["CIFAR10", "DIGITS"])
def test_a_batch_of_strong_has_everything_on(dataset):
    config = resolve({"recipe": "strong", "batch_size": 32}, dataset)
    side = 32 if dataset == "CIFAR10" else 8
    images = torch.randint(0, 256, (64, 3, side, side), dtype=torch.uint8)
    data = TensorData(images, torch.arange(64) % 10, info_without_files(dataset, 10, side))
    batches = list(data.batches(0, batch_size=32, augment=augmentation(config)))
    assert len(batches) == 2
    for pixels, targets in batches:
        assert pixels.shape == (32, 3, side, side) and pixels.isfinite().all()
        torch.testing.assert_close(targets.sum(1), torch.ones(32))
        assert ((targets > 0).sum(1) == 2).any()
    assert (config.random_erase, config.drop_path, config.auto_augment) == (0.25, 0.1, "rand")


def test_the_pipeline_is_measured(capsys):
    flags = ["--batch-size", "8", "--rounds", "1", "--dataset", "DIGITS", "--model-name", "NaiveResNet26"]
    assert pipeline.main(flags) == 0
    found = re.search(r"input (\d+) images/s, NaiveResNet26 trains ([\d.]+): ([\d.]+) times", capsys.readouterr().out)
    made, trained, ratio = map(float, found.groups())
    assert ratio == pytest.approx(made / trained, rel=0.05) and ratio > 1
