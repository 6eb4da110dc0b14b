"""Addresses of remote objects: ``s3://bucket/key``, ``gs://``, ``az://``, ``https://``, ``hf://``.

An address names a place and nothing else. Credentials in it are refused, and no message shows them.
"""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from posixpath import normpath
from typing import Self
from urllib.parse import quote, unquote

from gradproj.errors import ConfigError
from gradproj.flags.paths import check_no_secret, without_secret

WRITABLE = ("s3", "gs", "az")
"""Schemes of stores that can be written to: they have conditional writes."""
# One slash is enough: str(Path("s3://x")) is s3:/x. But `prepare` takes hf:/FOLDER.
_REMOTE = re.compile(r"(hf(?=://)|s3|gs|az|https?):/{1,2}", re.IGNORECASE)
_HUB = re.compile(r"(datasets|models|spaces|buckets)/([^/@]+/[^/@]+)(?:@([^/]+))?$")


def is_remote(text: str) -> bool:
    """Return True for an address that ``Address.parse`` takes, or refuses by name."""
    return _REMOTE.match(text) is not None


@dataclass(frozen=True, order=True)
class Address:
    """A remote object or the common beginning of several. ``str`` gives the address back.

    Its names are those of ``pathlib.PurePath``, as far as gradproj needs them.
    """

    scheme: str
    bucket: str
    """Bucket or container; for ``https`` host and port; ``datasets/ORG/NAME@REVISION``."""
    key: str = ""
    """Without a slash at either end; of an ``https`` address without percent escapes."""
    anonymous: bool = field(default=False, compare=False)
    """Read without credentials."""

    @classmethod
    def parse(cls, text: str, anonymous: bool = False) -> "Address":
        """Return the address that ``text`` is, to be read without credentials if ``anonymous``.

        Raises:
            ConfigError: it has credentials, a query, no bucket, or is no address. The message does
                not repeat what may be secret.
        """
        match = _REMOTE.match(text)
        if match is None:
            raise ConfigError(
                f"{without_secret(text)!r} is no address; give one such as s3://bucket/folder"
            )
        check_no_secret(text)
        scheme, rest = match[1].lower(), text[match.end() :]
        bucket, _, key = rest.partition("/")
        if scheme == "hf":
            bucket, key = _hub(bucket, key)
        if not bucket:
            raise ConfigError(f"{scheme}:// names no bucket; give {scheme}://BUCKET/KEY")
        if scheme.startswith("http"):
            key = unquote(key)
        return cls(scheme, bucket, _clean(key, scheme), anonymous)

    def __str__(self) -> str:
        key = (
            quote(self.key, safe="/!$&'()*+,;=:@~") if self.scheme.startswith("http") else self.key
        )
        return f"{self.scheme}://{self.bucket}{'/' if key else ''}{key}"

    def of_bucket(self, key: str) -> Self:
        """Return the address of another key of the same bucket."""
        return replace(self, key=key)

    def __truediv__(self, name: str) -> Self:
        if str(name) in ("", "."):
            return self
        return self.of_bucket(_clean(f"{self.key}/{name}", self.scheme))

    def joinpath(self, *names: str) -> Self:
        """Return the address with further parts."""
        return self / "/".join(map(str, names))

    @property
    def name(self) -> str:
        """The part of the key behind the last slash."""
        return self.key.rpartition("/")[2]

    @property
    def stem(self) -> str:
        """The name without its last suffix."""
        return PurePosixPath(self.name).stem

    @property
    def suffix(self) -> str:
        """The end of the name, with its dot: ``.tar``."""
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> Self:
        """The address without its name; the bucket itself is its own parent."""
        return self.of_bucket(self.key.rpartition("/")[0])

    @property
    def parents(self) -> tuple[Self, ...]:
        """All folders above, the nearest first."""
        above, path = [], self
        while path.key:
            path = path.parent
            above.append(path)
        return tuple(above)

    @property
    def is_writable(self) -> bool:
        """Whether the address is of a store that takes objects."""
        return self.scheme in WRITABLE

    @property
    def is_fixed(self) -> bool:
        """Whether the address names a commit of the hub, whose files cannot change."""
        revision = self.bucket.partition("@")[2]
        return self.scheme == "hf" and re.fullmatch("[0-9a-f]{40}", revision) is not None

    @property
    def origin(self) -> "Address":
        """The bucket alone."""
        return Address(self.scheme, self.bucket)

    def resolve(self) -> Self:
        """Return the address: there are no links, and no relative ones."""
        return self

    absolute = expanduser = resolve

    def as_posix(self) -> str:
        """Return the address as text."""
        return str(self)

    def with_name(self, name: str) -> Self:
        """Return the address with another name in the same folder."""
        return self.parent / name

    def with_suffix(self, suffix: str) -> Self:
        """Return the address with another last suffix."""
        return self.with_name(PurePosixPath(self.name).with_suffix(suffix).name)

    def is_relative_to(self, folder: object) -> bool:
        """Return True if the address lies below ``folder``."""
        if not isinstance(folder, Address) or folder.origin != self.origin:
            return False
        return not folder.key or self.key == folder.key or self.key.startswith(folder.key + "/")

    def relative_to(self, folder: "Location") -> PurePosixPath:
        """Return the key's part below ``folder``; a ValueError if it is not there."""
        if not isinstance(folder, Address) or not self.is_relative_to(folder):
            raise ValueError(f"{self} is not below {folder}")
        return PurePosixPath(self.key[len(folder.key) :].lstrip("/"))


Location = Path | Address
"""The place of a file or an object."""


def parse_location(text: str, anonymous: bool = False) -> Location:
    """Return the address or the local path that ``text`` is."""
    return Address.parse(text, anonymous) if is_remote(text) else Path(text)


def _clean(key: str, scheme: str) -> str:
    """Return a key without empty parts; a part of dots would be another object on some stores."""
    parts = [part for part in key.split("/") if part]
    if "." in parts or ".." in parts:
        raise ConfigError(f"the key {normpath(key)!r} of a {scheme}:// address has a part of dots")
    return "/".join(parts)


def _hub(kind: str, rest: str) -> tuple[str, str]:
    """Split ``datasets/ORG/NAME@REVISION/path`` into repository and path."""
    parts = rest.split("/")
    repository = "/".join([kind, *parts[:2]])
    match = _HUB.match(repository)
    if match is None or match[1] == "buckets":
        raise ConfigError(
            f"hf://{kind}/{rest}: give hf://datasets/ORG/NAME[@REVISION]/PATH, a file or folder of "
            "a repository of the hub"
        )
    return repository, "/".join(parts[2:])
