"""SHA-256 of everything that a run's future depends on, group by group: two runs with equal digests go on equally."""

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

GROUPS = ("weights", "buffers", "optimizer", "moving_average", "generators")


def of_run(
    model: nn.Module, optimizer, scaler, ema: nn.Module | None, generators: list[dict[str, Any]]
) -> dict[str, str]:
    """The digests of a run as it stands, by the names of `GROUPS`; no moving average, no digest of one.

    Args:
        optimizer, scaler: their `state_dict` counts; the scaler of fp16, or None, is part of the optimizer's group.
        generators: `checkpoint.generator_states` of every rank.
    """
    buffers = {name for name, _ in model.named_buffers()}
    state = model.state_dict()
    parts = {
        "weights": {name: value for name, value in state.items() if name not in buffers},
        "buffers": {name: value for name, value in state.items() if name in buffers},
        "optimizer": [optimizer.state_dict(), None if scaler is None else scaler.state_dict()],
        "generators": generators,
    }
    if ema is not None:
        parts["moving_average"] = ema.state_dict()
    return {name: digest(parts[name]) for name in GROUPS if name in parts}


def of_state(state: dict[str, Any], buffers: Iterable[str]) -> dict[str, str]:
    """The digests of a checkpoint's content: equal to `of_run` of the run that wrote it.

    Args:
        buffers: the names of the network's buffers, which its state does not tell from weights.
    """
    names = set(buffers)
    parts = {
        "weights": {name: value for name, value in state["model"].items() if name not in names},
        "buffers": {name: value for name, value in state["model"].items() if name in names},
        "optimizer": [state["optimizer"], state["scaler"]],
        "generators": state["generators"],
    }
    if state["ema"] is not None:
        parts["moving_average"] = state["ema"]
    return {name: digest(parts[name]) for name in GROUPS if name in parts}


def digest(values: Any) -> str:
    """The SHA-256 of nested dicts and lists of tensors, numbers and strings, as hex.

    A tensor counts by its dtype, shape and bytes, whatever its device and layout; dicts by their sorted keys. Tensors
    are hashed by several threads, each for itself, and the digests are hashed in their order.
    """
    lines: list[str] = []
    tensors: list[tuple[int, Tensor]] = []
    _walk(values, "", lines, tensors)
    with ThreadPoolExecutor(min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2, 4)) as pool:
        hashes = pool.map(_of_tensor, (value for _, value in tensors))
        for (place, _), found in zip(tensors, hashes, strict=True):
            lines[place] += found
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _walk(values: Any, path: str, lines: list[str], tensors: list[tuple[int, Tensor]]) -> None:
    """A line for each leaf; those of tensors lack their digest."""
    if isinstance(values, Tensor):
        tensors.append((len(lines), values))
        lines.append(f"{path} {values.dtype} {tuple(values.shape)} ")
    elif isinstance(values, dict):
        lines.append(f"{path} {{{len(values)}}}")
        for key in sorted(values, key=str):
            _walk(values[key], f"{path}/{key}", lines, tensors)
    elif isinstance(values, list | tuple):
        lines.append(f"{path} [{len(values)}]")
        for i, value in enumerate(values):
            _walk(value, f"{path}/{i}", lines, tensors)
    else:
        lines.append(f"{path} {json.dumps(values)}")


def _of_tensor(value: Tensor) -> str:
    data = value.detach().to("cpu").contiguous().view(-1)
    return hashlib.sha256(memoryview(data.view(torch.uint8).numpy()) if data.numel() else b"").hexdigest()
