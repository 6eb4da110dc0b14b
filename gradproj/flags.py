"""Dataclasses from flags and one flat TOML file of the same names; needs none of the stages it is given.

A field's flag is its name, or ``metadata["flag"]``; ``metadata["help"]`` and ``metadata["choices"]`` go to the
parser; ``metadata["words"]`` are words that stand for a value, ``{"auto": 0}``. What a dataclass checks in
``__post_init__`` is checked however the value came in.
"""

import argparse
import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from gradproj.errors import ConfigError


def parse(
    argv: list[str], prog: str, *sections: type, description: str | None = None
) -> tuple[Any, ...]:
    """Build the dataclasses ``sections`` from flags, and from ``--config FILE.toml`` where a flag is not given.

    Raises:
        ConfigError: an unknown flag or key (with the nearest known one), a value of the wrong type, or
            one that a dataclass refuses.
    """
    parser = _Parser(prog=prog, description=description, allow_abbrev=False)
    parser.add_argument(
        "--config", metavar="FILE.toml", help="flat TOML file; its keys are the flags' names"
    )
    fields = {flag_of(f): f for section in sections for f in dataclasses.fields(section)}
    for flag, f in fields.items():
        _add_flag(parser, flag, f)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(_unknown(unknown[0], [f"--{flag}" for flag in fields]))
    values = {k: v for k, v in vars(given).items() if v is not None}
    from_file = _read_toml(Path(values.pop("config")), fields) if "config" in values else {}
    values = {**from_file, **values}
    missing = [f"--{flag}" for flag, f in fields.items() if _is_required(f) and flag not in values]
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


def flag_of(f: dataclasses.Field) -> str:
    """A field's name on the command line, without the dashes."""
    return f.metadata.get("flag", f.name)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.removeprefix("argument "))


def _add_flag(parser: argparse.ArgumentParser, flag: str, f: dataclasses.Field) -> None:
    kind, repeated = _kind(f)
    default = (
        ""
        if _is_required(f) or f.default in (None, "", ())
        else f" (default: {in_words(f, f.default)})"
    )
    options: dict[str, Any] = {
        "help": f.metadata.get("help", "").replace("%", "%%") + default,
        "default": None,
    }
    if kind is bool:
        parser.add_argument(f"--{flag}", action=argparse.BooleanOptionalAction, **options)
    elif f.metadata.get("positional"):
        parser.add_argument(flag, nargs="+" if repeated else None, type=kind, help=options["help"])
    else:
        choices, words = f.metadata.get("choices"), f.metadata.get("words", {})
        metavar = "|".join(map(str, choices or (*words, kind.__name__.upper())))
        parser.add_argument(
            f"--{flag}",
            type=_reader_of(kind, words),
            metavar=metavar,
            nargs="+" if repeated else None,
            **options,
        )


def _reader_of(kind: type, words: dict[str, Any]) -> Callable[[str], Any]:
    """What turns the text of a flag into its value."""

    def read(text: str) -> Any:
        return words[text] if text in words else kind(text)

    read.__name__ = kind.__name__  # argparse says it where a text is refused
    return read


def in_words(f: dataclasses.Field, value: Any) -> Any:
    """A field's value as it is written in a file or on a command line: the word that stands for it, if any does."""
    return next(
        (word for word, meant in f.metadata.get("words", {}).items() if meant == value), value
    )


def _kind(f: dataclasses.Field) -> tuple[type, bool]:
    """A field's scalar type and whether it takes several: ``int | None`` is int, ``tuple[str, ...]`` str, many."""
    kind: Any = f.type
    if isinstance(kind, str):  # from a module with postponed annotations
        kind = _FIELD_TYPES[kind]
    if isinstance(kind, types.UnionType):
        kind = next(k for k in typing.get_args(kind) if k is not types.NoneType)
    if typing.get_origin(kind) is tuple:
        return typing.get_args(kind)[0], True
    return kind, False


_FIELD_TYPES: dict[str, Any] = {
    "str": str,
    "int": int,
    "float": float,
    "bool": bool,
    "int | None": int,
    "str | None": str,
    "tuple[str, ...]": tuple[str, ...],
}


def _is_required(f: dataclasses.Field) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name.split("=")[0], known, n=1)
    return f"unknown flag {name!r}" + (
        f"; did you mean {near[0]}?" if near else "; --help lists all flags"
    )


def _read_toml(path: Path, fields: dict[str, dataclasses.Field]) -> dict[str, Any]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"--config {path} cannot be read: {error}") from error
    values = {}
    for key, value in content.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(fields))}"
            raise ConfigError(f"--config {path}: unknown key {key!r}; {hint}")
        values[key] = _from_toml(path, key, value, fields[key])
    return values


def _from_toml(path: Path, key: str, value: Any, f: dataclasses.Field) -> Any:
    kind, repeated = _kind(f)
    value = f.metadata.get("words", {}).get(value, value) if isinstance(value, str) else value
    items = value if repeated and isinstance(value, list) else [value]
    if kind is float:
        items = [float(item) if type(item) is int else item for item in items]
    if any(type(item) is not kind for item in items) or (not repeated and isinstance(value, list)):
        wanted = f"a list of {kind.__name__}" if repeated else f"one {kind.__name__}"
        raise ConfigError(f"--config {path}: {key} must be {wanted}, got {value!r}")
    return tuple(items) if repeated else items[0]
