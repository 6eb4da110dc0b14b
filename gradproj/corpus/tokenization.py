"""The rules of a corpus that was tokenized ahead, in a file beside its tars and in its index."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from gradproj.errors import CorpusError
from gradproj.files import write_file_durably
from gradproj.storage.address import Location
from gradproj.storage.folders import read_or_none
from gradproj.storage.object_path import opened

TOKENIZATION_NAME = "tokens.json"
_FORMAT = "gradproj tokenization"


@dataclass(frozen=True, kw_only=True)
class Tokenization:
    """The tokenizer and the rules by which documents became token ids and labels."""

    tokenizer: str
    """A hash of the tokenizer."""
    special_tokens: str
    loss_on: str
    chat_template: str
    """A hash of the chat template; empty if there was none, and so no conversation."""
    name: str = ""
    """The tokenizer as its user named it, for messages."""

    def settings(self) -> dict[str, Any]:
        """Return flag -> value of all that token ids depend on."""
        return {f"--{name}": value for name, value in asdict(self).items() if name != "name"}


def write_tokenization(folder: Path, tokenization: Tokenization) -> None:
    """Write the file that ``read_tokenization`` finds beside the tars of a folder."""
    content = {"format": _FORMAT, "tokenization": tokenization}
    text = msgspec.json.format(msgspec.json.encode(content), indent=2)
    write_file_durably(folder / TOKENIZATION_NAME, [text + b"\n"], mode=0o644)


def read_tokenization(tars: Iterable[Location]) -> Tokenization | None:
    """Return the rules of tars that were tokenized ahead; None if no file beside one has any.

    Raises:
        CorpusError: the file is damaged, or two folders have different rules.
    """
    found: dict[Location, Tokenization] = {}
    for folder in dict.fromkeys(tar.parent for tar in tars):
        path = folder / TOKENIZATION_NAME
        content = read_or_none(opened(path))
        if content is not None:
            found[path] = _decode(path, content)
    if not found:
        return None
    (first, tokenization), *others = found.items()
    for path, other in others:
        if other.settings() != tokenization.settings():
            raise CorpusError(
                f"{first} and {path} name different tokenizers or rules ({tokenization.name} and "
                f"{other.name}): the tars of one corpus must be tokenized in one way"
            )
    return tokenization


class _File(msgspec.Struct):
    format: str
    tokenization: Tokenization


def _decode(path: Location, content: bytes) -> Tokenization:
    try:
        file = msgspec.json.decode(content, type=_File)
        if file.format != _FORMAT:
            raise ValueError(f"its format is {file.format[:40]!r}")
    except (ValueError, msgspec.MsgspecError) as error:
        raise CorpusError(
            f"{path}: not the file that prepare --tokenizer wrote ({error}); restore it"
        ) from error
    return file.tokenization
