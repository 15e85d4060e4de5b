"""streams.py: an output that is closed, full or of another encoding costs no run and, where it can be, no line."""

import errno
import io
import os
import sys

import pytest

from sasa.training.streams import Surviving, surviving_streams


class Broken(io.StringIO):
    def __init__(self, code: int) -> None:
        super().__init__()
        self.code, self.calls = code, 0

    def write(self, text):
        self.calls += 1
        raise OSError(self.code, "broken")


@pytest.mark.parametrize("code", [errno.EPIPE, errno.EIO, errno.ENOSPC])
def test_a_broken_output_is_reported_once(code):
    beside, broken = io.StringIO(), Broken(code)
    stream = Surviving(broken, "standard output", beside)
    for _ in range(3):
        assert stream.write("a line\n") == 7
        stream.flush()
    assert beside.getvalue().count("\n") == 1 and "standard output is not written to any more" in beside.getvalue()
    assert broken.calls == (3 if code == errno.ENOSPC else 1)  # a disk may have room again


def test_closed_and_missing_streams(monkeypatch):
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed):
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", None)
        with surviving_streams():
            print("nobody reads this")
            print("nor this", file=sys.stderr, flush=True)
            assert not sys.stdout.isatty() and not sys.stderr.isatty()
        assert sys.stdout is stream


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_no_character_loses_its_line(monkeypatch, encoding):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, write_through=True))
    with surviving_streams():
        print("caf\u00e9 \u4e2d", os.fsdecode(b"\xff"), "end")
    line = raw.getvalue()
    assert line.endswith(b"\\udcff end\n") and line.startswith("caf\u00e9".encode(encoding, "backslashreplace"))
