"""What each rank of test_ranks.py runs: a detection run on a few canvases."""

import os
from pathlib import Path

import pytest
import torch

import train
from sasa.detection import data, digits, run
from sasa.detection import train as detection
from sasa.detection.config import ABOUT, PROG, DetectionConfig
from sasa.training.cli import parse_command_line

CANVASES = {"train": 9, "val": 3}  # an epoch of 2 steps of 4 images; 2 ranks do not divide the validation images


def detect(output: str, flags: str) -> int:
    """A run in fp64; leaves the losses of the steps and the final weights in output/held<rank>.pt."""
    patch, losses, weights = pytest.MonkeyPatch(), [], {}
    build, to_device = run.build_detector, data.to_device

    def to_device_in_fp64(*arguments):
        images, targets = to_device(*arguments)
        return [image.double() for image in images], targets

    patch.setattr(run, "build_detector", lambda *arguments: build(*arguments).double())
    patch.setattr(data, "to_device", to_device_in_fp64)
    patch.setattr(digits, "COUNTS", CANVASES)
    patch.setattr(digits, "ABOUT", digits.ABOUT | {"canvases": CANVASES})
    step, finish = train.train_step, detection.DETECTION.finish

    def train_step(*arguments):
        done = step(*arguments)
        losses.append(done.read().loss)
        return done

    def kept(trained, *more):
        weights.update(trained.model.state_dict())
        return finish(trained, *more)

    patch.setattr(train, "train_step", train_step)
    folder = ["--data-dir", f"{output}/data", "--output-dir", f"{output}/runs"]
    command = parse_command_line([*folder, *flags.split()], DetectionConfig, PROG, ABOUT)
    code = train.main(command, task=detection.DETECTION._replace(finish=kept))
    torch.save({"losses": losses, "model": weights}, Path(output) / f"held{os.environ['RANK']}.pt")
    return code
