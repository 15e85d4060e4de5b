"""Optimizer, learning rate and moving average of a run: functions of the network, the Config and the step."""

import math

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from config import Config

EMBEDDINGS = ("rel_row", "rel_col", "emb_row", "emb_col", "emb_mix")


def learning_rate(config: Config, step: int, steps_per_epoch: int) -> float:
    """The rate of global step `step` (the first is 0): linear warm-up, then cosine to 0 or steps.

    The whole schedule is a function of the Config: nothing of it needs saving.
    """
    epoch = (step + 1) / steps_per_epoch  # the end of this step, in epochs: the first rate is above 0
    if epoch < config.warmup_epochs:
        return config.lr * epoch / config.warmup_epochs
    if config.schedule == "step":
        return config.lr * config.step_factor ** (step // (config.step_epochs * steps_per_epoch))
    progress = (step / steps_per_epoch - config.warmup_epochs) / (config.epochs - config.warmup_epochs)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


def parameter_groups(model: nn.Module, weight_decay: float, embedding_weight_decay: float) -> list[dict]:
    """Weights of projections and convolutions decay; norms and biases do not; embeddings have their own decay.

    Decay pulls a norm's scale or an embedding towards "nothing special", which is a prior that neither needs.
    """
    decayed, embeddings, plain = [], [], []
    for name, parameter in model.named_parameters():
        if name.rsplit(".", 1)[-1] in EMBEDDINGS:
            embeddings.append(parameter)
        elif parameter.ndim >= 2:
            decayed.append(parameter)
        else:
            plain.append(parameter)
    groups = ((decayed, weight_decay), (embeddings, embedding_weight_decay), (plain, 0.0))
    return [{"params": parameters, "weight_decay": decay} for parameters, decay in groups if parameters]


def build_optimizer(model: nn.Module, config: Config, device: torch.device) -> torch.optim.Optimizer:
    """SGD or AdamW on the groups of `parameter_groups`, fused; the rate is set before each step."""
    groups = parameter_groups(model, config.weight_decay, config.embedding_weight_decay)
    fused = device.type in ("cpu", "cuda")  # one pass over the weights instead of one for each operation
    if config.optimizer == "adamw":
        betas = (config.adam_beta1, config.adam_beta2)
        return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.adam_eps, fused=fused)
    nesterov = config.nesterov and config.momentum > 0
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov, fused=fused)


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
