"""tools.elpv: the tree that it makes of files of the package's form, its split, and what it refuses."""

import csv
import importlib.util
import io
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

import preprocess
from tools import elpv

# Pictures of each probability and kind; 52 in all.
COUNTS = {
    (0.0, "mono"): 12, (1 / 3, "mono"): 3, (2 / 3, "mono"): 2, (1.0, "mono"): 5, (0.0, "poly"): 18, (1.0, "poly"): 12,
}  # fmt: skip


@pytest.fixture
def source(tmp_path):
    """A folder of the package's form: labels.csv in aligned columns, and 8x8 gray PNG files."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    lines = []
    for (probability, kind), count in COUNTS.items():
        for _ in range(count):
            name = f"images/cell{len(lines) + 1:04}.png"
            lines.append(f"{name}  {probability!r:<20} {kind}\n")
            Image.new("L", (8, 8), 4 * len(lines)).save(folder / name)
    (folder / "labels.csv").write_text("".join(lines))
    return folder


def run(source: Path, target: Path, *flags: str) -> int:
    return elpv.main([str(target), "--source", str(source), *flags])


def tree(folder: Path) -> dict[str, tuple[str, str]]:
    """(part, label) of each picture by its name."""
    return {path.name: path.parts[-3:-1] for path in folder.glob("*/*/*.png")}


def test_the_tree_is_the_stored_split_and_the_strata_by_hand(source, tmp_path, capsys):
    assert run(source, tmp_path / "cells") == 0
    found = tree(tmp_path / "cells")
    with open(tmp_path / "cells" / "split.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {Path(row["path"]).name: (row["split"], row["label"]) for row in rows} == found and len(found) == 52
    assert all((row["label"] == "defective") == (float(row["probability"]) > 0.5) for row in rows)
    # by hand: three quarters of 15, 7, 18 and 12 are 11.25, 5.25, 13.5 and 9; of all 52 they are 39
    train = Counter((row["label"], row["kind"]) for row in rows if row["split"] == "train")
    assert train == {("functional", "mono"): 11, ("defective", "mono"): 5, ("functional", "poly"): 14,
                     ("defective", "poly"): 9}  # fmt: skip
    out = capsys.readouterr().out.splitlines()
    assert out[1] == (
        "val: 13 pictures, 8 functional (4 mono, 4 poly), 5 defective (2 mono, 3 poly); a constant answer scores 61.5%"
    )
    for name, (part, label) in found.items():
        copied = (tmp_path / "cells" / part / label / name).read_bytes()
        assert copied == (source / "images" / name).read_bytes()


def test_the_split_is_the_seeds_whatever_the_order_of_the_labels(source, tmp_path):
    assert run(source, tmp_path / "a") == run(source, tmp_path / "other", "--seed", "1") == 0
    lines = (source / "labels.csv").read_text().splitlines()
    (source / "labels.csv").write_text("\r\n".join([*reversed(lines), "", ""]))
    assert run(source, tmp_path / "b", "--seed", "0") == 0
    assert tree(tmp_path / "a") == tree(tmp_path / "b") != tree(tmp_path / "other")
    assert (tmp_path / "a/split.csv").read_bytes() == (tmp_path / "b/split.csv").read_bytes()


def test_the_tree_is_one_that_training_reads(source, tmp_path):
    assert run(source, tmp_path / "cells") == 0
    info, train, _, test = preprocess.load(dataset="FOLDER", data_dir=str(tmp_path / "cells"), img_size=8)
    assert (tuple(info.class_names), len(train), len(test)) == (("defective", "functional"), 39, 13)


BAD = {
    "two words": "images/cell0001.png 1.0\n",
    "another kind": "images/cell0001.png 1.0 glass\n",
    "no number": "images/cell0001.png high mono\n",
    "nan": "images/cell0001.png nan mono\n",
    "above one": "images/cell0001.png 1.5 mono\n",
    "leads out": "images/../../secret.png 1.0 mono\n",
    "absolute": "/images/cell0001.png 1.0 mono\n",
    "twice": "images/cell0001.png 1.0 mono\n" * 2,
    "empty": "\n",
    "no such picture": "images/none.png 1.0 mono\n",
}


@pytest.mark.parametrize("which", BAD)
def test_labels_of_another_form_are_one_line_and_leave_nothing(source, tmp_path, capsys, which):
    (source / "labels.csv").write_text(BAD[which])
    assert run(source, tmp_path / "cells") == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("tools.elpv: error: ") and captured.err.count("\n") == 1
    assert "labels.csv" in captured.err or "none.png" in captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_links_are_not_copied_and_a_folder_that_holds_something_is_left_alone(source, tmp_path, capsys):
    picture = source / "images" / "cell0002.png"
    picture.rename(tmp_path / "secret.png")
    picture.symlink_to(tmp_path / "secret.png")
    assert run(source, tmp_path / "cells") == 2 and "cell0002.png" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("mine")
    assert run(source, tmp_path / "mine") == 2 and "not an empty folder" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"data", "secret.png", "mine"}
    assert (tmp_path / "mine" / "notes").read_text() == "mine"


def test_a_disk_that_is_full_leaves_nothing(source, tmp_path, monkeypatch):
    def full(*_, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(csv, "writer", full)
    assert run(source, tmp_path / "cells") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_without_the_package_one_line_names_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert elpv.main([str(tmp_path / "cells")]) == 2
    error = capsys.readouterr().err
    assert "pip install elpv-dataset" in error and error.count("\n") == 1 and not any(tmp_path.iterdir())


@pytest.mark.parametrize("flags", ["--seed -1", "--seed x", "--sed 1"])
def test_wrong_usage_is_one_line_and_exit_2(tmp_path, capsys, flags):
    with pytest.raises(SystemExit) as end:
        elpv.main([str(tmp_path / "cells"), *flags.split()])
    assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.skipif(not importlib.util.find_spec("elpv_dataset"), reason="the package elpv-dataset is not installed")
def test_the_packages_own_counts():
    parts = elpv.split(elpv.read_labels(elpv.package_folder()), 0)
    assert Counter(parts.values()) == {"train": 1968, "val": 656}
    assert Counter(cell.label for cell in parts) == {"functional": 1803, "defective": 821}
    cell = min(parts)
    with Image.open(io.BytesIO(elpv.read_picture(elpv.package_folder() / cell.path))) as picture:
        assert (picture.size, picture.mode) == ((300, 300), "L")
