"""plot.py: what its pictures show of a folder of runs, and what it refuses."""

import json
import os
import shutil

import pytest
from PIL import Image

from tools import plot, report, runs
from tools.paper import rows_for
from tools.trials import TABLES, Budget, run_name


def test_the_pictures_are_drawn(made):
    assert plot.main([str(made)]) == 0
    for name in report.PICTURES:
        with Image.open(made / name) as picture:
            assert picture.width > 1000 and len(picture.convert("RGB").getcolors(1 << 20)) > 20
    runs.remember(made, Budget("DIGITS"), [(table, "ResNet26") for table in ("3", "recipe")])
    assert plot.main([str(made)]) == 0


def test_a_folder_of_the_recipe_alone_has_curves_and_says_so(made, capsys):
    (made / "ablation.json").unlink()
    runs.remember(made, Budget("DIGITS", ("--holdout", "9")), [("recipe", "ResNet26")])
    (made / "accuracy.png").touch()
    assert plot.main([str(made)]) == 0
    assert capsys.readouterr().out == f"wrote {made / 'curves.png'}\n" and not (made / "accuracy.png").exists()


def test_the_learning_curve_is_the_logs(made):
    folder = runs.read(made)
    assert plot.errors(folder, rows_for(TABLES["5"], "ResNet26")[2]) == [(1, [10.0, 8.0, 3.0])]


def test_lines_and_legend_are_the_rows(made):
    """A line a row at its mean error by epoch; the legend names it with the last mean, the worst first."""
    relative = rows_for(TABLES["5"], "ResNet26")[2]
    for seed, top1 in enumerate((94.0, 95.0, 99.0)):
        with open(made / f"{run_name(relative, seed)}/log.jsonl", "a") as file:
            file.write(json.dumps({"epoch": 2, "val_top1_pct": top1}) + "\n")
    (ax,) = plot.curves_figure(runs.read(made)).axes
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in ax.lines}
    assert lines == {"none, 18.5": ([1], [18.5]), "relative, 4.0": ([1, 2], [7.0, 4.0])}
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["none, 18.5", "relative, 4.0"]
    assert ax.get_yscale() == "log" and ax.get_xlabel() == "epoch"


def test_the_points_are_the_rows_means_against_their_cost(made):
    figure = plot.accuracy_figure(runs.read(made))
    for ax, cost in zip(figure.axes, (2.5, 1.234567), strict=True):
        points = {bar.get_label(): bar.lines[0].get_xydata().tolist() for bar in ax.containers}
        assert points == {"relative": [[cost, 93.0]], "none": [[cost, 81.5]]}
    assert [text.get_text() for text in figure.axes[1].get_legend().get_texts()] == ["relative", "none"]


def test_no_two_rows_of_a_picture_look_alike():
    rows_of_all = [row for name, table in TABLES.items() if name != "recipe" for row in rows_for(table, "ResNet26")]
    found = {(row.model, row.flags): row for row in rows_of_all}
    scores = {"flops_per_image": 1e6, "parameters": 1e6, "test_top1_pct_mean": 1.0, "test_top1_pct_std": 0.0}
    ax = plot.figures.new_figure(500, 500).subplots()
    plot.draw_points(ax, [(row, scores) for row in found.values()], "parameters")
    shown = [(bar.lines[0].get_color(), bar.lines[0].get_marker()) for bar in ax.containers]
    assert len(shown) == len(found) == len(set(shown)) > 15


def test_a_folder_without_a_done_run_has_no_picture(made, capsys):
    for path in made.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    assert plot.main([str(made)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tools.plot: error: ") and "no run in it is done" in error and error.count("\n") == 1


def test_a_link_in_the_pictures_place_is_not_written_through(made, tmp_path):
    other = tmp_path / "other.png"
    other.write_text("kept")
    (made / "curves.png").symlink_to(other)
    assert plot.main([str(made)]) == 0
    assert other.read_text() == "kept" and not (made / "curves.png").is_symlink()


@pytest.mark.parametrize("flags", [[], ["--wrong", "x"]])
def test_wrong_usage_ends_with_one_line(flags, capsys):
    with pytest.raises(SystemExit) as end:
        plot.main(flags)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("tools.plot: error: ") and error.count("\n") == 1


@pytest.mark.parametrize("content", ["{", "[1]", "{}", None])
def test_a_damaged_log_or_a_pipe_is_one_line(made, capsys, content):
    for path in made.glob("*/log.jsonl"):
        path.unlink()
        os.mkfifo(path) if content is None else path.write_text(content)  # opened, a pipe would wait for ever
    assert plot.main([str(made)]) == 2
    error = capsys.readouterr().err
    assert str(made) in error and error.count("\n") == 1
