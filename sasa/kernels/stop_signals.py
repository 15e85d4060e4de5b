"""Signals that ask the process to end while it waits for another program. No torch."""

import signal
import threading
from types import FrameType

_NUMBERS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]


class BuildStopped(Exception):
    """A signal ended the build. The process's own handler has run and returned, so the process is about to stop."""


class StopSignals:
    """In this block stop signals are noted, `check` raises at the next chance, and at its end they take effect.

    A handler of the process's own (or the system's, which ends it) runs when the block is left, so that the block can
    first end what it started. Ignored signals stay ignored. Outside the main thread nothing is noted: Python delivers
    signals to the main thread.
    """

    def __init__(self) -> None:
        self._received: list[int] = []
        self._handlers = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in _NUMBERS:
                if signal.getsignal(number) not in (None, signal.SIG_IGN):  # None: not set by Python
                    self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        for number in self._received:
            signal.raise_signal(number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received.append(number)

    def check(self) -> None:
        """Raises:
        BuildStopped: a signal has come.
        """
        if self._received:
            raise BuildStopped(f"{signal.Signals(self._received[0]).name} ended the build of the CPU kernel")
