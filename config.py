"""Config (every setting of a run) and `resolve`, which fills in what the command line leaves open.

A value comes from the command line (sasa/training/cli.py), else from the recipe of the data set (sasa/recipes.py),
else from the field's default. "auto" values are resolved once, at the start of a run; the resolved Config is what
config.json and the checkpoints hold, so that an edited recipe never changes a run that was started before. Read without
torch.
"""

import dataclasses
import math
from dataclasses import dataclass, fields
from typing import Any

from sasa.data.specs import DATASETS, SIDES
from sasa.recipes import RECIPES
from sasa.settings import ConfigError, Settings, as_typed, flag_of, from_recipe, option

MODELS = ("ResNet26", "ResNet38", "ResNet50", "NaiveResNet26", "NaiveResNet38")


@dataclass(frozen=True)
class Config(Settings):
    """A run. Every field is a flag: `batch_size` is --batch-size.

    Raises:
        ConfigError: a value of another type or out of its bounds, or values that do not go together.
    """

    # Model
    model_name: str = option("ResNet26", "build this network", choices=MODELS)
    stem: bool = option(False, "use the attention stem in place of the first convolution")
    form: str = option(
        "auto",
        "build the network's form for small images or for ImageNet's; auto: small up to 64 pixels",
        choices=("auto", "small", "imagenet"),
    )
    attention_stages: tuple[int, ...] | None = option(
        None,
        "give these stages (1 2 3 4) attention in place of 3x3 convolutions; no value: the convolution baseline",
        otherwise="all; none for the Naive networks",
        kind=int,
        choices=(1, 2, 3, 4),
        nargs="*",
        metavar="N",
    )
    kernel_size: int = option(7, "set the side of the attention window, pixels", low=1, high=1023)
    num_heads: int = option(8, "set the heads of each attention layer (the stem has 4)", low=1)
    position: str = option(
        "relative", "give attention this position information", choices=("relative", "absolute", "none")
    )
    content: bool = option(True, "attend by q.k + q.r; --no-content: by q.r alone (Table 6)")
    border: str = option(
        "mask", "give keys outside the map weight 0, or take them as zero keys in the softmax", choices=("mask", "zero")
    )
    scale: float = option(1.0, "multiply the logits by this factor (the paper has none)", above=0, high=1e38)
    grouped: bool = option(False, "let each head project its own input channels only")
    share_embeddings: bool = option(False, "share one pair of embedding tables among all heads of a layer")
    embedding_std: float | None = option(
        None, "set the standard deviation of the embeddings at the start", otherwise="by head width", kind=float, low=0
    )
    stem_window: str = option(
        "auto",
        "set the windows of the attention stem; auto: sliding in the small form",
        choices=("auto", "block", "sliding"),
    )
    stem_values: str = option(
        "mixture", "set how the attention stem makes its values (Table 7)", choices=("mixture", "plain", "conv")
    )
    stem_mixtures: int | None = option(
        None,
        "set how many value matrices the attention stem mixes",
        otherwise="16 in the small form, else 4",
        kind=int,
        low=1,
        high=1024,
    )
    zero_init_residual: bool | None = from_recipe("start each residual branch at zero", bool)
    backend: str = option("auto", "compute attention by this kernel (python -m tools.backends lists them)", free=True)

    # Data
    dataset: str = option(
        "auto",
        "train on this data set; auto: CIFAR10 if at hand, or downloadable to a GPU machine, else DIGITS",
        choices=("auto", *DATASETS),
    )
    data_dir: str = option(
        "datasets",
        "read the data sets from this folder, or a FOLDER or IMAGENET tree, or WEBDATASET's train shards",
        free=True, is_path=True,
    )  # fmt: skip
    img_size: int | None = option(
        None, "feed images of this side, pixels", otherwise="the set's own; 224 for trees", kind=int, low=8, high=4096
    )
    eval_size: int | None = option(
        None, "evaluate images of this side, pixels", otherwise="--img-size", kind=int, low=8, high=4096
    )
    eval_crop: float | None = option(
        None,
        "evaluate this share of the resized image's side, its centre",
        otherwise="the recipe's",
        kind=float,
        above=0,
        high=1,
        in_recipe=True,
    )
    eval_interpolation: str = option(
        "bilinear", "resize images for evaluation by this interpolation, antialiased", choices=("bilinear", "bicubic")
    )
    train_images: int | None = option(
        None, "train on a seeded part of this many images; --holdout is taken from it", otherwise="all", kind=int, low=1
    )
    holdout: float = option(
        0.0, "hold this part of train out to select best.pt by: a fraction below 1, or a number of images", low=0
    )
    val_every: int = option(
        1, "validate whenever this many epochs are done, and after the last", low=1, metavar="EPOCHS"
    )
    early_stop: int = option(
        0,
        "end the run when top-1 on the images of --holdout has not risen for this many epochs; 0: never",
        low=0,
        metavar="EPOCHS",
    )
    skip_bad_images: bool = option(False, "skip unreadable images of a tree, counted, instead of ending", free=True)
    num_workers: int | None = option(
        None, "decode a tree's images by this many processes", kind=int, low=0, high=1024, free=True,
        otherwise="up to 4 on a CPU; for a GPU one less than its share of the CPUs, 1 to 32",
    )  # fmt: skip
    worker_timeout: float = option(
        600.0, "end the run when decoding processes are silent for this many seconds, 0: never", low=0, free=True
    )
    index_dir: str | None = option(
        None, "keep WEBDATASET's indexes in this folder", otherwise="beside the shards, or the user's cache", free=True,
        is_path=True,
    )  # fmt: skip

    # Augmentation of the training images
    crop_area: float | None = from_recipe(
        "set the smallest share of a tree's image that its random resized crop takes", float, above=0, high=1
    )
    crop_aspect: float | None = from_recipe(
        "set the widest aspect of that crop, width / height; its inverse is the narrowest", float, low=1, high=100
    )
    pad: int | None = from_recipe("shift each image by up to this many pixels, into padding", int, low=0, high=4096)
    flip: bool | None = from_recipe("mirror each image left to right, half of the time", bool)
    rotate: float | None = from_recipe("rotate each image by up to this many degrees", float, low=0, high=180)
    translate: float | None = from_recipe("shift each image by up to this share of its side", float, low=0, below=1)
    zoom: float | None = from_recipe("scale each image by up to this share, either way", float, low=0, below=1)
    cutout: int | None = from_recipe(
        "set a square of each image to the mean, of this side in pixels", int, low=0, high=4096
    )
    auto_augment: str | None = from_recipe(
        "change colours and shapes by torchvision's operations: RandAugment, TrivialAugmentWide, or AutoAugment's "
        "policy for the data set", str, choices=("none", "rand", "trivial", "auto"),
        switches={"--randaugment": "rand", "--no-randaugment": "none"},
    )  # fmt: skip
    rand_rounds: int | None = from_recipe("set how many of RandAugment's operations an image gets", int, low=1, high=14)
    rand_magnitude: int | None = from_recipe("set the magnitude of RandAugment's operations", int, low=0, high=30)
    random_erase: float | None = from_recipe(
        "set a rectangle of this share of the images to the mean, 2 to 33% of the area",
        float,
        low=0,
        high=1,
        metavar="SHARE",
    )
    repeats: int | None = from_recipe(
        "take each image of a step this many times, augmented anew each time; an epoch keeps its number of steps and "
        "so takes fewer of the images", int, low=1, high=1024,
    )  # fmt: skip
    mixup: float | None = from_recipe("mix images by mixup with this alpha, 0: not at all", float, low=0)
    cutmix: float | None = from_recipe("mix images by CutMix with this alpha, 0: not at all", float, low=0)
    reflect: bool | None = from_recipe("mirror the image beyond its border where it is shifted, not black", bool)

    # Training
    recipe: str = option(
        "default", "fill in every flag whose default is \"the recipe's\", by data set",
        choices=tuple(RECIPES),
        alias={"seed": "port"},
    )  # fmt: skip
    epochs: int | None = from_recipe("train for this many epochs", int, low=1)
    batch_size: int | None = from_recipe("set the images in a batch of one process", int, low=1)
    accumulate: int = option(1, "make one step of the gradients of this many batches", low=1)
    optimizer: str | None = from_recipe("train by this optimizer", str, choices=("sgd", "adamw", "lamb"))
    lr: float | None = from_recipe("set the peak learning rate, taken as it is; the recipe's is scaled", float, above=0)
    lr_scaling: str | None = from_recipe(
        "set how the recipe's rate follows the ratio of the global batch to --lr-batch", str,
        choices=("none", "sqrt", "linear"),
    )  # fmt: skip
    lr_batch: int | None = from_recipe("set the global batch that the recipe's rate is for", int, low=1)
    schedule: str | None = from_recipe(
        "set the rate after the warm-up: a cosine down to --min-lr, or steps of --step-factor every --step-epochs", str,
        choices=("cosine", "step"),
    )  # fmt: skip
    step_epochs: int | None = from_recipe("set the epochs between two steps of --schedule step", int, low=1)
    step_factor: float | None = from_recipe(
        "set what each step of --schedule step multiplies the rate by", float, above=0, high=1
    )
    min_lr: float | None = from_recipe(
        "keep the rate after the warm-up at or above this; where the cosine ends", float, low=0
    )
    layer_decay: float = option(
        1.0, "multiply the rate by this from each block to the one before it, for fine-tuning: the classifier has the "
        "full rate, the stem the lowest", above=0, high=1,
    )  # fmt: skip
    warmup_epochs: float | None = from_recipe("warm up linearly for this many epochs", float, low=0)
    momentum: float | None = from_recipe("set SGD's momentum", float, low=0, high=1)
    nesterov: bool | None = from_recipe("use SGD's momentum in Nesterov's form", bool)
    adam_beta1: float | None = from_recipe("set the decay of AdamW's and LAMB's mean gradient", float, low=0, below=1)
    adam_beta2: float | None = from_recipe(
        "set the decay of AdamW's and LAMB's mean square gradient", float, low=0, below=1
    )
    adam_eps: float | None = from_recipe("set what AdamW and LAMB add to their denominator", float, above=0)
    weight_decay: float | None = from_recipe(
        "decay weights by this, but not norms, biases and embeddings", float, low=0
    )
    embedding_weight_decay: float = option(0.0, "decay the attention's embeddings by this", low=0)
    bn_momentum: float | None = from_recipe(
        "set batch norm's momentum: 1 - decay of its running statistics", float, above=0, high=1
    )
    loss: str | None = from_recipe(
        "train by cross-entropy of the softmax, or by binary cross-entropy of each class", str, choices=("ce", "bce")
    )
    bce_threshold: float = option(
        0.2, "take classes of a mixed image as present where their share is above this, with --loss bce", low=0, below=1
    )
    class_weights: str = option(
        "none", "weigh the classes in the training loss: none | balanced, the fewer images the more | a JSON file of "
        '{"class name": weight, ...}', metavar="FILE", is_path=True,
    )  # fmt: skip
    drop_path: float | None = from_recipe(
        "leave out the last block's residual branch for this share of the images; from 0 in the first block the share "
        "grows linearly", float, low=0, below=1, metavar="RATE",
    )  # fmt: skip
    label_smoothing: float | None = from_recipe("smooth the labels by this share", float, low=0, high=1)
    sync_bn: bool = option(False, "normalise by the batches of all ranks together")
    clip_grad: float | None = from_recipe("clip the gradient to this norm, 0: no limit", float, low=0)
    ema: float | None = option(
        None,
        "keep a moving average of the weights with this decay, 0: none",
        otherwise="the recipe's, over at most a fifth of the steps",
        kind=float,
        low=0,
        below=1,
        in_recipe=True,
    )
    seed: int = option(0, "set the seed of weights, order and augmentation", low=0)

    # Machine
    device: str = option("auto", "run on auto, cpu, cuda or cuda:N", free=True)
    amp: str = option(
        "auto", "compute in mixed precision; auto: bf16 on GPUs that have it", choices=("auto", "off", "bf16", "fp16")
    )
    compile: bool = option(False, "compile the network with torch.compile")
    compile_mode: str = option(
        "default",
        "compile with torch.compile's mode of this name",
        choices=("default", "reduce-overhead", "max-autotune"),
    )
    matmul_precision: str = option(
        "highest",
        "compute fp32 products and convolutions at this precision; high: TF32 on GPUs that have it",
        choices=("highest", "high"),
    )
    # Free: without --deterministic no run on CUDA repeats another to the bit anyway, and with it this is off.
    cudnn_benchmark: bool = option(
        True, "let cuDNN time its convolutions and take the fastest; not under --deterministic", free=True
    )
    channels_last: bool = option(True, "keep maps in channels-last layout; --no-channels-last: contiguous")
    deterministic: bool = option(False, "refuse operators that are not deterministic")

    # Files
    output_dir: str = option("runs", "write the runs below this folder", free=True, is_path=True)
    name: str | None = option(
        None, "name this run's folder", otherwise="by model, stem, data set, recipe, seed", free=True, is_name=True
    )
    save_every: int = option(
        1, "save whenever this many epochs are done; 0: not by epochs", low=0, free=True, metavar="EPOCHS"
    )
    save_minutes: float = option(
        10.0, "save last.pt whenever this many minutes are over, 0: not by the clock", low=0, free=True
    )
    progress: bool = option(True, "show progress bars on a terminal", free=True)
    attention_every: int = option(
        5,
        "draw TensorBoard's attention panels whenever this many epochs are done, 0: never",
        low=0,
        free=True,
        metavar="EPOCHS",
    )
    digest: bool = option(
        True, "write SHA-256 of weights, buffers, optimizer, moving average and generators into each row of log.jsonl",
        free=True,
    )  # fmt: skip
    keep_states: int = option(
        0, "keep the state at the start and whenever this many epochs are done, for tools.verify; 0: none", low=0,
        free=True, metavar="EPOCHS",
    )  # fmt: skip
    log_csv: bool = option(False, "write log.csv beside log.jsonl, a table for spreadsheets", free=True)
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
        options |= {"stem_backend": self.backend, "stem_border": self.border}
        if self.stem_mixtures is not None:
            options["stem_num_mixtures"] = self.stem_mixtures
        if self.stem_window != "auto":
            options["stem_window"] = self.stem_window
        if self.attention_stages is not None:
            options["attention_stages"] = self.attention_stages
        return options | {"small_images": self.form == "small"}


FIELDS = {f.name: f for f in fields(Config)}
IN_RECIPE = tuple(f.name for f in fields(Config) if f.metadata["in_recipe"])


def check_any_run(config: Settings) -> None:
    """Refuses values that do not go together in any kind of run.

    Raises:
        ConfigError: names the flag, its value and what is allowed.
    """
    if config.position in ("none", "absolute") and not config.content:
        raise ConfigError(
            f"--no-content leaves no logits with --position {config.position}: allowed is --position relative"
        )
    if config.model_name.startswith("Naive") and config.attention_stages:
        stages = " ".join(map(str, config.attention_stages))
        raise ConfigError(f"--attention-stages {stages}: {config.model_name} is a convolution network, allowed is none")
    if config.warmup_epochs is not None and config.epochs is not None and config.warmup_epochs >= config.epochs:
        raise ConfigError(f"--warmup-epochs {config.warmup_epochs:g}: must be below --epochs {config.epochs}")
    if None not in (config.min_lr, config.lr) and config.min_lr > config.lr:
        raise ConfigError(f"--min-lr {config.min_lr:g}: must be at most --lr {config.lr:g}")
    if config.save_every == 0 and config.save_minutes == 0:
        raise ConfigError("--save-every 0 and --save-minutes 0 would never save: one must be above 0")


def _check_together(config: Config) -> None:
    """Values that do not go together. Raises ConfigError."""
    check_any_run(config)
    if config.holdout >= 1 and config.holdout != int(config.holdout):
        raise ConfigError(f"--holdout {config.holdout:g}: must be a fraction below 1 or a whole number of images")
    if config.early_stop and not config.holdout:
        raise ConfigError(f"--early-stop {config.early_stop}: needs --holdout, whose images it goes by")
    if None not in (config.repeats, config.batch_size) and config.repeats > max(config.batch_size // 2, 1):
        raise ConfigError(f"--repeats {config.repeats}: must be at most half of --batch-size {config.batch_size}")
    side = config.img_size or SIDES.get(config.dataset)
    if config.reflect and side and config.pad and config.pad >= side:
        raise ConfigError(f"--pad {config.pad}: with --reflect must be below the image's side, {side} pixels")
    if config.dataset != "auto" and SIDES[config.dataset] is None:
        for name in ("pad", "rotate", "translate", "zoom"):
            if getattr(config, name):
                raise ConfigError(
                    f"{flag_of(name)} {getattr(config, name):g}: {config.dataset} is trained on random resized crops "
                    "instead; allowed is 0"
                )


# Fields that have an effect beside certain values of another one only.
NEEDED = {
    "rand_rounds": ("auto_augment", "rand"), "rand_magnitude": ("auto_augment", "rand"),
    "step_epochs": ("schedule", "step"), "step_factor": ("schedule", "step"),
    "momentum": ("optimizer", "sgd"), "nesterov": ("optimizer", "sgd"),
    "adam_beta1": ("optimizer", "adamw", "lamb"), "adam_beta2": ("optimizer", "adamw", "lamb"),
    "adam_eps": ("optimizer", "adamw", "lamb"),
    "bce_threshold": ("loss", "bce"), "compile_mode": ("compile", True),
}  # fmt: skip


def idle_flags(config: Settings, given: dict[str, Any]) -> dict[str, str]:
    """The given fields that have no effect in a run of this configuration, each with why, in a line."""
    rules, why = {f.name: f.metadata["rule"] for f in fields(config)}, {}
    for name, value in given.items():
        flag = " ".join(as_typed(name, value))
        if name in NEEDED:
            other, *wanted = NEEDED[name]
            if getattr(config, other) not in wanted:
                known = [value for value in wanted if value in rules[other].get("choices", wanted)]
                why[name] = f"{flag}: needs {' or '.join(' '.join(as_typed(other, value)) for value in known)}"
        elif name in ("crop_area", "crop_aspect") and SIDES[config.dataset] is not None:
            why[name] = f"{flag}: needs an image tree, whose images are cropped so; those of {config.dataset} are not"
    return why


def refuse_idle_flags(config: Settings, given: dict[str, Any]) -> None:
    """Refuses flags that a new run would ignore. Not those of a resumed one, which may spell out any of its values.

    Raises:
        ConfigError: one of `idle_flags`.
    """
    for line in idle_flags(config, given).values():
        raise ConfigError(line)


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
    values = own | given | {"dataset": dataset}
    if "warmup_epochs" not in given:  # a recipe's own warm-up fits a short run; only an explicit one is checked
        values["warmup_epochs"] = min(values["warmup_epochs"], values["epochs"] / 4)
    if "ema" not in given and values["ema"]:
        values["ema"] = None
    config = Config(**values)
    if "lr" in given:
        return config
    return dataclasses.replace(config, lr=config.lr * rate_factor(config, nominal_batch(config, world_size)))


def nominal_batch(config: Config, world_size: int = 1) -> int:
    """Images of a step over all ranks, where the training set has as many."""
    return config.batch_size * config.accumulate * world_size


def rate_factor(config: Config, global_batch: int) -> float:
    """What the recipe's rate is multiplied by for this many images a step."""
    ratio = global_batch / config.lr_batch
    return {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[config.lr_scaling]


def rate_for(config: Config, images: int, nominal: int) -> float:
    """The recipe's rate, which `config` has for steps of `nominal` images, for steps of `images`."""
    return config.lr * (rate_factor(config, images) / rate_factor(config, nominal))
