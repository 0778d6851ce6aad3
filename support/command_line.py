"""How does a dataclass become the options of a program, and how are their values checked?

A setting is described once, in its `Annotated`: its type (with `Literal` for a choice), a sentence of help,
and, where it has one, the least value that it, or each of its numbers, may have:

    steps: Annotated[int, "How many optimizer steps are made.", 1] = 12_500
"""

import argparse
import dataclasses
import math
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from support.files import InputError


class Setting(NamedTuple):
    """What is known of one field. `kind` is what `type` says of its value, and `leaf` of the values in a
    tuple, which may be nested."""

    name: str
    option: str
    kind: type
    leaf: type
    nested: bool
    choices: tuple
    help: str
    least: float
    default: Any


def settings_of(config: type) -> list[Setting]:
    """The settings of a dataclass, in its order."""
    hints, found = get_type_hints(config, include_extras=True), []
    for field in dataclasses.fields(config):
        annotation, text, *least = get_args(hints[field.name])
        choices = get_args(annotation) if get_origin(annotation) is Literal else ()
        kind = str if choices else get_origin(annotation) or annotation
        leaf, nested = (get_args(annotation)[0] if kind is tuple else kind), False
        if get_origin(leaf) is tuple:
            leaf, nested = get_args(leaf)[0], True
        option = "--" + field.name.replace("_", "-")
        lowest = least[0] if least else -math.inf
        found.append(Setting(field.name, option, kind, leaf, nested, choices, text, lowest, field.default))
    return found


def add_options(parser: argparse.ArgumentParser, config: type) -> None:
    """An option for every setting. What is not typed is None."""
    for setting in settings_of(config):
        text = f"{setting.help} Default: {as_typed(setting.default)}".rstrip() + "."
        text = text.replace("Default: .", "Empty by default.").replace("%", "%%")
        if setting.kind is bool:
            parser.add_argument(setting.option, action=argparse.BooleanOptionalAction, help=text)
        elif setting.kind is tuple:
            read, shape = (strides, "NxN,NxN") if setting.nested else (numbers, "N,N")
            parser.add_argument(setting.option, type=read, metavar=shape, help=text)
        else:
            choices = setting.choices or None
            parser.add_argument(setting.option, type=setting.kind, choices=choices, help=text)


def check_settings(config: object) -> None:
    """Raises InputError, one line, for the first setting that is of a wrong kind, none of the choices, not
    finite or too small. That settings suit each other is not looked at."""
    for setting in settings_of(type(config)):
        value, option = getattr(config, setting.name), setting.option
        found = leaves(value)
        allowed = {setting.leaf, int} if setting.leaf is float else {setting.leaf}
        shaped = type(value) is tuple if setting.kind is tuple else type(value) is not tuple
        if setting.nested:
            shaped = shaped and all(type(part) is tuple for part in value)
        if not shaped or any(type(leaf) not in allowed for leaf in found):
            kind = f"{'tuples of' * setting.nested} {setting.leaf.__name__}".strip()
            raise InputError(f"{option} {value!r} is not of the kind {setting.kind.__name__} ({kind})")
        if setting.leaf is float and not all(map(math.isfinite, found)):
            raise InputError(f"{option} {value} is not finite")
        if setting.choices and value not in setting.choices:
            raise InputError(f"{option} {value} is none of {', '.join(setting.choices)}")
        if setting.least > -math.inf and min(found, default=setting.least) < setting.least:
            raise InputError(f"{option} must be {setting.least} or more")


def leaves(value: object) -> list:
    """The values in a tuple of tuples, or the value itself."""
    return [leaf for part in value for leaf in leaves(part)] if isinstance(value, tuple) else [value]


def as_typed(value: object) -> str:
    """A setting as it is typed: 16,32 or 2x2,2x1."""
    if not isinstance(value, tuple):
        return str(value)
    return ",".join("x".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in value)


def numbers(text: str) -> tuple[int, ...]:
    """ "16,32" -> (16, 32)."""
    try:
        return tuple(int(n) for n in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 16,32,64") from None


def strides(text: str) -> tuple[tuple[int, ...], ...]:
    """ "2x2,2x1" -> ((2, 2), (2, 1))."""
    try:
        return tuple(numbers(part.replace("x", ",")) for part in text.split(","))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 2x2,2x1") from None


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
    """The options of whatever draws samples."""
    command.add_argument(
        "--sampling-steps", type=int, default=0, metavar="K",
        help="How many sampling steps are taken. Default: as many as in training's validation.",
    )  # fmt: skip
    command.add_argument("--seed", type=int, default=0, help="Seed of the sampling noise. Default: 0.")


def check_counts(parser: argparse.ArgumentParser, args: argparse.Namespace, **least: int) -> None:
    """Ends the program where one of these options is below the least value that it may have."""
    for name, value in least.items():
        if getattr(args, name, value) < value:
            parser.error(f"--{name.replace('_', '-')} must be {value} or more")


def described(doc: str) -> dict[str, Any]:
    """How a program's module docstring becomes the top of its --help, line by line."""
    return {"description": doc, "formatter_class": argparse.RawDescriptionHelpFormatter}
