"""Reads dataclasses of flags from a command line and a flat TOML file."""

import argparse
import dataclasses
import difflib
import itertools
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from gradproj.errors import ConfigError
from gradproj.flags.declaration import (
    flag_of,
    is_required,
    label_of,
    split_list,
    takes_commas,
    type_of,
    typed,
    word_of,
)
from gradproj.flags.paths import local_path, without_secret


def parse(
    argv: Sequence[str],
    prog: str,
    *sections: type,
    description: str | None = None,
    defaults: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda given: {},
) -> tuple[Any, ...]:
    """Build the dataclasses ``sections`` from flags.

    ``--config FILE.toml`` gives flags that are not on the command line. A flag's name may be
    written with ``-`` for ``_``. ``--help`` groups flags by the dataclass that declares them, a
    derived one before its bases. ``defaults`` returns other defaults, flag -> value, for the flags
    that are given.

    Raises:
        ConfigError: an unknown flag or key (names the nearest known one), a value of the wrong
            type, or one that a dataclass refuses.
    """
    fields: dict[str, dataclasses.Field] = {}
    titles: dict[str, str] = {}
    for section in sections:
        homes = {f: _home(section, f.name) for f in dataclasses.fields(section)}
        for f in sorted(homes, key=lambda f: section.__mro__.index(homes[f])):
            if flag_of(f) not in fields:
                fields[flag_of(f)] = f
                titles[flag_of(f)] = f.metadata.get("group", homes[f].title)
    given = _given(_parser(prog, description, fields, titles), argv, fields)
    from_file = _read_toml(given.pop("config"), fields) if "config" in given else {}
    values = {**from_file, **given}
    values = {**defaults(values), **values}
    missing = [label_of(f) for name, f in fields.items() if is_required(f) and name not in values]
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
    fields = dict(sorted(fields.items(), key=lambda item: _is_optional_list(item[1])))  # last
    positional = [_usage(name, f) for name, f in fields.items() if f.metadata.get("positional")]
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


def _is_optional_list(f: dataclasses.Field) -> bool:
    return bool(f.metadata.get("positional")) and type_of(f)[1] and not is_required(f)


def _usage(name: str, f: dataclasses.Field) -> str:
    if not type_of(f)[1]:
        return name
    return f"[{name} ...]" if _is_optional_list(f) else f"{name} ..."


def _add_flag(group: Any, name: str, f: dataclasses.Field) -> None:
    kind, is_list = type_of(f)
    text = f.metadata.get("help", "")
    if is_required(f) and not f.metadata.get("positional"):
        text += " (required)"
    elif not (is_required(f) or f.default in (None, "", ()) or f.default is False):
        text += f" (default: {f.metadata.get('default_text', word_of(f, f.default))})"
    text = text.replace("%", "%%")  # argparse formats it
    if f.metadata.get("positional"):
        nargs = ("*" if _is_optional_list(f) else "+") if is_list else None
        # A list of any length with a default is not among the required ones of argparse's error.
        group.add_argument(name, nargs=nargs, type=kind, help=text, default=None)
    elif kind is bool:
        group.add_argument(
            f"--{name}", action=argparse.BooleanOptionalAction, default=None, help=text
        )
    else:
        choices, words = f.metadata.get("choices"), f.metadata.get("words", {})
        value = f.metadata.get("metavar", kind.__name__.upper())
        metavar = "|".join(map(str, choices or (*words, value)))
        group.add_argument(
            f"--{name}",
            action="append" if takes_commas(f) else "store",
            type=_list_reader(kind) if is_list else _reader(kind, words),
            metavar=f"{metavar},..." if takes_commas(f) else metavar,
            help=text,
        )


def _reader(kind: type, words: Mapping[str, Any]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        return words[text] if text in words else kind(text)

    read.__name__ = kind.__name__  # argparse prints it when it refuses a text
    return read


def _split_positional(
    words: Sequence[str], fields: Mapping[str, dataclasses.Field]
) -> tuple[dict[str, list[str]], list[str]]:
    """Return the items of an optional list before the first flag, by its name, and other words."""
    lists = [name for name, f in fields.items() if _is_optional_list(f)]
    n_words = sum(bool(f.metadata.get("positional")) for f in fields.values()) - len(lists)
    leading = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    if not lists:
        return {}, list(words)
    return {lists[0]: leading[n_words:]}, [*leading[:n_words], *words[len(leading) :]]


def _list_reader(kind: type) -> Callable[[str], tuple[Any, ...]]:
    def read(text: str) -> tuple[Any, ...]:
        return tuple(kind(item) for item in split_list(text))

    read.__name__ = f"list of {kind.__name__}"
    return read


def _given(
    parser: argparse.ArgumentParser, argv: Sequence[str], fields: Mapping[str, dataclasses.Field]
) -> dict[str, Any]:
    """Return the values on the command line by flag."""
    words = _joined([_with_underscores(word, fields) for word in argv], fields)
    further, words = _split_positional(words, fields)
    given, unknown = parser.parse_known_args(words)
    values = {name: value for name, value in vars(given).items() if value is not None}
    # What argparse finds for an optional list is behind a flag, such as `--layers A B`.
    unknown = [word for name in further for word in values.pop(name, [])] + unknown
    if unknown:
        _refuse(unknown[0], words, fields)
    values |= {name: items for name, items in further.items() if items}
    for name, value in values.items():
        if isinstance(value, list):
            f = fields[name]
            if not type_of(f)[1]:
                values[name] = ",".join(value)
                continue
            items = value if f.metadata.get("positional") else [i for v in value for i in v]
            if not items:
                raise ConfigError(f"--{name} is empty; give a list such as A,B, or leave it out")
            values[name] = tuple(items)
    return values


def _with_underscores(word: str, fields: Mapping[str, dataclasses.Field]) -> str:
    """Spell a flag as it is declared: ``--proj-layers=a`` becomes ``--proj_layers=a``."""
    if not word.startswith("--") or word == "--":
        return word
    name, equals, value = word[2:].partition("=")
    for prefix, spelled in (("", ""), ("no-", "no-"), ("no_", "no-")):
        declared = name.removeprefix(prefix).replace("-", "_")
        if name.startswith(prefix) and declared in fields:
            return f"--{spelled}{declared}{equals}{value}"
    new_name = _renamed(name.removeprefix("no-"), fields)
    if new_name:
        raise ConfigError(f"--{name} is now called --{new_name}")
    return word


def _joined(words: Sequence[str], fields: Mapping[str, dataclasses.Field]) -> list[str]:
    """Join a list's flag and its value if that begins with a dash, which argparse would refuse."""
    joined: list[str] = []
    for word in words:
        f = fields.get(joined[-1].removeprefix("--")) if joined else None
        is_dashed = word.startswith("-") and not word.startswith("--")
        if f is not None and joined[-1].startswith("--") and takes_commas(f) and is_dashed:
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


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
    if flags and flags[-1] in fields and takes_commas(fields[flags[-1]]):
        hint = f"--{flags[-1]} takes one list with commas: --{flags[-1]} A,B"
    elif flags and flags[-1] in fields and fields[flags[-1]].metadata.get("path") == "TARS":
        path = Path(unknown)
        hint = (
            f"--{flags[-1]} takes one value: quote a pattern, so that the shell leaves it alone "
            f"(--{flags[-1]} '{path.with_name('*' + path.suffix)}'), or name the folder"
        )
    raise ConfigError(f"unexpected argument {unknown!r}; {hint}")


# --- reading TOML ---


def _read_toml(path: str, fields: Mapping[str, dataclasses.Field]) -> dict[str, Any]:
    try:
        content = tomllib.loads(Path(local_path(path)).read_text(encoding="utf-8-sig"))
    except ConfigError as error:
        raise ConfigError(f"--config {without_secret(path)} {error}") from error
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
            values[name] = typed(key, value, fields[name])
        except ConfigError as error:
            raise ConfigError(f"--config {path}: {error}") from error
    return values
