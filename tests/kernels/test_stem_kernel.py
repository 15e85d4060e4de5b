"""The stem's C++ kernel against its PyTorch form in fp64; the stem that pools inside the kernel against its layers."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import AttentionStem
from model import ResNet26, make_stem
from sasa.kernels import cpu, dispatch, stem_operator

pytestmark = pytest.mark.skipif(cpu.unusable() is not None, reason=f"no CPU kernel: {cpu.unusable()}")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11}


def results(stem, x, direction):
    x = x.detach().requires_grad_()
    out = stem(x)
    out.backward(direction.to(out.dtype))
    return {"out": out.detach(), "x": x.grad} | {name: p.grad for name, p in stem.named_parameters()}


def assert_same(got, wanted, tolerance):
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        error = (got[name].double() - value.double()).abs().max().item()
        assert error <= tolerance * max(1.0, value.abs().max().item()), f"{name}: off by {error}"


def check(shape, channels_last=False, dtype=torch.float32, slack=1, **options):
    """Kernel in `dtype` against PyTorch in fp64."""
    b, h, w = shape
    stem = AttentionStem(backend="cpu", **options).to(dtype)
    definition = AttentionStem(backend="reference", **options).double()
    definition.load_state_dict(stem.state_dict())
    x, direction = torch.randn(b, 3, h, w, dtype=dtype), torch.randn(b, stem.out_channels, h, w, dtype=dtype)
    if channels_last:
        x, direction = (y.contiguous(memory_format=torch.channels_last) for y in (x, direction))
    got = results(stem, x, direction)
    assert got["out"].is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    assert_same(got, results(definition, x.double(), direction.double()), slack * TOLERANCE[dtype])


# ---- the kernel ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("border", ["mask", "zero"])
@pytest.mark.parametrize("window", ["block", "sliding"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(2, 8, 8), (1, 1, 1), (3, 65, 70), (1, 9, 200), (20, 5, 7)], ids=str)
def test_matches_the_definition(shape, dtype, window, border):
    check(shape, dtype=dtype, window=window, border=border)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 18), st.integers(1, 40), st.integers(1, 90)),
    window=st.sampled_from(["block", "sliding"]),
    border=st.sampled_from(["mask", "zero"]),
    values=st.sampled_from(["mixture", "plain"]),
    dtype=st.sampled_from(list(TOLERANCE)),
    channels_last=st.booleans(),
    num_heads=st.sampled_from([1, 2, 3, 4]),
    head_dim=st.sampled_from([1, 3, 8, 16, 20]),
    block_size=st.integers(1, 6),
    num_mixtures=st.sampled_from([1, 3, 4, 8]),
)
def test_matches_the_definition_anywhere(shape, num_heads, head_dim, **options):
    check(shape, out_channels=num_heads * head_dim, num_heads=num_heads, **options)


@pytest.mark.parametrize("window", ["block", "sliding"])
def test_takes_any_strides(window):
    stem = AttentionStem(window=window, backend="cpu")
    x, direction = torch.randn(2, 3, 10, 23), torch.randn(2, 64, 10, 23)
    wanted = results(stem, x, direction)
    stem.zero_grad()
    odd = torch.randn(23, 2, 20, 3)[:, :, ::2].permute(1, 3, 2, 0).copy_(x)
    assert_same(results(stem, odd, direction.mT.contiguous().mT), wanted, 1e-6)


@pytest.mark.parametrize(("window", "pooled"), [("block", False), ("sliding", False), ("block", True)])
def test_every_thread_count_gives_the_same_bits(window, pooled):
    x, threads, seen = torch.randn(3, 3, 33, 29, requires_grad=True), torch.get_num_threads(), []
    weights = [torch.randn(shape, requires_grad=True) for shape in ((4, 3, 3), (16, 4), (4, 64, 3))]
    signs = torch.randn(64).sign() if pooled else None
    direction = torch.randn(3, 64, 9, 8) if pooled else torch.randn(3, 64, 33, 29)
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            out, _, moments = torch.ops.sasa.stem_attention(x, *weights, window, "mask", signs)
            seen.append((out, moments, *torch.autograd.grad((out * direction).sum() + moments.sum(), [x, *weights])))
    finally:
        torch.set_num_threads(threads)
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("image_gradient", [False, True])
def test_opcheck(image_gradient, pooled):
    stem = AttentionStem(out_channels=8, num_heads=2).double()
    x = torch.randn(2, 3, 6, 9, dtype=torch.float64, requires_grad=image_gradient)
    weights = [w.detach().requires_grad_() for w in (stem._forms(), stem._mixture(x), stem._value_weight())]
    signs = x.new_tensor([1, -1, 0, 1, 1, -1, 0, 1]) if pooled else None
    operator = torch.ops.sasa.stem_attention.default
    torch.library.opcheck(operator, (x, *weights, "block", "mask", signs))


@pytest.mark.parametrize("name", ["stem_attention", "stem_attention_backward", "local_attention_packed"])
def test_inductor_can_call_the_operators(name):
    """It passes their arguments, by name too, through a function with two arguments of its own."""
    arguments = getattr(torch.ops.sasa, name).default._schema.arguments
    assert not {"cls", "kernel"} & {argument.name for argument in arguments}


def test_is_the_choice_and_can_be_refused(monkeypatch):
    def served(dtype, channels, backend):
        return stem_operator.kernel_for("cpu", dtype, channels, backend, 4, 4, 16) == "cpu"

    assert served(torch.float32, 3, "auto") and served(torch.bfloat16, 3, "cpu")
    assert not served(torch.float32, 4, "auto")
    assert not served(torch.float32, 3, "tiled")
    monkeypatch.setenv("SASA_BACKEND", "reference")
    dispatch.forget()
    assert not served(torch.float32, 3, "auto") and served(torch.float32, 3, "cpu")


def test_keeps_nothing_but_the_image_and_the_weights():
    stem, sizes = AttentionStem(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        stem(torch.randn(1, 3, 64, 64))
    assert max(sizes) == 3 * 64 * 64


def test_infinite_and_nan_pixels_stay_in_their_windows():
    for window in ("block", "sliding"):
        stem, x = AttentionStem(window=window, backend="cpu"), torch.randn(1, 3, 12, 40)
        clean = stem(x)
        x[0, 1, 5, 21] = float("nan")
        seen = (stem(x) != clean).flatten(0, 1).any(0)
        wanted = torch.zeros(12, 40, dtype=torch.bool)
        wanted[(slice(4, 8), slice(20, 24)) if window == "block" else (slice(3, 7), slice(19, 23))] = True
        assert torch.equal(seen, wanted)
        assert torch.isnan(stem(x)[0, :, 5, 21]).all()


# ---- the stem that pools inside --------------------------------------------------------------------------------------


def two_stems(dtype, **options):
    """A pooling stem with weights of both signs and zero in its norm, and the same layers called one by one."""
    fused = make_stem(64, True, False, options).to(dtype)
    with torch.no_grad():
        fused[1].weight.normal_()
        fused[1].bias.normal_()
        fused[1].weight[3], fused[1].bias[3] = 0, 1  # the ReLU lets its gradient pass
        fused[1].running_mean.normal_()
        fused[1].running_var.uniform_(0.5, 2)
    layers = copy.deepcopy(fused).double()
    layers[0].register_forward_hook(lambda *_: None)
    return fused, layers


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(2, 32, 24), (1, 67, 70), (3, 9, 5), (2, 8, 130)], ids=str)
@pytest.mark.parametrize("border", ["mask", "zero"])
def test_pooling_inside_is_the_layers_one_by_one(border, shape, dtype, training):
    fused, layers = (stem.train(training) for stem in two_stems(dtype, border=border))
    b, h, w = shape
    x = torch.randn(b, 3, h, w, dtype=dtype)
    direction = torch.randn(b, 64, -(-h // 4), -(-w // 4), dtype=dtype)
    calls = []
    layers[0].register_forward_hook(lambda *_: calls.append(1))
    got, wanted = results(fused, x, direction), results(layers, x.double(), direction.double())
    assert calls == [1] and fused[0].can_pool(x)
    assert_same(got, wanted, 10 * TOLERANCE[dtype])
    for name, buffer in layers.named_buffers():
        torch.testing.assert_close(dict(fused.named_buffers())[name].double(), buffer.double(), rtol=1e-5, atol=1e-6)


def test_second_derivatives_of_pooling_inside_are_those_of_the_layers():
    seen, x = [], torch.randn(2, 3, 9, 6, dtype=torch.float64, requires_grad=True)
    for stem in two_stems(torch.float64):
        (grad,) = torch.autograd.grad(stem(x).square().sum(), x, create_graph=True)
        seen.append((grad, *torch.autograd.grad(grad.square().sum(), [x, *stem.parameters()], materialize_grads=True)))
    for ours, theirs in zip(*seen, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


def test_the_mean_of_the_norm_may_be_far_from_zero():
    fused, layers = two_stems(torch.float32)
    x = torch.randn(2, 3, 32, 32) + 30
    with torch.no_grad():
        fused.train(), layers.train()
        torch.testing.assert_close(fused(x).double(), layers(x.double()), rtol=1e-3, atol=1e-3)


def test_the_map_of_the_image_s_size_never_exists():
    stem, sizes = make_stem(64, True, False, {}), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        stem(torch.randn(2, 3, 64, 64))
    assert max(sizes) <= 2 * 64 * 16 * 16


@pytest.mark.parametrize(
    "options", [{"backend": "tiled"}, {"window": "sliding"}, {"values": "conv"}, {"block_size": 2}], ids=str
)
def test_other_stems_call_their_layers(options):
    stem, seen = make_stem(64, True, False, options), []
    stem[1].forward = lambda x, norm=stem[1].forward: seen.append(1) or norm(x)
    assert stem(torch.randn(1, 3, 16, 16)).shape == (1, 64, 4, 4)
    assert seen


def test_autocast_pools_inside_and_narrows_once_at_the_end():
    stem, x = make_stem(64, True, False, {}), torch.randn(1, 3, 16, 16)
    wanted = stem(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(stem(x), wanted.bfloat16())


@pytest.mark.parametrize("half", ["projections", "embeddings"])
def test_weights_of_another_dtype_are_cast_for_the_kernel(half):
    """As autocast does for half projections beside a norm in fp32: the kernel reads numbers of one type."""
    stem, x = make_stem(64, True, False, {}), torch.randn(2, 3, 16, 16)
    layer = stem[0]
    if half == "projections":
        for projection in (layer.query, layer.key, layer.value):
            projection.bfloat16()
    else:
        for name in ("emb_row", "emb_col", "emb_mix"):
            setattr(layer, name, torch.nn.Parameter(getattr(layer, name).detach().double()))
    called = copy.deepcopy(stem)
    called[1].register_forward_hook(lambda *what: None)
    with torch.autocast("cpu", torch.bfloat16, enabled=half == "projections"):
        ours, theirs = stem(x), called(x)
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.05, atol=0.05)
    (ours.float().sum() + theirs.float().sum()).backward()
    assert all(torch.isfinite(p.grad).all() for p in stem.parameters())


def test_a_backward_after_the_statistics_have_moved_on():
    """Evaluation, then training, then the backward of both, as the norm's own call allows."""
    stem = make_stem(64, True, False, {})
    first, second = torch.randn(2, 2, 3, 16, 16)
    evaluated = stem.eval()(first)
    (evaluated.sum() + stem.train()(second).sum()).backward()


@pytest.mark.parametrize("side", [11, 19, 33, 41])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_windows_that_reach_back_further_than_a_vector(side, dtype):
    """In memory that is not zero: what lies before a row is read as pixels."""
    junk = [torch.full((n,), 3e38) for n in (500, 3000, 9000, 30000, 100000, 250000) * 3]
    del junk
    options = {"block_size": side, "window": "sliding", "num_mixtures": 2, "border": "zero"}
    check((1, 23, 20), dtype=dtype, slack=10, **options)  # sums of up to 1,681 terms


@pytest.mark.parametrize("window", ["block", "sliding"])
def test_second_derivatives_under_autocast_are_as_exact_as_the_first(window):
    stem, x = AttentionStem(3, 16, num_heads=2, window=window), torch.randn(2, 3, 8, 8, requires_grad=True)
    grads = []
    for create in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            out = stem(x)
            grads.append(torch.autograd.grad(out.float().sum(), x, create_graph=create)[0])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_network_with_it_compiles_without_a_graph_break():
    model = ResNet26(10, stem=True).eval()
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-4, atol=1e-4)
