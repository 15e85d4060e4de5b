"""A checkpoint from anywhere: each field is checked, and what is wrong ends in one line and exit code 2."""

import copy
import math

import pytest
import torch

import small_runs
from small_runs import FLAGS

NAN = math.nan


def put(*path):
    """Sets the value at the end of a path of keys."""

    def change(state):
        *keys, last, value = path
        for key in keys:
            state = state[key]
        state[last] = value

    return change


def without(*path):
    def change(state):
        for key in path[:-1]:
            state = state[key]
        del state[path[-1]]

    return change


EITHER = {  # --evaluate and --resume
    "format": put("format", torch.ones(2)),
    "no config": put("config", None),
    "a field of another type": put("config", "epochs", "x"),
    "another data set": put("config", "dataset", "EVIL"),
    "another recipe": put("config", "recipe", "x"),
    "a name that leads out": put("config", "name", "../../evil"),
    "a zero byte": put("config", "data_dir", "a\0b"),
    "a window of a million": put("config", "kernel_size", 10**9),
    "a negative size": put("config", "img_size", -1),
    "an infinite rate": put("config", "lr", math.inf),
    "no weights": put("model", None),
    "a weight that is text": put("model", "fc.weight", "x"),
    "a weight that is missing": without("model", "fc.weight"),
    "a weight without numbers": put("model", "fc.bias", torch.empty(10, device="meta")),
    "a weight larger than the file": put("model", "fc.bias", torch.zeros(1).expand(10)),
    "no data": put("data", None),
    "no class names": put("data", "class_names", []),
    "a mean of two numbers": put("data", "mean", [0.5, 0.5]),
    "a deviation that is no number": put("data", "std", [NAN] * 3),
}
RUN = {
    "no generators": put("generators", []),
    "a generator's state of zeros": put("generators", 0, "torch", torch.zeros(3)),
    "no progress": put("progress", None),
    "a negative epoch": put("progress", "epoch", -5),
    "no global batch": put("progress", "global_batch", 0),
    "a global batch beyond the data": put("progress", "global_batch", 2**61),
    "an open epoch without images": put("progress", "images", 0),
    "an open epoch without time": put("progress", "epoch_seconds", 0.0),
    "a loss that is no number": put("progress", "loss_sum", NAN),
    "a best score that is text": put("progress", "best_top1", "x"),
    "a best epoch that is text": put("progress", "best_epoch", "x"),
    "changes that are a number": put("progress", "data_changes", 7),
    "figures that are text": put("progress", "figures", {"train/loss": "x"}),
    "rows that are text": put("progress", "rows", ["x"]),
    "a field that no run has": put("progress", "evil", 1),
    "no optimizer": put("optimizer", None),
    "no parameter groups": put("optimizer", "param_groups", []),
    "a batch of none": put("config", "batch_size", 0),
    "a recipe that is a list": put("recipe", [1]),
}


@pytest.fixture
def state(tmp_path, tiny, monkeypatch):
    """Of a run that was stopped in the middle of an epoch."""
    small_runs.few_digits(monkeypatch)
    assert small_runs.run(tmp_path, *FLAGS.split(), "--device", "cpu", "--max-steps", "2", "--ema", "0") == 0
    return torch.load(tmp_path / "run/last.pt", weights_only=True)


@pytest.mark.parametrize("flag", ["--evaluate", "--resume"])
def test_hostile_fields_are_one_line(tmp_path, state, capsys, flag):
    path = tmp_path / "other" / "last.pt"
    path.parent.mkdir()
    for name, change in (EITHER if flag == "--evaluate" else EITHER | RUN).items():
        hostile = copy.deepcopy(state)
        change(hostile)
        torch.save(hostile, path)
        capsys.readouterr()
        code = small_runs.run(tmp_path / "new", flag, str(path), "--device", "cpu")
        error = capsys.readouterr().err
        assert code == 2 and error.count("\n") == 1 and error.startswith("train.py: error: "), (name, code, error)
        assert sorted(p.name for p in path.parent.iterdir() if p.suffix not in (".lock",)) == ["last.pt"], name


def test_the_state_itself_goes_on(tmp_path, state):
    """So the refusals above are of the changes."""
    (tmp_path / "other").mkdir()
    torch.save(state, tmp_path / "other" / "last.pt")
    assert small_runs.run(tmp_path, "--evaluate", str(tmp_path / "other" / "last.pt"), "--device", "cpu") == 0
    assert small_runs.run(tmp_path / "new", "--resume", str(tmp_path / "other" / "last.pt"), "--no-progress") == 0


def test_weights_that_are_no_numbers_have_no_score(tmp_path, state, capsys):
    state["model"]["fc.weight"] *= NAN
    torch.save(state, tmp_path / "nan.pt")
    capsys.readouterr()
    assert small_runs.run(tmp_path, "--evaluate", str(tmp_path / "nan.pt"), "--device", "cpu") == 1
    error = capsys.readouterr().err
    assert "the loss is nan: the network has no result" in error and error.count("\n") == 1
