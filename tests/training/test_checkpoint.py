"""checkpoint.py: whole files or none, verified reading, what differs said; training runs are in test_resume.py."""

import errno
import os
import random
import re

import pytest
import torch

from config import resolve
from sasa.training import checkpoint
from sasa.training.checkpoint import CheckpointError, Progress
from sasa.training.files import BEST
from sasa.training.optim import build_ema, build_optimizer
from sasa.training.resume import changed_keys

RECIPE = {"lr": 0.5}
SPLIT = {"images": 3, "hash": "00", "classes": [[1, "0"], [2, "1"]]}
DATA = {"dataset": "DIGITS", "class_names": ["a", "b", "c"], "mean": [0.5] * 3, "std": [0.25] * 3}
IDENTITY = checkpoint.Identity("00ff", DATA | {"train": SPLIT, "holdout": None, "test": SPLIT})


def small_parts(epochs=3):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 3))
    config = resolve({"epochs": epochs, "ema": 0.9}, "DIGITS")
    optimizer = build_optimizer(model, config, torch.device("cpu"))
    ema = build_ema(model, 0.9)
    model(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    ema.update_parameters(model)
    return config, model, optimizer, ema


def small_state(**progress):
    config, model, optimizer, ema = small_parts()
    return checkpoint.run_state(
        config, IDENTITY, RECIPE, model, optimizer, None, ema, None, Progress(global_batch=4, **progress)
    )


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def test_every_file_loads_with_weights_only_and_comes_back_equal(tmp_path):
    state = small_state(step=5, rows=[{"epoch": 1, "train_loss": 0.5}])
    checkpoint.save(state, tmp_path)
    checkpoint.save(state, tmp_path)
    config, model, _, _ = small_parts()
    checkpoint.save(checkpoint.weights_state(config, IDENTITY, model.state_dict(), 1, 5, "test"), tmp_path, BEST)
    for name in (checkpoint.LAST, checkpoint.PREVIOUS, BEST):
        torch.load(tmp_path / name, weights_only=True)
    assert equal(checkpoint.load(tmp_path / checkpoint.LAST), state)


def test_restore_puts_every_part_back(tmp_path):
    state = small_state(step=7, epoch=1, batch=2, images=8, epoch_seconds=0.5, best_top1=12.5, rows=[{"epoch": 1}])
    checkpoint.save(state, tmp_path)
    torch.rand(3), random.random()
    _, model, optimizer, ema = small_parts()
    with torch.no_grad():
        for p in [*model.parameters(), *ema.parameters()]:
            p.add_(1)
    optimizer.state.clear()
    progress = checkpoint.restore(checkpoint.load(tmp_path / checkpoint.LAST), model, optimizer, None, ema)
    config = resolve({"epochs": 3, "ema": 0.9}, "DIGITS")
    assert equal(checkpoint.run_state(config, IDENTITY, RECIPE, model, optimizer, None, ema, None, progress), state)


def test_previous_is_the_whole_file_before_the_last(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(small_state(step=step), tmp_path)
    assert checkpoint.load(tmp_path / checkpoint.LAST)["progress"]["step"] == 3
    assert checkpoint.load(tmp_path / checkpoint.PREVIOUS)["progress"]["step"] == 2


def test_the_bytes_are_on_the_disk_before_the_name_moves_and_the_folder_after(tmp_path, monkeypatch):
    checkpoint.save(small_state(), tmp_path)
    calls, fsync, replace = [], os.fsync, os.replace

    def recorded_fsync(descriptor):
        calls.append(plain(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(f"{plain(a)} > {plain(b)}"), replace(a, b)))
    checkpoint.save(small_state(), tmp_path)
    temporary = ".last.pt.*.tmp"
    assert calls == [temporary, "last.pt > previous.pt", temporary, f"{temporary} > last.pt", tmp_path.name]


def plain(path) -> str:
    """A file's name without what is random in it."""
    return re.sub(r"\.[0-9a-f]{16}\.", ".*.", os.path.basename(path))


class FullDisk:
    """A file that takes `room` bytes, then fails as a full disk does."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


@pytest.mark.parametrize("room", [0, 100, 3000])
def test_a_full_disk_leaves_the_old_files_and_no_temporary_one(tmp_path, monkeypatch, room):
    checkpoint.save(small_state(step=1), tmp_path)
    checkpoint.save(small_state(step=2), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    opened = os.fdopen
    monkeypatch.setattr(os, "fdopen", lambda d, m="r", **k: FullDisk(opened(d, m, **k), room))
    with pytest.raises(OSError, match="not written"):
        checkpoint.save(small_state(step=3), tmp_path)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_kill_between_the_renames_still_leaves_a_whole_file(tmp_path, monkeypatch):
    checkpoint.save(small_state(step=1), tmp_path)
    checkpoint.save(small_state(step=2), tmp_path)
    replace, calls = os.replace, []

    def killed(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt  # not an Exception: nothing cleans up, as at a kill
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(small_state(step=3), tmp_path)
    monkeypatch.undo()
    state, path, _ = checkpoint.newest(tmp_path)
    assert path.name == checkpoint.PREVIOUS and state["progress"]["step"] == 2
    checkpoint.save(state, tmp_path)
    assert checkpoint.newest(tmp_path)[1].name == checkpoint.LAST


def test_newest_says_what_was_wrong_and_takes_the_one_before(tmp_path):
    checkpoint.save(small_state(step=1), tmp_path)
    checkpoint.save(small_state(step=2), tmp_path)
    (tmp_path / checkpoint.LAST).write_bytes(b"")
    state, path, problems = checkpoint.newest(tmp_path)
    assert path.name == checkpoint.PREVIOUS and state["progress"]["step"] == 1
    assert len(problems) == 1 and "last.pt" in problems[0]


def test_newest_of_nothing_is_none_and_of_damaged_files_is_an_error(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    for name in (checkpoint.LAST, checkpoint.PREVIOUS):
        (tmp_path / name).write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match=r"last\.pt.*previous\.pt"):
        checkpoint.newest(tmp_path)


def damage(data: bytes, rng: random.Random) -> bytes:
    kind = rng.choice(("cut", "flip", "zeros", "swap"))
    at = rng.randrange(len(data))
    if kind == "cut":
        return data[:at]
    if kind == "flip":
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
    if kind == "zeros":
        end = min(len(data), at + rng.randrange(1, 512))
        return data[:at] + bytes(end - at) + data[end:]
    other = rng.randrange(len(data))
    both = bytearray(data)
    both[at], both[other] = both[other], both[at]
    return bytes(both)


def test_200_damaged_files_never_load_wrongly_and_never_raise_anything_else(tmp_path):
    state = small_state(step=4, rows=[{"epoch": 1, "train_loss": 0.25}])
    checkpoint.save(state, tmp_path)
    whole = (tmp_path / checkpoint.LAST).read_bytes()
    rng, refused = random.Random(0), 0
    for _ in range(200):
        bytes_ = damage(whole, rng)
        (tmp_path / checkpoint.LAST).write_bytes(bytes_)
        try:
            loaded = checkpoint.load_run(tmp_path / checkpoint.LAST)
        except CheckpointError as error:
            assert "\n" not in str(error)
            refused += 1
        else:  # damage to padding or to unused header fields, or none at all: the values must be right
            assert equal(loaded, state)
    assert refused > 100  # the fuzz reaches the data


@pytest.mark.parametrize("at", [0, 1, 100, 0.25, 0.5, 0.9, 0.999])
def test_a_file_cut_anywhere_is_refused(tmp_path, at):
    checkpoint.save(small_state(), tmp_path)
    path = tmp_path / checkpoint.LAST
    whole = path.read_bytes()
    path.write_bytes(whole[: at if isinstance(at, int) else int(at * len(whole))])
    with pytest.raises(CheckpointError, match=r"last\.pt"):
        checkpoint.load(path)


def test_a_flipped_bit_in_a_weight_is_noticed(tmp_path):
    """torch's own reader takes it: the negative control."""
    checkpoint.save({**small_state(), "marker": torch.full((64,), 1.5)}, tmp_path)
    path = tmp_path / checkpoint.LAST
    data = bytearray(path.read_bytes())
    at = bytes(data).index(torch.full((64,), 1.5).numpy().tobytes())
    data[at + 2] ^= 1
    path.write_bytes(data)
    assert torch.load(path, weights_only=True)["marker"][0] != 1.5
    with pytest.raises(CheckpointError):
        checkpoint.load(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([1, 2], "not a checkpoint of train.py"),
        ({"format": 99}, "format 99"),
        ({"format": checkpoint.FORMAT, "kind": "run"}, "lacks"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, content, said):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=said):
        checkpoint.load(tmp_path / "x.pt")


def test_a_pickled_object_is_never_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    torch.save({"format": checkpoint.FORMAT, "x": Evil()}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError):
        checkpoint.load(tmp_path / "x.pt")
    assert not (tmp_path / "pwned").exists()


def test_missing_file_folder_and_weights_only_file_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        checkpoint.load(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="folder"):
        checkpoint.load(tmp_path)
    config, model, _, _ = small_parts()
    checkpoint.save(checkpoint.weights_state(config, IDENTITY, model.state_dict(), 1, 5, "test"), tmp_path, BEST)
    with pytest.raises(CheckpointError, match="weights only"):
        checkpoint.load_run(tmp_path / BEST)


def test_weights_of_another_network_are_named():
    _, model, _, _ = small_parts()
    weights = {**model.state_dict(), "extra": torch.ones(1)}
    weights.pop("0.bias")
    weights["2.weight"] = torch.ones(5, 8)
    with pytest.raises(CheckpointError, match=r"0\.bias is missing.*extra is not.*2\.weight is \(5, 8\) there"):
        checkpoint.load_weights(model, weights)


def test_changed_keys_lists_what_could_change_the_result_and_nothing_else():
    saved = resolve({"lr": 0.1, "stem": True}, "DIGITS")
    free = {"num_workers": 9, "output_dir": "elsewhere", "save_minutes": 1.0, "progress": False, "max_steps": 3}
    free["attention_every"] = 1
    assert changed_keys(saved, resolve({"lr": 0.1, "stem": True, **free}, "DIGITS")) == []
    lines = changed_keys(saved, resolve({"lr": 0.2, "epochs": 99}, "DIGITS"))
    assert [line.split()[0] for line in lines] == ["--epochs", "--lr", "--stem"]
    assert "was 0.1, is 0.2" in lines[1]


def test_more_epochs_are_allowed_where_the_rates_already_used_stay():
    seed = {"recipe": "port", "epochs": 4}
    saved = resolve(seed, "DIGITS")
    assert changed_keys(saved, resolve({**seed, "epochs": 8}, "DIGITS")) == []
    assert changed_keys(saved, resolve({**seed, "epochs": 3}, "DIGITS")) != []


class Net(torch.nn.Module):
    def __init__(self, classes, size):
        super().__init__()
        self.rel_row = torch.nn.Parameter(torch.linspace(0, 1, size).expand(2, 3, size).clone())
        self.body = torch.nn.Linear(4, 4)
        self.fc = torch.nn.Linear(4, classes)


def test_transfer_interpolates_embeddings_and_keeps_a_new_classifier():
    torch.manual_seed(0)
    source, target = Net(5, 7), Net(3, 9)
    fresh = target.fc.weight.clone()
    lines = checkpoint.transfer_weights(target, source.state_dict())
    assert torch.equal(target.body.weight, source.body.weight)
    assert torch.equal(target.fc.weight, fresh)
    assert torch.allclose(target.rel_row, torch.linspace(0, 1, 9).expand(2, 3, 9), atol=1e-6)
    assert lines == [
        "fc.bias: (5,) there, (3,) here, stays new",
        "fc.weight: (5, 4) there, (3, 4) here, stays new",
        "rel_row: interpolated from 7 to 9 offsets",
    ]


def test_transfer_from_something_else_is_an_error():
    with pytest.raises(CheckpointError, match="no weight"):
        checkpoint.transfer_weights(Net(3, 7), {"other": torch.ones(3)})


def test_weights_of_takes_the_moving_average_where_there_is_one():
    state = small_state()
    average = checkpoint.weights_of(state)
    assert average.keys() == state["model"].keys()
    assert torch.equal(average["0.weight"], state["ema"]["module.0.weight"])
    assert checkpoint.weights_of({**state, "ema": None}) is state["model"]
