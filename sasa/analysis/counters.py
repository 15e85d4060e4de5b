"""Rules for other packages' counters of operations, which know PyTorch's own layers only.

They count by hooks: without a rule they see the projections of our layers and miss the attention between them. Both
packages count a multiply-add as 1, so half of the FLOPs of `sasa.analysis.flops`.
"""

from collections.abc import Callable

from torch import Tensor, nn

from attention import AttentionStem, LocalAttention2d
from sasa.analysis.flops import FLOPS


def operations(layer: nn.Module, x: Tensor, out: Tensor) -> int:
    """Multiply-adds of a call of one of our two layers on x, projections included, its pool left out."""
    kind = LocalAttention2d if isinstance(layer, LocalAttention2d) else AttentionStem
    return sum(FLOPS[kind](layer, x, out).values()) // 2


def thop_rules() -> dict[type[nn.Module], Callable]:
    """For thop.profile(..., custom_ops=thop_rules())."""

    def rule(layer: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        layer.total_ops += operations(layer, inputs[0], out)

    return dict.fromkeys((LocalAttention2d, AttentionStem), rule)


def ptflops_rules() -> dict[type[nn.Module], Callable]:
    """For ptflops.get_model_complexity_info(..., custom_modules_hooks=ptflops_rules(), backend="pytorch")."""

    def rule(layer: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        layer.__flops__ += operations(layer, inputs[0], out)

    return dict.fromkeys((LocalAttention2d, AttentionStem), rule)
