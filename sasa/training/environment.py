"""What a run's bits depend on beside its configuration, its data and its state: versions, machine, kernels."""

import hashlib
import json
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sasa.kernels import triton_backend
from sasa.kernels.build import library
from sasa.training import distributed

# How each value is called where it differs.
NAMES = {
    "torch": "torch version", "numpy": "numpy version", "ranks": "number of ranks", "threads": "thread count",
    "device": "device", "processor": "processor model", "vector_extension": "vector extension",
    "kernel_build": "kernel build", "backend": "backend", "cuda": "CUDA and cuDNN version",
}  # fmt: skip


def describe(device: torch.device, backend: str | None) -> dict[str, Any]:
    """Plain values by the keys of `NAMES`.

    Args:
        backend: --backend of a network with attention, whose kernel is then part of it; None: it has none.
    """
    gpu = device.type == "cuda"
    if backend == "auto":
        backend = os.environ.get("SASA_BACKEND") or "auto"
    compiled = backend in ("auto", "triton" if gpu else "cpu")
    return {
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "ranks": distributed.world_size(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if gpu else "cpu",
        "processor": _processor(),
        "vector_extension": torch.backends.cpu.get_cpu_capability(),
        "kernel_build": (_triton_build() if gpu else _cpu_build()) if compiled else "none",
        "backend": backend or "none",
        "cuda": f"{torch.version.cuda}, {torch.backends.cudnn.version()}" if gpu else "none",
    }


def digest(described: dict[str, Any]) -> str:
    """SHA-256 of `describe`, as hex."""
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One line for each value that differs."""
    return [
        f"{NAMES.get(key, key)} was {before.get(key)}, is {now.get(key)}"
        for key in (*NAMES, *sorted(before.keys() - NAMES.keys()))
        if before.get(key) != now.get(key)
    ]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = {line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "CPU part"))}
    return ", ".join(sorted(models)) or platform.machine()


def _cpu_build() -> str:
    """The name of the compiled kernel, which is a digest of source, compiler, flags and processor."""
    found = library(torch.float32)
    return "none" if isinstance(found, str) else Path(found._name).stem


def _triton_build() -> str:
    """Triton's version and a digest of the kernels' sources; "none" where they cannot run, so that others do."""
    if triton_backend.unusable() is not None:
        return "none"
    import triton

    sources = sorted((Path(__file__).parents[1] / "kernels").glob("triton_*"))
    content = b"".join(path.read_bytes() for path in sources if path.is_file())
    return f"triton {triton.__version__}, {hashlib.sha256(content).hexdigest()[:24]}"
