"""The C++ kernels for CPUs, compiled on first use and kept in the user's cache.

The library has a plain C interface and is loaded with ctypes, so it needs a C++ compiler but no headers of torch, and
one build serves every torch version. fp64 has a library of its own, built at the first call that needs it.

$CXX names the compiler, $SASA_CXXFLAGS adds flags for it. Cache: $SASA_CACHE_DIR, else $XDG_CACHE_HOME/sasa or
~/.cache/sasa, else a private folder for temporary files.
"""

import ctypes
import errno
import functools
import hashlib
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

SOURCES = [Path(__file__).parent / "csrc" / name for name in ("cpu.cpp", "stem.cpp")]
HEADER = Path(__file__).parent / "csrc" / "cpu.h"
BUILD_SECONDS = {torch.float32: 9, torch.float64: 3}  # measured with g++ 12; only for the message
_LEVEL = {torch.float32: "-O3", torch.float64: "-O1"}  # fp64 is for checking gradients: it need not be fast
# Passes of GCC that take a third of the time to build and gain nothing.
_LEAVE_OUT = ["-fno-tree-vectorize", "-fno-unswitch-loops", "-fno-split-loops", "-fno-ipa-cp-clone"]
BUILD_LIMIT = 300  # seconds until a compiler, or the process that holds the lock, is given up
_FILE_SIZE_SIGNAL = getattr(signal, "SIGXFSZ", 0) or -1  # ends a program that writes past the limit on file sizes
_DIGEST = hashlib.sha256().digest_size


class _BuildError(Exception):
    """Why there is no kernel, in one line."""


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL | str:
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
    source = b"".join(path.read_bytes() for path in (HEADER, *SOURCES))
    name = hashlib.sha256("\0".join(identity).encode() + source).hexdigest()[:24] + ".so"
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
        return ctypes.CDLL(str(path))
    except OSError:
        return None


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
            _compile([*command, *map(str, SOURCES), "-o", part])
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
