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


def test_flagged_steps_change_nothing_and_are_not_counted():
    """As on CUDA: of five steps the first and third are flagged, with NaN and infinity in their gradients."""
    start = [[1.0, 2.0, -2.0], [0.0, 0.0]]
    good = [[[0.3, -1.0, 2.0], [1.0, -1.0]], [[0.1, 0.2, 0.3], [0.5, 0.25]], [[-3.0, 0.0, 1.0], [0.0, 2.0]]]
    bad = [[math.nan, 1.0, math.inf], [-math.inf, 0.5]]
    weights = [nn.Parameter(torch.tensor(values, dtype=torch.float64)) for values in start]
    optimizer = Lamb(weights, lr=0.05, weight_decay=0.3)
    for gradients in (bad, good[0], bad, *good[1:]):
        for w, g in zip(weights, gradients, strict=True):
            w.grad = torch.tensor(g, dtype=torch.float64)
        optimizer.found_inf = torch.tensor(float(gradients is bad))
        before = [w.detach().clone() for w in weights]
        optimizer.step()
        assert all(map(torch.equal, weights, before)) == (gradients is bad)
    for i, w in enumerate(weights):
        wanted = by_hand(start[i], [step[i] for step in good], 0.05, 0.3, adapt=True)
        torch.testing.assert_close(w.detach(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_a_flag_that_is_0_changes_no_bit_and_a_state_with_skipped_steps_is_loaded():
    def run(w, optimizer, flags):
        for i, flag in enumerate(flags):
            w.grad = torch.tensor([1.0 + i, -2.0, 0.1])
            if flag is not None:
                optimizer.found_inf = torch.tensor(flag)
            optimizer.step()

    weights = [nn.Parameter(torch.tensor([1.0, 2.0, 0.3])) for _ in range(3)]
    plain, flagged, loaded = (Lamb([w], weight_decay=0.1) for w in weights)
    run(weights[0], plain, [None] * 3)
    run(weights[1], flagged, [0.0] * 3)
    assert torch.equal(weights[0], weights[1])
    run(weights[1], flagged, [1.0, 1.0])
    assert torch.equal(weights[0], weights[1])
    loaded.load_state_dict(flagged.state_dict())  # on a device without flags, such as a CPU
    with torch.no_grad():
        weights[2].copy_(weights[1])
    run(weights[0], plain, [None])
    run(weights[2], loaded, [None])
    assert torch.equal(weights[0], weights[2])


def test_gradscaler_skips_a_step_by_the_flag_and_reads_nothing(monkeypatch):
    w = nn.Parameter(torch.tensor([3.0, -4.0]))
    optimizer, scaler = Lamb([w], weight_decay=0.1), torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor, moves in ((math.inf, False), (1.0, True)):
        optimizer.zero_grad()
        scaler.scale((w * factor).sum()).backward()
        scaler.unscale_(optimizer)
        before = w.detach().clone()
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "item", lambda x: pytest.fail("the flag is read"))
            scaler.step(optimizer)
        scaler.update()
        assert torch.equal(w, before) != moves
    with pytest.raises(ValueError, match="unscale_"):
        scaler.scale(w.sum()).backward()
        scaler.step(optimizer)


def test_it_is_built_with_the_configurations_numbers():
    config = resolve({"optimizer": "lamb", "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_eps": 1e-5}, "DIGITS")
    optimizer = build_optimizer(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), config, torch.device("cpu"))
    assert type(optimizer) is Lamb
    assert [(g["betas"], g["eps"], g["weight_decay"]) for g in optimizer.param_groups] == [
        ((0.8, 0.95), 1e-5, 0.05), ((0.8, 0.95), 1e-5, 0.0),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: None)
