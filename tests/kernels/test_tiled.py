"""kernels/tiled.py beside the reference: forced chunks and bands, NaN and inf, and the memory that it takes.

tests/kernels/test_local_attention.py holds every backend against the equations as loops; what is here is about tiles.
"""

import itertools

import pytest
import torch

from dispatch_modes import LargestStorage
from sasa.kernels import local_attention, reference, tiled
from sasa.kernels.interface import AttentionOptions

NAMES = ("out", "query", "key", "value", "rel_row", "rel_col")


def draw(batch, heads, head_dim, size, height, width, content=True, embeddings=True, dtype=torch.float64):
    def numbers(*shape):
        return torch.randn(*shape, dtype=dtype) * head_dim**-0.25

    shape = (batch, heads, head_dim, height, width)
    tables = [numbers(heads, head_dim // 2, size) if embeddings else None for _ in range(2)]
    return [numbers(*shape), numbers(*shape) if content else None, numbers(*shape), *tables], numbers(*shape)


def run(backend, inputs, direction, size, border, scale=1.0):
    """Output and gradients by name; None where the input is None."""
    options = AttentionOptions(size, border, scale)
    out, lse = backend.forward(*inputs, options)
    return dict(zip(NAMES, (out, *backend.backward(direction, *inputs, out, lse, options)), strict=True))


def assert_close(got, wanted, tolerance):
    for name, value in wanted.items():
        if value is None:
            assert got[name] is None
            continue
        # inf or NaN: in a gradient, a sum of several infinities depends on its order.
        assert torch.equal(got[name].isfinite(), value.isfinite()), name
        assert name != "out" or torch.equal(got[name].isnan(), value.isnan())
        error = (got[name].double() - value.double())[value.isfinite()].abs()
        largest = value[value.isfinite()].abs().max().item() if error.numel() else 1.0
        assert not error.numel() or error.max() <= tolerance * max(1.0, largest), name


# ---- tiles ---------------------------------------------------------------------------------------------------------

MAPS = [(17, 19), (24, 21), (28, 5), (3, 33), (15, 16), (7, 7), (1, 1)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("chunk", [1, tiled.CHUNK], ids=["smallest chunks", "chunks as shipped"])
@pytest.mark.parametrize(("height", "width"), MAPS, ids=[f"{h}x{w}" for h, w in MAPS])
def test_tiles_match_the_reference(height, width, chunk, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(tiled, "CHUNK", chunk)
    kinds = itertools.product((1, 4, 7, 11), ("mask", "zero"))
    for (size, border), (content, embeddings) in zip(kinds, [(True, True), (False, True), (True, False)] * 3):  # noqa: B905
        inputs, direction = draw(2, 2, 4, size, height, width, content, embeddings, dtype)
        wanted = run(reference, inputs, direction, size, border, 0.7)
        assert_close(run(tiled, inputs, direction, size, border, 0.7), wanted, tolerance)


def test_a_map_is_cut_as_documented():
    assert [tiled.cut(n, 7, halo=False).tile for n in (1, 14, 15, 16, 28, 32, 49, 56)] == [1, 14, 15, 8, 7, 8, 7, 8]
    assert tiled.cut(14, 7, halo=False).span == 14
    assert tiled.cut(14, 7, halo=True).span == 20
    assert tiled.cut(56, 7, halo=False).span == 14


@pytest.mark.parametrize("border", ["mask", "zero"])
@pytest.mark.parametrize(("height", "width"), [(5, 6), (3, 18)])
def test_gradcheck(height, width, border):
    inputs, _ = draw(1, 2, 4, 4, height, width)
    leaves = [x.requires_grad_() for x in inputs]

    def function(*tensors):
        return local_attention(*tensors, kernel_size=4, border=border, scale=0.5, backend="tiled")

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


def test_opcheck_of_tiles_with_halo():
    inputs, direction = draw(1, 2, 4, 3, 17, 18, dtype=torch.float32)
    torch.library.opcheck(
        torch.ops.sasa.local_attention.default, (*(x.requires_grad_() for x in inputs), 3, "mask", 1.0, "tiled")
    )
    inputs = [x.detach() for x in inputs]
    results = torch.ops.sasa.local_attention(*inputs, 3, "mask", 1.0, "tiled")
    arguments = (direction, *inputs, *results, 3, "mask", 1.0, "tiled")
    torch.library.opcheck(torch.ops.sasa.local_attention_backward.default, arguments)


def test_logits_of_ten_thousand():
    """One head of width 1 and no embeddings: q.k is exact in fp32, so softmax is all that can go wrong."""
    query = torch.full((1, 1, 1, 18, 18), 100.0)
    key = torch.randint(-100, 101, query.shape).float()
    inputs, direction = [query, key, torch.randn_like(query), None, None], torch.randn_like(query)
    double = [None if x is None else x.double() for x in inputs]
    wanted = run(reference, double, direction.double(), 5, "mask")
    assert_close(run(tiled, inputs, direction, 5, "mask"), wanted, 1e-5)


# ---- NaN and inf ---------------------------------------------------------------------------------------------------

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(("height", "width"), [(6, 7), (18, 9)], ids=["one tile", "tiles with halo"])
@pytest.mark.parametrize("border", ["mask", "zero"])
@pytest.mark.parametrize("number", [NAN, INF, -INF, 1e25], ids=str)
@pytest.mark.parametrize("which", [*range(6)], ids=["query", "key", "value", "rel_row", "rel_col", "gradient"])
def test_what_is_not_finite_stays_where_the_reference_has_it(which, number, border, height, width):
    """In fp32, 1e25 is finite and its products are not."""
    if which in (3, 4) and number == 1e25:
        pytest.skip("where a product with a table overflows depends on the order of the sum")
    inputs, direction = draw(1, 2, 4, 3, height, width, dtype=torch.float32)
    tensor = (*inputs, direction)[which]
    if which in (3, 4):
        tensor[0, 1, 0] = number
    else:
        tensor[0, 1, 2, 0, 0] = tensor[0, 0, 1, 4, 5] = number
    if number == 1e25:
        for x in (*inputs[:2], direction):
            x *= 1e15
    got, wanted = (run(backend, inputs, direction, 3, border) for backend in (tiled, reference))
    assert any(not x.isfinite().all() for x in wanted.values())
    assert_close(got, wanted, 1e-4)


# ---- memory --------------------------------------------------------------------------------------------------------


def memory(backend, side, size):
    """(bytes of the largest tensor made, bytes kept for backward), both over the bytes of one input map."""
    inputs, direction = draw(2, 4, 8, size, side, side, dtype=torch.float32)
    one_map = inputs[0].numel() * 4
    with LargestStorage() as made:
        run(backend, inputs, direction, size, "mask")
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    name = backend.__name__.rpartition(".")[2]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        local_attention(*(x.requires_grad_() for x in inputs), kernel_size=size, backend=name)
    return made.bytes / one_map, sum(kept.values()) / one_map


@pytest.mark.parametrize("side", [32, 56])
@pytest.mark.parametrize("size", [7, 9])
def test_nothing_of_windows_times_channels_is_made_or_kept(side, size, monkeypatch):
    monkeypatch.setattr(tiled, "CHUNK", 1 << 15)  # as on a map so large that a chunk of logits is little beside it
    made, kept = memory(tiled, side, size)
    assert made <= 2.0  # a map with its halo
    assert kept <= 4.5  # query, key, value, out; the log-sum-exp and the embeddings are small


def test_the_memory_test_sees_the_windows_of_the_reference():
    made, _ = memory(reference, 32, 7)
    assert made >= 49


def test_the_numbers_of_a_call_one_by_one_or_as_options():
    query, rel = torch.randn(1, 2, 4, 5, 6), torch.randn(2, 2, 3)
    ours = tiled.forward(query, query, query, rel, rel, 3, "zero", 0.5)
    wanted = tiled.forward(query, query, query, rel, rel, AttentionOptions(3, "zero", 0.5))
    other = tiled.forward(query, query, query, rel, rel, 3)
    assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True)) and not torch.equal(ours[0], other[0])
