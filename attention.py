"""The two layers of Stand-Alone Self-Attention in Vision Models (Ramachandran et al. 2019, arXiv 1906.05909).

`LocalAttention2d` takes the place of a 3x3 convolution (section 3.1); `AttentionStem` that of the first convolution
(section 3.3). They own the parameters and check the arguments; the mathematics is in `sasa.kernels`.

Shapes: B batch, C channels, H x W map, N heads, D = C / N head width, K window side.

Decisions where the paper is silent or ambiguous; each has a switch where ports or the paper's ablations differ:
    projections          dense: every head sees all input channels. The text describes grouped ones, but only dense
                         ones fit the paper's tables. `grouped=True` is the text.
    embeddings           per head, rows in the first half of a head's channels and columns in the second half, so that
                         every head sees both. `share_embeddings=True`: one table for all heads.
    border               keys outside the map are masked (weight 0). `border="zero"`: zero keys and values that stay in
                         the softmax, as ports do.
    scale of the logits  none, as in the paper. `scale=` multiplies them.
    downsampling         attention at the incoming resolution, then an average pool right after it, before its batch
                         norm; rounds up, so any size works and matches the stride-2 shortcut.
    absolute position    2-D sinusoids (rows in the first half of the channels, columns in the second) added to the
                         layer's input, so to queries, keys and values, as Vaswani et al. 2017 do at their input.
    stem windows         `window="block"`: aligned 4x4 blocks that do not overlap (ImageNet form, followed by a 4x4 max
                         pool); a ragged last block attends within what there is of it. `window="sliding"`: the 4x4
                         window around each pixel, values mixed by the offset in it (small-image form, no pool), since
                         aligned blocks without a pool give equal pixels of a block equal features.
    stem values          m = 4 value matrices, in the small-image form of `ResNet` one for each position of the window:
                         with fewer it sees small images too blurred (docs/recipes.md). e = D; the mixture is shared by
                         the heads. `values="plain"` has one matrix and no mixture; `values="conv"` takes them from a
                         4x4 convolution (Table 7).
    precision            logits and softmax in at least fp32 (fp32 for half types, fp64 for fp64).
    initialisation       see `reset_parameters` of each layer.
"""

import math
import operator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sasa.initialise import normal_weight, set_initialiser, spread_mixtures
from sasa.kernels import (
    BORDERS,
    attention_logits,
    check_backend,
    local_attention,
    local_attention_packed,
    local_attention_pooled,
    pools,
    projected_operator,
    stem_operator,
)
from sasa.kernels import flops as kernel_flops
from sasa.kernels import stem as stem_kernels
from sasa.kernels.functional import composite_serves, pairs_up
from sasa.kernels.interface import (
    LARGEST_SCALE,
    AttentionOptions,
    accumulate_dtype,
    autocast_dtype,
    without_autocast,
)
from sasa.kernels.plain import fused_kind, is_plain_average, is_plain_projection
from sasa.kernels.projection import project
from sasa.kernels.reference import reach, window_softmax
from sasa.kernels.tracing import CeilAvgPool2d, as_leaf, is_proxy

POSITIONS = ("relative", "absolute", "none")
WINDOWS = ("block", "sliding")
VALUES = ("mixture", "plain", "conv")


class LocalAttention2d(nn.Module):
    """Local multi-head self-attention over a K x K window, with relative row and column embeddings.

    (B, in_channels, H, W) -> (B, out_channels, ceil(H / stride), ceil(W / stride)); any H and W.

    Args:
        in_channels, out_channels: channels of the input and of the output, multiples of `num_heads`.
        kernel_size: K, the side of the window; an even one reaches (K-1)//2 back and K//2 ahead.
        stride: side and stride of the average pool after the attention; 1 for none.
        num_heads: N; each head owns out_channels / N channels.
        position: "relative" (q.r in the logits), "absolute" (2-D sinusoids added to the input) or "none" (Table 5).
        content: False drops q.k and the key projection (Table 6); needs position="relative".
        border: "mask" or "zero", see the head of this file.
        grouped: each head projects its own in_channels / N input channels only.
        share_embeddings: one pair of embedding tables for all heads: `rel_row`, `rel_col` of shape (1, D/2, K).
        scale: factor of the logits, above 0.
        backend: of `sasa.kernels.local_attention`.
        embedding_std: standard deviation of the embeddings at initialisation; None: see `reset_parameters`.

    Parameters: `query`, `key`, `value` (1x1 convolutions, no bias), `rel_row`, `rel_col` (N, D/2, K).

    Backward reads the output again: with stride 1 it must not be changed in place before.

    Raises:
        ValueError: an argument out of its range, or an input of another rank or channel count.

    Source: Ramachandran et al. 2019, equations 2 and 3.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 7,
        *,
        stride: int = 1,
        num_heads: int = 8,
        position: str = "relative",
        content: bool = True,
        border: str = "mask",
        grouped: bool = False,
        share_embeddings: bool = False,
        scale: float = 1.0,
        backend: str = "auto",
        embedding_std: float | None = None,
    ) -> None:
        super().__init__()
        kernel_flops.register()
        in_channels, out_channels, num_heads = _checked_heads(in_channels, out_channels, num_heads)
        kernel_size, stride = _positive_integer("kernel_size", kernel_size), _positive_integer("stride", stride)
        _check_choice("position", position, POSITIONS)
        _check_choice("border", border, BORDERS)
        check_backend(backend)
        head_dim = out_channels // num_heads
        if position == "relative" and head_dim % 2:
            raise ValueError(
                f"out_channels={out_channels} with num_heads={num_heads} gives a head width of {head_dim}: it must be "
                "even with position='relative', one half for rows and one for columns"
            )
        if position == "absolute" and in_channels % 4:
            raise ValueError(f"in_channels={in_channels}: must be a multiple of 4 with position='absolute'")
        if not content and position != "relative":
            raise ValueError(f"content=False leaves no logits with position={position!r}: it needs 'relative'")
        if not 0 < scale <= LARGEST_SCALE:
            raise ValueError(f"scale={scale}: must be a finite number above 0, and at most {LARGEST_SCALE:.3g}")
        if embedding_std is not None and not (embedding_std >= 0 and math.isfinite(embedding_std)):
            raise ValueError(f"embedding_std={embedding_std}: must be None or a finite number of at least 0")

        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.num_heads, self.head_dim = kernel_size, stride, num_heads, head_dim
        self.position, self.content, self.border = position, content, border
        self.grouped, self.share_embeddings = grouped, share_embeddings
        self.scale, self.backend, self.embedding_std = float(scale), backend, embedding_std

        groups = num_heads if grouped else 1
        self.query = nn.Conv2d(in_channels, out_channels, 1, groups=groups, bias=False)
        self.key = nn.Conv2d(in_channels, out_channels, 1, groups=groups, bias=False) if content else None
        self.value = nn.Conv2d(in_channels, out_channels, 1, groups=groups, bias=False)
        if position == "relative":
            tables = 1 if share_embeddings else num_heads
            self.rel_row = nn.Parameter(torch.empty(tables, head_dim // 2, kernel_size))
            self.rel_col = nn.Parameter(torch.empty(tables, head_dim // 2, kernel_size))
        else:
            self.register_parameter("rel_row", None)
            self.register_parameter("rel_col", None)
        self.pool = CeilAvgPool2d(stride) if stride > 1 else None
        fan_in = in_channels // groups
        logit_variance = head_dim**-0.5 / self.scale
        for layer in (self.query, self.key) if content else (self.query,):
            set_initialiser(layer, normal_weight, std=math.sqrt(logit_variance / fan_in))
        set_initialiser(self.value, normal_weight, std=fan_in**-0.5)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights, such that for inputs of unit variance q.k and q.r each have standard deviation 1.

        The logits are a sum over D channels and are not divided by sqrt(D). Weights of the usual spread give q.k a
        standard deviation of sqrt(D), which saturates the softmax of wide heads at the start. Queries, keys and
        embeddings of variance D^(-1/2) / scale make it 1 for every head width. Values keep unit variance.
        """
        for layer in (self.query, self.key, self.value):
            if layer is not None:
                layer.reset_parameters()
        if self.rel_row is not None:
            logit_variance = self.head_dim**-0.5 / self.scale
            std = math.sqrt(logit_variance) if self.embedding_std is None else self.embedding_std
            nn.init.normal_(self.rel_row, std=std)
            nn.init.normal_(self.rel_col, std=std)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, ceil(H / stride), ceil(W / stride))."""
        if is_proxy(x):
            return as_leaf(self, x)
        x, rel_row, rel_col = self._placed(x)
        options = {
            "kernel_size": self.kernel_size, "border": self.border, "scale": self.scale, "backend": self.backend,
        }  # fmt: skip
        heads = (self.num_heads, self.head_dim)
        layers = [layer for layer in (self.query, self.key, self.value) if layer is not None]
        # Grouped projections are not plain: one product would interleave the three by head, and saves no arithmetic.
        if all(is_plain_projection(layer, self.in_channels, self.out_channels, x) for layer in layers):
            weight = torch.cat([layer.weight for layer in layers])  # (3 * C, in_channels, 1, 1)
            if projected_operator.serves(x, weight, rel_row, rel_col, heads, self.kernel_size, self.backend):
                pooled = self._may_pool() and pairs_up(x)
                rest = (len(layers), *heads), AttentionOptions(self.kernel_size, self.border, self.scale), pooled
                out = projected_operator.attend(x, weight, rel_row, rel_col, *rest).flatten(1, 2)
                return out if pooled or self.pool is None else self.pool(out)
            qkv = project(x, weight).unflatten(1, (len(layers), *heads))  # one product
            if self._may_pool() and pools(qkv, rel_row, rel_col, self.kernel_size, self.backend):
                return local_attention_pooled(qkv, rel_row, rel_col, **options).flatten(1, 2)
            out = local_attention_packed(qkv, rel_row, rel_col, **options)
        else:
            query, *key, value = (layer(x).unflatten(1, heads) for layer in layers)
            out = local_attention(query, key[0] if key else None, value, rel_row, rel_col, **options)
        out = out.flatten(1, 2)  # (B, N, D, H, W) -> (B, C, H, W)
        return out if self.pool is None else self.pool(out)

    def _may_pool(self) -> bool:
        """Whether a kernel may do what the pool does, and nobody can tell: the map before the pool is never written."""
        return self.pool is not None and is_plain_average(self.pool, 2)

    def _placed(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The input, checked and with its absolute positions, and each head's embedding tables."""
        _check_input(x, self.in_channels)
        if self.position == "absolute":
            x = x + sinusoids(self.in_channels, *x.shape[-2:], dtype=x.dtype, device=x.device)
        rel_row, rel_col = self.rel_row, self.rel_col
        if rel_row is not None and self.share_embeddings:
            rel_row, rel_col = (r.expand(self.num_heads, -1, -1) for r in (rel_row, rel_col))
        return x, rel_row, rel_col

    def attention_logits(self, x: Tensor, pixels: Tensor | None = None) -> Tensor:
        """scale * (q.k + q.r) of each pixel with its window, -inf at masked keys; shapes of `attention_weights`."""
        x, rel_row, rel_col = self._placed(x)
        heads = (self.num_heads, self.head_dim)
        query = self.query(x).unflatten(1, heads)
        key = self.key(x).unflatten(1, heads) if self.content else None
        return attention_logits(
            query, key, rel_row, rel_col,
            kernel_size=self.kernel_size, border=self.border, scale=self.scale, pixels=pixels,
        )  # fmt: skip

    def attention_weights(self, x: Tensor, pixels: Tensor | None = None) -> Tensor:
        """What each pixel attends to, before the pool: (B, in_channels, H, W) -> (B, N, H, W, K, K).

        A K x K map sums to 1; masked keys have weight 0. With `pixels` (P, 2), rows and columns: of these alone,
        (B, N, P, K, K), in memory for these alone. The reference backend's softmax, whichever serves `forward`.
        """
        return window_softmax(self.attention_logits(x, pixels))

    def window_origins(self, pixels: Tensor) -> Tensor:
        """Row and column of the first key of each pixel's window, outside the map at its border: (P, 2) -> (P, 2)."""
        return pixels - reach(self.kernel_size)[0]

    def extra_repr(self) -> str:
        shown = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, num_heads={self.num_heads}"
        defaults = {"stride": 1, "position": "relative", "content": True, "border": "mask", "grouped": False}
        defaults |= {"share_embeddings": False, "scale": 1.0, "backend": "auto"}
        return shown + "".join(f", {k}={getattr(self, k)}" for k, v in defaults.items() if getattr(self, k) != v)


@fused_kind
class AttentionStem(nn.Module):
    """Attention over the image's pixels in place of the first convolution: softmax over q.k, spatially aware values.

    (B, in_channels, H, W) -> (B, out_channels, H, W); batch norm, ReLU and pool belong to the network.

    Args:
        in_channels, out_channels: 3 and 64 in the paper; out_channels a multiple of `num_heads`.
        block_size: S, the side of the window, 4 in the paper.
        window: "block" (aligned, not overlapping) or "sliding" (stride 1, around each pixel).
        num_heads: N, 4 in the paper.
        num_mixtures: m, the number of value matrices.
        values: "mixture" (sum_m p(a, b, m) W_V^m), "plain" (one matrix) or "conv" (an S x S convolution) (Table 7).
        border: "mask" or "zero", for keys outside the image.
        backend: of `sasa.kernels.local_attention`, which serves window="sliding" with values="conv"; for the other
            values "cpu" is the C++ kernel and "triton" the fused one for CUDA (3 channels each), any other name plain
            PyTorch; "auto" takes the fastest.

    Parameters: `query`, `key`, `value` (convolutions without bias; `value` holds the m matrices one after the other),
    `emb_row`, `emb_col` (e, S), `emb_mix` (m, e) with e = out_channels / N.

    Raises:
        ValueError: an argument out of its range, or an input of another rank or channel count.

    Source: Ramachandran et al. 2019, section 3.3 and Table 7.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 64,
        *,
        block_size: int = 4,
        window: str = "block",
        num_heads: int = 4,
        num_mixtures: int = 4,
        values: str = "mixture",
        border: str = "mask",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        kernel_flops.register()
        in_channels = _positive_integer("in_channels", in_channels)
        _, out_channels, num_heads = _checked_heads(None, out_channels, num_heads)
        block_size = _positive_integer("block_size", block_size)
        num_mixtures = _positive_integer("num_mixtures", num_mixtures)
        _check_choice("window", window, WINDOWS)
        _check_choice("values", values, VALUES)
        _check_choice("border", border, BORDERS)
        check_backend(backend)
        self.in_channels, self.out_channels, self.num_heads = in_channels, out_channels, num_heads
        self.block_size, self.window, self.num_mixtures = block_size, window, num_mixtures
        self.values, self.border, self.backend = values, border, backend
        self.head_dim = out_channels // num_heads

        self.query = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.key = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        matrices = num_mixtures if values == "mixture" else 1
        side = block_size if values == "conv" else 1
        self.value = nn.Conv2d(in_channels, matrices * out_channels, side, bias=False)
        if values == "mixture":
            self.emb_row = nn.Parameter(torch.empty(self.head_dim, block_size))
            self.emb_col = nn.Parameter(torch.empty(self.head_dim, block_size))
            self.emb_mix = nn.Parameter(torch.empty(num_mixtures, self.head_dim))
        else:
            for name in ("emb_row", "emb_col", "emb_mix"):
                self.register_parameter(name, None)
        for layer in (self.query, self.key):
            set_initialiser(layer, normal_weight, std=self.head_dim**-0.25 / math.sqrt(in_channels))
        set_initialiser(self.value, normal_weight, std=self.value.weight[0].numel() ** -0.5)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights: for inputs of unit variance q.k has standard deviation 1, each value matrix keeps variance 1.

        The mixtures start each at a place of its own in the window (`initialise.spread_mixtures`).
        """
        for layer in (self.query, self.key, self.value):
            layer.reset_parameters()
        if self.emb_row is not None:
            spread_mixtures(self.emb_row, self.emb_col, self.emb_mix)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, H, W)."""
        if is_proxy(x):
            return as_leaf(self, x)
        _check_input(x, self.in_channels)
        if not self._is_plain(x):
            return self._attend_maps(x)
        conv_values = self._values(x) if self.values == "conv" else None
        dtype = None if x.dtype == torch.float64 else autocast_dtype(x.device)
        if dtype is None:
            return self._attend(x, conv_values)
        # Autocast would narrow the products behind the logits too: they stay wide, the output is narrowed.
        with without_autocast(x.device):
            return self._attend(x.to(self.query.weight.dtype), conv_values).to(dtype)

    def _attend(self, x: Tensor, conv_values: Tensor | None) -> Tensor:
        if self.window == "sliding" and conv_values is not None:
            return self._slide(*(y.to(x.dtype) for y in (self.query(x), self.key(x), conv_values)))
        if conv_values is not None:
            return stem_kernels.block_attention(x, self._forms(), conv_values.to(x.dtype), self.block_size, self.border)
        weights = (self._forms(), self._mixture(x), self._value_weight())
        return stem_operator.attend(x, *weights, self.window, self.border, self.backend)

    def _slide(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Sliding windows without a mixture are local attention without embeddings: 3 x (B, C, H, W) -> the same."""
        query, key, value = (y.unflatten(1, (self.num_heads, self.head_dim)) for y in (query, key, value))
        options = {"kernel_size": self.block_size, "border": self.border, "backend": self.backend}
        return local_attention(query, key, value, None, None, **options).flatten(1, 2)

    def _values(self, x: Tensor) -> Tensor:
        """The value convolution's output: (B, in_channels, H, W) -> (B, M * out_channels, H, W)."""
        if self.values == "conv":  # padded as a window reaches: an even one one pixel further ahead than back
            back, ahead = reach(self.block_size)
            x = F.pad(x, (back, ahead, back, ahead))
        return self.value(x)

    def _is_plain(self, x: Tensor) -> bool:
        """Whether weights may be used in place of calls: of query and key, and of value unless it is called anyway."""
        projections = [(self.query, self.out_channels), (self.key, self.out_channels)]
        if self.values != "conv":
            matrices = self.num_mixtures if self.values == "mixture" else 1
            projections.append((self.value, matrices * self.out_channels))
        return all(is_plain_projection(layer, self.in_channels, width, x) for layer, width in projections)

    def _attend_maps(self, x: Tensor) -> Tensor:
        """`forward` by calls of query, key and value."""
        query, key, value = self.query(x), self.key(x), self._values(x)
        if self.values != "mixture" and self.window == "sliding":
            return self._slide(query, key, value)
        with without_autocast(x.device):
            return stem_kernels.attention_of_maps(
                query, key, value, self._mixture(value), self.num_heads, self.window, self.border
            )

    def can_pool(self, x: Tensor) -> bool:
        """Whether `pooled` serves this input: blocks, values of one pixel, no half type, and a kernel."""
        if self.window != "block" or x.dtype != accumulate_dtype(x.dtype):
            return False
        if self.kernel(x.device.type, x.dtype) is None or not self._is_plain(x):
            return False
        return not composite_serves(self.backend, x, self.emb_row, self.emb_col, self.emb_mix)

    def kernel(self, device: str, dtype: torch.dtype) -> str | None:
        """The kernel that serves images of this device's type and dtype: "cpu", "triton", or None for PyTorch."""
        if self.values == "conv":
            return None
        mixtures = self.num_mixtures if self.values == "mixture" else 1
        sizes = (self.block_size, mixtures, self.head_dim)
        return stem_operator.kernel_for(device, dtype, self.in_channels, self.backend, *sizes)

    def pooled(self, x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
        """The largest value of each block of norm(forward(x)), without that map; only where `can_pool(x)`.

        (B, in_channels, H, W) -> (B, out_channels, ceil(H / S), ceil(W / S)), in autocast's dtype where it is on.
        """
        _check_input(x, self.in_channels)
        dtype = None if x.dtype == torch.float64 else autocast_dtype(x.device)
        with without_autocast(x.device):  # as in `forward`
            weights = (self._forms(), self._mixture(x), self._value_weight())
            out = stem_operator.attend_normalise_pool(x, *weights, self.border, norm, self.backend)
        return out if dtype is None else out.to(dtype)

    def _forms(self) -> Tensor:
        return stem_kernels.logit_forms(self.query.weight.flatten(1), self.key.weight.flatten(1), self.num_heads)

    def _value_weight(self) -> Tensor:
        return self.value.weight.flatten(1).unflatten(0, (-1, self.out_channels))  # (M, N * D, C)

    def attention_logits(self, x: Tensor, pixels: Tensor | None = None) -> Tensor:
        """q.k of each pixel with its window, -inf at masked keys; shapes of `attention_weights`."""
        _check_input(x, self.in_channels)
        chosen = torch.cartesian_prod(*map(torch.arange, x.shape[-2:])) if pixels is None else pixels
        chosen, where = chosen.to(x.device), (self.block_size, self.window, self.border)
        if self._is_plain(x):
            with without_autocast(x.device):  # wide, as in `forward`
                logits = stem_kernels.logits_at(x.to(self.query.weight.dtype), self._forms(), chosen, *where)
        else:
            query, key = self.query(x), self.key(x)
            with without_autocast(x.device):
                logits = stem_kernels.logits_of_maps_at(query, key, self.num_heads, chosen, *where)
        return logits.unflatten(2, x.shape[-2:]) if pixels is None else logits

    def attention_weights(self, x: Tensor, pixels: Tensor | None = None) -> Tensor:
        """What each pixel attends to: (B, in_channels, H, W) -> (B, N, H, W, S, S), the last two its block or window.

        An S x S map sums to 1; masked keys have weight 0. With `pixels` (P, 2), rows and columns: of these alone,
        (B, N, P, S, S), in memory for these alone.
        """
        return window_softmax(self.attention_logits(x, pixels))

    def window_origins(self, pixels: Tensor) -> Tensor:
        """Row and column of the first key of each pixel's block or window: (P, 2) -> (P, 2)."""
        if self.window == "block":
            return pixels // self.block_size * self.block_size
        return pixels - reach(self.block_size)[0]

    def _mixture(self, like: Tensor) -> Tensor:
        """p(a, b, m) as (P, M); with plain values the one matrix has weight 1 everywhere, of the dtype of `like`."""
        if self.emb_row is None:
            return like.new_ones(self.block_size**2, 1)
        for name in ("emb_row", "emb_col", "emb_mix"):
            if getattr(self, name).device != like.device:  # einsum mixes the meta device with others without a word
                raise ValueError(f"{name} is on {getattr(self, name).device}, the image on {like.device}")
        return stem_kernels.mixture_weights(self.emb_row, self.emb_col, self.emb_mix)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, block_size={self.block_size}, window={self.window!r}, "
            f"num_heads={self.num_heads}, num_mixtures={self.num_mixtures}, values={self.values!r}, "
            f"border={self.border!r}"
        )


def sinusoids(channels: int, height: int, width: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Absolute positions: sines and cosines of the row in the first half of the channels, of the column in the second.

    -> (channels, height, width); wavelengths from 2 pi to 10000 * 2 pi pixels, as in Vaswani et al. 2017, section 3.5.
    """
    quarter, wide = channels // 4, accumulate_dtype(dtype)
    frequency = 10000.0 ** (-torch.arange(quarter, device=device, dtype=wide) / quarter)

    def encode(length: int) -> Tensor:  # -> (channels / 2, length)
        angle = frequency[:, None] * torch.arange(length, device=device, dtype=wide)
        return torch.cat((angle.sin(), angle.cos()))

    rows = encode(height)[:, :, None].expand(-1, -1, width)
    cols = encode(width)[:, None, :].expand(-1, height, -1)
    return torch.cat((rows, cols)).to(dtype)


def _check_choice(name: str, got: str, allowed: tuple[str, ...]) -> None:
    if got not in allowed:
        raise ValueError(f"{name}={got!r}: allowed are {', '.join(allowed)}")


def _positive_integer(name: str, got: int) -> int:
    """`got` as Python's int: NumPy's are integers too."""
    try:
        number = 0 if isinstance(got, bool) else operator.index(got)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"{name}={got!r}: must be an integer of at least 1")
    return number


def _checked_heads(in_channels: int | None, out_channels: int, num_heads: int) -> tuple[int | None, int, int]:
    """Heads own equal slices of the output channels, and of the input channels when the projections are grouped."""
    num_heads, checked = _positive_integer("num_heads", num_heads), []
    for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
        checked.append(None if channels is None else _positive_integer(name, channels))
        if channels is not None and checked[-1] % num_heads:
            raise ValueError(f"{name}={channels}: must be a multiple of num_heads={num_heads}")
    return *checked, num_heads


def _check_input(x: Tensor, channels: int) -> None:
    if x.dim() != 4:
        raise ValueError(f"the input must be (B, {channels}, H, W), got shape {tuple(x.shape)}")
    if x.shape[1] != channels:
        raise ValueError(f"the input must have in_channels={channels} channels, got {x.shape[1]}: {tuple(x.shape)}")
