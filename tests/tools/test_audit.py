"""tools.audit: the counting rule by hand on single layers, the tables, exit codes, JSON, and no traces on the model."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from attention import AttentionStem, LocalAttention2d
from model import BasicBlock, Bottleneck, build
from sasa.analysis.flops import count_flops, count_parameters
from sasa.training.cli import parse_command_line
from tools import audit
from tools.paper import CIFAR, TABLES, Figures, Table

ROOT = Path(audit.__file__).resolve().parents[1]

# Computed apart from this repository (billions): the convention that fits the paper's tables, to two decimals.
EXPECTED_GFLOPS = {
    "1": (4.71, 6.46, 8.22, 4.47, 5.71, 6.95, 4.71, 5.95, 7.19, 4.61, 5.84, 7.08),
    "3": (6.95, 7.24, 7.45, 8.02, 8.22, 7.92, 7.72, 7.14),
    "4": (6.54, 6.70, 6.95, 7.27, 7.68),
    "6": (6.21, 6.95),
    "7": (7.00, 7.29, 7.19, 7.08),
}


def records(table: Table) -> list[dict]:
    return [audit.audit_row(row, "small" if table is CIFAR else "imagenet") for row in audit.audited(table)]


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


# The tables ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", EXPECTED_GFLOPS)
def test_flops_of_the_tables(number):
    got = [r["flops"] / 1e9 for r in records(TABLES[number])]
    assert got == pytest.approx(EXPECTED_GFLOPS[number], abs=0.0105)


def test_parameters_to_the_unit():
    assert [r["parameters"] for r in records(TABLES["1"])[:6]] == [
        13_696_552, 19_626_792, 25_557_032, 10_342_632, 14_190_632, 18_038_632,
    ]  # fmt: skip
    only_r, full = (r["parameters"] for r in records(TABLES["6"]))
    key_projections = 3 * 64**2 + 4 * 128**2 + 6 * 256**2 + 3 * 512**2
    assert full - only_r == key_projections == 1_257_472
    port = [8_306_442, 12_154_442, 16_002_442, 8_740_682, 15_011_402, 11_660_362, 17_590_602, 23_520_842]
    assert [r["parameters"] for r in records(CIFAR)] == port


def test_differences_are_ours_minus_the_paper_s():
    record = records(TABLES["6"])[0]
    assert record["difference_gflops"] == pytest.approx(6.21 - 6.1, abs=0.005)
    assert record["difference_parameters"] == 16_781_160 - 16_700_000
    conv = records(TABLES["1"])[2]
    assert conv["difference_parameters"] == 25_557_032 - 25_600_000


def test_frozen_parameters_count_and_buffers_do_not():
    layers = nn.Sequential(nn.Linear(3, 4).requires_grad_(False), nn.BatchNorm1d(4))
    assert count_parameters(layers) == 3 * 4 + 4 + 2 * 4


def test_the_paper_s_figures_are_the_paper_s():
    """The figures held against, once more, so that a slip in the table does not pass for agreement."""
    figures = {n: [row.printed[1:3] for row in TABLES[n].rows] for n in TABLES}
    assert figures["1"][:6] == [(4.7, 13.7), (6.5, 19.6), (8.2, 25.6), (4.5, 10.3), (5.7, 14.1), (7.0, 18.0)]
    assert figures["1"][6:] == [(4.7, 10.3), (6.0, 14.1), (7.2, 18.0)]
    assert [f for f, _ in figures["3"]] == [7.0, 7.3, 7.5, 8.0, 8.2, 7.9, 7.8, 7.2]
    assert [p for _, p in figures["3"]] == [18.0, 18.1, 18.5, 20.8, 25.6, 25.5, 25.0, 22.7]
    assert figures["4"] == [(6.6, 18.0), (6.7, 18.0), (7.0, 18.0), (7.3, 18.0), (7.7, 18.0)]
    assert figures["5"] == [(6.9, 18.0), (6.9, 18.0), (7.0, 18.0)]
    assert figures["6"] == [(6.1, 16.7), (7.0, 18.0)]
    assert figures["7"] == [(7.1, None), (7.4, None), (7.2, None)]


def test_each_convolution_group_is_named_as_it_is_built():
    for row in TABLES["3"].rows:
        named = {int(n) for n in re.findall(r"\d", row.label)}
        stages = parse_command_line(row.flags.split()).given.get("attention_stages", (1, 2, 3, 4))
        assert named == {1, 2, 3, 4} - set(stages), row.label


@pytest.mark.parametrize(
    ("ours", "printed", "agrees"),
    [
        (14_249_999, {"mparams": 14.1}, True), (14_250_000, {"mparams": 14.1}, True),
        (14_250_001, {"mparams": 14.1}, False), (14_000_000, {"mparams": 14.1}, True),
        (13_999_999, {"mparams": 14.1}, False), (8_306_442, {"parameters": 8_306_442}, True),
        (8_306_443, {"parameters": 8_306_442}, False), (1, {}, True),
    ],
)  # fmt: skip
def test_parameter_tolerance(ours, printed, agrees):
    assert audit.parameters_agree(ours, Figures(**printed)) is agrees


# The command ---------------------------------------------------------------------------------------------------------


def forced(table: Table, index: int, **figures) -> Table:
    rows = list(table.rows)
    rows[index] = rows[index]._replace(printed=rows[index].printed._replace(**figures))
    return table._replace(rows=tuple(rows))


def test_agreement_exits_0(capsys):
    assert audit.main([]) == 0
    assert "34 of 34 rows agree" in capsys.readouterr().out
    assert audit.main(["--cifar"]) == 0
    assert "8 of 8 rows agree" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("figures", "code"),
    [
        ({"gflops": 6.3}, 0), ({"gflops": 6.4}, 1), ({"gflops": 6.0}, 1),  # ours: 6.210
        ({"mparams": 16.8}, 0), ({"mparams": 16.9}, 1), ({"mparams": 16.6}, 1),  # ours: 16.781
    ],
)  # fmt: skip
@pytest.mark.parametrize("json_flag", [[], ["--json"]])
def test_a_figure_that_is_off_exits_1(monkeypatch, capsys, figures, code, json_flag):
    monkeypatch.setitem(audit.TABLES, "6", forced(TABLES["6"], 0, **figures))
    assert audit.main(["--table", "6", *json_flag]) == code
    printed = capsys.readouterr().out
    if json_flag:
        assert json.loads(printed)["ok"] is (code == 0)
    else:
        assert f"{2 - code} of 2 rows agree" in printed
        assert printed.count("OFF") == code


def test_one_parameter_of_the_port_off_exits_1(monkeypatch):
    monkeypatch.setattr(audit, "CIFAR", forced(CIFAR, 0, parameters=8_306_443))
    assert audit.main(["--cifar"]) == 1


def test_json_holds_what_is_printed(capsys):
    for which in ([], ["--cifar"]):
        audit.main(which)
        lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith((" ok", " OFF"))]
        audit.main([*which, "--json"])
        document = json.loads(capsys.readouterr().out)
        rows = [r for table in document["tables"] for r in table["rows"]]
        assert len(rows) == len(lines)
        for r, line in zip(rows, lines, strict=True):
            assert line.startswith(r["model"]) and r["row"] in line
            figures = [r["flops"] / 1e9, r["paper_gflops"], r["difference_gflops"]]
            figures += [r["parameters"], r["paper_parameters"], r["difference_parameters"]]
            cells = line[38:].removesuffix("ok").split()
            for figure, cell in zip(figures, cells, strict=True):
                if figure is None:
                    assert cell == "-"
                else:
                    assert float(cell.replace(",", "")) == pytest.approx(figure, abs=0.00051)
            assert sum(r["flops_by_kind"].values()) == r["flops"]
        assert document["rule"] == [*audit.RULE, *audit.AGREEMENT]


@pytest.mark.parametrize("arguments", [["--table", "2"], ["--table", "x"], ["--table", "1", "--cifar"], ["--tab", "1"]])
def test_wrong_usage_is_one_line_and_exit_2(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        audit.main(arguments)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == "" and captured.err.count("\n") == 1
    if arguments[1] == "2":
        assert "choose from '1', '3', '4', '5', '6', '7'" in captured.err


def test_as_a_command():
    command = [sys.executable, "-m", "tools.audit", "--table", "7", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == ""
    assert [r["parameters"] for r in json.loads(done.stdout)["tables"][0]["rows"]][-1] == 18_030_568


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
