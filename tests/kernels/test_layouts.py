"""Local attention gives the same for every memory layout, a fused projection, an empty batch; its inputs stay."""

import functools

import pytest
import torch

import oracle
from local_attention_cases import (
    CASES,
    LAYOUTS,
    NAMES,
    cast,
    channels_innermost,
    draw,
    each_backend,
    expected,
    gradients,
    options,
    packed,
    packed_innermost,
    skip_unless_taken,
)
from oracle import assert_close
from sasa.kernels import local_attention, local_attention_packed


@each_backend
@pytest.mark.parametrize("parameters", [CASES[0], CASES[9], CASES[13], CASES[16], CASES[22]])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_any_strides(layout, parameters, backend):
    inputs, direction = draw(*parameters)
    inputs, direction = cast(inputs, torch.float32), direction.float()
    skip_unless_taken(backend, inputs["query"], parameters[3])
    function = functools.partial(local_attention, **options(parameters, backend))
    for chosen in ({"query", "key", "value"}, {"query"}, {"key"}, {"value"}):  # one alone: mixed layouts in one call
        relaid = {n: layout(x) if n in chosen else x for n, x in inputs.items()}
        assert_close(gradients(function, relaid, layout(direction)), expected(parameters), 1e-5)


@each_backend
def test_expanded_inputs_and_gradients_of_stride_zero(backend):
    """sum() hands back a gradient of stride 0, and shared embeddings arrive expanded."""
    inputs, _ = draw(2, 2, 4, 3, 5, 7, "mask", True, True, 1.0)
    inputs = cast(inputs, torch.float32)
    inputs["rel_row"], inputs["rel_col"] = (inputs[n][:1].expand(2, -1, -1) for n in NAMES[3:])
    ones = torch.ones(()).expand(inputs["query"].shape)
    got = gradients(functools.partial(local_attention, kernel_size=3, backend=backend), inputs, ones)
    double = cast(inputs, torch.float64)
    wanted = gradients(functools.partial(oracle.local_attention, kernel_size=3), double, ones.double())
    assert_close(got, wanted, 1e-5)


@each_backend
def test_output_has_channels_innermost_where_query_has(backend):
    inputs, _ = draw(2, 2, 4, 3, 5, 7, "mask", True, True, 1.0)
    inputs = cast(inputs, torch.float32)
    out = local_attention(*inputs.values(), kernel_size=3, backend=backend)
    assert out.is_contiguous()
    inputs["query"] = channels_innermost(inputs["query"])
    out = local_attention(*inputs.values(), kernel_size=3, backend=backend)
    assert out.flatten(1, 2).is_contiguous(memory_format=torch.channels_last)


@each_backend
def test_inputs_are_not_changed_and_calls_repeat_bit_for_bit(backend):
    inputs, direction = draw(2, 2, 8, 7, 9, 10, "mask", True, True, 1.0)
    inputs = cast(inputs, torch.float32)
    before = {n: x.clone() for n, x in inputs.items()}
    function = functools.partial(local_attention, kernel_size=7, backend=backend)
    first, second = (gradients(function, inputs, direction) for _ in range(2))
    assert all(torch.equal(inputs[n], before[n]) for n in inputs)
    assert all(torch.equal(first[n], second[n]) for n in first)


@each_backend
def test_only_the_gradients_asked_for(backend):
    inputs, direction = draw(*CASES[0].values[0])
    inputs = cast(inputs, torch.float32)
    for name in NAMES:
        leaves = inputs | {name: inputs[name].clone().requires_grad_()}
        out = local_attention(*leaves.values(), kernel_size=3, backend=backend)
        (grad,) = torch.autograd.grad(out, leaves[name], direction.float())
        assert_close({name: grad}, {name: expected(CASES[0].values[0])[name]}, 1e-5)


@each_backend
def test_an_empty_batch(backend):
    inputs, direction = draw(1, 2, 4, 3, 5, 7, "mask", True, True, 1.0)
    inputs = cast(inputs, torch.float32) | {n: torch.zeros(0, 2, 4, 5, 7) for n in NAMES[:3]}
    got = gradients(functools.partial(local_attention, kernel_size=3, backend=backend), inputs, direction[:0])
    assert got["out"].shape == (0, 2, 4, 5, 7)
    assert not got["rel_row"].any()
    assert not got["rel_col"].any()


@each_backend
@pytest.mark.parametrize("layout", [packed, packed_innermost], ids=lambda f: f.__name__)
@pytest.mark.parametrize("parameters", [CASES[i] for i in (0, 2, 3, 4, 9, 14, 16, 22, 24)])
def test_a_fused_projection_gives_the_same_in_one_gradient(parameters, layout, backend):
    inputs, direction = draw(*parameters)
    inputs = cast(inputs, torch.float32)
    skip_unless_taken(backend, inputs["query"], parameters[3])
    names = [n for n in NAMES[:3] if inputs[n] is not None]
    fused_inputs = {"qkv": layout(inputs)} | {n: inputs[n] for n in NAMES[3:]}
    got = gradients(functools.partial(local_attention_packed, **options(parameters, backend)), fused_inputs, direction)
    parts = dict(zip(names, got.pop("qkv").unbind(1), strict=True))
    assert_close(got | parts, expected(parameters), 1e-5)
