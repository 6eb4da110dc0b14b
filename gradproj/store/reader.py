"""``ProjectionStore``: reads rows, layers and samples of a store in bounded memory."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from gradproj.errors import ConfigError, StoreError, damaged
from gradproj.storage.failures import explained
from gradproj.store.column_reader import Columns
from gradproj.store.head_view import HeadView
from gradproj.store.layer_arrays import unpack_layers
from gradproj.store.layer_view import LayerView, Sample
from gradproj.store.layout import STATUS, STATUS_NAMES, LayerSlice, decode_key
from gradproj.store.metadata import find_store, layers_of, read_attributes, read_layout
from gradproj.store.notebook import store_html
from gradproj.store.page_cache import LRUCache
from gradproj.store.row_reader import Band, Missing, Rows
from gradproj.store.selection import Selection, select_layers
from gradproj.store.texts import RecordedTexts
from gradproj.store.zarr_arrays import open_array

if TYPE_CHECKING:
    import xarray as xr

_MAX_MAPS = 64  # a store of the Pile has 51,000 shards
_STATUS_ROWS = 2**18


class ProjectionStore:
    """A store on disk or in a bucket, read-only. ``len(store)`` counts all samples.

    Units that are not merged into the columns yet are read from their records, so an unfinished
    store can be read. Opening and reading never write or list files, and keep at most 64 mapped.

    Args:
        path: the job's ``--output_dir``, or the ``projections.zarr`` in it; may be an address.
        read_text: from a sample id to its text, for ``samples``. Default: from the tars that the
            job recorded.

    Raises:
        StoreError: there is no store, or a newer gradproj wrote it.
    """

    def __init__(self, path: str | Path, read_text: Callable[[int], str] | None = None) -> None:
        self.path = find_store(path)
        self.attributes: dict[str, Any] = read_attributes(self.path)
        self.layout = read_layout(self.path, self.attributes)
        self.layers: list[LayerSlice] = layers_of(self.attributes)
        self.domains: list[str] = list(self.attributes.get("domains", []))
        self._read_text = read_text or RecordedTexts(self.path.parent)
        self._maps: LRUCache[tuple[str, int], Any] = LRUCache(_MAX_MAPS)
        self._columns = Columns(self.path, self.layout, self._maps)
        self._rows = Rows(self.path, self.layout, self._columns, self._maps)
        self._selections: dict[tuple[str, ...] | None, Selection] = {}

    def __len__(self) -> int:
        return self.layout.n_samples

    def __repr__(self) -> str:
        return f"ProjectionStore({str(self.path)!r}: {len(self):,} rows of {self.dim:,} values)"

    def _repr_html_(self) -> str:
        return store_html(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process maps files and loads the texts' index itself.
        default = isinstance(self._read_text, RecordedTexts)
        return type(self), (self.path, None if default else self._read_text)

    @property
    def dim(self) -> int:
        return self.layout.dim

    def close(self) -> None:
        """Unmap all files. A later read maps them again."""
        self._maps.clear()
        self._columns.clear()
        self._rows.clear()

    def rows(
        self,
        ids: Sequence[int] | np.ndarray,
        layers: Sequence[str] | None = None,
        missing: Missing = "raise",
    ) -> np.ndarray:
        """Read the rows of the given samples, in that order, decoded.

        Args:
            ids: sample ids; repeats are fine.
            layers: names; the values of these layers, one after the other. Default: all.
            missing: for samples of status ``missing``: ``raise``, or ``nan`` for NaN rows. Samples
                without a row for another reason (see their status) are NaN either way.

        Returns:
            ``(len(ids), D)`` float32.

        Raises:
            StoreError: an id is out of range, a layer does not exist, samples are missing, or a
                file is damaged.
        """
        if missing not in ("raise", "nan"):
            raise StoreError(f'missing is {missing!r}; choose "raise" or "nan"')
        return self._rows.read(self._checked_ids(ids), self._selection(layers), missing)

    def layer(self, name: str) -> LayerView:
        """Return a lazy array ``(N, k_o, k_i)`` of one layer, which reads what is indexed."""
        layer = self._layer(name)

        def scan(height: int | None, start: int, stop: int | None) -> Iterator[Any]:
            return self.scan(height, [name], start, stop)

        shape = len(self), layer.k_o, layer.k_i
        return LayerView(shape, lambda ids: self.rows(ids, [name]), scan)

    @cached_property
    def head(self) -> HeadView | None:
        """The sparse head rows of the documents; None for a store without them."""
        return HeadView.of(self.path, self.attributes, self._rows)

    def scan(
        self,
        rows_per_block: int | None = None,
        layers: Sequence[str] | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield all rows in order, a block at a time: ``(ids (n,) int64, rows (n, D) float32)``.

        Missing rows are NaN. By default a block has at most 8 MB.
        """
        selection = self._selection(layers)
        row_bytes = 4 * selection.decoded_width
        for first, last in self._rows.blocks(rows_per_block, selection, row_bytes, start, stop):
            yield np.arange(first, last, dtype=np.int64), self._rows.decoded(first, last, selection)

    def scan_stored(
        self,
        rows_per_block: int | None = None,
        layers: Sequence[str] | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield ``(ids (n,) int64, stored (n, w), row_scale (n,) float32)``, not decoded.

        ``stored`` has ``layout.stored_dtype``. Of dense rows it holds the layers' values (bfloat16
        as uint16 bits) and ``row = stored * row_scale``; of packed rows the header and then the
        layers' codes, or without ``layers`` the whole stored row. Missing rows are full of
        ``layout.fill``, and their scales are NaN. Use it to decode on a GPU.
        """
        selection = self._selection(layers)
        row_bytes = selection.width * self.layout.stored_dtype.itemsize
        for first, last in self._rows.blocks(rows_per_block, selection, row_bytes, start, stop):
            yield np.arange(first, last, dtype=np.int64), *self._rows.stored(first, last, selection)

    def decode(
        self, stored: np.ndarray, row_scale: np.ndarray, layers: Sequence[str] | None = None
    ) -> np.ndarray:
        """Decode stored rows, as ``scan_stored`` yields them for these layers, to float32."""
        return self._selection(layers).decode(stored, row_scale)

    def scan_bands(
        self,
        rows_per_band: int | None = None,
        layers: Sequence[str] | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> Iterator[Band]:
        """Yield stored rows as bands, whose values come a tile at a time: the fastest scan.

        A band has at most ``rows_per_band`` rows, and at most those of one chunk of the array.
        """
        return self._rows.bands(rows_per_band, self._selection(layers), start, stop)

    def samples(self, ids: Sequence[int] | np.ndarray, text: bool = False) -> list[Sample]:
        """Read key, domain, loss and the other columns of samples, and with ``text`` their texts.

        Raises:
            StoreError: an id is out of range, or no text is recorded.
            CorpusError: the tars of the texts are gone or have changed.
        """
        sample_ids = self._checked_ids(ids)
        columns = self._columns.read(
            ["key", "domain", "loss", "n_tokens", "grad_norm", "tar"], sample_ids
        )
        self.check_domains(columns["domain"])
        return [
            Sample(
                sample_id=sample_id,
                key=decode_key(columns["key"][i]),
                domain=self.domains[columns["domain"][i]] if columns["domain"][i] >= 0 else None,
                loss=float(columns["loss"][i]),
                n_tokens=int(columns["n_tokens"][i]),
                status=STATUS_NAMES[int(columns["status"][i])],
                grad_norm=float(columns["grad_norm"][i]),
                tar=int(columns["tar"][i]),
                text=self._read_text(sample_id) if text else None,
            )
            for i, sample_id in enumerate(sample_ids.tolist())
        ]

    def check_domains(self, codes: np.ndarray) -> None:
        """Raise StoreError if a code of the ``domain`` column has no name."""
        largest = int(codes.max(initial=-1))
        if largest >= len(self.domains):
            what = f"a document is of domain {largest}, and the store names {len(self.domains)}"
            raise damaged(self.path, what)

    def column(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Read one column for the samples ``[start, stop)`` (default: all, which may be large)."""
        return self._columns.read_range([name], start, len(self) if stop is None else stop)[name]

    def columns_at(
        self, names: Sequence[str], ids: Sequence[int] | np.ndarray
    ) -> dict[str, np.ndarray]:
        """Read several columns at the given samples, by name."""
        values = self._columns.read(names, self._checked_ids(ids))
        return {name: values[name] for name in names}

    def to_xarray(self, rows_per_chunk: int | None = None) -> "xr.Dataset":
        """Open the store as an ``xarray.Dataset`` of dask arrays, which read when computed.

        ``rows (sample, value)`` are float32, NaN for missing rows; ``layer`` is an index of the
        values (``.sel(layer=NAME)`` reads that layer only). The columns have their own names.

        Args:
            rows_per_chunk: of a dask chunk, of which each of its threads holds a few; default:
                those of a shard.

        Raises:
            ConfigError: xarray or dask is not installed.
        """
        if any(find_spec(name) is None for name in ("xarray", "dask")):
            raise ConfigError(
                "to_xarray needs xarray and dask, which are not installed: "
                "pip install 'gradproj[xarray]' brings both"
            )
        from gradproj.store.xarray_dataset import lazy_dataset

        return lazy_dataset(self).chunk({"sample": rows_per_chunk or self.layout.rows_per_shard})

    def missing_ranges(self) -> list[tuple[int, int]]:
        """Return ``[start, stop)`` of every run of missing samples, in order."""
        runs: list[tuple[int, int]] = []
        for first, status in self._statuses():
            absent = np.concatenate(([False], status == STATUS["missing"], [False]))
            edges = np.flatnonzero(absent[1:] != absent[:-1]) + first
            for start, stop in edges.reshape(-1, 2).tolist():
                if runs and runs[-1][1] == start:
                    start = runs.pop()[0]
                runs.append((start, stop))
        return runs

    def missing(self) -> np.ndarray:
        """Return the ids of missing samples, sorted int64. ``missing_ranges`` needs less memory."""
        ranges = [np.arange(start, stop, dtype=np.int64) for start, stop in self.missing_ranges()]
        return np.concatenate([np.empty(0, np.int64), *ranges])

    def status_counts(self) -> dict[str, int]:
        """Count the samples of each status, by the status's name."""
        counts = np.zeros(256, np.int64)
        for _, status in self._statuses():
            counts += np.bincount(status, minlength=256)
        return {name: int(counts[code]) for name, code in STATUS.items()}

    @cached_property
    def projection_matrices(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Each layer's ``(P_i (k_i, n_i), P_o (k_o, n_o))`` of the rows, float32."""
        return self._layer_arrays("projection_matrices")

    @cached_property
    def basis(self) -> dict[str, tuple[np.ndarray, np.ndarray]] | None:
        """Each layer's ``(R_i (k_i, k_i), R_o (k_o, k_o))`` float32; None for the random basis.

        A layer's row is ``R_o (P_o G P_i^T) R_i^T``.
        """
        return self._layer_arrays("basis_matrices") if self._has_basis else None

    @cached_property
    def basis_eigenvalues(self) -> dict[str, tuple[np.ndarray, np.ndarray]] | None:
        """Each layer's eigenvalues ``(E_i (k_i,), E_o (k_o,))`` float64; None as for ``basis``."""
        return self._layer_arrays("basis_eigenvalues") if self._has_basis else None

    @property
    def _has_basis(self) -> bool:
        basis = self.attributes.get("basis")
        return isinstance(basis, dict) and basis.get("kind") != "random"

    def _layer_arrays(self, name: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        flat = self.array(name)
        try:
            return unpack_layers(name, self.layers, flat)
        except ValueError as error:
            raise damaged(self.path / name, str(error)) from error

    def array(self, name: str) -> np.ndarray:
        """Read a small array whole; ``StoreError`` if there is none, or it is damaged."""
        if not (self.path / name / "zarr.json").is_file():
            raise StoreError(
                f"{self.path} has no array {name!r}. If a job wrote this store, run "
                "`python -m gradproj verify` to see all damage"
            )
        try:
            with explained(str(self.path / name)):
                return np.asarray(open_array(self.path / name)[...])
        except (ValueError, TypeError, KeyError, RuntimeError) as error:  # zarr's, of damaged files
            raise damaged(self.path / name, f"zarr cannot read it ({error})") from error

    def _checked_ids(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        sample_ids = np.asarray(ids)
        if sample_ids.ndim != 1 or (sample_ids.size and sample_ids.dtype.kind not in "iu"):
            raise StoreError(
                f"sample ids must be a list of integers, got {sample_ids.dtype} {sample_ids.shape}"
            )
        sample_ids = sample_ids.astype(np.int64)
        outside = sample_ids[(sample_ids < 0) | (sample_ids >= len(self))]
        if len(outside):
            raise StoreError(
                f"sample {outside[0]} is out of range: {self.path} has samples 0 to {len(self) - 1}"
            )
        return sample_ids

    def _layer(self, name: str) -> LayerSlice:
        for layer in self.layers:
            if layer.name == name:
                return layer
        names = ", ".join(layer.name for layer in self.layers)
        raise StoreError(f"{self.path} has no layer {name!r}; it has {names}")

    def _selection(self, layers: Sequence[str] | None) -> Selection:
        names = None if layers is None else tuple(layers)
        if names not in self._selections:
            for name in names or ():
                self._layer(name)  # raises if there is none
            self._selections[names] = select_layers(self.layout, self.layers, names)
        return self._selections[names]

    def _statuses(self) -> Iterator[tuple[int, np.ndarray]]:
        for first in range(0, len(self), _STATUS_ROWS):
            last = min(first + _STATUS_ROWS, len(self))
            yield first, self._columns.read_range([], first, last)["status"]
