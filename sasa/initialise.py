"""Initialisation that can be repeated module by module, as FSDP does for a network that was built on the meta device.

FSDP calls `reset_parameters` of each module, parents first. A convolution would then draw PyTorch's usual weights over
those of the layer or network that owns it, so its owner gives it a `reset_parameters` of its own.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

SHARPNESS = 4.0  # of the stem's mixtures at the start: at a neighbour's place a mixture weighs exp(-4) as much


def set_initialiser(module: nn.Module, initialise: Callable[..., None], **options) -> None:
    """From now on module.reset_parameters() is initialise(module, **options); the module is not initialised here.

    `initialise` is a function of a module's file, so that the module can be copied and pickled.
    """
    module.reset_parameters = partial(initialise, module, **options)


def normal_weight(module: nn.Module, std: float) -> None:
    """Normal weights of mean 0."""
    nn.init.normal_(module.weight, std=std)


def he_weight(module: nn.Module) -> None:
    """He et al. 2015, by fan-out: for a convolution before a ReLU."""
    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def zero_norm(module: nn.Module) -> None:
    """A batch norm that starts as the constant 0: the last one of a residual branch."""
    type(module).reset_parameters(module)
    nn.init.zeros_(module.weight)


@torch.no_grad()
def spread_mixtures(emb_row: Tensor, emb_col: Tensor, emb_mix: Tensor) -> None:
    """Each mixture of the attention stem starts at a place of its own in the window, on a grid over it.

    p(a, b, m) = softmax over m of (emb_row(a) + emb_col(b)) . emb_mix(m) is all that tells the places of a window
    apart, so mixtures that start alike leave the stem a blurred view of it (docs/recipes.md). Three channels hold the
    logits -SHARPNESS * (distance of (a, b) from the place of m, in steps of the grid)^2, up to what is equal for all m
    and so drops out; the others are normal, with logits of standard deviation 1, as are all where e is below 3.

    emb_row, emb_col: (e, S). emb_mix: (m, e). The grid has m places, as near a square as the divisors of m allow.
    """
    (width, side), mixtures = emb_row.shape, emb_mix.shape[0]
    like = {"device": emb_row.device, "dtype": emb_row.dtype}
    row, col, mix = (torch.randn(e.shape, **like) * (2 * width) ** -0.25 for e in (emb_row, emb_col, emb_mix))
    if width >= 3:
        columns = max(n for n in range(1, math.isqrt(mixtures) + 1) if mixtures % n == 0)
        rows = mixtures // columns
        places = torch.cartesian_prod(middles(rows), middles(columns)).to(**like)  # (m, 2)
        # -(a - r)^2 - (b - c)^2 is 2 a r + 2 b c - (r^2 + c^2), but for what is equal for all m.
        row[:3], col[:3], mix[:, :3] = 0, 0, 0
        row[0], col[1], row[2] = middles(side) * rows / side, middles(side) * columns / side, 1
        mix[:, :2], mix[:, 2] = 2 * SHARPNESS * places, -SHARPNESS * places.square().sum(1)
    for embedding, value in ((emb_row, row), (emb_col, col), (emb_mix, mix)):
        assign(embedding, value)


def middles(count: int) -> Tensor:
    """The middles of `count` steps in a row, from the row's centre: (count,), in steps."""
    return torch.arange(count) + 0.5 - count / 2


def assign(parameter: Tensor, value: Tensor) -> None:
    """Sets a parameter, also one that fully_shard has split among ranks (a DTensor); rank 0's value counts then."""
    if hasattr(parameter, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
    parameter.copy_(value)
