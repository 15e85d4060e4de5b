"""Training steps and evaluation of whole networks, `python -m tools.benchmark --network`: images/s and peak memory.

Attention is measured beside its convolution baseline. A step is forward, backward and SGD's update; its peak is
everything that the step adds to the process: weights, gradients, momentum and activations. Evaluation is the forward
alone, without gradients, by batch norm's kept statistics.
"""

import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from model import build
from sasa.training import device as memory
from tools.benchmark.measure import Bench, growth, in_fresh_process, ratio

FORMS = {"CIFAR": (64, 32), "ImageNet": (4, 224)}  # form -> batch, image side
DEPTHS = ("ResNet26", "ResNet38", "ResNet50")
LARGEST_BATCH = 4096  # that --batch-size auto tries
SHARE = 0.8  # of the memory that is free, for a batch on a CPU
PROBES = (2, 4)  # batches whose peaks say what an image costs


def candidates(backend: str) -> dict[str, dict]:
    """The networks of a row; the first is the convolution baseline of the others."""
    nets = {"convolution": {"attention_stages": ()}, "attention": {"backend": backend}}
    return nets | {"attention + stem": {"backend": backend, "stem_backend": backend, "stem": True}}


def _model_and_images(
    name: str, options: dict, form: str, batch: int, side: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.nn.Module, torch.Tensor]:
    """A network and a batch in memory, channels-last as train.py has them."""
    small = form == "CIFAR"
    model = build(name, 10 if small else 1000, small_images=small, **options)
    model = model.to(device, dtype, memory_format=torch.channels_last)
    x = torch.randn(batch, 3, side, side, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    return model, x


def train_step(*arguments) -> Callable:
    """One step of a network: a function that does it again and again. Arguments as _model_and_images."""
    model, x = _model_and_images(*arguments)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    y = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)

    def run():
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return run


def evaluation_pass(*arguments) -> Callable:
    """The forward of an evaluation: a function that does it again and again. Arguments as _model_and_images."""
    model, x = _model_and_images(*arguments)
    model.eval()

    def run():
        with torch.inference_mode():
            model(x)

    return run


def peak_of_step(*arguments) -> float | None:
    """MiB that train_step(*arguments) adds at its highest, the network included; None where its process failed."""
    *_, device, _ = arguments
    if device.type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        train_step(*arguments)()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    return in_fresh_process(_growth_of_step, *arguments)


def _growth_of_step(name, options, form, batch, side, device, dtype) -> int:
    train_step("ResNet26", options, "CIFAR", 2, 8, device, dtype)()  # libraries and their buffers are loaded
    return growth(lambda: train_step(name, options, form, batch, side, device, dtype)())


# ---- the largest batch ----------------------------------------------------------------------------------------------


def largest_batch(fits: Callable[[int], bool], limit: int = LARGEST_BATCH) -> int:
    """The largest batch up to `limit` that fits, by doubling and then halving the gap to an eighth; 0: not even 1."""
    low, high = 0, 1
    while high <= limit and fits(high):
        low, high = high, 2 * high
    if high > limit:
        return low
    while high - low > max(low // 8, 1):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def fits_on_gpu(*arguments) -> Callable[[int], bool]:
    """Whether a step with so many images fits, by trying it. Arguments as train_step, without batch."""
    name, options, form, side, device, dtype = arguments

    def fits(batch: int) -> bool:
        try:
            train_step(name, options, form, batch, side, device, dtype)()
            torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            return False
        finally:
            torch.cuda.empty_cache()
        return True

    return fits


def fits_in_memory(available: float, *arguments) -> Callable[[int], bool]:
    """By the peaks of two small batches, in a straight line: on a CPU a batch that does not fit ends the machine.

    Args:
        available: MiB.
        arguments: as train_step, without batch.

    Raises:
        RuntimeError: a step of few images failed.
    """
    name, options, form, side, device, dtype = arguments
    few, more = (peak_of_step(name, options, form, batch, side, device, dtype) for batch in PROBES)
    if few is None or more is None:
        raise RuntimeError(f"a training step of {name} with {PROBES[1]} images failed")
    image = max(more - few, 0) / (PROBES[1] - PROBES[0])
    return lambda batch: few + image * (batch - PROBES[0]) <= SHARE * available


def free_mib() -> float:
    """Memory that this machine can still give, MiB."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("MemAvailable"))) / 1024


def choose_batch(wanted: int | str | None, default: int, *arguments) -> int:
    """`wanted` images, or by default; "auto": the largest batch that fits. Arguments as train_step, without batch.

    Raises:
        RuntimeError: not even one image fits.
    """
    if wanted != "auto":
        return wanted or default
    device = arguments[-2]
    fits = fits_on_gpu(*arguments) if device.type == "cuda" else fits_in_memory(free_mib(), *arguments)
    batch = largest_batch(fits)
    if batch == 0:
        raise RuntimeError(f"not even one image of {arguments[0]} fits in the memory")
    return batch


# ---- the tables -----------------------------------------------------------------------------------------------------


def network(bench: Bench, names: tuple[str, ...], batch_size: int | str | None = None) -> list[dict]:
    """Training steps: a row for each network; peaks, which take a process each, only with --network."""
    _head(bench, "Training step (SGD)", " peak MiB" if bench.peaks else "")
    rows, backend = [], (bench.fast or bench.backends)[0]
    if bench.device.type == "cpu":
        memory.keep_freed()  # as train.py does
    for form, (batch, side) in FORMS.items():
        if bench.quick and form != "CIFAR":
            continue
        for name in names:
            wanted = 16 if bench.quick else batch
            nets, where = candidates(backend), (side, bench.device, bench.dtype)
            # one batch for all, so that their times can be held against each other
            size = min(choose_batch(batch_size, wanted, name, options, form, *where) for options in nets.values())
            rows += _rows(bench, train_step, (name, form, size, side, backend), bench.peaks)
    return rows


def evaluation(bench: Bench, trained: list[dict]) -> list[dict]:
    """Evaluation of the networks of `network`'s rows, by the same batches: a row for each."""
    _head(bench, "Evaluation (no gradients)")
    asked = dict.fromkeys(tuple(row[k] for k in ("model", "form", "batch", "image", "backend")) for row in trained)
    return [row for problem in asked for row in _rows(bench, evaluation_pass, problem)]


def _head(bench: Bench, title: str, more: str = "") -> None:
    bench.print(f"\n{title}: / baseline: to the convolution baseline; / conv stem: to attention")
    columns = f"{'form':<9} {'network':<34} {'batch':>5} {'images/s':>9} {'/ baseline':>10} {'lowest .. highest':>18}"
    columns += f" {'/ conv stem':>11}{more}"
    bench.print(columns + "\n" + "-" * len(columns))


def _rows(bench: Bench, make: Callable, problem: tuple[str, str, int, int, str], peaks: bool = False) -> list[dict]:
    """The candidates of one network, `make`'s function of each timed in turns."""
    name, form, batch, side, backend = problem
    nets, rest = candidates(backend), (form, batch, side, bench.device, bench.dtype)
    runs = {net: make(name, options, *rest) for net, options in nets.items()}
    times = bench.time(runs)
    runs.clear()  # before the peaks are taken
    rows = []
    for net, seconds in times.items():
        baseline, stem = (ratio(seconds, times[base]) for base in ("convolution", "attention"))
        rate = batch / statistics.median(seconds)
        label = f"{name} {net}" + ("" if net == "convolution" else f" ({backend})")
        text = f"{form:<9} {label:<34} {batch:>5} {rate:>9.1f} {baseline['median']:>10.3f}"
        text += f" {baseline['low']:>8.3f} ..{baseline['high']:>7.3f} "
        text += f"{stem['median']:>11.3f}" if "stem" in net else " " * 11
        rows.append(
            {"form": form, "batch": batch, "image": side, "model": name, "network": net, "backend": backend,
             "images_per_s": rate, "ratio_to_baseline": baseline, "ratio_to_conv_stem": stem}
        )  # fmt: skip
        if make is train_step:
            peak = rows[-1]["peak_mib"] = peak_of_step(name, nets[net], *rest) if peaks else None
            text += "" if peak is None else f" {peak:>8.1f}"
        bench.print(text)
    return rows
