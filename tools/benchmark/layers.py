"""Single layers: local attention beside the 3x3 convolution of the same width, and how its cost scales.

A section prints its rows as they are measured and returns them.
"""

import math
import statistics
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from attention import LocalAttention2d
from sasa import kernels
from tools.benchmark.measure import Bench, geometric_mean, growth, in_fresh_process, ratio

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


# ---- what is timed --------------------------------------------------------------------------------------------------


def lay_out(x: torch.Tensor) -> torch.Tensor:
    """The maps of a layer or a convolution with channels innermost in memory, as train.py has them.

    On CUDA those of attention alone too; on a CPU they are left as planes, as a caller of the function may have them.
    """
    if x.dim() < 4 or (x.dim() > 4 and x.device.type != "cuda"):
        return x
    return x.flatten(1, -3).contiguous(memory_format=torch.channels_last).unflatten(1, x.shape[1:-2])


def step(function: Callable, leaves: Sequence[torch.Tensor], shape: Sequence[int]) -> Callable:
    """A forward and backward to `leaves`, with a fixed random gradient of the output, of `shape`."""
    leaves = [lay_out(x.detach()).requires_grad_() for x in leaves]
    direction = lay_out(torch.randn(shape, device=leaves[0].device, dtype=leaves[0].dtype))
    return lambda: torch.autograd.grad(function(*leaves), leaves, direction)


def conv_step(b: int, c: int, h: int, stride: int, device: torch.device, dtype: torch.dtype) -> Callable:
    """Forward and backward of the 3x3 convolution of a (b, c, h, h) map."""
    x, weight = torch.randn(b, c, h, h, device=device, dtype=dtype), torch.randn(c, c, 3, 3, device=device, dtype=dtype)
    side = -(-h // stride)
    return step(lambda x, w: F.conv2d(x, w, stride=stride, padding=1), (x, weight / (9 * c) ** 0.5), (b, c, side, side))


def core_step(b: int, c: int, h: int, k: int, backend: str, device: torch.device, dtype: torch.dtype) -> Callable:
    """Forward and backward of local attention alone, on maps of c channels in all heads."""
    d = c // HEADS
    shapes = [(b, HEADS, d, h, h)] * 3 + [(HEADS, d // 2, k)] * 2
    leaves = [torch.randn(shape, device=device, dtype=dtype) * d**-0.25 for shape in shapes]
    return step(lambda *leaves: kernels.local_attention(*leaves, kernel_size=k, backend=backend), leaves, shapes[0])


def layer_step(b: int, c: int, h: int, stride: int, backend: str, device: torch.device, dtype: torch.dtype) -> Callable:
    """Forward and backward of the layer with its projections, and its pool where stride is above 1."""
    # Its own parameters, not tensors in their place: for those it calls its projections one by one.
    layer = LocalAttention2d(c, c, WINDOW, stride=stride, num_heads=HEADS, backend=backend).to(device, dtype)
    x = lay_out(torch.randn(b, c, h, h, device=device, dtype=dtype)).requires_grad_()
    leaves, side = (x, *layer.parameters()), -(-h // stride)
    direction = lay_out(torch.randn(b, c, side, side, device=device, dtype=dtype))
    return lambda: torch.autograd.grad(layer(x), leaves, direction)


STEPS = {"conv": conv_step, "core": core_step, "layer": layer_step}


def _growth_of_call(kind: str, small: tuple, full: tuple) -> int:
    STEPS[kind](*small)()  # libraries and their buffers are loaded before the count starts
    return growth(STEPS[kind](*full))


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


# ---- sections -------------------------------------------------------------------------------------------------------


def measure_row(bench: Bench, calls: dict[str, tuple], memory: bool = True) -> dict:
    """calls: name -> (kind, *arguments); the first is the base of the ratios."""
    calls = {name: (kind, (*rest, bench.device, bench.dtype)) for name, (kind, *rest) in calls.items()}
    times = bench.time({name: STEPS[kind](*rest) for name, (kind, rest) in calls.items()})
    base = next(iter(times))
    return {
        name: {
            "ms": statistics.median(times[name]) * 1e3,
            "ratio": ratio(times[name], times[base]),
            "peak_mib": peak_memory(*calls[name], bench.device) if memory else None,
        }
        for name in times
    }


def print_row(bench: Bench, label: str, row: dict) -> None:
    """A line for each candidate of a row."""
    for i, (name, figures) in enumerate(row.items()):
        r, peak = figures["ratio"], figures["peak_mib"]
        text = f"{label if i == 0 else '':<16} {name:<18} {figures['ms']:>9.1f} {r['median']:>8.3f}"
        text += f" {r['low']:>8.3f} ..{r['high']:>7.3f}"
        bench.print(text + ("" if peak is None else f" {peak:>9.1f}"))


def head(bench: Bench, title: str, label: str) -> None:
    """Title and head of a table."""
    bench.print(f"\n{title}")
    columns = f"{label:<16} {'candidate':<18} {'ms':>9} {'/ conv':>8} {'lowest .. highest':>18} {'peak MiB':>9}"
    bench.print(columns + "\n" + "-" * len(columns))


def layers(bench: Bench, shapes: Sequence[tuple[int, int, int]] | None = None) -> list[dict]:
    """`shapes`: None for all, or with --quick a few."""
    head(bench, "Stride 1: local attention (K = 7) beside the 3x3 convolution of the same width", "B, C, H")
    rows = []
    for b, c, h in shapes or (QUICK if bench.quick else PAPER + CIFAR):
        calls: dict[str, tuple] = {"conv": ("conv", b, c, h, 1)}
        for name in bench.fast:
            calls[f"core {name}"] = ("core", b, c, h, WINDOW, name)
            calls[f"layer {name}"] = ("layer", b, c, h, 1, name)
        if "reference" in bench.backends:
            calls["unfold"] = ("core", b, c, h, WINDOW, "reference")
        row = measure_row(bench, calls)
        print_row(bench, f"{b}, {c}, {h}", row)
        rows.append({"shape": [b, c, h], "candidates": row})
    return rows


def strided(bench: Bench) -> list[dict]:
    """A row for each first block of stages 2 to 4."""
    head(bench, "First blocks of stages 2 to 4: attention and 2x2 pool beside the stride-2 convolution", "B, C, H in")
    rows = []
    for b, c, h in STRIDED[:1] if bench.quick else STRIDED:
        calls: dict[str, tuple] = {"conv": ("conv", b, c, h, 2)}
        calls |= {f"layer {name}": ("layer", b, c, h, 2, name) for name in bench.fast}
        row = measure_row(bench, calls, memory=not bench.quick)
        print_row(bench, f"{b}, {c}, {h}", row)
        rows.append({"shape": [b, c, h], "candidates": row})
    return rows


def scaling(bench: Bench) -> list[dict]:
    """Exponents: 1 is linear; for K they are against K * K, the size of the window."""
    bench.print("\nScaling of the core; each series grows one thing, the others stay")
    columns = f"{'backend':<10} {'grows':<6} {'B, C, H, K':<16} {'ms':>9} {'ns / pixel':>11} {'peak MiB':>9}"
    bench.print(columns + "\n" + "-" * len(columns))
    rows = []
    for backend in bench.fast[:1] if bench.quick else bench.fast:
        for what, series in SCALING.items():
            series = series[:2] if bench.quick else series
            steps = {str(s): core_step(*s, backend, bench.device, bench.dtype) for s in series}
            milliseconds = [statistics.median(times) * 1e3 for times in bench.time(steps).values()]
            peaks = [peak_memory("core", (*s, backend, bench.device, bench.dtype), bench.device) for s in series]
            for (b, c, h, k), ms, peak in zip(series, milliseconds, peaks, strict=True):
                label = f"{b}, {c}, {h}, {k}"
                text = f"{backend:<10} {what:<6} {label:<16} {ms:>9.1f} {ms * 1e6 / (b * h * h):>11.1f}"
                bench.print(text + f" {'?' if peak is None else f'{peak:.1f}':>9}")
            first, last = series[0], series[-1]
            factor = math.log(math.prod((last[0], last[2] ** 2, last[3] ** 2)))
            factor -= math.log(math.prod((first[0], first[2] ** 2, first[3] ** 2)))
            exponent = math.log(milliseconds[-1] / milliseconds[0]) / factor
            memory = math.log(peaks[-1] / peaks[0]) / factor if peaks[0] and peaks[-1] else None
            shown = "?" if memory is None else f"{memory:.2f}"
            axis = "(K*K)" if what == "K" else f"({what})"
            bench.print(f"{'':<10} time grows as {axis}^{exponent:.2f}, memory as {axis}^{shown}")
            rows.append(
                {"backend": backend, "grows": what, "series": series, "ms": milliseconds, "peak_mib": peaks,
                 "time_exponent": exponent, "memory_exponent": memory}
            )  # fmt: skip
    return rows


def means(rows: list[dict]) -> dict[str, float]:
    """Geometric means over the shapes of the median ratios, to the convolution and of unfold to each core."""
    names = rows[0]["candidates"]
    medians = {name: [row["candidates"][name]["ratio"]["median"] for row in rows] for name in names}
    found = {f"{name} / conv": geometric_mean(medians[name]) for name in names if name != "conv"}
    if "unfold" in names:
        found |= {
            f"unfold / {name}": found["unfold / conv"] / found[f"{name} / conv"]
            for name in names
            if name.startswith("core")
        }
    return found
