"""Which of a checkpoint's classes a folder's classes are, by their names."""

import dataclasses
from pathlib import Path

import pytest
import torch

import preprocess
from preprocess import DataError
from sasa.training.scoring import Relabelled, order_of_classes

PATH = Path("best.pt")


def info(*names, mean=(0.5, 0.5, 0.5)):
    plain = preprocess.info_without_files("FOLDER", len(names), 8)
    return dataclasses.replace(plain, class_names=names, mean=mean)


def test_the_same_names_need_no_order():
    assert order_of_classes(info("a", "b"), info("a", "b"), True, "data", PATH) is None


def test_names_in_another_order_are_mapped_to_the_checkpoints_numbers():
    assert order_of_classes(info("a", "b", "c"), info("c", "a", "b"), True, "data", PATH) == [2, 0, 1]


def test_without_names_in_the_checkpoint_numbers_are_compared():
    assert order_of_classes(info("class 0", "class 1"), info("b", "a"), False, "data", PATH) is None


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (info("a", "b", "c"), ["data: 3 classes", "best.pt has 2"]),
        (info("a", "x"), ["other classes", "x"]),
        (info("a", "b", mean=(0.1, 0.5, 0.5)), ["normalised", "0.5"]),
    ],
)
def test_what_cannot_be_compared_is_refused(now, words):
    with pytest.raises(DataError) as error:
        order_of_classes(info("a", "b"), now, True, "data", PATH)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_labels_become_the_checkpoints_and_the_rest_is_the_splits():
    class Split:
        skipped = 1

        def __len__(self):
            return 3

        def eval_batches(self, size, rank):
            assert (size, rank) == (2, 0)
            yield torch.zeros(2, 1), torch.tensor([0, 2])
            yield torch.ones(1, 1), torch.tensor([1])

    relabelled = Relabelled(Split(), [2, 0, 1])
    batches = list(relabelled.eval_batches(2, 0))
    assert [labels.tolist() for _, labels in batches] == [[2, 1], [0]] and batches[1][0].item() == 1
    assert len(relabelled) == 3 and relabelled.skipped == 1
