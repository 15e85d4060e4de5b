"""One run in a folder: a lock that lives as long as the process."""

import contextlib
import errno
import json
import os
import socket
import sys
import time
from pathlib import Path

from config import ConfigError
from sasa.console import one_line, printable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAME = ".run.lock"
WAIT_SECONDS = 30.0  # a restarted run meets its dying predecessor
POLL_SECONDS = 0.25
_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


def _not_lockable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{printable(folder / NAME)}: cannot be locked ({error.strerror}); --name names another folder")


class FolderLock:
    """A POSIX record lock on a run's folder: forked workers do not inherit it, and the kernel frees it on any death."""

    def __init__(self) -> None:
        self._descriptor: int | None = None

    def acquire(self, folder: Path) -> None:
        """Wait for the folder for up to WAIT_SECONDS. Where locks are not supported, one line warns instead.

        Raises:
            ConfigError: another run has it, on which host, as which process and since when; or the lock's file cannot
                be made.
        """
        if fcntl is None:
            return
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
        try:
            self._descriptor = os.open(folder / NAME, flags, 0o666)
        except OSError as error:  # something else has its name, or the folder lets nothing be made
            raise _not_lockable(folder, error) from error
        until = time.monotonic() + WAIT_SECONDS
        while True:
            try:
                fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno in _UNSUPPORTED:
                    print(f"train.py: {folder}: no locks here ({error.strerror}): two runs in it would not notice each "
                          "other", file=sys.stderr)  # fmt: skip
                    return
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise _not_lockable(folder, error) from error
                if time.monotonic() >= until:
                    raise ConfigError(
                        f"{folder}: another run is in it, {self._holder()}; --name names another"
                    ) from None
                time.sleep(POLL_SECONDS)
        holder = {"host": socket.gethostname(), "process": os.getpid(), "started": time.strftime("%Y-%m-%d %H:%M:%S")}
        with contextlib.suppress(OSError):  # a full disk: the lock holds, only its holder stays unnamed
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(holder).encode(), 0)

    def _holder(self) -> str:
        try:
            holder = json.loads(os.pread(self._descriptor, 1000, 0))
            host, process, started = (printable(holder[key]) for key in ("host", "process", "started"))
        except (OSError, ValueError, TypeError, KeyError):
            return "of an unknown process"
        return one_line(f"process {process} on {host}, started {started}", 200)

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
