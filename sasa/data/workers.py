"""The processes that decode images: batches in the order of their keys, from one pool that lives through all epochs.

A process that died, cannot hand over a batch, or is silent for too long ends the pass by a WorkerError: never a wait
without end, and never an exception out of a signal handler, in the middle of a training step.
"""

import atexit
import contextlib
import os
import pickle
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from sasa.console import one_line, printable
from sasa.data.errors import DataError, WorkerError
from sasa.data.images import ImageFiles, Key, collate

NAMED_AFTER_S = 60.0  # a worker that is silent for so long is named
WORKER_TIMEOUT_S = 600.0  # by default it ends the run then
_POLL_S = 10  # how long a dead worker, or a request to stop while waiting, goes unnoticed
_KILL_AFTER_S = 3.0  # how long processes may take to end by themselves
_RESTART = "a restart can help"


class Workers:
    """Batches of samples, made by `num_workers` processes or, with 0, by this one.

    One pass at a time: starting another ends the first, as they share the processes.
    """

    def __init__(
        self,
        samples: Dataset,
        collate: Callable[[list], Any],
        name: Callable[[int], str],
        device: torch.device,
        num_workers: int,
        timeout_s: float = WORKER_TIMEOUT_S,
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        Args:
            samples: what a key becomes; a key has the number of its file as `index`.
            collate: a batch of a list of samples.
            name: the file of a number, for a person.
            device: where the batches go: for CUDA they are put into pinned memory.
            timeout_s: of one batch, of processes that are alive; 0 waits without end.
            is_stopped: whether a signal stopped the run: then no batch is waited for any longer.
        """
        self._name, self._timeout_s, self._is_stopped = name, timeout_s, is_stopped
        self._pass: _Pass | None = None
        self._keys = _Refillable()
        self._loader = DataLoader(
            samples,
            batch_sampler=self._keys,
            num_workers=num_workers,
            collate_fn=partial(_hand_over, collate) if num_workers else collate,
            pin_memory=device.type == "cuda",
            persistent_workers=num_workers > 0,
            worker_init_fn=ignore_signals,
            timeout=_POLL_S if num_workers else 0,
            generator=torch.Generator(),  # DataLoader draws a seed for its workers: not from the global state
        )
        if num_workers:
            # Holds the loader, which can end its processes only while its queues are not garbage yet.
            self._finalizer = weakref.finalize(self, _end_processes, self._loader)
            # Run before multiprocessing's own exit handler, as it is registered later. That one ends workers by
            # SIGTERM, which ours ignore, and waits for them without end.
            atexit.register(self._finalizer)

    def batches(self, keys: Iterator[list]) -> Iterator[Any]:
        """What `collate` made of each item of `keys`, in their order.

        Raises:
            WorkerError: a process died, or handed nothing over.
        """
        if not self._loader.num_workers:
            self._keys.batches = keys
            yield from self._loader
            return
        if self._pass is not None:  # left in the middle: what its processes still have to do
            for _ in self._rest(self._pass, cut=True):
                pass
        current = self._pass = _Pass(keys)
        self._keys.batches = current
        current.iterator = self._start()
        yield from self._rest(current)

    def _start(self) -> Iterator:
        """The loader's next pass. DataLoader's own handler of SIGCHLD would raise wherever the run happens to be."""
        main = threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD")
        before = signal.getsignal(signal.SIGCHLD) if main else None
        try:
            return iter(self._loader)
        except Exception as error:  # no more processes, no memory, no answer
            raise WorkerError(f"the decoding processes cannot be started ({one_line(error)}): {_RESTART}") from error
        finally:
            if main and before is not None:
                signal.signal(signal.SIGCHLD, before)

    def _rest(self, current: "_Pass", cut: bool = False) -> Iterator[Any]:
        """The batches that are left of a pass; with `cut`, only those that are on their way."""
        current.is_cut = cut
        while current is self._pass and current.iterator is not None:
            try:
                batch = self._wait(current)
            except StopIteration:
                self._pass = None
                return
            except BaseException:
                self._pass = None
                self.close()
                raise
            if isinstance(batch, str):  # not a batch, but why there is none
                self._pass = None
                self.close()
                raise WorkerError(f"{batch}: {_RESTART}")
            current.received += 1
            yield batch

    def _wait(self, current: "_Pass") -> Any:
        """The next batch of the loader. Raises StopIteration, WorkerError."""
        began, named = time.monotonic(), False
        while True:
            try:
                return next(current.iterator)
            except StopIteration:
                raise
            except Exception as error:
                workers = current.iterator._workers
                dead = [worker for worker in workers if not worker.is_alive()]
                if dead:
                    raise WorkerError(f"{_how_it_died(dead[0])}: {_RESTART}") from error
                if isinstance(error, WorkerError):  # which has the process's traceback before its own text
                    raise WorkerError(str(error).strip().rpartition(f"{WorkerError.__name__}: ")[2]) from error
                if not isinstance(error, RuntimeError) or "timed out" not in str(error):
                    raise WorkerError(f"a batch was lost on its way ({one_line(error)}): {_RESTART}") from error
            waited = time.monotonic() - began
            worker = workers[current.received % len(workers)]
            silent = (
                f"decoding process {worker.pid} is alive but silent for {waited:.0f} s; it reads {self._next(current)}"
            )
            if self._is_stopped():
                raise WorkerError(silent)
            if self._timeout_s and waited >= self._timeout_s:
                raise WorkerError(f"{silent}: the limit is --worker-timeout {self._timeout_s:g}")
            if waited >= NAMED_AFTER_S and not named:
                named = True
                limit = f"after {self._timeout_s:g} s" if self._timeout_s else "never"
                with contextlib.suppress(OSError, ValueError, AttributeError):  # a closed stderr costs no run
                    print(f"{silent}; ends the run {limit} (--worker-timeout)", file=sys.stderr, flush=True)

    def _next(self, current: "_Pass") -> str:
        """The files of the batch that is waited for."""
        keys = current.given.get(current.received, [])
        names = printable(self._name(keys[0].index)) if keys else "nothing"
        return names + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")

    def close(self) -> None:
        """Ends the processes. The next pass would need a new object; at the end of the process it is done by itself."""
        _end_processes(self._loader)


class Reader:
    """Reads batches of image files for classification by `Workers`.

    Attributes:
        bad_images: "path: what is wrong" of each file that was skipped so far.
        skipped: how often a file was skipped in the latest pass.
    """

    def __init__(self, files: ImageFiles, device: torch.device, num_workers: int, *args, **kwargs) -> None:
        """`args`, `kwargs`: the rest of what `Workers` takes."""
        self.bad_images: list[str] = []
        self.skipped = 0
        self.workers = Workers(files, collate, files.files.name, device, num_workers, *args, **kwargs)
        self._files, self._device = files, device

    def read(self, keys: Iterator[list[Key]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches on the device, in the order of the keys: images (B, 3, H, W) uint8 and labels (B,) int64.

        Raises:
            DataError: a file that cannot be read, unless such are skipped; no file at all that can.
            WorkerError: a process died, or handed nothing over.
        """
        self.skipped = 0
        for images, labels, bad in self.workers.batches(keys):
            if bad and not self._files.skip_bad_images:
                raise DataError(f"cannot read image {bad[0]}; repair or remove it, or skip such with --skip-bad-images")
            self.skipped += len(bad)
            lines = dict.fromkeys(bad)
            self.bad_images.extend(line for line in lines if line not in self.bad_images)
            if len(lines) == len(self._files):  # in one batch: from one to the next a file may become whole, or break
                raise DataError(f"cannot read any of the {len(self._files)} images, the first: {bad[0]}")
            yield images.to(self._device, non_blocking=True), labels.to(self._device, non_blocking=True)

    def close(self) -> None:
        """Ends the processes."""
        self.workers.close()


def ignore_signals(_worker: int) -> None:
    """Launchers signal the whole process group; the training process decides when its workers end."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"):
        if hasattr(signal, name):  # not all on Windows
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _end_processes(loader: DataLoader) -> None:
    """Waits a little for processes that still read, then kills them: SIGTERM they ignore."""
    if loader._iterator is None:
        return
    workers = list(getattr(loader._iterator, "_workers", []))
    killer = threading.Timer(_KILL_AFTER_S, _kill, (workers,))
    killer.daemon = True
    killer.start()
    loader._iterator._shutdown_workers()
    killer.cancel()
    _kill(workers)


def _kill(workers: list) -> None:
    for worker in workers:
        with contextlib.suppress(ValueError, OSError, AttributeError):  # closed, or gone already
            if worker.is_alive():
                worker.kill()


def _how_it_died(worker) -> str:
    code = worker.exitcode
    if code is None or code >= 0:
        return f"decoding process {worker.pid} ended by itself, exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = ", as the system does where memory runs out; fewer --num-workers need less" if name == "SIGKILL" else ""
    return f"decoding process {worker.pid} was killed by {name}{hint}"


class _Pass:
    """One pass over the files: the batch sampler that DataLoader is given, and how far it is."""

    def __init__(self, keys: Iterator[list]) -> None:
        self.iterator: Any = None
        self.received = 0
        self.is_cut = False
        self.given: dict[int, list] = {}  # batches that the processes have and have not handed over
        self._keys, self._asked = keys, 0

    def __iter__(self) -> "_Pass":
        return self

    def __next__(self) -> list:
        if self.is_cut:
            raise StopIteration
        keys = next(self._keys)
        self.given.pop(self.received - 1, None)
        self.given[self._asked] = keys
        self._asked += 1
        return keys


class _Refillable:
    """A batch sampler that persistent workers can be given anew for every pass."""

    def __init__(self) -> None:
        self.batches: Iterator[list] = iter(())

    def __iter__(self) -> Iterator[list]:
        return self.batches


# ---- in a worker ----------------------------------------------------------------------------------------------------


class _Parcel:
    """A batch that is pickled already: its tensors lie in shared memory; whoever unpickles it has the batch itself."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def __reduce__(self) -> tuple:
        return pickle.loads, (self.content,)


def _hand_over(collate: Callable[[list], Any], samples: list) -> "_Parcel | str":
    """A collated batch as a parcel, or why it cannot be handed over.

    Pickled here and not by the queue's own thread, whose errors nobody hears of: a full /dev/shm, a TMPDIR too long for
    the name of a socket.
    """
    try:
        return _Parcel(bytes(ForkingPickler.dumps(collate(samples))))
    except Exception as error:
        worker = get_worker_info()
        return (
            f"decoding process {os.getpid()} ({worker.id + 1} of {worker.num_workers}) cannot hand over a batch "
            f"({one_line(error, 300)}); it needs free shared memory (/dev/shm) and a short TMPDIR, or --num-workers 0"
        )
