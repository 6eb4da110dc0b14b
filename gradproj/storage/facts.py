"""Facts that tell one version of a remote object from another."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any


@dataclass(frozen=True)
class ObjectFacts:
    """Facts that tell one version of an object from another."""

    size_bytes: int
    etag: str = ""
    """Empty if the server names none."""
    modified_ns: int = 0


def facts_of(meta: dict[str, Any]) -> ObjectFacts:
    """Return the facts that obstore's description of an object holds."""
    when: datetime = meta["last_modified"]
    return ObjectFacts(meta["size"], meta.get("e_tag") or "", int(when.timestamp()) * 10**9)


def differences(now: ObjectFacts, then: ObjectFacts) -> list[str]:
    """Return what differs between two versions of an object, for a message; empty if nothing does.

    Times count only where the server names no etags.
    """
    found = []
    if now.size_bytes != then.size_bytes:
        found.append(f"it has {now.size_bytes:,} bytes, the index says {then.size_bytes:,}")
    if now.etag != then.etag and now.etag and then.etag:
        found.append(f"its etag is {now.etag}, the index says {then.etag}")
    if not (now.etag and then.etag) and now.modified_ns != then.modified_ns:
        found.append("it was written again since")
    return found
