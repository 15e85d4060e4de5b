"""The attention stem on CUDA: the host side of triton_stem_kernels.py, in fp32.

Only the image, the weights and, pooled, the places of the chosen values are kept between the passes; backward writes
one partial sum of the weights' gradients a program. Results repeat bit for bit, and there is no host synchronisation.

Shapes: B batch, C = 3 image channels, H x W image, N heads, D head width, S window side, M mixtures, P = S * S
positions of a window. Source: Ramachandran et al. 2019, section 3.3; the mathematics is in sasa/kernels/stem.py.
"""

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sasa.kernels import triton_backend
from sasa.kernels.reference import sum_windows
from sasa.kernels.triton_tiles import LARGEST, power

CHANNELS = 3
MAX_POSITIONS, MAX_MIXED, MAX_HEAD_DIM = 64, 48, 64  # of P, M * C and D: what a program's registers hold
# Padded to 64, all three need 106,496 bytes of shared memory in backward (Triton 3.8); compute capability 8.6, 8.9 and
# 12.0 have 101,376. With one of them at 32 it is 94,208 at most.
_HALF = 32
UNITS = 32  # blocks or pixels of a program, a lane each


def unsupported(channels: int, side: int, mixtures: int, head_dim: int, dtype: torch.dtype) -> str | None:
    """Why the kernel cannot take an image and weights of these sizes, or None."""
    if channels != CHANNELS:
        return f"it takes images of {CHANNELS} channels, got {channels}"
    if dtype != torch.float32:
        return f"it takes fp32, got {dtype}"
    if side * side > MAX_POSITIONS or mixtures * channels > MAX_MIXED or head_dim > MAX_HEAD_DIM:
        return f"it takes blocks up to 8, {MAX_MIXED // channels} mixtures and a head width of {MAX_HEAD_DIM}"
    if min(side * side, mixtures * channels, head_dim) > _HALF:
        return "blocks above 5, more than 10 mixtures and a head width above 32 together exceed a GPU's shared memory"
    return None


@functools.cache
def _kernels():
    from sasa.kernels import triton_stem_kernels

    triton_backend.load()  # repairs the interpreter where it is on
    return triton_stem_kernels


class Sizes(NamedTuple):
    """Of a call: what the kernels are compiled for, and the grid."""

    batch: int
    height: int
    width: int
    heads: int
    depth: int
    mixtures: int
    side: int
    sliding: bool
    units: tuple[int, int]  # rows and columns of blocks, or of pixels
    tiles: int  # programs an image

    @classmethod
    def of(cls, shape: tuple[int, ...], *, heads: int, depth: int, mixtures: int, side: int, sliding: bool) -> "Sizes":
        """Those of an image of `shape` (B, C, H, W)."""
        batch, _, height, width = shape
        step = 1 if sliding else side
        units = (-(-height // step), -(-width // step))
        tiles = -(-units[0] * units[1] // UNITS)
        return cls(batch, height, width, heads, depth, mixtures, side, sliding, units, tiles)

    @property
    def padded(self) -> tuple[int, int, int]:
        """DP, MC and PP: D, M * C and P padded to what a product takes."""
        sizes = (self.depth, self.mixtures * CHANNELS, self.side**2)
        return tuple(max(power(n), 16) for n in sizes)

    @property
    def programs(self) -> int:
        """Of a launch: a tile of an image each."""
        return self.batch * self.tiles

    @property
    def numbers(self) -> tuple[int, ...]:
        """The kernels' plain numbers."""
        return self.height, self.width, *self.units, self.tiles


def constants(sizes: Sizes, mask: bool, pooled: bool) -> dict[str, int]:
    """What both kernels are compiled for."""
    depth, mixed, positions = sizes.padded
    return {
        "N": sizes.heads, "D": sizes.depth, "M": sizes.mixtures, "S": sizes.side, "T": UNITS, "DP": depth, "MC": mixed,
        "PP": positions, "SLIDING": sizes.sliding, "MASK": mask, "POOLED": pooled,
    }  # fmt: skip


def warps(sizes: Sizes) -> int:
    """Of a program: as its matrices grow; with one for the paper's stem, backward would spill 576 bytes a thread."""
    return max(sizes.padded) // 8


def exceeded(shape: tuple[int, ...], strides: tuple[int, ...]) -> str | None:
    """Whether one image (B, C, H, W) spans more elements than 32-bit offsets reach, or None."""
    span = 1 + sum((n - 1) * stride for n, stride in zip(shape[1:], strides[1:], strict=True))
    return f"an image spans {span} elements in memory, it takes up to {LARGEST}" if span > LARGEST else None


def _sizes(weights: tuple[Tensor, Tensor, Tensor], x: Tensor, window: str, *maps: Tensor) -> Sizes:
    forms, mixture, weight = weights
    for y in (x, *maps):
        if reason := exceeded(y.shape, y.stride()):
            raise ValueError(f"the stem's triton kernel does not take this call: {reason}")
    heads, side = forms.shape[0], math.isqrt(mixture.shape[0])
    depth = weight.shape[1] // heads
    return Sizes.of(
        x.shape, heads=heads, depth=depth, mixtures=mixture.shape[1], side=side, sliding=window == "sliding"
    )


def _matrices(mixture: Tensor, sizes: Sizes) -> Tensor:
    """(P, M) -> MIX of the kernels, (C, MC, PP): mixture[p, m] at row m * C + c of the c-th matrix."""
    _, mixed, positions = sizes.padded
    matrices = torch.einsum("pm,ck->cmkp", mixture, torch.eye(CHANNELS, dtype=mixture.dtype, device=mixture.device))
    matrices = matrices.flatten(1, 2)  # (C, M * C, P)
    return F.pad(matrices, (0, positions - matrices.shape[2], 0, mixed - matrices.shape[1])).contiguous()


def _options(sizes: Sizes, border: str, pooled: bool) -> dict:
    launch = {"num_warps": warps(sizes), "num_stages": 1}
    return constants(sizes, border == "mask", pooled) | launch | triton_backend.compiler_options()


def forward(
    weights: tuple[Tensor, Tensor, Tensor],
    x: Tensor,
    window: str,
    border: str,
    out: Tensor,
    index: Tensor | None = None,
    signs: Tensor | None = None,
) -> Tensor | None:
    """Writes `out` (B, N * D, H, W).

    With `index` and `signs` (N * D), `out` is one value of each block, (B, N * D, ceil(H / S), ceil(W / S)): that whose
    product with the channel's sign is the largest, the first of equals. `index` (of its shape and strides) is that
    value's place in the block, and the mean and biased variance over the map are returned, (2, N * D) in fp64.

    Args:
        weights: forms (N, C, C), mixture (P, M), value_weight (M, N * D, C), as in sasa/kernels/stem.py, fp32.
        x: (B, C, H, W), fp32, any strides.

    Raises:
        ValueError: an image spans more memory than the kernel's offsets reach.
    """
    forms, mixture, weight = (y.contiguous() for y in weights)
    sizes, pooled = _sizes((forms, mixture, weight), x, window, out), index is not None
    moments = x.new_empty((sizes.programs, 2, weight.shape[1])) if pooled else None
    if out.numel():
        with triton_backend.device(x):
            _kernels().stem_forward_kernel[(sizes.programs,)](
                x, forms, _matrices(mixture, sizes), weight, signs, out, index, moments, *x.stride(), *out.stride(),
                *sizes.numbers, **_options(sizes, border, pooled),
            )  # fmt: skip
    return _moments(moments, sizes) if pooled else None


def _moments(partial: Tensor, sizes: Sizes) -> Tensor:
    """Mean and variance over all pixels from each program's mean and sum of squared deviations, in fp64."""
    if not sizes.programs:
        return partial.new_zeros((2, partial.shape[2]), dtype=torch.float64)
    means, squares = partial.double().unbind(1)  # (programs, N * D)
    count = _pixels(sizes, partial.device)[:, None]
    total = sizes.batch * sizes.height * sizes.width
    mean = (means * count).sum(0) / total
    variance = (squares + count * (means - mean).square()).sum(0) / total
    return torch.stack((mean, variance))


def _pixels(sizes: Sizes, device: torch.device) -> Tensor:
    """How many pixels the blocks of each program hold, in fp64: (programs,)."""

    def lengths(size: int, units: int) -> Tensor:
        return (size - sizes.side * torch.arange(units, device=device)).clamp(max=sizes.side)

    blocks = lengths(sizes.height, sizes.units[0])[:, None] * lengths(sizes.width, sizes.units[1])
    blocks = F.pad(blocks.flatten(), (0, sizes.tiles * UNITS - blocks.numel()))
    return blocks.unflatten(0, (sizes.tiles, UNITS)).sum(1).double().repeat(sizes.batch)


def backward(
    weights: tuple[Tensor, Tensor, Tensor],
    x: Tensor,
    window: str,
    border: str,
    grad_out: Tensor,
    grad_x: Tensor | None = None,
    index: Tensor | None = None,
    slopes: Tensor | None = None,
) -> list[Tensor]:
    """Gradients of the weights; that of x is written to `grad_x` unless it is None.

    With `index`, grad_out is of the chosen values; slopes (2, N * D) adds slopes[0] + slopes[1] * value at each pixel.

    Raises:
        ValueError: as `forward`.
    """
    forms, mixture, weight = (y.contiguous() for y in weights)
    if index is not None and grad_out.stride() != index.stride():
        grad_out = torch.empty_like(index).copy_(grad_out)
    sizes = _sizes((forms, mixture, weight), x, window, grad_out)
    if not grad_out.numel():
        return [torch.zeros_like(y) for y in (forms, mixture, weight)]
    _, mixed, positions = sizes.padded
    of_forms = x.new_empty((sizes.programs, *forms.shape))
    of_mix = x.new_empty((sizes.programs, mixed, positions))
    of_weight = x.new_empty((sizes.programs, *weight.shape))
    shares = None
    if grad_x is not None:
        shares = x.new_empty((sizes.batch, *sizes.units, CHANNELS, sizes.side, sizes.side))
    with triton_backend.device(x):
        _kernels().stem_backward_kernel[(sizes.programs,)](
            grad_out, index, slopes, x, forms, _matrices(mixture, sizes), weight, shares, of_forms, of_mix, of_weight,
            *grad_out.stride(), *x.stride(), *sizes.numbers,
            **_options(sizes, border, index is not None), IMAGE=shares is not None,
        )  # fmt: skip
    if shares is not None:
        shares = shares.permute(0, 3, 1, 2, 4, 5)  # (B, C, units_h, units_w, S, S)
        if sizes.sliding:
            grad_x.copy_(sum_windows(shares, sizes.side))
        else:
            grad_x.copy_(shares.transpose(3, 4).flatten(4, 5).flatten(2, 3)[..., : sizes.height, : sizes.width])
    rows = of_mix.sum(0)[: sizes.mixtures * CHANNELS, : sizes.side**2].unflatten(0, (sizes.mixtures, CHANNELS))
    return [of_forms.sum(0), rows.sum(1).t().contiguous(), of_weight.sum(0)]
