"""Inputs for the tests of ``prepare``, and what webdataset reads back."""

import gzip
import json
from pathlib import Path

import pyarrow
import webdataset
import zstandard
from pyarrow import parquet

from gradproj.corpus.prepare import PrepareConfig, prepare


def record(text, domain="web", **meta):
    return {"text": text, "meta": {"pile_set_name": domain, **meta}}


def line_of(value, **options):
    return json.dumps(value, **options).encode() + b"\n"


def write_jsonl(path, values, **options):
    path.write_bytes(b"".join(line_of(value, **options) for value in values))
    return str(path)


def write_as(kind, folder, values):
    """One input of the given kind that holds ``values``; the name to pass to prepare."""
    folder.mkdir()
    raw = b"".join(line_of(value, ensure_ascii=False) for value in values)
    if kind == ".jsonl.gz":
        raw = gzip.compress(raw)
    elif kind == ".jsonl.zst":
        raw = zstandard.ZstdCompressor().compress(raw)
    elif kind == ".parquet":
        parquet.write_table(
            pyarrow.Table.from_pylist(values), folder / "in.parquet", row_group_size=7
        )
        return str(folder / "in.parquet")
    elif kind == "hf:":
        (folder / "train.jsonl").write_bytes(raw)
        return f"hf:{folder}:train"
    elif kind == "stdlib:":
        return "stdlib:"
    (folder / f"in{kind}").write_bytes(raw)
    return str(folder / f"in{kind}")


def run(inputs, output_dir, **settings):
    inputs = (inputs,) if isinstance(inputs, str) else tuple(inputs)
    return prepare(
        PrepareConfig(inputs=inputs, output_dir=str(output_dir), **settings), progress=False
    )


def read_back(output_dir):
    """(key, document) of every sample, as webdataset reads the tars in sorted order."""
    urls = sorted(str(path) for path in Path(output_dir).glob("*.tar"))
    dataset = webdataset.WebDataset(urls, shardshuffle=False).decode()
    return [(sample["__key__"], sample["json"]) for sample in dataset]


def documents(output_dir):
    return [document for _, document in read_back(output_dir)]
