"""Signals that ask a run to stop: noted at once, obeyed at the next step boundary."""

import os
import signal
import time

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
REPEAT_SECONDS = 5.0  # launchers send a signal twice: within this time a repeat counts as the same one


class StopRequest:
    """`received` is the name of the first stop signal, or None.

    A second signal more than 5 s after the first ends the process at once, unsaved, with the shell's code for a signal
    (128 + its number).
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._first = 0.0

    def install(self) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._first = signal.Signals(number).name, now
            # descriptor 2 at once: a signal may arrive inside print, which is not reentrant
            os.write(2, f"\n{self.received}: saving at the next step\n".encode())
        elif now - self._first > REPEAT_SECONDS:
            os._exit(128 + number)
