"""Repositories of the Hugging Face hub: revisions, listings, and the address of their files."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from gradproj.errors import CorpusError
from gradproj.storage.address import Address
from gradproj.storage.facts import ObjectFacts
from gradproj.storage.failures import Reason
from gradproj.storage.retry import retried

T = TypeVar("T")

_PATHS_AT_ONCE = 500


def pinned(address: Address) -> Address:
    """Return the address with its revision replaced by the commit that it is now.

    Raises:
        CorpusError: there is no such repository or revision, or the hub cannot be reached.
    """
    kind, name, revision = _parts(address)
    if address.is_fixed:
        return address
    info = _ask(address, lambda api: api.repo_info(name, repo_type=kind, revision=revision))
    return replace(address, bucket=f"{kind}s/{name}@{info.sha}")


def list_folder(folder: Address) -> dict[Address, ObjectFacts]:
    """Return the files of a folder of a repository, without those of folders in it."""
    kind, name, revision = _parts(folder)
    key = folder.key or None
    entries = _ask(
        folder, lambda api: list(api.list_repo_tree(name, key, repo_type=kind, revision=revision))
    )
    files = {folder.of_bucket(entry.path): entry for entry in entries if _is_file(entry)}
    return {address: _facts(files[address]) for address in sorted(files)}


def facts(addresses: Sequence[Address]) -> dict[Address, ObjectFacts]:
    """Return the facts of files of one repository; those that do not exist are left out."""
    kind, name, revision = _parts(addresses[0])
    found: dict[Address, ObjectFacts] = {}
    for first in range(0, len(addresses), _PATHS_AT_ONCE):
        some = addresses[first : first + _PATHS_AT_ONCE]
        keys = [address.key for address in some]
        entries = _ask(
            some[0],
            lambda api, keys=keys: api.get_paths_info(  # type: ignore[misc]
                name, keys, repo_type=kind, revision=revision
            ),
        )
        found |= {
            some[0].of_bucket(entry.path): _facts(entry) for entry in filter(_is_file, entries)
        }
    return found


def base_of(address: Address) -> str:
    """Return the web address under which the repository's files lie."""
    kind, name, revision = _parts(address)
    folder = "" if kind == "model" else f"{kind}s/"
    return f"{_endpoint()}/{folder}{name}/resolve/{revision}"


def token() -> str:
    """Return the user's token, from ``HF_TOKEN`` or a login; empty without one."""
    from huggingface_hub import get_token

    return get_token() or ""


def _parts(address: Address) -> tuple[str, str, str]:
    """Return kind (``dataset``), name and revision of the address's repository."""
    kind, _, rest = address.bucket.partition("/")
    name, _, revision = rest.partition("@")
    return kind.removesuffix("s"), name, revision or "main"


def _endpoint() -> str:
    from huggingface_hub import constants

    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi(endpoint=_endpoint())


def _is_file(entry: Any) -> bool:
    return hasattr(entry, "blob_id")


def _facts(entry: Any) -> ObjectFacts:
    # The hash of the content, which stays while the file does, in whatever commit.
    return ObjectFacts(entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id)


def _ask(address: Address, question: Callable[[Any], T]) -> T:
    """Ask the hub's interface, again while it is too busy (429) or cannot be reached."""
    from huggingface_hub import errors

    words = {
        errors.GatedRepoError: "the repository is gated: accept its terms on its page, and give a "
        "token that may read it (HF_TOKEN)",
        errors.RepositoryNotFoundError: "there is no such repository, or it is private; check its "
        "name, or give a token that may read it (HF_TOKEN)",
        errors.RevisionNotFoundError: "the repository has no such revision",
        errors.EntryNotFoundError: "there is no such file or folder",
        errors.OfflineModeIsEnabled: "HF_HUB_OFFLINE is set; unset it to read from the hub",
    }

    def meaning(error: BaseException) -> Reason:
        if isinstance(error, tuple(words)):
            return "other"
        status = _status(error)
        if status is not None:
            return "unavailable" if status == 429 or status >= 500 else "other"
        is_network = type(error).__module__.startswith("httpx") or isinstance(error, OSError)
        if not is_network:
            return "other"
        return "unreachable" if type(error).__name__ == "ConnectError" else "unavailable"

    try:
        return retried(lambda: question(_api()), address, meaning=meaning)
    except Exception as error:
        reason = next((text for kind, text in words.items() if isinstance(error, kind)), "")
        status = _status(error)
        if not (reason or status) and meaning(error) == "other":
            raise
        reason = reason or "the hub cannot be reached, or refuses; check the address"
        answer = f" (the answer was {status})" if status else ""
        raise CorpusError(f"{address}: {reason}{answer}") from None


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)
