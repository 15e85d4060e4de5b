"""What a person sees of a run: lines, bars on a terminal, progress.png; and a network that watching leaves alone."""

import json
import re
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tqdm import tqdm

import preprocess
import small_runs
from model import ResNet26
from sasa.analysis import figures
from sasa.analysis.attention_maps import lattice, record_attention
from sasa.training import classification, monitor
from sasa.training.checkpoint import Progress
from sasa.training.evaluation import Evaluation, evaluate
from sasa.training.monitor import Monitor
from tiny_runs import go


def test_drawing_panels_leaves_the_network_as_it_was():
    """Its mode, its batch norms' statistics and torch's generator; the images are the first of the validation split."""
    _, _, _, test = preprocess.load(dataset="DIGITS")
    network, shown = ResNet26(10, small_images=True).train(), []
    watcher = SimpleNamespace(attention=lambda step, layers: shown.append((step, layers)))
    run = SimpleNamespace(
        eval_model=network, data=SimpleNamespace(val=test), autocast=nullcontext, progress=SimpleNamespace(step=5),
    )  # fmt: skip
    before, generator = {k: v.clone() for k, v in network.state_dict().items()}, torch.get_rng_state()
    classification.show_attention(run, watcher)
    assert network.training and all(module.training for module in network.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    with torch.no_grad(), record_attention(network.eval(), pixels=lattice(classification.WATCHED_PIXELS)) as wanted:
        network(next(test.eval_batches(classification.WATCHED_IMAGES))[0])
    ((step, layers),) = shown
    assert step == 5 and len(layers) == 8
    assert all(torch.equal(a.weights, b.weights) for a, b in zip(layers, wanted, strict=True))


# ---- the terminal ---------------------------------------------------------------------------------------------------


WATCHED = "--dataset DIGITS --name run --epochs 2 --batch-size 4 --device cpu"


class EagerBar(tqdm):
    """Draws each update, however fast they come."""

    def __init__(self, **options):
        super().__init__(**options, mininterval=0, miniters=1)


def test_quiet_where_standard_error_is_no_terminal(tmp_path, tiny, capsys):
    assert (
        small_runs.run(
            tmp_path, *["--dataset", "DIGITS", "--name", "run", "--epochs", "2", "--batch-size", "4", "--device", "cpu"]
        )
        == 0
    )
    out, error = capsys.readouterr()
    assert error == "" and "\r" not in out and out.count("\nepoch ") == 2


@pytest.mark.parametrize("flag", ["", "--no-progress"])
def test_bars_on_a_terminal_unless_told_not_to(tmp_path, tiny, capsys, monkeypatch, flag):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(monitor, "tqdm", EagerBar)
    assert small_runs.run(tmp_path, *WATCHED.split(), *flag.split()) == 0
    error = capsys.readouterr().err
    if flag:
        assert error == ""
    else:
        assert all(word in error for word in ("run", "epoch 1", "loss=", "top1=", "images=", "/s"))
        # Both bars in steps, so that both show the time left: of 20 in the run, of 10 in each epoch.
        assert "| 20/20 [" in error and "| 10/10 [" in error and re.search(r"run: +\d+%.*?<\d\d:\d\d", error)


@pytest.mark.parametrize(("flags", "shown"), [("--max-steps 5", "5/5"), ("--max-steps 500", "20/20")])
def test_the_runs_bar_ends_where_the_run_does(tmp_path, tiny, capsys, monkeypatch, flags, shown):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(monitor, "tqdm", EagerBar)
    assert small_runs.run(tmp_path, *WATCHED.split(), *flags.split()) == 0
    assert f"| {shown} [" in capsys.readouterr().err
    if flags == "--max-steps 5":  # a resumed run's bar begins where it stands
        assert small_runs.run(tmp_path, *WATCHED.split(), "--resume") == 0
        error = capsys.readouterr().err
        assert "| 6/20 [" in error and "| 20/20 [" in error and "| 1/20 [" not in error


def test_a_preview_is_written_at_each_validation(tmp_path, tiny, monkeypatch):
    """The curves so far and the wrong predictions of that validation; nothing without the flag."""
    drawn, draw = [], figures.progress_figure
    monkeypatch.setattr(figures, "progress_figure", lambda *args: drawn.append(args) or draw(*args))
    folder = go(tmp_path, "--preview --holdout 8")
    rows = small_runs.log_rows(folder)
    assert [[row["epoch"] for row in of_run] for of_run, _ in drawn] == [[1], [1, 2]]
    wrong = round(8 * (1 - rows[-1]["val_top1_pct"] / 100))
    assert len(drawn[1][1]) == wrong and all(image.shape == (3, 8, 8) for image, _, _ in drawn[1][1])
    with Image.open(folder / "progress.png") as picture:
        assert picture.size == (1000, 560 if wrong else 400)
    go(tmp_path, "--overwrite")
    assert not (folder / "progress.png").exists()


def test_the_log_is_rebuilt_from_the_rows(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"epoch": 1}\n{"epoch": 2}\n{"epo')
    Monitor(tmp_path, Progress(rows=[{"epoch": 1}], step=4), 4, bars=False).close()
    assert (tmp_path / "log.jsonl").read_text() == '{"epoch": 1}\n'


# ---- evaluation -----------------------------------------------------------------------------------------------------


class Split(list):
    skipped = 0

    def eval_batches(self, size, rank, world_size):
        for i in range(0, len(self), size):
            images, labels = zip(*self[i : i + size], strict=True)
            yield torch.stack(images), torch.tensor(labels)


def test_scores_by_hand():
    """Logits are the images: labels 0, 1, 1, 6 of 7 classes; right, right, wrong (in the top 5), wrong (not)."""
    rows = [[5, 0, 0, 0, 0, 0, 0], [0, 5, 0, 0, 0, 0, 0], [5, 4, 3, 2, 1, 0, 0], [6, 5, 4, 3, 2, 1, 0]]
    split = Split(zip(torch.tensor(rows, dtype=torch.float32), (0, 1, 1, 6), strict=True))
    network = torch.nn.Identity().train()
    result = evaluate(network, split, 7, 3, nullcontext, keep_wrong=1)
    assert network.training
    assert (result.images, result.top1_pct, result.top5_pct) == (4, 50.0, 75.0)
    log_p = torch.tensor(rows, dtype=torch.float64).log_softmax(1)
    assert result.loss == pytest.approx(
        -sum(log_p[i, label].item() for i, (_, label) in enumerate(split)) / 4, rel=1e-6
    )
    wanted = torch.zeros(7, 7, dtype=torch.int64)
    for label, guess in ((0, 0), (1, 1), (1, 0), (6, 0)):
        wanted[label, guess] += 1
    assert torch.equal(result.confusion, wanted)
    assert result.per_class_pct() == [100.0, 50.0, None, None, None, None, 0.0]
    assert result.balanced_pct() == 50.0
    assert [(label, guess) for _, label, guess in result.wrong] == [(1, 0)]


def test_fewer_than_five_classes_and_a_lost_image():
    split = Split(zip(torch.eye(3), (0, 1, 0), strict=True))
    result = evaluate(torch.nn.Identity(), split, 3, 2, nullcontext)
    assert isinstance(result, Evaluation) and result.top5_pct == 100 and result.top1_pct == pytest.approx(200 / 3)
    split.skipped = 1
    with pytest.raises(RuntimeError, match="evaluated 3 images of a split of 2"):
        evaluate(torch.nn.Identity(), split, 3, 2, nullcontext)


def test_an_output_that_fails_is_reported_once_and_costs_nothing(tmp_path, monkeypatch, capsys):
    """log.jsonl on a disk that is full for a while; TensorBoard and a picture that cannot be drawn."""
    outputs = Monitor(tmp_path, Progress(), 4, bars=False)
    row = {"epoch": 1, "step": 4, "train_loss": 1.0, "train_top1_pct": 1.0, "val_loss": 1.0, "val_top1_pct": 1.0,
           "val_top5_pct": 1.0, "lr": 0.1, "images_per_s": 1.0, "epoch_s": 1.0}  # fmt: skip

    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(monitor, "write_text", full)
        patch.setattr(monitor.os, "open", full)
        patch.setattr(monitor.Board, "epoch", full)
        for epoch in (1, 2):
            outputs.epoch(4 * epoch, row | {"epoch": epoch}, 3)
            outputs.attempt("picture.png", full)
    errors = capsys.readouterr().err.splitlines()
    assert sorted(line.split()[0] for line in errors) == ["TensorBoard's", "log.jsonl", "picture.png"], errors
    outputs.epoch(12, row | {"epoch": 3}, 3)
    outputs.close()
    assert [json.loads(line)["epoch"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [1, 2, 3]
    assert capsys.readouterr().err == ""
