"""Tracers: torch.fx, torch.export with free sizes, ONNX, fake and meta tensors."""

import io
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torchvision.models.feature_extraction import create_feature_extractor

import model
from attention import AttentionStem, LocalAttention2d
from sasa.kernels.tracing import CeilAvgPool2d, CeilMaxPool2d

NETWORKS = {
    "imagenet": {"kernel_size": 3},
    "imagenet, stem": {"kernel_size": 3, "stem": True},
    "small": {"kernel_size": 3, "small_images": True},
    "small, stem": {"kernel_size": 3, "small_images": True, "stem": True},
    "baseline": {"attention_stages": ()},
    "absolute": {"kernel_size": 3, "position": "absolute", "small_images": True},
}

pytestmark = pytest.mark.usefixtures("small_network")
# The suite was run with 2.6, which cannot, and from 2.14 on; tools.export knows the versions between.
OLD_TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 14)


def network(which, **options):
    torch.manual_seed(0)
    return model.ResNet26(num_classes=4, **NETWORKS[which], **options).eval()


@pytest.mark.parametrize("which", NETWORKS)
def test_symbolic_trace_keeps_the_layers_as_leaves(which):
    net, x = network(which), torch.randn(2, 3, 40, 32)
    traced = torch.fx.symbolic_trace(net)
    torch.testing.assert_close(traced(x), net(x))
    called = {node.target for node in traced.graph.nodes if node.op == "call_module"}
    layers = {n for n, m in net.named_modules() if isinstance(m, LocalAttention2d | AttentionStem)}
    assert layers <= called and not any(name.endswith(("query", "value")) for name in called)
    got = traced(torch.randn(1, 3, 64, 48))  # the size is not tied
    assert got.shape == (1, 4)


def test_a_layer_as_root_says_why_it_cannot_be_traced():
    with pytest.raises(ValueError, match="LocalAttention2d"):
        torch.fx.symbolic_trace(LocalAttention2d(4, 8, 3, num_heads=2))


@pytest.mark.parametrize("which", ["imagenet", "small, stem", "baseline"])
def test_features_by_torchvision(which):
    net, x = network(which), torch.randn(2, 3, 40, 32)
    features = create_feature_extractor(net, ["layer1", "layer3.0.conv3"])(x)
    torch.testing.assert_close(features["layer1"], net.layer1(net.stem(x)))
    assert features["layer3.0.conv3"].shape[1] == 256


@pytest.mark.skipif(OLD_TORCH, reason="this torch's export ties height and width down")
@pytest.mark.parametrize("which", ["imagenet, stem", "small, stem", "imagenet"])
@pytest.mark.filterwarnings("ignore")
def test_export_with_free_batch_height_and_width(which):
    net = network(which)
    free = {0: Dim("batch", min=1, max=64), 2: Dim("height", min=64, max=512), 3: Dim("width", min=64, max=512)}
    exported = torch.export.export(net, (torch.randn(2, 3, 64, 96),), dynamic_shapes=(free,))
    program = exported.module()
    for shape in ((1, 3, 64, 96), (3, 3, 65, 79), (2, 3, 98, 64)):
        x = torch.randn(shape)
        torch.testing.assert_close(program(x), net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", [2, 3, 4])
@pytest.mark.parametrize("size", [(1, 1), (5, 7), (8, 12), (9, 6), (13, 11)])
def test_pools_of_free_sizes_equal_pytorchs(side, size, monkeypatch):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    average = F.avg_pool2d(x, side, ceil_mode=True, count_include_pad=False)
    largest = F.max_pool2d(x, side, ceil_mode=True)
    for free in (False, True):
        monkeypatch.setattr("sasa.kernels.tracing.has_free_size", lambda x, free=free: free)
        torch.testing.assert_close(CeilAvgPool2d(side)(x), average)
        assert torch.equal(CeilMaxPool2d(side)(x), largest)


@pytest.mark.skipif(OLD_TORCH, reason="this torch's export ties height and width down")
@pytest.mark.parametrize("which", ["small", "small, stem", "imagenet, stem"])
def test_export_to_onnx_with_free_sizes(which, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    import onnxruntime

    net, path = network(which), str(tmp_path / "net.onnx")
    free = {0: Dim("batch", min=1, max=64), 2: Dim("height", min=64, max=512), 3: Dim("width", min=64, max=512)}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (torch.randn(2, 3, 64, 72),), path, dynamo=True, dynamic_shapes=(free,), verbose=False)
    session = onnxruntime.InferenceSession(path)
    for shape in ((2, 3, 64, 72), (1, 3, 67, 73)):
        x = torch.randn(shape)
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        wanted = net(x)
        assert (torch.from_numpy(got) - wanted).abs().max() <= 1e-5 * wanted.abs().max().clamp(min=1)


@pytest.mark.skipif(OLD_TORCH, reason="this torch's compiler makes symbols of the weights' sizes too")
@pytest.mark.parametrize("window", ["block", "sliding"])
def test_the_stem_compiles_with_free_sizes_in_one_graph(window):
    stem = AttentionStem(3, 16, window=window)
    torch._dynamo.reset()
    compiled = torch.compile(stem, backend="aot_eager", fullgraph=True, dynamic=True)
    for size in ((16, 16), (18, 13)):
        x = torch.randn(2, 3, *size)
        torch.testing.assert_close(compiled(x), stem(x), rtol=1e-5, atol=1e-5)


def test_compiled_layers_honour_hooks():
    layer, x = LocalAttention2d(4, 8, 3, num_heads=2), torch.randn(2, 4, 6, 6)
    layer.value.register_forward_hook(lambda m, i, out: 2 * out)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("which", NETWORKS)
def test_fake_tensors(which):
    with FakeTensorMode():
        net = model.ResNet26(num_classes=4, **NETWORKS[which])
        out = net(torch.randn(2, 3, 40, 32))
        out.sum().backward()
    assert out.shape == (2, 4)


def spread_of(net):
    """Standard deviation of every parameter and buffer with numbers enough; the value of constant ones."""
    return {
        name: (x.float().std().item() if x.numel() > 1 else 0.0, x.float().mean().item())
        for name, x in net.state_dict().items()
    }


@pytest.mark.parametrize("which", [*NETWORKS, "zero residual"])
def test_meta_construction_and_reset_give_the_same_initialisation(which):
    """In FSDP's order: each module that has numbers of its own, parents first."""
    options = {"zero_init_residual": True} if which == "zero residual" else {}
    which = "small, stem" if which == "zero residual" else which
    wanted = spread_of(network(which, **options))
    with torch.device("meta"):
        net = model.ResNet26(num_classes=4, **NETWORKS[which], **options)
    queue = [net]
    while queue:
        module = queue.pop(0)
        queue += module.children()
        if [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            module.to_empty(device="cpu", recurse=False)
            for x in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                nn.init.constant_(x.data, 7)  # what was not initialised is seen
            module.reset_parameters()
    got = spread_of(net)
    for name, (std, mean) in wanted.items():
        count = net.state_dict()[name].numel()
        assert abs(got[name][0] - std) <= (6 / count**0.5) * std, name  # a sample's deviation, six times over
        assert abs(got[name][1] - mean) <= 6 * max(std, 1e-12) / count**0.5 * 1.5, name


@pytest.mark.parametrize("which", NETWORKS)
@pytest.mark.filterwarnings("ignore:.*:torch.jit.TracerWarning", "ignore:.*jit.*:FutureWarning")
def test_a_jit_trace_serves_other_sizes(which):
    """Even ones and odd ones: what a kernel takes in one step for some sizes must not be kept for all."""
    net = network(which)
    traced = torch.jit.trace(net, torch.randn(1, 3, 64, 64), check_trace=False)
    for size in ((64, 64), (80, 80), (72, 40), (65, 33)):
        if which == "absolute" and size != (64, 64):
            continue  # the positions are numbers of the trace
        x = torch.randn(2, 3, *size)
        torch.testing.assert_close(traced(x), net(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("which", ["imagenet, stem", "small, stem"])
@pytest.mark.filterwarnings("ignore:.*:torch.jit.TracerWarning", "ignore:.*jit.*:FutureWarning")
def test_a_jit_trace_gives_the_images_gradient(which):
    """Though the image that it was traced with needed none."""
    net, x = network(which), torch.randn(1, 3, 32, 32)
    traced = torch.jit.trace(net, x, check_trace=False)
    wanted, got = (torch.autograd.grad(f(y).sum(), y)[0] for f in (net, traced) for y in [x.clone().requires_grad_()])
    torch.testing.assert_close(got, wanted)


def test_networks_can_still_be_copied_and_saved_whole():
    import copy

    net = network("small, stem")
    other = copy.deepcopy(net)
    before = net.layer1[0].conv1.weight.clone()
    other.layer1[0].conv1.reset_parameters()
    assert torch.equal(net.layer1[0].conv1.weight, before)  # the copy's own
    assert not torch.equal(other.layer1[0].conv1.weight, before)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(torch.load(file, weights_only=False)(x), net(x))
