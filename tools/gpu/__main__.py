"""Everything that only a GPU can tell, by one command, in stages of at most nine minutes each.

    python -m tools.gpu [--stages machine right times ...] [--write]

Results are kept in runs/gpu/<device>.json after every unit of a stage; a stage that ran out of time, or was ended,
goes on from there when it is run again. --write makes the page docs/gpu/<device>.md of all that is in that file. What
was predicted before any GPU was at hand is printed beside what is measured. --dry-run walks all stages without one.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from sasa import files
from sasa.console import Parser, as_path, one_line, printable, raise_if_reader_is_gone, run_main
from sasa.training.device import make_current
from tools.arguments import usable_device
from tools.gpu import kernels, page, training
from tools.gpu.predictions import PREDICTIONS, verdict
from tools.gpu.stage import DeviceLost, Lab, Stage, run_command
from tools.gpu.timer import CudaTimer, StubTimer

ROOT = Path(__file__).resolve().parents[2]
STAGES = {
    "machine": kernels.machine,
    "right": kernels.right,
    "times": kernels.times,
    "steps": training.steps,
    "counters": kernels.counters,
    "compiled": training.compiled,
    "runs": training.runs,
    "tests": training.tests,  # last: hundreds of builds, and what matters most of them is in "right"
}
STAGE_MINUTES = 8.5  # a unit that has begun is waited for: nine with the longest
GRACE = 30.0  # seconds more until a stage's process is ended
DEVICE_LOST = 3  # exit code of such a process
ENDED = "the stage as a whole"  # unit that says why its process ended


def parse(arguments: list[str] | None) -> tuple[Parser, argparse.Namespace]:
    """The parser and what it made of the command line."""
    parser = Parser(
        "python -m tools.gpu",
        description="Everything that only a GPU can tell, in stages of at most nine minutes.",
        epilog="stages: " + "; ".join(f"{name}: {of_doc(stage)}" for name, stage in STAGES.items())
        + ". exit code: 0 done, 1 something failed, 2 wrong usage or no GPU",
    )  # fmt: skip
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE",
                        help="which, in this order (default: all)")  # fmt: skip
    parser.add_argument("--again", action="store_true", help="do anew what an earlier run has done")
    parser.add_argument("--results", type=as_path, help="the file of results (default: runs/gpu/<device>.json)")
    parser.add_argument("--write", nargs="?", const=False, type=as_path, metavar="FILE",
                        help="make a page of the results (default: docs/gpu/<device>.md)")  # fmt: skip
    parser.add_argument("--device", default="cuda", help="cuda or cuda:N (default: cuda)")
    parser.add_argument("--dry-run", action="store_true", help="walk all stages on the CPU with a stub timer")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # one stage, in this process
    parser.add_argument("--keep-errors", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60 * STAGE_MINUTES, help=argparse.SUPPRESS)
    return parser, parser.parse_args(arguments)


def of_doc(stage: Callable) -> str:
    """What a stage does: the first line of its docstring."""
    return (stage.__doc__ or "").split("\n")[0].rstrip(".")


def main(arguments: list[str] | None = None) -> int:
    """The command line; -> exit code."""
    parser, args = parse(arguments)
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here; --dry-run walks the stages without one")
    device = torch.device("cpu") if args.dry_run else usable_device(parser, args.device)
    slug = "dry-run" if args.dry_run else name_of(torch.cuda.get_device_name(device))
    path = args.results or ROOT / "runs" / "gpu" / f"{slug}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        results = read(path)
        if args.here or args.dry_run:
            if args.dry_run:
                print_predictions({})
            for name in args.stages:
                run_stage(name, make_lab(device, args.dry_run), results, path, args)
        else:
            print_predictions(results)
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # with the stage's process
            for name in args.stages:
                start_stage(name, args, path)
                results = read(path)
                try:
                    write_page(results, args, slug)
                except OSError as error:  # told again at the end; the stages are worth more
                    print(f"  no page: {one_line(error)}", flush=True)
        if args.here:
            return 0
        print_predictions(results)
        target = write_page(results, args, slug)
        if target is not None:
            print(f"page: {printable(target)}")
    except DeviceLost:
        return DEVICE_LOST
    except OSError as error:
        raise_if_reader_is_gone(error)
        parser.error(str(error))
    failed = [
        f"{stage}: {unit}" for stage in args.stages for unit, result in results[stage]["units"].items()
        if "error" in result
    ]  # fmt: skip
    print(f"results: {printable(path)}; failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


def write_page(results: dict[str, dict], args: argparse.Namespace, slug: str) -> Path | None:
    """Write the page that --write asks for, if it does: after each stage, so that a later failure cannot lose it."""
    if args.write is None:
        return None
    target = args.write or ROOT / "docs" / "gpu" / f"{slug}.md"
    target.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(target, page.render(results, args.dry_run))
    return target


def name_of(device: str) -> str:
    """A device's name as a file's: "NVIDIA H100 80GB HBM3" -> nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") or "device"


def read(path: Path) -> dict[str, dict]:
    """The results in a file; none where there is no file.

    Raises:
        OSError: the file cannot be read, or holds something else.
    """
    if not path.exists():
        return {}
    try:
        results = json.loads(files.read_regular(path))
        return {name: {"units": dict(results[name]["units"]), "seconds": results[name]["seconds"]} for name in results}
    except (ValueError, TypeError, KeyError) as error:
        raise OSError(f"{path} holds no results of this command ({error}); name another with --results") from error


def stub_shell(command: list[str], seconds: float) -> subprocess.CompletedProcess:
    """Runs nothing."""
    return subprocess.CompletedProcess(command, 0, "not run", "")


def make_lab(device: torch.device, is_dry: bool) -> Lab:
    """What the stages share, on a GPU or on a dry run."""
    if is_dry:
        return Lab(device, "tiled", StubTimer(), stub_shell, dry=True)
    make_current(device)
    return Lab(device, "triton", CudaTimer(torch.cuda.get_device_properties(device).L2_cache_size), run_command)


def run_stage(name: str, lab: Lab, results: dict[str, dict], path: Path, args: argparse.Namespace) -> None:
    """Runs one stage in this process; `path` is written after each of its units."""
    units = {} if args.again else results.get(name, {}).get("units", {})
    units.pop(ENDED, None)
    start = time.monotonic()

    def keep() -> None:
        results[name] = {"units": units, "seconds": round(time.monotonic() - start, 1)}
        files.write_text(path, files.json_text(results, indent=1) + "\n")

    keep()
    print(f"{name}: {of_doc(STAGES[name])}", flush=True)
    STAGES[name](lab, Stage(units, start + args.seconds, keep, args.keep_errors))
    keep()


def stage_command(name: str, results: Path, seconds: float, more: list[str]) -> list[str]:
    """The command of a stage's own process, for which the chosen GPU is the first one."""
    command = [sys.executable, "-m", "tools.gpu", "--here", "--device", "cuda:0", "--stages", name]
    return [*command, "--results", str(results.absolute()), "--seconds", str(seconds), *more]


def start_stage(name: str, args: argparse.Namespace, path: Path) -> None:
    """Runs one stage in processes of its own, for at most nine minutes.

    One that ends its process, or hangs, ends nothing else; after an error that leaves the device unusable, another
    process goes on with the next unit.
    """
    until, more = time.monotonic() + args.seconds, ["--again"] if args.again else []
    while True:
        left = max(until - time.monotonic(), 0.0)
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": chosen_first(args.device)}
        code = run_group(stage_command(name, path, left, more), left + GRACE, environment)
        if code != DEVICE_LOST:
            break
        more = ["--keep-errors"]
    if code == 0:
        return
    if code is None:
        problem = {"not_reached": f"ended in the middle of a unit, after {args.seconds + GRACE:.0f} s: run it again"}
    else:
        problem = {"error": f"its process ended with exit code {code}"}
    results = read(path)
    results.setdefault(name, {"units": {}, "seconds": args.seconds})["units"][ENDED] = problem
    files.write_text(path, files.json_text(results, indent=1) + "\n")
    print(f"  {name}: {next(iter(problem.values()))}")


def chosen_first(device: str) -> str:
    """CUDA_VISIBLE_DEVICES by which this GPU is the first one for whatever a stage starts, and the others follow."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    index = torch.device(device).index or 0
    return ",".join([names[index], *names[:index], *names[index + 1 :]])


def run_group(command: list[str], seconds: float, environment: dict[str, str] | None = None) -> int | None:
    """Exit code of a command with all that it starts; None where that had to be ended after `seconds`."""
    with subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True) as process:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)


def print_predictions(results: dict[str, dict]) -> None:
    """Each prediction, and beside it what is measured so far."""
    print("predicted (H100, bf16, 128 images), and measured:")
    for row in (verdict(prediction, results) for prediction in PREDICTIONS):
        measured = (
            "-" if row["measured"] is None else f"{row['measured']:.3g} {'within' if row['within'] else 'OUTSIDE'}"
        )
        where = f"{row['stage']}, {row['unit']}, {row['key']}"
        print(f"  {where:<45} {row['low']:>7g} to {row['high']:<7g} {measured}")


def command() -> int:
    """`main` as a process: one whose device is lost ends at once, since CUDA's own end could hang."""
    code = main()
    if code == DEVICE_LOST:
        sys.stdout.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    run_main(command)
