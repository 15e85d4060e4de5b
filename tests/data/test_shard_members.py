"""shard_members.py: hostile headers of a tar end in one line, in little memory and time."""

import tarfile

import pytest

from sasa.data.errors import DataError
from sasa.data.shard_members import members

BLOCK = 512
GIB = 2**30


def header(name: str, size: int, kind: bytes) -> bytes:
    """A tar header as no writer makes it: sizes below 0 and beyond 8 GiB are in base 256."""
    member = tarfile.TarInfo(name)
    member.type = kind
    head = bytearray(member.tobuf(tarfile.GNU_FORMAT)[:BLOCK])
    head[124:136] = bytes([0o377 if size < 0 else 0o200]) + (size % 256**11).to_bytes(11, "big")
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head)


def sample(key: str) -> bytes:
    image, label = header(f"{key}.png", 3, b"0") + b"png", header(f"{key}.cls", 1, b"0") + b"1"
    return image.ljust(2 * BLOCK, b"\0") + label.ljust(2 * BLOCK, b"\0")


def test_a_sample(tmp_path):
    path = tmp_path / "train-0.tar"
    path.write_bytes(sample("a") + sample("b") + bytes(2 * BLOCK))
    assert list(members(str(path))) == [("a.png", BLOCK, 3, 1), ("b.png", 5 * BLOCK, 3, 1)]


@pytest.mark.parametrize("kind", [b"x", b"L", b"g"], ids=["pax", "long-name", "global"])
def test_a_header_of_gigabytes_is_refused_before_it_is_read(tmp_path, kind):
    path = tmp_path / "train-0.tar"
    with open(path, "wb") as file:
        file.write(header("a.png", 5 * GIB, kind))
        file.truncate(6 * GIB)  # a hole: the file takes no place
    with pytest.raises(DataError, match=r"train-0\.tar: a header of 5,368,709,120 bytes"):
        list(members(str(path)))


@pytest.mark.parametrize("kind", [b"x", b"L", b"0", b"Z", b"S"], ids=["pax", "long-name", "file", "unknown", "sparse"])
def test_a_negative_size_ends(tmp_path, kind):
    """Python 3.11 goes back by it and reads the same members again for ever."""
    path = tmp_path / "train-0.tar"
    path.write_bytes(sample("a") + header("b.png", -BLOCK, kind) + bytes(2 * BLOCK))
    found = members(str(path))
    with pytest.raises(DataError, match=r"negative size|a header of -512 bytes"):
        for _ in range(10):
            next(found)


def test_a_size_of_pax_that_is_negative_ends(tmp_path):
    record = b"14 size=-1024\n"
    path = tmp_path / "train-0.tar"
    head = header("pax", len(record), b"x") + record.ljust(BLOCK, b"\0")
    path.write_bytes(sample("a") + head + header("b.png", 0, b"0") + bytes(2 * BLOCK))
    with pytest.raises(DataError, match=r"negative size|header"):
        list(members(str(path)))


WHOLE = sample("a") + sample("b") + sample("c")
END = bytes(2 * BLOCK)


@pytest.mark.parametrize("blocks", [1, 2, 20, 2048])
def test_zeros_after_the_last_member_are_an_end(tmp_path, blocks):
    """One block at least, which GNU tar takes with a warning; up to the padding of tar -b 2048."""
    path = tmp_path / "train-0.tar"
    path.write_bytes(WHOLE + bytes(blocks * BLOCK))
    assert [member.name for member in members(str(path))] == ["a.png", "b.png", "c.png"]


def flipped(place: int) -> bytes:
    content = bytearray(WHOLE + END)
    content[place] ^= 0xFF
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (flipped(4 * BLOCK + 10), f"at byte {4 * BLOCK} neither a member nor the end"),
        (flipped(8 * BLOCK + 150), f"at byte {8 * BLOCK} neither a member nor the end"),
        (WHOLE, "no end mark: cut short"),
        (WHOLE[: 4 * BLOCK], "no end mark: cut short"),
        (WHOLE[: 4 * BLOCK + 100], "no end mark: cut short"),
        (WHOLE + END + WHOLE + END, f"at byte {12 * BLOCK} neither a member nor the end"),
        (WHOLE + bytes(2**20 + BLOCK), f"at byte {12 * BLOCK} neither a member nor the end"),
    ],
    ids=["name", "checksum", "cut-at-the-end", "cut-at-a-sample", "cut-in-a-header", "joined", "unwritten"],
)  # fmt: skip
def test_a_damaged_shard_is_not_read_in_part(tmp_path, content, words):
    """tarfile ends at each of these as at a whole shard's end mark."""
    path = tmp_path / "train-0.tar"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"train-0\.tar: {words}"):
        list(members(str(path)))


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE], ids=["hard", "symbolic"])
def test_a_sample_that_is_a_link_is_refused_by_name(tmp_path, kind):
    """As tar writes the second name of a file that deduplication has linked."""
    path = tmp_path / "train-0.tar"
    path.write_bytes(sample("a") + END)
    with tarfile.open(path, "a") as tar:
        for name in ("b.cls", "b.png"):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, f"a{name[1:]}"
            tar.addfile(link)
    with pytest.raises(DataError, match=r"train-0\.tar: b\.cls is a link to a\.cls.*--hard-dereference"):
        list(members(str(path)))
