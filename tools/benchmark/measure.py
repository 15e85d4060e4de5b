"""How benchmarks measure: candidates that take turns, ratios of one round, memory by a process of its own."""

import argparse
import contextlib
import ctypes
import gc
import math
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch

from sasa.training.device import peak_resident_bytes

# ---- time -----------------------------------------------------------------------------------------------------------


def interleave(
    candidates: dict[str, Callable], rounds: int, clock: Callable, sync: Callable, few: Collection[str] = ()
) -> dict[str, list[float]]:
    """Seconds of each candidate in each round, after one to warm up; each round starts with the next candidate.

    The candidates of `few`, whose time is long, take part in the first two rounds only, and do not warm up.
    """
    names = list(candidates)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-1, rounds):
        first = max(turn, 0) % len(names)
        for name in names[first:] + names[:first]:
            if name in few and turn not in (0, 1):
                continue
            sync()
            start = clock()
            candidates[name]()
            sync()
            if turn >= 0:
                times[name].append(clock() - start)
    return times


def ratio(times: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest of the ratios of the same round."""
    each = [t / b for t, b in zip(times, base, strict=False)]  # a candidate of few rounds has the first ones
    return {"median": statistics.median(each), "low": min(each), "high": max(each)}


def geometric_mean(values: Sequence[float]) -> float:
    """Of numbers above 0."""
    return math.exp(statistics.fmean(math.log(v) for v in values))


# ---- memory ---------------------------------------------------------------------------------------------------------


def growth(run: Callable) -> int:
    """Bytes that `run` adds to this process's resident set at its highest."""
    gc.collect()  # what an earlier step left in a cycle would be freed while `run` runs, and hide as much of its growth
    libc = ctypes.CDLL(None)
    with contextlib.suppress(AttributeError):
        libc.malloc_trim(0)
    with contextlib.suppress(OSError):  # Linux: the high-water mark starts again from what is resident now
        Path("/proc/self/clear_refs").write_text("5")
    before = _high_water()
    run()
    return _high_water() - before


def in_fresh_process(function: Callable, *arguments) -> float | None:
    """MiB of the bytes that function(*arguments) gives in a process of its own; None where that failed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["attention", "model"])  # a child then starts at once
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(theirs, torch.get_num_threads(), function, arguments))
    process.start()
    theirs.close()
    try:
        return ours.recv() / 2**20
    except EOFError:
        return None
    finally:
        process.join()


def _send(pipe, threads: int, function: Callable, arguments: tuple) -> None:
    """In a process of its own: sends the bytes that function(*arguments) found."""
    with contextlib.suppress(AttributeError):  # glibc: memory that is freed leaves at once, so that its reuse counts
        ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD
    torch.set_num_threads(threads)
    pipe.send(function(*arguments))


def _high_water() -> int:
    """Bytes. Linux's ru_maxrss is kept when the mark is set back, VmHWM is not."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024
    return peak_resident_bytes()


# ---- where ----------------------------------------------------------------------------------------------------------


def machine(device: torch.device) -> dict:
    """What was measured on: no names of hosts or users."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {"cpu": name, "capability": torch.backends.cpu.get_cpu_capability(), "cores": cores}
    found |= {"threads": torch.get_num_threads(), "python": platform.python_version(), "torch": torch.__version__}
    if flags := os.environ.get("SASA_CXXFLAGS"):  # they may have taken AVX-512 or AVX2 from the C++ kernel
        found["SASA_CXXFLAGS"] = flags
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


class Bench:
    """What the sections share: device, dtype, backends, rounds, and where the tables go."""

    def __init__(self, args: argparse.Namespace, device: torch.device, backends: list[str]) -> None:
        self.device, self.dtype, self.backends = device, getattr(torch, args.dtype), backends
        self.rounds, self.quick = args.rounds or (2 if args.quick else 5), args.quick
        self.peaks = args.network  # of whole networks: a process each
        self.fast = [name for name in backends if name != "reference"]
        self.target = sys.stderr if args.json else sys.stdout

    def print(self, *words: str) -> None:
        """Prints a line of the tables."""
        print(*words, file=self.target, flush=True)

    def sync(self) -> None:
        """Waits until a GPU has done what was launched."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def time(self, candidates: dict[str, Callable]) -> dict[str, list[float]]:
        """Seconds of each candidate's calls, round by round."""
        return interleave(candidates, self.rounds, time.perf_counter, self.sync, few=("unfold",))
