"""A detection run that is ready to train: data, network and optimizer, on the machinery of sasa/training."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from config import ConfigError, nominal_batch, refuse_idle_flags
from sasa.analysis.flops import count_parameters
from sasa.detection import digits
from sasa.detection.coco import read_split
from sasa.detection.config import FIELDS_HERE, DetectionConfig, as_flag, resolve
from sasa.detection.data import CocoImages, DetectionSplit, Jitter
from sasa.detection.evaluation import require_pycocotools
from sasa.detection.flops import detector_flops
from sasa.detection.retinanet import IMAGENET_MEAN, IMAGENET_STD, dense, retinanet
from sasa.kernels.dispatch import named_backend
from sasa.training import distributed
from sasa.training.cli import Command
from sasa.training.device import AMP_NAMES, check_bf16_gradients
from sasa.training.image_list import Listed
from sasa.training.lock import FolderLock
from sasa.training.network import as_flags
from sasa.training.resume import RunSpec, specify_run
from sasa.training.run import Run, assemble, check_last_map, prepare_machine, seeded

BACKBONE = "backbone.body."  # where the weights of a classification network are in a detector's
# Mean and standard deviation of the training images in [0, 1]: of the digits' canvases by `digits`, rounded to 3 places
# (tests/detection/test_detection_run.py computes them again).
STATS = {"DIGITS": ((0.089,) * 3, (0.200,) * 3), "COCO": (IMAGENET_MEAN, IMAGENET_STD)}


class DetectionInfo(NamedTuple):
    """A detection set as the network is fed with it; image_size is the longer side in pixels."""

    name: str
    num_classes: int
    class_names: tuple[str, ...]
    image_size: int


@dataclass
class DetectionData:
    """A detection set, in its splits: the `RunData` of a detection run."""

    info: DetectionInfo
    train: DetectionSplit
    val: DetectionSplit

    @property
    def splits(self) -> list[DetectionSplit]:
        return [self.train, self.val]

    def identity(self) -> dict[str, Any]:
        mean, std = STATS[self.info.name]
        train, val = self.train.truth.fingerprint(), self.val.truth.fingerprint()
        about = {"dataset": self.info.name, "class_names": list(self.info.class_names)}
        return about | {"mean": list(mean), "std": list(std), "train": train, "holdout": None, "test": val}

    def listed(self) -> Iterator[Listed]:
        splits = ("train", self.train), ("test", self.val)
        return (Listed(name, *image) for name, split in splits for image in split.truth.listed())

    def close(self) -> None:
        for split in self.splits:
            split.close()


class DetectionRun(Run):
    """A `Run` over a detection set."""

    def batches(self):
        """This rank's batches of the open epoch from the next one on: `micro_batches` pairs of lists a step."""
        progress = self.progress
        return self.data.train.batches(
            progress.epoch, progress.batch, global_batch=self.global_batch, accumulate=self.micro_batches,
            rank=distributed.rank(), world_size=distributed.world_size(), seed=self.config.seed,
        )  # fmt: skip


def specify(command: Command, lock: FolderLock) -> RunSpec:
    """The run that a training command names. For the main rank: it reads the run's folder."""
    require_pycocotools()  # before an hour of training, not after

    def new(given: dict[str, Any]) -> DetectionConfig:
        config = resolve(given, given.get("dataset", "DIGITS"), distributed.world_size())
        if command.resume is None:
            refuse_idle_flags(config, given)
        return config

    return specify_run(command, lock, DetectionConfig, new)


def set_up(spec: RunSpec, is_stopped: Callable[[], bool] = lambda: False) -> DetectionRun:
    """Device, data, network and optimizer of a run, and its folder; nothing in the folder is changed yet.

    Raises:
        SharedError: the configuration, the data or the machine do not allow it.
    """
    device, amp = prepare_machine(spec.config)
    config = dataclasses.replace(spec.config, amp=AMP_NAMES[amp], name=spec.folder.name)
    data = load_data(config, device, is_stopped)
    if config.batch_norm != "frozen":
        side = math.ceil(config.img_size / 32)  # of the backbone's last map
        distributed.on_all_ranks(partial(check_last_map, config, len(data.train), side))
    nominal = spec.global_batch or nominal_batch(config, distributed.world_size())
    build = partial(seeded, partial(build_detector, config, data.info.num_classes), config, device)
    detector = distributed.on_all_ranks(build)
    distributed.on_all_ranks(partial(check_bf16_gradients, dense(detector), config.img_size, amp, device))
    return assemble(DetectionRun, spec, config, data, detector, device, amp, nominal)


def load_data(
    config: DetectionConfig, device: torch.device, is_stopped: Callable[[], bool] = lambda: False
) -> DetectionData:
    """The data set of a configuration, on the main rank first, which draws the digits.

    Args:
        is_stopped: whether the run has to stop: then nothing waits for a silent worker.

    Raises:
        SharedError: what is wrong with it.
    """
    return distributed.main_rank_first(partial(_read_data, config, device, is_stopped))


def _read_data(config: DetectionConfig, device: torch.device, is_stopped: Callable[[], bool]) -> DetectionData:
    folder = Path(config.data_dir)
    if config.dataset == "DIGITS":
        folder = digits.make(folder)
    train, val = (read_split(folder, f"{name}2017") for name in ("train", "val"))
    if (train.category_ids, train.class_names) != (val.category_ids, val.class_names):
        raise ConfigError(f"--data-dir {folder}: train2017 and val2017 have different categories")
    mean, _ = STATS[config.dataset]
    fill = tuple(round(255 * value) for value in mean)
    jitter = Jitter(config.jitter_low, config.jitter_high, config.flip)
    info = DetectionInfo(config.dataset, len(train.class_names), train.class_names, config.img_size)
    parts = [CocoImages(split, config.img_size, fill, jitter) for split in (train, val)]
    workers = config.num_workers, config.worker_timeout, is_stopped
    return DetectionData(info, *(DetectionSplit(part, device, *workers) for part in parts))


def build_detector(config: DetectionConfig, num_classes: int) -> nn.Module:
    """A new detector on the CPU.

    Raises:
        ConfigError: options that do not go together in a layer, or a backend that is not usable here.
    """
    mean, std = STATS[config.dataset]
    options = config.network_options()
    if config.sync_bn:  # by the run: torch's own synchronised norm needs a GPU
        options["batch_norm"] = "plain"
    try:
        named_backend(config.backend)  # now, not in the first step
        return retinanet(num_classes=num_classes, mean=mean, std=std, **options)
    except ValueError as error:
        known = {*FIELDS_HERE, "scales", "backbone", "image_size"}
        raise ConfigError(as_flags(str(error), known, as_flag)) from error


def initial_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of an --init-from checkpoint by a detector's names: those of a classification network go below
    `BACKBONE`."""
    if any(name.startswith(BACKBONE) for name in weights):
        return weights
    return {BACKBONE + name: value for name, value in weights.items()}


def describe(run: DetectionRun) -> None:
    """What is about to run, for a person."""
    config, data, cpu = run.config, run.data, run.device.type == "cpu"
    device = f"CPU, {torch.get_num_threads()} threads" if cpu else torch.cuda.get_device_name(run.device)
    precision = "fp32" if config.amp == "off" else config.amp
    ranks, stages = distributed.world_size(), config.attention_stages
    convolution = stages == () or config.model_name.startswith("Naive")
    body = "convolution" if convolution else "attention" if stages is None else f"attention in stages {stages}"
    print(f"device    {device}, {precision}, torch {torch.__version__}")
    if ranks > 1:
        norm = "over all ranks" if config.sync_bn else "of each rank's own batch"
        print(f"ranks     {ranks}, {run.micro_batches} micro-batches a step each; batch norm {norm}")
    for name, split in (("train", data.train), ("val", data.val)):
        truth = split.truth
        empty = sum(len(truth.targets(i)[0]) == 0 for i in range(len(truth)))
        print(f"{name:10}{len(truth)} images of {truth.folder}, {len(truth.boxes)} boxes; left out of training: "
              f"{truth.crowds} of crowds, {truth.empty} without an area; {empty} images without boxes")  # fmt: skip
    print(f"          {data.info.num_classes} classes, images of {config.img_size} pixels")
    print(f"model     RetinaNet, {config.model_name} ({body}), {'attention' if config.stem else 'convolution'} stem, "
          f"{config.fpn} pyramid, {config.heads} heads of {config.fpn_channels} channels")  # fmt: skip
    print(f"          {count_parameters(run.model):,} parameters, "
          f"{detector_flops(run.model, config.img_size).total:,} FLOPs an image")  # fmt: skip
    print(f"recipe    {config.epochs} epochs of {run.steps_per_epoch} steps of {run.global_batch} images, "
          f"{config.optimizer}, peak rate {config.lr:g}, seed {config.seed}")  # fmt: skip
    print(f"folder    {run.folder}; watch it with: tensorboard --logdir {run.folder.parent}", flush=True)
