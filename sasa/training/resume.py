"""From a command to the specification of a run: which configuration, which folder, which state to continue from."""

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

import preprocess
from config import Config, ConfigError, Settings, flag_of, nominal_batch, resolve
from sasa.console import printable
from sasa.data.fingerprint import differences as data_differences
from sasa.data.fingerprint import only_sizes_differ
from sasa.settings import renamed
from sasa.training import checkpoint, class_weights, distributed
from sasa.training.cli import Command
from sasa.training.device import AMP_NAMES, pick_amp, pick_device
from sasa.training.files import (
    CONFIG,
    LAST,
    PREVIOUS,
    RunRecord,
    held_files,
    read_config,
    refuse_foreign_files,
    refuse_other_run,
)
from sasa.training.lock import FolderLock

SMALL_FORM_LIMIT = 64  # pixels: images up to this side get the small form of the network


@dataclass(frozen=True)
class RunSpec:
    """The run that a command names, before anything of it is set up.

    Attributes:
        config: settled where `started`, else with open values that `set_up` fills in.
        recipe: the values that the recipe provides, of the fields that the command line leaves to it.
        started: the configuration is that of a run which was set up before.
        state: to go on from; None: step 0.
        run_id: of the run that goes on; None: a new one.
        source: the folder that the state was read from.
        global_batch: images of a step over all ranks, of a run that was started; None: those of these ranks.
        init_from: the checkpoint whose weights the run begins with, or began with where there is a state.
    """

    config: Settings
    folder: Path
    recipe: dict[str, Any]
    started: bool = False
    state: dict[str, Any] | None = None
    run_id: str | None = None
    source: Path | None = None
    global_batch: int | None = None
    init_from: str | None = None


def new_config(given: dict[str, Any]) -> Config:
    """The configuration of a new run of train.py by its flags, a file of --class-weights not read yet."""
    dataset = given.get("dataset", "auto")
    return resolve(given, auto_dataset(given) if dataset == "auto" else dataset, distributed.world_size())


def specify_run(
    command: Command,
    lock: FolderLock,
    settings: type[Settings] = Config,
    new: Callable[[dict[str, Any]], Settings] = new_config,
) -> RunSpec:
    """The run that a training command names; its folder is made and locked. For the main rank: it reads the folder.

    Args:
        settings: the kind of configuration. new: the one of a new run by its flags.

    Raises:
        ConfigError, CheckpointError: a folder that holds another run, a state that cannot be gone on from, or flags
            that would change the run's result.
    """
    given = command.given
    if command.resume:
        return _specify_from_file(Path(command.resume), given, lock, settings)
    config = new(given)
    folder = Path(config.output_dir, config.name or config.default_name())
    if command.resume is None:
        config = dataclasses.replace(config, **settled_weights(given))
    lock.acquire(folder)
    if command.resume is None:
        if command.overwrite:
            refuse_foreign_files(folder)
        else:
            refuse_other_run(folder)
        return RunSpec(config, folder, _left_to_recipe(config, given), init_from=command.init_from)
    found = checkpoint.newest(folder)
    if found is None:
        print(f"--resume: no checkpoint was ever written to {folder}: starting at step 0")
        if (folder / CONFIG).exists():
            return _started_again(read_config(folder), command, folder, settings)
        config = dataclasses.replace(config, **settled_weights(given))
        return RunSpec(config, folder, _left_to_recipe(config, given), init_from=command.init_from)
    state, path, problems = found
    for problem in problems:
        print(f"--resume: {problem}: using {path.name}, the whole one before it")
    _refuse_another_runs(state, folder)
    spec = _resumed(state, path, given, folder, settings)
    if path.name == PREVIOUS and os.path.lexists(folder / LAST):  # or the next save would put it in this one's place
        (folder / LAST).replace(folder / f"damaged-{LAST}")
    if command.init_from is not None:
        print(f"--init-from {command.init_from}: not read, the run goes on from {path}")
    return spec


def _specify_from_file(path: Path, given: dict[str, Any], lock: FolderLock, settings: type[Settings]) -> RunSpec:
    """--resume PATH: in the file's own folder, or in another one, which has to be empty."""
    state = checkpoint.load_run(path)
    folder = path.parent
    if folder.name in ("", ".."):  # of a path as it is typed in the run's folder or below: no name for a run
        folder = folder.resolve()
    own = folder.absolute()
    if "output_dir" in given or "name" in given:
        name = given.get("name") or state["config"].get("name") or own.name
        folder = Path(given.get("output_dir", own.parent), name)
    if folder.absolute() != own and (not folder.exists() or not folder.samefile(own)):
        if held_files(folder):
            raise ConfigError(f"--resume {path} into {folder}: it already holds a run; allowed is an empty folder")
        spec = dataclasses.replace(_resumed(state, path, given, folder, settings), run_id=None)
        lock.acquire(folder)
        refuse_other_run(folder)
        return spec
    spec = _resumed(state, path, given, folder, settings)
    lock.acquire(folder)
    _refuse_another_runs(state, folder)
    return dataclasses.replace(spec, state=checkpoint.load_run(path))  # as a run that was in the folder has left it


def _refuse_another_runs(state: dict[str, Any], folder: Path) -> None:
    """The folder's files are replaced by those of the run that goes on: they must be its own. Raises ConfigError."""
    if (folder / CONFIG).exists() and read_config(folder).run_id != state["run_id"]:
        raise ConfigError(f"{folder}: its config.json is another run's than the checkpoint; --name names another")


def auto_dataset(given: dict[str, Any]) -> str:
    """What --dataset auto stands for here; prints which and why."""
    has_gpu = torch.cuda.is_available() and given.get("device") != "cpu"
    name, reason = preprocess.resolve_auto(given.get("data_dir", "datasets"), has_gpu)
    print(f"--dataset auto: {name}, {reason}")
    return name


def _started_again(record: RunRecord, command: Command, folder: Path, settings: type[Settings]) -> RunSpec:
    """A run that ended before its first save: it begins again as it was started, by its config.json.

    Raises:
        ConfigError: what it was started with is not known, or is not there.
    """
    start = record.start
    if start is None:
        raise ConfigError(
            f"--resume: {folder} holds no checkpoint, and its config.json, of an older version, does not tell all that "
            "the run was started with; --overwrite starts a new one"
        )
    if start.init_from is not None and command.init_from is None:
        raise ConfigError(
            f"--resume: {folder} holds no checkpoint, and its run was started with --init-from {start.init_from}: give "
            "it again, or the run would begin with new weights"
        )
    refuse_other_task(record.config, folder / CONFIG, settings)
    config = resumed_config(record.config, command.given, settings)
    left = _still_left(start.recipe, config, command.given)
    batch, ranks = start.global_batch, distributed.world_size()
    if batch != nominal_batch(config, ranks):
        print(f"--resume: started on {batch} images a step, goes on with them on {ranks} ranks")
    more = {"run_id": record.run_id, "global_batch": batch, "init_from": command.init_from}
    return RunSpec(config, folder, left, True, **more)


def _resumed(
    state: dict[str, Any], path: Path, given: dict[str, Any], folder: Path, settings: type[Settings]
) -> RunSpec:
    """Raises ConfigError where flags, or an edited recipe, would change the run's result."""
    refuse_other_task(state["config"], path, settings)
    config = resumed_config(state["config"], given, settings)
    left = _still_left(state["recipe"], config, given)
    more = {"global_batch": state["progress"]["global_batch"], "init_from": state.get("init_from")}
    return RunSpec(config, folder, left, True, state, state["run_id"], path.absolute().parent, **more)


def _still_left(provided: dict[str, Any], config: Settings, given: dict[str, Any]) -> dict[str, Any]:
    """What the recipe `provided` when the run was started, less what the command line gives now.

    Raises:
        ConfigError: the recipe has been edited since.
    """
    left = {key: value for key, value in renamed(provided).items() if key not in given}
    changed = recipe_changes(config, left)
    if changed:
        raise ConfigError(
            f"--resume: the recipe {config.recipe_name()} has changed since the run was started: "
            f"{'; '.join(changed)}. Give these flags with the run's values to go on with them"
        )
    return left


def refuse_other_task(saved: dict[str, Any], path: Path, settings: type[Settings]) -> None:
    """A detector's checkpoint is of no use to train.py, nor the other way round.

    Args:
        saved: the configuration that the file at `path` holds. settings: the kind that is wanted.

    Raises:
        ConfigError: it is of the other kind.
    """
    detects = "anchor_scales" in saved
    if detects != ("anchor_scales" in {f.name for f in fields(settings)}):
        what, command = ("detector", "-m sasa.detection.train") if detects else ("classification network", "train.py")
        raise ConfigError(f"{printable(path)}: belongs to a {what}, which python {command} takes")


def resumed_config(saved: dict[str, Any], given: dict[str, Any], settings: type[Settings] = Config) -> Settings:
    """The saved configuration with what the command line may change.

    Raises:
        ConfigError: flags of the command line that would change the result.
    """
    before = settings.from_dict(saved)
    config = dataclasses.replace(before, **{"max_steps": None} | settled(given, saved))
    changed = changed_keys(before, config)
    if changed:
        raise ConfigError(f"--resume: the run was started with another configuration: {'; '.join(changed)}")
    return config


def settled(given: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """The given values with what "auto" stands for here, where the saved configuration has the value itself."""
    values = given | settled_weights(given, saved)
    if values.get("dataset") == "auto":
        values["dataset"] = auto_dataset(given)
    if values.get("form") == "auto" and type(saved.get("img_size")) is int:
        values["form"] = form_of(saved["img_size"])
    if values.get("amp") == "auto":
        device = pick_device(given.get("device", saved.get("device", "auto")))
        values["amp"] = AMP_NAMES[pick_amp("auto", device)]
    return values


def settled_weights(given: dict[str, Any], saved: dict[str, Any] | None = None) -> dict[str, Any]:
    """--class-weights of the given values as the configuration holds it.

    Args:
        saved: the configuration of a run that goes on: it has the weights of a file that is gone.

    Raises:
        ConfigError: a file that cannot be read, or that holds something else.
    """
    if "class_weights" not in given:
        return {}
    value, kept = given["class_weights"], (saved or {}).get("class_weights")
    if class_weights.is_of_a_file(kept) and class_weights.is_gone(value):
        print(f"--class-weights {printable(value)}: the file is gone, the run keeps the weights that it had")
        return {"class_weights": kept}
    return {"class_weights": class_weights.settle(value)}


def form_of(image_size: int) -> str:
    """The form of network that --form auto stands for."""
    return "small" if image_size <= SMALL_FORM_LIMIT else "imagenet"


def changed_keys(before: Settings, now: Settings) -> list[str]:
    """What differs between a checkpoint's configuration and this run's and could change the result, one line each."""
    saved, ours = before.to_dict(), now.to_dict()
    changed = [f.name for f in fields(now) if not f.metadata["free"] and saved[f.name] != ours[f.name]]
    if "epochs" in changed and now.schedule == "step" and now.epochs > before.epochs:
        changed.remove("epochs")  # the rate of the epochs already trained does not depend on how many follow
    return [f"{flag_of(key)} was {saved[key]}, is {ours[key]}" for key in sorted(changed)]


def _left_to_recipe(config: Settings, given: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.recipe_values().items() if key not in given}


def recipe_changes(config: Settings, left: dict[str, Any]) -> list[str]:
    """How today's recipe differs from what it provided when the run was started, one line each."""
    now = config.recipe_values()
    return [f"{flag_of(key)} was {left[key]}, is {now.get(key)}" for key in left if left[key] != now.get(key)]


# ---- the data and the version that the state was made with ----------------------------------------------------------


def check_data(
    saved: dict[str, Any],
    now: dict[str, Any],
    allow: bool,
    skip_bad_images: bool = False,
    images: Callable[[], list[str]] = list,
) -> list[str]:
    """How the data set (`preprocess.data_identity`) differs from the saved run's, one line each.

    Args:
        skip_bad_images: files of another size are allowed, as damaged ones are then skipped.
        images: names the first images that differ, in a line.

    Raises:
        ConfigError: it does, and that is not allowed.
    """
    try:
        lines = data_differences(saved, now)
        lines += images() if lines else []
        resized = only_sizes_differ(saved, now)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ConfigError("--resume: the checkpoint's description of its data set is damaged") from error
    if lines and not allow and not (skip_bad_images and resized):
        hint = "; some files are of another size, and --skip-bad-images leaves out damaged ones" if resized else ""
        raise ConfigError(
            f"--resume: the data set has changed since the run was saved: {'; '.join(lines)}. --allow-changed-data "
            f"goes on with it all the same{hint}"
        )
    return lines


def report_changes(
    state: dict[str, Any], sync_bn: bool, data_changes: list[str], environment: Callable[[], str]
) -> None:
    """Why the run is no longer bitwise the one that was interrupted: other data, another torch, other ranks or machine.

    Args:
        environment: the digest of what the run's bits depend on here (`sasa/training/environment.py`).
    """
    if not distributed.is_main():
        return
    for line in data_changes:
        print(f"--resume: goes on although the data set has changed: {line}")
    if state["torch"] != str(torch.__version__):
        print(f"--resume: saved by torch {state['torch']}, goes on with {torch.__version__}: no longer bitwise")
    saved, now = len(state["generators"]), distributed.world_size()
    rows = state["progress"]["rows"]  # of the epochs that are done; those of an older version have no environment
    known = rows[-1].get("environment") if rows else None
    is_alike = state["torch"] == str(torch.__version__) and saved == now
    if is_alike and known is not None and known != environment():
        print(
            "--resume: another processor, GPU, thread count, kernel or library version than that of the last whole "
            "epoch: no longer bitwise; `environment` of summary.json says what it ended with"
        )
    if saved != now:
        norm = "" if sync_bn else ", batch norm's statistics are of other parts of the batch (no --sync-bn)"
        print(
            f"--resume: saved by {saved} ranks, goes on with {now}: same step, global batch, order and rate; no longer "
            f"bitwise the run of {saved}: sums over the batch round otherwise{norm}, generators are dealt anew"
        )
