"""Train a network, resume a run, evaluate a checkpoint: set-up -> epochs -> evaluation. `python train.py --help`.

Exit codes: 0 done; 2 wrong usage or data; 75 stopped by a signal, its state saved where there was one; 1 anything else.
"""

import sys

from sasa.training.cli import PROG, Command, parse_command_line
from sasa.training.signals import STOPPED, StopRequest

if __name__ == "__main__":
    COMMAND = parse_command_line()  # before torch is imported: --help and a wrong flag answer at once
    STOP = StopRequest()
    STOP.install()

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import preprocess
from config import ConfigError
from preprocess import DataError, WorkerError
from sasa.analysis.attention_maps import attention_layers, lattice, record_attention
from sasa.analysis.flops import count_flops, count_parameters
from sasa.console import USAGE_ERROR, one_line, print_error
from sasa.kernels.stop_signals import BuildStopped
from sasa.training import checkpoint, distributed, environment
from sasa.training.checkpoint import CheckpointError, Progress
from sasa.training.device import is_out_of_memory, peak_memory_mib
from sasa.training.distributed import SharedError
from sasa.training.evaluation import EVAL_BATCH, Evaluation, evaluate
from sasa.training.files import BEST, SUMMARY, claim_folder, write_json
from sasa.training.lock import FolderLock
from sasa.training.losses import mean_loss
from sasa.training.monitor import WRONG_SHOWN, Monitor, Silent
from sasa.training.optim import learning_rate, set_rate
from sasa.training.resume import Plan, check_data, make_plan, report_changes
from sasa.training.run import Run, describe, initialise, set_up
from sasa.training.saving import Saver, TrainingError
from sasa.training.scoring import evaluate_checkpoint
from sasa.training.streams import surviving_streams

WATCHED_IMAGES, WATCHED_PIXELS = 8, 64  # of the attention panels: the first validation images, pixels a map
SKIPPED_STEPS = 10  # in a row, by fp16's scaler: then the run has diverged


class Task(NamedTuple):
    """What a kind of training does its own way; the loop around it is one. `CLASSIFICATION` is this command's.

    Attributes:
        prog: the command, in messages.
        plan, set_up, describe: from the command to a run that is ready.
        initial_weights: the weights of an --init-from checkpoint by the names that the network has.
        preview: pictures (B, 3, H, W) in [0, 1] of a first batch.
        loss: the mean loss of a micro-batch, and what is counted of it, summed over its images.
        figures: of a step, for TensorBoard. bar: of the open epoch, for the progress bar.
        finish_epoch, finish: an epoch's end and the run's.
        evaluate: --evaluate; returns the exit code.
    """

    prog: str
    plan: Callable[[Command, FolderLock], Plan]
    set_up: Callable[[Plan, Callable[[], bool]], Run]
    describe: Callable[[Run], None]
    initial_weights: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    preview: Callable[..., Tensor]
    loss: Callable[..., tuple[Tensor, Tensor]]
    figures: Callable[["Step"], dict[str, float]]
    bar: Callable[[Progress], dict[str, str]]
    finish_epoch: Callable[..., Any]
    finish: Callable[..., bool]
    evaluate: Callable[[Command], int]


def main(command: Command, stop: StopRequest | None = None, task: Task | None = None) -> int:
    """Do what the command line says, on every rank alike; returns the exit code.

    Args:
        task: None is `CLASSIFICATION`.
    """
    task = task or CLASSIFICATION
    if stop is None:
        stop = StopRequest()
        stop.install()
    with surviving_streams():
        return run_command(command, stop, task)


def run_command(command: Command, stop: StopRequest, task: Task) -> int:
    """`main`, with streams that cannot fail."""
    distributed.start()
    try:
        code = task.evaluate(command) if command.evaluate is not None else run_to_end(command, stop, task)
    except SharedError as shared:
        code = exit_code_of(shared.error)
        if code is None:
            raise shared.error from None
        if distributed.is_main():
            print_error(task.prog, with_advice(shared.error))
    except Exception as error:  # of this rank alone: the others do not know
        code = exit_code_of(error)
        if code is None:
            raise
        print_error(task.prog, with_advice(error))
        sys.exit(code)
    distributed.stop()
    return code


def exit_code_of(error: Exception) -> int | None:
    """Of an error that one line explains; None for any other, whose traceback is wanted."""
    if isinstance(error, ConfigError | DataError | CheckpointError):
        return USAGE_ERROR
    if isinstance(error, WorkerError | BuildStopped):  # nothing was trained yet: a restart can help
        return STOPPED
    return 1 if is_out_of_memory(error) else None


def with_advice(error: Exception) -> str:
    """The text of an error that one line explains."""
    if not is_out_of_memory(error):
        return str(error)
    return f"out of memory: {one_line(error, 200)}; a smaller --batch-size, --img-size or --eval-size needs less"


def run_to_end(command: Command, stop: StopRequest, task: Task) -> int:
    """Plan, set up, go on from a state or from other weights, train; returns the exit code."""
    lock = FolderLock()
    try:
        plan = distributed.on_main_rank(partial(task.plan, command, lock))
        return run_plan(plan, command, stop, task)
    finally:
        lock.release()


def run_plan(plan: Plan, command: Command, stop: StopRequest, task: Task) -> int:
    """`run_to_end`, in a folder that no other run is in."""
    run = task.set_up(plan, lambda: stop.received is not None)
    try:
        if distributed.is_main():
            task.describe(run)
        if command.init_from is not None:
            initialise(run, Path(command.init_from), task.initial_weights)
        if plan.state is not None:
            tolerated = command.allow_changed_data, getattr(run.config, "skip_bad_images", False)
            changes = distributed.on_main_rank(partial(check_data, plan.state["data"], run.identity.data, *tolerated))
            distributed.on_all_ranks(partial(run.restore, plan.state))
            run.progress.data_changes += changes
            report_changes(plan.state, run.config.sync_bn, changes)
        return train(run, stop, command.overwrite, task)
    finally:
        run.data.close()


# ---- training -------------------------------------------------------------------------------------------------------


def train(run: Run, stop: StopRequest, overwrite: bool, task: Task) -> int:
    """All epochs that are left, then the summary; returns the exit code."""
    config, progress = run.config, run.progress
    fresh, begun = progress.step == 0, progress.step
    first = distributed.on_all_ranks(lambda: next(run.batches())) if fresh else None  # wrong data: no file changed
    distributed.on_main_rank(partial(claim_folder, run.folder, config, run.identity.run_id, overwrite))
    if distributed.is_main():
        monitor = Monitor(run.folder, progress, run.steps_per_epoch, config.progress and sys.stderr.isatty(),
                          config.log_csv)  # fmt: skip
    else:
        monitor = Silent()
    saver = Saver(config, monitor)
    stop.has_state = True
    if first is not None:
        saver.keep(run)
        monitor.start(0, config, str(run.model), task.preview(run, *first))
    else:
        monitor.say(f"resumed   at step {progress.step}, epoch {progress.epoch + 1}, batch {progress.batch}")
    try:
        try:
            finished = train_epochs(run, monitor, saver, stop, task)
        except (DataError, WorkerError, SharedError) as error:
            return stop_after_reading(error, run, saver, task.prog, progress.step > begun)
        if not finished:
            signals = [name for name in distributed.all_gather_object(stop.received) if name is not None]
            monitor.say(
                f"stopped by {signals[0]} at step {progress.step}, saved: the same command with --resume goes on"
            )
        return 0 if finished else STOPPED
    except TrainingError as error:  # on every rank
        if distributed.is_main():
            print_error(task.prog, error)
        return 1
    except OSError as error:  # a full disk
        print_error(task.prog, f"{error}: stopping at step {progress.step}")
        sys.exit(1)  # not `return`: the other ranks do not know
    finally:
        monitor.close()


def stop_after_reading(
    error: DataError | WorkerError | SharedError, run: Run, saver: Saver, prog: str, trained: bool
) -> int:
    """A decoding process died, or an image cannot be read, while the run is sound: save the last step's state.

    Where one rank alone has noticed it, the others are in the middle of a step: it ends unsaved, and they with it.

    Args:
        trained: steps were done since the start; before, wrong data changes no file.

    Returns:
        The exit code: STOPPED where a restart can help.
    """
    cause = error.error if isinstance(error, SharedError) else error
    if not isinstance(cause, DataError | WorkerError) or (isinstance(cause, DataError) and not trained):
        raise error
    code = exit_code_of(cause)
    if isinstance(error, SharedError) or not distributed.is_distributed():
        saver.save_or_end(run)
        if distributed.is_main():
            print_error(prog, f"{cause}; saved at step {run.progress.step}: the same command with --resume goes on")
        return code
    print_error(prog, cause)
    sys.exit(code)


def train_epochs(run: Run, monitor: Monitor, saver: Saver, stop: StopRequest, task: Task) -> bool:
    """Epoch by epoch to the run's end; False where a signal ended it before, with its state saved."""
    progress, result, reported = run.progress, None, set()
    last_step = min(run.config.epochs * run.steps_per_epoch, run.config.max_steps or math.inf)
    with monitor.whole_run(last_step, progress.step) as whole:
        while not is_over(run):
            if not train_epoch(run, monitor, saver, stop, whole, task):
                return False
            result = task.finish_epoch(run, monitor, saver, stop)
            if result is None:
                return False
            reported = report_bad_images(run, monitor, reported)
            if at_max_steps(run):
                break
            if has_stopped_rising(run):
                monitor.say(f"ended early: no better top-1 on the held-out images since epoch {progress.best_epoch}")
    return task.finish(run, monitor, saver, stop, result)


def is_over(run: Run) -> bool:
    """Whether no epoch is to be trained any more; one that --max-steps has cut is finished by a resume."""
    done = run.progress.epoch >= run.config.epochs or has_stopped_rising(run)
    return done or (at_max_steps(run) and not run.progress.batch)


def has_stopped_rising(run: Run) -> bool:
    """Whether --early-stop ends the run after the last whole epoch: a function of what a checkpoint holds."""
    progress, patience = run.progress, run.config.early_stop
    if not patience or progress.batch or progress.best_epoch is None or not progress.rows:
        return False
    is_scored = progress.rows[-1]["val_top1_pct"] is not None
    return is_scored and progress.epoch - progress.best_epoch >= patience


def at_max_steps(run: Run) -> bool:
    return run.config.max_steps is not None and run.progress.step >= run.config.max_steps


def train_epoch(run: Run, monitor: Monitor, saver: Saver, stop: StopRequest, whole: tqdm, task: Task) -> bool:
    """The rest of the open epoch, or up to --max-steps, saving by the clock; False after a signal, with all saved.

    Args:
        whole: the bar of the run's steps.
    """
    progress = run.progress
    run.network.train()
    pairs = run.batches()
    with monitor.batches(run.steps_per_epoch, progress.batch, progress.epoch) as bar:
        while progress.batch < run.steps_per_epoch and not at_max_steps(run):
            started = time.perf_counter()
            step = train_step(run, islice(pairs, run.micro_batches), stop, saver, task)
            progress.add(step.loss, step.counted, step.images, time.perf_counter() - started)
            progress.figures = task.figures(step)
            bar.update()
            whole.update()
            bar.set_postfix(loss=f"{step.loss:.3f}", **task.bar(progress),
                            images=f"{progress.images / progress.epoch_seconds:.0f}/s", refresh=False)  # fmt: skip
            monitor.step(progress.step, progress.figures)
            if step.requests.stop:
                saver.save_or_end(run)
                return False
            if step.requests.save:
                saver.save(run)
    return True


class Requests(NamedTuple):
    """What is to be done after a step: one rank's wish, or what all ranks do."""

    stop: bool
    save: bool


class Step(NamedTuple):
    """One optimizer step over the global batch: mean loss, what the task counts (right predictions), images, rate, the
    gradient's norm."""

    loss: float
    counted: float
    images: int
    lr: float
    grad_norm: float
    requests: Requests


def train_step(run: Run, pairs: Iterator[tuple], stop: StopRequest, saver: Saver, task: Task) -> Step:
    """One optimizer step over the pairs, this rank's micro-batches.

    The gradient and every figure are of the global batch: the mean over its images, whatever rank has how many. The
    requests that come back are those of any rank by the step's end, the same on all.

    Raises:
        TrainingError: a loss or gradient that is not finite, on whatever rank; nothing was updated on any.
    """
    config, progress = run.config, run.progress
    rate = learning_rate(config, progress.step, run.steps_per_epoch)
    set_rate(run.optimizer, rate)
    run.optimizer.zero_grad(set_to_none=True)
    loss = counted = torch.zeros((), device=run.device)
    ranks, total, count = distributed.world_size(), run.global_batch, run.micro_batches
    for i, (images, targets) in enumerate(pairs):
        with no_sync(run.network) if i + 1 < count else nullcontext():
            run.draw_drop_path(i)
            part, ours = task.loss(run, images, targets)
            part = part / (total / (len(images) * ranks))  # DDP divides by the ranks
            (part if run.scaler is None else run.scaler.scale(part)).backward()
        loss = loss + part.detach()
        counted = counted + ours
    if run.scaler is not None:
        run.scaler.unscale_(run.optimizer)
    parameters = [p for p in run.model.parameters() if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip_grad or math.inf)
    own = Requests(stop.received is not None, saver.due_by_clock())
    loss, norm, counted, requests = sum_over_ranks(loss, norm, counted, own)
    check_finite(run, loss, norm, rate)
    if run.scaler is None:
        run.optimizer.step()
    else:
        run.scaler.step(run.optimizer)
        run.scaler.update()
    if run.ema is not None:
        run.ema.update_parameters(run.model)
    return Step(loss, counted, total, rate, norm, requests)


def loss_and_right(run: Run, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mean loss of images (B, 3, H, W) with labels (B,) or soft targets (B, classes); right predictions."""
    config = run.config
    if config.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    with run.autocast():
        logits = run.network(images)
    labels = targets if targets.ndim == 1 else targets.argmax(1)
    right = (logits.detach().argmax(1) == labels).sum()
    loss = mean_loss(
        logits.float(), targets, kind=config.loss, label_smoothing=config.label_smoothing,
        threshold=config.bce_threshold, weights=run.class_weights,
    )  # fmt: skip
    return loss, right


def no_sync(network):
    """The context of a micro-batch before the step's last: DDP sums the gradients over the ranks once a step."""
    return network.no_sync() if distributed.is_distributed() else nullcontext()


def sum_over_ranks(
    loss: Tensor, norm: Tensor, counted: Tensor, requests: Requests
) -> tuple[float, float, float, Requests]:
    """The step's figures and requests of all ranks: the step's one wait for the device.

    loss and norm are each rank's own view of a mean over all; one that is not finite makes the result so.
    """
    flags = [loss.new_full((), float(flag)) for flag in requests]  # filled on the device: no copy
    figures = distributed.all_reduce_sum(torch.stack((loss, norm, counted, *flags)))
    loss, norm, counted, stops, saves = figures.tolist()
    ranks = distributed.world_size()
    return loss / ranks, norm / ranks, counted, Requests(stops > 0, saves > 0)


def check_finite(run: Run, loss: float, norm: float, rate: float) -> None:
    """Stop before an update that would spoil the weights.

    fp16's scaler meets an infinite gradient now and then, lowers its scale and skips the step: only many in a row, or a
    loss that is not finite, stop such a run.

    Raises:
        TrainingError: on every rank.
    """
    progress = run.progress
    progress.skipped = progress.skipped + 1 if run.scaler is not None and not math.isfinite(norm) else 0
    what = None
    if not math.isfinite(loss):
        what = f"the loss is {loss}"
    elif not math.isfinite(norm) and (run.scaler is None or progress.skipped >= SKIPPED_STEPS):
        what = f"the gradient's norm is {norm}"
    if what is not None:
        last = "none" if progress.last_loss is None else f"{progress.last_loss:.4f}"
        raise TrainingError(
            f"{what} at step {progress.step + 1}, epoch {progress.epoch + 1}, rate {rate:.3g}; "
            f"last finite loss {last}. Nothing was updated, the checkpoints of {run.folder} are as they were. "
            "Try a lower --lr, a longer --warmup-epochs, --clip-grad 1, or --amp off"
        )


# ---- an epoch's end, and the run's ----------------------------------------------------------------------------------


def finish_epoch(run: Run, monitor: Monitor, saver: Saver, stop: StopRequest) -> Evaluation | None:
    """A save where one is due, validation, the epoch's row everywhere, selection; None after a signal, all saved."""
    config, progress, info = run.config, run.progress, run.data.info
    complete = progress.batch >= run.steps_per_epoch
    if not complete:  # cut by --max-steps: saved as it stands, so that a later resume finishes the epoch exactly
        saver.save_or_end(run)
    elif saver.due_by_epoch(progress.epoch + 1):  # before a long validation begins; a resume does it again
        saver.save(run)
    distributed.broadcast(run.batch_norm_buffers())
    last = progress.epoch + 1 == config.epochs or at_max_steps(run)
    keep_wrong = WRONG_SHOWN if config.preview or (last and run.data.holdout is None) else 0
    is_scored = last or not complete or (progress.epoch + 1) % config.val_every == 0
    result = Evaluation.none()
    if is_scored:
        result = evaluate(
            run.eval_model, run.data.val, info.num_classes, EVAL_BATCH, run.autocast, keep_wrong=keep_wrong, stop=stop
        )
    if result is None:
        saver.save_or_end(run)
        return None
    row = {
        "epoch": progress.epoch + 1,
        "step": progress.step,
        "train_loss": progress.loss_sum / progress.images,
        "train_top1_pct": 100 * progress.correct / progress.images,
        "val_loss": result.loss if is_scored else None,
        "val_top1_pct": result.top1_pct if is_scored else None,
        "val_top5_pct": result.top5_pct if is_scored else None,
        "lr": learning_rate(config, progress.step - 1, run.steps_per_epoch),
        "images_per_s": progress.images / progress.epoch_seconds,
        "epoch_s": progress.epoch_seconds,
        "peak_mem_mib": peak_memory_mib(run.device),
    }
    if config.digest:
        row |= {"digests": run.digests(), "environment": environment.digest(run.environment())}
    monitor.epoch(progress.step, row, config.epochs)
    if config.preview and is_scored and distributed.is_main():
        monitor.preview(result, pictures_of(result, info), info.class_names)
    if complete and config.attention_every and (progress.epoch + 1) % config.attention_every == 0:
        show_attention(run, monitor)
    if (
        run.data.holdout is not None
        and is_scored
        and (progress.best_top1 is None or result.top1_pct > progress.best_top1)
    ):
        progress.best_top1, progress.best_epoch = result.top1_pct, progress.epoch + 1
        run.best = {name: value.detach().cpu().clone() for name, value in run.eval_model.state_dict().items()}
    if complete:
        progress.rows.append(row)
        progress.open_epoch()
        saver.keep(run)
    return result


def pictures_of(result: Evaluation, info: preprocess.DataInfo) -> list[Tensor]:
    """The images of the wrong predictions, (3, H, W) in [0, 1]."""
    return [preprocess.denormalise(image[None], info)[0] for image, _, _ in result.wrong]


@torch.no_grad()
def show_attention(run: Run, monitor: Monitor) -> None:
    """TensorBoard's attention panels, of the same few validation images each time."""
    model = run.eval_model
    if not attention_layers(model) or not distributed.is_main():
        return
    images, _ = next(run.data.val.eval_batches(WATCHED_IMAGES))
    training = model.training
    model.eval()
    with record_attention(model, pixels=lattice(WATCHED_PIXELS)) as layers, run.autocast():
        model(images)
    model.train(training)
    monitor.attention(run.progress.step, layers)


def report_bad_images(run: Run, monitor: Monitor, reported: set[str]) -> set[str]:
    """Name the images that any rank skipped and that are not `reported` yet; returns all that are by now."""
    skipped = bad_images(run)
    for line in sorted(skipped - reported):
        monitor.say(f"skipped {line}")
    return reported | skipped


def bad_images(run: Run) -> set[str]:
    """The images that were skipped so far, on any rank: "path: what is wrong"."""
    own = [line for split in run.data.splits for line in split.bad_images]
    return {line for lines in distributed.all_gather_object(own) for line in lines}


def finish(run: Run, monitor: Monitor, saver: Saver, stop: StopRequest, result: Evaluation | None) -> bool:
    """The end of a run: last.pt, the kept weights' score on the test split, best.pt, summary.json, then the pictures.

    Args:
        result: of the last epoch in this process, None where it trained none.

    Returns:
        False where a signal ended it before the score was there.
    """
    config, progress, info = run.config, run.progress, run.data.info
    distributed.broadcast(run.batch_norm_buffers())
    if progress.batch == 0:  # else cut by --max-steps, and saved as it was
        saver.save_or_end(run)
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
        "environment_digest": environment.digest(run.environment()),
    }


CLASSIFICATION = Task(
    prog=PROG,
    plan=make_plan,
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
    finish_epoch=finish_epoch,
    finish=finish,
    evaluate=evaluate_checkpoint,
)

if __name__ == "__main__":
    sys.exit(main(COMMAND, STOP))
