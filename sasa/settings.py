"""Settings as fields of a frozen dataclass: each with its flag, help, type and what is allowed. No torch.

`Settings` is what the configuration of every kind of run can do (config.py; sasa/detection/config.py), and the one
place where a value is checked, wherever it comes from: a command line, a file, code.
"""

import dataclasses
import math
import os
from dataclasses import dataclass, field, fields
from typing import Any

MAX_INT = 2**31 - 1  # of every integer: beyond it floats, timers and progress bars overflow


# Fields that are younger than stored configurations (checkpoints of format 3, results/), with what the code did before
# it had them. An entry never changes, whatever becomes of defaults and recipes.
ADDED = {
    "step_epochs": 30, "step_factor": 0.1, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_eps": 1e-8,
    "rand_rounds": 2, "rand_magnitude": 9, "crop_area": 0.08, "crop_aspect": 4 / 3,
    "auto_augment": "none", "random_erase": 0.0, "repeats": 1, "drop_path": 0.0, "loss": "ce", "bce_threshold": 0.2,
    "class_weights": "none", "min_lr": 0.0, "layer_decay": 1.0,
    "compile_mode": "default", "matmul_precision": "highest", "cudnn_benchmark": False,
    "digest": True, "keep_states": 0, "val_every": 1, "early_stop": 0, "log_csv": False,
}  # fmt: skip
# Fields that had another name: what the old field's value is in the new one.
RENAMED = {"randaugment": ("auto_augment", {False: "none", True: "rand"})}


def renamed(values: dict[str, Any]) -> dict[str, Any]:
    """A stored configuration, or what a recipe provided of one, by today's names of the fields."""
    values = dict(values)
    for old, (new, meaning) in RENAMED.items():
        if old in values:
            value = values.pop(old)
            values[new] = meaning.get(value, value)
    return values


class ConfigError(ValueError):
    """A value that cannot be: one line that names the flag, the value and what is allowed."""


def option(
    default: Any,
    text: str,
    *,
    otherwise: str | None = None,
    kind: type | None = None,
    free: bool = False,
    in_recipe: bool = False,
    **rule,
) -> Any:
    """A field of Config and its flag.

    Args:
        default: the value without the flag.
        text: the help text: what the flag does.
        otherwise: what holds without the flag, in words, where the default does not show it.
        kind: the type of a value, where the default does not show it.
        free: a resumed run may change it, since it cannot change the result.
        in_recipe: the value without the flag is the recipe's.
        rule: what is allowed, `choices`, `low`, `high` (inclusive), `above` or `below` (exclusive), `is_name` (of one
            folder, not a path), `is_path` (a leading ~ of the command line is the home folder); `alias` maps an old
            spelling of a choice to the present one; `switches` maps flags without a value to a choice; `nargs` and
            `metavar` are argparse's.
    """
    kind = kind or (str if default is None else type(default))
    about = {"help": text, "otherwise": otherwise, "kind": kind, "free": free, "in_recipe": in_recipe, "rule": rule}
    return field(default=default, metadata=about)


def from_recipe(text: str, kind: type, **rule) -> Any:
    """A field whose value comes from the recipe unless its flag is given."""
    return option(None, text, otherwise="the recipe's", kind=kind, in_recipe=True, **rule)


@dataclass(frozen=True)
class Settings:
    """What the configuration of every kind of run can do, by the fields that its class has.

    Raises:
        ConfigError: a value of another type or out of its bounds.
    """

    # What shared code reads of runs whose kind has no such flags.
    early_stop, log_csv, keep_states, cudnn_benchmark = 0, False, 0, False

    def __post_init__(self) -> None:
        for f in fields(self):
            _check_typed(f, getattr(self, f.name))

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, as config.json and the checkpoints hold them."""
        values = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]):
        """The configuration that `to_dict` gave, of this version or before the fields of `ADDED`.

        Raises:
            ConfigError: keys that this version does not know, or lacks; values that cannot be.
        """
        known = {f.name for f in fields(cls)}
        values = {key: value for key, value in ADDED.items() if key in known} | renamed(values)
        differing = sorted(str(key) for key in known ^ values.keys())
        if differing:
            more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
            raise ConfigError(f"the configuration is of another version: {', '.join(differing[:5])}{more} differ")
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})

    def recipe_values(self) -> dict[str, Any]:
        """What this version's recipe gives to each field that has its value from there unless its flag is given."""
        raise NotImplementedError

    def recipe_name(self) -> str:
        """That recipe, for a person."""
        raise NotImplementedError


def flag_of(name: str) -> str:
    """The flag of a field."""
    return "--" + name.replace("_", "-")


def as_typed(name: str, value: Any) -> list[str]:
    """A field's flag and its values, in one spelling."""
    values = value if isinstance(value, tuple) else () if isinstance(value, bool) else (value,)
    flag = flag_of(name).replace("--", "--no-", 1) if value is False else flag_of(name)
    return [flag, *(str(v).removesuffix(".0") for v in values)]


# ---- what is allowed ------------------------------------------------------------------------------------------------


def parse_value(f: dataclasses.Field, text: str) -> Any:
    """The text of a flag's value in its field's type and spelling.

    Raises:
        ConfigError: it is not of that type, or not allowed.
    """
    kind, rule = f.metadata["kind"], f.metadata["rule"]
    if not text:  # a shell variable that is not set
        raise ConfigError(f"{flag_of(f.name)}: must not be empty")
    value = _number(kind, text, f"{flag_of(f.name)} {text}") if kind in (int, float) else text
    if rule.get("is_path"):  # a shell leaves ~ as it is after =, and in quotes
        value = os.path.expanduser(text)
    if "choices" in rule:
        spelling = {str(choice).lower(): choice for choice in rule["choices"]} | rule.get("alias", {})
        value = spelling.get(str(value).lower(), value)
    _check_rule(f, value)
    return value


def _number(kind: type, text: str, given: str) -> int | float:
    try:
        return kind(text)
    except ValueError:  # also of an integer of thousands of digits
        digits = text.strip().removeprefix("-").isdigit()
        wanted = f"at most {MAX_INT}" if digits else "an integer" if kind is int else "a number"
        raise ConfigError(f"{given[:60]}: must be {wanted}") from None


def _check_typed(f: dataclasses.Field, value: Any) -> None:
    """A field's value as code or a file gives it. Raises ConfigError."""
    kind = f.metadata["kind"]
    if value is None and f.default is None:
        return
    items = value if isinstance(value, tuple) and "nargs" in f.metadata["rule"] else (value,)
    for item in items:
        if type(item) is not kind and not (kind is float and type(item) is int):
            raise ConfigError(f"{flag_of(f.name)} {str(item)[:60]!r}: must be of type {kind.__name__}")
        _check_rule(f, item)


def _check_rule(f: dataclasses.Field, value: Any) -> None:
    """A value of the right type against its field's bounds and choices. Raises ConfigError."""
    rule, given = f.metadata["rule"], f"{flag_of(f.name)} {str(value)[:60]}"
    if isinstance(value, str) and "\0" in value:
        raise ConfigError(f"{given!r}: must not hold a zero byte")
    if rule.get("is_name") and (value in ("", ".", "..") or any(sep in value for sep in (os.sep, os.altsep) if sep)):
        raise ConfigError(f"{given!r}: must be the name of one folder, without {os.sep} and not . or ..")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{given}: must be finite")
    if f.metadata["kind"] is int and abs(value) > MAX_INT:
        raise ConfigError(f"{given}: must be at most {MAX_INT}")
    if f.metadata["kind"] in (int, float):
        for bound, holds, words in (
            ("low", value.__ge__, "at least"),
            ("high", value.__le__, "at most"),
            ("above", value.__gt__, "above"),
            ("below", value.__lt__, "below"),
        ):
            if bound in rule and not holds(type(value)(rule[bound])):
                raise ConfigError(f"{given}: must be {words} {rule[bound]}")
    if "choices" in rule and value not in rule["choices"]:
        raise ConfigError(f"{given}: allowed are {', '.join(map(str, rule['choices']))}")
