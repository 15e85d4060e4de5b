"""What a person sees of a run: lines on the terminal, bars, log.jsonl, TensorBoard."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from config import Config
from sasa.analysis.attention_maps import LayerAttention, entropy, mean_distance
from sasa.analysis.figures import embedding_rows, map_row, table, to_tensor
from sasa.training.evaluation import Evaluation

SCALAR_EVERY = 10  # steps between points of the training curves
TILE, CAPTIONED_TILE = 64, 96  # pixels: small images are enlarged to about this side in pictures
BATCH_SHOWN, WRONG_SHOWN = 32, 24  # images


class Monitor:
    """Writes log.jsonl and TensorBoard's files of one run's folder; `rows` are the log's rows so far.

    On a resumed run log.jsonl is rebuilt from `rows`, and what TensorBoard holds past `step` is purged.
    """

    def __init__(self, folder: Path, rows: list[dict[str, Any]], step: int, bars: bool) -> None:
        from torch.utils.tensorboard import SummaryWriter  # half a second: only a run that trains pays it

        self.folder, self.bars = folder, bars
        write_whole(folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        # Steps done are the x axis: what was logged at `step` stays, what comes after it is written again.
        self.writer = SummaryWriter(str(folder), purge_step=step + 1)

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
        self.writer.add_image("images/first_batch", grid(batch[:BATCH_SHOWN]), step)
        settings = "\n".join(f"| {key} | {value} |" for key, value in config.to_dict().items())
        self.writer.add_text("config", f"| flag | value |\n| --- | --- |\n{settings}", step)
        self.writer.add_text("model", "```\n" + summary + "\n```", step)

    def evaluated(self, step: int, result: Evaluation, images: list[Tensor], class_names: tuple[str, ...]) -> None:
        """Wrong predictions with their labels (`images`: those of result.wrong in [0, 1]) and the confusion matrix."""
        if images:
            captions = [(class_names[label], class_names[guess]) for _, label, guess in result.wrong]
            self.writer.add_image("images/wrong_label_then_prediction", captioned(images, captions), step)
        self.writer.add_image("images/confusion_matrix", confusion_picture(result.confusion, class_names), step)

    def attention(self, step: int, layers: list[LayerAttention]) -> None:
        """What the heads of each layer look at: mean maps, embeddings, entropy and distance, the largest logit.

        The last is the alarm for half types: fp16 overflows at 65504.
        """
        for layer in layers:
            self.writer.add_image(f"attention_maps/{layer.name}", to_tensor(table([map_row(layer)])), step)
            rows = embedding_rows(layer)
            if rows:
                self.writer.add_image(f"attention_embeddings/{layer.name}", to_tensor(table(rows)), step)
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


def write_whole(path: Path, text: str) -> None:
    """Replace a small text file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, values: dict[str, Any]) -> None:
    write_whole(path, json.dumps(values, indent=2) + "\n")


# ---- pictures: (3, H, W) float in [0, 1] ----------------------------------------------------------------------------

LINE = 14  # pixels: height of a line of PIL's own font
CELL, LABELLED_CLASSES, NAME_SHOWN = 36, 20, 14  # of a confusion matrix: pixels, classes, characters
DARK = (8, 48, 107)  # the colour of a full cell


def enlarge(images: Tensor, side: int = TILE) -> Tensor:
    """Whole-number nearest-neighbour enlargement of (B, 3, H, W) to at least `side` pixels where smaller."""
    factor = max(1, -(-side // images.shape[-1]))
    return images.repeat_interleave(factor, -1).repeat_interleave(factor, -2)


def grid(images: Tensor) -> Tensor:
    from torchvision.utils import make_grid

    return make_grid(enlarge(images.float().cpu()), nrow=8, padding=2, pad_value=0.5)


def captioned(images: list[Tensor], captions: list[tuple[str, str]]) -> Tensor:
    """Images in rows of 8, each with its label and below it what it was taken for."""
    from torchvision.utils import make_grid

    tiles = enlarge(torch.stack(images).float().cpu(), CAPTIONED_TILE)
    labelled = []
    for tile, (label, guess) in zip(tiles, captions, strict=True):
        lines = text_strip(label, tile.shape[-1], "white"), text_strip(f"> {guess}", tile.shape[-1], "orange")
        labelled.append(torch.cat((tile, *lines), dim=-2))  # (3, H + 2 LINE, W)
    return make_grid(labelled, nrow=8, padding=2, pad_value=0.5)


def text_strip(text: str, width: int, fill: str) -> Tensor:
    """A line of text on black, cut at the right: (3, LINE, width)."""
    from PIL import Image, ImageDraw
    from torchvision.transforms.v2.functional import pil_to_tensor

    strip = Image.new("RGB", (width, LINE))
    ImageDraw.Draw(strip).text((2, 0), printable(text), fill=fill)
    return pil_to_tensor(strip).float() / 255


def printable(text: str) -> str:
    """PIL's own font may lack everything beyond Latin-1, and then raises."""
    return text.encode("latin-1", "replace").decode("latin-1")


def confusion_picture(confusion: Tensor, class_names: tuple[str, ...]) -> Tensor:
    """Rows the label, columns the prediction: white none of the row, dark blue all of it; counts up to 20 classes.

    The cells are the lower right square of the picture.
    """
    from PIL import Image, ImageDraw
    from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

    classes = len(confusion)
    cell = CELL if classes <= LABELLED_CLASSES else max(1, 600 // classes)
    shares = confusion / confusion.sum(1, keepdim=True).clamp(min=1)  # (classes, classes)
    cells = 1 + shares * (torch.tensor(DARK).view(3, 1, 1) / 255 - 1)  # (3, classes, classes)
    cells = enlarge(cells[None], classes * cell)[0]  # (3, classes * cell, classes * cell)
    if classes > LABELLED_CLASSES:
        return cells
    names = [printable(name)[:NAME_SHOWN] for name in class_names]
    widest = round(max(ImageDraw.Draw(Image.new("RGB", (1, 1))).textlength(name) for name in names))
    left, top = max(widest, 30) + 8, (widest if widest > CELL - 4 else LINE) + LINE + 8
    picture = Image.new("RGB", (left + cells.shape[-1], top + cells.shape[-2]), "white")
    picture.paste(to_pil_image((cells * 255).round().byte()), (left, top))
    draw = ImageDraw.Draw(picture)
    draw.text((left, 1), "prediction", fill="gray")
    draw.text((2, top - LINE - 2), "label", fill="gray")
    for i, name in enumerate(names):
        width = draw.textlength(name)
        draw.text((left - 5 - width, top + i * cell + (cell - LINE) // 2), name, fill="black")
        title = Image.new("RGB", (max(round(width), 1) + 1, LINE), "white")
        ImageDraw.Draw(title).text((0, 0), name, fill="black")
        if widest > CELL - 4:
            title = title.rotate(90, expand=True)
        picture.paste(title, (left + i * cell + (cell - title.width) // 2, top - title.height - 3))
        for j, (share, count) in enumerate(zip(shares[i].tolist(), confusion[i].tolist(), strict=True)):
            if count:
                text = str(count)
                x = left + j * cell + (cell - draw.textlength(text)) // 2
                fill = "white" if share > 0.5 else "black"
                draw.text((x, top + i * cell + (cell - LINE) // 2), text, fill=fill)
    return pil_to_tensor(picture).float() / 255
