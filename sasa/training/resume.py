"""From a command to a plan: which configuration, which folder, and the state to go on from."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

import preprocess
from config import Config, ConfigError, Settings, flag_of, resolve
from sasa.training import checkpoint, distributed
from sasa.training.cli import Command
from sasa.training.files import CONFIG, LAST, PREVIOUS, read_config, refuse_other_run


@dataclass(frozen=True)
class Plan:
    """What a command stands for.

    Attributes:
        config: settled where `started`, else with open values that `set_up` fills in.
        recipe: the values that the recipe provides, of the fields that the command line leaves to it.
        started: the configuration is that of a run which was set up before.
        state: to go on from; None: step 0.
    """

    config: Settings
    folder: Path
    recipe: dict[str, Any]
    started: bool = False
    state: dict[str, Any] | None = None


def new_config(given: dict[str, Any]) -> Config:
    """The configuration of a new run of train.py by its flags."""
    return resolve(given, given.get("dataset") or auto_dataset(given), distributed.world_size())


def make_plan(
    command: Command, settings: type[Settings] = Config, new: Callable[[dict[str, Any]], Settings] = new_config
) -> Plan:
    """The plan of a training command. For the main rank: it reads the run's folder.

    Args:
        settings: the kind of configuration. new: the one of a new run by its flags.

    Raises:
        ConfigError, CheckpointError: a folder that holds another run, a state that cannot be gone on from, or flags
            that would change the run's result.
    """
    given = without_auto(command.given, settings)
    if command.resume:
        path = Path(command.resume)
        state = checkpoint.load_run(path)
        folder = Path(given.get("output_dir", "runs"), given["name"]) if "name" in given else path.parent
        return _resumed(state, given, folder, settings)
    config = new(given)
    folder = Path(config.output_dir, config.name or config.default_name())
    if command.resume is None:
        if not command.overwrite:
            refuse_other_run(folder)
        return Plan(config, folder, _left_to_recipe(config, given))
    found = checkpoint.newest(folder)
    if found is None:
        print(f"--resume: no checkpoint was ever written to {folder}: starting at step 0")
        started = (folder / CONFIG).exists()
        if started:
            config = resumed_config(read_config(folder / CONFIG), given, settings)
        return Plan(config, folder, _left_to_recipe(config, given), started)
    state, path, problems = found
    for problem in problems:
        print(f"--resume: {problem}: using {path.name}, the whole one before it")
    if path.name == PREVIOUS and (folder / LAST).exists():  # the next save must not put a damaged file in its place
        (folder / LAST).replace(folder / f"damaged-{LAST}")
    return _resumed(state, given, folder, settings)


def without_auto(given: dict[str, Any], settings: type[Settings] = Config) -> dict[str, Any]:
    """The flags whose value is not their default, "auto"."""
    automatic = {f.name for f in fields(settings) if f.default == "auto"}
    return {key: value for key, value in given.items() if not (value == "auto" and key in automatic)}


def auto_dataset(given: dict[str, Any]) -> str:
    """What --dataset auto stands for here; prints which and why."""
    has_gpu = torch.cuda.is_available() and given.get("device") != "cpu"
    name, reason = preprocess.resolve_auto(given.get("data_dir", "datasets"), has_gpu)
    print(f"--dataset auto: {name}, {reason}")
    return name


def _resumed(state: dict[str, Any], given: dict[str, Any], folder: Path, settings: type[Settings]) -> Plan:
    """Raises ConfigError where flags, or an edited recipe, would change the run's result."""
    config = resumed_config(state["config"], given, settings)
    left = {key: value for key, value in state["recipe"].items() if key not in given}
    changed = recipe_changes(config, left)
    if changed:
        raise ConfigError(
            f"--resume: the recipe {config.recipe_name()} has changed since the run was started: "
            f"{'; '.join(changed)}. Give these flags with the run's values to go on with them"
        )
    return Plan(config, folder, left, True, state)


def resumed_config(saved: dict[str, Any], given: dict[str, Any], settings: type[Settings] = Config) -> Settings:
    """The saved configuration with what the command line may change.

    Raises:
        ConfigError: flags of the command line that would change the result.
    """
    config = dataclasses.replace(settings.from_dict(saved), **{"max_steps": None} | given)
    changed = changed_keys(saved, config)
    if changed:
        raise ConfigError(f"--resume: the run was started with another configuration: {'; '.join(changed)}")
    return config


def changed_keys(saved: dict[str, Any], config: Settings) -> list[str]:
    """What differs between a checkpoint's configuration and this run's and could change the result, one line each."""
    ours, free = config.to_dict(), {f.name for f in fields(config) if f.metadata["free"]}
    lines = []
    for key in sorted(saved.keys() | ours.keys()):
        if key in free:
            continue
        if key == "epochs" and config.schedule == "step" and ours[key] >= saved.get(key, 0):
            continue  # the rate of the epochs already trained does not depend on how many follow
        if key not in saved or key not in ours:
            lines.append(f"{key} ({'only in the checkpoint' if key in saved else 'not in the checkpoint'})")
        elif saved[key] != ours[key]:
            lines.append(f"{flag_of(key)} was {saved[key]}, is {ours[key]}")
    return lines


def _left_to_recipe(config: Settings, given: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.recipe_values().items() if key not in given}


def recipe_changes(config: Settings, left: dict[str, Any]) -> list[str]:
    """How today's recipe differs from what it provided when the run was started, one line each."""
    now = config.recipe_values()
    return [f"{flag_of(key)} was {left[key]}, is {now.get(key)}" for key in left if left[key] != now.get(key)]
