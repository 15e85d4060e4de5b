"""What the tests of local attention as a function share: backends, cases, inputs, layouts, and the loops' results."""

import functools
import types

import pytest
import torch

import oracle
from sasa import kernels
from sasa.kernels import dispatch
from sasa.kernels.interface import CallKind


def on(device):
    """Each backend as a parameter, skipped with its reason where it is not usable or takes no tensors of the device."""
    query = types.SimpleNamespace(device=torch.device(device), dtype=torch.float32, shape=torch.Size((1, 1, 2, 3, 3)))
    reasons = {
        n: reason or dispatch.module(n).unsupported(CallKind.of(query, 3)) for n, reason in kernels.backends().items()
    }
    return [
        pytest.param(name, marks=[pytest.mark.skip(reason=f"{name}: {reason}")] if reason else [])
        for name, reason in reasons.items()
    ]


BACKENDS = on("cpu")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_backend_on_the_gpu = pytest.mark.parametrize("backend", on("cuda") if torch.cuda.is_available() else BACKENDS)
NAMES = ("query", "key", "value", "rel_row", "rel_col")


def case(batch, heads, width, size, map_height, map_width, border="mask", content=True, embeddings=True, scale=1.0):
    label = f"B{batch}N{heads}D{width}-K{size}-{map_height}x{map_width}-{border}"
    label += "" if content else "-nokey"
    label += "" if embeddings else "-norel"
    label += "" if scale == 1.0 else f"-scale{scale}"
    return pytest.param(
        (batch, heads, width, size, map_height, map_width, border, content, embeddings, scale), id=label
    )


# Odd, prime, non-square, smaller than the window, single pixels, rows and columns; every K from 1 to 9 and 11.
CASES = [
    case(2, 2, 4, 3, 5, 7),
    case(1, 2, 4, 3, 5, 7, "zero"),
    case(2, 1, 8, 3, 4, 6, content=False),
    case(1, 2, 6, 3, 6, 4, "zero", content=False),
    case(2, 3, 2, 3, 5, 5, embeddings=False),
    case(1, 2, 5, 3, 3, 7, embeddings=False),  # without embeddings an odd head width is fine
    case(1, 1, 1, 3, 4, 4, "zero", embeddings=False),
    case(1, 2, 4, 7, 5, 3),  # the map is smaller than the window
    case(1, 2, 4, 7, 5, 3, "zero"),
    case(1, 2, 8, 7, 11, 13),
    case(1, 2, 8, 7, 8, 16, "zero"),
    case(1, 1, 32, 7, 7, 7),
    case(1, 1, 64, 5, 4, 4),
    case(1, 2, 16, 5, 1, 9),
    case(1, 2, 16, 5, 9, 1, "zero"),
    case(1, 1, 2, 1, 3, 4),
    case(1, 2, 2, 2, 4, 5),  # even windows reach one further ahead
    case(1, 1, 4, 4, 6, 5, "zero"),
    case(1, 2, 4, 6, 5, 7),
    case(1, 1, 4, 8, 6, 9),
    case(1, 1, 4, 9, 12, 10),
    case(1, 1, 4, 11, 5, 6),
    case(3, 2, 4, 3, 1, 1),
    case(1, 1, 2, 7, 1, 1, "zero"),
    case(1, 2, 4, 3, 5, 6, scale=0.25),
    case(1, 2, 4, 3, 5, 6, "zero", scale=2.0),
]


def draw(batch, heads, width, size, map_height, map_width, border, content, embeddings, scale):
    """The five inputs in fp64 and a direction for the gradient; every number is one that fp16 and bf16 also have."""
    generator = torch.Generator().manual_seed(size * 1000 + width)

    def numbers(*shape, std=1.0):
        return (torch.randn(*shape, generator=generator) * std).half().bfloat16().double()

    shape = (batch, heads, width, map_height, map_width)
    std = width**-0.25  # so that q.k and q.r have standard deviation 1, as at initialisation
    inputs = {
        "query": numbers(*shape, std=std),
        "key": numbers(*shape, std=std) if content else None,
        "value": numbers(*shape),
        "rel_row": numbers(heads, width // 2, size, std=std) if embeddings else None,
        "rel_col": numbers(heads, width // 2, size, std=std) if embeddings else None,
    }
    return inputs, numbers(*shape)


def gradients(function, inputs, direction):
    """Output and gradients by name of sum(direction * function(inputs)); inputs and direction keep their layout."""
    leaves = {n: None if x is None else x.detach().requires_grad_() for n, x in inputs.items()}
    out = function(*leaves.values())
    out.backward(direction.to(out.dtype))
    return {"out": out.detach()} | {n: x.grad for n, x in leaves.items() if x is not None}


@functools.cache
def expected(parameters):
    """What the loops say, once for all backends and dtypes."""
    size, border, scale = parameters[3], parameters[6], parameters[9]
    function = functools.partial(oracle.local_attention, kernel_size=size, border=border, scale=scale)
    return gradients(function, *draw(*parameters))


def options(parameters, backend):
    return {"kernel_size": parameters[3], "border": parameters[6], "scale": parameters[9], "backend": backend}


def skip_unless_taken(backend, query, kernel_size):
    reason = dispatch.module(backend).unsupported(CallKind.of(query, kernel_size))
    if reason is not None:
        pytest.skip(f"{backend} does not take this call: {reason}")


def cast(inputs, dtype):
    return {n: None if x is None else x.to(dtype) for n, x in inputs.items()}


def channels_innermost(x):
    """The same numbers, heads and channels innermost in memory, as a channels_last convolution makes them."""
    return x.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)


def sliced(x):
    """The same numbers as every other column of every other image of something larger."""
    room = x.new_full((2 * x.shape[0], *x.shape[1:4], 2 * x.shape[4]), float("nan"))
    room[::2, ..., ::2] = x
    return room[::2, ..., ::2]


def fused(x):
    """The same numbers as a slice of one product that holds queries, keys and values."""
    return torch.stack([torch.full_like(x, float("nan")), x, torch.full_like(x, float("nan"))], 1)[:, 1]


def fused_innermost(x):
    joined = torch.stack([x, torch.full_like(x, float("nan"))], 1).flatten(1, 3)  # (B, 2 * N * D, H, W)
    return joined.contiguous(memory_format=torch.channels_last).unflatten(1, (2, *x.shape[1:3])).unbind(1)[0]


def transposed(x):
    return x.transpose(-2, -1).contiguous().transpose(-2, -1)


LAYOUTS = [channels_innermost, sliced, fused, fused_innermost, transposed]


def packed(inputs):
    """Query, key (where there is one) and value as one fused projection (B, P, N, D, H, W)."""
    return torch.stack([inputs[n] for n in NAMES[:3] if inputs[n] is not None], 1)


def packed_innermost(inputs):
    joined = packed(inputs)
    inner = joined.flatten(1, 3).contiguous(memory_format=torch.channels_last)
    return inner.unflatten(1, joined.shape[1:4])
