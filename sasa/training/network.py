"""Networks by a run's configuration: new ones, and those that a checkpoint holds."""

import dataclasses
import re
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

import model
from config import FIELDS, Config, ConfigError, flag_of
from preprocess import DataInfo, info_without_files
from sasa.console import printable
from sasa.kernels.dispatch import named_backend
from sasa.training import checkpoint
from sasa.training.checkpoint import CheckpointError
from sasa.training.resume import refuse_other_task


class Trained(NamedTuple):
    """What a checkpoint holds for use: `network_of`."""

    network: nn.Module
    config: Config
    info: DataInfo


def network_of(state: dict[str, Any], backend: str | None = None) -> Trained:
    """The network of a checkpoint, as `checkpoint.load` gives it: the one way for evaluation and for every tool.

    Args:
        state: of last.pt, previous.pt (the moving average where the run keeps one) or best.pt.
        backend: the kernel of the attention; None takes the run's own choice.

    Returns:
        The network with its weights, in eval mode on the CPU; the run's configuration; and its data set's class names,
        image size and normalisation, for which none of its files is needed. A checkpoint of format 2 holds no class
        names: they are then numbers.

    Raises:
        ConfigError: a configuration that this version does not know, or a backend that is not usable here.
        CheckpointError: the weights are not of the network that the configuration describes.
    """
    config = Config.from_dict(state["config"])
    if config.img_size is None:
        raise ConfigError("--img-size None: a checkpoint's configuration must name it")
    if backend is not None:
        config = dataclasses.replace(config, backend=backend)
    weights = checkpoint.weights_of(state)
    classes = checkpoint.classes_of(weights)
    network = build_network(config, classes)
    checkpoint.load_weights(network, weights)
    return Trained(network.eval(), config, _info(state, config, classes))


def load_network(path: Path, backend: str | None = None) -> tuple[Trained, dict[str, Any]]:
    """`network_of` the file at `path`, and what the file holds.

    Raises:
        ConfigError, CheckpointError: a file that holds no network of train.py, by its name.
    """
    state = checkpoint.load(path)
    refuse_other_task(state["config"], path, Config)
    try:
        return network_of(state, backend), state
    except (ConfigError, CheckpointError) as error:
        raise type(error)(f"{printable(path)}: {error}") from error


def _info(state: dict[str, Any], config: Config, classes: int) -> DataInfo:
    info = info_without_files(config.dataset, classes, config.img_size)
    info = dataclasses.replace(info, eval_size=config.eval_size or config.img_size)
    data = state.get("data")
    if data is None:  # format 2
        return info
    if len(data["class_names"]) != classes:
        raise CheckpointError(f"the checkpoint has {len(data['class_names'])} class names for {classes} classes")
    return dataclasses.replace(
        info, class_names=tuple(data["class_names"]), mean=tuple(data["mean"]), std=tuple(data["std"])
    )


def build_network(config: Config, num_classes: int) -> nn.Module:
    """A new network on the CPU.

    Raises:
        ConfigError: options that do not go together in a layer, or a backend that is not usable here.
    """
    try:
        named_backend(config.backend)
        return model.build(config.model_name, num_classes, config.stem, **config.layer_options())
    except ValueError as error:
        raise ConfigError(as_flags(str(error))) from error


def as_flags(message: str, known: Container[str] = FIELDS, flag: Callable[[str], str] = flag_of) -> str:
    """A layer's "num_heads=7" as the `flag` that sets it, where the name is `known`."""
    return re.sub(r"\b([a-z_]+)=", lambda m: f"{flag(m[1])} " if m[1] in known else m[0], message)
