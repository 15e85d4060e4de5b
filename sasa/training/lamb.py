"""LAMB (You et al., 2020): Adam whose step, of each tensor, has a length in proportion to the tensor's own."""

from collections.abc import Iterable

import torch
from torch import Tensor

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of a number


class Lamb(torch.optim.Optimizer):
    """With m and v Adam's bias-corrected moments and w a tensor of weights, each step does

        u = m / (sqrt(v) + eps) + weight_decay * w
        w -= lr * |w| / |u| * u

    The ratio of the norms is 1 where either is 0, and in groups without weight decay: norms and biases, which start at
    0 or 1 and would grow by their own length, as the usual implementations have it.

    All tensors of a group at once, by foreach operators; no value is read from the device. As torch's fused optimizers
    it obeys `found_inf`, () on the weights' device, where a caller or a GradScaler sets it: a step with 1 there changes
    nothing but the gradients, and is not counted. Steps that were skipped so are a number in the first weight's state.
    """

    _step_supports_amp_scaling = True  # GradScaler then hands over its flag instead of reading it

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
            ValueError: a closure, or gradients that a GradScaler has not unscaled.
        """
        if closure is not None:
            raise ValueError("Lamb.step takes no closure")
        if getattr(self, "grad_scale", None) is not None:
            raise ValueError("Lamb.step takes unscaled gradients: call GradScaler.unscale_ before")
        flag = getattr(self, "found_inf", None)
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if weights:
                group["step"] += 1
                self._step(group, weights, None if flag is None else (1 - flag).to(weights[0].dtype))

    def _step(self, group: dict, weights: list[Tensor], keep: Tensor | None) -> None:
        """`keep`: 0 where the step changes nothing; None where it is known to be 1."""
        for p in weights:
            if "exp_avg" not in self.state[p]:
                self.state[p] |= {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        gradients = [p.grad for p in weights]
        first, second = ([self.state[p][name] for p in weights] for name in ("exp_avg", "exp_avg_sq"))
        beta1, beta2 = group["betas"]
        corrections = self._corrections(group, keep)
        if keep is None:
            torch._foreach_mul_(second, beta2)
        else:
            _clear(gradients, keep)
            torch._foreach_mul_(second, beta2 * keep + (1 - keep))  # beta2, or 1
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        if keep is not None:  # a mean that moves towards itself stays as it is
            torch._foreach_add_(gradients, torch._foreach_mul(first, 1 - keep))
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        scale = torch._foreach_div(second, corrections[1])
        torch._foreach_sqrt_(scale)
        torch._foreach_add_(scale, group["eps"])
        update = torch._foreach_div(first, corrections[0])
        torch._foreach_div_(update, scale)
        if group["weight_decay"]:
            torch._foreach_add_(update, weights, alpha=group["weight_decay"])
            own, length = (torch.stack(torch._foreach_norm(tensors)) for tensors in (weights, update))
            ratio = torch.where((own > 0) & (length > 0), own / length, 1.0)
            torch._foreach_mul_(update, list(ratio.unbind()))
        if keep is not None:
            torch._foreach_mul_(update, keep)
        torch._foreach_add_(weights, update, alpha=-group["lr"])

    def _corrections(self, group: dict, keep: Tensor | None) -> list[float | Tensor]:
        """1 - beta ** step of both moments, of the steps that were done; on the device once a flag was set."""
        weight = group["params"][0]
        state = self.state[weight]
        if keep is not None and "skipped" not in state:
            state["skipped"] = torch.zeros((), dtype=weight.dtype, device=weight.device)
        if "skipped" not in state:
            return [1 - beta ** group["step"] for beta in group["betas"]]
        if keep is not None:
            state["skipped"] += 1 - keep
        done = (group["step"] - state["skipped"].double()).clamp(min=1)  # of none, nothing is changed
        return [(1 - beta**done).to(weight.dtype) for beta in group["betas"]]


def _clear(tensors: list[Tensor], keep: Tensor) -> None:
    """0 in place of every number, NaN too, where `keep` is 0: products of bits, as 0 * NaN is NaN."""
    bits = _BITS[tensors[0].element_size()]
    torch._foreach_mul_([x.view(bits) for x in tensors], keep.to(bits))
