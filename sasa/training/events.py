"""TensorBoard's event files, written by this process itself.

TensorBoard's own writer has a thread, whose death on a full disk prints a traceback and lets the run wait for it.
"""

import os
import socket
import time
from pathlib import Path

from tensorboard.compat.proto import event_pb2
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import SummaryWriter

from sasa.training.files import EVENTS


class EventWriter(SummaryWriter):
    """torch's SummaryWriter over an `EventFile`: what it adds is in a buffer of the process, and on the disk after
    `flush`.

    Raises:
        OSError: as does every call, where the disk refuses.
    """

    def __init__(self, folder: Path, purge_step: int) -> None:
        self._folder = folder
        super().__init__(str(folder), purge_step=purge_step)

    def _get_file_writer(self):
        if self.all_writers is None or self.file_writer is None:
            self.file_writer = EventFile(self._folder)
            self.all_writers = {str(self._folder): self.file_writer}
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self.file_writer.add_event(event_pb2.Event(file_version="brain.Event:2"), self.purge_step)
            self.file_writer.add_event(event_pb2.Event(session_log=start), self.purge_step)
        return self.file_writer


class EventFile:
    """One new event file of a folder, with the calls that SummaryWriter makes of its file writer."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
        name = f"events.out.tfevents.{next_number(folder):010d}.{socket.gethostname()}.{os.getpid()}.0"
        self._file = os.fdopen(os.open(folder / name, flags, 0o666), "wb")
        self._records = RecordWriter(self._file)

    def get_logdir(self) -> str:
        return str(self._folder)

    def add_event(self, event: event_pb2.Event, step: int | None = None, walltime: float | None = None) -> None:
        event.wall_time = time.time() if walltime is None else walltime
        if step is not None:
            event.step = int(step)
        self._records.write(event.SerializeToString())

    def add_summary(self, summary, global_step: int | None = None, walltime: float | None = None) -> None:
        self.add_event(event_pb2.Event(summary=summary), global_step, walltime)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def next_number(folder: Path) -> int:
    """The number of a new event file: the time, but always after the files that are there.

    TensorBoard reads the files in the order of their names, and a clock may have been set back.
    """
    numbers = [int(word) for path in folder.glob(EVENTS) if (word := path.name.split(".")[3]).isdecimal()]
    return max([int(time.time()), *(number + 1 for number in numbers if number < 10**10 - 1)])
