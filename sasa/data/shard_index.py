"""Where each sample of tar shards lies, and its label: an index written once, so that any image is one read.

An index is an npz file beside the shards, or in a folder of indexes for shards that cannot be written to. It holds each
shard's size, time and a digest of its members' names, places and labels: a shard of the same size and time is trusted;
one of another time is read through again, and refused where its digest is another.
"""

import hashlib
import itertools
import os
import re
import stat
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sasa.console import one_line, printable
from sasa.data.class_files import read_classes
from sasa.data.errors import DataError
from sasa.data.shard_members import FORM, Member, digest, members
from sasa.files import open_regular, replacing

MAX_SHARDS = 100_000  # that a pattern names
_INDEX_BYTES = 2**33  # of an index, far beyond any set
_ZIP = b"PK\3\4"  # how an npz file begins
ANEW = "write it anew: python preprocess.py index"


class Index(NamedTuple):
    """The samples of some shards."""

    classes: list[str]
    is_numbered: bool  # the classes are the labels' numbers: no list of names was given
    samples: np.ndarray  # (n, 3) int64: shard, first byte and bytes of each image
    labels: np.ndarray  # (n,) int64


# ---- names of shards and of indexes ---------------------------------------------------------------------------------


def expand(pattern: str) -> list[str]:
    """The shards that a pattern such as train-{000000..000999}.tar names; {a,b} names two.

    Raises:
        DataError: a pattern that is none, of several folders or of more than MAX_SHARDS; a shard that is no regular
            file.
    """
    shown = f"--data-dir {printable(pattern)}"
    if re.search(r"[{}]", os.path.dirname(pattern)):  # one index describes them, which lies beside them
        raise DataError(f"{shown}: braces stand for shards of one folder, not in the folder's own name")
    parts = [_choices(part, shown) for part in re.split(r"(\{[^{}]*\})", pattern)]
    count = 1
    for part in parts:
        count *= len(part)
        if count > MAX_SHARDS:
            raise DataError(f"{shown}: names more than {MAX_SHARDS:,} shards")
    shards = ["".join(choice) for choice in itertools.product(*parts)]
    for shard in shards:
        if not os.path.isfile(shard):
            raise DataError(
                f"{shown}: no file {printable(shard)}; it must be like 'shards/train-{{000000..000999}}.tar'"
            )
    return shards


def _choices(part: str, shown: str) -> list[str]:
    """What one part of a pattern stands for."""
    if not part.startswith("{"):
        if "{" in part or "}" in part:
            raise DataError(f"{shown}: braces must be in pairs and not nested, like {{000000..000999}} or {{a,b}}")
        return [part]
    numbers = re.fullmatch(r"\{(\d{1,18})\.\.(\d{1,18})\}", part)
    if numbers is None:
        return part[1:-1].split(",")
    first, last = numbers.groups()
    low, high = int(first), int(last)
    if high < low:
        raise DataError(f"{shown}: {part} counts down")
    if high - low >= MAX_SHARDS:
        raise DataError(f"{shown}: names more than {MAX_SHARDS:,} shards")
    width = max(len(first), len(last)) if any(len(end) > 1 and end.startswith("0") for end in (first, last)) else 0
    return [f"{number:0{width}d}" for number in range(low, high + 1)]


def index_name(shard: str) -> str:
    """train-000017.tar -> train-index.npz"""
    return re.sub(r"[-_.]?\d*\.tar$", "", Path(shard).name) + "-index.npz"


def index_paths(shard: str, index_dir: Path | None) -> list[Path]:
    """Where the index of these shards may lie, in the order in which it is written: beside them, in the user's cache.

    index_dir: there and nowhere else.
    """
    name = index_name(shard)
    if index_dir is not None:
        return [index_dir / name]
    beside = Path(shard).with_name(name)
    cache = _user_cache()
    if cache is None:
        return [beside]
    place = hashlib.sha256(os.fsencode(os.path.realpath(beside.parent))).hexdigest()[:16]
    return [beside, cache / "sasa" / "shards" / place / name]


def _user_cache() -> Path | None:
    """None where the user has no home."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(named):
        return Path(named)
    home = os.path.expanduser("~")
    return Path(home, ".cache") if os.path.isabs(home) else None


# ---- reading --------------------------------------------------------------------------------------------------------


def read_index(shards: list[str], index_dir: Path | None = None, is_whole: bool = False) -> Index:
    """The index of these shards, checked against them.

    Args:
        is_whole: they must be all that it describes, not a part of them.

    Raises:
        DataError: there is none, it is damaged, or the shards are not those that it describes.
    """
    places = [path for path in index_paths(shards[0], index_dir) if os.path.exists(path)]
    if not places:
        path = index_paths(shards[0], index_dir)[0]
        raise DataError(f"{printable(path)}: no such file; write it with: python preprocess.py index PATTERN")
    path = max(places, key=lambda place: place.stat().st_mtime_ns)  # shards that became read-only have a newer one
    stored, shown = _load(path), printable(path)
    known = {name: i for i, name in enumerate(stored["shards"].tolist())}
    number = np.full(len(known), -1)  # of each stored shard its place in `shards`; -1: not in it
    for i, shard in enumerate(shards):
        place = known.get(Path(shard).name)
        if place is None:
            raise DataError(f"{printable(shard)}: not a shard that {shown} describes; {ANEW}")
        found = os.stat(shard)
        same_time = found.st_mtime_ns == stored["mtime_ns"][place]
        if found.st_size != stored["bytes"][place] or (
            not same_time and digest(list(members(shard))) != stored["digests"][place]
        ):
            raise DataError(f"{printable(shard)}: not the file that {shown} describes; {ANEW}")
        number[place] = i
    if is_whole and (number < 0).any():
        missing = Path(shards[0]).parent / stored["shards"][number.argmin()].item()
        raise DataError(f"{printable(missing)}: not among the shards that are read, but {shown} describes it; bring it "
                        f"back, or {ANEW}")  # fmt: skip
    samples = np.column_stack((number[stored["samples"][:, 0]], stored["samples"][:, 1:]))
    chosen = samples[:, 0] >= 0
    classes = stored["classes"].tolist()
    return Index(classes, bool(stored["is_numbered"]), samples[chosen], stored["labels"][chosen])


def _load(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an index, of the right kinds and within their ranges. Raises DataError."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("not a regular file")
        with zipfile.ZipFile(path) as archive:  # numpy would unpack whatever a small file claims to hold
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError("compressed members, which an index never has")
            if sum(member.file_size for member in archive.infolist()) > min(_INDEX_BYTES, os.stat(path).st_size):
                raise ValueError("members larger than the file")
        with np.load(path, allow_pickle=False) as file:
            if "digests" not in file:
                raise ValueError("of an older form")
            stored = {name: file[name] for name in file.files}
        shards, samples, labels = stored["shards"], stored["samples"], stored["labels"]
        lists = ("shards", "bytes", "mtime_ns", "digests", "labels", "classes")
        if any(stored[key].ndim != 1 for key in lists) or stored["is_numbered"].shape or samples.ndim != 2:
            raise ValueError("lists of another form")
        if any(stored[key].dtype.kind != "U" for key in ("shards", "digests", "classes")):
            raise ValueError("names that are no text")
        if "" in stored["classes"].tolist():  # which also shows letters that are none
            raise ValueError("a class without a name")
        if any(stored[key].dtype != np.int64 for key in ("bytes", "mtime_ns", "samples", "labels")):
            raise ValueError("numbers that are no integers")
        count = len(shards)
        if any(len(stored[key]) != count for key in ("bytes", "mtime_ns", "digests")) or len(set(shards)) != count:
            raise ValueError("its lists of shards do not fit together")
        if samples.shape != (len(labels), 3) or not len(labels):
            raise ValueError(f"{samples.shape} places for {len(labels)} labels")
        if labels.min() < 0 or labels.max() >= len(stored["classes"]):
            raise ValueError(f"a label is {labels.min() if labels.min() < 0 else labels.max()}")
        shard, start, size = samples.T
        if shard.min() < 0 or shard.max() >= count or start.min() < 0 or size.min() < 0:
            raise ValueError("a sample lies outside its shards")
        if (size > stored["bytes"][shard] - start).any():
            raise ValueError("a sample ends beyond its shard")
    except Exception as error:  # damaged in whatever way
        raise DataError(f"{printable(path)}: damaged ({one_line(error)}); {ANEW}") from error
    return stored


# ---- writing --------------------------------------------------------------------------------------------------------


def write_indexes(splits: list[list[str]], index_dir: Path | None = None) -> list[str]:
    """Writes the index of each list of shards; classes are of the file of class names beside them, or the labels'.

    Several splits are numbered together: where one of them lacks the last class, all have the classes of the largest.

    Returns:
        What was found, a line a split.

    Raises:
        DataError: a shard of another form, or labels beyond the classes.
    """
    taken: set[Path] = set()
    for shards in splits:
        names = [Path(shard).name for shard in shards]
        if len(set(names)) != len(names):
            raise DataError(f"{printable(shards[0])}: two shards of one split have the same name")
        paths = index_paths(shards[0], index_dir)
        if paths[0] in taken:
            raise DataError(
                f"{printable(paths[0])}: would be the index of two patterns; name the shards of a split in one pattern"
            )
        taken.add(paths[0])
        for path in paths:
            _refuse_foreign(path)
    found = [[list(members(shard)) for shard in shards] for shards in splits]
    for shards, by_shard in zip(splits, found, strict=True):
        if not any(by_shard):
            raise DataError(f"{printable(shards[0])}: no images in it; shards have {FORM}")
    most = max(member.label for by_shard in found for in_shard in by_shard for member in in_shard)
    names, source = read_classes(Path(splits[0][0]).parent)
    if names is not None and most >= len(names):
        raise DataError(f"{printable(source)}: {len(names)} classes, but a label is {most}")
    classes = list(map(str, range(most + 1))) if names is None else names
    return [_write(shards, by_shard, classes, names is None, index_dir) for shards, by_shard in
            zip(splits, found, strict=True)]  # fmt: skip


def _refuse_foreign(path: Path) -> None:
    """An index takes the place of an older one, be it damaged, and of nothing else. Raises DataError."""
    if os.path.lexists(path) and not _looks_like_an_index(path):
        raise DataError(f"{printable(path)}: is there already and is no index of shards; remove or rename it")


def _looks_like_an_index(path: Path) -> bool:
    start = b""
    try:
        with os.fdopen(open_regular(path, os.O_RDONLY), "rb") as file:
            start = file.read(len(_ZIP))
            with zipfile.ZipFile(file) as archive:
                return {"shards.npy", "samples.npy", "labels.npy"} <= set(archive.namelist())
    except zipfile.BadZipFile:
        return start in (b"", _ZIP)  # cut short, or damaged
    except OSError:  # a link, a folder, a pipe
        return False


def write_index(shards: list[str]) -> str:
    """`write_indexes` of one split."""
    return write_indexes([shards])[0]


def _write(
    shards: list[str], by_shard: list[list[Member]], classes: list[str], is_numbered: bool, index_dir: Path | None
) -> str:
    samples = [(i, m.start, m.size) for i, in_shard in enumerate(by_shard) for m in in_shard]
    stats = [os.stat(shard) for shard in shards]
    arrays = {
        "shards": np.array([Path(shard).name for shard in shards]),
        "bytes": np.array([found.st_size for found in stats], np.int64),
        "mtime_ns": np.array([found.st_mtime_ns for found in stats], np.int64),
        "digests": np.array([digest(in_shard) for in_shard in by_shard]),
        "samples": np.array(samples, np.int64),
        "labels": np.array([m.label for in_shard in by_shard for m in in_shard], np.int64),
        "classes": np.array(classes),
        "is_numbered": np.array(is_numbered),
    }
    problems = []
    for path in index_paths(shards[0], index_dir):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                np.savez(file, **arrays)
        except OSError as error:  # a read-only folder: the next place
            problems.append(f"{printable(path.parent)}: {error.strerror}")
            continue
        return f"{printable(path)}: {len(samples)} images of {len(classes)} classes in {len(shards)} shards"
    raise DataError(f"the index cannot be written ({'; '.join(problems)}); name a folder for it with --index-dir")
