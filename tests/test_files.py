"""sasa/files.py: a file is replaced whole or not at all, through no link, and where folders cannot be synced."""

import errno
import os
from pathlib import Path

import pytest

from sasa import files
from sasa.files import json_text, open_regular, read_regular, replacing, sync_folder, write_text


def test_the_new_content_takes_the_old_ones_place(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with replacing(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    write_text(tmp_path / "text", "caf\u00e9\n")
    assert path.read_bytes() == b"new" and (tmp_path / "text").read_bytes() == "caf\u00e9\n".encode()
    assert {p.name for p in tmp_path.iterdir()} == {"file", "text"}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), RuntimeError("x"), KeyboardInterrupt()])
def test_an_error_leaves_the_old_file_and_no_other(tmp_path, error):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(type(error)), replacing(path) as file:
        file.write(b"half")
        raise error
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_links_are_replaced_and_never_written_through(tmp_path, monkeypatch):
    outside = tmp_path / "outside"
    outside.write_bytes(b"mine")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").symlink_to(outside)
    with replacing(folder / "file") as file:
        file.write(b"new")
    assert outside.read_bytes() == b"mine" and not (folder / "file").is_symlink()
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: "known")
    (folder / ".file.known.tmp").symlink_to(outside)  # whoever guessed the name
    with pytest.raises(FileExistsError), replacing(folder / "file") as file:
        file.write(b"worse")
    assert outside.read_bytes() == b"mine" and (folder / "file").read_bytes() == b"new"


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_sync_of_folders_is_no_error(tmp_path, monkeypatch, code):
    def refuse(descriptor):
        raise OSError(code, "not here")

    monkeypatch.setattr(os, "fsync", refuse)
    sync_folder(tmp_path)


def test_a_failed_sync_is_an_error(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="input/output"):
        sync_folder(tmp_path)


def test_only_regular_files_are_opened_and_nothing_is_cut(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe", "."):
        with pytest.raises(OSError):
            os.close(open_regular(tmp_path / name, os.O_RDWR | os.O_CREAT))
    with os.fdopen(open_regular(tmp_path / "file", os.O_WRONLY | os.O_CREAT | os.O_APPEND), "a") as file:
        file.write(", new")
    assert (tmp_path / "file").read_text() == "old, new"


def test_json_never_holds_what_it_does_not_know():
    assert json_text({"a": [float("nan"), 1.5], "b": (float("inf"), -0.0), "c": True}) == (
        '{"a": [null, 1.5], "b": [null, -0.0], "c": true}'
    )


def test_only_regular_files_of_a_bounded_size_are_read(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    (tmp_path / "link").symlink_to(path)
    os.mkfifo(tmp_path / "pipe")  # opened to read, it would wait for ever
    assert read_regular(path) == read_regular(tmp_path / "link", 5) == b"12345"
    with pytest.raises(OSError, match="more than 4 bytes"):
        read_regular(path, 4)
    for other in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(OSError):
            read_regular(other)
