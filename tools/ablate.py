"""Run the rows of the paper's tables by train.py, resume what was interrupted, and print what they scored.

    python -m tools.ablate --table 5 --dataset DIGITS --seeds 3
    python -m tools.ablate --table 1 port --model-name ResNet26 --dataset FashionMNIST -- --train-images 10000

What all runs share (data set, epochs, the flags after --) names the folder that they are in, as far as it changes one
of the rows, so that runs in one folder are comparable; rows that several tables share are run once. Every run is a
train.py of its own with --resume: the same command continues after any kind of end, leaves alone what is done, and two
of them at a time share the work.

Exit codes: 0 all done, or left to another tools.ablate that has them; 1 a run failed (the others were run); 2 wrong
usage, or runs that make no table; 75 stopped by a signal: the same command continues.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from config import DATASETS, MODELS, SIDES, Config, ConfigError, idle_flags, nominal_batch, rate_factor, rate_for
from sasa import console
from sasa.console import (
    Parser,
    as_path,
    as_path_text,
    one_line,
    print_error,
    printable,
    raise_if_reader_is_gone,
    run_main,
    show,
)
from sasa.files import open_regular
from sasa.settings import ADDED, flag_of, renamed
from sasa.training import format2
from sasa.training.cli import Command, parse_command_line
from sasa.training.files import BEST, CONFIG, LAST, PREVIOUS, SUMMARY
from sasa.training.signals import STOPPED, StopRequest
from tools.arguments import one_of, positive
from tools.paper import DEPTHS, rows_for
from tools.report import markdown, write_beside
from tools.runs import RunsError, read, read_json, remember
from tools.trials import TABLES, Budget, Trial, in_words, table_name, unique, varied

PROG = "tools.ablate"
HERE = Path(__file__).resolve().parents[1]
POLL_SECONDS = 0.1
OWN = ("model_name", "dataset", "data_dir", "seed", "output_dir", "name")  # flags that this command sets
SETTLED = ("form", "img_size", "eval_size", "amp", "ema")  # what a run fills in at its start where it is "auto" or None
WEIGHTS = (LAST, PREVIOUS, BEST)  # what train.py writes; other weights in a run's folder are not ours
OUTPUT, LOCK = "output.txt", ".ablate-lock"  # in a run's folder: what it has printed, and who is running it


# ---- what is there --------------------------------------------------------------------------------------------------


def is_done(folder: Path, config: Config) -> bool:
    """Whether the folder holds the whole summary of a run of this configuration."""
    saved, summary = read_json(folder / CONFIG), read_json(folder / SUMMARY)
    if saved is None or summary is None or saved.get("max_steps") != config.max_steps:
        return False
    return not differing(saved, config)


def differing(saved: dict[str, Any], config: Config) -> list[str]:
    """The fields in which a run's config.json differs from `config` and that can change its result.

    A field that is younger than the run counts as what the run did, else as its default.
    """
    with contextlib.suppress(KeyError, TypeError):  # else it is no configuration: its fields differ
        saved = renamed(format2.complete(saved))
    ours = config.to_dict()
    names = []
    for f in dataclasses.fields(Config):
        if f.name == "stem_mixtures" and not (ours["stem"] and ours["stem_values"] == "mixture"):
            continue  # of a stem that the run does not have; it was 4 by default
        open_value = f.name in SETTLED and ours[f.name] in ("auto", None)
        before = saved.get(f.name, ADDED.get(f.name, f.default))
        if f.name == "lr" and is_lowered_rate(before, config):
            continue
        if not f.metadata["free"] and not open_value and before != ours[f.name]:
            names.append(f.name)
    return names


def is_lowered_rate(rate: Any, config: Config) -> bool:
    """Whether a run lowers its recipe's rate to this one where its training set is smaller than a batch.

    How many images there are is known once they are read, and follows from fields that are compared themselves.
    """
    whole = nominal_batch(config)
    if config.lr != config.recipe_values()["lr"] * rate_factor(config, whole):
        return False
    return any(rate == rate_for(config, images, whole) for images in range(1, whole))


def other_run(folder: Path, config: Config) -> str | None:
    """Why the run in the folder is not continued, as train.py --resume keeps its values; None where it can be."""
    names = differing(read_json(folder / CONFIG) or config.to_dict(), config)
    if not names:
        return None
    return f"{folder} holds a run of another configuration ({', '.join(names)}): delete it, or --output-dir"


# ---- running --------------------------------------------------------------------------------------------------------


@dataclass
class Work:
    """The runs to make and how; what became of them."""

    trials: dict[Trial, Config]
    budget: Budget
    folder: Path
    data_dir: str | None = None
    jobs: int = 1
    threads: int | None = None
    keep_weights: bool = False
    failures: dict[str, str] = dataclasses.field(default_factory=dict)
    stop: StopRequest = dataclasses.field(default_factory=StopRequest)

    def command(self, trial: Trial) -> list[str]:
        """The run's line, from train.py on."""
        where = ["--output-dir", str(self.folder), "--name", trial.name, "--no-progress", "--resume"]
        return [
            "train.py",
            *trial.flags(self.budget),
            *(["--data-dir", self.data_dir] if self.data_dir else []),
            *where,
        ]

    def say(self, trial: Trial, text: str) -> None:
        place = list(self.trials).index(trial) + 1
        line = f"[{place:{len(str(len(self.trials)))}}/{len(self.trials)}] {trial.name}: {text}"
        show(one_line(line))

    def fail(self, trial: Trial, why: str) -> None:
        self.failures[trial.name] = why
        self.say(trial, f"FAILED, {why}")


def run_all(work: Work) -> None:
    """Every run that is not done, `jobs` at a time; on a signal the open ones save and end."""
    work.stop.has_state = True  # the runs': they save and end when the signal is handed on to them
    work.stop.install()
    waiting, processes, signalled = list(work.trials), {}, False
    while processes or (waiting and work.stop.received is None):
        while waiting and len(processes) < work.jobs and work.stop.received is None:
            trial = waiting.pop(0)
            process = start(work, trial)
            if process is not None:
                processes[trial] = process
        if work.stop.received is not None and not signalled:
            signalled = True
            for process in processes.values():
                process.send_signal(signal.SIGTERM)
        time.sleep(POLL_SECONDS if processes else 0)
        for trial in [trial for trial, process in processes.items() if process.poll() is not None]:
            finish(work, trial, processes.pop(trial).returncode)


def start(work: Work, trial: Trial) -> subprocess.Popen | None:
    """The run's train.py, or None where it is done or another process has it.

    The lock is inherited by train.py and lives as long as it does, also where this process is killed.
    """
    folder = work.folder / trial.name
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as opened:
        try:
            lock = opened.enter_context(os.fdopen(open_regular(folder / LOCK, os.O_RDWR | os.O_CREAT), "r+b"))
            output = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            output = opened.enter_context(os.fdopen(open_regular(folder / OUTPUT, output), "ab"))
        except OSError as error:
            work.fail(trial, f"{error.filename}: {error.strerror}")
            return None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            work.say(trial, "another process has it, left to that one")
            return None
        if is_done(folder, work.trials[trial]):
            work.say(trial, "done before")
            return None
        why_not = other_run(folder, work.trials[trial])
        if why_not:
            work.fail(trial, why_not)
            return None
        threads = {} if work.threads is None else {"OMP_NUM_THREADS": str(work.threads)}
        command = [sys.executable, str(HERE / "train.py"), *work.command(trial)[1:]]
        work.say(trial, f"started, output in {folder / OUTPUT}")
        return subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=os.environ | threads,
            pass_fds=(lock.fileno(),),
        )  # fmt: skip


def finish(work: Work, trial: Trial, code: int) -> None:
    """Say what became of a run whose train.py has ended with `code`."""
    folder = work.folder / trial.name
    if code == 0:
        summary = read_json(folder / SUMMARY)
        if summary is None:
            work.fail(trial, "ended well, but its summary.json cannot be read")
            return
        work.say(trial, f"test top-1 {summary['test_top1_pct']:.2f}%, trained {summary['seconds']:.0f} s")
        if not work.keep_weights:
            for name in WEIGHTS:
                (folder / name).unlink(missing_ok=True)
    elif work.stop.received is not None:
        work.say(trial, "stopped, the same command continues")
    else:
        work.fail(trial, f"exit code {code}: {last_line(folder / OUTPUT)}")


def last_line(path: Path) -> str:
    """The last line that a run has printed."""
    with os.fdopen(open_regular(path, os.O_RDONLY), "rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - 10_000, 0))
        lines = file.read().decode(errors="backslashreplace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")


# ---- the command line -----------------------------------------------------------------------------------------------


def parse(arguments: list[str]) -> tuple[argparse.Namespace, Budget]:
    """This command's own flags, and what all runs share; wrong usage ends the process with one line and code 2."""
    own, shared = arguments, []
    if "--" in arguments:
        cut = arguments.index("--")
        own, shared = arguments[:cut], arguments[cut + 1 :]

    parser = Parser(
        f"python -m {PROG}",
        description="Run the rows of the paper's tables by train.py, resume what was interrupted, print the scores.",
        epilog="Flags of train.py after -- go to every run: python -m tools.ablate --table 5 -- --train-images 10000",
    )
    tables = "tables whose rows are run: 1, 3 to 7 of the paper, the port's, the recipe's, the strong recipe's"
    parser.add_argument("--table", nargs="+", required=True, type=table_name, choices=TABLES, help=tables)
    parser.add_argument("--dataset", default="DIGITS", type=one_of(DATASETS), choices=DATASETS, help="default: DIGITS")
    parser.add_argument("--data-dir", type=as_path_text, metavar="DIR", help="folder of the data sets")
    parser.add_argument("--epochs", type=positive, metavar="N", help="of every run (default: the recipe's)")
    parser.add_argument("--seeds", type=positive, default=1, metavar="N", help="seeds 0 to N-1 (default: 1)")
    parser.add_argument("--model-name", type=one_of(MODELS), choices=DEPTHS,
                        help="network of the rows; tables 1 and port, whose rows have their own, are cut to that depth "
                        "(default: not cut; ResNet26, ResNet50 on image trees)")  # fmt: skip
    parser.add_argument("--jobs", type=positive, default=1, metavar="N", help="runs at a time (default: 1)")
    parser.add_argument("--threads", type=positive, metavar="N", help="threads of a run (default: OMP_NUM_THREADS)")
    parser.add_argument("--output-dir", type=as_path, default="runs/ablate", metavar="DIR", help="default: runs/ablate")
    parser.add_argument("--keep-weights", action="store_true", help="keep the checkpoints of runs that are done")
    parser.add_argument("--dry-run", action="store_true", help="print the train.py lines of what is not done, and end")
    args = parser.parse_args(own)
    command = parse_command_line(shared)
    taken = [name for name in OWN if name in command.given] + (["epochs"] if "epochs" in command.given else [])
    if taken or command != Command(command.given):
        what = flag_of(taken[0]) if taken else "--resume, --init-from, --evaluate or --overwrite"
        fail(f"{what} after --: not for train.py here, this command has or sets it")
    return args, Budget(args.dataset, (*(["--epochs", str(args.epochs)] if args.epochs else []), *shared))


def fail(message: object) -> NoReturn:
    console.fail(PROG, message)


def main(arguments: list[str] | None = None) -> int:
    args, budget = parse(sys.argv[1:] if arguments is None else arguments)
    model = args.model_name or ("ResNet50" if SIDES[args.dataset] is None else "ResNet26")
    # As (table, network): tables whose rows name their networks are shown whole, whatever was run of them.
    tables = [(name, model if TABLES[name].rows[0].model is None else None) for name in args.table]
    chosen = unique(row for name, net in tables for row in rows_for(TABLES[name], net or args.model_name))
    trials = [Trial(row, seed) for seed in range(args.seeds) for row in chosen]
    rows = f"rows of --table {' '.join(args.table)}"
    try:
        budget = budget.for_rows(chosen)
        taken = {name: value for name, value in budget.given().items() if name in varied(chosen)}
        if taken:
            fail(f"{in_words(taken)[0]} after --: {rows} set it themselves")
        configs = {trial: trial.config(budget) for trial in trials}
        idle = [idle_flags(config, budget.given()) for config in configs.values()]
        for name, why in idle[0].items():
            if all(name in of for of in idle):
                fail(why)
        lengths = sorted({config.epochs for config in configs.values()})
        if len(lengths) > 1:  # an error before hours are spent
            fail(f"{rows} train for {' and '.join(map(str, lengths))} epochs, which makes no table: --epochs N")
        folder = Path(args.output_dir, budget.name())
    except ConfigError as error:
        fail(error)
    work = Work(configs, budget, folder, args.data_dir, args.jobs, args.threads, args.keep_weights)
    if args.dry_run:
        for trial, config in configs.items():
            why_not = other_run(folder / trial.name, config)
            if why_not:
                print_error(PROG, f"{trial.name}: {why_not}")
            elif not is_done(folder / trial.name, config):
                print(shlex.join(["python", *work.command(trial)]))
        return 0
    try:
        remember(folder, budget, tables)
        read(folder)  # runs that make no table are an error before hours are spent
        run_all(work)
        done = write_beside(folder)
        print("", *(markdown(done, *table) for table in tables), sep="\n")
        print(f"Tables and CSV: {printable(folder)}")
    except (RunsError, OSError) as error:
        raise_if_reader_is_gone(error)
        if not work.failures and work.stop.received is None:
            fail(error)
        print_error(PROG, error)
    for name, why in work.failures.items():
        print_error(PROG, f"{name} failed, {why}")
    if work.stop.received is not None:
        return STOPPED
    return 1 if work.failures else 0


if __name__ == "__main__":
    run_main(main)
