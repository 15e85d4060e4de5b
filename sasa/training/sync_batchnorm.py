"""Batch norm over all ranks of a run, for the CPU: torch's SyncBatchNorm refuses it. `--sync-bn`.

Shapes: B this rank's images, C channels, H x W map. Source: Ioffe and Szegedy 2015, arXiv 1502.03167, whose batch is
here the batches of all ranks together.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sasa.training.distributed import all_reduce_sum, is_distributed


class SyncBatchNorm2d(nn.BatchNorm2d):
    """(B, C, H, W) -> (B, C, H, W), B of any size on each rank; parameters and buffers are BatchNorm2d's."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        out, mean, variance, count = _SyncNorm.apply(x, self.weight, self.bias, self.eps)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)  # unbiased, as torch keeps it
        return out


class _SyncNorm(torch.autograd.Function):
    """Normalisation by the mean and variance over all ranks, and its gradient, which crosses the ranks as they do."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float):
        """-> normalised x, and of all ranks' values of each channel: mean (C,), variance (C,), their number (1,)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        variance, mean = torch.var_mean(x.to(wide), (0, 2, 3), correction=0)  # (C,), of this rank
        # A large mean would drown the variance in a sum of squares in fp32; in fp64 it does not.
        variance, mean, count = variance.double(), mean.double(), x.numel() // x.shape[1]
        sums = all_reduce_sum(count * torch.cat((mean.new_ones(1), mean, variance + mean.square())))  # (1 + 2 C,)
        number, (mean, squares) = sums[:1], (sums[1:] / sums[0]).chunk(2)
        mean, variance, number = (v.to(wide) for v in (mean, squares - mean.square(), number))
        ctx.save_for_backward(x, weight, mean, (variance + eps).rsqrt(), number)
        ctx.mark_non_differentiable(mean, variance, number)
        return F.batch_norm(x, mean, variance, weight, bias, eps=eps), mean, variance, number

    @staticmethod
    def backward(ctx, grad: Tensor, *_):
        x, weight, mean, scale, number = ctx.saved_tensors
        grad = grad.to(mean.dtype)
        normal = (x - _maps(mean)) * _maps(scale)  # (B, C, H, W)
        grad_bias, grad_weight = grad.sum((0, 2, 3)), (grad * normal).sum((0, 2, 3))  # (C,), of this rank's images
        by_mean, by_scale = all_reduce_sum(torch.stack((grad_bias, grad_weight))) / number
        grad_x = _maps(weight * scale) * (grad - _maps(by_mean) - normal * _maps(by_scale))
        return grad_x.to(x.dtype), grad_weight, grad_bias, None  # DDP adds up the parameters' own


def _maps(x: Tensor) -> Tensor:
    """(C,) -> (C, 1, 1)"""
    return x[:, None, None]


def sync_batch_norms(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with every BatchNorm2d over all ranks; its parameters are new ones, with the same names."""
    if not is_distributed():
        return model
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for name, module in list(model.named_children()):
        if type(module) is nn.BatchNorm2d:
            synced = SyncBatchNorm2d(module.num_features, module.eps, module.momentum).to(module.weight)
            synced.load_state_dict(module.state_dict())
            setattr(model, name, synced)
        else:
            sync_batch_norms(module, device)
    return model
