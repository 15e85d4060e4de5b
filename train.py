"""Train a network, resume a run, evaluate a checkpoint: set-up -> epochs -> evaluation. `python train.py --help`.

Exit codes: 0 done; 2 wrong usage or data; 75 stopped by a signal, its state saved where there was one, or by decoding
processes that failed after at least one step, which is saved; 1 anything else.
"""

import sys

from sasa.training.cli import Command, parse_command_line
from sasa.training.signals import STOPPED, StopRequest

if __name__ == "__main__":
    COMMAND = parse_command_line()  # before torch is imported: --help and a wrong flag answer at once
    STOP = StopRequest()
    STOP.install()

import math
import time
from functools import partial
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from config import ConfigError
from preprocess import DataError, WorkerError
from sasa.console import USAGE_ERROR, one_line, print_error
from sasa.kernels.stop_signals import BuildStopped
from sasa.training import distributed, image_list
from sasa.training.checkpoint import CheckpointError
from sasa.training.classification import CLASSIFICATION
from sasa.training.device import is_out_of_memory
from sasa.training.distributed import SharedError
from sasa.training.files import IMAGES, Start, claim_folder
from sasa.training.lock import FolderLock
from sasa.training.monitor import Monitor, Silent
from sasa.training.resume import RunSpec, check_data, report_changes
from sasa.training.run import Run, bad_images, initialise
from sasa.training.saving import Saver, TrainingError
from sasa.training.step import QueuedStep, Requests, check_finite, train_step
from sasa.training.streams import surviving_streams
from sasa.training.task import Task


def main(command: Command, stop: StopRequest | None = None, task: Task = CLASSIFICATION) -> int:
    """Do what the command line says, on every rank alike; returns the exit code.

    Args:
        stop: notes the stop signals; None: they are this function's own while it runs.
    """
    own = None if stop is not None else StopRequest()
    if own is not None:
        own.install()
    try:
        with surviving_streams():
            return run_command(command, stop or own, task)
    finally:
        if own is not None:
            own.uninstall()


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
        exit_alone(code)
    distributed.stop()
    return code


def exit_alone(code: int) -> int:
    """The exit code of an error that this rank alone knows: where there are others, it ends here, and they with it."""
    if distributed.is_distributed():
        sys.exit(code)
    return code


def exit_code_of(error: Exception) -> int | None:
    """The code of an error that one line explains; None for any other, whose traceback is wanted."""
    if isinstance(error, ConfigError | DataError | CheckpointError):
        return USAGE_ERROR
    if isinstance(error, BuildStopped):
        return STOPPED
    return 1 if isinstance(error, WorkerError) or is_out_of_memory(error) else None


def with_advice(error: Exception) -> str:
    """The text of an error that one line explains."""
    if not is_out_of_memory(error):
        return str(error)
    return f"out of memory: {one_line(error, 200)}; a smaller --batch-size, --img-size or --eval-size needs less"


# ---- set-up ---------------------------------------------------------------------------------------------------------


def run_to_end(command: Command, stop: StopRequest, task: Task) -> int:
    """Specify the run, set it up, continue from a state or start from other weights, train; returns the exit code."""
    lock = FolderLock()
    try:
        spec = distributed.on_main_rank(partial(task.specify, command, lock))
        return run_spec(spec, command, stop, task)
    finally:
        lock.release()


def run_spec(spec: RunSpec, command: Command, stop: StopRequest, task: Task) -> int:
    """`run_to_end`, in a folder that no other run is in."""
    run = task.set_up(spec, lambda: stop.received is not None)
    try:
        if distributed.is_main():
            task.describe(run)
        if spec.state is None and spec.init_from is not None:
            initialise(run, Path(spec.init_from), task.initial_weights)
        if spec.state is not None:
            tolerated = command.allow_changed_data, getattr(run.config, "skip_bad_images", False)
            identities = spec.state["data"], run.identity.data
            named = partial(image_list.changes, spec.source / IMAGES, *identities, run.data.listed())
            changes = distributed.on_main_rank(partial(check_data, *identities, *tolerated, named))
            distributed.on_all_ranks(partial(run.restore, spec.state))
            run.progress.data_changes += changes
            report_changes(spec.state, run.config.sync_bn, changes, run.environment_digest)
        return train(run, stop, command.overwrite, task)
    finally:
        run.data.close()


def train(run: Run, stop: StopRequest, overwrite: bool, task: Task) -> int:
    """All epochs that are left, then the summary; returns the exit code."""
    config, progress = run.config, run.progress
    fresh, begun = progress.step == 0, progress.step
    first = distributed.on_all_ranks(lambda: next(run.batches())) if fresh else None  # wrong data: no file changed
    begun_with = Start(run.recipe, progress.global_batch, run.identity.init_from)
    claim = (run.folder, config, run.identity.run_id, begun_with, overwrite, is_over(run))
    distributed.on_main_rank(partial(claim_folder, *claim))
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
            can_help = progress.step > begun or stop.received is not None
            return stop_after_reading(error, run, saver, task.prog, progress.step > begun, can_help)
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
        return exit_alone(1)
    finally:
        monitor.close()


def stop_after_reading(
    error: DataError | WorkerError | SharedError, run: Run, saver: Saver, prog: str, trained: bool, can_help: bool
) -> int:
    """A decoding process died, or an image cannot be read, while the run is sound: save the last step's state.

    Where one rank alone has noticed it, the others are in the middle of a step: it ends unsaved, and they with it.

    Args:
        trained: steps were done since the start; before, wrong data changes no file.
        can_help: a restart, where processes failed: not where a start fails before any step, again and again.

    Returns:
        The exit code.

    Raises:
        DataError, SharedError: another error, or no step was done.
    """
    cause = error.error if isinstance(error, SharedError) else error
    if not isinstance(cause, DataError | WorkerError) or (isinstance(cause, DataError) and not trained):
        raise error
    code = STOPPED if isinstance(cause, WorkerError) and can_help else exit_code_of(cause)
    if isinstance(error, SharedError) or not distributed.is_distributed():
        saver.save_or_end(run)
        if distributed.is_main():
            print_error(prog, f"{cause}; saved at step {run.progress.step}: the same command with --resume goes on")
        return code
    print_error(prog, cause)
    return exit_alone(code)


# ---- epochs ---------------------------------------------------------------------------------------------------------


def train_epochs(run: Run, monitor: Monitor, saver: Saver, stop: StopRequest, task: Task) -> bool:
    """Epoch by epoch to the run's end; False where a signal ended it before, with its state saved."""
    config, progress, result, reported = run.config, run.progress, None, set()
    last_step = min(config.epochs * run.steps_per_epoch, config.max_steps or math.inf)
    with monitor.whole_run(last_step, progress.step) as whole:
        while not is_over(run):
            if not train_epoch(run, monitor, saver, stop, whole, task):
                return False
            is_whole = progress.batch >= run.steps_per_epoch
            if (
                not is_whole
            ):  # cut by --max-steps: saved as it stands, so that a later resume finishes the epoch exactly
                saver.save_or_end(run)
            elif saver.due_by_epoch(progress.epoch + 1):  # before a long validation begins; a resume does it again
                saver.save(run)
            distributed.broadcast(run.buffers())
            found = task.validate(run, monitor, stop, progress.epoch + 1 == config.epochs or at_max_steps(run))
            if found is None:
                saver.save_or_end(run)
                return False
            result = found.result
            if found.selects is not None:
                run.select(found.selects, progress.epoch + 1)
            if is_whole:
                progress.close_epoch(found.row)
                saver.keep(run)
            reported = report_bad_images(run, monitor, reported)
            if at_max_steps(run):
                break
            if has_stopped_rising(run):
                monitor.say(f"ended early: no better top-1 on the held-out images since epoch {progress.best_epoch}")
    distributed.broadcast(run.buffers())
    if progress.batch == 0:  # else cut by --max-steps, and saved as it was
        saver.save_or_end(run)
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
    """Whether the run has done the steps of --max-steps."""
    return run.config.max_steps is not None and run.progress.step >= run.config.max_steps


def train_epoch(run: Run, monitor: Monitor, saver: Saver, stop: StopRequest, whole: tqdm, task: Task) -> bool:
    """The rest of the open epoch, or up to --max-steps, saving by the clock; False after a signal, with all saved.

    Nothing is saved, logged or ended while the figures of a step are unread (sasa/training/step.py).

    Args:
        whole: the bar of the run's steps.
    """
    progress = run.progress
    run.network.train()
    pairs = run.batches()
    steps = run.steps_per_epoch - progress.batch
    if run.config.max_steps is not None:
        steps = min(steps, run.config.max_steps - progress.step)
    unread: list[QueuedStep] = []
    with monitor.batches(run.steps_per_epoch, progress.batch, progress.epoch) as bar:
        started = time.perf_counter()

        def read(most: int) -> Requests:
            """Take in the figures of the steps that were done, until at most so many are unread."""
            nonlocal started
            requests = Requests()
            while len(unread) > most:
                requests |= record_step(run, unread.pop(0), started, monitor, (bar, whole), task)
                started = time.perf_counter()
            return requests

        def wishes() -> Requests:
            return Requests(stop.received is not None, saver.due_by_clock())

        for index in range(progress.step, progress.step + steps):
            try:
                queued = train_step(run, islice(pairs, run.micro_batches), index, wishes, task.loss)
            except (DataError, WorkerError):
                read(0)  # the state to be saved is that after the last step
                raise
            unread.append(queued)
            requests = read(1 if queued.is_guarded else 0)
            if requests.stop or requests.save:
                requests |= read(0)
            if requests.stop:
                saver.save_or_end(run)
                return False
            if requests.save:
                saver.save(run)
                started = time.perf_counter()
        requests = read(0)
    if requests.stop:
        saver.save_or_end(run)
    elif requests.save:
        saver.save(run)
    return not requests.stop


def record_step(
    run: Run, queued: QueuedStep, started: float, monitor: Monitor, bars: tuple[tqdm, tqdm], task: Task
) -> Requests:
    """Read a step's figures and take them in; returns what any rank asks for.

    Args:
        started: when the run turned to this step, by `time.perf_counter`.
        bars: of the epoch's steps and of the run's.

    Raises:
        TrainingError: the step was not finite; it has updated nothing.
    """
    step, progress = queued.read(), run.progress
    progress.skipped = check_finite(run, step)
    progress.add(step.loss, step.counted, step.images, time.perf_counter() - started)
    progress.figures = task.figures(step)
    for bar in bars:
        bar.update()
    bars[0].set_postfix(loss=f"{step.loss:.3f}", **task.bar(progress),
                        images=f"{progress.images / progress.epoch_seconds:.0f}/s", refresh=False)  # fmt: skip
    monitor.step(progress.step, progress.figures)
    return step.requests


def report_bad_images(run: Run, monitor: Monitor, reported: set[str]) -> set[str]:
    """Name the images that any rank skipped and that are not `reported` yet; returns all that are by now."""
    skipped = bad_images(run)
    for line in sorted(skipped - reported):
        monitor.say(f"skipped {line}")
    return reported | skipped


if __name__ == "__main__":
    sys.exit(main(COMMAND, STOP))
