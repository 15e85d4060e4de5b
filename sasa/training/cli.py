"""The command line of train.py: every field of Config as a flag, and what to do with the run. Read without torch."""

import argparse
import dataclasses
from dataclasses import dataclass, fields
from typing import Any

from config import Config, ConfigError, flag_of, parse_value
from sasa.console import Parser, fail

PROG = "train.py"


@dataclass(frozen=True)
class Command:
    """What to do with a run: `resume` is None (no), "" (the newest of the run's folder) or a path."""

    given: dict[str, Any]  # the Config fields that the command line names
    resume: str | None = None
    init_from: str | None = None
    evaluate: str | None = None
    overwrite: bool = False


def parse_command_line(arguments: list[str] | None = None) -> Command:
    """The command line (None: the process's own) as a Command.

    A wrong value ends the process with one line on stderr and exit code 2.
    """
    values = vars(_parser().parse_args(arguments))
    command = {f.name: values.pop(f.name) for f in fields(Command) if f.name in values}
    try:
        given = {name: _value(name, value) for name, value in values.items()}
    except ConfigError as error:
        fail(PROG, error)
    if "resume" in command and ("init_from" in command or command.get("overwrite")):
        fail(PROG, "--resume goes on with a run: it does not go with --init-from or --overwrite")
    if "evaluate" in command and ("resume" in command or "init_from" in command):
        fail(PROG, "--evaluate does not go with --resume or --init-from")
    return Command(given, **command)


def _parser() -> Parser:
    parser = Parser(
        PROG,
        description="Train a stand-alone self-attention network (or its convolution baseline), resume it, evaluate it.",
        argument_default=argparse.SUPPRESS,
    )
    for f in fields(Config):
        _add_flag(parser, f)
    parser.add_argument("--resume", nargs="?", const="", metavar="PATH",
                        help="go on from PATH, or from the newest whole checkpoint of the run's folder")  # fmt: skip
    parser.add_argument("--init-from", metavar="PATH", help="start from the weights of a checkpoint, nothing else")
    parser.add_argument("--evaluate", metavar="PATH", help="evaluate a checkpoint and end")
    parser.add_argument("--overwrite", action="store_true", help="replace a run that the folder already holds")
    return parser


def _add_flag(parser: Parser, f: dataclasses.Field) -> None:
    text, rule = f.metadata["help"], f.metadata["rule"]
    if f.metadata["kind"] is bool:
        if f.default is not None:
            text += f" (default: {'on' if f.default else 'off'})"
        parser.add_argument(flag_of(f.name), action=argparse.BooleanOptionalAction, help=text)
        return
    options = {"metavar": f.name.rsplit("_", 1)[-1].upper()} | {k: rule[k] for k in ("nargs", "metavar") if k in rule}
    if "choices" in rule and "nargs" not in rule:
        text += f": {' | '.join(rule['choices'])}"
    if f.default is not None:
        text += f" (default: {f.default})"
    parser.add_argument(flag_of(f.name), help=text.replace("%", "%%"), **options)


def _value(name: str, value: Any) -> Any:
    """What argparse gives for a field, in the field's type. Raises ConfigError."""
    if isinstance(value, list):
        return tuple(sorted({parse_value(name, item) for item in value}))
    return value if isinstance(value, bool) else parse_value(name, value)
