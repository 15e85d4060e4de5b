"""The detector: shapes of the pyramid, what the switches replace, the paper's counts, and that it learns an image."""

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FrozenBatchNorm2d, box_convert, box_iou

from attention import LocalAttention2d
from preprocess import load
from sasa.analysis.flops import count_parameters
from sasa.detection import digits
from sasa.detection.flops import detector_flops
from sasa.detection.retinanet import anchors, dense, retinanet
from sasa.training.optim import parameter_groups

SMALL = {"backbone": "ResNet26", "num_classes": 3, "fpn_channels": 16, "image_size": 64, "kernel_size": 3}


def meta(**options):
    with torch.device("meta"):
        return retinanet(**options)


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        ({"attention_stages": ()}, 33_397_364),
        ({}, 25_878_964),
        ({"stem": True}, 25_870_900),
        ({"heads": "attention"}, 21_987_252),
        ({"heads": "attention", "stem": True}, 21_979_188),
        ({"heads": "attention", "fpn": "attention"}, 20_028_852),
    ],
    ids=str,
)
def test_parameters_to_the_unit(options, parameters):
    assert count_parameters(meta(**options)) == parameters


def test_parameters_of_the_convolution_detector_by_hand():
    """The parts of He et al. 2016 and Lin et al. 2017, by arithmetic that shares nothing with the modules."""
    backbone = 25_557_032 - 1000 * 2049  # ResNet-50 without its classifier
    pyramid = 256 * (512 + 1024 + 2048 + 3) + 5 * (9 * 256 * 256 + 256)  # three 1x1, three 3x3, P6, P7
    heads = 8 * (9 * 256 * 256 + 256) + (9 * 256 + 1) * 6 * (90 + 4)
    assert count_parameters(meta(attention_stages=())) == backbone + pyramid + heads


@pytest.mark.parametrize("options", [{}, {"stem": True, "heads": "attention", "fpn": "attention"}], ids=str)
def test_layer_decay_goes_by_the_depth_in_the_body_and_leaves_what_is_outside_alone(options):
    """ResNet26: 8 blocks. Pyramid and heads have the full rate, layer4 half of it, ..., the stem 2^-9."""
    detector = meta(**SMALL, **options)
    groups = parameter_groups(detector, 0.5, 0.25, layer_decay=0.5)
    factors = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    blocks = [f"layer{stage}.{i}" for stage, depth in ((4, 1), (3, 4), (2, 2), (1, 1)) for i in reversed(range(depth))]
    order = [f"backbone.body.{part}." for part in (*blocks, "stem")]
    found = set()
    for name, parameter in detector.named_parameters():
        depth = next((i for i, start in enumerate(order, start=1) if name.startswith(start)), 0)
        assert depth or name.startswith(("backbone.fpn.", "head.")), name
        assert factors[id(parameter)] == 0.5**depth, name
        found.add(depth)
    assert found == set(range(10))


def test_flops_of_the_convolution_detector_by_hand():
    """Of the multiply-adds, the FPN's and heads' part; the backbone is held by tests/tools/test_audit.py."""
    places = [80 * 80, 40 * 40, 20 * 20, 10 * 10, 5 * 5]
    pyramid = sum(256 * (2 * c + 1) * n for c, n in zip((512, 1024, 2048), places, strict=False))
    pyramid += 256 * (2 * 9 * 256 + 1) * sum(places)  # three 3x3 on P3 to P5, P6, P7: one each level
    heads = (8 * 256 + 6 * 94) * (2 * 9 * 256 + 1) * sum(places)
    detector = meta(attention_stages=())
    whole = detector_flops(detector, 640).by_kind
    from sasa.analysis.flops import count_flops

    body = count_flops(detector.backbone.body, 640).by_kind["convolution"]
    assert whole["convolution"] - body == pyramid + heads
    assert whole["add"] - count_flops(detector.backbone.body, 640).by_kind["add"] == 256 * (80 * 80 + 40 * 40)


@pytest.mark.parametrize("fpn", ["conv", "attention"])
@pytest.mark.parametrize("heads", ["conv", "attention"])
def test_the_switches_replace_every_3x3_convolution_of_their_part(fpn, heads):
    detector = meta(**SMALL, fpn=fpn, heads=heads)
    for part, kind, layers in ((detector.backbone.fpn, fpn, 5), (detector.head, heads, 10)):
        attention = [m for m in part.modules() if isinstance(m, LocalAttention2d)]
        convolutions = [m for m in part.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
        assert (len(attention), len(convolutions)) == ((layers, 0) if kind == "attention" else (0, layers))
        assert all((m.kernel_size, m.num_heads) == (3, 8) for m in attention)


@pytest.mark.parametrize("size", [(64, 64), (65, 97)])
@pytest.mark.parametrize("options", [{}, {"fpn": "attention"}, {"stem": True}])
def test_features_have_the_strides_and_the_pyramid_halves(options, size):
    detector = retinanet(**SMALL, **options).eval()
    x = torch.randn(2, 3, *size)
    ceil = lambda side, stride: -(-side // stride)  # noqa: E731
    shapes = [tuple(f.shape[-2:]) for f in detector.backbone.features(x)]
    assert shapes == [tuple(ceil(side, stride) for side in size) for stride in (4, 8, 16, 32)]
    maps = list(detector.backbone(x).values())
    assert [tuple(m.shape[-2:]) for m in maps] == [
        tuple(ceil(side, stride) for side in size) for stride in (8, 16, 32, 64, 128)
    ]
    assert all(m.shape[:2] == (2, 16) for m in maps)
    places = sum(m[0, 0].numel() for m in maps)
    out = dense(detector)(x)
    assert out["cls_logits"].shape == (2, 6 * places, 3) and out["bbox_regression"].shape == (2, 6 * places, 4)


def test_anchors_are_two_sizes_by_three_ratios_and_double_by_level():
    made = anchors(2, 32.0).cell_anchors
    assert len(made) == 5
    for level, boxes in enumerate(made):
        width, height = (boxes[:, 2:] - boxes[:, :2]).T
        assert sorted(set((height / width).log2().round().tolist())) == [-1, 0, 1]
        assert sorted((width * height).sqrt().tolist()) == pytest.approx(
            sorted(3 * [32 * 2**level, 32 * 2 ** (level + 0.5)]), rel=0.03
        )


def test_anchors_from_24_pixels_fit_the_digits():
    """What docs/detection.md gives: a digit is matched by 9.0 anchors of 24 pixels upwards, by 4.6 of 16 upwards."""
    _, source, _, _ = load(dataset="DIGITS")
    random = np.random.default_rng(0)
    boxes = [torch.tensor(digits.draw_canvas(source.images, source.labels, random).boxes) for _ in range(60)]
    mean = {}
    for smallest in (16.0, 24.0):
        detector = meta(**SMALL, anchor_size=smallest)
        maps = [torch.zeros(1, 1, side, side) for side in (16, 8, 4, 2, 1)]
        (places,) = detector.anchor_generator(ImageList(torch.zeros(1, 3, 128, 128), [(128, 128)]), maps)
        matched = [detector.proposal_matcher(box_iou(box_convert(b.float(), "xywh", "xyxy"), places)) for b in boxes]
        mean[smallest] = sum((m >= 0).sum().item() for m in matched) / sum(map(len, boxes))
    assert mean == pytest.approx({16.0: 4.6, 24.0: 9.0}, rel=0.1)


def test_heads_start_with_the_paper_s_values_and_the_prior_s_scores():
    torch.manual_seed(0)
    detector = retinanet(**SMALL | {"fpn_channels": 64}, heads="attention", scales=3).eval()
    layers = [m for m in detector.head.modules() if isinstance(m, LocalAttention2d)]
    assert len(layers) == 10
    for layer in layers:
        assert layer.value.weight.std().item() == pytest.approx(0.01, rel=0.1)
        assert layer.query.weight.std().item() > 0.02  # the layer's own
    with torch.no_grad():
        scores = dense(detector)(torch.randn(1, 3, 64, 64))["cls_logits"].sigmoid()
    assert scores.shape[-1] == 3 and scores.mean().item() == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize("heads", ["conv", "attention"])
def test_shortcuts_start_the_heads_close_to_the_identity(heads):
    x, spreads = torch.randn(2, 64, 16, 16), {}
    for shortcuts in (True, False):
        torch.manual_seed(0)
        head = retinanet(**SMALL | {"fpn_channels": 64}, heads=heads, head_shortcuts=shortcuts).head
        for part, predictor in ((head.classification_head, "cls_logits"), (head.regression_head, "bbox_reg")):
            with torch.no_grad():
                out = part.conv(x)
                if heads == "attention":
                    out = getattr(part, predictor)[0](out)
            spreads[shortcuts] = (out - x if shortcuts else out).std().item()
            assert spreads[shortcuts] < 0.4
    assert spreads[False] < 0.02  # nothing of the input is left without them


@pytest.mark.parametrize("heads", ["conv", "attention"])
def test_shortcuts_cost_an_addition_each_and_no_parameter(heads):
    plain, with_them = (retinanet(**SMALL, heads=heads, head_shortcuts=value) for value in (False, True))
    assert count_parameters(plain) == count_parameters(with_them)
    places, layers = 8 * 8 + 4 * 4 + 2 * 2 + 1 + 1, 8 if heads == "conv" else 10
    added = detector_flops(with_them, 64).total - detector_flops(plain, 64).total
    assert added == layers * 16 * places


def targets():
    boxes = torch.tensor([[4.0, 6.0, 30.0, 40.0], [33.0, 20.0, 60.0, 50.0]])
    return [
        {"boxes": boxes, "labels": torch.tensor([0, 2])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long()},
    ]


@pytest.mark.parametrize("options", [{}, {"heads": "attention", "fpn": "attention", "stem": True}])
def test_every_parameter_gets_a_finite_gradient_that_is_not_zero(options):
    torch.manual_seed(0)
    detector = retinanet(**SMALL | {"fpn_channels": 32, "image_size": 256}, **options, anchor_size=16).train()
    sum(detector([torch.rand(3, 256, 256) for _ in range(2)], targets()).values()).backward()
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_two_images_are_learned():
    """A red and a blue box, and an image without any; batch norm by the statistics of the batch throughout."""
    torch.manual_seed(0)
    detector = retinanet(**SMALL | {"fpn_channels": 32}, heads="attention", head_shortcuts=True, anchor_size=16)
    images, wanted = [0.1 * torch.rand(3, 64, 64) for _ in range(2)], targets()
    for box, label in zip(*wanted[0].values(), strict=True):
        x1, y1, x2, y2 = box.int().tolist()
        images[0][label, y1:y2, x1:x2] += 0.8
    optimizer = torch.optim.AdamW(detector.parameters(), lr=2e-3, fused=True)
    detector.train()
    for _ in range(60):  # after 40, boxes are off by more than the limit with some seeds
        optimizer.zero_grad()
        sum(detector(images, wanted).values()).backward()
        optimizer.step()
    detector.eval()
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
    first, second = detector(images)
    assert (second["scores"] < 0.3).all()
    for box, label in zip(*wanted[0].values(), strict=True):
        best = first["scores"][first["labels"] == label].argmax()
        assert first["scores"][first["labels"] == label][best] > 0.5
        assert (first["boxes"][first["labels"] == label][best] - box).abs().max() < 4


def test_frozen_norms_are_constants_and_keep_the_names():
    plain, frozen = retinanet(**SMALL), retinanet(**SMALL, batch_norm="frozen")
    assert not any(isinstance(m, nn.BatchNorm2d) for m in frozen.modules())
    assert sum(isinstance(m, FrozenBatchNorm2d) for m in frozen.modules()) == sum(
        isinstance(m, nn.BatchNorm2d) for m in plain.modules()
    )
    differing = set(plain.state_dict()) ^ set(frozen.state_dict())
    assert all(name.endswith("num_batches_tracked") for name in differing)
    assert count_parameters(plain) - count_parameters(frozen) == sum(
        2 * m.num_features for m in plain.modules() if isinstance(m, nn.BatchNorm2d)
    )
    assert detector_flops(frozen, 64) == detector_flops(plain, 64)


def test_synchronised_norms_keep_the_names():
    detector = retinanet(**SMALL, batch_norm="sync")
    assert any(isinstance(m, nn.SyncBatchNorm) for m in detector.modules())
    assert list(detector.state_dict()) == list(retinanet(**SMALL).state_dict())


def test_frozen_parts_do_not_train_and_their_norms_stand_still():
    detector = retinanet(**SMALL, frozen_parts=2).train()
    body = detector.backbone.body
    assert not any(p.requires_grad for part in (body.stem, body.layer1) for p in part.parameters())
    assert not body.stem.training and not body.layer1.training and body.layer2.training
    assert all(p.requires_grad for p in body.layer2.parameters())
    assert all(p.requires_grad for p in retinanet(**SMALL).parameters())  # nothing is frozen unless asked for


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": "linear"}, "heads='linear': allowed are conv, attention"),
        ({"fpn": "no"}, "fpn='no'"), ({"batch_norm": "x"}, "allowed are plain, frozen, sync"),
        ({"num_classes": 0}, "num_classes=0"), ({"scales": 1.5}, "scales=1.5"), ({"fpn_channels": 0}, "fpn_channels=0"),
        ({"frozen_parts": 6}, "frozen_parts=6"), ({"anchor_size": 0}, "anchor_size=0"),
        ({"head_std": -1.0}, "head_std=-1"),
        ({"small_images": True}, "ImageNet form"),
        ({"heads": "attention", "fpn_channels": 20}, "fpn_channels=20: attention"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        meta(**{"backbone": "ResNet26"} | options)
