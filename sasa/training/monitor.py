"""What a person sees of a run: lines on the terminal, bars, log.jsonl, TensorBoard, and progress.png."""

import contextlib
import csv
import io
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from config import Config
from sasa.analysis import figures
from sasa.analysis.attention_maps import LayerAttention
from sasa.console import one_line, printable
from sasa.files import json_text, write_text
from sasa.training.board import Board
from sasa.training.checkpoint import Progress
from sasa.training.evaluation import Evaluation
from sasa.training.files import LOG, LOG_CSV, PREVIEW

SCALAR_EVERY = 10  # steps between points of the training curves
EVENT_FILES = "TensorBoard's event file"
WRONG_SHOWN = 24  # images


class Monitor:
    """Writes log.jsonl and TensorBoard's files of one run's folder, and progress.png with `config.preview`.

    On a resumed run log.jsonl is rebuilt from the rows of `progress`, and what TensorBoard holds of later steps is
    purged. An output that fails (a full disk, a picture that cannot be drawn) is reported once and dropped until it
    works again: none may cost the run its state.
    """

    def __init__(
        self, folder: Path, progress: Progress, steps_per_epoch: int, bars: bool, log_csv: bool = False
    ) -> None:
        self.folder, self.bars, self.rows = folder, bars, list(progress.rows)
        self._log_is_whole, self._has_csv = False, log_csv
        self._failing: set[str] = set()
        self._board: Board | None = None
        # Steps done are the x axis: what was logged at this one stays, what comes after it is written again; and of an
        # epoch whose steps are done, its end, whose figures stand at this step too.
        ended = progress.batch >= steps_per_epoch
        self._purge_step = progress.step + (not ended)
        self.attempt(LOG, self._write_log)
        if self._has_csv:
            self.attempt(LOG_CSV, self._write_csv)
        self.attempt(EVENT_FILES, lambda: self.board)
        if ended:
            self.step(progress.step, progress.figures)

    @property
    def board(self) -> Board:
        """TensorBoard's files; a new one where the last one failed."""
        if self._board is None:
            self._board = Board(self.folder, self._purge_step)
        return self._board

    def attempt(self, what: str, action: Callable[[], Any]) -> None:
        """Draw or write one output; where that fails, a line says so and the run goes on."""
        try:
            action()
            self._failing.discard(what)
        except Exception as error:
            if what not in self._failing:
                self._failing.add(what)
                print(f"{what} could not be written: {one_line(error, 300)}; the run goes on",
                      file=sys.stderr, flush=True)  # fmt: skip
            if what == EVENT_FILES and isinstance(error, OSError):
                self._drop_board()

    def _drop_board(self) -> None:
        board, self._board = self._board, None
        with contextlib.suppress(Exception):  # its buffer cannot be written either
            board.close()

    def _write_log(self) -> None:
        """The last row to the end of log.jsonl; all rows to a new one where it is not whole."""
        path = self.folder / LOG
        if self._log_is_whole:
            self._log_is_whole = False  # until the row is written
            flags = os.O_WRONLY | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
            with os.fdopen(os.open(path, flags), "a", encoding="utf-8") as file:
                file.write(json_text(self.rows[-1]) + "\n")
        else:
            write_text(path, "".join(json_text(row) + "\n" for row in self.rows))
        self._log_is_whole = True

    def _write_csv(self) -> None:
        write_text(self.folder / LOG_CSV, csv_text(self.rows))

    def whole_run(self, total: int, done: int) -> tqdm:
        """The bar of the run's steps, whose estimate of the time left counts what validation and saves take."""
        return tqdm(
            total=total, initial=done, desc="run", unit="step", disable=not self.bars, position=0, smoothing=0
        )  # fmt: skip

    def batches(self, total: int, done: int, epoch: int) -> tqdm:
        """The bar of an epoch's steps."""
        return tqdm(
            total=total, initial=done, desc=f"epoch {epoch + 1}", unit="step", disable=not self.bars, position=1,
            leave=False,
        )  # fmt: skip

    def say(self, line: str) -> None:
        """A line for a person, above the bars."""
        tqdm.write(printable(line), file=sys.stdout)
        sys.stdout.flush()

    def step(self, step: int, values: dict[str, float]) -> None:
        if step % SCALAR_EVERY == 0:
            self.attempt(EVENT_FILES, lambda: self.board.step(step, values))

    def epoch(self, step: int, row: dict[str, Any], epochs: int) -> None:
        """`row` of a classification run."""
        scored = ""
        if row["val_top1_pct"] is not None:
            top = f"top-1 {row['val_top1_pct']:6.2f}% top-5 {row['val_top5_pct']:6.2f}%"
            scored = f"val loss {row['val_loss']:.4f} {top}  "
        self.row(
            step,
            row,
            f"epoch {row['epoch']:3d}/{epochs}  "
            f"train loss {row['train_loss']:.4f} top-1 {row['train_top1_pct']:6.2f}%  {scored}"
            f"lr {row['lr']:.2e}  {row['images_per_s']:.0f} images/s  {row['epoch_s']:.1f} s",
        )

    def row(self, step: int, row: dict[str, Any], line: str) -> None:
        """An epoch's row: one line on the terminal, one in log.jsonl, the epoch's scalars."""
        self.rows.append(row)
        self._purge_step = step + 1  # of a new event file, should this one fail
        self.attempt(LOG, self._write_log)
        if self._has_csv:
            self.attempt(LOG_CSV, self._write_csv)
        self.attempt(EVENT_FILES, lambda: self.board.epoch(step, row))
        self.say(line)

    def preview(self, result: Evaluation, images: list[Tensor], class_names: tuple[str, ...]) -> None:
        """progress.png: the curves so far and the first wrong predictions (`images`: those of result.wrong)."""
        names = [(class_names[label], class_names[guess]) for _, label, guess in result.wrong]
        mistakes = [(image, *pair) for image, pair in zip(images, names, strict=True)]
        draw = partial(figures.progress_figure, list(self.rows), mistakes)
        self.attempt(PREVIEW, lambda: figures.save(draw(), self.folder / PREVIEW))

    def start(self, step: int, config: Config, summary: str, batch: Tensor) -> None:
        """The first augmented batch (B, 3, H, W in [0, 1]), the configuration and the network as text."""
        self.attempt(EVENT_FILES, lambda: self.board.start(step, config, summary, batch))

    def evaluated(self, step: int, result: Evaluation, images: list[Tensor], class_names: tuple[str, ...]) -> None:
        """Wrong predictions with their labels (`images`: those of result.wrong in [0, 1]) and the confusion matrix."""
        self.attempt(EVENT_FILES, lambda: self.board.evaluated(step, result, images, class_names))

    def attention(self, step: int, layers: list[LayerAttention]) -> None:
        """TensorBoard's attention panels."""
        self.attempt(EVENT_FILES, lambda: self.board.attention(step, layers))

    def hparams(self, step: int, config: Config, result: Evaluation) -> None:
        """The settings beside the test scores."""
        self.attempt(EVENT_FILES, lambda: self.board.hparams(step, config, result))

    def picture(self, name: str, image: Tensor, step: int) -> None:
        """(3, H, W) in [0, 1]."""
        self.board.picture(name, image, step)

    def flush(self) -> None:
        """Before a checkpoint: what it will purge from must be on the disk."""
        self.attempt(EVENT_FILES, lambda: self.board.flush())

    def close(self) -> None:
        if self._board is not None:
            self.attempt(EVENT_FILES, lambda: self.board.flush())
        self._drop_board()


def csv_text(rows: list[dict[str, Any]]) -> str:
    """Rows of log.jsonl as a table: a line of names, a line a row, nothing for a value that is not there.

    Values that hold several, such as digests, are left out.
    """
    names = list(dict.fromkeys(name for row in rows for name, value in row.items() if not isinstance(value, dict)))
    out = io.StringIO()
    table = csv.DictWriter(out, names, extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return out.getvalue() if names else ""


class Silent:
    """The monitor of the ranks that write and show nothing: takes every call of `Monitor`."""

    def whole_run(self, *_) -> tqdm:
        return tqdm(disable=True)

    batches = whole_run

    def __getattr__(self, name: str):
        return lambda *_: None
