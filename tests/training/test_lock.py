"""lock.py: one run in a folder, freed by the kernel, and a warning where there are no locks."""

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from config import ConfigError
from sasa.training import lock
from sasa.training.lock import FolderLock

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from sasa.training.lock import FolderLock
FolderLock().acquire(Path(sys.argv[2]))
print("held", flush=True)
time.sleep(100)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that has the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(ROOT), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_the_second_run_is_refused_and_names_the_first(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(lock, "WAIT_SECONDS", 0.3)
    with pytest.raises(ConfigError) as error:
        FolderLock().acquire(tmp_path)
    text = str(error.value)
    assert f"process {holder.pid} on {socket.gethostname()}, started 20" in text and "\n" not in text


def test_a_refused_run_leaves_the_lock_of_the_one_that_holds_the_folder(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(lock, "WAIT_SECONDS", 0.0)
    for _ in range(2):
        refused = FolderLock()
        with pytest.raises(ConfigError):
            refused.acquire(tmp_path)
        refused.release()
        assert [path.name for path in tmp_path.iterdir()] == [lock.NAME]


def test_a_death_frees_the_folder_and_the_next_run_waits_for_it(tmp_path, holder, monkeypatch):
    waits = []
    monkeypatch.setattr(lock.time, "sleep", lambda _: waits.append(holder.kill()) or holder.wait())
    found = FolderLock()
    found.acquire(tmp_path)
    assert len(waits) == 1
    found.release()
    found.release()  # at the end of a run that was never in a folder too


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_one_line_warns(tmp_path, monkeypatch, capsys, code):
    def refuse(*_):
        raise OSError(code, "no locks")

    monkeypatch.setattr(lock.fcntl, "lockf", refuse)
    FolderLock().acquire(tmp_path)
    error = capsys.readouterr().err
    assert "no locks here" in error and error.count("\n") == 1


def test_no_link_is_followed(tmp_path):
    (tmp_path / "mine").write_text("precious")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / lock.NAME).symlink_to(tmp_path / "mine")
    with pytest.raises(ConfigError, match=f"{lock.NAME}: cannot be locked"):
        FolderLock().acquire(folder)
    assert (tmp_path / "mine").read_text() == "precious"


def test_a_lock_that_fails_otherwise_is_one_line(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(lock.fcntl, "lockf", refuse)
    with pytest.raises(ConfigError, match="cannot be locked"):
        FolderLock().acquire(tmp_path)


def test_a_damaged_note_of_the_holder_is_no_traceback(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(lock, "WAIT_SECONDS", 0.0)
    for content in (b"", b"{", b"[1]", b'{"host": "\\u001b]0;x"}'):
        descriptor = os.open(tmp_path / lock.NAME, os.O_WRONLY | os.O_TRUNC)
        os.write(descriptor, content)
        os.close(descriptor)
        with pytest.raises(ConfigError, match="unknown process"):
            FolderLock().acquire(tmp_path)


def test_a_refused_run_leaves_no_folder_that_it_made(tmp_path):
    folder = tmp_path / "runs" / "new"
    found = FolderLock()
    found.acquire(folder)
    assert [path.name for path in folder.iterdir()] == [lock.NAME]
    found.release()
    assert not (tmp_path / "runs").exists()
    folder.mkdir(parents=True)  # the user's own
    found.acquire(folder)
    found.release()
    assert not [*folder.iterdir()]
    found.acquire(folder)
    (folder / "config.json").write_text("{}")
    found.release()
    assert sorted(path.name for path in folder.iterdir()) == [lock.NAME, "config.json"]


def test_a_lock_that_its_holder_has_removed_is_taken_anew(tmp_path, monkeypatch, capsys):
    """The waiting process has the removed file open: with it, two runs would be in the folder."""
    folder = tmp_path / "run"
    first, second = FolderLock(), FolderLock()  # the one removes it between the other's two steps
    refused = [OSError(errno.EAGAIN, "held"), None]  # POSIX locks do not part two of one process
    lockf = lock.fcntl.lockf

    def held_once(descriptor, how):
        if refused and (error := refused.pop(0)):
            raise error
        lockf(descriptor, how)

    first.acquire(folder)
    monkeypatch.setattr(lock.fcntl, "lockf", held_once)
    monkeypatch.setattr(lock.time, "sleep", lambda _: first.release())
    second.acquire(folder)
    assert os.path.samestat(os.fstat(second._descriptor), os.stat(folder / lock.NAME))
    assert f"process {os.getpid()}" in capsys.readouterr().err
    second.release()
    assert not folder.exists()


def test_a_folder_that_goes_while_it_is_tried_is_made_again(tmp_path, monkeypatch, capsys):
    """A refused run removes what it has made: between our making it and our trying it, and before our lock's file."""
    folder, make, left = tmp_path / "run", lock.make_folder, [2]

    def made(path):
        make(path)
        if left[0]:
            left[0] -= 1
            path.rmdir()
            if left[0]:
                raise ConfigError("cannot be written to")

    monkeypatch.setattr(lock, "make_folder", made)
    monkeypatch.setattr(lock, "POLL_SECONDS", 0.0)
    ours = FolderLock()
    ours.acquire(folder)
    assert (folder / lock.NAME).exists() and left == [0]
    assert not capsys.readouterr().err  # nobody is waited for
    ours.release()
