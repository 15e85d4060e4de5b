"""Scores against numbers counted by hand, and what an evaluation may cost."""

from contextlib import nullcontext

import pytest
import torch
from test_monitor import Split
from test_step import WAITS, Calls

import preprocess
import small_runs
from sasa.training import evaluation
from sasa.training.evaluation import evaluate
from sasa.training.signals import StopRequest
from tiny_runs import Tiny, go, read

# Logits of 8 classes, the label, and which place the label has among them.
ROWS = [
    ([9, 1, 2, 3, 4, 5, 6, 7], 0, 1),
    ([7, 9, 6, 5, 4, 3, 2, 1], 0, 2),
    ([5, 9, 8, 7, 6, 4, 3, 2], 0, 5),
    ([4, 9, 8, 7, 6, 5, 3, 2], 0, 6),
    ([9, 8, 7, 6, 5, 4, 3, 2], 7, 8),
    ([9, 8, 7, 6, 5, 4, 3, 2], 4, 5),
]


def split_of(rows) -> Split:
    return Split([(torch.tensor(logits, dtype=torch.float32), label) for logits, label, _ in rows])


def test_top1_and_top5_count_the_labels_place_among_eight_classes():
    """Places 1, 2, 5, 6, 8, 5: one of six is first, four are among the first five."""
    result = evaluate(torch.nn.Identity(), split_of(ROWS), 8, 4, nullcontext)
    assert result.images == 6
    assert result.top1_pct == pytest.approx(100 * 1 / 6) and result.top5_pct == pytest.approx(100 * 4 / 6)
    assert result.counts.tolist() == [4, 0, 0, 0, 1, 0, 0, 1] and result.right.tolist() == [1, 0, 0, 0, 0, 0, 0, 0]


def test_the_headline_figures_of_a_run_by_plain_counting(tmp_path, tiny):
    """top-1, top-5 and loss of summary.json from the kept weights: logits sorted one image at a time."""
    folder = go(tmp_path)
    network = Tiny(10).eval()
    network.load_state_dict(torch.load(folder / "best.pt", weights_only=True)["model"])
    _, _, _, test = preprocess.load(dataset="DIGITS")
    first = second = loss = 0
    found = {label: [] for label in range(10)}
    ((images, labels),) = test.eval_batches(len(test))
    for image, label in zip(images, labels.tolist(), strict=True):
        logits = network(image[None])[0].double().tolist()
        order = sorted(range(10), key=lambda i: -logits[i])
        first += order[0] == label
        found[label].append(order[0] == label)
        second += label in order[:5]
        loss -= torch.tensor(logits).log_softmax(0)[label].item()
    summary, count = read(folder), len(test)
    assert count == 12 and 0 < first < second < 12
    assert summary["test_top1_pct"] == pytest.approx(100 * first / count)
    assert summary["test_top5_pct"] == pytest.approx(100 * second / count)
    classes = [sum(of) / len(of) for of in found.values() if of]
    assert summary["test_balanced_pct"] == pytest.approx(100 * sum(classes) / len(classes))
    assert summary["test_loss"] == pytest.approx(loss / count, rel=1e-5)
    assert small_runs.log_rows(folder)[-1]["val_top5_pct"] == summary["test_top5_pct"]


def test_batches_do_not_wait_for_the_device():
    """However many batches there are, as many reads of a value: those of the sums at the end."""
    waits = []
    for size in (1, 6):
        with Calls() as calls:
            evaluate(torch.nn.Identity(), split_of(ROWS), 8, size, nullcontext)
        waits.append([name for name, _ in calls.seen if name in WAITS])
    assert waits[0] == waits[1] and len(waits[0]) <= 3


def test_many_classes_are_counted_without_a_matrix(monkeypatch):
    monkeypatch.setattr(evaluation, "CONFUSION_CLASSES", 7)
    result = evaluate(torch.nn.Identity(), split_of(ROWS), 8, 4, nullcontext)
    assert result.confusion is None
    assert result.per_class_pct() == [25.0, None, None, None, 0.0, None, None, 0.0]


def test_memory_does_not_grow_with_the_square_of_the_classes():
    """A hundred thousand classes: the matrix would have ten thousand million places."""
    logits = torch.zeros(100_000)
    logits[99_999] = 1
    result = evaluate(torch.nn.Identity(), Split([(logits, 99_999)]), 100_000, 1, nullcontext)
    assert result.top1_pct == 100 and result.right[99_999] == 1


def test_a_signal_ends_an_evaluation_at_the_next_batch():
    stop, seen = StopRequest(), []

    class Watched(torch.nn.Identity):
        def forward(self, x):
            seen.append(len(x))
            stop.received = "SIGTERM"
            return x

    network = Watched().train()
    assert evaluate(network, split_of(ROWS), 8, 2, nullcontext, stop=stop) is None
    assert seen == [2] and network.training
