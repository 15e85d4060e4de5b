"""Local attention with its projections inside: what convolutions and the definition in fp64 give."""

import functools
import itertools
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from attention import AttentionStem, LocalAttention2d
from model import build
from sasa import kernels
from sasa.kernels import cpu, projected_operator, reference
from sasa.kernels import flops as kernel_flops
from sasa.kernels.interface import AttentionOptions
from sasa.kernels.projection import project, projection_gradients

pytestmark = pytest.mark.skipif(cpu.unusable() is not None, reason=f"no CPU kernel: {cpu.unusable()}")

NAMES = ("out", "grad x", "grad weight", "grad rel_row", "grad rel_col")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}


def make_inputs(batch, channels, heads, depth, size, window, parts=3, dtype=torch.float32, embeddings=True):
    """x, weight of `parts` projections, rel_row, rel_col."""
    x = torch.randn(batch, *size, channels, dtype=dtype).permute(0, 3, 1, 2)
    weight = torch.randn(parts * heads * depth, channels, 1, 1, dtype=dtype) / channels**0.5
    rel = [torch.randn(heads, depth // 2, window, dtype=dtype) if embeddings else None for _ in range(2)]
    return [x, weight, *rel]


def split(weight, rel_row, heads):
    """P, N and D of a weight: three projections where no table tells the heads' width."""
    parts = 3 if rel_row is None else weight.shape[0] // (2 * heads * rel_row.shape[1])
    return parts, heads, weight.shape[0] // (parts * heads)


def attend(x, weight, rel_row, rel_col, heads, options, pooled=False):
    return projected_operator.attend(x, weight, rel_row, rel_col, split(weight, rel_row, heads), options, pooled)


def by_definition(inputs, heads, options, pooled):
    x, weight, *rel = inputs
    maps = F.conv2d(x, weight).unflatten(1, split(weight, rel[0], heads)).unbind(1)
    out, _ = reference.forward(maps[0], maps[1] if len(maps) == 3 else None, maps[-1], *rel, options)
    return F.avg_pool2d(out.flatten(1, 2), 2).unflatten(1, out.shape[1:3]) if pooled else out


def with_gradients(function, inputs, direction=None):
    """The output and the gradients of all inputs, for one gradient of the output."""
    inputs = [None if x is None else x.detach().requires_grad_() for x in inputs]
    out = function(inputs)
    if direction is None:
        direction = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    given = [x for x in inputs if x is not None]
    return [out.detach(), *torch.autograd.grad(out, given, direction.to(out.dtype))]


def check(inputs, heads, window, border="mask", scale=0.7, pooled=False):
    options, dtype = AttentionOptions(window, border, scale), inputs[0].dtype
    got = with_gradients(lambda y: attend(*y, heads, options, pooled), inputs)
    wide = [None if x is None else x.double() for x in inputs]
    expected = with_gradients(lambda y: by_definition(y, heads, options, pooled), wide)
    for name, a, b in zip(NAMES, got, expected, strict=False):
        error = (a - b).abs().max() / b.abs().max().clamp_min(1.0)
        assert error <= TOLERANCE[dtype], f"{name}: {error:.2e} of the largest value"
    with torch.no_grad():  # nothing is kept: the same bits
        assert torch.equal(attend(*inputs, heads, options, pooled), got[0])


@pytest.mark.parametrize("border", kernels.BORDERS)
@pytest.mark.parametrize("window", [1, 2, 3, 4, 7, 13])
def test_matches_the_definition_on_every_map(window, border):
    """Of one pixel and up, of every number of pixels that a block of the product has."""
    sizes = [(1, 1), (1, 5), (5, 1), (2, 2), (9, 7), (4, 13), (6, 25), (3, 16)]
    for i, size in enumerate(sizes):
        check(make_inputs(2, (8, 5, 20)[i % 3], 8, (4, 6, 16)[i % 3], size, window), 8, window, border)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("heads", [1, 2, 3, 8, 16])
def test_matches_the_definition_for_every_group_of_heads(heads, dtype):
    for (batch, depth), size, pooled in itertools.product(((1, 2), (4, 6), (9, 8)), ((7, 7), (8, 14)), (False, True)):
        inputs = make_inputs(batch, 12, heads, depth, size, 5, dtype=dtype)
        if not pooled or size[0] % 2 == 0:
            check(inputs, heads, 5, pooled=pooled)


@pytest.mark.parametrize(("embeddings", "parts"), [(True, 3), (False, 3), (True, 2)])
def test_matches_the_definition_without_parts(embeddings, parts):
    for dtype, border, pooled in itertools.product(TOLERANCE, kernels.BORDERS, (False, True)):
        inputs = make_inputs(2, 10, 4, 4, (6, 10), 5, parts, dtype, embeddings)
        check(inputs, 4, 5, border, pooled=pooled)


@pytest.mark.parametrize("depth", [1, 3, 5, 7])
def test_heads_of_odd_width(depth):
    """A vector of weights holds channels that are not there."""
    for heads, batch in itertools.product((1, 2, 8), (1, 9)):
        check(make_inputs(batch, 7, heads, depth, (5, 9), 3, embeddings=False), heads, 3)


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan"), 1e30])
@pytest.mark.parametrize("border", kernels.BORDERS)
def test_infinities_and_nans_are_the_definition_s(border, bad):
    for i, which in itertools.product(range(6), range(5)):
        window, heads, size = (1, 3, 4, 7)[i % 4], (1, 8)[i % 2], ((2, 4), (6, 10), (5, 18))[i % 3]
        pooled = size[0] % 2 == 0 and i > 2
        inputs = make_inputs(2, 6, heads, 4, size, window)
        options = AttentionOptions(window, border, 0.5)
        shape = attend(*inputs, heads, options, pooled).shape
        direction = torch.linspace(-1, 1, shape.numel()).view(shape)
        target = direction if which == 4 else inputs[which]
        target[tuple(int(torch.randint(0, n, ())) for n in target.shape)] = bad
        got = with_gradients(lambda y: attend(*y, heads, options, pooled), inputs, direction)  # noqa: B023
        maps = with_gradients(lambda y: calls(*y, heads, options, pooled), inputs, direction)  # noqa: B023
        for name, a, b in zip(NAMES, got, maps, strict=True):
            assert torch.equal(torch.isfinite(a), torch.isfinite(b)), (name, which, window)


def calls(x, weight, rel_row, rel_col, heads, options, pooled):
    """The projection, the attention and the pool one after the other."""
    qkv = project(x, weight).unflatten(1, split(weight, rel_row, heads))
    named = {"kernel_size": options.kernel_size, "border": options.border, "scale": options.scale, "backend": "cpu"}
    function = kernels.local_attention_pooled if pooled else kernels.local_attention_packed
    return function(qkv, rel_row, rel_col, **named)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(("batch", "heads", "size"), [
    (3, 8, (12, 14)), (1, 2, (41, 10)), (2, 3, (8, 8)), (1, 8, (23, 9))
])  # fmt: skip
def test_every_thread_count_gives_the_same_bits(batch, heads, size, keep):
    """Though a map is cut into more strips where there are more threads, and one task's rows are another's border."""
    inputs, options = make_inputs(batch, 12, heads, 4, size, 7), AttentionOptions(7, "mask", 1.0)
    before, weight = torch.get_num_threads(), inputs[1].flatten(1).unflatten(0, (3, -1))
    try:
        results = []
        for threads in (1, 2, 3, 7, 16):
            torch.set_num_threads(threads)
            found = cpu.project_and_attend(inputs[0], weight, *inputs[2:], heads, options, False, keep)
            if keep:
                out, lse, kept = found
                backward = cpu.projected_backward(out, kept, *inputs[2:], out, lse, 3, options, False)
                found = (*found, *backward)
            results.append(found)
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_scratch_that_is_kept_carries_nothing_over():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        inputs, options = make_inputs(2, 6, 8, 4, (6, 8), 5), AttentionOptions(5, "mask", 0.5)
        function = functools.partial(with_gradients, lambda y: attend(*y, 8, options))
        first = function(inputs)
        for bad in (float("inf"), float("nan")):
            function([torch.full_like(x, bad) for x in inputs])
            calls(*[torch.full_like(x, bad) for x in inputs], 8, options, False)
            assert all(torch.equal(a, b) for a, b in zip(function(inputs), first, strict=True))
    finally:
        torch.set_num_threads(before)


# ---- the operator --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("parts", [2, 3])
def test_gradcheck_and_opcheck(parts, pooled):
    inputs = make_inputs(2, 3, 2, 2, (4, 6), 3, parts, torch.float64)
    inputs = [x.requires_grad_() for x in inputs]
    options = AttentionOptions(3, "mask", 1.0)
    function = lambda *tensors: attend(*tensors, 2, options, pooled)  # noqa: E731
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)
    arguments = (parts, 2, *options, pooled)
    projection = torch.zeros(2, parts * 4, 4, 6, dtype=torch.float64, requires_grad=True)
    fixed = [inputs[0].detach(), inputs[1].detach(), *inputs[2:]]
    torch.library.opcheck(torch.ops.sasa.projected_attention.default, (projection, *fixed, *arguments))
    inputs = [x.detach() for x in inputs]
    torch.library.opcheck(torch.ops.sasa.projected_attention.default, (None, *inputs, *arguments))
    out, lse, kept = torch.ops.sasa.projected_attention(projection.detach(), *inputs, *arguments)
    backward = (torch.randn_like(out), kept, *inputs[2:], None if pooled else out, lse, parts, *options, pooled)
    torch.library.opcheck(torch.ops.sasa.projected_attention_backward.default, backward)


def test_what_was_not_kept_has_no_backward():
    """Not zeros, and not what happens to lie in memory."""
    inputs = [x.requires_grad_() for x in make_inputs(1, 4, 2, 2, (4, 4), 3)]
    out, *_ = torch.ops.sasa.projected_attention(None, *inputs, 3, 2, 3, "mask", 1.0, False)
    with pytest.raises(RuntimeError, match="no backward"):
        out.sum().backward()


@pytest.mark.parametrize("frozen", [*itertools.product((False, True), repeat=3)])
def test_frozen_inputs_have_no_gradient_and_the_others_theirs(frozen):
    inputs, options = make_inputs(2, 6, 2, 4, (4, 6), 3), AttentionOptions(3)
    full = with_gradients(lambda y: attend(*y, 2, options), inputs)[1:]
    needed = [not frozen[0], not frozen[1], not frozen[2], not frozen[2]]
    for x, need in zip(inputs, needed, strict=True):
        x.requires_grad_(need)
    out = attend(*inputs, 2, options)
    assert out.requires_grad == any(needed)
    if any(needed):
        out.backward(torch.linspace(-1, 1, out.numel()).view_as(out))
    for x, need, wanted in zip(inputs, needed, full, strict=True):
        assert (x.grad is None) != need and (not need or torch.equal(x.grad, wanted))


@pytest.mark.parametrize("shape", [(3, 5, 4, 7), (1, 5, 4, 7), (2, 8, 1, 1), (2, 3, 6, 1)])
def test_gradients_of_the_projection_are_autograd_s(shape):
    x = torch.randn(shape, dtype=torch.float64).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(6, shape[1], 1, 1, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    out = project(x, weight.requires_grad_())
    grad = torch.randn_like(out)
    wanted = torch.autograd.grad(out, (x, weight), grad)
    for pair in itertools.product((False, True), repeat=2):
        found = projection_gradients(grad, x.detach(), weight.detach(), pair)
        for y, theirs, asked in zip(found, wanted, pair, strict=True):
            assert (y is not None) == asked
            if asked:
                torch.testing.assert_close(y, theirs)
                assert y.stride() == theirs.stride()


def test_flops_are_those_of_the_parts():
    kernel_flops.register()
    inputs, options = make_inputs(2, 6, 2, 4, (4, 6), 3), AttentionOptions(3, "mask", 0.5)
    totals = []
    for function in (attend, calls):
        for pooled in (False, True):
            with FlopCounterMode(display=False) as counter:
                with_gradients(lambda y: function(*y, 2, options, pooled), inputs)  # noqa: B023
            totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] == totals[2] == totals[3] > 0


# ---- the layer -----------------------------------------------------------------------------------------------------


def make_layer(dtype=torch.float32, **options):
    torch.manual_seed(3)
    return LocalAttention2d(8, 16, 7, num_heads=4, **options).to(dtype)


def image(batch=2, size=(10, 12), dtype=torch.float32):
    torch.manual_seed(4)
    return torch.randn(batch, 8, *size, dtype=dtype).contiguous(memory_format=torch.channels_last)


def run(layer, x, monkeypatch, inside):
    """Output and gradients; `inside`: by the operator, which is counted, or by the steps."""
    count = []
    with monkeypatch.context() as patch:
        inner = projected_operator.attend
        patch.setattr(projected_operator, "attend", lambda *a: count.append(1) or inner(*a))
        if not inside:
            patch.setattr(projected_operator, "serves", lambda *a: False)
        layer.zero_grad()
        x = x.clone(memory_format=torch.preserve_format).requires_grad_()
        out = layer(x)
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    assert len(count) == inside
    return [out.detach(), x.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize("stride", [1, 2, 3])
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
def test_the_layer_gives_what_the_steps_give(options, stride, monkeypatch):
    layer = make_layer(torch.float64, stride=stride, **options)
    for batch, size in ((2, (10, 12)), (1, (9, 7)), (3, (2, 2)), (1, (8, 8))):
        x = image(batch, size, torch.float64)
        got, wanted = (run(layer, x, monkeypatch, inside) for inside in (True, False))
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
            assert a.stride() == b.stride()  # of the weights' gradients too, which DistributedDataParallel looks at
        with torch.no_grad():
            alone = layer(x)
        assert torch.equal(alone, got[0]) and alone.stride() == got[0].stride()


def compiled(layer, x):
    return torch.compile(layer, backend="eager")(x)


def under_autocast(layer, x):
    with torch.autocast("cpu", torch.bfloat16):
        return layer(x)


def traced(layer, x):
    return torch.jit.trace(layer, x, check_trace=False)(x)


OUTSIDE = {
    "rows of columns": lambda layer, x: layer(x.contiguous()),
    "a part of a map": lambda layer, x: layer(image(size=(10, 24))[..., ::2]),
    "no image": lambda layer, x: layer(x[:0]),
    "bf16": lambda layer, x: layer.bfloat16()(x.bfloat16()),
    "autocast": under_autocast,
    "compiled": compiled,
    "traced": traced,
    "tangent": lambda layer, x: torch.func.jvp(layer, (x,), (torch.ones_like(x),))[0],
    "transform": lambda layer, x: torch.func.vmap(lambda y: layer(y[None])[0])(x),
    "another backend": lambda layer, x: setattr(layer, "backend", "tiled") or layer(x),
    "composite": lambda layer, x: setattr(layer, "backend", "composite") or layer(x),
    "a hook": lambda layer, x: layer.key.register_forward_hook(lambda *what: None) and layer(x),
    "a bias": lambda layer, x: setattr(layer.value, "bias", torch.nn.Parameter(torch.zeros(16))) or layer(x),
    "grouped": lambda layer, x: make_layer(grouped=True)(x),
    "a large window": lambda layer, x: LocalAttention2d(8, 16, 15, num_heads=4)(x),
}


@pytest.mark.parametrize("which", OUTSIDE)
def test_where_the_steps_are_taken(which, monkeypatch):
    inner, count = projected_operator.attend, []
    monkeypatch.setattr(projected_operator, "attend", lambda *a: count.append(1) or inner(*a))
    OUTSIDE[which](make_layer(), image())
    assert not count
    make_layer()(image())
    assert count


@pytest.mark.parametrize("change", [
    lambda layer: setattr(layer, "rel_row", torch.nn.Parameter(layer.rel_row.detach().double())),
    lambda layer: setattr(layer, "rel_col", torch.nn.Parameter(layer.rel_col.detach()[:, :, :5])),
    lambda layer: setattr(layer, "rel_col", None),
    lambda layer: setattr(layer, "rel_row", torch.nn.Parameter(layer.rel_row.detach().to("meta"))),
], ids=["dtype", "window", "one table", "device"])  # fmt: skip
def test_tables_that_do_not_fit_are_refused_and_never_read(change):
    layer = make_layer()
    change(layer)
    with pytest.raises(ValueError, match="rel_"):
        layer(image())


def test_without_gradients_nothing_is_kept(monkeypatch):
    found = []
    inside = cpu.project_and_attend
    monkeypatch.setattr(cpu, "project_and_attend", lambda *a: found.append(inside(*a)) or found[-1])
    layer, x = make_layer(), image()
    with torch.no_grad():
        layer(x)
    with torch.inference_mode():
        layer(x)
    layer.requires_grad_(False)(x)
    layer(x.requires_grad_())
    sizes = [[y.numel() for y in result[1:]] for result in found]
    assert sizes == [[0, 0]] * 3 + [[2 * 4 * 120, 3 * 2 * 16 * 120]]


def test_what_is_kept_is_free_before_the_projection_s_gradients_are_made(monkeypatch):
    """A step needs no more memory than with the projection outside: autograd frees what a node kept when it is done."""
    kept, alive = [], []
    inside, gradients = cpu.project_and_attend, projected_operator.projection_gradients
    monkeypatch.setattr(cpu, "project_and_attend", lambda *a: remember(inside(*a)))
    monkeypatch.setattr(projected_operator, "projection_gradients", lambda *a: alive.append(kept[0]()) or gradients(*a))

    def remember(result):
        kept.append(weakref.ref(result[2].untyped_storage()))
        return result

    make_layer()(image().requires_grad_()).sum().backward()
    assert alive == [None]


def test_no_gradient_is_made_for_what_is_kept():
    """Zeros of three maps, as autograd makes them for outputs that nobody uses."""

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if function.__name__.startswith("zeros"):
                sizes.append(out.numel())
            return out

    sizes, out = [], make_layer()(image().requires_grad_())
    with Sizes():
        out.backward(torch.ones_like(out))
    assert all(size < out.numel() for size in sizes)


@pytest.mark.parametrize("kind", ["pooled", "block", "sliding"])
def test_an_output_with_channels_innermost_can_be_changed_in_place(kind):
    """As a convolution's; of stride 1 autograd says that backward needs it, as of a softmax."""
    torch.manual_seed(0)
    if kind == "pooled":
        layer, x = make_layer(stride=2), image()
    else:
        layer = AttentionStem(3, 8, block_size=4, window=kind, num_heads=2)
        x = torch.randn(2, 3, 8, 12).contiguous(memory_format=torch.channels_last)
    results = []
    for relu in (torch.relu, torch.relu_):
        layer.zero_grad()
        out = relu(layer(x))
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad for p in layer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("stride", [1, 2])
def test_batched_gradients_are_those_one_by_one(stride):
    layer, x = make_layer(torch.float64, stride=stride), image(dtype=torch.float64).requires_grad_()
    out, inputs = layer(x), (x, *layer.parameters())
    directions = torch.randn(3, *out.shape, dtype=out.dtype)
    batched = torch.autograd.grad(out, inputs, directions, is_grads_batched=True, retain_graph=True)
    for i, direction in enumerate(directions):
        alone = torch.autograd.grad(out, inputs, direction, retain_graph=True)
        for a, b in zip(batched, alone, strict=True):
            torch.testing.assert_close(a[i], b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("stride", [1, 2])
def test_second_derivatives_are_not_narrowed_by_autocast(stride):
    layer, x = make_layer(stride=stride), image().requires_grad_()
    out, inputs = layer(x), (x, *layer.parameters())
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(torch.autograd.grad(out, inputs, out.detach(), create_graph=True))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_checkpointed_blocks_have_the_same_gradients():
    def gradients(checkpointing):
        torch.manual_seed(0)
        network = build("ResNet26", 10, small_images=True).to(memory_format=torch.channels_last)
        network.set_grad_checkpointing(checkpointing)
        x = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
        network(x).square().sum().backward()
        return [p.grad for p in network.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(gradients(False), gradients(True), strict=True))
