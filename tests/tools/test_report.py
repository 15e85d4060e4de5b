"""tools.report: the arithmetic of a table, and that results/ is what its runs say."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from finished_runs import make_run
from tools import ablate, report, runs
from tools.paper import rows_for
from tools.trials import TABLES, Budget, Trial, run_name, table_name

ROOT = Path(__file__).resolve().parents[2]
RESULTS = sorted(path.parent for path in (ROOT / "results").glob("*/ablation.json"))


def test_a_table_in_markdown_and_csv_by_hand(made):
    report.write_beside(made)
    text = (made / "tables.md").read_text()
    # by hand: mean 93, variance ((-3)^2 + (-1)^2 + 4^2) / 2 = 13; 81.5 and sqrt(4.5); differences -10 and -9:
    # their deviation sqrt(0.5), the interval 12.706 * sqrt(0.5) / sqrt(2) = 6.353
    assert "| relative | 1,234,567 | 2.5 | 93.00 +- 3.61 | 3 | base | 11 | 80.2 | 7.0 | 18.0 |" in text
    assert "| none | 1,234,567 | 2.5 | 81.50 +- 2.12 | 2 | **-9.50 +- 6.35** | 10 | 77.6 | 6.9 | 18.0 |" in text
    assert "| absolute | - | - | - | 0 | - | - | 78.2 | 6.9 | 18.0 |" in text
    assert "Missing runs: `python -m tools.ablate --table 5 --dataset DIGITS --seeds 3 --model-name ResNet26`" in text
    assert (
        "5 runs of DIGITS, 1 epochs each, on cpu with torch 2. Top-1 on the 400 test images (one is 0.25 points)"
        in text
    )
    with open(made / "table-5-resnet26.csv", newline="") as file:
        none, absolute, relative = csv.DictReader(file)
    assert (none["seeds"], none["difference_n"], absolute["n"], relative["difference_n"]) == ("0 1", "2", "0", "0")
    assert (none["base"], relative["base"]) == ("resnet26", "")
    assert float(none["difference_points"]) == -9.5 and float(relative["test_top1_pct_std"]) == pytest.approx(13**0.5)
    assert relative["runs"] == "resnet26-seed0 resnet26-seed1 resnet26-seed2"


@pytest.mark.parametrize(
    ("selected", "said"),
    [
        ("the last epoch (no images held out to select by)", "of the last epoch; mean"),
        ("best top-1 (81.40%) on 500 held-out training images, epoch 4",
         "of the epoch that was best on 500 held-out training images; mean"),
    ],
)  # fmt: skip
def test_the_caption_says_which_weights_were_scored(tmp_path, selected, said):
    make_run(tmp_path, rows_for(TABLES["5"], "ResNet26")[2], 0, 90.0, selected=selected)
    runs.remember(tmp_path, Budget("DIGITS"), [("5", "ResNet26")])
    assert said in report.caption(runs.read(tmp_path))


def test_weights_of_classes_are_a_digest_in_headings_and_whole_in_the_command(tmp_path):
    """A class may have any name."""
    make_run(tmp_path, rows_for(TABLES["5"], "ResNet26")[2], 0, 90.0)
    runs.remember(tmp_path, Budget("DIGITS", ("--class-weights", '{"<b>": 2, "a": 1}')), [("5", "ResNet26")])
    folder = runs.read(tmp_path)
    heading = report.page([folder], tmp_path, tmp_path / "results.md").partition("**Table 5")[0]
    assert "## DIGITS --class-weights " in heading and "`--class-weights " in heading and "<b>" not in heading
    assert report.command(folder.budget, "5", "ResNet26", 1).endswith("""-- --class-weights '{"<b>": 2.0, "a": 1.0}'""")


@pytest.mark.parametrize(("scores", "cell"), [((80.0, 82.0), "**-10.00 +- 0.00**"), ((80.0, 93.0), "-4.50 +- 69.88")])
def test_an_interval_that_leaves_out_0_is_bold_also_of_width_0(made, scores, cell):
    for seed, top1 in enumerate(scores):
        shutil.rmtree(made / f"resnet26-position-none-seed{seed}")
        make_run(made, rows_for(TABLES["5"], "ResNet26")[0], seed, top1)
    assert f"| {cell} |" in report.markdown(runs.read(made), "5", "ResNet26")


def test_a_row_without_a_run_of_its_base_has_no_difference(made):
    for seed in range(3):
        shutil.rmtree(made / f"resnet26-seed{seed}")
    text = report.markdown(runs.read(made), "5", "ResNet26")
    assert "| none | 1,234,567 | 2.5 | 81.50 +- 2.12 | 2 | - | 10 |" in text and "| base |" not in text


def test_adding_takes_small_files_without_paths_and_check_finds_what_is_not_up_to_date(made, tmp_path, capsys):
    results, page = tmp_path / "results", tmp_path / "results.md"
    where = ["--results", str(results), "--page", str(page)]
    (made / "resnet26-seed0" / "last.pt").write_bytes(b"large")
    (made / "resnet26-seed8").mkdir()  # begun, not done
    assert report.main([*where, "--add", str(made)]) == 0
    target = results / "digits"
    assert {path.name for path in (target / "resnet26-seed0").iterdir()} == {"config.json", "log.jsonl", "summary.json"}
    assert not (target / "resnet26-seed8").exists()
    assert not any("secret" in path.read_text() for path in target.glob("*/*"))
    text = page.read_text()
    assert text.startswith("# Results\n") and report.MARK in text and "93.00 +- 3.61" in text
    assert "(results/digits/)" in text  # links go from the page's folder
    assert report.main([*where, "--check"]) == 0

    def found() -> str:
        capsys.readouterr()
        assert report.main([*where, "--check"]) == 1
        return capsys.readouterr().out

    page.write_text(text.replace("93.00", "99.00"))
    assert "results.md: not up to date" in found()
    page.write_text(text)
    summary = target / "resnet26-seed0" / "summary.json"
    summary.write_text(summary.read_text().replace("90.0", "91.0"))
    assert "table-5-resnet26.csv" in found()
    assert report.main(where) == 0 and report.main([*where, "--check"]) == 0
    (target / "table-4-resnet26.csv").write_text("")
    assert "table-4-resnet26.csv: no table" in found()
    (target / "table-4-resnet26.csv").unlink()
    (target / "notes.md").write_text("A finding.\n")
    (results / "notes.md").write_text("An introduction.\n")
    assert "results.md" in found()
    assert report.main(where) == 0
    assert page.read_text().index("An introduction.") < page.read_text().index("A finding.")


def test_adding_again_keeps_the_tables_that_were_there(made, tmp_path):
    results = tmp_path / "results"
    report.add(made, results)
    (made / "ablation.json").unlink()
    runs.remember(made, Budget("DIGITS"), [("4", "ResNet26")])
    report.add(made, results)
    assert runs.read(results / "digits").tables == [("5", "ResNet26"), ("4", "ResNet26")]


def test_what_a_link_points_at_is_not_copied(made, tmp_path, capsys):
    (tmp_path / "secret").write_text("root:secret")
    path = made / "resnet26-seed0" / "log.jsonl"
    path.unlink()
    path.symlink_to(tmp_path / "secret")
    where = ["--results", str(tmp_path / "results"), "--page", str(tmp_path / "page.md")]
    assert report.main([*where, "--add", str(made)]) == 2
    error = capsys.readouterr().err
    assert "log.jsonl" in error and error.count("\n") == 1 and not (tmp_path / "results").exists()


def test_a_log_that_is_none_and_a_target_of_somebody_else_are_refused(made, tmp_path, capsys):
    where = ["--results", str(tmp_path / "results"), "--page", str(tmp_path / "page.md")]
    target = tmp_path / "results" / "digits"
    target.mkdir(parents=True)
    (target / "table.txt").write_text("mine")
    assert report.main([*where, "--add", str(made)]) == 2 and "has not written" in capsys.readouterr().err
    assert [path.name for path in target.iterdir()] == ["table.txt"]
    (target / "table.txt").unlink()
    (made / "resnet26-seed0" / "log.jsonl").write_text("{}\nroot:secret\n")
    assert report.main([*where, "--add", str(made)]) == 2 and "not a log" in capsys.readouterr().err
    assert not any(target.iterdir())


def test_links_in_results_are_replaced_and_not_written_through(made, tmp_path):
    (tmp_path / "precious").write_text("mine")
    report.add(made, tmp_path / "results")
    for name in ("tables.md", "resnet26-seed0/summary.json"):
        path = tmp_path / "results" / "digits" / name
        path.unlink(missing_ok=True)
        path.symlink_to(tmp_path / "precious")
    report.add(made, tmp_path / "results")
    report.write_beside(tmp_path / "results" / "digits")
    assert (tmp_path / "precious").read_text() == "mine"


def test_the_text_of_a_summary_is_no_markup(tmp_path):
    evil = "cpu</td><script>alert(1)</script> | [x](http://a) **b** `c`\n\n# head \x1b[31m"
    make_run(tmp_path, rows_for(TABLES["5"], "ResNet26")[2], 0, 90.0, device=evil, selected=evil)
    runs.remember(tmp_path, Budget("DIGITS"), [("5", "ResNet26")])
    first, *_ = report.texts(runs.read(tmp_path))["tables.md"].split("\n")
    assert first.count("cpu\\</td\\>\\<script\\>") == 2 and first.count("\\[x\\]") == 2
    assert first.count("\\*\\*b\\*\\* \\`c\\`\\\\x0a\\\\x0a# head \\\\x1b\\[31m") == 2


def test_names_of_any_bytes_and_an_ascii_terminal_lose_no_line(made, tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9 (1)\nx")
    made.rename(folder)
    where = ["--results", str(tmp_path / "r\u00e9sultats"), "--page", str(tmp_path / "page.md")]
    command = [sys.executable, "-m", "tools.report", *where, "--add", str(folder)]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    lines = done.stdout.decode("ascii").splitlines()
    assert len(lines) == 3 and all("r\\xe9sultats/caf\\xe9 (1)\\x0ax/" in line for line in lines[:2])
    page = (tmp_path / "page.md").read_text()
    assert "[results/caf\\\\xe9 (1)\\\\x0ax/](r%C3%A9sultats/caf%E9%20%281%29%0Ax/)" in page


@pytest.mark.parametrize("what", ["folder", "page"])
def test_what_is_no_folder_of_runs_or_no_page_of_ours_is_one_line(made, tmp_path, capsys, what):
    page = tmp_path / "page.md"
    if what == "page":
        page.write_text("mine")
    source = tmp_path if what == "folder" else made
    assert report.main(["--results", str(tmp_path / "results"), "--page", str(page), "--add", str(source)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tools.report: error: ") and error.count("\n") == 1
    assert not page.exists() or page.read_text() == "mine"
    assert not (tmp_path / "results").exists()


# ---- the results of this repository ---------------------------------------------------------------------------------


def test_results_are_up_to_date(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("folder", RESULTS, ids=lambda path: path.name)
def test_each_run_is_of_the_configuration_that_its_name_says(folder):
    about = json.loads((folder / "ablation.json").read_text())
    budget = Budget(about["dataset"], tuple(about["flags"]))
    assert folder.name == budget.name()
    named = {}
    for name, model in about["tables"]:
        rows = rows_for(TABLES[table_name(name)], model)
        named |= {run_name(row, seed): Trial(row, seed) for row in rows for seed in range(20)}
    for path in (path for path in folder.iterdir() if path.is_dir()):
        config, summary = (json.loads((path / name).read_text()) for name in ("config.json", "summary.json"))
        assert ablate.differing(config, named[path.name].config(budget)) == [], path
        log = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
        assert [row["epoch"] for row in log] == list(range(1, summary["epochs"] + 1))
        assert summary["epochs"] == config["epochs"] and log[-1]["step"] == summary["steps"]
        if config["holdout"]:
            best = max(row["val_top1_pct"] for row in log)
            assert f"best top-1 ({best:.2f}%) on {config['holdout']:.0f} held-out" in summary["selected"]
        else:
            assert summary["test_top1_pct"] == pytest.approx(log[-1]["val_top1_pct"])
        assert not set(report.PATHS) & config.keys()
