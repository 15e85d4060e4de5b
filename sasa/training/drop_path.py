"""Stochastic depth (Huang et al., 2016): in training, the residual branch of a block is left out for some images.

Which ones is drawn for the whole global batch of a step, as a function of (seed, epoch, step), and cut like the images.
"""

from functools import partial

import torch
from torch import Tensor, nn

from model import BasicBlock, Bottleneck
from sasa.data.augment import stream


def block_rates(rate: float, blocks: int) -> list[float]:
    """How often each block's branch is left out: from 0 in the first, linearly, to `rate` in the last."""
    return [rate * i / max(blocks - 1, 1) for i in range(blocks)]


def draw(seed: int, epoch: int, step: int, images: int, rates: list[float]) -> Tensor:
    """The factors of the branches: (images, blocks) float32, 0 where it is left out, else 1 / (1 - rate).

    The mean over many draws is 1, so nothing changes in evaluation.

    Args:
        step: of the epoch. images: of the global batch.
    """
    uniform = torch.from_numpy(stream(seed, "drop_path", epoch, step).random((images, len(rates))))
    rate = torch.tensor(rates, dtype=torch.float64)
    return ((uniform >= rate) / (1 - rate)).float()


class DropPath:
    """Multiplies what each block's last batch norm gives, while it trains, by the factors in `keep`.

    Attributes:
        rates: of `block_rates`.
        keep: (B, blocks) of the batch that is next; None: every branch is taken as it is.
    """

    def __init__(self, network: nn.Module, rate: float) -> None:
        blocks = [module for module in network.modules() if isinstance(module, BasicBlock | Bottleneck)]
        self.rates = block_rates(rate, len(blocks))
        self.keep: Tensor | None = None
        for i, block in enumerate(blocks):
            last = block.bn3 if isinstance(block, Bottleneck) else block.bn2
            last.register_forward_hook(partial(self._scale, i))

    def _scale(self, i: int, norm: nn.Module, _, branch: Tensor) -> Tensor | None:
        """The hook of block i: (B, C, H, W) -> the same shape; None leaves it as it is."""
        if self.keep is None or not norm.training:
            return None
        return branch * self.keep[:, i, None, None, None].to(branch.dtype)
