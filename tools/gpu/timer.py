"""Times on a CUDA device: a CUDA graph of many calls, each on buffers of its own, replayed between two events."""

import itertools
import math
import statistics
from collections.abc import Callable

import torch

ROUNDS, WARM_ROUNDS = 7, 3
MAX_COPIES = 64
ROUND_SECONDS = 0.05  # of replays between two events


class CudaTimer:
    """`l2_bytes`: the cache that the buffers of the calls together must exceed."""

    def __init__(self, l2_bytes: int) -> None:
        self._l2_bytes = l2_bytes

    def seconds(self, make: Callable[[], Callable[[], object]], bytes_each: int) -> float:
        """Seconds of one call, the median of some rounds, with no launch and no wait of the host in it.

        Args:
            make: gives a call with buffers of its own.
            bytes_each: that a call reads and writes; of as many calls as exceed the L2 twice, one follows the other.
        """
        copies = min(max(2, math.ceil(2 * self._l2_bytes / max(bytes_each, 1))), MAX_COPIES)
        calls = [make() for _ in range(copies)]
        side = torch.cuda.Stream()  # work that is captured must have run before, outside the default stream
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        first = self._round(graph, 1)
        replays = max(1, math.ceil(ROUND_SECONDS / first))
        times = [self._round(graph, replays) for _ in range(WARM_ROUNDS + ROUNDS)]
        return statistics.median(times[WARM_ROUNDS:]) / copies

    def steps(self, step: Callable[[], object], count: int) -> list[float]:
        """Seconds of each of `count` eager calls, host and device together."""
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        torch.cuda.synchronize()
        marks[0].record()
        for mark in marks[1:]:
            step()
            mark.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]

    @staticmethod
    def _round(graph: torch.cuda.CUDAGraph, replays: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / replays


class StubTimer:
    """For a dry run: each call is made once, and every time is `SECONDS`."""

    SECONDS = 1e-3

    def seconds(self, make: Callable[[], Callable[[], object]], bytes_each: int) -> float:
        """As `CudaTimer.seconds`."""
        make()()
        return self.SECONDS

    def steps(self, step: Callable[[], object], count: int) -> list[float]:
        """As `CudaTimer.steps`."""
        step()
        return [self.SECONDS] * count
