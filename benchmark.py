"""Time and peak memory of attention beside the 3x3 convolution it replaces and the unfold of the definition.

Every figure is of a forward and a backward. A machine's speed moves within minutes, so times of different moments are
never compared: the candidates of a row take turns round by round, a ratio is of times of one round, and its median and
range over the rounds are given. Peak memory is what one forward and backward add to the process: on a CPU the growth
of the resident set's high-water mark in a fresh process (which sees what a kernel allocates itself, too), on CUDA
torch's own count.

Columns: `conv` 3x3 convolution; `core` local attention alone; `layer` with its 1x1 projections; `unfold` the core by
the backend "reference". Shapes: B batch, C channels, H x H map, K window side; 8 heads.
"""

import argparse
import contextlib
import ctypes
import json
import math
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NoReturn

import torch
import torch.nn.functional as F

import benchmark_network
import kernels
from attention import LocalAttention2d

PAPER = ((4, 64, 56), (4, 128, 56), (16, 128, 28), (16, 256, 28), (16, 256, 14), (16, 512, 14), (32, 512, 7))
CIFAR = ((16, 64, 32), (16, 128, 16), (16, 256, 8), (16, 512, 4))
QUICK = ((4, 128, 56), (16, 256, 14), (16, 128, 16))
STRIDED = ((4, 128, 56), (16, 256, 28), (16, 512, 14))  # the first blocks of stages 2 to 4, ImageNet form
HEADS, WINDOW = 8, 7
SCALING = {  # what grows -> (B, C, H, K); 7 divides every map, so that tiles are all whole
    "H*W": ((4, 64, 28, 7), (4, 64, 56, 7), (4, 64, 112, 7)),
    "batch": ((2, 64, 56, 7), (4, 64, 56, 7), (8, 64, 56, 7)),
    "K": ((4, 64, 56, 3), (4, 64, 56, 7), (4, 64, 56, 11)),
}
DTYPES = ("float32", "float64", "bfloat16", "float16")

# Measuring ------------------------------------------------------------------------------------------------------------


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
    return math.exp(statistics.fmean(math.log(v) for v in values))


def lay_out(x: torch.Tensor) -> torch.Tensor:
    """Maps on CUDA with channels innermost, which is fastest there for convolutions and for backend "triton"."""
    if x.device.type != "cuda" or x.dim() < 4:
        return x
    return x.flatten(1, -3).contiguous(memory_format=torch.channels_last).unflatten(1, x.shape[1:-2])


def step(function: Callable, leaves: Sequence[torch.Tensor], shape: Sequence[int]) -> Callable:
    """A forward and backward to `leaves`, with a fixed random gradient of the output, of `shape`."""
    leaves = [lay_out(x.detach()).requires_grad_() for x in leaves]
    direction = lay_out(torch.randn(shape, device=leaves[0].device, dtype=leaves[0].dtype))
    return lambda: torch.autograd.grad(function(*leaves), leaves, direction)


def conv_step(b: int, c: int, h: int, stride: int, device, dtype) -> Callable:
    x, weight = torch.randn(b, c, h, h, device=device, dtype=dtype), torch.randn(c, c, 3, 3, device=device, dtype=dtype)
    side = -(-h // stride)
    return step(lambda x, w: F.conv2d(x, w, stride=stride, padding=1), (x, weight / (9 * c) ** 0.5), (b, c, side, side))


def core_step(b: int, c: int, h: int, k: int, backend: str, device, dtype) -> Callable:
    d = c // HEADS
    shapes = [(b, HEADS, d, h, h)] * 3 + [(HEADS, d // 2, k)] * 2
    leaves = [torch.randn(shape, device=device, dtype=dtype) * d**-0.25 for shape in shapes]
    return step(lambda *leaves: kernels.local_attention(*leaves, kernel_size=k, backend=backend), leaves, shapes[0])


def layer_step(b: int, c: int, h: int, stride: int, backend: str, device, dtype) -> Callable:
    layer = LocalAttention2d(c, c, WINDOW, stride=stride, num_heads=HEADS, backend=backend).to(device, dtype)
    names = [name for name, _ in layer.named_parameters()]
    x = torch.randn(b, c, h, h, device=device, dtype=dtype)

    def call(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    side = -(-h // stride)
    return step(call, (x, *layer.parameters()), (b, c, side, side))


STEPS = {"conv": conv_step, "core": core_step, "layer": layer_step}


def growth(run: Callable) -> int:
    """Bytes that `run` adds to this process's resident set at its highest."""
    libc = ctypes.CDLL(None)
    with contextlib.suppress(AttributeError):
        libc.malloc_trim(0)
    with contextlib.suppress(OSError):  # Linux: the high-water mark starts again from what is resident now
        Path("/proc/self/clear_refs").write_text("5")
    before = _high_water()
    run()
    return _high_water() - before


def _growth_of_call(kind: str, small: tuple, full: tuple) -> int:
    STEPS[kind](*small)()  # libraries and their buffers are loaded before the count starts
    return growth(STEPS[kind](*full))


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
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_memory(kind: str, arguments: tuple, device: torch.device) -> float | None:
    """MiB that one forward and backward of STEPS[kind](*arguments) add; None where its process failed."""
    if device.type == "cuda":
        run = STEPS[kind](*arguments)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    small = (1, 16, 8, *arguments[3:])
    return in_fresh_process(_growth_of_call, kind, small, arguments)


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


# Sections: each prints its rows as they are measured and returns them -------------------------------------------------


class Bench:
    """What the sections share: device, dtype, backends, rounds, and where the tables go."""

    def __init__(self, args: argparse.Namespace, device: torch.device, backends: list[str]) -> None:
        self.device, self.dtype, self.backends = device, getattr(torch, args.dtype), backends
        self.rounds, self.quick = args.rounds or (2 if args.quick else 5), args.quick
        self.peaks = args.network  # of whole networks: a process each
        self.fast = [name for name in backends if name != "reference"]
        self.target = sys.stderr if args.json else sys.stdout

    def say(self, *words: str) -> None:
        print(*words, file=self.target, flush=True)

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def time(self, candidates: dict[str, Callable]) -> dict[str, list[float]]:
        return interleave(candidates, self.rounds, time.perf_counter, self.sync, few=("unfold",))

    def row(self, calls: dict[str, tuple], memory: bool = True) -> dict:
        """calls: name -> (kind, *arguments); the first is the base of the ratios."""
        calls = {name: (kind, (*rest, self.device, self.dtype)) for name, (kind, *rest) in calls.items()}
        times = self.time({name: STEPS[kind](*rest) for name, (kind, rest) in calls.items()})
        base = next(iter(times))
        return {
            name: {
                "ms": statistics.median(times[name]) * 1e3,
                "ratio": ratio(times[name], times[base]),
                "peak_mib": peak_memory(*calls[name], self.device) if memory else None,
            }
            for name in times
        }

    def print_row(self, label: str, row: dict) -> None:
        for i, (name, figures) in enumerate(row.items()):
            r, peak = figures["ratio"], figures["peak_mib"]
            text = f"{label if i == 0 else '':<16} {name:<18} {figures['ms']:>9.1f} {r['median']:>8.3f}"
            text += f" {r['low']:>8.3f} ..{r['high']:>7.3f}"
            self.say(text + ("" if peak is None else f" {peak:>9.1f}"))

    def head(self, title: str, label: str) -> None:
        self.say(f"\n{title}")
        columns = f"{label:<16} {'candidate':<18} {'ms':>9} {'/ conv':>8} {'lowest .. highest':>18} {'peak MiB':>9}"
        self.say(columns + "\n" + "-" * len(columns))

    def layers(self, shapes: Sequence[tuple[int, int, int]]) -> list[dict]:
        self.head("Stride 1: local attention (K = 7) beside the 3x3 convolution of the same width", "B, C, H")
        rows = []
        for b, c, h in shapes:
            calls: dict[str, tuple] = {"conv": ("conv", b, c, h, 1)}
            for name in self.fast:
                calls[f"core {name}"] = ("core", b, c, h, WINDOW, name)
                calls[f"layer {name}"] = ("layer", b, c, h, 1, name)
            if "reference" in self.backends:
                calls["unfold"] = ("core", b, c, h, WINDOW, "reference")
            row = self.row(calls)
            self.print_row(f"{b}, {c}, {h}", row)
            rows.append({"shape": [b, c, h], "candidates": row})
        return rows

    def strided(self) -> list[dict]:
        self.head("First blocks of stages 2 to 4: attention and 2x2 pool beside the stride-2 convolution", "B, C, H in")
        rows = []
        for b, c, h in STRIDED[:1] if self.quick else STRIDED:
            calls: dict[str, tuple] = {"conv": ("conv", b, c, h, 2)}
            calls |= {f"layer {name}": ("layer", b, c, h, 2, name) for name in self.fast}
            row = self.row(calls, memory=not self.quick)
            self.print_row(f"{b}, {c}, {h}", row)
            rows.append({"shape": [b, c, h], "candidates": row})
        return rows

    def scaling(self) -> list[dict]:
        """Exponents: 1 is linear; for K they are against K * K, the size of the window."""
        self.say("\nScaling of the core; each series grows one thing, the others stay")
        columns = f"{'backend':<10} {'grows':<6} {'B, C, H, K':<16} {'ms':>9} {'ns / pixel':>11} {'peak MiB':>9}"
        self.say(columns + "\n" + "-" * len(columns))
        rows = []
        for backend in self.fast[:1] if self.quick else self.fast:
            for what, series in SCALING.items():
                series = series[:2] if self.quick else series
                steps = {str(s): core_step(*s, backend, self.device, self.dtype) for s in series}
                milliseconds = [statistics.median(times) * 1e3 for times in self.time(steps).values()]
                peaks = [peak_memory("core", (*s, backend, self.device, self.dtype), self.device) for s in series]
                for (b, c, h, k), ms, peak in zip(series, milliseconds, peaks, strict=True):
                    label = f"{b}, {c}, {h}, {k}"
                    text = f"{backend:<10} {what:<6} {label:<16} {ms:>9.1f} {ms * 1e6 / (b * h * h):>11.1f}"
                    self.say(text + f" {'?' if peak is None else f'{peak:.1f}':>9}")
                first, last = series[0], series[-1]
                growth = math.log(math.prod((last[0], last[2] ** 2, last[3] ** 2)))
                growth -= math.log(math.prod((first[0], first[2] ** 2, first[3] ** 2)))
                exponent = math.log(milliseconds[-1] / milliseconds[0]) / growth
                memory = math.log(peaks[-1] / peaks[0]) / growth if peaks[0] and peaks[-1] else None
                shown = "?" if memory is None else f"{memory:.2f}"
                axis = "(K*K)" if what == "K" else f"({what})"
                self.say(f"{'':<10} time grows as {axis}^{exponent:.2f}, memory as {axis}^{shown}")
                rows.append(
                    {"backend": backend, "grows": what, "series": series, "ms": milliseconds, "peak_mib": peaks,
                     "time_exponent": exponent, "memory_exponent": memory}
                )  # fmt: skip
        return rows

    def means(self, rows: list[dict]) -> dict[str, float]:
        """Geometric means over the shapes of the median ratios, to the convolution and of unfold to each core."""
        names = rows[0]["candidates"]
        medians = {name: [row["candidates"][name]["ratio"]["median"] for row in rows] for name in names}
        means = {f"{name} / conv": geometric_mean(medians[name]) for name in names if name != "conv"}
        if "unfold" in names:
            means |= {
                f"unfold / {name}": means["unfold / conv"] / means[f"{name} / conv"]
                for name in names
                if name.startswith("core")
            }
        return means


# Command line ---------------------------------------------------------------------------------------------------------


def machine(device: torch.device) -> dict:
    """What was measured on: no names of hosts or users."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {"cpu": name, "capability": torch.backends.cpu.get_cpu_capability(), "cores": cores}
    found |= {"threads": torch.get_num_threads(), "python": platform.python_version(), "torch": torch.__version__}
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def parse_shapes(text: str) -> tuple[tuple[int, int, int], ...]:
    named = {"paper": PAPER, "cifar": CIFAR, "all": PAPER + CIFAR}
    if text in named:
        return named[text]
    try:
        b, c, h = (int(part) for part in text.split(","))
    except ValueError:
        b = c = h = 0
    if min(b, c, h) < 1 or c % (2 * HEADS):
        raise argparse.ArgumentTypeError(f"{text!r}: allowed are paper, cifar, all, or B,C,H with C a multiple of 16")
    return ((b, c, h),)


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be an integer of at least 1")
    return int(text)


def batch_size(text: str) -> int | str:
    return text if text == "auto" else positive(text)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")  # one line, no usage


def parse(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = _Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--shapes", type=parse_shapes, metavar="paper|cifar|all|B,C,H", help="only the layers of these")
    parser.add_argument("--network", action="store_true", help="only the networks: ResNet26, 38 and 50, with peaks")
    parser.add_argument("--plan", action="store_true", help="only the memory of a training step, by stage")
    parser.add_argument("--batch-size", type=batch_size, metavar="N|auto", help="of --network (auto: the largest that "
                        "fits) and --plan")  # fmt: skip
    parser.add_argument("--models", nargs="+", choices=benchmark_network.DEPTHS, help="of --network and --plan")
    parser.add_argument("--form", choices=tuple(benchmark_network.FORMS), default="ImageNet", help="of --plan")
    parser.add_argument("--quick", action="store_true", help="few shapes and rounds")
    parser.add_argument("--backends", nargs="+", metavar="NAME", help="without it, all that are usable here")
    parser.add_argument("--rounds", type=positive, help="without it 5, or 2 with --quick")
    parser.add_argument("--threads", type=positive)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--json", action="store_true", help="JSON on stdout, the tables on stderr")
    return parser, parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    parser, args = parse(argv)
    if args.plan and args.batch_size == "auto":
        parser.error("--batch-size auto: --plan needs a number")
    if args.batch_size and not (args.plan or args.network):
        parser.error(f"--batch-size {args.batch_size}: goes with --network or --plan")
    try:
        device = torch.device(args.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device!r}: {str(error).splitlines()[0]}")
    usable = kernels.backends()
    backends = args.backends or [name for name, reason in usable.items() if reason is None]
    widest = max(c for _, c, _ in args.shapes or PAPER + CIFAR) // HEADS
    query = torch.empty(1, HEADS, widest, 8, 8, dtype=getattr(torch, args.dtype), device=device)
    for name in dict.fromkeys(backends):
        try:
            kernels.choose_backend(query, WINDOW, name)
        except ValueError as error:
            if args.backends:
                parser.error(f"--backends {name}: {error}")
            backends.remove(name)
    if args.threads:
        torch.set_num_threads(args.threads)
    bench = Bench(args, device, backends)
    result: dict = {"machine": machine(device), "dtype": args.dtype, "rounds": bench.rounds, "backends": backends}
    bench.say("  ".join(f"{key} {value}" for key, value in result["machine"].items()))
    bench.say(f"device {device}  {args.dtype}  rounds {bench.rounds}  backends {', '.join(backends)}")
    layers = not args.network and not args.plan
    if layers:
        rows = result["layers"] = bench.layers(args.shapes or (QUICK if args.quick else PAPER + CIFAR))
        if not args.shapes:
            result["strided"] = bench.strided()
            result["scaling"] = bench.scaling()
    if args.plan:
        names = args.models or ["ResNet50"]
        result["plan"] = [benchmark_network.plan(bench, args.batch_size, args.form, name) for name in names]
    elif args.network or not args.shapes:
        names = tuple(args.models or (benchmark_network.DEPTHS if args.network else ("ResNet26",)))
        result["network"] = benchmark_network.network(bench, names, args.batch_size)
    if layers:
        result["geometric_means"] = bench.means(rows)
        bench.say(f"\nGeometric means over {len(rows)} shapes (stride 1)")
        for name, value in result["geometric_means"].items():
            bench.say(f"  {name:<28} {value:8.3f}")
    if args.json:
        print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
