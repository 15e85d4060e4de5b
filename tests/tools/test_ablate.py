"""tools.ablate: what it runs, skips, resumes and prints."""

import fcntl
import json
import math
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

from sasa.training.cli import parse_command_line
from sasa.training.signals import STOP_SIGNALS
from tools import ablate, plot, runs
from tools.paper import DEPTHS

ROOT = Path(__file__).resolve().parents[2]


def test_the_port_may_be_called_by_its_old_name(tmp_path, capsys):
    for name in ("port", "seed"):
        assert ablate.main(["--table", name, "--dry-run", "--output-dir", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12 and lines[:6] == lines[6:]


@pytest.mark.parametrize(("dataset", "network"), [
    ("DIGITS", "ResNet26"), ("IMAGENET", "ResNet50"), ("FOLDER", "ResNet50"), ("WEBDATASET", "ResNet50"),
])  # fmt: skip
def test_the_network_of_an_ablation_goes_by_the_data_set_whatever_it_is_packed_in(dataset, network, tmp_path, capsys):
    assert ablate.main(["--table", "5", "--dataset", dataset, "--dry-run", "--output-dir", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines and all(f"--model-name {network} " in f"{line} " for line in lines)


# ---- running, with a train.py that scores at once -------------------------------------------------------------------

STUB = """
import json, signal, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from config import resolve
from sasa.training.cli import parse_command_line
command = parse_command_line(sys.argv[1:])
config = resolve(command.given, command.given["dataset"])
folder, notes = Path(config.output_dir, config.name), Path({notes!r})
assert command.resume == ""
with open(notes / "calls", "a") as file:
    file.write(config.name + chr(10))
(folder / "config.json").write_text(json.dumps(config.to_dict()))
if (notes / ("fail-" + config.name)).exists():
    sys.exit("train.py: it broke")
if (notes / ("wait-" + config.name)).exists():
    signal.signal(signal.SIGTERM, lambda *_: ((notes / "terminated").touch(), sys.exit(75)))
    (notes / "waiting").touch()
    time.sleep(60)
(folder / "last.pt").touch()
(folder / "log.jsonl").write_text(json.dumps(dict(epoch=1, val_top1_pct=90.0)) + chr(10))
epochs = 2 if config.early_stop and config.content else 1
(folder / "summary.json").write_text(json.dumps(dict(
    test_top1_pct=90.0 + config.seed, test_images=360, epochs=epochs, seconds=2.0, parameters=7, flops_per_image=5,
    selected="the last epoch (none held out)", device="cpu", torch="0")))
"""


class Stubbed:
    """Runs tools.ablate in this process on a stub of train.py; `calls` are the runs started since the last."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "train.py").write_text(STUB.format(root=str(ROOT), notes=str(folder)))

    def __call__(self, *flags: str) -> int:
        (self.folder / "calls").write_text("")
        handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        try:
            return ablate.main(["--dataset", "DIGITS", "--output-dir", str(self.folder / "out"), *flags])
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    @property
    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().split()

    def run_folder(self, name: str) -> Path:
        return self.folder / "out" / "digits" / name


@pytest.fixture
def stubbed(tmp_path, monkeypatch):
    monkeypatch.setattr(ablate, "HERE", tmp_path)
    return Stubbed(tmp_path)


TABLE_6 = ["resnet26-no-content-seed0", "resnet26-seed0"]


def test_what_is_done_is_skipped_and_a_deleted_run_is_the_only_one_made_again(stubbed, capsys):
    assert stubbed("--table", "6") == 0 and stubbed.calls == TABLE_6
    assert not list(stubbed.run_folder(TABLE_6[0]).glob("*.pt"))
    out = capsys.readouterr().out
    assert "| q.r only | 7 | 0.0 | 90.00 | 1 | +0.00 | 2 | 76.9 | 6.1 | 16.7 |" in out
    assert {p.name for p in (stubbed.folder / "out/digits").glob("table*")} == {"tables.md", "table-6-resnet26.csv"}
    assert stubbed("--table", "6") == 0 and stubbed.calls == []
    shutil.rmtree(stubbed.run_folder("resnet26-seed0"))
    assert stubbed("--table", "6", "--keep-weights") == 0 and stubbed.calls == ["resnet26-seed0"]
    assert (stubbed.run_folder("resnet26-seed0") / "last.pt").exists()
    assert stubbed("--table", "6", "5", "--seeds", "2") == 0
    assert stubbed.calls == [
        "resnet26-position-none-seed0", "resnet26-position-absolute-seed0", "resnet26-no-content-seed1",
        "resnet26-seed1", "resnet26-position-none-seed1", "resnet26-position-absolute-seed1",
    ]  # fmt: skip
    assert json.loads((stubbed.folder / "out/digits/ablation.json").read_text())["tables"] == [
        ["6", "ResNet26"], ["5", "ResNet26"],
    ]  # fmt: skip


@pytest.mark.parametrize("damage", ["no summary", "half a summary", "cut by --max-steps"])
def test_what_is_not_whole_is_not_done(stubbed, damage):
    assert stubbed("--table", "6") == 0
    folder = stubbed.run_folder("resnet26-seed0")
    config = json.loads((folder / "config.json").read_text())
    if damage == "no summary":
        (folder / "summary.json").unlink()
    elif damage == "half a summary":
        (folder / "summary.json").write_text('{"test_top1_pct": 9')
    else:
        (folder / "config.json").write_text(json.dumps(config | {"max_steps": 2}))
    assert stubbed("--table", "6") == 0 and stubbed.calls == ["resnet26-seed0"]


def test_a_folder_with_a_run_of_another_configuration_is_said_and_left_alone(stubbed, capsys):
    """train.py --resume would go on with the values in the folder."""
    assert stubbed("--table", "6") == 0
    path = stubbed.run_folder("resnet26-seed0") / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lr": 1.0, "data_dir": "elsewhere"}))
    capsys.readouterr()
    assert stubbed("--table", "6", "--dry-run") == 0
    captured = capsys.readouterr()
    assert captured.out == "" and "another configuration (lr): delete it" in captured.err
    assert stubbed("--table", "6") == 1 and stubbed.calls == []
    error = capsys.readouterr().err
    assert "another configuration (lr): delete it" in error and error.count("\n") == 1
    shutil.rmtree(path.parent)
    assert stubbed("--table", "6") == 0 and stubbed.calls == ["resnet26-seed0"]


def test_runs_that_end_early_by_their_own_figures_make_a_table(stubbed, capsys):
    """The runs of the stub train for one epoch and for two."""
    assert stubbed("--table", "6", "--", "--early-stop", "2", "--holdout", "0.2") == 0 and stubbed.calls == TABLE_6
    assert "| q.r only | 7 | 0.0 | 90.00 | 1 |" in capsys.readouterr().out
    folder = stubbed.folder / "out" / "digits-holdout-0.2-early-stop-2"
    assert "`--holdout 0.2 --early-stop 2`, at most 12 epochs each, on cpu" in (folder / "tables.md").read_text()
    assert plot.title_of(runs.read(folder)) == "DIGITS --holdout 0.2 --early-stop 2, at most 12 epochs"
    path = folder / TABLE_6[0] / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"epochs": 13}))
    with pytest.raises(runs.RunsError, match="cannot be compared, epochs: 13 in"):
        runs.read(folder)


def test_a_rate_that_a_run_has_lowered_for_few_images_is_the_same_configuration(stubbed):
    """20 images where a batch has 32: the recipe's rate, by the root."""
    flags = ("--table", "6", "--", "--train-images", "20")
    assert stubbed(*flags) == 0 and stubbed.calls == TABLE_6
    path = stubbed.folder / "out/digits-train-images-20/resnet26-seed0/config.json"
    config = json.loads(path.read_text())
    for images, code in ((20, 0), (33, 1)):  # which no batch of 32 has
        path.write_text(json.dumps(config | {"lr": 1e-3 * math.sqrt(images / 32)}))
        assert stubbed(*flags) == code and stubbed.calls == []
    given = (*flags, "--lr", "2e-3")  # is not lowered
    assert stubbed(*given) == 0
    path = stubbed.folder / "out/digits-train-images-20-lr-0.002/resnet26-seed0/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lr": 2e-3 * math.sqrt(20 / 32)}))
    assert stubbed(*given) == 1 and stubbed.calls == []


def test_runs_that_make_no_table_are_one_line_and_exit_2(stubbed, capsys):
    assert stubbed("--table", "6") == 0
    path = stubbed.run_folder("resnet26-no-content-seed0") / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"test_images": 7}))
    with pytest.raises(SystemExit) as end:
        stubbed("--table", "6", "--seeds", "2")
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and "cannot be compared" in error
    assert stubbed.calls == []  # said before anything is run


def test_a_run_older_than_a_field_is_done_where_the_field_has_its_default(stubbed):
    assert stubbed("--table", "6") == 0
    path = stubbed.run_folder("resnet26-seed0") / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in config.items() if key != "train_images"}))
    assert stubbed("--table", "6") == 0 and stubbed.calls == []


def test_only_the_runs_own_weights_are_deleted_and_no_link_is_written_through(stubbed, tmp_path, capsys):
    folders = [stubbed.run_folder(name) for name in TABLE_6]
    (tmp_path / "precious").write_text("mine")
    for folder, name in zip(folders, (ablate.LOCK, "my-pretrained.pt"), strict=True):
        folder.mkdir(parents=True)
        (folder / name).symlink_to(tmp_path / "precious")
    assert stubbed("--table", "6") == 1 and stubbed.calls == TABLE_6[1:]
    assert f"tools.ablate: error: {TABLE_6[0]} failed, {folders[0] / ablate.LOCK}: " in capsys.readouterr().err
    assert (tmp_path / "precious").read_text() == "mine"
    assert (folders[1] / "my-pretrained.pt").is_symlink() and not (folders[1] / "last.pt").exists()


def test_a_folder_that_cannot_be_made_is_one_line_and_exit_2(stubbed, capsys):
    (stubbed.folder / "out").write_text("a file")
    with pytest.raises(SystemExit) as end:
        stubbed("--table", "6")
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("tools.ablate: error: ") and error.count("\n") == 1


def test_a_failed_run_is_said_the_others_are_made_and_it_is_tried_again(stubbed, capsys):
    (stubbed.folder / f"fail-{TABLE_6[0]}").touch()
    assert stubbed("--table", "6") == 1 and stubbed.calls == TABLE_6
    captured = capsys.readouterr()
    assert captured.err.strip() == f"tools.ablate: error: {TABLE_6[0]} failed, exit code 1: train.py: it broke"
    assert "| q.r only | - | - | - | 0 | - | - |" in captured.out
    assert "`python -m tools.ablate --table 6 --dataset DIGITS --seeds 1 --model-name ResNet26`" in captured.out
    (stubbed.folder / f"fail-{TABLE_6[0]}").unlink()
    assert stubbed("--table", "6") == 0 and stubbed.calls == TABLE_6[:1]
    assert "it broke" in (stubbed.run_folder(TABLE_6[0]) / "output.txt").read_text()  # kept


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_signal_ends_the_open_runs_with_75_and_the_same_command_goes_on(stubbed, capsys, jobs):
    for name in TABLE_6:
        (stubbed.folder / f"wait-{name}").touch()
    locked = []

    def stop():
        while not (stubbed.folder / "waiting").exists():
            time.sleep(0.01)
        time.sleep(0.3)
        with open(stubbed.run_folder(TABLE_6[0]) / ablate.LOCK) as lock:  # by train.py: tools.ablate has closed its own
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                locked.append(True)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    assert stubbed("--table", "6", "--jobs", jobs) == 75
    assert sorted(stubbed.calls) == TABLE_6[: int(jobs)]
    assert locked and (stubbed.folder / "terminated").exists()  # by SIGTERM, so that a run can save
    captured = capsys.readouterr()
    assert captured.out.count("stopped, the same command continues") == int(jobs) and captured.err == ""
    for name in TABLE_6:
        (stubbed.folder / f"wait-{name}").unlink()
    assert stubbed("--table", "6") == 0 and stubbed.calls == TABLE_6


def test_a_run_that_another_process_is_at_is_left_to_it(stubbed, capsys):
    folder = stubbed.run_folder("resnet26-seed0")
    folder.mkdir(parents=True)
    with open(folder / ablate.LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert stubbed("--table", "6") == 0 and stubbed.calls == TABLE_6[:1]
    assert "resnet26-seed0: another process has it" in capsys.readouterr().out
    assert stubbed("--table", "6") == 0 and stubbed.calls == TABLE_6[1:]


def test_a_leading_tilde_is_the_home_folder_as_in_train(monkeypatch, capsys):
    """train.py expands ~, so this command must too: else it does not find the runs that train.py has written."""
    monkeypatch.setenv("HOME", "/home/of/me")
    assert ablate.main(["--table", "6", "--dry-run", "--output-dir=~/ablate", "--data-dir=~/sets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines and all("--output-dir /home/of/me/ablate/digits" in line for line in lines)
    assert all("--data-dir /home/of/me/sets" in line for line in lines)


def test_dry_run_prints_the_lines_of_what_is_left_and_changes_nothing(stubbed, capsys):
    assert stubbed("--table", "6", "--dry-run", "--data-dir", "here") == 0
    assert not (stubbed.folder / "out").exists()
    lines = capsys.readouterr().out.splitlines()
    commands = [parse_command_line(line.removeprefix("python train.py ").split()) for line in lines]
    assert [command.given["content"] for command in commands if "content" in command.given] == [False]
    assert all(c.resume == "" and c.given["data_dir"] == "here" and c.given["seed"] == 0 for c in commands)
    assert stubbed("--table", "6") == 0
    capsys.readouterr()
    assert stubbed("--table", "6", "--seeds", "2", "--dry-run") == 0
    assert [line.split("--name ")[1].split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "resnet26-no-content-seed1", "resnet26-seed1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "networks"),
    [
        ("--table 1 --dataset DIGITS", sorted(DEPTHS * 3)),
        ("--table 1 --dataset DIGITS --model-name resnet38", ["ResNet38"] * 3),
        ("--table 6 --dataset CIFAR10", ["ResNet26"] * 2),
        ("--table 6 --dataset IMAGENET", ["ResNet50"] * 2),
        ("--table 6 --dataset FOLDER --model-name ResNet26", ["ResNet26"] * 2),
    ],
)
def test_the_networks_of_a_table(flags, networks, tmp_path, capsys):
    assert ablate.main([*flags.split(), "--dry-run", "--output-dir", str(tmp_path)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert sorted(words[words.index("--model-name") + 1] for words in lines) == networks


def test_threads_and_flags_after_the_dashes_reach_the_runs(stubbed, monkeypatch):
    started = []

    def popen(command, env, **options):
        started.append((command[1:], env.get("OMP_NUM_THREADS")))
        raise KeyboardInterrupt  # far enough

    monkeypatch.setattr(ablate.subprocess, "Popen", popen)
    with pytest.raises(KeyboardInterrupt):
        stubbed("--table", "6", "--threads", "3", "--epochs", "5", "--data-dir", "d")
    (command, threads), given = started[0], parse_command_line(started[0][0][1:]).given
    assert threads == "3" and command[0] == str(stubbed.folder / "train.py")
    assert (given["epochs"], given["data_dir"], given["content"], given["progress"]) == (5, "d", False, False)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--table 2", "invalid choice"),
        ("--table 5 --seeds 0", "at least 1"),
        ("--table 5 --model-name NaiveResNet26", "invalid choice"),
        ("--table 5 -- --seed 3", "--seed after --"),
        ("--table 5 -- --overwrite", "--overwrite after --"),
        ("--table 5 -- --lr -1", "--lr -1"),
        ("--table 5 -- --epochs 3", "--epochs after --"),
        ("--table 5 -- --warmup-epochs 99", "--warmup-epochs 99"),
        ("--table 6 -- --position none", "--no-content leaves no logits"),
        ("--table 5 -- --position none", "--position after --: rows of --table 5 set it"),
        ("--table 4 1 -- --stem", "--stem after --: rows of --table 4 1 set it"),
        ("--table 6 -- --no-content", "--no-content after --: rows"),
        ("--table strong --dry-run", "rows of --table strong train for 12 and 500 epochs"),
        ("--table 5 -- --class-weights nowhere.json", "--class-weights nowhere.json: cannot be read"),
        ("--table 5 -- --momentum 0.8", "--momentum 0.8: needs --optimizer sgd"),
        ("--table 5 -- --early-stop 2", "--early-stop 2: needs --holdout"),
        ("--table recipe -- --no-zero-init-residual", "--no-zero-init-residual after --: rows"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(capsys, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        ablate.main(flags.split())
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and words in error, error
    assert not list(tmp_path.iterdir())


def test_a_flag_that_some_rows_use_goes_to_all_of_them(tmp_path, capsys):
    """Two rows of the recipe's table are SGD's."""
    arguments = ["--table", "recipe", "--dry-run", "--output-dir", str(tmp_path), "--", "--momentum", "0.8"]
    assert ablate.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12 and all("--momentum 0.8" in line for line in lines)


def test_the_real_train_py_runs_is_cut_and_is_not_run_again(tmp_path, capsys):
    """A step of each row of Table 6, by subprocess, with settings that the run settles: the rate of 6 images where a
    batch has 8, and weights of a file."""
    weights = tmp_path / "weights.json"
    weights.write_text(json.dumps({str(digit): 1 + digit for digit in range(10)}))
    out = tmp_path / "out"
    flags = ["--table", "6", "--epochs", "1", "--threads", "1", "--output-dir", str(out), "--dataset", "digits"]
    shared = ["--", "--max-steps", "2", "--batch-size", "8", "--train-images", "6", "--attention-every", "0"]
    shared += ["--class-weights", str(weights)]
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        assert ablate.main([*flags, *shared]) == 0
        (folder,) = out.glob("digits-train-images-6-epochs-1-batch-size-8-class-weights-????????-max-steps-2")
        first = (folder / "resnet26-seed0" / "summary.json").read_bytes()
        assert ablate.main([*flags, *shared]) == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert json.loads((folder / "resnet26-seed0" / "config.json").read_text())["lr"] < 1e-3 * math.sqrt(8 / 32)
    assert (folder / "resnet26-seed0" / "summary.json").read_bytes() == first
    assert capsys.readouterr().out.count("done before") == 2
    assert (folder / "table-6-resnet26.csv").read_text().count("8306442,") == 1
