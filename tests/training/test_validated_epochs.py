"""--val-every, --early-stop and --log-csv."""

import csv
import json
import os
import signal

import pytest
import torch
from test_resume import assert_same_run, kill_at_step

import model
import ranks
import small_runs
from sasa.training import classification
from sasa.training.evaluation import Evaluation
from sasa.training.monitor import csv_text

FLAGS = "--dataset DIGITS --name run --no-progress --device cpu --batch-size 8 --save-minutes 0 --holdout 8 --epochs 6"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    small_runs.few_digits(monkeypatch, 32)
    monkeypatch.setattr(model, "build", lambda name, num_classes, stem, **options: ranks.Small(num_classes, None, True))


def scores(monkeypatch, top1: list[float]) -> None:
    """Validation gives these scores, epoch by epoch; the test split another one."""
    original, left = classification.evaluate, iter(top1)

    def evaluate(net, split, *arguments, **options) -> Evaluation:
        result = original(net, split, *arguments, **options)
        if len(split) == 8:
            result.top1_pct = next(left)
        return result

    monkeypatch.setattr(classification, "evaluate", evaluate)


def test_every_second_epoch_and_the_last_are_validated(tmp_path, capsys):
    flags = FLAGS.replace("--epochs 6", "--epochs 5 --val-every 2 --preview --log-csv")
    assert small_runs.run(tmp_path, *flags.split()) == 0
    rows = small_runs.log_rows(tmp_path / "run")
    assert [row["val_top1_pct"] is not None for row in rows] == [False, True, False, True, True]
    assert all(
        (row["val_loss"] is None) == (row["val_top5_pct"] is None) == (row["val_top1_pct"] is None) for row in rows
    )
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert ["val loss" in line for line in lines] == [False, True, False, True, True]
    table = list(csv.DictReader((tmp_path / "run" / "log.csv").open()))
    assert [row["epoch"] for row in table] == ["1", "2", "3", "4", "5"] and table[0]["val_loss"] == ""
    assert float(table[1]["val_loss"]) == rows[1]["val_loss"] and "digests" not in table[0]


def test_a_finished_epoch_is_on_the_disk_before_its_validation_begins(tmp_path, monkeypatch):
    """However little time has passed since the last save: a validation may take hours, and be killed."""
    original, found = classification.evaluate, []

    def evaluate(*arguments, **options) -> Evaluation:
        progress = torch.load(tmp_path / "run/last.pt", weights_only=True)["progress"]
        found.append((progress["epoch"], progress["batch"], progress["step"]))
        return original(*arguments, **options)

    monkeypatch.setattr(classification, "evaluate", evaluate)
    assert small_runs.run(tmp_path, *FLAGS.replace("--epochs 6", "--epochs 3").split()) == 0
    assert found[:3] == [(0, 3, 3), (1, 3, 6), (2, 3, 9)]


def test_training_is_the_same_whatever_is_validated(tmp_path):
    states = []
    for every in ("1", "3"):
        assert small_runs.run(tmp_path / every, *FLAGS.split(), "--val-every", every) == 0
        states.append(small_runs.state_without_times(tmp_path / every / "run"))
    assert small_runs.differences(states[0]["model"], states[1]["model"]) == []
    digests = [[row["digests"] for row in small_runs.log_rows(tmp_path / every / "run")] for every in ("1", "3")]
    assert digests[0] == digests[1]


@pytest.mark.parametrize(("every", "top1", "ends"), [
    (1, [10, 30, 20, 30, 40, 50], 4),  # 30 again is no better: two epochs after the second it ends
    (1, [10, 9, 11, 10, 12, 10], 6),
    (2, [10, 5, 5], 4),  # scored at 2 and 4
])  # fmt: skip
def test_the_run_ends_when_held_out_top1_has_stopped_rising(tmp_path, monkeypatch, capsys, every, top1, ends):
    scores(monkeypatch, top1)
    flags = [*FLAGS.split(), "--early-stop", "2", "--val-every", str(every)]
    assert small_runs.run(tmp_path, *flags) == 0
    assert len(small_runs.log_rows(tmp_path / "run")) == ends
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["epochs"] == ends
    assert ("ended early: no better top-1" in capsys.readouterr().out) == (ends < 6)
    assert small_runs.run(tmp_path, *flags, "--resume") == 0  # it is over, and stays so
    assert len(small_runs.log_rows(tmp_path / "run")) == ends


def test_an_interrupted_run_ends_early_at_the_same_epoch(tmp_path, monkeypatch):
    """Bitwise: stopped in the third epoch, whose end is the last."""
    flags = [*FLAGS.split(), "--early-stop", "1"]
    with monkeypatch.context() as patch:
        scores(patch, [10, 30, 20])
        assert small_runs.run(tmp_path / "straight", *flags) == 0
    with monkeypatch.context() as patch:
        scores(patch, [10, 30])
        kill_at_step(patch, 7, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert small_runs.run(tmp_path, *flags) == 75
    scores(monkeypatch, [20])
    small_runs.scramble_generators()
    assert small_runs.run(tmp_path, *flags, "--resume") == 0
    assert_same_run(tmp_path / "straight" / "run", tmp_path / "run")


def test_a_resumed_run_writes_the_whole_table_again(tmp_path):
    assert small_runs.run(tmp_path, *FLAGS.split(), "--max-steps", "3", "--log-csv") == 0
    assert small_runs.run(tmp_path, *FLAGS.split(), "--resume", "--log-csv") == 0
    assert len((tmp_path / "run" / "log.csv").read_text().splitlines()) == 7
    assert small_runs.run(tmp_path, *FLAGS.split(), "--overwrite") == 0
    assert not (tmp_path / "run" / "log.csv").exists()


def test_a_table_by_hand():
    rows = [{"epoch": 1, "a": 0.5, "d": {"x": 1}}, {"epoch": 2, "a": None, "b": "x,y"}]
    assert csv_text(rows) == 'epoch,a,b\n1,0.5,\n2,,"x,y"\n' and csv_text([]) == ""
