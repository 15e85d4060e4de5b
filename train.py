"""Train a network, resume a run, evaluate a checkpoint: set-up -> epochs -> evaluation. `python train.py --help`.

Exit codes: 0 done; 2 wrong usage or data; 75 stopped by a signal with its state saved; 1 anything else.
"""

import sys

from sasa.training.cli import PROG, Command, parse_command_line

if __name__ == "__main__":
    COMMAND = parse_command_line()  # before torch is imported: --help and a wrong flag answer at once

import copy
import dataclasses
import math
import resource
import time
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import preprocess
from config import Config, ConfigError
from preprocess import DataError
from sasa.analysis.attention_maps import attention_layers, lattice, record_attention
from sasa.analysis.flops import count_flops, count_parameters
from sasa.console import USAGE_ERROR, print_error
from sasa.kernels.stop_signals import BuildStopped
from sasa.training import checkpoint, distributed
from sasa.training.checkpoint import BEST, CheckpointError
from sasa.training.evaluation import Evaluation, evaluate
from sasa.training.monitor import WRONG_SHOWN, Monitor, Silent, write_json
from sasa.training.network import network_of
from sasa.training.optim import learning_rate
from sasa.training.run import (
    Run,
    claim_folder,
    initialise,
    load_data,
    pick_amp,
    pick_device,
    plan,
    set_up,
    without_auto,
)

STOPPED = 75  # exit code: stopped by a signal, state saved (EX_TEMPFAIL: run the same command with --resume)
EVAL_BATCH = 256
SAVE_GAP_SECONDS = 60.0  # an epoch's end this soon after a save need not save again
SAVE_FAILURES = 3  # in a row: then the run stops instead of training on without a checkpoint
WATCHED_IMAGES, WATCHED_PIXELS = 8, 64  # of the attention panels: the first validation images, pixels a map
SKIPPED_STEPS = 10  # in a row, by fp16's scaler: then the run has diverged


class TrainingError(Exception):
    """The run cannot go on: exit code 1."""


class Stopped(Exception):
    """A signal asked the run to stop, and its state is saved."""


def main(command: Command) -> int:
    """Do what the command line says, on every rank alike; returns the exit code."""
    distributed.start()
    try:
        code = evaluate_checkpoint(command) if command.evaluate is not None else run_to_end(command)
    except (ConfigError, DataError, CheckpointError) as error:
        if distributed.is_main() or not distributed.known_to_all(error):
            print_error(PROG, error)
        if not distributed.known_to_all(error):
            sys.exit(USAGE_ERROR)
        code = USAGE_ERROR
    except BuildStopped as error:  # in the middle of a step, so there is nothing to save
        print_error(PROG, f"{error}: nothing saved; --resume goes on from the last checkpoint")
        code = STOPPED
    distributed.stop()
    return code


def run_to_end(command: Command) -> int:
    config, folder, state = distributed.from_main(partial(plan, command))
    run = set_up(config, folder, state["progress"]["global_batch"] if state is not None else 0)
    run.overwrite = command.overwrite
    if command.init_from is not None:
        initialise(run, Path(command.init_from))
    if state is not None:
        run.progress = distributed.together(
            lambda: checkpoint.restore(state, run.model, run.optimizer, run.scaler, run.ema)
        )
        run.best = state["best"]
        tell_other_ranks(len(state["generators"]), config)
    try:
        return train(run)
    finally:
        run.data.close()


def tell_other_ranks(saved: int, config: Config) -> None:
    """What is no longer bitwise where a run goes on with another number of ranks."""
    now = distributed.world_size()
    if saved == now or not distributed.is_main():
        return
    norm = "" if config.sync_bn else ", batch norm's statistics are of other parts of the batch (no --sync-bn)"
    print(
        f"--resume: saved by {saved} ranks, goes on with {now}: same step, global batch, order and rate; no longer "
        f"bitwise the run of {saved}: sums over the batch round otherwise{norm}, generators are dealt anew"
    )


# ---- training -------------------------------------------------------------------------------------------------------


def train(run: Run) -> int:
    """All epochs that are left, then the summary; returns the exit code."""
    config, progress = run.config, run.progress
    fresh = progress.step == 0
    first = distributed.together(lambda: next(batches(run))[0]) if fresh else None  # wrong data: no file changed yet
    distributed.from_main(partial(claim_folder, run))
    if distributed.is_main():
        run.monitor = Monitor(run.folder, progress.rows, progress.step, bars=config.progress and sys.stderr.isatty())
    else:
        run.monitor = Silent()
    run.stop.install()
    if first is not None:
        run.monitor.start(0, config, str(run.model), preprocess.denormalise(first, run.data.info))
    else:
        run.monitor.say(f"resumed   at step {progress.step}, epoch {progress.epoch + 1}, batch {progress.batch}")
    result = None
    try:
        with run.monitor.epochs(config.epochs, progress.epoch) as bar:
            while progress.epoch < config.epochs and (progress.batch or not ended(run)):
                train_epoch(run)
                result = finish_epoch(run)
                bar.update()
                if ended(run):
                    break
        finish(run, result)
    except Stopped:
        signals = [name for name in distributed.gather(run.stop.received) if name is not None]
        run.monitor.say(
            f"stopped by {signals[0]} at step {progress.step}, saved: the same command with --resume goes on"
        )
        return STOPPED
    except TrainingError as error:
        if distributed.is_main():
            print(f"train.py: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # a full disk
        print(f"train.py: {error}: stopping at step {progress.step}", file=sys.stderr)
        sys.exit(1)  # not `return`: the other ranks do not know
    finally:
        run.monitor.close()
    return 0


def ended(run: Run) -> bool:
    return run.config.max_steps is not None and run.progress.step >= run.config.max_steps


def augment_config(config: Config) -> preprocess.AugmentConfig:
    return preprocess.AugmentConfig(
        **{f.name: getattr(config, f.name) for f in dataclasses.fields(preprocess.AugmentConfig)}
    )


def batches(run: Run):
    """This rank's batches of the open epoch from the next one on: `accumulate` pairs a step."""
    config, progress = run.config, run.progress
    return run.data.train.batches(
        progress.epoch, progress.batch, batch_size=config.batch_size, accumulate=run.accumulate, seed=config.seed,
        augment=augment_config(config), rank=distributed.rank(), world_size=distributed.world_size(),
        global_batch=progress.global_batch,
    )  # fmt: skip


def train_epoch(run: Run) -> None:
    """The rest of the open epoch, or up to --max-steps; saves by the clock and on a signal."""
    progress = run.progress
    run.network.train()
    pairs = batches(run)
    with run.monitor.batches(run.steps_per_epoch, progress.batch, progress.epoch) as bar:
        while progress.batch < run.steps_per_epoch and not ended(run):
            started = time.perf_counter()
            step = train_step(run, islice(pairs, run.accumulate))
            elapsed = time.perf_counter() - started
            progress.batch += 1
            progress.step += 1
            progress.seconds += elapsed
            progress.epoch_seconds += elapsed
            bar.update()
            bar.set_postfix(loss=f"{step['train/loss']:.3f}", top1=f"{100 * progress.correct / progress.images:.1f}%",
                            images=f"{progress.images / progress.epoch_seconds:.0f}/s", refresh=False)  # fmt: skip
            run.monitor.step(progress.step, step)
            if run.stopping:
                save_or_end(run)
                raise Stopped
            if run.save_due:
                save(run)


def train_step(run: Run, pairs) -> dict[str, float]:
    """One optimizer step over the pairs; adds to the epoch's sums and returns the step's figures.

    The gradient and every figure are of the global batch: the mean over its images, whatever rank has how many.

    Raises:
        TrainingError: a loss or gradient that is not finite, on whatever rank; nothing was updated on any.
    """
    config, progress = run.config, run.progress
    rate = learning_rate(config, progress.step, run.steps_per_epoch)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.zero_grad(set_to_none=True)
    loss = correct = torch.zeros((), device=run.device)
    ranks, total = distributed.world_size(), run.step_images
    for i, (images, targets) in enumerate(pairs):
        if config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with gradients_stay(run.network) if i + 1 < run.accumulate else nullcontext():
            with run.autocast():
                logits = run.network(images)
            part = F.cross_entropy(logits.float(), targets, label_smoothing=config.label_smoothing)
            part = part / (total / (len(images) * ranks))  # DDP divides by the ranks
            (part if run.scaler is None else run.scaler.scale(part)).backward()
        labels = targets if targets.ndim == 1 else targets.argmax(1)
        loss = loss + part.detach()
        correct = correct + (logits.detach().argmax(1) == labels).sum()
    if run.scaler is not None:
        run.scaler.unscale_(run.optimizer)
    parameters = [p for p in run.model.parameters() if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip_grad or math.inf)
    loss, norm, correct = agree(run, loss, norm, correct)
    guard(run, loss, norm, rate)
    if run.scaler is None:
        run.optimizer.step()
    else:
        run.scaler.step(run.optimizer)
        run.scaler.update()
    if run.ema is not None:
        run.ema.update_parameters(run.model)
    progress.last_loss = loss
    progress.loss_sum += loss * total
    progress.correct += correct
    progress.images += total
    return {
        "train/loss": loss,
        "train/top1_pct": 100 * correct / total,
        "train/lr": rate,
        "train/grad_norm": norm,
    }


def gradients_stay(network):
    """A piece of a step before its last: DDP sums the gradients over the ranks once a step."""
    return network.no_sync() if distributed.several() else nullcontext()


def agree(run: Run, loss: Tensor, norm: Tensor, correct: Tensor) -> tuple[float, float, float]:
    """The step's figures of all ranks, and with them whether to stop and to save: the step's one wait for the device.

    loss and norm are each rank's own view of a mean over all; one that is not finite makes the result so.
    """
    clock = run.config.save_minutes and time.monotonic() - run.saved_at >= 60 * run.config.save_minutes
    asked = (run.stop.received is not None, bool(clock) and distributed.is_main())
    flags = [loss.new_full((), float(flag)) for flag in asked]  # filled on the device: no copy
    figures = distributed.add_up(torch.stack((loss, norm, correct, *flags)))
    loss, norm, correct, stops, saves = figures.tolist()
    run.stopping, run.save_due = stops > 0, saves > 0
    ranks = distributed.world_size()
    return loss / ranks, norm / ranks, correct


def guard(run: Run, loss: float, norm: float, rate: float) -> None:
    """Stop before an update that would spoil the weights.

    fp16's scaler meets an infinite gradient now and then, lowers its scale and skips the step: only many in a row, or a
    loss that is not finite, stop such a run.
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


def finish_epoch(run: Run) -> Evaluation:
    """Validation, the epoch's row everywhere, selection, and a save where one is due."""
    config, progress, info = run.config, run.progress, run.data.info
    complete = progress.batch == run.steps_per_epoch
    if not complete:  # cut by --max-steps: saved as it stands, so that a later resume finishes the epoch exactly
        save_or_end(run)
    distributed.copy_from_main(run.batch_norm_buffers())
    result = evaluate(run.scored_model, run.data.val, info.num_classes, EVAL_BATCH, run.autocast, WRONG_SHOWN)
    row = {
        "epoch": progress.epoch + 1,
        "step": progress.step,
        "train_loss": progress.loss_sum / progress.images,
        "train_top1_pct": 100 * progress.correct / progress.images,
        "val_loss": result.loss,
        "val_top1_pct": result.top1_pct,
        "val_top5_pct": result.top5_pct,
        "lr": learning_rate(config, progress.step - 1, run.steps_per_epoch),
        "images_per_s": progress.images / progress.epoch_seconds,
        "epoch_s": progress.epoch_seconds,
        "peak_mem_mib": peak_memory_mib(run.device),
    }
    run.monitor.epoch(progress.step, row, result, config.epochs)
    tell_bad_images(run)
    if complete and config.attention_every and (progress.epoch + 1) % config.attention_every == 0:
        show_attention(run)
    if run.data.holdout is not None and (progress.best_top1 is None or result.top1_pct > progress.best_top1):
        progress.best_top1, progress.best_epoch = result.top1_pct, progress.epoch + 1
        run.best = {name: value.detach().cpu().clone() for name, value in run.scored_model.state_dict().items()}
    if complete:
        progress.rows.append(row)
        progress.open_epoch()
        due = config.save_every and progress.epoch % config.save_every == 0 and progress.epoch < config.epochs
        if due and distributed.from_main(lambda: time.monotonic() - run.saved_at >= SAVE_GAP_SECONDS):
            save(run)
    return result


@torch.no_grad()
def show_attention(run: Run) -> None:
    """TensorBoard's attention panels, of the same few validation images each time."""
    model = run.scored_model
    if not attention_layers(model) or not distributed.is_main():
        return
    images, _ = next(run.data.val.eval_batches(WATCHED_IMAGES))
    training = model.training
    model.eval()
    with record_attention(model, pixels=lattice(WATCHED_PIXELS)) as layers, run.autocast():
        model(images)
    model.train(training)
    run.monitor.attention(run.progress.step, layers)


def tell_bad_images(run: Run) -> None:
    """Name the images that were skipped since the last time."""
    met = {line for lines in distributed.gather(bad_images(run)) for line in lines}
    for line in sorted(met - run.told):
        run.monitor.say(f"skipped {line}")
    run.told |= met


def bad_images(run: Run) -> list[str]:
    return [line for split in run.data.splits for line in split.bad_images]


def peak_memory_mib(device: torch.device) -> float:
    """Of the device's allocator on CUDA, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def save(run: Run) -> bool:
    """Write last.pt; a failure (a full disk) is said and survived, up to SAVE_FAILURES in a row.

    Every rank takes part; the main one writes.

    Raises:
        TrainingError: too many failures in a row.
    """
    started = time.perf_counter()
    run.monitor.flush()
    state = checkpoint.run_state(run.config, run.model, run.optimizer, run.scaler, run.ema, run.best, run.progress)
    run.saved_at = time.monotonic()
    try:
        distributed.from_main(lambda: checkpoint.save(state, run.folder))
        run.save_seconds += time.perf_counter() - started
    except OSError as error:
        run.save_failures += 1
        run.monitor.say(f"save failed ({run.save_failures} in a row): {error}; the last whole file is kept")
        if run.save_failures >= SAVE_FAILURES:
            raise TrainingError(
                f"{SAVE_FAILURES} saves failed in a row: stopping at step {run.progress.step}"
            ) from error
        return False
    run.save_failures = 0
    return True


def save_or_end(run: Run) -> None:
    """A save that the run cannot go on without. Raises TrainingError."""
    if not save(run):
        raise TrainingError("the state could not be saved")


def finish(run: Run, result: Evaluation | None) -> None:
    """The end of a run: the kept weights' score on the test split, summary.json, best.pt, last.pt."""
    config, progress, info = run.config, run.progress, run.data.info
    distributed.copy_from_main(run.batch_norm_buffers())
    if run.best is None:
        about = "the last epoch (no images held out to select by)"
        weights, epoch = run.scored_model.state_dict(), progress.epoch
    else:
        about = (
            f"best top-1 ({progress.best_top1:.2f}%) on {info.holdout_size} held-out training images, "
            f"epoch {progress.best_epoch}"
        )
        weights, epoch = run.best, progress.best_epoch
        result = None
    if result is None:
        scored = copy.deepcopy(run.model)
        scored.load_state_dict(weights)
        result = evaluate(scored, run.data.test, info.num_classes, EVAL_BATCH, run.autocast, WRONG_SHOWN)
    wrong = [preprocess.denormalise(image[None], info)[0] for image, _, _ in result.wrong]
    run.monitor.evaluated(progress.step, result, wrong, info.class_names)
    metrics = {"hparam/test_top1_pct": result.top1_pct, "hparam/test_loss": result.loss}
    run.monitor.hparams(config, metrics)
    if progress.batch == 0:
        save_or_end(run)
    skipped = {line for lines in distributed.gather(bad_images(run)) for line in lines}
    if not distributed.is_main():
        return
    checkpoint.save(checkpoint.weights_state(config, weights, epoch, progress.step, about), run.folder, BEST)
    write_json(run.folder / "summary.json", {
        "test_top1_pct": result.top1_pct,
        "test_top5_pct": result.top5_pct,
        "test_loss": result.loss,
        "test_images": result.images,
        "parameters": count_parameters(run.model),
        "flops_per_image": count_flops(run.model, info.image_size).total,
        "epochs": progress.epoch,
        "steps": progress.step,
        "seconds": progress.seconds,
        "save_seconds": run.save_seconds,
        "selected": about,
        "bad_images": len(skipped),
        "device": str(run.device),
        "torch": str(torch.__version__),
    })  # fmt: skip
    run.monitor.say(
        f"test top-1 {result.top1_pct:.2f}%, top-5 {result.top5_pct:.2f}% on {result.images} images; "
        f"{about}; trained {progress.seconds:.0f} s; {run.folder / 'summary.json'}"
    )


# ---- evaluation -----------------------------------------------------------------------------------------------------


def evaluate_checkpoint(command: Command) -> int:
    """--evaluate: the checkpoint's own configuration, its data set or another --data-dir of the same kind."""
    path = Path(command.evaluate)
    state = distributed.from_main(partial(checkpoint.load, path))
    saved = Config.from_dict(state["config"])
    given = without_auto(command.given)
    allowed = ("batch_size", "amp", "skip_bad_images")
    config = dataclasses.replace(saved, **given)
    comparable = dataclasses.replace(config, **{key: getattr(saved, key) for key in allowed})
    changed = checkpoint.changed_keys(state["config"], comparable)
    if changed:
        raise ConfigError(f"--evaluate rebuilds the checkpoint's own network and data set: {'; '.join(changed)}")
    device = pick_device(config.device)
    try:
        amp = pick_amp(config.amp, device)  # the run's own precision: its summary's figures come out again
    except ConfigError:
        if "amp" in given:
            raise
        amp = pick_amp("auto", device)
    data = load_data(dataclasses.replace(config, train_images=None, holdout=0.0), device)
    network, _, known = network_of(state, config.backend)
    network, classes = network.to(device), known.num_classes
    if data.info.num_classes != classes:
        raise DataError(f"{config.data_dir}: {data.info.num_classes} classes, but the checkpoint {path} has {classes}")
    autocast = partial(torch.autocast, device.type, dtype=amp, enabled=amp is not None)
    batch_size = config.batch_size if "batch_size" in given else EVAL_BATCH
    try:
        result = evaluate(network, data.test, classes, batch_size, autocast)
    finally:
        data.close()
    skipped = distributed.gather(data.test.bad_images)
    if not distributed.is_main():
        return 0
    print(f"{path}: {config.model_name} on the test split of {config.dataset}, {result.images} images")
    for line in (line for lines in skipped for line in lines):
        print(f"skipped {line}")
    width = max(len(name) for name in data.info.class_names)
    for name, accuracy, count in zip(
        data.info.class_names, result.per_class_pct(), result.confusion.sum(1).tolist(), strict=True
    ):
        shown = "     -" if accuracy is None else f"{accuracy:6.2f}"
        print(f"  {name:{width}}  {shown}%  of {count}")
    print(f"test top-1 {result.top1_pct:.3f}%, top-5 {result.top5_pct:.3f}%, loss {result.loss:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(COMMAND))
