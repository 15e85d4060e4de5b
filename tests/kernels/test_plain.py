"""Fused paths read weights past their modules: nobody must be able to tell.

Every kind of change that acts through a module's call is tried on every module of every fused path.
"""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.overrides import TorchFunctionMode

from attention import AttentionStem, LocalAttention2d
from dispatch_modes import Operators
from fused_paths import PATHS, TARGETS, build
from sasa.kernels import cpu, plain
from sasa.kernels.plain import is_plain_norm, is_plain_pool, is_plain_projection
from sasa.kernels.tracing import CeilMaxPool2d

# Ways to double what a module returns --------------------------------------------------------------------------------


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


class Stored(torch.Tensor):
    """Stands for a quantized or sharded weight: the numbers are half of the real ones, as only their layers know."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        out = super().__torch_function__(function, types, args, kwargs or {})
        return 2 * out.as_subclass(torch.Tensor) if function in (F.conv2d, F.batch_norm) else out


def forward_hook(network, name, monkeypatch):
    network.get_submodule(name).register_forward_hook(lambda module, inputs, out: 2 * out)


def forward_pre_hook(network, name, monkeypatch):
    network.get_submodule(name).register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))


def global_forward_hook(network, name, monkeypatch):
    target = network.get_submodule(name)
    return nn.modules.module.register_module_forward_hook(lambda m, i, out: 2 * out if m is target else out)


def global_forward_pre_hook(network, name, monkeypatch):
    target = network.get_submodule(name)
    return nn.modules.module.register_module_forward_pre_hook(lambda m, i: (2 * i[0],) if m is target else i)


def other_forward(network, name, monkeypatch):
    module = network.get_submodule(name)
    module.forward = lambda x: 2 * type(module).forward(module, x)


def other_forward_of_the_class(network, name, monkeypatch):
    target, before = network.get_submodule(name), nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: before(self, x) * (2 if self is target else 1))


def other_call_of_every_module(network, name, monkeypatch):
    target, before = network.get_submodule(name), nn.Module.__call__
    monkeypatch.setattr(nn.Module, "__call__", lambda self, *x: before(self, *x) * (2 if self is target else 1))


def subclass(network, name, monkeypatch):
    network.get_submodule(name).__class__ = Doubled


def wrapper(network, name, monkeypatch):
    parent, _, last = name.rpartition(".")
    setattr(network.get_submodule(parent), last, nn.Sequential(network.get_submodule(name), Twice()))


def parametrization(network, name, monkeypatch):
    parametrize.register_parametrization(network.get_submodule(name), "weight", Twice())


def pruning(network, name, monkeypatch):
    module = prune.identity(network.get_submodule(name), "weight")
    module.weight_orig.data.mul_(2)


def weight_norm(network, name, monkeypatch):
    module = nn.utils.weight_norm(network.get_submodule(name))
    module.weight_g.data.mul_(2)


def weight_subclass(network, name, monkeypatch):
    module = network.get_submodule(name)
    module.weight = nn.Parameter(module.weight.detach().as_subclass(Stored))


def offloading(network, name, monkeypatch):
    """The weight is brought by the call, and gone after it."""
    module = network.get_submodule(name)
    kept = 2 * module.weight.detach()
    module.weight = nn.Parameter(module.weight.detach().to("meta"))
    module.forward = lambda x: F.conv2d(x, kept)


class DoublingMode(TorchFunctionMode):
    """As packages for quantization see and change the calls of PyTorch's functions."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        return 2 * out if function is F.conv2d and args[1] is self.weight else out

    def remove(self):
        self.__exit__(None, None, None)


def function_mode(network, name, monkeypatch):
    mode = DoublingMode(network.get_submodule(name).weight)
    mode.__enter__()
    return mode


def other_function(network, name, monkeypatch):
    weight, before = network.get_submodule(name).weight, F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda x, w, *rest: before(x, w, *rest) * (2 if w is weight else 1))


DOUBLING = [
    forward_hook, forward_pre_hook, global_forward_hook, global_forward_pre_hook, other_forward,
    other_forward_of_the_class, other_call_of_every_module, subclass, wrapper, parametrization, pruning, weight_norm,
    weight_subclass, offloading, function_mode, other_function,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize("double", DOUBLING, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("path", "name"), TARGETS)
def test_what_doubles_a_projection_is_honoured(path, name, double, monkeypatch):
    plain, x = build(path)
    before = plain(x)
    plain.get_submodule(name).weight.data.mul_(2)
    wanted = plain(x)
    network, _ = build(path)
    handle = double(network, name, monkeypatch)
    try:
        got = network(x)
    finally:
        if handle is not None:
            handle.remove()
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    scale = wanted.abs().max()
    assert (wanted - before).abs().max() > 0.01 * scale or path == "pooled stem"  # a norm forgets a factor
    assert wanted.abs().max() > 0


def an_attribute(module, bias):
    del module.bias
    module.bias = bias


def a_buffer(module, bias):
    del module.bias
    module.register_buffer("bias", bias)


def shadowing(module, bias):
    module.__dict__["bias"] = bias


@pytest.mark.parametrize("added", [an_attribute, a_buffer, shadowing], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("path", "name"), TARGETS)
def test_a_bias_that_is_no_parameter_is_added(path, name, added):
    shift = torch.randn(build(path)[0].get_submodule(name).out_channels)
    results = []
    for add in (lambda module, bias: setattr(module, "bias", nn.Parameter(bias)), added):
        network, x = build(path)
        add(network.get_submodule(name), shift)
        results.append(network(x))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(("path", "name"), TARGETS)
def test_a_bias_is_added(path, name):
    network, x = build(path)
    shift = torch.randn(network.get_submodule(name).out_channels)
    network.get_submodule(name).register_forward_hook(lambda m, i, out: out + shift[:, None, None])
    wanted = network(x)
    network, _ = build(path)
    module = network.get_submodule(name)
    module.bias = nn.Parameter(shift)
    got = network(x)
    torch.testing.assert_close(got, wanted)
    got.square().sum().backward()
    assert module.bias.grad is not None


@pytest.mark.parametrize("register", [
    "register_full_backward_hook", "register_full_backward_pre_hook",
    "register_module_full_backward_hook", "register_module_full_backward_pre_hook",
])  # fmt: skip
@pytest.mark.parametrize(("path", "name"), TARGETS)
def test_backward_hooks_run(path, name, register):
    network, x = build(path)
    target, seen = network.get_submodule(name), []

    def hook(module, *grads):
        if module is target:
            seen.append(module)

    handle = getattr(nn.modules.module if "module" in register else target, register)(hook)
    try:
        network(x.requires_grad_()).square().sum().backward()
    finally:
        handle.remove()
    assert len(seen) == 1


@pytest.mark.parametrize("change", [("stride", (2, 2)), ("groups", 2), ("padding", (1, 1))], ids=lambda c: c[0])
@pytest.mark.parametrize("which", ["query", "value"])
def test_another_geometry_is_no_plain_projection(which, change):
    layer = LocalAttention2d(4, 16, 3, num_heads=2)
    setattr(getattr(layer, which), *change)
    with pytest.raises((RuntimeError, ValueError)):  # as PyTorch says of such a module; never a wrong result
        layer(torch.randn(2, 4, 9, 10))


def test_projections_of_other_widths_are_not_split_wrongly():
    """Together they have the channels of three, each alone has too many or too few."""
    layer = LocalAttention2d(4, 16, 3, num_heads=2)
    layer.query, layer.key, layer.value = (nn.Conv2d(4, width, 1, bias=False) for width in (32, 8, 8))
    with pytest.raises((RuntimeError, ValueError)):
        layer(torch.randn(2, 4, 9, 10))


@pytest.mark.parametrize("change", [("to", "meta"), ("double",), ("bfloat16",)], ids=lambda c: c[-1])
def test_a_weight_unlike_the_input_is_no_plain_projection(change):
    """PyTorch's own convolution may read the memory of a weight on another device: the module decides, not we."""
    projection, x = nn.Conv2d(4, 16, 1, bias=False), torch.randn(2, 4, 9, 10)
    assert is_plain_projection(projection, 4, 16, x)
    getattr(projection, change[0])(*change[1:])
    assert not is_plain_projection(projection, 4, 16, x)


def test_a_default_device_changes_no_call():
    with torch.device("cpu"):
        assert is_plain_projection(nn.Conv2d(4, 16, 1, bias=False), 4, 16, torch.randn(2, 4, 9, 10))


@pytest.mark.parametrize("change", ["forward", "_conv_forward", "__call__", "_call_impl", "conv2d"])
def test_what_another_package_replaced_before_the_import_is_not_plain(change, monkeypatch):
    kind = nn.Conv2d if "forward" in change else F if change == "conv2d" else nn.Module
    before = getattr(kind, change)
    monkeypatch.setattr(kind, change, lambda self, *x: before(self, *x))
    later = {"__name__": "later"}
    exec(compile(inspect.getsource(plain), "later", "exec"), later)  # as if imported now
    assert not later["is_plain_projection"](nn.Conv2d(4, 16, 1, bias=False), 4, 16, torch.randn(2, 4, 9, 10))


# The pooled stem's other modules --------------------------------------------------------------------------------------


def hooked(name):
    def change(stem):
        stem[name].register_forward_hook(lambda m, i, out: 2 * out)

    return change


def norm(channels=16, **options):
    def change(stem):
        stem[1] = nn.BatchNorm2d(channels, **options)

    return change


def set_on(layer, name, value):
    return lambda stem: setattr(stem[layer], name, value)


def convolved_values(stem):
    torch.manual_seed(2)
    stem[0] = AttentionStem(3, 16, values="conv")


class OtherNorm(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


class OtherStem(AttentionStem):
    def forward(self, x):
        return 2 * super().forward(x)


POOLED = {
    "hook on the attention": hooked(0),
    "hook on the norm": hooked(1),
    "hook on the pool": hooked(2),
    "hook on the ReLU": hooked(3),
    "sliding windows": set_on(0, "window", "sliding"),
    "convolved values": convolved_values,
    "other attention": lambda stem: setattr(stem[0], "__class__", OtherStem),
    "other forward": lambda stem: setattr(stem[0], "forward", lambda x: 2 * AttentionStem.forward(stem[0], x)),
    "other norm": lambda stem: setattr(stem[1], "__class__", OtherNorm),
    "no affine": norm(affine=False),
    "no running statistics": norm(track_running_stats=False),
    "statistics not tracked": set_on(1, "track_running_stats", False),
    "statistics removed": lambda stem: [setattr(stem[1], n, None) for n in ("running_mean", "running_var")],
    "no counter": set_on(1, "num_batches_tracked", None),
    "no bias": set_on(1, "bias", None),
    "cumulative average": set_on(1, "momentum", None),
    "group norm": lambda stem: stem.__setitem__(1, nn.GroupNorm(4, 16)),
    "overlapping pool": lambda stem: stem.__setitem__(2, nn.MaxPool2d(4, 2, ceil_mode=True)),
    "average pool": lambda stem: stem.__setitem__(2, nn.AvgPool2d(4, 4, ceil_mode=True)),
    "padded pool": lambda stem: setattr(stem[2], "padding", 1),
    "dilated pool": lambda stem: setattr(stem[2], "dilation", (1, 2)),
    "smaller pool": lambda stem: setattr(stem[2], "kernel_size", 3),
    "other pool": lambda stem: setattr(stem[2], "forward", lambda x: F.avg_pool2d(x, 4, ceil_mode=True)),
    "stored norm": lambda stem: setattr(stem[1], "weight", nn.Parameter(stem[1].weight.detach().as_subclass(Stored))),
    "stored bias": lambda stem: setattr(stem[1], "bias", nn.Parameter(stem[1].bias.detach().as_subclass(Stored))),
    "floor pool": lambda stem: setattr(stem[2], "ceil_mode", False),
    "other activation": lambda stem: stem.__setitem__(3, nn.Tanh()),
    "one more module": lambda stem: stem.append(Twice()),
    "no activation": lambda stem: stem.__delitem__(3),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("which", POOLED)
def test_a_changed_pooled_stem_is_its_modules_one_by_one(which, training):
    (stem, x), (steps, _) = build("pooled stem"), build("pooled stem")
    for changed in (stem, steps):
        POOLED[which](changed)
        changed.train(training)
    for _ in range(2):
        got, wanted = stem(x), nn.Sequential.forward(steps, x)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(stem.buffers(), steps.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


REFUSED = {
    "pool with indices": lambda stem: setattr(stem[2], "return_indices", True),
    "norm of another dtype": lambda stem: stem[1].double(),
    "norm on another device": lambda stem: stem[1].to("meta"),
    "norm of one channel": norm(1),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("which", REFUSED)
def test_a_pooled_stem_is_refused_where_its_modules_are(which, training):
    stem, x = build("pooled stem")
    REFUSED[which](stem)
    stem.train(training)
    for call in (stem, lambda x: nn.Sequential.forward(stem, x)):
        with pytest.raises((RuntimeError, TypeError)):
            call(x)


@pytest.mark.parametrize("change", [
    lambda y: y.to("meta"), torch.Tensor.double, lambda y: y[:1].clone()
], ids=["device", "dtype", "channels"])  # fmt: skip
@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_one_tensor_of_the_norm_unlike_the_input(name, change):
    norm, x = nn.BatchNorm2d(16), torch.randn(2, 3, 9, 10)
    assert is_plain_norm(norm, 16, x)
    changed = change(getattr(norm, name).detach())
    setattr(norm, name, nn.Parameter(changed) if name in norm._parameters else changed)
    assert not is_plain_norm(norm, 16, x)


@pytest.mark.parametrize("pool", [
    CeilMaxPool2d(4), nn.MaxPool2d(4, 4, ceil_mode=True), nn.MaxPool2d((4, 4), (4, 4), (0, 0), (1, 1), ceil_mode=True)
], ids=["ours", "PyTorch's", "pairs"])  # fmt: skip
def test_pools_of_aligned_blocks(pool):
    assert is_plain_pool(pool, 4)
    assert not is_plain_pool(pool, 2)


# And where nothing was changed, they are fused ------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_plain_modules_are_fused(path):
    network, x = build(path)
    with Operators() as operators:
        network(x)
    inside = "projected_attention" in operators.seen
    assert inside == ("channels last" in path and cpu.unusable() is None)
    assert operators.seen.count("convolution") == (
        ("layer" in path and not inside) or path == "stem of convolved values"
    )
    if path.startswith("layer") and not inside:
        assert "local_attention_packed" in operators.seen
    if path.startswith("pooled layer") and inside:
        assert "avg_pool2d" not in operators.seen
    if path == "pooled layer" and "local_attention_pooled" in operators.seen:  # with a compiler
        assert "avg_pool2d" not in operators.seen
    if path == "pooled stem" and "stem_attention" in operators.seen:  # with a compiler
        assert "native_batch_norm" not in operators.seen and "max_pool2d_with_indices" not in operators.seen


def test_half_types_are_not_pooled_before_the_norm():
    """Batch norm rounds to them what the kernel keeps wide."""
    stem, x = AttentionStem(3, 16), torch.randn(2, 3, 9, 10)
    assert stem.can_pool(x) == (stem.kernel("cpu", x.dtype) is not None)
    assert not stem.bfloat16().can_pool(x.bfloat16())


@pytest.mark.parametrize("path", PATHS)
def test_weights_wider_than_the_input_are_fused_under_autocast(path):
    """As the layers of a network in mixed precision are: the input is the output of another layer."""
    network, x = build(path)
    with torch.autocast("cpu", torch.bfloat16), Operators() as operators:
        network(x.bfloat16())
    assert operators.seen.count("convolution") == ("layer" in path or path == "stem of convolved values")


@pytest.mark.parametrize("name", ["attention_weights", "attention_logits"])
@pytest.mark.parametrize("path", [p for p in PATHS if p != "pooled stem"])
def test_attention_weights_honour_hooks_too(path, name):
    network, x = build(path)
    pixels = torch.tensor([[0, 0], [3, 7], [8, 9]])
    plain, _ = build(path)
    plain.query.weight.data.mul_(2)
    network.query.register_forward_hook(lambda m, i, out: 2 * out)
    for chosen in (None, pixels):
        got, wanted = (getattr(y, name)(x, chosen) for y in (network, plain))
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
