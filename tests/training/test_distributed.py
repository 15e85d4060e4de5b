"""Runs of two and three ranks by Gloo: the same training as one rank's, ended together, resumed, restarted."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import ranks
import small_runs
from ranks import on_rank
from tiny_runs import make_tree, tree_flags

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")

# 225 of the 250 images train; a global batch of 12 makes 18 steps an epoch.
FLAGS = "--sync-bn --optimizer sgd --lr 0.05 --warmup-epochs 0 --epochs 2 --max-steps 20 --ema 0.9 --holdout 25"
FLAGS += " --save-minutes 0"


def held(output: Path, rank: int = 0) -> dict:
    return torch.load(output / f"held{rank}.pt", weights_only=True)


def go(output: Path, number: int, flags: str, *more) -> Path:
    """A run of so many ranks that ends well; its output folder."""
    codes, outputs = ranks.launch(output, number, ranks.train_small, str(output), flags, *more)
    assert codes == [0] * number, outputs
    return output


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one rank that others are held against; tests only read it."""
    return go(tmp_path_factory.mktemp("alone"), 1, f"{FLAGS} --batch-size 12")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The same by two ranks."""
    return go(tmp_path_factory.mktemp("pair"), 2, f"{FLAGS} --batch-size 6")


def assert_same_training(one: Path, other: Path, number: int) -> None:
    """Losses within 1e-4 at every step; the same log; weights equal but for rounding, and bitwise on all ranks."""
    wanted, first = held(one), held(other)
    assert len(wanted["losses"]) == len(first["losses"]) == 20
    assert first["losses"] == pytest.approx(wanted["losses"], abs=1e-4)
    for name, value in wanted["scored"].items():
        torch.testing.assert_close(first["scored"][name], value, rtol=1e-3, atol=1e-4)
    for rank in range(1, number):
        assert small_runs.differences(held(other, rank), first) == []
    rows, wanted_rows = small_runs.log_rows(other / "run"), small_runs.log_rows(one / "run")
    assert len(rows) == len(wanted_rows) == 2
    for row, wanted_row in zip(rows, wanted_rows, strict=True):
        for key in ("digests", "environment"):  # of another number of ranks
            del row[key], wanted_row[key]
        assert row == pytest.approx(wanted_row, abs=1e-3)


# ---- the same training ----------------------------------------------------------------------------------------------


def test_two_ranks_train_as_one_does(alone, pair):
    assert_same_training(alone, pair, 2)


def test_three_ranks_train_as_one_does(tmp_path, alone):
    assert_same_training(alone, go(tmp_path, 3, f"{FLAGS} --batch-size 4"), 3)


def test_two_ranks_train_as_one_does_with_every_regularisation_on(tmp_path):
    flags = "--sync-bn --lr 0.01 --warmup-epochs 0 --epochs 2 --max-steps 20 --ema 0.9 --holdout 25 "
    flags += f"{small_runs.EVERYTHING} --save-minutes 0"
    one = go(tmp_path / "one", 1, f"{flags} --batch-size 12", None, True, 3)
    two = go(tmp_path / "two", 2, f"{flags} --batch-size 6", None, True, 3)
    assert_same_training(one, two, 2)


def test_the_test_split_is_counted_once_whatever_the_ranks(tmp_path, alone, pair):
    summaries = [json.loads((output / "run/summary.json").read_text()) for output in (alone, pair)]
    assert [summary["test_images"] for summary in summaries] == [37, 37]
    assert summaries[0]["test_loss"] == pytest.approx(summaries[1]["test_loss"], abs=1e-4)
    evaluate = f"--evaluate {pair / 'run/best.pt'}"
    codes, outputs = ranks.launch(tmp_path, 3, ranks.train_small, str(tmp_path), evaluate)
    assert codes == [0, 0, 0] and outputs[1:] == ["", ""]
    assert "37 images" in outputs[0] and f"loss {summaries[1]['test_loss']:.4f}" in outputs[0]


def test_accumulated_pieces_are_one_batch_and_sent_once_a_step(tmp_path):
    """Without batch norm, whose statistics are of a piece."""
    go(tmp_path / "one", 1, f"{FLAGS} --batch-size 12", None, False)
    go(tmp_path / "two", 2, f"{FLAGS} --batch-size 3 --accumulate 2", None, False)
    assert held(tmp_path / "two")["no_sync"] == 20
    assert held(tmp_path / "two")["losses"] == pytest.approx(held(tmp_path / "one")["losses"], abs=1e-4)
    held_by = [held(tmp_path / "two", rank) for rank in range(2)]
    assert small_runs.differences(*held_by) == []


def test_without_sync_bn_the_ranks_still_end_equal(tmp_path, alone):
    """Running statistics are then the main rank's."""
    go(tmp_path, 2, FLAGS.replace("--sync-bn", "--batch-size 6"))
    assert small_runs.differences(held(tmp_path, 0), held(tmp_path, 1)) == []
    assert max(abs(a - b) for a, b in zip(held(tmp_path)["losses"], held(alone)["losses"], strict=True)) > 1e-3


def test_one_rank_writes_and_prints(pair):
    out, other = ((pair / f"rank{rank}.txt").read_text() for rank in range(2))
    assert other == ""
    assert "ranks     2, each 1 x 6 images a step; batch norm over all ranks" in out
    assert "(as given)" in out
    assert len(list((pair / "run").glob("events.out.tfevents.*"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 3])
def test_the_real_network_by_ranks(tmp_path, number, monkeypatch):
    """ResNet26 with attention, in fp64 but for the loss.

    In fp32 rounding errors grow past 1e-4 within about eight steps: as far as those of one rank whose batches are fed
    in reverse, which is the same training too.
    """
    monkeypatch.setattr(ranks, "SECONDS", 300.0)
    flags = "--sync-bn --optimizer sgd --lr 1e-3 --warmup-epochs 0 --epochs 1 --max-steps 20 --batch-size"
    for ranks_used in (1, number):
        output = str(tmp_path / str(ranks_used))
        codes, outputs = ranks.launch(
            tmp_path / str(ranks_used), ranks_used, ranks.train_real, output, f"{flags} {12 // ranks_used}"
        )
        assert codes == [0] * ranks_used, outputs
    losses = [held(tmp_path / str(n))["losses"] for n in (1, number)]
    assert len(losses[0]) == 20 and losses[1] == pytest.approx(losses[0], abs=1e-4)


# ---- batch norm over all ranks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [2, 3])
def test_batch_norm_over_ranks_is_batch_norm_of_all(tmp_path, number):
    """Parts of unequal size and a mean of 1000 deviations, in fp64; the same names in the state."""
    for count in (1, number):
        codes, outputs = ranks.launch(tmp_path / str(count), count, ranks.normalise, str(tmp_path / str(count)))
        assert codes == [0] * count, outputs
    (one,), parts = (
        [torch.load(tmp_path / str(count) / f"norm{rank}.pt", weights_only=True) for rank in range(count)]
        for count in (1, number)
    )
    assert one["kind"] == "BatchNorm2d" and {part["kind"] for part in parts} == {"SyncBatchNorm2d"}
    close = {"rtol": 1e-7, "atol": 1e-7}
    for name in ("out", "x", "eval"):
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), one[name], **close)
    for i in range(2):
        torch.testing.assert_close(sum(part["parameters"][i] for part in parts), one["parameters"][i], **close)
    for part in parts:
        assert part["names"] == one["names"]
        torch.testing.assert_close(part["buffers"], one["buffers"], **close)


def test_with_one_rank_batch_norm_stays():
    model = nn.Sequential(nn.BatchNorm2d(2))
    assert ranks.sync_batch_norms(model, torch.device("cpu")) is model and type(model[0]) is nn.BatchNorm2d


# ---- ended together -------------------------------------------------------------------------------------------------


def test_values_actions_and_errors(tmp_path):
    codes, outputs = ranks.launch(tmp_path, 3, ranks.act_together, str(tmp_path))
    assert codes == [0] * 3, outputs
    assert (tmp_path / "main0").exists() and not (tmp_path / "main1").exists()


def spoiled(output: Path, number: int, what, flags: str = "", rank: int = 1, call: int = 5, run=ranks.train_small):
    return ranks.launch(output, number, run, str(output), f"{FLAGS} --batch-size 4 {flags}", on_rank(rank, call, what))


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_before_the_update(tmp_path):
    codes, outputs = spoiled(tmp_path, 3, ranks.not_finite)
    assert codes == [1, 1, 1] and outputs[1:] == ["", ""]
    assert "train.py: error: the loss is nan at step 5," in outputs[0] and "Nothing was updated" in outputs[0]
    states = [held(tmp_path, rank) for rank in range(3)]
    assert len(states[0]["losses"]) == states[0]["step"] == 4
    assert small_runs.differences(states[0], states[1]) == small_runs.differences(states[0], states[2]) == []
    assert all(value.isfinite().all() for value in states[0]["model"].values())


def test_read_late_it_stops_all_too_and_neither_it_nor_the_step_behind_it_changes_anything(tmp_path):
    ends = []
    for name, run in (("early", ranks.train_small), ("late", ranks.train_small_late)):
        codes, outputs = spoiled(tmp_path / name, 2, ranks.not_finite, run=run)
        assert codes == [1, 1] and "the loss is nan at step 5," in outputs[0], outputs
        ends += [held(tmp_path / name, rank) for rank in range(2)]
    assert [end["step"] for end in ends] == [4] * 4
    assert [len(end["losses"]) for end in ends] == [4, 4, 5, 5]  # that of step 6, which was queued by then
    assert all(small_runs.differences(end["model"], ends[0]["model"]) == [] for end in ends)


def test_an_error_on_one_rank_ends_the_others(tmp_path):
    codes, outputs = spoiled(tmp_path, 3, ranks.fail)
    assert all(codes) and "this rank alone fails" in outputs[1]


def test_wrong_data_is_said_once_and_ends_all_with_2(tmp_path):
    codes, outputs = ranks.launch(
        tmp_path, 3, ranks.train_small, str(tmp_path), f"--dataset FOLDER --data-dir {tmp_path / 'none'}"
    )
    assert codes == [2, 2, 2] and outputs[1:] == ["", ""]
    assert outputs[0].count("\n") == 1 and "no such folder" in outputs[0]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Two ranks with 7 images each, stopped at step 5 by a signal to the second alone."""
    output = tmp_path_factory.mktemp("stopped")
    flags = f"{FLAGS} --batch-size 7"
    codes, outputs = ranks.launch(output, 2, ranks.train_small, str(output), flags, on_rank(1, 5, ranks.terminate))
    assert codes == [75, 75], outputs
    assert "stopped by SIGTERM at step 5, saved" in outputs[0]
    return output


def test_a_run_stopped_on_one_rank_is_resumed_bitwise(tmp_path, stopped):
    straight = go(tmp_path / "straight", 2, f"{FLAGS} --batch-size 7")
    shutil.copytree(stopped, tmp_path / "resumed")
    resumed = go(tmp_path / "resumed", 2, f"{FLAGS} --batch-size 7 --resume")
    assert small_runs.log_rows(straight / "run") == small_runs.log_rows(resumed / "run")
    states = [small_runs.state_without_times(output / "run") for output in (straight, resumed)]
    assert len(states[0]["generators"]) == 2 and small_runs.differences(*states) == []
    assert held(straight)["losses"][5:] == held(resumed)["losses"]


@pytest.mark.parametrize("number", [1, 3])
def test_resume_on_another_number_of_ranks_keeps_the_global_batch_and_says_so(tmp_path, stopped, number):
    """14 images a step: on 3 ranks 4, 5 and 5, on one 14 in pieces of 7 at most. Without batch norm's parts equal."""
    shutil.copytree(stopped, tmp_path / "resumed")
    resumed = go(tmp_path / "resumed", number, f"{FLAGS} --batch-size 7 --resume")
    out = (resumed / "rank0.txt").read_text()
    assert f"saved by 2 ranks, goes on with {number}: same step, global batch, order and rate; no longer bitwise" in out
    assert "resumed   at step 5" in out
    summary = json.loads((resumed / "run/summary.json").read_text())
    assert summary["steps"] == 20 and summary["test_images"] == 37
    if number == 3:  # the same images under one norm: the same losses
        straight = go(tmp_path / "straight", 2, f"{FLAGS} --batch-size 7")
        assert held(resumed)["losses"] == pytest.approx(held(straight)["losses"][5:], abs=1e-4)


@pytest.mark.parametrize("number", [1, 3])
def test_a_run_that_was_never_saved_keeps_its_global_batch_and_rate_on_other_ranks(tmp_path, number):
    """Started on 2 ranks, ended in the first step; a loss that is not finite saves nothing."""
    flags = f"{FLAGS.replace('--lr 0.05 ', '')} --batch-size 6"
    straight = go(tmp_path / "straight", 2, flags)
    spoil = on_rank(0, 1, ranks.not_finite)
    codes, _ = ranks.launch(tmp_path, 2, ranks.train_small, str(tmp_path), flags, spoil)
    assert codes == [1, 1] and not (tmp_path / "run/last.pt").exists()
    go(tmp_path, number, f"{flags} --resume")
    outputs = [(output / "rank0.txt").read_text().splitlines() for output in (straight, tmp_path)]
    said = [[line for line in lines if "steps of 12 images" in line or "peak rate" in line] for lines in outputs]
    assert len(said[0]) == 2 and said[0] == said[1]
    assert f"--resume: started on 12 images a step, goes on with them on {number} ranks" in outputs[1]
    if number == 3:  # the same images under one norm: the same losses
        assert held(tmp_path)["losses"] == pytest.approx(held(straight)["losses"], abs=1e-4)


# ---- images that cannot be read -------------------------------------------------------------------------------------


def test_attention_panels_read_no_other_ranks_images(tmp_path):
    """One that both have found unreadable would be missing twice in the next validation."""
    tree = make_tree(tmp_path / "tree", train_images=4, val_images=2)
    (tree / "val/cow/1.jpg").write_bytes(b"junk")
    flags = f"{tree_flags(tree, 0)} --img-size 8 --skip-bad-images --epochs 2 --batch-size 3 --attention-every 1"
    go(tmp_path, 2, flags)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["test_images"], summary["bad_images"]) == (5, 1)


# ---- torchrun -------------------------------------------------------------------------------------------------------


def test_a_killed_rank_brings_the_job_back(tmp_path):
    """SIGKILL of the second rank in step 20, under torchrun: back from the save of step 18, finished, the log whole."""
    flags = FLAGS.replace("--max-steps 20", "--max-steps 30") + " --batch-size 6 --attention-every 0 --resume"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    command += ["--master-port", str(ranks.free_port()), str(ROOT / "tests/killed_rank.py"), str(tmp_path), flags]
    started = time.monotonic()
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - started < 100
    assert (tmp_path / "killed").exists() and "resumed   at step 18" in done.stdout
    assert [row["step"] for row in small_runs.log_rows(tmp_path / "run")] == [18, 30]
    straight = go(tmp_path / "straight", 2, flags.replace(" --resume", ""))
    assert small_runs.log_rows(straight / "run") == small_runs.log_rows(tmp_path / "run")
    states = [small_runs.state_without_times(output / "run") for output in (straight, tmp_path)]
    assert small_runs.differences(*states) == []
