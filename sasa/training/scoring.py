"""`train.py --evaluate`: the score of a checkpoint on its own test split, or on another folder of the same kind."""

import dataclasses
from functools import partial
from pathlib import Path

import torch

from config import ConfigError
from preprocess import DataError
from sasa.training import checkpoint, distributed
from sasa.training.cli import Command
from sasa.training.device import pick_amp, pick_device
from sasa.training.evaluation import EVAL_BATCH, evaluate
from sasa.training.network import network_of
from sasa.training.resume import changed_keys, without_auto
from sasa.training.run import load_data


def evaluate_checkpoint(command: Command) -> int:
    """Print the score of the checkpoint that --evaluate names, with its own configuration; returns the exit code.

    Raises:
        ConfigError, CheckpointError, DataError, SharedError: flags that change the network, a file that is no
            checkpoint, data that does not fit it.
    """
    path = Path(command.evaluate)
    state = distributed.on_main_rank(partial(checkpoint.load, path))
    given = without_auto(command.given)
    trained = network_of(state, given.get("backend"))
    config = dataclasses.replace(trained.config, **given)
    allowed = ("batch_size", "amp", "skip_bad_images", "eval_size", "eval_crop", "eval_interpolation")
    comparable = dataclasses.replace(config, **{key: getattr(trained.config, key) for key in allowed})
    changed = changed_keys(state["config"], comparable)
    if changed:
        raise ConfigError(f"--evaluate rebuilds the checkpoint's own network and data set: {'; '.join(changed)}")
    device = pick_device(config.device)
    try:
        amp = pick_amp(config.amp, device)  # the run's own precision: its summary's figures come out again
    except ConfigError:
        if "amp" in given:
            raise
        amp = pick_amp("auto", device)
    network, classes = trained.network.to(device), trained.info.num_classes
    autocast = partial(torch.autocast, device.type, dtype=amp, enabled=amp is not None)
    batch_size = config.batch_size if "batch_size" in given else EVAL_BATCH
    data = load_data(dataclasses.replace(config, train_images=None, holdout=0.0), device)
    try:
        if data.info.num_classes != classes:
            raise DataError(
                f"{config.data_dir}: {data.info.num_classes} classes, but the checkpoint {path} has {classes}"
            )
        result = evaluate(network, data.test, classes, batch_size, autocast)
    finally:
        data.close()
    skipped = distributed.all_gather_object(data.test.bad_images)
    if not distributed.is_main():
        return 0
    print(f"{path}: {config.model_name} on the test split of {config.dataset}, {result.images} images")
    for line in (line for lines in skipped for line in lines):
        print(f"skipped {line}")
    width = max(len(name) for name in data.info.class_names)
    for name, accuracy, count in zip(
        data.info.class_names, result.per_class_pct(), result.counts.tolist(), strict=True
    ):
        shown = "     -" if accuracy is None else f"{accuracy:6.2f}"
        print(f"  {name:{width}}  {shown}%  of {count}")
    print(f"test top-1 {result.top1_pct:.3f}%, top-5 {result.top5_pct:.3f}%, loss {result.loss:.4f}")
    return 0
