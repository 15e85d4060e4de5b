"""Every setting of a detection run, and the recipes. Read without torch; what it shares with config.py is taken there.

The part of the paper's text that we had gives the architecture and how the heads' value weights start, but no schedule,
optimizer, augmentation or losses. COCO's recipe is therefore the RetinaNet family's, with what the counts of Table 2
imply (640 pixels, two scales of anchors): docs/detection.md.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from config import FIELDS, ConfigError, Settings, check_any_run, flag_of, option

DATASETS = ("DIGITS", "COCO")
ABOUT = "Train RetinaNet with attention (or its convolution baseline) to detect objects, resume it, evaluate it."
PROG = "python -m sasa.detection.train"


def same(name: str, text: str | None = None, **rule) -> Any:
    """The field of train.py's Config, with another help text or other rules where detection differs."""
    f = FIELDS[name]
    about = dict(f.metadata) | {"rule": f.metadata["rule"] | rule}
    if f.metadata["in_recipe"]:
        about["otherwise"] = "the data set's"
    return field(default=f.default, metadata=about | ({"help": text} if text else {}))


def from_recipe(text: str, kind: type, **rule) -> Any:
    """A field whose value comes from the data set's recipe unless its flag is given."""
    return option(None, text, otherwise="the data set's", kind=kind, in_recipe=True, **rule)


@dataclass(frozen=True)
class DetectionConfig(Settings):
    """A detection run. Every field is a flag, those of the same name as in train.py mean the same.

    Raises:
        ConfigError: a value of another type or out of its bounds, or values that do not go together.
    """

    # Model
    model_name: str = same("model_name", "build this backbone, in the ImageNet form")
    stem: bool = same("stem")
    attention_stages: tuple[int, ...] | None = same("attention_stages")
    heads: str = option("conv", "build the heads of these in place of 3x3 convolutions", choices=("conv", "attention"))
    fpn: str = option("conv", "build the feature pyramid of these", choices=("conv", "attention"))
    fpn_channels: int | None = from_recipe("set the width of pyramid and heads", int, low=1, high=4096)
    anchor_scales: int = option(2, "set how many sizes of anchors a level has", low=1, high=16)
    anchor_size: float | None = from_recipe("set the side of the smallest square anchor, pixels", float, above=0)
    kernel_size: int = same("kernel_size")
    num_heads: int = same("num_heads")
    position: str = same("position")
    content: bool = same("content")
    border: str = same("border")
    scale: float = same("scale")
    grouped: bool = same("grouped")
    share_embeddings: bool = same("share_embeddings")
    embedding_std: float | None = same("embedding_std")
    stem_values: str = same("stem_values")
    stem_mixtures: int | None = same("stem_mixtures")
    head_std: float = option(0.01, "standard deviation of the heads' weights at the start", above=0)
    head_shortcuts: bool | None = from_recipe("add the input to the output of each layer of the heads", bool)
    zero_init_residual: bool | None = from_recipe("start each residual branch at zero", bool)
    batch_norm: str = option(
        "plain", "normalise by each rank's batch, by constants of the checkpoint, or over all ranks",
        choices=("plain", "frozen", "sync"),
    )  # fmt: skip
    frozen_parts: int = option(0, "train all but this many of stem, layer1, ..., layer4", low=0, high=5)
    backend: str = same("backend")

    # Data
    dataset: str = option(
        "DIGITS", "train on digits on canvases, drawn on first use, or on a COCO folder", choices=DATASETS
    )
    data_dir: str = option(
        "datasets",
        "draw the digits in this folder, or read COCO from this one with annotations/, train2017/ and val2017/",
        free=True, is_path=True,
    )  # fmt: skip
    img_size: int | None = from_recipe("feed images of this longer side, pixels", int,
                                       low=32, high=4096)  # fmt: skip
    num_workers: int = option(2, "decode images by this many processes", low=0, high=1024, free=True)
    worker_timeout: float = same("worker_timeout")
    flip: bool | None = from_recipe("mirror each training image left to right, half of the time", bool)
    jitter_low: float | None = from_recipe(
        "set the smallest random scale of a training image", float, low=0.05, high=10
    )
    jitter_high: float | None = from_recipe(
        "set the largest random scale of a training image", float, low=0.05, high=10
    )

    # Training
    epochs: int | None = from_recipe("train for this many epochs", int, low=1)
    batch_size: int | None = from_recipe("set the images in a batch of one process", int, low=1)
    accumulate: int = same("accumulate")
    optimizer: str | None = from_recipe("train by this optimizer", str, choices=("sgd", "adamw"))
    lr: float | None = from_recipe(
        "set the peak learning rate, taken as it is; the recipe's grows with the batch", float, above=0
    )
    schedule: str | None = same("schedule")
    step_epochs: int | None = same("step_epochs")
    step_factor: float | None = same("step_factor")
    min_lr: float | None = same("min_lr")
    layer_decay: float = same(
        "layer_decay", "multiply the rate by this from each block of the backbone to the one before it, for "
        "fine-tuning: pyramid and heads have the full rate, the stem the lowest",
    )  # fmt: skip
    warmup_epochs: float | None = from_recipe("warm up linearly for this many epochs", float, low=0)
    momentum: float | None = from_recipe("set SGD's momentum", float, low=0, high=1)
    nesterov: bool | None = from_recipe("use SGD's momentum in Nesterov's form", bool)
    adam_beta1: float | None = same("adam_beta1")
    adam_beta2: float | None = same("adam_beta2")
    adam_eps: float | None = same("adam_eps")
    weight_decay: float | None = from_recipe(
        "decay weights by this, but not norms, biases and embeddings", float, low=0
    )
    embedding_weight_decay: float = same("embedding_weight_decay")
    bn_momentum: float | None = from_recipe("set batch norm's momentum: 1 - decay of its running statistics", float,
                                            above=0, high=1)  # fmt: skip
    clip_grad: float | None = from_recipe("clip the gradient to this norm, 0: no limit", float, low=0)
    ema: float | None = from_recipe(
        "keep a moving average of the weights with this decay, 0: none", float, low=0, below=1
    )
    eval_every: int = option(1, "evaluate whenever this many epochs are done, and after the last", low=1, free=True,
                             metavar="EPOCHS")  # fmt: skip
    seed: int = same("seed")

    # Machine
    device: str = same("device")
    amp: str = same("amp")
    matmul_precision: str = same("matmul_precision")
    channels_last: bool = same("channels_last")
    deterministic: bool = same("deterministic")

    # Files
    output_dir: str = same("output_dir")
    name: str | None = option(
        None, "name this run's folder", otherwise="by network, data set and seed", free=True, is_name=True
    )
    save_every: int = same("save_every")
    save_minutes: float = same("save_minutes")
    progress: bool = same("progress")
    max_steps: int | None = same("max_steps")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_together(self)

    def default_name(self) -> str:
        """The run's folder name: the same command gives the same one."""
        convolution = self.attention_stages == () or self.model_name.startswith("Naive")
        backbone = "stem" if self.stem else "convolution" if convolution else ""
        parts = ["detection", self.model_name, backbone, *(f"{k}-attention" for k in ("heads", "fpn")
                 if getattr(self, k) == "attention"), self.dataset, f"seed{self.seed}"]  # fmt: skip
        return "-".join(part.lower() for part in parts if part)

    @property
    def sync_bn(self) -> bool:
        """Whether batch norm is over all ranks, by train.py's name."""
        return self.batch_norm == "sync"

    def recipe_values(self) -> dict[str, Any]:
        return {key: RECIPES[self.dataset][key] for key in IN_RECIPE}

    def recipe_name(self) -> str:
        return f"of {self.dataset}"

    def network_options(self) -> dict[str, Any]:
        """The options of `retinanet` that this configuration holds, but for classes and normalisation."""
        options = {key: getattr(self, key) for key in (
            "stem", "heads", "fpn", "fpn_channels", "anchor_size", "batch_norm", "frozen_parts", "head_std",
            "head_shortcuts", "kernel_size", "num_heads", "position", "content", "border", "scale", "grouped",
            "share_embeddings", "embedding_std", "zero_init_residual", "backend", "stem_values",
        )}  # fmt: skip
        options |= {"backbone": self.model_name, "scales": self.anchor_scales, "image_size": self.img_size}
        options |= {"stem_backend": self.backend, "stem_border": self.border}
        if self.stem_mixtures is not None:
            options["stem_num_mixtures"] = self.stem_mixtures
        return options if self.attention_stages is None else options | {"attention_stages": self.attention_stages}


FIELDS_HERE = {f.name: f for f in dataclasses.fields(DetectionConfig)}
IN_RECIPE = tuple(name for name, f in FIELDS_HERE.items() if f.metadata["in_recipe"])


def check_together(config: DetectionConfig) -> None:
    """Refuses values that do not go together.

    Raises:
        ConfigError: names the flag, its value and what is allowed.
    """
    check_any_run(config)
    if None not in (config.jitter_low, config.jitter_high) and config.jitter_low > config.jitter_high:
        raise ConfigError(f"--jitter-low {config.jitter_low:g}: must be at most --jitter-high {config.jitter_high:g}")


# Of each data set, complete. DIGITS was chosen by trials (docs/detection.md). COCO: 36 epochs, rate 0.01 for 16 images,
# decay 1e-4 and momentum 0.9 are the RetinaNet family's; jitter, clipping and the width of the warm-up are ours.
_BASE = {"step_epochs": 30, "step_factor": 0.1, "min_lr": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_eps": 1e-8}
RECIPES: dict[str, dict[str, Any]] = {
    "DIGITS": _BASE | {
        "fpn_channels": 64, "anchor_size": 24.0, "head_shortcuts": True, "zero_init_residual": False, "img_size": 128,
        "flip": False, "jitter_low": 1.0, "jitter_high": 1.0,
        "epochs": 2, "batch_size": 4, "optimizer": "adamw", "lr": 1e-3, "schedule": "cosine", "warmup_epochs": 0.1,
        "momentum": 0.9, "nesterov": True, "weight_decay": 0.05, "bn_momentum": 0.1, "clip_grad": 10.0, "ema": 0.0,
    },
    "COCO": _BASE | {
        "fpn_channels": 256, "anchor_size": 32.0, "head_shortcuts": False, "zero_init_residual": False, "img_size": 640,
        "flip": True, "jitter_low": 0.8, "jitter_high": 1.2,
        "epochs": 36, "batch_size": 16, "optimizer": "sgd", "lr": 0.01, "schedule": "cosine", "warmup_epochs": 0.5,
        "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4, "bn_momentum": 0.01, "clip_grad": 10.0, "ema": 0.0,
    },
}  # fmt: skip


def resolve(given: dict[str, Any], dataset: str, world_size: int = 1) -> DetectionConfig:
    """The configuration of a run: `given` (flags of the command line) over the recipe of the data set.

    The recipe's rate is for its own batch; it grows with the global batch, linearly for SGD, by the root for AdamW.

    Raises:
        ConfigError: values that do not go together.
    """
    values = RECIPES[dataset] | given | {"dataset": dataset}
    if "warmup_epochs" not in given:  # a recipe's own warm-up fits a short run; only an explicit one is checked
        values["warmup_epochs"] = min(values["warmup_epochs"], values["epochs"] / 4)
    config = DetectionConfig(**values)
    if "lr" in given:
        return config
    ratio = config.batch_size * config.accumulate * world_size / RECIPES[dataset]["batch_size"]
    return dataclasses.replace(config, lr=config.lr * (ratio if config.optimizer == "sgd" else math.sqrt(ratio)))


def as_flag(name: str) -> str:
    """A layer's option as the flag that sets it."""
    names = {"scales": "anchor_scales", "backbone": "model_name", "image_size": "img_size"}
    return flag_of(names.get(name, name))
