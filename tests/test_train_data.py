"""Runs of train.py on other data sets than the embedded one, and `--evaluate`."""

import multiprocessing
import os
import signal
from itertools import islice

import pytest
import torch

import small_runs
from data_sets import write_idx
from preprocess import FolderData, WorkerError
from tiny_runs import BASE, Tiny, evaluated, go, make_tree, read, tree_flags

# ---- --evaluate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", ["--ema 0.5", "--amp bf16", "--channels-last --seed 4"])
def test_evaluate_prints_what_the_summary_says(tmp_path, tiny, capsys, flags):
    folder = go(tmp_path, flags)
    summary = read(folder)
    for name in ("last.pt", "best.pt"):
        top1, top5, loss, balanced, classes = evaluated(capsys, folder / name)
        assert top1 == pytest.approx(summary["test_top1_pct"], abs=5e-4)
        assert top5 == pytest.approx(summary["test_top5_pct"], abs=5e-4)
        assert loss == pytest.approx(summary["test_loss"], abs=6e-5)
        assert len(classes) == 10 and sum(count for _, count in classes) == summary["test_images"] == 12
        assert sum(share * count for share, count in classes) / 12 == pytest.approx(top1, abs=0.01)
        assert balanced == pytest.approx(summary["test_balanced_pct"], abs=5e-4)


def test_evaluate_in_small_batches_is_the_same(tmp_path, tiny, capsys):
    folder = go(tmp_path)
    assert evaluated(capsys, folder / "best.pt") == evaluated(capsys, folder / "best.pt", "--batch-size", "5")


def test_evaluate_of_a_run_that_holds_out_images_to_end_early_by(tmp_path, tiny, capsys):
    folder = go(tmp_path, "--holdout 8 --early-stop 1 --train-images 30")
    top1, *_ = evaluated(capsys, folder / "best.pt")
    assert top1 == pytest.approx(read(folder)["test_top1_pct"], abs=5e-4)


def test_evaluate_of_another_network_or_data_set_is_refused(tmp_path, tiny, capsys):
    folder = go(tmp_path)
    for flags in ("--dataset MNIST", "--kernel-size 3"):
        capsys.readouterr()
        assert small_runs.run(tmp_path, "--evaluate", str(folder / "best.pt"), *flags.split()) == 2
        assert flags.split()[0] in capsys.readouterr().err


# ---- data sets ------------------------------------------------------------------------------------------------------


def test_a_tree_of_jpegs_trains_evaluates_and_is_resumed_bitwise(tmp_path, tiny, seen, monkeypatch, capsys):
    """24 images, 6 steps an epoch, 2 workers; the interrupted run stops after step 8 of 12."""
    flags = tree_flags(make_tree(tmp_path / "tree"))
    straight = go(tmp_path / "straight", flags, "--randaugment")
    assert read(straight)["steps"] == 12 and read(straight)["test_images"] == 9
    top1, *_, classes = evaluated(capsys, straight / "best.pt")
    assert top1 == pytest.approx(read(straight)["test_top1_pct"], abs=5e-4)
    assert [count for _, count in classes] == [3, 3, 3]

    def spoil(logits, call):
        if call == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return logits

    others = multiprocessing.active_children()  # of other tests of this process
    with monkeypatch.context() as patch:
        patch.setattr(Tiny, "spoil", staticmethod(spoil))
        stopped = [*BASE.split(), *flags.split(), "--randaugment"]
        assert small_runs.run(tmp_path, *stopped) == 75
    assert multiprocessing.active_children() == others  # the run itself has ended its workers
    small_runs.scramble_generators()
    go(tmp_path, flags, "--randaugment --resume")
    assert small_runs.differences(*(small_runs.state_without_times(f) for f in (straight, tmp_path / "run"))) == []
    assert small_runs.log_rows(straight) == small_runs.log_rows(tmp_path / "run")


def test_evaluate_on_another_folder_of_the_same_classes(tmp_path, tiny, seen, capsys):
    folder = go(tmp_path, tree_flags(make_tree(tmp_path / "tree"), 0), "--max-steps 2")
    other = make_tree(tmp_path / "other", val_images=5)
    *_, classes = evaluated(capsys, folder / "last.pt", "--data-dir", str(other))
    assert [count for _, count in classes] == [5, 5, 5]


@pytest.mark.parametrize(
    ("before", "after", "scored", "named"),
    [("empty", "whole", 9, 1), ("whole", "empty", 8, 1), ("empty", "cut", 8, 2)],
)
def test_a_validation_image_may_change_between_two_validations(
    tmp_path, tiny, monkeypatch, before, after, scored, named
):
    """Each pass counts what it skipped itself."""
    tree = make_tree(tmp_path / "tree")
    path = tree / "val" / "bee" / "1.jpg"
    whole = path.read_bytes()
    contents = {"whole": whole, "empty": b"", "cut": whole[:-200]}
    path.write_bytes(contents[before])

    def spoil(logits, call):
        if call == 8:  # of 12, in the second epoch
            path.write_bytes(contents[after])
        return logits

    monkeypatch.setattr(Tiny, "spoil", staticmethod(spoil))
    summary = read(go(tmp_path, tree_flags(tree, 0), "--skip-bad-images"))
    assert (summary["test_images"], summary["bad_images"]) == (scored, named)


def test_a_validation_split_of_which_nothing_can_be_read_is_named(tmp_path, tiny, capsys):
    tree = make_tree(tmp_path / "tree")
    folder = go(tmp_path, tree_flags(tree, 0), "--max-steps 1")
    for path in tree.glob("val/*/*.jpg"):
        path.write_bytes(b"")
    flags = "--skip-bad-images --num-workers 0 --batch-size 2"
    assert small_runs.run(tmp_path, "--evaluate", str(folder / "best.pt"), *flags.split()) == 2
    assert "cannot read any of the 9 images to evaluate on" in capsys.readouterr().err


@pytest.mark.parametrize(("good", "has_run", "has_signal", "code"), [
    (0, False, False, 1), (3, False, False, 75), (0, True, False, 1), (3, True, False, 75), (0, True, True, 75),
])  # fmt: skip
def test_failed_decoding_processes_ask_for_a_restart_only_after_a_step(
    tmp_path, tiny, monkeypatch, capsys, good, has_run, has_signal, code
):
    """A job that requeues itself by code 75 must not do so for ever where each start fails in the same way.

    A signal, too, makes the wait for a silent process end.
    """
    tree = make_tree(tmp_path / "tree")
    flags, batches = [*BASE.split(), *tree_flags(tree, 0).split()], FolderData.batches
    if has_run:
        assert small_runs.run(tmp_path, *flags, "--max-steps", "2") == 0

    def failing(self, *arguments, **options):
        yield from islice(batches(self, *arguments, **options), good)
        if has_signal:
            os.kill(os.getpid(), signal.SIGTERM)
        raise WorkerError("a decoding process was killed")

    monkeypatch.setattr(FolderData, "batches", failing)
    resumes = ["--resume", "--max-steps", "8"] if has_run else []
    assert small_runs.run(tmp_path, *flags, *resumes) == code
    step = good + 2 * has_run
    assert (f"saved at step {step}: the same" in capsys.readouterr().err) == bool(step)


def test_fashion_mnist_from_its_four_files(tmp_path, tiny):
    write_idx(tmp_path / "files", ".gz", train=60, test=20)
    folder = go(tmp_path, f"--dataset fashionmnist --data-dir {tmp_path / 'files'} --max-steps 3")
    assert read(folder)["test_images"] == 20 and read(folder)["steps"] == 3
    config = read(folder, "config.json")
    assert (config["dataset"], config["img_size"], config["form"]) == ("FashionMNIST", 28, "small")


def test_the_automatic_data_set_says_which_and_why(tmp_path, tiny, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    flags = f"--data-dir {tmp_path / 'none'} --max-steps 1 --no-progress"
    assert small_runs.run(tmp_path, *flags.split()) == 0
    out = capsys.readouterr().out
    assert "--dataset auto: DIGITS" in out and "no GPU" in out
    assert read(tmp_path / "resnet26-digits-default-seed0", "config.json")["dataset"] == "DIGITS"
