"""`train.py --evaluate`: the score of a checkpoint on its own test split, or on another folder of the same kind."""

import dataclasses
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from config import Config, ConfigError
from preprocess import DataError, DataInfo
from sasa.console import print_error, printable
from sasa.data.fingerprint import class_differences, class_order
from sasa.training import checkpoint, distributed
from sasa.training.cli import PROG, Command
from sasa.training.device import amp_of_checkpoint, autocast_in, pick_device, set_fp32_precision
from sasa.training.evaluation import EVAL_BATCH, evaluate
from sasa.training.network import network_of
from sasa.training.resume import changed_keys, refuse_other_task, settled
from sasa.training.run import load_data, without_parts


def evaluate_checkpoint(command: Command) -> int:
    """Print the score of the checkpoint that --evaluate names, with its own configuration; returns the exit code.

    Raises:
        ConfigError, CheckpointError, DataError, SharedError: flags that change the network, a file that is no
            checkpoint, data that does not fit it.
    """
    path = Path(command.evaluate)
    state = distributed.on_main_rank(partial(checkpoint.load, path))
    refuse_other_task(state["config"], path, Config)
    given = settled(command.given, state["config"] | {"form": "auto"})
    trained = network_of(state, given.get("backend"))
    config = dataclasses.replace(trained.config, **given)
    allowed = ("batch_size", "amp", "eval_size", "eval_crop", "eval_interpolation")
    comparable = dataclasses.replace(config, **{key: getattr(trained.config, key) for key in allowed})
    changed = changed_keys(trained.config, comparable)
    if changed:
        raise ConfigError(f"--evaluate rebuilds the checkpoint's own network and data set: {'; '.join(changed)}")
    device = pick_device(config.device)
    set_fp32_precision(config.matmul_precision)
    amp = amp_of_checkpoint(trained.config.amp, device, given.get("amp"))
    network, classes = trained.network.to(device), trained.info.num_classes
    autocast = autocast_in(amp, device)
    batch_size = config.batch_size if "batch_size" in given else EVAL_BATCH
    data = load_data(without_parts(config), device)
    try:
        order = order_of_classes(trained.info, data.info, state["format"] == checkpoint.FORMAT, config.data_dir, path)
        split = data.test if order is None else Relabelled(data.test, order)
        result = evaluate(network, split, classes, batch_size, autocast)
    finally:
        data.close()
    skipped = distributed.all_gather_object(data.test.bad_images)
    if not distributed.is_main():
        return 0 if math.isfinite(result.loss) else 1
    print(f"{printable(path)}: {config.model_name} on the test split of {config.dataset}, {result.images} images")
    names = trained.info.class_names
    if state["format"] != checkpoint.FORMAT:
        names = data.info.class_names
        print(f"format {state['format']} holds no class names: classes are compared by their numbers")
    elif order is not None:
        print("the folder has the checkpoint's classes in another order: they are compared by their names")
    for line in sorted({line for lines in skipped for line in lines}):
        print(f"skipped {printable(line)}")
    names = [printable(name) for name in names]
    width = max(len(name) for name in names)
    for name, accuracy, count in zip(names, result.per_class_pct(), result.counts.tolist(), strict=True):
        shown = "     -" if accuracy is None else f"{accuracy:6.2f}"
        print(f"  {name:{width}}  {shown}%  of {count}")
    print(f"balanced accuracy {result.balanced_pct():.3f}%, the mean of the classes that have images")
    print(f"test top-1 {result.top1_pct:.3f}%, top-5 {result.top5_pct:.3f}%, loss {result.loss:.4f}")
    if not math.isfinite(result.loss):
        print_error(PROG, f"{printable(path)}: the loss is {result.loss}: the network has no result")
        return 1
    return 0


def order_of_classes(saved: DataInfo, now: DataInfo, has_names: bool, data_dir: str, path: Path) -> list[int] | None:
    """For each class of the data its number in the checkpoint; None where both have the same order.

    Raises:
        DataError: they do not have the same classes, or the checkpoint's images were normalised otherwise.
    """
    if now.num_classes != saved.num_classes:
        raise DataError(f"{data_dir}: {now.num_classes} classes, but the checkpoint {path} has {saved.num_classes}")
    if (saved.mean, saved.std) != (now.mean, now.std):
        raise DataError(f"{path}: its images were normalised by mean {saved.mean} and deviation {saved.std}")
    if not has_names or saved.class_names == now.class_names:
        return None
    order = class_order(saved.class_names, now.class_names)
    if order is None:
        what = "; ".join(class_differences(saved.class_names, now.class_names))
        raise DataError(f"{data_dir}: other classes than those of the checkpoint {path}: {what}")
    return order


class Relabelled:
    """A split whose labels are the numbers that the checkpoint's classes have."""

    def __init__(self, split, order: list[int]) -> None:
        self._split, self._order = split, torch.tensor(order)

    def __len__(self) -> int:
        return len(self._split)

    @property
    def skipped(self) -> int:
        return self._split.skipped

    def eval_batches(self, *place: int) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self._split.eval_batches(*place):
            yield images, self._order.to(labels.device)[labels]
