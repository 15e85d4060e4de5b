"""Counters of operations: PyTorch's own by the formulas of our operators, others' by rules, all against tools.audit."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import model
from attention import AttentionStem, LocalAttention2d
from sasa.analysis.counters import ptflops_rules, thop_rules
from sasa.analysis.flops import count_flops
from sasa.kernels import cpu, local_attention_packed, local_attention_pooled, stem_operator

SHARED = {"convolution", "linear", "projection", "logits", "softmax", "weighted sum", "value mixture"}
NETWORKS = {
    "attention": {},
    "grouped, scaled": {"grouped": True, "scale": 0.5},
    "no content": {"content": False},
    "no position": {"position": "none", "border": "zero"},
    "two stages": {"attention_stages": (2, 4)},
    "baseline": {"attention_stages": ()},
}


def counted(net, *shape):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.randn(shape))
    return counter.get_total_flops()


@pytest.mark.parametrize("which", NETWORKS)
def test_flop_counter_mode_agrees_with_audit(which):
    """All of audit's kinds but batch norm, ReLU, pools, sums and biases, which FlopCounterMode does not count."""
    net = model.ResNet26(num_classes=0, **NETWORKS[which]).eval()
    wanted = sum(n for kind, n in count_flops(net, 64).by_kind.items() if kind in SHARED)
    assert counted(net, 1, 3, 64, 64) == wanted
    assert counted(net, 2, 3, 64, 64) == 2 * wanted


@pytest.mark.skipif(cpu.unusable() is not None, reason=f"the stem's kernel: {cpu.unusable()}")
@pytest.mark.parametrize("values", ["mixture", "plain"])
@pytest.mark.parametrize("window", ["block", "sliding"])
def test_the_stems_operator_agrees_with_audit(window, values):
    """Called directly: FlopCounterMode hooks every module, and a stem with hooks is computed module by module."""
    stem, x = AttentionStem(window=window, values=values), torch.randn(2, 3, 64, 64)
    weights = (stem._forms(), stem._mixture(x), stem._value_weight())
    with FlopCounterMode(display=False) as counter:
        stem_operator.attend(x, *weights, window, "mask", "cpu").sum().backward()
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    assert counts["sasa.stem_attention"] == 2 * count_flops(stem, 64).total
    assert counts["sasa.stem_attention_backward"] == 2 * counts["sasa.stem_attention"]


def test_the_packed_operator_agrees_and_backward_counts_twice():
    layer = LocalAttention2d(8, 16, 3, num_heads=2, scale=0.5)
    qkv = torch.randn(2, 3, 2, 8, 6, 6, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        local_attention_packed(qkv, layer.rel_row, layer.rel_col, kernel_size=3, scale=0.5).sum().backward()
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    kinds = count_flops(layer, 6, in_channels=8).by_kind
    assert counts["sasa.local_attention_packed"] == 2 * (sum(kinds.values()) - kinds["projection"])
    assert counts["sasa.local_attention_packed_backward"] == 2 * counts["sasa.local_attention_packed"]


@pytest.mark.skipif(cpu.unusable() is not None, reason=f"no CPU kernel: {cpu.unusable()}")
def test_with_the_pool_inside_attention_counts_as_without():
    layer = LocalAttention2d(8, 16, 3, num_heads=2, scale=0.5)
    qkv = torch.randn(2, 3, 2, 8, 6, 6, requires_grad=True)
    counts = {}
    for function in (local_attention_packed, local_attention_pooled):
        with FlopCounterMode(display=False) as counter:
            function(qkv, layer.rel_row, layer.rel_col, kernel_size=3, scale=0.5).sum().backward()
        counts |= {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    for part in ("", "_backward"):
        assert counts[f"sasa.local_attention_pooled{part}"] == counts[f"sasa.local_attention_packed{part}"] > 0


def test_backward_of_the_layer_counts_twice_the_forward():
    layer = LocalAttention2d(8, 16, 3, num_heads=2)
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(1, 8, 6, 6, requires_grad=True)).sum().backward()
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    assert counts["sasa.local_attention_backward"] == 2 * counts["sasa.local_attention"] > 0


@pytest.mark.parametrize("make", [lambda: LocalAttention2d(8, 16, 3, num_heads=2), lambda: AttentionStem(8, 16)])
def test_thop_and_ptflops_count_half_of_audits_flops(make):
    net, x = make().eval(), torch.randn(1, 8, 12, 12)
    wanted = count_flops(net, 12, in_channels=8).total / 2
    thop = pytest.importorskip("thop", reason="thop is not installed")
    ptflops = pytest.importorskip("ptflops", reason="ptflops is not installed")
    found, _ = thop.profile(torch.nn.Sequential(net), (x,), custom_ops=thop_rules(), verbose=False)
    assert found == pytest.approx(wanted)
    found, _ = ptflops.get_model_complexity_info(
        torch.nn.Sequential(net), (8, 12, 12), as_strings=False, print_per_layer_stat=False, backend="pytorch",
        custom_modules_hooks=ptflops_rules(), verbose=False,
    )  # fmt: skip
    assert found == pytest.approx(wanted)


def test_torchinfo_sees_the_layers():
    torchinfo = pytest.importorskip("torchinfo", reason="torchinfo is not installed")
    info = torchinfo.summary(LocalAttention2d(8, 16, 3, num_heads=2), (1, 8, 12, 12), verbose=0)
    assert info.total_mult_adds >= 3 * 8 * 16 * 12 * 12
    assert info.total_params == 3 * 8 * 16 + 2 * 16 // 2 * 3
