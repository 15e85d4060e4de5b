"""Checkpoints of format 2, written here as that version wrote them: they are evaluated and drawn, never resumed."""

import json

import pytest
import torch

import model
import small_runs
from config import FIELDS, Config
from sasa.settings import renamed
from sasa.training import checkpoint, format2
from sasa.training.checkpoint import CheckpointError
from sasa.training.network import network_of
from tiny_runs import BASE, Tiny, evaluated, go
from tools import visualize

# config.json of a format 2 run of `train.py --model-name ResNet26 --kernel-size 3 --dataset DIGITS`.
CONFIG = json.loads("""{
  "model_name": "ResNet26", "stem": false, "form": "small", "attention_stages": null, "kernel_size": 3, "num_heads": 8,
  "position": "relative", "content": true, "border": "mask", "scale": 1.0, "grouped": false, "share_embeddings": false,
  "embedding_std": null, "stem_window": "auto", "stem_values": "mixture", "stem_mixtures": 4,
  "zero_init_residual": true, "backend": "auto", "dataset": "DIGITS", "data_dir": "datasets", "img_size": 8,
  "train_images": null, "holdout": 0.0, "skip_bad_images": false, "num_workers": 4, "recipe": "default", "epochs": 12,
  "batch_size": 32, "accumulate": 1, "optimizer": "adamw", "lr": 0.001, "momentum": 0.9, "weight_decay": 0.05,
  "embedding_weight_decay": 0.0, "warmup_epochs": 2.0, "label_smoothing": 0.1, "sync_bn": false, "clip_grad": 1.0,
  "ema": 0.98, "mixup": 0.0, "cutmix": 0.0, "randaugment": false, "seed": 0, "device": "auto", "amp": "off",
  "compile": false, "channels_last": true, "deterministic": false, "output_dir": "runs", "name": "run",
  "save_every": 1, "save_minutes": 10.0, "progress": true, "attention_every": 5, "max_steps": null
}""")


def write(path, network, kind="weights"):
    """A file of format 2: no data set's identity, no run id, the shorter configuration."""
    state = {"format": 2, "kind": kind, "torch": "2.8.0", "config": CONFIG, "model": network.state_dict()}
    if kind == "weights":
        state |= {"epoch": 12, "step": 528, "selected": "the last epoch"}
    else:
        progress = checkpoint.dataclasses.asdict(
            checkpoint.Progress(global_batch=32, step=3, batch=3, images=96, epoch_seconds=1.0)
        )
        del progress["figures"], progress["data_changes"]
        state |= {"optimizer": {}, "scaler": None, "ema": None, "best": None, "progress": progress}
        state["generators"] = [checkpoint.generator_states(torch.device("cpu"))]
    torch.save(state, path)
    return path


def test_the_configuration_is_completed_by_what_that_version_did():
    config = Config.from_dict(format2.complete(CONFIG))
    assert config.to_dict().keys() == FIELDS.keys() and renamed(CONFIG).items() <= config.to_dict().items()
    assert (config.schedule, config.nesterov, config.bn_momentum) == ("cosine", True, 0.1)
    assert (config.rotate, config.translate, config.zoom, config.pad, config.flip) == (10.0, 0.1, 0.1, 0, False)
    assert (config.eval_crop, config.eval_interpolation, config.lr_scaling) == (1.0, "bilinear", "sqrt")


@pytest.mark.parametrize(("given", "wanted"), [
    ({"recipe": "seed"}, {"recipe": "port", "schedule": "step", "nesterov": False, "pad": 1, "flip": False,
                          "rotate": 0.0, "lr_scaling": "none"}),
    ({"recipe": "paper", "dataset": "IMAGENET", "img_size": 224},
     {"bn_momentum": 1e-4, "schedule": "cosine", "pad": 0, "flip": True, "eval_crop": 0.875, "lr_scaling": "linear"}),
    ({"dataset": "CIFAR10", "img_size": 64}, {"pad": 8, "cutout": 16, "flip": True, "rotate": 0.0}),
    ({"dataset": "FashionMNIST", "img_size": 28}, {"pad": 2, "cutout": 0, "flip": True}),
])  # fmt: skip
def test_the_frozen_table(given, wanted):
    config = Config.from_dict(format2.complete(CONFIG | given)).to_dict()
    assert wanted.items() <= config.items()


def test_it_does_not_follow_todays_recipes(monkeypatch):
    import config

    before = format2.complete(CONFIG)
    edited = {**config.RECIPES["default"], "DIGITS": config.RECIPES["default"]["DIGITS"] | {"schedule": "step"}}
    monkeypatch.setitem(config.RECIPES, "default", edited)
    assert format2.complete(CONFIG) == before


def test_it_is_evaluated_and_says_that_classes_have_numbers_only(tmp_path, tiny, capsys):
    folder = go(tmp_path)
    network = Tiny(10)
    network.load_state_dict(torch.load(folder / "best.pt", weights_only=True)["model"])
    old = write(tmp_path / "old.pt", network)
    assert evaluated(capsys, old) == evaluated(capsys, folder / "best.pt")
    assert small_runs.run(tmp_path, "--evaluate", str(old)) == 0
    assert "format 2 holds no class names" in capsys.readouterr().out


def test_a_run_starts_from_its_weights(tmp_path, tiny, capsys):
    old = write(tmp_path / "old.pt", Tiny(10), "run")
    go(tmp_path, f"--init-from {old} --max-steps 1")
    assert "0 exceptions" in capsys.readouterr().out


def test_no_run_goes_on_from_it(tmp_path, tiny, capsys):
    (tmp_path / "run").mkdir()
    old = write(tmp_path / "run" / "last.pt", Tiny(10), "run")
    for flags in (["--resume"], ["--resume", str(old)]):
        assert small_runs.run(tmp_path, *BASE.split(), *flags) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "format 2" in error and "--init-from" in error


def test_it_is_looked_at(tmp_path, small_network):
    network = model.build("ResNet26", 10, small_images=True, kernel_size=3)
    old = write(tmp_path / "old.pt", network)
    trained = network_of(checkpoint.load(old))
    assert trained.info.class_names[:2] == ("class 0", "class 1") and trained.config.kernel_size == 3
    assert visualize.main([str(old), "--device", "cpu", "--no-effects", "--probe-images", "0"]) == 0
    assert (tmp_path / "attention" / "attention.html").exists()


def test_what_is_no_configuration_of_format_2_is_refused(tmp_path):
    path = write(tmp_path / "old.pt", Tiny(10))
    state = torch.load(path, weights_only=True)
    del state["config"]["recipe"]
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"old\.pt"):
        checkpoint.load(path)
