"""Token ids of a store's documents in ``OUTPUT/text``, a file per unit, read from the tars once.

A file is an uncompressed ``.npz``: ``tokens`` of all the unit's documents, uint16 or uint32, and
``lengths`` of them. Files are published atomically, so that a killed pass continues.
"""

import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gradproj.coordinator.merge import wanted_units
from gradproj.errors import StoreError
from gradproj.files import explain_os_errors
from gradproj.formatting import shown
from gradproj.job.recorded import config_from, recorded_index, recorded_tokenizer
from gradproj.job.recorded_args import RecordedRunArgs
from gradproj.job.unit_reader import PreparedUnit, UnitReader, UnitSettings
from gradproj.model.sequences import TokenSequence, join_windows
from gradproj.storage.contents import open_whole
from gradproj.storage.object_path import names_in
from gradproj.storage.results import save_arrays
from gradproj.store import ProjectionStore
from gradproj.store.layout import TEXT_DIR
from gradproj.text.ngrams import Documents

FORMAT_VERSION = 1
_DEPENDS_ON = (
    "--shards (corpus index)", "--tokenizer", "--special_tokens", "--max_length",
    "--long_documents", "--rows_per_shard", "--max_samples", "--domains", "--max_document_bytes",
    "--max_json_depth",
)  # fmt: skip
"""Settings of the job that decide which tokens a unit's file holds."""
_RULES = ("--loss_on", "--truncate_side", "--chat_template")
"""Further ones, which an identity names if they are not the defaults."""


class TokenFiles:
    """Token files of one store.

    The folder's name is a digest of the settings that the tokens depend on, so files of another
    corpus or tokenizer are never read.
    """

    def __init__(self, store: ProjectionStore) -> None:
        identity = store.attributes.get("identity")
        if "wanted_units" not in store.attributes or not isinstance(identity, dict):
            raise StoreError(
                f"{store.path} was not written by the job: it does not record from which tars and "
                "with which tokenizer its documents come, so they have no text scores"
            )
        rules = {name: identity[name] for name in _RULES if name in identity}
        named = {name: identity.get(name) for name in _DEPENDS_ON}
        settings = [FORMAT_VERSION, named | rules]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        self.layout, self.units = store.layout, wanted_units(store.attributes)
        self.output = store.path.parent
        self.folder = self.output / TEXT_DIR / digest

    def path(self, unit: int) -> Path:
        return self.folder / f"{unit:08d}.npz"

    def missing(self) -> list[int]:
        """Return the units without a file."""
        present = set(names_in(self.folder))
        return [unit for unit in self.units.tolist() if self.path(unit).name not in present]

    def read(self, unit: int) -> Documents:
        """Return a unit's documents; one that cannot have a row has no tokens.

        Raises:
            StoreError: the file is missing or damaged.
        """
        tokens, lengths = self._load(unit, "tokens", "lengths")
        ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        return Documents(tokens.astype(np.uint32), ends)

    def tokens_at(self, ids: np.ndarray) -> list[np.ndarray]:
        """Return the token ids ``(S,)`` uint32 of documents; empty for one that has none."""
        height, found = self.layout.rows_per_shard, {}
        for unit in np.unique(ids // height).tolist():
            documents = self.read(unit)
            for sample_id in ids[ids // height == unit].tolist():
                row = sample_id - unit * height
                found[sample_id] = documents.tokens[documents.ends[row] : documents.ends[row + 1]]
        return [found[sample_id] for sample_id in ids.tolist()]

    def totals(self) -> tuple[int, int]:
        """Return the numbers of documents with tokens and of tokens in all files."""
        n_documents = n_tokens = 0
        for unit in self.units.tolist():
            (lengths,) = self._load(unit, "lengths")
            n_documents += int(np.count_nonzero(lengths))
            n_tokens += int(lengths.sum(dtype=np.int64))
        return n_documents, n_tokens

    def _load(self, unit: int, *names: str) -> list[np.ndarray]:
        """Return arrays of a unit's file, with ``lengths`` among them."""
        path = self.path(unit)
        try:
            with open_whole(path) as whole, np.load(whole, allow_pickle=False) as file:
                found = {name: file[name] for name in names}
            first, last = self.layout.unit_range(unit)
            n_tokens = int(found["lengths"].sum(dtype=np.int64))
            if len(found["lengths"]) != last - first:
                raise ValueError(
                    f"it has {len(found['lengths'])} documents, its unit has {last - first}"
                )
            if "tokens" in found and len(found["tokens"]) != n_tokens:
                raise ValueError(f"it has {len(found['tokens'])} tokens, its documents {n_tokens}")
            return list(found.values())
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
            raise StoreError(
                f"{path} cannot be read ({error}). Delete it, and `python -m gradproj text "
                f"{self.output}` reads its documents again"
            ) from error


def make_token_files(
    store: ProjectionStore,
    inputs: RecordedRunArgs,
    share: tuple[int, int] = (0, 1),
    note: Callable[[str], None] = lambda line: None,
) -> TokenFiles:
    """Write the token files that a store lacks. Arguments and errors: see ``make_text_index``."""
    files, (rank, n_ranks) = TokenFiles(store), share
    missing = files.missing()
    if missing:
        if rank == 0:
            note(f"reading the tokens of {len(missing):,} of {len(files.units):,} units")
        writer = TokenWriter(store, files, inputs)
        # Each rank begins at its own place and takes what no other has finished, up to the end.
        start = len(missing) * rank // n_ranks
        units = missing[start:] + missing[:start]
        for unit in shown(units, len(units), "tokens", "units") if rank == 0 else units:
            if not files.path(unit).is_file():
                writer.write(unit)
    return files


class TokenWriter:
    """Reads units from the tars with the job's own reader and tokenizer, and writes their files.

    Raises:
        ModelError: the tokenizer is not the recorded one.
        CorpusError: the tars are not where the job found them, or have changed.
    """

    def __init__(self, store: ProjectionStore, files: TokenFiles, inputs: RecordedRunArgs) -> None:
        run = config_from(inputs, loads_weights=False)
        tokenizer, vocabulary = recorded_tokenizer(store, run)
        index = recorded_index(files.output, inputs.shards)
        settings = UnitSettings(
            files.layout,
            store.attributes["identity_hash"],
            run.batch,
            run.model.special_tokens,
            vocabulary,
            index.domains,
            run.corpus.chosen_domains,
            run.limits,
            run.rules,
        )
        self._files, self._reader = files, UnitReader(index, tokenizer, settings)
        self._dtype = np.uint16 if vocabulary <= 2**16 else np.uint32
        with explain_os_errors(files.folder):
            files.folder.mkdir(parents=True, exist_ok=True)

    def write(self, unit: int) -> None:
        prepared = self._reader.read(unit)
        assert prepared is not None  # nothing requests a stop
        documents = Documents.of(_whole_documents(prepared))
        tokens = documents.tokens.astype(self._dtype)
        lengths = np.diff(documents.ends).astype(np.int32)
        with explain_os_errors(self._files.folder):
            save_arrays(self._files.path(unit), tokens=tokens, lengths=lengths)


def _whole_documents(unit: PreparedUnit) -> list[np.ndarray]:
    """Return every document's tokens, joining the windows of a long one."""
    parts: list[list[TokenSequence]] = [[] for _ in unit.columns["status"]]
    for sequence in unit.sequences:
        parts[sequence.owner].append(sequence)
    return [join_windows(p).ids if p else np.empty(0, np.int64) for p in parts]
