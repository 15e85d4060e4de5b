"""The files of a run's folder: which there are, when a folder may be taken, and how they are replaced."""

import json
import os
import re
import secrets
from pathlib import Path
from typing import Any

from config import Config, ConfigError
from sasa.console import one_line
from sasa.files import json_text, read_regular, write_text

LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"
CONFIG, LOG, LOG_CSV, SUMMARY = "config.json", "log.jsonl", "log.csv", "summary.json"
IMAGES = "images.jsonl.gz"  # sasa/training/image_list.py
RUN_FILES = (LAST, PREVIOUS, BEST, CONFIG, LOG, LOG_CSV, SUMMARY, IMAGES)
CONFIG_BYTES = 2**20  # of a config.json: thousands of times as long as one is
RUN_ID = "run_id"  # of config.json: whose files these are
EVENTS, PREVIEW = "events.out.tfevents.*", "progress.png"
OWN_EVENTS = re.compile(r"events\.out\.tfevents\.\d{10}\.")
KEPT = re.compile(r"state-(\d{4,})\.pt")  # the state after that many epochs: --keep-states
# Of `sasa.files.replacing`.
UNFINISHED = re.compile(r"\.((last|best|state-\d{4,})\.pt|images\.jsonl\.gz)\.[0-9a-f]{16}\.tmp")


def write_json(path: Path, values: dict[str, Any]) -> None:
    write_text(path, json_text(values, indent=2) + "\n")


def new_run_id() -> str:
    return secrets.token_hex(8)


def read_config(folder: Path) -> tuple[dict[str, Any], str | None]:
    """The configuration in a run's config.json, and the run's id: None where an older version wrote it.

    Raises:
        ConfigError: the file is damaged.
    """
    path = folder / CONFIG
    try:
        values = dict(json.loads(read_regular(path, CONFIG_BYTES)))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path}: damaged ({one_line(error, 200)}): --name names another folder") from error
    run_id = values.pop(RUN_ID, None)
    return values, run_id if isinstance(run_id, str) else None


def is_run(folder: Path) -> bool:
    """Whether the folder's config.json is one that a run wrote."""
    try:
        values, _ = read_config(folder)
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
        probe = folder / ".probe"
        write_text(probe, "")
        probe.unlink()
    except OSError as error:
        raise _not_writable(folder, error) from error


def claim_folder(folder: Path, config: Config, run_id: str, overwrite: bool) -> None:
    """The folder is this run's from here on: with `overwrite` the old run's files go; config.json is written."""
    if overwrite:
        refuse_foreign_files(folder)
        events = [path for path in folder.glob(EVENTS) if OWN_EVENTS.match(path.name)]
        for path in [*held_files(folder), *events, *folder.glob(PREVIEW)]:
            path.unlink()
    for path in folder.glob(".*.tmp"):  # of a process that was killed while it saved: as large as a checkpoint
        if UNFINISHED.fullmatch(path.name):
            path.unlink()
    write_json(folder / CONFIG, config.to_dict() | {RUN_ID: run_id})


def _not_writable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"--output-dir, --name: {folder} cannot be written to: {error.strerror}")
