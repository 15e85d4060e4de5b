"""What the heads of a network attend to: weights recorded while it runs, and measures of them.

    with record_attention(network, images=[0], pixels=lattice(64)) as layers:
        network(batch)
    for layer in layers:
        print(layer.name, entropy(layer.weights).mean((0, 2)))  # bits, by head

Only the chosen pixels of the chosen images are ever computed, so memory is bounded by their number. Nothing here draws
a random number or changes the network.

Shapes: B chosen images, N heads, P chosen pixels, H x W map, K window side (S of the stem's block).
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import AttentionStem, LocalAttention2d
from sasa.kernels.reference import window_softmax

PIXELS_AT_ONCE = 1024  # bounds the memory of a layer: its keys are gathered K * K times for so many pixels

Chooser = Callable[[int, int], Tensor]  # (H, W) of a layer's map -> (P, 2) rows and columns on it


@dataclass(frozen=True)
class LayerAttention:
    """One layer's attention at the chosen pixels of the chosen images, on the CPU.

    name: the layer's path in the network, shortened ("stem", "layer2.0"); size: (H, W) of the map it attends over;
    pixels, origins (P, 2): rows and columns of the pixels and of their windows' first keys, which may lie outside the
    map; weights (B, N, P, K, K), or (B, 1, P, K, K) as the mean over heads; largest_logit: the largest
    magnitude of a logit.
    """

    name: str
    layer: nn.Module
    size: tuple[int, int]
    pixels: Tensor
    origins: Tensor
    weights: Tensor
    largest_logit: float

    @property
    def kernel_size(self) -> int:
        return self.weights.shape[-1]


def every_pixel(height: int, width: int) -> Tensor:
    """All pixels of a map, row by row: -> (H * W, 2)."""
    return torch.cartesian_prod(torch.arange(height), torch.arange(width))


def lattice(limit: int) -> Chooser:
    """Chooses at most `limit` pixels of a map on an even grid, all of them where they are no more."""

    def choose(height: int, width: int) -> Tensor:
        step = 1
        while math.ceil(height / step) * math.ceil(width / step) > limit:
            step += 1
        return torch.cartesian_prod(torch.arange(step // 2, height, step), torch.arange(step // 2, width, step))

    return choose


def pixel_of(row: int, col: int, image_size: tuple[int, int]) -> Chooser:
    """Chooses the pixel of a map that holds the pixel (row, col) of an image of that size."""
    return lambda height, width: torch.tensor([[row * height // image_size[0], col * width // image_size[1]]])


def attention_layers(network: nn.Module) -> dict[str, nn.Module]:
    """The attention layers of a network by their shortened names, the stem first."""
    layers = {
        name: module for name, module in network.named_modules() if isinstance(module, LocalAttention2d | AttentionStem)
    }
    return {name.removesuffix(".spatial").replace("stem.0", "stem"): module for name, module in layers.items()}


@contextmanager
def record_attention(
    network: nn.Module, images: list[int] | None = None, pixels: Chooser = every_pixel, mean_heads: bool = False
) -> Iterator[list[LayerAttention]]:
    """While open, each forward of the network adds a `LayerAttention` for each of its attention layers, in order.

    images: positions in the batch, None for all. mean_heads: keep the mean over heads alone, an N-th of the memory.
    """
    recorded: list[LayerAttention] = []

    def record(name: str, layer: nn.Module, inputs: tuple[Tensor]) -> None:
        x = inputs[0] if images is None else inputs[0][images]
        chosen = pixels(*x.shape[-2:]).to(x.device)
        weights, largest = [], 0.0
        with torch.no_grad():
            for part in chosen.split(PIXELS_AT_ONCE):
                logits = layer.attention_logits(x, part)  # (B, N, P, K, K)
                attn = window_softmax(logits)
                weights.append((attn.mean(1, keepdim=True) if mean_heads else attn).cpu())
                largest = max(largest, logits.masked_fill(logits == -torch.inf, 0).abs().max().item())
        origins = layer.window_origins(chosen)
        attention = LayerAttention(
            name, layer, tuple(x.shape[-2:]), chosen.cpu(), origins.cpu(), torch.cat(weights, 2), largest
        )
        recorded.append(attention)

    hooks = [
        layer.register_forward_pre_hook(lambda module, inputs, name=name: record(name, module, inputs))
        for name, layer in attention_layers(network).items()
    ]
    try:
        yield recorded
    finally:
        for hook in hooks:
            hook.remove()


# ---- measures -------------------------------------------------------------------------------------------------------


def entropy(weights: Tensor) -> Tensor:
    """Bits: 0 where all weight is on one key, log2(K * K) where it is spread evenly. (..., K, K) -> (...)."""
    return torch.special.entr(weights).sum((-2, -1)) / math.log(2)


def distances(attention: LayerAttention) -> Tensor:
    """From each pixel to each key of its window, in pixels of the layer's map: -> (P, K, K)."""
    steps = torch.arange(attention.kernel_size)
    rows, cols = (attention.origins - attention.pixels).unbind(1)
    return torch.hypot(*torch.broadcast_tensors(
        (rows[:, None, None] + steps[:, None]).float(), (cols[:, None, None] + steps).float()
    ))  # fmt: skip


def mean_distance(attention: LayerAttention) -> Tensor:
    """How far away a pixel attends on average, in pixels of the layer's map: -> (B, N, P)."""
    return (attention.weights * distances(attention)).sum((-2, -1))


def centre_share(attention: LayerAttention) -> Tensor:
    """The weight that a pixel gives to itself: -> (B, N, P)."""
    return (attention.weights * (distances(attention) == 0)).sum((-2, -1))


def even_attention(attention: LayerAttention) -> LayerAttention:
    """What the same pixels' maps are of equal weights over the keys that take part, to measure others by.

    Keys outside the map take part only where the layer's border is "zero". Weights (1, 1, P, K, K).
    """
    steps = torch.arange(attention.kernel_size)
    rows, cols = attention.origins[:, 0, None] + steps, attention.origins[:, 1, None] + steps  # (P, K)
    inside = [(places >= 0) & (places < side) for places, side in zip((rows, cols), attention.size, strict=True)]
    part = (inside[0][:, :, None] & inside[1][:, None]) | (attention.layer.border == "zero")
    weights = part / part.sum((-2, -1), keepdim=True)  # (P, K, K)
    return replace(attention, weights=weights[None, None])


def mean_maps(attention: LayerAttention) -> Tensor:
    """Each head's map, averaged over images and pixels: -> (N, K, K)."""
    return attention.weights.mean((0, 2))


def embeddings(layer: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Learned row and column tables (tables, channels, K), a table a head unless shared; None where there are none.

    The stem's place the values (the mixture of its value matrices), the other layers' enter the logits.
    """
    names = ("emb_row", "emb_col") if isinstance(layer, AttentionStem) else ("rel_row", "rel_col")
    tables = [getattr(layer, name) for name in names]
    if tables[0] is None:
        return None
    return tuple(table.detach().float().cpu().view(-1, *table.shape[-2:]) for table in tables)


def similarity(tables: Tensor) -> Tensor:
    """Cosine between the embeddings of each two offsets: (tables, channels, K) -> (tables, K, K)."""
    unit = F.normalize(tables, dim=1)
    return unit.mT @ unit


# ---- rollout --------------------------------------------------------------------------------------------------------


def rollout_layers(layers: list[LayerAttention]) -> list[LayerAttention]:
    """Those that a rollout goes through: all, but for a stem whose map a pool makes smaller before the first stage.

    A block of the ImageNet form's stem is one cell of the map behind its pool: its attention never leaves the cell.
    """
    pooled = isinstance(layers[0].layer, AttentionStem) and len(layers) > 1 and layers[0].size != layers[1].size
    return layers[1:] if pooled else layers


def rollout(layers: list[LayerAttention], image: int, row: int, col: int) -> Tensor:
    """What the pixel (row, col) of the last layer's map attends to through all `layers`, on the map of the first.

    Each layer passes on half of a pixel's share by its attention, the mean over heads, and half by the shortcut
    (Abnar and Zuidema 2020, arXiv 2005.00928); a pool shares evenly, a shortcut of stride s takes each s-th pixel.
    Convolutions between attention layers count as if they read their own pixel alone. -> (H, W), sum 1; less with
    border="zero", whose weight outside the map is left out. `layers`: of `record_attention` at every pixel.
    """
    share = torch.zeros(layers[-1].size)
    share[row, col] = 1
    stay = pooled = share
    for attention, below in zip(reversed(layers), [*layers[-2::-1], None], strict=True):
        weights = attention.weights[image].mean(0)  # (P, K, K)
        share = 0.5 * stay + 0.5 * _attend(pooled, weights, attention.origins)
        if below is not None:
            pooled, stay = spread_evenly(share, below.size), take_back(share, below)
    return share


def _attend(share: Tensor, weights: Tensor, origins: Tensor) -> Tensor:
    """Each pixel's share handed to the keys of its window: (H, W), (H * W, K, K) -> (H, W)."""
    height, width = share.shape
    steps = torch.arange(weights.shape[-1])
    rows, cols = torch.broadcast_tensors(origins[:, 0, None, None] + steps[:, None], origins[:, 1, None, None] + steps)
    inside = (rows >= 0) & (rows < height) & (cols >= 0) & (cols < width)
    given = share.flatten()[:, None, None] * weights
    return torch.zeros_like(share).index_put((rows[inside], cols[inside]), given[inside], accumulate=True)


def spread_evenly(share: Tensor, size: tuple[int, int]) -> Tensor:
    """Each cell's share dealt out evenly over the pixels of a larger map that it covers: (h, w) -> (H, W)."""
    if share.shape == size:
        return share
    rows, cols = (torch.arange(large) * small // large for small, large in zip(share.shape, size, strict=True))
    counts = rows.bincount()[:, None] * cols.bincount()
    return (share / counts)[rows[:, None], cols]


def take_back(share: Tensor, below: LayerAttention) -> Tensor:
    """Through the strided shortcut of the layer below: each cell's share at the one pixel that it took."""
    stride = getattr(below.layer, "stride", 1)
    if tuple(-(-side // stride) for side in below.size) != tuple(share.shape):
        return spread_evenly(share, below.size)  # a convolution stage lies between
    stay = torch.zeros(below.size)
    stay[::stride, ::stride] = share
    return stay
