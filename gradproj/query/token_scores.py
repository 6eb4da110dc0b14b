"""Scores by token and by layer: which tokens of a document, and of a query, a score comes from.

A score is linear in the row of the document, and in that of the query; its divisors are numbers of
the whole. So it is a sum over the tokens of either, which ``engine/token_parts.py`` computes from
one forward and backward pass of each text. The rows of these passes give the recomputed score that
the parts add up to; the stored row, rounded or packed, gave another.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch

from gradproj.analysis.prepared_queries import PreparedQueries
from gradproj.analysis.reduction import stored_reduction
from gradproj.analysis.scan import Scan, select_layers
from gradproj.analysis.score_blocks import RowScores
from gradproj.analysis.score_types import SCORES
from gradproj.analysis.watch import ScanProgress
from gradproj.engine.token_parts import SplitTexts, pulled_back, split_texts
from gradproj.errors import ConfigError
from gradproj.job.recorded import RecordedEngine
from gradproj.job.recorded_documents import RecordedDocuments
from gradproj.model.sequences import TokenSequence, targets_by_owner
from gradproj.model.token_texts import TokenText, TokenTexts
from gradproj.query.projector import QueryProjector, QueryRows

MAX_TOKENS = 2**17
"""Of a document that is split; a longer one is of use to no reader of its tokens."""
_ROW_BYTES = 2**30
"""Most bytes of documents' rows at once; more documents take several groups of queries."""


@dataclass(frozen=True)
class TokenScore:
    """Parts of a document's score for a query, or for a set of them."""

    score: float
    """Of the recomputed row, with ``head``."""
    parts: np.ndarray
    """``(T,)`` float64: of the document's tokens. They sum to ``score`` less ``head``."""
    layers: np.ndarray
    """``(L,)`` float64: of the layers, with the same sum."""
    head: float
    """Of the stored head rows; 0 without."""
    query_parts: np.ndarray | None = None
    """``(T_q,)`` float64: of the query's tokens, with the same sum; None for sets of queries."""


@dataclass
class TokenScores:
    """Scores of listed documents, split."""

    layers: list[str]
    has_head: bool
    documents: dict[int, list[TokenText]] = field(default_factory=dict)
    """Sample id -> the tokens that its row covers."""
    queries: dict[int, list[TokenText]] = field(default_factory=dict)
    """Number of a query -> its tokens, if they were split."""
    found: dict[tuple[int, int], TokenScore] = field(default_factory=dict)
    """(Number of the query or set, sample id) -> its parts; none of documents of more than
    ``MAX_TOKENS``."""

    @classmethod
    def summed(cls, parts: Sequence["TokenScores"], weights: Sequence[float]) -> "TokenScores":
        """Return the weighted sum of the scores of the same documents at several checkpoints.

        Raises:
            ConfigError: tokenizers that split a text into other tokens.
        """
        first, total = parts[0], TokenScores(parts[0].layers, any(x.has_head for x in parts))
        total.documents, total.queries = first.documents, first.queries
        for other in parts[1:]:
            if (other.documents, other.queries) != (first.documents, first.queries):
                raise ConfigError(
                    "the checkpoints' tokenizers split the texts into other tokens, so the scores "
                    "of tokens cannot be added: leave --tokens out"
                )
        for key in first.found:
            pairs = [(w, x.found[key]) for w, x in zip(weights, parts, strict=True)]
            of_queries = [(w, x.query_parts) for w, x in pairs if x.query_parts is not None]
            total.found[key] = TokenScore(
                score=sum(w * x.score for w, x in pairs),
                parts=np.sum([w * x.parts for w, x in pairs], axis=0),
                layers=np.sum([w * x.layers for w, x in pairs], axis=0),
                head=sum(w * x.head for w, x in pairs),
                query_parts=np.sum([w * x for w, x in of_queries], axis=0) if of_queries else None,
            )
        return total


@dataclass(frozen=True)
class TokenSplitter:
    """Splits scores with the job's model.

    Args:
        recorded: the store's model and engine.
        documents: of the store.
        projector: of the queries, whose tokens are then split too; None leaves them out.
        turn: entered around each use of the model or its tokenizer, which threads may share.
    """

    recorded: RecordedEngine
    documents: RecordedDocuments
    projector: QueryProjector | None = None
    turn: Callable[[], AbstractContextManager[None]] = nullcontext

    def split(self, scan: Scan, rows: QueryRows, listed: Sequence[np.ndarray]) -> TokenScores:
        """Split the scores of the documents ``listed`` of each query, or of each set.

        Every document runs once for each group of queries whose documents fit the memory.

        Args:
            scan: with the damping of the scores.
            rows: the queries; those of a control set last.
            listed: sample ids of each query or set.

        Raises:
            ModelError: the parts of tokens are not known, or the device lacks memory for a text.
            CorpusError, StoreError: a document is not what it was.
        """
        has_sets, head = scan.options.get("sets") is not None, scan.options.get("head")
        found = TokenScores(scan.layers, head is not None)
        most = max(map(len, listed), default=0) * 4 * (scan.store.dim + 5 * scan.width)
        step = len(listed) if has_sets else max(1, _ROW_BYTES // max(most, 1))
        for first in range(0, len(listed), step):
            span = slice(None) if has_sets else slice(first, first + step)
            prepared = scan.prepare_queries(rows.rows[span], None if head is None else head[span])
            group = _Group(self, scan, prepared, found, listed[first : first + step], first)
            if not len(group.ids):
                continue
            group.split_documents()
            if len(group.ids) and self.projector is not None and not has_sets:
                group.split_queries(rows)
        return found


class _Group:
    """Some queries, or all sets, with the documents that they list."""

    def __init__(
        self,
        splitter: TokenSplitter,
        scan: Scan,
        prepared: PreparedQueries,
        found: TokenScores,
        listed: Sequence[np.ndarray],
        first: int,
    ) -> None:
        self._splitter, self._scan, self._prepared = splitter, scan, prepared
        self._found, self._listed, self._first = found, listed, first
        self.ids = np.unique(np.concatenate([*listed, np.empty(0, np.int64)]))
        self._subjects: dict[int, list[int]] = {i: [] for i in self.ids.tolist()}
        for number, ids in enumerate(listed):
            for i in ids.tolist():
                self._subjects[i].append(number)
        self._columns = _columns(scan)
        self._is_mean = stored_reduction(scan.store) == "mean"

    def split_documents(self) -> None:
        """Run the documents, and note what their tokens and layers add to each score."""
        made, prepared, scan = self._splitter.recorded, self._prepared, self._scan
        documents, turn = self._splitter.documents, self._splitter.turn
        self.ids, sequences, texts = documents.with_texts(self.ids, MAX_TOKENS, turn)
        if not len(self.ids):
            return
        chosen = [self._weights_of(i) for i in self.ids.tolist()]
        matrices = pulled_back(prepared.weights.cpu(), self._columns, scan.store.basis)
        split = self._split(made, sequences, matrices, chosen)
        lengths = np.ones(len(self.ids))
        if self._is_mean:
            lengths = targets_by_owner(sequences, len(self.ids)).astype(np.float64)
        all_rows = torch.from_numpy(split.rows / lengths[:, None].astype(np.float32))
        self.rows = select_layers(all_rows, scan.store, scan.layers)
        here = self.rows.to(scan.device)
        layers, head, factors = RowScores(scan, prepared)(here, self.ids)
        norms = prepared.norms_of(here)
        self.scale = factors if norms is None else torch.where(norms > 0, 1 / norms, 0.0).double()
        self.scale = self.scale.cpu()
        values, head = ((x * factors).cpu() for x in (layers, head))
        scales = prepared.scales.cpu()[:, None] * self.scale / torch.from_numpy(lengths)
        texts_of = _Places(sequences, texts)
        sets = prepared.sets
        best = None if sets is None else sets.rows_that_count(values + head)
        for place, sample_id in enumerate(self.ids.tolist()):
            parts = texts_of.summed(split, place)
            self._found.documents[sample_id] = texts_of.tokens(place)
            for subject in self._subjects[sample_id]:
                row = subject if best is None else int(best[subject, place])
                signs = {row: 1.0}
                if sets is not None and sets.n_control:
                    signs[len(values) - 1] = -1.0
                factors_of = np.zeros(len(chosen[place]))
                for number, sign in signs.items():
                    at = np.searchsorted(chosen[place], number)
                    factors_of[at] += sign * float(scales[number, place])
                of_head = sum(sign * float(head[n, place]) for n, sign in signs.items())
                of_layers = sum(sign * float(values[n, place]) for n, sign in signs.items())
                self._found.found[self._first + subject, sample_id] = TokenScore(
                    score=of_layers + of_head,
                    parts=factors_of @ parts,
                    layers=factors_of @ split.layers[place],
                    head=of_head,
                )

    def _weights_of(self, sample_id: int) -> np.ndarray:
        """Return the numbers of the weights that a document is multiplied with, sorted."""
        if self._prepared.sets is not None:
            return np.arange(len(self._prepared.weights))
        return np.array(self._subjects[sample_id], np.int64)

    def split_queries(self, rows: QueryRows) -> None:
        """Run the queries, and note what their tokens add to the scores of their documents."""
        scan, projector = self._scan, self._splitter.projector
        assert projector is not None
        asked = rows.queries[self._first : self._first + len(self._listed)]
        with self._splitter.turn():
            sequences, texts = projector.tokenizer.with_texts(asked)
        solved = scan.solved(self.rows.double()).double()
        largest = solved.abs().amax(dim=1).clamp(min=torch.finfo(torch.float64).tiny)
        matrices = pulled_back(solved / largest[:, None], self._columns, scan.store.basis)
        listed = [ids[np.isin(ids, self.ids)] for ids in self._listed]
        chosen = [np.searchsorted(self.ids, ids).astype(np.int64) for ids in listed]
        made = projector.recorded
        split = self._split(made, sequences, matrices, chosen)
        lengths = np.ones(len(asked))
        if self._is_mean:
            lengths = targets_by_owner(sequences, len(asked)).astype(np.float64)
        norms = self._query_norms(rows)
        texts_of = _Places(sequences, texts)
        for subject, ids in enumerate(listed):
            parts = texts_of.summed(split, subject)
            self._found.queries[self._first + subject] = texts_of.tokens(subject)
            for part, place, sample_id in zip(parts, chosen[subject], ids.tolist(), strict=True):
                factor = float(self.scale[place] * largest[place]) / lengths[subject]
                known = self._found.found[self._first + subject, sample_id]
                of_query = part * factor / norms[subject]
                self._found.found[self._first + subject, sample_id] = TokenScore(
                    known.score, known.parts, known.layers, known.head, of_query
                )

    def _split(
        self,
        made: RecordedEngine,
        sequences: Sequence[TokenSequence],
        matrices: Mapping[str, torch.Tensor],
        chosen: Sequence[np.ndarray],
    ) -> SplitTexts:
        """Split texts, with news for the watch of this thread's scans."""
        with ScanProgress(len(sequences), what="texts") as progress:
            return split_texts(
                made.model, made.engine, sequences, matrices, chosen, made.batch,
                self._splitter.turn, progress.update,
            )  # fmt: skip

    def _query_norms(self, rows: QueryRows) -> np.ndarray:
        """Return by what the queries were divided when they were prepared."""
        if SCORES[self._scan.score].divisor != "norms":
            return np.ones(len(self._listed))
        span = slice(self._first, self._first + len(self._listed))
        layers = select_layers(
            torch.from_numpy(rows.rows[span]), self._scan.store, self._scan.layers
        )
        norms = (layers.double() * self._scan.solved(layers)).sum(dim=1).sqrt()
        return torch.where(norms > 0, norms, 1.0).numpy()


class _Places:
    """Parts of sequences, put in the places of their documents' tokens."""

    def __init__(self, sequences: Sequence[TokenSequence], texts: Sequence[TokenTexts]) -> None:
        self._sequences, self._texts = sequences, texts
        self._of: list[list[int]] = [[] for _ in texts]
        for number, sequence in enumerate(sequences):
            self._of[sequence.owner].append(number)

    def _covered(self, owner: int) -> np.ndarray:
        places = [self._sequences[number].places for number in self._of[owner]]
        return np.unique(np.concatenate([x for x in places if x is not None]))

    def tokens(self, owner: int) -> list[TokenText]:
        """Return the tokens that the owner's sequences cover."""
        return [self._texts[owner][place] for place in self._covered(owner).tolist()]

    def summed(self, split: SplitTexts, owner: int) -> np.ndarray:
        """Return the parts of these tokens, ``(m, T)``; that of two windows is their sum."""
        covered, n = self._covered(owner), len(split.layers[owner])
        total = np.zeros((n, len(covered)))
        for number in self._of[owner]:
            places = self._sequences[number].places
            assert places is not None  # sequences with texts have them
            total[:, np.searchsorted(covered, places).astype(np.int64)] += split.parts[number]
        return total


def _columns(scan: Scan) -> dict[str, slice]:
    """Return the chosen layers' values in a row of these layers."""
    widths = {layer.name: layer.slice_end - layer.slice_start for layer in scan.store.layers}
    ends = np.cumsum([widths[name] for name in scan.layers]).tolist()
    return {
        name: slice(end - widths[name], end) for name, end in zip(scan.layers, ends, strict=True)
    }
