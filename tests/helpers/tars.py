"""Tars made by the standard library, and what the slow way says of them: shared by the corpus's tests."""

import io
import json
import tarfile
import zlib
from pathlib import Path

from webdataset.tariterators import group_by_keys, tar_file_iterator

BLOCK = 512
Members = list[tuple[str, bytes]]


def write_tar(
    path: Path, members: Members, form: int = tarfile.USTAR_FORMAT, mtime: float = 0
) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), mtime
            tar.addfile(info, io.BytesIO(data))
    return path


def document(text: str, domain: str | None = None, **more: object) -> bytes:
    fields: dict[str, object] = {"text": text, **more}
    return json.dumps(
        fields if domain is None else fields | {"meta": {"pile_set_name": domain}}
    ).encode()


def plain_members(n: int, first: int = 0) -> Members:
    return [
        (f"{i:06d}.json", document(f"text {i} " * (i % 90), f"domain {i % 3}"))
        for i in range(first, first + n)
    ]


def slow_samples(path: Path) -> list[dict]:
    """What webdataset itself makes of a whole tar."""
    with open(path, "rb") as file:
        members = ({**member, "__url__": path.name} for member in tar_file_iterator(file))
        return list(group_by_keys(members))


def slow_offsets(path: Path) -> dict[str, int]:
    """Each member's first header, by name, from the standard library."""
    with tarfile.open(path) as tar:
        return {info.name: info.offset for info in tar}


def slow_domain(data: bytes | None, path: tuple[str, ...] = ("meta", "pile_set_name")) -> str:
    try:
        value = json.loads((data or b"").decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return "unknown"
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, str) and value else "unknown"


def slow_crc(keys: list[str]) -> int:
    return zlib.crc32("\n".join(keys).encode("utf-8", "surrogateescape"))


def header(
    name: bytes, n_bytes: int, kind: bytes = b"0", size: bytes = b"", magic: bytes = b"ustar\x0000"
) -> bytes:
    """One header by hand, for what the standard library does not write."""
    head = bytearray(BLOCK)
    head[: len(name)] = name
    head[124:136] = size or b"%011o\0" % n_bytes
    head[156:157] = kind
    head[257 : 257 + len(magic)] = magic
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)
