"""The C++ kernels for CPUs, compiled on first use and kept in the user's cache.

The library has a plain C interface and is loaded with ctypes, so it needs a C++ compiler but no headers of torch, and
one build serves every torch version. fp64 has a library of its own, built at the first call that needs it.

$CXX names the compiler, $SASA_CXXFLAGS adds flags for it. Cache: $SASA_CACHE_DIR, else $XDG_CACHE_HOME/sasa or
~/.cache/sasa; where that cannot be used, $TMPDIR/sasa-UID. Only a folder that no other user can change is used
(`private_folder`); the message about the build says why another one was not.
"""

import contextlib
import ctypes
import errno
import functools
import hashlib
import itertools
import os
import platform
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from sasa.console import one_line
from sasa.files import replacing
from sasa.kernels import private_folder
from sasa.kernels.stop_signals import StopSignals

_CSRC = Path(__file__).parent / "csrc"
SOURCES = [_CSRC / name for name in ("cpu.cpp", "stem.cpp")]
HEADERS = [
    _CSRC / f"{name}.h"
    for name in ("frame", "maps", "packing", "pairs", "planes", "products", "projection", "simd", "threads", "tiles")
]
BUILD_SECONDS = {torch.float32: "9 to 20", torch.float64: "3 to 9"}  # measured with g++ 12; only for the message
_LEVEL = {torch.float32: "-O3", torch.float64: "-O1"}  # fp64 is for checking gradients: it need not be fast
# Passes of GCC that take a third of the time to build and gain nothing.
_LEAVE_OUT = ["-fno-tree-vectorize", "-fno-unswitch-loops", "-fno-split-loops", "-fno-ipa-cp-clone"]
BUILD_LIMIT = 300  # seconds until a compiler, or the process that holds the lock, is given up
_FILE_SIZE_SIGNAL = getattr(signal, "SIGXFSZ", 0) or -1  # ends a program that writes past the limit on file sizes
_DIGEST = hashlib.sha256().digest_size
_loads = itertools.count(1)


class _BuildError(Exception):
    """Why there is no kernel, in one line."""


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL | str:
    """The library for fp32 or fp64, or the reason why there is none; printed once on stderr, with how to get it.

    Raises:
        BuildStopped: a signal ended the build, and the process's own handler for it returned.
    """
    try:
        with StopSignals() as signals:
            return _load_or_build(dtype, signals)
    except _BuildError as error:
        reason = one_line(error)
        print(f"sasa: no fast attention on the CPU, a slower backend serves: {reason}", file=sys.stderr, flush=True)
        return reason


def _load_or_build(dtype: torch.dtype, signals: StopSignals) -> ctypes.CDLL:
    try:
        source = b"".join(path.read_bytes() for path in (*HEADERS, *SOURCES))
    except OSError as error:  # inside a zip or pex, or a package without its data files
        raise _BuildError(f"its sources cannot be read: {error}") from None
    if not private_folder.SUPPORTED:
        raise _BuildError("it is built on systems with POSIX file permissions only")
    compiler = _compiler()
    version = _version(compiler)
    real = "double" if dtype == torch.float64 else "float"
    flags = ["-std=c++17", _LEVEL[dtype], "-fPIC", "-shared", "-pthread", *_native_flags(), f"-DSASA_REAL={real}"]
    flags += _LEAVE_OUT if "Free Software Foundation" in version else []  # clang refuses what it does not know
    flags += shlex.split(os.environ.get("SASA_CXXFLAGS", ""))
    identity = [version, *compiler, *flags, _cpu()]
    name = hashlib.sha256("\0".join(identity).encode() + source).hexdigest()[:24] + ".so"
    paths = _cache_folders()
    for path in paths:
        with contextlib.suppress(OSError), private_folder.opened(path) as folder:
            return _load(folder, name)
    problems = []
    for path in paths:
        try:
            with private_folder.opened(path, create=True) as folder:
                return _build(folder, name, compiler + flags, BUILD_SECONDS[dtype], signals, problems)
        except OSError as error:
            problems.append(f"{path}: {error.strerror or error}")
    raise _BuildError(f"no folder to build it in ({'; '.join(problems)}); set SASA_CACHE_DIR to a folder of yours")


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


def _cache_folders() -> list[str]:
    """Where the library may lie, most wanted first."""
    first = os.environ.get("SASA_CACHE_DIR") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "sasa")
    folders = [os.path.expanduser(first)]  # without HOME and an entry for the user it stays relative: not used
    with contextlib.suppress(OSError):
        folders.append(os.path.join(tempfile.gettempdir(), f"sasa-{os.geteuid()}"))
    return folders


def _load(folder: private_folder.Folder, name: str) -> ctypes.CDLL:
    """The library `name`, loaded from the descriptor on which it was checked.

    Raises:
        OSError: it is absent, others can change it, it is not whole, or the system does not load it.
    """
    descriptor = private_folder.open_file(folder, name)
    with open(descriptor, "rb") as file:
        content = file.read()
        # The digest at its end is checked first: loading half a library can kill the process.
        if hashlib.sha256(content[:-_DIGEST]).digest() != content[-_DIGEST:]:
            raise OSError(errno.EINVAL, f"{name} is not whole")
        path = str(folder.path / name)
        if folder.place != folder.path:
            # Spelled differently each time: a path that was loaded before would give that library again, and numbers
            # of descriptors come back.
            path = f"/proc/self/{'./' * next(_loads)}fd/{descriptor}"
        library = ctypes.CDLL(path)
    library._name = str(folder.path / name)  # for people: the descriptor is closed
    return library


def _build(
    folder: private_folder.Folder,
    name: str,
    command: list[str],
    seconds: str,
    signals: StopSignals,
    problems: list[str],
) -> ctypes.CDLL:
    """Builds the library in `folder`, once however many processes ask. `problems`: why not in a more wanted folder.

    Raises:
        OSError: the folder cannot be written, its disk is full, or what was built there does not load.
        _BuildError: the compiler failed.
        BuildStopped: a signal came.
    """
    with open(private_folder.open_lock(folder, name.removesuffix(".so") + ".lock"), "w") as lock:
        _wait_for(lock, signals)
        with contextlib.suppress(OSError):
            return _load(folder, name)  # another process has built it meanwhile
        part = f"{secrets.token_hex(8)}.part"
        instead = f" in {folder.path} ({'; '.join(problems)})" if problems else ""
        message = one_line(f"sasa: building the CPU kernel once ({seconds} s){instead} ...")
        print(message, file=sys.stderr, flush=True)
        try:
            # By its path: a compiler's own processes do not share descriptors, and others cannot change the path.
            _compile([*command, *map(str, SOURCES), "-o", str(folder.path / part)], signals)
            content = (folder.place / part).read_bytes()
        finally:
            (folder.place / part).unlink(missing_ok=True)
        with replacing(folder.place / name) as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(content + hashlib.sha256(content).digest())
    try:
        return _load(folder, name)
    except OSError as error:
        raise OSError(errno.ENOEXEC, f"the library built by {command[0]} does not load: {error}") from None


def _wait_for(lock, signals: StopSignals) -> None:
    """Takes the lock; gives up waiting after BUILD_LIMIT, or where files cannot be locked: two builds do no harm."""
    try:
        import fcntl
    except ImportError:
        return
    until = time.monotonic() + BUILD_LIMIT
    while time.monotonic() < until:
        signals.check()
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(0.1)
        except OSError:
            return


def _compile(command: list[str], signals: StopSignals) -> None:
    try:
        status, errors = _run(command, signals)
    except (OSError, subprocess.SubprocessError) as error:
        raise _BuildError(f"{command[0]} did not finish: {error}") from None
    if "No space left" in errors or "File size limit" in errors or status == -_FILE_SIZE_SIGNAL:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if status:
        raise _BuildError(f"{command[0]} failed: {' '.join(errors.split()) or f'exit status {status}'}")


def _run(command: list[str], signals: StopSignals) -> tuple[int, str]:
    """Exit status and stderr of the compiler; it has a process group of its own, which a signal to us ends whole."""
    until = time.monotonic() + BUILD_LIMIT
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    with process:
        try:
            while True:
                signals.check()
                try:
                    errors = process.communicate(timeout=0.1)[1]
                    return process.returncode, errors
                except subprocess.TimeoutExpired:
                    if time.monotonic() > until:
                        raise subprocess.TimeoutExpired(command[0], BUILD_LIMIT) from None
        except BaseException:
            _end_group(process)
            raise


def _end_group(process: subprocess.Popen) -> None:
    """Ends the process and those it started: SIGTERM lets a compiler remove its temporary files, SIGKILL is sure."""
    for number, patience in ((signal.SIGTERM, 2), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS has the second for a group that ended
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
