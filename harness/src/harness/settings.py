"""A command's settings: one frozen dataclass, of which its flags are made. No torch up here.

    @dataclass(frozen=True, kw_only=True)
    class Schedule:
        \"\"\"how long and how fast\"\"\"
        epochs: float | None = flag(None, "default: those published", check=POSITIVE)

    @dataclass(frozen=True, kw_only=True)
    class Settings(Schedule, Shared):
        \"\"\"Train a model.\"\"\"
        model: str = word("MODEL", "folder or hub id")

A field is a flag. The fields of each base are a group in --help, headed by the base's docstring.
"""

import argparse
import dataclasses
import inspect
from dataclasses import dataclass
from math import inf
from types import NoneType
from typing import ClassVar, get_args

from harness.errors import UserError, nearest

REQUIRED = dataclasses.MISSING
# (what a value must be, how an error says it)
POSITIVE = (lambda value: 0 < value < inf, "expected a number above 0")
NOT_NEGATIVE = (lambda value: 0 <= value < inf, "expected 0 or more")
AT_LEAST_1 = (lambda value: value >= 1, "at least 1")
BELOW_1 = (lambda value: 0 <= value < 1, "expected 0 to below 1")
SHARE = (lambda value: 0 <= value <= 1, "expected 0 to 1")

# Flags of several commands, for :func:`flag` or `add_argument`.
IGNORE = {
    "help": "linears that stay dense, by full name or last parts (dt_proj, mlp.down_proj) or "
    "re:REGEX; may be given again",
    "action": "append",
    "metavar": "PATTERN",
}
BOS = {
    "help": "BOS at the head of every window of text: auto (default: none, as published, unless "
    "trying shows that the model needs it), none, window",
    "choices": ["auto", "none", "window"],
}


def flag(default, help: str, *, names=(), check=None, **more):
    """A dataclass field that is a flag, of the field's name and type.

    Args:
        default: REQUIRED: there is none. names: its spellings; () derives them from the field's
            name. check: one of those above, or None.
        more: for `argparse.ArgumentParser.add_argument`.
    """
    metadata = {"help": help, "names": names, "check": check, **more}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def word(name: str, help: str, default=REQUIRED):
    """A field that is a word of its own place, not after a flag; it may be left out where it has a
    default."""
    more = {} if default is REQUIRED else {"nargs": "?"}
    return flag(default, help, names=None, metavar=name, **more)


@dataclass(frozen=True, kw_only=True)
class Shared:
    """shared by all commands"""

    # What stands between the words of a flag, the spelling that --help puts first first.
    SEPARATORS: ClassVar[tuple[str, ...]] = ("-",)

    out: str | None = flag(None, "where the result is written", metavar="PATH")
    device: str = flag("auto", "auto (default: a GPU if there is one), cpu, cuda, cuda:1 ...")
    dtype: str = flag(
        "auto", "dtype of the computation (default auto: the one the checkpoint is stored in where "
        "the device is fast in it, else float32); what is written keeps the checkpoint's own",
        choices=["auto", "float32", "bfloat16", "float16"],
    )  # fmt: skip
    seed: int = flag(0, "of every random choice (default 0)")
    resume: bool = flag(
        True, "go on from an interrupted run of the same command (default), or start again"
    )
    overwrite: bool = flag(False, "replace an existing result")
    dry_run: bool = flag(
        False, "resolve everything, print the plan and what it needs, write nothing, exit 0",
        names=["--dry-run"],
    )  # fmt: skip

    def __post_init__(self):
        """Refuse values that no flag takes.

        Raises:
            UserError: the first of them, by its flag.
        """
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), field.metadata.get("choices")
            holds, words = field.metadata["check"] or (lambda _: True, "")
            if choices:
                holds, words = choices.__contains__, f"expected {', '.join(map(str, choices))}"
            if value is not None and not holds(value):
                meant = nearest(str(value), map(str, choices or ()))
                raise UserError(f"{_names(self, field)[0]} {value}: {words}.{meant}")


def groups(cls) -> list[tuple[str | None, list[dataclasses.Field]]]:
    """(heading, fields) of a settings class: its own first, then each base's under its docstring;
    those and words, which need no heading, without one."""
    left = {field.name: field for field in dataclasses.fields(cls)}
    headed = []
    for base in cls.__mro__[:-1]:
        own = [left.pop(name) for name in inspect.get_annotations(base) if name in left]
        words = all(field.metadata["names"] is None for field in own)
        headed.append((None if base is cls or words else base.__doc__, own))
    return headed


def make_parser(cls, command: str, epilog: str) -> argparse.ArgumentParser:
    """The parser of ``python -m COMMAND``: a settings class's flags under its docstring."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {command}", description=inspect.cleandoc(cls.__doc__), epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_flags(parser, cls)
    return parser


def add_flags(parser: argparse.ArgumentParser, cls) -> None:
    """Give ``parser`` the flags of a settings class: ``cls(**vars(args))`` of what it parses."""
    for heading, members in groups(cls):
        group = parser.add_argument_group(heading) if heading else parser
        for field in members:
            add_flag(group, cls, field)


def add_flag(group, cls, field: dataclasses.Field) -> None:
    """One field's flag, in a parser or a group of one."""
    more = {k: v for k, v in field.metadata.items() if k not in ("names", "check")}
    names = _names(cls, field)
    kind = field.type
    while inner := get_args(kind):  # of int | None and list[int] the int
        kind = next(t for t in inner if t is not NoneType)
    if kind is bool and "type" not in more:
        more["action"] = argparse.BooleanOptionalAction if field.default else "store_true"
    elif kind is not str:
        more.setdefault("type", kind)
    if kind is int and "choices" not in more:
        more.setdefault("metavar", "N")
    if names[0].startswith("-"):
        more |= {"dest": field.name}
    if field.default is not REQUIRED:
        more["default"] = field.default
    elif field.default_factory is not REQUIRED:
        more["default"] = field.default_factory()
    elif names[0].startswith("-"):
        more["required"] = True
    group.add_argument(*names, **more)


def _names(cls, field: dataclasses.Field) -> list[str]:
    """The spellings of a flag, the one that is shown first first; of a word its field's name."""
    if field.metadata["names"] is None:
        return [field.name]
    derived = (f"--{field.name.replace('_', separator)}" for separator in cls.SEPARATORS)
    return list(field.metadata["names"] or dict.fromkeys(derived))


def refuse(*cases: tuple[object, str]) -> None:
    """Raise UserError with the words of the first case that is so."""
    for so, words in cases:
        if so:
            raise UserError(words)


def record(settings: Shared, without: set[str] | tuple[str, ...]) -> dict:
    """What a run was told, by name, but for ``without`` and what is None: for recipes and to know
    an interrupted run again."""
    names = [field.name for _, members in groups(type(settings)) for field in members]
    values = {name: getattr(settings, name) for name in names if name not in without}
    return {name: value for name, value in values.items() if value is not None}
