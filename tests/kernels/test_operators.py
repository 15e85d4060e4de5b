"""The registered operators of local attention: opcheck, autocast and meta tensors."""

import functools

import pytest
import torch

from local_attention_cases import (
    NAMES,
    cast,
    channels_innermost,
    draw,
    each_backend,
    fused_innermost,
    gradients,
    packed,
    packed_innermost,
    skip_unless_taken,
    sliced,
)
from sasa.kernels import local_attention

OPERATOR_CASES = {
    "all": {},
    "no key": {"content": False},
    "no embeddings": {"embeddings": False},
    "zero border, even window": {"size": 4, "border": "zero"},
    "channels innermost": {"layout": channels_innermost},
    "slice of a fused product": {"layout": fused_innermost},
    "every other column": {"layout": sliced},
    "one pixel": {"height": 1, "width": 1, "layout": channels_innermost},
    "fp16": {"dtype": torch.float16},
}


def operator_arguments(backend, content=True, embeddings=True, size=3, border="mask", layout=None, height=5, width=6,
                       dtype=torch.float32):  # fmt: skip
    inputs = cast(draw(2, 2, 4, size, height, width, border, content, embeddings, 1.0)[0], dtype)
    if layout is not None:
        inputs = {n: layout(x) if n in NAMES[:3] and x is not None else x for n, x in inputs.items()}
    skip_unless_taken(backend, inputs["query"], size)
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs.values()]
    return (*leaves, size, border, 1.0, backend)


@each_backend
@pytest.mark.parametrize("which", OPERATOR_CASES)
def test_opcheck_of_the_operator(which, backend):
    arguments = operator_arguments(backend, **OPERATOR_CASES[which])
    torch.library.opcheck(torch.ops.sasa.local_attention.default, arguments)


@each_backend
@pytest.mark.parametrize("which", OPERATOR_CASES)
def test_opcheck_of_its_gradient(which, backend):
    arguments = operator_arguments(backend, **OPERATOR_CASES[which])
    inputs = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments[:5]]
    out, lse = torch.ops.sasa.local_attention(*inputs, *arguments[5:])
    arguments = (torch.randn_like(out), *inputs, out, lse, *arguments[5:])
    torch.library.opcheck(torch.ops.sasa.local_attention_backward.default, arguments)


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_narrows_the_inputs_and_nothing_inside(dtype, backend):
    """An operator's body still sees autocast: it must not reach the logits, which stay in fp32."""
    parameters = (1, 2, 16, 7, 9, 8, "mask", True, True, 1.0)
    inputs, direction = draw(*parameters)
    function = functools.partial(local_attention, kernel_size=7, backend=backend)
    narrow = cast(inputs, dtype)
    skip_unless_taken(backend, narrow["query"], 7)
    wanted = gradients(function, narrow, direction)

    def under_autocast(*tensors):
        with torch.autocast("cpu", dtype):
            return function(*tensors)

    got = gradients(under_autocast, cast(inputs, torch.float32), direction)
    assert got["out"].dtype == dtype
    assert all(x.dtype == torch.float32 for n, x in got.items() if n != "out")
    with torch.autocast("cpu", dtype):  # a backward inside autocast is unusual, and must give the same
        inside = gradients(function, narrow, direction)
    for name, value in wanted.items():
        assert torch.equal(got[name].to(dtype), value), name
        # The composite form's backward is PyTorch's own, which autocast narrows like any other.
        assert torch.equal(inside[name], value) or (backend == "composite" and name != "out"), name


def test_autocast_leaves_fp64_alone():
    inputs, _ = draw(1, 2, 4, 3, 5, 7, "mask", True, True, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        out = local_attention(*inputs.values(), kernel_size=3)
    assert torch.equal(out, local_attention(*inputs.values(), kernel_size=3))


def test_meta_tensors_give_shapes_without_arithmetic():
    inputs = {n: x.to("meta") for n, x in draw(2, 2, 4, 3, 5, 7, "mask", True, True, 1.0)[0].items()}
    out = local_attention(*inputs.values(), kernel_size=3)
    assert (out.device.type, out.shape, out.dtype) == ("meta", (2, 2, 4, 5, 7), torch.float64)


@each_backend
@pytest.mark.parametrize("layout", [packed, packed_innermost], ids=lambda f: f.__name__)
@pytest.mark.parametrize("content", [True, False])
def test_opcheck_of_a_fused_projection(content, layout, backend):
    inputs = cast(draw(2, 2, 4, 3, 5, 6, "mask", content, True, 1.0)[0], torch.float32)
    skip_unless_taken(backend, inputs["query"], 3)
    qkv, rows, cols = layout(inputs).requires_grad_(), *(inputs[n].requires_grad_() for n in NAMES[3:])
    options = (3, "mask", 1.0, backend)
    torch.library.opcheck(torch.ops.sasa.local_attention_packed.default, (qkv, rows, cols, *options))
    inputs = [x.detach() for x in (qkv, rows, cols)]
    out, lse = torch.ops.sasa.local_attention_packed(*inputs, *options)
    arguments = (torch.randn_like(out), *inputs, out, lse, *options)
    torch.library.opcheck(torch.ops.sasa.local_attention_packed_backward.default, arguments)
