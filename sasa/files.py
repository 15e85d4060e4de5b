"""Files that are replaced whole or not at all, and never through a link that someone else has put there. No torch."""

import contextlib
import errno
import json
import math
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

# A file system without fsync of folders (some network and FUSE mounts) has done what it can.
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.EACCES, errno.EISDIR)


@contextlib.contextmanager
def replacing(path: Path, text: bool = False) -> Iterator[IO]:
    """A new file to write, which takes the place of `path` when the block ends; after an error `path` is as it was.

    The bytes are on the disk before the name is moved, so that the name always means a whole file. The temporary file
    lies in the same folder under a random name and is created exclusively: no link is followed, no file overwritten.
    Where `path` itself is a symbolic link, the link is replaced, not what it points at.

    Args:
        text: the file takes str, written as UTF-8; else bytes.

    Raises:
        OSError: the folder or the disk refuses.
    """
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
    descriptor = os.open(temporary, flags, 0o666)
    try:
        with os.fdopen(descriptor, "w" if text else "wb", encoding="utf-8" if text else None) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def write_text(path: Path, content: str) -> None:
    """`replacing` with this content."""
    with replacing(path, text=True) as file:
        file.write(content)


def read_regular(path: Path, limit: int = 2**31 - 1) -> bytes:
    """The content of a regular file, through links; a pipe or a device, which might never answer, is refused.

    Args:
        limit: bytes that such a file may have.

    Raises:
        OSError: the file cannot be read, is longer, or something else than a file has that name.
    """
    with os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"more than {limit:,} bytes", str(path))
    return content


def open_regular(path: Path, flags: int) -> int:
    """A descriptor of the regular file at `path`: no link is followed, no pipe or device is opened, nothing is cut.

    Args:
        flags: os.O_RDONLY, or os.O_RDWR or os.O_WRONLY with os.O_CREAT and os.O_APPEND as wanted.

    Raises:
        OSError: the file cannot be opened, or something else than a file has that name.
    """
    guards = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(path, flags | guards, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return descriptor


def json_text(value: Any, indent: int | None = None) -> str:
    """`value` as JSON, ASCII only; a number that is not finite is null, as JSON knows neither NaN nor Infinity."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def sync_folder(folder: Path) -> None:
    """A rename is on the disk only when its folder is; where folders cannot be synced, nothing more can be done."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)
