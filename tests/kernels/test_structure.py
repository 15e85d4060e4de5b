"""What local attention must keep whatever the numbers: its heads, windows, shifts, transposes and borders."""

import functools
import itertools

import pytest
import torch

import oracle
from local_attention_cases import NAMES, cast, draw, each_backend, gradients, options, skip_unless_taken
from sasa import kernels
from sasa.kernels import local_attention


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
