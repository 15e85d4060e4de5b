"""The attention stem on CUDA: the host side of triton_stem_kernels.py, in fp32.

Only the image, the weights and, pooled, the places of the largest values are kept between the passes; backward writes
one partial sum of the weights' gradients a program. Results repeat bit for bit, and there is no host synchronisation.

Shapes: B batch, C = 3 image channels, H x W image, N heads, D head width, S window side, M mixtures, P = S * S
positions of a window. Source: Ramachandran et al. 2019, section 3.3; the mathematics is in sasa/kernels/stem.py.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sasa.kernels import triton_backend
from sasa.kernels.reference import sum_windows
from sasa.kernels.triton_tiles import power

CHANNELS = 3
MAX_POSITIONS, MAX_MIXED, MAX_HEAD_DIM = 64, 32, 64  # of P, M * C and D: what a program's registers hold
UNITS = 32  # blocks or pixels of a program, a lane each


def unsupported(channels: int, side: int, mixtures: int, head_dim: int, dtype: torch.dtype) -> str | None:
    """Why the kernel cannot take an image and weights of these sizes, or None."""
    if channels != CHANNELS:
        return f"it takes images of {CHANNELS} channels, got {channels}"
    if dtype != torch.float32:
        return f"it takes fp32, got {dtype}"
    if side * side > MAX_POSITIONS or mixtures * channels > MAX_MIXED or head_dim > MAX_HEAD_DIM:
        return f"it takes blocks up to 8, {MAX_MIXED // channels} mixtures and a head width of {MAX_HEAD_DIM}"
    return None


@functools.cache
def _kernels():
    from sasa.kernels import triton_stem_kernels

    triton_backend.load()  # repairs the interpreter where it is on
    return triton_stem_kernels


class _Plan:
    """Sizes of a call: what the kernels are compiled for, and the grid."""

    def __init__(self, x: Tensor, forms: Tensor, mixture: Tensor, weight: Tensor, window: str, border: str) -> None:
        self.batch, _, self.height, self.width = x.shape
        self.heads, (self.positions, self.mixtures) = forms.shape[0], mixture.shape
        self.side, self.depth = math.isqrt(self.positions), weight.shape[1] // self.heads
        self.sliding = window == "sliding"
        step = 1 if self.sliding else self.side
        self.units = (-(-self.height // step), -(-self.width // step))
        self.tiles = -(-self.units[0] * self.units[1] // UNITS)
        self.programs = self.batch * self.tiles
        padded = (max(power(n), 16) for n in (self.depth, self.mixtures * CHANNELS, self.positions))
        self.depth_padded, self.mixed, self.positions_padded = padded
        largest = max(self.depth_padded, self.mixed, self.positions_padded)
        self.constants = {
            "N": self.heads, "D": self.depth, "M": self.mixtures, "S": self.side, "T": UNITS,
            "DP": self.depth_padded, "MC": self.mixed, "PP": self.positions_padded, "SLIDING": self.sliding,
            "MASK": border == "mask", "num_warps": largest // 16, "num_stages": 1,
        }  # fmt: skip

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.height, self.width, *self.units, self.tiles

    def matrices(self, mixture: Tensor) -> Tensor:
        """(P, M) -> MIX of the kernels, (C, MC, PP): mixture[p, m] at row m * C + c of the c-th matrix."""
        spread = torch.einsum("pm,ck->cmkp", mixture, torch.eye(CHANNELS, dtype=mixture.dtype, device=mixture.device))
        spread = spread.flatten(1, 2)  # (C, M * C, P)
        return F.pad(spread, (0, self.positions_padded - self.positions, 0, self.mixed - spread.shape[1])).contiguous()


def forward(weights, x: Tensor, window: str, border: str, out: Tensor, index: Tensor | None = None) -> Tensor | None:
    """Writes `out` (B, N * D, H, W).

    With `index`, `out` is the largest value of each block (B, N * D, ceil(H / S), ceil(W / S)), `index` (of its shape
    and strides) that value's place in the block, and the mean and biased variance over the map are returned, (2, N * D)
    in fp64.

    Args:
        weights: forms (N, C, C), mixture (P, M), value_weight (M, N * D, C), as in sasa/kernels/stem.py, fp32.
        x: (B, C, H, W), fp32, any strides.
    """
    forms, mixture, weight = (y.contiguous() for y in weights)
    plan = _Plan(x, forms, mixture, weight, window, border)
    pooled = index is not None
    moments = x.new_empty((plan.programs, 2, weight.shape[1])) if pooled else None
    if out.numel():
        with triton_backend.device(x):
            _kernels().stem_forward_kernel[(plan.programs,)](
                x, forms, plan.matrices(mixture), weight, out, index, moments, *x.stride(), *out.stride(), *plan.sizes,
                **plan.constants, POOLED=pooled, **triton_backend.compiler_options(),
            )  # fmt: skip
    return _moments(moments, plan) if pooled else None


def _moments(partial: Tensor, plan: _Plan) -> Tensor:
    """Mean and variance over all pixels from each program's mean and sum of squared deviations, in fp64."""
    if not plan.programs:
        return partial.new_zeros((2, partial.shape[2]), dtype=torch.float64)
    means, squares = partial.double().unbind(1)  # (programs, N * D)
    count = _pixels(plan, partial.device)[:, None]
    total = plan.batch * plan.height * plan.width
    mean = (means * count).sum(0) / total
    variance = (squares + count * (means - mean).square()).sum(0) / total
    return torch.stack((mean, variance))


def _pixels(plan: _Plan, device: torch.device) -> Tensor:
    """How many pixels the blocks of each program hold, in fp64: (programs,)."""

    def lengths(size: int, units: int) -> Tensor:
        return (size - plan.side * torch.arange(units, device=device)).clamp(max=plan.side)

    blocks = lengths(plan.height, plan.units[0])[:, None] * lengths(plan.width, plan.units[1])
    blocks = F.pad(blocks.flatten(), (0, plan.tiles * UNITS - blocks.numel()))
    return blocks.unflatten(0, (plan.tiles, UNITS)).sum(1).double().repeat(plan.batch)


def backward(
    weights, x: Tensor, window: str, border: str, grad_out, grad_x=None, index=None, slopes=None
) -> list[Tensor]:
    """Gradients of the weights; that of x is written to `grad_x` unless it is None.

    With `index`, grad_out is of the largest values; slopes (2, N * D) adds slopes[0] + slopes[1] * value at each pixel.
    """
    forms, mixture, weight = (y.contiguous() for y in weights)
    plan = _Plan(x, forms, mixture, weight, window, border)
    if not grad_out.numel():
        return [torch.zeros_like(y) for y in (forms, mixture, weight)]
    if index is not None and grad_out.stride() != index.stride():
        grad_out = torch.empty_like(index).copy_(grad_out)
    of_forms = x.new_empty((plan.programs, *forms.shape))
    of_mix = x.new_empty((plan.programs, plan.mixed, plan.positions_padded))
    of_weight = x.new_empty((plan.programs, *weight.shape))
    shares = None
    if grad_x is not None:
        shares = x.new_empty((plan.batch, *plan.units, CHANNELS, plan.side, plan.side))
    with triton_backend.device(x):
        _kernels().stem_backward_kernel[(plan.programs,)](
            grad_out, index, slopes, x, forms, plan.matrices(mixture), weight, shares, of_forms, of_mix, of_weight,
            *grad_out.stride(), *x.stride(), *plan.sizes,
            **plan.constants, POOLED=index is not None, IMAGE=shares is not None, **triton_backend.compiler_options(),
        )  # fmt: skip
    if shares is not None:
        shares = shares.permute(0, 3, 1, 2, 4, 5)  # (B, C, units_h, units_w, S, S)
        if plan.sliding:
            grad_x.copy_(sum_windows(shares, plan.side))
        else:
            grad_x.copy_(shares.transpose(3, 4).flatten(4, 5).flatten(2, 3)[..., : plan.height, : plan.width])
    rows = of_mix.sum(0)[: plan.mixtures * CHANNELS, : plan.positions].unflatten(0, (plan.mixtures, CHANNELS))
    return [of_forms.sum(0), rows.sum(1).t().contiguous(), of_weight.sum(0)]
