"""Documents, tars and inputs of `prepare` for the tests, and what the slow way reads in them."""

import bz2
import contextlib
import functools
import gzip
import io
import json
import lzma
import re
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.ipc
import webdataset
import zstandard
from pyarrow import parquet
from webdataset.tariterators import group_by_keys, tar_file_iterator

from gradproj.corpus.prepare import prepare
from gradproj.corpus.prepare_config import PrepareConfig

WORDS = re.findall(
    r"\w+",
    "the of and to in is that it was for on are as with they be at one have this from or had by "
    "hot but some what there we can out other were all your when up use word how said an each she "
    "which do their time if will way about many then them would write like so these her long make "
    "thing see him two has look more day could go",
)


def words(n: int, seed: int) -> str:
    """Return ``n`` seeded words."""
    generator = np.random.default_rng(seed)
    return " ".join(WORDS[i] for i in generator.integers(0, len(WORDS), n))


def mixed_documents(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return documents of 1 to 60 words in three domains, in the Pile's format."""
    generator = np.random.default_rng(seed)
    return [
        {
            "text": words(int(generator.integers(1, 60)), 1000 * seed + i),
            "meta": {"pile_set_name": ("Github", "ArXiv", "Pile-CC")[i % 3]},
        }
        for i in range(n)
    ]


def make_corpus(
    folder: Path, documents: Sequence[dict[str, Any] | bytes], per_tar: int = 40
) -> Path:
    """Write documents (or raw bytes of their ``.json``) as WebDataset tars."""
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, len(documents), per_tar):
        with tarfile.open(folder / f"shard-{first // per_tar:06d}.tar", "w") as tar:
            for i, document in enumerate(documents[first : first + per_tar], first):
                data = document if isinstance(document, bytes) else json.dumps(document).encode()
                member = tarfile.TarInfo(f"{i:012d}.json")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return folder


# ---- Tars, written and read by the standard library and webdataset

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
    """Read a whole tar with webdataset."""
    with open(path, "rb") as file:
        members = ({**member, "__url__": path.name} for member in tar_file_iterator(file))
        return list(group_by_keys(members))


def slow_offsets(path: Path) -> dict[str, int]:
    """Return the offset of each member's first header by name, from the standard library."""
    with tarfile.open(path) as tar:
        return {info.name: info.offset for info in tar}


def slow_domain(data: bytes | None, path: tuple[str, ...] = ("meta", "pile_set_name")) -> str:
    try:
        value = json.loads((data or b"").decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return "unknown"
    for name in path:
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = json.loads(value, parse_constant=lambda text: int(text))  # NaN is no JSON
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, str) and value else "unknown"


def slow_crc(keys: list[str]) -> int:
    return zlib.crc32("\n".join(keys).encode("utf-8", "surrogateescape"))


def header(
    name: bytes, n_bytes: int, kind: bytes = b"0", size: bytes = b"", magic: bytes = b"ustar\x0000"
) -> bytes:
    """Build a header that the standard library does not write."""
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


# ---- Inputs of prepare


def input_record(text, domain="web", **meta):
    return {"text": text, "meta": {"pile_set_name": domain, **meta}}


def line_of(value, **options):
    return json.dumps(value, **options).encode() + b"\n"


def write_jsonl(path, values, **options):
    path.write_bytes(b"".join(line_of(value, **options) for value in values))
    return str(path)


COMPRESS = {
    ".gz": gzip.compress,
    ".bz2": lambda raw: bz2.compress(raw, 1),  # in blocks of 100 kB
    ".xz": functools.partial(lzma.compress, preset=0),
    ".zst": lambda raw: zstandard.ZstdCompressor(write_checksum=True).compress(raw),
    ".zstd": lambda raw: zstandard.ZstdCompressor(write_checksum=True).compress(raw),
}


def write_as(kind, folder, values):
    """Write ``values`` as an input of the given kind. Returns its name for prepare."""
    folder.mkdir()
    raw = b"".join(line_of(value, ensure_ascii=False) for value in values)
    suffix = Path(kind).suffix
    if suffix in COMPRESS:
        raw = COMPRESS[suffix](raw)
    elif kind == ".parquet":
        parquet.write_table(
            pyarrow.Table.from_pylist(values), folder / "in.parquet", row_group_size=7
        )
        return str(folder / "in.parquet")
    elif kind == ".arrow":
        table = pyarrow.Table.from_pylist(values)
        with pyarrow.ipc.new_stream(folder / "in.arrow", table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
        return str(folder / "in.arrow")
    elif kind == "hf:":
        (folder / "train.jsonl").write_bytes(raw)
        return f"hf:{folder}:train"
    elif kind == "stdlib:":
        return "stdlib:"
    (folder / f"in{kind}").write_bytes(raw)
    return str(folder / f"in{kind}")


def run_prepare(inputs, output_dir, tokenizer=None, **settings):
    inputs = (inputs,) if isinstance(inputs, str) else tuple(inputs)
    config = PrepareConfig(inputs=inputs, output_dir=str(output_dir), **settings)
    return prepare(config, progress=False, tokenizer=tokenizer)


def read_back(output_dir):
    """Return ``(key, document)`` of every sample, read by webdataset, tars in sorted order."""
    urls = sorted(str(path) for path in Path(output_dir).glob("*.tar"))
    dataset = webdataset.WebDataset(urls, shardshuffle=False).decode()
    return [(sample["__key__"], sample["json"]) for sample in dataset]


def packed_documents(output_dir):
    return [document for _, document in read_back(output_dir)]
