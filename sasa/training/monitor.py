"""What a person sees of a run: lines on the terminal, bars, log.jsonl, TensorBoard."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from tqdm import tqdm

from config import Config
from sasa.analysis import figures
from sasa.analysis.attention_maps import LayerAttention, entropy, mean_distance
from sasa.files import write_text
from sasa.training.checkpoint import Progress
from sasa.training.evaluation import Evaluation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCALAR_EVERY = 10  # steps between points of the training curves
BATCH_SHOWN, WRONG_SHOWN = 32, 24  # images


class Monitor:
    """Writes log.jsonl and TensorBoard's files of one run's folder.

    On a resumed run log.jsonl is rebuilt from the rows of `progress`, and what TensorBoard holds of later steps is
    purged.
    """

    def __init__(self, folder: Path, progress: Progress, steps_per_epoch: int, bars: bool) -> None:
        from torch.utils.tensorboard import SummaryWriter  # half a second: only a run that trains pays it

        self.folder, self.bars = folder, bars
        write_text(folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in progress.rows))
        # Steps done are the x axis: what was logged at this one stays, what comes after it is written again; and of an
        # epoch whose steps are done, its end, whose figures stand at this step too.
        ended = progress.batch >= steps_per_epoch
        self.writer = SummaryWriter(str(folder), purge_step=progress.step + (not ended))
        if ended:
            self.step(progress.step, progress.figures)

    def epochs(self, total: int, done: int) -> tqdm:
        return tqdm(total=total, initial=done, desc="epochs", unit="epoch", disable=not self.bars, position=0)

    def batches(self, total: int, done: int, epoch: int) -> tqdm:
        return tqdm(
            total=total, initial=done, desc=f"epoch {epoch + 1}", unit="step", disable=not self.bars, position=1,
            leave=False,
        )  # fmt: skip

    def say(self, line: str) -> None:
        """A line for a person, above the bars."""
        tqdm.write(line)

    def step(self, step: int, values: dict[str, float]) -> None:
        if step % SCALAR_EVERY == 0:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def epoch(self, step: int, row: dict[str, Any], val: Evaluation, epochs: int) -> None:
        """One line on the terminal, one in log.jsonl, the epoch's scalars."""
        with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in {
            "epoch/train_loss": row["train_loss"], "epoch/train_top1_pct": row["train_top1_pct"],
            "epoch/val_loss": val.loss, "epoch/val_top1_pct": val.top1_pct, "epoch/val_top5_pct": val.top5_pct,
            "epoch/lr": row["lr"], "epoch/images_per_s": row["images_per_s"],
        }.items():  # fmt: skip
            self.writer.add_scalar(name, value, step)
        self.say(
            f"epoch {row['epoch']:3d}/{epochs}  "
            f"train loss {row['train_loss']:.4f} top-1 {row['train_top1_pct']:6.2f}%  "
            f"val loss {val.loss:.4f} top-1 {val.top1_pct:6.2f}% top-5 {val.top5_pct:6.2f}%  "
            f"lr {row['lr']:.2e}  {row['images_per_s']:.0f} images/s  {row['epoch_s']:.1f} s"
        )

    def start(self, step: int, config: Config, summary: str, batch: Tensor) -> None:
        """The first augmented batch (B, 3, H, W in [0, 1]), the configuration and the network as text."""
        self.writer.add_image("images/first_batch", figures.image_grid(batch[:BATCH_SHOWN]), step)
        settings = "\n".join(f"| {key} | {value} |" for key, value in config.to_dict().items())
        self.writer.add_text("config", f"| flag | value |\n| --- | --- |\n{settings}", step)
        self.writer.add_text("model", "```\n" + summary + "\n```", step)

    def evaluated(self, step: int, result: Evaluation, images: list[Tensor], class_names: tuple[str, ...]) -> None:
        """Wrong predictions with their labels (`images`: those of result.wrong in [0, 1]) and the confusion matrix."""
        if images:
            captions = [(class_names[label], class_names[guess]) for _, label, guess in result.wrong]
            self.draw("images/wrong_label_then_prediction", figures.mistakes_figure(images, captions), step)
        self.draw("images/confusion_matrix", figures.confusion_figure(result.confusion, class_names), step)

    def attention(self, step: int, layers: list[LayerAttention]) -> None:
        """What the heads of each layer look at: mean maps, embeddings, entropy and distance, the largest logit.

        The last is the alarm for half types: fp16 overflows at 65504.
        """
        for layer in layers:
            self.draw(f"attention_maps/{layer.name}", figures.card([figures.map_strip(layer)]), step)
            strips = figures.embedding_strips(layer)
            if strips:
                self.draw(f"attention_embeddings/{layer.name}", figures.card(strips), step)
            self.writer.add_histogram(f"attention_entropy_bits/{layer.name}", entropy(layer.weights), step)
            self.writer.add_histogram(f"attention_distance_pixels/{layer.name}", mean_distance(layer), step)
            self.writer.add_scalar(f"attention_largest_logit/{layer.name}", layer.largest_logit, step)

    def hparams(self, config: Config, metrics: dict[str, float]) -> None:
        """The configuration beside the final metrics, in this run's own files (`add_hparams` opens another run)."""
        from torch.utils.tensorboard.summary import hparams

        plain = {
            key: value if isinstance(value, bool | int | float | str) else str(value)
            for key, value in config.to_dict().items()
        }
        for summary in hparams(plain, metrics):
            self.writer.file_writer.add_summary(summary)
        for name, value in metrics.items():
            self.writer.add_scalar(name, value)

    def draw(self, tag: str, figure: "Figure", step: int) -> None:
        self.writer.add_image(tag, figures.to_tensor(figure), step)

    def flush(self) -> None:
        """Before a checkpoint: what it will purge from must be on the disk."""
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Silent:
    """The monitor of the ranks that write and show nothing: takes every call of `Monitor`."""

    def epochs(self, *_) -> tqdm:
        return tqdm(disable=True)

    batches = epochs

    def __getattr__(self, name: str):
        return lambda *_: None
