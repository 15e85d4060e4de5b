"""fingerprint.py: what makes two data sets the same, and how a difference is described."""

import json

import pytest
import torch

from preprocess import data_identity, load
from sasa.data import fingerprint as fp


def identity(tree, **options):
    return data_identity(*load(dataset="FOLDER", data_dir=tree, img_size=16, **options))


def test_the_same_tree_elsewhere_is_the_same(tree, tree_source):
    assert identity(tree, holdout=3) == identity(tree_source, holdout=3)
    assert fp.differences(identity(tree), identity(tree_source)) == []


def test_an_identity_is_plain_and_survives_json_and_a_checkpoint(tree, tmp_path):
    (tree / "train" / "cat").rename(tree / "train" / "c\udce9t\u2028")
    (tree / "val" / "cat").rename(tree / "val" / "c\udce9t\u2028")
    found = identity(tree, holdout=3)
    assert json.loads(json.dumps(found)) == found
    torch.save(found, tmp_path / "a.pt")
    assert torch.load(tmp_path / "a.pt", weights_only=True) == found
    assert found["class_names"] == ["c\udce9t\u2028", "dog"]


def test_each_difference_is_named(tree):
    before = identity(tree)
    (tree / "train" / "cat" / "00.jpg").unlink()
    assert fp.differences(before, identity(tree)) == ["train: 21 images, were 22 (class cat 10 images, were 11)"]
    before = identity(tree)
    path = tree / "val" / "dog" / "01.jpg"
    path.write_bytes(path.read_bytes() + b"0")  # another size
    assert fp.differences(before, identity(tree)) == [
        "test: 14 images, not the same ones (class dog 7 images, not the same ones)"
    ]
    before = identity(tree)
    path.rename(path.with_name("other.jpg"))
    assert fp.differences(before, identity(tree)) == [
        "test: 14 images, not the same ones (class dog 7 images, not the same ones)"
    ]
    before = identity(tree)
    (path.with_name("other.jpg")).unlink()
    assert fp.differences(before, identity(tree)) == ["test: 13 images, were 14 (class dog 6 images, were 7)"]
    assert fp.differences(before, before | {"holdout": before["test"]}) == ["holdout: 14 images, were no images"]
    assert fp.differences(before, before | {"mean": [0.5] * 3})[0].startswith("the normalisation's mean is (0.5")
    before = identity(tree)
    for split in ("train", "val"):
        (tree / split / "cat").rename(tree / split / "kitten")
    assert fp.differences(before, identity(tree))[0] == "class 0 is dog, was cat, class 1 is kitten, was dog"


def test_files_of_another_size_under_the_same_names(tree):
    """As a damaged disk leaves them; not a file more, less, of another name or class."""
    before = identity(tree, holdout=3)
    path = tree / "train" / "dog" / "01.jpg"
    path.write_bytes(path.read_bytes()[:-1])
    now = identity(tree, holdout=3)
    assert fp.differences(before, now) and fp.only_sizes_differ(before, now)
    assert not fp.only_sizes_differ(before, now | {"class_names": ["cat", "wolf"]})
    assert not fp.only_sizes_differ(before, now | {"holdout": None})
    older = {key: value for key, value in before["train"].items() if key != "names"}  # a checkpoint without it
    assert not fp.only_sizes_differ(before | {"train": older}, now)
    path.rename(path.with_name("x.jpg"))
    assert not fp.only_sizes_differ(before, identity(tree, holdout=3))
    digits = data_identity(*load(dataset="DIGITS"))
    assert not fp.only_sizes_differ(digits, digits | {"train": digits["train"] | {"hash": "0"}})


def test_tensor_sets_by_their_bytes():
    sets = [load(dataset="DIGITS", seed=seed, holdout=100, img_size=size) for seed, size in ((1, 8), (1, 16), (2, 8))]
    first, resized, other = (data_identity(*data) for data in sets)
    assert first == resized  # as they are stored, whatever they are fed at
    assert [line.split(":")[0] for line in fp.differences(first, other)] == ["train", "holdout"]
    images, labels = sets[0][1].images.clone(), sets[0][1].labels
    whole = fp.of_tensors(images, labels, 10)
    assert whole["images"] == 1337 and sum(count for count, _ in whole["classes"]) == 1337
    images[5, 0, 3, 3] ^= 1
    assert fp.of_tensors(images, labels, 10)["hash"] != whole["hash"]
    swapped = labels.clone()
    swapped[5] = (swapped[5] + 1) % 10
    assert fp.of_tensors(sets[0][1].images, swapped, 10)["hash"] != whole["hash"]


def test_class_names_that_look_alike_are_told_apart():
    assert fp.class_differences(["café", "b"], ["cafe\u0301", "b"]) == [r"class 0 is 'cafe\u0301', was 'caf\xe9'"]
    assert fp.class_differences(["a", "b"], ["a", "b", "c"]) == ["3 classes, were 2"]
    assert fp.class_differences(list("abcdef"), list("fedcba")) == [
        "class 0 is f, was a, class 1 is e, was b, class 2 is d, was c, 3 more are renamed or moved"
    ]


def test_classes_in_another_order_are_mapped():
    assert fp.class_order(["a", "b", "c"], ["c", "a", "b"]) == [2, 0, 1]
    for other in (["a", "b"], ["a", "b", "d"], ["a", "a", "b"]):
        assert fp.class_order(["a", "b", "c"], other) is None
    assert fp.class_order(["a", "a"], ["a", "a"]) is None


def test_many_classes_have_no_part_of_their_own():
    found = fp.fingerprint([b"x"], [fp.CLASSES_APART], fp.CLASSES_APART + 1)
    assert found["classes"] == [] and found["images"] == 1
    other = fp.fingerprint([b"y"], [fp.CLASSES_APART], fp.CLASSES_APART + 1)
    assert found["hash"] != other["hash"]
    with pytest.raises(ValueError, match="zip"):
        fp.fingerprint([b"x", b"y"], [0], 2)
