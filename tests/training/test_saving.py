"""When a run's state is saved, and what becomes of saves that fail."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tiny_runs
from config import FIELDS, resolve
from sasa.training import checkpoint, saving
from sasa.training.files import LAST, kept_name
from sasa.training.saving import SAVE_FAILURES, Saver, TrainingError


class Heard:
    """A monitor that keeps what it is given to print."""

    def __init__(self):
        self.lines, self.flushed = [], 0

    def say(self, line):
        self.lines.append(line)

    def flush(self):
        self.flushed += 1


class StandIn:
    """A run as a saver sees it."""

    def __init__(self, folder, weight=1.0):
        self.folder, self.weight = folder, torch.tensor([weight])
        self.progress = SimpleNamespace(step=5, epoch=2, batch=0)
        self.identity = SimpleNamespace(data={"train": {}})
        self.data = SimpleNamespace(listed=lambda: iter(()))

    def weights(self):
        return [{"w": self.weight}]

    def state(self):
        return {"model": {"w": self.weight}}


@pytest.fixture
def heard():
    return Heard()


@pytest.fixture
def written(monkeypatch):
    """The names of the checkpoints that were written; an OSError for those in `written.fails`."""

    class Written(list):
        fails = 0

    names = Written()

    def save(state, folder, name=LAST):
        if names.fails:
            names.fails -= 1
            raise OSError(28, "No space left on device")
        names.append(name)

    monkeypatch.setattr(saving.checkpoint, "save", save)
    monkeypatch.setattr(saving.image_list, "write", lambda *what: None)
    return names


def saver(heard, **given):
    return Saver(resolve(given, "DIGITS"), heard)


@pytest.mark.parametrize(("every", "due"), [(0, []), (1, [1, 2, 3, 4, 5, 6]), (3, [3, 6])])
def test_epochs_that_are_saved(heard, every, due):
    of = saver(heard, save_every=every)
    assert [epochs for epochs in range(1, 7) if of.due_by_epoch(epochs)] == due


def test_the_clock_counts_from_the_last_save(heard, written, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(saving.time, "monotonic", lambda: now[0])
    of = saver(heard, save_minutes=2.0)
    now[0] += 119
    assert not of.due_by_clock()
    now[0] += 1
    assert of.due_by_clock() and of.save(StandIn(Path("run"))) and not of.due_by_clock()
    now[0] += 120
    assert of.due_by_clock() and not saver(heard, save_minutes=0.0).due_by_clock()


def test_failures_are_reported_and_survived_until_they_are_too_many_in_a_row(heard, written):
    of, run = saver(heard), StandIn(Path("run"))
    written.fails = SAVE_FAILURES - 1
    assert [of.save(run) for _ in range(SAVE_FAILURES)] == [False] * (SAVE_FAILURES - 1) + [True]
    assert len(heard.lines) == SAVE_FAILURES - 1 and all("No space left" in line for line in heard.lines)
    assert heard.flushed == SAVE_FAILURES and written == [LAST]
    written.fails = SAVE_FAILURES  # the count began again
    assert not of.save(run) and not of.save(run)
    with pytest.raises(TrainingError, match=f"{SAVE_FAILURES} saves failed in a row"):
        of.save(run)


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_never_written(heard, written, weight):
    with pytest.raises(TrainingError, match="not finite at step 5"):
        saver(heard).save(StandIn(Path("run"), weight))
    assert written == []


def test_a_save_that_the_run_needs_ends_it(heard, written):
    written.fails = 1
    with pytest.raises(TrainingError, match="could not be saved"):
        saver(heard).save_or_end(StandIn(Path("run")))


@pytest.mark.parametrize(("epoch", "batch", "kept"), [(2, 0, True), (3, 0, False), (2, 1, False)])
def test_states_that_stay(heard, written, epoch, batch, kept):
    run = StandIn(Path("run"))
    run.progress.epoch, run.progress.batch = epoch, batch
    saver(heard, keep_states=2).keep(run)
    assert written == ([kept_name(epoch)] if kept else [])


def test_a_list_that_cannot_be_written_costs_a_line(heard, written, monkeypatch):
    def full(*what):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving.image_list, "write", full)
    of, run = saver(heard), StandIn(Path("run"))
    assert of.save(run) and of.save(run)
    assert len(heard.lines) == 1 and "was not written" in heard.lines[0]


def test_an_epoch_of_a_second_is_saved_too(tmp_path, tiny, monkeypatch):
    """As the flag's help has it: no time must pass between two saves."""
    steps, save = [], checkpoint.save

    def watched(state, folder, name=LAST):
        if name == LAST:
            steps.append(state["progress"]["step"])
        save(state, folder, name)

    monkeypatch.setattr(checkpoint, "save", watched)
    tiny_runs.go(tmp_path, "--epochs 3 --save-every 1 --save-minutes 0")
    assert steps == [10, 20, 30, 30]  # and at the end
    assert FIELDS["save_every"].metadata["help"] == "save whenever this many epochs are done; 0: not by epochs"
