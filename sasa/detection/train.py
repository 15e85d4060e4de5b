"""Train a detector, resume a run, evaluate a checkpoint. `python -m sasa.detection.train --help`.

The loop is train.py's, and so are the exit codes; here is what detection does its own way.
"""

import sys

from sasa.detection.config import ABOUT, PROG, DetectionConfig
from sasa.training.cli import Command, parse_command_line
from sasa.training.signals import StopRequest

if __name__ == "__main__":
    COMMAND = parse_command_line(None, DetectionConfig, PROG, ABOUT)  # before torch: --help answers at once
    STOP = StopRequest()
    STOP.install()

import copy
import dataclasses
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.utils import save_image

import train
from config import ConfigError
from preprocess import DataError
from sasa.analysis.flops import count_parameters
from sasa.console import printable
from sasa.detection import pictures
from sasa.detection.coco import CocoSplit, relabelled
from sasa.detection.data import Target
from sasa.detection.evaluation import FIGURES, Detections, evaluate, require_pycocotools
from sasa.detection.flops import detector_flops
from sasa.detection.run import DetectionRun, build_detector, describe, initial_weights, load_data, set_up, specify
from sasa.files import replacing
from sasa.training import checkpoint, distributed
from sasa.training.device import amp_of_checkpoint, autocast_in, peak_memory_mib, pick_device, set_fp32_precision
from sasa.training.files import BEST, SUMMARY, write_json
from sasa.training.monitor import Monitor
from sasa.training.resume import changed_keys, refuse_other_task, settled
from sasa.training.saving import Saver
from sasa.training.task import Task, Validation

EVAL_BATCH, SHOWN = 8, 8  # images
PICTURE = "detections.png"


def losses(run: DetectionRun, images: list[Tensor], targets: list[Target]) -> tuple[Tensor, Tensor]:
    """Focal loss + box loss of a micro-batch, the mean over its images; the box loss, summed over them."""
    with run.autocast():
        parts = run.network(images, targets)
    boxes = parts["bbox_regression"].float()
    return parts["classification"].float() + boxes, boxes.detach() * len(images)


def validate(run: DetectionRun, monitor: Monitor, stop: StopRequest, is_last: bool) -> Validation | None:
    """The scores at an epoch's end where they are due, and its row everywhere; None after a signal."""
    config, progress = run.config, run.progress
    result = Detections({}, {})
    if is_last or (progress.epoch + 1) % config.eval_every == 0:
        result = _evaluate(run, run.eval_model, stop)
        if result is None:
            return None
    box_loss = progress.correct / progress.images
    row = {
        "epoch": progress.epoch + 1,
        "step": progress.step,
        "train_loss": progress.loss_sum / progress.images,
        "train_box_loss": box_loss,
        **{f"val_{name}_pct": result.figures.get(name) for name in FIGURES},
        "lr": run.rate(progress.step - 1),
        "images_per_s": progress.images / progress.epoch_seconds,
        "epoch_s": progress.epoch_seconds,
        "peak_mem_mib": peak_memory_mib(run.device),
    }
    scored = f"val {in_words(result.figures)}  " if result.figures else ""
    monitor.row(
        progress.step,
        row,
        f"epoch {row['epoch']:3d}/{config.epochs}  train loss {row['train_loss']:.4f} (boxes {box_loss:.4f})  {scored}"
        f"lr {row['lr']:.2e}  {row['images_per_s']:.1f} images/s  {row['epoch_s']:.1f} s",
    )
    return Validation(result, row)


def _evaluate(run: DetectionRun, model: torch.nn.Module, stop: StopRequest) -> Detections | None:
    val = run.data.val
    batches = val.eval_batches(EVAL_BATCH, distributed.rank(), distributed.world_size())
    return evaluate(model, val.truth, batches, run.autocast, stop)


def in_words(figures: dict[str, float | None]) -> str:
    """mAP 51.23%, at IoU 0.50 70.00%, at 0.75 60.00%; "-" where there is nothing to find."""
    words = (("mAP", "map"), ("at IoU 0.50", "map_50"), ("at 0.75", "map_75"))
    return ", ".join(f"{word} {'-' if figures[key] is None else f'{figures[key]:.2f}%'}" for word, key in words)


def finish(run: DetectionRun, monitor: Monitor, saver: Saver, stop: StopRequest, result: Detections | None) -> bool:
    """The end of a run: the last weights' score, best.pt, summary.json, then the pictures.

    Args:
        result: of the last epoch in this process, None where it trained none.

    Returns:
        False where a signal ended it before the score was there.
    """
    config, progress = run.config, run.progress
    if result is None or not result.figures:
        result = _evaluate(run, copy.deepcopy(run.eval_model), stop)
        if result is None:
            return False
    about = "the last epoch"
    if distributed.is_main():
        weights = run.eval_model.state_dict()
        checkpoint.save(
            checkpoint.weights_state(config, run.identity, weights, progress.epoch, progress.step, about),
            run.folder,
            BEST,
        )
        write_json(run.folder / SUMMARY, summary(run, saver, result, about))
        monitor.attempt(PICTURE, partial(draw_detections, run, monitor, result))
    monitor.say(
        f"val {in_words(result.figures)} on {len(run.data.val)} images; {about}; "
        f"trained {progress.seconds:.0f} s; {run.folder / SUMMARY}"
    )
    return True


def draw_detections(run: DetectionRun, monitor: Monitor, result: Detections) -> None:
    """The first validation images with what was found in them: for TensorBoard, and as a file of the run's folder."""
    val = run.data.val
    shown = pictures.detections(val.truth, *first_images(val, result.found), result.found)
    monitor.picture("detections", shown, run.progress.step)
    with replacing(run.folder / PICTURE) as file:
        save_image(shown, file, format="png")


def first_images(split, found: dict[int, list]) -> tuple[list[int], list[Tensor], list[Target]]:
    """The first images that this rank has evaluated, with their numbers and targets."""
    numbers, images, targets = [], [], []
    for some, pixels, truths in islice(split.eval_batches(SHOWN), len(split)):
        for number, image, target in zip(some, pixels, truths, strict=True):
            if number in found and len(numbers) < SHOWN:
                numbers.append(number)
                images.append(image)
                targets.append(target)
        if len(numbers) == SHOWN:
            break
    return numbers, images, targets


def summary(run: DetectionRun, saver: Saver, result: Detections, about: str) -> dict[str, Any]:
    """What summary.json holds; `about`: which weights these are."""
    return {f"val_{name}_pct": value for name, value in result.figures.items()} | {
        "val_images": len(run.data.val),
        "parameters": count_parameters(run.model),
        "flops_per_image": detector_flops(run.model, run.config.img_size).total,
        "epochs": run.progress.epoch,
        "steps": run.progress.step,
        "seconds": run.progress.seconds,
        "save_seconds": saver.seconds,
        "selected": about,
        "data_changes": run.progress.data_changes,
        "threads": torch.get_num_threads(),
        "device": str(run.device),
        "torch": str(torch.__version__),
    }


def evaluate_checkpoint(command: Command) -> int:
    """Print COCO's figures of the checkpoint that --evaluate names on its own validation images; the exit code.

    Raises:
        ConfigError, CheckpointError, DataError, SharedError: flags that change the network, a file that is no
            checkpoint of a detector, data that does not fit it.
    """
    require_pycocotools()
    path = Path(command.evaluate)
    state = distributed.on_main_rank(partial(checkpoint.load, path))
    refuse_other_task(state["config"], path, DetectionConfig)
    given = settled(command.given, state["config"])
    saved = DetectionConfig.from_dict(state["config"])
    config = dataclasses.replace(saved, **given)
    allowed = ("batch_size", "amp")
    changed = changed_keys(saved, dataclasses.replace(config, **{key: getattr(saved, key) for key in allowed}))
    if changed:
        raise ConfigError(f"--evaluate rebuilds the checkpoint's own network and data set: {'; '.join(changed)}")
    device = pick_device(config.device)
    set_fp32_precision(config.matmul_precision)
    amp = amp_of_checkpoint(saved.amp, device, given.get("amp"))
    data = load_data(config, device)
    try:
        truth = in_classes_of(state, data.val.truth, config.data_dir, path)
        model = build_detector(config, data.info.num_classes)
        checkpoint.load_weights(model, checkpoint.weights_of(state))
        batch = config.batch_size if "batch_size" in given else EVAL_BATCH
        batches = data.val.eval_batches(batch, distributed.rank(), distributed.world_size())
        autocast = autocast_in(amp, device)
        result = evaluate(model.to(device), truth, batches, autocast)
    finally:
        data.close()
    if distributed.is_main():
        print(f"{printable(path)}: {config.model_name} on val2017 of {config.dataset}, {len(data.val)} images")
        if truth is not data.val.truth:
            print("the annotations have the checkpoint's classes in another order: they are compared by their names")
        for name, value in result.figures.items():
            print(f"  {name:14}{'     -' if value is None else f'{value:6.2f}'}%")
        print(f"val {in_words(result.figures)}")
    return 0


def in_classes_of(state: dict[str, Any], truth: CocoSplit, data_dir: str, path: Path) -> CocoSplit:
    """The validation images with the labels of the checkpoint's classes.

    Raises:
        DataError: they show other classes.
    """
    if state["format"] != checkpoint.FORMAT:  # which holds no names
        return truth
    try:
        return relabelled(truth, tuple(state["data"]["class_names"]))
    except DataError as error:
        raise DataError(f"{data_dir}: other classes than those of the checkpoint {path}: {error}") from None


DETECTION = Task(
    prog=PROG.removeprefix("python -m "),
    specify=specify,
    set_up=set_up,
    describe=describe,
    initial_weights=initial_weights,
    preview=lambda run, images, targets: pictures.training_images(images, targets, run.data.info.class_names),
    loss=losses,
    figures=lambda step: {
        "train/loss": step.loss,
        "train/box_loss": step.counted / step.images,
        "train/class_loss": step.loss - step.counted / step.images,
        "train/lr": step.lr,
        "train/grad_norm": step.grad_norm,
    },
    bar=lambda progress: {"boxes": f"{progress.correct / progress.images:.3f}"},
    validate=validate,
    finish=finish,
    evaluate=evaluate_checkpoint,
)

if __name__ == "__main__":
    sys.exit(train.main(COMMAND, STOP, DETECTION))
