"""The folder of a run where something goes wrong in it: a full disk, a link to nowhere, a start cut short, a race."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import small_runs
import train
from sasa.detection.config import resolve
from sasa.training import files
from sasa.training.cli import parse_command_line
from sasa.training.files import make_folder
from sasa.training.lock import NAME
from tiny_runs import Killed, go, read, refused


@pytest.mark.parametrize("flags", ["", "--resume", "--overwrite"])
def test_a_full_disk_at_the_start_is_one_line(tmp_path, tiny, monkeypatch, capsys, flags):
    def full(*_):
        raise OSError(28, "No space left on device")

    if flags:
        go(tmp_path, "--max-steps 3")
    monkeypatch.setattr(files, "write_json", full)
    error = refused(capsys, tmp_path, flags)
    assert f"{tmp_path / 'run'} cannot be written to: No space left on device" in error


@pytest.mark.parametrize("what", ["folder", "link"])
def test_something_else_in_the_locks_place_is_one_line(tmp_path, tiny, capsys, what):
    place = tmp_path / "run" / NAME
    place.parent.mkdir()
    place.mkdir() if what == "folder" else place.symlink_to(tmp_path / "elsewhere")
    assert f"{place}: cannot be locked (" in refused(capsys, tmp_path)
    assert not (tmp_path / "elsewhere").exists()


def test_two_starts_at_a_time_do_not_trip_over_each_other(tmp_path, monkeypatch):
    """Another one comes in between where this one removes what it tried to write with."""
    unlink, inside = Path.unlink, []

    def meanwhile(path, *args, **options):
        if not inside:
            inside.append(path)
            make_folder(tmp_path)
        unlink(path, *args, **options)

    monkeypatch.setattr(Path, "unlink", meanwhile)
    make_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_overwrite_that_is_cut_short_can_be_repeated(tmp_path, tiny, monkeypatch):
    """Killed before each of the files that it removes."""
    old, cuts = go(tmp_path / "old"), 0
    unlink = Path.unlink
    for cut in range(20):
        shutil.copytree(old, tmp_path / str(cut) / "run")
        left = [cut]

        def killed(path, *args, left=left, **options):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            unlink(path, *args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", killed)
            try:
                go(tmp_path / str(cut), "--overwrite --max-steps 1 --no-digest")
                break
            except Killed:
                cuts += 1
        folder = go(tmp_path / str(cut), "--overwrite --max-steps 1 --no-digest")
        assert read(folder)["steps"] == 1
    assert cuts >= 6  # last.pt, previous.pt, best.pt, log.jsonl, summary.json, images.jsonl.gz


# ---- links to nowhere -----------------------------------------------------------------------------------------------


def test_a_link_to_nowhere_is_a_checkpoint_that_is_not_whole(tmp_path, tiny, capsys):
    folder = go(tmp_path, "--max-steps 3")
    (folder / "last.pt").unlink()
    (folder / "last.pt").symlink_to(tmp_path / "nowhere")
    (folder / "previous.pt").unlink(missing_ok=True)
    assert f"{folder / 'last.pt'}: no such file" in refused(capsys, tmp_path, "--resume")
    assert (folder / "last.pt").is_symlink()


def test_the_state_before_a_link_to_nowhere_serves(tmp_path, tiny, capsys):
    straight = go(tmp_path / "straight")
    folder = go(tmp_path, "--max-steps 12")
    (folder / "last.pt").replace(folder / "previous.pt")
    (folder / "last.pt").symlink_to(tmp_path / "nowhere")
    assert small_runs.log_rows(go(tmp_path, "--resume")) == small_runs.log_rows(straight)
    assert "last.pt: no such file: using previous.pt" in capsys.readouterr().out
    assert os.path.lexists(folder / "damaged-last.pt") and not (folder / "last.pt").is_symlink()


# ---- a path as it is typed in the folder ----------------------------------------------------------------------------


@pytest.mark.parametrize(("where", "typed"), [(".", "last.pt"), (".", "./last.pt"), ("deeper", "../last.pt")])
def test_a_path_typed_in_the_folder_keeps_the_runs_name(tmp_path, tiny, monkeypatch, capsys, where, typed):
    folder = go(tmp_path, "--max-steps 3")
    (folder / "deeper").mkdir()
    monkeypatch.chdir(folder / where)
    capsys.readouterr()
    assert train.main(parse_command_line(["--resume", typed, "--no-progress"])) == 0
    assert f"folder    {folder}; watch it with: tensorboard --logdir {tmp_path}\n" in capsys.readouterr().out
    assert read(folder, "config.json")["name"] == "run" and read(folder)["steps"] == 20


# ---- a checkpoint of the other command ------------------------------------------------------------------------------


def test_a_detectors_checkpoint_is_called_one(tmp_path, tiny, capsys):
    folder = go(tmp_path, "--max-steps 3")
    state = torch.load(folder / "last.pt", weights_only=True)
    path = tmp_path / "detector.pt"
    torch.save(state | {"config": resolve({}, "DIGITS").to_dict()}, path)
    torch.save(state | {"config": resolve({}, "DIGITS").to_dict()}, folder / "last.pt")
    for flags, name in ((f"--resume {path}", path), (f"--evaluate {path}", path)):
        assert f"{name}: belongs to a detector" in refused(capsys, tmp_path / "new", flags)
    assert f"{folder / 'last.pt'}: belongs to a detector" in refused(capsys, tmp_path, "--resume")
    (folder / "last.pt").unlink()
    (folder / "previous.pt").unlink(missing_ok=True)
    (folder / "config.json").write_text(json.dumps(read(folder, "config.json") | {"anchor_scales": 2}))
    assert f"{folder / 'config.json'}: belongs to a detector" in refused(capsys, tmp_path, "--resume")
