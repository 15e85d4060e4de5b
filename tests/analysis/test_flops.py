"""sasa.analysis.flops: the counting rule by hand on single layers, whole networks, and no traces on the model."""

import pytest
import torch
from torch import nn

from attention import AttentionStem, LocalAttention2d
from model import BasicBlock, Bottleneck, build
from sasa.analysis.flops import count_flops, count_parameters

# By hand, one image of 5 x 6 = 30 pixels -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "flops"),
    [
        # stride 2: 3 x 3 outputs; 7 channels; 3 * 3 taps of 4 inputs at 2, and the bias
        (nn.Conv2d(4, 7, 3, stride=2, padding=1), {"convolution": 9 * 7 * (2 * 9 * 4 + 1)}),
        (nn.Conv2d(4, 8, 3, padding=1, groups=2, bias=False), {"convolution": 30 * 8 * 2 * 9 * 2}),
        (nn.BatchNorm2d(4), {"batch norm": 2 * 30 * 4}),
        (nn.ReLU(), {"relu": 30 * 4}),
        # 2 x 2 and, of a ragged map, 3 x 3 windows: 2 * 2 = 4 elements each
        (nn.MaxPool2d(2), {"pool": 4 * 2 * 3 * 4}),
        (nn.AvgPool2d(2, ceil_mode=True), {"pool": 4 * 3 * 3 * 4}),
        (nn.AdaptiveAvgPool2d(1), {"pool": 30 * 4}),
        (nn.Sequential(nn.Identity(), nn.ReLU()), {"relu": 30 * 4}),
        (nn.Linear(6, 7), {"linear": 4 * 5 * 7 * (2 * 6 + 1)}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_plain_layers(layer, flops):
    assert count_flops(layer, (5, 6), in_channels=4).by_kind == flops


def attention_flops(*, projections=3 * 4 * 8, r=8, dots=2 * 8, scaled=0, pooled=0, position=0):
    """30 pixels, 9 neighbours each, 4 -> 8 channels, 2 heads."""
    return {
        "position": position,
        "projection": 30 * 2 * projections,
        "logits": 30 * 9 * (r + dots + scaled),
        "softmax": 30 * 9 * 5 * 2,
        "weighted sum": 30 * 9 * 2 * 8,
    } | ({"pool": pooled} if pooled else {})


@pytest.mark.parametrize(
    ("options", "flops"),
    [
        ({}, attention_flops()),
        ({"border": "zero"}, attention_flops()),
        ({"share_embeddings": True}, attention_flops()),
        ({"grouped": True}, attention_flops(projections=3 * 2 * (2 * 4))),
        ({"position": "none"}, attention_flops(r=0)),
        ({"position": "absolute"}, attention_flops(r=0, position=30 * 4)),
        ({"content": False}, attention_flops(projections=2 * 4 * 8, r=0)),
        ({"scale": 0.5}, attention_flops(scaled=2)),
        ({"stride": 2}, attention_flops(pooled=3 * 3 * 8 * 4)),
    ],
    ids=str,
)
def test_local_attention(options, flops):
    layer = LocalAttention2d(4, 8, 3, num_heads=2, **options)
    assert count_flops(layer, (5, 6), in_channels=4).by_kind == flops
    assert count_flops(layer, (5, 6), in_channels=4).total == sum(flops.values())


@pytest.mark.parametrize(
    ("options", "value_weights", "mixture"),
    [
        ({"num_mixtures": 3}, 3 * 3 * 8, 30 * 2 * 3 * 8),
        ({"num_mixtures": 3, "window": "sliding"}, 3 * 3 * 8, 30 * 4 * 2 * 3 * 8),  # 4 neighbours, a mix for each
        ({"values": "plain"}, 3 * 8, 0),
        ({"values": "conv"}, 3 * 8 * 4, 0),
        ({"values": "conv", "window": "sliding"}, 3 * 8 * 4, 0),
    ],
    ids=str,
)
def test_attention_stem(options, value_weights, mixture):
    """30 pixels, 2 x 2 blocks (ragged ones too), 3 -> 8 channels, 2 heads."""
    assert count_flops(AttentionStem(3, 8, block_size=2, num_heads=2, **options), (5, 6)).by_kind == {
        "projection": 30 * 2 * (2 * 3 * 8 + value_weights),
        "value mixture": mixture,
        "logits": 30 * 4 * 2 * 8,
        "softmax": 30 * 4 * 5 * 2,
        "weighted sum": 30 * 4 * 2 * 8,
    }


def test_blocks_add_the_shortcut_once():
    for block in (Bottleneck(8, 2), BasicBlock(8, 8)):
        assert count_flops(block, (5, 6), in_channels=8).by_kind["add"] == 30 * 8


def test_a_whole_network_is_the_sum_of_its_layers():
    """ResNet26's convolutions from the widths of He et al. 2016, by loops that share nothing with the hooks."""
    size, inplanes, total = 56, 64, 2 * 112**2 * 64 * 3 * 49
    for planes, depth, stride in ((64, 1, 1), (128, 2, 2), (256, 4, 2), (512, 1, 2)):
        for i in range(depth):
            out = size // stride if i == 0 else size
            total += 2 * (size**2 * inplanes * planes + out**2 * (9 * planes**2 + 4 * planes**2))
            total += 2 * out**2 * inplanes * 4 * planes if i == 0 else 0
            size, inplanes = out, 4 * planes
    flops = count_flops(build("ResNet26", attention_stages=()), 224).by_kind
    assert flops["convolution"] == total
    assert flops["linear"] == 1000 * (2 * 2048 + 1)


def test_an_unknown_module_is_an_error():
    with pytest.raises(TypeError, match="no FLOPs rule for GELU"):
        count_flops(nn.Sequential(nn.Conv2d(3, 4, 1), nn.GELU()), 8)


def test_frozen_parameters_count_and_buffers_do_not():
    layers = nn.Sequential(nn.Linear(3, 4).requires_grad_(False), nn.BatchNorm1d(4))
    assert count_parameters(layers) == 3 * 4 + 4 + 2 * 4


# No traces -----------------------------------------------------------------------------------------------------------


def test_the_model_stays_as_it_is():
    model = build("ResNet26", 10, True, small_images=True, num_heads=4).train()
    model.layer2.eval()
    model.requires_grad_(False).layer3.requires_grad_(True)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    calls = []
    model.register_forward_hook(lambda *_: calls.append("hook"))
    model.layer1.register_forward_pre_hook(lambda *_: calls.append("pre-hook"))

    def look():
        modules = list(model.modules())
        return (
            {k: (v.clone(), v.data_ptr()) for k, v in model.state_dict().items()},
            [m.training for m in modules],
            [{k: dict(v) for k, v in vars(m).items() if k.endswith("hooks") and v} for m in modules],
            [(id(p), p.requires_grad, p.device.type) for p in model.parameters()],
            [sorted(vars(m)) for m in modules],
            torch.get_rng_state().tolist(),
        )

    state, *rest = look()
    flops = count_flops(model, 16)
    state_after, *rest_after = look()
    assert rest == rest_after and calls == []
    assert all(torch.equal(state[k][0], state_after[k][0]) and state[k][1] == state_after[k][1] for k in state)
    assert torch.equal(model.fc.weight.grad, torch.ones_like(model.fc.weight))
    assert count_flops(model.eval(), 16) == flops  # the mode does not change the count
    assert count_flops(model.to(torch.bfloat16), (16, 16)) == flops  # nor the dtype
    assert count_flops(model.to("meta"), 16) == flops  # nor the device


@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("ResNet26", {"kernel_size": 4, "grouped": True, "border": "zero"}, (33, 47)),
        ("ResNet26", {"stem": True, "stem_values": "conv", "position": "absolute"}, (37, 50)),
        ("ResNet26", {"small_images": True, "stem": True, "stem_values": "plain", "num_classes": 0}, 9),
        ("NaiveResNet26", {"small_images": True}, 8),
    ],
)
def test_any_form_and_size(name, options, size):
    with torch.device("meta"):
        model = build(name, **options)
    flops = count_flops(model, size)
    assert flops.total == sum(flops.by_kind.values()) > 0


def test_a_size_that_the_model_does_not_take():
    with torch.device("meta"):
        model = build("ResNet26")
    with pytest.raises(ValueError, match="at least 8x8"):
        count_flops(model, 7)
