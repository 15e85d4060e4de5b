"""LAMB's steps by hand."""

import math

import pytest
import torch
from torch import nn

from config import resolve
from sasa.training.lamb import Lamb
from sasa.training.optim import build_optimizer


def by_hand(w, gradients, lr, wd, adapt, beta1=0.9, beta2=0.999, eps=1e-6):
    """In plain numbers, w a list."""
    m, v = [0.0] * len(w), [0.0] * len(w)
    for t, g in enumerate(gradients, start=1):
        m = [beta1 * a + (1 - beta1) * b for a, b in zip(m, g, strict=True)]
        v = [beta2 * a + (1 - beta2) * b * b for a, b in zip(v, g, strict=True)]
        u = [
            a / (1 - beta1**t) / (math.sqrt(b / (1 - beta2**t)) + eps) + wd * x for a, b, x in zip(m, v, w, strict=True)
        ]
        norms = [math.sqrt(sum(x * x for x in side)) for side in (w, u)]
        ratio = norms[0] / norms[1] if adapt and min(norms) > 0 else 1.0
        w = [x - lr * ratio * y for x, y in zip(w, u, strict=True)]
    return w


def test_the_first_step_by_hand():
    """Adam's first step is the gradient's sign; with w = (3, -4), decay 0.5 it is (2.5, -3), and |w| = 5."""
    w = nn.Parameter(torch.tensor([3.0, -4.0]))
    w.grad = torch.tensor([7.0, -0.1])
    Lamb([w], lr=0.1, weight_decay=0.5, eps=1e-12).step()
    ratio = 5 / math.sqrt(2.5**2 + 3**2)
    torch.testing.assert_close(w.detach(), torch.tensor([3 - 0.1 * ratio * 2.5, -4 + 0.1 * ratio * 3]))


@pytest.mark.parametrize("wd", [0.0, 0.3])
def test_three_steps_of_three_tensors(wd):
    """Each tensor has its own ratio; one that is all zero has 1, and so has a group without decay."""
    start = [[1.0, 2.0, -2.0], [0.0, 0.0], [0.5]]
    weights = [nn.Parameter(torch.tensor(values, dtype=torch.float64)) for values in start]
    optimizer = Lamb(weights, lr=0.05, weight_decay=wd)
    gradients = [[[0.3, -1.0, 2.0], [1.0, -1.0], [4.0]], [[0.1, 0.2, 0.3], [0.5, 0.25], [-4.0]],
                 [[-3.0, 0.0, 1.0], [0.0, 2.0], [1.0]]]  # fmt: skip
    for step in gradients:
        for w, g in zip(weights, step, strict=True):
            w.grad = torch.tensor(g, dtype=torch.float64)
        optimizer.step()
    for i, w in enumerate(weights):
        wanted = by_hand(start[i], [step[i] for step in gradients], 0.05, wd, adapt=wd > 0)
        torch.testing.assert_close(w.detach(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_a_loaded_state_goes_on_bitwise():
    def run(steps, optimizer, w):
        for i in steps:
            w.grad = torch.tensor([1.0 + i, -2.0])
            optimizer.step()

    one, two = (nn.Parameter(torch.tensor([1.0, 2.0])) for _ in range(2))
    straight, first = Lamb([one], weight_decay=0.1), Lamb([two], weight_decay=0.1)
    run(range(5), straight, one)
    run(range(3), first, two)
    second = Lamb([two], weight_decay=0.1)
    second.load_state_dict(first.state_dict())
    run(range(3, 5), second, two)
    assert torch.equal(one, two) and not torch.equal(one, torch.tensor([1.0, 2.0]))


def test_it_is_built_with_the_configurations_numbers():
    config = resolve({"optimizer": "lamb", "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_eps": 1e-5}, "DIGITS")
    optimizer = build_optimizer(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), config, torch.device("cpu"))
    assert type(optimizer) is Lamb
    assert [(g["betas"], g["eps"], g["weight_decay"]) for g in optimizer.param_groups] == [
        ((0.8, 0.95), 1e-5, 0.05), ((0.8, 0.95), 1e-5, 0.0),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: None)
