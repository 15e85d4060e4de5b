"""Classification, as train.py trains it: its loss, its figures, the end of an epoch and of a run."""

import copy
import math
from typing import Any

import torch
from torch import Tensor

import preprocess
from config import Config, refuse_idle_flags
from sasa.analysis.attention_maps import attention_layers, lattice, record_attention
from sasa.analysis.flops import count_flops, count_parameters
from sasa.training import checkpoint, distributed
from sasa.training.cli import PROG, Command
from sasa.training.device import peak_memory_mib
from sasa.training.evaluation import EVAL_BATCH, Evaluation, evaluate
from sasa.training.files import BEST, SUMMARY, write_json
from sasa.training.lock import FolderLock
from sasa.training.losses import mean_loss
from sasa.training.monitor import WRONG_SHOWN, Monitor
from sasa.training.resume import RunSpec, new_config, specify_run
from sasa.training.run import Run, bad_images, describe, set_up
from sasa.training.saving import Saver, TrainingError
from sasa.training.scoring import evaluate_checkpoint
from sasa.training.signals import StopRequest
from sasa.training.task import Task, Validation

WATCHED_IMAGES, WATCHED_PIXELS = 8, 64  # of the attention panels: the first validation images, pixels a map


def specify(command: Command, lock: FolderLock) -> RunSpec:
    """The run that a training command names. For the main rank: it reads the run's folder."""

    def new(given: dict[str, Any]) -> Config:
        config = new_config(given)
        if command.resume is None:
            refuse_idle_flags(config, given)
        return config

    return specify_run(command, lock, new=new)


def loss_and_right(run: Run, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mean loss of images (B, 3, H, W) with labels (B,) or soft targets (B, classes); right predictions."""
    config = run.config
    with run.autocast():
        logits = run.network(images)
    labels = targets if targets.ndim == 1 else targets.argmax(1)
    right = (logits.detach().argmax(1) == labels).sum()
    loss = mean_loss(
        logits.float(), targets, kind=config.loss, label_smoothing=config.label_smoothing,
        threshold=config.bce_threshold, weights=run.class_weights,
    )  # fmt: skip
    return loss, right


def validate(run: Run, monitor: Monitor, stop: StopRequest, is_last: bool) -> Validation | None:
    """The score at an epoch's end, its row everywhere, and pictures; None after a signal."""
    config, progress, info = run.config, run.progress, run.data.info
    keep_wrong = WRONG_SHOWN if config.preview or (is_last and run.data.holdout is None) else 0
    is_whole = progress.batch >= run.steps_per_epoch
    is_scored = is_last or not is_whole or (progress.epoch + 1) % config.val_every == 0
    result = Evaluation.none()
    if is_scored:
        result = evaluate(
            run.eval_model, run.data.val, info.num_classes, EVAL_BATCH, run.autocast, keep_wrong=keep_wrong, stop=stop
        )
    if result is None:
        return None
    row = {
        "epoch": progress.epoch + 1,
        "step": progress.step,
        "train_loss": progress.loss_sum / progress.images,
        "train_top1_pct": 100 * progress.correct / progress.images,
        "val_loss": result.loss if is_scored else None,
        "val_top1_pct": result.top1_pct if is_scored else None,
        "val_top5_pct": result.top5_pct if is_scored else None,
        "lr": run.rate(progress.step - 1),
        "images_per_s": progress.images / progress.epoch_seconds,
        "epoch_s": progress.epoch_seconds,
        "peak_mem_mib": peak_memory_mib(run.device),
    }
    if config.digest:
        row |= {"digests": run.digests(), "environment": run.environment_digest()}
    monitor.epoch(progress.step, row, config.epochs)
    if config.preview and is_scored and distributed.is_main():
        monitor.preview(result, pictures_of(result, info), info.class_names)
    if is_whole and config.attention_every and (progress.epoch + 1) % config.attention_every == 0:
        show_attention(run, monitor)
    competes = run.data.holdout is not None and is_scored
    is_best = competes and (progress.best_top1 is None or result.top1_pct > progress.best_top1)
    return Validation(result, row, result.top1_pct if is_best else None)


def pictures_of(result: Evaluation, info: preprocess.DataInfo) -> list[Tensor]:
    """The images of the wrong predictions, (3, H, W) in [0, 1]."""
    return [preprocess.denormalise(image[None], info)[0] for image, _, _ in result.wrong]


@torch.no_grad()
def show_attention(run: Run, monitor: Monitor) -> None:
    """TensorBoard's attention panels, of the same few validation images each time.

    They are of the main rank's part: another's, read here, would be among the skipped ones of both.
    """
    model = run.eval_model
    if not attention_layers(model) or not distributed.is_main():
        return
    images, _ = next(run.data.val.eval_batches(WATCHED_IMAGES, 0, distributed.world_size()), (None, None))
    if images is None:  # of a part that is empty, or of which nothing can be read
        return
    training = model.training
    model.eval()
    with record_attention(model, pixels=lattice(WATCHED_PIXELS)) as layers, run.autocast():
        model(images)
    model.train(training)
    monitor.attention(run.progress.step, layers)


def finish(run: Run, monitor: Monitor, saver: Saver, stop: StopRequest, result: Evaluation | None) -> bool:
    """The end of a run: the kept weights' score on the test split, best.pt, summary.json, then the pictures.

    Args:
        result: of the last epoch in this process, None where it trained none.

    Returns:
        False where a signal ended it before the score was there.

    Raises:
        TrainingError: the kept weights' loss is not finite.
    """
    config, progress, info = run.config, run.progress, run.data.info
    if run.best is None:
        about = "the last epoch (no images held out to select by)"
        weights, epoch = run.eval_model.state_dict(), progress.epoch
    else:
        about = (
            f"best top-1 ({progress.best_top1:.2f}%) on {info.holdout_size} held-out training images, "
            f"epoch {progress.best_epoch}"
        )
        weights, epoch = run.best, progress.best_epoch
        result = None
    if result is None:
        kept = copy.deepcopy(run.model)
        kept.load_state_dict(weights)
        result = evaluate(
            kept, run.data.test, info.num_classes, EVAL_BATCH, run.autocast, keep_wrong=WRONG_SHOWN, stop=stop
        )
        if result is None:
            return False
    skipped = bad_images(run)
    if distributed.is_main():
        best = checkpoint.weights_state(config, run.identity, weights, epoch, progress.step, about)
        checkpoint.save(best, run.folder, BEST)
        write_json(run.folder / SUMMARY, summary(run, saver, result, about, len(skipped)))
        monitor.evaluated(progress.step, result, pictures_of(result, info), info.class_names)
        monitor.hparams(progress.step, config, result)
    monitor.say(
        f"test top-1 {result.top1_pct:.2f}%, top-5 {result.top5_pct:.2f}% on {result.images} images; "
        f"{about}; trained {progress.seconds:.0f} s; {run.folder / SUMMARY}"
    )
    if not math.isfinite(result.loss):
        raise TrainingError(f"the kept weights' loss on the test split is {result.loss}: the run has no result")
    return True


def summary(run: Run, saver: Saver, result: Evaluation, about: str, skipped: int) -> dict[str, Any]:
    """What summary.json holds; `about`: which weights these are, `skipped`: unreadable images."""
    return {
        "test_top1_pct": result.top1_pct,
        "test_top5_pct": result.top5_pct,
        "test_balanced_pct": result.balanced_pct(),
        "test_loss": result.loss,
        "test_images": result.images,
        "parameters": count_parameters(run.model),
        "flops_per_image": count_flops(run.model, run.data.info.image_size).total,
        "epochs": run.progress.epoch,
        "steps": run.progress.step,
        "seconds": run.progress.seconds,
        "save_seconds": saver.seconds,
        "selected": about,
        "bad_images": skipped,
        "data_changes": run.progress.data_changes,
        "device": str(run.device),
        "torch": str(torch.__version__),
        "environment": run.environment(),
        "environment_digest": run.environment_digest(),
    }


CLASSIFICATION = Task(
    prog=PROG,
    specify=specify,
    set_up=set_up,
    describe=describe,
    initial_weights=lambda weights: weights,
    preview=lambda run, images, _: preprocess.denormalise(images, run.data.info),
    loss=loss_and_right,
    figures=lambda step: {
        "train/loss": step.loss,
        "train/top1_pct": 100 * step.counted / step.images,
        "train/lr": step.lr,
        "train/grad_norm": step.grad_norm,
    },
    bar=lambda progress: {"top1": f"{100 * progress.correct / progress.images:.1f}%"},
    validate=validate,
    finish=finish,
    evaluate=evaluate_checkpoint,
)
