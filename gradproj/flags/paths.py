"""Paths as people give them: a local path, or a ``file://`` address of one."""

import os
import re
import stat
from urllib.parse import unquote

from gradproj.errors import ConfigError

# One slash is enough: str(Path("s3://x")) is s3:/x. But `prepare` takes hf:/FOLDER.
_SCHEME = re.compile(r"(hf(?=://)|(?!hf:)[A-Za-z][A-Za-z0-9+.-]+):/|(pipe):")
REMOTE_SCHEMES = ("s3", "gs", "az", "https", "http", "hf")
_KINDS = {
    stat.S_IFIFO: "a FIFO (named pipe)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def local_path(text: str, *, remote: bool = False) -> str:
    """Return the local path that ``text`` is, or that a ``file://`` address names.

    With ``remote``, an address of a bucket, a web server or the hub is returned as it is.

    Raises:
        ConfigError: an address of another kind, which would become a folder named ``s3:``.
    """
    match = _SCHEME.match(text)
    if match is None:
        return text
    scheme = (match[1] or match[2]).lower()
    if remote and scheme in REMOTE_SCHEMES:
        return text
    if scheme == "file":
        host, slash, path = text[len("file:") :].removeprefix("//").partition("/")
        if host in ("", "localhost"):
            return unquote(slash + path)
    if scheme == "pipe":
        raise ConfigError("is a command, and commands are not run; give a local path")
    hub = " (a model of the hub is named OWNER/NAME)" if "hf:" in text or ".co/" in text else ""
    raise ConfigError(
        f"is an address, and only local paths are read and written; copy or mount it and give its "
        f"path{hub}, or write ./{text} if it is one"
    )


def special_file(path: str) -> str:
    """Return the kind of a file that holds no data of its own: a pipe, a socket or a device."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return ""
    return _KINDS.get(stat.S_IFMT(mode), "")
