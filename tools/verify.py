"""Replay stretches of a finished run and compare them with its digests, bit for bit.

    python -m tools.verify RUN [--segments 3] [--epochs A B]

RUN is the folder of a run that was trained with --keep-states N; a stretch begins at a kept state and goes to the next.
Without kept states there is one, the whole run from its seed. First the run's files are held against each other:
config.json, log.jsonl and every kept state against last.pt.

Exit code 0: all equal. 1: something differs; the first epoch and group are named, and the tensor where that epoch's
state was kept. 2: the run cannot be compared here, with the reason: another torch, machine, kernel, number of threads
or other data. docs/training.md has more.
"""

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import train
from config import Config, ConfigError
from preprocess import DataError
from sasa.console import Parser, as_path, as_path_text, fail, print_error, printable, raise_if_reader_is_gone, run_main
from sasa.data.fingerprint import differences as data_differences
from sasa.training import checkpoint, digests, distributed, environment
from sasa.training.checkpoint import CheckpointError
from sasa.training.distributed import SharedError
from sasa.training.files import LAST, LOG, SUMMARY, kept_states, read_config
from sasa.training.monitor import Silent
from sasa.training.network import build_network
from sasa.training.resume import RunSpec, changed_keys
from sasa.training.run import Run, set_up
from sasa.training.saving import Saver
from sasa.training.signals import StopRequest
from tools.arguments import positive
from tools.runs import RunsError, read_json, read_rows

PROG = "tools.verify"


class Refused(Exception):
    """The run cannot be compared here; the message says why."""


class Record(NamedTuple):
    """What a finished run has left."""

    folder: Path
    config: Config
    state: dict[str, Any]  # of last.pt
    rows: list[dict[str, Any]]  # of log.jsonl, whole epochs only
    summary: dict[str, Any]
    kept: dict[int, Path]


class Segment(NamedTuple):
    """Epochs to replay: those after `start`, whose state is there or is the seed's, up to `stop`."""

    start: int
    stop: int

    def name(self) -> str:
        """The epochs that are replayed, for a person."""
        first = self.start + 1
        return f"epoch {first}" if first == self.stop else f"epochs {first} to {self.stop}"


# ---- what the run has left ------------------------------------------------------------------------------------------


def read_record(folder: Path) -> Record:
    """The files of a finished run.

    Raises:
        Refused: it is no finished run with digests.
        CheckpointError, ConfigError: its last.pt or config.json cannot be read.
    """
    summary = read_json(folder / SUMMARY)
    if summary is None:
        raise Refused(f"{printable(folder)}: no whole {SUMMARY} in it: not a finished run")
    if not isinstance(summary.get("environment"), dict):
        raise Refused(f"{printable(folder / SUMMARY)}: has no environment: a run of an older version")
    state = checkpoint.load_run(folder / LAST)
    done = len(state["progress"]["rows"])
    try:
        rows = read_rows(folder / LOG)[:done]
    except RunsError as error:
        raise Refused(str(error)) from error
    if len(rows) < done or not all(isinstance(row.get("digests"), dict) for row in rows) or not rows:
        raise Refused(f"{printable(folder / LOG)}: not a digest for each of {done} epochs: trained with --no-digest?")
    config = Config.from_dict(state["config"])
    return Record(folder, config, state, rows, summary, kept_states(folder))


def check_environment(record: Record) -> None:
    """Raises Refused where other bits are to be expected."""
    before = record.summary["environment"]
    device = torch.device("cuda" if before.get("cuda") != "none" else "cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise Refused(f"device was {before.get('device')}, is cpu")
    now = environment.describe(device, None if before.get("backend") == "none" else record.config.backend)
    differing = environment.differences(before, now)
    if differing:
        raise Refused("; ".join(differing))
    if environment.digest(before) != record.summary.get("environment_digest"):
        raise Refused(f"{SUMMARY}: its environment is not the one of its digest")
    if record.summary.get("data_changes"):
        raise Refused(f"the run went on with changed data: {record.summary['data_changes'][0]}")


def contradictions(record: Record) -> Iterator[str]:
    """What differs among the files of the run, a line each: nothing is replayed for it."""
    for line in changed_keys(record.config, Config.from_dict(read_config(record.folder).config)):
        yield f"config.json and {LAST}: {line}"
    for row, own in zip(record.rows, record.state["progress"]["rows"], strict=True):
        for group in differing_groups(row["digests"], own.get("digests", {})):
            yield f"epoch {own['epoch']}: {LOG} has another digest of {group} than {LAST}"
    buffers = [name for name, _ in build_network(record.config, _classes(record)).named_buffers()]
    for epoch, path in record.kept.items():
        state = checkpoint.load_run(path)
        for line in changed_keys(record.config, Config.from_dict(state["config"])):
            yield f"{path.name} and {LAST}: {line}"
        if 0 < epoch <= len(record.rows):
            found = digests.of_state(state, buffers)
            for group in differing_groups(record.rows[epoch - 1]["digests"], found):
                yield f"epoch {epoch}: {path.name} is not what {LOG} has the digest of: {group}"


def differing_groups(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """The names of the groups whose digests are not the same, in the order of `digests.GROUPS`."""
    return [group for group in digests.GROUPS if one.get(group) != other.get(group)]


def _classes(record: Record) -> int:
    return checkpoint.classes_of(record.state["model"])


# ---- replaying ------------------------------------------------------------------------------------------------------


def segments(record: Record, count: int, epochs: tuple[int, int] | None) -> list[Segment]:
    """The stretches to replay: the one with `epochs`, else `count` of those between kept states, evenly spread.

    Raises:
        Refused: epochs that the run has not.
    """
    done = len(record.rows)
    starts = sorted({0, *(epoch for epoch in record.kept if epoch < done)})
    if epochs is not None:
        first, last = epochs
        if not 1 <= first <= last <= done:
            raise Refused(f"--epochs {first} {last}: the run has epochs 1 to {done}")
        return [Segment(max(start for start in starts if start < first), last)]
    every = [Segment(*pair) for pair in zip(starts, [*starts[1:], done], strict=True)]
    if count >= len(every):
        return every
    places = {round(i * (len(every) - 1) / max(count - 1, 1)) for i in range(count)}
    return [every[place] for place in sorted(places)]


def replay(record: Record, segment: Segment, config: Config) -> str | None:
    """Train a stretch again; None where every epoch's digests are those of log.jsonl, else what differs first.

    Raises:
        Refused: other data than the run's, epochs of another environment, or a beginning that was not kept.
        SharedError: the machine or the data do not allow it.
    """
    for row in record.rows[segment.start : segment.stop]:
        if row.get("environment") != record.summary["environment_digest"]:
            raise Refused(f"epoch {row['epoch']} was trained in another environment than the run's last")
    path = record.kept.get(segment.start)
    state = None if path is None else checkpoint.load_run(path)
    if state is None and record.state.get("init_from") is not None:
        raise Refused(f"the run began with the weights of {record.state['init_from']}, and no state of then was kept")
    batch = record.state["progress"]["global_batch"]
    run = set_up(RunSpec(config, record.folder, {}, True, state, record.state["run_id"], global_batch=batch))
    try:
        changed = data_differences(record.state["data"], run.identity.data)
        if changed:
            raise Refused(f"other data: {'; '.join(changed)}")
        if state is not None:
            run.restore(state)
        return _replay(record, segment, run)
    finally:
        run.data.close()


def _replay(record: Record, segment: Segment, run: Run) -> str | None:
    saver, stop = Saver(run.config, Silent()), StopRequest()
    for epoch in range(segment.start + 1, segment.stop + 1):
        train.train_epoch(run, Silent(), saver, stop, tqdm(disable=True), train.CLASSIFICATION)
        distributed.broadcast(run.buffers())
        wanted, found = record.rows[epoch - 1]["digests"], run.digests()
        groups = differing_groups(wanted, found)
        if groups:
            line = f"epoch {epoch} differs in {groups[0]}"
            line += f" (and {', '.join(groups[1:])})" if groups[1:] else ""
            line += f": {LOG} has {str(wanted.get(groups[0]))[:16]}, the replay {str(found.get(groups[0]))[:16]}"
            if epoch in record.kept:
                kept = checkpoint.load_run(record.kept[epoch])
                place = first_difference(kept, run.state())
                line += f"; the kept state {'is equal' if place is None else f'differs first in {place}'}"
            return line
        run.progress.open_epoch()
    return None


def first_difference(kept: dict[str, Any], ours: dict[str, Any]) -> str | None:
    """The first tensor or number of a state that differs, by its path."""
    for part in ("model", "optimizer", "scaler", "ema", "generators"):
        place = _first(kept[part], ours[part], part)
        if place is not None:
            return place
    return None


def _first(one: Any, other: Any, path: str) -> str | None:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same = one.dtype == other.dtype and torch.equal(one.cpu(), other.cpu())
        return None if same else path
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return path
        places = (_first(one[key], other[key], f"{path} {key}") for key in one)
        return next((place for place in places if place is not None), None)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            return path
        places = (_first(a, b, f"{path} {i}") for i, (a, b) in enumerate(zip(one, other, strict=True)))
        return next((place for place in places if place is not None), None)
    return None if one == other else path


# ---- the command ----------------------------------------------------------------------------------------------------


def parse(arguments: list[str] | None) -> tuple[Parser, argparse.Namespace]:
    parser = Parser("python -m tools.verify", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=as_path, metavar="RUN", help="the folder of a finished run")
    parser.add_argument("--segments", type=positive, default=3, metavar="N",
                        help="replay this many stretches between kept states, evenly spread (default: 3)")  # fmt: skip
    parser.add_argument("--epochs", type=positive, nargs=2, metavar=("A", "B"),
                        help="replay epochs A to B instead, from the newest kept state before them")  # fmt: skip
    parser.add_argument("--data-dir", type=as_path_text, help="read the data set from this folder (default: the run's)")
    return parser, parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    _, args = parse(arguments)
    try:
        return verify(args.run, args.segments, tuple(args.epochs) if args.epochs else None, args.data_dir)
    except SharedError as shared:
        fail(PROG, shared.error)
    except Refused as error:
        print_error(PROG, f"not compared: {error}")
    except (CheckpointError, ConfigError, DataError, OSError) as error:
        raise_if_reader_is_gone(error)
        print_error(PROG, error)
    return 2


def verify(folder: Path, count: int, epochs: tuple[int, int] | None, data_dir: str | None) -> int:
    """Compare a run with its replay; returns 0 or 1.

    Raises:
        Refused: it cannot be compared here.
    """
    record = read_record(folder)
    check_environment(record)
    chosen = segments(record, count, epochs)
    wrong = list(contradictions(record))
    for line in wrong:
        print(line)
    config = dataclasses.replace(
        record.config, save_every=1, save_minutes=0.0, max_steps=None, progress=False,
        data_dir=data_dir or record.config.data_dir,
    )  # fmt: skip
    for segment in chosen:
        found = replay(record, segment, config)
        print(f"{segment.name()}: {found or 'equal'}", flush=True)
        wrong += [found] if found else []
    if record.config.deterministic is False and record.summary["environment"]["device"] != "cpu" and wrong:
        print("the run was on a GPU without --deterministic: two runs of it may differ")
    return 1 if wrong else 0


if __name__ == "__main__":
    run_main(main)
