"""Only a library that is ours, in a folder that is ours, is ever loaded."""

import ctypes
import errno
import os
import pwd
import shutil
import stat
from pathlib import Path

import pytest

from fresh_process import ROOT, run_python
from kernel_builds import USE
from sasa.kernels import build, private_folder
from sasa.kernels.stop_signals import StopSignals

pytestmark = pytest.mark.skipif(not private_folder.SUPPORTED, reason="no POSIX file permissions here")


def load(folder, name):
    with private_folder.opened(str(folder)) as opened:
        return build._load(opened, name)


def give_away(path, monkeypatch):
    """`path` now belongs to another user, as far as a test can have it."""
    if os.geteuid() == 0:
        os.chown(path, 12345, 12345, follow_symlinks=False)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)  # our own files are another user's then


def test_what_is_made_is_ours_alone_whatever_the_umask(compiler):
    env, _ = compiler
    env["SASA_CACHE_DIR"] = env["TMPDIR"] + "/new/cache"
    done = run_python("os.umask(0)\n" + USE + "use()", env)
    assert done.stdout == "cpu\n", done.stderr
    made = [Path(env["TMPDIR"]) / "new", *(Path(env["TMPDIR"]) / "new").rglob("*")]
    modes = {path.suffix or "folder": stat.S_IMODE(path.lstat().st_mode) for path in made}
    assert modes == {"folder": 0o700, ".so": 0o600, ".lock": 0o600}


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702, 0o1777])
def test_a_folder_that_others_can_write_is_not_used(cached, mode):
    folder, name = cached
    assert load(folder, name).sasa_stem
    folder.chmod(mode)
    with pytest.raises(OSError, match="others can write to cache"):
        load(folder, name)


def test_nor_one_below_such_a_folder_unless_it_is_sticky(cached):
    folder, name = cached
    above = folder.parent / "above"
    above.mkdir()
    folder.rename(above / "cache")
    for mode, safe in ((0o777, False), (0o775, False), (0o1777, True), (0o711, True)):
        above.chmod(mode)
        if safe:
            load(above / "cache", name)
        else:
            with pytest.raises(OSError, match="others can write to above"):
                load(above / "cache", name)


def test_a_folder_or_link_of_another_user_is_not_used(cached, monkeypatch):
    folder, name = cached
    (folder.parent / "way").symlink_to(folder.parent)
    load(folder.parent / "way" / "cache", name)  # root's and our own links may be on the way
    with monkeypatch.context() as patch:
        give_away(folder.parent / "way", patch)
        with pytest.raises(OSError, match="another user"):
            load(folder.parent / "way" / "cache", name)
    give_away(folder, monkeypatch)
    with pytest.raises(OSError, match="another user"):
        load(folder, name)


def test_a_link_in_the_folder_s_place_is_not_followed(cached):
    folder, name = cached
    link = folder.parent / "link"
    link.symlink_to(folder)
    with pytest.raises(OSError, match="link is a symbolic link"):
        load(link, name)
    loop = folder.parent / "loop"
    loop.symlink_to("loop")
    with pytest.raises(OSError, match="symbolic link"):
        load(loop / "cache", name)


@pytest.mark.parametrize("damage", ["others can write", "link", "fifo", "another user's"])
def test_a_library_that_others_could_have_made_is_not_loaded(cached, damage, monkeypatch):
    folder, name = cached
    file = folder / name
    if damage == "others can write":
        file.chmod(0o620)
    elif damage == "another user's":
        give_away(file, monkeypatch)
    else:
        file.rename(folder / "elsewhere")
        file.symlink_to("elsewhere") if damage == "link" else os.mkfifo(file, 0o600)
    with pytest.raises(OSError):
        load(folder, name)


def test_what_was_checked_is_what_is_loaded(cached, monkeypatch):
    """A library, and its whole folder, exchanged in the moment between the check and the load."""
    folder, name = cached
    real = ctypes.CDLL

    def exchange(path):
        folder.rename(folder.parent / "old")
        folder.mkdir()
        for place in (folder / name, folder.parent / "old" / name):
            place.unlink(missing_ok=True)
            place.write_text("not a library")
        return real(path)

    monkeypatch.setattr(build.ctypes, "CDLL", exchange)
    assert load(folder, name).sasa_stem


def test_two_libraries_are_never_taken_for_each_other(cached):
    """The loader knows a library by its path, and a descriptor's number is used again."""
    folder, name = cached
    shutil.copy(folder / name, folder / "b.so")
    first, second = load(folder, name), load(folder, "b.so")
    assert first._handle != second._handle
    assert second._name == str(folder / "b.so")


def test_a_lock_that_is_a_link_is_not_followed(cached):
    folder, _ = cached
    (folder / "b.lock").symlink_to(folder.parent / "victim")
    with private_folder.opened(str(folder)) as opened, StopSignals() as signals:
        with pytest.raises(OSError) as error:
            build._build(opened, "b.so", ["true"], 1, signals, [])
        assert error.value.errno == errno.ELOOP
    assert not (folder.parent / "victim").exists()


def test_a_folder_mounted_noexec_falls_through(cached, monkeypatch):
    folder, name = cached
    flag = os.ST_NOEXEC if hasattr(os, "ST_NOEXEC") else 0
    real = os.fstatvfs
    monkeypatch.setattr(os, "fstatvfs", lambda fd: os.statvfs_result([*real(fd)[:8], real(fd).f_flag | flag, 255]))
    with pytest.raises(OSError, match="noexec"):
        load(folder, name)


def test_the_next_folder_serves_and_the_message_says_why(compiler):
    """A relative folder, a planted link, and a second folder planted by another user."""
    env, calls = compiler
    tmp = Path(env["TMPDIR"])
    (tmp / "second").mkdir()
    done = run_python(USE + "use()", env | {"SASA_CACHE_DIR": ".", "TMPDIR": str(tmp / "second")})
    assert done.stdout == "cpu\n", done.stderr
    assert f"in {tmp}/second/sasa-{os.geteuid()} (.: is not an absolute path)" in done.stderr
    assert calls() == 1
    (tmp / "third").mkdir()
    (tmp / "home").mkdir()
    (tmp / "third" / f"sasa-{os.geteuid()}").symlink_to(tmp / "home")
    done = run_python(USE + "use()", env | {"SASA_CACHE_DIR": ".", "TMPDIR": str(tmp / "third")})
    assert done.stdout != "cpu\n"
    assert f"sasa-{os.geteuid()} is a symbolic link" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list((tmp / "home").iterdir())


def test_without_a_home_no_folder_is_named_tilde(tmp_path, monkeypatch):
    def no_entry(uid):
        raise KeyError(uid)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pwd, "getpwuid", no_entry)
    for name in ("HOME", "XDG_CACHE_HOME", "SASA_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    first, second = build._cache_folders()
    assert os.path.isabs(second)
    with pytest.raises(OSError, match="absolute"), private_folder.opened(first, create=True):
        pass
    assert not list(tmp_path.iterdir())


def test_sources_that_cannot_be_read_leave_the_next_backend(tmp_path):
    """As a zip file, where there are no files to compile."""
    archive = shutil.make_archive(str(tmp_path / "package"), "zip", ROOT, "sasa")
    code = f"sys.path[0] = {archive!r}\n" + USE + "use()\nfrom sasa.kernels import build\nprint(build.__file__)"
    done = run_python(code, {"SASA_CACHE_DIR": str(tmp_path / "cache")})
    backend, file = done.stdout.split()
    assert file.startswith(archive)
    assert backend != "cpu"
    (line,) = done.stderr.splitlines()
    assert "sources cannot be read" in line
    assert not (tmp_path / "cache").exists()
