"""Folders whose files nobody but this user (and root) can change or exchange: what lies there can be run as code.

A folder is opened from / downwards, each component relative to the one before and checked on its descriptor, so that
nothing can be exchanged between the check and the use. No torch.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SUPPORTED = os.open in os.supports_dir_fd and hasattr(os, "geteuid")  # not on Windows
_LINKS = 40  # symbolic links on one path: more is a loop
_PASS = getattr(os, "O_PATH", os.O_RDONLY)  # a folder on the way need not be readable
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class Folder(NamedTuple):
    """path: for messages and other programs; place: the same folder by its open descriptor, where the system can."""

    path: Path
    place: Path


@contextlib.contextmanager
def opened(path: str, create: bool = False) -> Iterator[Folder]:
    """Opens the folder at `path` for the length of the block; what `create` makes on the way there has mode 0700.

    Every component must belong to root or this user, and nobody else may write to it; a sticky folder such as /tmp may
    be on the way. A symbolic link of root's or this user's may be on the way too, but not at the end.

    Raises:
        OSError: it is absent, is not such a folder, or programs may not be run from it; the reason is its strerror.
    """
    if not os.path.isabs(path):
        raise OSError(errno.EINVAL, "is not an absolute path")
    names = _names(path)
    descriptor = os.open("/", _PASS | os.O_DIRECTORY | os.O_CLOEXEC)
    links = 0
    try:
        _check(os.fstat(descriptor), "/", on_the_way=bool(names))
        while names:
            name = names.pop()
            target = _link(name, descriptor)
            if target is None:
                below = _enter(name, descriptor, bool(names), create)
                os.close(descriptor)
                descriptor = below
                _check(os.fstat(descriptor), name, on_the_way=bool(names))
                continue
            links += 1
            if not names or links > _LINKS:
                raise OSError(errno.ELOOP, f"{name} is a symbolic link" if not names else "too many symbolic links")
            names += _names(target)
            if os.path.isabs(target):
                root = os.open("/", _PASS | os.O_DIRECTORY | os.O_CLOEXEC)
                os.close(descriptor)
                descriptor = root
        if os.fstatvfs(descriptor).f_flag & getattr(os, "ST_NOEXEC", 0):
            raise OSError(errno.EACCES, "is on a file system mounted noexec")
        place = Path(f"/proc/self/fd/{descriptor}")
        yield Folder(Path(path), place if place.is_dir() else Path(path))
    finally:
        os.close(descriptor)


def open_file(folder: Folder, name: str) -> int:
    """A descriptor of a regular file in the folder, to read.

    Raises:
        OSError: it is absent, a link or not a regular file, or others can write to it.
    """
    descriptor = os.open(folder.place / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, f"{name} is not a regular file")
        _check(status, name, on_the_way=False)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def open_lock(folder: Folder, name: str) -> int:
    """A descriptor of a file to lock, made where it is absent.

    Raises:
        OSError: it is a link, or the folder cannot be written.
    """
    return os.open(folder.place / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _names(path: str) -> list[str]:
    """The components of `path`, last first."""
    return [name for name in reversed(path.split("/")) if name not in ("", ".")]


def _link(name: str, parent: int) -> str | None:
    """Where the symbolic link `name` leads, or None where it is none. The parent is checked already."""
    try:
        status = os.lstat(name, dir_fd=parent)
    except FileNotFoundError:
        return None
    if not stat.S_ISLNK(status.st_mode):
        return None
    if status.st_uid not in (0, os.geteuid()):  # in a sticky folder anybody can make one
        raise PermissionError(errno.EPERM, f"{name} is another user's symbolic link")
    return os.readlink(name, dir_fd=parent)


def _enter(name: str, parent: int, on_the_way: bool, create: bool) -> int:
    flags = (_PASS if on_the_way else os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(name, flags, dir_fd=parent)
    except FileNotFoundError:
        if not create:
            raise
    with contextlib.suppress(FileExistsError):  # another process of ours was faster
        os.mkdir(name, 0o700, dir_fd=parent)
    return os.open(name, flags, dir_fd=parent)


def _check(status: os.stat_result, name: str, on_the_way: bool) -> None:
    if status.st_uid not in (0, os.geteuid()):
        raise PermissionError(errno.EPERM, f"{name} belongs to another user")
    sticky = on_the_way and status.st_mode & stat.S_ISVTX  # there, others cannot rename or remove what is ours
    if status.st_mode & _OTHERS_WRITE and not sticky:
        raise PermissionError(errno.EPERM, f"others can write to {name}")
