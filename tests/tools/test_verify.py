"""tools.verify: a finished run is replayed and found equal; whatever was changed in it is found and named."""

import json
import shutil

import pytest
import torch

import model
import ranks
import small_runs
from sasa.training import environment
from tools import verify

FLAGS = "--dataset DIGITS --name run --no-progress --device cpu --epochs 4 --batch-size 8 --ema 0.9 --save-minutes 0 "
FLAGS += "--keep-states 1 --auto-augment trivial --mixup 0.2"


def small(patch) -> None:
    small_runs.few_digits(patch, 24)
    patch.setattr(model, "build", lambda name, num_classes, stem, **options: ranks.Small(num_classes, None, True))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run; tests copy it."""
    output = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        small(patch)
        assert small_runs.run(output, *FLAGS.split()) == 0
    return output / "run"


@pytest.fixture
def run(finished, tmp_path, monkeypatch):
    small(monkeypatch)
    return shutil.copytree(finished, tmp_path / "run")


def verified(capsys, folder, *flags) -> tuple[int, str, str]:
    """Exit code, standard output but for the run's own lines, standard error."""
    capsys.readouterr()
    try:
        code = verify.main([str(folder), *flags])
    except SystemExit as end:
        code = end.code
    out, error = capsys.readouterr()
    return code, out, error


def change_row(folder, epoch, change) -> None:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    change(rows[epoch - 1])
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_finished_run_is_equal(run, capsys):
    code, out, _ = verified(capsys, run)
    assert (code, out.splitlines()) == (0, ["epoch 1: equal", "epoch 3: equal", "epoch 4: equal"])
    code, out, _ = verified(capsys, run, "--epochs", "3", "4")
    assert code == 0 and out == "epochs 3 to 4: equal\n"
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.name != ".run.lock"}
    verified(capsys, run, "--segments", "1")
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.name != ".run.lock"} == before


def test_without_kept_states_the_whole_run_is_replayed_from_its_seed(run, capsys):
    for path in run.glob("state-*.pt"):
        path.unlink()
    assert verified(capsys, run)[:2] == (0, "epochs 1 to 4: equal\n")


def test_a_run_of_other_weights_cannot_be_replayed_from_its_seed(run, capsys):
    """Their file may be another by now; the state at the start holds them."""
    last = torch.load(run / "last.pt", weights_only=True)
    torch.save(last | {"init_from": "x.pt"}, run / "last.pt")
    assert verified(capsys, run, "--epochs", "1", "1")[:2] == (0, "epoch 1: equal\n")
    (run / "state-0000.pt").unlink()
    code, _, error = verified(capsys, run, "--epochs", "1", "1")
    assert code == 2 and "not compared: the run began with the weights of x.pt" in error and error.count("\n") == 1


def test_one_byte_of_a_digest(run, capsys):
    def change(row):
        text = row["digests"]["optimizer"]
        row["digests"]["optimizer"] = text[:20] + ("0" if text[20] != "0" else "1") + text[21:]

    change_row(run, 2, change)
    code, out, _ = verified(capsys, run, "--epochs", "1", "3")
    assert code == 1
    assert "epoch 2: log.jsonl has another digest of optimizer than last.pt" in out
    assert "epoch 2: state-0002.pt is not what log.jsonl has the digest of: optimizer" in out
    assert "epochs 1 to 3: epoch 2 differs in optimizer: " in out and "; the kept state is equal" in out


def test_one_image(run, capsys, monkeypatch):
    source = small_runs.preprocess.SMALL_SETS["DIGITS"]

    def changed(data_dir):
        classes, (images, labels), test = source(data_dir)
        images = images.clone()
        images[5, 0, 3, 3] ^= 1
        return classes, (images, labels), test

    monkeypatch.setitem(small_runs.preprocess.SMALL_SETS, "DIGITS", changed)
    code, _, error = verified(capsys, run)
    assert code == 2 and error.count("\n") == 1
    assert "not compared: other data: train: 24 images, not the same ones (class" in error


@pytest.mark.parametrize(("where", "words"), [
    ("config.json", "config.json and last.pt: --lr was"),
    ("state-0002.pt", "state-0002.pt and last.pt: --lr was"),
    ("everywhere", "epochs 1 to 2: epoch 1 differs in weights (and"),
])  # fmt: skip
def test_one_flag(run, capsys, where, words):
    for path in [run / where] if where != "everywhere" else [run / "config.json", *run.glob("*.pt")]:
        if path.suffix == ".json":
            values = json.loads(path.read_text())
            path.write_text(json.dumps(values | {"lr": values["lr"] * 2}))
        else:
            state = torch.load(path, weights_only=True)
            state["config"]["lr"] *= 2
            torch.save(state, path)
    code, out, _ = verified(capsys, run, "--epochs", "1", "2")
    assert code == 1 and words in out
    if where == "everywhere":
        assert "the kept state differs first in model body.0.weight" in out


def test_a_kept_state_with_another_weight(run, capsys):
    state = torch.load(run / "state-0001.pt", weights_only=True)
    state["model"]["fc.weight"][0, 0] += 1
    torch.save(state, run / "state-0001.pt")
    code, out, _ = verified(capsys, run, "--epochs", "2", "2")
    assert code == 1 and "epoch 1: state-0001.pt is not what log.jsonl has the digest of: weights" in out
    assert "epoch 2: epoch 2 differs in weights" in out and "differs first in model body.0.weight" in out


@pytest.mark.parametrize(("key", "value", "words"), [
    ("torch", "2.0.0", "torch version was 2.0.0"), ("threads", 64, "thread count was 64, is 1"),
    ("device", "Some GPU", "device was Some GPU"), ("processor", "Z80", "processor model was Z80"),
    ("vector_extension", "AVX9", "vector extension was AVX9"), ("kernel_build", "abc", "kernel build was abc"),
    ("ranks", 8, "number of ranks was 8, is 1"),
])  # fmt: skip
def test_another_environment_is_refused(run, capsys, key, value, words):
    summary = json.loads((run / "summary.json").read_text())
    summary["environment"][key] = value
    summary["environment_digest"] = environment.digest(summary["environment"])
    (run / "summary.json").write_text(json.dumps(summary))
    code, out, error = verified(capsys, run)
    assert code == 2 and out == "" and error.count("\n") == 1 and words in error


@pytest.mark.parametrize(("damage", "words"), [
    (lambda run: (run / "summary.json").unlink(), "not a finished run"),
    (lambda run: (run / "last.pt").unlink(), "no such file"),
    (lambda run: (run / "log.jsonl").write_text("{}\n"), "not a digest for each of 4 epochs"),
    (lambda run: (run / "log.jsonl").write_text("x"), "not a log"),
    (lambda run: change_row(run, 1, lambda row: row.update(environment="0")), "epoch 1 was trained in another"),
])  # fmt: skip
def test_what_is_no_finished_run_is_refused(run, capsys, damage, words):
    damage(run)
    code, _, error = verified(capsys, run)
    assert code == 2 and error.count("\n") == 1 and words in error


def test_epochs_that_the_run_has_not(run, capsys):
    assert "the run has epochs 1 to 4" in verified(capsys, run, "--epochs", "3", "5")[2]
    assert verified(capsys, run, "--segments", "0")[0] == 2
