"""What every command prints the same way: messages of one line, and a parser whose errors are such a line. No torch."""

import argparse
import contextlib
import os
import select
import sys
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

USAGE_ERROR, READER_GONE = 2, 141  # exit codes: wrong usage or data; the shell's for a broken pipe
_LINE_LIMIT = 2000  # characters of a message: a library's error can hold a whole compiler log


def printable(text: object) -> str:
    """`text` with each character that a terminal would act on, or could not show, as an escape: \\x1b, \\u2028, \\xff.

    Names of files and classes come from strangers. Control and format characters, line and paragraph separators and
    bytes that are not UTF-8 (surrogates, as `os.fsdecode` gives them) are escaped; all else is kept, spaces too.
    """
    return "".join(_escape(c) if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") else c for c in str(text))


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # surrogateescape's stand-in for one byte
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def show_apart(name: str, others: Iterable[str]) -> str:
    """`name` for a message, apart from the `others`: as an escape where composed and decomposed letters show alike."""
    looks = unicodedata.normalize("NFC", name)
    alike = any(other != name and unicodedata.normalize("NFC", other) == looks for other in others)
    return ascii(name) if alike else printable(name)


def one_line(message: object, limit: int = _LINE_LIMIT) -> str:
    """`message` as one printable line: its lines joined by a space, cut after `limit` characters.

    An exception without a text is named by its type. A file's name that may hold line breaks goes through `printable`
    before it goes into a message; spaces inside a line are kept, so that a name is shown exactly.
    """
    text = printable(" ".join(line.strip() for line in str(message).split("\n") if line.strip()))
    if not text and isinstance(message, BaseException):
        return type(message).__name__
    return text if len(text) <= limit else text[:limit] + "..."


def show_every_character() -> None:
    """From now on stdout and stderr escape what their encoding lacks (an e with an accent on an ASCII terminal)."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):  # None, closed, or not a stream of text
            stream.reconfigure(errors="backslashreplace")


def show(content: str | bytes) -> None:
    """Print a text, or write bytes, on stdout; a reader that has gone (`| head`) is no error, now or at the exit."""
    try:
        if isinstance(content, str):
            print(content, flush=True)
        else:
            sys.stdout.buffer.write(content)
            sys.stdout.flush()
    except BrokenPipeError:
        _close_stdout()


def raise_if_reader_is_gone(error: Exception) -> None:
    """For whoever turns an OSError into a message: `run_main` ends a command whose reader of stdout has gone."""
    if _reader_is_gone(error):
        raise error


def _reader_is_gone(error: Exception) -> bool:
    """Whether stdout is a pipe that nobody reads any more: the error may be of a pipe to a process of our own."""
    if not isinstance(error, BrokenPipeError):
        return False
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # no such call here, or no descriptor
        return True


def _close_stdout() -> None:
    """What is still in its buffer goes nowhere, or it would fail at the exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_main(main: Callable[[], int]) -> NoReturn:
    """End the process with the exit code of `main`; a reader of stdout that has gone (`| head`) ends it without a word.

    Then the exit code is the shell's for it, 141.
    """
    try:
        try:
            code = main()
        except SystemExit as end:
            code = end.code
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError as error:
        if not _reader_is_gone(error):
            raise
        code = READER_GONE
        _close_stdout()
    sys.exit(code)


def as_path(text: str) -> Path:
    """For `add_argument(type=...)`: a path, not empty as a shell variable that is not set is; a leading ~ is the home
    folder (a shell leaves it as it is after = and in quotes).
    """
    return Path(as_path_text(text))


def as_path_text(text: str) -> str:
    """`as_path` for a path, or a pattern of paths, that is kept as text."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return os.path.expanduser(text)


def print_error(prog: str, message: object) -> None:
    """`prog: error: message` on stderr, in one line."""
    print(f"{prog}: error: {one_line(message)}", file=sys.stderr, flush=True)


def fail(prog: str, message: object) -> NoReturn:
    """Wrong usage or data: one line on stderr, exit code 2."""
    print_error(prog, message)
    sys.exit(USAGE_ERROR)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and exit code 2; flags are not abbreviated.

    `prog` is the command as it is typed: "train.py", "python -m tools.audit".
    """

    def __init__(self, prog: str, **options) -> None:
        super().__init__(prog=prog, allow_abbrev=False, **options)

    def parse_known_args(self, *arguments):
        show_every_character()  # every command parses before it prints
        return super().parse_known_args(*arguments)

    def error(self, message: str) -> NoReturn:
        fail(self.prog.removeprefix("python -m "), message.removeprefix("argument "))
