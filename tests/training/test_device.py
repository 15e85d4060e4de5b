"""The device and precision that a run picks, and what it refuses; nothing here touches a GPU."""

import pytest
import torch

from config import ConfigError
from sasa.training import checkpoint
from sasa.training.device import check_bf16_gradients, pick_amp, pick_device, set_fp32_precision


@pytest.mark.parametrize(("native", "wanted"), [(True, torch.bfloat16), (False, None)])
def test_emulated_bf16_is_not_chosen_unasked(native, wanted, monkeypatch):
    """A V100 or T4 says that it supports bf16, which it emulates."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    assert pick_amp("auto", torch.device("cuda")) == wanted
    assert pick_amp("bf16", torch.device("cuda")) == torch.bfloat16
    assert pick_amp("auto", torch.device("cpu")) is None


def test_the_gpu_that_was_picked_is_the_current_one(monkeypatch):
    """Else a step's event is recorded on another GPU, and its figures are read before they are there."""
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert pick_device("cuda:1") == torch.device("cuda", 1) and current == [torch.device("cuda", 1)]
    pick_device("cuda"), pick_device("auto"), pick_device("cpu"), pick_device("cpu:0")
    with pytest.raises(ConfigError, match="2 CUDA devices"):
        pick_device("cuda:2")
    assert len(current) == 1


CPU = torch.device("cpu")


@pytest.mark.parametrize("kernel", [3, 7])
def test_bf16_of_a_cpu_is_refused_where_a_strided_convolution_reads_one_column(kernel):
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.Conv2d(8, 8, kernel, 2, kernel // 2))
    with pytest.raises(ConfigError, match=r"--amp bf16.*--img-size 1 .*convolution 1 "):
        check_bf16_gradients(network, 1, torch.bfloat16, CPU)
    check_bf16_gradients(network, 2, torch.bfloat16, CPU)
    check_bf16_gradients(network, 1, None, CPU)
    check_bf16_gradients(network, 1, torch.bfloat16, torch.device("cuda"))
    assert not network[1]._forward_pre_hooks and network.training and network[0].weight.device == CPU


@pytest.mark.parametrize("kernel", [3, 7])
@pytest.mark.parametrize(("height", "width"), [(1, 2), (4, 2), (2, 3)])
def test_what_is_not_refused_has_the_gradient(kernel, height, width):
    """Memory that was freed holds large numbers: an unwritten part of a gradient would show."""
    for _ in range(3):
        x = torch.randn(2, 16, height, width).bfloat16()
        weight = torch.randn(16, 16, kernel, kernel).bfloat16().requires_grad_()
        freed = [torch.full((weight.numel(),), 1e25, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)] * 8
        del freed
        out = torch.nn.functional.conv2d(x, weight, stride=2, padding=kernel // 2)
        direction = torch.randn_like(out)
        out.backward(direction)
        exact = weight.detach().double().requires_grad_()
        torch.nn.functional.conv2d(x.double(), exact, stride=2, padding=kernel // 2).backward(direction.double())
        torch.testing.assert_close(weight.grad.double(), exact.grad, rtol=0.02, atol=0.1)


@pytest.mark.parametrize(("name", "is_tf32"), [("highest", False), ("high", True)])
def test_the_precision_of_fp32_is_that_of_convolutions_too(name, is_tf32):
    """By itself PyTorch computes fp32 convolutions on a GPU in TF32, and products not."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        set_fp32_precision(name)
        assert torch.get_float32_matmul_precision() == name and torch.backends.cudnn.allow_tf32 == is_tf32
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def test_the_generators_of_a_run_are_those_of_its_own_device(monkeypatch):
    """However many GPUs the process sees, or the digests of one run would differ from machine to machine."""
    kept = {}
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.tensor([device.index or 0]))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: kept.update({device: state.item()}))
    assert checkpoint.generator_states(CPU)["cuda"] == []
    states = checkpoint.generator_states(torch.device("cuda", 1))
    assert [state.item() for state in states["cuda"]] == [1]
    checkpoint.set_generator_states(states, torch.device("cuda", 0))  # goes on with another GPU
    checkpoint.set_generator_states(states | {"cuda": [torch.tensor([i]) for i in range(4)]}, torch.device("cuda", 3))
    assert kept == {torch.device("cuda", 0): 1, torch.device("cuda", 3): 3}
    checkpoint.set_generator_states(states, CPU)
    assert len(kept) == 2
