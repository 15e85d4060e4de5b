"""A run that was interrupted and resumed is bit for bit the run that was not."""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import config
import small_runs
import train
from sasa.training import board, checkpoint, classification
from sasa.training.signals import StopRequest
from small_runs import FLAGS
from tiny_runs import Killed

STRAIGHT = FLAGS.split()
KILL_RESUME = Path(__file__).parents[1] / "kill_resume.py"


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The uninterrupted run's folder; tests only read it."""
    with pytest.MonkeyPatch.context() as patch:
        small_runs.few_digits(patch)
        output = tmp_path_factory.mktemp("straight")
        assert small_runs.run(output, *STRAIGHT) == 0
    return output / "run"


@pytest.fixture(scope="module")
def stopped_at_6(tmp_path_factory):
    """The folder of a run stopped by SIGTERM after 6 of its 8 steps; tests copy it."""
    with pytest.MonkeyPatch.context() as patch:
        small_runs.few_digits(patch)
        kill_at_step(patch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        output = tmp_path_factory.mktemp("stopped")
        assert small_runs.run(output, *STRAIGHT) == 75
    return output / "run"


@pytest.fixture(autouse=True)
def _few_digits(monkeypatch):
    small_runs.few_digits(monkeypatch)


def kill_at_step(monkeypatch, step, what=None):
    """Before step number `step` (from 0): raise Killed, or do `what`."""
    original = train.train_step

    def train_step(run, *more):
        if run.progress.step == step:
            if what is None:
                raise Killed
            what()
        return original(run, *more)

    monkeypatch.setattr(train, "train_step", train_step)


def assert_same_run(a: Path, b: Path):
    assert small_runs.differences(small_runs.state_without_times(a), small_runs.state_without_times(b)) == []
    assert (
        small_runs.differences(
            small_runs.state_without_times(a, "best.pt"), small_runs.state_without_times(b, "best.pt")
        )
        == []
    )
    assert small_runs.log_rows(a) == small_runs.log_rows(b)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (a, b)]
    for summary in summaries:
        summary.pop("seconds")
        summary.pop("save_seconds")
    assert summaries[0] == summaries[1]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the lock, which names the last run that was started."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".run.lock"}


def resume(output, *flags):
    small_runs.scramble_generators()
    return small_runs.run(output, *STRAIGHT, "--resume", *flags)


def test_the_same_command_twice_is_bitwise_the_same(tmp_path, straight):
    small_runs.scramble_generators()
    assert small_runs.run(tmp_path, *STRAIGHT) == 0
    assert_same_run(straight, tmp_path / "run")


@pytest.mark.parametrize("step", [1, 3, 4, pytest.param(7, marks=pytest.mark.slow)])
def test_sigterm_at_any_step_then_resume(tmp_path, straight, monkeypatch, step, capsys):
    """Mid-epoch (1), at an epoch's last step (3, 7) and at its first (4)."""
    with monkeypatch.context() as patch:
        kill_at_step(patch, step, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert small_runs.run(tmp_path, *STRAIGHT) == train.STOPPED == 75
    assert f"stopped by SIGTERM at step {step + 1}" in capsys.readouterr().out
    assert resume(tmp_path) == 0
    assert_same_run(straight, tmp_path / "run")


@pytest.mark.parametrize("step", [5, 7])
def test_killed_after_a_save_then_resume(tmp_path, straight, monkeypatch, step):
    """The steps since the last save, at the end of epoch 1, are lost and done again."""
    with monkeypatch.context() as patch:
        kill_at_step(patch, step)
        with pytest.raises(Killed):
            small_runs.run(tmp_path, *STRAIGHT)
    assert torch.load(tmp_path / "run/last.pt", weights_only=True)["progress"]["step"] == 4
    assert resume(tmp_path) == 0
    assert_same_run(straight, tmp_path / "run")


def test_killed_before_any_save_starts_at_step_0_and_says_so(tmp_path, straight, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        kill_at_step(patch, 2)
        with pytest.raises(Killed):
            small_runs.run(tmp_path, *STRAIGHT)
    assert not (tmp_path / "run/last.pt").exists()
    assert resume(tmp_path) == 0
    assert "starting at step 0" in capsys.readouterr().out
    assert_same_run(straight, tmp_path / "run")


def test_killed_during_a_save_then_resume(tmp_path, straight, monkeypatch):
    """Killed while the second state is half written: the first one serves."""
    with monkeypatch.context() as patch:
        original, calls = torch.save, []

        def torch_save(state, file):
            calls.append(file)
            if len(calls) == 2:
                file.write(b"half")
                raise Killed
            original(state, file)

        patch.setattr(torch, "save", torch_save)
        with pytest.raises(Killed):
            small_runs.run(tmp_path, *STRAIGHT)
    assert resume(tmp_path) == 0
    assert_same_run(straight, tmp_path / "run")


def test_resuming_twice_and_by_path(tmp_path, straight, monkeypatch):
    for step in (1, 5):
        with monkeypatch.context() as patch:
            kill_at_step(patch, step, lambda: os.kill(os.getpid(), signal.SIGUSR1))
            assert (small_runs.run(tmp_path, *STRAIGHT) if step == 1 else resume(tmp_path)) == 75
    small_runs.scramble_generators()
    assert small_runs.run(tmp_path, "--resume", str(tmp_path / "run/last.pt"), "--no-progress") == 0
    assert_same_run(straight, tmp_path / "run")


def test_a_run_cut_by_max_steps_ends_whole_and_goes_on_exactly(tmp_path, straight):
    assert small_runs.run(tmp_path, *STRAIGHT, "--max-steps", "6") == 0
    folder = tmp_path / "run"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 6
    assert [row["step"] for row in small_runs.log_rows(folder)] == [4, 6]
    assert (folder / "best.pt").exists() and (folder / "last.pt").exists()
    assert resume(tmp_path, "--max-steps", "6") == 0  # nothing left to do: the same end again
    assert [row["step"] for row in small_runs.log_rows(folder)] == [4, 6]
    assert resume(tmp_path) == 0
    assert_same_run(straight, folder)


def test_a_finished_run_resumed_ends_at_once_and_unchanged(tmp_path, straight):
    shutil.copytree(straight, tmp_path / "run")
    assert resume(tmp_path) == 0
    assert_same_run(straight, tmp_path / "run")


@pytest.mark.parametrize("damage", ["empty", "cut", "flip"])
def test_a_damaged_last_is_said_and_the_one_before_serves(tmp_path, straight, stopped_at_6, capsys, damage):
    shutil.copytree(stopped_at_6, tmp_path / "run")
    last = tmp_path / "run/last.pt"
    data = bytearray(last.read_bytes())
    if damage == "flip":  # in a tensor: bytes between two records hold nothing
        with zipfile.ZipFile(last) as file:
            record = max(file.infolist(), key=lambda info: info.file_size)
        name, extra = struct.unpack_from("<HH", data, record.header_offset + 26)  # their lengths, after which it lies
        data[record.header_offset + 30 + name + extra + record.file_size // 2] ^= 4
    last.write_bytes({"empty": b"", "cut": data[: len(data) // 2], "flip": data}[damage])
    assert resume(tmp_path) == 0
    assert "using previous.pt" in capsys.readouterr().out
    assert_same_run(straight, tmp_path / "run")


def test_with_no_whole_file_left_exit_2_and_nothing_overwritten(tmp_path, straight, capsys):
    shutil.copytree(straight, tmp_path / "run")
    for name in ("last.pt", "previous.pt"):
        (tmp_path / "run" / name).write_bytes(b"damaged")
    before = contents(tmp_path / "run")
    assert resume(tmp_path) == 2
    assert "last.pt" in capsys.readouterr().err
    assert contents(tmp_path / "run") == before


def test_the_previous_whole_file_survives_a_resume_from_it(tmp_path, stopped_at_6, monkeypatch):
    """A damaged last.pt must not be moved over the only whole file by the next save."""
    shutil.copytree(stopped_at_6, tmp_path / "run")
    folder = tmp_path / "run"
    (folder / "last.pt").write_bytes(b"damaged")
    with monkeypatch.context() as patch:
        kill_at_step(patch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert resume(tmp_path) == 75
    assert checkpoint.load(folder / "last.pt")["progress"]["step"] == 6
    assert checkpoint.load(folder / "previous.pt")["progress"]["step"] == 4


# ---- negative controls: each part of the state matters --------------------------------------------------------------


def zero_moments(state):
    for slot in state["optimizer"]["state"].values():
        slot["exp_avg"].zero_()


def forget(**progress):
    return lambda state: state["progress"].update(progress)


LEFT_OUT = {
    "weights": lambda state: state["model"]["fc.weight"].mul_(1.001),
    "buffers": lambda state: state["model"]["layer1.0.bn1.running_mean"].add_(1e-3),
    "optimizer": zero_moments,
    "ema": lambda state: state["ema"]["module.fc.weight"].add_(1e-3),
    "generators": lambda state: state["generators"][0].update(torch=torch.get_rng_state()),
    "batch in the epoch": forget(batch=0),
    "step": forget(step=4),
    "epoch's sums": forget(loss_sum=0.0),
    "best metric": forget(best_top1=100.0),
    "rows": forget(rows=[]),
}


@pytest.mark.parametrize("part", LEFT_OUT)
def test_negative_control_a_state_without_this_part_is_not_the_same_run(tmp_path, straight, stopped_at_6, part):
    shutil.copytree(stopped_at_6, tmp_path / "run")
    state = torch.load(tmp_path / "run/last.pt", weights_only=True)
    small_runs.scramble_generators()
    LEFT_OUT[part](state)
    checkpoint.save(state, tmp_path / "run")
    assert resume(tmp_path) == 0
    with pytest.raises(AssertionError):
        assert_same_run(straight, tmp_path / "run")


def test_negative_control_best_weights_left_out(tmp_path, monkeypatch):
    """The first epoch is made the best one; without its weights in the state another best.pt comes out."""
    scores = iter([90.0, 10.0, 10.0])
    original = classification.evaluate

    def evaluate(model, split, *args, **options):
        result = original(model, split, *args, **options)
        if len(split) == 8:  # the held-out images
            result.top1_pct = next(scores)
        return result

    monkeypatch.setattr(classification, "evaluate", evaluate)
    with monkeypatch.context() as patch:
        kill_at_step(patch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert small_runs.run(tmp_path, *STRAIGHT) == 75
    shutil.copytree(tmp_path / "run", tmp_path / "whole" / "run")
    assert resume(tmp_path / "whole") == 0
    assert torch.load(tmp_path / "whole/run/best.pt", weights_only=True)["epoch"] == 1
    state = torch.load(tmp_path / "run/last.pt", weights_only=True)
    state["best"] = None
    checkpoint.save(state, tmp_path / "run")
    scores = iter([10.0])
    resume(tmp_path)
    best = [torch.load(tmp_path / f / "best.pt", weights_only=True)["model"] for f in ("run", "whole/run")]
    assert small_runs.differences(*best) != []


# ---- what may change and what may not -------------------------------------------------------------------------------


@pytest.fixture
def stopped(tmp_path, stopped_at_6):
    shutil.copytree(stopped_at_6, tmp_path / "run")
    return tmp_path


def test_flags_that_change_the_result_are_listed_and_refused(stopped, capsys):
    before = (stopped / "run/last.pt").read_bytes()
    assert resume(stopped, "--lr", "0.5", "--seed", "3", "--kernel-size", "3") == 2
    error = capsys.readouterr().err
    assert all(flag in error for flag in ("--lr was", "--seed was 0, is 3", "--kernel-size was 7, is 3"))
    assert "Traceback" not in error and error.count("\n") == 1
    assert (stopped / "run/last.pt").read_bytes() == before


def test_flags_that_cannot_change_the_result_may_change(stopped, straight):
    assert resume(stopped, "--num-workers", "1", "--save-minutes", "5", "--save-every", "0") == 0
    assert_same_run(straight, stopped / "run")


def test_a_missing_named_checkpoint_is_exit_2(tmp_path, capsys):
    assert small_runs.run(tmp_path, *STRAIGHT, "--resume", str(tmp_path / "none.pt")) == 2
    assert "none.pt: no such file" in capsys.readouterr().err


def test_a_folder_that_holds_a_run_is_refused_without_resume_or_overwrite(stopped, capsys):
    before = contents(stopped / "run")
    assert small_runs.run(stopped, *STRAIGHT) == 2
    assert "--resume" in capsys.readouterr().err
    assert contents(stopped / "run") == before
    assert small_runs.run(stopped, *STRAIGHT, "--overwrite", "--max-steps", "1") == 0
    assert [row["step"] for row in small_runs.log_rows(stopped / "run")] == [1]


def test_tensorboard_has_each_step_once_after_a_resume(tmp_path, straight, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr("sasa.training.monitor.SCALAR_EVERY", 1)
    assert small_runs.run(tmp_path / "straight", *STRAIGHT) == 0
    with monkeypatch.context() as patch:
        kill_at_step(patch, 7)
        with pytest.raises(Killed):
            small_runs.run(tmp_path, *STRAIGHT)
    assert resume(tmp_path) == 0

    def scalars(folder, tag):
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        events.Reload()
        return [(event.step, event.value) for event in events.Scalars(tag)]

    for tag in ("3_step/loss", "1_validation/loss"):
        assert scalars(tmp_path / "run", tag) == scalars(tmp_path / "straight/run", tag)
    assert [step for step, _ in scalars(tmp_path / "run", "3_step/loss")] == [1, 2, 3, 4, 5, 6, 7, 8]


# ---- signals --------------------------------------------------------------------------------------------------------


def test_a_repeat_within_5_s_counts_as_one_and_a_later_one_exits_at_once(monkeypatch):
    now, exits = [100.0], []
    monkeypatch.setattr("sasa.training.signals.time.monotonic", lambda: now[0])
    monkeypatch.setattr("sasa.training.signals.os._exit", exits.append)
    stop = StopRequest()
    stop.has_state = True
    stop._handle(signal.SIGUSR1, None)
    now[0] += 4.9
    stop._handle(signal.SIGTERM, None)
    assert stop.received == "SIGUSR1" and exits == []
    now[0] += 0.2
    stop._handle(signal.SIGTERM, None)
    assert exits == [128 + signal.SIGTERM]


# ---- a full disk ----------------------------------------------------------------------------------------------------


def failing_saves(monkeypatch, failures):
    original, calls = checkpoint.save, []

    def save(state, folder, name=checkpoint.LAST):
        calls.append(name)
        if len(calls) <= failures:
            raise OSError("No space left on device")
        original(state, folder, name)

    monkeypatch.setattr(checkpoint, "save", save)


def test_a_failed_save_is_said_and_the_run_goes_on(tmp_path, straight, monkeypatch, capsys):
    failing_saves(monkeypatch, 1)
    assert small_runs.run(tmp_path, *STRAIGHT) == 0
    assert "save failed (1 in a row): No space left" in capsys.readouterr().out
    assert_same_run(straight, tmp_path / "run")


def test_three_failed_saves_in_a_row_stop_the_run(tmp_path, monkeypatch, capsys):
    failing_saves(monkeypatch, 99)
    assert small_runs.run(tmp_path, *STRAIGHT, "--save-minutes", "1e-9") == 1
    assert "3 saves failed in a row" in capsys.readouterr().err


# ---- --init-from ----------------------------------------------------------------------------------------------------


def test_init_from_takes_weights_and_says_what_it_did_not(tmp_path, straight, capsys):
    flags = [*STRAIGHT, "--kernel-size", "5", "--max-steps", "1", "--init-from", str(straight / "last.pt")]
    assert small_runs.run(tmp_path, *flags) == 0
    out = capsys.readouterr().out
    assert "layer1.0.spatial.rel_row: interpolated from 7 to 5 offsets" in out
    assert torch.load(tmp_path / "run/last.pt", weights_only=True)["progress"]["step"] == 1


def test_init_from_a_damaged_file_is_exit_2(tmp_path, capsys):
    (tmp_path / "x.pt").write_bytes(b"nothing")
    assert small_runs.run(tmp_path, *STRAIGHT, "--init-from", str(tmp_path / "x.pt")) == 2
    assert "x.pt" in capsys.readouterr().err


def test_attention_panels_change_nothing_and_resume(tmp_path, straight, monkeypatch):
    """Drawn each epoch, over a stop: the run is the one without them, and each panel is there once an epoch."""
    with monkeypatch.context() as patch:
        kill_at_step(patch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert small_runs.run(tmp_path, *STRAIGHT, "--attention-every", "1") == 75
    assert resume(tmp_path, "--attention-every", "1") == 0
    assert_same_run(straight, tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"images": 0, "scalars": 0, "histograms": 0})
    events.Reload()
    for group, read in ((board.MAPS, events.Images), (board.EMBEDDINGS, events.Images), (board.LARGEST, events.Scalars),
                        (board.ENTROPY, events.Histograms), (board.DISTANCE, events.Histograms)):  # fmt: skip
        for layer in ("stem", "layer1.0", "layer4.0"):
            assert [point.step for point in read(f"{group}/{layer}")] == [4, 8]
    events = EventAccumulator(str(straight)).Reload()
    assert not any("attention" in tag for kind in ("images", "scalars", "histograms") for tag in events.Tags()[kind])


# ---- an edited recipe -----------------------------------------------------------------------------------------------


def test_an_edited_recipe_is_refused_by_name_and_goes_on_with_the_runs_own_value(
    stopped, straight, monkeypatch, capsys
):
    edited = config.RECIPES["default"]["DIGITS"] | {"schedule": "step", "rotate": 30.0, "adam_beta2": 0.95}
    monkeypatch.setitem(config.RECIPES["default"], "DIGITS", edited)
    assert resume(stopped) == 2
    error = capsys.readouterr().err
    assert "--schedule was cosine, is step" in error and "--rotate was 10.0, is 30.0" in error
    assert "--adam-beta2 was 0.999, is 0.95" in error and "recipe default" in error and error.count("\n") == 1
    assert resume(stopped, "--schedule", "step", "--rotate", "10", "--adam-beta2", "0.999") == 2
    assert "--schedule was cosine, is step" in capsys.readouterr().err
    assert resume(stopped, "--schedule", "cosine", "--rotate", "10", "--adam-beta2", "0.999") == 0
    assert small_runs.log_rows(stopped / "run") == small_runs.log_rows(straight)


def test_an_edit_of_what_the_command_line_gave_itself_is_none(stopped, straight, monkeypatch):
    """The run was started with --optimizer adamw and --mixup 0.2."""
    edited = config.RECIPES["default"]["DIGITS"] | {"optimizer": "sgd", "mixup": 0.7}
    monkeypatch.setitem(config.RECIPES["default"], "DIGITS", edited)
    assert resume(stopped) == 0
    assert_same_run(straight, stopped / "run")


# ---- other data, another version, another folder --------------------------------------------------------------------


def test_other_images_are_refused_and_allowed_knowingly(stopped, monkeypatch, capsys):
    small_runs.few_digits(monkeypatch, 39)
    assert resume(stopped) == 2
    error = capsys.readouterr().err
    assert "train: 31 images, were 32" in error and "--allow-changed-data" in error and error.count("\n") == 1
    assert resume(stopped, "--allow-changed-data") == 0
    assert "train: 31 images" in capsys.readouterr().out
    summary = json.loads((stopped / "run/summary.json").read_text())
    assert any("train: 31 images, were 32" in line for line in summary["data_changes"])


def test_another_torch_is_told(stopped, capsys):
    state = torch.load(stopped / "run/last.pt", weights_only=True)
    checkpoint.save(state | {"torch": "1.13.1"}, stopped / "run")
    assert resume(stopped) == 0
    assert "saved by torch 1.13.1" in capsys.readouterr().out


def test_another_thread_count_is_told(tmp_path, stopped_at_6, monkeypatch, capsys):
    """It changes the bits; the same one is no news."""
    for count, is_told in ((2, True), (1, False)):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        shutil.copytree(stopped_at_6, tmp_path / str(count) / "run")
        assert resume(tmp_path / str(count)) == 0
        assert ("--resume: another processor, GPU, thread count" in capsys.readouterr().out) == is_told


def test_a_run_goes_on_in_another_folder_only_if_that_is_empty(stopped, straight, tmp_path, capsys):
    source = contents(stopped / "run")
    other = ["--resume", str(stopped / "run/last.pt"), "--output-dir", str(tmp_path / "mine"), "--no-progress"]
    assert small_runs.run(tmp_path, *other) == 0
    assert contents(stopped / "run") == source
    assert_same_run(straight, tmp_path / "mine" / "run")
    ids = [json.loads((f / "run/config.json").read_text())["run_id"] for f in (stopped, tmp_path / "mine")]
    assert ids[0] != ids[1]
    before = contents(tmp_path / "mine" / "run")
    capsys.readouterr()
    assert small_runs.run(tmp_path, *other) == 2
    assert "already holds a run" in capsys.readouterr().err and contents(tmp_path / "mine" / "run") == before


def test_a_checkpoint_among_another_runs_files_is_refused(stopped, tmp_path, capsys):
    assert small_runs.run(tmp_path / "b", *STRAIGHT, "--seed", "9", "--max-steps", "1") == 0
    shutil.copy(stopped / "run/last.pt", tmp_path / "b/run/last.pt")
    before = contents(tmp_path / "b/run")
    assert small_runs.run(tmp_path / "b", "--resume", str(tmp_path / "b/run/last.pt")) == 2
    assert "another run's" in capsys.readouterr().err and contents(tmp_path / "b/run") == before


def test_weights_that_are_not_finite_are_never_saved(tmp_path, capsys):
    """The update makes them infinite: the loss before it was finite."""
    flags = "--dataset DIGITS --batch-size 4 --lr 1e38 --clip-grad 0 --warmup-epochs 0 --max-steps 1 --name run --ema 0"
    assert small_runs.run(tmp_path, *flags.split(), "--no-progress", "--device", "cpu") == 1
    error = capsys.readouterr().err
    assert "weights are not finite at step 1" in error and error.count("\n") == 1
    assert not list((tmp_path / "run").glob("*.pt")) and not (tmp_path / "run/summary.json").exists()


# ---- real processes, real SIGKILLs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kills", [2, pytest.param(30, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_ends_bitwise_equal(kills):
    """tests/kill_resume.py, with few kills in its short form."""
    # Seed 1 kills in the run's first third and second half, wherever a loaded machine stretches it.
    size = ["--epochs", "3", "--train-images", "80", "--seed", "1"] if kills < 10 else []
    done = subprocess.run(
        [sys.executable, str(KILL_RESUME), "--kills", str(kills), *size],
        capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bitwise equal" in done.stdout
