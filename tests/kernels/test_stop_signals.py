"""Signals while the C++ kernel is built."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fresh_process import ROOT, environment, python_command
from kernel_builds import USE
from sasa.kernels import build, private_folder
from sasa.kernels.stop_signals import BuildStopped, StopSignals

pytestmark = pytest.mark.skipif(not private_folder.SUPPORTED, reason="no POSIX file permissions here")


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
