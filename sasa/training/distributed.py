"""The processes ("ranks") of a run: one alone, or those that torchrun started, which act together.

    torchrun --nproc-per-node 8 train.py ...

torchrun says by the environment who is who. Rank 0 is the main rank: it alone reads and writes the run's folder, prints
and downloads. Tensors on CUDA go by NCCL, everything on the CPU by Gloo. With one process every function here is the
plain call.

An error that every rank has (`SharedError`, from `on_all_ranks`, `on_main_rank`, `main_rank_first`) ends them together.
An error on one rank alone ends that one: Gloo's connections to it break at once and the others end with an error, while
under NCCL they wait until torchrun, which has seen it end, ends them (SIGTERM, and SIGKILL 30 s later).
"""

import os
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Value = TypeVar("Value")
TIMEOUT = timedelta(minutes=30)  # of a rank that is alive but silent: longer than any download or save
CPU = torch.device("cpu")


class SharedError(Exception):
    """An error that every rank raises alike: `error` is the first rank's that had one."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def start() -> None:
    """Join the processes that torchrun started; nothing where there is one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        return
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        if local_rank() < torch.cuda.device_count():
            torch.cuda.set_device(local_rank())
    store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun on one machine may keep its store over a restart: without this, ranks would call dead processes
        # as if they were alive. Several machines count their restarts each, and their store is new every time
        # (--rdzv-backend c10d).
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)


def stop() -> None:
    """Wait for all ranks and part: the main one may still be writing."""
    if is_distributed():
        all_gather_object(None)
        # torch 2.6 holds the interpreter's lock while it joins Gloo's threads, one of which may still need the lock to
        # let go of the last message: it gets it while this thread sleeps.
        time.sleep(0.1)
        dist.destroy_process_group()


def is_distributed() -> bool:
    """Whether there are several ranks."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def local_rank() -> int:
    """Which of its machine's ranks this is: the number of its GPU."""
    return int(os.environ["LOCAL_RANK"])


def is_main() -> bool:
    return rank() == 0


# ---- values ---------------------------------------------------------------------------------------------------------


def all_gather_object(value: Value) -> list[Value]:
    """Every rank's value, in the order of the ranks, on every rank."""
    if not is_distributed():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def all_reduce_sum(x: Tensor) -> Tensor:
    """x becomes the sum of every rank's x, bitwise the same on all."""
    if is_distributed():
        dist.all_reduce(x)
    return x


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Each tensor becomes the main rank's."""
    if is_distributed():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


# ---- actions --------------------------------------------------------------------------------------------------------


def on_all_ranks(action: Callable[[], Value]) -> Value:
    """What `action` gives on this rank.

    Raises:
        SharedError: on every rank, where `action` fails on any of several.
    """
    if not is_distributed():
        return action()
    value, error = _attempt(action)
    _raise_first(all_gather_object(error))
    return value


def on_main_rank(action: Callable[[], Value]) -> Value:
    """What `action` gives on the main rank, the only one to run it.

    Raises:
        SharedError: on every rank of several, where it fails.
    """
    if not is_distributed():
        return action()
    outcome = list(_attempt(action)) if is_main() else [None, None]
    dist.broadcast_object_list(outcome, src=0, device=CPU)
    _raise_first(outcome[1:])
    return outcome[0]


def main_rank_first(action: Callable[[], Value]) -> Value:
    """`on_all_ranks`, where the other ranks begin when the main one is done: what it downloads is there for them."""
    if not is_distributed():
        return action()
    if is_main():
        value, error = _attempt(action)
        _raise_first(all_gather_object(error))
    else:
        _raise_first(all_gather_object(None))
        value, error = _attempt(action)
    _raise_first(all_gather_object(error))
    return value


def _attempt(action: Callable[[], Value]) -> tuple[Value | None, Exception | None]:
    try:
        return action(), None
    except Exception as error:
        return None, error


def _raise_first(errors: list[Exception | None]) -> None:
    for error in errors:
        if error is not None:
            raise SharedError(error) from error
