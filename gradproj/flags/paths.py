"""Paths as people give them: a local path, or a ``file://`` address of one."""

import os
import re
import stat
from urllib.parse import unquote

from gradproj.errors import ConfigError

# One slash is enough: str(Path("s3://x")) is s3:/x. But `prepare` takes hf:/FOLDER.
_SCHEME = re.compile(r"(hf(?=://)|(?!hf:)[A-Za-z][A-Za-z0-9+.-]+):/|(pipe):")
REMOTE_SCHEMES = ("s3", "gs", "az", "https", "http", "hf")
_SECRET = r"x-amz-|x-goog-|signature|credential|token|sig|sv|awsaccesskeyid|key|password"
# In a key of a bucket a question mark may also be a part of a name, or of a pattern.
_SIGNED = re.compile(rf"(?:.*&)?[\w-]*(?:{_SECRET})[\w-]*=", re.IGNORECASE)
_PROBLEMS = {
    "credentials": "has credentials, which do not belong in an address: give them where the "
    "store's own tools find them (environment, profile)",
    "signature": "has a signature or token, which may be secret and may expire: give the address "
    "without it",
    "query": "has a query, which may be secret and may expire: give the address without it",
}
_HOST = re.compile(r"(?:\[[^\]]*\]|[^:@]*)(?::\d*)?")
_KINDS = {
    stat.S_IFIFO: "a FIFO (named pipe)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def without_secret(text: str) -> str:
    """Return a path or an address for a message, without what may be secret in it."""
    return _split_secret(text)[0]


def check_no_secret(text: str) -> None:
    """Raise a ``ConfigError``, which does not repeat it, for a user, password or query."""
    safe, secret = _split_secret(text)
    if secret:
        raise ConfigError(f"{safe} {_PROBLEMS[secret]}")


def _split_secret(text: str) -> tuple[str, str]:
    """Return a text without what may be secret in it, and its problem; "" for none."""
    match = _SCHEME.match(text)
    if match is None or match[2]:
        return ("pipe:..." if match else text), ""
    scheme, rest = match[1].lower(), text[match.end() :].removeprefix("/")
    place, question, query = rest.partition("?")
    # Before the bucket, or before the owner of a repository. A slash may be a part of a password.
    names = place.split("/")[: 2 if scheme == "hf" else 1]
    hosts = _HOST if scheme.startswith("http") else re.compile("[^:@]*")
    if not all(hosts.fullmatch(name) for name in names):
        _, at, behind = place.rpartition("@")
        return f"{scheme}://...{at}{behind}", "credentials"
    if question and (scheme.startswith("http") or _SIGNED.match(query)):
        kind = "signature" if _SIGNED.match(query) else "query"
        return f"{scheme}://{place}?...", kind
    return text, ""


def local_path(text: str, *, remote: bool = False) -> str:
    """Return the local path that ``text`` is, or that a ``file://`` address names.

    With ``remote``, an address of a bucket, a web server or the hub is returned as it is.

    Raises:
        ConfigError: an address of another kind, which would become a folder named ``s3:``, or one
            with credentials. The caller begins the message with ``without_secret(text)``.
    """
    _, secret = _split_secret(text)
    if secret:
        raise ConfigError(_PROBLEMS[secret])
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
