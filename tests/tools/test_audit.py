"""tools.audit: the networks that the tables name, counted; agreement, exit codes, JSON."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_table_2_counts_the_detectors():
    """Parameters to the unit; FLOPs as computed apart from this repository where they were, to a decimal."""
    table, text = ([(r["parameters"], r["flops"] / 1e9) for r in d["rows"]] for d in audit.detection_documents())
    assert [p for p, _ in table] == [33_397_364, 25_878_964, 25_870_900, 21_987_252, 21_979_188]
    assert [p for p, _ in text] == [20_028_852, 20_020_788]
    assert [f for _, f in table] == pytest.approx([182.695, 172.315, 173.396, 111.187, 112.268], abs=0.001)
    assert text[0][1] == pytest.approx(105.204, abs=0.001)
    assert [row.printed[1:] for row in audit.DETECTION.rows] == [
        (182, 33.4, None, 36.5), (173, 25.9, None, 36.8), (173, 25.9, None, 36.2),
        (111, 22.0, None, 36.6), (110, 22.0, None, 36.6),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("figures", "code"),
    [({"gflops": 109.3}, 0), ({"gflops": 109.2}, 1), ({"mparams": 21.85}, 0), ({"mparams": 21.8}, 1)],  # ours: 112.268
)
def test_table_2_exits_1_where_a_row_is_off_and_the_text_s_reading_does_not_count(monkeypatch, capsys, figures, code):
    monkeypatch.setattr(audit, "DETECTION", forced(audit.DETECTION, 4, **figures))
    assert audit.main(["--table", "2"]) == code
    printed = capsys.readouterr().out
    assert f"{5 - code} of 5 rows agree" in printed and printed.count("OFF") == code
    assert "by the appendix's text" in printed


# The command ---------------------------------------------------------------------------------------------------------


def forced(table: Table, index: int, **figures) -> Table:
    rows = list(table.rows)
    rows[index] = rows[index]._replace(printed=rows[index].printed._replace(**figures))
    return table._replace(rows=tuple(rows))


def test_agreement_exits_0(capsys):
    assert audit.main([]) == 0
    assert "39 of 39 rows agree" in capsys.readouterr().out
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
    for which in ([], ["--cifar"], ["--table", "6"]):
        audit.main(which)
        lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith((" ok", " OFF", "  -"))]
        audit.main([*which, "--json"])
        document = json.loads(capsys.readouterr().out)
        rows = [r for table in document["tables"] for r in table["rows"]]
        assert len(rows) == len(lines)
        for r, line in zip(rows, lines, strict=True):
            assert line.startswith(r["model"]) and r["row"] in line
            figures = [r["flops"] / 1e9, r["paper_gflops"], r["difference_gflops"]]
            figures += [r["parameters"], r["paper_parameters"], r["difference_parameters"]]
            cells = line[38:].rsplit(maxsplit=1)[0].split()
            for figure, cell in zip(figures, cells, strict=True):
                if figure is None:
                    assert cell == "-"
                else:
                    assert float(cell.replace(",", "")) == pytest.approx(figure, abs=0.00051)
            assert sum(r["flops_by_kind"].values()) == r["flops"]
        agreement = [*audit.AGREEMENT, *([] if which else audit.AGREEMENT_DETECTION)]
        assert document["rule"] == [*audit.RULE, *agreement]


@pytest.mark.parametrize("arguments", [["--table", "9"], ["--table", "x"], ["--table", "1", "--cifar"], ["--tab", "1"]])
def test_wrong_usage_is_one_line_and_exit_2(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        audit.main(arguments)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == "" and captured.err.count("\n") == 1
    if arguments[1] == "9":
        assert "choose from '1', '2', '3', '4', '5', '6', '7'" in captured.err


def test_as_a_command():
    command = [sys.executable, "-m", "tools.audit", "--table", "7", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == ""
    assert [r["parameters"] for r in json.loads(done.stdout)["tables"][0]["rows"]][-1] == 18_030_568
