"""What a step that is not finite must leave as it was, decided on the device: nothing waits for it."""

import torch
from torch import Tensor, nn


class Guard:
    """Puts the network's buffers back as they were before a step that is not finite, and keeps the flag of such a step.

    Attributes:
        flag: () float32 on the device, 1 from a step on that is not finite: what the fused optimizers call found_inf.
    """

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self.flag = torch.zeros((), device=device)
        kinds: dict[torch.dtype, list[Tensor]] = {}
        for buffer in network.buffers():
            kinds.setdefault(buffer.dtype, []).append(buffer)
        self._groups = list(kinds.values())
        self._kept: list[Tensor] = []

    def keep(self) -> None:
        """The buffers as they are now are those to put back."""
        self._kept = [_flat(group) for group in self._groups]

    def set(self, figures: Tensor) -> None:
        """The flag, where any of these figures is not finite; it is never taken back."""
        self.flag.copy_(torch.maximum(self.flag, 1 - figures.isfinite().all().to(self.flag.dtype)))

    def put_back(self, flag: Tensor | None = None) -> None:
        """The buffers that were kept, where `flag` is 1 (None: in any case). Nothing waits for it."""
        for group, kept in zip(self._groups, self._kept, strict=True):
            chosen = kept if flag is None else torch.where(flag > 0, kept, _flat(group))
            parts = chosen.split([buffer.numel() for buffer in group])
            torch._foreach_copy_(group, [part.view_as(buffer) for part, buffer in zip(parts, group, strict=True)])


def _flat(group: list[Tensor]) -> Tensor:
    return torch.cat([buffer.reshape(-1) for buffer in group])
