"""Stages about single kernels: what the machine can do, whether the kernels are right, and how long they take.

Shapes: B batch, N heads, D head width, H x W map, K window side.
"""

import csv
import io
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sasa.kernels import dispatch, triton_tiles
from sasa.kernels.interface import AttentionOptions
from tools.gpu.stage import Lab, Stage, Unmet, checked
from tools.gpu.stem import LIMITS as STEM_LIMITS
from tools.gpu.stem import compare_stem, stem_forms, time_stem

HEADS, WINDOW = 8, 7
OPTIONS = AttentionOptions(WINDOW)
NAMES = ("out", "grad query", "grad key", "grad value", "grad rel_row", "grad rel_col")
LIMITS = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}  # of the largest value, as in the tests
REPEATS = 3
COUNTERS = (
    "smsp__inst_executed.sum", "sm__cycles_elapsed.max", "dram__bytes.sum", "sm__inst_executed.avg.per_cycle_active",
)  # fmt: skip


class Form(NamedTuple):
    """A local attention of ResNet50 at 224 pixels: head width, side of the map, and how many layers have it."""

    width: int
    side: int
    layers: int

    def __str__(self) -> str:
        return f"d{self.width} {self.side}x{self.side}"


FORMS = (
    Form(8, 56, 3), Form(16, 56, 1), Form(16, 28, 3), Form(32, 28, 1), Form(32, 14, 5), Form(64, 14, 1), Form(64, 7, 2),
)  # fmt: skip
DRY_FORMS = (Form(8, 6, 3), Form(16, 5, 13))


def forms(lab: Lab) -> tuple[Form, ...]:
    """Those of this walk."""
    return DRY_FORMS if lab.dry else FORMS


# ---- the machine ----------------------------------------------------------------------------------------------------


def machine(lab: Lab, stage: Stage) -> None:
    """Versions, and the ceilings that everything else is held against."""
    stage.unit("versions", partial(versions, lab))
    stage.unit("copy", partial(copy_bandwidth, lab))
    stage.unit("product", partial(product_rate, lab))


def versions(lab: Lab) -> dict:
    """Of Python, torch and triton, and what the GPU is; what nvidia-smi does not say is None."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
    if lab.device.type != "cuda":
        return found | {"gpu": "none: a dry run", "multiprocessors": 1, "max_clock_mhz": 1.0}
    properties = torch.cuda.get_device_properties(lab.device)
    clock, driver, power = ask_nvidia_smi(lab)
    return found | {
        "gpu": properties.name,
        "capability": ".".join(map(str, torch.cuda.get_device_capability(lab.device))),
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": properties.L2_cache_size / 2**20,
        "max_clock_mhz": clock,
        "driver": driver,
        "power_limit_w": power,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def ask_nvidia_smi(lab: Lab) -> tuple[float | None, str | None, str | None]:
    """The highest clock in MHz, the driver's version and the limit of power in W; None where it is not told."""
    index = lab.device.index or 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")  # numbers, or names of which it knows the long ones
    for which in [name.strip() for name in visible[index : index + 1] if name.strip()] + [str(index)]:
        query = ["nvidia-smi", f"--id={which}", "--format=csv,noheader,nounits"]
        try:
            output = checked(lab.shell([*query, "--query-gpu=clocks.max.sm,driver_version,power.limit"], 30))
            clock, driver, power = output.strip().split(", ")
        except (OSError, RuntimeError, ValueError, subprocess.TimeoutExpired):  # not there, not allowed, another form
            continue
        return float(clock) if clock.replace(".", "").isdigit() else None, driver, power  # or [N/A], of a part of one
    return None, None, None


def copy_bandwidth(lab: Lab) -> dict:
    """GB/s read and written by a copy of 1 GiB."""
    count = 2**12 if lab.dry else 2**28

    def make():
        source, target = (torch.empty(count, device=lab.device) for _ in range(2))
        return lambda: target.copy_(source)

    return {"gb_per_s": 8 * count / lab.timer.seconds(make, 8 * count) / 1e9}


def product_rate(lab: Lab) -> dict:
    """TFLOP/s of a product of 8192 x 8192 matrices in bf16."""
    side = 64 if lab.dry else 8192

    def make():
        a, b = (torch.randn(side, side, device=lab.device, dtype=torch.bfloat16) for _ in range(2))
        out = torch.empty_like(a)
        return lambda: torch.mm(a, b, out=out)

    return {"tflop_per_s": 2 * side**3 / lab.timer.seconds(make, 6 * side * side) / 1e12}


# ---- right? ---------------------------------------------------------------------------------------------------------


def make_inputs(form: Form, batch: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> list[Tensor]:
    """grad_out, query, key, value, rel_row, rel_col: the maps are slices of one projection, channels innermost, as in a
    layer, for which the kernels have builds of their own.
    """
    generator = torch.Generator(device).manual_seed(seed)
    n, d, h = HEADS, form.width, form.side
    options = {"device": device, "dtype": dtype, "generator": generator}
    maps = torch.randn(batch, h, h, 3, n, d, **options)
    maps[:, :, :, :2] *= d**-0.25  # in place: a product would be a map of its own
    grad = torch.randn(batch, h, h, n, d, **options).permute(0, 3, 4, 1, 2)
    rows, cols = (torch.randn(n, d // 2, WINDOW, **options) * d**-0.25 for _ in range(2))
    return [grad, *slices(maps), rows, cols]


def slices(maps: Tensor) -> tuple[Tensor, ...]:
    """(B, H, W, 3, N, D) -> query, key, value or their gradients, each (B, N, D, H, W)."""
    return tuple(x.permute(0, 3, 4, 1, 2) for x in maps.unbind(3))


def gradient_maps(query: Tensor) -> tuple[Tensor, ...]:
    """Where a layer's backward writes the gradients of query, key and value: slices of one map."""
    b, n, d, h, w = query.shape
    return slices(query.new_empty(b, h, w, 3, n, d))


def both_ways(backend: str, inputs: list[Tensor]) -> list[Tensor]:
    """out and the five gradients."""
    kernel, (grad, *rest) = dispatch.module(backend), inputs
    out, lse = kernel.forward(*rest, OPTIONS)
    return [out, *kernel.backward(grad, *rest, out, lse, OPTIONS, gradient_maps(rest[0]))]


def right(lab: Lab, stage: Stage) -> None:
    """Every form and stem in every dtype against the definition in fp64, and repetitions bitwise."""
    for form in forms(lab):
        for dtype, limit in LIMITS.items():
            stage.unit(f"{form} {str(dtype).removeprefix('torch.')}", partial(compare, lab, form, dtype, limit))
    for form in stem_forms(lab):
        for dtype in STEM_LIMITS:
            stage.unit(f"{form} {str(dtype).removeprefix('torch.')}", partial(compare_stem, lab, form, dtype))


def compare(lab: Lab, form: Form, dtype: torch.dtype, limit: float) -> dict:
    """The largest error of a form's results and gradients.

    Raises:
        RuntimeError: a value is off, or repetitions differ.
    """
    inputs = make_inputs(form, 1 if lab.dry else 4, dtype, lab.device)
    expected = both_ways("tiled", [x.double() for x in inputs])
    got = both_ways(lab.backend, inputs)
    errors = {
        name: ((a.double() - b).abs().max() / b.abs().max()).item()
        for name, a, b in zip(NAMES, got, expected, strict=True)
    }
    worst = max(errors, key=errors.get)
    if not all(error <= limit for error in errors.values()):
        raise RuntimeError(f"{worst} is off by {errors[worst]:.2e} of its largest value, allowed are {limit:.0e}")
    for _ in range(REPEATS - 1):
        if not all(torch.equal(a, b) for a, b in zip(got, both_ways(lab.backend, inputs), strict=True)):
            raise RuntimeError("a repetition gives other bits")
    return {"largest_error": errors[worst], "of": worst, "limit": limit, "repeats_bitwise": REPEATS}


# ---- how long? ------------------------------------------------------------------------------------------------------


def times(lab: Lab, stage: Stage) -> None:
    """bf16: each form beside cuDNN's convolutions of its map, instructions a cycle; both stems."""
    if lab.device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    about = versions(lab)
    for form in forms(lab):
        stage.unit(str(form), partial(time_form, lab, form, about))
    for form in stem_forms(lab):
        stage.unit(str(form), partial(time_stem, lab, form))


def time_form(lab: Lab, form: Form, about: dict) -> dict:
    """Times in ms of a form's passes and of cuDNN's convolutions, and instructions a cycle.

    Args:
        about: what `versions` found.
    """
    batch, dtype = (1, torch.float32) if lab.dry else (128, torch.bfloat16)
    c, pixels = HEADS * form.width, batch * form.side**2
    bytes_map = pixels * c * dtype.itemsize
    kernel = dispatch.module(lab.backend)

    def forward():
        _, *inputs = make_inputs(form, batch, dtype, lab.device)
        return lambda: kernel.forward(*inputs, OPTIONS)

    def backward():
        grad, *inputs = make_inputs(form, batch, dtype, lab.device)
        out, lse = kernel.forward(*inputs, OPTIONS)
        into = gradient_maps(inputs[0])
        return lambda: kernel.backward(grad, *inputs, out, lse, OPTIONS, into)

    found = {
        "forward_ms": 1e3 * lab.timer.seconds(forward, 4 * bytes_map),
        "backward_ms": 1e3 * lab.timer.seconds(backward, 8 * bytes_map),
    }
    for name, size, channels in (("conv3x3", 3, c), ("conv1x1_qkv", 1, 3 * c)):
        forward, backward = (partial(convolution, lab, batch, form.side, c, channels, size, dtype, i) for i in (0, 1))
        moved = bytes_map * (1 + channels // c)
        found[f"{name}_forward_ms"] = 1e3 * lab.timer.seconds(forward, moved)
        found[f"{name}_backward_ms"] = 1e3 * lab.timer.seconds(backward, 2 * moved)
    for name, kinds in (("forward", ("forward",)), ("backward", ("query", "key"))):
        counts = [counted(kind, form, dtype, about) for kind in kinds]
        if None not in counts and about["max_clock_mhz"] is not None:
            cycles = found[f"{name}_ms"] / 1e3 * about["max_clock_mhz"] * 1e6 * about["multiprocessors"]
            found[f"{name}_ipc"] = sum(counts) * pixels * HEADS / cycles
    return found


def convolution(
    lab: Lab, batch: int, side: int, c: int, channels: int, size: int, dtype: torch.dtype, is_backward: int
) -> Callable[[], object]:
    """A call of cuDNN's convolution of a (batch, c, side, side) map to `channels`, or of its backward."""
    options = {"device": lab.device, "dtype": dtype}
    x = torch.randn(batch, c, side, side, **options).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(channels, c, size, size, **options).contiguous(memory_format=torch.channels_last)
    if not is_backward:
        return lambda: F.conv2d(x, weight, padding=size // 2)
    grad = torch.randn(batch, channels, side, side, **options).contiguous(memory_format=torch.channels_last)
    rest = ([0], [1, 1], [size // 2] * 2, [1, 1], False, [0, 0], 1, [True, True, False])
    return lambda: torch.ops.aten.convolution_backward(grad, x, weight, *rest)


def counted(kind: str, form: Form, dtype: torch.dtype, about: dict) -> float | None:
    """Executed warp instructions a pixel and head of the tile in use, from the committed table; None: not counted.

    The count of this version of triton and compute capability, else of that version for 9.0. The table's rows stand
    for all maps and head widths of their bucket.
    """
    if dtype != torch.bfloat16:
        return None
    problem = triton_tiles.Problem(HEADS, form.width, form.side, form.side, WINDOW)
    entry = triton_tiles.table()[triton_tiles.row_of(kind, problem, dtype)][kind]
    version = ".".join(str(about.get("triton")).split(".")[:2])
    capability = str(about.get("capability", "")).replace(".", "")
    tile = triton_tiles.tile_name(triton_tiles.choice(entry, f"{version} {capability}"))
    for key in (f"{version} {capability}", f"{version} 90"):
        if entry["builds"][tile].get(key):
            return entry["builds"][tile][key][0]
    return None


# ---- counters -------------------------------------------------------------------------------------------------------


def counters(lab: Lab, stage: Stage) -> None:
    """What the hardware counts for each form, by ncu."""
    for form in forms(lab):
        stage.unit(str(form), partial(count_form, lab, stage, form))


def count_form(lab: Lab, stage: Stage, form: Form) -> dict:
    """A form's counters, at the clocks that the GPU has by itself.

    Raises:
        Unmet: ncu is missing, or this user may not read the counters.
    """
    if not lab.dry and shutil.which("ncu") is None:
        raise Unmet("ncu is not installed")
    options = ["--csv", "--print-units", "base", "--clock-control", "none", "--metrics", ",".join(COUNTERS)]
    command = ["ncu", *options, sys.executable, "-m", "tools.gpu.probe"]
    done = lab.shell([*command, str(form.width), str(form.side)], stage.left)
    if "ERR_NVGPUCTRPERM" in done.stdout + done.stderr:
        raise Unmet("this user may not read the GPU's counters (ERR_NVGPUCTRPERM)")
    return counters_of(checked(done))


def counters_of(text: str) -> dict[str, float]:
    """ "<kernel> <counter>" -> value, of ncu's CSV; of a kernel that ran several times, its last run."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    found = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines[start:]))):
        if row.get("Metric Name") in COUNTERS:
            found[f"{row['Kernel Name'][:40]} {row['Metric Name']}"] = float(row["Metric Value"].replace(",", ""))
    return found
