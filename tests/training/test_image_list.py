"""image_list.py: a changed data set's first differing images by name, whatever has changed and wherever they lie."""

import gzip
import json
import os
import re
from pathlib import Path

import pytest
import torch

import small_runs
from preprocess import load
from sasa.data.shards import main as pack_and_index
from sasa.training import image_list
from sasa.training.run import Data
from tiny_runs import BASE, make_tree, tree_flags


def read(**options) -> Data:
    return Data(*load(**options))


def of_tree(folder: Path, **options) -> Data:
    return read(dataset="FOLDER", data_dir=folder, img_size=16, report=lambda line: None, **options)


def written(path: Path, data: Data) -> Data:
    """The data set, as it is now, with its list on the disk."""
    image_list.write(path, data.identity(), data.listed())
    return data


def after(path: Path, before: Data, now: Data) -> str:
    """The line that names what changed between two states of a data set; the list of the first is at `path`."""
    lines = image_list.changes(path, before.identity(), now.identity(), now.listed())
    assert len(lines) <= 1
    return "".join(lines)


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"0")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda cat: (cat / "new.jpg").touch(), "new: train/cat/new.jpg"),
        (lambda cat: (cat / "03.jpg").unlink(), "gone: train/cat/03.jpg"),
        (lambda cat: (cat / "03.jpg").rename(cat.with_name("dog") / "n.jpg"),
         "gone: train/cat/03.jpg; new: train/dog/n.jpg"),
        (lambda cat: grow(cat / "03.jpg"), "changed: train/cat/03.jpg (SIZE bytes, was SIZE bytes)"),
        (lambda cat: [path.unlink() for path in cat.glob("0[0-8].jpg")],
         "gone: train/cat/00.jpg, train/cat/01.jpg, train/cat/02.jpg and 6 more"),
        (lambda cat: (cat / "03.jpg").rename(cat / "a\n\x1b\udcff.jpg"),
         "gone: train/cat/03.jpg; new: train/cat/a\\x0a\\x1b\\xff.jpg"),
        (lambda cat: None, ""),
    ],
)  # fmt: skip
def test_a_tree(tree, tmp_path, change, said):
    """With images held out, whose drawing another number of images changes."""
    before = written(tmp_path / "l", of_tree(tree, holdout=3))
    change(tree / "train/cat")
    assert re.sub(r"\d+ bytes", "SIZE bytes", after(tmp_path / "l", before, of_tree(tree, holdout=3))) == said


def test_the_same_images_otherwise_dealt(tree, tmp_path):
    before = written(tmp_path / "l", of_tree(tree, holdout=3, seed=1))
    said = after(tmp_path / "l", before, of_tree(tree, holdout=3, seed=2))
    assert said == "the same images, but in another order or split"


def test_a_tensor_set(tmp_path):
    before = read(dataset="DIGITS")
    now = read(dataset="DIGITS")
    images, labels = before.train.images.clone(), before.train.labels.clone()
    images[17], labels[20] = 255 - images[17], (labels[20] + 1) % 10
    now.train = type(before.train)(images, labels, before.info)
    before.train = type(before.train)(before.train.images, before.train.labels, before.info)
    said = after(tmp_path / "l", written(tmp_path / "l", before), now)
    assert re.fullmatch(
        r"changed: image 17 \(pixels of checksum [0-9a-f]{8}, was pixels of checksum [0-9a-f]{8}\); "
        rf"in another class: image 20 \({labels[20]}, was {before.train.labels[20]}\)", said
    )  # fmt: skip
    names = [image.name for image in read(dataset="DIGITS", holdout=100, img_size=16).listed()]
    assert len(set(names)) == len(names) == 1797  # of training, held-out and test images alike


def test_relabelled_shards(tree, tmp_path):
    """The same names of the same sizes."""
    shards = tmp_path / "shards"
    assert pack_and_index(["pack", str(tree), str(shards)]) == 0
    options = {"dataset": "WEBDATASET", "data_dir": str(shards / "train-{000000..000000}.tar"), "img_size": 16}
    before = written(tmp_path / "l", read(**options))
    path = next(shards.glob("train-0*.tar"))
    content = path.read_bytes()
    at = content.index(b".cls") // 512 * 512 + 512  # the first label, behind its header
    assert content[at : at + 1] == b"0"
    path.write_bytes(content[:at] + b"1" + content[at + 1 :])
    for index in shards.glob("*-index.npz"):
        index.unlink()
    patterns = [str(shards / f"{split}-{{000000..000000}}.tar") for split in ("train", "val")]
    assert pack_and_index(["index", *patterns]) == 0
    said = after(tmp_path / "l", before, read(**options))
    assert re.fullmatch(r"in another class: train-000000.tar at byte \d+ \(dog, was cat\)", said)


def damaged(path: Path) -> None:
    content = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(content[: len(content) // 2]))


def of_another_type(path: Path) -> None:
    first, _, *rest = gzip.decompress(path.read_bytes()).split(b"\n")
    path.write_bytes(gzip.compress(b"\n".join((first, b'["train", 7, "x", null]', *rest))))


def endless(path: Path) -> None:
    """A small file that unpacks to much."""
    first = gzip.decompress(path.read_bytes()).split(b"\n")[0]
    path.write_bytes(gzip.compress(first + b"\n" + bytes(2**24)))


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (Path.unlink, "No such file or directory"),
        (lambda path: path.write_bytes(path.read_bytes()[:60]), ""),
        (lambda path: path.write_bytes(b"x"), ""),
        (damaged, ""),
        (of_another_type, "damaged"),
        (endless, ""),
        (a_pipe, "not a regular file"),
        (lambda path: path.write_bytes(gzip.compress(b"null\n")), "of other images than the checkpoint's"),
    ],
)
def test_a_list_that_cannot_be_used_is_said(tree, tmp_path, damage, said):
    path = tmp_path / "images.jsonl.gz"
    before = written(path, of_tree(tree))
    damage(path)
    grow(tree / "train/cat/03.jpg")
    now = of_tree(tree)
    (line,) = image_list.changes(path, before.identity(), now.identity(), now.listed())
    assert line.startswith(f"which images differ is not known: {path}: {said}") and "\n" not in line
    image_list.write(path, before.identity(), before.listed())  # replaces what is not whole
    assert image_list.changes(path, before.identity(), now.identity(), now.listed())[0].startswith("changed: ")


def test_a_whole_list_is_kept(tree, tmp_path):
    path = tmp_path / "images.jsonl.gz"
    data = written(path, of_tree(tree))
    first = path.stat().st_ino
    written(path, data)
    assert path.stat().st_ino == first


def test_a_resume_names_them_and_a_run_that_goes_on_lists_them_anew(tmp_path, tiny, capsys):
    tree, flags = make_tree(tmp_path / "tree"), tree_flags(tmp_path / "tree", 0)

    def run(*more: str) -> int:
        return small_runs.run(tmp_path, *BASE.split(), *flags.split(), *more)

    assert run("--max-steps", "8") == 0
    (tree / "train/bee/2.jpg").rename(tree / "train/bee/200.jpg")
    capsys.readouterr()
    assert run("--resume") == 2
    error = capsys.readouterr().err
    named = "gone: train/bee/2.jpg; new: train/bee/200.jpg"
    assert f"(class bee 8 images, not the same ones); {named}. --allow-changed-data goes on" in error
    copy = tmp_path / "copy.pt"
    copy.write_bytes((tmp_path / "run/last.pt").read_bytes())
    assert run("--resume", str(copy), "--name", "other") == 2
    error = capsys.readouterr().err
    assert "class bee" in error and f"not known: {tmp_path / 'images.jsonl.gz'}: No such file" in error
    assert run("--resume", "--allow-changed-data") == 0
    assert named in json.loads((tmp_path / "run/summary.json").read_text())["data_changes"][-1]
    listed = gzip.decompress((tmp_path / "run/images.jsonl.gz").read_bytes()).decode()
    assert "200.jpg" in listed and "train/bee/2.jpg" not in listed


def test_a_list_that_cannot_be_written_costs_no_step(tmp_path, tiny, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(image_list, "write", refuse)
    assert small_runs.run(tmp_path, *BASE.split()) == 0
    assert capsys.readouterr().out.count("images.jsonl.gz was not written: [Errno 28] No space left on device") == 1
    assert torch.load(tmp_path / "run/last.pt", weights_only=True)["progress"]["epoch"] == 2
