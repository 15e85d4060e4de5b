"""Every measured figure of README and docs comes from a file in results/; what is counted, from the modules themselves.

results/benchmark/ holds what tools.benchmark and sasa.kernels.tune printed, results/measured.json single figures: the
words around them, the command, what it printed and how the figure follows from that; and as settings the figures with
a unit that nobody measured: what a program does, or arithmetic.
"""

import csv
import json
import re
import shlex
import statistics
from pathlib import Path

import pytest

from sasa.data.specs import SPECS
from tools import ablate, audit, report
from tools.paper import TABLES
from tools.runs import read_rows

ROOT = Path(__file__).resolve().parents[1]
RESULTS_PAGE = (ROOT / "docs" / "results.md").read_text()
README = (ROOT / "README.md").read_text()
PAGES = [page for page in sorted((ROOT / "docs").rglob("*.md")) if page.name != "results.md"]
RESULTS = sorted(path.parent for path in (ROOT / "results").glob("*/ablation.json"))
FIGURES = json.loads((ROOT / "results" / "measured.json").read_text())
MEASURED, SETTINGS = FIGURES["measured"], FIGURES["settings"]
OURS = "\n".join([README, *(page.read_text() for page in [*PAGES, ROOT / "results" / report.NOTES])])  # by hand
BY = {"min": min, "max": max, "median": statistics.median}
WITH_UNIT = re.compile(
    r"(?<![\w.])(\d[\d.]*) ?(?:%|x |s\b|ms\b|seconds|min\b|minutes|hours|[KMG]i?B|points|times\b|images/s)"
)


def load(name: str) -> dict:
    text = (ROOT / "results" / "benchmark" / name).read_text()
    return json.loads(text.replace("ratio_to_twin", "ratio_to_baseline"))  # the key's old name


def table(first_cells: str, text: str = OURS) -> list[list[str]]:
    """The rows of the table whose head begins so, without head."""
    lines = text[text.index(f"| {first_cells} ") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]


# ---- the page that tools.report writes ------------------------------------------------------------------------------


def shown(values: list[float], form: str) -> str:
    text = format(statistics.fmean(values), form)
    return text + (f" +- {statistics.stdev(values):.2f}" if form == ".2f" and len(values) > 1 else "")


def test_every_figure_of_the_results_is_in_a_file_of_results():
    """Each cell of each table from the summaries, by arithmetic of its own."""
    blocks = re.split(r"^## ", RESULTS_PAGE, flags=re.M)[1:]
    assert len(blocks) == len(RESULTS) > 0
    for folder, block in zip(RESULTS, blocks, strict=True):
        cells = [[c.strip() for c in line.strip("|").split("|")] for line in block.splitlines() if line[:2] == "| "]
        balanced = [row.pop(4) for row in cells] if "| balanced, % |" in block else []
        measured = [row for row in cells if row[0] and row[4] not in ("0", "n")]
        traced = []
        for path in sorted(folder.glob("table-*.csv")):
            with open(path, newline="") as file:
                traced += [row for row in csv.DictReader(file) if row["runs"]]
        assert len(measured) == len(traced) > 0
        scores = [[summary(folder, name).get("test_balanced_pct") for name in row["runs"].split()] for row in traced]
        is_of_trees = SPECS[json.loads((folder / "ablation.json").read_text())["dataset"]].side is None
        assert bool(balanced) == is_of_trees
        if is_of_trees:
            known = [cell for cell in balanced if cell not in ("-", "balanced, %")]
            assert sorted(known) == sorted(shown(of, ".2f") for of in scores)
        wanted = []
        for row in traced:
            of = [summary(folder, name) for name in row["runs"].split()]
            paper = [row[f"paper_{key}"] for key in ("top1_pct", "gflops", "mparams")]
            paper = [] if row["table"] in ("recipe", "strong") else paper
            wanted.append((
                row["row"], f"{of[0]['parameters']:,}", shown([s["flops_per_image"] / 1e6 for s in of], ".1f"),
                shown([s["test_top1_pct"] for s in of], ".2f"), str(len(of)), difference(folder, row),
                shown([s["seconds"] for s in of], ".0f"),
                *(float(value) if value else None for value in paper),
            ))  # fmt: skip
        found = [
            (re.sub(r", (Naive)?ResNet\d\d$", "", row[0]), *row[1:7],
             *(None if cell == "-" else float(cell) for cell in row[7:])) for row in measured
        ]  # fmt: skip
        assert sorted(found, key=str) == sorted(wanted, key=str)


def summary(folder: Path, name: str) -> dict:
    return json.loads((folder / name / "summary.json").read_text())


def difference(folder: Path, row: dict) -> str:
    """To the base, paired by seed, where it was run; Student's 0.975 for 2, 3 and 8 seeds by hand."""
    if not row["base"]:
        return "base"
    pairs = [(name, f"{row['base']}-seed{name[-1]}") for name in row["runs"].split()]
    pairs = [(name, base) for name, base in pairs if (folder / base).exists()]
    if not pairs:
        return "-"
    gaps = [summary(folder, name)["test_top1_pct"] - summary(folder, base)["test_top1_pct"] for name, base in pairs]
    if len(gaps) == 1:
        return f"{gaps[0]:+.2f}"
    half = {2: 12.706, 3: 4.303, 8: 2.365}[len(gaps)] * statistics.stdev(gaps) / len(gaps) ** 0.5
    text = f"{statistics.fmean(gaps):+.2f} +- {half:.2f}"
    return f"**{text}**" if abs(statistics.fmean(gaps)) > half else text


def test_what_is_missing_is_a_command_that_is_taken(tmp_path, capsys):
    lines = re.findall(r"^Missing runs: `python -m tools.ablate (.*)`$", RESULTS_PAGE, flags=re.M)
    assert lines
    for line in lines:
        assert ablate.main(["--dry-run", "--output-dir", str(tmp_path), *shlex.split(line)]) == 0
        assert "train.py --dataset" in capsys.readouterr().out


def test_notes_repeat_the_tables_beside_them():
    for notes in (ROOT / "results").glob(f"*/{report.NOTES}"):
        tables = (notes.parent / report.TABLES_FILE).read_text()
        figures = re.findall(r"(?<![\d.])\d+\.\d+(?![.\d])|\d+(?=%)", notes.read_text())
        assert figures and [f for f in figures if f not in tables] == []


# ---- tables by hand -------------------------------------------------------------------------------------------------


def test_the_papers_figures_are_counted_on_the_modules():
    rows = {(row.model, row.label): row for row in audit.audited(TABLES["1"])}
    labels = ("convolution", "conv stem + attention", "full attention, m = 8")
    found = table("ImageNet, 224x224 | ResNet26")
    assert [cells[0].partition(",")[0] for cells in found] == ["convolution", labels[1], "attention stem too"]
    for label, cells in zip(labels, found, strict=True):
        for name, cell in zip(("ResNet26", "ResNet38", "ResNet50"), cells[1:], strict=True):
            row = rows[name, label]
            counted = audit.audit_row(row)
            ours = f"{counted['flops'] / 1e9:.2f} / {counted['parameters'] / 1e6:.2f}"
            assert cell == f"{ours} ({row.printed.gflops} / {row.printed.mparams})"


def test_the_search_for_the_recipe_is_in_its_logs():
    folder = ROOT / "results/digits-search"
    runs = {path.name: json.loads((path / "summary.json").read_text()) for path in folder.iterdir()}
    names = {
        "batch32-lr0.001-zero": "zero-init, rate 1e-3 (default)", "batch32-lr0.002-zero": "zero-init, rate 2e-3",
        "batch32-lr0.003-zero": "zero-init, rate 3e-3", "batch32-lr0.002-nozero": "no zero-init, rate 2e-3",
        "batch64-lr0.002-nozero": "no zero-init, rate 2e-3, batch 64",
        "batch64-lr0.001-nozero": "no zero-init, rate 1e-3, batch 64",
    }  # fmt: skip
    wanted = [[f"{runs[f'{name}-seed{seed}']['test_top1_pct']:.2f}" if f"{name}-seed{seed}" in runs else ""
               for seed in range(3)] for name in names]  # fmt: skip
    found = table("attention stem, batch 32 | seed 0")
    assert [cells[1:] for cells in found] == wanted and [cells[0] for cells in found] == list(names.values())
    first, other = ([runs[f"batch32-lr0.002-{kind}-seed{seed}"]["test_top1_pct"] for kind in ("zero", "nozero")]
                    for seed in (0, 2))  # fmt: skip
    assert f"made {first[0] - first[1]:.2f} and {other[0] - other[1]:.2f} points at rate 2e-3" in " ".join(OURS.split())
    assert sum(cell != "" for cells in wanted for cell in cells) == len(runs)  # none left out


def test_what_the_photographs_take_is_in_its_logs():
    folder, wanted = ROOT / "results/elpv-search", []
    names = {
        "crop0.08": "none (`--crop-area 0.08`)", "crop0.35": "`--crop-area 0.35`",
        "crop0.8": "`--crop-area 0.8 --crop-aspect 1.1`",
        "crop0.8-batch32-lr0.001": "these and `--batch-size 32 --lr 1e-3 --warmup-epochs 2`",
    }  # fmt: skip
    for name, label in names.items():
        log = read_rows(folder / f"{name}-seed10" / "log.jsonl")
        assert len(log) == 12
        wanted.append([label, *(f"{log[-1][key]:.2f}" for key in ("train_top1_pct", "val_top1_pct"))])
    assert table("flags | on training pictures, %") == wanted
    assert len(list(folder.iterdir())) == len(names)  # none left out


def test_the_stems_trials_are_in_their_logs():
    """Top-1 on the held-out images after the last epoch, by seed, with mean and deviation."""
    folder = ROOT / "results/digits-stem"
    names = {
        "convolution": "convolution stem", "random-4": "at random, m = 4 (before)", "random-16": "at random, m = 16",
        "grid-8": "on a grid, m = 8", "grid-16": "on a grid, m = 16 (default)",
    }  # fmt: skip
    wanted = []
    for name, label in names.items():
        logs = [read_rows(folder / f"{name}-seed{seed}" / "log.jsonl") for seed in (10, 11, 12)]
        assert [len(log) for log in logs] == [24] * 3
        scores = [log[-1]["val_top1_pct"] for log in logs]
        wanted.append([label, *(f"{score:.2f}" for score in scores), shown(scores, ".2f")])
    assert table("the mixtures start | seed 10") == wanted
    assert len(list(folder.iterdir())) == 3 * len(names)  # none left out


def test_the_attention_stem_is_level_with_the_convolution_stem_on_digits():
    """On five seeds that no choice used: within one point, deviation at most 1."""
    wanted, means = [], []
    for name, label in {"resnet26": "convolution stem", "resnet26-stem": "`--stem`"}.items():
        scores = [summary(ROOT / "results/digits", f"{name}-seed{seed}")["test_top1_pct"] for seed in range(3, 8)]
        wanted.append([label, *(f"{score:.2f}" for score in scores), shown(scores, ".2f")])
        means.append(statistics.fmean(scores))
    assert table("`--dataset DIGITS` | seed 3") == wanted
    assert means[1] > means[0] - 1 and statistics.stdev(scores) <= 1


def test_the_layers_speed_is_the_benchmarks():
    found = load("cpu-2-threads.json")
    means = found["geometric_means"]
    assert table("time / the 3x3 convolution's") == [
        ["`cpu`, attention alone", f"{means['core cpu / conv']:.2f}", f"{means['unfold / core cpu']:.0f}"],
        ["`cpu`, layer with its projections", f"{means['layer cpu / conv']:.2f}", ""],
        ["`tiled`, attention alone", f"{means['core tiled / conv']:.2f}", f"{means['unfold / core tiled']:.0f}"],
    ]
    assert (found["machine"]["capability"], found["machine"]["threads"], len(found["layers"])) == ("AVX2", 2, 11)
    assert "over 11 shapes" in OURS and "of 2 cores with AVX2" in OURS
    candidates = [row["candidates"] for row in found["layers"]]
    peaks = [c["core cpu"]["peak_mib"] / c["conv"]["peak_mib"] for c in candidates]
    less = f"less memory than the convolution at {sum(peak < 1 for peak in peaks)} of the 11 shapes"
    assert f"{less}, at most {max(peaks):.2f} of it" in " ".join(OURS.split())
    grown = [row for row in found["scaling"] if row["backend"] in ("cpu", "tiled")]
    exponents = [row[f"{what}_exponent"] for row in grown for what in ("time", "memory")]
    assert len(exponents) == 12 and max(exponents) < 1.1  # "about as fast"
    strided = [row["candidates"]["layer cpu"]["ratio"]["median"] for row in found["strided"]]
    assert f"({min(strided):.1f} to {max(strided):.1f} times its time)" in OURS


def test_the_speed_of_each_build_is_the_benchmarks():
    of = {name: load(f"layers-{name}-2-threads.json")["geometric_means"] for name in ("avx2", "plain")}
    core, layer = ([f"{means[f'{part} cpu / conv']:.2f}" for means in of.values()] for part in ("core", "layer"))
    text = " ".join(OURS.split())
    assert f"built for AVX2, attention alone {core[0]} and layer {layer[0]} of the convolution's time on planes" in text
    assert f'as plain code (`SASA_CXXFLAGS="-mno-avx2 -mno-fma -mno-avx"`) {core[1]} and {layer[1]}' in text


def networks(found: dict, part: str) -> dict[tuple[str, str, str], dict]:
    return {(row["form"], row["model"], row["network"]): row for row in found[part]}


def test_the_networks_speed_is_the_benchmarks():
    found = load("network-cpu-2-threads.json")
    steps, evaluations = networks(found, "network"), networks(found, "evaluation")
    wanted = []
    for form in ("CIFAR", "ImageNet"):
        for name in ("ResNet26", "ResNet50"):
            ratios = [of[form, name, net]["ratio_to_baseline"] for of in (steps, evaluations)
                      for net in ("attention", "attention + stem")]  # fmt: skip
            baseline, ours = (steps[form, name, net] for net in ("convolution", "attention"))
            wanted.append([
                f"{form}, {ours['batch']} images" if name == "ResNet26" else "", name,
                *(f"{r['median']:.2f} ({r['low']:.2f} to {r['high']:.2f})" for r in ratios),
                f"{baseline['peak_mib']:.0f}, {ours['peak_mib']:.0f}",
            ])  # fmt: skip
    assert table("form, batch | network") == wanted
    cifar, imagenet = (
        steps[form, "ResNet26", "attention"]["ratio_to_baseline"]["median"] for form in ("CIFAR", "ImageNet")
    )
    text = (
        f"takes {cifar:.2f} of its convolution baseline's time on 2 CPU threads with small images, {imagenet:.2f} with"
    )
    assert text in " ".join(README.split())
    assert found["rounds"] == 9 and "range of 9 rounds on 2 threads" in " ".join(OURS.split())
    assert (found["machine"]["capability"], found["machine"]["threads"]) == ("AVX2", 2)


def test_before_and_after_are_the_benchmarks():
    before, after = load("resnet26-before-cpu-2-threads.json"), load("network-cpu-2-threads.json")
    assert before["rounds"] == 9 and before["machine"] == after["machine"]
    shown = {}
    for part in ("network", "evaluation"):
        for form in ("CIFAR", "ImageNet"):
            pair = (networks(found, part)[form, "ResNet26", "attention"] for found in (before, after))
            first, second = (f"{row['ratio_to_baseline']['median']:.2f}" for row in pair)
            shown[part, form] = f"{first} and {second} ({form} form)"
    text = " ".join(OURS.split())
    for part, words in {"network": "steps", "evaluation": "evaluation"}.items():
        assert f"{words} {shown[part, 'CIFAR']}, {shown[part, 'ImageNet']}" in text


def test_a_steps_memory_is_the_benchmarks():
    (found,) = load("plan-resnet50.json")["step_memory"]
    kept, work, total = found["kept_mib"], found["work_mib"], found["total_mib"]
    wanted = [
        [stage, *(f"{kept[net][stage]:.1f}" for net in ("convolution", "attention")),
         *(f"{work[backend][stage]:.1f}" if stage in work[backend] else "" for backend in ("cpu", "tiled"))]
        for stage in ("stem", "layer1", "layer2", "layer3", "layer4")
    ]  # fmt: skip
    assert table("ResNet50, 4 images of 224x224, fp32, MiB | convolution keeps") == wanted
    sentence = (
        f"Weights, gradients and momentum are {found['state_mib']['convolution']:.1f} MiB (convolution) or "
        f"{found['state_mib']['attention']:.1f} (attention), so that a step takes at most {total['convolution']:.0f} "
        f"MiB (convolution), {total['cpu']:.0f} (`cpu`) or {total['tiled']:.0f} (`tiled`)"
    )
    assert sentence in " ".join(OURS.split())


def test_the_roofline_is_what_the_tuner_printed():
    assert (ROOT / "results/benchmark/roofline-sm90.md").read_text().strip() in OURS


# ---- single figures -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", MEASURED, ids=lambda entry: entry["text"][:40])
def test_a_figure_follows_from_what_its_command_printed(entry):
    assert entry["text"] in " ".join(OURS.split()) and entry["command"]
    assert {match[1] for match in WITH_UNIT.finditer(entry["text"])} <= entry["figures"].keys()
    printed = re.findall(r"\d+(?:\.\d+)?", entry["output"])
    for figure, how in entry["figures"].items():
        assert re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d.])", entry["text"])
        assert all(str(value) in printed for value in how["of"])
        assert f"{BY[how['by']](how['of']):.{len(figure.partition('.')[2])}f}" == figure


def score_of_the_main_command() -> str:
    found = json.loads((ROOT / "results/main-command/summary.json").read_text())
    assert found["test_images"] == 360 and found["epochs"] == 12
    return f"test top-1 {found['test_top1_pct']:.2f}%, top-5 {found['test_top5_pct']:.2f}% on 360 images"


def test_the_main_command_scored_what_the_readme_states():
    assert f"It ends with `{score_of_the_main_command()}; ...`" in OURS


def test_no_other_figure_is_in_the_text():
    """Figures with a unit outside the tables and code must be traced above or be settings."""
    text = " ".join(line for line in re.sub(r"```.*?```", "", OURS, flags=re.S).splitlines() if line[:1] != "|")
    text = " ".join(text.split())
    for known in (*(entry["text"] for entry in MEASURED), *SETTINGS, score_of_the_main_command()):
        assert known in text, known
        text = text.replace(known, "")
    tested = r"made \S+ and \S+ points|momentum are .*?\(`tiled`\)|\(\S+ to \S+ times its time\)"  # above
    text = re.sub(tested, "", text)
    assert [text[max(0, match.start() - 30) : match.end()] for match in WITH_UNIT.finditer(text)] == []
