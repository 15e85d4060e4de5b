"""shards.py: a tree packed into tar shards is the same set, bitwise; what wrong shards say."""

import io
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import preprocess
from preprocess import AugmentConfig, load
from sasa.data import datasets as sources
from sasa.data import shards

pytest.importorskip("webdataset", reason="the optional package webdataset is not installed")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """22 training and 7 validation images of two classes, of several sizes and suffixes."""
    root, rng = tmp_path_factory.mktemp("tree"), np.random.default_rng(0)
    for split, count in (("train", 11), ("val", 4)):
        for name in ("cat", "a dog.v2"):
            (root / split / name).mkdir(parents=True)
            for i in range(count - (name == "cat" and split == "val")):
                pixels = rng.integers(0, 256, (20 + i, 31, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.x{('.JPG', '.png', '.jpeg')[i % 3]}")
    return root


@pytest.fixture(scope="module")
def packed(tree, tmp_path_factory):
    """The tree in shards of 4 images; tests that damage them copy the folder."""
    folder = tmp_path_factory.mktemp("shards")
    assert shards.main(["pack", str(tree), str(folder), "--images", "4"]) == 0
    return folder


def read(dataset: str, data_dir, **options):
    return load(dataset=dataset, data_dir=data_dir, img_size=16, **options)


def pattern(folder: Path) -> str:
    return str(folder / "train-{000000..000005}.tar")


def same(left, right) -> bool:
    left, right = list(left), list(right)
    return len(left) == len(right) and all(
        torch.equal(a, b) for x, y in zip(left, right, strict=True) for a, b in zip(x, y, strict=True)
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_are_the_tree_bitwise(tree, packed, workers):
    """Classes, hold-out, the order and augmentation of an epoch from its middle, by ranks; validation."""
    assert sorted(path.name for path in packed.glob("*.tar")) == [
        *(f"train-{i:06d}.tar" for i in range(6)), "val-000000.tar", "val-000001.tar"
    ]  # fmt: skip
    sets = [read("FOLDER", tree, holdout=3, seed=1), read("webdataset", pattern(packed), holdout=3, seed=1,
                                                         num_workers=workers)]  # fmt: skip
    for infos in zip(*(vars(data[0]).items() for data in sets), strict=True):
        assert infos[0] == infos[1] or infos[0][0] == "name"
    options = {"batch_size": 4, "seed": 5, "augment": AugmentConfig(flip=True), "rank": 1, "world_size": 2}
    assert same(*(data[1].batches(2, 1, **options) for data in sets))
    for split in (2, 3):
        assert same(*(data[split].eval_batches(3) for data in sets))
    for data in sets:
        for split in data[1:]:
            split.close()


def test_a_sample_reads_as_the_package_itself_reads_it(tree, packed):
    from webdataset import tariterators

    (files, labels) = shards.read_shards(pattern(packed))[1]
    found = []
    for shard in sorted(packed.glob("train-*.tar")):
        with open(shard, "rb") as file:
            members = ({**member, "__url__": str(shard)} for member in tariterators.tar_file_iterator(file))
            found += list(tariterators.group_by_keys(members))
    assert len(found) == len(files) == 22
    for i, sample in enumerate(found):
        (image,) = (value for key, value in sample.items() if key in ("jpg", "jpeg", "png"))
        assert files.open(i).read() == image and labels[i] == int(sample["cls"])


def test_packing_is_reproducible_and_keeps_the_files_bytes(tree, packed, tmp_path):
    shards.pack(tree, tmp_path / "%d again", 4)
    for path in packed.iterdir():
        if path.suffix == ".tar":
            assert path.read_bytes() == (tmp_path / "%d again" / path.name).read_bytes()
    files = shards.read_shards(pattern(packed))[1][0]
    first = sorted((tree / "train" / "a dog.v2").iterdir())[0]
    assert files.open(0).read() == first.read_bytes()


def test_part_of_the_shards_is_part_of_the_images(packed):
    classes, (files, labels), _ = shards.read_shards(str(packed / "train-{000001..000002}.tar"))
    assert classes == ["a dog.v2", "cat"] and len(files) == len(labels) == 8
    assert "train-000001.tar at byte 0" in files.name(0)


def foreign(folder: Path, split: str, names=("jpg", "cls"), label=b"3") -> Path:
    """A shard of two samples that another program might have written."""
    path = folder / f"{split}-0.tar"
    with tarfile.open(path, "w") as tar:
        for key in ("n01/a", "n01/b.c"):
            for name in names:
                content = io.BytesIO()
                Image.new("RGB", (9, 9), "red").save(content, "jpeg")
                data = label if name == "cls" else content.getvalue()
                member = tarfile.TarInfo(f"{key.partition('.')[0]}.{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def test_shards_from_elsewhere_are_indexed_by_the_command(tmp_path, capsys):
    for split in ("train", "val"):
        path = foreign(tmp_path, split)
        assert preprocess.shards_main(["index", str(path)]) == 0
    assert "2 images of 4 classes in 1 shards" in capsys.readouterr().out
    info, train, _, test = read("WEBDATASET", tmp_path / "train-0.tar")
    assert info.class_names == tuple("0123") and len(train) == len(test) == 2
    ((images, labels),) = test.eval_batches(4)
    assert labels.tolist() == [3, 3] and images.shape == (2, 3, 16, 16)


def test_an_image_that_cannot_be_read_is_named(packed, tmp_path):
    for split in ("train", "val"):
        path = foreign(tmp_path, split)
        shards.write_index([str(path)])
    data = bytearray(path.read_bytes())
    data[600:700] = bytes(100)
    path.write_bytes(data)
    with pytest.raises(sources.DataError, match=r"val-0\.tar at byte 0"):
        list(read("WEBDATASET", tmp_path / "train-0.tar")[3].eval_batches(2))


def test_wrong_shards_are_one_line(tree, packed, tmp_path, capsys):
    def message(call, *arguments) -> str:
        with pytest.raises(sources.DataError) as error:
            call(*arguments)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "no file" in message(shards.read_shards, str(packed / "train-{000004..000006}.tar"))
    assert "`train`" in message(shards.read_shards, str(packed / "val-000000.tar"))
    lonely = foreign(tmp_path, "train")
    assert "no validation shards" in message(shards.read_shards, str(lonely))
    foreign(tmp_path, "val")
    assert "preprocess.py index" in message(shards.read_shards, str(lonely))
    for path in tmp_path.glob("*.tar"):
        shards.write_index([str(path)])
    with open(lonely, "ab") as file:
        file.write(bytes(512))
    assert "not the file that" in message(shards.read_shards, str(lonely))
    (tmp_path / "train-index.npz").write_bytes(b"nothing")
    assert "damaged" in message(shards.read_shards, str(lonely))
    assert "KEY.cls" in message(shards.write_index, [str(foreign(tmp_path, "x", names=("jpg",)))])
    assert "KEY.cls" in message(shards.write_index, [str(foreign(tmp_path, "x", label=b"cat"))])
    assert "already holds" in message(shards.pack, tree, packed)
    assert shards.main(["pack", str(tmp_path / "none"), str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_without_the_package_one_line_says_what_to_install(packed, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(sources.DataError, match="pip install webdataset"):
        read("WEBDATASET", pattern(packed))
