"""--compile: where torch.compile keeps what it has built, and what its CUDA graphs cannot do."""

import os
import tempfile

import torch

from config import Config, ConfigError
from sasa.kernels import private_folder

CACHE = "TORCHINDUCTOR_CACHE_DIR"
WITH_GRAPHS = ("reduce-overhead", "max-autotune")  # modes that replay CUDA graphs


def keep_builds() -> str:
    """The folder in which torch.compile keeps its builds from now on: $TORCHINDUCTOR_CACHE_DIR, or in the user's cache.

    All ranks of a machine share it, without an order among them: each file is written under another name and moved into
    place, so that a rank finds it whole or builds its own, and what is compiled by a C++ compiler is locked. What lies
    there is run as code, so it is a folder that no other user can write; where there is none, torch's own is kept.
    """
    if not os.environ.get(CACHE):
        first = os.environ.get("SASA_CACHE_DIR") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "sasa")
        path = os.path.join(os.path.expanduser(first), "inductor")
        try:
            with private_folder.opened(path, create=True):
                os.environ[CACHE] = path
        except OSError:
            return f"torch's own folder in {tempfile.gettempdir()}"
    return os.environ[CACHE]


def check_accumulation(config: Config, micro_batches: int, device: torch.device) -> None:
    """Refuses gradients that are summed over several batches where CUDA graphs write each into the same memory.

    The second batch's backward would overwrite the first one's gradients, which then count wrong without an error
    (pytorch issue 96693), or end the run (169545).

    Raises:
        ConfigError: it would be so.
    """
    graphs = config.compile and config.compile_mode in WITH_GRAPHS and device.type == "cuda"
    if graphs and micro_batches > 1:
        raise ConfigError(
            f"--compile-mode {config.compile_mode}: a step is {micro_batches} batches on this rank, whose gradients "
            "its CUDA graphs would overwrite; allowed are --compile-mode default, or a --batch-size that makes it one"
        )
