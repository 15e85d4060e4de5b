"""predict.py: the probabilities are those of the run's own evaluation; which files it takes, names and writes."""

import csv
import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

import preprocess
import small_runs
from config import resolve
from model import ResNet26
from sasa.training import checkpoint
from tools import predict

pytestmark = pytest.mark.usefixtures("small_network")
TREE = {"img_size": 24, "eval_size": 28, "eval_crop": 0.8, "eval_interpolation": "bicubic"}


def save(folder, network, dataset, **given):
    config = resolve({"form": "small", "name": "run", **given}, dataset)
    weights = network.state_dict()
    identity = small_runs.identity(dataset, len(weights["fc.weight"]))
    state = checkpoint.weights_state(config, identity, weights, 3, 77, "the last epoch")
    checkpoint.save(state, folder, "best.pt")
    return str(folder / "best.pt")


@pytest.fixture(scope="module")
def network(small_network):
    torch.manual_seed(1)
    network = ResNet26(10, small_images=True).eval()
    torch.nn.init.normal_(network.fc.weight, std=0.3)  # probabilities that differ from image to image
    return network


@pytest.fixture(scope="module")
def digits(tmp_path_factory, network):
    return save(tmp_path_factory.mktemp("digits"), network, "DIGITS", img_size=8)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, with nine of the test split's digits in pictures/."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    for i, image in enumerate(preprocess.load(dataset="DIGITS")[3].images[:9]):
        to_pil_image(image).save(tmp_path / "pictures" / f"{i}.png")
    return tmp_path


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Colour pictures of other shapes than the network is fed with."""
    root = tmp_path_factory.mktemp("tree")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 1), ("val", 2)):
        for i in range(10):
            (root / split / f"class {i}").mkdir(parents=True)
            for j in range(count):
                pixels = torch.randint(256, (3, 40 + 5 * i, 50 - 2 * i), dtype=torch.uint8, generator=generator)
                to_pil_image(pixels).save(root / split / f"class {i}" / f"{j}.png")
    return root


def rows(path):
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def probabilities_of(row):
    pairs = [(row[f"class_{k}"], float(row[f"probability_{k}"])) for k in range(1, 11)]
    assert [p for _, p in pairs] == sorted((p for _, p in pairs), reverse=True)
    return [p for _, p in sorted(pairs)]


def terminal(monkeypatch, name):
    """In place of a standard stream, one that takes ASCII alone."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, name, stream)
    return stream


def written(stream):
    stream.flush()
    return stream.buffer.getvalue()


@torch.no_grad()
def evaluated(network, test):
    return torch.cat([network(images).softmax(1) for images, _ in test.eval_batches(100)])


@pytest.mark.parametrize("batch", ["1", "4", "100"])
def test_a_gray_set_is_predicted_as_it_is_evaluated(digits, folder, network, batch):
    assert predict.main([digits, "pictures", "--top-k", "10", "--batch-size", batch]) == 0
    expected = evaluated(network, preprocess.load(dataset="DIGITS")[3])[:9]
    found = rows("predictions.csv")
    assert [row["path"] for row in found] == [f"pictures/{i}.png" for i in range(9)]
    torch.testing.assert_close(torch.tensor([probabilities_of(r) for r in found]), expected, atol=2e-6, rtol=0)
    assert expected.max() - expected.min() > 0.1


def test_a_tree_is_predicted_as_it_is_evaluated(tmp_path, tree, network, monkeypatch):
    """As the run does, and as the flags say; with decoding processes too."""
    best = save(tmp_path, network, "FOLDER", **TREE)
    monkeypatch.chdir(tmp_path)
    flags = [best, str(tree / "val"), "--top-k", "10"]
    for given in ({}, {"eval_size": 40}, {"eval_crop": 1.0}, {"eval_interpolation": "bilinear"}):
        more = [text for key, value in given.items() for text in (f"--{key.replace('_', '-')}", str(value))]
        assert predict.main([*flags, *more, "--num-workers", "2" if not given else "0"]) == 0
        test = preprocess.load(dataset="FOLDER", data_dir=tree, **TREE | given)[3]
        found = torch.tensor([probabilities_of(row) for row in rows("predictions.csv")])
        torch.testing.assert_close(found, evaluated(network, test), atol=2e-6, rtol=0)


def test_what_training_leaves_out_of_a_folder_is_no_image(digits, folder):
    for place in (".hidden", "@eaDir", "__MACOSX"):
        shutil.copytree("pictures", Path("pictures", place))
    Path("pictures", "._0.png").write_bytes(b"resource fork")
    assert predict.main([digits, "pictures", "./pictures/3.png", "pictures/../pictures/4.png"]) == 0
    assert [row["path"] for row in rows("predictions.csv")] == [f"pictures/{i}.png" for i in range(9)]


def test_a_detector_is_named_as_what_it_is(digits, folder, capsys):
    state = checkpoint.load(Path(digits))
    state["config"] |= {"anchor_scales": 2}
    torch.save(state, "detector.pt")
    with pytest.raises(SystemExit) as ended:
        predict.main(["detector.pt", "pictures"])
    assert ended.value.code == 2 and "detector.pt: belongs to a detector" in capsys.readouterr().err
    state["config"] = state["config"] | {"of_tomorrow": 2}
    del state["config"]["anchor_scales"]
    torch.save(state, "tomorrow.pt")
    with pytest.raises(SystemExit):
        predict.main(["tomorrow.pt", "pictures"])
    assert "tomorrow.pt: the configuration is of another version: of_tomorrow" in capsys.readouterr().err


def test_colour_is_made_gray_for_a_gray_set(digits, folder):
    """A photograph of a digit: what the network sees is what it would see of PIL's gray picture, to its rounding."""
    pixels = torch.randint(256, (3, 8, 8), dtype=torch.uint8)
    to_pil_image(pixels).save("colour.png")
    to_pil_image(pixels).convert("L").save("gray.png")
    assert predict.main([digits, "colour.png", "gray.png", "--top-k", "10"]) == 0
    colour, gray = (torch.tensor(probabilities_of(row)) for row in rows("predictions.csv"))
    assert (colour - gray).abs().max() < 0.02


def test_json_holds_the_same_and_how_it_was_made(digits, folder):
    Path("bad.png").write_bytes(b"no picture")
    flags = ["--top-k", "2", "--format", "json", "--num-workers", "0"]
    assert predict.main([digits, "pictures/3.png", "bad.png", *flags]) == 0
    assert predict.main([digits, "pictures/3.png", "--top-k", "2"]) == 0
    content, (row,) = json.loads(Path("predictions.json").read_text()), rows("predictions.csv")
    (found,) = content["predictions"]
    assert found["path"] == row["path"] == "pictures/3.png"
    for k, entry in enumerate(found["classes"], start=1):
        assert entry["class"] == row[f"class_{k}"]
        assert entry["probability"] == float(row[f"probability_{k}"])
        assert entry["class"] == f"class {entry['index']}" or entry["class"] == str(entry["index"])
    assert content["preparation"]["size"] == content["preparation"]["resize"] == 8
    assert content["preparation"]["mean"] == [0.3054] * 3
    assert [line.split(":")[0] for line in content["skipped"]] == ["bad.png"]
    assert set(row) == {"path", "class_1", "probability_1", "class_2", "probability_2"}


def test_bad_files_are_named_and_counted(digits, folder, capsys):
    assert predict.main([digits, "pictures", "--output", "before.csv"]) == 0
    capsys.readouterr()
    whole = Path("pictures/0.png").read_bytes()
    (folder / "pictures" / "3 cut.png").write_bytes(whole[: len(whole) // 2])
    os.mkfifo(folder / "pictures" / "pipe.png")
    (folder / "empty").mkdir()
    paths = ["pictures", "absent.png", "empty", "pictures/pipe.png", "/dev/zero", "*.tif"]
    assert predict.main([digits, *paths]) == 0
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert all(line.startswith("skipped ") for line in lines)
    names = {line.removeprefix("skipped ").split(":")[0] for line in lines}
    assert names == {"pictures/3 cut.png", "absent.png", "empty", "pictures/pipe.png", "/dev/zero", "*.tif"}
    assert out.splitlines()[-1] == "9 images, 6 could not be read: predictions.csv"
    assert rows("predictions.csv") == rows("before.csv")  # each image has kept its own
    assert len(rows("before.csv")) == 9


def test_where_nothing_can_be_read_nothing_is_written(digits, folder, capsys):
    Path("bad.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit) as end:
        predict.main([digits, "bad.png", "absent.png"])
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("error: none of 2 images could be read")
    assert not Path("predictions.csv").exists()


def test_files_folders_and_patterns(digits, folder):
    deep = folder / "pictures" / "deep" / "er"
    deep.mkdir(parents=True)
    (folder / "pictures" / "1.png").rename(deep / "B.PNG")
    (folder / "pictures" / "2.png").rename(folder / "pictures" / "odd [2] name.png")
    (folder / "pictures" / "notes.txt").write_text("not a picture")
    (folder / "link").symlink_to("pictures")
    (folder / "pictures" / "deep" / "up").symlink_to("../..")
    names = ["0.png", "3.png", "4.png", "5.png", "6.png", "7.png", "8.png", "odd [2] name.png"]
    inside = [f"pictures/{name}" for name in names]
    found = predict.find_images
    assert found(["pictures"]) == ([*inside, "pictures/deep/er/B.PNG"], [])
    assert found(["pictures/3.png", "pictures"])[0] == [
        "pictures/3.png",
        *inside[:1],
        *inside[2:],
        inside[0][:9] + "deep/er/B.PNG",
    ]
    assert found(["pictures/odd [2] name.png"]) == (["pictures/odd [2] name.png"], [])
    assert found(["pictures/[0-4].png"]) == ([f"pictures/{i}.png" for i in (0, 3, 4)], [])
    assert found(["pictures/deep/er/*"])[0] == ["pictures/deep/er/B.PNG"]
    assert len(found(["link"])[0]) == 9


@pytest.mark.skipif(sys.platform != "linux", reason="file names of any bytes")
def test_names_of_any_bytes_on_any_terminal(digits, folder, monkeypatch):
    """Control characters, bytes that are no UTF-8, an ASCII terminal, a comma: the file has the name exactly."""
    name = os.fsdecode(b'pictures/a\x1b[31m, "b"\xff\xc3\xa9.png')
    (folder / "pictures" / "5.png").rename(name)
    out, err = terminal(monkeypatch, "stdout"), terminal(monkeypatch, "stderr")
    assert predict.main([digits, name, os.fsdecode(b"gone\xff.png")]) == 0
    assert b"\x1b" not in written(out) + written(err)
    assert b"1 image, 1 could not be read: predictions.csv" in written(out)
    assert b"skipped gone\\xff.png: " in written(err)
    assert [row["path"] for row in rows("predictions.csv")] == [name]


@pytest.mark.parametrize("name", ["=1+1.png", "-1.png", "@a.png", "a\rb.png", "a\nb.png", "\r\n.png", ' a" .png'])
def test_the_path_in_the_file_is_the_path_given(digits, folder, name, capsys):
    """Also where a spreadsheet would take it for a formula: what reads the file must find the image."""
    (folder / "pictures" / "5.png").rename(folder / name)
    assert predict.main([digits, "--", name]) == 0
    assert [row["path"] for row in rows("predictions.csv")] == [name]
    assert capsys.readouterr().out.splitlines()[-1] == "1 image: predictions.csv"


def test_only_its_own_files_are_replaced(digits, folder, capsys):
    def code(*flags):
        try:
            return predict.main([digits, "pictures/0.png", *flags])
        except SystemExit as end:
            return end.code

    assert code() == code() == 0
    Path("mine.csv").write_text("path,class\na,b\n")
    Path("mine.json").write_text("{}")
    assert code("--output", "mine.csv") == 2
    assert "mine.csv: is there already" in capsys.readouterr().err
    assert code("--output", "mine.json", "--format", "json") == 2
    assert code("--output", "predictions.csv", "--format", "json") == 2
    assert code("--output", "pictures") == 2
    assert code("--output", "absent/out.csv") == 2
    assert Path("mine.csv").read_text() == "path,class\na,b\n"
    assert Path("mine.json").read_text() == "{}"
    Path("link.csv").symlink_to("predictions.csv")
    before = Path("predictions.csv").read_bytes()
    assert code("--output", "link.csv", "--top-k", "1") == 0
    assert Path("predictions.csv").read_bytes() == before  # the link was replaced, not what it points at
    assert rows("link.csv")[0].keys() == {"path", "class_1", "probability_1"}


def test_the_table_shows_the_best_classes_of_the_first_images(digits, folder, capsys):
    for i in range(20):
        Image.new("L", (8, 8), 12 * i).save(f"pictures/more {i:02}.png")
    assert predict.main([digits, "pictures"]) == 0
    *shown, rest, last = capsys.readouterr().out.splitlines()
    found = rows("predictions.csv")
    assert len(shown) == 20
    assert rest == "... and 9 more"
    assert last == "29 images: predictions.csv"
    for line, row in zip(shown, found, strict=False):
        assert line.startswith(row["path"])
        assert f"{row['class_1']} {float(row['probability_1']):.1%}" in line


def test_stdout_takes_the_file_alone(digits, folder, monkeypatch):
    out, err = terminal(monkeypatch, "stdout"), terminal(monkeypatch, "stderr")
    assert predict.main([digits, "pictures", "--output", "-"]) == 0
    printed = written(out)
    assert written(err) == b""
    assert predict.main([digits, "pictures"]) == 0
    assert printed == Path("predictions.csv").read_bytes()


def test_a_reader_that_stops_reading_is_no_error(digits, folder, monkeypatch):
    """As in `tools.predict ... | head`."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        err = terminal(monkeypatch, "stderr")
        assert predict.main([digits, "pictures", "--output", "-"]) == 0
        assert predict.main([digits, "pictures"]) == 0
    assert written(err) == b""
    assert len(rows("predictions.csv")) == 9


def test_outputs_that_are_not_finite_end_it(folder, network, capsys):
    broken = ResNet26(10, small_images=True)
    broken.load_state_dict(network.state_dict())
    broken.fc.bias.data[3] = float("nan")
    best = save(folder, broken, "DIGITS", img_size=8)
    assert predict.main([best, "pictures"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "NaN or infinity for pictures/0.png" in line
    assert not Path("predictions.csv").exists()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--eval-size", "7"], "--eval-size 7"),
        (["--eval-crop", "1.5"], "--eval-crop 1.5"),
        (["--eval-interpolation", "nearest"], "--eval-interpolation nearest"),
        (["--amp", "fp8"], "--amp fp8"),
        (["--amp", ""], "--amp: must not be empty"),
        (["--eval-size", ""], "--eval-size: must not be empty"),
        (["--output", ""], "--output: must not be empty"),
        (["--top-k", "0"], "--top-k"),
        (["--batch-size", "0"], "--batch-size"),
        (["--num-workers", "-1"], "--num-workers"),
        (["--device", "cuda:99"], "--device cuda:99"),
    ],
)
def test_a_wrong_value_is_named_in_one_line(digits, folder, flags, named, capsys):
    with pytest.raises(SystemExit) as end:
        predict.main([digits, "pictures", *flags])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line
