"""The learning rate, parameter groups, moving average and batch norm's momentum, against numbers worked out by hand."""

import math

import pytest
import torch
from torch import nn

import model
from config import resolve
from sasa.training.optim import (
    build_ema,
    build_optimizer,
    ema_decay,
    learning_rate,
    parameter_groups,
    set_batch_norm_momentum,
    set_rate,
)

CPU = torch.device("cpu")


def test_cosine_with_warm_up_at_five_steps():
    """10 epochs of 4 steps, 2 of them warm-up: eighths of the peak up to step 7, then a cosine of the 32 steps left."""
    config = resolve({"epochs": 10, "warmup_epochs": 2.0, "lr": 0.8}, "DIGITS")
    by_hand = {0: 0.1, 3: 0.4, 7: 0.8, 24: 0.4, 32: 0.4 * (1 - math.sqrt(0.5)), 39: 0.4 * (1 - math.cos(math.pi / 32))}
    assert {step: learning_rate(config, step, 4) for step in by_hand} == pytest.approx(by_hand)


def test_the_rate_rises_to_its_peak_once_and_never_to_zero_before_the_end():
    config = resolve({"epochs": 10, "warmup_epochs": 2.5, "lr": 1.0}, "DIGITS")
    rates = [learning_rate(config, step, 7) for step in range(70)]
    peak = rates.index(max(rates))
    assert max(rates) == pytest.approx(1, abs=0.01) and peak in (16, 17)
    assert rates[:peak] == sorted(rates[:peak]) and rates[peak:] == sorted(rates[peak:], reverse=True)
    assert min(rates) > 0 and learning_rate(config, 70, 7) == pytest.approx(0)


def test_no_warm_up_starts_at_the_peak():
    config = resolve({"epochs": 10, "warmup_epochs": 0.0, "lr": 0.8}, "DIGITS")
    assert learning_rate(config, 0, 4) == 0.8


def test_the_step_schedule_at_five_steps():
    """A tenth every 30 epochs, here of 4 steps."""
    config = resolve({"recipe": "port", "lr": 0.1}, "CIFAR10")
    by_hand = {0: 0.1, 119: 0.1, 120: 0.01, 239: 0.01, 240: 0.001, 399: 0.0001}
    assert {step: learning_rate(config, step, 4) for step in by_hand} == pytest.approx(by_hand)


def test_the_step_schedules_own_numbers():
    config = resolve({"recipe": "port", "lr": 0.1, "step_epochs": 2, "step_factor": 0.5}, "CIFAR10")
    assert [learning_rate(config, step, 4) for step in (7, 8, 16)] == pytest.approx([0.1, 0.05, 0.025])


def test_adams_numbers_reach_the_optimizer():
    config = resolve({"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_eps": 1e-6}, "DIGITS")
    group = build_optimizer(nn.Linear(2, 2), config, CPU).param_groups[0]
    assert (group["betas"], group["eps"]) == ((0.8, 0.95), 1e-6)


def test_the_lowest_rate_ends_the_cosine_and_stops_the_steps():
    """A cosine from 1 to 0.2: half-way 0.6, a quarter 0.2 + 0.4 (1 + sqrt(0.5)); steps 1, 0.1, then 0.05, not 0.01."""
    config = resolve({"epochs": 8, "warmup_epochs": 0.0, "lr": 1.0, "min_lr": 0.2}, "DIGITS")
    by_hand = {0: 1.0, 2: 0.2 + 0.4 * (1 + math.sqrt(0.5)), 4: 0.6, 8: 0.2}
    assert {step: learning_rate(config, step, 1) for step in by_hand} == pytest.approx(by_hand)
    config = resolve({"recipe": "port", "lr": 1.0, "min_lr": 0.05}, "CIFAR10")
    assert [learning_rate(config, step, 1) for step in (0, 30, 60, 90)] == pytest.approx([1.0, 0.1, 0.05, 0.05])


# ---- parameter groups -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("position", "tables"), [("relative", 2 * 8 + 3), ("absolute", 3)])
def test_decay_is_for_weights_of_projections_and_convolutions_only(position, tables):
    net = model.build("ResNet26", 10, True, small_images=True, position=position)
    decay = {id(p): g["weight_decay"] for g in parameter_groups(net, 0.5, 0.25) for p in g["params"]}
    assert len(decay) == len(list(net.parameters())) == sum(len(g["params"]) for g in parameter_groups(net, 0.5, 0.25))
    norms = {id(p) for m in net.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    embeddings = 0
    for name, parameter in net.named_parameters():
        if id(parameter) in norms or name.endswith("bias"):
            wanted = 0.0
        elif "rel_" in name or "emb_" in name:
            wanted, embeddings = 0.25, embeddings + 1
        else:
            wanted = 0.5
            assert name.endswith("weight") or ".value" in name, name
        assert decay[id(parameter)] == wanted, name
    assert embeddings == tables


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_optimizer_and_its_settings(name):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    given = {"optimizer": name, "lr": 0.25, "momentum": 0.75, "weight_decay": 0.5}
    optimizer = build_optimizer(net, resolve(given, "DIGITS"), CPU)
    assert type(optimizer) is {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[name]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
    if name == "sgd":
        assert [(group["momentum"], group["nesterov"]) for group in optimizer.param_groups] == [(0.75, True)] * 2


def test_nesterov_is_the_recipes_and_needs_momentum():
    net = nn.Conv2d(3, 4, 1)
    seed = build_optimizer(net, resolve({"recipe": "port"}, "DIGITS"), CPU)
    assert seed.param_groups[0]["nesterov"] is False and seed.param_groups[0]["momentum"] == 0.9
    plain = build_optimizer(net, resolve({"optimizer": "sgd", "momentum": 0.0}, "DIGITS"), CPU)
    assert plain.param_groups[0]["nesterov"] is False


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_one_step_by_hand(name):
    """SGD with Nesterov: the gradient, decay included, counts 1 + momentum times at first; AdamW moves by the rate."""
    net = nn.Linear(2, 1, bias=False)
    given = {"optimizer": name, "lr": 0.1, "momentum": 0.5, "weight_decay": 0.2}
    optimizer = build_optimizer(net, resolve(given, "DIGITS"), CPU)
    before = net.weight.detach().clone()
    net.weight.grad = torch.tensor([[3.0, -4.0]])
    optimizer.step()
    if name == "sgd":
        wanted = before - 0.1 * 1.5 * (net.weight.grad + 0.2 * before)
    else:
        wanted = before * (1 - 0.1 * 0.2) - 0.1 * net.weight.grad.sign()
    torch.testing.assert_close(net.weight.detach(), wanted)


def test_layer_decay_by_hand():
    """ResNet26: 8 blocks. The classifier has the full rate, layer4 half of it, ..., layer1.0 2^-8, the stem 2^-9."""
    net = model.build("ResNet26", 10, small_images=True)
    optimizer = build_optimizer(net, resolve({"layer_decay": 0.5}, "DIGITS"), CPU)
    set_rate(optimizer, 3.0)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    order = [
        "fc",
        "layer4.0",
        "layer3.3",
        "layer3.2",
        "layer3.1",
        "layer3.0",
        "layer2.1",
        "layer2.0",
        "layer1.0",
        "stem",
    ]
    for name, parameter in net.named_parameters():
        depth = next(i for i, start in enumerate(order) if name.startswith(f"{start}."))
        assert rates[id(parameter)] == 3.0 * 0.5**depth, name
    assert len(rates) == len(list(net.parameters()))
    decays = {group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {0.05, 0.0}


def test_without_layer_decay_the_groups_are_as_they_were():
    net = model.build("ResNet26", 10, small_images=True)
    optimizer = build_optimizer(net, resolve({}, "DIGITS"), CPU)
    set_rate(optimizer, 3.0)
    assert [(g["lr"], g["weight_decay"], "lr_scale" in g) for g in optimizer.param_groups] == [
        (3.0, 0.05, False), (3.0, 0.0, False), (3.0, 0.0, False),
    ]  # fmt: skip


# ---- moving average -------------------------------------------------------------------------------------------------


def test_the_moving_average_is_the_one_by_hand_for_weights_and_buffers():
    """It starts at the first step's weights; batch norm's statistics are averaged too, its counter follows."""
    net = nn.BatchNorm1d(1)
    ema = build_ema(net, 0.75)
    wanted = {}
    for step, value in enumerate((4.0, 8.0, 0.0)):
        with torch.no_grad():
            net.weight.fill_(value)
            net.running_mean.fill_(-value)
        ema.update_parameters(net)
        for key, own in (("weight", value), ("running_mean", -value)):
            wanted[key] = own if step == 0 else 0.75 * wanted[key] + 0.25 * own
    assert wanted == {"weight": 3.75, "running_mean": -3.75}
    assert ema.module.weight.item() == 3.75 and ema.module.running_mean.item() == -3.75
    assert net.weight.item() == 0.0


def test_no_decay_is_no_average():
    assert build_ema(nn.Linear(1, 1), 0.0) is None


def test_a_recipes_moving_average_spans_at_most_a_fifth_of_the_run():
    """DIGITS: 0.98 spans 50 steps, so from 250 on; 88 steps, two epochs: 1 - 5 / 88."""
    decays = [ema_decay(None, 0.98, steps) for steps in (528, 250, 88, 10, 5, 1)]
    assert decays == [0.98, 0.98, 0.943182, 0.5, 0.0, 0.0]
    assert ema_decay(None, 0.9999, 650520) == 0.9999
    assert ema_decay(0.9, None, 10) == ema_decay(0.9, 0.98, 10) == 0.9


def test_batch_norms_momentum_is_the_recipes():
    net = model.build("ResNet26", 10, small_images=True, attention_stages=())
    config = resolve({"recipe": "paper"}, "IMAGENET")
    set_batch_norm_momentum(net, config.bn_momentum)
    assert {m.momentum for m in net.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-4}
