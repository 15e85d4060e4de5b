"""Units about the attention stem: whether it is right, and how long it takes beside the convolution stem.

A stem is all that stands before stage 1: attention or convolution, batch norm, ReLU and pool.
Shapes: B batch, H x W image, S side of the pool's blocks (1 where there is no pool).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model import make_stem
from tools.gpu.stage import Lab

CHANNELS = 64
# Of the largest value, or of 1 where that is smaller: as in the tests. fp32 inside, bf16 is rounded once at the end.
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 2**-6}
# The least distance of two values of which the larger leaves a pool, and of that one from 0.
CLEAR = {torch.float32: 1e-4, torch.bfloat16: 2**-5}
REPEATS = 3


class StemForm(NamedTuple):
    """A stem of ResNet: for images of a side, batches to compare and to time, and whether it pools 4 x 4 blocks."""

    name: str
    side: int
    compared: int
    timed: int
    pool: int

    def __str__(self) -> str:
        return f"stem {self.name} {self.side}x{self.side}"


STEMS = (StemForm("ImageNet", 224, 2, 128, 4), StemForm("small images", 32, 8, 512, 1))
DRY_STEMS = (StemForm("ImageNet", 9, 1, 1, 4), StemForm("small images", 6, 1, 1, 1))


def stem_forms(lab: Lab) -> tuple[StemForm, ...]:
    """The stems of this walk."""
    return DRY_STEMS if lab.dry else STEMS


def compare_stem(lab: Lab, form: StemForm, dtype: torch.dtype) -> dict:
    """Output, gradients of all parameters and running statistics against the layers in fp64; repeated bitwise.

    Raises:
        RuntimeError: a value is off, or repetitions differ.
    """
    torch.manual_seed(0)
    stem = attention_stem(form, lab.backend).to(lab.device).train()
    exact = attention_stem(form, "reference").to(lab.device, torch.float64).train()
    exact.load_state_dict(stem.state_dict())
    state = {name: value.clone() for name, value in stem.state_dict().items()}
    images = torch.randn(form.compared, 3, form.side, form.side, device=lab.device)
    images = images.contiguous(memory_format=torch.channels_last)
    pooled = -(-form.side // form.pool)
    direction = torch.randn(form.compared, CHANNELS, pooled, pooled, device=lab.device)
    direction *= is_clear(exact, images.double(), form.pool, CLEAR[dtype])
    expected = results(exact, images.double(), direction.double(), torch.float64)
    got = results(stem, images, direction, dtype)
    errors = {
        name: ((got[name].double() - x).abs().max() / x.abs().max().clamp(min=1.0)).item()
        for name, x in expected.items()
    }
    worst, limit = max(errors, key=errors.get), LIMITS[dtype]
    if not all(error <= limit for error in errors.values()):
        raise RuntimeError(f"{worst} is off by {errors[worst]:.2e} of its largest value, allowed are {limit:.0e}")
    for _ in range(REPEATS - 1):
        stem.load_state_dict(state)
        again = results(stem, images, direction, dtype)
        if not all(torch.equal(again[name], x) for name, x in got.items()):
            raise RuntimeError("a repetition gives other bits")
    return {"largest_error": errors[worst], "of": worst, "limit": limit, "repeats_bitwise": REPEATS}


def attention_stem(form: StemForm, backend: str) -> nn.Sequential:
    """The attention stem of this form."""
    return make_stem(CHANNELS, True, form.pool == 1, {"backend": backend})


def is_clear(stem: nn.Sequential, images: Tensor, pool: int, least: float) -> Tensor:
    """Where rounding cannot change which value leaves the pool and the ReLU: (B, C, ceil(H / S), ceil(W / S)).

    Elsewhere fp32 may send a gradient to another pixel than fp64 does, and both are right.
    """
    with torch.no_grad():
        layers = nn.Sequential(nn.Sequential(stem[0]), stem[1])  # one by one: nothing is fused
        statistics = {name: value.clone() for name, value in stem[1].state_dict().items()}
        values = layers(images)  # (B, C, H, W)
        stem[1].load_state_dict(statistics)
        rest = (-values.shape[-2] % pool, -values.shape[-1] % pool)
        values = nn.functional.pad(values, (0, rest[1], 0, rest[0]), value=float("-inf"))
        blocks = values.unfold(2, pool, pool).unfold(3, pool, pool).flatten(4)  # (B, C, H / S, W / S, S * S)
        largest, *others = blocks.topk(min(2, pool * pool), -1).values.unbind(-1)
        clear = largest.abs() > least
        return clear if not others else clear & (largest - others[0] > least)


def results(stem: nn.Sequential, images: Tensor, direction: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output and gradients of one step in training mode, and the running statistics after it."""
    stem.zero_grad()
    with torch.autocast(images.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = stem(images)
    out.backward(direction.to(out.dtype))
    grads = {f"grad {name}": parameter.grad.clone() for name, parameter in stem.named_parameters()}
    statistics = {name: x.clone() for name, x in stem.named_buffers() if x.is_floating_point()}
    return {"out": out.detach()} | grads | statistics


def time_stem(lab: Lab, form: StemForm) -> dict:
    """Forward and backward of both stems under autocast of bf16, the image's gradient left out."""
    batch = form.timed
    image_bytes = 4 * batch * 3 * form.side**2
    out_bytes = 2 * batch * CHANNELS * (-(-form.side // form.pool)) ** 2
    stems = {"attention": True, "conv": False}
    return {
        f"{name}_ms": 1e3 * lab.timer.seconds(lambda kind=kind: stem_step(lab, form, kind), image_bytes + out_bytes)
        for name, kind in stems.items()
    }


def stem_step(lab: Lab, form: StemForm, attention: bool) -> Callable[[], object]:
    """A call of forward and backward on buffers of its own."""
    options = {"backend": lab.backend} if attention else {}
    stem = make_stem(CHANNELS, attention, form.pool == 1, options)
    stem = stem.to(lab.device, memory_format=torch.channels_last).train()
    images = torch.randn(form.timed, 3, form.side, form.side, device=lab.device)
    images = images.contiguous(memory_format=torch.channels_last)
    parameters = list(stem.parameters())

    def step() -> tuple[Tensor, ...]:
        # Without its cache, which a captured graph would not fill again.
        with torch.autocast(lab.device.type, torch.bfloat16, cache_enabled=False):
            out = stem(images)
        return torch.autograd.grad(out, parameters, torch.ones_like(out))

    return step
