"""Building the C++ kernel never costs a user more than the speed."""

import re
from pathlib import Path

import pytest

from fresh_process import run_python
from kernel_builds import FORK
from sasa.kernels import build, private_folder

pytestmark = pytest.mark.skipif(not private_folder.SUPPORTED, reason="no POSIX file permissions here")


def test_the_library_s_name_follows_from_every_source_file():
    """A change of any of them is built again; none is included that the name does not know."""
    csrc = Path(build.__file__).parent / "csrc"
    known = {*build.SOURCES, *build.HEADERS}
    assert known == set(csrc.iterdir())
    included = {csrc / name for file in known for name in re.findall(r'#include "(.+)"', file.read_text())}
    assert included == set(build.HEADERS)


def test_importing_builds_nothing_and_many_processes_build_once(compiler):
    env, calls = compiler
    code = """
assert not os.path.exists(os.environ["SASA_CACHE_DIR"])
for child in [fork() for _ in range(8)]:
    os.waitpid(child, 0)
"""
    done = run_python(FORK + code, env)
    assert done.stdout.split() == ["cpu"] * 8, done.stderr
    assert calls() == 1
    assert len(done.stderr.splitlines()) == 1
    assert "building the CPU kernel once" in done.stderr


def test_a_damaged_library_is_built_again(compiler):
    env, calls = compiler
    code = """
from pathlib import Path
os.waitpid(fork(), 0)
(library,) = Path(os.environ["SASA_CACHE_DIR"]).glob("*.so")
whole = library.read_bytes()
for damaged in (whole[: len(whole) // 2], whole[:100], b"", whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:]):
    library.write_bytes(damaged)
    os.waitpid(fork(), 0)
os.waitpid(fork(), 0)
"""
    done = run_python(FORK + code, env)
    assert done.stdout.split() == ["cpu"] * 6, done.stderr
    assert calls() == 5
    assert sorted(p.suffix for p in Path(env["SASA_CACHE_DIR"]).iterdir()) == [".lock", ".so"]


def test_another_folder_serves_where_the_cache_cannot_be_written(compiler, tmp_path):
    """A file in the way, a read-only folder, a full disk there; and a full disk everywhere."""
    env, calls = compiler
    script = Path(env["CXX"])
    full = tmp_path / "full"
    script.write_text(
        script.read_text().replace(
            "exec cat", f'case "$2" in {full}*) echo "error: No space left on device" >&2; exit 1;; esac\nexec cat'
        )
    )
    (tmp_path / "a file").write_text("")
    (tmp_path / "read-only").mkdir(mode=0o700)
    code = """
import errno, resource
import sasa.kernels.build  # before os.open is another
opened = os.open
root = os.environ["TMPDIR"]
def refuse(path, flags, *rest, **named):  # permissions do not stop root
    if flags & os.O_CREAT and os.path.realpath(os.path.dirname(path)) == root + "/read-only":
        raise OSError(errno.EROFS, "Read-only file system")
    return opened(path, flags, *rest, **named)
def prepare(folder):
    os.environ["SASA_CACHE_DIR"] = f"{root}/{folder}"
    os.environ["TMPDIR"] = f"{root}/second folder of {folder}"
    os.mkdir(os.environ["TMPDIR"])
    os.open = refuse
    if folder == "nowhere":
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
for folder in ("a file", "read-only", "full", "nowhere"):
    os.write(2, b"=\\n")
    os.waitpid(fork(lambda: prepare(folder)), 0)
"""
    done = run_python(FORK + code, env)
    backends = done.stdout.split()
    assert backends[:3] == ["cpu"] * 3, done.stderr
    assert backends[3] != "cpu"
    said = done.stderr.split("=\n")[1:]
    assert all("slower backend" not in text for text in said[:3])
    assert "SASA_CACHE_DIR" in said[3]
    assert calls() == 6  # the full disk and the last case try both folders
    assert not list(tmp_path.rglob("*.part"))
    assert not list(tmp_path.glob("*nowhere/**/*.so"))


def test_without_a_working_compiler_the_next_backend_serves(tmp_path):
    """None, one that fails, one whose library does not load: one line each, with the reason."""
    for name, script in (
        ("fails", 'echo "cc1plus: a strange error" >&2\nexit 1\n'),
        ("junk", 'while [ "$1" != -o ]; do shift; done\necho junk > "$2"\n'),
    ):
        (tmp_path / name).write_text('#!/bin/sh\n[ "$1" = --version ] && exit\n' + script)
        (tmp_path / name).chmod(0o755)
    code = """
root = os.environ["SASA_CACHE_DIR"]
def prepare(name):
    os.environ["CXX" if name else "PATH"] = f"{root}/{name}"
    use()
for name in ("", "fails", "junk"):
    os.write(2, b"=\\n")
    os.waitpid(fork(lambda: prepare(name)), 0)
"""
    done = run_python(FORK + code, {"SASA_CACHE_DIR": str(tmp_path)})
    assert len(done.stdout.split()) == 6, done.stderr
    assert "cpu" not in done.stdout.split()
    for text, expected in zip(
        done.stderr.split("=\n")[1:], ("install g++", "a strange error", "does not load"), strict=True
    ):
        lines = [line for line in text.splitlines() if "building" not in line]
        assert len(lines) == 1, done.stderr
        assert expected in lines[0]
