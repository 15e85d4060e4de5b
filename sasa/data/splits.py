"""The images of one purpose, and their batches: plan -> fetch -> transform, for a tensor and for files."""

import os
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from itertools import tee
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sasa.data.augment import AugmentConfig
from sasa.data.batches import DataInfo, Piece, normalise, own_part, plan, transform
from sasa.data.batches import steps_per_epoch as count_steps
from sasa.data.errors import DataError
from sasa.data.fingerprint import list_tensors, of_files, of_tensors
from sasa.data.images import Evaluated, ImageFiles, Key, Source
from sasa.data.transfer import to_device
from sasa.data.workers import WORKER_TIMEOUT_S, Reader


class Split(Protocol):
    """The images of one purpose, training, holdout or test: `TensorData` or `FolderData`.

    Attributes:
        info: of the whole data set.
        bad_images: "path: what is wrong" of each file that this process could not read and skipped so far.
        skipped: how often this process could not read a file in its latest pass; in `eval_batches`, images left out.
    """

    info: DataInfo
    bad_images: list[str]
    skipped: int

    def __len__(self) -> int: ...

    def steps_per_epoch(self, batch_size: int, world_size: int = 1, accumulate: int = 1) -> int:
        """Optimizer steps in an epoch: `steps_per_epoch` of this many images."""

    def batches(self, epoch: int, start_step: int = 0, **options) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch of this process from optimizer step start_step on: `accumulate` pairs a step.

        Args:
            options: those of `plan`.

        Yields:
            images (B, 3, H, W) float32 and labels (B,) int64, or soft targets (B, classes) float32 where mixed.

        Raises:
            DataError: a step with fewer images than pieces; a file that cannot be read, unless such are skipped.
            WorkerError: a decoding process died, or handed nothing over.
        """

    def eval_batches(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Each image once over all ranks, in order, not augmented: (B, 3, H, W) float32 and labels (B,) int64.

        Skipped files are left out, so that nothing counts twice: the total over all ranks is len(self) less what they
        have `skipped` at the end.
        """

    def image(self, index: int) -> tuple[Tensor, int]:
        """One image as evaluation feeds it, (3, H, W) float32, and its label.

        Raises:
            DataError, IndexError: a file that cannot be read, a number beyond the images.
            WorkerError: no memory, or no more open files.
        """

    def fingerprint(self) -> dict[str, Any]:
        """`sasa.data.fingerprint.fingerprint` of the images."""

    def listed(self) -> Iterator[tuple[str, int, str]]:
        """Of each image, in the fingerprint's order: name, label, and "120 bytes" of a file or a digest of pixels."""

    def class_counts(self) -> list[int]:
        """The images of each class."""

    def close(self) -> None:
        """Ends the workers, where there are any."""


class TensorData:
    """A small set on the device; a `Split`."""

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        info: DataInfo,
        device: torch.device | str = "cpu",
        identity: dict[str, Any] | None = None,
        listed: list[tuple[str, int, str]] | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        """
        Args:
            images: (n, C, H, W) uint8 with C = 1 or 3, as they are fed.
            labels: (n,) int64.
            identity, listed: fingerprint and list (`list_tensors`) of the images before they were resized; None: of
                these.
            memory_format: of the batches.
        """
        self.info, self.bad_images, self.skipped, self._format = info, [], 0, memory_format
        self.images, self.labels = images.to(device), labels.to(device)
        self._fingerprint = identity or of_tensors(images, labels, info.num_classes)
        self._listed = listed or list_tensors(images, labels, (f"image {i}" for i in range(len(labels))))

    def __len__(self) -> int:
        return len(self.labels)

    def steps_per_epoch(self, batch_size: int, world_size: int = 1, accumulate: int = 1) -> int:
        return count_steps(len(self), batch_size, world_size, accumulate)

    def batches(
        self, epoch: int, start_step: int = 0, *, augment: AugmentConfig | None = None, **options
    ) -> Iterator[tuple[Tensor, Tensor]]:
        config = augment or AugmentConfig()
        pieces = plan(self.info, len(self), epoch, start_step, augment=config, **options)
        fetched = self._fetch(pieces)
        return (transform(images, labels, piece, config, self.info, self._format) for images, labels, piece in fetched)

    def _fetch(self, pieces: Iterator[Piece]) -> Iterator[tuple[Tensor, Tensor, Piece]]:
        for piece in pieces:
            index = to_device(piece.index, self.images.device)
            yield self.images[index], self.labels[index], piece

    def eval_batches(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        for own in own_part(len(self), batch_size, rank, world_size):
            part = slice(own.start, own.stop)
            yield normalise(self.images[part], self.info, self._format), self.labels[part]

    def image(self, index: int) -> tuple[Tensor, int]:
        return normalise(self.images[index][None], self.info)[0], int(self.labels[index])

    def fingerprint(self) -> dict[str, Any]:
        return self._fingerprint

    def listed(self) -> Iterator[tuple[str, int, str]]:
        return iter(self._listed)

    def class_counts(self) -> list[int]:
        return torch.bincount(self.labels, minlength=self.info.num_classes).tolist()

    def close(self) -> None:
        pass


class FolderData:
    """Image files, or images in shards, read by workers; a `Split`.

    Always a random resized crop, so pad, rotate, translate and zoom of an AugmentConfig must be 0. A file that cannot
    be read is replaced by the next one that can (`ImageFiles`). One pass at a time: starting another on the same
    object ends the first, as they share the persistent workers.
    """

    def __init__(
        self,
        files: Source,
        labels: list[int],
        info: DataInfo,
        *,
        device: torch.device | str = "cpu",
        num_workers: int = 0,
        skip_bad_images: bool = False,
        evaluated: Evaluated | None = None,
        worker_timeout: float = WORKER_TIMEOUT_S,
        is_stopped: Callable[[], bool] = lambda: False,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        """
        Args:
            evaluated: None is a centre crop of 224/256 of the short side, bilinear, at `info.image_size`.
            worker_timeout, is_stopped: those of `preprocess.load`.
            memory_format: of the batches.
        """
        self.info, self._device, self._format = info, torch.device(device), memory_format
        self._files = ImageFiles(files, labels, info.image_size, skip_bad_images, evaluated)
        self._reader = Reader(self._files, self._device, num_workers, worker_timeout, is_stopped)
        self.bad_images = self._reader.bad_images

    @property
    def skipped(self) -> int:
        return self._reader.skipped

    def __len__(self) -> int:
        return len(self._files)

    def steps_per_epoch(self, batch_size: int, world_size: int = 1, accumulate: int = 1) -> int:
        return count_steps(len(self), batch_size, world_size, accumulate)

    def batches(
        self, epoch: int, start_step: int = 0, *, augment: AugmentConfig | None = None, **options
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As `Split.batches`. Where images are mixed, each piece reads one file more, the partner of its first: so the
        mixture is what a single process makes.

        Raises:
            ValueError: pad, rotate, translate or zoom, whose part the resized crop plays here.
        """
        config = augment or AugmentConfig()
        if config.geometric:
            raise ValueError(f"{self.info.name}: pad, rotate, translate and zoom must be 0, the crop is a resized one")
        pieces = plan(self.info, len(self), epoch, start_step, augment=config, crops=True, **options)
        fetched = self._fetch(pieces, partial(Key, area=config.crop_area, aspect=config.crop_aspect))
        return (transform(images, labels, piece, config, self.info, self._format) for images, labels, piece in fetched)

    def _fetch(self, pieces: Iterator[Piece], key: Callable[..., Key]) -> Iterator[tuple[Tensor, Tensor, Piece]]:
        pieces, ahead = tee(pieces)  # the workers are given work ahead of what is yielded
        keys = (list(map(key, piece.index.tolist(), piece.draws.crop.numpy())) for piece in ahead)
        for (images, labels), piece in zip(self._reader.read(keys), pieces, strict=True):
            yield images, labels, piece

    def eval_batches(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        keys = ([Key(i, None) for i in own] for own in own_part(len(self), batch_size, rank, world_size))
        for images, labels in self._reader.read(keys):
            if len(labels):
                yield normalise(images, self.info, self._format), labels

    def image(self, index: int) -> tuple[Tensor, int]:
        """As `Split.image`, read by this process."""
        image, label, bad = self._files[Key(index, None)]
        if image is None:
            raise DataError(f"cannot read image {bad[0]}")
        return normalise(image[None].to(self._device), self.info)[0], label

    def fingerprint(self) -> dict[str, Any]:
        labels = self._files.labels.tolist()
        return of_files(self._files.files.identities(), self._sizes.tolist(), labels, self.info.num_classes)

    def listed(self) -> Iterator[tuple[str, int, str]]:
        names = (os.fsdecode(name.replace(b"\0", b" at byte ")) for name in self._files.files.identities())
        contents = (f"{size} bytes" for size in self._sizes.tolist())
        return zip(names, self._files.labels.tolist(), contents, strict=True)

    @cached_property
    def _sizes(self) -> np.ndarray:
        """(n,) int64, bytes of each file: found out once, since every file is a question to a server."""
        return np.array(self._files.files.sizes(), np.int64)

    def class_counts(self) -> list[int]:
        return np.bincount(self._files.labels, minlength=self.info.num_classes).tolist()

    def close(self) -> None:
        self._reader.close()
