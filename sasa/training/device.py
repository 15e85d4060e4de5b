"""Memory of the process."""

import contextlib
import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h of glibc


def keep_freed() -> None:
    """Freed memory stays with the process for the next step, where the C library is glibc.

    Without it each large map of a step on a CPU is given back and asked for again: the kernel clears its pages each
    time, which took a fifth of a training step (ResNet26, CIFAR form, 64 images, 2 threads).
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
