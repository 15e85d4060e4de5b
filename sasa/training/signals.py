"""Signals that ask a run to stop: obeyed at once while there is no state to save, else at the next step boundary."""

import contextlib
import os
import signal
import threading
import time

STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if hasattr(signal, name)
)
STOPPED = 75  # exit code (EX_TEMPFAIL): the same command with --resume goes on
REPEAT_SECONDS = 5.0  # launchers send a signal twice: within this time a repeat counts as the same one


class StopRequest:
    """Notes the stop signals of this process; `received` is the name of the first one, or None.

    While `has_state` is False a signal ends the process at once with code 75 and a line. From then on it is noted, and
    the run saves and ends where it next looks. A second signal more than 5 s after the first ends the process at once,
    unsaved, with the shell's code for a signal (128 + its number).
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.has_state = False
        self._first = 0.0
        self._before = {}

    def install(self) -> None:
        """Take over the process's stop signals, but for those that it was started to ignore (nohup).

        Outside the main thread there is nothing to take over: Python gives signals to the main thread alone.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        for number in STOP_SIGNALS:
            if signal.getsignal(number) not in (None, signal.SIG_IGN):  # None: not set by Python
                self._before[number] = signal.signal(number, self._handle)

    def uninstall(self) -> None:
        """Give the signals back to whom they were taken from."""
        while self._before:
            signal.signal(*self._before.popitem())

    def _handle(self, number: int, frame) -> None:
        # Descriptor 2 at once: a signal may arrive inside print, which is not reentrant.
        name, now = signal.Signals(number).name, time.monotonic()
        if self.received is not None:
            if now - self._first > REPEAT_SECONDS:
                os._exit(128 + number)
        elif self.has_state:
            self.received, self._first = name, now
            _write_line(f"{name}: saving at the next step")
        else:
            _write_line(f"{name}: stopped before a step was done, there is nothing new to save")
            os._exit(STOPPED)


def _write_line(text: str) -> None:
    with contextlib.suppress(OSError):  # closed, or a pipe whose reader has gone: the signal is obeyed all the same
        os.write(2, f"\n{text}\n".encode())
