"""The command line: every flag's type, spelling and bounds, what comes from the recipe, and what is refused."""

import json
import math
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest

import config
import model
import preprocess
from config import FIELDS, IN_RECIPE, Config, ConfigError, recipe, refuse_idle_flags, resolve
from sasa import settings
from sasa.training.cli import parse_command_line

ROOT = Path(__file__).resolve().parents[1]

# A value of each flag that takes one, as typed, and as the Config holds it.
TYPED = {
    "model_name": ("nAIVEresnet38", "NaiveResNet38"), "form": ("IMAGENET", "imagenet"), "kernel_size": ("5", 5),
    "num_heads": ("4", 4), "position": ("Absolute", "absolute"), "border": ("ZERO", "zero"), "scale": ("0.5", 0.5),
    "embedding_std": ("0.1", 0.1), "stem_window": ("Block", "block"), "stem_values": ("PLAIN", "plain"),
    "stem_mixtures": ("2", 2), "backend": ("reference", "reference"), "dataset": ("fashionmnist", "FashionMNIST"),
    "data_dir": ("some/Folder", "some/Folder"), "img_size": ("16", 16), "holdout": ("0.25", 0.25),
    "train_images": ("10000", 10000), "eval_size": ("20", 20), "eval_crop": ("0.9", 0.9),
    "eval_interpolation": ("BICUBIC", "bicubic"), "pad": ("3", 3), "rotate": ("15", 15.0), "translate": ("0.2", 0.2),
    "zoom": (".3", 0.3), "cutout": ("6", 6), "schedule": ("STEP", "step"), "lr_scaling": ("Linear", "linear"),
    "lr_batch": ("100", 100), "bn_momentum": ("0.01", 0.01),
    "num_workers": ("0", 0), "worker_timeout": ("30", 30.0), "index_dir": ("some/Indexes", "some/Indexes"),
    "recipe": ("Paper", "paper"), "epochs": ("7", 7), "batch_size": ("9", 9),
    "accumulate": ("2", 2), "optimizer": ("AdamW", "adamw"), "lr": ("1e-3", 0.001), "momentum": ("0.8", 0.8),
    "weight_decay": ("0", 0.0), "embedding_weight_decay": ("1e-2", 0.01), "warmup_epochs": ("0.5", 0.5),
    "label_smoothing": ("0.1", 0.1), "clip_grad": ("1", 1.0), "ema": ("0.99", 0.99), "mixup": (".2", 0.2),
    "cutmix": ("1", 1.0), "seed": ("3", 3), "device": ("cuda:1", "cuda:1"), "amp": ("BF16", "bf16"),
    "output_dir": ("out", "out"), "name": ("A", "A"), "save_every": ("0", 0), "save_minutes": ("0.5", 0.5),
    "step_epochs": ("20", 20), "step_factor": (".2", 0.2), "adam_beta1": ("0.8", 0.8), "adam_beta2": ("0.95", 0.95),
    "adam_eps": ("1e-6", 1e-6), "rand_rounds": ("3", 3), "rand_magnitude": ("12", 12), "crop_area": ("0.25", 0.25),
    "crop_aspect": ("2", 2.0), "attention_every": ("3", 3),
    "compile_mode": ("Max-Autotune", "max-autotune"), "matmul_precision": ("HIGH", "high"), "max_steps": ("10", 10),
    "auto_augment": ("Trivial", "trivial"), "random_erase": (".25", 0.25), "repeats": ("3", 3), "loss": ("BCE", "bce"),
    "drop_path": ("0.1", 0.1), "bce_threshold": ("0", 0.0), "class_weights": ("some/File", "some/File"),
    "min_lr": ("1e-5", 1e-5), "keep_states": ("4", 4),
    "val_every": ("2", 2), "early_stop": ("5", 5), "layer_decay": ("0.75", 0.75),
}  # fmt: skip
SWITCHES = {
    "stem": True, "content": False, "grouped": True, "share_embeddings": True, "zero_init_residual": True,
    "skip_bad_images": True, "compile": True, "channels_last": False, "deterministic": True,
    "progress": False, "sync_bn": True, "flip": True, "reflect": True, "nesterov": False,
    "preview": True, "digest": False, "log_csv": True, "cudnn_benchmark": False,
}  # fmt: skip


def refused(capsys, *flags: str) -> str:
    """The one line that a wrong command line ends with."""
    with pytest.raises(SystemExit) as end:
        parse_command_line(list(flags))
    out, error = capsys.readouterr()
    assert end.value.code == 2
    assert out == "" and error.count("\n") == 1 and error.startswith("train.py: error: "), error
    return error


@pytest.mark.parametrize("name", TYPED)
def test_a_flags_value_gets_its_type_and_spelling(name):
    text, value = TYPED[name]
    given = parse_command_line(["--" + name.replace("_", "-"), text]).given
    assert given == {name: value} and type(given[name]) is type(value)


def test_a_switch_of_the_recipe_may_be_turned_either_way():
    assert resolve({}, "DIGITS").zero_init_residual and not resolve({"recipe": "paper"}, "DIGITS").zero_init_residual
    for flag, value in (("--zero-init-residual", True), ("--no-zero-init-residual", False)):
        assert resolve(parse_command_line([flag]).given, "DIGITS").zero_init_residual is value


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_may_be_turned_either_way(name):
    flag = name.replace("_", "-")
    assert parse_command_line([f"--{flag}"]).given == {name: True}
    assert parse_command_line([f"--no-{flag}"]).given == {name: False}
    assert FIELDS[name].default is not SWITCHES[name]


def test_randaugment_is_an_alias(capsys):
    assert parse_command_line(["--randaugment"]).given == {"auto_augment": "rand"}
    assert parse_command_line(["--no-randaugment"]).given == {"auto_augment": "none"}
    assert parse_command_line(["--auto-augment", "auto", "--randaugment"]).given == {"auto_augment": "rand"}
    with pytest.raises(SystemExit):
        parse_command_line(["--help"])
    assert "the same as --auto-augment rand" in capsys.readouterr().out


@pytest.mark.parametrize(("flags", "words"), [
    ("--min-lr 0.5 --lr 0.1", "--min-lr 0.5: must be at most --lr 0.1"),
    ("--repeats 5 --batch-size 8", "--repeats 5: must be at most half of --batch-size 8"),
    ("--early-stop 3", "--early-stop 3: needs --holdout"),
])  # fmt: skip
def test_regularisation_that_does_not_go_together_is_refused(flags, words):
    with pytest.raises(ConfigError, match=words):
        resolve(parse_command_line(flags.split()).given, "DIGITS")


@pytest.mark.parametrize(("flags", "words"), [
    ("--drop-path 1", "--drop-path 1.0: must be below 1"),
    ("--random-erase 1.5", "--random-erase 1.5: must be at most 1"),
    ("--layer-decay 0", "--layer-decay 0.0: must be above 0"),
    ("--auto-augment best", "--auto-augment best: allowed are none, rand, trivial, auto"),
])  # fmt: skip
def test_regularisation_out_of_its_bounds_is_refused(capsys, flags, words):
    assert words in refused(capsys, *flags.split())


def test_a_configuration_from_before_these_fields_is_what_that_code_did():
    now = resolve({"auto_augment": "rand"}, "DIGITS").to_dict()
    younger = ("random_erase", "repeats", "drop_path", "loss", "bce_threshold", "class_weights", "min_lr",
               "layer_decay")  # fmt: skip
    before = {key: value for key, value in now.items() if key not in (*younger, "auto_augment")} | {"randaugment": True}
    assert Config.from_dict(before).to_dict() == now
    assert Config.from_dict(before | {"randaugment": False}).auto_augment == "none"
    assert before["randaugment"] is True  # left as it is


def test_every_field_is_tried_above():
    assert TYPED.keys() | SWITCHES.keys() | {"attention_stages"} == FIELDS.keys()


def test_every_default_and_every_recipes_value_is_allowed_and_of_the_flags_own_type():
    """Numbers as the command line would make them: 10.0, not 10, for a float."""
    for name in config.RECIPES:
        for dataset in config.DATASETS:
            values = resolve({"recipe": name}, dataset).to_dict()
            for field, value in values.items():
                if value is not None and field != "attention_stages":
                    assert type(value) is FIELDS[field].metadata["kind"], (name, dataset, field, value)


def test_docs_list_what_each_recipe_sets():
    """docs/recipes.md, row by row; CIFAR100 is as CIFAR10, WEBDATASET as IMAGENET."""
    default, named = config.RECIPES["default"], ("DIGITS", "MNIST", "FashionMNIST", "CIFAR10", "IMAGENET", "FOLDER")
    assert default["CIFAR100"] == default["CIFAR10"] and default["WEBDATASET"] == default["IMAGENET"]
    columns = [default[name] for name in named]
    columns += [config.RECIPES[name][of] for name, of in (("port", "CIFAR10"), ("paper", "IMAGENET"),
                ("rsb", "IMAGENET"), ("rsb-a3", "IMAGENET"), ("strong", "CIFAR10"))]  # fmt: skip

    def shown(value) -> str:
        return ("off", "on")[value] if isinstance(value, bool) else value if isinstance(value, str) else f"{value:g}"

    rows = [" | ".join([f"| `{config.flag_of(key)}`", *(shown(of[key]) for of in columns)]) + " |" for key in IN_RECIPE]
    assert "\n".join(rows) in (ROOT / "docs" / "recipes.md").read_text()


def test_the_recipe_called_seed_is_the_ports():
    assert parse_command_line(["--recipe", "Seed"]).given == {"recipe": "port"}


@pytest.mark.parametrize(("text", "stages"), [("", ()), ("4 3 3", (3, 4)), ("1 2 3 4", (1, 2, 3, 4))])
def test_attention_stages(text, stages):
    assert parse_command_line(["--attention-stages", *text.split()]).given == {"attention_stages": stages}


def test_the_commands_that_are_not_fields():
    command = parse_command_line([])
    assert (command.given, command.resume, command.evaluate, command.init_from) == ({}, None, None, None)
    assert parse_command_line(["--resume"]).resume == "" and parse_command_line(["--resume", "x.pt"]).resume == "x.pt"
    assert parse_command_line(["--evaluate", "x.pt"]).evaluate == "x.pt"
    assert parse_command_line(["--init-from", "x.pt", "--overwrite"]).overwrite
    both = parse_command_line(["--init-from", "x.pt", "--resume"])
    assert (both.init_from, both.resume) == ("x.pt", "")


@pytest.mark.parametrize("flag", ["--resume", "--init-from", "--evaluate", "--name", "--data-dir", "--output-dir",
                                  "--class-weights", "--device"])  # fmt: skip
def test_an_empty_value_is_not_the_flags_absence(flag, capsys):
    """As a shell leaves of a variable that is not set: `--resume "$CKPT"` must not begin a new run."""
    with pytest.raises(SystemExit) as error:
        parse_command_line([flag, ""])
    assert error.value.code == 2 and f"{flag}: must not be empty" in capsys.readouterr().err


def test_a_stored_configuration_may_hold_what_the_command_line_refuses_now():
    """`--data-dir ""` was taken as the current folder."""
    stored = Config().to_dict() | {"data_dir": "", "output_dir": ""}
    assert Config.from_dict(stored).data_dir == ""
    with pytest.raises(ConfigError, match=r"--name .*must be the name of one folder"):
        Config(name="")


def test_a_leading_tilde_is_the_home_folder_where_the_shell_has_left_it(monkeypatch):
    monkeypatch.setenv("HOME", "/home/of/me")
    flags = ["--data-dir=~/x", "--output-dir=~", "--index-dir=~/i", "--class-weights=~/w.json", "--resume=~/last.pt"]
    command = parse_command_line(flags)
    assert command.resume == "/home/of/me/last.pt"
    assert command.given == {
        "data_dir": "/home/of/me/x", "output_dir": "/home/of/me", "index_dir": "/home/of/me/i",
        "class_weights": "/home/of/me/w.json",
    }  # fmt: skip
    assert parse_command_line(["--name=~x", "--data-dir=a/~"]).given == {"name": "~x", "data_dir": "a/~"}


# The flags that must stay.
CONTRACT = """
    --dataset --data-dir --epochs --batch-size --lr --weight-decay --momentum --label-smoothing --warmup-epochs
    --seed --recipe --model-name --kernel-size --num-heads --position --no-content --border --scale --grouped
    --share-embeddings --backend --attention-stages --stem --stem-window --stem-values --stem-mixtures
    --zero-init-residual --form --img-size --num-workers --holdout --skip-bad-images --optimizer --embedding-std
    --embedding-weight-decay --no-progress --amp --compile --channels-last --accumulate --clip-grad --ema
    --mixup --cutmix --randaugment --deterministic --output-dir --name --save-every --save-minutes --resume
    --init-from --evaluate --device --max-steps --overwrite
"""


def test_every_flag_of_the_contract_is_in_the_help(capsys):
    with pytest.raises(SystemExit) as end:
        parse_command_line(["--help"])
    assert end.value.code == 0
    told = capsys.readouterr().out
    assert [
        flag
        for flag in CONTRACT.split()
        if not any(f"{start}{flag}{end}" in told for start in ("  ", ", ") for end in " \n,")
    ] == []


@pytest.mark.parametrize(("flags", "words"), [
    ("--batch-size 0", "--batch-size 0 at least 1"),
    ("--batch-size -3", "--batch-size -3 at least 1"),
    ("--batch-size 2.5", "--batch-size 2.5 integer"),
    ("--batch-size " + "9" * 400, "--batch-size 2147483647"),
    ("--epochs 9999999999", "--epochs 9999999999 2147483647"),
    ("--epochs ten", "--epochs ten integer"),
    ("--lr 0", "--lr 0 above 0"),
    ("--lr nan", "--lr nan finite"),
    ("--lr inf", "--lr inf finite"),
    ("--lr fast", "--lr fast number"),
    ("--lr", "--lr expected one argument"),
    ("--label-smoothing 1.5", "--label-smoothing 1.5 at most 1"),
    ("--momentum -0.1", "--momentum -0.1 at least 0"),
    ("--weight-decay -1", "--weight-decay -1 at least 0"),
    ("--img-size 7", "--img-size 7 at least 8"),
    ("--kernel-size 0", "--kernel-size 0 at least 1"),
    ("--kernel-size 99999", "--kernel-size 99999 at most 1023"),
    ("--scale 0", "--scale 0 above 0"),
    ("--seed -1", "--seed -1 at least 0"),
    ("--seed 2147483648", "--seed 2147483648 at most 2147483647"),
    ("--max-steps 0", "--max-steps 0 at least 1"),
    ("--model-name ResNet27", "--model-name ResNet27 ResNet26 ResNet38 ResNet50 NaiveResNet26 NaiveResNet38"),
    ("--dataset SVHN", "--dataset SVHN auto DIGITS CIFAR10 CIFAR100 MNIST FashionMNIST IMAGENET FOLDER WEBDATASET"),
    ("--recipe mine", "--recipe mine default port paper"),
    ("--optimizer lion", "--optimizer lion sgd adamw"),
    ("--amp fp8", "--amp fp8 auto off bf16 fp16"),
    ("--attention-stages 0 1", "--attention-stages 0 1, 2, 3, 4"),
    ("--attention-stages x", "--attention-stages x integer"),
    ("--attention-stages 5", "--attention-stages 5 1, 2, 3, 4"),
    ("--learning-rate 1", "--learning-rate"),
    ("--batch 3", "--batch"),  # no abbreviations
    ("stray", "stray"),
    ("--stem yes", "yes"),
    ("--resume --overwrite", "--resume --overwrite"),
    ("--resume y.pt --init-from x.pt", "--resume --init-from"),
    ("--evaluate x.pt --resume", "--evaluate --resume"),
    ("--evaluate x.pt --overwrite", "--evaluate --overwrite"),
    ("--evaluate x.pt --allow-changed-data", "--evaluate --allow-changed-data"),
    ("--evaluate x.pt --max-steps 3", "--evaluate --max-steps"),
    ("--evaluate x.pt --keep-states 4", "--evaluate --keep-states"),
    ("--evaluate x.pt --preview --log-csv", "--evaluate --preview --log-csv"),
    ("--allow-changed-data", "--allow-changed-data --resume"),
])  # fmt: skip
def test_a_wrong_command_line_is_one_line_that_says_what_is_allowed(capsys, flags, words):
    error = refused(capsys, *flags.split())
    assert [word for word in words.split() if word not in error] == []
    assert len(error) < 250


@pytest.mark.parametrize(("given", "words"), [
    ({"warmup_epochs": 2.0, "epochs": 2}, "--warmup-epochs 2 below --epochs 2"),
    ({"warmup_epochs": 9999.0}, "--warmup-epochs 9999 below --epochs"),
    ({"ema": 1.0}, "--ema 1.0 below 1"),
    ({"holdout": 2.5}, "--holdout 2.5 whole number"),
    ({"save_every": 0, "save_minutes": 0.0}, "--save-every --save-minutes"),
    ({"reflect": True, "pad": 8}, "--pad 8 --reflect below 8 pixels"),
    ({"reflect": True, "pad": 20, "img_size": 16}, "--pad 20 --reflect below 16 pixels"),
    ({"position": "none", "content": False}, "--no-content --position none"),
    ({"position": "absolute", "content": False}, "--no-content --position absolute"),
    ({"model_name": "NaiveResNet26", "attention_stages": (3, 4)}, "--attention-stages 3 4 NaiveResNet26"),
])  # fmt: skip
def test_values_that_do_not_go_together(given, words):
    with pytest.raises(ConfigError) as error:
        resolve(given, "DIGITS")
    assert [word for word in words.split() if word not in str(error.value)] == []
    assert "\n" not in str(error.value)


def test_a_reflection_that_stays_within_the_image_is_allowed():
    """And padding of black may be of any width."""
    assert resolve({"reflect": True, "pad": 7}, "DIGITS").pad == 7
    assert resolve({"reflect": True, "pad": 20, "img_size": 21}, "DIGITS").pad == 20
    assert resolve({"reflect": False, "pad": 8}, "DIGITS").pad == 8


# ---- recipes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", config.DATASETS)
@pytest.mark.parametrize("name", ["default", "port", "paper"])
def test_a_recipe_fills_every_field_and_the_command_line_wins(dataset, name):
    values = resolve({"recipe": name}, dataset)
    assert set(IN_RECIPE) == recipe(name, dataset).keys()
    assert [
        f.name for f in fields(Config) if f.metadata["otherwise"] and f.metadata["otherwise"].startswith("the recipe's")
    ] == list(IN_RECIPE)
    average = ["ema"] if recipe(name, dataset)["ema"] else []  # the run's start fills it in (test_optim.py)
    assert [key for key in IN_RECIPE if getattr(values, key) is None] == average
    alone = {"lr_scaling", "lr_batch"}  # which are for the recipe's rate
    if config.SIDES[dataset] is None:
        alone |= {"pad", "rotate", "translate", "zoom"}  # which are for stored images of one size
    given = {key: (TYPED.get(key) or (None, SWITCHES.get(key)))[1] for key in IN_RECIPE if key not in alone}
    ours = resolve({"recipe": name, **given}, dataset)
    assert {key: getattr(ours, key) for key in given} == given
    assert ours.dataset == dataset and ours.recipe == name


def test_the_papers_and_the_ports_recipes():
    paper = resolve({"recipe": "paper"}, "IMAGENET")
    assert (paper.optimizer, paper.lr, paper.batch_size, paper.epochs) == ("sgd", 0.1, 256, 130)
    assert (paper.warmup_epochs, paper.momentum, recipe("paper", "IMAGENET")["ema"]) == (10, 0.9, 0.9999)
    assert (paper.schedule, paper.nesterov, paper.bn_momentum) == ("cosine", True, 1e-4)
    port = resolve({"recipe": "port"}, "CIFAR10")
    assert (port.optimizer, port.lr, port.batch_size, port.epochs) == ("sgd", 0.1, 25, 100)
    assert (port.weight_decay, port.momentum, port.warmup_epochs) == (1e-4, 0.9, 0)
    assert (port.schedule, port.nesterov, port.bn_momentum) == ("step", False, 0.1)


def test_the_augmentation_of_the_recipes():
    """Digits are turned and moved, not mirrored; port and paper take the CIFAR family's crop, an eighth of the side."""

    def augment(dataset, name="default", **given):
        values = resolve({"recipe": name, **given}, dataset)
        return {key: getattr(values, key) for key in ("pad", "flip", "rotate", "translate", "zoom", "cutout")}

    nothing = {"pad": 0, "flip": False, "rotate": 0.0, "translate": 0.0, "zoom": 0.0, "cutout": 0}
    moves = nothing | {"rotate": 10.0, "translate": 0.1, "zoom": 0.1}
    crop = nothing | {"pad": 4, "flip": True, "cutout": 8}
    assert augment("DIGITS") == augment("MNIST") == moves
    assert augment("FashionMNIST") == nothing | {"pad": 2, "flip": True}
    assert augment("CIFAR10") == augment("CIFAR100") == crop
    assert augment("CIFAR10", img_size=64) == crop | {"pad": 8, "cutout": 16}
    assert augment("CIFAR10", img_size=64, pad=3) == crop | {"pad": 3, "cutout": 16}
    assert augment("CIFAR10", flip=False) == crop | {"flip": False}
    for name in ("port", "paper"):
        assert augment("CIFAR10", name) == nothing | {"pad": 4, "flip": True}
        assert augment("DIGITS", name) == nothing | {"pad": 1}
        assert augment("DIGITS", name, img_size=32) == nothing | {"pad": 4}
        assert augment("IMAGENET", name, img_size=160) == nothing | {"flip": True}
    assert augment("IMAGENET") == augment("FOLDER") == augment("WEBDATASET") == nothing | {"flip": True}


@pytest.mark.parametrize(("dataset", "given", "words"), [
    ("FOLDER", {"pad": 4}, "--pad 4 FOLDER resized crops 0"),
    ("IMAGENET", {"rotate": 3.0}, "--rotate 3 0"),
    ("DIGITS", {"lr": 0.1, "lr_scaling": "sqrt"}, "--lr 0.1 --lr-scaling"),
])  # fmt: skip
def test_a_flag_that_would_do_nothing_is_refused(dataset, given, words):
    with pytest.raises(ConfigError) as error:
        resolve(given, dataset)
    assert [word for word in words.split() if word not in str(error.value)] == []


@pytest.mark.parametrize(("flags", "line", "used"), [
    ("--momentum 0.8", "--momentum 0.8: needs --optimizer sgd", "--momentum 0.8 --optimizer sgd"),
    ("--momentum 0.8 --recipe rsb", "--momentum 0.8: needs --optimizer sgd", "--momentum 0.8 --recipe paper"),
    ("--no-nesterov", "--no-nesterov: needs --optimizer sgd", "--nesterov --recipe port"),
    ("--adam-beta1 0.9 --optimizer sgd", "--adam-beta1 0.9: needs --optimizer adamw or --optimizer lamb",
     "--adam-beta1 0.9"),
    ("--adam-beta2 0.9 --recipe port", "--adam-beta2 0.9: needs --optimizer adamw or", "--adam-beta2 0.9 --recipe rsb"),
    ("--adam-eps 1e-6 --recipe port", "--adam-eps 1e-06: needs --optimizer adamw or", "--adam-eps 1e-6"),
    ("--step-epochs 5", "--step-epochs 5: needs --schedule step", "--step-epochs 5 --recipe port"),
    ("--step-factor 0.5", "--step-factor 0.5: needs --schedule step", "--step-factor 0.5 --schedule step"),
    ("--rand-magnitude 3", "--rand-magnitude 3: needs --auto-augment rand", "--rand-magnitude 3 --randaugment"),
    ("--rand-rounds 3 --auto-augment trivial", "--rand-rounds 3: needs --auto-augment rand",
     "--rand-rounds 3 --recipe strong"),
    ("--bce-threshold 0.1", "--bce-threshold 0.1: needs --loss bce", "--bce-threshold 0.1 --recipe rsb"),
    ("--compile-mode default", "--compile-mode default: needs --compile", "--compile-mode default --compile"),
    ("--crop-area 0.5", "--crop-area 0.5: needs an image tree", "--crop-area 0.5 --dataset FOLDER"),
    ("--crop-aspect 2", "--crop-aspect 2: needs an image tree", "--crop-aspect 2 --dataset WEBDATASET"),
])  # fmt: skip
def test_a_flag_that_needs_another_one_is_idle_without_it(flags, line, used):
    given = parse_command_line(flags.split()).given
    with pytest.raises(ConfigError, match=f"^{line}"):
        refuse_idle_flags(resolve(given, "DIGITS"), given)
    given = parse_command_line(used.split()).given
    refuse_idle_flags(resolve(given, given.get("dataset", "DIGITS")), given)


def test_a_recipes_own_warm_up_shrinks_for_a_short_run_and_an_explicit_one_does_not():
    assert resolve({"recipe": "paper"}, "IMAGENET").warmup_epochs == 10
    assert resolve({"recipe": "paper", "epochs": 8}, "IMAGENET").warmup_epochs == 2
    assert resolve({"recipe": "paper", "epochs": 1}, "IMAGENET").warmup_epochs == 0.25
    assert resolve({"recipe": "paper", "epochs": 8, "warmup_epochs": 7.0}, "IMAGENET").warmup_epochs == 7
    with pytest.raises(ConfigError, match="--warmup-epochs 8"):
        resolve({"recipe": "paper", "epochs": 8, "warmup_epochs": 8.0}, "IMAGENET")


def test_the_rate_follows_the_global_batch_as_the_recipe_says():
    """Batch 64 x accumulate 4 x 8 processes is 8 times the paper's 256: linear 8; AdamW's square root; the port's 1."""
    given = {"batch_size": 64, "accumulate": 4}
    assert resolve({"recipe": "paper", **given}, "IMAGENET", world_size=8).lr == pytest.approx(0.8)
    base = resolve({}, "CIFAR10").lr
    assert resolve(given, "CIFAR10", world_size=8).lr == pytest.approx(base * math.sqrt(2048 / 128))
    assert resolve({"recipe": "port", **given}, "CIFAR10", world_size=8).lr == 0.1
    assert resolve({"recipe": "port", "lr_scaling": "linear", "lr_batch": 512}, "CIFAR10").lr == 0.1 * 25 / 512
    assert resolve({"lr": 0.3, **given}, "CIFAR10", world_size=8).lr == 0.3


# ---- the Config as data ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [None, (), (3, 4)])
def test_a_config_comes_back_from_json_the_same(stages):
    ours = resolve({"attention_stages": stages, "stem": True, "holdout": 0.1, "max_steps": 5}, "DIGITS")
    back = Config.from_dict(json.loads(json.dumps(ours.to_dict())))
    assert back == ours and type(back.attention_stages) is type(ours.attention_stages)


@pytest.mark.parametrize("values", [
    {"lr": "fast"}, {"lr": float("nan")}, {"lr": True}, {"epochs": 0}, {"epochs": 2.0}, {"stem": 1}, {"stem": None},
    {"dataset": "EVIL"}, {"model_name": None}, {"img_size": -1}, {"kernel_size": 10**9}, {"seed": 2**63},
    {"attention_stages": [9]}, {"attention_stages": ["1"]}, {"data_dir": "a\0b"}, {"name": 3}, {"amp": None},
])  # fmt: skip
def test_a_config_from_a_file_is_checked_as_a_command_line_is(values):
    ours = resolve({}, "DIGITS").to_dict()
    with pytest.raises(ConfigError, match="--" + next(iter(values)).replace("_", "-")) as error:
        Config.from_dict(ours | values)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


def test_a_configuration_from_before_a_field_has_what_the_code_did_then(monkeypatch):
    """Whatever becomes of the recipes and defaults."""
    values = resolve({}, "DIGITS").to_dict()
    for key in settings.ADDED:
        del values[key]
    edited = config.RECIPES["default"]["DIGITS"] | {"step_epochs": 5}
    monkeypatch.setitem(config.RECIPES["default"], "DIGITS", edited)
    read = Config.from_dict(values)
    assert {key: getattr(read, key) for key in settings.ADDED} == settings.ADDED
    assert (read.step_epochs, read.adam_beta2, read.crop_aspect) == (30, 0.999, 4 / 3)


def test_a_config_of_another_version_is_refused_by_the_keys_that_differ():
    values = resolve({}, "DIGITS").to_dict()
    del values["lr"]
    with pytest.raises(ConfigError, match=r"lr, newer differ"):
        Config.from_dict(values | {"newer": 1})


def test_the_default_name_is_by_model_stem_data_set_recipe_and_seed():
    assert resolve({"stem": True, "seed": 3}, "DIGITS").default_name() == "resnet26-stem-digits-default-seed3"
    assert resolve({"recipe": "paper", "lr": 1.0}, "CIFAR10").default_name() == "resnet26-cifar10-paper-seed0"


def test_the_lists_of_names_are_those_of_the_modules_that_own_them():
    """config.py keeps its own copies, since theirs need torch."""
    assert tuple(model.VARIANTS) == config.MODELS
    assert preprocess.DATASETS == config.DATASETS


def test_every_layer_option_reaches_the_network():
    given = {"kernel_size": 5, "num_heads": 4, "position": "absolute", "border": "zero", "scale": 0.5, "grouped": True,
             "share_embeddings": True, "stem_values": "plain", "stem_mixtures": 2, "stem_window": "block",
             "attention_stages": (4,), "form": "small", "stem": True, "zero_init_residual": True}  # fmt: skip
    values = resolve(given, "DIGITS")
    net = model.build("ResNet26", 10, True, **values.layer_options())
    layer = net.layer4[0].spatial
    assert (layer.kernel_size, layer.num_heads, layer.position, layer.border) == (5, 4, "absolute", "zero")
    assert (layer.scale, layer.grouped, layer.share_embeddings) == (0.5, True, True)
    stem = net.stem[0]
    assert (stem.values, stem.num_mixtures, stem.window, stem.border) == ("plain", 2, "block", "zero")
    assert isinstance(net.layer1[0].spatial, model.nn.Conv2d) and net.small_images
    assert not net.layer4[0].bn3.weight.any()


# ---- before torch ---------------------------------------------------------------------------------------------------


def test_reading_the_command_line_does_not_import_torch():
    code = "import sys; from sasa.training.cli import parse_command_line as parse; parse(['--lr', '1'])"
    code += "; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_help_answers_within_3_seconds():
    started = time.monotonic()
    done = subprocess.run([sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert time.monotonic() - started < 3
    assert "--model-name" in done.stdout and done.stderr == ""
