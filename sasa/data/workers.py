"""The processes that decode images: batches in the order of their keys, from one pool that lives through all epochs."""

import atexit
import signal
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from sasa.data.errors import DataError
from sasa.data.images import ImageFiles, Key, collate


class Reader:
    """Reads batches of `files`, by `num_workers` processes or, with 0, by this one.

    One pass at a time: starting another ends the first, as they share the processes.

    Attributes:
        bad_images: "path: what is wrong" of each file that was skipped so far.
    """

    def __init__(self, files: ImageFiles, device: torch.device, num_workers: int) -> None:
        self.bad_images: list[str] = []
        self._files, self._device = files, device
        self._keys = _Refillable()
        self._loader = DataLoader(
            files,
            batch_sampler=self._keys,
            num_workers=num_workers,
            collate_fn=collate,
            pin_memory=device.type == "cuda",
            persistent_workers=num_workers > 0,
            worker_init_fn=ignore_signals,
            generator=torch.Generator(),  # DataLoader draws a seed for its workers: not from the global state
        )
        if num_workers:
            # Holds the loader, which can end its processes only while its queues are not garbage yet.
            self._finalizer = weakref.finalize(self, _end_processes, self._loader)
            # Run before multiprocessing's own exit handler, as it is registered later. That one ends workers by
            # SIGTERM, which ours ignore, and waits for them without end.
            atexit.register(self._finalizer)

    def read(self, keys: Iterator[list[Key]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches on the device, in the order of the keys: images (B, 3, H, W) uint8 and labels (B,) int64.

        Raises:
            DataError: a file that cannot be read, unless such are skipped; no file at all that can.
        """
        self._keys.batches = keys
        for images, labels, bad in self._loader:
            if bad and not self._files.skip_bad_images:
                raise DataError(f"cannot read image {bad[0]}; repair or remove it, or skip such with --skip-bad-images")
            self.bad_images.extend(line for line in dict.fromkeys(bad) if line not in self.bad_images)
            if len(self.bad_images) == len(self._files):
                raise DataError(f"cannot read any of the {len(self._files)} images, the first: {self.bad_images[0]}")
            yield images.to(self._device, non_blocking=True), labels.to(self._device, non_blocking=True)

    def close(self) -> None:
        """Ends the processes. The next pass would need a new object; at the end of the process it is done by itself."""
        _end_processes(self._loader)


def ignore_signals(_worker: int) -> None:
    """Launchers signal the whole process group; the training process decides when its workers end."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"):
        if hasattr(signal, name):  # not all on Windows
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _end_processes(loader: DataLoader) -> None:
    if loader._iterator is not None:
        loader._iterator._shutdown_workers()


class _Refillable:
    """A batch sampler that persistent workers can be given anew for every pass."""

    def __init__(self) -> None:
        self.batches: Iterator[list[Key]] = iter(())

    def __iter__(self) -> Iterator[list[Key]]:
        return self.batches
