"""Kill a DIGITS run with SIGKILL at random moments, resume it each time, and compare with the run that was not killed.

    python tests/kill_resume.py [--kills 30] [--epochs 4] [--train-images N] [--seed 0]

Exits 0 when all kills hit the run before its end, and its final weights, optimizer, generators and log rows are bitwise
equal; 1 when not. training/test_resume.py runs a short form of it.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import small_runs  # noqa: E402 (a script: its folder must be on the path first)


def command(folder: Path, size: list[str], *more: str) -> list[str]:
    """A run that saves after about every second of training."""
    flags = "--dataset DIGITS --batch-size 16 --holdout 0.1 --ema 0.9 --mixup 0.2 --no-progress"
    flags += f" --save-minutes 0.02 --save-every 0 --attention-every 0 --output-dir {folder} --name run --device cpu"
    return [sys.executable, str(ROOT / "train.py"), *flags.split(), *size, *more]


def run_to_end(folder: Path, size: list[str], *more: str) -> None:
    done = subprocess.run(command(folder, size, *more), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"train.py ended with {done.returncode}:\n{done.stdout}{done.stderr}")


def wait_for_start(folder: Path, process: subprocess.Popen) -> None:
    """Until the run writes into its folder: kills before that hit nothing but imports."""
    before = time.time()
    while process.poll() is None and not any(
        path.stat().st_mtime > before for path in (folder / "run").glob("events.out.tfevents.*")
    ):
        time.sleep(0.05)


def kill_and_resume(folder: Path, kills: int, size: list[str], seconds: float, rng: random.Random) -> int:
    """The run, killed up to `kills` times, then resumed to its end; returns how many kills hit it before its end.

    Args:
        size: the flags that say how long the run is.
        seconds: that the run trains for when it is not killed. Kills are so close together, on average, that all of
            them come before it is over.
    """
    hits = 0
    while hits < kills:
        process = subprocess.Popen(
            command(folder, size, "--resume"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_for_start(folder, process)
        time.sleep(rng.uniform(0.0, min(5.0, 1.4 * seconds / kills)))
        code = process.poll()
        if code:
            raise RuntimeError(f"train.py ended by itself with {code}")
        process.kill()
        process.wait()
        if (folder / "run" / "summary.json").exists():
            break
        hits += 1
    run_to_end(folder, size, "--resume")
    return hits


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--train-images", type=int, help="of the training images, so many (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    size = ["--epochs", str(options.epochs)]
    if options.train_images:
        size += ["--train-images", str(options.train_images)]
    output = Path(tempfile.mkdtemp(prefix="kill_resume-"))
    try:
        run_to_end(output / "straight", size)
        started = time.monotonic()
        a, b = output / "straight" / "run", output / "killed" / "run"
        seconds = json.loads((a / "summary.json").read_text())["seconds"]
        hits = kill_and_resume(output / "killed", options.kills, size, seconds, random.Random(options.seed))
        wrong = small_runs.differences(small_runs.state_without_times(a), small_runs.state_without_times(b))
        wrong += small_runs.differences(
            small_runs.state_without_times(a, "best.pt"), small_runs.state_without_times(b, "best.pt"), "best"
        )
        wrong += [] if small_runs.log_rows(a) == small_runs.log_rows(b) else ["log.jsonl"]
    finally:
        shutil.rmtree(output)
    verdict = f"{len(wrong)} differences: {wrong[:5]}" if wrong else "bitwise equal to the run that was not killed"
    print(f"{hits} kills in {time.monotonic() - started:.0f} s: {verdict}")
    if hits < options.kills:
        print(f"the run ended before {options.kills} kills: --epochs {options.epochs} is too short for them")
    return 1 if wrong or hits < options.kills else 0


if __name__ == "__main__":
    sys.exit(main())
