"""Every row of the bad-input list: one line on standard error, exit code 2, nothing overwritten. And real processes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import model
import preprocess
import small_runs
from data_sets import truncate, write_idx
from tiny_runs import BASE, Tiny, go, make_tree, tree_flags

ROOT = Path(__file__).resolve().parents[2]


def files(folder: Path) -> dict[Path, bytes]:
    """Every file but the lock, which names the last run that was started."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".run.lock"}


def refused(capsys, output: Path, flags: str, *words: str) -> str:
    """The line that these flags end with; it names `words`, and the files of `output` are as they were."""
    before = files(output) if output.is_dir() else {}
    capsys.readouterr()
    assert small_runs.run(output, *BASE.split(), *flags.split()) == 2
    error = capsys.readouterr().err
    after = files(output) if output.is_dir() else {}
    assert {path: after.get(path) for path in before} == before
    assert error.startswith("train.py: error: ") and error.count("\n") == 1 and "Traceback" not in error, error
    assert [word for word in words if word not in error] == [], error
    return error


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """The folder of a whole run named "run"; tests take copies."""
    with pytest.MonkeyPatch.context() as patch:
        small_runs.few_digits(patch)
        patch.setattr(model, "build", lambda name, num_classes, stem, **options: Tiny(num_classes))
        return go(tmp_path_factory.mktemp("finished"), "--max-steps 2")


@pytest.fixture
def held(finished_run, tmp_path, tiny):
    """An output folder that holds a run."""
    shutil.copytree(finished_run, tmp_path / "out" / "run")
    return tmp_path / "out"


@pytest.fixture
def tree(tmp_path):
    return make_tree(tmp_path / "tree")


# ---- data -----------------------------------------------------------------------------------------------------------


def test_a_missing_or_empty_data_folder(tmp_path, tiny, capsys):
    (tmp_path / "empty").mkdir()
    for dataset in ("FOLDER", "IMAGENET"):
        refused(capsys, tmp_path, f"--dataset {dataset} --data-dir {tmp_path / 'none'}", "none", "no such folder")
        refused(capsys, tmp_path, f"--dataset {dataset} --data-dir {tmp_path / 'empty'}", "empty", "train")
    (tmp_path / "empty/train").mkdir()
    refused(capsys, tmp_path, f"--dataset FOLDER --data-dir {tmp_path / 'empty'}", "empty/train", "no class folders")


def test_a_class_folder_without_images(tmp_path, tiny, tree, capsys):
    (tree / "train" / "dog").mkdir()
    refused(capsys, tmp_path, tree_flags(tree, 0), "train/dog", "without images")


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_truncated_jpeg_is_named(tmp_path, tiny, tree, capsys, split):
    bad = truncate(tree / split / "bee/1.jpg")
    refused(capsys, tmp_path, tree_flags(tree, 0), str(bad), "--skip-bad-images")


def test_a_truncated_jpeg_is_skipped_only_when_asked_then_named_and_counted(tmp_path, tiny, tree, capsys):
    bad = [truncate(tree / "train/bee/1.jpg"), truncate(tree / "val/cow/0.jpg")]
    folder = go(tmp_path, tree_flags(tree, 0), "--skip-bad-images --epochs 1")
    out, error = capsys.readouterr()
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["bad_images"], summary["test_images"], summary["steps"]) == (2, 8, 6)
    for path in bad:
        assert str(path) in out + error, "a skipped image is named"
    assert small_runs.run(tmp_path, "--evaluate", str(folder / "best.pt"), "--num-workers", "0") == 0
    assert "8 images" in capsys.readouterr().out


def test_a_corrupt_download(tmp_path, tiny, capsys):
    write_idx(tmp_path / "files", ".gz", train=60, test=20)
    flags = f"--dataset FashionMNIST --data-dir {tmp_path / 'files'}"
    for name, cut in (("train-images-idx3-ubyte.gz", 100), ("t10k-labels-idx1-ubyte.gz", 5)):
        path = tmp_path / "files" / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-cut])
        refused(capsys, tmp_path, flags, name, "damaged")
        path.write_bytes(whole)
    path.write_bytes(b"<html>404</html>")
    refused(capsys, tmp_path, flags, path.name, "damaged")


def test_no_network_for_a_named_set_is_never_another_set(tmp_path, tiny, monkeypatch, capsys):
    def urlopen(*_args, **_options):
        raise OSError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    refused(capsys, tmp_path, f"--dataset CIFAR10 --data-dir {tmp_path}", "CIFAR10", "Name or service", "DIGITS")


def test_images_smaller_than_the_network_takes(tmp_path, tiny, capsys):
    refused(capsys, tmp_path, "--img-size 7", "--img-size 7", "at least 8")


@pytest.mark.parametrize("flags", ["--batch-size 1", "--batch-size 2 --accumulate 40 --form small",
                                   "--batch-size 1 --img-size 32 --form imagenet"])  # fmt: skip
def test_one_image_of_one_pixel_cannot_be_normalised(tmp_path, monkeypatch, capsys, flags):
    """The last map of 8x8 images (32x32 in the ImageNet form) is one pixel: batch norm needs two images."""
    small_runs.few_digits(monkeypatch)
    refused(capsys, tmp_path, f"{flags} --model-name NaiveResNet26", "--batch-size", "batch norm")
    assert not (tmp_path / "run/config.json").exists()


def test_one_image_at_a_time_is_fine_where_maps_are_larger(tmp_path, monkeypatch):
    small_runs.few_digits(monkeypatch)
    go(tmp_path, "--batch-size 1 --img-size 9 --model-name NaiveResNet26 --max-steps 1")


def test_a_holdout_that_leaves_nothing(tmp_path, tiny, capsys):
    refused(capsys, tmp_path, "--holdout 40", "--holdout 40", "40 training images")
    refused(capsys, tmp_path, "--holdout 0.001", "--holdout 0.001")


def test_more_training_images_than_there_are(tmp_path, tiny, capsys):
    refused(capsys, tmp_path, "--train-images 41", "--train-images 41", "40 images")


@pytest.mark.parametrize("classes", [("ant", "bee"), ("ant", "bee", "cow", "dog")])
def test_other_classes_than_the_checkpoints(tmp_path, tiny, tree, capsys, classes):
    folder = go(tmp_path, tree_flags(tree, 0), "--max-steps 1")
    other = make_tree(tmp_path / "other", classes)
    capsys.readouterr()
    flags = ["--evaluate", str(folder / "best.pt"), "--data-dir", str(other), "--num-workers", "0"]
    assert small_runs.run(tmp_path, *flags) == 2
    error = capsys.readouterr().err
    assert f"{len(classes)} classes" in error and "has 3" in error and error.count("\n") == 1
    before = (folder / "last.pt").read_bytes()
    refused(capsys, tmp_path, f"{tree_flags(other, 0)} --resume", f"{len(classes)} classes, were 3")
    assert (folder / "last.pt").read_bytes() == before


# ---- flags ----------------------------------------------------------------------------------------------------------


def test_batch_size_0(tmp_path, tiny, capsys):
    refused(capsys, tmp_path, "--batch-size 0", "--batch-size 0", "at least 1")
    assert list(tmp_path.iterdir()) == []


def test_a_flag_without_an_effect_is_refused_in_a_new_run_and_may_be_spelled_out_in_a_resumed_one(held, tiny, capsys):
    before = (held / "run/config.json").read_bytes()
    for flags in ("--overwrite", "--name other"):
        refused(capsys, held, f"{flags} --momentum 0.9", "--momentum 0.9: needs --optimizer sgd")
    assert (held / "run/config.json").read_bytes() == before and not (held / "other").exists()
    go(held, "--resume --momentum 0.9 --step-epochs 30")  # as a recipe that was edited since has it asked for


MACHINE = [("--amp fp16", "fp16 off bf16"), ("--device cuda --amp off", "cuda 0"), ("--device cuda:3", "cuda:3 0"),
           ("--device tpu", "tpu cpu cuda"), ("--backend cuda9", "cuda9 auto reference"),
           ("--num-heads 7", "7 multiple"), ("--accumulate 41", "too few 41")]  # fmt: skip


@pytest.mark.parametrize(("flags", "words"), MACHINE)
def test_what_this_machine_or_network_has_not_got(tmp_path, monkeypatch, capsys, flags, words):
    small_runs.few_digits(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    refused(capsys, tmp_path, flags, *words.split())


@pytest.mark.parametrize(("flags", "words"), [("--backend cuda9", "--backend"), ("--num-heads 7", "--num-heads 7")])
def test_options_that_the_network_refuses_are_named_as_flags(tmp_path, monkeypatch, capsys, flags, words):
    small_runs.few_digits(monkeypatch)
    refused(capsys, tmp_path, flags, words)


def test_an_unknown_backend_in_the_environment(tmp_path, monkeypatch, capsys):
    small_runs.few_digits(monkeypatch)
    monkeypatch.setenv("SASA_BACKEND", "cuda9")
    refused(capsys, tmp_path, "--max-steps 1", "cuda9")


@pytest.mark.parametrize("flags", ["--resume none.pt", "--init-from none.pt"])
def test_a_missing_checkpoint(tmp_path, tiny, capsys, flags):
    refused(capsys, tmp_path, flags, "none.pt", "no such file")
    assert not (tmp_path / "run/config.json").exists()  # the corrected command is not refused


def test_evaluate_of_a_missing_or_foreign_file(tmp_path, tiny, capsys):
    (tmp_path / "x.pt").write_bytes(b"nothing")
    for path, words in ((tmp_path / "none.pt", "no such file"), (tmp_path / "x.pt", "not a checkpoint")):
        capsys.readouterr()
        assert small_runs.run(tmp_path, "--evaluate", str(path)) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1


# ---- folders --------------------------------------------------------------------------------------------------------


def test_an_unwritable_output_folder(tmp_path, tiny, capsys):
    """A file in the folder's place, one on its way, a system folder that takes no files, a name too long."""
    (tmp_path / "file").write_text("kept")
    for output in (tmp_path / "file", tmp_path / "file" / "deeper", Path("/proc/none")):
        refused(capsys, output, "", str(output), "cannot be written")
    assert (tmp_path / "file").read_text() == "kept"
    (tmp_path / "run").write_text("kept")
    refused(capsys, tmp_path, "", "cannot be written")
    refused(capsys, tmp_path, f"--name {'x' * 300}", "--name")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_folder_without_permission(tmp_path, tiny, capsys):
    (tmp_path / "locked").mkdir(mode=0o500)
    refused(capsys, tmp_path / "locked", "", "cannot be written")


def test_a_folder_that_holds_another_configuration(held, capsys):
    refused(capsys, held, "--lr 0.5", "already holds a run", "--resume", "--overwrite")
    refused(capsys, held, "--lr 0.5 --resume", "--lr was", "is 0.5")
    assert len(list((held / "run").glob("events*"))) == 1


@pytest.mark.parametrize("name", ["last.pt", "best.pt", "config.json", "log.jsonl", "summary.json"])
def test_one_file_of_a_run_is_enough_to_refuse_its_folder(held, tmp_path, capsys, name):
    output = tmp_path / "other"
    (output / "run").mkdir(parents=True)
    shutil.copy(held / "run" / name, output / "run" / name)
    refused(capsys, output, "", "already holds a run")


@pytest.mark.parametrize("flags", ["--amp fp16", "--device tpu", "--dataset FOLDER --data-dir none", "--holdout 40",
                                   "--init-from none.pt", "--accumulate 41"])  # fmt: skip
def test_a_refused_overwrite_has_removed_nothing(held, capsys, flags):
    refused(capsys, held, f"{flags} --overwrite")
    assert (held / "run/last.pt").exists()


def test_overwrite_replaces_the_run(held):
    before = (held / "run/last.pt").read_bytes()
    go(held, "--max-steps 1 --overwrite")
    assert (held / "run/last.pt").read_bytes() != before and not (held / "run/previous.pt").exists()
    assert len(list((held / "run").glob("events.out.tfevents.*"))) == 1


def test_a_resume_removes_nothing_before_its_first_save(held, monkeypatch):
    before = files(held)

    class Killed(BaseException):
        pass

    def train_step(*_):
        raise Killed

    monkeypatch.setattr("train.train_step", train_step)
    with pytest.raises(Killed):
        small_runs.run(held, *BASE.split(), "--resume")
    after = files(held)
    assert [path for path in before if path.suffix == ".pt" and after.get(path) != before[path]] == []


@pytest.mark.parametrize("when", ["training", "evaluation", "loading"])
def test_out_of_memory_is_one_line(tmp_path, tiny, monkeypatch, capsys, when):
    """The error is the allocator's own, of a terabyte more than any machine has."""
    import train
    from sasa.training import classification

    def allocate(*_args, **_options):
        return torch.empty(2**60, dtype=torch.uint8)

    where = {
        "training": (train, "train_step"),
        "evaluation": (classification, "evaluate"),
        "loading": (preprocess, "load"),
    }
    monkeypatch.setattr(*where[when], allocate)
    assert small_runs.run(tmp_path, *BASE.split()) == 1
    error = capsys.readouterr().err
    assert "out of memory: " in error and "a smaller --batch-size" in error and error.count("\n") == 1


@pytest.mark.parametrize("name", ["..", ".", "a/b", "../run", "/tmp/run"])
def test_a_name_that_is_a_path_is_refused(tmp_path, tiny, capsys, name):
    """It would lead out of --output-dir, where --overwrite deletes."""
    refused(capsys, tmp_path / "runs", f"--name {name} --overwrite", "--name", "one folder")
    assert not (tmp_path / "run").exists() and not (tmp_path / "config.json").exists()


def test_a_pipe_for_a_config_json_is_one_line(tmp_path, capsys):
    """Opened, it would wait for ever."""
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run/config.json")
    for flag in ("--resume", "--overwrite"):
        refused(capsys, tmp_path, flag, "config.json")


def test_a_damaged_config_json_is_one_line(held, capsys):
    for name in ("last.pt", "previous.pt", "best.pt"):
        (held / "run" / name).unlink(missing_ok=True)
    (held / "run/config.json").write_text('{"model_name": ')
    refused(capsys, held, "--resume", "config.json")


@pytest.mark.parametrize("name", ["best.pt", "summary.json"])
def test_a_full_disk_at_the_end_is_one_line_and_exit_1(tmp_path, tiny, monkeypatch, capsys, name):
    from sasa.training import checkpoint, classification

    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    original = checkpoint.save
    if name == "best.pt":
        monkeypatch.setattr(checkpoint, "save", lambda s, f, n="last.pt": full() if n == name else original(s, f, n))
    else:
        monkeypatch.setattr(classification, "write_json", full)
    assert small_runs.run(tmp_path, *BASE.split()) == 1
    error = capsys.readouterr().err
    assert "No space left" in error and error.count("\n") == 1


# ---- real processes -------------------------------------------------------------------------------------------------


def python(*flags: str, cwd: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "train.py"), *flags]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=300)


def test_the_command_ends_with_0_and_its_summary(tmp_path):
    """As README has it, cut to one step; runs/ is in the folder that the command is given in."""
    done = python("--model-name", "resnet26", "--stem", "--dataset", "digits", "--max-steps", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "test top-1" in done.stdout.splitlines()[-1] and "Traceback" not in done.stderr
    summary = json.loads((tmp_path / "runs/resnet26-stem-digits-default-seed0/summary.json").read_text())
    assert (summary["steps"], summary["test_images"]) == (1, 360)
    assert preprocess.load(dataset="DIGITS")[0].train_size == 1437


@pytest.mark.parametrize("flags", ["--batch-size 0", "--dataset FOLDER --data-dir none"])
def test_the_command_ends_with_2_and_one_line(tmp_path, flags):
    done = python(*flags.split(), cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("train.py: error: ") and done.stderr.count("\n") == 1
