"""The names of the classes beside shards: classes.txt, a name a line, or classes.json for names that no line can hold.

Names are kept exactly. Bytes that are not UTF-8 stay (as surrogates, like Python's names of files); only a line feed
ends a line, not U+2028 or a form feed; a carriage return before it belongs to the line's end.
"""

import json
import os
from pathlib import Path

from sasa.console import one_line, printable
from sasa.data.errors import DataError
from sasa.files import read_regular

TEXT, JSON = "classes.txt", "classes.json"
_LARGEST = 2**26  # bytes


def read_classes(folder: Path) -> tuple[list[str] | None, Path]:
    """The names and the file that has them; None where there is no such file.

    Raises:
        DataError: a file that cannot be used, or two that differ.
    """
    found = [(_read(folder / name), folder / name) for name in (JSON, TEXT) if os.path.lexists(folder / name)]
    if len(found) == 2 and found[0][0] != found[1][0]:
        raise DataError(f"{printable(folder)}: {JSON} and {TEXT} differ: remove the one that is wrong")
    return found[0] if found else (None, folder / TEXT)


def _read(path: Path) -> list[str]:
    shown = printable(path)
    try:
        content = read_regular(path, _LARGEST)
        names = json.loads(content) if path.name == JSON else _lines(content)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("must be a list of names")
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{shown}: {one_line(error)}") from error
    if any("\0" in name for name in names):  # which an array of names would lose at a name's end
        raise DataError(f"{shown}: a name holds a zero byte")
    if "" in names:
        raise DataError(
            f"{shown}: line {names.index('') + 1} is empty; it must hold the name of class {names.index('')}"
        )
    return names


def _lines(content: bytes) -> list[str]:
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    lines = [line.removesuffix(b"\r") for line in lines]
    while lines and not lines[-1]:  # the last line's end, and blank lines after it
        lines.pop()
    return [line.decode("utf-8", "surrogateescape") for line in lines]


def classes_file(names: list[str]) -> tuple[str, bytes]:
    """The file that holds these names: its name and content."""
    if any("\n" in name or name.endswith("\r") for name in names) or (names[:1] and names[0].startswith("\ufeff")):
        return JSON, json.dumps(names).encode()
    return TEXT, "".join(f"{name}\n" for name in names).encode("utf-8", "surrogateescape")
