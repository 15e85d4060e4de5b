"""The device of a run: which one, in which precision, and its memory."""

import contextlib
import copy
import ctypes
import os
import resource
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from config import ConfigError
from sasa.training import distributed

AMP_NAMES = {None: "off", torch.bfloat16: "bf16", torch.float16: "fp16"}
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h of glibc


def pick_device(name: str) -> torch.device:
    """The device of --device, from now on the current one; on several ranks each takes the GPU of its own number.

    Raises:
        ConfigError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if distributed.is_distributed() and name.startswith("cuda"):
        if name != "cuda":
            raise ConfigError(f"--device {name}: every rank takes a GPU of its own; allowed are auto, cpu, cuda")
        name = f"cuda:{distributed.local_rank()}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device {name}: allowed are auto, cpu, cuda, cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name}: allowed are auto, cpu, cuda, cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ConfigError(f"--device {name}: this machine has {count} CUDA devices; --device auto takes what there is")
    make_current(device)
    return device


def make_current(device: torch.device) -> None:
    """A GPU given by its number becomes the one that PyTorch means where none is named.

    PyTorch records events on the current GPU, and answers for it whether a GPU has bf16.
    """
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def pick_amp(name: str, device: torch.device) -> torch.dtype | None:
    """The dtype of mixed precision, None for none.

    "auto" is bf16 on GPUs that compute in it; older ones (V100, T4) only emulate it.

    Raises:
        ConfigError: the device has not got it.
    """
    if name == "auto":
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else None
    has_bf16 = device.type == "cpu" or torch.cuda.is_bf16_supported()
    if name == "fp16" and device.type != "cuda":
        raise ConfigError(f"--amp fp16: needs a CUDA device, this run is on {device.type}; allowed here are off, bf16")
    if name == "bf16" and not has_bf16:
        raise ConfigError("--amp bf16: this GPU has no bfloat16; allowed here are off, fp16")
    return next(dtype for dtype, amp_name in AMP_NAMES.items() if amp_name == name)


def autocast_in(amp: torch.dtype | None, device: torch.device) -> Callable[[], torch.autocast]:
    """Makes the context that a forward pass in mixed precision runs in; with `amp` None one that changes nothing."""
    return partial(torch.autocast, device.type, dtype=amp, enabled=amp is not None)


def set_fp32_precision(name: str) -> None:
    """--matmul-precision, for products and convolutions alike: PyTorch by itself computes fp32 convolutions in TF32.

    Args:
        name: "highest", or "high" for TF32 where the GPU has it.
    """
    torch.set_float32_matmul_precision(name)
    torch.backends.cudnn.allow_tf32 = name == "high"


def check_bf16_gradients(network: nn.Module, image_size: int, amp: torch.dtype | None, device: torch.device) -> None:
    """Refuse bf16 on a CPU where PyTorch would give a convolution's weight garbage for a gradient.

    oneDNN leaves a part of the weight's gradient unwritten where a strided bf16 convolution larger than 1x1 reads a map
    one pixel wide (seen on torch 2.6.0, 2.14.1 and 2.15.0): what the memory held before is added to the gradient, NaN
    or 1e20 or anything.

    Args:
        network: takes a batch of images (B, 3, H, W).
        image_size: H and W of a training image.

    Raises:
        ConfigError: such a convolution, by its name.
    """
    if device.type != "cpu" or amp is None:
        return
    narrow = []

    def note(name: str, x: torch.Tensor) -> None:
        if x.shape[-1] == 1:
            narrow.append(name)

    shadow = copy.deepcopy(network).to("meta").eval()  # shapes alone: nothing is computed
    for name, module in shadow.named_modules():
        if isinstance(module, nn.Conv2d) and max(module.stride) > 1 and max(module.kernel_size) > 1:
            module.register_forward_pre_hook(lambda _, x, name=name: note(name, *x))
    with torch.no_grad():
        shadow(torch.empty(1, 3, image_size, image_size, device="meta"))
    if narrow:
        raise ConfigError(
            f"--amp bf16: at --img-size {image_size} the strided convolution {narrow[0]} reads a map one pixel wide, "
            "for which PyTorch's bf16 gradient on a CPU is wrong; use --amp off or larger images"
        )


def decoding_processes(given: int | None, device: torch.device) -> int:
    """--num-workers, or without it as many as the CPUs allow: which images come in which order never depends on it.

    For a GPU, this process's CPUs (`taskset`, a container's set), shared by the machine's ranks, less one that trains.
    Training on a CPU needs them itself: as many as there are, at most 4, which wait most of the time. (PyTorch warns of
    more processes than CPUs.)
    """
    if given is not None:
        return given
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if device.type == "cpu":
        return min(cpus, 4)
    return min(max(cpus // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1, 1), 32)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device's memory, or the machine's, is too small for what was computed."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)  # torch has no class for it


def amp_of_checkpoint(own: str, device: torch.device, given: str | None = None) -> torch.dtype | None:
    """The precision to evaluate a checkpoint in: --amp where it is `given`; else the run's own, with which its scores
    come out again; "auto" where the device has not got that.

    Raises:
        ConfigError: the device has not got the given one.
    """
    if given is not None:
        return pick_amp(given, device)
    try:
        return pick_amp(own, device)
    except ConfigError:
        return pick_amp("auto", device)


def keep_freed() -> None:
    """Freed memory stays with the process for the next step, where the C library is glibc.

    Without it each large map of a step on a CPU is freed and allocated again: the kernel clears its pages each time,
    which took a fifth of a training step (ResNet26, CIFAR form, 64 images, 2 threads).
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def peak_memory_mib(device: torch.device) -> float:
    """The most memory so far, in MiB: of the device's allocator on CUDA, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return peak_resident_bytes() / 2**20


def peak_resident_bytes() -> int:
    """The most memory that this process has had so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
