"""From the host to the device, without a wait."""

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x on the device; what is queued there next finds it whole.

    To CUDA from pinned memory: a copy out of any other may wait for all that the device was given before.
    """
    if x.device.type == "cpu" and device.type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)
