"""Silenced heads against a network rebuilt by hand without them, and linear probes against their definition."""

import copy

import pytest
import torch
import torch.nn.functional as F

from model import ResNet26
from sasa.analysis import causal
from sasa.analysis.attention_maps import attention_layers
from sasa.backbone import FEATURES


@pytest.fixture(scope="module", params=["small", "imagenet"])
def case(request, small_network):
    """A network whose batch norms and biases are not trivial, and an image; ragged maps, so that pools round up."""
    torch.manual_seed(0)
    network = ResNet26(7, stem=True, small_images=request.param == "small").double()
    image = torch.randn(1, 3, *((11, 13) if request.param == "small" else (70, 52)), dtype=torch.float64)
    with torch.no_grad():
        network.train()
        for _ in range(3):
            network(image + torch.randn(6, *image.shape[1:], dtype=torch.float64))
    return network.eval(), image


def logits_without(network, image, layer, head, kind):
    """The network run layer by layer, its own way, with one head replaced in the map that the layer gave."""

    def replace(output, module):
        width = output.shape[1] // module.num_heads
        output = output.clone()
        for channel in range(head * width, (head + 1) * width):
            plane = output[0, channel]
            output[0, channel] = plane.sum() / plane.numel() if kind == "mean" else 0.0
        return output

    chosen = attention_layers(network)[layer]
    x = image
    for module in network.stem:
        x = module(x)
        if module is chosen:
            x = replace(x, module)
    for block in [*network.layer1, *network.layer2, *network.layer3, *network.layer4]:
        identity = x if block.downsample is None else block.downsample(x)
        x = block.spatial(F.relu(block.bn1(block.conv1(x))))
        if block.spatial is chosen:
            x = replace(x, chosen)
        x = F.relu(block.bn3(block.conv3(F.relu(block.bn2(x)))) + identity)
    return network.fc(x.mean((-2, -1)))[0]


@torch.no_grad()
def test_silenced_logits_are_those_of_a_network_without_the_head(case):
    network, image = case
    for layer, module in attention_layers(network).items():
        found = causal.silenced_logits(network, image, layer)
        for kind, logits in zip(("mean", "zero"), found, strict=True):
            assert logits.shape == (module.num_heads, 7)
            for head in (0, module.num_heads - 1):
                wanted = logits_without(network, image, layer, head, kind)
                assert (logits[head].double() - wanted).abs().max() < 1e-4 * wanted.abs().max(), (layer, kind, head)


@torch.no_grad()
def test_silenced_by_zero_is_a_head_without_values(case):
    """The head's value projection set to zero: another way to the same network."""
    network, image = case
    for layer in ("stem", "layer2.1", "layer4.0"):
        _, by_zero = causal.silenced_logits(network, image, layer)
        for head in (1, 3):
            other = copy.deepcopy(network)
            module = attention_layers(other)[layer]
            weight = module.value.weight  # (matrices * N * D, C, 1, 1)
            weight.view(-1, module.num_heads, module.head_dim, weight.shape[1])[:, head] = 0
            assert (other(image)[0] - by_zero[head].double()).abs().max() < 1e-4, (layer, head)


def test_effects_are_the_predicted_classs_losses(case):
    network, image = case
    effects = causal.head_effects(network, image)
    names = [(name, head) for name, layer in attention_layers(network).items() for head in range(layer.num_heads)]
    assert [(effect.layer, effect.head) for effect in effects] == names and len(names) == 4 + 5 * 8
    with torch.no_grad():
        whole = network(image)[0].float()
        decided = whole.argmax().item()
        for effect in effects[::9]:
            by_mean, by_zero = causal.silenced_logits(network, image, effect.layer)
            for found, logits in ((effect.by_mean, by_mean[effect.head]), (effect.by_zero, by_zero[effect.head])):
                assert found.logit == logits[decided].item()
                assert found.drop == pytest.approx((whole - logits)[decided].item(), abs=1e-6)
                assert found.probability == pytest.approx(logits.softmax(0)[decided].item())
                assert found.prediction == logits.argmax().item()
                assert found.prediction_probability == pytest.approx(logits.softmax(0).max().item())
    assert max(abs(effect.by_mean.drop) for effect in effects) > 1e-3
    assert any(abs(effect.by_mean.drop - effect.by_zero.drop) > 1e-4 for effect in effects)


def test_a_head_that_says_the_same_everywhere_has_no_effect_by_its_mean(case):
    """A constant output is its own mean; without the values it is gone."""
    network, image = copy.deepcopy(case[0]), case[1]
    constant = attention_layers(network)["layer2.1"]
    hook = constant.register_forward_hook(lambda _, __, output: output.mean((-2, -1), keepdim=True).expand_as(output))
    effects = {(e.layer, e.head): e for e in causal.head_effects(network, image)}
    hook.remove()
    of_layer = [effects["layer2.1", head] for head in range(8)]
    assert all(abs(effect.by_mean.drop) < 1e-5 for effect in of_layer)
    assert any(abs(effect.by_zero.drop) > 1e-4 for effect in of_layer)


def test_the_network_is_left_as_it_was_and_hooks_go(case):
    network, image = case
    before, generator = {k: v.clone() for k, v in network.state_dict().items()}, torch.get_rng_state()
    with torch.no_grad():
        logits = network(image)
        causal.head_effects(network, image)
        causal.pooled_features(network, image)
        assert torch.equal(network(image), logits)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert not any(module._forward_hooks for module in network.modules())


def test_training_mode_and_several_images_are_refused(case):
    network, image = copy.deepcopy(case[0]), case[1]
    with pytest.raises(ValueError, match="must be"):
        causal.silenced_logits(network, torch.cat((image, image)), "stem")
    with pytest.raises(ValueError, match="eval mode"):
        causal.silenced_logits(network.train(), image, "stem")


# ---- probes ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_features_are_the_means_of_the_stages_maps(case):
    network, image = case
    images = torch.cat((image, -image))
    features = causal.pooled_features(network, images)
    x = network.stem(images)
    assert torch.allclose(features["stem"].double(), x.mean((-2, -1)), atol=1e-5)
    x = network.layer4(network.layer3(network.layer2(network.layer1(x))))
    assert torch.allclose(features["layer4"].double(), x.mean((-2, -1)), rtol=1e-5, atol=1e-5)
    assert list(features) == list(FEATURES)
    assert torch.allclose(network.fc(features["layer4"].double()), network(images), rtol=1e-4, atol=1e-4)


def test_a_probe_is_where_the_losss_gradient_vanishes():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(60, 5, generator=generator) * torch.tensor([1.0, 10, 0.1, 3, 0]) + 7
    labels = (features[:, 0] + torch.randn(60, generator=generator) > 7).long() + (features[:, 1] > 12).long()
    probe = causal.fit_probe(features, labels, 3)
    inputs = (features.double() - features.double().mean(0)) / features.double().std(0, correction=0)
    inputs[:, 4] = 0  # constant
    odds = (inputs @ probe.weight.T + probe.bias).exp()
    shares = odds / odds.sum(1, keepdim=True)
    assert torch.allclose(probe.probabilities(features), shares)
    excess = (shares - torch.eye(3, dtype=torch.float64)[labels]) / len(labels)
    assert (excess.T @ inputs + causal.PROBE_DECAY * probe.weight).abs().max() < 1e-5
    assert excess.sum(0).abs().max() < 1e-5
    found = (shares.argmax(1) == labels).sum().item()
    assert causal.top1_pct(probe, features, labels) == pytest.approx(100 * found / 60) and found > 30
    again = causal.fit_probe(features, labels, 3)
    assert torch.equal(again.weight, probe.weight) and torch.equal(again.bias, probe.bias)


def test_features_of_batches_are_put_together(case):
    network, image = case
    batches = [(torch.cat((image, -image)), torch.tensor([1, 2])), (2 * image, torch.tensor([0]))]
    features, labels = causal.gather_features(network, batches)
    assert labels.tolist() == [1, 2, 0] and features["layer3"].shape == (3, 256)
    assert torch.equal(features["layer3"][2:], causal.pooled_features(network, 2 * image)["layer3"])
