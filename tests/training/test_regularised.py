"""Runs with every regularisation on, bitwise over a resume in the middle of an epoch; on ranks: test_distributed.py."""

import json
import os
import signal

import pytest
import torch
from test_resume import assert_same_run, kill_at_step

import model
import small_runs
from ranks import Small
from small_runs import EVERYTHING

SHORT = "--dataset DIGITS --name run --no-progress --device cpu --epochs 2 --batch-size 8 --lr 0.01 --save-minutes 0"


@pytest.fixture
def blocks(monkeypatch):
    small_runs.few_digits(monkeypatch)
    monkeypatch.setattr(model, "build", lambda name, num_classes, stem, **options: Small(num_classes, None, True, 3))


def test_a_resume_in_the_middle_of_an_epoch_is_bitwise(tmp_path, blocks, monkeypatch):
    flags = [*SHORT.split(), *EVERYTHING.split()]
    assert small_runs.run(tmp_path / "straight", *flags) == 0
    with monkeypatch.context() as patch:
        kill_at_step(patch, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert small_runs.run(tmp_path, *flags) == 75
    small_runs.scramble_generators()
    assert small_runs.run(tmp_path, *flags, "--resume") == 0
    assert_same_run(tmp_path / "straight" / "run", tmp_path / "run")


@pytest.mark.parametrize("less", ["--drop-path 0", "--repeats 1", "--random-erase 0", "--loss ce", "--min-lr 0",
                                  "--class-weights none", "--layer-decay 1", "--auto-augment auto"])  # fmt: skip
def test_each_of_them_changes_the_weights(tmp_path, blocks, less):
    flags = [*SHORT.split(), *EVERYTHING.split(), "--max-steps", "5", "--attention-every", "0"]
    states = []
    for i, more in enumerate(("", less)):
        assert small_runs.run(tmp_path / str(i), *flags, *more.split()) == 0
        states.append(torch.load(tmp_path / str(i) / "run" / "best.pt", weights_only=True)["model"])
    assert small_runs.differences(*states) != []


def test_weights_of_a_file_are_kept_in_the_run(tmp_path, blocks, capsys):
    """The file may change or go: the run goes on with its own; a flag with other weights is refused."""
    names, path = [str(i) for i in range(10)], tmp_path / "weights.json"
    path.write_text(json.dumps({name: 1 + int(name) for name in names}))
    flags = [*SHORT.split(), "--class-weights", str(path)]
    assert small_runs.run(tmp_path, *flags, "--max-steps", "2") == 0
    held = json.loads((tmp_path / "run" / "config.json").read_text())["class_weights"]
    assert json.loads(held) == {name: 1.0 + int(name) for name in names}
    assert small_runs.run(tmp_path, *flags, "--resume", "--max-steps", "3") == 0
    path.write_text(json.dumps(dict.fromkeys(names, 1)))
    capsys.readouterr()
    assert small_runs.run(tmp_path, *flags, "--resume") == 2
    error = capsys.readouterr().err
    assert "--class-weights was" in error and error.count("\n") == 1
    assert small_runs.run(tmp_path, *SHORT.split(), "--resume") == 0
    path.write_text('{"zero": 1}')
    assert small_runs.run(tmp_path / "other", *flags) == 2
    assert "has no weight" in capsys.readouterr().err


def test_a_run_keeps_the_weights_of_a_file_that_is_gone(tmp_path, blocks, capsys):
    """By the same command, which is what a requeued job has; a new run, or one without such weights, needs the file."""
    path = tmp_path / "weights.json"
    path.write_text(json.dumps({str(i): 1 + i for i in range(10)}))
    flags = [*SHORT.split(), "--class-weights", str(path)]
    assert small_runs.run(tmp_path / "straight", *flags, "--max-steps", "4") == 0
    assert small_runs.run(tmp_path, *flags, "--max-steps", "2") == 0
    assert small_runs.run(tmp_path / "plain", *SHORT.split(), "--max-steps", "2") == 0
    path.unlink()
    capsys.readouterr()
    assert small_runs.run(tmp_path, *flags, "--max-steps", "4", "--resume") == 0
    assert f"--class-weights {path}: the file is gone, the run keeps the weights that it had" in capsys.readouterr().out
    assert_same_run(tmp_path / "straight" / "run", tmp_path / "run")
    for output, more in (("new", []), ("new", ["--resume"]), ("plain", ["--resume"])):
        assert small_runs.run(tmp_path / output, *flags, *more) == 2
        error = capsys.readouterr().err
        assert f"--class-weights {path}: cannot be read" in error and error.count("\n") == 1


def test_an_older_run_goes_on(tmp_path, blocks):
    """A state from before these fields, whose recipe said randaugment: bitwise the run of today's names."""
    flags = [*SHORT.split(), "--randaugment"]
    assert small_runs.run(tmp_path / "straight", *flags) == 0
    assert small_runs.run(tmp_path, *flags, "--max-steps", "5") == 0
    path = tmp_path / "run" / "last.pt"
    state = torch.load(path, weights_only=True)
    younger = ("random_erase", "repeats", "drop_path", "loss", "bce_threshold", "class_weights", "min_lr",
               "layer_decay")  # fmt: skip
    for key in younger:
        del state["config"][key]
        state["recipe"].pop(key, None)
    assert state["config"].pop("auto_augment") == "rand"
    state["config"]["randaugment"] = True
    torch.save(state, path)
    assert small_runs.run(tmp_path, *flags, "--resume") == 0
    ends = [small_runs.state_without_times(folder) for folder in (tmp_path / "straight" / "run", tmp_path / "run")]
    for end in ends:
        del end["recipe"]  # what it provided is that of the day
    assert small_runs.differences(*ends) == []
    state["recipe"]["randaugment"] = True  # as though it had come from the recipe, which now says otherwise
    torch.save(state, path)
    assert small_runs.run(tmp_path, *SHORT.split(), "--resume") == 2
