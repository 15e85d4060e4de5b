"""tools.paper: its figures once more, so that a slip in the transcription does not pass for agreement."""

import re

import pytest

from sasa.training.cli import parse_command_line
from tools.paper import PORT, TABLES

# PAPER: top-1 of tables 1 (by row, then depth) and 3 to 7 of arXiv 1906.05909, and of the port's README.
TOP1 = {
    "1": (74.5, 76.2, 76.9, 75.8, 77.1, 77.4, 74.8, 76.9, 77.6),
    "3": (80.2, 80.7, 80.7, 80.2, 79.5, 79.7, 79.6, 79.9),
    "4": (76.4, 77.2, 77.4, 77.7, 77.6),
    "5": (77.6, 78.2, 80.2),
    "6": (76.9, 77.4),
    "7": (76.2, 77.2, 77.6),
    "port": (90.94, 94.29, 90.22, 89.46, 94.93, None),
}


@pytest.mark.parametrize("table", TOP1)
def test_the_rows_carry_the_printed_top1(table):
    assert tuple(row.printed.top1_pct for row in (TABLES | {"port": PORT})[table].rows) == TOP1[table]


def test_the_rows_carry_the_printed_costs():
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
