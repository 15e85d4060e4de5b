"""The command line of a training command: every field of its configuration as a flag, and what to do with the run.

Read without torch.
"""

import argparse
import dataclasses
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from config import Config
from sasa.console import Parser, as_path_text, fail
from sasa.settings import ConfigError, Settings, flag_of, parse_value

PROG = "train.py"
_NEWEST = object()  # --resume without a value
OF_TRAINING = ("max_steps", "keep_states", "preview", "log_csv")  # what --evaluate would ignore and may be wanted of it
ABOUT = "Train a stand-alone self-attention network (or its convolution baseline), resume it, evaluate it."


@dataclass(frozen=True)
class Command:
    """What to do with a run: `resume` is None (no), "" (the newest of the run's folder) or a path."""

    given: dict[str, Any]  # the Config fields that the command line names
    resume: str | None = None
    init_from: str | None = None
    evaluate: str | None = None
    overwrite: bool = False
    allow_changed_data: bool = False


def parse_command_line(
    arguments: list[str] | None = None, settings: type[Settings] = Config, prog: str = PROG, about: str = ABOUT
) -> Command:
    """The command line (None: the process's own) as a Command.

    A wrong value ends the process with one line on stderr and exit code 2.

    Args:
        settings: the configuration whose fields are the flags.
        prog, about: the command as it is typed, and what it does.
    """
    values = vars(_parser(settings, prog, about).parse_args(arguments))
    command = {f.name: values.pop(f.name) for f in fields(Command) if f.name in values}
    fail_here = partial(fail, prog.removeprefix("python -m "))
    try:
        given = {f.name: _value(f, values[f.name]) for f in fields(settings) if f.name in values}
    except ConfigError as error:
        fail_here(error)
    if command.get("resume") is _NEWEST:
        command["resume"] = ""
    if "resume" in command and command.get("overwrite"):
        fail_here("--resume goes on with a run: it does not go with --overwrite")
    if command.get("resume") and "init_from" in command:
        fail_here("--resume PATH names the state to go on from: --init-from goes with --resume alone")
    if "evaluate" in command:
        trains = [*sorted(command.keys() - {"evaluate"}), *(name for name in OF_TRAINING if given.get(name))]
        if trains:
            fail_here(f"--evaluate trains nothing: it does not go with {' or '.join(map(flag_of, trains))}")
    if "allow_changed_data" in command and "resume" not in command:
        fail_here("--allow-changed-data: needs --resume; a new run takes the data as it is")
    return Command(given, **command)


def _parser(settings: type[Settings], prog: str, about: str) -> Parser:
    parser = Parser(prog, description=about, argument_default=argparse.SUPPRESS)
    for f in fields(settings):
        _add_flag(parser, f)
    parser.add_argument("--resume", nargs="?", const=_NEWEST, type=as_path_text, metavar="PATH",
                        help="go on from PATH, or from the newest whole checkpoint of the run's folder")  # fmt: skip
    parser.add_argument("--init-from", type=as_path_text, metavar="PATH",
                        help="start from the weights of a checkpoint, nothing else; with --resume, only where the run "
                        "has no checkpoint yet")  # fmt: skip
    parser.add_argument("--evaluate", type=as_path_text, metavar="PATH", help="evaluate a checkpoint and end")
    parser.add_argument("--overwrite", action="store_true", help="replace a run that the folder already holds")
    parser.add_argument("--allow-changed-data", action="store_true",
                        help="resume although the data set's files have changed; summary.json tells so")  # fmt: skip
    return parser


def _add_flag(parser: Parser, f: dataclasses.Field) -> None:
    text, rule = f.metadata["help"], f.metadata["rule"]
    if f.metadata["kind"] is bool:
        default = {True: "on", False: "off", None: f.metadata["otherwise"]}[f.default]
        text += f" (default: {default})"
        parser.add_argument(flag_of(f.name), action=argparse.BooleanOptionalAction, help=text)
        return
    options = {"metavar": f.name.rsplit("_", 1)[-1].upper()} | {k: rule[k] for k in ("nargs", "metavar") if k in rule}
    if "choices" in rule and "nargs" not in rule:
        text += f": {' | '.join(rule['choices'])}"
    default = f.metadata["otherwise"] if f.default is None else f.default
    if default is not None:
        text += f" (default: {default})"
    parser.add_argument(flag_of(f.name), help=text.replace("%", "%%"), **options)
    for flag, value in rule.get("switches", {}).items():
        same = f"{flag_of(f.name)} {value}"
        parser.add_argument(flag, action="store_const", const=value, dest=f.name, help=f"the same as {same}")


def _value(f: dataclasses.Field, value: Any) -> Any:
    """What argparse gives for a field, in the field's type. Raises ConfigError."""
    if isinstance(value, list):
        return tuple(sorted({parse_value(f, item) for item in value}))
    return value if isinstance(value, bool) else parse_value(f, value)
