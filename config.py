"""Config (what a run is) <-> the command line, and the recipes that fill in what the command line leaves open.

Read without torch, so that `--help` and a wrong flag answer at once. A value comes from the command line, else from the
recipe of the data set, else from the field's default. "auto" values are resolved once, at the start of a run; the
resolved Config is what config.json and the checkpoints hold.
"""

import argparse
import dataclasses
import math
import sys
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn

MODELS = ("ResNet26", "ResNet38", "ResNet50", "NaiveResNet26", "NaiveResNet38")
DATASETS = ("DIGITS", "CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "IMAGENET", "FOLDER", "WEBDATASET")
USAGE_ERROR = 2  # exit code of wrong usage or data
MAX_INT = 2**31 - 1  # of every integer flag: beyond it floats, timers and progress bars overflow


class ConfigError(ValueError):
    """A value that cannot be: one line that names the flag, the value and what is allowed."""


def option(default: Any, text: str, *, kind: type | None = None, free: bool = False, flag: str | None = None, **rule):
    """A field of Config and its flag.

    Args:
        text: the help text.
        kind: the type of a value, where the default does not show it.
        free: a resumed run may change it, since it cannot change the result.
        flag: the flag's name where it is not the field's.
        rule: what is allowed, `choices`, `low`, `high` (inclusive) or `above` (exclusive); `nargs` and `metavar` are
            argparse's.
    """
    kind = kind or (str if default is None else type(default))
    return field(default=default, metadata={"help": text, "kind": kind, "free": free, "flag": flag, "rule": rule})


def from_recipe(text: str, **rule):
    """A field whose value comes from the recipe unless its flag is given."""
    return option(None, f"{text} (default: the recipe's)", **rule)


@dataclass(frozen=True)
class Config:
    """A run. Every field is a flag: `batch_size` is --batch-size; the flags that differ carry theirs in `flag`."""

    # Model
    model_name: str = option("ResNet26", "network", choices=MODELS)
    stem: bool = option(False, "attention stem in place of the first convolution")
    form: str = option(
        "auto", "form of the network; auto: small up to 64 pixels", choices=("auto", "small", "imagenet")
    )
    attention_stages: tuple[int, ...] | None = option(
        None,
        "stages (1 2 3 4) whose 3x3 convolutions become attention; no value: the convolution twin (default: all; none "
        "for the Naive networks)",
        kind=int,
        choices=(1, 2, 3, 4),
        nargs="*",
        metavar="N",
    )
    kernel_size: int = option(7, "side of the attention window, pixels", low=1, high=1023)
    num_heads: int = option(8, "heads of each attention layer (the stem has 4)", low=1)
    position: str = option("relative", "position information", choices=("relative", "absolute", "none"))
    content: bool = option(True, "drop q.k: attention by q.r alone (Table 6)", flag="--no-content")
    border: str = option(
        "mask", "keys outside the map: weight 0, or zero keys in the softmax", choices=("mask", "zero")
    )
    scale: float = option(1.0, "factor of the logits (the paper has none)", above=0)
    grouped: bool = option(False, "each head projects its own input channels only")
    share_embeddings: bool = option(False, "one pair of embedding tables for all heads of a layer")
    embedding_std: float | None = option(
        None, "spread of the embeddings at the start (default: by head width)", kind=float, low=0
    )
    stem_window: str = option(
        "auto", "windows of the attention stem; auto: sliding in the small form", choices=("auto", "block", "sliding")
    )
    stem_values: str = option("mixture", "values of the attention stem (Table 7)", choices=("mixture", "plain", "conv"))
    stem_mixtures: int = option(4, "value matrices of the attention stem", low=1, high=1024)
    zero_init_residual: bool = from_recipe("each residual branch starts at zero", kind=bool)
    backend: str = option("auto", "kernel of the attention (python -m tools.backends lists them)", free=True)

    # Data
    dataset: str = option(
        "auto",
        "data set; auto: CIFAR10 if at hand, or downloadable to a GPU machine, else DIGITS",
        choices=("auto", *DATASETS),
    )
    data_dir: str = option(
        "datasets", "folder of the data sets, or of a FOLDER or IMAGENET tree, or WEBDATASET's train shards", free=True
    )
    img_size: int | None = option(
        None, "side of the images fed, pixels (default: the set's own; 224 for trees)", kind=int, low=8, high=4096
    )
    train_images: int | None = option(
        None, "train on a seeded part of this many images; --holdout is taken from it (default: all)", kind=int, low=1
    )
    holdout: float = option(0.0, "part of train that selects best.pt: a fraction below 1, or a number of images", low=0)
    skip_bad_images: bool = option(False, "skip unreadable images of a tree, counted, instead of ending")
    num_workers: int = option(4, "processes that decode a tree's images", low=0, high=1024, free=True)

    # Training
    recipe: str = option("default", "values of the training flags, by data set", choices=("default", "seed", "paper"))
    epochs: int | None = from_recipe("epochs", kind=int, low=1)
    batch_size: int | None = from_recipe("images in a batch of one process", kind=int, low=1)
    accumulate: int = option(1, "batches whose gradients make one step", low=1)
    optimizer: str | None = from_recipe("optimizer", choices=("sgd", "adamw"))
    lr: float | None = from_recipe("peak learning rate; the recipe's scales with the global batch", kind=float, above=0)
    momentum: float | None = from_recipe("SGD's momentum", kind=float, low=0, high=1)
    weight_decay: float | None = from_recipe("weight decay, not of norms, biases and embeddings", kind=float, low=0)
    embedding_weight_decay: float = option(0.0, "weight decay of the attention's embeddings", low=0)
    warmup_epochs: float | None = from_recipe("epochs of linear warm-up", kind=float, low=0)
    label_smoothing: float | None = from_recipe("label smoothing", kind=float, low=0, high=1)
    sync_bn: bool = option(False, "batch norm over the batches of all ranks")
    clip_grad: float | None = from_recipe("largest norm of the gradient, 0 for no limit", kind=float, low=0)
    ema: float | None = option(
        None,
        "decay of the weights' moving average, 0 for none (default: the recipe's, over at most a fifth of the steps)",
        kind=float,
        low=0,
        high=1,
    )
    mixup: float | None = from_recipe("mixup's alpha, 0 for none", kind=float, low=0)
    cutmix: float | None = from_recipe("cutmix's alpha, 0 for none", kind=float, low=0)
    randaugment: bool = option(False, "torchvision's RandAugment")
    seed: int = option(0, "seed of weights, order and augmentation", low=0)

    # Machine
    device: str = option("auto", "auto, cpu, cuda or cuda:N", free=True)
    amp: str = option(
        "auto", "mixed precision; auto: bf16 on GPUs that have it", choices=("auto", "off", "bf16", "fp16")
    )
    compile: bool = option(False, "torch.compile the network")
    channels_last: bool = option(True, "contiguous maps instead of channels-last ones", flag="--no-channels-last")
    deterministic: bool = option(False, "refuse operators that are not deterministic")

    # Files
    output_dir: str = option("runs", "folder of the runs", free=True)
    name: str | None = option(None, "folder of this run (default: by model, stem, data set, recipe, seed)", free=True)
    save_every: int = option(1, "epochs between saves, a minute apart at least; 0: not by epochs", low=0, free=True)
    save_minutes: float = option(10.0, "minutes between saves of last.pt, 0: not by the clock", low=0, free=True)
    progress: bool = option(True, "no progress bars", flag="--no-progress", free=True)
    attention_every: int = option(5, "epochs between TensorBoard's attention panels, 0: none", low=0, free=True)
    max_steps: int | None = option(None, "end the run at this global step", kind=int, low=1, free=True)

    def __post_init__(self) -> None:
        if self.position == "none" and not self.content:
            raise ConfigError("--no-content leaves no logits with --position none: allowed is --position relative")
        if self.position == "absolute" and not self.content:
            raise ConfigError("--no-content leaves no logits with --position absolute: allowed is --position relative")
        if self.model_name.startswith("Naive") and self.attention_stages:
            stages = " ".join(map(str, self.attention_stages))
            raise ConfigError(
                f"--attention-stages {stages}: {self.model_name} is a convolution network, allowed is none"
            )
        if self.warmup_epochs is not None and self.epochs is not None and self.warmup_epochs >= self.epochs:
            raise ConfigError(f"--warmup-epochs {self.warmup_epochs:g}: must be below --epochs {self.epochs}")
        if self.ema is not None and self.ema >= 1:
            raise ConfigError(f"--ema {self.ema:g}: must be below 1")
        if self.holdout >= 1 and self.holdout != int(self.holdout):
            raise ConfigError(f"--holdout {self.holdout:g}: must be a fraction below 1 or a whole number of images")
        if self.save_every == 0 and self.save_minutes == 0:
            raise ConfigError("--save-every 0 and --save-minutes 0 would never save: one must be above 0")

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, as config.json and the checkpoints hold them."""
        values = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Config":
        """The Config that `to_dict` gave.

        Raises:
            ConfigError: keys that this version does not know, or lacks.
        """
        known = {f.name for f in fields(cls)}
        differing = sorted(known ^ values.keys())
        if differing:
            raise ConfigError(f"the configuration is of another version: {', '.join(differing)} differ")
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})

    def recipe_value(self, key: str) -> Any:
        """What the recipe says of a thing that has no flag of its own (`HIDDEN`)."""
        return recipe(self.recipe, self.dataset).get(key, HIDDEN[key])

    def default_name(self) -> str:
        """The run's folder name: the same command gives the same one."""
        parts = (self.model_name, "stem" if self.stem else "", self.dataset, self.recipe, f"seed{self.seed}")
        return "-".join(part.lower() for part in parts if part)

    def layer_options(self) -> dict[str, Any]:
        """The options of `model.build` that this Config holds."""
        options = {
            key: getattr(self, key)
            for key in ("kernel_size", "num_heads", "position", "content", "border", "scale", "grouped")
        }
        options |= {"share_embeddings": self.share_embeddings, "embedding_std": self.embedding_std}
        options |= {
            "backend": self.backend,
            "stem_backend": self.backend,
            "zero_init_residual": self.zero_init_residual,
        }
        options |= {
            "stem_values": self.stem_values,
            "stem_num_mixtures": self.stem_mixtures,
            "stem_border": self.border,
        }
        if self.stem_window != "auto":
            options["stem_window"] = self.stem_window
        if self.attention_stages is not None:
            options["attention_stages"] = self.attention_stages
        return options | {"small_images": self.form == "small"}


# Parts of a recipe without a flag: the shape of the schedule, Nesterov, the batch that `lr` is for and how the rate
# follows the global batch ("linear", "sqrt" or None), and batch norm's momentum. Augmentation: preprocess.py.
HIDDEN = {"schedule": "cosine", "nesterov": True, "lr_batch": None, "lr_scaling": None, "bn_momentum": 0.1}

_PLAIN = {
    "momentum": 0.9, "label_smoothing": 0.0, "clip_grad": 0.0, "ema": 0.0, "mixup": 0.0, "cutmix": 0.0,
    "zero_init_residual": False,
}  # fmt: skip
_ADAMW = _PLAIN | {
    "optimizer": "adamw", "weight_decay": 0.05, "label_smoothing": 0.1, "clip_grad": 1.0, "lr_scaling": "sqrt",
    "zero_init_residual": True,
}  # fmt: skip
# The default recipe of each data set. DIGITS' was found by trials (README); the others follow it or the family's
# practice and say so in README.
_DEFAULT = {
    "DIGITS": _ADAMW | {"epochs": 12, "batch_size": 32, "lr": 1e-3, "lr_batch": 32, "warmup_epochs": 2, "ema": 0.98},
    "MNIST": _ADAMW | {"epochs": 20, "batch_size": 64, "lr": 1e-3, "lr_batch": 64, "warmup_epochs": 2},
    "FashionMNIST": _ADAMW | {"epochs": 30, "batch_size": 64, "lr": 1e-3, "lr_batch": 64, "warmup_epochs": 2},
    "CIFAR10": _ADAMW | {
        "epochs": 200, "batch_size": 128, "lr": 1e-3, "lr_batch": 128, "warmup_epochs": 10, "ema": 0.999,
    },
    "IMAGENET": _PLAIN | {
        "optimizer": "sgd", "epochs": 130, "batch_size": 256, "lr": 0.1, "lr_batch": 256, "lr_scaling": "linear",
        "warmup_epochs": 10, "weight_decay": 1e-4, "label_smoothing": 0.1, "ema": 0.9999, "clip_grad": 5.0,
    },
    "FOLDER": _ADAMW | {"epochs": 90, "batch_size": 64, "lr": 1e-3, "lr_batch": 256, "warmup_epochs": 5},
}  # fmt: skip
_DEFAULT["CIFAR100"] = _DEFAULT["CIFAR10"]
_DEFAULT["WEBDATASET"] = _DEFAULT["IMAGENET"]  # which is what shards are for
# The port's CIFAR-10 run: rate divided by 10 every 30 epochs (PAPER: README of the port, results table).
_SEED = _PLAIN | {
    "optimizer": "sgd", "epochs": 100, "batch_size": 25, "lr": 0.1, "warmup_epochs": 0, "weight_decay": 1e-4,
    "schedule": "step", "nesterov": False,
}  # fmt: skip
# The paper's ImageNet run (section 4.1); weight decay, label smoothing and augmentation are not given there.
_PAPER = _PLAIN | {
    "optimizer": "sgd", "epochs": 130, "batch_size": 256, "lr": 0.1, "lr_batch": 256, "lr_scaling": "linear",
    "warmup_epochs": 10, "weight_decay": 1e-4, "label_smoothing": 0.1, "ema": 0.9999, "bn_momentum": 1e-4,
}  # fmt: skip


def recipe(name: str, dataset: str) -> dict[str, Any]:
    """The values that a recipe gives to a data set."""
    if name == "default":
        return _DEFAULT[dataset]
    return {"seed": _SEED, "paper": _PAPER}[name]


def resolve(given: dict[str, Any], dataset: str, world_size: int = 1) -> Config:
    """The Config of a run: `given` (flags of the command line) over the recipe of the resolved `dataset`.

    Raises:
        ConfigError: values that do not go together.
    """
    name = given.get("recipe", "default")
    values = {key: value for key, value in recipe(name, dataset).items() if key not in HIDDEN}
    values |= given | {"dataset": dataset}
    if "warmup_epochs" not in given:  # a recipe's own warm-up fits a short run; only an explicit one is checked
        values["warmup_epochs"] = min(values["warmup_epochs"], values["epochs"] / 4)
    if "ema" not in given and values["ema"]:
        values["ema"] = None  # the run's start fills it in, when its steps are known
    if "lr" not in given:
        values["lr"] *= rate_factor(name, dataset, values["batch_size"] * values.get("accumulate", 1) * world_size)
    return Config(**values)


def rate_factor(recipe_name: str, dataset: str, global_batch: int) -> float:
    """What the recipe's rate is multiplied by for this global batch (images a step over all processes)."""
    values = HIDDEN | recipe(recipe_name, dataset)
    ratio = global_batch / values["lr_batch"] if values["lr_batch"] else 1.0
    return {None: 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[values["lr_scaling"]]


@dataclass(frozen=True)
class Command:
    """What to do with a run: `resume` is None (no), "" (the newest of the run's folder) or a path."""

    given: dict[str, Any]  # the Config fields that the command line names
    resume: str | None = None
    init_from: str | None = None
    evaluate: str | None = None
    overwrite: bool = False


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        fail(message.removeprefix("argument "))


def fail(message: str) -> NoReturn:
    """Wrong usage or data: one line, exit code 2."""
    say_failure(message)
    sys.exit(USAGE_ERROR)


def say_failure(message: object) -> None:
    print(f"train.py: error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)


def parse_command_line(arguments: list[str] | None = None) -> Command:
    """The command line as a Command; a wrong value ends the process with one line and exit code 2."""
    parser = _Parser(
        prog="train.py",
        description="Train a stand-alone self-attention network (or its convolution twin), resume it, evaluate it.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for f in fields(Config):
        _add_flag(parser, f)
    parser.add_argument("--resume", nargs="?", const="", metavar="PATH",
                        help="go on from PATH, or from the newest whole checkpoint of the run's folder")  # fmt: skip
    parser.add_argument("--init-from", metavar="PATH", help="start from the weights of a checkpoint, nothing else")
    parser.add_argument("--evaluate", metavar="PATH", help="evaluate a checkpoint and end")
    parser.add_argument("--overwrite", action="store_true", help="replace a run that the folder already holds")
    values = vars(parser.parse_args(arguments))
    command = {f.name: values.pop(f.name) for f in fields(Command) if f.name in values}
    try:
        given = {key: check(key, value) for key, value in values.items()}
    except ConfigError as error:
        fail(error)
    if "resume" in command and ("init_from" in command or command.get("overwrite")):
        fail("--resume goes on with a run: it does not go with --init-from or --overwrite")
    if "evaluate" in command and ("resume" in command or "init_from" in command):
        fail("--evaluate does not go with --resume or --init-from")
    if "attention_stages" in given:
        given["attention_stages"] = tuple(sorted(set(given["attention_stages"])))
    return Command(given, **command)


def flag_of(f: dataclasses.Field) -> str:
    return f.metadata["flag"] or "--" + f.name.replace("_", "-")


def _add_flag(parser: argparse.ArgumentParser, f: dataclasses.Field) -> None:
    text, rule = f.metadata["help"], f.metadata["rule"]
    if f.metadata["kind"] is bool and f.default is None:
        parser.add_argument(flag_of(f), dest=f.name, action=argparse.BooleanOptionalAction, help=text)
        return
    if f.metadata["kind"] is bool:
        parser.add_argument(flag_of(f), dest=f.name, action="store_false" if f.default else "store_true", help=text)
        if f.default:
            parser.add_argument("--" + f.name.replace("_", "-"), action="store_true", help="the default")
        return
    options = {"metavar": f.name.rsplit("_", 1)[-1].upper()} | {k: rule[k] for k in ("nargs", "metavar") if k in rule}
    if "choices" in rule and "nargs" not in rule:
        text += f": {' | '.join(rule['choices'])}"
    if f.default is not None:
        text += f" (default: {f.default})"
    parser.add_argument(flag_of(f), dest=f.name, help=text.replace("%", "%%"), **options)


def check(name: str, value: Any) -> Any:
    """`value` of a flag in its field's type and spelling; a list item by item.

    Raises:
        ConfigError: it is not of that type, or not allowed.
    """
    f = next(f for f in fields(Config) if f.name == name)
    return [_check_one(f, item) for item in value] if isinstance(value, list) else _check_one(f, value)


def _check_one(f: dataclasses.Field, value: Any) -> Any:
    kind, rule, said = f.metadata["kind"], f.metadata["rule"], f"{flag_of(f)} {value}"
    if kind in (int, float):
        value = _number(kind, value, said)
        for bound, holds, words in (
            ("low", value.__ge__, "at least"),
            ("high", value.__le__, "at most"),
            ("above", value.__gt__, "above"),
        ):
            if bound in rule and not holds(kind(rule[bound])):
                raise ConfigError(f"{said}: must be {words} {rule[bound]}")
    if "choices" in rule:
        spelling = {str(choice).lower(): choice for choice in rule["choices"]}
        if str(value).lower() not in spelling:
            raise ConfigError(f"{said}: allowed are {', '.join(map(str, rule['choices']))}")
        value = spelling[str(value).lower()]
    return value


def _number(kind: type, text: str, said: str) -> int | float:
    try:
        value = kind(text)
    except ValueError:
        raise ConfigError(f"{said}: must be {'an integer' if kind is int else 'a number'}") from None
    if kind is int and abs(value) > MAX_INT:
        raise ConfigError(f"{said[:60]}: must be at most {MAX_INT}")
    if not math.isfinite(value):
        raise ConfigError(f"{said}: must be finite")
    return value
