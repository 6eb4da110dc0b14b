"""Fields that are flags: their declaration, checks, types and lists."""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from gradproj.errors import ConfigError
from gradproj.flags.paths import local_path, special_file, without_secret

T = TypeVar("T")

DEVICES = ("auto", "cpu", "cuda")
"""Choices of ``--device``; ``distributed.choose_device`` takes them."""


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
    metavar: str = "",
    path: str = "",
    remote: bool = False,
    streams: bool = False,
    group: str = "",
    default_text: str = "",
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
        metavar: what stands for the value in ``--help``, in place of its type: DIR, FILE, NAME.
        path: the value is a path, and this stands for it in ``--help``: DIR, FILE. An address such
            as ``s3://...`` is refused; ``file:///x`` is ``/x``.
        remote: the path may be an address of a bucket, a web server or the hub.
        streams: the path may be a pipe or a device, such as ``/dev/stdin``.
        group: title of the flag's group in ``--help``, in place of its dataclass's.
        default_text: words for the default in ``--help``, if its value says too little or too much.
    """
    declared = {
        "help": help, "flag": name, "positional": positional, "comma_separated": comma_separated,
        "minimum": minimum, "above": above, "maximum": maximum, "below": below, "why": why,
        "choices": tuple(choices), "words": words, "required": required,
        "renamed_from": renamed_from, "metavar": path or metavar, "path": path or None,
        "remote": remote or None, "streams": streams or None,
        "group": group,
        "default_text": default_text,
    }  # fmt: skip
    # A bound of 0 is declared, though it is false.
    metadata = {k: v for k, v in declared.items() if v is not None and v != "" and v != ()}
    return dataclasses.field(default=default, metadata=metadata)


def as_in(section: Any, name: str, **changes: Any) -> Any:
    """Declare a field as ``section`` declares its field of this name, with other ``changes``.

    ``default`` is another default value.
    """
    declared = section.__dataclass_fields__[name]
    default = changes.pop("default", declared.default)
    metadata = {k: v for k, v in declared.metadata.items() if k != "flag"}
    return dataclasses.field(default=default, metadata=metadata | changes)


class Flags:
    """Base of all dataclasses of flags. ``title`` heads their group in ``--help``."""

    title = "flags"

    def __init_subclass__(cls, title: str = "", **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if title:
            cls.title = title

    def __post_init__(self) -> None:
        """Check every field's declared bounds and choices; make local paths of ``file://`` ones.

        Raises:
            ConfigError: names the flag, its bound, choices or type, and the value.
        """
        for f in dataclasses.fields(typing.cast(Any, self)):
            value = getattr(self, f.name)
            if "path" in f.metadata and value:
                value = _as_paths(f, value)
                object.__setattr__(self, f.name, value)  # of a frozen dataclass
            problem = _problem(f, value)
            if problem:
                raise ConfigError(f"{label_of(f)} {problem}")


def _as_paths(f: dataclasses.Field, value: Any) -> Any:
    """Return the value of a path's flag, a text or a tuple of texts, with local paths."""
    if isinstance(value, tuple):
        return tuple(_as_paths(f, item) for item in value)
    try:
        path = local_path(value, remote="remote" in f.metadata)
    except ConfigError as error:
        raise ConfigError(f"{label_of(f)} {without_secret(value)} {error}") from error
    kind = "" if "streams" in f.metadata else special_file(path)
    if kind:
        raise ConfigError(f"{label_of(f)} {value} is {kind}; give a file or folder")
    return path


def _problem(f: dataclasses.Field, value: Any) -> str:
    declared = f.metadata
    is_empty = not value.strip() if isinstance(value, str) else value in (None, (), [])
    if "required" in declared and is_empty:
        return f"is empty; {declared['required']}"
    if value is None or value == f.default or value in declared.get("words", {}).values():
        return ""
    choices = declared.get("choices", ())
    if choices and value not in choices:
        one_of = "one of " if len(choices) > 1 else ""
        return f"is {value!r}; choose {one_of}{', '.join(choices)}"
    try:
        # Negated, so that NaN is refused.
        is_outside = (
            ("minimum" in declared and not value >= declared["minimum"])
            or ("above" in declared and not value > declared["above"])
            or ("maximum" in declared and not value <= declared["maximum"])
            or ("below" in declared and not value < declared["below"])
        )
    except TypeError:
        return f"must be one {type_of(f)[0].__name__}, got {value!r}"
    if is_outside:
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


def label_of(f: dataclasses.Field) -> str:
    return flag_of(f) if f.metadata.get("positional") else f"--{flag_of(f)}"


def word_of(f: dataclasses.Field, value: Any) -> Any:
    """Return the word that stands for a value of a field, or the value itself if none does."""
    words = f.metadata.get("words", {})
    return next((word for word, stands_for in words.items() if stands_for == value), value)


def current_names(section: type, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings recorded under an earlier version's names of flags under today's names."""
    renamed = {f.metadata.get("renamed_from"): f.name for f in dataclasses.fields(section)}
    return {renamed.get(name, name): value for name, value in recorded.items()}


def type_of(f: dataclasses.Field) -> tuple[type, bool]:
    """Return the type of a field's value or items, and whether it is a list.

    ``int | None`` is int, ``tuple[str, ...]`` a list of str.
    """
    kind: Any = f.type
    if isinstance(kind, types.UnionType):
        kind = next(k for k in typing.get_args(kind) if k is not types.NoneType)
    if typing.get_origin(kind) is tuple:
        return typing.get_args(kind)[0], True
    return kind, False


def takes_commas(f: dataclasses.Field) -> bool:
    is_list = type_of(f)[1] and not f.metadata.get("positional")
    return is_list or bool(f.metadata.get("comma_separated"))


def is_required(f: dataclasses.Field) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def typed(name: str, value: Any, f: dataclasses.Field) -> Any:
    """Return a value from TOML or JSON as the field's type."""
    kind, is_list = type_of(f)
    if isinstance(value, str):
        value = f.metadata.get("words", {}).get(value, value)
        if is_list and not f.metadata.get("positional"):
            value = list(split_list(value))
    takes_list = is_list or takes_commas(f)
    items = value if takes_list and isinstance(value, list) else [value]
    if kind is float:
        items = [float(item) if type(item) is int else item for item in items]
    kinds = typing.get_args(f.type) if isinstance(f.type, types.UnionType) else (kind,)
    if any(type(item) not in kinds for item in items):
        wanted = f"a list of {kind.__name__}" if takes_list else f"one {kind.__name__}"
        raise ConfigError(f"{name} must be {wanted}, got {value!r}")
    if is_list:
        return tuple(items)
    return join_list(items) if isinstance(value, list) else items[0]


def from_recorded(section: type[T], recorded: Mapping[str, Any]) -> T:
    """Build a dataclass from recorded flags; flags of other dataclasses are ignored.

    Raises:
        ConfigError: a value of the wrong type, or one that the dataclass refuses.
    """
    fields = {flag_of(f): f for f in dataclasses.fields(typing.cast(Any, section))}
    return section(
        **{f.name: typed(name, recorded[name], f) for name, f in fields.items() if name in recorded}
    )


# --- lists: one rule for all flags and for TOML ---


def split_list(text: str) -> tuple[str, ...]:
    r"""Split ``a,b`` at its commas. ``\,`` is a comma in an item; empty items are dropped."""
    items = (item.replace("\\,", ",").strip(" ") for item in re.split(r"(?<!\\),", text))
    return tuple(item for item in items if item)


def join_list(items: Iterable[str]) -> str:
    """Return the text that ``split_list`` splits into ``items``."""
    return ",".join(item.replace(",", "\\,") for item in items)
