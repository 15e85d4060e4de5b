"""From a command to the specification of a run: which configuration, which folder, which state to continue from."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

import preprocess
from config import Config, ConfigError, Settings, flag_of, resolve
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
    held_files,
    make_folder,
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
    """

    config: Settings
    folder: Path
    recipe: dict[str, Any]
    started: bool = False
    state: dict[str, Any] | None = None
    run_id: str | None = None
    source: Path | None = None


def new_config(given: dict[str, Any]) -> Config:
    """The configuration of a new run of train.py by its flags."""
    given = given | settled_weights(given)
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
    make_folder(folder)
    lock.acquire(folder)
    if command.resume is None:
        if command.overwrite:
            refuse_foreign_files(folder)
        else:
            refuse_other_run(folder)
        return RunSpec(config, folder, _left_to_recipe(config, given))
    found = checkpoint.newest(folder)
    if found is None:
        print(f"--resume: no checkpoint was ever written to {folder}: starting at step 0")
        if not (folder / CONFIG).exists():
            return RunSpec(config, folder, _left_to_recipe(config, given))
        saved, run_id = read_config(folder)
        config = resumed_config(saved, given, settings)
        return RunSpec(config, folder, _left_to_recipe(config, given), True, run_id=run_id)
    state, path, problems = found
    for problem in problems:
        print(f"--resume: {problem}: using {path.name}, the whole one before it")
    _refuse_another_runs(state, folder)
    spec = _resumed(state, given, folder, settings, folder)
    if path.name == PREVIOUS and (folder / LAST).exists():  # the next save must not put a damaged file in its place
        (folder / LAST).replace(folder / f"damaged-{LAST}")
    return spec


def _specify_from_file(path: Path, given: dict[str, Any], lock: FolderLock, settings: type[Settings]) -> RunSpec:
    """--resume PATH: in the file's own folder, or in another one, which has to be empty."""
    state = checkpoint.load_run(path)
    own = path.absolute().parent
    folder = path.parent
    if "output_dir" in given or "name" in given:
        name = given.get("name") or state["config"].get("name") or own.name
        folder = Path(given.get("output_dir", own.parent), name)
    if folder.absolute() != own and (not folder.exists() or not folder.samefile(own)):
        if held_files(folder):
            raise ConfigError(f"--resume {path} into {folder}: it already holds a run; allowed is an empty folder")
        spec = dataclasses.replace(_resumed(state, given, folder, settings, own), run_id=None)
        make_folder(folder)
        lock.acquire(folder)
        refuse_other_run(folder)
        return spec
    spec = _resumed(state, given, folder, settings, own)
    make_folder(folder)
    lock.acquire(folder)
    _refuse_another_runs(state, folder)
    return dataclasses.replace(spec, state=checkpoint.load_run(path))  # as a run that was in the folder has left it


def _refuse_another_runs(state: dict[str, Any], folder: Path) -> None:
    """The folder's files are replaced by those of the run that goes on: they must be its own. Raises ConfigError."""
    if (folder / CONFIG).exists():
        _, run_id = read_config(folder)
        if run_id != state["run_id"]:
            raise ConfigError(f"{folder}: its config.json is another run's than the checkpoint; --name names another")


def auto_dataset(given: dict[str, Any]) -> str:
    """What --dataset auto stands for here; prints which and why."""
    has_gpu = torch.cuda.is_available() and given.get("device") != "cpu"
    name, reason = preprocess.resolve_auto(given.get("data_dir", "datasets"), has_gpu)
    print(f"--dataset auto: {name}, {reason}")
    return name


def _resumed(
    state: dict[str, Any], given: dict[str, Any], folder: Path, settings: type[Settings], source: Path
) -> RunSpec:
    """Raises ConfigError where flags, or an edited recipe, would change the run's result."""
    config = resumed_config(state["config"], given, settings)
    left = {key: value for key, value in renamed(state["recipe"]).items() if key not in given}
    changed = recipe_changes(config, left)
    if changed:
        raise ConfigError(
            f"--resume: the recipe {config.recipe_name()} has changed since the run was started: "
            f"{'; '.join(changed)}. Give these flags with the run's values to go on with them"
        )
    return RunSpec(config, folder, left, True, state, state["run_id"], source)


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
    values = given | settled_weights(given)
    if values.get("dataset") == "auto":
        values["dataset"] = auto_dataset(given)
    if values.get("form") == "auto" and type(saved.get("img_size")) is int:
        values["form"] = form_of(saved["img_size"])
    if values.get("amp") == "auto":
        device = pick_device(given.get("device", saved.get("device", "auto")))
        values["amp"] = AMP_NAMES[pick_amp("auto", device)]
    return values


def settled_weights(given: dict[str, Any]) -> dict[str, Any]:
    """--class-weights of the given values as the configuration holds it. Raises ConfigError."""
    return {"class_weights": class_weights.settle(given["class_weights"])} if "class_weights" in given else {}


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


def report_changes(state: dict[str, Any], sync_bn: bool, data_changes: list[str]) -> None:
    """Why the run is no longer bitwise the one that was interrupted: other data, another torch, other ranks."""
    if not distributed.is_main():
        return
    for line in data_changes:
        print(f"--resume: goes on although the data set has changed: {line}")
    if state["torch"] != str(torch.__version__):
        print(f"--resume: saved by torch {state['torch']}, goes on with {torch.__version__}: no longer bitwise")
    saved, now = len(state["generators"]), distributed.world_size()
    if saved != now:
        norm = "" if sync_bn else ", batch norm's statistics are of other parts of the batch (no --sync-bn)"
        print(
            f"--resume: saved by {saved} ranks, goes on with {now}: same step, global batch, order and rate; no longer "
            f"bitwise the run of {saved}: sums over the batch round otherwise{norm}, generators are dealt anew"
        )
