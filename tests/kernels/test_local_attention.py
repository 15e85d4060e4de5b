"""Local attention as a function: every backend that is usable here against the equations as loops, on CPU tensors.

A backend that joins `kernels` is held to all of this without a change here; a call that it does not take is skipped
with the backend's own reason. The backends of GPUs are compared at the end of the file.
"""

import functools
import itertools
import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from sasa import kernels
from sasa.kernels import dispatch, local_attention, local_attention_packed, reference
from sasa.kernels.interface import AttentionOptions, CallKind


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


def assert_close(got, wanted, tolerance):
    """Within `tolerance` of the largest value, and of 1 where all values are smaller."""
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert got[name].shape == value.shape, name
        error = (got[name].double() - value).abs().max().item()
        assert error <= tolerance * max(1.0, value.abs().max().item()), f"{name}: off by {error}"


# ---- against the loops ---------------------------------------------------------------------------------------------


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


# ---- layouts -------------------------------------------------------------------------------------------------------


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


def packed(inputs):
    """Query, key (where there is one) and value as one fused projection (B, P, N, D, H, W)."""
    return torch.stack([inputs[n] for n in NAMES[:3] if inputs[n] is not None], 1)


def packed_innermost(inputs):
    joined = packed(inputs)
    inner = joined.flatten(1, 3).contiguous(memory_format=torch.channels_last)
    return inner.unflatten(1, joined.shape[1:4])


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


@pytest.mark.parametrize("shape", [(1, 3, 4, 3, 3), (1, 4, 2, 4, 3, 3), (1, 1, 2, 4, 3, 3)], ids=str)
def test_bad_fused_projections(shape):
    with pytest.raises(ValueError) as error:
        local_attention_packed(torch.zeros(shape), None, None, kernel_size=3)
    assert all(word in str(error.value) for word in ("qkv", str(shape), "(B, 3 or 2, N, D, H, W)"))


# ---- structure -----------------------------------------------------------------------------------------------------


def structured(backend, size=3, height=7, width=9, border="mask", heads=3, head_dim=4):
    """Inputs of a small call in fp32, and the call itself as a function of inputs by name."""
    parameters = (1, heads, head_dim, size, height, width, border, True, True, 1.0)
    inputs = cast(draw(*parameters)[0], torch.float32)
    skip_unless_taken(backend, inputs["query"], size)
    return inputs, lambda values: local_attention(*values.values(), **options(parameters, backend))


@each_backend
@pytest.mark.parametrize("name", NAMES)
def test_a_heads_input_moves_all_and_only_that_heads_channels(name, backend):
    inputs, function = structured(backend)
    before = function(inputs)
    for head in range(3):
        changed = inputs | {name: inputs[name].clone()}
        index = (slice(None), head) if name in NAMES[:3] else (head,)
        changed[name][index] += torch.linspace(0.5, 1.5, changed[name][index].numel()).view_as(changed[name][index])
        moved = (function(changed) != before).flatten(3).any(-1)[0]  # (N, D)
        assert moved[head].all()
        assert not moved[[n for n in range(3) if n != head]].any()


@each_backend
@pytest.mark.parametrize("half", [0, 1], ids=["row", "column"])
def test_the_halves_of_the_query_meet_their_own_embedding(half, backend):
    """Queries that have only their row half must not see column embeddings, and the other way round."""
    inputs, function = structured(backend)
    masked = inputs["query"].clone()
    masked[:, :, 2 * (1 - half) : 2 * (1 - half) + 2] = 0
    inputs = inputs | {"query": masked}
    before = function(inputs)
    own, other = ("rel_row", "rel_col") if half == 0 else ("rel_col", "rel_row")
    assert (function(inputs | {own: inputs[own].flip(-1)}) - before).abs().amax((0, 2, 3, 4)).min() > 1e-3
    assert torch.equal(function(inputs | {other: inputs[other].flip(-1)}), before)


@each_backend
@pytest.mark.parametrize("size", [2, 3, 4, 7])
def test_a_pixel_changes_exactly_the_windows_that_hold_it(size, backend):
    inputs, function = structured(backend, size)
    before = function(inputs)
    back, ahead = (size - 1) // 2, size // 2
    for name, (y, x) in itertools.product(("key", "value"), ((3, 4), (0, 0), (6, 8), (2, 7))):
        changed = inputs | {name: inputs[name].clone()}
        changed[name][..., y, x] += 2
        moved = (function(changed) != before).flatten(0, 2).any(0)
        wanted = torch.zeros(7, 9, dtype=torch.bool)
        wanted[max(0, y - ahead) : y + back + 1, max(0, x - ahead) : x + back + 1] = True
        if name == "key" and size == 2:
            wanted[6, 8] = False  # the last corner's window is one pixel: its weight is 1 whatever the key
        assert torch.equal(moved, wanted), (name, y, x)
    changed = inputs | {"query": inputs["query"].clone()}
    changed["query"][..., 3, 4] += 2
    moved = (function(changed) != before).flatten(0, 2).any(0)
    assert moved.nonzero().tolist() == [[3, 4]]


@each_backend
@pytest.mark.parametrize("size", [3, 4])
@pytest.mark.parametrize("border", kernels.BORDERS)
def test_shifting_the_input_shifts_the_inside_of_the_output(border, size, backend):
    inputs, function = structured(backend, size, 10, 11, border)
    shifted = inputs | {n: inputs[n].roll((1, 2), (-2, -1)) for n in NAMES[:3]}
    back, ahead = (size - 1) // 2, size // 2
    inside = (..., slice(back + 1, 10 - ahead), slice(back + 2, 11 - ahead))
    torch.testing.assert_close(function(shifted)[inside], function(inputs).roll((1, 2), (-2, -1))[inside])


@each_backend
@pytest.mark.parametrize("size", [1, 3, 4, 7])
def test_constant_values_come_out_constant_when_masked_and_fade_at_the_border_otherwise(size, backend):
    inputs, function = structured(backend, size)
    inputs["value"] = torch.arange(1.0, 13.0).view(1, 3, 4, 1, 1).expand(1, 3, 4, 7, 9)
    torch.testing.assert_close(function(inputs), inputs["value"].contiguous())
    _, zero = structured(backend, size, border="zero")
    kept = zero(inputs) / inputs["value"]
    back, ahead = (size - 1) // 2, size // 2
    full = torch.zeros(7, 9, dtype=torch.bool)
    full[back : 7 - ahead, back : 9 - ahead] = True
    torch.testing.assert_close(kept[..., full], torch.ones_like(kept[..., full]))
    assert (kept[..., ~full] < 1 - 1e-4).all()


@each_backend
def test_transposing_the_input_and_swapping_the_embeddings_transposes_the_output(backend):
    inputs, function = structured(backend, 4, 5, 8)

    def swap_halves(x):
        return x.roll(x.shape[2] // 2, 2)

    swapped = {
        "query": swap_halves(inputs["query"]).transpose(-2, -1),
        "key": swap_halves(inputs["key"]).transpose(-2, -1),
        "value": inputs["value"].transpose(-2, -1),
        "rel_row": inputs["rel_col"],
        "rel_col": inputs["rel_row"],
    }
    torch.testing.assert_close(function(swapped).transpose(-2, -1), function(inputs))
    inputs["rel_col"] = inputs["rel_row"].flip(-1)  # the swap must matter, or the line above proves nothing
    assert not torch.allclose(function(swapped).transpose(-2, -1), function(inputs), atol=1e-3)


@each_backend
def test_batch_mates_do_not_matter(backend):
    inputs, _ = draw(3, 2, 4, 3, 5, 7, "mask", True, True, 1.0)
    inputs = cast(inputs, torch.float32)
    function = functools.partial(local_attention, kernel_size=3, backend=backend)
    alone = inputs | {n: inputs[n][1:2] for n in NAMES[:3]}
    torch.testing.assert_close(function(*alone.values())[0], function(*inputs.values())[1])


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_large_logits_stay_finite(dtype, backend):
    inputs, function = structured(backend)
    big = {n: (x * (60 if n in NAMES[:2] else 1)).to(dtype) for n, x in inputs.items()}
    skip_unless_taken(backend, big["query"], 3)
    got = gradients(lambda *v: function(dict(zip(NAMES, v, strict=True))), big, torch.ones_like(big["query"]))
    assert all(x.isfinite().all() for x in got.values())
    exact = oracle.local_attention(*cast(big, torch.float64).values(), kernel_size=3)
    assert (got["out"].double() - exact).abs().max() < (1e-3 if dtype == torch.float32 else 4e-3)


# ---- the operator --------------------------------------------------------------------------------------------------

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


# ---- backends ------------------------------------------------------------------------------------------------------


@pytest.fixture
def spy(monkeypatch):
    """A backend "spy" in front of the others that counts its calls; its `reason` and `refusal` can be set."""
    module = types.ModuleType("spy_backend")
    module.reason, module.refusal, module.calls = None, None, []
    module.unusable = lambda: module.reason
    module.unsupported = lambda kind: module.refusal

    def forward(*arguments):
        module.calls.append("forward")
        return reference.forward(*arguments)

    def backward(*arguments, **options):
        module.calls.append("backward")
        return reference.backward(*arguments, **options)

    module.forward, module.backward = forward, backward
    monkeypatch.setitem(sys.modules, "spy_backend", module)
    monkeypatch.setattr(dispatch, "MODULES", {"spy": "spy_backend", "reference": "sasa.kernels.reference"})
    return module


def small_call(backend="auto"):
    dispatch.forget()  # what the test changed since the last call
    inputs = draw(1, 1, 2, 3, 3, 3, "mask", True, True, 1.0)[0]
    leaves = [x.requires_grad_() for x in inputs.values()]
    local_attention(*leaves, kernel_size=3, backend=backend).sum().backward()


def test_backends_lists_each_with_none_or_a_reason(spy):
    assert kernels.backends() == {"spy": None, "reference": None}
    spy.reason = "no compiler"
    assert kernels.backends() == {"spy": "no compiler", "reference": None}


def test_auto_takes_the_first_backend_that_is_usable_and_takes_the_call(spy):
    small_call()
    assert spy.calls == ["forward", "backward"]
    spy.refusal = "maps of 3x3"
    small_call()
    spy.refusal, spy.reason = None, "no compiler"
    small_call()
    assert spy.calls == ["forward", "backward"]


def test_a_named_backend_serves_the_call(spy):
    small_call("reference")
    assert spy.calls == []
    small_call("spy")
    assert spy.calls == ["forward", "backward"]


def test_sasa_backend_replaces_auto_but_no_named_backend(spy, monkeypatch):
    monkeypatch.setenv("SASA_BACKEND", "reference")
    small_call()
    assert spy.calls == []
    small_call("spy")
    assert spy.calls == ["forward", "backward"]
    monkeypatch.setenv("SASA_BACKEND", "")
    small_call()
    assert len(spy.calls) == 4


def test_a_choice_is_made_once_for_each_kind_of_call(spy, monkeypatch):
    """Polling the backends and reading the environment at each forward and backward would cost host time."""
    polled = []
    spy.unsupported = polled.append
    query = torch.zeros(2, 1, 4, 3, 3)
    for _ in range(3):
        assert kernels.choose_backend(query, 3) == "spy"
    assert polled == [(torch.device("cpu"), torch.float32, 4, 3)]
    assert kernels.choose_backend(query[:1, ..., :2], 3) == "spy"  # batch and map do not count
    assert len(polled) == 1
    for kind in ((query.double(), 3), (query[:, :, :2], 3), (query, 5), (query.to("meta"), 3)):
        assert kernels.choose_backend(*kind) == "spy"
    assert len(polled) == 5
    monkeypatch.setenv("SASA_BACKEND", "reference")
    assert kernels.choose_backend(query, 3) == "spy"  # a process reads it once
    dispatch.forget()
    assert kernels.choose_backend(query, 3) == "reference"


def test_an_unknown_sasa_backend_is_named_as_what_it_is(spy, monkeypatch):
    """The caller passed no backend, so an error about `backend` alone would send him to the wrong place."""
    monkeypatch.setenv("SASA_BACKEND", "magic")
    with pytest.raises(ValueError) as error:
        small_call()
    assert all(word in str(error.value) for word in ("SASA_BACKEND", "magic", "spy", "reference"))


def test_an_unusable_backend_asked_for_by_name_says_why(spy, monkeypatch):
    spy.reason = "no compiler"
    with pytest.raises(ValueError, match=r"backend='spy'.*no compiler"):
        small_call("spy")
    monkeypatch.setenv("SASA_BACKEND", "spy")
    with pytest.raises(ValueError, match=r"spy.*no compiler"):
        small_call()


def test_a_backend_that_refuses_the_call_says_why(spy):
    spy.refusal = "kernel_size=3: up to 2"
    with pytest.raises(ValueError, match=r"backend='spy'.*kernel_size=3: up to 2"):
        small_call("spy")


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
