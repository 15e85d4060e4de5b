"""LAMB (You et al., 2020): Adam whose step, of each tensor, has a length in proportion to the tensor's own."""

from collections.abc import Iterable

import torch
from torch import Tensor


class Lamb(torch.optim.Optimizer):
    """With m and v Adam's bias-corrected moments and w a tensor of weights, each step does

        u = m / (sqrt(v) + eps) + weight_decay * w
        w -= lr * |w| / |u| * u

    The ratio of the norms is 1 where either is 0, and in groups without weight decay: norms and biases, which start at
    0 or 1 and would grow by their own length, as the usual implementations have it.

    All tensors of a group at once, by foreach operators; no value is read from the device.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One step with the gradients that are there; `closure` is not taken.

        Raises:
            ValueError: a closure.
        """
        if closure is not None:
            raise ValueError("Lamb.step takes no closure")
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if weights:
                group["step"] += 1
                self._step(group, weights)

    def _step(self, group: dict, weights: list[Tensor]) -> None:
        for p in weights:
            if not self.state[p]:
                self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        gradients = [p.grad for p in weights]
        first, second = ([self.state[p][name] for p in weights] for name in ("exp_avg", "exp_avg_sq"))
        beta1, beta2 = group["betas"]
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        scale = torch._foreach_div(second, 1 - beta2 ** group["step"])
        torch._foreach_sqrt_(scale)
        torch._foreach_add_(scale, group["eps"])
        update = torch._foreach_div(first, 1 - beta1 ** group["step"])
        torch._foreach_div_(update, scale)
        if group["weight_decay"]:
            torch._foreach_add_(update, weights, alpha=group["weight_decay"])
            own, length = (torch.stack(torch._foreach_norm(tensors)) for tensors in (weights, update))
            ratio = torch.where((own > 0) & (length > 0), own / length, 1.0)
            torch._foreach_mul_(update, list(ratio.unbind()))
        torch._foreach_add_(weights, update, alpha=-group["lr"])
