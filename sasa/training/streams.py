"""Standard output and error that cannot end a run: closed, full, a pipe whose reader has gone, or an ASCII terminal."""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import TextIO


class Surviving(io.TextIOBase):
    """A text stream that writes to `stream` and drops what it refuses, with one line on `beside` the first time.

    Characters that the stream's encoding lacks are written as escapes, so that no line is lost.
    """

    def __init__(self, stream: TextIO | None, name: str, beside: TextIO | None = None) -> None:
        self._stream, self._name, self._beside, self._reported = stream, name, beside, False

    @property
    def encoding(self) -> str:
        return getattr(self._stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        try:
            if self._stream is not None:
                self._stream.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            self._fail(error)
        return len(text)

    def flush(self) -> None:
        try:
            if self._stream is not None:
                self._stream.flush()
        except (OSError, ValueError) as error:
            self._fail(error)

    def isatty(self) -> bool:
        with contextlib.suppress(OSError, ValueError):
            return self._stream is not None and self._stream.isatty()
        return False

    def fileno(self) -> int:
        if self._stream is None:
            raise io.UnsupportedOperation("fileno")
        return self._stream.fileno()

    def writable(self) -> bool:
        return True

    def _fail(self, error: Exception) -> None:
        """Report once; nothing more is written to a stream that will not come back."""
        if not isinstance(error, OSError) or error.errno in (errno.EPIPE, errno.EBADF, errno.EIO):
            self.discard()
        if not self._reported and self._beside is not None:
            self._reported = True
            self._beside.write(f"{self._name} is not written to any more: {error}; the run goes on\n")
            self._beside.flush()

    def discard(self) -> None:
        """Write nothing from here on; what is in the stream's buffer goes nowhere, or it would fail at the exit."""
        stream, self._stream = self._stream, None
        with contextlib.suppress(OSError, ValueError, AttributeError):
            descriptor = os.open(os.devnull, os.O_WRONLY)
            os.dup2(descriptor, stream.fileno())
            os.close(descriptor)


@contextlib.contextmanager
def surviving_streams() -> Iterator[None]:
    """`sys.stdout` and `sys.stderr` are such streams in this block."""
    before = sys.stdout, sys.stderr
    error = Surviving(sys.stderr, "standard error")
    output = Surviving(sys.stdout, "standard output", beside=error)
    sys.stdout, sys.stderr = output, error
    try:
        yield
    finally:
        for stream in (output, error):
            stream.flush()
            if stream._reported:
                stream.discard()
        sys.stdout, sys.stderr = before
