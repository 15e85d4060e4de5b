"""The product that makes query, key and value of a map, and its gradients."""

import torch
import torch.nn.functional as F
from torch import Tensor


def project(x: Tensor, weight: Tensor) -> Tensor:
    """A 1x1 convolution: (B, C, H, W) by (C', C, 1, 1) -> (B, C', H, W).

    On a CPU oneDNN is given each map as one row of pixels: the gradient of the weight then takes 0.7 to 1.0 of the time
    (fp32, two threads, maps of 8 to 56 pixels a side), the rest as long as before. One image alone is left as it is: as
    a row it would lose its layout.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing() or not _has_rows(x):
        return F.conv2d(x, weight)
    return F.conv2d(_as_row(x), weight).unflatten(3, x.shape[2:]).squeeze(2)


def projection_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and of the weight from that of what `project` makes of them, where wanted."""
    flat = _has_rows(x) and _has_rows(grad)
    inputs = (_as_row(grad), _as_row(x)) if flat else (grad, x)
    by_x, by_weight, _ = torch.ops.aten.convolution_backward(
        *inputs, weight, None, (1, 1), (0, 0), (1, 1), False, (0, 0), 1, (*wanted, False)
    )
    if flat and wanted[0]:
        by_x = by_x.reshape(x.shape)
    return by_x if wanted[0] else None, by_weight if wanted[1] else None


def _has_rows(x: Tensor) -> bool:
    """Whether each map is one row of pixels as it lies, of more than one image."""
    return x.shape[0] > 1 and x.stride(2) == x.shape[3] * x.stride(3)


def _as_row(x: Tensor) -> Tensor:
    return x.reshape(*x.shape[:2], 1, -1)
