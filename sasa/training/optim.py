"""Optimizer, learning rate and moving average of a run: functions of the network, the Config and the step."""

import math
import re

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from config import Settings
from sasa.training.lamb import Lamb

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
    """Of each parameter, how many steps it lies before the classifier (0): a block is one, the stem is the first."""
    names = [name for name, _ in model.named_parameters()]
    blocks = sorted({place for place in map(_block, names) if place})
    top = len(blocks) + 1
    return {
        name: 0 if name.startswith("fc.") else top - blocks.index(_block(name)) - 1 if _block(name) else top
        for name in names
    }


def _block(name: str) -> tuple[int, int] | None:
    """(stage, place in it) of a block's parameter; None of the stem's and the classifier's."""
    found = re.match(r"layer(\d+)\.(\d+)\.", name)
    return (int(found[1]), int(found[2])) if found else None


def build_optimizer(model: nn.Module, config: Settings, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer on the groups of `parameter_groups`, SGD and AdamW fused; the rate is set before each step."""
    groups = parameter_groups(model, config.weight_decay, config.embedding_weight_decay, config.layer_decay)
    fused = device.type in ("cpu", "cuda")  # one pass over the weights instead of one for each operation
    if config.optimizer in ("adamw", "lamb"):
        options = {"lr": config.lr, "betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_eps}
        return (
            Lamb(groups, **options) if config.optimizer == "lamb" else torch.optim.AdamW(groups, fused=fused, **options)
        )
    nesterov = config.nesterov and config.momentum > 0
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov, fused=fused)


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


def build_ema(model: nn.Module, decay: float) -> AveragedModel | None:
    """The moving average of weights and of batch norm's statistics; None where the decay is 0."""
    if decay == 0:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def set_batch_norm_momentum(model: nn.Module, momentum: float) -> None:
    """Batch norm's momentum: 1 - decay of the running statistics (the paper's decay of 0.9999 is 1e-4)."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = momentum
