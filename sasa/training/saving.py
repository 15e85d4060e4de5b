"""When a run's state is saved, and what becomes of a save that fails."""

import time

from config import Config
from sasa.console import one_line
from sasa.training import checkpoint, distributed, image_list
from sasa.training.files import IMAGES, LAST, kept_name
from sasa.training.monitor import Monitor
from sasa.training.run import Run

SAVE_FAILURES = 3  # in a row: then the run stops instead of training on without a checkpoint


class TrainingError(Exception):
    """The run cannot go on: exit code 1."""


class Saver:
    """Writes last.pt of one run. Every rank takes part; the main one writes, and its clock counts."""

    def __init__(self, config: Config, monitor: Monitor) -> None:
        self.seconds = 0.0  # spent on saves
        self._config, self._monitor = config, monitor
        self._saved_at: float | None = None
        self._started_at = time.monotonic()
        self._failures = 0  # in a row
        self._is_listed = False  # the list of the images lies beside the state

    def due_by_clock(self) -> bool:
        """Whether --save-minutes have passed, on the main rank; on the others never."""
        minutes, since = self._config.save_minutes, self._saved_at or self._started_at
        return distributed.is_main() and minutes > 0 and time.monotonic() - since >= 60 * minutes

    def due_by_epoch(self, epochs: int) -> bool:
        """Whether the end of this many epochs is to be saved."""
        every = self._config.save_every
        return every > 0 and epochs % every == 0

    def save(self, run: Run) -> bool:
        """Write the state; a failure (a full disk) is reported and survived, up to SAVE_FAILURES in a row.

        Raises:
            TrainingError: too many failures in a row, or weights that are not finite.
        """
        if not all(distributed.all_gather_object(checkpoint.all_finite(run.weights()))):
            raise TrainingError(
                f"the weights are not finite at step {run.progress.step}: nothing is saved, the checkpoints of "
                f"{run.folder} are as they were. Try a lower --lr, a longer --warmup-epochs or --clip-grad 1"
            )
        started = time.monotonic()
        self._monitor.flush()
        state = run.state()
        self._saved_at = time.monotonic()
        problem = distributed.on_main_rank(lambda: _attempt_save(state, run))
        if problem is None:
            self.seconds += time.monotonic() - started
            self._failures = 0
            self._list_images(run)
            return True
        self._failures += 1
        self._monitor.say(f"save failed ({self._failures} in a row): {problem}; the last whole file is kept")
        if self._failures >= SAVE_FAILURES:
            raise TrainingError(f"{SAVE_FAILURES} saves failed in a row: stopping at step {run.progress.step}")
        return False

    def _list_images(self, run: Run) -> None:
        """The list of the images, once, beside the first state that has them; a failure is survived, and said."""
        if self._is_listed or not distributed.is_main():
            return
        self._is_listed = True
        try:
            image_list.write(run.folder / IMAGES, run.identity.data, run.data.listed())
        except OSError as error:
            self._monitor.say(f"{IMAGES} was not written: {one_line(error, 200)}; the run goes on without it")

    def keep(self, run: Run) -> None:
        """The state after the epochs that are done, where --keep-states wants it; a failure is survived, and said."""
        every = self._config.keep_states
        if not every or run.progress.batch or run.progress.epoch % every:
            return
        started, state = time.monotonic(), run.state()
        problem = distributed.on_main_rank(lambda: _attempt_save(state, run, kept_name(run.progress.epoch)))
        self.seconds += time.monotonic() - started
        if problem is not None:
            self._monitor.say(f"a state to keep was not written: {problem}; the run goes on without it")

    def save_or_end(self, run: Run) -> None:
        """A save that the run cannot go on without. Raises TrainingError."""
        if not self.save(run):
            raise TrainingError("the state could not be saved")


def _attempt_save(state: dict, run: Run, name: str = LAST) -> str | None:
    """What was wrong, or None."""
    try:
        checkpoint.save(state, run.folder, name)
    except OSError as error:
        return str(error)
    return None
