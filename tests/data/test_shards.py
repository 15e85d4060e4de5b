"""shards.py: a tree packed into tar shards is the same set, bitwise; what wrong shards say."""

import io
import os
import shutil
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import preprocess
from preprocess import AugmentConfig, load
from sasa.data import pack, shard_index, shards
from sasa.data.errors import DataError
from sasa.data.trees import read_trees


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
    tariterators = pytest.importorskip("webdataset.tariterators", reason="the package webdataset is not installed")
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
    assert "train-000001.tar at byte 512" in files.name(0)


@pytest.mark.parametrize("name", ["val-000000.tar", "val-000001.tar"])
def test_part_of_the_validation_shards_is_refused(packed, tmp_path, name):
    """Nobody names them, so that a lost one would go unnoticed: the score would be of other images."""
    folder = shutil.copytree(packed, tmp_path / "shards")
    (folder / name).unlink()
    text = message(shards.read_shards, pattern(folder))
    assert str(folder / name) in text and "val-index.npz describes it" in text


def test_class_names_that_are_corrected_after_indexing_are_not_ignored(packed, tmp_path):
    folder = shutil.copytree(packed, tmp_path / "shards")
    (folder / "classes.txt").write_text("a dog\ncat\n")
    text = message(shards.read_shards, pattern(folder))
    assert str(folder / "classes.txt") in text and "preprocess.py index" in text
    val = str(folder / "val-{000000..000001}.tar")
    assert shards.main(["index", pattern(folder), val]) == 0
    assert shards.read_shards(pattern(folder)).classes == ["a dog", "cat"]
    (folder / "classes.txt").unlink()  # the index has them
    assert shards.read_shards(pattern(folder)).classes == ["a dog", "cat"]


def test_names_that_come_after_an_index_of_numbers_are_not_ignored(tmp_path):
    for split in ("train", "val"):
        shards.write_index([str(foreign(tmp_path, split))])
    (tmp_path / "classes.txt").write_text("a\nb\nc\nd\n")
    assert "other classes than those of the index" in message(shards.read_shards, str(tmp_path / "train-0.tar"))


def foreign(folder: Path, split: str, names=("jpg", "cls"), label=b"3", second=b"0") -> Path:
    """A shard of two samples that another program might have written, with a label each."""
    path = folder / f"{split}-0.tar"
    with tarfile.open(path, "w") as tar:
        for key, of_key in (("n01/a", label), ("n01/b.c", second)):
            for name in names:
                content = io.BytesIO()
                Image.new("RGB", (9, 9), "red").save(content, "jpeg")
                data = of_key if name == "cls" else content.getvalue()
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
    assert labels.tolist() == [3, 0] and images.shape == (2, 3, 16, 16)


def test_an_image_that_cannot_be_read_is_named(packed, tmp_path):
    for split in ("train", "val"):
        path = foreign(tmp_path, split)
        shards.write_index([str(path)])
    data = bytearray(path.read_bytes())
    data[600:700] = bytes(100)
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"val-0\.tar at byte 512"):
        list(read("WEBDATASET", tmp_path / "train-0.tar")[3].eval_batches(2))


def message(call, *arguments) -> str:
    with pytest.raises(DataError) as error:
        call(*arguments)
    assert "\n" not in str(error.value) and len(str(error.value)) < 2000
    return str(error.value)


def test_wrong_shards_are_one_line(tree, packed, tmp_path, capsys):
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
    assert "KEY.cls" in message(shards.write_index, [str(foreign(tmp_path, "x", names=("txt", "cls")))])
    assert "already holds" in message(shards.pack, tree, packed)
    with pytest.raises(SystemExit) as ended:
        shards.main(["pack", str(tmp_path / "none"), str(tmp_path)])
    assert ended.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "label", [b"-1", b"-100", b"cat", b"1.0", b"1_0", b"", b"1" * 21, b"1000000000", b"\xef\xbb\xbf1"]
)
def test_labels_that_are_no_class_are_refused(tmp_path, label):
    text = message(shards.write_index, [str(foreign(tmp_path, "train", label=label))])
    assert "train-0.tar: n01/a.cls" in text and ("below 1,000,000" in text or "a number from 0" in text)


def test_what_is_neither_image_nor_label_is_left_out(tmp_path):
    """Captions, boxes and scores lie beside many published images; two images or labels of a key are no sample."""
    names = ("json", "jpg", "txt", "cls", "__key__")
    for split in ("train", "val"):
        shards.write_index([str(foreign(tmp_path, split, names=names))])
    info, train, _, test = read("WEBDATASET", tmp_path / "train-0.tar")
    assert (len(train), len(test), info.num_classes) == (2, 2, 4)
    ((images, labels),) = test.eval_batches(4)
    assert labels.tolist() == [3, 0] and images.shape[0] == 2
    for names in (("jpg", "cls", "seg.png"), ("jpg", "cls", "CLS"), ("jpg", "json")):
        assert "one each" in message(shards.write_index, [str(foreign(tmp_path, "x", names=names))])


@pytest.mark.parametrize("label", [b"0", b"1"])
@pytest.mark.parametrize("names", [None, b"a\nb\nc\n"])
def test_shards_of_one_class_are_refused(tmp_path, label, names):
    """Whatever number it has, and however many classes have names: every answer would be right."""
    if names:
        (tmp_path / "classes.txt").write_bytes(names)
    shards.write_indexes([[str(foreign(tmp_path, split, label=label, second=label))] for split in ("train", "val")])
    found = message(shards.read_shards, str(tmp_path / "train-0.tar"))
    assert f"all labels of these training shards are {label.decode()}, one class only" in found


def test_labels_beyond_the_named_classes_are_refused(tmp_path):
    (tmp_path / "classes.txt").write_bytes(b"a\nb\nc\n")
    assert "classes.txt: 3 classes, but a label is 3" in message(shards.write_index, [str(foreign(tmp_path, "train"))])


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (b"a\nb\nc\nd\n", ["a", "b", "c", "d"]),
        (b"a\r\nb\r\nc\r\nd\r\n\r\n", ["a", "b", "c", "d"]),
        (b"\xef\xbb\xbfa\nb\nc\nd\n\n\n", ["a", "b", "c", "d"]),
        (b"a\xe2\x80\xa8x\nb\x85\x0cy\ncaf\xe9\nd", ["a\u2028x", "b\udc85\x0cy", "caf\udce9", "d"]),
    ],
)
def test_names_of_classes_are_kept_exactly(tmp_path, content, names):
    (tmp_path / "classes.txt").write_bytes(content)
    for split in ("train", "val"):
        shards.write_index([str(foreign(tmp_path, split))])
    assert shards.read_shards(str(tmp_path / "train-0.tar")).classes == names


def test_wrong_files_of_classes_are_named(tmp_path):
    shard = str(foreign(tmp_path, "train"))
    for name, content, words in (
        ("classes.txt", b"a\n\nc\nd\n", "line 2 is empty"),
        ("classes.json", b"{}", "list of names"),
        ("classes.json", b"[" * 100_000, "classes.json"),
        ("classes.json", b'["a", "b\\u0000"]', "zero byte"),
        ("classes.json", b'["x"]', "differ"),
    ):
        (tmp_path / name).write_bytes(content)
        if name == "classes.json":
            (tmp_path / "classes.txt").unlink(missing_ok=True)
        if words == "differ":
            (tmp_path / "classes.txt").write_bytes(b"a\n")
        assert words in message(shards.write_index, [shard])


def test_class_folders_of_any_name_are_packed_exactly(tree, tmp_path):
    """A line break, U+2028, bytes that are not UTF-8: as many classes in the shards, of the same names."""
    odd = shutil.copytree(tree, tmp_path / "tree")
    for split in ("train", "val"):
        (odd / split / "cat").rename(odd / split / os.fsdecode(b"caf\xe9\nx\xe2\x80\xa8y"))
    assert shards.main(["pack", str(odd), str(tmp_path / "shards")]) == 0
    found = shards.read_shards(str(tmp_path / "shards" / "train-000000.tar")).classes
    assert found == read_trees("FOLDER", odd).classes and len(found) == 2
    assert (tmp_path / "shards" / "classes.json").exists() and not (tmp_path / "shards" / "classes.txt").exists()


def test_packing_replaces_nothing_and_leaves_nothing_behind_when_it_fails(tree, tmp_path, monkeypatch):
    (tmp_path / "classes.txt").write_text("mine")
    assert "already holds classes.txt" in message(shards.pack, tree, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["classes.txt"]
    full = tmp_path / "full"
    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "addfile", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        assert "No space left" in message(shards.pack, tree, full)
    assert list(full.iterdir()) == []
    with monkeypatch.context() as patch:  # another set comes while this one is packed
        patch.setattr(pack, "classes_file", lambda _: ((full / "val-000000.tar").write_bytes(b"theirs"), ("x", b""))[1])
        assert "already holds val-000000.tar" in message(shards.pack, tree, full)
    assert [path.read_bytes() for path in full.iterdir()] == [b"theirs"]
    (full / "val-000000.tar").unlink()
    shards.pack(tree, full)
    assert len(list(full.glob("*.tar"))) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_packing_that_a_signal_ends_leaves_nothing_behind(tree, tmp_path, monkeypatch, capsys, number):
    usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(number, usual)  # ignored where the tests run under nohup
    monkeypatch.setattr(pack, "classes_file", lambda _: os.kill(os.getpid(), number))
    try:
        assert shards.main(["pack", str(tree), str(tmp_path / "made")]) == 1
        assert signal.getsignal(number) is usual
    finally:
        signal.signal(number, before)
    assert "stopped by a signal" in capsys.readouterr().err and list((tmp_path / "made").iterdir()) == []


def test_an_image_that_packing_cannot_read_is_named(tree, tmp_path, monkeypatch):
    class Broken(io.BytesIO):
        def read(self, *_):
            raise OSError(5, "Input/output error")

    whole = pack.Files.open
    monkeypatch.setattr(pack.Files, "open", lambda files, i: Broken() if i == 3 else whole(files, i))
    name = sorted((tree / "train" / "a dog.v2").iterdir())[3]
    assert message(shards.pack, tree, tmp_path / "made") == f"{name}: Input/output error"


def test_what_a_killed_pack_has_left_is_mentioned(tree, tmp_path):
    """SIGKILL leaves its folder, which is hidden and may be as large as the set."""
    (tmp_path / ".pack-x1").mkdir()
    lines = shards.pack(tree, tmp_path)
    assert lines[0].startswith(f"{tmp_path / '.pack-x1'}: of a pack that was killed") and len(lines) == 3


def test_packing_without_place_for_the_index_leaves_nothing_behind(tree, tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard_index, "replacing", full)
    assert "No space left" in message(shards.pack, tree, tmp_path / "made")
    assert list((tmp_path / "made").iterdir()) == []


def test_a_rewritten_shard_is_noticed_and_a_touched_one_is_not_refused(tmp_path):
    """Other labels of the same size at the same places; then the same content at another time."""
    for split in ("train", "val"):
        shards.write_index([str(foreign(tmp_path, split, label=b"1"))])
    train = tmp_path / "train-0.tar"
    size = train.stat().st_size
    os.utime(train, (0, 0))
    assert shards.read_shards(str(train)).train[1] == [1, 0]
    foreign(tmp_path, "train", label=b"0")
    os.utime(train, (0, 0))
    assert train.stat().st_size == size
    assert "not the file that" in message(shards.read_shards, str(train))


def test_the_time_of_a_shard_is_trusted(tmp_path, monkeypatch):
    for split in ("train", "val"):
        shards.write_index([str(foreign(tmp_path, split))])
    monkeypatch.setattr(shard_index, "members", lambda _: pytest.fail("read again"))
    assert len(shards.read_shards(str(tmp_path / "train-0.tar")).train[1]) == 2


def test_several_splits_in_one_command(tmp_path, capsys):
    paths = [str(foreign(tmp_path, "train")), str(foreign(tmp_path, "val", label=b"1"))]
    assert shards.main(["index", *paths]) == 0
    assert capsys.readouterr().out.count("of 4 classes") == 2
    for path in paths:  # one by one: numbers are numbers, whatever the last one is
        shards.write_index([path])
    assert shards.read_shards(paths[0]).classes == list("0123")
    (tmp_path / "classes.txt").write_text("a\nb\n")
    shards.write_index([paths[1]])
    assert "index both in one command" in message(shards.read_shards, paths[0])


def test_an_index_elsewhere(tmp_path, monkeypatch, capsys):
    """--index-dir; and the user's cache where the shards' folder refuses."""
    paths = [str(foreign(tmp_path, split)) for split in ("train", "val")]
    assert shards.main(["index", *paths, "--index-dir", str(tmp_path / "there")]) == 0
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["train-index.npz", "val-index.npz"]
    assert "no such file" in message(shards.read_shards, paths[0])
    assert len(shards.read_shards(paths[0], tmp_path / "there").train[1]) == 2
    assert read("WEBDATASET", paths[0], index_dir=tmp_path / "there")[0].train_size == 2
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    replacing = shard_index.replacing

    def read_only(path):
        if path.parent == tmp_path:
            raise OSError(30, "Read-only file system")
        return replacing(path)

    monkeypatch.setattr(shard_index, "replacing", read_only)
    assert shards.main(["index", *paths]) == 0
    assert str(tmp_path / "cache" / "sasa" / "shards") in capsys.readouterr().out
    assert not list(tmp_path.glob("*.npz")) and len(shards.read_shards(paths[0]).train[1]) == 2
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # no home
    assert "Read-only file system); name a folder for it with --index-dir" in message(shards.write_index, paths[:1])
    assert not Path("~").exists()


def test_an_index_replaces_an_index_and_nothing_else(tmp_path):
    shard, path = str(foreign(tmp_path, "train")), tmp_path / "train-index.npz"
    shards.write_index([shard])
    whole = path.read_bytes()
    for older in (whole, whole[:100], b""):
        path.write_bytes(older)
        shards.write_index([shard])
        assert path.read_bytes() == whole
    mine = tmp_path / "mine"
    mine.write_bytes(b"precious")
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    for make in (
        lambda: path.write_bytes(b"precious"),
        lambda: path.write_bytes((tmp_path / "other.npz").read_bytes()),
        lambda: path.symlink_to(mine),
        path.mkdir,
        lambda: os.mkfifo(path),
    ):
        path.rmdir() if path.is_dir() else path.unlink()
        make()
        assert "is no index of shards" in message(shards.write_index, [shard])
    assert mine.read_bytes() == b"precious"


def test_two_patterns_do_not_share_an_index(tmp_path):
    """The second would replace the first, in one folder as by --index-dir."""
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    paths = [foreign(tmp_path / name, "train") for name in "ab"]
    shutil.copy(paths[0], tmp_path / "a/train-1.tar")
    for splits, index_dir in (
        ([[str(paths[0])], [str(tmp_path / "a/train-1.tar")]], None),
        ([[str(path)] for path in paths], tmp_path / "there"),
    ):
        assert "in one pattern" in message(shard_index.write_indexes, splits, index_dir)
    assert not list(tmp_path.rglob("*.npz"))


def damage(path: Path, **arrays) -> None:
    with np.load(path) as stored:
        np.savez(path, **(dict(stored.items()) | arrays))


def test_hostile_indexes_are_refused(tmp_path):
    for split in ("train", "val"):
        shards.write_index([str(foreign(tmp_path, split))])
    path = tmp_path / "train-index.npz"
    whole = path.read_bytes()
    with np.load(path) as stored:
        samples = stored["samples"]

    def refused() -> str:
        text = message(shards.read_shards, str(tmp_path / "train-0.tar"))
        path.unlink()
        path.write_bytes(whole)
        return text

    for arrays, words in (
        ({"labels": np.array([3, 4])}, "a label is 4"),
        ({"labels": np.array([3, -1])}, "a label is -1"),
        ({"labels": np.array([3.0, 1.0])}, "no integers"),
        ({"labels": np.array([3])}, "places for 1 labels"),
        ({"samples": samples + np.array([1, 0, 0])}, "outside its shards"),
        ({"samples": samples - np.array([0, 10**6, 0])}, "outside its shards"),
        ({"samples": samples + np.array([0, 0, 10**6])}, "beyond its shard"),
        ({"samples": samples + np.array([0, 2**62, 2**62])}, "beyond its shard"),
        ({"shards": np.array(["train-0.tar", "b"])}, "do not fit together"),
        ({"classes": np.array([object()])}, "damaged"),
        ({"classes": np.array([list("0123")])}, "of another form"),
        ({"classes": np.array(["", "b", "c", "d"])}, "without a name"),
        ({"classes": np.full(4, 0x110000, "<u4").view("<U1")}, "damaged"),  # beyond Unicode
        ({"is_numbered": np.array([True, False])}, "of another form"),
    ):
        damage(path, **arrays)
        assert words in refused()
    for missing in ("is_numbered", "mtime_ns", "classes"):
        with np.load(path) as stored:
            np.savez(path, **{key: value for key, value in stored.items() if key != missing})
        assert "damaged" in refused()
    with np.load(path) as stored:
        np.savez(path, **{key: value for key, value in stored.items() if key != "digests"})
    assert "of an older form" in refused()
    with np.load(path) as stored:
        np.savez_compressed(path, **dict(stored.items()))
    assert "compressed members" in refused()
    path.unlink()
    os.mkfifo(path)
    assert "not a regular file" in refused()
    assert len(shards.read_shards(str(tmp_path / "train-0.tar")).train[1]) == 2


def test_patterns(tmp_path):
    for name in ("train-08.tar", "train-09.tar", "train-10.tar", "train-a.tar"):
        (tmp_path / name).touch()

    def names(pattern):
        return [Path(shard).name for shard in shards.expand(str(tmp_path / pattern))]

    assert names("train-{08..10}.tar") == ["train-08.tar", "train-09.tar", "train-10.tar"]
    assert names("train-{10,a}.tar") == ["train-10.tar", "train-a.tar"]
    for pattern, words in (
        ("train-{000000..999999999}.tar", "more than 100,000 shards"),
        ("train-{0..9999}{0..9999}.tar", "more than 100,000 shards"),
        ("train-{3..1}.tar", "counts down"),
        ("train-{{1..2}}.tar", "not nested"),
        ("train-{08..11}.tar", "no file"),
        ("{a,b}/train-08.tar", "of one folder"),
        ("{a/train-08,b/train-09}.tar", "of one folder"),
    ):
        assert words in message(names, pattern)


def test_a_pattern_of_several_folders_is_refused_by_reading_and_by_indexing(tmp_path, capsys):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for split in ("train", "val"):
            foreign(tmp_path / folder, split)
    several = str(tmp_path / "{a,b}" / "train-0.tar")
    assert "of one folder" in message(shards.read_shards, several)
    several = str(tmp_path / "{a,b}" / "train-{0..0}.tar")
    with pytest.raises(SystemExit) as ended:
        shards.main(["index", several])
    assert ended.value.code == 2 and "of one folder" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.npz"))
