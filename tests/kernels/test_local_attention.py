"""Local attention as a function: every backend that is usable here against the equations as loops, on CPU tensors.

A backend that joins `kernels` is held to all of this without a change here; a call that it does not take is skipped
with the backend's own reason. The backends of GPUs are compared at the end of the file.
"""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from local_attention_cases import (
    BACKENDS,
    CASES,
    NAMES,
    case,
    cast,
    channels_innermost,
    draw,
    each_backend,
    each_backend_on_the_gpu,
    expected,
    gradients,
    options,
    skip_unless_taken,
)
from oracle import assert_close
from sasa import kernels
from sasa.kernels import dispatch, local_attention, local_attention_packed, reference
from sasa.kernels.interface import AttentionOptions, CallKind


@each_backend
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("parameters", CASES)
def test_output_and_gradients_match_the_loops(parameters, dtype, tolerance, backend):
    inputs, direction = draw(*parameters)
    inputs = cast(inputs, dtype)
    skip_unless_taken(backend, inputs["query"], parameters[3])
    got = gradients(functools.partial(local_attention, **options(parameters, backend)), inputs, direction)
    assert all(x.dtype == dtype for x in got.values())
    assert_close(got, expected(parameters), tolerance)


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("parameters", CASES)
def test_half_types_err_at_most_twice_as_much_as_plain_half_arithmetic(parameters, dtype, backend):
    inputs, direction = draw(*parameters)
    inputs, direction = cast(inputs, dtype), direction.to(dtype)
    skip_unless_taken(backend, inputs["query"], parameters[3])
    call = options(parameters, backend)
    got = gradients(functools.partial(local_attention, **call), inputs, direction)
    del call["backend"]
    plain = gradients(functools.partial(oracle.plain_local_attention, **call), inputs, direction)
    for name, exact in expected(parameters).items():
        assert got[name].dtype == dtype
        ours, theirs = (r[name].double() - exact for r in (got, plain))
        # One rounding of the result is what even an exact computation would have.
        rounding = torch.finfo(dtype).eps * exact.abs().max().item()
        assert ours.abs().max() <= 2 * theirs.abs().max() + rounding / 2, name


@each_backend
@pytest.mark.parametrize("parameters", CASES[:12:3])
def test_log_sum_exp_means_the_same_in_every_backend(parameters, backend):
    """Forward and backward may be of two backends, so what they hand over is part of the contract."""
    inputs, _ = draw(*parameters)
    inputs = cast(inputs, torch.float32)
    skip_unless_taken(backend, inputs["query"], parameters[3])
    arguments = (*inputs.values(), parameters[3], parameters[6], parameters[9])
    _, lse = torch.ops.sasa.local_attention(*arguments, backend)
    double = (*(None if x is None else x.double() for x in inputs.values()), *arguments[5:])
    wanted = reference.logits(*double[:2], *double[3:5], AttentionOptions(*double[5:])).flatten(-2).logsumexp(-1)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), wanted, atol=1e-5, rtol=1e-5)


# Larger than any tile, beside the reference, which the loops have proven: the loops would take minutes here.
LARGE = [
    case(2, 2, 8, 7, 19, 21),
    case(1, 2, 8, 7, 40, 33, "zero"),
    case(2, 8, 8, 7, 16, 16),
    case(1, 4, 16, 7, 28, 28),
    case(1, 2, 16, 5, 37, 17),
    case(2, 3, 32, 7, 14, 14),
    case(1, 3, 24, 3, 23, 19),
    case(3, 2, 64, 7, 7, 7),
    case(1, 1, 64, 9, 21, 18, "zero"),
    case(1, 2, 12, 4, 18, 25),
    case(1, 2, 8, 11, 26, 31),
    case(1, 2, 8, 7, 3, 41),
    case(1, 2, 8, 7, 41, 3),
    case(1, 2, 16, 7, 20, 20, content=False),
    case(1, 2, 10, 7, 20, 20, embeddings=False),
    case(2, 16, 4, 3, 10, 9),
]
FASTER = [p for p in BACKENDS if p.values[0] != "reference"] or [
    pytest.param("none", marks=pytest.mark.skip(reason="no backend beside the reference is registered"))
]


@functools.lru_cache(maxsize=2)  # the next tests ask for the same; all of them together would take a lot of memory
def expected_of_reference(parameters):
    return gradients(functools.partial(local_attention, **options(parameters, "reference")), *draw(*parameters))


@pytest.mark.parametrize("backend", FASTER)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("parameters", LARGE)
def test_larger_maps_match_the_reference(parameters, layout, backend, threads):
    threads(2)
    wanted = expected_of_reference(parameters)
    inputs, direction = draw(*parameters)
    inputs, direction = cast(inputs, torch.float32), direction.float()
    skip_unless_taken(backend, inputs["query"], parameters[3])
    if layout == "channels_last":
        inputs = inputs | {n: channels_innermost(inputs[n]) for n in NAMES[:3] if inputs[n] is not None}
        direction = channels_innermost(direction)
    got = gradients(functools.partial(local_attention, **options(parameters, backend)), inputs, direction)
    assert_close(got, wanted, 1e-5)


@each_backend
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.tuples(*(st.integers(1, n) for n in (2, 3, 6, 12, 12))),
    size=st.integers(1, 8),
    border=st.sampled_from(kernels.BORDERS),
    given_parts=st.sampled_from([(True, True), (True, False), (False, True)]),
)
def test_any_shape_matches_shifted_slices(backend, shape, size, border, given_parts):
    batch, heads, half_width, height, width = shape
    parameters = (batch, heads, 2 * half_width, size, height, width, border, *given_parts, 0.5)
    inputs, direction = draw(*parameters)
    call = options(parameters, backend)
    wanted = gradients(
        functools.partial(oracle.plain_local_attention, kernel_size=size, border=border, scale=0.5), inputs, direction
    )
    inputs = cast(inputs, torch.float32)
    if dispatch.module(backend).unsupported(CallKind.of(inputs["query"], size)) is None:
        assert_close(gradients(functools.partial(local_attention, **call), inputs, direction), wanted, 1e-5)


@pytest.mark.parametrize("parameters", [CASES[i] for i in (0, 1, 2, 4, 7, 16, 24)])
def test_gradcheck(parameters):
    inputs, _ = draw(*parameters)
    given_inputs = {n: x.requires_grad_() for n, x in inputs.items() if x is not None}

    def function(*tensors):
        full = dict.fromkeys(NAMES) | dict(zip(given_inputs, tensors, strict=True))
        return local_attention(*full.values(), **options(parameters, "reference"))

    assert torch.autograd.gradcheck(function, tuple(given_inputs.values()), fast_mode=True)


# ---- bad input -----------------------------------------------------------------------------------------------------

GOOD = {
    "query": torch.zeros(1, 2, 4, 3, 3),
    "key": torch.zeros(1, 2, 4, 3, 3),
    "value": torch.zeros(1, 2, 4, 3, 3),
    "rel_row": torch.zeros(2, 2, 3),
    "rel_col": torch.zeros(2, 2, 3),
    "kernel_size": 3,
}
BAD = {
    "rank": ({"query": torch.zeros(2, 4, 3, 3)}, ("query", "(2, 4, 3, 3)", "(B, N, D, H, W)")),
    "integer query": ({"query": torch.zeros(1, 2, 4, 3, 3).int()}, ("query", "int32", "floating")),
    "key's shape": ({"key": torch.zeros(1, 2, 4, 3, 2)}, ("key", "(1, 2, 4, 3, 2)", "(1, 2, 4, 3, 3)")),
    "value's shape": ({"value": torch.zeros(1, 1, 4, 3, 3)}, ("value", "(1, 1, 4, 3, 3)", "(1, 2, 4, 3, 3)")),
    "kernel_size": ({"kernel_size": 0}, ("kernel_size", "0", "at least 1")),
    "border": ({"border": "wrap"}, ("border", "'wrap'", "mask", "zero")),
    "backend": ({"backend": "magic"}, ("backend", "'magic'", "auto", "reference")),
    "scale nan": ({"scale": float("nan")}, ("scale=nan", "finite")),
    "scale beyond float32": ({"scale": -1e39}, ("scale=-1e+39", "3.4e+38")),
    "one embedding": ({"rel_col": None}, ("rel_row", "rel_col", "None")),
    "the other embedding": ({"rel_row": None}, ("rel_row", "rel_col", "None")),
    "no logits": ({"key": None, "rel_row": None, "rel_col": None}, ("key=None", "rel_row", "rel_col")),
    "odd head width": (
        {n: torch.zeros(1, 2, 3, 3, 3) for n in NAMES[:3]},
        ("query", "even", "3"),
    ),
    "rows' shape": ({"rel_row": torch.zeros(2, 2, 5)}, ("rel_row", "(2, 2, 3)", "(2, 2, 5)")),
    "columns' shape": ({"rel_col": torch.zeros(1, 2, 3)}, ("rel_col", "(2, 2, 3)", "(1, 2, 3)")),
    "key's dtype": ({"key": torch.zeros(1, 2, 4, 3, 3).double()}, ("key", "float64", "float32")),
    "rows' dtype": ({"rel_row": torch.zeros(2, 2, 3).half()}, ("rel_row", "float16", "float32")),
    "value's device": ({"value": torch.zeros(1, 2, 4, 3, 3, device="meta")}, ("value", "meta", "cpu")),
}


@pytest.mark.parametrize("which", BAD)
def test_bad_input(which):
    change, words = BAD[which]
    local_attention(**GOOD)
    with pytest.raises(ValueError) as error:
        local_attention(**GOOD | change)
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, f"{error.value} does not say {missing}"


@pytest.mark.parametrize("shape", [(1, 3, 4, 3, 3), (1, 4, 2, 4, 3, 3), (1, 1, 2, 4, 3, 3)], ids=str)
def test_bad_fused_projections(shape):
    with pytest.raises(ValueError) as error:
        local_attention_packed(torch.zeros(shape), None, None, kernel_size=3)
    assert all(word in str(error.value) for word in ("qkv", str(shape), "(B, 3 or 2, N, D, H, W)"))


# ---- GPU -----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@each_backend_on_the_gpu
@pytest.mark.parametrize("parameters", CASES)
def test_on_the_gpu_output_and_gradients_match_the_loops(parameters, backend):
    inputs, direction = draw(*parameters)
    inputs = {n: None if x is None else x.float().cuda() for n, x in inputs.items()}
    skip_unless_taken(backend, inputs["query"], parameters[3])
    got = gradients(functools.partial(local_attention, **options(parameters, backend)), inputs, direction.cuda())
    assert_close({n: x.cpu() for n, x in got.items()}, expected(parameters), 1e-5)


@pytest.mark.gpu
@each_backend_on_the_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_on_the_gpu_autocast_narrows_the_inputs_and_nothing_inside(dtype, backend):
    parameters = (1, 2, 16, 7, 9, 8, "mask", True, True, 1.0)
    inputs = {n: x.float().cuda() for n, x in draw(*parameters)[0].items()}
    skip_unless_taken(backend, inputs["query"].to(dtype), 7)
    function = functools.partial(local_attention, kernel_size=7, backend=backend)
    with torch.autocast("cuda", dtype):
        got = function(*inputs.values())
    assert got.dtype == dtype
    assert torch.equal(got, function(*cast(inputs, dtype).values()))
    exact = expected(parameters)["out"]
    assert (got.double().cpu() - exact).abs().max() < torch.finfo(dtype).eps * exact.abs().max()
