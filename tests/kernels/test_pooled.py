"""Local attention with the 2x2 average pool inside: what the definition in fp64 and a pool after it give."""

import contextlib
import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from attention import LocalAttention2d
from dispatch_modes import Operators
from sasa import kernels
from sasa.kernels import cpu, local_attention_pooled, projected_operator, reference
from sasa.kernels.interface import AttentionOptions

pytestmark = pytest.mark.skipif(cpu.unusable() is not None, reason=f"no CPU kernel: {cpu.unusable()}")

NAMES = ("out", "lse", "grad query", "grad key", "grad value", "grad rel_row", "grad rel_col")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
MAPS = ((2, 2), (2, 8), (6, 4), (8, 8), (14, 10), (4, 34), (18, 6))


def make_inputs(shape, size, layout="nchw", dtype=torch.float32, embeddings=True, content=True):
    """Gradient of the averages, then query, key, value, rel_row, rel_col."""
    b, n, d, h, w = shape
    if layout == "fused_channels_last":
        maps = [x.permute(0, 3, 4, 1, 2) for x in torch.randn(b, h, w, 3, n, d, dtype=dtype).unbind(3)]
        grad = torch.randn(b, h // 2, w // 2, n, d, dtype=dtype).permute(0, 3, 4, 1, 2)
    else:
        maps = [torch.randn(shape, dtype=dtype) for _ in range(3)]
        grad = torch.randn(b, n, d, h // 2, w // 2, dtype=dtype)
    rel = [torch.randn(n, d // 2, size, dtype=dtype) if embeddings else None for _ in range(2)]
    return [grad, maps[0], maps[1] if content else None, maps[2], *rel]


def pooled(inputs, size, border, scale):
    grad, *rest = inputs
    options = AttentionOptions(size, border, scale)
    out, lse = cpu.forward(*rest, options, pooled=True)
    return out, lse, *cpu.backward(grad, *rest, None, lse, options, pooled=True)


def by_definition(inputs, size, border, scale):
    """The reference, and PyTorch's average pool after it."""
    grad, *rest = inputs
    options = AttentionOptions(size, border, scale)
    out, lse = reference.forward(*rest, options)
    flat = out.flatten(1, 2).requires_grad_()
    means = F.avg_pool2d(flat, 2)
    (back,) = torch.autograd.grad(means, flat, grad.flatten(1, 2))
    gradients = reference.backward(back.view_as(out), *rest, out, lse, options)
    return means.detach().unflatten(1, out.shape[1:3]), lse, *gradients


def check(inputs, size, border="mask", scale=0.7):
    dtype = inputs[0].dtype
    expected = by_definition([None if x is None else x.double() for x in inputs], size, border, scale)
    for name, a, b in zip(NAMES, pooled(inputs, size, border, scale), expected, strict=True):
        if b is None:
            assert a is None, name
            continue
        assert a.dtype == dtype, name
        error = (a.double() - b).abs().max() / b.abs().max().clamp_min(1.0)
        assert error <= TOLERANCE[dtype], f"{name}: {error:.2e} of the largest value"


@pytest.mark.parametrize("border", kernels.BORDERS)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 13])
def test_matches_the_definition_on_every_map(size, border):
    for i, (height, width) in enumerate(MAPS):
        layout = ("nchw", "fused_channels_last")[i % 2]
        check(make_inputs((2, 8, (4, 6, 16)[i % 3], height, width), size, layout), size, border)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("heads", [1, 2, 3, 8, 16])
def test_matches_the_definition_for_every_group_of_heads(heads, dtype):
    for height, width in ((8, 8), (14, 14), (6, 20)):
        check(make_inputs((4, heads, 8, height, width), 7, "fused_channels_last", dtype), 7)


@pytest.mark.parametrize(("embeddings", "content"), [(True, True), (False, True), (True, False)])
def test_matches_the_definition_without_parts(embeddings, content):
    for dtype, border in itertools.product(TOLERANCE, kernels.BORDERS):
        check(make_inputs((2, 4, 4, 6, 10), 5, "nchw", dtype, embeddings, content), 5, border)


def test_large_logits():
    """Where the last bit of a log-sum-exp counts, P is normalised anew."""
    inputs = make_inputs((2, 8, 8, 8, 8), 7)
    expected = by_definition([x.double() for x in inputs], 7, "mask", 300.0)
    for name, a, b in zip(NAMES, pooled(inputs, 7, "mask", 300.0), expected, strict=True):
        assert (a - b).abs().max() <= 2e-3 * b.abs().max(), name


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan"), 1e30])
@pytest.mark.parametrize("border", kernels.BORDERS)
def test_infinities_and_nans_are_the_definition_s(border, bad):
    for i, which in itertools.product(range(6), range(6)):
        size, heads, (height, width) = (1, 3, 4, 7)[i % 4], (1, 8)[i % 2], ((2, 4), (6, 10), (4, 18))[i % 3]
        inputs = make_inputs((2, heads, 4, height, width), size)
        inputs[which][tuple(int(torch.randint(0, n, ())) for n in inputs[which].shape)] = bad
        expected = by_definition(inputs, size, border, 0.5)
        for name, a, b in zip(NAMES, pooled(inputs, size, border, 0.5), expected, strict=True):
            assert torch.equal(torch.isfinite(a), torch.isfinite(b)), (name, which, size)


@pytest.mark.parametrize("shape", [(3, 8, 8, 12, 14), (1, 2, 4, 40, 10), (2, 3, 6, 8, 8)])
def test_every_thread_count_gives_the_same_bits(shape):
    inputs = make_inputs(shape, 7)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(pooled(inputs, 7, "mask", 1.0))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_scratch_that_is_kept_carries_nothing_over():
    """After infinities and NaNs, with the pool and without, the first call's bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        inputs = make_inputs((2, 8, 4, 6, 8), 5)
        first = pooled(inputs, 5, "mask", 0.5)
        for bad in (float("inf"), float("nan")):
            pooled([torch.full_like(x, bad) for x in inputs], 5, "mask", 0.5)
            options = AttentionOptions(5, "mask", 0.5)
            out, lse = cpu.forward(*inputs[1:], options)
            cpu.backward(out, *inputs[1:], out, lse, options)
            assert all(torch.equal(a, b) for a, b in zip(pooled(inputs, 5, "mask", 0.5), first, strict=True))
    finally:
        torch.set_num_threads(before)


# ---- the operator --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [True, False])
def test_gradcheck_and_opcheck(content):
    qkv = torch.randn(2, 3 if content else 2, 2, 4, 4, 6, dtype=torch.float64, requires_grad=True)
    tables = [torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    function = functools.partial(local_attention_pooled, kernel_size=3)
    assert gradcheck(function, (qkv, *tables))
    assert gradgradcheck(function, (qkv, *tables))
    options = (3, "mask", 1.0, "auto")
    torch.library.opcheck(torch.ops.sasa.local_attention_pooled.default, (qkv, *tables, *options))
    inputs = [x.detach() for x in (qkv, *tables)]
    out, lse = torch.ops.sasa.local_attention_pooled(*inputs, *options)
    arguments = (torch.randn_like(out), *inputs, lse, *options)
    torch.library.opcheck(torch.ops.sasa.local_attention_pooled_backward.default, arguments)


@pytest.mark.parametrize("size", [(5, 4), (4, 7)])
def test_odd_sides_are_refused(size):
    """The kernel itself checks nothing, and would write beyond its output."""
    qkv = torch.randn(1, 3, 2, 4, *size)
    with pytest.raises(ValueError, match="2 x 2"):
        torch.ops.sasa.local_attention_pooled(qkv, None, None, 3, "mask", 1.0, "cpu")
    options, maps = AttentionOptions(3), qkv.unbind(1)
    with pytest.raises(ValueError, match="2 x 2"):
        cpu.backward(qkv[:, 0, :, :, ::2, ::2], *maps, None, None, None, qkv[:, 0, :, 0], options, pooled=True)
    with pytest.raises(ValueError, match="2 x 2"):
        cpu.project_and_attend(torch.randn(1, 4, *size), torch.randn(3, 8, 4), None, None, 2, options, True, False)


# ---- the layer: with its projection outside, as for maps of planes and in a compiled network -------------------------


@pytest.fixture(autouse=True)
def projects_outside(monkeypatch):
    monkeypatch.setattr(projected_operator, "serves", lambda *call: False)


def run(layer, x):
    """Output, gradients, and whether the kernel pooled."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    layer.zero_grad()
    with Operators() as operators:
        out = layer(x)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    names = set(operators.seen)
    assert ("local_attention_pooled" in names) != ("local_attention_packed" in names or "local_attention" in names)
    return [out.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())], "local_attention_pooled" in names


def make_layer(dtype=torch.float64, stride=2, **options):
    torch.manual_seed(3)
    return LocalAttention2d(8, 16, 7, stride=stride, num_heads=4, **options).to(dtype)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"content": False},
        {"position": "none"},
        {"position": "absolute"},
        {"border": "zero"},
        {"share_embeddings": True, "scale": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_layer_gives_what_separate_calls_give(options, memory_format):
    layer, x = make_layer(**options), torch.randn(2, 8, 10, 12, dtype=torch.float64).to(memory_format=memory_format)
    got, inside = run(layer, x)
    handle = layer.pool.register_forward_hook(lambda *what: None)
    wanted, outside = run(layer, x)
    handle.remove()
    assert inside and not outside
    assert got[0].stride() == wanted[0].stride()
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


class Doubled(nn.AvgPool2d):
    def forward(self, x):
        return 2 * super().forward(x)


def global_hook(layer):
    return contextlib.closing(Handle(nn.modules.module.register_module_forward_hook(lambda *what: None)))


class Handle:
    def __init__(self, handle):
        self.close = handle.remove


def set_pool(make):
    return lambda layer: setattr(layer, "pool", make())


OUTSIDE = {
    "hook of the pool": lambda layer: layer.pool.register_forward_hook(lambda *what: what[-1] * 2),
    "hook of every module": global_hook,
    "subclass": set_pool(lambda: Doubled(2)),
    "replaced forward": lambda layer: setattr(layer.pool, "forward", lambda x: F.max_pool2d(x, 2)),
    "largest value": set_pool(lambda: nn.MaxPool2d(2)),
    "larger blocks": set_pool(lambda: nn.AvgPool2d(3, 2, padding=1)),
    "another divisor": set_pool(lambda: nn.AvgPool2d(2, divisor_override=3)),
    "another stride": set_pool(lambda: nn.AvgPool2d(2, 1)),
    "another backend": lambda layer: setattr(layer, "backend", "tiled"),
    "composite": lambda layer: setattr(layer, "backend", "composite"),
}


@pytest.mark.parametrize("change", OUTSIDE)
def test_a_changed_pool_is_called(change, monkeypatch):
    layer, x = make_layer(torch.float32), torch.randn(2, 8, 8, 12)
    context = OUTSIDE[change](layer)
    with context if hasattr(context, "__exit__") else contextlib.nullcontext():
        if change == "composite":
            with Operators() as operators:
                layer(x)
            assert "local_attention_pooled" not in operators.seen
            return
        got, inside = run(layer, x)
        assert not inside
        with monkeypatch.context() as patch:
            patch.setattr("attention.is_plain_average", lambda *a: False)
            wanted, _ = run(layer, x)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("size", [(7, 8), (8, 7), (9, 9), (1, 2)])
def test_a_ragged_last_block_is_pooled_outside(size):
    assert not run(make_layer(), torch.randn(1, 8, *size, dtype=torch.float64))[1]


def test_other_strides_and_a_plain_pool_of_pytorch():
    assert not run(make_layer(stride=3), torch.randn(1, 8, 6, 6, dtype=torch.float64))[1]
    layer, x = make_layer(), torch.randn(1, 8, 6, 6, dtype=torch.float64)
    wanted, _ = run(layer, x)
    layer.pool = nn.AvgPool2d(2)
    got, inside = run(layer, x)
    assert inside and all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_half_types_are_pooled_outside():
    """Each value before the pool is rounded to them."""
    layer, x = make_layer(torch.float32), torch.randn(1, 8, 6, 6)
    with torch.autocast("cpu", torch.bfloat16), Operators() as operators:
        layer(x)
        assert "local_attention_pooled" not in operators.seen
    assert not run(layer.bfloat16(), x.bfloat16())[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_under_autocast_the_pool_is_called(dtype):
    qkv, tables = torch.randn(1, 3, 2, 4, 4, 4, dtype=dtype), torch.zeros(2, 2, 3, dtype=dtype)
    assert kernels.pools(qkv, tables, tables, 3, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        assert not kernels.pools(qkv, tables, tables, 3, "cpu")


def test_forward_mode_and_transforms_of_functions_see_the_parts():
    layer, x = make_layer(), torch.randn(1, 8, 4, 4, dtype=torch.float64)
    _, tangent = torch.func.jvp(layer, (x,), (torch.ones_like(x),))
    step = 1e-6
    difference = (layer(x + step) - layer(x - step)) / (2 * step)
    torch.testing.assert_close(tangent, difference, rtol=1e-5, atol=1e-7)


def test_the_map_before_the_pool_is_not_kept():
    layer, x = make_layer(torch.float32), torch.randn(2, 8, 8, 8, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        layer(x)
    assert (2, 4, 4, 8, 8) not in kept and (2, 16, 8, 8) not in kept
    assert (2, 4, 8, 8) in kept  # log-sum-exp
