"""What a decision rests on: heads silenced one by one, and what can be read off after each stage.

Attention weights show what a head weighs, not whether the network uses it. Here a head's output is taken away and the
network goes on without it: the logit that the decided class then loses is the head's effect. Heads can stand in for
each other, so effects do not add up, and one of 0 is no proof that a head is idle.

Shapes: B images, N heads, D head width, C channels, H x W map. Networks are in eval mode; nothing here changes them or
draws a random number.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sasa.analysis.attention_maps import attention_layers
from sasa.backbone import FEATURES

PROBE_DECAY = 1e-2  # of a probe's weights: with features of unit variance, mild
PROBE_STEPS = 200  # of L-BFGS, at most


class Silenced(NamedTuple):
    """The answer for one image with one head silenced. "Decided" is the class that the whole network predicts.

    logit, probability: of the decided class; drop: its logit in the whole network less `logit`; prediction: the class
    predicted now, with its probability.
    """

    logit: float
    drop: float
    probability: float
    prediction: int
    prediction_probability: float


class HeadEffect(NamedTuple):
    """What the decision for one image loses without one head; head counts from 0.

    by_mean: the head's output replaced by its mean over the pixels; by_zero: by zero.
    """

    layer: str
    head: int
    by_mean: Silenced
    by_zero: Silenced


# ---- silencing ------------------------------------------------------------------------------------------------------


def silence_each_head(output: Tensor, num_heads: int) -> Tensor:
    """Copies of a layer's output of one image, in each of which one head's channels are silenced.

    (1, N * D, H, W) -> (2 * N, N * D, H, W): copy i has head i replaced by its mean over the pixels, channel by
    channel; copy N + i has it replaced by zero.
    """
    heads = output.unflatten(1, (num_heads, -1))  # (1, N, D, H, W)
    copies = heads.repeat(2 * num_heads, 1, 1, 1, 1)  # (2 * N, N, D, H, W)
    each = torch.arange(num_heads, device=output.device)
    copies[each, each] = heads[0].mean((-2, -1), keepdim=True)
    copies[num_heads + each, each] = 0
    return copies.flatten(1, 2)


@torch.no_grad()
def silenced_logits(network: nn.Module, image: Tensor, layer: str) -> tuple[Tensor, Tensor]:
    """Logits of one image with each head of a layer silenced alone.

    The head's channels of the layer's output, after the layer's own pool where it has one, are replaced by their mean
    over the pixels, or by zero. The copies share all that comes before the layer.

    Args:
        image: (1, 3, H, W), normalised.
        layer: a name of `attention_layers`.

    Returns:
        (N, classes) silenced by the mean, (N, classes) silenced by zero.

    Raises:
        ValueError: a network in training mode, whose batch norm would mix the copies; or more than one image.
    """
    if network.training:
        raise ValueError("the network must be in eval mode")
    if len(image) != 1:
        raise ValueError(f"the image must be (1, 3, H, W), got shape {tuple(image.shape)}")
    module = attention_layers(network)[layer]
    hook = module.register_forward_hook(lambda module, _, output: silence_each_head(output, module.num_heads))
    try:
        logits = network(image)  # one image up to the layer, 2 * N from there on: the shortcut is broadcast over them
    finally:
        hook.remove()
    return tuple(logits.float().chunk(2))


def head_effects(
    network: nn.Module, image: Tensor, progress: Callable[[Iterable[str]], Iterable[str]] = iter
) -> list[HeadEffect]:
    """The effect of every head of every attention layer on the predicted class, in the order of the layers.

    Args:
        image: (1, 3, H, W), normalised.
        progress: wraps the names of the layers, such as tqdm.

    Raises:
        ValueError: as `silenced_logits`.
    """
    with torch.no_grad():
        whole = network(image)[0].float()  # (classes)
    effects = []
    for layer in progress(list(attention_layers(network))):
        both = (silenced_answers(logits, whole) for logits in silenced_logits(network, image, layer))
        effects += [HeadEffect(layer, head, *of_head) for head, of_head in enumerate(zip(*both, strict=True))]
    return effects


def silenced_answers(logits: Tensor, whole: Tensor) -> list[Silenced]:
    """Of each silenced head: logits (N, classes), and those of the whole network (classes)."""
    decided = whole.argmax()
    share = logits.softmax(1)
    best, kept = share.max(1), logits[:, decided]
    figures = (kept, whole[decided] - kept, share[:, decided], best.indices, best.values)
    return [Silenced(*of_head) for of_head in zip(*(figure.tolist() for figure in figures), strict=True)]


# ---- linear probes --------------------------------------------------------------------------------------------------


class Probe(NamedTuple):
    """A linear classifier on one stage's pooled features: `fit_probe`."""

    mean: Tensor  # (C), of the features that it was fitted on
    std: Tensor  # (C)
    weight: Tensor  # (classes, C)
    bias: Tensor  # (classes)

    def probabilities(self, features: Tensor) -> Tensor:
        """(B, C) -> (B, classes)."""
        return F.linear((features.double() - self.mean) / self.std, self.weight, self.bias).softmax(1)


@torch.no_grad()
def pooled_features(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """The output of each stage averaged over its map: (B, 3, H, W) -> {stage: (B, C)} in fp32 on the CPU."""
    features: dict[str, Tensor] = {}

    def keep(stage: str, output: Tensor) -> None:
        features[stage] = output.float().mean((-2, -1)).cpu()

    hooks = [
        getattr(network, stage).register_forward_hook(lambda _, __, output, stage=stage: keep(stage, output))
        for stage in FEATURES
    ]
    try:
        network(images)
    finally:
        for hook in hooks:
            hook.remove()
    return features


def fit_probe(features: Tensor, labels: Tensor, num_classes: int, decay: float = PROBE_DECAY) -> Probe:
    """Multinomial logistic regression on features brought to mean 0 and variance 1.

    Minimises the mean cross-entropy + decay / 2 * |weight|^2 from zero by L-BFGS in fp64, so the same features give the
    same probe. A channel that is constant has no part in it.

    Args:
        features: (n, C).
        labels: (n) int64.
    """
    features = features.double()
    mean, std = features.mean(0), features.std(0, correction=0)
    std = torch.where(std > 1e-12, std, torch.inf)
    inputs = (features - mean) / std
    weight = torch.zeros(num_classes, features.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=PROBE_STEPS, tolerance_grad=1e-6, tolerance_change=1e-10, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(inputs, weight, bias), labels) + decay / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return Probe(mean, std, weight.detach(), bias.detach())


def top1_pct(probe: Probe, features: Tensor, labels: Tensor) -> float:
    """How many of the labels the probe finds, per cent."""
    return 100 * (probe.probabilities(features).argmax(1) == labels).double().mean().item()


def gather_features(network: nn.Module, batches: Iterable[tuple[Any, Any]]) -> tuple[dict[str, Tensor], Tensor]:
    """`pooled_features` of batches of images and labels, put together: {stage: (n, C)}, labels (n)."""
    device = next(network.parameters()).device
    parts, labels = [], []
    for images, of_images in batches:
        parts.append(pooled_features(network, images.to(device)))
        labels.append(torch.as_tensor(of_images).cpu())
    return {stage: torch.cat([part[stage] for part in parts]) for stage in FEATURES}, torch.cat(labels)
