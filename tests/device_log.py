"""A device that is not there: tensors on `meta`, and a log of what is queued on it and of what the host waits for.

Host tensors are on the CPU, as ever. A value that the host reads of the device is an error, but for copies that are
declared not to wait; mixed precision is done as autocast does it on CUDA.
"""

import collections

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sasa.kernels import plain

META = torch.device("meta")
_COPIES = ("aten::_to_copy", "aten::to", "aten::copy_")  # `to` is whole in inference mode
# Operators that queue no kernel: views, and memory that is not written.
_QUIET = ("view", "detach", "alias", "expand", "permute", "transpose", "slice", "select", "split", "unbind", "squeeze",
          "unsqueeze", "empty", "as_strided", "t", "_reshape_alias", "unfold", "diagonal", "lift_fresh", "is_same_size",
          "split_with_sizes", "chunk", "new_empty", "empty_like", "empty_strided", "new_empty_strided",
          "_unsafe_view")  # fmt: skip


class DeviceLog(TorchDispatchMode):
    """Attributes:
    kernels: operator on the device -> how often it was queued.
    bytes: operator -> what it read and wrote, each of its tensors once.
    copies: (from, to, whether the host waits) -> how often.
    waits: what the host waited for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.bytes, self.copies = (collections.Counter() for _ in range(3))
        self.waits = []

    def __enter__(self):
        self._tensor = torch.tensor

        def tensor(data, *, device=None, **options):  # a copy that no dispatcher sees
            if device is not None and torch.device(device) == META:
                self._copied("host", "device", False)
            return self._tensor(data, device=device, **options)

        torch.tensor = tensor
        return super().__enter__()

    def __exit__(self, *error):
        torch.tensor = self._tensor
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function._schema.name
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_device = any(x.device == META for x in tensors)
        if name == "aten::_local_scalar_dense" and on_device:
            raise AssertionError("the host reads a number of the device")
        if name in ("aten::_to_copy", "aten::to") and on_device and kwargs.get("device", META).type == "cpu":
            self._copied("device", "host", kwargs.get("non_blocking", False))
            return torch.zeros(tensors[0].shape, dtype=kwargs.get("dtype") or tensors[0].dtype)
        if name.startswith(("aten::_fused_", "aten::_amp_")):  # they write in place, and meta has no such kernel
            self._queued(name, tensors)
            return None
        out = function(*args, **kwargs)
        results = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        if not on_device and not any(x.device == META for x in results):
            return out
        if name in _COPIES:
            source = tensors[-1] if name == "aten::copy_" else tensors[0]
            if source.device.type == "cpu":
                self._copied("host", "device", kwargs.get("non_blocking", args[2:3] == (True,)))
        elif any(x.device.type == "cpu" and x.ndim for x in tensors):
            self._copied("host", "device", False)  # an operator that takes both
        if name.removeprefix("aten::").removesuffix("_copy") not in _QUIET:
            self._queued(name, tensors + results)
        return out

    def _queued(self, name: str, tensors: list[torch.Tensor]) -> None:
        self.kernels[name] += 1
        self.bytes[name] += sum(x.numel() * x.element_size() for x in tensors if x.device == META)

    def _copied(self, source: str, target: str, waits_not: bool) -> None:
        self.copies[source, target, "no wait" if waits_not else "wait"] += 1
        if not waits_not:
            self.waits.append(f"copy from {source} to {target}")


class Autocast(TorchFunctionMode):
    """bf16 for convolutions, products and ours, each weight narrowed once; what autocast does on CUDA."""

    NARROW = (torch.conv2d, torch.nn.functional.conv2d, torch.nn.functional.linear, torch.matmul)

    def __init__(self) -> None:
        super().__init__()
        self._narrowed: dict[torch.Tensor, torch.Tensor] = {}

    def __enter__(self):
        self._is_intercepted = plain._is_intercepted
        plain._is_intercepted = lambda: False  # it stands for autocast, for which weights are used past their modules
        return super().__enter__()

    def __exit__(self, *error):
        plain._is_intercepted = self._is_intercepted
        return super().__exit__(*error)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self.NARROW:
            args = tuple(self._narrow(x) if isinstance(x, torch.Tensor) else x for x in args)
        return function(*args, **(kwargs or {}))

    def _narrow(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.float32:
            return x
        if not x.is_leaf:
            return x.bfloat16()
        if x not in self._narrowed:
            self._narrowed[x] = x.bfloat16()
        return self._narrowed[x]
