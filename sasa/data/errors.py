"""What can be wrong with data, and with the processes that read it."""


class DataError(Exception):
    """Wrong data: one line that names the path and what to do."""


class WorkerError(Exception):
    """A decoding process died, handed nothing over, or lacks memory or open files: the data may be sound, and a restart
    can help."""
