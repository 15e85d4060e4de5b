"""Types of arguments that several tools take. A wrong one ends the command with one line and exit code 2."""

import argparse
from collections.abc import Callable, Iterable

from sasa.console import Parser, one_line


def positive(text: str) -> int:
    """For `add_argument(type=...)`: an integer of at least 1."""
    return _integer(text, least=1)


def natural(text: str) -> int:
    """For `add_argument(type=...)`: an integer of at least 0."""
    return _integer(text, least=0)


def one_of(names: Iterable[str]) -> Callable[[str], str]:
    """For `add_argument(type=..., choices=names)`: a name in any case."""
    spelling = {name.lower(): name for name in names}
    return lambda text: spelling.get(text.lower(), text)


def _integer(text: str, least: int) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10) or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text[:60]}: must be an integer of at least {least}, of at most 9 digits")
    return int(text)


def usable_device(parser: Parser, name: str):
    """The torch.device of this name, from now on the current one; where there is none, the parser's error."""
    import torch

    from sasa.training.device import make_current

    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {name}: {one_line(error, 200)}")  # torch lists every device type there is
    make_current(device)
    return device
