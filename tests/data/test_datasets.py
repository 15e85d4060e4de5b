"""datasets.py: every small set read from files of its own form, and what wrong files say."""

import gzip
import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import datasets

import preprocess
from data_sets import (
    batches,
    write_cifar,
    write_idx,
)
from preprocess import DataError, load
from sasa.data import datasets as small_sets
from sasa.data.download import resolve_auto

ROOT = Path(__file__).resolve().parents[2]
DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture(scope="module")
def digits():
    return load(dataset="digits")


def test_digits_is_the_published_set(digits):
    info, train, holdout, test = digits
    assert (len(train), holdout, len(test)) == (1437, None, 360)
    assert (info.name, info.num_classes, info.image_size, info.channels) == ("DIGITS", 10, 8, 3)
    assert (info.train_size, info.test_size, info.holdout_size) == (1437, 360, 0)
    images, labels = torch.cat((train.images, test.images)), torch.cat((train.labels, test.labels))
    assert images.shape == (1797, 1, 8, 8) and images.dtype == torch.uint8
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert images.unique().tolist() == [(255 * v + 8) // 16 for v in range(17)]
    # the first image as sklearn.datasets.load_digits documents it: a zero
    assert labels[0] == 0
    assert ((images[0, 0, 0].int() * 16 + 127) // 255).tolist() == [0, 0, 5, 13, 9, 1, 0, 0]


def test_digits_file_is_small_whole_and_attributed():
    content = (ROOT / "sasa" / "data" / "digits.csv.gz").read_bytes()
    readme = (ROOT / "sasa" / "data" / "README.md").read_text()
    assert len(content) < 200_000
    assert hashlib.sha256(content).hexdigest() in readme
    assert all(word in readme for word in ("Alpaydin", "Kaynak", "CC BY 4.0", "10.24432/C50P49"))


def test_damaged_digits_file_is_named(monkeypatch, tmp_path):
    content = (ROOT / "sasa" / "data" / "digits.csv.gz").read_bytes()
    monkeypatch.setattr(small_sets, "_DIGITS_FILE", tmp_path / "digits.csv.gz")
    for damaged in (content[:20_000], b"nonsense", gzip.compress(b"1,2,3\n4,5,6\n")):
        (tmp_path / "digits.csv.gz").write_bytes(damaged)
        with pytest.raises(DataError, match=r"digits\.csv\.gz"):
            load(dataset="DIGITS")


def test_names_in_any_case():
    assert [preprocess.canonical_name(n) for n in ("digits", "CIFAR10", "fashionmnist", "Folder")] == [
        "DIGITS",
        "CIFAR10",
        "FashionMNIST",
        "FOLDER",
    ]
    with pytest.raises(ValueError, match=r"SVHN.*DIGITS, CIFAR10, CIFAR100, MNIST, FashionMNIST, IMAGENET, FOLDER"):
        preprocess.canonical_name("SVHN")


def test_digits_constants_are_its_statistics(digits):
    info, train, _, _ = digits
    mean, std = preprocess.channel_stats(train.images)
    assert info.mean == (round(mean[0], 4),) * 3 and info.std == (round(std[0], 4),) * 3


@pytest.mark.skipif(not DEBIAN_FASHION.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed here")
def test_real_fashion_mnist():
    info, train, _, test = load(dataset="FashionMNIST", data_dir=DEBIAN_FASHION)
    assert (len(train), len(test)) == (60_000, 10_000)
    assert train.labels.bincount().tolist() == [6000] * 10
    mean, std = preprocess.channel_stats(train.images)
    assert info.mean == (round(mean[0], 4),) * 3 and info.std == (round(std[0], 4),) * 3


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
def test_cifar_from_its_files(name, tmp_path, monkeypatch):
    images, labels = write_cifar(tmp_path, name, monkeypatch)
    info, train, _, test = load(dataset=name.lower(), data_dir=tmp_path)
    assert torch.equal(torch.cat((train.images, test.images)), images)
    assert torch.equal(torch.cat((train.labels, test.labels)), labels)
    assert len(test) == 6 and (info.name, info.num_classes, info.image_size) == (name, int(name[5:]), 32)
    assert info.class_names[3] == "class 3" and len(set(info.mean)) == 3


def test_damaged_cifar_is_named(tmp_path, monkeypatch):
    write_cifar(tmp_path, "CIFAR10", monkeypatch)
    file = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match="data_batch_3: damaged; delete"):
        load(dataset="CIFAR10", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("name", "folder", "suffix"),
    [
        ("FashionMNIST", "", ".gz"),
        ("MNIST", "", ".gz"),
        ("FashionMNIST", "FashionMNIST/raw", ""),
        ("MNIST", "MNIST/raw", ""),
        ("MNIST", "MNIST/raw", ".gz"),
    ],
)
def test_mnist_from_its_files(name, folder, suffix, tmp_path):
    images, labels = write_idx(tmp_path / folder, suffix)
    info, train, _, test = load(dataset=name, data_dir=tmp_path)
    assert torch.equal(train.images, images) and torch.equal(train.labels, labels) and len(test) == 8
    assert (info.name, info.num_classes, info.image_size) == (name, 10, 28)
    assert info.class_names[9] == ("Ankle boot" if name == "FashionMNIST" else "9 - nine")
    assert batches(train)[0][0].shape == (12, 3, 28, 28)


def test_damaged_idx_files_are_named(tmp_path):
    def expect(words):
        with pytest.raises(DataError, match=words):
            load(dataset="MNIST", data_dir=tmp_path)

    name = "train-images-idx3-ubyte.gz"
    write_idx(tmp_path, ".gz")
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    expect(f"{name}: damaged")
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0x55
    (tmp_path / name).write_bytes(bytes(flipped))
    expect(f"{name}: damaged")
    (tmp_path / name).write_bytes(gzip.compress(gzip.decompress(whole)[:-1]))
    expect(f"{name}: damaged .*do not hold shape")
    (tmp_path / name).write_bytes((tmp_path / "train-labels-idx1-ubyte.gz").read_bytes())
    expect(f"{name}: damaged .*not an IDX file of 3")
    (tmp_path / name).write_bytes(whole)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes((tmp_path / "t10k-labels-idx1-ubyte.gz").read_bytes())
    expect("train-labels-idx1-ubyte.gz: not the labels of train-images")


def test_mnist_and_fashion_mnist_are_told_apart(tmp_path, monkeypatch):
    """Their files have the same names: by torchvision's checksums, by the folder, by the published first labels."""
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    write_idx(tmp_path, ".gz", train=30)
    _, labels = write_idx(tmp_path / "MNIST" / "raw", ".gz", train=20)
    assert load(dataset="MNIST", data_dir=tmp_path)[0].train_size == len(labels) == 20  # its own folder comes first
    shutil.rmtree(tmp_path / "MNIST")
    checksums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in tmp_path.glob("*.gz")}
    monkeypatch.setattr(datasets.FashionMNIST, "resources", list(checksums.items()))
    assert load(dataset="FashionMNIST", data_dir=tmp_path)[0].train_size == 30
    with pytest.raises(DataError, match="MNIST is not in"):
        load(dataset="MNIST", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("name", "other", "first"),
    [
        ("MNIST", "FashionMNIST", [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]),
        ("FashionMNIST", "MNIST", [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]),
    ],
)
def test_unpacked_files_of_the_other_set_are_refused(tmp_path, name, other, first):
    write_idx(tmp_path, "")
    path = tmp_path / "train-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:8] + bytes(first) + path.read_bytes()[18:])
    with pytest.raises(DataError, match=f"train-labels-idx1-ubyte: these are {other}'s files"):
        load(dataset=name, data_dir=tmp_path)
    assert load(dataset=other, data_dir=tmp_path)[0].train_size == 20


def test_packed_and_unpacked_idx_files_may_be_mixed(tmp_path):
    images, _ = write_idx(tmp_path, ".gz")
    for name in ("train-labels-idx1-ubyte", "t10k-images-idx3-ubyte"):
        packed = tmp_path / f"{name}.gz"
        (tmp_path / name).write_bytes(gzip.decompress(packed.read_bytes()))
        packed.unlink()
    assert torch.equal(load(dataset="MNIST", data_dir=tmp_path)[1].images, images)


def test_a_packed_file_is_not_unpacked_beyond_its_shape(tmp_path, monkeypatch):
    """A small .gz that holds gigabytes, whether its header says so or not."""
    write_idx(tmp_path, ".gz")
    name = "train-images-idx3-ubyte.gz"
    unpacked = []
    read = gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda file, n=-1: unpacked.append(n) or read(file, n))
    for shape, words in (((2**31, 28, 28), "far beyond a set of this kind"), ((20, 28, 28), "more than 15680 bytes")):
        head = bytes((0, 0, 8, 3)) + np.array(shape, ">u4").tobytes()
        (tmp_path / name).write_bytes(gzip.compress(head + bytes(2_000_000)))
        with pytest.raises(DataError, match=words):
            load(dataset="MNIST", data_dir=tmp_path)
    assert min(unpacked) >= 0 and max(unpacked) <= 15681


def test_an_archive_is_unpacked_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("the network was used"))
    images, _ = write_cifar(tmp_path, "CIFAR10", monkeypatch)
    archive = Path(shutil.make_archive(str(tmp_path / "cifar-10-python"), "gztar", tmp_path, "cifar-10-batches-py"))
    shutil.rmtree(tmp_path / "cifar-10-batches-py")
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    assert resolve_auto(tmp_path, has_gpu=False)[0] == "CIFAR10"
    _, train, _, test = load(dataset="CIFAR10", data_dir=tmp_path)
    assert torch.equal(torch.cat((train.images, test.images)), images)
    shutil.rmtree(tmp_path / "cifar-10-batches-py")
    archive.write_bytes(archive.read_bytes()[:-10])
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(DataError, match=r"no network.*cifar-10-python\.tar\.gz is not the whole archive"):
        load(dataset="CIFAR10", data_dir=tmp_path)
