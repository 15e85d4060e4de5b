"""Image trees: train/ and val/, each with a folder a class; the files in the order of torchvision's ImageFolder.

Links are followed, and each real folder is listed once, under the class that it lies in. What is left out is counted in
one line: files whose name is no image's, hidden and service folders, links that lead nowhere or to where it was before.
"""

import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from sasa.console import printable, show_apart
from sasa.data.decode import EXTENSIONS, readable_formats
from sasa.data.errors import DataError
from sasa.data.images import Files

# Folders of file servers and archivers; those that begin with a dot are hidden.
_SERVICE_FOLDERS = ("@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found")
_NOT_IN_IMAGE_FOLDER = (".gif", ".jfif", ".avif")
_ENDINGS_NAMED = 5

Labelled = tuple[Files, list[int]]  # and the class of each file


class Tree(NamedTuple):
    """What `read_trees` found; `notes`: a line on each split that leaves files out."""

    classes: list[str]
    train: Labelled
    val: Labelled
    notes: list[str]


def read_trees(name: str, data_dir: Path) -> Tree:
    """The images of data_dir/train and data_dir/val.

    Args:
        name: the data set's; IMAGENET must have 1000 classes.

    Raises:
        DataError: a folder that is not there or cannot be read, an empty class, one class only, classes that differ.
    """
    shown = printable(data_dir)
    if not os.path.isdir(data_dir):
        raise DataError(f"{shown}: no such folder; --data-dir must hold train/ and val/, each with a folder a class")
    classes, train, note = _read_split(data_dir, "train")
    val_classes, val, val_note = _read_split(data_dir, "val")
    if classes != val_classes:
        odd = sorted(set(classes) ^ set(val_classes))
        raise DataError(
            f"{shown}: train/ and val/ have different class folders, {show_apart(odd[0], odd)} is in one of them only"
        )
    if len(classes) == 1:  # every answer would be right; most often a folder too much, of an archive or of its author
        raise DataError(
            f"{printable(data_dir / 'train' / classes[0])}: the only class folder, so there is nothing to tell apart; "
            "--data-dir must hold train/ and val/, and each of them a folder a class"
        )
    if name == "IMAGENET" and len(classes) != 1000:
        raise DataError(f"{shown}: IMAGENET has 1000 class folders, here are {len(classes)}; try --dataset FOLDER")
    notes = [line for line in (note, val_note) if line]
    if os.path.samefile(data_dir / "train", data_dir / "val"):
        notes.append(f"{shown}: train/ and val/ are one folder: figures of val/ are of images that were trained on")
    return Tree(classes, train, val, notes)


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name holds no images of a data set: it is hidden, or of a server or archiver."""
    return name.startswith(".") or name in _SERVICE_FOLDERS


def _read_split(data_dir: Path, split: str) -> tuple[list[str], Labelled, str]:
    """Classes, files with labels, and what is left out."""
    root, lister = data_dir / split, _Lister()
    try:
        lister.claim(str(data_dir))
        lister.claim(str(root))
        names = lister.class_names(str(root))
    except OSError as error:
        what = "no such folder" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise DataError(f"{printable(root)}: {what}; put one folder of images for each class there") from error
    if not names:
        raise DataError(f"{printable(root)}: no class folders in it; put one folder of images for each class there")
    by_class = lister.list_classes([os.path.join(root, name) for name in names])
    note = lister.note()
    for name, paths in zip(names, by_class, strict=True):
        if not paths:  # files that are left out can be why
            seen = f" ({split}/ as a whole: {note})" if note else ""
            raise DataError(f"{printable(root / name)}: class folder without images; fill it or remove it{seen}")
    labels = [label for label, paths in enumerate(by_class) for _ in paths]
    files = Files([path for paths in by_class for path in paths], str(data_dir))
    return names, (files, labels), f"{printable(root)}: {note}" if note else ""


class _Lister:
    """Lists the folders of one split, each real folder once, and counts what it leaves out."""

    def __init__(self) -> None:
        self._claimed: set[tuple[int, int]] = set()  # device and inode of folders
        self._left_out: Counter[str] = Counter()
        self._endings: Counter[str] = Counter()  # of the files that are left out
        self._taken: Counter[str] = Counter()  # of those that are taken
        self._formats = EXTENSIONS if "AVIF" in readable_formats() else tuple(e for e in EXTENSIONS if e != ".avif")

    def claim(self, folder: str) -> bool:
        """Whether the folder was not claimed before. Raises OSError."""
        found = os.stat(folder)
        is_new = (found.st_dev, found.st_ino) not in self._claimed
        self._claimed.add((found.st_dev, found.st_ino))
        return is_new

    def class_names(self, root: str) -> list[str]:
        """The names of the class folders, sorted. Raises OSError."""
        names = []
        with os.scandir(root) as entries:
            for entry in entries:
                if self._is_hidden(entry) or self._leads_nowhere(entry):
                    continue
                if entry.is_dir():
                    names.append(entry.name)
                elif self._is_image(entry):
                    self._left_out["images outside the class folders"] += 1
        return sorted(names)

    def list_classes(self, folders: list[str]) -> list[list[str]]:
        """The image files of each class folder: first by their folder's path, then by name, as ImageFolder has them."""
        # What really lies in a class folder is that class's, whatever links of other classes lead there.
        listed: list[list[tuple[str, list[str]]]] = []
        linked: list[list[str]] = []
        for folder in folders:
            found, links = [], []
            self._walk(folder, found, links)
            listed.append(found)
            linked.append(links)
        for found, links in zip(listed, linked, strict=True):
            for link in links:  # which grows as links are followed
                self._walk(link, found, links)
        return [[os.path.join(folder, name) for folder, names in sorted(found) for name in names] for found in listed]

    def _walk(self, start: str, found: list[tuple[str, list[str]]], links: list[str]) -> None:
        """Adds the image names of each real folder from `start` down to `found`, and links to folders to `links`."""
        folders = [start]
        while folders:
            folder = folders.pop()
            try:
                if not self.claim(folder):
                    self._left_out["links to a folder that is listed already"] += 1
                    continue
                with os.scandir(folder) as entries:
                    entries = list(entries)
            except OSError:
                self._left_out["folders that cannot be read"] += 1
                continue
            names = []
            for entry in entries:
                if self._is_hidden(entry) or self._leads_nowhere(entry):
                    continue
                if entry.is_dir():
                    (links if entry.is_symlink() else folders).append(entry.path)
                elif self._is_image(entry):
                    self._taken[os.path.splitext(entry.name)[1].lower()] += 1
                    names.append(entry.name)
            found.append((folder, sorted(names)))

    def _is_hidden(self, entry: os.DirEntry) -> bool:
        hidden = is_hidden(entry.name)
        self._left_out["hidden files and service folders"] += hidden
        return hidden

    def _leads_nowhere(self, entry: os.DirEntry) -> bool:
        try:
            gone = entry.is_symlink() and not os.path.exists(entry.path)
        except OSError:
            gone = True
        self._left_out["links that lead nowhere"] += gone
        return gone

    def _is_image(self, entry: os.DirEntry) -> bool:
        """Of what is no folder."""
        try:
            regular = entry.is_file()
        except OSError:
            regular = False
        named = entry.name.lower().endswith(self._formats)
        if regular and not named:
            self._left_out["files without an image's ending"] += 1
            self._endings[os.path.splitext(entry.name)[1] or "none"] += 1
        if not regular:
            self._left_out["pipes, devices and sockets"] += 1
        return regular and named

    def note(self) -> str:
        """What was left out, or taken though torchvision leaves it out, in one line; empty where nothing was."""
        parts = [f"{count} {what}" for what, count in sorted(self._left_out.items()) if count]
        if self._endings:
            often = sorted(self._endings, key=lambda ending: (-self._endings[ending], ending))[:_ENDINGS_NAMED]
            named = " ".join(printable(ending)[:20] for ending in often)
            parts = [f"{part} ({named})" if "ending" in part else part for part in parts]
        notes = [f"left out: {', '.join(parts)}"] if parts else []
        more = {ending: count for ending, count in self._taken.items() if ending in _NOT_IN_IMAGE_FOLDER}
        if more:
            notes.append(f"taken, as ImageFolder does not: {sum(more.values())} files ({' '.join(sorted(more))})")
        return "; ".join(notes)
