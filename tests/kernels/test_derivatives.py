"""Derivatives beyond one backward: forward mode, torch.func, second derivatives, checkpointing.

PyTorch's own checkers compare them with differences of function values in fp64.
"""

import functools

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

from attention import AttentionStem, LocalAttention2d
from model import PooledAttentionStem
from sasa.kernels import backends, dispatch, local_attention, local_attention_packed, stem_operator
from sasa.kernels.interface import CallKind

# Along random directions: a wrong entry of a Jacobian shows as it does entry by entry, in a fraction of the time.
gradcheck = functools.partial(torch.autograd.gradcheck, fast_mode=True)
gradgradcheck = functools.partial(torch.autograd.gradgradcheck, fast_mode=True)

OPERATORS = [
    name
    for name, reason in backends().items()
    if reason is None and dispatch.module(name).unsupported(CallKind(torch.device("cpu"), torch.float64, 2, 3)) is None
]
FORMS = {
    "all": {},
    "no content": {"content": False},
    "no embeddings": {"embeddings": False},
    "zero border, scaled": {"border": "zero", "scale": 0.5},
}


def draw(content=True, embeddings=True, border="mask", scale=1.0):
    def numbers(*shape):
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    maps = numbers(1, 2, 2, 3, 4), numbers(1, 2, 2, 3, 4) if content else None, numbers(1, 2, 2, 3, 4)
    tables = [numbers(2, 1, 3) if embeddings else None for _ in range(2)]
    return (*maps, *tables), {"kernel_size": 3, "border": border, "scale": scale}


def of_present(function, inputs):
    """`function` of the inputs that are not None, since the checkers want tensors."""

    def call(*present):
        given = iter(present)
        return function(*(None if x is None else next(given) for x in inputs))

    return call, [x for x in inputs if x is not None]


@pytest.mark.parametrize("which", FORMS)
def test_composite_has_first_and_second_derivatives_of_both_modes(which):
    inputs, options = draw(**FORMS[which])
    call, present = of_present(functools.partial(local_attention, **options, backend="composite"), inputs)
    assert gradcheck(call, present, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(call, present)


@pytest.mark.parametrize("backend", [*OPERATORS, "auto"])
@pytest.mark.parametrize("which", FORMS)
def test_every_backend_has_second_derivatives(which, backend):
    inputs, options = draw(**FORMS[which])
    call, present = of_present(functools.partial(local_attention, **options, backend=backend), inputs)
    assert gradgradcheck(call, present)


@pytest.mark.parametrize("parts", [2, 3])
def test_second_derivatives_of_a_fused_projection(parts):
    qkv = torch.randn(1, parts, 2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    tables = [torch.randn(2, 1, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert gradgradcheck(functools.partial(local_attention_packed, kernel_size=3), (qkv, *tables))
    assert gradcheck(functools.partial(local_attention_packed, kernel_size=3), (qkv, *tables), check_forward_ad=True)


def test_second_derivatives_need_only_the_inputs_that_have_them():
    inputs, options = draw()
    inputs[1].requires_grad_(False)
    inputs[3].requires_grad_(False)
    call, present = of_present(functools.partial(local_attention, **options), inputs)
    assert gradgradcheck(call, present)


def tied_maps(x):
    return local_attention(x, x.tanh(), x, None, None, kernel_size=3)


def tied_tables(x):
    layer = LocalAttention2d(4, 8, 3, num_heads=2).double()
    layer.load_state_dict({name: torch.linspace(-1, 1, p.numel()).view_as(p) for name, p in layer.state_dict().items()})
    table = x[0, :, :, 0, :3]
    tables = {"rel_row": table, "rel_col": table}
    return functional_call(layer, tables, (x.flatten(1, 2),)).unflatten(1, (2, 4))


def tied_stem(x):
    image, forms = x[:, 0, :1].expand(-1, 3, -1, -1), torch.linspace(-1, 1, 18, dtype=x.dtype).view(2, 3, 3)
    mixture, values = x[0, :2, 0, 0, :2].repeat(2, 1), x[:1, :, 0, 0, :3].repeat(2, 2, 1)  # (P, M), (M, N * D, C)
    return stem_operator.attend(image, forms, mixture, values, "block", "mask", "auto")


@pytest.mark.parametrize("function", [tied_maps, tied_tables, tied_stem])
def test_inputs_that_share_their_history_have_their_gradient_once(function):
    """With create_graph as without: one map as query and value, a key that is computed from it, one table for both."""
    x = torch.randn(1, 2, 2, 4, 6, dtype=torch.float64, requires_grad=True)
    once, again = (torch.autograd.grad(function(x).sin().sum(), x, create_graph=graph)[0] for graph in (False, True))
    torch.testing.assert_close(again, once)
    assert gradgradcheck(function, (x,))


@pytest.mark.parametrize("backend", ["cpu", "tiled"])
def test_a_named_backend_that_cannot_says_which_one_can(backend):
    if backend not in OPERATORS:
        pytest.skip(f"{backend} is not usable here")
    inputs, options = draw()
    call = functools.partial(local_attention, **options, backend=backend)
    detached = tuple(x.detach() for x in inputs)
    with pytest.raises(RuntimeError, match="'composite'"):
        jvp(call, detached, detached)
    with pytest.raises(RuntimeError, match="'composite'"):
        grad(lambda x: call(x, *detached[1:]).sum())(detached[0])
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="'composite'"):
        call(forward_ad.make_dual(detached[0], detached[0]), *detached[1:])


LAYERS = {
    "layer": lambda: LocalAttention2d(4, 8, 3, num_heads=2, stride=2),
    "absolute positions": lambda: LocalAttention2d(4, 8, 3, num_heads=2, position="absolute"),
    "grouped": lambda: LocalAttention2d(4, 8, 3, num_heads=2, grouped=True, border="zero"),
    "stem of blocks": lambda: AttentionStem(3, 8, num_heads=2),
    "sliding stem": lambda: AttentionStem(3, 8, num_heads=2, window="sliding"),
    "stem of convolved values": lambda: AttentionStem(3, 8, num_heads=2, values="conv", window="sliding"),
    "pooled stem": lambda: PooledAttentionStem(AttentionStem(3, 8, num_heads=2)),
    "pooled stem, eval": lambda: PooledAttentionStem(AttentionStem(3, 8, num_heads=2)).eval(),
}


def build(which):
    layer = LAYERS[which]().double()
    channels = 3 if "stem" in which else 4
    return layer, torch.randn(2, channels, 3, 4, dtype=torch.float64)


def without_counting(layer, parameters, x):
    """A functional call that leaves the module's buffers alone."""
    buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    return functional_call(layer, {**parameters, **buffers}, (x,))


@pytest.mark.parametrize("which", LAYERS)
def test_layers_have_derivatives_of_both_modes(which):
    layer, x = build(which)
    assert gradcheck(layer, x.requires_grad_(), check_forward_ad=True)
    if "pooled" not in which:  # the ReLU has corners
        assert gradgradcheck(layer, x)


@pytest.mark.parametrize("which", ["pooled stem", "pooled stem, eval"])
def test_second_derivatives_of_the_pooled_stem_are_those_of_its_modules(which):
    layer, x = build(which)
    inputs, results = [x.requires_grad_(), *layer.parameters()], []
    for call in (layer, functools.partial(nn.Sequential.forward, layer)):
        out = call(x)
        loss = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum()
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        penalty = sum(y.square().sum() for y in first)
        results.append((first, torch.autograd.grad(penalty, inputs, materialize_grads=True)))
    torch.testing.assert_close(*results)
    assert results[0][1][0].any()


@pytest.mark.parametrize("which", LAYERS)
def test_forward_mode_of_the_parameters(which):
    layer, x = build(which)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    directions = {name: torch.randn_like(p) for name, p in parameters.items()}
    _, got = jvp(lambda p: without_counting(layer, p, x), (parameters,), (directions,))
    step = 1e-6
    ahead, back = (
        without_counting(layer, {n: p + sign * step * directions[n] for n, p in parameters.items()}, x)
        for sign in (1, -1)
    )
    torch.testing.assert_close(got, (ahead - back) / (2 * step), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("which", [w for w in LAYERS if "pooled" not in w])
def test_gradients_of_each_sample(which):
    layer, x = build(which)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(p, sample):
        return functional_call(layer, p, (sample[None],)).square().sum()

    got = vmap(grad(loss), (None, 0))(parameters, x)
    for i, sample in enumerate(x):
        layer.zero_grad()
        layer(sample[None]).square().sum().backward()
        for name, p in layer.named_parameters():
            torch.testing.assert_close(got[name][i], p.grad)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("which", LAYERS)
def test_checkpointing_gives_the_same_gradients(which, reentrant):
    layer, x = build(which)
    results = []
    for call in (layer, lambda y: checkpoint(layer, y, use_reentrant=reentrant)):
        layer.zero_grad()
        x.grad = None
        call(x.requires_grad_()).square().sum().backward()
        results.append([x.grad.clone(), *(p.grad.clone() for p in layer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_operator_serves_what_it_can(monkeypatch):
    """No transform, no tangent: the K * K copies of the composite form must not be made."""
    layer, x = build("layer")
    monkeypatch.setattr("sasa.kernels.functional._composite", lambda *a: pytest.fail("not the operator"))
    layer(x.requires_grad_()).sum().backward()
    with forward_ad.dual_level():
        layer(x)  # no tensor has a tangent


TRANSFORMS = {
    "jvp": lambda layer, x: jvp(layer, (x,), (x.cos(),))[1],
    "grad": lambda layer, x: grad(lambda y: layer(y).square().sum())(x),
    "vmap": lambda layer, x: vmap(lambda sample: layer(sample[None]))(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("which", ["layer", "stem of blocks"])
def test_compiled_transforms_are_those_that_are_not_compiled(which, transform):
    layer, x = build(which)
    torch._dynamo.reset()
    compiled = torch.compile(lambda y: TRANSFORMS[transform](layer, y), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), TRANSFORMS[transform](layer, x))


def test_a_compiled_call_without_a_transform_is_that_of_the_operator():
    """Also in the graph that a transform was compiled before: each has its own answer."""
    layer, x = build("layer")
    torch._dynamo.reset()
    compiled = torch.compile(lambda y: (layer(y), jvp(layer, (y,), (y.cos(),))[1]), backend="eager", fullgraph=True)
    for got, wanted in zip(compiled(x), (layer(x), TRANSFORMS["jvp"](layer, x)), strict=True):
        torch.testing.assert_close(got, wanted)
    graphs = []
    torch.compile(layer, backend=lambda graph, inputs: graphs.append(graph) or graph, fullgraph=True)(x)
    assert [node for node in graphs[0].graph.nodes if "local_attention_packed" in str(node.target)]
