"""Image files that are damaged while a run trains, or between two of its starts: named, saved, skipped if wanted."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import small_runs
import train
from config import resolve
from sasa.training import distributed
from sasa.training.distributed import SharedError
from sasa.training.optim import learning_rate
from sasa.training.run import check_ranks_agree
from tiny_runs import BASE, make_tree, tree_flags


@pytest.fixture
def tree(tmp_path):
    return make_tree(tmp_path / "tree")


def run(output: Path, *flags: str) -> int:
    return small_runs.run(output, *BASE.split(), *" ".join(flags).split())


def test_damaged_images_are_skipped_by_a_resume_that_allows_it(tree, tmp_path, tiny, capsys):
    flags = tree_flags(tree, 0)
    assert run(tmp_path, flags, "--max-steps 8") == 0
    for image in (tree / "train/bee").iterdir():
        image.write_bytes(image.read_bytes()[:100])
    capsys.readouterr()
    assert run(tmp_path, flags, "--resume") == 2
    error = capsys.readouterr().err
    assert "class bee 8 images, not the same ones" in error and "--skip-bad-images leaves out" in error
    assert run(tmp_path, flags, "--resume --skip-bad-images") == 0
    out = capsys.readouterr().out
    assert "although the data set has changed: train: 24 images, not the same ones" in out and "skipped" in out
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["bad_images"] and "class bee" in summary["data_changes"][0]


@pytest.mark.parametrize("factor", [3, 1 / 2])
def test_the_rate_goes_by_the_epochs_whatever_the_number_of_images(tree, tmp_path, tiny, monkeypatch, factor):
    """6 steps an epoch, from the 5th of the third of 6 epochs on more or fewer; 2 warm up, then a cosine to 0."""
    flags = f"{tree_flags(tree, 0)} --epochs 6 --warmup-epochs 2"
    assert run(tmp_path, flags, "--max-steps 16") == 0
    for folder in (tree / "train").iterdir():
        for i in range(8, round(8 * factor)):
            shutil.copy(folder / f"{i % 8}.jpg", folder / f"{i}.jpg")
        for i in range(round(8 * factor), 8):
            (folder / f"{i}.jpg").unlink()
    rates, check_finite = [], train.check_finite

    def watched(run, step):
        rates.append(step.lr)
        return check_finite(run, step)

    monkeypatch.setattr(train, "check_finite", watched)
    assert run(tmp_path, flags, "--resume --allow-changed-data") == 0
    config, steps = resolve({"lr": 0.02, "epochs": 6, "warmup_epochs": 2.0}, "FOLDER"), round(6 * factor)
    first = 2 * steps + min(4, steps)  # an epoch that has become as short is over
    assert rates == pytest.approx([learning_rate(config, step, steps) for step in range(first, 6 * steps)])
    logged = [row["lr"] for row in small_runs.log_rows(tmp_path / "run")]
    ends = [learning_rate(config, epoch * 6 - 1, 6) for epoch in (1, 2)]
    assert logged == pytest.approx(ends + [learning_rate(config, epoch * steps - 1, steps) for epoch in (3, 4, 5, 6)])


def test_another_file_is_not_a_damaged_one(tree, tmp_path, tiny, capsys):
    flags = tree_flags(tree, 0)
    assert run(tmp_path, flags, "--max-steps 8 --skip-bad-images") == 0
    (tree / "train/bee/2.jpg").rename(tree / "train/bee/200.jpg")
    capsys.readouterr()
    assert run(tmp_path, flags, "--resume --skip-bad-images") == 2
    error = capsys.readouterr().err
    assert "class bee 8 images, not the same ones" in error and "leaves out" not in error


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_any_more_costs_no_step(tree, tmp_path, tiny, monkeypatch, capsys, workers):
    """All are damaged after the third step, their sizes and times the same: found only when the next is read."""
    flags, original, steps = tree_flags(tree, workers), train.train_step, []

    def train_step(*args):
        steps.append(1)
        if len(steps) == 3:
            for path in tree.glob("train/*/*"):
                path.write_bytes(bytes(path.stat().st_size))
        return original(*args)

    monkeypatch.setattr(train, "train_step", train_step)
    assert run(tmp_path, flags) == 2
    error = capsys.readouterr().err
    assert "cannot read image" in error and "; saved at step " in error and error.count("\n") == 1
    done = len(steps) - 1
    assert torch.load(tmp_path / "run/last.pt", weights_only=True)["progress"]["step"] == done >= 2


def test_ranks_with_other_data_are_refused(monkeypatch):
    """Each rank reads its own machine's folder: labels would contradict each other."""
    main = small_runs.identity("FOLDER", 3).data
    other = main | {"class_names": ["class 0", "class 2", "class 1"]}
    monkeypatch.setattr(distributed, "all_gather_object", lambda own: [main, main])
    check_ranks_agree(main)
    monkeypatch.setattr(distributed, "all_gather_object", lambda own: [main, main, other])
    with pytest.raises(SharedError) as error:
        check_ranks_agree(main)
    assert "rank 2 has other data than rank 0: class 1 is class 2, was class 1" in str(error.value.error)
