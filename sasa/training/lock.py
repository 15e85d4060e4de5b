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
from sasa.training.files import make_folder

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
        self._folder = Path()
        self._made: list[Path] = []  # folders, the deepest first
        self._holds = False  # by a lock, so that nobody else can be in it

    def acquire(self, folder: Path) -> None:
        """Make the folder where there is none, and wait for it for up to WAIT_SECONDS.

        Where locks are not supported, one line warns instead.

        Raises:
            ConfigError: another run has it, on which host, as which process and since when; or the folder or the lock's
                file cannot be made.
        """
        self._folder = folder
        self._make()
        if fcntl is None:
            return
        until, is_said = time.monotonic() + WAIT_SECONDS, False
        while not self._try():
            if time.monotonic() >= until:
                raise ConfigError(f"{folder}: another run is in it, {self._holder()}; --name names another")
            if not is_said and self._descriptor is not None:
                print(f"{folder}: another run is in it, {self._holder()}: waiting for its end, {WAIT_SECONDS:.0f} s at "
                      "most", file=sys.stderr)  # fmt: skip
                is_said = True
            time.sleep(POLL_SECONDS)
        holder = {"host": socket.gethostname(), "process": os.getpid(), "started": time.strftime("%Y-%m-%d %H:%M:%S")}
        with contextlib.suppress(OSError):  # a full disk: the lock holds, only its holder stays unnamed
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(holder).encode(), 0)

    def _make(self) -> None:
        """Make the folder where there is none; a refused run's removal may take it away again meanwhile."""
        self._made = [path for path in (self._folder, *self._folder.parents) if not os.path.lexists(path)] or self._made
        try:
            make_folder(self._folder)
        except ConfigError:
            if os.path.lexists(self._folder):
                raise
            make_folder(self._folder)  # it went between being made and being tried

    def _try(self) -> bool:
        """Whether the folder is this process's now, or has no locks."""
        path = self._folder / NAME
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
        try:
            if self._descriptor is None:
                self._descriptor = os.open(path, flags, 0o666)
        except FileNotFoundError:  # a run that was refused has just removed it
            self._make()
            return False
        except OSError as error:  # something else has its name, or the folder lets nothing be made
            raise _not_lockable(self._folder, error) from error
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                print(f"{self._folder}: no locks here ({error.strerror}): two runs in it would not notice each other",
                      file=sys.stderr)  # fmt: skip
                return True
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise _not_lockable(self._folder, error) from error
            return False
        with contextlib.suppress(OSError):
            self._holds = os.path.samestat(os.fstat(self._descriptor), os.stat(path))
        if self._holds:
            return True
        os.close(self._descriptor)  # of a run that was refused and has removed it meanwhile: there is another, or none
        self._descriptor = None
        self._make()
        return False

    def _holder(self) -> str:
        try:
            holder = json.loads(os.pread(self._descriptor, 1000, 0))
            host, process, started = (printable(holder[key]) for key in ("host", "process", "started"))
        except (OSError, ValueError, TypeError, KeyError):
            return "of an unknown process"
        return one_line(f"process {process} on {host}, started {started}", 200)

    def release(self) -> None:
        """Give the folder back; of a run that was refused before it wrote anything, nothing stays."""
        if self._descriptor is None:
            return
        if self._holds:  # else it is another's, and so is the lock's file
            with contextlib.suppress(OSError):
                if os.listdir(self._folder) == [NAME]:
                    (self._folder / NAME).unlink()
                    for made in self._made:
                        made.rmdir()
        os.close(self._descriptor)
        self._descriptor, self._holds, self._made = None, False, []
