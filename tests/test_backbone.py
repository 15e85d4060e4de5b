"""What users of image models expect: channels, intermediate maps, checkpointing, freezing, detection, timm, convert."""

import copy

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN, _resnet_fpn_extractor
from torchvision.models.feature_extraction import create_feature_extractor

import model
from attention import AttentionStem, LocalAttention2d
from sasa.analysis.flops import count_parameters


def network(**options):
    torch.manual_seed(0)
    return model.ResNet26(num_classes=4, **{"kernel_size": 3, "small_images": True} | options)


# Image channels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 4, 12])
@pytest.mark.parametrize("options", [
    {}, {"stem": True}, {"stem": True, "small_images": False}, {"stem": True, "stem_values": "conv"},
    {"attention_stages": ()},
], ids=str)  # fmt: skip
def test_images_of_any_channels(channels, options):
    net = network(in_chans=channels, **options)
    net(torch.randn(2, channels, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    with pytest.raises(ValueError, match=f"{channels}"):
        net(torch.randn(2, 3, 32, 32))


def test_a_replaced_first_convolution_says_what_it_takes():
    net = network(attention_stages=())
    net.stem[0] = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    assert net(torch.randn(2, 1, 64, 64)).shape == (2, 4)
    net.stem[0] = nn.Sequential(nn.Conv2d(5, 64, 3, padding=1))  # does not say: its own error, if any
    assert net(torch.randn(2, 5, 64, 64)).shape == (2, 4)


# Maps and head --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"small_images": False}, {"small_images": False, "stem": True}], ids=str)
def test_feature_info_says_what_forward_intermediates_returns(options):
    net, x = network(**options).eval(), torch.randn(2, 3, 64, 96)
    last, maps = net.forward_intermediates(x)
    assert torch.equal(last, net.forward_features(x))
    assert torch.equal(maps[2], net.layer2(net.layer1(net.stem(x))))
    for info, got in zip(net.feature_info, maps, strict=True):
        assert got.shape == (2, info["num_chs"], 64 // info["reduction"], 96 // info["reduction"])
        assert isinstance(net.get_submodule(info["module"]), nn.Module)
    assert net.feature_info[-1]["num_chs"] == net.num_features


def test_chosen_intermediate_maps():
    net, x = network().eval(), torch.randn(1, 3, 16, 16)
    every = net.forward_intermediates(x, intermediates_only=True)
    for indices, wanted in ((2, (3, 4)), (np.int64(2), (3, 4)), ([1], (1,)), (np.array([-1, 0]), (0, 4))):
        got = net.forward_intermediates(x, indices, intermediates_only=True)
        assert all(torch.equal(a, every[i]) for a, i in zip(got, wanted, strict=True))
    calls = []
    net.layer4.register_forward_hook(lambda *a: calls.append(1))
    last, _ = net.forward_intermediates(x, [2], stop_early=True)
    assert torch.equal(last, every[2]) and not calls
    for wrong in ({"indices": [5]}, {"indices": 0}, {"output_fmt": "NLC"}):
        with pytest.raises(ValueError):
            net.forward_intermediates(x, **wrong)


def test_no_intermediate_map_at_all():
    net, x = network().eval(), torch.randn(1, 3, 16, 16)
    last, maps = net.forward_intermediates(x, [])
    assert torch.equal(last, net.forward_features(x)) and maps == []
    with pytest.raises(ValueError, match="indices: stop_early needs at least one map"):
        net.forward_intermediates(x, [], stop_early=True)


def test_head_and_classifier():
    net, x = network().eval(), torch.randn(2, 3, 16, 16)
    features = net.forward_features(x)
    assert torch.equal(net.forward_head(features), net(x))
    assert torch.equal(net.forward_head(features, pre_logits=True), features.mean((2, 3)))
    assert net.get_classifier() is net.fc
    net.reset_classifier(0)
    assert isinstance(net.get_classifier(), nn.Identity)
    assert torch.equal(net(x), net.forward_head(features, pre_logits=True))


# Checkpointing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ResNet26", "NaiveResNet26"])
def test_grad_checkpointing_changes_nothing_but_memory(name):
    torch.manual_seed(0)
    options = {} if name.startswith("Naive") else {"kernel_size": 3}
    plain = model.build(name, 4, small_images=True, **options)
    checkpointed = copy.deepcopy(plain)
    checkpointed.set_grad_checkpointing()
    x, kept = torch.randn(4, 3, 16, 16), {}
    for which, net in (("plain", plain), ("checkpointed", checkpointed)):
        sizes = kept[which] = []

        def pack(t, sizes=sizes):
            sizes.append(t.numel() * (t.dim() == 4))
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = net(x)
        before_backward = sum(sizes)
        out.square().sum().backward()
        kept[which] = before_backward
    assert kept["checkpointed"] < kept["plain"] / 2
    for a, b in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    for a, b in zip(plain.buffers(), checkpointed.buffers(), strict=True):  # statistics are counted once
        assert torch.equal(a, b)
    checkpointed.set_grad_checkpointing(False)
    assert not any(getattr(m, "grad_checkpointing", False) for m in checkpointed.modules())


# Detection ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", range(6))
def test_freezing_freezes_what_it_says(trainable):
    net = network()
    net.freeze(np.int64(trainable))
    trained = {"layer4", "layer3", "layer2", "layer1", "stem"} if trainable == 5 else {
        f"layer{i}" for i in range(5 - trainable, 5)
    }  # fmt: skip
    for name, p in net.named_parameters():
        part = name.partition(".")[0]
        assert p.requires_grad == (part in trained or part == "fc"), name


@pytest.mark.parametrize("trainable", range(6))
def test_torchvisions_freezing_is_right_or_refused(trainable):
    net = network(small_images=False)
    if trainable >= 4:
        with pytest.raises(RuntimeError, match=r"freeze"):
            _resnet_fpn_extractor(net, trainable)
        return
    body = _resnet_fpn_extractor(net, trainable).body
    for name, p in body.named_parameters():
        assert p.requires_grad == (name.startswith("layer") and int(name[5]) > 4 - trainable), name


def test_freeze_refuses_another_number():
    for wrong in (6, -1, 2.5):
        with pytest.raises(ValueError, match="trainable_layers"):
            network().freeze(wrong)


def test_retinanet_of_torchvision_trains_a_step_on_our_backbone():
    net = network(small_images=False)
    layers = {f"layer{i}": str(i) for i in (2, 3, 4)}
    backbone = BackboneWithFPN(net, layers, [net.inplanes // 4, net.inplanes // 2, net.inplanes], 64)
    head = torchvision.models.detection.RetinaNet(
        backbone, num_classes=3, min_size=64, max_size=64,
        anchor_generator=torchvision.models.detection.anchor_utils.AnchorGenerator(
            ((16,), (32,), (64,), (128,)), ((1.0,),) * 4),
    )  # fmt: skip
    target = {"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    optimizer = torch.optim.SGD(head.parameters(), lr=1e-3)
    before = net.layer2[0].spatial.rel_row.detach().clone()
    losses = head([torch.rand(3, 64, 64)], [target])
    sum(losses.values()).backward()
    optimizer.step()
    assert not torch.equal(net.layer2[0].spatial.rel_row, before)


# Networks of others ---------------------------------------------------------------------------------------------------


def test_a_converted_resnet50_has_our_parameter_count():
    with torch.device("meta"):
        theirs = model.convert(torchvision.models.resnet50())
        assert count_parameters(theirs) == count_parameters(model.ResNet50())
        half = model.convert(torchvision.models.resnet50(), stages=(3, 4))
        assert count_parameters(half) == count_parameters(model.ResNet50(attention_stages=(3, 4)))


def test_convert_keeps_all_other_weights_and_runs():
    theirs = torchvision.models.resnet50().eval()
    before = copy.deepcopy(theirs)
    assert model.convert(theirs, stages=(4,), kernel_size=3) is theirs
    changed = {n for n, m in theirs.named_modules() if isinstance(m, LocalAttention2d)}
    assert changed == {f"layer4.{i}.conv2" for i in range(3)}
    kept = theirs.state_dict()
    assert all(torch.equal(kept[n], x) for n, x in before.state_dict().items() if n.rpartition(".")[0] not in changed)
    assert not any(m.training for m in theirs.modules())
    x = torch.randn(1, 3, 64, 64)
    assert theirs(x).shape == (1, 1000)
    early, late = (create_feature_extractor(net, ["layer3"])(x)["layer3"] for net in (before, theirs))
    assert torch.equal(early, late)


REFUSED = {
    "groups": (lambda: torchvision.models.resnext50_32x4d(), {}, "layer1.0.conv2: groups=32"),
    "dilation": (
        lambda: torchvision.models.resnet50(replace_stride_with_dilation=(False, False, True)), {"stages": (4,)},
        "layer4.1.conv2: dilation",
    ),
    "no bottleneck": (lambda: torchvision.models.resnet18(), {}, "BasicBlock"),
    "no ResNet": (lambda: torchvision.models.vgg11(), {}, "VGG"),
    "stage": (lambda: torchvision.models.resnet50(), {"stages": (5,)}, "5"),
    "heads": (lambda: torchvision.models.resnet50(), {"num_heads": 7}, "num_heads=7"),
    "twice": (lambda: model.convert(torchvision.models.resnet50()), {}, "LocalAttention2d"),
}  # fmt: skip


@pytest.mark.parametrize("which", REFUSED)
def test_convert_refuses_by_name_and_leaves_the_network(which):
    make, options, words = REFUSED[which]
    with torch.device("meta"):
        net = make()
    before = [type(m) for m in net.modules()]
    with pytest.raises(ValueError) as error:
        model.convert(net, **options)
    assert words in str(error.value)
    assert [type(m) for m in net.modules()] == before


def test_torchvision_weights_load_with_difference_0():
    theirs = torchvision.models.resnet50(num_classes=10).eval()
    for m in theirs.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
    ours = model.ResNet50(num_classes=10, attention_stages=())
    assert model.load_torchvision(ours, theirs.state_dict()) is ours
    x = torch.randn(1, 3, 96, 64)
    assert torch.equal(ours.eval()(x), theirs(x))


def test_torchvision_weights_of_another_network_are_refused():
    weights = torchvision.models.resnet50(num_classes=10).state_dict()
    for net, words in (
        (model.ResNet50(num_classes=10), "attention_stages"),
        (model.ResNet38(num_classes=10, attention_stages=()), "differ"),
        (model.ResNet50(num_classes=11, attention_stages=()), "fc"),
    ):
        with pytest.raises(ValueError, match=words):
            model.load_torchvision(net, weights)


def test_timm_finds_and_converts_networks():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    import sasa.timm_models  # noqa: F401

    net = timm.create_model("sasa_resnet26", num_classes=5, in_chans=1, small_images=True, kernel_size=3)
    assert net(torch.randn(1, 1, 16, 16)).shape == (1, 5)
    with pytest.raises(ValueError, match="pretrained"):
        timm.create_model("sasa_resnet50", pretrained=True)
    theirs = model.convert(timm.create_model("resnet50"), stages=(3, 4))
    assert count_parameters(theirs) == count_parameters(model.ResNet50(attention_stages=(3, 4)))
    with pytest.raises(ValueError, match="groups=32"):
        model.convert(timm.create_model("resnext50_32x4d"))


# Arguments ------------------------------------------------------------------------------------------------------------


def test_numpy_integers_are_integers():
    i = np.int64
    layer = LocalAttention2d(i(16), i(32), i(3), stride=i(2), num_heads=i(4))
    assert layer(torch.randn(1, 16, 8, 8)).shape == (1, 32, 4, 4)
    assert all(type(n) is int for n in (layer.in_channels, layer.kernel_size, layer.stride, layer.num_heads))
    stem = AttentionStem(i(3), i(16), block_size=i(4), num_heads=i(4), num_mixtures=i(2))
    assert stem(torch.randn(1, 3, 8, 8)).shape == (1, 16, 8, 8)
    net = model.ResNet26(i(7), attention_stages=tuple(np.arange(1, 3)), in_chans=i(3), num_heads=i(4))
    assert net.fc.out_features == 7
    for wrong in (np.float64(4), np.bool_(True), True, 0, "4", i(-4)):
        with pytest.raises(ValueError, match="num_heads"):
            LocalAttention2d(16, 16, 3, num_heads=wrong)
