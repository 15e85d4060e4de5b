"""Every fused path that reads weights past their modules, small, and every module that one of them reads."""

import torch
from torch import nn

from attention import AttentionStem, LocalAttention2d
from model import PooledAttentionStem

PATHS = {
    "layer": lambda: LocalAttention2d(4, 16, 3, num_heads=2),
    "pooled layer": lambda: LocalAttention2d(4, 16, 3, num_heads=2, stride=2),
    "layer of channels last": lambda: LocalAttention2d(4, 16, 3, num_heads=2),
    "pooled layer of channels last": lambda: LocalAttention2d(4, 16, 3, num_heads=2, stride=2),
    "layer without content": lambda: LocalAttention2d(4, 16, 3, num_heads=2, content=False),
    "stem of blocks": lambda: AttentionStem(3, 16),
    "sliding stem": lambda: AttentionStem(3, 16, window="sliding", border="zero"),
    "stem of one matrix": lambda: AttentionStem(3, 16, values="plain", border="zero"),
    "sliding stem of one matrix": lambda: AttentionStem(3, 16, window="sliding", values="plain"),
    "stem of convolved values": lambda: AttentionStem(3, 16, values="conv"),
    "stem in PyTorch": lambda: AttentionStem(3, 16, backend="tiled"),
    "pooled stem": lambda: PooledAttentionStem(AttentionStem(3, 16)),
}
PROJECTIONS = {
    path: [name for name, module in make().named_modules() if isinstance(module, nn.Conv2d)]
    for path, make in PATHS.items()
}
TARGETS = [(path, name) for path, names in PROJECTIONS.items() for name in names]


def build(path):
    """The path's network, always with the same weights, and an image for it."""
    torch.manual_seed(1)
    network = PATHS[path]()
    if path == "pooled stem":
        network[1].weight.data.uniform_(-1, 1)
        network[3].inplace = False  # PyTorch's backward hooks do not go with it
    x = torch.randn(2, 4 if "layer" in path else 3, 10 if path.startswith("pooled layer") else 9, 10)
    return network, x.contiguous(memory_format=torch.channels_last) if "channels last" in path else x
