"""When weights may be used without calling the module that owns them: where nobody can tell the difference.

A fused path reads the weights of several modules and computes what their calls would. Adapters, hooks, pruning, weight
norm, offloading, quantization and replaced modules all act through those calls, so one predicate decides: `is_plain`
for a module whose class, call and forward are PyTorch's own, and more for a projection or a batch norm, whose numbers
are used. Where it says no, the modules are called.
"""

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._device import DeviceContext

from sasa.kernels.interface import autocast_dtype
from sasa.kernels.tracing import CeilAvgPool2d, CeilMaxPool2d

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(getattr(nn.modules.module, f"_global{name}") for name in _HOOKS)
_REPLACEABLE = ("forward", "_conv_forward", "_call_impl", "_compiled_call_impl")  # of one module alone


def _pytorchs_own(kind: type, name: str) -> Callable | None:
    """The function kind.name, or None where another package has put its own there already: no call is plain then."""
    function = getattr(kind, name)
    return function if getattr(function, "__globals__", None) is vars(sys.modules[kind.__module__]) else None


_CALL, _CALL_IMPL = (_pytorchs_own(nn.Module, name) for name in ("__call__", "_call_impl"))
_CONVOLVE = _pytorchs_own(nn.Conv2d, "_conv_forward")
_FORWARDS = {
    kind: _pytorchs_own(kind, "forward")
    for kind in (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, CeilMaxPool2d, nn.AvgPool2d, CeilAvgPool2d)
}


_CONV2D = F.conv2d if type(F.conv2d) is type(torch.relu) else None  # None: not PyTorch's own, which is a builtin


def fused_kind(kind: type[nn.Module]) -> type[nn.Module]:
    """Class decorator: modules of this kind take part in a fused path, as long as its forward is the one of now."""
    _FORWARDS[kind] = kind.forward
    return kind


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of `module` is the forward of `kind` and nothing else.

    False for a subclass (a parametrized module is one), any hook, its own or global, a compiled module, and a forward
    or call that was replaced, in the module or in its class.
    """
    if type(module) is not kind or kind.forward is not _FORWARDS[kind]:
        return False
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    own = module.__dict__
    if any(_GLOBAL_HOOKS) or any(name in own for name in _REPLACEABLE):
        return False
    return kind.__call__ is _CALL and kind._call_impl is _CALL_IMPL


def is_plain_projection(module: nn.Module, in_channels: int, out_channels: int, x: Tensor) -> bool:
    """Whether a call of `module` on x is a 1x1 convolution by a weight (out_channels, in_channels, 1, 1).

    False where F.conv2d was replaced or a mode sees the calls of PyTorch's functions (quantizers change operands so),
    with a bias, for a weight that is not exactly a `Parameter` (sharded, quantized, computed by a hook), for one
    that lies elsewhere (offloaded), and for one of another dtype, which a convolution refuses, but for those that
    autocast narrows.
    """
    if not is_plain(module, nn.Conv2d) or nn.Conv2d._conv_forward is not _CONVOLVE or _is_intercepted():
        return False
    weight, bias = module.weight, module.bias  # as its forward finds them: a bias may also be a buffer or an attribute
    if type(weight) is not nn.Parameter or bias is not None or weight.device != x.device:
        return False
    if weight.dtype != x.dtype and not (_is_narrowed(weight) and _is_narrowed(x)):
        return False
    geometry = module.stride == (1, 1) and module.padding == (0, 0) and module.groups == 1
    return geometry and weight.shape == (out_channels, in_channels, 1, 1)


def _is_intercepted() -> bool:
    """Whether a convolution's call of F.conv2d meets something else than PyTorch; `torch.device` as a context is none.

    Not asked while compiling, which has modes of its own.
    """
    if F.conv2d is not _CONV2D:
        return True
    if torch.compiler.is_compiling():
        return False
    modes = torch.overrides._get_current_function_mode_stack()
    return any(type(mode) is not DeviceContext for mode in modes)


def _is_narrowed(y: Tensor) -> bool:
    """Whether autocast is on and brings y to its dtype."""
    return autocast_dtype(y.device) is not None and y.is_floating_point() and y.dtype != torch.float64


def is_plain_norm(module: nn.Module, channels: int, x: Tensor) -> bool:
    """Whether `module` is an affine batch norm of so many channels, with running statistics and a momentum, like x.

    Like x: of its dtype and on its device.
    """
    if not is_plain(module, nn.BatchNorm2d) or module.momentum is None or not module.track_running_stats:
        return False
    numbers, statistics = (module.weight, module.bias), (module.running_mean, module.running_var)
    if any(type(y) is not nn.Parameter for y in numbers) or any(type(y) is not Tensor for y in statistics):
        return False
    return module.num_batches_tracked is not None and all(
        y.dtype == x.dtype and y.device == x.device and y.shape == (channels,) for y in (*numbers, *statistics)
    )


def is_plain_pool(module: nn.Module, side: int) -> bool:
    """Whether `module` takes the largest value of aligned side x side blocks, ragged last ones included."""
    kind = CeilMaxPool2d if type(module) is CeilMaxPool2d else nn.MaxPool2d
    return (
        is_plain(module, kind)
        and _both_are(side, module.kernel_size) and _both_are(side, module.stride)
        and _both_are(0, module.padding) and _both_are(1, module.dilation)
        and module.ceil_mode and not module.return_indices
    )  # fmt: skip


def is_plain_average(module: nn.Module, side: int) -> bool:
    """Whether `module` averages the aligned side x side blocks of a map whose sides are multiples of `side`."""
    kind = CeilAvgPool2d if type(module) is CeilAvgPool2d else nn.AvgPool2d
    return (
        is_plain(module, kind)
        and _both_are(side, module.kernel_size) and _both_are(side, module.stride)
        and _both_are(0, module.padding) and module.divisor_override is None
    )  # fmt: skip


def _both_are(wanted: int, sides: int | tuple[int, int]) -> bool:
    return sides in (wanted, (wanted, wanted))
