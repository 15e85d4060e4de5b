"""What users of image models expect of a network: intermediate maps, a head of its own, checkpointing, freezing.

The names are those of timm and torchvision, so that code written for their ResNets finds what it looks for.
"""

import contextlib
from collections.abc import Iterator, Sequence
from numbers import Integral

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from sasa.kernels.tracing import is_proxy

FEATURES = ("stem", "layer1", "layer2", "layer3", "layer4")


class CheckpointedBlock(nn.Module):
    """A block whose forward can be computed again in backward instead of keeping its maps.

    A subclass defines `compute(x)`. `grad_checkpointing` is set by `StagedNetwork.set_grad_checkpointing`.
    """

    grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.grad_checkpointing or is_proxy(x) or not torch.is_grad_enabled():
            return self.compute(x)
        if torch.compiler.is_compiling():
            return checkpoint(self.compute, x, use_reentrant=False)
        contexts = (contextlib.nullcontext(), _statistics_kept(self))
        return checkpoint(self.compute, x, use_reentrant=False, context_fn=lambda: contexts)


@contextlib.contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """Running statistics stay as they are: the second pass over a batch must not count it again."""
    norms = [
        m for m in block.modules() if isinstance(m, _BatchNorm) and m.training and m.num_batches_tracked is not None
    ]
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)


class StagedNetwork(nn.Module):
    """A network of `stem`, `layer1` to `layer4`, `avgpool` and `fc`."""

    @property
    def feature_info(self) -> list[dict[str, int | str]]:
        """Of each intermediate map: `num_chs` channels, `reduction` of height and width, `module` that returns it."""
        reductions = (1, 1, 2, 4, 8) if self.small_images else (4, 4, 8, 16, 32)
        channels = [64] + [64 * 2**stage * self.layer1[0].expansion for stage in range(4)]
        return [
            {"num_chs": width, "reduction": reduction, "module": name}
            for width, reduction, name in zip(channels, reductions, FEATURES, strict=True)
        ]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps of the stem and of the stages on the way to `forward_features`.

        Args:
            x: (B, C, H, W).
            indices: which of the five maps of `feature_info`; a number n for the last n; None for all.
            norm: has no effect, as a map ends with its block's ReLU.
            stop_early: leave out what the last wanted map does not need.
            output_fmt: "NCHW" is the only one.
            intermediates_only: return the maps alone.

        Returns:
            The map after the last stage computed, and the list of intermediate maps in network order; or the list.

        Raises:
            ValueError: an index out of range, another `output_fmt`, or no index with `stop_early`, which would leave
                nothing to compute.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r}: allowed is NCHW")
        count = len(FEATURES)
        if indices is None:
            indices = range(count)
        elif isinstance(indices, Integral):  # NumPy's too
            if not 1 <= indices <= count:
                raise ValueError(f"indices={indices}: a number of last maps, 1 to {count}")
            indices = range(count - indices, count)
        wanted = set()
        for index in indices:
            if not -count <= index < count:
                raise ValueError(f"indices: {index} is out of the range of {count} maps")
            wanted.add(index % count)
        if stop_early and not wanted:
            raise ValueError("indices: stop_early needs at least one map to stop after, got none")
        self.check_image(x)
        maps = []
        for i, name in enumerate(FEATURES):
            if stop_early and i > max(wanted):
                break
            x = getattr(self, name)(x)
            if i in wanted:
                maps.append(x)
        return maps if intermediates_only else (x, maps)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, num_features, h, w) -> logits (B, num_classes); with `pre_logits` the pooled (B, num_features)."""
        x = torch.flatten(self.avgpool(x), 1)
        return x if pre_logits else self.fc(x)

    def get_classifier(self) -> nn.Module:
        """The last layer; an `nn.Identity` where there is none."""
        return self.fc

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Each block keeps its input alone and computes its maps again in backward: less memory, a forward more."""
        for block in self.modules():
            if isinstance(block, CheckpointedBlock):
                block.grad_checkpointing = enable

    def freeze(self, trainable_layers: int) -> None:
        """Only the last `trainable_layers` of stem, layer1, ..., layer4 (and the head) are trained; 5 trains all.

        Raises:
            ValueError: not an integer of 0 to 5.
        """
        if trainable_layers not in range(len(FEATURES) + 1):
            raise ValueError(f"trainable_layers={trainable_layers!r}: must be an integer of 0 to {len(FEATURES)}")
        for i, name in enumerate(FEATURES):
            getattr(self, name).requires_grad_(i >= len(FEATURES) - int(trainable_layers))

    @property
    def inplanes(self) -> int:
        """Channels of the last stage, where torchvision's detection models look for them.

        Raises:
            RuntimeError: the stem is frozen and layer1 is not. torchvision's `trainable_layers` reaches that by 4 and
                by 5, since it knows a first layer as conv1 and bn1 only, and 5 would freeze the stem without a word.
        """
        stem, first = ([p.requires_grad for p in part.parameters()] for part in (self.stem, self.layer1))
        if any(first) and not any(stem):
            raise RuntimeError(
                "trainable_layers: torchvision cannot tell 4 from 5 here, since it does not know this network's stem; "
                "use network.freeze(trainable_layers) and torchvision's BackboneWithFPN"
            )
        return self.num_features
