"""Detection runs as a whole: files, figures, resume, start from a classification network, and what is refused."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import small_runs
import train
from model import build
from sasa.detection import digits, run
from sasa.detection import train as detection
from sasa.detection.coco import read_split
from sasa.detection.config import ABOUT, PROG, DetectionConfig, resolve
from sasa.training import checkpoint
from sasa.training.cli import parse_command_line
from sasa.training.files import read_config
from sasa.training.signals import STOP_SIGNALS

ROOT = Path(detection.__file__).resolve().parents[2]
pytest.importorskip("pycocotools", reason="pycocotools is not installed: no detection run without its evaluator")

FLAGS = "--epochs 2 --batch-size 4 --accumulate 2 --img-size 64 --anchor-size 8 --fpn-channels 16 --kernel-size 3 "
FLAGS += "--heads attention --ema 0.9 --num-workers 0 --no-progress --save-minutes 0 --name run --device cpu"


@pytest.fixture(autouse=True)
def few(monkeypatch, tmp_path):
    """20 training and 6 validation canvases: epochs of 2 steps."""
    monkeypatch.setattr(digits, "COUNTS", {"train": 20, "val": 6})
    monkeypatch.setattr(digits, "ABOUT", digits.ABOUT | {"canvases": digits.COUNTS})
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # it guards against a power cut, elsewhere tested
    digits.make(tmp_path / "data")


def started(folder: Path, *flags: str, data: Path | None = None) -> int:
    """The command in this process; its exit code. Signal handlers are put back."""
    torch.set_num_threads(1)
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    base = ["--data-dir", str(data or folder.parent / "data"), "--output-dir", str(folder)]
    try:
        return train.main(
            parse_command_line([*base, *FLAGS.split(), *flags], DetectionConfig, PROG, ABOUT),
            task=detection.DETECTION,
        )
    except SystemExit as error:
        return error.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_a_run_s_files_and_figures(tmp_path, capsys):
    assert started(tmp_path / "a") == 0
    printed, folder = capsys.readouterr().out, tmp_path / "a" / "run"
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    assert [row["epoch"] for row in rows] == [1, 2] and [row["step"] for row in rows] == [2, 4]
    assert all(0 < row["train_box_loss"] < row["train_loss"] for row in rows)
    assert summary["val_map_pct"] == rows[-1]["val_map_pct"] and summary["val_images"] == 6
    assert "val mAP" in printed.splitlines()[-1] and "20 images" in printed and "6 images" in printed
    assert Image.open(folder / "detections.png").size[0] > 1000  # 4 canvases in a row, enlarged
    events = b"".join(path.read_bytes() for path in folder.glob("events.*"))
    for tag in (b"1_validation/map_pct", b"2_training/box_loss", b"5_images/first_batch", b"5_images/detections"):
        assert tag in events, tag
    config, run_id, _ = read_config(folder)
    assert len(run_id) == 16 and DetectionConfig.from_dict(config).fpn_channels == 16


def test_changed_annotations_are_refused_by_the_image_s_name(tmp_path, capsys):
    """And each epoch's state is on the disk before its validation begins."""
    found, original = [], detection.evaluate

    def evaluate(*arguments):
        found.append(torch.load(tmp_path / "a/run/last.pt", weights_only=True)["progress"]["step"])
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detection, "evaluate", evaluate)
        assert started(tmp_path / "a") == 0
    assert found == [2, 4]
    file = tmp_path / "data" / digits.FOLDER / "annotations" / "instances_train2017.json"
    document = json.loads(file.read_text())
    document["annotations"][0]["bbox"][2] -= 1
    name = {image["id"]: image["file_name"] for image in document["images"]}[document["annotations"][0]["image_id"]]
    file.write_text(json.dumps(document))
    capsys.readouterr()
    assert started(tmp_path / "a", "--resume") == 2
    error = capsys.readouterr().err
    assert f"changed: train2017/{name} (boxes of checksum " in error and error.count("\n") == 1


@pytest.mark.parametrize("step", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_is_stopped_and_resumed_is_bitwise_the_straight_one(tmp_path, monkeypatch, step):
    assert started(tmp_path / "straight") == 0
    with monkeypatch.context() as patch:
        original = train.train_step

        def stopping(run, *more):
            if run.progress.step == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(run, *more)

        patch.setattr(train, "train_step", stopping)
        assert started(tmp_path / "cut") == 75
    small_runs.scramble_generators()
    assert started(tmp_path / "cut", "--resume") == 0
    states = [small_runs.state_without_times(tmp_path / name / "run") for name in ("straight", "cut")]
    assert small_runs.differences(*states) == []
    assert small_runs.log_rows(tmp_path / "straight" / "run") == small_runs.log_rows(tmp_path / "cut" / "run")


def test_another_jitter_would_be_seen_and_bf16_is_close(tmp_path):
    """The comparison's negative control; and mixed precision, whose loss differs by rounding only."""
    for name, flags in (("a", ()), ("b", ("--jitter-low", "0.9")), ("c", ("--amp", "bf16"))):
        assert started(tmp_path / name, "--max-steps", "1", "--img-size", "96", *flags) == 0
    states = [small_runs.state_without_times(tmp_path / name / "run") for name in ("a", "b")]
    assert any(".model." in line for line in small_runs.differences(*states))
    losses = [small_runs.log_rows(tmp_path / name / "run")[0]["train_loss"] for name in ("a", "c")]
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.02)


def test_bf16_is_refused_where_its_gradient_would_be_garbage(tmp_path, capsys):
    """P6 of a canvas of 64 pixels is one pixel wide, and P7 a strided convolution of it."""
    assert started(tmp_path / "a", "--amp", "bf16") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--amp bf16" in error and "extra_blocks.p7" in error


def test_a_resume_with_another_setting_is_refused_by_its_flag(tmp_path, capsys):
    assert started(tmp_path / "a", "--max-steps", "1") == 0
    capsys.readouterr()
    assert started(tmp_path / "a", "--resume", "--lr", "0.5") == 2
    error = capsys.readouterr().err
    assert "--lr was" in error and error.count("\n") == 1


def test_evaluate_prints_the_summary_s_figures(tmp_path, capsys):
    assert started(tmp_path / "a", "--max-steps", "2") == 0
    summary = json.loads((tmp_path / "a" / "run" / "summary.json").read_text())
    capsys.readouterr()
    arguments = ["--data-dir", str(tmp_path / "data"), "--num-workers", "0", "--device", "cpu"]
    for name in ("best.pt", "last.pt"):
        path = str(tmp_path / "a" / "run" / name)
        command = parse_command_line([*arguments, "--evaluate", path], DetectionConfig, PROG, ABOUT)
        assert train.main(command, task=detection.DETECTION) == 0
        printed = capsys.readouterr().out
        for key in ("map", "map_50", "recall_100"):
            value = summary[f"val_{key}_pct"]
            assert f"{key:14}{value:6.2f}%" in " ".join(printed.split("\n  ")), key


def test_evaluate_compares_categories_by_their_names(tmp_path, capsys):
    """The validation set's categories are renumbered: the same score; another name: refused."""
    assert started(tmp_path / "a", "--max-steps", "2") == 0
    path = tmp_path / "data" / digits.FOLDER / "annotations" / "instances_{}2017.json"
    for split in ("train", "val"):
        file = Path(str(path).format(split))
        document = json.loads(file.read_text())
        for record in (*document["categories"], *document["annotations"]):
            key = "id" if "name" in record else "category_id"
            record[key] = 11 - record[key]  # 1..10: in reverse
        file.write_text(json.dumps(document))
    arguments = f"--data-dir {tmp_path / 'data'} --num-workers 0 --device cpu --evaluate {tmp_path / 'a/run/best.pt'}"
    command = parse_command_line(arguments.split(), DetectionConfig, PROG, ABOUT)
    summary = json.loads((tmp_path / "a" / "run" / "summary.json").read_text())
    capsys.readouterr()
    assert train.main(command, task=detection.DETECTION) == 0
    printed = capsys.readouterr().out
    assert "compared by their names" in printed
    assert f"recall_100    {summary['val_recall_100_pct']:6.2f}%" in printed
    for split in ("train", "val"):
        file = Path(str(path).format(split))
        file.write_text(file.read_text().replace('"name": "3"', '"name": "three"'))
    assert train.main(command, task=detection.DETECTION) == 2
    error = capsys.readouterr().err
    assert "other classes" in error and error.count("\n") == 1


def classification_checkpoint(path: Path, network):
    from config import resolve as resolve_classification

    config = resolve_classification({"img_size": 64}, "DIGITS")
    weights = network.state_dict()
    identity = small_runs.identity("DIGITS", len(weights["fc.weight"]))
    checkpoint.save(checkpoint.weights_state(config, identity, weights, 1, 1, "test"), path.parent, path.name)


def test_a_classification_network_s_weights_go_into_the_backbone(tmp_path, capsys):
    network = build("ResNet26", 10, kernel_size=3)
    classification_checkpoint(tmp_path / "best.pt", network)
    kept = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            train, "train", lambda run, *_: kept.update({k: v.clone() for k, v in run.model.state_dict().items()}) or 0
        )
        assert started(tmp_path / "a", "--init-from", str(tmp_path / "best.pt")) == 0
    printed = capsys.readouterr().out
    for name, value in network.state_dict().items():
        if not name.startswith("fc."):
            assert torch.equal(kept[f"backbone.body.{name}"], value), name
    assert "backbone.body.fc.weight: not in this network, left" in printed
    assert "head.regression_head.bbox_reg.1.weight: not in the checkpoint, stays new" in printed
    assert "backbone.body.layer1.0.conv1.weight" not in printed  # taken as it is


def test_a_run_of_other_weights_that_was_never_saved_never_begins_with_new_ones(tmp_path, capsys, monkeypatch):
    class Killed(BaseException):
        pass

    network = build("ResNet26", 10, kernel_size=3)
    classification_checkpoint(tmp_path / "best.pt", network)
    flags, kept = ["--init-from", str(tmp_path / "best.pt")], {}

    def end(run, *_):
        kept.update({name: value.clone() for name, value in run.model.state_dict().items()})
        raise Killed

    monkeypatch.setattr(train, "train_epochs", end)
    with pytest.raises(Killed):
        started(tmp_path / "a", *flags)
    kept.clear()
    capsys.readouterr()
    assert started(tmp_path / "a", "--resume") == 2 and kept == {}
    error = capsys.readouterr().err
    assert "--init-from" in error and "give it again" in error and error.count("\n") == 1
    with pytest.raises(Killed):
        started(tmp_path / "a", "--resume", *flags)
    assert torch.equal(kept["backbone.body.layer1.0.conv1.weight"], network.state_dict()["layer1.0.conv1.weight"])


def test_a_classification_networks_checkpoint_is_called_one(tmp_path, capsys):
    assert started(tmp_path / "a", "--max-steps", "1") == 0
    path = tmp_path / "a/run/last.pt"
    state = torch.load(path, weights_only=True)
    del state["config"]["anchor_scales"]
    torch.save(state, path)
    for flags in (["--resume"], ["--evaluate", str(path)]):
        capsys.readouterr()
        assert started(tmp_path / "a", *flags) == 2
        error = capsys.readouterr().err
        assert f"{path}: belongs to a classification network" in error and error.count("\n") == 1


def test_names_of_a_detector_stay():
    weights = {"backbone.body.stem.0.weight": torch.ones(1), "head.x": torch.ones(1)}
    assert run.initial_weights(weights) is weights
    assert list(run.initial_weights({"fc.weight": 1})) == ["backbone.body.fc.weight"]


def test_the_canvases_statistics():
    """Of 200 training canvases, a tenth of the set: close to the rounded figures of all."""
    from preprocess import load

    _, source, _, _ = load(dataset="DIGITS")
    drawn = [
        digits.draw_canvas(
            source.images,
            source.labels,
            np.random.default_rng(np.random.SeedSequence(digits.SEED, spawn_key=(0, i))),
        ).pixels
        for i in range(200)
    ]
    pixels = np.stack(drawn) / 255
    (mean, *_), (std, *_) = run.STATS["DIGITS"]
    assert pixels.mean() == pytest.approx(mean, abs=0.006) and pixels.std() == pytest.approx(std, abs=0.008)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--heads linear", "--heads linear: allowed are conv, attention"),
        ("--fpn-channels 20", "--fpn-channels 20"),
        ("--jitter-low 2", "--jitter-low 2: must be at most --jitter-high 1"),
        ("--lr 0.001 --min-lr 0.5", "--min-lr 0.5: must be at most --lr 0.001"),
        ("--momentum 0.5", "--momentum 0.5: needs --optimizer sgd"),
        ("--optimizer sgd --adam-beta1 0.5", "--adam-beta1 0.5: needs --optimizer adamw\n"),
        ("--warmup-epochs 9", "--warmup-epochs 9: must be below --epochs"),
        ("--position none --no-content", "--no-content leaves no logits"),
        ("--save-every 0 --save-minutes 0", "would never save"),
        ("--img-size 32 --batch-size 1", "--batch-size 1: batch norm needs 2 images"),
        ("--batch-size 30 --accumulate 30", "too few"),
        ("--dataset COCO", "instances_train2017.json: No such file"),
        ("--init-from nowhere.pt", "nowhere.pt: no such file"),
        ("--frozen-parts 6", "--frozen-parts 6: must be at most 5"),
        ("--model-name NaiveResNet26 --attention-stages 1", "convolution network"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(tmp_path, capsys, flags, message):
    (tmp_path / "empty").mkdir()
    where = tmp_path / "empty" if "COCO" in flags else None
    assert started(tmp_path / "a", *flags.split(), data=where) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "sasa.detection.train: error:" in error


def test_a_backend_of_the_environment_that_is_unknown_is_one_line_and_exit_2(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SASA_BACKEND", "nothing")
    assert started(tmp_path / "a") == 2
    error = capsys.readouterr().err
    assert "SASA_BACKEND" in error and "'nothing'" in error and error.count("\n") == 1


def damage_json(folder):
    path = folder / "annotations" / "instances_train2017.json"
    path.write_text(path.read_text()[:-100])


def remove_image(folder):
    (folder / "train2017" / "000000000003.png").unlink()


def other_size(folder):
    for i in range(1, 21):
        Image.new("L", (64, 128)).save(folder / "train2017" / f"{i:012}.png")


def broken_image(folder):
    for i in range(1, 21):
        (folder / "train2017" / f"{i:012}.png").write_bytes(b"\x89PNG no")


def other_categories(folder):
    path = folder / "annotations" / "instances_val2017.json"
    path.write_text(path.read_text().replace('"name": "3"', '"name": "three"'))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_json, "truncated or not JSON"), (remove_image, "1 of 20 images are missing"),
        (other_size, "64x128 pixels, 128x128 in the annotations"), (broken_image, "cannot read image"),
        (other_categories, "different categories"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("workers", ["0", "2"])
def test_wrong_data_is_one_line_and_exit_2(tmp_path, capsys, damage, message, workers):
    if workers == "2" and damage not in (other_size, broken_image):
        pytest.skip("found before any image is read")
    damage(digits.make(tmp_path / "data"))
    assert started(tmp_path / "a", "--num-workers", workers) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "a" / "run" / "config.json").exists()  # no run was begun


def test_a_coco_folder_with_crowds_gaps_and_empty_images_trains(tmp_path):
    """The digits' folder as a COCO one, with ids from 3 in steps of 7, a crowd, a flat box and an image without any."""
    folder = digits.make(tmp_path / "data")
    for name in ("train", "val"):
        path = folder / "annotations" / f"instances_{name}2017.json"
        document = json.loads(path.read_text())
        for record in (*document["categories"], *document["annotations"]):
            key = "id" if "name" in record else "category_id"
            record[key] = 3 + 7 * record[key]
        document["annotations"] = [a for a in document["annotations"] if a["image_id"] != 1]
        document["annotations"][0]["iscrowd"] = 1
        document["annotations"][1]["bbox"][2] = 0
        path.write_text(json.dumps(document))
    split = read_split(folder, "train2017")
    assert split.crowds == 1 and split.empty == 1 and len(split.targets(0)[0]) == 0
    flags = "--dataset COCO --flip --jitter-low 0.5 --jitter-high 1.5 --optimizer sgd --lr 0.001 --max-steps 2"
    assert started(tmp_path / "a", *flags.split(), data=folder) == 0


def test_without_pycocotools_the_command_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools.cocoeval", None)
    for flags in ([], ["--evaluate", "x.pt"]):
        command = parse_command_line(["--output-dir", str(tmp_path), *flags], DetectionConfig, PROG, ABOUT)
        try:
            code = train.main(command, task=detection.DETECTION)
        except SystemExit as error:
            code = error.code
        error = capsys.readouterr().err
        assert code == 2 and error.endswith("pip install pycocotools\n") and error.count("\n") == 1


def test_help_answers_without_torch():
    code = "import sys; sys.argv[1:] = ['--help']\nimport runpy\ntry:\n    runpy.run_module('sasa.detection.train', "
    code += "run_name='__main__')\nexcept SystemExit:\n    assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--fpn-channels" in done.stdout and done.stderr == ""


def test_recipes_are_complete_and_their_rate_follows_the_batch():
    for dataset in ("DIGITS", "COCO"):
        config = resolve({}, dataset)
        assert None not in [getattr(config, key) for key in config.recipe_values()]
        larger = resolve({"batch_size": 4 * config.batch_size}, dataset)
        assert larger.lr == pytest.approx(config.lr * (4 if config.optimizer == "sgd" else 2))
    assert resolve({"lr": 0.3, "batch_size": 64}, "COCO").lr == 0.3
