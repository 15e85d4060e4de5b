"""How a stage runs: its units one after the other within a limit of time, each result kept as soon as it is there."""

import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sasa.console import one_line

NOT_REACHED = "not reached in the stage's time: run the stage again, it goes on from here"
OUTPUT_TAIL = 600  # characters of a failed command that its result keeps


def print_at_once(line: str) -> None:
    """A process that is ended has then told what it found."""
    print(line, flush=True)


class DeviceLost(Exception):
    """The CUDA device answers no more in this process."""


class Unmet(Exception):
    """Why a unit cannot run on this machine, in one line; no failure."""


@dataclass
class Lab:
    """What the stages share.

    time: `timer.CudaTimer`'s way of timing, or a stub of it. shell: runs a command for at most some seconds.
    dry: a walk through the stages on the CPU, with sizes that only exercise the code.
    """

    device: torch.device
    backend: str
    timer: Any
    shell: Callable[[list[str], float], subprocess.CompletedProcess]
    dry: bool = False


@dataclass
class Stage:
    """One run of a stage: `found` has the results by unit, also of an earlier run, and `keep` writes them.

    keeps_errors: units that failed before are not done again.
    """

    found: dict[str, dict]
    until: float  # time.monotonic()
    keep: Callable[[], None]
    keeps_errors: bool = False
    report: Callable[[str], None] = print_at_once
    clock: Callable[[], float] = time.monotonic
    has_run: bool = False  # a unit has, and so the next one has not the whole time

    @property
    def left(self) -> float:
        """Seconds."""
        return self.until - self.clock()

    def unit(self, name: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """`run`'s result, kept under `name`; an error is a result too, so that the stage goes on.

        A unit that an earlier run has done is not done again; one that failed, or was not reached, is.

        Raises:
            DeviceLost: after an error that leaves CUDA unusable in this process; the result is kept.
        """
        earlier = self.found.get(name, {"missing": True})
        anew = {"missing", "not_reached", "unmet"} | (set() if self.keeps_errors else {"error"})
        if not earlier.keys() & anew:
            return earlier
        if self.left <= 0:
            result = {"not_reached": NOT_REACHED}
        else:
            start = self.clock()
            try:
                result = run()
            except Unmet as reason:
                result = {"unmet": str(reason)}
            except subprocess.TimeoutExpired as error:  # after what was left of the stage
                result = {"not_reached": NOT_REACHED} if self.has_run else {"error": one_line(error, OUTPUT_TAIL)}
            except Exception as error:  # whatever a kernel, a compiler or a driver raises
                result = {"error": f"{type(error).__name__}: {one_line(error, OUTPUT_TAIL)}"}
            result["seconds"] = round(self.clock() - start, 2)
            self.has_run = True
        self.found[name] = result
        self.keep()
        self.report(f"  {name}: {line_of(result)}")
        if _is_lost(result.get("error", "")):
            raise DeviceLost(name)
        return result


def _is_lost(error: str) -> bool:
    """Whether the process can use its device no more.

    Triton says "Triton Error [CUDA]: ..." of a launch that was refused too, after which the device is as it was.
    """
    fatal = ("illegal", "misaligned", "launch failure", "uncorrectable", "assert", "timed out", "hardware stack")
    return "CUDA error" in error or ("Error [CUDA]" in error and any(word in error for word in fatal))


def line_of(result: dict[str, Any]) -> str:
    """A result for a person, in one line."""
    for key in ("error", "unmet", "not_reached"):
        if key in result:
            return f"{key.upper() if key == 'error' else key.replace('_', ' ')}: {result[key]}"
    return ", ".join(f"{key} {number(value)}" for key, value in result.items() if not isinstance(value, (dict, list)))


def number(value: Any) -> str:
    """A figure with four digits; anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def run_command(command: list[str], seconds: float) -> subprocess.CompletedProcess:
    """Runs a command and keeps what it prints.

    Raises:
        subprocess.TimeoutExpired: it took more than `seconds`.
    """
    return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=max(seconds, 1))


def checked(done: subprocess.CompletedProcess) -> str:
    """The output of a command.

    Raises:
        RuntimeError: it failed; with the end of what it printed.
    """
    if done.returncode:
        tail = one_line((done.stdout + "\n" + done.stderr)[-OUTPUT_TAIL:])
        raise RuntimeError(f"exit code {done.returncode}: {tail}")
    return done.stdout
