"""signals.py: each stop signal, with and without a state to save; those that nohup ignores stay ignored."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sasa.training.signals import STOP_SIGNALS, STOPPED, StopRequest

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"]
CODE = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from sasa.training.signals import StopRequest
number = getattr(signal, sys.argv[2])
signal.signal(number, signal.SIG_IGN if sys.argv[3] == "nohup" else signal.SIG_DFL)  # whatever this process inherits
stop = StopRequest()
stop.install()
stop.has_state = sys.argv[3] == "state"
os.kill(os.getpid(), number)
print(stop.received)
"""


def run(name: str, how: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", CODE, str(ROOT), name, how]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("name", NAMES)
def test_without_a_state_a_signal_ends_at_once_with_75_and_a_line(name):
    done = run(name, "start")
    assert done.returncode == STOPPED == 75 and done.stdout == ""
    assert done.stderr.strip() == f"{name}: stopped before a step was done, there is nothing new to save"


@pytest.mark.parametrize("name", NAMES)
def test_with_a_state_a_signal_is_noted(name):
    done = run(name, "state")
    assert done.returncode == 0 and done.stdout.strip() == name and "saving at the next step" in done.stderr


def test_what_nohup_ignores_stays_ignored():
    done = run("SIGHUP", "nohup")
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "None", "")


def test_a_closed_standard_error_does_not_keep_a_signal(monkeypatch):
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    monkeypatch.setattr(os, "write", lambda *_: (_ for _ in ()).throw(BrokenPipeError()))
    stop = StopRequest()
    stop.has_state = True
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where the tests run under nohup
    try:
        stop.install()
        os.kill(os.getpid(), signal.SIGHUP)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert stop.received == "SIGHUP"
