"""tools.runs: folders of runs that make a table and those that do not, and the arithmetic of a row."""

import json
import os
import statistics

import pytest

from finished_runs import make_run
from tools import report, runs
from tools.paper import rows_for
from tools.trials import TABLES, Budget


def test_one_seed_has_no_spread_and_many_have_students_interval():
    assert runs.deviation([3.0]) is None and runs.interval([3.0]) is None
    values = [1.0, 2.0, 3.0, 4.0]
    assert runs.interval(values) == pytest.approx(3.182 * statistics.stdev(values) / 2)
    assert runs.interval(values * 5) == pytest.approx(2.262 * statistics.stdev(values * 5) / 20**0.5)


def test_seeds_are_not_mixed_up_with_longer_names(made):
    """resnet26-seed1 is neither of resnet26-seed11 nor of resnet26-stem-seed1."""
    relative = rows_for(TABLES["5"], "ResNet26")[2]
    make_run(made, relative, 11, 90.0)
    make_run(made, rows_for(TABLES["7"], "ResNet26")[2], 5, 90.0)
    assert runs.seeds_of(runs.read(made), relative) == [0, 1, 2, 11]


def test_runs_of_other_moving_averages_make_no_table(made):
    path = made / "resnet26-seed0" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ema": 0.5}))
    with pytest.raises(runs.RunsError, match=r"cannot be compared, ema"):
        runs.read(made)
    about = json.loads((made / "ablation.json").read_text())
    (made / "ablation.json").write_text(json.dumps(about | {"tables": [["strong", "ResNet26"]]}))
    assert len(runs.read(made).configs) == 5  # the rows' recipes say it


@pytest.mark.parametrize("change", [{"epochs": 2}, {"test_images": 12}])
def test_runs_of_other_lengths_or_test_sets_make_no_table(made, change):
    make_run(made, rows_for(TABLES["5"], "ResNet26")[2], 9, 90.0, **change)
    with pytest.raises(runs.RunsError, match=r"cannot be compared.*resnet26-seed9"):
        runs.read(made)


def test_a_folder_that_holds_the_ports_table_under_its_old_name_is_read_and_written_as_port(made):
    about = json.loads((made / "ablation.json").read_text())
    (made / "ablation.json").write_text(json.dumps(about | {"tables": [["seed", None]]}))
    assert runs.read(made).tables == [("port", None)]
    runs.remember(made, Budget("DIGITS"), [("port", None)])
    assert json.loads((made / "ablation.json").read_text())["tables"] == [["port", None]]


def test_balanced_accuracy_is_a_column_of_data_sets_with_classes_of_any_size(made):
    """Of DIGITS' runs it is not shown, and a table of trees has it where each run of a row does."""
    assert "test_balanced_pct_mean" not in runs.records(runs.read(made), "5", "ResNet26")[2]
    about = json.loads((made / "ablation.json").read_text())
    (made / "ablation.json").write_text(json.dumps(about | {"dataset": "FOLDER"}))
    assert "balanced" not in report.markdown(runs.read(made), "5", "ResNet26")
    paths = sorted(made.glob("resnet26-seed*/summary.json"))
    for path, score in zip(paths, (80.0, 84.0, 85.0), strict=False):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"test_balanced_pct": score}))
    _, _, row = runs.records(runs.read(made), "5", "ResNet26")
    scores = (80.0, 84.0, 85.0)[: len(paths)]
    assert len(paths) > 1 and row["n"] == len(paths)
    assert row["test_balanced_pct_mean"] == pytest.approx(statistics.fmean(scores))
    assert row["test_balanced_pct_std"] == pytest.approx(statistics.stdev(scores))
    text = report.markdown(runs.read(made), "5", "ResNet26")
    assert "| balanced, % |" in text and f"| {statistics.fmean(scores):.2f} +- {statistics.stdev(scores):.2f} |" in text
    paths[0].write_text(json.dumps(json.loads(paths[0].read_text()) | {"test_balanced_pct": None}))
    assert runs.records(runs.read(made), "5", "ResNet26")[2]["test_balanced_pct_mean"] is None


@pytest.mark.parametrize("score", ["NaN", "null", '"90"', "true", "1e999"])
def test_a_run_without_a_score_is_not_counted(made, score):
    """Its weights went bad: the row has one seed fewer, and the table names the missing run."""
    path = made / "resnet26-seed0" / "summary.json"
    path.write_text(path.read_text().replace('"test_top1_pct": 90.0', f'"test_top1_pct": {score}'))
    _, _, relative = runs.records(runs.read(made), "5", "ResNet26")
    assert (relative["seeds"], relative["test_top1_pct_mean"]) == ("1 2", 94.5)


@pytest.mark.parametrize(
    "change",
    [{"dataset": "EVIL"}, {"dataset": 3}, {"flags": ["--help"]}, {"flags": ["--epochs", "-1"]}, {"flags": None},
     {"tables": [["5", None]]}, {"tables": [["2", "ResNet26"]]}, {"tables": [["5", "ResNet26", 1]]}, {"tables": 5},
     {"tables": [[["5"], "ResNet26"]]}],
    ids=str,
)  # fmt: skip
def test_a_mark_that_was_not_written_by_ablate_is_one_error(made, capsys, change):
    about = json.loads((made / "ablation.json").read_text())
    (made / "ablation.json").write_text(json.dumps(about | change))
    with pytest.raises(runs.RunsError, match=r"ablation\.json: "):
        runs.read(made)
    assert capsys.readouterr() == ("", "")


def test_tables_without_the_mark_are_somebody_elses(made):
    (made / "ablation.json").unlink()
    (made / "tables.md").write_text("mine")
    with pytest.raises(runs.RunsError, match="has not written"):
        runs.remember(made, Budget("DIGITS"), [("5", "ResNet26")])
    assert (made / "tables.md").read_text() == "mine"


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "large"])
def test_files_of_runs_are_small_regular_files(tmp_path, monkeypatch, kind):
    path = tmp_path / "summary.json"
    if kind == "link":
        (tmp_path / "other").write_text("{}")
        path.symlink_to("other")
    elif kind == "pipe":
        os.mkfifo(path)  # opened, it would wait for ever
    elif kind == "folder":
        path.mkdir()
    else:
        monkeypatch.setattr(runs, "LARGEST_FILE", 1)
        path.write_text("{}")
    assert runs.read_json(path) is None
    with pytest.raises(OSError):
        runs.read_bytes(path)


def test_json_that_is_none_of_ours_is_none(tmp_path):
    for text in ("[1]", "{", "[" * 100_000, "\xff"):
        (tmp_path / "file").write_text(text, encoding="latin-1")
        assert runs.read_json(tmp_path / "file") is None
