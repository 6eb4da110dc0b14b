"""Read columns: Parquet, Arrow's IPC files and streams, and data sets of ``datasets``."""

import os
from collections.abc import Iterable, Iterator
from typing import Any

from gradproj.corpus.inputs.records import InputReader, Record
from gradproj.errors import ConfigError, CorpusError

TABLE_ROWS = 64
"""Rows that are made Python objects at once."""
_SAVED_TO_DISK = ("state.json", "dataset_dict.json")
_ARROW_FILE, _ARROW_STREAM_END = b"ARROW1", b"\xff\xff\xff\xff\0\0\0\0"

_Batches = Iterator[tuple[Any, float, float]]


def read_parquet(source: InputReader) -> Iterator[Record]:
    """Yield the rows of a Parquet file."""
    from pyarrow import parquet

    def batches() -> _Batches:
        with parquet.ParquetFile(source.location) as file:
            columns, n_rows = _columns(file.schema_arrow, source), max(file.metadata.num_rows, 1)
            done = 0
            for batch in file.iter_batches(TABLE_ROWS, columns=columns):
                yield batch, done / n_rows, (done + batch.num_rows) / n_rows
                done += batch.num_rows

    return _records(source, "parquet", batches())


def read_arrow(source: InputReader) -> Iterator[Record]:
    """Yield the rows of an Arrow IPC file, or of an IPC stream such as ``datasets`` writes."""
    from pyarrow import ipc, memory_map

    def batches() -> _Batches:
        with memory_map(source.location) as file:
            n_bytes, magic = file.size(), file.read(len(_ARROW_FILE))
            # A stream that is cut between two batches would end without an error.
            file.seek(max(0, n_bytes - len(_ARROW_STREAM_END)))
            if magic != _ARROW_FILE and file.read() != _ARROW_STREAM_END:
                raise CorpusError(
                    f"{source.location}: an Arrow stream without its end mark: it is cut short, or "
                    "no Arrow file; write it again"
                )
            file.seek(0)
            if magic == _ARROW_FILE:
                reader = ipc.open_file(file)
                parts = (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                reader = parts = ipc.open_stream(file)
            columns, begin = _columns(reader.schema, source), 0.0
            for number, part in enumerate(parts, start=1):
                is_file = magic == _ARROW_FILE
                end = number / reader.num_record_batches if is_file else file.tell() / n_bytes
                yield part.select(columns), begin, end
                begin = end

    return _records(source, "Arrow", batches())


def _columns(schema: Any, source: InputReader) -> list[str]:
    """Return the columns that are asked for, and all that are neither nested nor binary."""
    from pyarrow import types

    unread = (types.is_nested, types.is_binary, types.is_large_binary, types.is_fixed_size_binary)
    return [
        column.name
        for column in schema
        if column.name in source.fields or not any(is_kind(column.type) for is_kind in unread)
    ]


def _records(source: InputReader, form: str, batches: _Batches) -> Iterator[Record]:
    """Yield the rows of batches; each comes with the parts of the file before it and up to its end.

    Raises:
        CorpusError: the file is not whole.
    """
    import pyarrow

    n_bytes, number, reached = os.path.getsize(source.location), 0, 0.0
    source.position = lambda: int(n_bytes * reached)
    try:
        for batch, begin, end in batches:
            for first in range(0, batch.num_rows, TABLE_ROWS):
                rows = _batch_rows(batch.slice(first, TABLE_ROWS))
                for done, (value, problem) in enumerate(rows, start=first + 1):
                    number += 1
                    reached = begin + (end - begin) * done / batch.num_rows
                    yield Record(f"row {number}", value, problem)
            reached = end
    except pyarrow.ArrowException as error:
        reason = str(error).strip().splitlines()[0]
        raise CorpusError(
            f"{source.location}, after row {number}: not whole {form} ({reason})"
        ) from error


def _batch_rows(batch: Any) -> Iterable[tuple[Any, str | None]]:
    try:
        return [(row, None) for row in batch.to_pylist()]
    except UnicodeDecodeError:
        return [_one_row(batch.slice(i, 1)) for i in range(batch.num_rows)]


def _one_row(batch: Any) -> tuple[Any, str | None]:
    try:
        return batch.to_pylist()[0], None
    except UnicodeDecodeError as error:
        return None, f"not UTF-8 ({error.reason})"


def read_hugging_face(source: InputReader) -> Iterator[Record]:
    """Yield rows of ``hf:NAME[@CONFIG][:SPLIT]``; NAME is a hub name or a folder of data files."""
    path, _, split = source.location.removeprefix("hf:").partition(":")
    name, _, config = path.partition("@")
    if not name:
        raise ConfigError(
            f"INPUT {source.location!r} names no data set; write hf:NAME[@CONFIG][:SPLIT]"
        )
    number = 0
    try:
        import datasets

        if was_saved_to_disk(name):
            rows = datasets.load_from_disk(name)
            splits = rows if isinstance(rows, dict) else {str(rows.split or "train"): rows}
            if (split or "train") not in splits and (split or len(splits) > 1):
                raise ValueError(f"its splits are {', '.join(splits)}")
            rows = splits.get(split or "train", next(iter(splits.values())))
        else:
            rows = datasets.load_dataset(
                name, config or None, split=split or "train", streaming=True
            )
        for row in rows:
            number += 1
            yield Record(f"row {number}", row)
    except Exception as error:  # datasets does not wrap the errors of the libraries it uses
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        place = f", after row {number}" if number else ""
        raise CorpusError(
            f"INPUT {source.location}{place}: {reason}. Check name, configuration and split "
            "(hf:NAME[@CONFIG][:SPLIT]) and the network, or give a local folder: hf:./FOLDER"
        ) from error


def was_saved_to_disk(folder: str) -> bool:
    """Return True for a folder that ``save_to_disk`` of a data set, or of several splits, wrote."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in _SAVED_TO_DISK)
