"""Stochastic depth: rates and draws by hand, and what it does to a network."""

import copy

import pytest
import torch

import model
from sasa.training.drop_path import DropPath, block_rates, draw
from sasa.training.optim import build_ema


def test_rates_rise_linearly_over_the_blocks():
    assert block_rates(0.3, 4) == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert block_rates(0.3, 1) == [0.0] and block_rates(0.3, 0) == []
    net = model.build("ResNet26", 10, small_images=True)
    assert len(DropPath(net, 0.7).rates) == 8 and DropPath(net, 0.7).rates[-1] == pytest.approx(0.7)


def test_draws_keep_as_often_as_they_should_and_the_mean():
    keep = draw(0, 1, 2, 8000, [0.0, 0.25, 0.5])
    assert keep.dtype == torch.float32 and keep.shape == (8000, 3)
    assert keep[:, 0].unique().tolist() == [1.0]
    assert keep[:, 1].unique().tolist() == pytest.approx([0.0, 4 / 3]) and keep[:, 2].unique().tolist() == [0.0, 2.0]
    assert abs(keep[:, 1].mean() - 1) < 0.03 and abs(keep[:, 2].mean() - 1) < 0.05
    assert torch.equal(keep, draw(0, 1, 2, 8000, [0.0, 0.25, 0.5]))
    for other in (
        draw(1, 1, 2, 8000, [0, 0.25, 0.5]),
        draw(0, 2, 2, 8000, [0, 0.25, 0.5]),
        draw(0, 1, 3, 8000, [0, 0.25, 0.5]),
    ):
        assert not torch.equal(keep, other)


@pytest.mark.parametrize("name", ["ResNet26", "NaiveResNet26"])
def test_a_branch_that_is_left_out_leaves_the_shortcut(name):
    """Image 0 keeps no branch, image 1 all: the block gives relu(shortcut), or what it gives otherwise."""
    net = model.build(name, 10, small_images=True).train()
    block = net.layer1[0]
    x = torch.randn(2, 64, 8, 8)
    plain = copy.deepcopy(block)(x)
    drop = DropPath(net, 0.5)
    drop.keep = torch.tensor([[0.0] * 8, [1.0] * 8])
    out = block(x)
    shortcut = x if block.downsample is None else copy.deepcopy(block.downsample)(x)
    torch.testing.assert_close(out[0], shortcut[0].relu())
    torch.testing.assert_close(out[1], plain[1])
    drop.keep = torch.tensor([[2.0] * 8, [1.0] * 8])
    branch = plain - shortcut
    doubled = block(x)[0]
    positive = plain[0] > 0  # where the ReLU hides nothing
    torch.testing.assert_close(doubled[positive], (shortcut + 2 * branch)[0].relu()[positive], atol=1e-4, rtol=1e-4)


def test_evaluation_and_the_moving_average_are_left_alone():
    net = model.build("ResNet26", 10, small_images=True)
    x = torch.randn(2, 3, 8, 8)
    wanted = net.eval()(x)
    drop = DropPath(net, 0.9)
    drop.keep = torch.zeros(2, 8)
    assert torch.equal(net(x), wanted)
    assert torch.equal(build_ema(net, 0.9).module.eval()(x), wanted)
    assert net.state_dict().keys() == model.build("ResNet26", 10, small_images=True).state_dict().keys()


def test_under_bf16_the_branch_keeps_its_dtype():
    net = model.build("ResNet26", 10, small_images=True, attention_stages=()).train()
    drop = DropPath(net, 0.5)
    drop.keep = torch.ones(2, 8)
    seen = []
    net.layer1[0].bn3.register_forward_hook(lambda module, inputs, out: seen.append((inputs[0].dtype, out.dtype)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        net(torch.randn(2, 3, 8, 8))
    assert seen[0][0] == seen[0][1] == torch.bfloat16
