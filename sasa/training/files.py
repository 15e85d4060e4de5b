"""The files of a run's folder: which there are, when a folder may be taken, and how they are replaced."""

import json
import re
from pathlib import Path
from typing import Any

from config import Config, ConfigError
from sasa.files import write_text

LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"
CONFIG, LOG, SUMMARY = "config.json", "log.jsonl", "summary.json"
RUN_FILES = (LAST, PREVIOUS, BEST, CONFIG, LOG, SUMMARY)
EVENTS, PREVIEW = "events.out.tfevents.*", "progress.png"
UNFINISHED = re.compile(r"\.(last|best)\.pt\.[0-9a-f]{16}\.tmp")  # `sasa.files.replacing`


def write_json(path: Path, values: dict[str, Any]) -> None:
    write_text(path, json.dumps(values, indent=2) + "\n")


def read_config(path: Path) -> dict[str, Any]:
    """A run's config.json.

    Raises:
        ConfigError: the file is damaged.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: damaged ({error}): --overwrite starts anew") from error


def held_files(folder: Path) -> list[Path]:
    """The files of a run that the folder holds.

    Raises:
        ConfigError: the folder cannot be read.
    """
    try:
        return [folder / name for name in RUN_FILES if (folder / name).exists()]
    except OSError as error:
        raise _not_writable(folder, error) from error


def refuse_other_run(folder: Path) -> None:
    """A folder that holds a run is not trained into unless it is to be overwritten or resumed. Raises ConfigError."""
    if held_files(folder):
        raise ConfigError(
            f"{folder} already holds a run: --resume goes on with it, --overwrite replaces it, --name names another"
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


def claim_folder(folder: Path, config: Config, overwrite: bool) -> None:
    """The folder is this run's from here on: with `overwrite` the old run's files go; config.json is written."""
    if overwrite:
        for path in [*held_files(folder), *folder.glob(EVENTS), *folder.glob(PREVIEW)]:
            path.unlink()
    for path in folder.glob(".*.tmp"):  # of a process that was killed while it saved: as large as a checkpoint
        if UNFINISHED.fullmatch(path.name):
            path.unlink()
    write_json(folder / CONFIG, config.to_dict())


def _not_writable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"--output-dir, --name: {folder} cannot be written to: {error.strerror}")
