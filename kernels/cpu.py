"""Backend "cpu": local attention by the C++ kernel of cpu.cpp, compiled on first use and kept in the user's cache.

The library has a plain C interface and is loaded with ctypes, so it needs a C++ compiler but no headers of torch, and
one build serves every torch version. fp64 has a library of its own, built at the first call that needs it. Threads are
torch's own: the kernel is handed GOMP_parallel of the OpenMP runtime that torch has loaded, and follows
torch.set_num_threads.

$CXX names the compiler, $SASA_CXXFLAGS adds flags for it. Cache: $SASA_CACHE_DIR, else $XDG_CACHE_HOME/sasa or
~/.cache/sasa, else a private folder for temporary files.
Shapes: B batch, N heads, D head width, H x W map, K window side.
"""

import ctypes
import errno
import functools
import hashlib
import multiprocessing
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("cpu.cpp")
MAX_KERNEL_SIZE = 13  # kMaxWindow of cpu.cpp
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BUILD_SECONDS = {torch.float32: 9, torch.float64: 3}  # measured with g++ 12; only for the message
_LEVEL = {torch.float32: "-O3", torch.float64: "-O1"}  # fp64 is for checking gradients: it need not be fast
# Passes of GCC that take a third of the time to build and gain nothing.
_LEAVE_OUT = ["-fno-tree-vectorize", "-fno-unswitch-loops", "-fno-split-loops", "-fno-ipa-cp-clone"]
BUILD_LIMIT = 300  # seconds until a compiler, or the process that holds the lock, is given up
_FILE_SIZE_SIGNAL = getattr(signal, "SIGXFSZ", 0) or -1  # ends a program that writes past the limit on file sizes
_DIGEST = hashlib.sha256().digest_size


class _BuildError(Exception):
    """Why there is no kernel, in one line."""


def unusable() -> str | None:
    """Why the kernel cannot run here (no compiler, a failed build), or None. The first call builds or loads it."""
    library = _library(torch.float32)
    return library if isinstance(library, str) else None


def unsupported(query: Tensor, kernel_size: int) -> str | None:
    """Why the kernel cannot take this call, or None."""
    if query.device.type != "cpu":
        return f"it takes CPU tensors, got {query.device.type}"
    if query.dtype not in DTYPES:
        return f"it takes fp32, fp64, bf16 and fp16, got {query.dtype}"
    if kernel_size > MAX_KERNEL_SIZE:
        return f"it takes kernel_size up to {MAX_KERNEL_SIZE}, got {kernel_size}"
    if query.dtype == torch.float64 and isinstance(_library(torch.float64), str):
        return f"it has no fp64 form: {_library(torch.float64)}"
    return None


def forward(query, key, value, rel_row, rel_col, kernel_size: int, border: str, scale: float) -> tuple[Tensor, Tensor]:
    """-> out (B, N, D, H, W) in query's dtype and layout, log-sum-exp of the logits (B, N, H, W) in fp32 or fp64."""
    out = _empty_like_map(query)
    q, k, v, rows, cols = (_widen(x) for x in (query, key, value, rel_row, rel_col))
    wide_out = out if out.dtype == q.dtype else _empty_like_map(q)
    b, n, _, h, w = query.shape
    lse = q.new_empty((b, n, h, w))
    if query.numel():
        _call(False, (q, k, v, wide_out, lse, rows, cols), (), kernel_size, border, scale)
    return (out if wide_out is out else out.copy_(wide_out)), lse


def backward(
    grad_out, query, key, value, rel_row, rel_col, out, lse, kernel_size: int, border: str, scale: float, into=None
):
    """Gradients of query, key, value, rel_row, rel_col (None where the input is None).

    into: (query's, key's or None, value's) tensors of any strides to write instead of new ones.
    """
    targets = into or tuple(None if x is None else _empty_like_map(query) for x in (query, key, value))
    g, q, k, v, rows, cols, o = (_widen(x) for x in (grad_out, query, key, value, rel_row, rel_col, out))
    wide = tuple(t if t is None or t.dtype == q.dtype else _empty_like_map(q) for t in targets)
    wide_rel = tuple(None if x is None else x.new_zeros(x.shape) for x in (rows, cols))
    if query.numel():
        grads = (g, *wide, *wide_rel)
        _call(True, (q, k, v, o, lse.to(q.dtype).contiguous(), rows, cols), grads, kernel_size, border, scale)
    for target, source in zip(targets, wide, strict=True):
        if target is not source:
            target.copy_(source)
    return *targets, *(None if x is None else x.to(query.dtype) for x in wide_rel)


def _empty_like_map(query: Tensor) -> Tensor:
    return sys.modules["kernels"]._empty_like_map(query)  # the package imports this module, so it is there by now


def _widen(x: Tensor | None) -> Tensor | None:
    return x.float() if x is not None and x.dtype in (torch.bfloat16, torch.float16) else x


def _call(backward: bool, inputs, grads, kernel_size: int, border: str, scale: float) -> None:
    """Calls the kernel; the order of the numbers is that of struct Call in cpu.cpp."""
    query, key, value, out, lse, rel_row, rel_col = inputs
    b, n, d, h, w = query.shape
    fields = [b, n, d, h, w, kernel_size, border == "zero", torch.get_num_threads(), _parallel_region()]
    for x in (query, key, value, out):
        fields += (0,) * 6 if x is None else (x.data_ptr(), *x.stride())
    fields += (lse.data_ptr(), n * h * w, h * w, 0, w, 1)
    for x in (rel_row, rel_col):
        fields += (0,) * 4 if x is None else (x.data_ptr(), *x.stride())
    for x in grads[:4]:
        fields += (0,) * 6 if x is None else (x.data_ptr(), *x.stride())
    for x in grads[4:]:
        fields.append(0 if x is None else x.data_ptr())
    library = _library(query.dtype)
    if library.sasa_local_attention(library.record(*fields), scale, backward):
        raise MemoryError("the CPU kernel could not allocate its scratch memory")


# ---------------------------------------------------------------------------------------------------------------------
# Threads


@functools.cache
def _parallel_region() -> int:
    """Address of GOMP_parallel in the OpenMP runtime that torch uses; 0 where the kernel must start its own threads."""
    if multiprocessing.parent_process() is not None and multiprocessing.get_start_method(allow_none=True) != "spawn":
        return 0  # a forked process: see _forget_threads
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return 0
    paths = {line.split(maxsplit=5)[5] for line in lines if "omp" in line and "/" in line}
    torch_folder = str(Path(torch.__file__).parent)
    for path in sorted(paths, key=lambda p: not p.startswith(torch_folder)):
        if Path(path).name.startswith(("libgomp", "libiomp", "libomp")):
            try:
                entry = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_NOW).GOMP_parallel
            except (OSError, AttributeError):
                continue
            return ctypes.cast(entry, ctypes.c_void_p).value
    return 0


def _forget_threads() -> None:
    """In a forked child: the pool of OpenMP threads was not copied, and a parallel region would wait for it forever."""
    global _parallel_region
    _parallel_region = int


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


# ---------------------------------------------------------------------------------------------------------------------
# Build


@functools.cache
def _library(dtype: torch.dtype) -> ctypes.CDLL | str:
    """The library for fp32 or fp64, or the reason why there is none; said once on stderr, with how to get it."""
    try:
        return _load_or_build(dtype)
    except _BuildError as error:
        print(f"sasa: no fast attention on the CPU, a slower backend serves: {error}", file=sys.stderr, flush=True)
        return str(error)


def _load_or_build(dtype: torch.dtype) -> ctypes.CDLL:
    compiler = _compiler()
    version = _version(compiler)
    real = "double" if dtype == torch.float64 else "float"
    flags = ["-std=c++17", _LEVEL[dtype], "-fPIC", "-shared", "-pthread", *_native_flags(), f"-DSASA_REAL={real}"]
    flags += _LEAVE_OUT if "Free Software Foundation" in version else []  # clang refuses what it does not know
    flags += shlex.split(os.environ.get("SASA_CXXFLAGS", ""))
    identity = [version, *compiler, *flags, _cpu()]
    name = hashlib.sha256("\0".join(identity).encode() + SOURCE.read_bytes()).hexdigest()[:24] + ".so"
    folders = _cache_folders()
    for folder in folders:
        library = _load(folder / name)
        if library is not None:
            return library
    problems = []
    for folder in folders:
        try:
            return _build(folder / name, compiler + flags, BUILD_SECONDS[dtype])
        except OSError as error:
            problems.append(f"{folder}: {error.strerror or error}")
    raise _BuildError(f"no folder to build it in ({'; '.join(problems)}); set SASA_CACHE_DIR to a writable folder")


def _compiler() -> list[str]:
    wanted = shlex.split(os.environ.get("CXX", ""))
    for command in [wanted] if wanted else [["c++"], ["g++"], ["clang++"]]:
        path = shutil.which(command[0])
        if path is not None:
            return [path, *command[1:]]
    raise _BuildError(
        f"CXX={shlex.join(wanted)} is not a program" if wanted else "no C++ compiler; install g++ or clang, or set CXX"
    )


def _version(compiler: list[str]) -> str:
    try:
        return subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise _BuildError(f"{compiler[0]} does not run: {error}") from None


def _native_flags() -> list[str]:
    machine = platform.machine().lower()
    if machine in ("x86_64", "amd64"):
        return ["-march=native"]
    return ["-mcpu=native"] if machine in ("aarch64", "arm64") else []


def _cpu() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return "".join(sorted({x for x in lines if x.startswith(("model name", "flags", "Features", "CPU part"))}))


def _cache_folders() -> list[Path]:
    """Where the library may lie, most wanted first."""
    if os.environ.get("SASA_CACHE_DIR"):
        first = Path(os.environ["SASA_CACHE_DIR"])
    else:
        first = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "sasa"
    second = Path(tempfile.gettempdir()) / f"sasa-{os.getuid() if hasattr(os, 'getuid') else 'user'}"
    return [first, second]


def _load(path: Path) -> ctypes.CDLL | None:
    """The library at `path`, or None where it is absent, not whole or not loadable: then it is built again."""
    try:
        if hasattr(os, "getuid") and not {path.stat().st_uid, path.parent.stat().st_uid} <= {0, os.getuid()}:
            return None  # folders for temporary files are shared: load nothing that another user can change
        content = path.read_bytes()
        # The digest at its end is checked first: loading half a library can kill the process.
        if hashlib.sha256(content[:-_DIGEST]).digest() != content[-_DIGEST:]:
            return None
        library = ctypes.CDLL(str(path))
    except OSError:
        return None
    library.record = ctypes.c_int64 * library.sasa_call_fields()
    library.sasa_local_attention.argtypes = (library.record, ctypes.c_double, ctypes.c_int)
    return library


def _build(path: Path, command: list[str], seconds: int) -> ctypes.CDLL:
    """Builds the library at `path`, once however many processes ask.

    Raises:
        OSError: the folder cannot be written, or its disk is full.
        _BuildError: the compiler failed.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if hasattr(os, "getuid") and path.parent.stat().st_uid not in (0, os.getuid()):
        raise PermissionError(errno.EPERM, "belongs to another user")
    with open(path.with_suffix(".lock"), "w") as lock:
        _wait_for(lock)
        library = _load(path)  # another process may have built it meanwhile
        if library is not None:
            return library
        handle, part = tempfile.mkstemp(dir=path.parent, suffix=".part")
        os.close(handle)
        try:
            print(f"sasa: building the CPU kernel once (about {seconds} s) ...", file=sys.stderr, flush=True)
            _compile([*command, str(SOURCE), "-o", part])
            content = Path(part).read_bytes()
            with open(part, "ab") as f:
                f.write(hashlib.sha256(content).digest())
            os.replace(part, path)
        finally:
            Path(part).unlink(missing_ok=True)
    library = _load(path)
    if library is None:
        raise _BuildError(f"the library built by {command[0]} does not load")
    return library


def _wait_for(lock) -> None:
    """Takes the lock; gives up waiting after BUILD_LIMIT, or where files cannot be locked: two builds do no harm."""
    try:
        import fcntl
    except ImportError:
        return
    until = time.monotonic() + BUILD_LIMIT
    while time.monotonic() < until:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(0.1)
        except OSError:
            return


def _compile(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_LIMIT)
    except (OSError, subprocess.SubprocessError) as error:
        raise _BuildError(f"{command[0]} did not finish: {error}") from None
    if "No space left" in done.stderr or "File size limit" in done.stderr or done.returncode == -_FILE_SIZE_SIGNAL:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if done.returncode:
        message = " ".join(done.stderr.split())[:2000] or f"exit status {done.returncode}"
        raise _BuildError(f"{command[0]} failed: {message}")
