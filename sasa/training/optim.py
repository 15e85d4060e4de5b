"""Optimizer, learning rate and moving average of a run: functions of the network, the Config and the step."""

import math
import re

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from config import Settings
from sasa.training.lamb import Lamb

READERS = ("fc.", "backbone.fpn.", "head.")  # of a body's features: the classifier; a detector's pyramid and heads
EMBEDDINGS = ("rel_row", "rel_col", "emb_row", "emb_col", "emb_mix")


def learning_rate(config: Settings, step: int, steps_per_epoch: int) -> float:
    """The rate of global step `step` (the first is 0): linear warm-up, then cosine to --min-lr or steps.

    The whole schedule is a function of the Config: nothing of it needs saving.
    """
    epoch = (step + 1) / steps_per_epoch  # the end of this step, in epochs: the first rate is above 0
    if epoch < config.warmup_epochs:
        return config.lr * epoch / config.warmup_epochs
    if config.schedule == "step":
        steps = step // (config.step_epochs * steps_per_epoch)
        return max(config.lr * config.step_factor**steps, config.min_lr)
    progress = (step / steps_per_epoch - config.warmup_epochs) / (config.epochs - config.warmup_epochs)
    cosine = 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))
    return config.min_lr + (config.lr - config.min_lr) * cosine


def parameter_groups(
    model: nn.Module, weight_decay: float, embedding_weight_decay: float, layer_decay: float = 1.0
) -> list[dict]:
    """Weights of projections and convolutions decay; norms and biases do not; embeddings have their own decay.

    Decay pulls a norm's scale or an embedding towards "nothing special", which is a prior that neither needs.

    Args:
        layer_decay: below 1, the groups are cut by depth too, and each has the factor of its rate as "lr_scale".
    """
    depths = layer_depths(model) if layer_decay != 1 else {}
    groups: dict[tuple[int, int], dict] = {}
    for name, parameter in model.named_parameters():
        if name.rsplit(".", 1)[-1] in EMBEDDINGS:
            kind, decay = 1, embedding_weight_decay
        elif parameter.ndim >= 2:
            kind, decay = 0, weight_decay
        else:
            kind, decay = 2, 0.0
        depth = depths.get(name, 0)
        group = groups.setdefault((kind, depth), {"params": [], "weight_decay": decay})
        if depths:
            group["lr_scale"] = layer_decay**depth
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def layer_depths(model: nn.Module) -> dict[str, int]:
    """Of each parameter, how many steps it lies before what reads the body's features (0): a block is one, what comes
    before the blocks is the first."""
    places = {name: _place(name) for name, _ in model.named_parameters()}
    order = sorted({place for place in places.values() if place})
    return {name: len(order) - order.index(place) if place else 0 for name, place in places.items()}


def _place(name: str) -> tuple[int, int] | None:
    """(stage, block in it) of a parameter of the body, (0, 0) before the blocks; None of what reads the features."""
    if name.startswith(READERS):
        return None
    found = re.search(r"(?:^|\.)layer(\d+)\.(\d+)\.", name)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def build_optimizer(model: nn.Module, config: Settings, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer on the groups of `parameter_groups`, SGD and AdamW fused; the rate is set before each step.

    SGD's momentum begins as zeros, as the first step would make it: the fused kernel leaves memory as it found it where
    that step is skipped (torch 2.14.1: 1e23 in momentum_buffer).
    """
    groups = parameter_groups(model, config.weight_decay, config.embedding_weight_decay, config.layer_decay)
    fused = device.type in ("cpu", "cuda")  # one pass over the weights instead of one for each operation
    if config.optimizer in ("adamw", "lamb"):
        options = {"lr": config.lr, "betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_eps}
        return (
            Lamb(groups, **options) if config.optimizer == "lamb" else torch.optim.AdamW(groups, fused=fused, **options)
        )
    nesterov = config.nesterov and config.momentum > 0
    optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov, fused=fused)
    if config.momentum > 0:
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            if parameter.requires_grad:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def obeys_flag(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step changes nothing where `optimizer.found_inf`, on the device, is 1: torch's fused ones, and LAMB."""
    return isinstance(optimizer, Lamb) or bool(optimizer.defaults.get("fused"))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The rate of the next step, in each group times its own factor (--layer-decay)."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


def ema_decay(given: float | None, from_recipe: float | None, steps: int) -> float:
    """The decay of the moving average in a run of `steps` planned steps; --max-steps, which resumes may change, is not
    seen.

    `given` is taken as it is. Without it the decay is the recipe's, but 1 / (1 - decay), the steps that the average
    spans, is at most a fifth of the run: else the first weights would be a part of a short run's average, and it would
    score as chance.
    """
    if given is not None:
        return given
    return round(min(from_recipe, max(1 - 5 / steps, 0.0)), 6)


class MovingAverage(AveragedModel):
    """An exponential moving average of weights and buffers, in few kernels and without a wait; torch's names.

    The first update copies. Buffers of integers (batch norm's counts) are always copied.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, next(model.parameters()).device, use_buffers=True)
        self.decay = decay
        self._has_begun = False

    @property
    def has_begun(self) -> bool:
        """Whether it has been updated; waits for the device until it has."""
        self._has_begun = self._has_begun or self.n_averaged.item() > 0
        return self._has_begun

    @torch.no_grad()
    def update_parameters(self, model: nn.Module, flag: Tensor | None = None) -> None:
        """Move towards the model's weights and buffers.

        Args:
            flag: () on the device; where it is 1 nothing changes, provided the model's integers have not. Not at the
                first update.
        """
        averages, values = ([*m.parameters(), *m.buffers()] for m in (self.module, model))
        pairs, has_begun = list(zip(averages, values, strict=True)), self.has_begun
        copied = [pair for pair in pairs if not has_begun or not pair[0].is_floating_point()]
        moved = [pair for pair in pairs if has_begun and pair[0].is_floating_point()]
        if copied:
            torch._foreach_copy_(*map(list, zip(*copied, strict=True)))
        if moved and flag is None:
            torch._foreach_lerp_(*map(list, zip(*moved, strict=True)), 1 - self.decay)
        elif moved:
            averages, values = map(list, zip(*moved, strict=True))
            steps = torch._foreach_sub(values, averages)
            torch._foreach_mul_(steps, (1 - self.decay) * (1 - flag))
            torch._foreach_add_(averages, steps)
        self.n_averaged += 1 if flag is None else (1 - flag).to(self.n_averaged.dtype)
        self._has_begun = True


def build_ema(model: nn.Module, decay: float) -> MovingAverage | None:
    """The moving average of weights and of batch norm's statistics; None where the decay is 0."""
    return None if decay == 0 else MovingAverage(model, decay)


def set_batch_norm_momentum(model: nn.Module, momentum: float) -> None:
    """Batch norm's momentum: 1 - decay of the running statistics (the paper's decay of 0.9999 is 1e-4)."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = momentum
