"""What a tar shard holds: the place, size and label of each sample, read from its headers and its labels alone."""

import hashlib
import io
import itertools
import re
import tarfile
from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

from sasa.console import one_line, printable
from sasa.data.decode import EXTENSIONS
from sasa.data.errors import DataError

FORM = "members KEY.jpg and KEY.cls, one each, side by side, not compressed"
MAX_CLASSES = 1_000_000  # labels are below it: the largest sets of this kind have 21,841
_LABEL_BYTES = 20  # of a .cls: digits and a line break
_HEADER_BYTES = 2**20  # of a header with a member's long name
_PADDING_BYTES = 2**20  # of zeros after the last member: tar -b pads to a multiple of its blocking
_MEMBERS, _MEMBERS_NAMED = 64, 5  # of a sample


class Member(NamedTuple):
    """One sample of a shard: its image's name, first byte and bytes, and its label."""

    name: str
    start: int
    size: int
    label: int


def digest(found: list[Member]) -> str:
    """A hash of a shard's members, in hex: of their names, places, sizes and labels."""
    text = "".join(f"{len(m.name)} {m.name} {m.start} {m.size} {m.label}\n" for m in found)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def members(shard: str) -> Iterator[Member]:
    """The samples of a shard, in their order.

    Raises:
        DataError: the shard has another form, or a label is none.
    """
    shown = printable(shard)
    try:
        with _Headers(shard) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for key, group in groupby(_regular(tar), lambda m: re.sub(r"\.[^/]*$", "", m.name)):
                parts = list(itertools.islice(group, _MEMBERS + 1))
                suffixes = [member.name[len(key) + 1 :] for member in parts]
                labels = [suffix.lower() == "cls" for suffix in suffixes]
                images = [f".{suffix}".lower().endswith(EXTENSIONS) for suffix in suffixes]
                # Captions, boxes and the like are no part of an image and its label.
                if len(parts) > _MEMBERS or sum(labels) != 1 or sum(images) != 1:
                    listed = ", ".join(suffixes[:_MEMBERS_NAMED]) + (", ..." if len(parts) > _MEMBERS_NAMED else "")
                    raise DataError(f"{shown}: {printable(key)} has {printable(listed)}; shards have {FORM}")
                image, cls = parts[images.index(True)], parts[labels.index(True)]
                if image.issparse():
                    raise DataError(f"{shown}: {printable(image.name)} is stored with holes; shards have {FORM}")
                yield Member(image.name, image.offset_data, image.size, _label(tar, cls, shown))
            _check_end(file, tar.offset)
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        raise DataError(f"{shown}: {one_line(error)}; shards have {FORM}") from error


class _Headers(io.FileIO):
    """A shard of which headers and labels are read: tarfile takes a header into memory, however long it is."""

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _HEADER_BYTES:
            raise OSError(f"a header of {size:,} bytes")
        return super().read(size)


def _regular(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members that are files. A link is refused: its sample would be lost without a word.

    A header whose size is negative leads back, in older Pythons round and round.
    """
    place = -1
    for member in tar:
        if member.offset <= place or member.size < 0:
            raise tarfile.ReadError("a member of negative size")
        place = member.offset
        if member.islnk() or member.issym():
            raise tarfile.ReadError(
                f"{printable(member.name)} is a link to {printable(member.linkname)}, without a file of its own; make "
                "the shard anew by tar --hard-dereference --dereference"
            )
        if member.isreg():
            yield member


def _check_end(file: io.FileIO, end: int) -> None:
    """After the last member come zeros, and nothing else: at a damaged header, or at the end of a file that was cut,
    tarfile stops as it does at a whole shard's end mark."""
    size = file.seek(0, io.SEEK_END) - end
    if size < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("no end mark: cut short")
    file.seek(end)
    if size > _PADDING_BYTES or any(file.read(size)):
        raise tarfile.ReadError(f"at byte {end} neither a member nor the end: damaged, or archives joined to one file")


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo, shard: str) -> int:
    where = f"{shard}: {printable(member.name)}"
    text = tar.extractfile(member).read() if member.size <= _LABEL_BYTES else b"%d bytes" % member.size
    if re.fullmatch(rb"\s*\d+\s*", text) is None:
        raise DataError(
            f"{where} holds {printable(text.decode('latin-1').strip())!r}; a label is a number from 0, in digits"
        )
    if int(text) >= MAX_CLASSES:
        raise DataError(f"{where}: label {int(text)}; labels must be below {MAX_CLASSES:,}")
    return int(text)
