"""TensorBoard's files of a run: which cards there are, and in which order.

TensorBoard sorts cards by their tags, group by group, so groups begin with a number: loss and accuracy of validation
and training first, pictures later, attention last. The layout "Overview" (tab Custom Scalars) draws training and
validation in one chart.
"""

import html
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from config import Config
from sasa.analysis import figures
from sasa.analysis.attention_maps import LayerAttention, entropy, mean_distance
from sasa.console import printable
from sasa.training.evaluation import Evaluation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BATCH_SHOWN = 32  # images

VALIDATION, TRAINING, STEP, TEST, IMAGES = "1_validation", "2_training", "3_step", "4_test", "5_images"
MAPS, EMBEDDINGS, ENTROPY = "6_attention_maps", "7_attention_embeddings", "8_attention_entropy_bits"
DISTANCE, LARGEST = "9_attention_distance_pixels", "9_attention_largest_logit"

STEP_TAGS = {  # of a step's figures
    "train/loss": f"{STEP}/loss",
    "train/top1_pct": f"{STEP}/top1_pct",
    "train/lr": f"{STEP}/learning_rate",
    "train/grad_norm": f"{STEP}/gradient_norm",
}
EPOCH_TAGS = {  # of an epoch's row in log.jsonl
    "val_loss": f"{VALIDATION}/loss",
    "val_top1_pct": f"{VALIDATION}/top1_pct",
    "val_top5_pct": f"{VALIDATION}/top5_pct",
    "train_loss": f"{TRAINING}/loss",
    "train_top1_pct": f"{TRAINING}/top1_pct",
    "images_per_s": f"{TRAINING}/images_per_s",
}
OVERVIEW = {
    "loss": [f"{TRAINING}/loss", f"{VALIDATION}/loss"],
    "top-1, %": [f"{TRAINING}/top1_pct", f"{VALIDATION}/top1_pct"],
    "learning rate": [f"{STEP}/learning_rate"],
    "images/s": [f"{TRAINING}/images_per_s"],
    "gradient norm": [f"{STEP}/gradient_norm"],
}
# The settings that distinguish runs.
HPARAMS = (
    "model_name", "stem", "attention_stages", "kernel_size", "num_heads", "position", "content", "border", "dataset",
    "img_size", "train_images", "recipe", "epochs", "batch_size", "optimizer", "lr", "weight_decay", "label_smoothing",
    "ema", "seed",
)  # fmt: skip


class Board:
    """Writes the event files of one run's folder; what they hold from `purge_step` on is purged.

    Raises:
        OSError: of any method: the folder or the disk refuses.
    """

    def __init__(self, folder: Path, purge_step: int) -> None:
        from sasa.training.events import EventWriter  # half a second: only a run that trains pays it

        self.writer = EventWriter(folder, purge_step)
        self.writer.add_custom_scalars({"Overview": {name: ["Multiline", tags] for name, tags in OVERVIEW.items()}})

    def step(self, step: int, values: dict[str, float]) -> None:
        """A step's figures."""
        for name, value in values.items():
            tag = STEP_TAGS.get(name, f"{STEP}/{name.removeprefix('train/')}")
            self.writer.add_scalar(tag, value, step)

    def epoch(self, step: int, row: dict[str, Any]) -> None:
        """An epoch's row of log.jsonl: what is of validation or training and has a value."""
        for name, value in row.items():
            tag = epoch_tag(name)
            if tag is not None and value is not None:
                self.writer.add_scalar(tag, value, step)

    def start(self, step: int, config: Config, summary: str, batch: Tensor) -> None:
        """The first augmented batch (B, 3, H, W in [0, 1]), the configuration and the network as text."""
        self.writer.add_image(f"{IMAGES}/first_batch", figures.image_grid(batch[:BATCH_SHOWN]), step)
        settings = "\n".join(f"| {key} | {as_markdown(value)} |" for key, value in config.to_dict().items())
        self.writer.add_text("config", f"| setting | value |\n| --- | --- |\n{settings}", step)
        self.writer.add_text("model", "```\n" + summary + "\n```", step)

    def evaluated(self, step: int, result: Evaluation, images: list[Tensor], class_names: tuple[str, ...]) -> None:
        """Wrong predictions with their labels (`images`: those of result.wrong in [0, 1]) and the confusion matrix."""
        names = tuple(printable(name) for name in class_names)
        if images:
            pairs = [(names[label], names[guess]) for _, label, guess in result.wrong]
            self.draw(f"{IMAGES}/wrong_label_then_prediction", figures.mistakes_figure(images, pairs), step)
        if result.confusion is not None:
            self.draw(f"{IMAGES}/confusion_matrix", figures.confusion_figure(result.confusion, names), step)

    def attention(self, step: int, layers: list[LayerAttention]) -> None:
        """What the heads of each layer attend to: mean maps, embeddings, entropy and distance, the largest logit.

        The last is the alarm for half types: fp16 overflows at 65504.
        """
        for layer in layers:
            self.draw(f"{MAPS}/{layer.name}", figures.card([figures.map_strip(layer)]), step)
            strips = figures.embedding_strips(layer)
            if strips:
                self.draw(f"{EMBEDDINGS}/{layer.name}", figures.card(strips), step)
            self.writer.add_histogram(f"{ENTROPY}/{layer.name}", entropy(layer.weights), step)
            self.writer.add_histogram(f"{DISTANCE}/{layer.name}", mean_distance(layer), step)
            self.writer.add_scalar(f"{LARGEST}/{layer.name}", layer.largest_logit, step)

    def hparams(self, step: int, config: Config, result: Evaluation) -> None:
        """The settings of HPARAMS beside the test scores, in this run's own files (`add_hparams` opens another run)."""
        from torch.utils.tensorboard.summary import hparams

        settings, scores = config.to_dict(), {f"{TEST}/top1_pct": result.top1_pct, f"{TEST}/loss": result.loss}
        for summary in hparams({name: as_hparam(settings[name]) for name in HPARAMS}, scores):
            self.writer.file_writer.add_summary(summary)
        for tag, value in scores.items():
            self.writer.add_scalar(tag, value, step)

    def picture(self, name: str, image: Tensor, step: int) -> None:
        """(3, H, W) in [0, 1]."""
        self.writer.add_image(f"{IMAGES}/{name}", image, step)

    def draw(self, tag: str, figure: "Figure", step: int) -> None:
        self.writer.add_image(tag, figures.to_tensor(figure), step)

    def flush(self) -> None:
        """Before a checkpoint: what it will purge from must be on the disk."""
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


def epoch_tag(name: str) -> str | None:
    """The card of a row's figure; None for one that has none."""
    if name in EPOCH_TAGS:
        return EPOCH_TAGS[name]
    group, _, rest = name.partition("_")
    return {"val": f"{VALIDATION}/{rest}", "train": f"{TRAINING}/{rest}"}.get(group)


def as_hparam(value: Any) -> bool | int | float | str:
    """A setting as the table of hparams takes it."""
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    if isinstance(value, str):
        return printable(value)
    return "default" if value is None else value


def as_markdown(value: Any) -> str:
    """A setting as text that Markdown shows as it is: paths and names may hold marks, tags and bars."""
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", html.escape(printable(value), quote=False))
