"""Config (every setting of a run), the recipes that fill in what the command line leaves open, and `resolve`.

A value comes from the command line (sasa/training/cli.py), else from the recipe of the data set, else from the field's
default. "auto" values are resolved once, at the start of a run; the resolved Config is what config.json and the
checkpoints hold, so that an edited recipe never changes a run that was started before. Read without torch.
"""

import dataclasses
import math
from dataclasses import dataclass, field, fields
from typing import Any

MODELS = ("ResNet26", "ResNet38", "ResNet50", "NaiveResNet26", "NaiveResNet38")
# The side of the stored images in pixels; None for trees and shards, whose images differ.
SIDES = {
    "DIGITS": 8, "CIFAR10": 32, "CIFAR100": 32, "MNIST": 28, "FashionMNIST": 28,
    "IMAGENET": None, "FOLDER": None, "WEBDATASET": None,
}  # fmt: skip
DATASETS = tuple(SIDES)
TREE_EVAL_CROP = 0.875  # 224 of 256 pixels, as the ImageNet family evaluates
MAX_INT = 2**31 - 1  # of every integer: beyond it floats, timers and progress bars overflow


class ConfigError(ValueError):
    """A value that cannot be: one line that names the flag, the value and what is allowed."""


def option(
    default: Any, text: str, *, kind: type | None = None, free: bool = False, in_recipe: bool = False, **rule
) -> Any:
    """A field of Config and its flag.

    Args:
        default: the value without the flag.
        text: the help text: what the flag does.
        kind: the type of a value, where the default does not show it.
        free: a resumed run may change it, since it cannot change the result.
        in_recipe: the value without the flag is the recipe's.
        rule: what is allowed, `choices`, `low`, `high` (inclusive), `above` or `below` (exclusive); `alias` maps an old
            spelling of a choice to the present one; `nargs` and `metavar` are argparse's.
    """
    kind = kind or (str if default is None else type(default))
    about = {"help": text, "kind": kind, "free": free, "in_recipe": in_recipe, "rule": rule}
    return field(default=default, metadata=about)


def from_recipe(text: str, kind: type, **rule) -> Any:
    """A field whose value comes from the recipe unless its flag is given."""
    return option(None, f"{text} (default: the recipe's)", kind=kind, in_recipe=True, **rule)


@dataclass(frozen=True)
class Settings:
    """What the configuration of every kind of run can do, by the fields that its class has.

    Raises:
        ConfigError: a value of another type or out of its bounds.
    """

    def __post_init__(self) -> None:
        for f in fields(self):
            _check_typed(f, getattr(self, f.name))

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, as config.json and the checkpoints hold them."""
        values = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]):
        """The configuration that `to_dict` gave.

        Raises:
            ConfigError: keys that this version does not know, or lacks; values that cannot be.
        """
        known = {f.name for f in fields(cls)}
        differing = sorted(str(key) for key in known ^ values.keys())
        if differing:
            more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
            raise ConfigError(f"the configuration is of another version: {', '.join(differing[:5])}{more} differ")
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})

    def recipe_values(self) -> dict[str, Any]:
        """What this version's recipe gives to each field that has its value from there unless its flag is given."""
        raise NotImplementedError

    def recipe_name(self) -> str:
        """That recipe, for a person."""
        raise NotImplementedError


@dataclass(frozen=True)
class Config(Settings):
    """A run. Every field is a flag: `batch_size` is --batch-size.

    Raises:
        ConfigError: a value of another type or out of its bounds, or values that do not go together.
    """

    # Model
    model_name: str = option("ResNet26", "network", choices=MODELS)
    stem: bool = option(False, "attention stem in place of the first convolution")
    form: str = option(
        "auto", "form of the network; auto: small up to 64 pixels", choices=("auto", "small", "imagenet")
    )
    attention_stages: tuple[int, ...] | None = option(
        None,
        "stages (1 2 3 4) whose 3x3 convolutions become attention; no value: the convolution baseline (default: all; "
        "none for the Naive networks)",
        kind=int,
        choices=(1, 2, 3, 4),
        nargs="*",
        metavar="N",
    )
    kernel_size: int = option(7, "side of the attention window, pixels", low=1, high=1023)
    num_heads: int = option(8, "heads of each attention layer (the stem has 4)", low=1)
    position: str = option("relative", "position information", choices=("relative", "absolute", "none"))
    content: bool = option(True, "attend by q.k + q.r; --no-content: by q.r alone (Table 6)")
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
    zero_init_residual: bool | None = from_recipe("start each residual branch at zero", bool)
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
    eval_size: int | None = option(
        None, "side of the images fed in evaluation, pixels (default: --img-size)", kind=int, low=8, high=4096
    )
    eval_crop: float | None = option(
        None,
        "share of the resized image's side that evaluation feeds, its centre (default: 0.875 for trees and shards, "
        "else 1)",
        kind=float,
        above=0,
        high=1,
    )
    eval_interpolation: str = option(
        "bilinear", "how evaluation resizes images, antialiased", choices=("bilinear", "bicubic")
    )
    train_images: int | None = option(
        None, "train on a seeded part of this many images; --holdout is taken from it (default: all)", kind=int, low=1
    )
    holdout: float = option(0.0, "part of train that selects best.pt: a fraction below 1, or a number of images", low=0)
    skip_bad_images: bool = option(False, "skip unreadable images of a tree, counted, instead of ending", free=True)
    num_workers: int = option(4, "processes that decode a tree's images", low=0, high=1024, free=True)
    worker_timeout: float = option(
        600.0, "seconds after which silent decoding processes end the run, 0: never", low=0, free=True
    )
    index_dir: str | None = option(
        None, "folder of WEBDATASET's indexes (default: beside the shards, or the user's cache)", free=True
    )

    # Augmentation of the training images
    pad: int | None = from_recipe("pixels of padding that a random crop shifts the image into", int, low=0, high=4096)
    flip: bool | None = from_recipe("mirror each image left to right, half of the time", bool)
    rotate: float | None = from_recipe("largest rotation, degrees", float, low=0, high=180)
    translate: float | None = from_recipe("largest shift, as a share of the side", float, low=0, below=1)
    zoom: float | None = from_recipe("largest change of scale, as a share", float, low=0, below=1)
    cutout: int | None = from_recipe("side of a square of each image set to the mean, pixels", int, low=0, high=4096)
    randaugment: bool | None = from_recipe("torchvision's RandAugment", bool)
    mixup: float | None = from_recipe("mixup's alpha, 0 for none", float, low=0)
    cutmix: float | None = from_recipe("cutmix's alpha, 0 for none", float, low=0)
    reflect: bool | None = from_recipe("mirror the image beyond its border where it is shifted, not black", bool)

    # Training
    recipe: str = option(
        "default", "values of the flags above and below that say so, by data set", choices=("default", "port", "paper"),
        alias={"seed": "port"},
    )  # fmt: skip
    epochs: int | None = from_recipe("epochs", int, low=1)
    batch_size: int | None = from_recipe("images in a batch of one process", int, low=1)
    accumulate: int = option(1, "batches whose gradients make one step", low=1)
    optimizer: str | None = from_recipe("optimizer", str, choices=("sgd", "adamw"))
    lr: float | None = from_recipe("peak learning rate, taken as it is; the recipe's is scaled", float, above=0)
    lr_scaling: str | None = from_recipe(
        "how the recipe's rate follows the ratio of the global batch to --lr-batch", str,
        choices=("none", "sqrt", "linear"),
    )  # fmt: skip
    lr_batch: int | None = from_recipe("global batch that the recipe's rate is for", int, low=1)
    schedule: str | None = from_recipe(
        "the rate after the warm-up: a cosine to 0, or a tenth every 30 epochs", str, choices=("cosine", "step")
    )
    warmup_epochs: float | None = from_recipe("epochs of linear warm-up", float, low=0)
    momentum: float | None = from_recipe("SGD's momentum", float, low=0, high=1)
    nesterov: bool | None = from_recipe("SGD's momentum in Nesterov's form", bool)
    weight_decay: float | None = from_recipe("weight decay, not of norms, biases and embeddings", float, low=0)
    embedding_weight_decay: float = option(0.0, "weight decay of the attention's embeddings", low=0)
    bn_momentum: float | None = from_recipe(
        "batch norm's momentum: 1 - decay of its running statistics", float, above=0, high=1
    )
    label_smoothing: float | None = from_recipe("label smoothing", float, low=0, high=1)
    sync_bn: bool = option(False, "batch norm over the batches of all ranks")
    clip_grad: float | None = from_recipe("largest norm of the gradient, 0 for no limit", float, low=0)
    ema: float | None = option(
        None,
        "decay of the weights' moving average, 0 for none (default: the recipe's, over at most a fifth of the steps)",
        kind=float,
        low=0,
        below=1,
        in_recipe=True,
    )
    seed: int = option(0, "seed of weights, order and augmentation", low=0)

    # Machine
    device: str = option("auto", "auto, cpu, cuda or cuda:N", free=True)
    amp: str = option(
        "auto", "mixed precision; auto: bf16 on GPUs that have it", choices=("auto", "off", "bf16", "fp16")
    )
    compile: bool = option(False, "torch.compile the network")
    channels_last: bool = option(True, "keep maps in channels-last layout; --no-channels-last: contiguous")
    deterministic: bool = option(False, "refuse operators that are not deterministic")

    # Files
    output_dir: str = option("runs", "folder of the runs", free=True)
    name: str | None = option(None, "folder of this run (default: by model, stem, data set, recipe, seed)", free=True)
    save_every: int = option(1, "epochs between saves, a minute apart at least; 0: not by epochs", low=0, free=True)
    save_minutes: float = option(10.0, "minutes between saves of last.pt, 0: not by the clock", low=0, free=True)
    progress: bool = option(True, "show progress bars on a terminal", free=True)
    attention_every: int = option(5, "epochs between TensorBoard's attention panels, 0: none", low=0, free=True)
    preview: bool = option(False, "write progress.png, curves and wrong predictions, at each validation", free=True)
    max_steps: int | None = option(None, "end the run at this global step", kind=int, low=1, free=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_together(self)

    def default_name(self) -> str:
        """The run's folder name: the same command gives the same one."""
        parts = (self.model_name, "stem" if self.stem else "", self.dataset, self.recipe, f"seed{self.seed}")
        return "-".join(part.lower() for part in parts if part)

    def recipe_values(self) -> dict[str, Any]:
        values = recipe(self.recipe, self.dataset, self.img_size)
        return {key: values[key] for key in IN_RECIPE}

    def recipe_name(self) -> str:
        return f"{self.recipe} of {self.dataset}"

    def layer_options(self) -> dict[str, Any]:
        """The options of `model.build` that this Config holds."""
        same = ("kernel_size", "num_heads", "position", "content", "border", "scale", "grouped", "share_embeddings",
                "embedding_std", "zero_init_residual", "backend", "stem_values")  # fmt: skip
        options = {key: getattr(self, key) for key in same}
        options |= {"stem_backend": self.backend, "stem_border": self.border, "stem_num_mixtures": self.stem_mixtures}
        if self.stem_window != "auto":
            options["stem_window"] = self.stem_window
        if self.attention_stages is not None:
            options["attention_stages"] = self.attention_stages
        return options | {"small_images": self.form == "small"}


FIELDS = {f.name: f for f in fields(Config)}
IN_RECIPE = tuple(f.name for f in fields(Config) if f.metadata["in_recipe"])


def flag_of(name: str) -> str:
    """The flag of a field."""
    return "--" + name.replace("_", "-")


# ---- what is allowed ------------------------------------------------------------------------------------------------


def parse_value(f: dataclasses.Field, text: str) -> Any:
    """The text of a flag's value in its field's type and spelling.

    Raises:
        ConfigError: it is not of that type, or not allowed.
    """
    kind, rule = f.metadata["kind"], f.metadata["rule"]
    value = _number(kind, text, f"{flag_of(f.name)} {text}") if kind in (int, float) else text
    if "choices" in rule:
        spelling = {str(choice).lower(): choice for choice in rule["choices"]} | rule.get("alias", {})
        value = spelling.get(str(value).lower(), value)
    _check_rule(f, value)
    return value


def _number(kind: type, text: str, given: str) -> int | float:
    try:
        return kind(text)
    except ValueError:  # also of an integer of thousands of digits
        digits = text.strip().removeprefix("-").isdigit()
        wanted = f"at most {MAX_INT}" if digits else "an integer" if kind is int else "a number"
        raise ConfigError(f"{given[:60]}: must be {wanted}") from None


def _check_typed(f: dataclasses.Field, value: Any) -> None:
    """A field's value as code or a file gives it. Raises ConfigError."""
    kind = f.metadata["kind"]
    if value is None and f.default is None:
        return
    items = value if isinstance(value, tuple) and "nargs" in f.metadata["rule"] else (value,)
    for item in items:
        if type(item) is not kind and not (kind is float and type(item) is int):
            raise ConfigError(f"{flag_of(f.name)} {str(item)[:60]!r}: must be of type {kind.__name__}")
        _check_rule(f, item)


def _check_rule(f: dataclasses.Field, value: Any) -> None:
    """A value of the right type against its field's bounds and choices. Raises ConfigError."""
    rule, given = f.metadata["rule"], f"{flag_of(f.name)} {str(value)[:60]}"
    if isinstance(value, str) and "\0" in value:
        raise ConfigError(f"{given!r}: must not hold a zero byte")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{given}: must be finite")
    if f.metadata["kind"] is int and abs(value) > MAX_INT:
        raise ConfigError(f"{given}: must be at most {MAX_INT}")
    if f.metadata["kind"] in (int, float):
        for bound, holds, words in (
            ("low", value.__ge__, "at least"),
            ("high", value.__le__, "at most"),
            ("above", value.__gt__, "above"),
            ("below", value.__lt__, "below"),
        ):
            if bound in rule and not holds(type(value)(rule[bound])):
                raise ConfigError(f"{given}: must be {words} {rule[bound]}")
    if "choices" in rule and value not in rule["choices"]:
        raise ConfigError(f"{given}: allowed are {', '.join(map(str, rule['choices']))}")


def _check_together(config: Config) -> None:
    """Values that do not go together. Raises ConfigError."""
    if config.position in ("none", "absolute") and not config.content:
        raise ConfigError(
            f"--no-content leaves no logits with --position {config.position}: allowed is --position relative"
        )
    if config.model_name.startswith("Naive") and config.attention_stages:
        stages = " ".join(map(str, config.attention_stages))
        raise ConfigError(f"--attention-stages {stages}: {config.model_name} is a convolution network, allowed is none")
    if config.warmup_epochs is not None and config.epochs is not None and config.warmup_epochs >= config.epochs:
        raise ConfigError(f"--warmup-epochs {config.warmup_epochs:g}: must be below --epochs {config.epochs}")
    if config.holdout >= 1 and config.holdout != int(config.holdout):
        raise ConfigError(f"--holdout {config.holdout:g}: must be a fraction below 1 or a whole number of images")
    if config.save_every == 0 and config.save_minutes == 0:
        raise ConfigError("--save-every 0 and --save-minutes 0 would never save: one must be above 0")
    if config.dataset != "auto" and SIDES[config.dataset] is None:
        for name in ("pad", "rotate", "translate", "zoom"):
            if getattr(config, name):
                raise ConfigError(
                    f"{flag_of(name)} {getattr(config, name):g}: {config.dataset} is trained on random resized crops "
                    "instead; allowed is 0"
                )


# ---- recipes --------------------------------------------------------------------------------------------------------

# What most recipes share: no regularisation, no augmentation, the rate as it stands.
_BASE = {
    "pad": 0, "flip": False, "rotate": 0.0, "translate": 0.0, "zoom": 0.0, "cutout": 0, "randaugment": False,
    "mixup": 0.0, "cutmix": 0.0, "reflect": False, "schedule": "cosine", "momentum": 0.9, "nesterov": True,
    "bn_momentum": 0.1, "label_smoothing": 0.0, "clip_grad": 0.0, "ema": 0.0, "zero_init_residual": False,
}  # fmt: skip
_ADAMW = _BASE | {
    "optimizer": "adamw", "lr": 1e-3, "lr_scaling": "sqrt", "weight_decay": 0.05, "label_smoothing": 0.1,
    "clip_grad": 1.0, "zero_init_residual": True,
}  # fmt: skip
_DIGITS = {"rotate": 10.0, "translate": 0.1, "zoom": 0.1}  # what leaves a digit the same digit
_CIFAR = {"pad": 4, "flip": True, "cutout": 8}
# The paper's ImageNet run (section 4.1); weight decay, label smoothing and augmentation are not given there.
_PAPER = _BASE | {
    "optimizer": "sgd", "epochs": 130, "batch_size": 256, "lr": 0.1, "lr_scaling": "linear", "lr_batch": 256,
    "warmup_epochs": 10.0, "weight_decay": 1e-4, "label_smoothing": 0.1, "ema": 0.9999, "bn_momentum": 1e-4,
}  # fmt: skip
_IMAGENET = _PAPER | {"clip_grad": 5.0, "bn_momentum": 0.1, "flip": True}
# The port's CIFAR-10 run: the rate divided by 10 every 30 epochs (README of the port, results table).
_PORT = _BASE | {
    "optimizer": "sgd", "epochs": 100, "batch_size": 25, "lr": 0.1, "lr_scaling": "none", "lr_batch": 25,
    "warmup_epochs": 0.0, "weight_decay": 1e-4, "schedule": "step", "nesterov": False,
}  # fmt: skip


def _digits(epochs: int, batch: int, **more) -> dict[str, Any]:
    return _ADAMW | {"epochs": epochs, "batch_size": batch, "lr_batch": batch, "warmup_epochs": 2.0} | more


def _everywhere(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A recipe with one augmentation for all sets: the CIFAR family's crop, by an eighth of the side, and the flip.

    A mirrored digit is another picture, so digits are not flipped; trees have their resized crop instead of the pad.
    """
    mirrored = {name: name not in ("DIGITS", "MNIST") for name in DATASETS}
    return {name: values | {"pad": (SIDES[name] or 0) // 8, "flip": mirrored[name]} for name in DATASETS}


# Every recipe of every data set, each complete. The default of DIGITS was found by trials (docs/recipes.md); the others
# follow it, or their family's practice.
RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "default": {
        "DIGITS": _digits(12, 32, ema=0.98, **_DIGITS),
        "MNIST": _digits(20, 64, **_DIGITS),
        "FashionMNIST": _digits(30, 64, pad=2, flip=True),
        "CIFAR10": _digits(200, 128, ema=0.999, **_CIFAR) | {"warmup_epochs": 10.0},
        "CIFAR100": _digits(200, 128, ema=0.999, **_CIFAR) | {"warmup_epochs": 10.0},
        "IMAGENET": _IMAGENET,
        "WEBDATASET": _IMAGENET,  # which is what shards are for
        "FOLDER": _ADAMW | {"epochs": 90, "batch_size": 64, "lr_batch": 256, "warmup_epochs": 5.0, "flip": True},
    },
    "port": _everywhere(_PORT),
    "paper": _everywhere(_PAPER),
}


def recipe(name: str, dataset: str, img_size: int | None = None) -> dict[str, Any]:
    """The values that a recipe gives to a data set fed at `img_size`: one for each field of `IN_RECIPE`.

    Lengths in pixels are for the set's own side and grow with the images.
    """
    values = dict(RECIPES[name][dataset])
    if img_size and SIDES[dataset]:
        for key in ("pad", "cutout"):
            values[key] = round(values[key] * img_size / SIDES[dataset])
    return values


def resolve(given: dict[str, Any], dataset: str, world_size: int = 1) -> Config:
    """The Config of a run: `given` (flags of the command line) over the recipe of the resolved `dataset`.

    What only the run's start can know stays open: `ema` where it is the recipe's, `form`, `amp`, and the sizes.

    Raises:
        ConfigError: values that do not go together.
    """
    if "lr" in given and not given.keys().isdisjoint(("lr_scaling", "lr_batch")):
        raise ConfigError(f"--lr {given['lr']:g}: is taken as it is; it does not go with --lr-scaling or --lr-batch")
    own = recipe(given.get("recipe", "default"), dataset, given.get("img_size"))
    values = own | {"eval_crop": TREE_EVAL_CROP if SIDES[dataset] is None else 1.0} | given | {"dataset": dataset}
    if "warmup_epochs" not in given:  # a recipe's own warm-up fits a short run; only an explicit one is checked
        values["warmup_epochs"] = min(values["warmup_epochs"], values["epochs"] / 4)
    if "ema" not in given and values["ema"]:
        values["ema"] = None
    config = Config(**values)
    if "lr" in given:
        return config
    return dataclasses.replace(config, lr=config.lr * rate_factor(config, nominal_batch(config, world_size)))


def nominal_batch(config: Config, world_size: int) -> int:
    """Images of a step over all ranks, where the training set has as many."""
    return config.batch_size * config.accumulate * world_size


def rate_factor(config: Config, global_batch: int) -> float:
    """What the recipe's rate is multiplied by for this many images a step."""
    ratio = global_batch / config.lr_batch
    return {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[config.lr_scaling]
