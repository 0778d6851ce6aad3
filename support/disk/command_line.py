"""How does a dataclass become the options of a program, and how are their values checked?

A setting is described once, in its `Annotated`: its type (with `Literal` for a choice), a sentence of
help, and, where there are bounds, the least and the largest value of it, or of each of its numbers; for a
name out of a table, which may grow later, the table in their place:

    steps: Annotated[int, "How many optimizer steps are made.", 1] = 12_500
"""

import argparse
import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal, NamedTuple, NoReturn, get_args, get_origin, get_type_hints

from support.disk.files import InputError


LARGEST = 2**31 - 1  # a seed, a step or a size of an array, as JAX counts them
MOST_NUMBERS = 16  # in a setting: levels of a network, which take seconds each to compile


class Setting(NamedTuple):
    """A field of a dataclass. `depth` is 0 for a single value, 1 for a tuple, and 2 for a tuple of
    tuples; the values in it are of the type `kind`."""

    name: str
    option: str
    default: Any
    depth: int
    kind: type
    choices: tuple
    help: str
    least: float = -LARGEST
    most: float = LARGEST


def settings_of(config: type) -> Iterator[Setting]:
    """The settings of a dataclass, in its order."""
    hints = get_type_hints(config, include_extras=True)
    for field in dataclasses.fields(config):
        kind, text, *bounds = get_args(hints[field.name])
        depth, choices = 0, get_args(kind) if get_origin(kind) is Literal else ()
        if bounds and isinstance(bounds[0], dict):
            choices = tuple(bounds.pop())
        while get_origin(kind) is tuple:
            depth, kind = depth + 1, get_args(kind)[0]
        option, kind = f"--{field.name.replace('_', '-')}", str if choices else kind
        yield Setting(field.name, option, field.default, depth, kind, choices, text, *bounds)


def add_options(
    parser: argparse.ArgumentParser | argparse._ArgumentGroup, config: type, defaults: object = None
) -> None:
    """Adds an option for every setting, which is None if it is not typed. The help names the defaults of the
    class, or those in `defaults`, an instance of it."""
    for setting in settings_of(config):
        default = as_typed(getattr(defaults or config, setting.name))
        text = f"{setting.help} " + (f"Default: {default}." if default else "Empty by default.")
        how: dict[str, Any] = {"type": setting.kind, "choices": setting.choices or None}
        if setting.kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif setting.depth == 1:
            how = {"type": partial(numbers, kind=setting.kind), "metavar": "N,N"}
        elif setting.depth == 2:
            how = {"type": strides, "metavar": "NxN,NxN"}
        parser.add_argument(setting.option, help=text.replace("%", "%%"), **how)


def check_settings(config: object) -> None:
    """Raises InputError, one line, for the first setting that is of a wrong type, not one of the
    choices, not finite, too small or too large. Whether settings fit together is not checked."""
    for setting in settings_of(type(config)):
        value, option, parts = getattr(config, setting.name), setting.option, [getattr(config, setting.name)]
        for _ in range(setting.depth):
            if any(type(part) is not tuple for part in parts):
                raise InputError(f"{option} {value!r} is not like {setting.default!r}")
            if setting.kind is not str and (most := max(map(len, parts), default=0)) > MOST_NUMBERS:
                raise InputError(f"{option} has {most} entries, and may have no more than {MOST_NUMBERS}")
            parts = [inner for part in parts for inner in part]
        kinds = (float, int) if setting.kind is float else (setting.kind,)
        if any(type(part) not in kinds for part in parts):
            raise InputError(f"{option} {value!r} is not of type {setting.kind.__name__}")
        if setting.choices and value not in setting.choices:
            raise InputError(f"{option} {value} is not one of {', '.join(setting.choices)}")
        if setting.kind in (int, float):
            if not all(part >= setting.least for part in parts):  # as NaN is not
                raise InputError(f"{option} must be {setting.least} or more")
            if any(part > setting.most for part in parts):
                raise InputError(f"{option} must be {setting.most} or less")


def as_typed(value: object) -> str:
    """A setting as it is typed: 16,32 or 2x2,2x1."""
    if not isinstance(value, tuple):
        return str(value)
    return ",".join("x".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in value)


def numbers(text: str, kind: type = int) -> tuple[int | float, ...]:
    """ "16,32" -> (16, 32)."""
    try:
        return tuple(kind(n) for n in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 16,32,64") from None


def strides(text: str) -> tuple[tuple[int, ...], ...]:
    """ "2x2,2x1" -> ((2, 2), (2, 1))."""
    return tuple(numbers(part.replace("x", ",")) for part in text.split(","))


def add_scoring_options(command: argparse.ArgumentParser) -> None:
    """The options that scoring and reporting share."""
    command.add_argument(
        "--split", default="test", choices=["validation", "test"], help="Which cases. Default: test."
    )
    command.add_argument(
        "--checkpoint", default="best", choices=["best", "final"],
        help="The model file of the run: the best in validation, or that of the last step. Default: best.",
    )  # fmt: skip
    command.add_argument(
        "--data-dir", default="", help="Where the HDF5 file is. Default: where it was in training."
    )


def add_sampling_options(command: argparse.ArgumentParser) -> None:
    """The options of programs that draw samples."""
    command.add_argument(
        "--sampling-steps", type=int, default=0, metavar="K",
        help="Number of sampling steps. Default: that of the validations in training.",
    )  # fmt: skip
    command.add_argument("--seed", type=int, default=0, help="Seed of the sampling noise. Default: 0.")


def check_counts(parser: argparse.ArgumentParser, args: argparse.Namespace, **least: int) -> None:
    """Ends the program if one of these options is below its least value, or above LARGEST."""
    for name, value in least.items():
        if not value <= getattr(args, name, value) <= LARGEST:
            parser.error(f"--{name.replace('_', '-')} must be from {value} to {LARGEST}")


class Parser(argparse.ArgumentParser):
    """A parser that takes no abbreviations, so that --step is not taken for --steps, and says what is wrong
    in one line. `doc`, a program's module docstring, stands at the top of its --help, line by line."""

    def __init__(self, doc: str | None = None, **how: Any):
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(description=doc, formatter_class=layout, allow_abbrev=False, **how)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")
