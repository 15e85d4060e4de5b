"""The files of a run's folder: which there are, when a folder may be taken, and how they are replaced."""

import json
import os
import re
import secrets
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from config import Config, ConfigError
from sasa.console import one_line
from sasa.files import json_text, read_regular, write_text

LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"
CONFIG, LOG, LOG_CSV, SUMMARY = "config.json", "log.jsonl", "log.csv", "summary.json"
IMAGES = "images.jsonl.gz"  # sasa/training/image_list.py
RUN_FILES = (LAST, PREVIOUS, BEST, CONFIG, LOG, LOG_CSV, SUMMARY, IMAGES)
CONFIG_BYTES = 2**20  # of a config.json: thousands of times as long as one is
RUN_ID, START = "run_id", "start"  # of config.json, beside the settings: whose files these are, and `Start`
EVENTS, PREVIEW = "events.out.tfevents.*", "progress.png"
OWN_EVENTS = re.compile(r"events\.out\.tfevents\.\d{10}\.")
KEPT = re.compile(r"state-(\d{4,})\.pt")  # the state after that many epochs: --keep-states
# Of `sasa.files.replacing`.
UNFINISHED = re.compile(r"\.((last|best|state-\d{4,})\.pt|images\.jsonl\.gz)\.[0-9a-f]{16}\.tmp")


def write_json(path: Path, values: dict[str, Any]) -> None:
    write_text(path, json_text(values, indent=2) + "\n")


def new_run_id() -> str:
    return secrets.token_hex(8)


class Start(NamedTuple):
    """What a run was started with beside its settings: enough to start it again where no checkpoint was written.

    Attributes:
        recipe: what the recipe provided of the settings.
        global_batch: images of a step over all ranks.
        init_from: the checkpoint of --init-from; None: new weights.
    """

    recipe: dict[str, Any]
    global_batch: int
    init_from: str | None


class RunRecord(NamedTuple):
    """What a config.json holds; an older version wrote no `start`, one before that no `run_id` either."""

    config: dict[str, Any]
    run_id: str | None
    start: Start | None


def read_config(folder: Path) -> RunRecord:
    """A run's config.json.

    Raises:
        ConfigError: the file is damaged.
    """
    path = folder / CONFIG
    try:
        values = dict(json.loads(read_regular(path, CONFIG_BYTES)))
        run_id, start = values.pop(RUN_ID, None), values.pop(START, None)
        start = None if start is None else _checked(Start(**start))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path}: damaged ({one_line(error, 200)}): --name names another folder") from error
    return RunRecord(values, run_id if isinstance(run_id, str) else None, start)


def _checked(start: Start) -> Start:
    """Raises ValueError for what no run writes."""
    is_batch = type(start.global_batch) is int and start.global_batch > 0
    if not (isinstance(start.recipe, dict) and is_batch and isinstance(start.init_from, str | None)):
        raise ValueError(f"its {START} is not what a run writes")
    return start


def is_run(folder: Path) -> bool:
    """Whether the folder's config.json is one that a run wrote."""
    try:
        values = read_config(folder).config
    except ConfigError:
        return False
    return {"model_name", "dataset", "seed"} <= values.keys()


def held_files(folder: Path) -> list[Path]:
    """What the folder holds under the names of a run's files.

    Raises:
        ConfigError: the folder cannot be read.
    """
    try:
        files = [folder / name for name in RUN_FILES if os.path.lexists(folder / name)]
        return files + list(kept_states(folder).values())
    except OSError as error:
        raise _not_writable(folder, error) from error


def kept_name(epochs: int) -> str:
    """The file of the state after so many epochs."""
    return f"state-{epochs:04d}.pt"


def kept_states(folder: Path) -> dict[int, Path]:
    """The states that --keep-states has left in a folder, by the epochs that they are after. Raises OSError."""
    if not folder.is_dir():
        return {}
    found = ((KEPT.fullmatch(path.name), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in sorted(found, key=lambda pair: pair[1]) if match}


def refuse_other_run(folder: Path) -> None:
    """A folder that holds a run is not trained into unless it is to be overwritten or resumed. Raises ConfigError."""
    if held_files(folder):
        raise ConfigError(
            f"{folder} already holds a run: --resume goes on with it, --overwrite replaces it, --name names another"
        )


def refuse_foreign_files(folder: Path) -> None:
    """--overwrite replaces what a run wrote and nothing else. Raises ConfigError."""
    held = held_files(folder)
    odd = [path for path in held if path.is_dir() and not path.is_symlink()]
    if odd:
        raise ConfigError(f"--overwrite: {odd[0]} is a folder, which no run wrote; --name names another run")
    if held and not is_run(folder):
        raise ConfigError(
            f"--overwrite: {held[0]} is of no run: {folder / CONFIG} is not a run's configuration; --name names another"
        )


def make_folder(folder: Path) -> None:
    """Raises ConfigError where the folder cannot be written to: before an hour of training, not after."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # without a name: another run may be doing the same
            pass
    except OSError as error:
        raise _not_writable(folder, error) from error


def claim_folder(folder: Path, config: Config, run_id: str, start: Start, overwrite: bool, is_over: bool) -> None:
    """The folder is this run's from here on: with `overwrite` the old run's files go; config.json is written.

    config.json is replaced last, and never absent: cut short, the folder is still known as a run's. Until a resumed run
    has done the steps that it has left, no summary.json says that it is finished; best.pt, which says what it is of,
    stays until there is another.

    Args:
        is_over: no step is left to do.

    Raises:
        ConfigError: the folder cannot be written to.
    """
    try:
        if overwrite:
            refuse_foreign_files(folder)
            held = [path for path in held_files(folder) if path.name != CONFIG]
            events = [path for path in folder.glob(EVENTS) if OWN_EVENTS.match(path.name)]
            for path in [*held, *events, *folder.glob(PREVIEW)]:
                path.unlink()
        elif not is_over:
            (folder / SUMMARY).unlink(missing_ok=True)
        for path in folder.glob(".*.tmp"):  # of a process that was killed while it saved: as large as a checkpoint
            if UNFINISHED.fullmatch(path.name):
                path.unlink()
        write_json(folder / CONFIG, config.to_dict() | {RUN_ID: run_id, START: start._asdict()})
    except OSError as error:
        raise _not_writable(folder, error) from error


def _not_writable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"--output-dir, --name: {folder} cannot be written to: {error.strerror or error}")
