"""`AttentionStem`: both windows, all values and borders against the loops; its structure, precision and errors."""

import functools
import itertools

import pytest
import torch

import oracle
from attention import AttentionStem
from oracle import assert_close
from sasa import kernels

SMALL = {"in_channels": 3, "out_channels": 8, "block_size": 4, "num_heads": 2, "num_mixtures": 3}
FORMS = [
    pytest.param({"window": window, "values": values, "border": border}, id=f"{window}-{values}-{border}")
    for window, values, border in itertools.product(
        ("block", "sliding"), ("mixture", "plain", "conv"), ("mask", "zero")
    )
]
# "same" padding of an even window is what the design asks for; that torch copies the input for it is no news.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


def run(function, x, parameters, direction):
    """Output and all gradients by name of sum(direction * function(x))."""
    for leaf in (x, *parameters.values()):
        leaf.grad = None
    out = function(x)
    out.backward(direction.to(out.dtype))
    return {"out": out.detach(), "x": x.grad} | {name: p.grad for name, p in parameters.items()}


def loops(stem, x, direction, dtype=torch.float64):
    """The equations from the stem's parameters, every step in `dtype`."""
    parameters = {name: p.detach().to(dtype).requires_grad_() for name, p in stem.named_parameters()}
    names = ("block_size", "window", "num_heads", "num_mixtures", "values", "border")
    function = functools.partial(oracle.stem, parameters=parameters, **{name: getattr(stem, name) for name in names})
    return run(function, x.detach().to(dtype).requires_grad_(), parameters, direction)


def ours(stem, x, direction, call=None):
    return run(stem if call is None else call, x.detach().requires_grad_(), dict(stem.named_parameters()), direction)


# ---- against the loops ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_matches_the_loops(form, dtype, tolerance):
    stem = AttentionStem(**SMALL, **form).to(dtype)
    x, direction = torch.randn(2, 3, 6, 5, dtype=dtype), torch.randn(2, 8, 6, 5)  # ragged both ways
    assert_close(ours(stem, x, direction), loops(stem, x, direction), tolerance)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (3, 2), (4, 8), (7, 4)], ids=str)
@pytest.mark.parametrize("form", FORMS[::2])
def test_awkward_sizes_match_the_loops(form, size):
    stem = AttentionStem(**SMALL, **form).double()
    x, direction = torch.randn(1, 3, *size, dtype=torch.float64), torch.randn(1, 8, *size)
    assert_close(ours(stem, x, direction), loops(stem, x, direction), 1e-10)


@pytest.mark.parametrize("block_size", [1, 2, 3, 5])
@pytest.mark.parametrize("form", FORMS)
def test_other_block_sizes_match_the_loops(form, block_size):
    stem = AttentionStem(**SMALL | {"block_size": block_size, "in_channels": 2}, **form).double()
    x, direction = torch.randn(1, 2, 5, 4, dtype=torch.float64), torch.randn(1, 8, 5, 4)
    assert_close(ours(stem, x, direction), loops(stem, x, direction), 1e-10)


@pytest.mark.parametrize("form", FORMS[::2])
def test_memory_formats_do_not_change_the_result(form):
    stem = AttentionStem(**SMALL, **form)
    x, direction = torch.randn(2, 3, 6, 7), torch.randn(2, 8, 6, 7)
    wanted = loops(stem, x, direction)
    room = torch.full((2, 3, 12, 7), float("nan"))
    room[:, :, ::2] = x
    for other in (x.to(memory_format=torch.channels_last), room[:, :, ::2], x.mT.contiguous().mT):
        assert_close(ours(stem, other, direction), wanted, 1e-5)


@pytest.mark.parametrize("form", FORMS[:12:2])
def test_gradcheck(form):
    stem = AttentionStem(**SMALL | {"block_size": 2, "out_channels": 4}, **form).double()
    x = torch.randn(1, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(stem, (x,), fast_mode=True)


# ---- structure -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", ["mixture", "plain"])
def test_a_pixel_reaches_its_own_block_only(values):
    stem = AttentionStem(**SMALL, values=values)
    x = torch.randn(1, 3, 10, 9)
    before = stem(x)
    for (y, c), block in {(2, 5): (slice(0, 4), slice(4, 8)), (9, 8): (slice(8, 10), slice(8, 9))}.items():
        changed = x.clone()
        changed[..., y, c] += 1
        wanted = torch.zeros(10, 9, dtype=torch.bool)
        wanted[block] = True
        assert torch.equal((stem(changed) != before).flatten(0, 1).any(0), wanted)


@pytest.mark.parametrize("values", ["mixture", "plain"])
def test_a_pixel_reaches_the_sliding_windows_that_hold_it_only(values):
    stem = AttentionStem(**SMALL, window="sliding", values=values)
    x = torch.randn(1, 3, 10, 9)
    before = stem(x)
    for y, c in ((4, 5), (0, 0), (9, 8)):
        changed = x.clone()
        changed[..., y, c] += 1
        wanted = torch.zeros(10, 9, dtype=torch.bool)
        wanted[max(0, y - 2) : y + 2, max(0, c - 2) : c + 2] = True  # windows reach 1 back and 2 ahead
        assert torch.equal((stem(changed) != before).flatten(0, 1).any(0), wanted)


def test_shifting_by_a_block_shifts_the_output_and_by_less_does_not():
    stem = AttentionStem(**SMALL)
    x = torch.randn(1, 3, 12, 12)
    torch.testing.assert_close(stem(x.roll((4, 8), (2, 3))), stem(x).roll((4, 8), (2, 3)))
    assert not torch.allclose(stem(x.roll(1, 2)), stem(x).roll(1, 2), atol=1e-2)
    stem = AttentionStem(**SMALL, window="sliding")
    moved, still = stem(x.roll(1, 2)), stem(x).roll(1, 2)
    torch.testing.assert_close(moved[:, :, 2:-2, 1:-2], still[:, :, 2:-2, 1:-2])


@pytest.mark.parametrize("window", ["block", "sliding"])
def test_plain_values_of_a_constant_image_are_constant_when_masked(window):
    x = torch.tensor([0.5, -1.0, 2.0]).view(1, 3, 1, 1).expand(1, 3, 6, 7)
    out = AttentionStem(**SMALL, window=window, values="plain")(x)
    torch.testing.assert_close(out, out[:, :, :1, :1].expand_as(out))
    out = AttentionStem(**SMALL, window=window, values="plain", border="zero")(x)
    assert not torch.allclose(out, out[:, :, :1, :1].expand_as(out), atol=1e-3)


@pytest.mark.parametrize("window", ["block", "sliding"])
def test_transposing_the_image_and_swapping_the_embeddings_transposes_the_output(window):
    stem = AttentionStem(**SMALL, window=window)
    x = torch.randn(1, 3, 6, 9)
    wanted = stem(x).mT
    assert not torch.allclose(stem(x.mT), wanted, atol=1e-3)
    stem.emb_row, stem.emb_col = stem.emb_col, stem.emb_row
    torch.testing.assert_close(stem(x.mT), wanted)


@pytest.mark.parametrize("window", ["block", "sliding"])
def test_heads_are_separate_and_share_the_mixture(window):
    stem = AttentionStem(**SMALL, window=window)
    x = torch.randn(1, 3, 8, 8)
    before = stem(x)
    for name in ("query", "key"):
        kept = getattr(stem, name).weight.data.clone()
        getattr(stem, name).weight.data[4:] += 1  # head 1 of 2
        moved = (stem(x) != before).flatten(2).any(-1)[0]
        assert moved.tolist() == [False] * 4 + [True] * 4
        getattr(stem, name).weight.data = kept
    for name in ("emb_row", "emb_col", "emb_mix"):
        kept = getattr(stem, name).data.clone()
        getattr(stem, name).data *= -2
        assert (stem(x) != before).flatten(2).any(-1).all()
        getattr(stem, name).data = kept


def test_the_value_matrices_lie_one_after_the_other():
    """Mixture-major: the first out_channels rows of `value` are matrix 0. With equal matrices the mixture drops out."""
    stem, plain = AttentionStem(**SMALL), AttentionStem(**SMALL, values="plain")
    state = plain.state_dict()
    stem.load_state_dict(state | {"value.weight": state["value.weight"].repeat(3, 1, 1, 1)}, strict=False)
    x = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(stem(x), plain(x))
    stem.emb_mix.data = torch.tensor([[0.0], [100.0], [0.0]]) * torch.ones(3, 4)
    stem.emb_row.data.fill_(1.0)
    stem.emb_col.data.fill_(0.0)
    chosen = torch.randn(8, 3, 1, 1)
    stem.value.weight.data[8:16] = chosen  # p is 1 for matrix 1 and 0 for the others, everywhere
    plain.value.weight.data = chosen
    torch.testing.assert_close(stem(x), plain(x))


# ---- parameters ----------------------------------------------------------------------------------------------------

PROJECTIONS = {"query.weight": (64, 3, 1, 1), "key.weight": (64, 3, 1, 1)}


@pytest.mark.parametrize("window", ["block", "sliding"])
@pytest.mark.parametrize(
    ("values", "shapes"),
    [
        ("mixture", {"value.weight": (256, 3, 1, 1), "emb_row": (16, 4), "emb_col": (16, 4), "emb_mix": (4, 16)}),
        ("plain", {"value.weight": (64, 3, 1, 1)}),
        ("conv", {"value.weight": (64, 3, 4, 4)}),
    ],
)
def test_parameters_are_pinned(values, shapes, window):
    stem = AttentionStem(values=values, window=window)
    assert {name: tuple(x.shape) for name, x in stem.state_dict().items()} == PROJECTIONS | shapes


@pytest.mark.parametrize(("channels", "heads"), [(64, 8), (64, 1)], ids=["D8", "D64"])
def test_logits_and_mixture_have_a_spread_of_one_at_initialisation(channels, heads):
    """Each of the two sums runs over a width of D: without care its spread would grow with it.

    Of the mixture's embeddings without the three channels that hold the grid.
    """
    draws = []
    for _ in range(40):
        stem = AttentionStem(3, channels, num_heads=heads)
        query, key = (p(torch.randn(1, 3, 12, 12)).unflatten(1, (heads, -1)) for p in (stem.query, stem.key))
        content = (query * key).sum(2)
        row, col, mix = stem.emb_row[3:], stem.emb_col[3:], stem.emb_mix[:, 3:]
        mixture = (row[:, None, :, None] + col[:, None, None, :]) * mix.t()[..., None, None]
        draws.append((content.var().item(), mixture.sum(0).var().item()))
    content, mixture = torch.tensor(draws).mean(0).sqrt()
    assert 0.7 < content < 1.4
    assert 0.7 < mixture < 1.4


# Mixtures -> the grid of their places over a window of 4 x 4.
GRIDS = {1: (1, 1), 2: (2, 1), 3: (3, 1), 4: (2, 2), 6: (3, 2), 7: (7, 1), 8: (4, 2), 16: (4, 4)}


@pytest.mark.parametrize("mixtures", GRIDS)
def test_each_mixture_starts_at_a_place_of_its_own(mixtures):
    """Without the normal channels, p is the softmax of -4 * squared distance in steps of the grid, by hand."""
    stem, (rows, columns) = AttentionStem(num_mixtures=mixtures).double(), GRIDS[mixtures]
    with torch.no_grad():
        for embedding in (stem.emb_row[3:], stem.emb_col[3:]):
            embedding.zero_()
    logits = torch.empty(4, 4, mixtures, dtype=torch.float64)
    for a, b, m in itertools.product(range(4), range(4), range(mixtures)):
        down = (a + 0.5) * rows / 4 - (m // columns + 0.5)
        right = (b + 0.5) * columns / 4 - (m % columns + 0.5)
        logits[a, b, m] = -4 * (down**2 + right**2)
    torch.testing.assert_close(stem._mixture(torch.ones(1)).unflatten(0, (4, 4)), logits.softmax(-1))


def test_with_a_mixture_for_each_position_each_starts_as_the_matrix_of_its_own():
    stem = AttentionStem(window="sliding", num_mixtures=16)
    assert torch.equal(stem._mixture(torch.ones(1)).argmax(1), torch.arange(16))


@pytest.mark.parametrize("heads", [32, 64], ids=["D2", "D1"])
def test_mixtures_of_heads_too_narrow_for_a_grid_start_at_random(heads):
    """A grid takes three channels."""
    torch.manual_seed(0)
    a, b = (AttentionStem(num_heads=heads).emb_mix for _ in range(2))
    assert a.shape == (4, 64 // heads) and (a != b).all() and 0.1 < a.std() < 2


def test_reset_parameters_draws_all_of_them_again():
    """But for the channels of the embeddings that hold the grid: those are the same again."""
    stem = AttentionStem()
    before = {name: p.clone() for name, p in stem.named_parameters()}
    with torch.no_grad():
        for p in stem.parameters():
            p.zero_()
    stem.reset_parameters()
    for name, p in stem.named_parameters():
        was, now = (x.t() if name == "emb_mix" else x for x in (before[name], p))
        grid = 3 if name.startswith("emb") else 0
        assert torch.equal(was[:grid], now[:grid]) and (was[grid:] != now[grid:]).all(), name


def test_a_stem_that_fully_shard_has_split_starts_as_a_whole_one(tmp_path):
    """fully_shard calls reset_parameters of modules whose parameters are DTensors."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        with torch.device("meta"):
            stem = AttentionStem(num_mixtures=8)
        fully_shard(stem, mesh=init_device_mesh("cpu", (1,)))
        stem.to_empty(device="cpu")
        stem.reset_parameters()
        whole = AttentionStem(num_mixtures=8)
        for name in ("emb_row", "emb_col"):
            assert torch.equal(getattr(stem, name).full_tensor()[:3], getattr(whole, name)[:3])
        assert torch.equal(stem.emb_mix.full_tensor()[:, :3], whole.emb_mix[:, :3])
        assert (stem.emb_mix.full_tensor()[:, 3:] != 0).all()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("form", FORMS)
def test_every_parameter_gets_a_finite_gradient_that_is_not_zero(form):
    stem = AttentionStem(**form)
    (stem(torch.randn(2, 3, 9, 8)) * torch.randn(2, 64, 9, 8)).sum().backward()
    for name, p in stem.named_parameters():
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().flatten(1).amax(1).min() > 0, name


# ---- precision, compile, export ------------------------------------------------------------------------------------


def check_against_yardstick(stem, call, x, dtype):
    """Errors against fp64 are at most twice those of the same equations with every step in `dtype`."""
    direction = torch.randn(1, 8, 5, 6).to(dtype)
    got, exact, plain = ours(stem, x, direction, call), loops(stem, x, direction), loops(stem, x, direction, dtype)
    assert got["out"].dtype == dtype
    for name, value in exact.items():
        error, allowed = ((r[name].double() - value).square().mean().sqrt() for r in (got, plain))
        assert error <= 2 * allowed, f"{name}: {error} against {allowed}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("form", FORMS[::2])
def test_autocast_errs_at_most_twice_as_much_as_plain_half_arithmetic(form, dtype):
    stem = AttentionStem(**SMALL, **form)

    def call(x):
        with torch.autocast("cpu", dtype):
            return stem(x)

    check_against_yardstick(stem, call, torch.randn(1, 3, 5, 6), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("form", FORMS[::2])
def test_half_stems_err_at_most_twice_as_much_as_plain_half_arithmetic(form, dtype):
    stem = AttentionStem(**SMALL, **form).to(dtype)
    check_against_yardstick(stem, stem, torch.randn(1, 3, 5, 6).to(dtype), dtype)


@pytest.mark.parametrize("form", FORMS[:10:2])  # but sliding conv: queries and keys are half tensors there
def test_logits_of_half_stems_are_not_rounded(form):
    """Logits of size 60, which a half type is off by 0.1 or more at: from the same half weights and pixels, a stem in
    bf16 and one in fp64 must part by the roundings of the values and weights only."""
    for seed in range(3):
        torch.manual_seed(seed)
        stem = AttentionStem(**SMALL, **form).to(torch.bfloat16)
        stem.query.weight.data *= 64
        x = torch.randn(2, 3, 8, 8).bfloat16()
        wide = AttentionStem(**SMALL, **form).double()
        wide.load_state_dict(stem.state_dict())
        wanted = wide(x.double())
        assert (stem(x).double() - wanted).norm() < torch.finfo(torch.bfloat16).eps * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("form", [f for f in FORMS if f.values[0]["values"] != "conv"])
def test_autocast_narrows_the_output_of_the_stem_and_nothing_inside(form, dtype):
    stem, x = AttentionStem(**SMALL, **form), torch.randn(2, 3, 6, 7)
    with torch.autocast("cpu", dtype):
        got = stem(x)
    assert torch.equal(got, stem(x).to(dtype))


@pytest.mark.parametrize("form", [FORMS[0], FORMS[4], FORMS[6], FORMS[10]])
def test_compiles_without_a_graph_break(form):
    torch._dynamo.reset()
    stem = AttentionStem(**SMALL, **form)
    compiled = torch.compile(stem, fullgraph=True, backend="aot_eager")
    x, direction = torch.randn(2, 3, 6, 7), torch.randn(2, 8, 6, 7)
    wanted = {name: value.double() for name, value in ours(stem, x, direction).items()}
    assert_close(ours(stem, x, direction, compiled), wanted, 1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(x), stem(x))


@pytest.mark.parametrize("form", [FORMS[0], FORMS[6], FORMS[10]])
def test_exports(form):
    stem = AttentionStem(**SMALL, **form).eval()
    x = torch.randn(2, 3, 6, 7)
    torch.testing.assert_close(torch.export.export(stem, (x,)).module()(x), stem(x))


@pytest.mark.parametrize("backend", ["auto", "tiled"])
@pytest.mark.parametrize("name", ["emb_row", "emb_col", "emb_mix"])
def test_tables_left_on_the_meta_device_are_refused(name, backend):
    """As load_state_dict(assign=True, strict=False) leaves them; products with them would be garbage without a word."""
    stem = AttentionStem(3, 8, num_heads=2, backend=backend)
    setattr(stem, name, torch.nn.Parameter(getattr(stem, name).detach().to("meta")))
    with pytest.raises(ValueError, match=f"{name} is on meta, the image on cpu"):
        stem(torch.randn(1, 3, 8, 8))


@pytest.mark.parametrize("form", FORMS[:12:2])
def test_meta_device_gives_shapes(form):
    with torch.device("meta"):
        out = AttentionStem(**form)(torch.empty(2, 3, 9, 8))
    assert (out.device.type, out.shape) == ("meta", (2, 64, 9, 8))


# ---- bad input -----------------------------------------------------------------------------------------------------

BAD = {
    "out_channels and heads": ({"out_channels": 10, "num_heads": 4}, ("out_channels", "10", "num_heads=4")),
    "no in_channels": ({"in_channels": 0}, ("in_channels", "0", "at least 1")),
    "no heads": ({"num_heads": 0}, ("num_heads", "0", "at least 1")),
    "block_size": ({"block_size": 0}, ("block_size", "0", "at least 1")),
    "num_mixtures": ({"num_mixtures": 0}, ("num_mixtures", "0", "at least 1")),
    "window": ({"window": "round"}, ("window", "'round'", "block", "sliding")),
    "values": ({"values": "dense"}, ("values", "'dense'", "mixture", "plain", "conv")),
    "border": ({"border": "wrap"}, ("border", "'wrap'", "mask", "zero")),
    "backend": ({"backend": "magic"}, ("backend", "'magic'", "auto", "reference")),
}


@pytest.mark.parametrize("which", BAD)
def test_bad_arguments(which):
    change, words = BAD[which]
    with pytest.raises(ValueError) as error:
        AttentionStem(**SMALL | change)
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, f"{error.value} does not say {missing}"


@pytest.mark.parametrize(
    ("shape", "words"),
    [((3, 8, 8), ("(3, 8, 8)", "(B, 3, H, W)")), ((2, 1, 8, 8), ("in_channels=3", "1"))],
    ids=["rank", "channels"],
)
def test_bad_inputs_at_forward(shape, words):
    with pytest.raises(ValueError) as error:
        AttentionStem()(torch.randn(shape))
    assert all(word in str(error.value) for word in words), error.value


def test_an_unusable_backend_is_refused_when_the_stem_is_made(monkeypatch):
    monkeypatch.setattr(kernels.reference, "unusable", lambda: "no compiler")
    with pytest.raises(ValueError, match=r"backend='reference'.*no compiler"):
        AttentionStem(backend="reference")
