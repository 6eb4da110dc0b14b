"""``query --rescore N``: the best of the scan, scored again with whole gradients."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from gradproj.analysis import TopDocuments
from gradproj.analysis.ranking import Ranking
from gradproj.analysis.reduction import stored_reduction
from gradproj.curvature.folder import CurvatureFolder
from gradproj.curvature.layer_curvature import AUTO_DAMPING, KINDS
from gradproj.curvature.recorded_model import RecordedModel
from gradproj.curvature.rescore import rescore
from gradproj.errors import ConfigError, StoreError
from gradproj.flags import Flags, flag
from gradproj.formatting import count, human_bytes, human_seconds
from gradproj.job.config import RunConfig
from gradproj.model.sequences import TokenSequence, targets_by_owner
from gradproj.query import QueryRows
from gradproj.store import STATUS, ProjectionStore
from gradproj.text.index import TextIndex, open_text_index
from gradproj.text.scores import QueryText, TextScan

DEFAULT_KIND = "ekfac"


@dataclass(frozen=True, kw_only=True)
class RescoreArgs(Flags, title="second stage"):
    """Whether and how the best documents are scored again."""

    rescore: int = flag(
        "Score so many documents, the best of the scan for each query, again with whole gradients "
        "and the exact curvature that `gradproj curvature` has measured; 0 = none.",
        0,
        minimum=0,
    )
    rescore_by: str = flag(
        f"Curvature of the second stage; default: {DEFAULT_KIND}.", "", choices=KINDS
    )
    rescore_damping: str = flag(
        "Damping of the second stage, as a multiple of the mean diagonal; auto: "
        f"{', '.join(f'{value} for {kind}' for kind, value in AUTO_DAMPING.items())}.",
        "auto",
        metavar="auto|FLOAT",
    )
    rescore_text: bool = flag(
        "Add as many documents, the best by shared text, to the second stage (`gradproj text` "
        "first).",
        False,
    )
    rescore_memory: float = flag(
        "GB of the queries' matrices on the device at once; what does not fit takes further "
        "passes. 0 = half of what is free.",
        0.0,
        minimum=0,
    )

    @property
    def exact_kind(self) -> str:
        """The curvature that ``--rescore_by`` stands for."""
        return self.rescore_by or DEFAULT_KIND

    @property
    def exact_damping(self) -> float:
        """The number that ``--rescore_damping`` stands for."""
        if self.rescore_damping == "auto":
            return AUTO_DAMPING[self.exact_kind]
        try:
            value = float(self.rescore_damping)
        except ValueError:
            value = math.nan
        if not 0 <= value < math.inf:
            raise ConfigError(
                f"--rescore_damping is {self.rescore_damping!r}; give auto or a number, 0 or more"
            )
        return value


@dataclass(frozen=True)
class FirstStage:
    """Earlier places of the documents of a rescored ranking, and how they were rescored."""

    scan: list[dict[int, tuple[int, float]]]
    """For each query: sample id -> its rank and score in the scan."""
    text: list[dict[int, int]] | None
    """For each query: sample id -> its rank by text. None without ``--rescore_text``."""
    note: str
    """Documents, layers, time and memory of the second stage, in words."""

    def header(self) -> str:
        """Return the heads of the table's columns of the earlier stages."""
        return f"{'scan':>7}{'scan score':>12}" + (f"{'text':>7}" if self.text is not None else "")

    def columns(self, query: int, sample_id: int) -> str:
        """Return a document's values in these columns; ``-`` where a stage did not list it."""
        fields = self.fields(query, sample_id)
        rank, score = fields["scan_rank"], fields["scan_score"]
        line = f"{'-' if rank is None else rank:>7}"
        line += f"{'-' if score is None else format(score, '+.3e'):>12}"
        if self.text is not None:
            line += f"{fields['text_rank'] or '-':>7}"
        return line

    def fields(self, query: int, sample_id: int) -> dict[str, Any]:
        """Return a document's earlier ranks; None for one that the stage did not list."""
        rank, score = self.scan[query].get(sample_id, (None, None))
        fields: dict[str, Any] = {"scan_rank": rank, "scan_score": score}
        if self.text is not None:
            fields["text_rank"] = self.text[query].get(sample_id)
        return fields


@dataclass(frozen=True)
class SecondStage:
    """The second stage of one query command; made before the scan, so that a mistake shows."""

    store: ProjectionStore
    config: RescoreArgs
    folder: CurvatureFolder
    layers: list[str]
    text_index: TextIndex | None
    """None without ``--rescore_text``."""

    @classmethod
    def of(
        cls, config: RescoreArgs, store: ProjectionStore, layers: Sequence[str] | None
    ) -> "SecondStage | None":
        """Return None without ``--rescore``. ``layers`` are those of the scan; None for all.

        Raises:
            StoreError: the curvature has not been measured, not to its end, or of another model.
        """
        _ = config.exact_damping
        if not config.rescore:
            return None
        folder = CurvatureFolder(store)
        measured = folder.recipe()["layers"]
        chosen = [name for name in measured if layers is None or name in layers]
        kinds = ["kfac"] if config.exact_kind == "kfac" else ["kfac", "ekfac"]
        lacking = {name for kind in kinds for name in folder.lacking(chosen, kind)}
        lacking |= set(layers or ()) - set(measured)
        if lacking:
            raise StoreError(
                f"{folder.path} lacks {config.exact_kind} curvature of "
                f"{count(len(lacking), 'layer')}, such as {min(lacking)}: run `python -m gradproj "
                f"curvature {store.path.parent}`, which computes what is missing"
            )
        text_index = open_text_index(store) if config.rescore_text else None
        if config.rescore_text and text_index is None:
            raise StoreError(
                f"--rescore_text: {store.path.parent} has no text index yet: run `python -m "
                f"gradproj text {store.path.parent}`"
            )
        return cls(store, config, folder, chosen, text_index)

    def rescored(
        self, ranking: Ranking, queries: QueryRows, k: int, source: "Source"
    ) -> tuple[Ranking, FirstStage]:
        """Return the ``k`` best of the candidates by whole gradients, and their earlier ranks.

        Raises:
            ModelError: the model is not what it was, or the device lacks memory for one text.
            CorpusError: a tar is not what it was.
        """
        started = time.monotonic()
        recorded = RecordedModel(self.store, source.run, source.device, source.shards, self.layers)
        memory = recorded.memory
        memory.start()
        asked = _query_sequences(recorded, queries, source.query_store)
        n_queries = len(queries.names)
        scan = [_ranks(ranking.top, n, self.config.rescore) for n in range(n_queries)]
        text = self._text_ranks(asked, n_queries, source) if self.config.rescore_text else None
        candidates = [
            np.array(sorted({*scan[n], *(text[n] if text else ())}), np.int64)
            for n in range(n_queries)
        ]
        scores, note = self._scores(recorded, asked, queries.n_tokens, candidates, source.reduction)
        width = min(k, *map(len, candidates))
        best = [np.argsort(-of, kind="stable")[:width] for of in scores]
        top = TopDocuments(
            np.stack([ids[order] for ids, order in zip(candidates, best, strict=True)]),
            np.stack([of[order] for of, order in zip(scores, best, strict=True)]),
            ranking.top.n_scored,
        )
        note += f"; {human_seconds(time.monotonic() - started)}, at most "
        note += f"{human_bytes(memory.peak())} of memory beside the model"
        return replace(ranking, top=top), FirstStage(scan, text, note)

    def _scores(
        self,
        recorded: RecordedModel,
        asked: Sequence[TokenSequence],
        query_tokens: np.ndarray,
        candidates: Sequence[np.ndarray],
        reduction: str,
    ) -> tuple[list[np.ndarray], str]:
        """Return every query's scores of its candidates, and what it took in words."""
        budget = recorded.budget(self.config.rescore_memory)
        widest = max(math.prod(recorded.targets[name].widths) for name in self.layers)
        at_once = max(1, budget // (4 * widest))
        scores, n_documents, n_tokens, n_groups = [], 0, 0, 0
        for first in range(0, len(candidates), at_once):
            part = slice(first, first + at_once)
            ids = np.unique(np.concatenate(candidates[part]))
            documents = recorded.sequences(ids)
            lengths = targets_by_owner(documents, len(ids))
            result = rescore(
                recorded,
                self.folder,
                self.layers,
                [s.owned_by(s.owner - first) for s in asked if first <= s.owner < part.stop],
                documents,
                kind=self.config.exact_kind,
                damping=self.config.exact_damping,
                budget=budget,
            )
            values = result.scores
            if stored_reduction(self.store) == "mean":  # as the scan has the queries' rows
                values = values / query_tokens[part, None]
            if reduction == "mean":
                values = values / lengths
            scores += [
                row[np.searchsorted(ids, chosen)]
                for row, chosen in zip(values, candidates[part], strict=True)
            ]
            n_documents, n_tokens = n_documents + len(ids), n_tokens + int(lengths.sum())
            n_groups += result.n_groups
        kind, damping = self.config.exact_kind, self.config.exact_damping
        note = (
            f"by {kind} of whole gradients, damping {damping:g}: "
            f"{count(n_documents, 'document')} of {n_tokens:,} target tokens, "
            f"{count(len(self.layers), 'layer')} in {count(n_groups, 'group')}"
        )
        return scores, note

    def _text_ranks(
        self, asked: Sequence[TokenSequence], n_queries: int, source: "Source"
    ) -> list[dict[int, int]]:
        queries = [
            QueryText.of_windows([sequence for sequence in asked if sequence.owner == n])
            for n in range(n_queries)
        ]
        assert self.text_index is not None  # its caller asks for text
        top, _ = TextScan(self.store, self.text_index, source.domains).rank(
            queries, self.config.rescore
        )
        return [
            {int(i): rank for rank, i in enumerate(ids, 1) if i >= 0} for ids in np.asarray(top.ids)
        ]


@dataclass(frozen=True)
class Source:
    """Inputs of the second stage: the model, and its texts."""

    run: RunConfig
    """The job's settings, with the model's present place."""
    device: torch.device
    shards: str
    query_store: str
    """Output directory whose documents are the queries; empty if they are texts."""
    domains: Sequence[str] | None
    """Domains that the query is restricted to."""
    reduction: str
    """Of the documents' losses: sum or mean."""


def _query_sequences(
    recorded: RecordedModel, queries: QueryRows, query_store: str
) -> Sequence[TokenSequence]:
    if query_store:
        with ProjectionStore(query_store) as other:
            ids = np.flatnonzero(other.column("status") == STATUS["ok"])
            return recorded.sequences(ids, other)
    return queries.sequences


def _ranks(top: TopDocuments, query: int, n: int) -> dict[int, tuple[int, float]]:
    """Return sample id -> rank and score of a query's ``n`` best."""
    ids, scores = (np.asarray(x)[query, :n].tolist() for x in (top.ids, top.scores))
    return {i: (rank, value) for rank, (i, value) in enumerate(zip(ids, scores, strict=True), 1)}
