"""Everything that can be checked before a model is loaded: printed by ``plan``, used by the job."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from gradproj.corpus.config import CorpusConfig
from gradproj.corpus.documents import UNKNOWN_DOMAIN
from gradproj.corpus.index import CorpusIndex
from gradproj.corpus.index_file import open_corpus
from gradproj.corpus.tar.paths import INDEX_NAME
from gradproj.corpus.tar.places import check_unchanged
from gradproj.distributed import choose_device
from gradproj.engine.compile import check_compiler
from gradproj.engine.coverage import Coverage
from gradproj.engine.matrix_file import matrices_digest, read_matrices, unused_lines
from gradproj.engine.projection import job_matrices, place_widths
from gradproj.engine.selection import idle_patterns
from gradproj.errors import CorpusError, ModelError, StoreError
from gradproj.job.borrowed_basis import borrowed_basis
from gradproj.job.chat_template import check_chat_template
from gradproj.job.config import RunConfig
from gradproj.job.document_check import check_documents
from gradproj.job.experts import experts_lines, with_experts
from gradproj.job.identity import (
    check_identity,
    identity_hash,
    identity_of_flags,
    is_untouched,
    reads_texts_only,
)
from gradproj.job.layer_choice import choose_layers
from gradproj.job.row_form import place_rows
from gradproj.job.sizes import check_requests, check_space, check_sparse
from gradproj.job.unit_reader import UnitReader, UnitSettings
from gradproj.job.wanted_units import wanted_units
from gradproj.model.chat import chat_template
from gradproj.model.checkpoint import ModelFiles, fetch
from gradproj.model.fingerprint import check_corpus_tokenizer, model_identity
from gradproj.model.loading import load_model_config, loading_notes, model_skeleton, positions_of
from gradproj.model.tokenizer_loading import load_tokenizer
from gradproj.storage.object_path import in_bucket, names_in
from gradproj.storage.probe import PROBE_DIR
from gradproj.storage.publish import PREPARED_DIR
from gradproj.store.head_rows import HeadSegment
from gradproj.store.layout import (
    CHAT_TEMPLATE_NAME,
    FAILED_NAME,
    FOLDERS,
    LATER_NAMES,
    METADATA_NAME,
    RUN_CONFIG_NAME,
    STATS_NAME,
    STORE_NAME,
    UNITS_DIR,
    LayerSlice,
    StoreLayout,
)
from gradproj.store.metadata import store_exists
from gradproj.store.unit_record import list_records

MAX_TARS_TO_INDEX = 1000
"""With more tars, build the index in a job of its own."""

DEFAULT_MAX_LENGTH = 1024
LIBRARY_BYTES = 600 * 2**20
"""Memory of a process with torch and transformers."""
HEAP_FACTOR = 1.2
"""Memory of the C library's heap over that of a batch's tensors in it: 1.17 and 1.29 measured for
SmolLM2-135M's shape with 1,024 and 4,096 tokens."""
BATCH_FILE = "batch.json"
"""File in the output directory that holds the measured batch size."""
OUR_FILES = {
    *FOLDERS, PREPARED_DIR, PROBE_DIR, STORE_NAME, INDEX_NAME, BATCH_FILE, METADATA_NAME,
    RUN_CONFIG_NAME, STATS_NAME, CHAT_TEMPLATE_NAME, FAILED_NAME, *LATER_NAMES,
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """A checked run."""

    config: RunConfig
    """With ``max_length`` resolved."""
    files: ModelFiles
    index: CorpusIndex
    layers: list[LayerSlice]
    coverage: Coverage
    layout: StoreLayout
    n_tokens: int
    """Tokens of the tokenizer; some of them may not be in the model's vocabulary."""
    vocabulary: int
    wanted: np.ndarray
    """Units to compute, sorted."""
    n_selected: int
    """Upper bound of the chosen domains' documents among the first ``n_samples``."""
    n_weights: int
    shared: list[list[str]]
    """Names of the modules that share a layer's weight, for each layer of several modules."""
    identity: dict[str, Any]
    """Flag -> value of every setting that a row depends on."""
    head: HeadSegment | None = None
    """The head rows' form and place in a row."""
    chat_template: str | None = None
    """Source of the template; None if the tokenizer has none."""
    notes: tuple[str, ...] = ()
    """Lines on members and documents of the corpus that will not be read."""

    @property
    def output(self) -> Path:
        return self.config.output

    @property
    def identity_hash(self) -> str:
        """Digest of ``identity``, carried by every record."""
        return identity_hash(self.identity)

    @property
    def unit_settings(self) -> UnitSettings:
        """Settings that turn documents into rows."""
        config = self.config
        return UnitSettings(
            self.layout,
            self.identity_hash,
            config.batch,
            config.model.special_tokens,
            self.vocabulary,
            self.index.domains,
            config.corpus.chosen_domains,
            config.limits,
            config.rules,
        )

    @property
    def row_bytes(self) -> int:
        return self.layout.row_bytes

    @property
    def hidden_bytes(self) -> int:
        """Bytes of a document's hidden state; 0 without."""
        return 2 * self.layout.hidden_width

    @property
    def matrix_bytes(self) -> int:
        """Bytes of all projection matrices."""
        return 4 * sum(layer.k_i * layer.n_i + layer.k_o * layer.n_o for layer in self.layers)

    def store_bytes(self) -> int:
        """Return the bytes of the finished store, uncompressed: rows, columns, records."""
        columns = 4 + 4 + 2 + 1 + 4 + 4 + 4 + self.layout.key_bytes
        squares = 4 * sum(layer.k_i**2 + layer.k_o**2 for layer in self.layers)
        has_basis = self.config.projection.basis == "eigen"
        matrices = self.matrix_bytes
        unit = self.layout.rows_per_shard * (self.row_bytes + self.hidden_bytes + columns)
        # Either the basis, once, or token covariances in every unit's record.
        unit, matrices = (unit, matrices + squares) if has_basis else (unit + squares, matrices)
        return len(self.wanted) * unit + self.layout.n_samples * columns + matrices

    def wasted_bytes(self) -> int:
        """Return the bytes of rows in wanted units that no chosen document fills."""
        rows = len(self.wanted) * self.layout.rows_per_shard
        return max(0, rows - self.n_selected) * (self.row_bytes + self.hidden_bytes)

    def n_files(self) -> int:
        """Return the number of files of the finished output: two a unit, columns, metadata.

        A third a unit for hidden states.
        """
        each = 3 if self.layout.hidden_width else 2
        return each * len(self.wanted) + 8 * (self.layout.n_column_blocks + 1) + 16

    def unit_bytes(self) -> int:
        """Return the most bytes that rows of units take on a device.

        A unit's stored rows are there up to three times: growing, the previous unit's, a copy.
        Sums of windows are float32, of all documents if each has a window in the last batch; so
        are those of hidden states.
        """
        rows, windows = self.layout.rows_per_shard, self.config.batch.long_documents == "windows"
        stored, sums = self.row_bytes + self.hidden_bytes, self.layout.dim * windows
        return rows * (3 * stored + 4 * (sums + self.layout.hidden_width))

    def host_bytes(self, model_bytes: int, batch_bytes: int = 0) -> int:
        """Estimate a rank's host memory.

        That is the libraries, the model (on a GPU: in transit), units' rows, two units' tokens, the
        token covariances (in float64, and a batch's), and on the CPU a batch.
        """
        squares = 16 * sum(layer.k_i**2 + layer.k_o**2 for layer in self.layers)
        tokens = self.layout.rows_per_shard * self.config.batch.max_length * 8
        index = 14_000 * len(self.index.tars)
        batch = int(HEAP_FACTOR * batch_bytes)
        unit = self.layout.rows_per_shard * (self.row_bytes + self.hidden_bytes)
        sent = unit * in_bucket(self.output)  # as one buffer
        held = LIBRARY_BYTES + model_bytes + self.unit_bytes() + sent + squares
        return held + batch + 2 * tokens + index


def make_plan(config: RunConfig, *, progress: bool = True) -> Plan:
    """Check everything a user can get wrong, without writing anything."""
    check_output(config.output)
    if config.job.compile:
        check_compiler(choose_device(config.job.device, 0)[0].type)
    index = find_index(config, progress=progress)
    n_samples = min(index.n_samples, config.corpus.max_samples or index.n_samples)
    files = fetch(config.model)
    model_config = load_model_config(files)
    tokenizer = load_tokenizer(files)
    check_corpus_tokenizer(index.tokenization, tokenizer, config.rules, config.model.special_tokens)
    vocabulary = model_config.get_text_config().vocab_size
    skeleton = model_skeleton(files)
    config = replace(config, batch=replace(config.batch, max_length=_max_length(config, skeleton)))
    chosen = choose_layers(with_experts(config, skeleton), skeleton)
    config, targets, projection = chosen.config, chosen.targets, chosen.config.projection
    given = read_matrices(projection.matrices) if projection.matrices else None
    layers = place_widths(targets, projection, given)
    n_weights = sum(p.numel() for p in skeleton.parameters())
    shared = [list(target.uses) for target in targets if len(target.uses) > 1]
    sizes = n_samples, index.longest_key_bytes
    layout, layers, head = place_rows(config, skeleton, layers, *sizes)
    wanted, n_selected = wanted_units(config, index, layout)
    identity = {
        **identity_of_flags(config, layout),
        "--shards (corpus index)": index.fingerprint,
        **model_identity(files, tokenizer),
        "layers": [layer.name for layer in layers],
    }
    if given is not None:
        identity["--matrices"] = matrices_digest(given, layers)
    if projection.basis_from:
        matrices = job_matrices(projection, layers)
        basis = borrowed_basis(projection.basis_from, config.output, layers, matrices, identity)
        identity["--basis_from"] = basis.digest
    counts = (len(tokenizer), vocabulary, wanted, n_selected, n_weights, shared)
    template = chat_template(tokenizer, config.rules.chat_template)
    is_older = reads_texts_only(config.output, identity_hash(identity))
    index = replace(index, texts_only=is_older)
    plan = Plan(
        config, files, index, layers, chosen.coverage, layout, *counts, identity, head, template
    )
    rows, widest = layout.rows_per_shard, max(plan.row_bytes, plan.hidden_bytes)
    check_sparse(config.corpus, len(wanted), rows * plan.row_bytes, plan.wasted_bytes())
    check_requests(plan.output, rows, widest, plan.matrix_bytes)
    if not is_untouched(plan.output):  # the job's start replaces an empty store
        check_identity(plan.output / STORE_NAME, plan.identity)
        if not is_older:
            check_chat_template(plan.output, template)
    check_space(plan.output, len(wanted), plan.store_bytes())
    notes = [*chosen.notes, *_notes(plan, skeleton), *unused_lines(given or {}, layers)]
    notes += experts_lines(targets, layers, plan.row_bytes)
    if not len(list_records(plan.output / UNITS_DIR)):
        notes += check_documents(index, UnitReader(index, tokenizer, plan.unit_settings))
    return replace(plan, notes=tuple(notes))


def _notes(plan: Plan, skeleton: nn.Module) -> list[str]:
    config, index = plan.config, plan.index
    notes = [*index.unread_lines(), *idle_patterns(skeleton, config.projection.patterns)]
    notes += loading_notes(plan.files)
    field = config.corpus.domain_field
    if index.domains == (UNKNOWN_DOMAIN,) and field != CorpusConfig.domain_field:
        notes.append(
            f"domains       no document names a domain in the field {field} (--domain_field)"
        )
    return notes


def check_output(output: Path) -> None:
    """Raise ``StoreError`` for a file, or a directory with other things than an output's."""
    if not output.exists():
        return
    if not output.is_dir():
        raise StoreError(f"--output_dir {output} is a file; give a folder")
    names = {name for name in names_in(output) if not name.startswith(".")}
    foreign = sorted(names - OUR_FILES)
    if foreign and not store_exists(output):
        raise StoreError(
            f"--output_dir {output} is not a gradproj output: it holds {', '.join(foreign[:4])}"
            f"{' and more' if len(foreign) > 4 else ''}. Give a new directory, or an output to "
            "continue"
        )


def find_index(config: RunConfig, *, progress: bool = True) -> CorpusIndex:
    """Return the corpus index: the output's own, the given, that beside the tars, or a new one."""
    shards = config.corpus.shards
    index = open_corpus(
        shards,
        output_index=config.output / INDEX_NAME,
        domain_field=config.corpus.domain_field,
        most_tars=MAX_TARS_TO_INDEX,
        progress=progress,
        anonymous=config.corpus.anonymous,
        cache=config.corpus.cache,
    )
    check_unchanged(*index.tars)
    if index.n_samples == 0:
        raise CorpusError(f"--shards {shards}: its {len(index.tars)} tars hold no document")
    if index.domain_field != config.corpus.domain_field:
        raise CorpusError(
            f"--domain_field {config.corpus.domain_field}: the corpus index was built with "
            f"{index.domain_field}; give that, or build the index again"
        )
    unknown = [name for name in config.corpus.chosen_domains if name not in index.domains]
    if unknown:
        raise CorpusError(
            f"--domains: the corpus has no {', '.join(unknown)}; it has {', '.join(index.domains)}"
        )
    return index


def _max_length(config: RunConfig, model: Any) -> int:
    positions = positions_of(model)
    wanted = config.batch.max_length
    if wanted and positions and wanted > positions:
        raise ModelError(f"--max_length {wanted} is more than the model's {positions} positions")
    return wanted or min(DEFAULT_MAX_LENGTH, positions or DEFAULT_MAX_LENGTH)
