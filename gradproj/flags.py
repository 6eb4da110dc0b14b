"""Dataclasses built from command-line flags and a flat TOML file; checks of their values.

A stage declares its settings as a frozen dataclass derived from ``Flags``::

    class BatchConfig(Flags, title="batches"):
        batch_size: int = flag("Largest number of sequences in a batch.", 256, minimum=1)

Bounds and choices are checked whenever the dataclass is built: from a command line, from a file or
in Python code.
"""

import argparse
import dataclasses
import difflib
import math
import re
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from gradproj.errors import ConfigError

T = TypeVar("T")

DEVICES = ("auto", "cpu", "cuda")
"""Choices of ``--device``; ``distributed.choose_device`` takes them."""

# --- declaring flags ---


def flag(
    help: str,
    default: Any = dataclasses.MISSING,
    *,
    name: str = "",
    positional: bool = False,
    comma_separated: bool = False,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    why: str = "",
    choices: Iterable[str] = (),
    words: Mapping[str, Any] | None = None,
    required: str = "",
    renamed_from: str = "",
) -> Any:
    """Declare a dataclass field that is a flag.

    Args:
        help: what the flag does, with its unit. One sentence or two.
        default: its value if it is not given; without one the flag must be given. A default is
            always accepted, whatever the bounds and choices.
        name: name of the flag, if it is not the field's.
        positional: the value stands without the flag's name.
        comma_separated: a ``str`` that holds a list (fields of type ``tuple`` need not say so).
        minimum: smallest number.
        above: excluded lower bound.
        maximum: largest number.
        below: excluded upper bound.
        why: added to the bounds in their error message, in parentheses.
        choices: the values of a string.
        words: words that stand for a value: ``{"auto": 0}``.
        required: if set, an empty value is an error, which this text ends ("give a folder").
        renamed_from: an earlier name of the flag. Giving it is an error that names the new one.
    """
    declared = {
        "help": help,
        "flag": name,
        "positional": positional,
        "comma_separated": comma_separated,
        "minimum": minimum,
        "above": above,
        "maximum": maximum,
        "below": below,
        "why": why,
        "choices": tuple(choices),
        "words": words,
        "required": required,
        "renamed_from": renamed_from,
    }
    # A bound of 0 is declared, though it is false.
    metadata = {k: v for k, v in declared.items() if v is not None and v != "" and v != ()}
    return dataclasses.field(default=default, metadata=metadata)


class Flags:
    """Base of all dataclasses of flags. ``title`` heads their group in ``--help``."""

    title = "flags"

    def __init_subclass__(cls, title: str = "", **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if title:
            cls.title = title

    def __post_init__(self) -> None:
        """Check every field's declared bounds and choices.

        Raises:
            ConfigError: names the flag, its bound or choices, and the value.
        """
        for f in dataclasses.fields(typing.cast(Any, self)):
            problem = _problem(f, getattr(self, f.name))
            if problem:
                raise ConfigError(f"{_label(f)} {problem}")


def _problem(f: dataclasses.Field, value: Any) -> str:
    declared = f.metadata
    is_empty = not value.strip() if isinstance(value, str) else value == ()
    if "required" in declared and is_empty:
        return f"is empty; {declared['required']}"
    if value is None or value == f.default or value in declared.get("words", {}).values():
        return ""
    choices = declared.get("choices", ())
    if choices and value not in choices:
        one_of = "one of " if len(choices) > 1 else ""
        return f"is {value!r}; choose {one_of}{', '.join(choices)}"
    # Negated, so that NaN is refused.
    if (
        ("minimum" in declared and not value >= declared["minimum"])
        or ("above" in declared and not value > declared["above"])
        or ("maximum" in declared and not value <= declared["maximum"])
        or ("below" in declared and not value < declared["below"])
    ):
        why = f" ({declared['why']})" if "why" in declared else ""
        return f"must be {_bounds(declared)}, got {value}{why}"
    return ""


def _bounds(declared: Mapping[str, Any]) -> str:
    if "minimum" in declared and "maximum" in declared:
        return f"from {declared['minimum']:,} to {declared['maximum']:,}"
    texts = {"minimum": "at least {:,}", "above": "more than {:,}", "maximum": "at most {:,}"}
    bounds = [text.format(declared[key]) for key, text in texts.items() if key in declared]
    if "below" in declared:
        below = declared["below"]
        bounds.append("finite" if below == math.inf else f"less than {below:,}")
    return " and ".join(bounds) + "".join(f", or {word}" for word in declared.get("words", ()))


def flag_of(f: dataclasses.Field) -> str:
    """Return a field's name on the command line, without the dashes."""
    return f.metadata.get("flag", f.name)


def _label(f: dataclasses.Field) -> str:
    return flag_of(f) if f.metadata.get("positional") else f"--{flag_of(f)}"


def word_of(f: dataclasses.Field, value: Any) -> Any:
    """Return the word that stands for a value of a field, or the value itself if none does."""
    words = f.metadata.get("words", {})
    return next((word for word, stands_for in words.items() if stands_for == value), value)


def current_names(section: type, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings recorded under an earlier version's names of flags under today's names."""
    renamed = {f.metadata.get("renamed_from"): f.name for f in dataclasses.fields(section)}
    return {renamed.get(name, name): value for name, value in recorded.items()}


def from_recorded(section: type[T], recorded: Mapping[str, Any]) -> T:
    """Build a dataclass from recorded flags; flags of other dataclasses are ignored.

    Raises:
        ConfigError: a value of the wrong type, or one that the dataclass refuses.
    """
    fields = {flag_of(f): f for f in dataclasses.fields(typing.cast(Any, section))}
    return section(
        **{
            f.name: _typed(name, recorded[name], f)
            for name, f in fields.items()
            if name in recorded
        }
    )


# --- lists: one rule for all flags and for TOML ---


def split_list(text: str) -> tuple[str, ...]:
    r"""Split ``a,b`` at its commas. ``\,`` is a comma in an item; empty items are dropped."""
    items = (item.replace("\\,", ",").strip(" ") for item in re.split(r"(?<!\\),", text))
    return tuple(item for item in items if item)


def join_list(items: Iterable[str]) -> str:
    """Return the text that ``split_list`` splits into ``items``."""
    return ",".join(item.replace(",", "\\,") for item in items)


# --- reading flags ---


def parse(
    argv: Sequence[str], prog: str, *sections: type, description: str | None = None
) -> tuple[Any, ...]:
    """Build the dataclasses ``sections`` from flags.

    ``--config FILE.toml`` gives flags that are not on the command line. A flag's name may be
    written with ``-`` for ``_``. ``--help`` prints one group of flags per section.

    Raises:
        ConfigError: an unknown flag or key (names the nearest known one), a value of the wrong
            type, or one that a dataclass refuses.
    """
    fields: dict[str, dataclasses.Field] = {}
    titles: dict[str, str] = {}
    for section in sections:
        for f in dataclasses.fields(section):
            if flag_of(f) not in fields:
                fields[flag_of(f)], titles[flag_of(f)] = f, _home(section, f.name).title
    given = _given(_parser(prog, description, fields, titles), argv, fields)
    from_file = _read_toml(Path(given.pop("config")), fields) if "config" in given else {}
    values = {**from_file, **given}
    missing = [_label(f) for name, f in fields.items() if _is_required(f) and name not in values]
    if missing:
        raise ConfigError(f"{', '.join(missing)} must be given; --help lists all flags")
    return tuple(
        section(
            **{
                f.name: values[flag_of(f)]
                for f in dataclasses.fields(section)
                if flag_of(f) in values
            }
        )
        for section in sections
    )


def _home(section: type, field_name: str) -> Any:
    """Return the class that declares a field first, whose title heads its group."""
    return next(
        c
        for c in reversed(section.__mro__)
        if field_name in vars(c).get("__dataclass_fields__", {})
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.removeprefix("argument "))


def _parser(
    prog: str,
    description: str | None,
    fields: Mapping[str, dataclasses.Field],
    titles: Mapping[str, str],
) -> argparse.ArgumentParser:
    positional = [
        f"{name} ..." if _type_of(f)[1] else name
        for name, f in fields.items()
        if f.metadata.get("positional")
    ]
    parser = _Parser(
        prog=prog,
        usage=" ".join([prog, *positional, "[--flag VALUE ...]"]),
        description=description,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", metavar="FILE.toml", help="Flat TOML file of flags; its keys are their names."
    )
    groups: dict[str, Any] = {}
    for name, f in fields.items():
        title = titles[name]
        if f.metadata.get("positional"):
            group: Any = parser
        else:
            group = groups.get(title) or groups.setdefault(title, parser.add_argument_group(title))
        _add_flag(group, name, f)
    return parser


def _add_flag(group: Any, name: str, f: dataclasses.Field) -> None:
    kind, is_list = _type_of(f)
    text = f.metadata.get("help", "")
    if _is_required(f) and not f.metadata.get("positional"):
        text += " (required)"
    elif not (_is_required(f) or f.default in (None, "", ()) or f.default is False):
        text += f" (default: {word_of(f, f.default)})"
    text = text.replace("%", "%%")  # argparse formats it
    if f.metadata.get("positional"):
        group.add_argument(name, nargs="+" if is_list else None, type=kind, help=text)
    elif kind is bool:
        group.add_argument(
            f"--{name}", action=argparse.BooleanOptionalAction, default=None, help=text
        )
    else:
        choices, words = f.metadata.get("choices"), f.metadata.get("words", {})
        metavar = "|".join(map(str, choices or (*words, kind.__name__.upper())))
        group.add_argument(
            f"--{name}",
            action="append" if _takes_commas(f) else "store",
            type=_reader(kind, words),
            metavar=f"{metavar},..." if _takes_commas(f) else metavar,
            help=text,
        )


def _reader(kind: type, words: Mapping[str, Any]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        return words[text] if text in words else kind(text)

    read.__name__ = kind.__name__  # argparse prints it when it refuses a text
    return read


def _given(
    parser: argparse.ArgumentParser, argv: Sequence[str], fields: Mapping[str, dataclasses.Field]
) -> dict[str, Any]:
    """Return the values on the command line by flag."""
    words = [_with_underscores(word, fields) for word in argv]
    given, unknown = parser.parse_known_args(words)
    if unknown:
        _refuse(unknown[0], words, fields)
    values = {name: value for name, value in vars(given).items() if value is not None}
    for name, value in values.items():
        if isinstance(value, list):
            f = fields[name]
            if not _type_of(f)[1]:
                values[name] = ",".join(value)
                continue
            items = (
                value if f.metadata.get("positional") else [i for v in value for i in split_list(v)]
            )
            if not items:
                raise ConfigError(f"--{name} is empty; give a list such as A,B, or leave it out")
            values[name] = tuple(items)
    return values


def _with_underscores(word: str, fields: Mapping[str, dataclasses.Field]) -> str:
    """Spell a flag as it is declared: ``--proj-layers=a`` becomes ``--proj_layers=a``."""
    if not word.startswith("--") or word == "--":
        return word
    name, equals, value = word[2:].partition("=")
    for prefix in ("", "no-"):
        declared = name.removeprefix(prefix).replace("-", "_")
        if name.startswith(prefix) and declared in fields:
            return f"--{prefix}{declared}{equals}{value}"
    new_name = _renamed(name.removeprefix("no-"), fields)
    if new_name:
        raise ConfigError(f"--{name} is now called --{new_name}")
    return word


def _renamed(name: str, fields: Mapping[str, dataclasses.Field]) -> str:
    """Return today's name of a flag that was called ``name``, or an empty text."""
    old = name.replace("-", "_")
    return next((new for new, f in fields.items() if f.metadata.get("renamed_from") == old), "")


def _refuse(
    unknown: str, words: Sequence[str], fields: Mapping[str, dataclasses.Field]
) -> NoReturn:
    if unknown.startswith("-"):
        near = difflib.get_close_matches(
            unknown.split("=")[0], [f"--{name}" for name in fields], n=1
        )
        hint = f"did you mean {near[0]}?" if near else "--help lists all flags"
        raise ConfigError(f"unknown flag {unknown!r}; {hint}")
    before = list(words[: words.index(unknown)])
    flags = [word.removeprefix("--").split("=")[0] for word in before if word.startswith("--")]
    hint = "--help lists all flags"
    if flags and flags[-1] in fields and _takes_commas(fields[flags[-1]]):
        hint = f"--{flags[-1]} takes one list with commas: --{flags[-1]} A,B"
    raise ConfigError(f"unexpected argument {unknown!r}; {hint}")


def _type_of(f: dataclasses.Field) -> tuple[type, bool]:
    """Return the type of a field's value or items, and whether it is a list.

    ``int | None`` is int, ``tuple[str, ...]`` a list of str.
    """
    kind: Any = f.type
    if isinstance(kind, types.UnionType):
        kind = next(k for k in typing.get_args(kind) if k is not types.NoneType)
    if typing.get_origin(kind) is tuple:
        return typing.get_args(kind)[0], True
    return kind, False


def _takes_commas(f: dataclasses.Field) -> bool:
    is_list = _type_of(f)[1] and not f.metadata.get("positional")
    return is_list or bool(f.metadata.get("comma_separated"))


def _is_required(f: dataclasses.Field) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


# --- reading TOML ---


def _read_toml(path: Path, fields: Mapping[str, dataclasses.Field]) -> dict[str, Any]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"--config {path} cannot be read: {error}") from error
    values = {}
    for key, value in content.items():
        name = key if key in fields else key.replace("-", "_")
        if name not in fields:
            new_name = _renamed(key, fields)
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(fields))}"
            hint = f"it is now called {new_name!r}" if new_name else hint
            raise ConfigError(f"--config {path}: unknown key {key!r}; {hint}")
        try:
            values[name] = _typed(key, value, fields[name])
        except ConfigError as error:
            raise ConfigError(f"--config {path}: {error}") from error
    return values


def _typed(name: str, value: Any, f: dataclasses.Field) -> Any:
    """Return a value from TOML or JSON as the field's type."""
    kind, is_list = _type_of(f)
    if isinstance(value, str):
        value = f.metadata.get("words", {}).get(value, value)
        if is_list and not f.metadata.get("positional"):
            value = list(split_list(value))
    takes_list = is_list or _takes_commas(f)
    items = value if takes_list and isinstance(value, list) else [value]
    if kind is float:
        items = [float(item) if type(item) is int else item for item in items]
    if any(type(item) is not kind for item in items):
        wanted = f"a list of {kind.__name__}" if takes_list else f"one {kind.__name__}"
        raise ConfigError(f"{name} must be {wanted}, got {value!r}")
    if is_list:
        return tuple(items)
    return join_list(items) if isinstance(value, list) else items[0]
