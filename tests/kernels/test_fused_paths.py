"""A fused path gives what calls of its modules give, whatever was done to one of them.

Each change is made twice: to a network that decides by itself, and to one where no module counts as plain. Outputs,
gradients, buffers and what hooks saw must be the same.
"""

import contextlib
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.ao.quantization import get_default_qat_qconfig
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.module_tracker import ModuleTracker

from fused_paths import PATHS, PROJECTIONS, build

EVERY = nn.modules.module  # where hooks of all modules are registered


# Changes: of a network, by the name of the module; `seen` takes what a hook sees. A context manager is entered. ------


def hook(register, changes=lambda *what: None, **options):
    """A hook of the module by its method `register`, or of every module by a function of that name."""

    def change(network, name, seen):
        target = network.get_submodule(name)

        def call(module, *what):
            if module is target:
                seen.append([type(x).__name__ for x in what])
                return changes(*what)
            return None

        handle = getattr(target if hasattr(target, register) else EVERY, register)(call, **options)
        return contextlib.closing(Removed(handle))

    return change


class Removed:
    def __init__(self, handle):
        self.close = handle.remove


def double_output(*what):
    return 2 * what[-1]


def double_input(inputs, *kwargs):
    return ((2 * inputs[0],), *kwargs) if kwargs else (2 * inputs[0],)


def double_gradient(grads, *_):
    return (2 * grads[0],)


def set_on_module(name, make):
    def change(network, target, seen):
        module = network.get_submodule(target)
        setattr(module, name, make(module))

    return change


def of_the_class(kind, attribute):
    """The function that every module of that kind has is replaced by one that doubles the target's output."""

    def change(network, name, seen):
        target, before = network.get_submodule(name), getattr(kind, attribute)

        @functools.wraps(before)
        def doubled(self, *inputs):
            return before(self, *inputs) * (2 if self is target else 1)

        return pytest.MonkeyPatch.context(), lambda patch: patch.setattr(kind, attribute, doubled)

    return change


class Standardised(nn.Conv2d):
    """As StdConv2d of timm: the weight is normalised in each call."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / (weight.std((1, 2, 3), keepdim=True) + 1e-3), self.bias)


class Adapted(nn.Module):
    """As LoRA layers of peft: has the wrapped layer's weight, and adds a product of two small matrices."""

    def __init__(self, layer):
        super().__init__()
        self.base = layer
        self.down = nn.Conv2d(layer.in_channels, 2, 1, bias=False)
        self.up = nn.Conv2d(2, layer.out_channels, 1, bias=False)

    weight = property(lambda self: self.base.weight)
    bias, stride, groups = None, (1, 1), 1

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def replaced(make):
    def change(network, name, seen):
        torch.manual_seed(2)
        network.set_submodule(name, make(network.get_submodule(name)))

    return change


def applied(function, *arguments, **options):
    return lambda network, name, seen: function(network.get_submodule(name), *arguments, **options)


def parametrized_and_cached(network, name, seen):
    parametrize.register_parametrization(network.get_submodule(name), "weight", nn.Tanh())
    return parametrize.cached()


def quantized_in_training(module):
    module.qconfig = get_default_qat_qconfig("fbgemm")
    return torch.ao.nn.qat.Conv2d.from_float(module.train())


def strided(module):
    """The same numbers, side by side in memory along the output channels."""
    weight = module.weight.detach().transpose(0, 1).contiguous()
    return nn.Parameter(weight.transpose(0, 1))


def tied(network, name, seen):
    """All projections of that shape have one parameter."""
    weight = network.get_submodule(name).weight
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.weight.shape == weight.shape:
            module.weight = weight


def one_module_twice(network, name, seen):
    parent, _, last = name.rpartition(".")
    if last != "value":
        network.get_submodule(parent).query = network.get_submodule(name)


def weight_hooks(network, name, seen):
    weight = network.get_submodule(name).weight
    weight.register_hook(lambda grad: 2 * grad)
    weight.register_post_accumulate_grad_hook(lambda p: seen.append(tuple(p.shape)))


def of_a_subclass_statistics(network, name, seen):
    """Buffers of a kind of their own, as of a sharded batch norm."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = module.running_mean.as_subclass(Counted)
    Counted.seen = seen


class Counted(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if "batch_norm" in function.__name__ or "lerp" in function.__name__:
            cls.seen.append(function.__name__)
        return super().__torch_function__(function, types, args, kwargs or {})


def tracked(network, name, seen):
    """The names of modules inside which a tensor was made, as counters of operations find them."""
    tracker, target = ModuleTracker(), network.get_submodule(name)
    before = type(target)._conv_forward

    def convolve(self, *inputs):
        seen.append(sorted(tracker.parents))
        return before(self, *inputs)

    @contextlib.contextmanager
    def tracking():
        with tracker, pytest.MonkeyPatch.context() as patch:
            patch.setattr(nn.Conv2d, "_conv_forward", convolve)
            yield

    return tracking()


CHANGES = {
    "forward hook": hook("register_forward_hook", double_output),
    "forward hook that only looks": hook("register_forward_hook"),
    "forward hook that is always called": hook("register_forward_hook", double_output, always_call=True),
    "forward hook with keywords": hook("register_forward_hook", double_output, with_kwargs=True),
    "forward pre-hook": hook("register_forward_pre_hook", double_input),
    "forward pre-hook with keywords": hook("register_forward_pre_hook", double_input, with_kwargs=True),
    "backward hook": hook("register_full_backward_hook", double_gradient),
    "backward pre-hook": hook("register_full_backward_pre_hook", double_gradient),
    "backward hook of the old kind": hook("register_backward_hook"),
    "global forward hook": hook("register_module_forward_hook", double_output),
    "global forward hook that is always called": hook("register_module_forward_hook", double_output, always_call=True),
    "global forward pre-hook": hook("register_module_forward_pre_hook", double_input),
    "global backward hook": hook("register_module_full_backward_hook", double_gradient),
    "global backward pre-hook": hook("register_module_full_backward_pre_hook", double_gradient),
    "module tracker": tracked,
    "hooks of the weight": weight_hooks,
    "hooks of the state dict": applied(nn.Module.register_state_dict_post_hook, lambda *a: None),
    "forward of its own": set_on_module("forward", lambda m: lambda x: 2 * nn.Conv2d.forward(m, x)),
    "convolution of its own": set_on_module("_conv_forward", lambda m: lambda x, w, b: 2 * F.conv2d(x, w, b)),
    "call of its own": set_on_module("_call_impl", lambda m: lambda x: 2 * nn.Module._call_impl(m, x)),
    "compiled call": set_on_module("_compiled_call_impl", lambda m: lambda x: 2 * m._call_impl(x)),
    "forward of the class": of_the_class(nn.Conv2d, "forward"),
    "convolution of the class": of_the_class(nn.Conv2d, "_conv_forward"),
    "call of every convolution": of_the_class(nn.Conv2d, "__call__"),
    "inner call of every convolution": of_the_class(nn.Conv2d, "_call_impl"),
    "call of every module": of_the_class(nn.Module, "__call__"),
    "inner call of every module": of_the_class(nn.Module, "_call_impl"),
    "subclass": set_on_module("__class__", lambda m: Standardised),
    "adapter": replaced(Adapted),
    "bias": set_on_module("bias", lambda m: nn.Parameter(torch.linspace(-1, 1, m.out_channels))),
    "parametrization": applied(parametrize.register_parametrization, "weight", nn.Tanh()),
    "cached parametrization": parametrized_and_cached,
    "pruning": applied(prune.l1_unstructured, "weight", 0.5),
    "weight norm": applied(parametrizations.weight_norm),
    "weight norm by a hook": applied(nn.utils.weight_norm),
    "spectral norm": applied(parametrizations.spectral_norm),
    "spectral norm by a hook": applied(nn.utils.spectral_norm),
    "fake quantization": replaced(quantized_in_training),
    "tied weights": tied,
    "one module twice": one_module_twice,
    "frozen weight": applied(nn.Module.requires_grad_, False),
    "channels last": applied(nn.Module.to, memory_format=torch.channels_last),
    "strided weight": set_on_module("weight", strided),
    "statistics of a subclass": of_a_subclass_statistics,
}  # fmt: skip


def results(path, name, change):
    """What the changed network gives: output, gradients, buffers, and what was seen."""
    network, x = build(path)
    seen, x = [], x.requires_grad_()
    with contextlib.ExitStack() as stack:
        context = change(network, name, seen)
        if isinstance(context, tuple):
            context[1](stack.enter_context(context[0]))
        elif hasattr(context, "__enter__"):
            stack.enter_context(context)
        out = network(x)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    grads = {n: p.grad for n, p in network.named_parameters()}
    buffers = {n: b.as_subclass(torch.Tensor) for n, b in network.named_buffers()}
    return out.detach(), x.grad, grads, buffers, seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("path", PATHS)
def test_a_changed_projection_gives_what_calls_of_the_modules_give(path, change, monkeypatch):
    for name in PROJECTIONS[path]:
        if change == "adapter" and path == "stem of convolved values" and name == "value":
            continue  # its product is 1x1
        got = results(path, name, CHANGES[change])
        with monkeypatch.context() as patch:
            patch.setattr("attention.is_plain_projection", lambda *a: False)
            patch.setattr("model.is_plain_norm", lambda *a: False)
            wanted = results(path, name, CHANGES[change])
        torch.testing.assert_close(got[:4], wanted[:4], rtol=1e-4, atol=1e-4)
        assert got[4] == wanted[4]


def test_parameters_given_for_one_call_are_those_that_count():
    """functional_call puts plain tensors in the place of parameters."""
    for path in PATHS:
        network, x = build(path)
        given = {name: 2 * p.detach() for name, p in network.named_parameters()}
        got = functional_call(network, given, (x,))
        changed, _ = build(path)
        changed.load_state_dict(given, strict=False)
        torch.testing.assert_close(got, changed(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_another_dtype_is_refused_as_a_convolution_refuses_it(path, autocast):
    """Autocast narrows neither fp64 nor integers."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for name in PROJECTIONS[path]:
            network, x = build(path)
            network.get_submodule(name).double()
            with pytest.raises((RuntimeError, ValueError)):
                network(x)
        for change in (torch.Tensor.double, torch.Tensor.byte, *(() if autocast else (torch.Tensor.bfloat16,))):
            network, x = build(path)
            with pytest.raises((RuntimeError, ValueError)):
                network(change(x))


@pytest.mark.parametrize("path", PATHS)
def test_fp64_stays_under_autocast(path):
    network, x = build(path)
    network, x = network.double(), x.double()
    with torch.autocast("cpu", torch.bfloat16):
        got = network(x)
    torch.testing.assert_close(got, network(x))


def test_one_value_per_channel_is_refused_as_batch_norm_refuses_it():
    network, _ = build("pooled stem")
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        network(torch.randn(1, 3, 1, 1))
    assert network.eval()(torch.randn(1, 3, 1, 1)).shape == (1, 16, 1, 1)


@pytest.mark.parametrize("training", [True, False])
def test_no_images_leave_the_statistics_as_they_are(training):
    network, _ = build("pooled stem")
    before = {name: buffer.clone() for name, buffer in network.named_buffers() if "tracked" not in name}
    assert network.train(training)(torch.randn(0, 3, 9, 10)).shape == (0, 16, 3, 3)
    torch.testing.assert_close(dict(network.named_buffers()), dict(network.named_buffers()) | before)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(3,), (3, 9), (3, 9, 10), (2, 4, 9, 10), (1, 2, 3, 9, 10)], ids=str)
def test_a_pooled_stem_names_the_shape_that_it_takes(shape, training):
    network, _ = build("pooled stem")
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)|in_channels=3"):
        network.train(training)(torch.randn(shape))


def test_parts_of_a_pooled_stem():
    """Sequential's slices, under the names that the layers have."""
    network, x = build("pooled stem")
    attention, norm, *_ = network.eval()
    torch.testing.assert_close(network[:2](x), norm(attention(x)))
    assert [name for name, _ in network[1:-1].named_children()] == ["1", "2"]
    torch.testing.assert_close(network[:](x), network(x))
    assert network[-1] is network[3]
