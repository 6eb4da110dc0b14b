"""A field of all documents as a column beside a store, read from the tars once.

``OUTPUT/columns/FIELD-DIGEST/`` holds ``column.npy``, int32 numbers of the documents' values with
-1 for none, and ``column.json``, the values, which is written last. Until then it holds a file per
unit, so that a killed pass continues. The digest is of the settings that decide which document has
which id, so that a column of another corpus is never read.
"""

import hashlib
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from gradproj.analysis.document_groups import DocumentGroups
from gradproj.coordinator.merge import wanted_units
from gradproj.corpus.fields import check_path, group_at
from gradproj.corpus.index import CorpusIndex
from gradproj.corpus.stream import read_json
from gradproj.distributed import World
from gradproj.errors import ConfigError, StoreError
from gradproj.files import explain_os_errors
from gradproj.formatting import count, listed, shown
from gradproj.job.recorded import recorded_index
from gradproj.storage.contents import map_array, open_whole, sum_of
from gradproj.storage.folders import delete_tree
from gradproj.storage.publish import replace
from gradproj.storage.results import save_arrays
from gradproj.store import ProjectionStore
from gradproj.store.layout import COLUMNS_DIR

MAX_VALUES = 2**16
_FORMAT_VERSION = 1
_DEPENDS_ON = ("--shards (corpus index)", "--rows_per_shard", "--max_samples", "--domains")
_LOOKED_AT, _RUNS = 16, 64
"""Documents of each run, and runs, in which the field must occur."""
_FIELDS_SHOWN = 20
_COLUMN, _FACTS = "column.npy", "column.json"


def groups_by_field(
    store: ProjectionStore,
    field: str,
    shards: str = "",
    world: World | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> DocumentGroups:
    """Return the groups of a store's documents by a field's value, from its column.

    The first call reads the column from the tars. Documents whose field is absent, null, empty, a
    list or an object are in no group.

    Args:
        store: of the job, finished or not.
        field: dotted path in ``{key}.json``, such as ``meta.source``.
        shards: the job's tars, if they have moved.
        world: the ranks that make this call and share the reading.
        note: called with a line for the user before a long step.

    Raises:
        ConfigError: no document has the field, or it has more than ``MAX_VALUES`` values.
        StoreError: the store was not written by the job, or a column is damaged.
        CorpusError: the tars are not where the job found them, or have changed.
    """
    column, world = _Column(store, field), world or World()
    # All ranks or none: making it is collective.
    if not all(world.gather(column.facts_path.is_file())):
        column.make(recorded_index(column.output, shards), world, note)
    return column.groups()


class _Column:
    def __init__(self, store: ProjectionStore, field: str) -> None:
        identity = store.attributes.get("identity")
        if "wanted_units" not in store.attributes or not isinstance(identity, dict):
            raise StoreError(
                f"{store.path} was not written by the job: it does not record from which tars its "
                "documents come, so their fields are not known"
            )
        settings = [_FORMAT_VERSION, field, {name: identity.get(name) for name in _DEPENDS_ON}]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        self.field, self._path = field, check_path("--by", field)
        self.output, self._layout = store.path.parent, store.layout
        self._units = wanted_units(store.attributes)
        name = re.sub(r"[^\w.-]", "_", field)[:60]
        self.folder = self.output / COLUMNS_DIR / f"{name}-{digest}"
        self.facts_path = self.folder / _FACTS

    def groups(self) -> DocumentGroups:
        """Return the groups of a finished column, mapped from its file."""
        path = self.folder / _COLUMN
        way_out = "Delete it, and the same query reads the field again"
        try:
            facts = json.loads(self.facts_path.read_text())
            if path.stat().st_size != facts["column"]["bytes"]:
                raise ValueError(f"{_COLUMN} has another size")
            column = map_array(path)
            if len(column) != self._layout.n_samples:
                raise ValueError(f"it has {len(column)} documents")
            names = [str(name) for name in facts["values"]]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise StoreError(f"{self.folder} is damaged ({error}). {way_out}") from error

        def numbers(first: int, last: int) -> np.ndarray:
            found = column[first:last]
            if found.min(initial=0) < -1 or found.max(initial=-1) >= len(names):
                raise StoreError(
                    f"{self.folder} is damaged ({_COLUMN} numbers values that {_FACTS} has not). "
                    f"{way_out}"
                )
            return found

        return DocumentGroups(names, self.field, numbers)

    def make(self, index: CorpusIndex, world: World, note: Callable[[str], None]) -> None:
        """Read what is missing, each rank its share, and write the column."""
        if world.rank == 0:
            self._check_occurs(index)
            note(f"reading {self.field} of all documents, which is kept in {self.folder}")
            with explain_os_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
        world.barrier()
        # Each rank begins at its own place and takes what no other has finished, up to the end.
        units = [unit for unit in self._units.tolist() if not self._part(unit).is_file()]
        start = len(units) * world.rank // world.size
        units, values = units[start:] + units[:start], set[str]()
        for unit in shown(units, len(units), self.field, "units") if world.rank == 0 else units:
            if not self._part(unit).is_file():
                self._read(index, unit, values)
        world.barrier()
        # Another process may have made the column meanwhile, and have deleted the units' files.
        if world.rank == 0 and not self.facts_path.is_file():
            self._join()
        world.barrier()

    def _part(self, unit: int) -> Path:
        return self.folder / f"{unit:08d}.npz"

    def _read(self, index: CorpusIndex, unit: int, values: set[str]) -> None:
        first, last = self._layout.unit_range(unit)
        found = [group_at(fields, self._path) for fields in _fields(index, first, last)]
        names = sorted({value for value in found if value is not None})
        values.update(names)
        self._check_number(values)
        number: dict[str | None, int] = {name: i for i, name in enumerate(names)}
        number[None] = -1
        encoded = np.frombuffer(json.dumps(names).encode(), np.uint8)
        numbers = np.array([number[value] for value in found], np.int32)
        with explain_os_errors(self.folder):
            save_arrays(self._part(unit), values=encoded, numbers=numbers)

    def _join(self) -> None:
        """Write the column of all units, and delete their files."""
        values: set[str] = set()
        for unit in self._units.tolist():
            values.update(self._load(unit)[0])
            self._check_number(values)
        if not values:
            raise ConfigError(f"--by {self.field}: no document has a text or number there")
        names, path = sorted(values), self.folder / _COLUMN
        with explain_os_errors(self.folder):
            replace(path, self._chunks({name: i for i, name in enumerate(names)}))
            facts = {"field": self.field, "values": names, "column": sum_of(path)}
            replace(self.facts_path, [json.dumps(facts).encode()])
            for unit in self._units.tolist():
                self._part(unit).unlink(missing_ok=True)
        self._delete_others()

    def _chunks(self, place: Mapping[str, int]) -> Iterator[Any]:
        """Yield the content of ``column.npy``."""
        header, n_samples = io.BytesIO(), self._layout.n_samples
        np.lib.format.write_array_header_1_0(
            header, {"descr": "<i4", "fortran_order": False, "shape": (n_samples,)}
        )
        yield header.getvalue()
        wanted = set(self._units.tolist())
        for unit in range(self._layout.n_units):
            first, last = self._layout.unit_range(unit)
            if unit not in wanted:
                yield np.full(last - first, -1, "<i4").data
                continue
            names, numbers = self._load(unit)
            yield np.array([*(place[name] for name in names), -1], "<i4")[numbers].data

    def _load(self, unit: int) -> tuple[list[str], np.ndarray]:
        path = self._part(unit)
        first, last = self._layout.unit_range(unit)
        try:
            with open_whole(path) as whole, np.load(whole, allow_pickle=False) as file:
                names, numbers = json.loads(bytes(file["values"])), file["numbers"]
            if len(numbers) != last - first:
                raise ValueError(f"it has {len(numbers)} documents, its unit {last - first}")
            return names, numbers
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
            raise StoreError(
                f"{path} cannot be read ({error}). Delete it, and the same query reads it again"
            ) from error

    def _delete_others(self) -> None:
        """Delete this field's columns of earlier stores in this output directory."""
        name, _, _ = self.folder.name.rpartition("-")
        for other in self.folder.parent.iterdir():
            if other.name.rpartition("-")[0] == name and other != self.folder:
                delete_tree(other)

    def _check_number(self, values: set[str]) -> None:
        if len(values) > MAX_VALUES:
            raise ConfigError(
                f"--by {self.field}: it has more than {MAX_VALUES:,} values; group by a field "
                "that names a class"
            )

    def _check_occurs(self, index: CorpusIndex) -> None:
        """Look at documents from all over the corpus before all are read."""
        names = dict[str, None]()
        places = np.unique(np.linspace(0, index.n_samples - 1, _RUNS).astype(int)).tolist()
        for first in places:
            for fields in _fields(index, first, min(first + _LOOKED_AT, index.n_samples)):
                if group_at(fields, self._path) is not None:
                    return
                names.update(dict.fromkeys(_names(fields)))
        raise ConfigError(
            f"--by {self.field}: no document at {count(len(places), 'place')} of the corpus has a "
            f"text or number there; fields that they have: {listed(list(names)[:_FIELDS_SHOWN])}"
        )


def _fields(index: CorpusIndex, first: int, last: int) -> Iterator[Mapping[str, Any]]:
    """Yield every document's fields; none of one that is no JSON object."""
    for data in read_json(index, first, last):
        fields = None
        try:
            fields = msgspec.json.decode(data) if data is not None else None
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            try:  # the standard library accepts NaN, lone surrogates and a byte order mark
                fields = json.loads((data or b"").decode("utf-8-sig"))
            except (ValueError, RecursionError):
                fields = None
        yield fields if isinstance(fields, dict) else {}


def _names(fields: Mapping[str, Any], before: Sequence[str] = ()) -> Iterator[str]:
    """Yield the dotted paths of an object's texts and numbers, two levels deep."""
    for name, value in fields.items():
        if isinstance(value, dict) and len(before) < 1:
            yield from _names(value, [*before, name])
        elif isinstance(value, str | int | float):
            yield ".".join([*before, name])
