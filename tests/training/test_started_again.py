"""A run that ended before its first save begins again by what its config.json says that it was started with."""

import json

import pytest
import torch

import config
import small_runs
import train
from tiny_runs import BASE, Killed, go, read, refused


@pytest.fixture
def killed(tiny, monkeypatch):
    """A function that starts a run which is killed in its first step."""

    def start(output, *flags: str):
        def train_step(*_):
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(train, "train_step", train_step)
            with pytest.raises(Killed):
                small_runs.run(output, *BASE.split(), *" ".join(flags).split())
        assert (output / "run/config.json").exists() and not (output / "run/last.pt").exists()

    return start


# ---- --init-from ----------------------------------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path, tiny):
    return go(tmp_path / "before", "--max-steps 5") / "best.pt"


def test_a_run_of_other_weights_never_begins_again_with_new_ones(tmp_path, weights, killed, capsys):
    straight = go(tmp_path / "straight", f"--init-from {weights}")
    killed(tmp_path, f"--init-from {weights}")
    error = refused(capsys, tmp_path, "--resume")
    assert f"--init-from {weights}: give it again" in error and not (tmp_path / "run/last.pt").exists()
    assert small_runs.log_rows(go(tmp_path, f"--resume --init-from {weights}")) == small_runs.log_rows(straight)
    assert small_runs.log_rows(go(tmp_path / "new")) != small_runs.log_rows(straight)


def test_one_command_line_serves_the_first_start_and_every_other(tmp_path, weights, capsys):
    """And says where the weights were from, to the run's end; they are not read where there is a checkpoint."""
    straight = go(tmp_path / "straight", f"--init-from {weights}")
    flags = f"--resume --init-from {weights}"
    folder = go(tmp_path, flags, "--max-steps 12")
    weights.unlink()
    assert "no such file" in refused(capsys, tmp_path / "none", flags)
    assert small_runs.log_rows(go(tmp_path, flags)) == small_runs.log_rows(straight)
    assert f"--init-from {weights}: not read, the run goes on from {folder / 'last.pt'}" in capsys.readouterr().out
    for name in ("last.pt", "best.pt"):
        assert torch.load(folder / name, weights_only=True)["init_from"] == str(weights)
    assert read(folder, "config.json")["start"]["init_from"] == str(weights)


# ---- its settings ---------------------------------------------------------------------------------------------------


def test_a_rate_that_was_given_stays_as_given(tmp_path, killed, capsys):
    killed(tmp_path, "--lr 0.25")
    folder = go(tmp_path, "--resume")
    assert "peak rate 0.25 (as given)" in capsys.readouterr().out
    assert read(folder, "config.json")["lr"] == 0.25
    assert "lr" not in torch.load(folder / "last.pt", weights_only=True)["recipe"]


def test_other_flags_and_an_edited_recipe_are_refused_by_name(tmp_path, killed, monkeypatch, capsys):
    killed(tmp_path)
    assert "--lr was" in refused(capsys, tmp_path, "--resume --lr 0.5")
    monkeypatch.setitem(config.RECIPES["default"], "DIGITS", config.RECIPES["default"]["DIGITS"] | {"rotate": 30.0})
    assert "--rotate was 10.0, is 30.0" in refused(capsys, tmp_path, "--resume")


@pytest.mark.parametrize("start", [None, {"recipe": [], "global_batch": 4, "init_from": None}, {"recipe": {}}, "x"])
def test_a_config_json_without_its_start_is_refused(tmp_path, killed, capsys, start):
    killed(tmp_path)
    path = tmp_path / "run/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"start": start}))
    words = "of an older version" if start is None else "config.json: damaged"
    assert words in refused(capsys, tmp_path, "--resume")


# ---- what a finished run has left -----------------------------------------------------------------------------------

LONGER = "--schedule step --epochs 4 --resume"


@pytest.fixture
def kill_in(monkeypatch):
    """A function that resumes a run which is killed where it calls this function of train.py."""

    def resume(output, name: str, *flags: str):
        def kill(*_):
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(train, name, kill)
            with pytest.raises(Killed):
                small_runs.run(output, *BASE.split(), *" ".join(flags).split())

    return resume


def test_a_run_that_goes_on_is_not_finished_any_more(tmp_path, tiny, kill_in):
    """Its summary goes: tools.ablate and others take it for done by that. best.pt says what it is of, and stays."""
    folder = go(tmp_path, "--schedule step")
    best = (folder / "best.pt").read_bytes()
    kill_in(tmp_path, "train_step", LONGER)
    assert not (folder / "summary.json").exists() and (folder / "best.pt").read_bytes() == best
    go(tmp_path, LONGER)
    assert read(folder)["epochs"] == torch.load(folder / "best.pt", weights_only=True)["epoch"] == 4


def test_a_run_without_a_step_left_stays_finished(tmp_path, tiny, kill_in):
    folder = go(tmp_path)
    summary = (folder / "summary.json").read_bytes()
    kill_in(tmp_path, "train_epochs", "--resume")
    assert (folder / "summary.json").read_bytes() == summary


def test_a_run_in_another_folder_keeps_where_its_weights_were_from(tmp_path, weights):
    folder = go(tmp_path / "a", f"--init-from {weights} --max-steps 3")
    assert small_runs.run(tmp_path, "--resume", str(folder / "last.pt"), "--output-dir", str(tmp_path / "b")) == 0
    assert read(tmp_path / "b/run", "config.json")["start"]["init_from"] == str(weights)
