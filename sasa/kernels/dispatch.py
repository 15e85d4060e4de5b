"""Which backend serves a call.

The fastest that can: the answer follows from device, dtype, head width and window, and is kept for each of these. The
environment variable SASA_BACKEND replaces "auto"; a process reads it once, at its first call (`forget` reads it anew).
"""

import functools
import importlib
import os

from torch import Tensor

from sasa.kernels.interface import Backend, CallKind

# Fastest first: "auto" takes the first that is usable here and takes the call.
MODULES = {
    "triton": "sasa.kernels.triton_backend",
    "cpu": "sasa.kernels.cpu",
    "tiled": "sasa.kernels.tiled",
    "reference": "sasa.kernels.reference",
    "composite": "sasa.kernels.reference",  # its forward, in operations that PyTorch differentiates: see functional.py
}


def module(name: str) -> Backend:
    """A backend by its name; its module is imported when it is first needed."""
    return importlib.import_module(MODULES[name])


def backends() -> dict[str, str | None]:
    """Each backend's name -> None where it is usable on this machine, or the reason why not."""
    return {name: module(name).unusable() for name in MODULES}


def check_name(backend: str) -> None:
    """Checks that `backend` is "auto" or the name of a backend.

    Raises:
        ValueError: it is neither.
    """
    if backend != "auto" and backend not in MODULES:
        raise ValueError(f"backend={backend!r}: allowed are {', '.join(('auto', *MODULES))}")


def check_backend(backend: str) -> None:
    """Checks that calls with this `backend` can be served on this machine.

    Raises:
        ValueError: it is neither "auto" nor the name of a backend that is usable here.
    """
    check_name(backend)
    if backend == "auto":
        return
    reason = module(backend).unusable()
    if reason is not None:
        raise ValueError(f"backend={backend!r} is not usable here: {reason}")


def choose_backend(query: Tensor, kernel_size: int, backend: str = "auto") -> str:
    """The name of the backend that serves a call: the named one, SASA_BACKEND's, or the fastest that can.

    Args:
        query: (B, N, D, H, W); only its device, its dtype and D count.
        kernel_size: K, the side of the window.
        backend: "auto" or a name of `backends()`.

    Raises:
        ValueError: the named backend (or that of SASA_BACKEND) is unknown, not usable here, or refuses the call.
    """
    return choose_for(CallKind.of(query, kernel_size), backend)


@functools.cache
def named_backend(backend: str) -> str:
    """`backend`, or in place of "auto" the name in SASA_BACKEND; "auto" where there is none.

    Raises:
        ValueError: as `check_backend`, for either.
    """
    if backend != "auto":
        check_backend(backend)
        return backend
    backend = os.environ.get("SASA_BACKEND") or "auto"
    try:
        check_backend(backend)
    except ValueError as error:
        raise ValueError(f"the environment variable SASA_BACKEND: {error}") from None
    return backend


@functools.cache
def choose_for(kind: CallKind, backend: str = "auto") -> str:
    """`choose_backend` by the kind of the calls.

    Raises:
        ValueError: as `choose_backend`.
    """
    backend = named_backend(backend)
    if backend != "auto":
        reason = module(backend).unsupported(kind)
        if reason is not None:
            raise ValueError(f"backend={backend!r} does not take this call: {reason}")
        return backend
    for name in MODULES:
        if name == "triton" and kind.device.type == "cpu":
            continue  # with TRITON_INTERPRET=1 it takes them, interpreted: far too slow for "auto"
        if name == "cpu" and kind.device.type != "cpu":
            continue  # to ask whether it is usable is to build it
        if module(name).unusable() is None and module(name).unsupported(kind) is None:
            return name
    raise AssertionError("the reference backend takes every call")


def forget() -> None:
    """Forgets all choices: the next call reads SASA_BACKEND and tries the backends anew."""
    choose_for.cache_clear()
    named_backend.cache_clear()
