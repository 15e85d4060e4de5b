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
from config import Config, ConfigError, parse_command_line, recipe, resolve

ROOT = Path(__file__).resolve().parents[1]

# A value of each flag that takes one, as typed, and as the Config holds it.
TYPED = {
    "model_name": ("nAIVEresnet38", "NaiveResNet38"), "form": ("IMAGENET", "imagenet"), "kernel_size": ("5", 5),
    "num_heads": ("4", 4), "position": ("Absolute", "absolute"), "border": ("ZERO", "zero"), "scale": ("0.5", 0.5),
    "embedding_std": ("0.1", 0.1), "stem_window": ("Block", "block"), "stem_values": ("PLAIN", "plain"),
    "stem_mixtures": ("2", 2), "backend": ("reference", "reference"), "dataset": ("fashionmnist", "FashionMNIST"),
    "data_dir": ("some/Folder", "some/Folder"), "img_size": ("16", 16), "holdout": ("0.25", 0.25),
    "train_images": ("10000", 10000),
    "num_workers": ("0", 0), "recipe": ("Paper", "paper"), "epochs": ("7", 7), "batch_size": ("9", 9),
    "accumulate": ("2", 2), "optimizer": ("AdamW", "adamw"), "lr": ("1e-3", 0.001), "momentum": ("0.8", 0.8),
    "weight_decay": ("0", 0.0), "embedding_weight_decay": ("1e-2", 0.01), "warmup_epochs": ("0.5", 0.5),
    "label_smoothing": ("0.1", 0.1), "clip_grad": ("1", 1.0), "ema": ("0.99", 0.99), "mixup": (".2", 0.2),
    "cutmix": ("1", 1.0), "seed": ("3", 3), "device": ("cuda:1", "cuda:1"), "amp": ("BF16", "bf16"),
    "output_dir": ("out", "out"), "name": ("A", "A"), "save_every": ("0", 0), "save_minutes": ("0.5", 0.5),
    "attention_every": ("3", 3), "max_steps": ("10", 10),
}  # fmt: skip
SWITCHES = {
    "--stem": True, "--no-content": False, "--grouped": True, "--share-embeddings": True, "--zero-init-residual": True,
    "--skip-bad-images": True, "--randaugment": True, "--compile": True, "--no-channels-last": False,
    "--deterministic": True, "--no-progress": False, "--sync-bn": True,
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


@pytest.mark.parametrize("name", ["content", "channels_last", "progress"])
def test_what_is_on_by_default_may_be_asked_for(name):
    assert parse_command_line(["--" + name.replace("_", "-")]).given == {name: True}


@pytest.mark.parametrize("flag", SWITCHES)
def test_a_switch_turns_its_field_over(flag):
    name = flag.removeprefix("--").removeprefix("no-").replace("-", "_")
    assert parse_command_line([flag]).given == {name: SWITCHES[flag]}
    default = next(f.default for f in fields(Config) if f.name == name)
    assert default is not SWITCHES[flag]


def test_every_field_is_tried_above():
    switches = {flag.removeprefix("--").removeprefix("no-").replace("-", "_") for flag in SWITCHES}
    assert TYPED.keys() | switches | {"attention_stages"} == {f.name for f in fields(Config)}


@pytest.mark.parametrize(("text", "stages"), [("", ()), ("4 3 3", (3, 4)), ("1 2 3 4", (1, 2, 3, 4))])
def test_attention_stages(text, stages):
    assert parse_command_line(["--attention-stages", *text.split()]).given == {"attention_stages": stages}


def test_the_commands_that_are_not_fields():
    command = parse_command_line([])
    assert (command.given, command.resume, command.evaluate, command.init_from) == ({}, None, None, None)
    assert parse_command_line(["--resume"]).resume == "" and parse_command_line(["--resume", "x.pt"]).resume == "x.pt"
    assert parse_command_line(["--evaluate", "x.pt"]).evaluate == "x.pt"
    assert parse_command_line(["--init-from", "x.pt", "--overwrite"]).overwrite


# As DESIGN.md section 4 lists them, less those of later steps (--attention-every, --sync-bn).
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
    assert [flag for flag in CONTRACT.split() if not any(f"  {flag}{end}" in told for end in " \n,")] == []


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
    ("--recipe mine", "--recipe mine default seed paper"),
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
    ("--resume --init-from x.pt", "--resume --init-from"),
    ("--evaluate x.pt --resume", "--evaluate --resume"),
])  # fmt: skip
def test_a_wrong_command_line_is_one_line_that_says_what_is_allowed(capsys, flags, words):
    error = refused(capsys, *flags.split())
    assert [word for word in words.split() if word not in error] == []
    assert len(error) < 250


@pytest.mark.parametrize(("given", "words"), [
    ({"warmup_epochs": 2.0, "epochs": 2}, "--warmup-epochs 2 below --epochs 2"),
    ({"warmup_epochs": 9999.0}, "--warmup-epochs 9999 below --epochs"),
    ({"ema": 1.0}, "--ema 1 below 1"),
    ({"holdout": 2.5}, "--holdout 2.5 whole number"),
    ({"save_every": 0, "save_minutes": 0.0}, "--save-every --save-minutes"),
    ({"position": "none", "content": False}, "--no-content --position none"),
    ({"position": "absolute", "content": False}, "--no-content --position absolute"),
    ({"model_name": "NaiveResNet26", "attention_stages": (3, 4)}, "--attention-stages 3 4 NaiveResNet26"),
])  # fmt: skip
def test_values_that_do_not_go_together(given, words):
    with pytest.raises(ConfigError) as error:
        resolve(given, "DIGITS")
    assert [word for word in words.split() if word not in str(error.value)] == []
    assert "\n" not in str(error.value)


# ---- recipes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", config.DATASETS)
@pytest.mark.parametrize("name", ["default", "seed", "paper"])
def test_a_recipe_fills_every_field_and_the_command_line_wins(dataset, name):
    values = resolve({"recipe": name}, dataset)
    open_fields = [f.name for f in fields(Config) if "(default: the recipe's" in f.metadata["help"]]
    assert len(open_fields) == 13
    average = ["ema"] if recipe(name, dataset)["ema"] else []  # the run's start fills it in (test_optim.py)
    assert [key for key in open_fields if getattr(values, key) is None] == average
    given = {key: TYPED[key][1] for key in open_fields if key in TYPED} | {"zero_init_residual": True}
    ours = resolve({"recipe": name, **given}, dataset)
    assert {key: getattr(ours, key) for key in open_fields} == given
    assert ours.dataset == dataset and ours.recipe == name


def test_the_papers_and_the_ports_recipes():
    paper = resolve({"recipe": "paper"}, "IMAGENET")
    assert (paper.optimizer, paper.lr, paper.batch_size, paper.epochs) == ("sgd", 0.1, 256, 130)
    assert (paper.warmup_epochs, paper.momentum, recipe("paper", "IMAGENET")["ema"]) == (10, 0.9, 0.9999)
    assert paper.recipe_value("schedule") == "cosine" and paper.recipe_value("nesterov") is True
    assert paper.recipe_value("bn_momentum") == 1e-4
    port = resolve({"recipe": "seed"}, "CIFAR10")
    assert (port.optimizer, port.lr, port.batch_size, port.epochs) == ("sgd", 0.1, 25, 100)
    assert (port.weight_decay, port.momentum, port.warmup_epochs) == (1e-4, 0.9, 0)
    assert port.recipe_value("schedule") == "step" and port.recipe_value("nesterov") is False


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
    assert resolve({"recipe": "seed", **given}, "CIFAR10", world_size=8).lr == 0.1
    assert resolve({"lr": 0.3, **given}, "CIFAR10", world_size=8).lr == 0.3


# ---- the Config as data ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [None, (), (3, 4)])
def test_a_config_comes_back_from_json_the_same(stages):
    ours = resolve({"attention_stages": stages, "stem": True, "holdout": 0.1, "max_steps": 5}, "DIGITS")
    back = Config.from_dict(json.loads(json.dumps(ours.to_dict())))
    assert back == ours and type(back.attention_stages) is type(ours.attention_stages)


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
    code = "import sys, config; config.parse_command_line(['--lr', '1']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_help_answers_within_3_seconds():
    started = time.monotonic()
    done = subprocess.run([sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert time.monotonic() - started < 3
    assert "--model-name" in done.stdout and done.stderr == ""
