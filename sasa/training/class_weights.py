"""--class-weights: what each class counts in the loss. Read without torch.

A file's weights become a part of the run's configuration, as one line of text, so that a run goes on exactly where the
file is gone; with one that has changed, it is not resumed.
"""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from sasa.console import one_line, printable, show_apart
from sasa.settings import ConfigError

NONE, BALANCED = "none", "balanced"
SMALLEST, LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # normal numbers of float32, which the loss computes in


def settle(value: str) -> str:
    """The value of the flag as the configuration holds it: none, balanced, or the weights as JSON, sorted by name.

    Raises:
        ConfigError: a file that cannot be read, or that holds something else than a weight for each class name.
    """
    if value.lower() in (NONE, BALANCED):
        return value.lower()
    if value.startswith("{"):
        return _canonical(value, "--class-weights")
    shown = f"--class-weights {printable(value)}"
    try:
        text = Path(value).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{shown}: cannot be read ({one_line(error, 100)}); allowed are none, balanced, or a JSON file of "
            '{"class name": weight, ...}'
        ) from None
    return _canonical(text, shown)


def is_of_a_file(settled: Any) -> bool:
    """Whether a settled value holds weights that were read from a file."""
    return isinstance(settled, str) and settled.startswith("{")


def is_gone(value: str) -> bool:
    """Whether the flag's value names a file that is not there."""
    return value.lower() not in (NONE, BALANCED) and not value.startswith("{") and not os.path.lexists(value)


def _canonical(text: str, shown: str) -> str:
    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        repeated = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        if repeated:  # json would take the last
            raise ConfigError(f"{shown}: {printable(repeated[0])} stands there more than once")
        return dict(pairs)

    try:
        weights = json.loads(text, object_pairs_hook=distinct)
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{shown}: is not JSON ({one_line(error, 100)})") from None
    good = isinstance(weights, dict) and all(
        type(weight) in (int, float) and (weight == 0 or SMALLEST <= weight <= LARGEST) for weight in weights.values()
    )
    if not good or not any(weights.values()):
        raise ConfigError(
            f'{shown}: must be {{"class name": weight, ...}} with finite weights of at least 0, one of them above 0 '
            f"(in float32: {SMALLEST:.2g} to {LARGEST:.2g})"
        )
    return json.dumps({name: float(weights[name]) for name in sorted(weights)})


def of_classes(value: str, class_names: tuple[str, ...], counts: list[int]) -> list[float] | None:
    """The weight of each class by a settled value; None where all are 1.

    Balanced: images / (classes * images of the class), so that every class counts as much as another and the mean over
    the training images is 1. A class without training images weighs 1.

    Args:
        counts: training images of each class.

    Raises:
        ConfigError: the weights are not of these classes.
    """
    if value == NONE:
        return None
    if value == BALANCED:
        present = sum(count > 0 for count in counts)
        return [sum(counts) / (present * count) if count else 1.0 for count in counts]
    weights = json.loads(value)
    odd = sorted(weights.keys() ^ set(class_names))
    if odd:
        what = "has no weight" if odd[0] in class_names else "is no class of the data set"
        raise ConfigError(
            f"--class-weights: {show_apart(odd[0], odd)} {what}; allowed is one weight for each class name"
        )
    return [weights[name] for name in class_names]
