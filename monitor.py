"""What a person sees of a run: lines on the terminal, bars, log.jsonl, TensorBoard."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from config import Config
from evaluation import Evaluation

SCALAR_EVERY = 10  # steps between points of the training curves
TILE = 64  # pixels: small images are enlarged to about this side in pictures
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
            captions = [f"{class_names[label]} > {class_names[guess]}" for _, label, guess in result.wrong]
            self.writer.add_image("images/wrong_label_then_prediction", captioned(images, captions), step)
        self.writer.add_image("images/confusion_matrix", confusion_picture(result.confusion, class_names), step)

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


def write_whole(path: Path, text: str) -> None:
    """Replace a small text file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, values: dict[str, Any]) -> None:
    write_whole(path, json.dumps(values, indent=2) + "\n")


# ---- pictures: (3, H, W) float in [0, 1] ----------------------------------------------------------------------------


def enlarge(images: Tensor) -> Tensor:
    """Whole-number nearest-neighbour enlargement of (B, 3, H, W) to at least TILE pixels where smaller."""
    factor = max(1, -(-TILE // images.shape[-1]))
    return images.repeat_interleave(factor, -1).repeat_interleave(factor, -2)


def grid(images: Tensor) -> Tensor:
    from torchvision.utils import make_grid

    return make_grid(enlarge(images.float().cpu()), nrow=8, padding=2, pad_value=0.5)


def captioned(images: list[Tensor], captions: list[str]) -> Tensor:
    """Images in rows of 8, each with its caption below."""
    from torchvision.utils import make_grid

    tiles = enlarge(torch.stack(images).float().cpu())
    width = tiles.shape[-1]
    labelled = [torch.cat((tile, text_strip(text, width)), dim=-2) for tile, text in zip(tiles, captions, strict=True)]
    return make_grid(labelled, nrow=8, padding=2, pad_value=0.5)


def text_strip(text: str, width: int, height: int = 12) -> Tensor:
    """White text on black, cut at the right: (3, height, width)."""
    from PIL import Image, ImageDraw
    from torchvision.transforms.v2.functional import pil_to_tensor

    strip = Image.new("RGB", (width, height))
    ImageDraw.Draw(strip).text((1, 0), text, fill="white")
    return pil_to_tensor(strip).float() / 255


def confusion_picture(confusion: Tensor, class_names: tuple[str, ...]) -> Tensor:
    """Rows the label, columns the prediction: white none of the row, dark blue all of it; counts up to 20 classes."""
    from PIL import Image, ImageDraw
    from torchvision.transforms.v2.functional import pil_to_tensor

    classes = len(confusion)
    cell = 36 if classes <= 20 else max(1, 600 // classes)
    margin = 90 if classes <= 20 else 0
    shares = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    picture = Image.new("RGB", (margin + classes * cell, margin // 3 + classes * cell), "white")
    draw = ImageDraw.Draw(picture)
    for row in range(classes):
        y = margin // 3 + row * cell
        if margin:
            draw.text((2, y + cell // 3), class_names[row][:14], fill="black")
            draw.text((margin + row * cell + 2, 10), class_names[row][:5], fill="black")
        for column in range(classes):
            share, count = shares[row, column].item(), confusion[row, column].item()
            x = margin + column * cell
            shade = tuple(round(255 + share * (dark - 255)) for dark in (8, 48, 107))
            draw.rectangle((x, y, x + cell - 1, y + cell - 1), fill=shade)
            if margin and count:
                draw.text((x + 4, y + cell // 3), str(count), fill="white" if share > 0.5 else "black")
    return pil_to_tensor(picture).float() / 255
