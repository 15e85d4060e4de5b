"""`LocalAttention2d`: the layer from its parameters against the loops, its switches, its initialisation, its errors."""

import copy
import functools
import io
import math

import pytest
import torch
from torch import nn

import attention
import oracle
from attention import LocalAttention2d
from oracle import assert_close
from sasa import kernels
from sasa.kernels import dispatch
from sasa.kernels.interface import CallKind

BASE = {"in_channels": 8, "out_channels": 12, "kernel_size": 3, "num_heads": 2}
SWITCHES = {
    "default": {},
    "K7": {"kernel_size": 7},
    "K2": {"kernel_size": 2},
    "K1": {"kernel_size": 1},
    "stride 2": {"stride": 2},
    "stride 3": {"stride": 3},
    "one head": {"num_heads": 1},
    "zero border": {"border": "zero"},
    "no content": {"content": False},
    "no content, zero border, stride 2": {"content": False, "border": "zero", "stride": 2},
    "absolute": {"position": "absolute"},
    "absolute, grouped, stride 2": {"position": "absolute", "grouped": True, "stride": 2},
    "no position": {"position": "none"},
    "grouped": {"grouped": True},
    "grouped, no content": {"grouped": True, "content": False},
    "shared embeddings": {"share_embeddings": True},
    "scale": {"scale": 0.5},
    "no position, scale, K4": {"position": "none", "scale": 2.0, "kernel_size": 4},
    "shared, grouped, zero border": {"share_embeddings": True, "grouped": True, "border": "zero"},
}


def oracle_options(layer):
    names = ("kernel_size", "num_heads", "stride", "position", "content", "border", "grouped", "share_embeddings")
    return {name: getattr(layer, name) for name in (*names, "scale")}


def parameters_of(layer, dtype=torch.float64):
    return {name: p.detach().to(dtype).requires_grad_() for name, p in layer.named_parameters()}


def run(function, x, parameters, direction):
    """Output and all gradients by name of sum(direction * function(x))."""
    out = function(x)
    for leaf in (x, *parameters.values()):
        leaf.grad = None
    out.backward(direction.to(out.dtype))
    return {"out": out.detach(), "x": x.grad} | {name: p.grad for name, p in parameters.items()}


def both(layer, x):
    """(what the layer gives, what the loops give in fp64 from the same parameters), outputs and gradients by name."""
    leaf = x.detach().requires_grad_()
    direction = torch.randn(layer(leaf).shape, dtype=torch.float64)
    ours = run(layer, leaf, dict(layer.named_parameters()), direction)
    parameters, wide = parameters_of(layer), x.detach().double().requires_grad_()
    loops = functools.partial(oracle.layer, parameters=parameters, **oracle_options(layer))
    return ours, run(loops, wide, parameters, direction)


# ---- against the loops ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("which", SWITCHES)
def test_every_switch_matches_the_loops(which, dtype, tolerance):
    layer = LocalAttention2d(**BASE | SWITCHES[which]).to(dtype)
    assert_close(*both(layer, torch.randn(2, 8, 5, 7, dtype=dtype)), tolerance)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", [(1, 1), (1, 6), (7, 1), (2, 2), (3, 8), (5, 5), (7, 4)], ids=str)
def test_awkward_sizes_match_the_loops(size, stride):
    layer = LocalAttention2d(4, 8, 5, num_heads=2, stride=stride).double()
    ours, wanted = both(layer, torch.randn(1, 4, *size, dtype=torch.float64))
    assert ours["out"].shape == (1, 8, math.ceil(size[0] / stride), math.ceil(size[1] / stride))
    assert_close(ours, wanted, 1e-10)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("height_width", [(5, 7), (1, 1), (1, 4)], ids=str)
def test_memory_formats_do_not_change_the_result(height_width, stride, grouped):
    layer = LocalAttention2d(8, 16, 3, num_heads=2, stride=stride, grouped=grouped)
    x = torch.randn(2, 8, *height_width)
    wanted = both(layer, x)[1]
    room = torch.full((4, 16, 3, *height_width), float("nan"))
    room[::2, ::2, 1] = x
    for other in (x.to(memory_format=torch.channels_last), room[::2, ::2, 1], x.mT.contiguous().mT):
        torch.manual_seed(1)
        ours, wanted = both(layer, other)
        assert_close(ours, wanted, 1e-5)
    layer = layer.to(memory_format=torch.channels_last)
    assert_close(*both(layer, x.to(memory_format=torch.channels_last)), 1e-5)


def test_channels_last_stays_channels_last():
    x = torch.randn(2, 8, 6, 5).to(memory_format=torch.channels_last)
    layer = LocalAttention2d(8, 16, 3, num_heads=2).to(memory_format=torch.channels_last)
    assert layer(x).is_contiguous(memory_format=torch.channels_last)
    assert layer(x.contiguous(memory_format=torch.channels_last)).stride() == layer(x).stride()


def test_an_empty_batch_passes():
    layer = LocalAttention2d(8, 16, 3, num_heads=2, stride=2)
    out = layer(torch.zeros(0, 8, 5, 7))
    out.sum().backward()
    assert out.shape == (0, 16, 3, 4)


@pytest.mark.parametrize("backend", [name for name, reason in kernels.backends().items() if reason is None])
def test_every_backend_gives_the_layer_the_same_result(backend):
    layer = LocalAttention2d(8, 16, 7, num_heads=2, stride=2, backend=backend)
    x = torch.randn(2, 8, 9, 6)
    if dispatch.module(backend).unsupported(CallKind.of(x.unflatten(1, (2, 4)), 7)) is not None:
        pytest.skip(f"{backend} does not take CPU tensors")
    assert_close(*both(layer, x), 1e-5)


# ---- switches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "shapes"),
    [
        ({}, {"query.weight": (16, 8, 1, 1), "key.weight": (16, 8, 1, 1), "value.weight": (16, 8, 1, 1)}),
        (
            {"grouped": True},
            {"query.weight": (16, 2, 1, 1), "key.weight": (16, 2, 1, 1), "value.weight": (16, 2, 1, 1)},
        ),
        ({"content": False}, {"query.weight": (16, 8, 1, 1), "value.weight": (16, 8, 1, 1)}),
    ],
    ids=["dense", "grouped", "no content"],
)
@pytest.mark.parametrize("shared", [False, True])
def test_parameters_are_pinned(options, shapes, shared):
    layer = LocalAttention2d(8, 16, 5, num_heads=4, share_embeddings=shared, **options)
    tables = 1 if shared else 4
    shapes = {"rel_row": (tables, 2, 5), "rel_col": (tables, 2, 5)} | shapes
    assert {name: tuple(x.shape) for name, x in layer.state_dict().items()} == shapes


@pytest.mark.parametrize("position", ["absolute", "none"])
def test_only_relative_positions_have_embeddings(position):
    layer = LocalAttention2d(8, 16, 5, num_heads=4, position=position)
    assert set(layer.state_dict()) == {"query.weight", "key.weight", "value.weight"}
    assert layer.rel_row is None
    assert layer.rel_col is None


def test_without_position_the_layer_cannot_see_where_a_neighbour_is():
    """Moving two neighbours within one window keeps the centre's output; relative and absolute positions tell."""
    x = torch.randn(1, 8, 3, 3)
    swapped = x.clone()
    swapped[..., 0, 0], swapped[..., 2, 1] = x[..., 2, 1], x[..., 0, 0]
    for position, same in (("none", True), ("relative", False), ("absolute", False)):
        layer = LocalAttention2d(8, 16, 3, num_heads=2, position=position)
        centre = layer(x)[..., 1, 1], layer(swapped)[..., 1, 1]
        assert torch.allclose(*centre, atol=1e-6) == same, position


def test_grouped_heads_see_only_their_own_input_channels():
    for grouped in (True, False):
        layer = LocalAttention2d(8, 16, 3, num_heads=4, grouped=grouped)
        x = torch.randn(1, 8, 5, 5)
        changed = x.clone()
        changed[:, 2:4] += 1  # the input channels of head 1
        moved = (layer(x) != layer(changed)).flatten(2).any(-1).view(4, 4).any(-1)
        assert moved.tolist() == [not grouped, True, not grouped, not grouped]


def test_every_head_reacts_to_its_row_and_its_column_embeddings():
    layer = LocalAttention2d(8, 16, 3, num_heads=4)
    x = torch.randn(1, 8, 6, 5)
    before = layer(x)
    for name in ("rel_row", "rel_col"):
        for head in range(4):
            changed = copy.deepcopy(layer)
            with torch.no_grad():
                getattr(changed, name)[head] += torch.tensor([1.0, -0.5, 0.25])
            moved = (changed(x) != before).flatten(2).any(-1).view(4, 4).all(-1)
            assert moved.tolist() == [n == head for n in range(4)]


def test_a_shared_table_is_the_same_as_equal_tables():
    shared = LocalAttention2d(8, 16, 3, num_heads=4, share_embeddings=True)
    equal = LocalAttention2d(8, 16, 3, num_heads=4)
    state = shared.state_dict()
    equal.load_state_dict(state | {n: state[n].expand(4, -1, -1) for n in ("rel_row", "rel_col")})
    x = torch.randn(2, 8, 5, 6)
    torch.testing.assert_close(shared(x), equal(x))


def test_scale_multiplies_the_logits():
    """scale = s is the same as queries that are s times as large."""
    plain, scaled = LocalAttention2d(8, 16, 3, num_heads=2), LocalAttention2d(8, 16, 3, num_heads=2, scale=0.3)
    state = plain.state_dict()
    scaled.load_state_dict(state)
    plain.load_state_dict(state | {"query.weight": 0.3 * state["query.weight"]})
    x = torch.randn(2, 8, 5, 6)
    torch.testing.assert_close(plain(x), scaled(x))


def test_stride_pools_the_map_of_stride_one():
    strided, plain = LocalAttention2d(8, 16, 3, num_heads=2, stride=2), LocalAttention2d(8, 16, 3, num_heads=2)
    plain.load_state_dict(strided.state_dict())
    x = torch.randn(1, 8, 4, 6)
    torch.testing.assert_close(strided(x), plain(x).unflatten(3, (3, 2)).unflatten(2, (2, 2)).mean((3, 5)))


def test_absolute_positions_are_fp64_for_fp64():
    code = attention.sinusoids(8, 5, 300, dtype=torch.float64, device=torch.device("cpu"))
    assert code.dtype == torch.float64
    assert (code - oracle.position_code(8, 5, 300)).abs().max() < 1e-12


def test_options_show_in_the_repr():
    shown = repr(LocalAttention2d(8, 16, 5, num_heads=2, stride=2, border="zero", scale=0.5))
    assert all(word in shown for word in ("8, 16", "kernel_size=5", "num_heads=2", "stride=2", "zero", "scale=0.5"))
    assert "grouped" not in shown.splitlines()[0]


# ---- initialisation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"grouped": True}, {"scale": 0.125}], ids=["dense", "grouped", "scaled"])
@pytest.mark.parametrize("head_dim", [8, 64])
def test_logits_have_a_spread_of_one_at_initialisation(head_dim, options):
    """Not divided by sqrt(D), so weights of the usual 1/sqrt(C) would give q.k a spread of 2.8 at D=8 and 8 at D=64."""
    layer = LocalAttention2d(8 * head_dim, 8 * head_dim, 7, num_heads=8, **options)
    x = torch.randn(8, 8 * head_dim, 16, 16)
    query, key, value = (p(x).unflatten(1, (8, head_dim)) for p in (layer.query, layer.key, layer.value))
    content = layer.scale * (query * key.roll((1, 1), (-2, -1))).sum(2)  # of each pixel with a neighbour
    relative = torch.cat((layer.rel_row[:, :, 2], layer.rel_col[:, :, 4]), 1)
    position = layer.scale * (query * relative[:, :, None, None]).sum(2)
    assert 0.85 < content.std() < 1.15
    assert 0.7 < position.std() < 1.4  # one vector a head: fewer draws
    assert 0.9 < value.std() < 1.1


@pytest.mark.parametrize("head_dim", [8, 64])
def test_attention_is_neither_flat_nor_saturated_at_initialisation(head_dim):
    """The effective number of neighbours, exp(entropy), of the 49: about 49 / e for logits of variance 2."""
    layer = LocalAttention2d(8 * head_dim, 8 * head_dim, 7, num_heads=8)
    x = torch.randn(2, 8 * head_dim, 12, 12)
    query, key = (p(x).unflatten(1, (8, head_dim)) for p in (layer.query, layer.key))
    attn = kernels.reference.attention_weights(query, key, layer.rel_row, layer.rel_col, 7, "zero").flatten(-2)
    inside = attn[:, :, 3:-3, 3:-3]
    neighbours = (-(inside * inside.clamp_min(1e-30).log()).sum(-1)).exp().mean()
    assert 12 < neighbours < 35


def test_embedding_std_replaces_the_spread_of_the_embeddings_only():
    layer = LocalAttention2d(64, 64, 7, num_heads=8, embedding_std=0.02)
    assert 0.015 < layer.rel_row.std() < 0.025
    assert 0.015 < layer.rel_col.std() < 0.025
    assert 0.06 < layer.query.weight.std() < 0.09  # 8**-0.25 / 8
    assert not LocalAttention2d(64, 64, 7, embedding_std=0.0).rel_row.any()


def test_reset_parameters_draws_all_of_them_again():
    layer = LocalAttention2d(8, 16, 3, num_heads=2)
    before = {name: p.clone() for name, p in layer.named_parameters()}
    layer.reset_parameters()
    assert all((p != before[name]).all() for name, p in layer.named_parameters())
    torch.manual_seed(3)
    first = LocalAttention2d(8, 16, 3, num_heads=2).state_dict()
    torch.manual_seed(3)
    layer.reset_parameters()
    assert not any(p.isnan().any() for p in first.values())
    with torch.device("meta"):
        layer = LocalAttention2d(8, 16, 3, num_heads=2)
    layer.to_empty(device="cpu").reset_parameters()
    assert layer(torch.randn(1, 8, 4, 4)).isfinite().all()


# ---- precision -----------------------------------------------------------------------------------------------------

PRECISION = {name: SWITCHES[name] for name in ("default", "stride 2", "zero border", "no content", "grouped")}


def low_precision_yardstick(layer, x, direction, dtype):
    """All of the layer in `dtype`, every intermediate rounded: what plain low-precision PyTorch gives."""
    parameters = parameters_of(layer, dtype)
    loops = functools.partial(oracle.layer, parameters=parameters, **oracle_options(layer))
    return run(loops, x.detach().to(dtype).requires_grad_(), parameters, direction)


def check_against_yardstick(layer, call, x, dtype):
    """Errors of `call` against fp64 are at most twice those of plain `dtype` arithmetic, output and all gradients."""
    leaf = x.detach().requires_grad_()
    direction = torch.randn(call(leaf).shape).to(dtype)
    ours = run(call, leaf, dict(layer.named_parameters()), direction)
    parameters, wide = parameters_of(layer), x.detach().double().requires_grad_()
    loops = functools.partial(oracle.layer, parameters=parameters, **oracle_options(layer))
    exact = run(loops, wide, parameters, direction)
    plain = low_precision_yardstick(layer, x, direction, dtype)
    assert ours["out"].dtype == dtype
    for name, value in exact.items():
        error, allowed = ((r[name].double() - value).square().mean().sqrt() for r in (ours, plain))
        assert error <= 2 * allowed, f"{name}: {error} against {allowed}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("which", PRECISION)
def test_autocast_errs_at_most_twice_as_much_as_plain_half_arithmetic(which, dtype):
    layer = LocalAttention2d(**BASE | PRECISION[which])

    def call(x):
        with torch.autocast("cpu", dtype):
            return layer(x)

    check_against_yardstick(layer, call, torch.randn(2, 8, 5, 6), dtype)
    assert all(p.dtype == torch.float32 == p.grad.dtype for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("which", PRECISION)
def test_half_layers_err_at_most_twice_as_much_as_plain_half_arithmetic(which, dtype):
    layer = LocalAttention2d(**BASE | PRECISION[which]).to(dtype)
    check_against_yardstick(layer, layer, torch.randn(2, 8, 5, 6).to(dtype), dtype)


@pytest.mark.parametrize("position", attention.POSITIONS)
def test_half_inputs_of_an_fp32_layer_pass_under_autocast(position):
    layer = LocalAttention2d(8, 16, 3, num_heads=2, position=position)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(1, 8, 4, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


# ---- compile, export, copies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["default", "absolute, grouped, stride 2", "no content", "shared embeddings"])
def test_compiles_without_a_graph_break(which):
    torch._dynamo.reset()
    layer = LocalAttention2d(**BASE | SWITCHES[which])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    direction = torch.randn(layer(torch.zeros(2, 8, 5, 7)).shape)
    for x in (torch.randn(2, 8, 5, 7), torch.randn(2, 8, 5, 7).to(memory_format=torch.channels_last)):
        ours, eager = (
            run(
                f,
                x.clone(memory_format=torch.preserve_format).requires_grad_(),
                dict(layer.named_parameters()),
                direction,
            )
            for f in (compiled, layer)
        )
        assert_close(ours, {name: value.double() for name, value in eager.items()}, 1e-6)


def test_compiles_under_autocast_and_for_new_sizes():
    torch._dynamo.reset()
    layer = LocalAttention2d(8, 16, 3, num_heads=2, stride=2)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((5, 7), (6, 6), (9, 4)):
        x = torch.randn(2, 8, *size)
        with torch.autocast("cpu", torch.bfloat16):
            got, wanted = compiled(x), layer(x)
        assert got.dtype == wanted.dtype == torch.bfloat16
        torch.testing.assert_close(got, wanted)
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("position", attention.POSITIONS)
def test_exports(position):
    layer = LocalAttention2d(8, 16, 3, num_heads=2, stride=2, position=position).eval()
    x = torch.randn(2, 8, 6, 7)
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), layer(x))
    assert any("sasa.local_attention" in str(node.target) for node in program.graph.nodes)


def test_exports_with_a_free_batch_and_saves():
    layer = LocalAttention2d(8, 16, 3, num_heads=2).eval()
    free = ({0: torch.export.Dim("batch", max=2**20)},)  # torch 2.6 wants a largest value
    program = torch.export.export(layer, (torch.randn(2, 8, 6, 7),), dynamic_shapes=free)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    x = torch.randn(5, 8, 6, 7)
    torch.testing.assert_close(torch.export.load(file).module()(x), layer(x))


def test_meta_device_gives_shapes():
    with torch.device("meta"):
        layer = LocalAttention2d(8, 16, 3, num_heads=2, stride=2)
        out = layer(torch.empty(2, 8, 5, 7))
    assert (out.device.type, out.shape) == ("meta", (2, 16, 3, 4))


def test_a_copy_is_equal_and_separate():
    layer = LocalAttention2d(8, 16, 3, num_heads=2)
    x = torch.randn(1, 8, 4, 5)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))
    nn.init.zeros_(twin.value.weight)
    assert not torch.equal(twin(x), layer(x))


# ---- bad input -----------------------------------------------------------------------------------------------------

BAD = {
    "in_channels and heads": ({"in_channels": 9}, ("in_channels", "9", "num_heads=2")),
    "out_channels and heads": ({"out_channels": 15}, ("out_channels", "15", "num_heads=2")),
    "no in_channels": ({"in_channels": 0}, ("in_channels", "0", "at least 1")),
    "negative out_channels": ({"out_channels": -2}, ("out_channels", "-2", "at least 1")),
    "no heads": ({"num_heads": 0}, ("num_heads", "0", "at least 1")),
    "odd head width": ({"out_channels": 6}, ("out_channels", "6", "num_heads=2", "3", "even", "relative")),
    "kernel_size 0": ({"kernel_size": 0}, ("kernel_size", "0", "at least 1")),
    "negative kernel_size": ({"kernel_size": -3}, ("kernel_size", "-3", "at least 1")),
    "kernel_size no integer": ({"kernel_size": 3.5}, ("kernel_size", "3.5", "integer")),
    "stride 0": ({"stride": 0}, ("stride", "0", "at least 1")),
    "border": ({"border": "reflect"}, ("border", "'reflect'", "mask", "zero")),
    "position": ({"position": "learned"}, ("position", "'learned'", "relative", "absolute", "none")),
    "backend": ({"backend": "magic"}, ("backend", "'magic'", "auto", "reference")),
    "no logits": ({"content": False, "position": "none"}, ("content=False", "position='none'", "relative")),
    "absolute channels": ({"in_channels": 6, "position": "absolute"}, ("in_channels", "6", "multiple of 4")),
    "scale 0": ({"scale": 0.0}, ("scale", "0", "above 0")),
    "scale nan": ({"scale": float("nan")}, ("scale", "nan", "finite")),
    "scale beyond float32": ({"scale": 1e39}, ("scale", "1e+39", "3.4e+38")),
    "embedding_std": ({"embedding_std": -1.0}, ("embedding_std", "-1", "at least 0")),
}


@pytest.mark.parametrize("which", BAD)
def test_bad_arguments(which):
    change, words = BAD[which]
    LocalAttention2d(**BASE)
    with pytest.raises(ValueError) as error:
        LocalAttention2d(**BASE | change)
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, f"{error.value} does not say {missing}"


def test_an_odd_head_width_is_fine_without_relative_embeddings():
    assert LocalAttention2d(8, 6, 3, num_heads=2, position="none")(torch.randn(1, 8, 4, 4)).shape == (1, 6, 4, 4)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((8, 5, 5), ("(8, 5, 5)", "(B, 8, H, W)")),
        ((1, 8, 5, 5, 5), ("(1, 8, 5, 5, 5)", "(B, 8, H, W)")),
        ((2, 6, 5, 5), ("in_channels=8", "6")),
    ],
    ids=["rank 3", "rank 5", "channels"],
)
def test_bad_inputs_at_forward(shape, words):
    with pytest.raises(ValueError) as error:
        LocalAttention2d(**BASE)(torch.randn(shape))
    assert all(word in str(error.value) for word in words), error.value


def test_an_unusable_backend_is_refused_when_the_layer_is_made(monkeypatch):
    monkeypatch.setattr(kernels.reference, "unusable", lambda: "no compiler")
    with pytest.raises(ValueError, match=r"backend='reference'.*no compiler"):
        LocalAttention2d(**BASE, backend="reference")


# ---- GPU -----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("which", PRECISION)
def test_on_the_gpu_the_layer_matches_the_loops(which):
    layer = LocalAttention2d(**BASE | PRECISION[which]).double()
    x = torch.randn(2, 8, 6, 7, dtype=torch.float64)
    ours, wanted = both(layer, x)
    direction = torch.randn(ours["out"].shape, dtype=torch.float64)
    wanted = run(layer, x.clone().requires_grad_(), dict(layer.named_parameters()), direction)
    layer.cuda()
    ours = run(layer, x.cuda().requires_grad_(), dict(layer.named_parameters()), direction.cuda())
    assert_close({name: value.cpu() for name, value in ours.items()}, wanted, 1e-10)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_on_the_gpu_autocast_stays_close_to_fp64(dtype):
    layer = LocalAttention2d(**BASE)
    x = torch.randn(2, 8, 6, 7)
    wanted = both(layer, x)[1]["out"]
    layer.cuda()
    with torch.autocast("cuda", dtype):
        got = layer(x.cuda())
    assert got.dtype == dtype
    assert (got.double().cpu() - wanted).abs().max() < 8 * torch.finfo(dtype).eps * wanted.abs().max()
