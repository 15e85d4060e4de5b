"""Building the C++ kernel never costs a user more than the speed, and only a library that is ours is ever loaded."""

import ctypes
import errno
import os
import pwd
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fresh_process import ROOT, environment, python_command, run_python
from sasa.kernels import build, private_folder
from sasa.kernels.stop_signals import BuildStopped, StopSignals

pytestmark = pytest.mark.skipif(not private_folder.SUPPORTED, reason="no POSIX file permissions here")

USE = """
from sasa.kernels import choose_backend, cpu
from sasa.kernels.interface import AttentionOptions
x = torch.randn(1, 2, 4, 5, 5)
def use():
    backend = choose_backend(x, 3)
    if backend == "cpu":  # not by the operator: its first call imports half of torch
        cpu.forward(x, x, x, None, None, AttentionOptions(3))
    os.write(1, f"{backend}\\n".encode())  # one write: children share the pipe
"""
# Fresh processes that need not import torch again.
FORK = (
    USE
    + """
def fork(prepare=lambda: None):
    child = os.fork()
    if child == 0:
        try:
            prepare()
            use()
        except BaseException as error:
            os.write(2, f"child failed: {error!r}\\n".encode())
        os._exit(0)
    return child
"""
)


@pytest.fixture
def compiler(tmp_path):
    """A compiler that counts its calls and delivers the library already built, so that no test waits for a real one."""
    library = build.library(torch.float32)
    if isinstance(library, str):
        pytest.skip(f"no CPU kernel: {library}")
    script = tmp_path / "c++"
    script.write_text(
        f"""#!/bin/sh
[ "$1" = --version ] && echo "a compiler" && exit
echo called >> {tmp_path}/calls
sleep 0.2
while [ "$1" != -o ]; do shift; done
exec cat {library._name} > "$2"
"""
    )
    script.chmod(0o755)

    def calls():
        path = tmp_path / "calls"
        return len(path.read_text().splitlines()) if path.exists() else 0

    return {"CXX": str(script), "SASA_CACHE_DIR": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)}, calls


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


# ---- whose folder, whose file --------------------------------------------------------------------------------------


@pytest.fixture
def cached(tmp_path):
    """A library in a cache folder of its own: the folder, the library's name."""
    library = build.library(torch.float32)
    if isinstance(library, str):
        pytest.skip(f"no CPU kernel: {library}")
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    shutil.copy(library._name, folder / "a.so")
    (folder / "a.so").chmod(0o600)
    return folder, "a.so"


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


# ---- signals while it is built -------------------------------------------------------------------------------------


@pytest.fixture
def slow_compiler(tmp_path):
    """A compiler that takes a minute in a child of its own; its child's number is in the file `child`."""
    script = tmp_path / "c++"
    script.write_text(
        f"""#!/bin/sh
[ "$1" = --version ] && echo "a compiler" && exit
while [ "$1" != -o ]; do shift; done
echo half > "$2"
sleep 60 &
echo $! > {tmp_path}/child.new && mv {tmp_path}/child.new {tmp_path}/child
wait
"""
    )
    script.chmod(0o755)
    return {"CXX": str(script), "SASA_CACHE_DIR": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)}


def await_file(path, seconds=60):
    until = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < until, f"{path} does not appear"
        time.sleep(0.05)


def alive(number):
    try:
        return Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


HANDLER = """
import signal
from sasa.kernels.stop_signals import BuildStopped
signal.signal(signal.SIGTERM, lambda *_: os.write(1, b"handled\\n"))
try:
    use()
except BuildStopped as error:
    print(error)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    ("number", "code", "status", "out"),
    [
        (signal.SIGTERM, "use()", -signal.SIGTERM, ""),
        (signal.SIGHUP, "use()", -signal.SIGHUP, ""),
        (signal.SIGINT, "use()", None, ""),
        (signal.SIGTERM, HANDLER, 0, "handled\nSIGTERM ended the build of the CPU kernel\n"),
    ],
)
def test_a_signal_ends_the_compiler_and_then_the_process(slow_compiler, tmp_path, number, code, status, out):
    # As a terminal starts a process: under nohup or in a shell's background two of the signals would be ignored.
    heard = "signal.signal(signal.SIGHUP, signal.SIG_DFL); signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = python_command(f"import signal; {heard}\n{USE}{code}")
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(slow_compiler)
    )
    with process:
        try:
            await_file(tmp_path / "child")
            process.send_signal(number)
            printed, errors = process.communicate(timeout=30)
        finally:
            process.kill()
    child = int((tmp_path / "child").read_text())
    until = time.monotonic() + 5  # the child is ended by the compiler's group, and reaped by whoever inherits it
    while alive(child) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(child)
    assert "slower backend" not in errors  # a signal is no reason to compute otherwise
    assert printed == out
    assert process.returncode == status if status is not None else "KeyboardInterrupt" in errors
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_signal_ends_the_wait_for_another_build(cached):
    fcntl = pytest.importorskip("fcntl")
    folder, _ = cached
    handled = []
    before = signal.signal(signal.SIGUSR1, lambda *_: handled.append(True))
    try:
        with open(folder / "b.lock", "w") as held, private_folder.opened(str(folder)) as opened:
            fcntl.flock(held, fcntl.LOCK_EX)
            start = time.monotonic()
            with pytest.raises(BuildStopped, match="SIGUSR1"), StopSignals() as signals:
                os.kill(os.getpid(), signal.SIGUSR1)
                build._build(opened, "b.so", ["true"], 1, signals, [])
            assert time.monotonic() - start < 5
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert handled == [True]


def test_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            signals.check()
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_a_run_that_is_stopped_while_it_builds_ends_in_one_line(slow_compiler, tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), "--dataset", "DIGITS", "--train-images", "32", "--epochs", "1"]
    command += [
        "--batch-size",
        "16",
        "--attention-every",
        "0",
        "--output-dir",
        str(tmp_path / "runs"),
        "--device",
        "cpu",
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(slow_compiler), cwd=tmp_path
    )
    with process:
        try:
            await_file(tmp_path / "child")
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 75, errors
    assert "SIGTERM ended the build of the CPU kernel" in errors
    assert "Traceback" not in errors
    assert not list(tmp_path.glob("runs/*/*.pt"))
