"""Rankings of a store's documents: by a gradient score, by text, or by both."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from gradproj.analysis import Preconditioner
from gradproj.analysis.preconditioner_cache import fit_cached
from gradproj.analysis.ranking import Ranker, Ranking
from gradproj.analysis.reduction import length_percentiles
from gradproj.analysis.row_blocks import scan_world
from gradproj.analysis.scan import ScanOptions, fit_for_scan
from gradproj.analysis.score_stream import ScoreStream
from gradproj.analysis.score_types import HEAD_SUMS, SCORES
from gradproj.cli.query.answer import Columns
from gradproj.cli.query.asked import Asked, Texts, ask
from gradproj.cli.query.config import MAX_JOINT_WIDTH, QueryConfig
from gradproj.cli.query.groups import Grouped
from gradproj.cli.query.rescore import SecondStage
from gradproj.cli.query.text import text_scan
from gradproj.distributed import Process, choose_device
from gradproj.errors import ConfigError
from gradproj.formatting import human_bytes
from gradproj.store import ProjectionStore
from gradproj.store.head_rows import HEAD_NAME
from gradproj.text.ranking import TEXT, WITH_TEXT, HybridRanker
from gradproj.text.scores import TextScan

_LENGTH_RATIO = 4
"""Of the 90th to the 10th percentile of documents' tokens, from which on ``query`` mentions it."""


@dataclass(frozen=True)
class Ranked:
    """Rankings, and the options that they were made with."""

    name: str
    """The score."""
    options: ScanOptions
    kind: str | None
    """Kind of the score's preconditioner."""
    asked: Asked
    rankings: list[Ranking]
    """One per damping; none of groups."""
    grouped: Grouped | None
    """Set with ``--by``."""
    second: SecondStage | None
    """None without ``--rescore``."""
    text: TextScan | None
    """Set if text scores are used."""
    columns: Columns = field(default_factory=dict)
    """Further scores of the ranked documents, on rank 0."""
    ranker: Ranker | None = None
    """Of a gradient score of one store."""

    @property
    def n_scored(self) -> int:
        """Documents that have a score."""
        if self.grouped is not None:
            return self.grouped.scores.n_scored
        return self.rankings[0].top.n_scored


def rank_by_text(
    config: QueryConfig,
    store: ProjectionStore,
    process: Process,
    n_ends: tuple[int, int],
    note: Callable[[str], None],
) -> Ranked:
    world = scan_world(process.world_size > 1)
    second = SecondStage.of(config, store, None)
    asked = world.broadcast(ask(config, store, note) if process.rank == 0 else None)
    scan = text_scan(config, store, process, note, second.text_index if second else None)
    scan = replace(scan, sets=asked.sets)
    found = collect(config, store, scan.stream(asked.texts), n_ends, note)
    device, _ = choose_device(config.device, process.local_rank)
    options: ScanOptions = {"score": TEXT, "layers": None, "domains": scan.domains}
    options |= {"device": device, "sets": asked.sets}
    return Ranked(TEXT, options, None, asked, *found, second, scan)


def collect(
    config: QueryConfig,
    store: ProjectionStore,
    stream: ScoreStream,
    n_ends: tuple[int, int],
    note: Callable[[str], None],
    damping: float | str | None = None,
) -> tuple[list[Ranking], Grouped | None]:
    """Rank documents, or the groups of ``--by``, by the scores of a stream, of this damping."""
    path = _scores_path(config, stream.n_scores, len(store), note)
    if config.by:
        return [], _grouped(config, store, stream, damping, n_ends, path, note)
    return [Ranking(damping, *stream.ends(*n_ends, path))], None


@dataclass(frozen=True)
class Gradients:
    """The gradient scores of one store for the queries, before its scan."""

    options: ScanOptions
    kind: str | None
    """Kind of the score's preconditioner."""
    asked: Asked
    ranker: Ranker
    second: SecondStage | None
    text: TextScan | None
    """Set if text scores are used."""

    @classmethod
    def of(
        cls,
        config: QueryConfig,
        store: ProjectionStore,
        process: Process,
        n_ends: tuple[int, int],
        note: Callable[[str], None],
        texts: Texts | None = None,
    ) -> "Gradients":
        """Project the queries and prepare all that the scan needs; ``texts`` as in ``ask``."""
        world = scan_world(process.world_size > 1)
        options = _scan_options(config, store, process, note)
        config.check_joint(options["layers"], store)
        second = SecondStage.of(config, store, options["layers"])
        kind = config.curvature or SCORES[options["score"]].curvature
        fit = functools.partial(_preconditioner, config, kind, store, options, note)
        # Missing token covariances show at once; a scan must wait until the queries are valid.
        fitted = fit() if kind == "kfac" else None
        asked = world.broadcast(ask(config, store, note, texts) if process.rank == 0 else None)
        queries, options["sets"] = asked.rows, asked.sets
        if queries.head is not None and config.uses_head(options["score"]):
            options |= {"head": queries.head, "head_sum": config.head_sum}
        elif store.head is not None and config.uses_head(options["score"]):
            note("the queries have no head rows: scores are those of the layers alone")
        # What a long scan would wait for comes before it.
        index = second.text_index if second else None
        text = text_scan(config, store, process, note, index) if config.uses_text else None
        text = None if text is None else replace(text, sets=asked.sets)
        ranker = Ranker(store, *n_ends, options, fitted or fit(), note)
        return cls(options, kind, asked, ranker, second, text)

    @property
    def rows(self) -> np.ndarray:
        """The queries' rows ``(Q, D)``."""
        return self.asked.rows.rows


def rank_by_gradients(
    config: QueryConfig,
    store: ProjectionStore,
    process: Process,
    n_ends: tuple[int, int],
    note: Callable[[str], None],
) -> Ranked:
    """Rank by a gradient score, alone or with text."""
    ours = Gradients.of(config, store, process, n_ends, note)
    options, asked, rows, ranker = ours.options, ours.asked, ours.rows, ours.ranker
    path = _scores_path(config, len(asked.subjects.names), len(store), note)
    dampings = config.dampings if ours.kind else config.dampings[:1]
    both = HybridRanker(ranker, replace(ours.text, progress=False)) if ours.text else None
    with_text = both if config.score in WITH_TEXT else None
    rankings, grouped = [], None
    if config.by:
        stream = ranker.stream(rows, dampings[0])
        if with_text is not None:
            stream = with_text.stream(rows, asked.texts, dampings[0])
        damping = dampings[0] if ours.kind else None
        grouped = _grouped(config, store, stream, damping, n_ends, path, note)
    elif with_text is not None:
        rankings = [with_text.rank(rows, asked.texts, c, path) for c in dampings]
    elif path is not None:
        rankings = [ranker.rank_and_save(rows, dampings[0], path)]
    else:
        rankings = ranker.rank(rows, config.dampings)
    if process.rank == 0 and SCORES[options["score"]].is_inner_product:
        _note_lengths(store, options, note)
    name = config.score or options["score"]
    found = rankings, grouped, ours.second, ours.text
    return Ranked(name, options, ours.kind, asked, *found, ranker=ranker)


def _grouped(
    config: QueryConfig,
    store: ProjectionStore,
    stream: ScoreStream,
    damping: float | str | None,
    n_ends: tuple[int, int],
    path: Path | None,
    note: Callable[[str], None],
) -> Grouped:
    groups = config.groups(store, config.shards, stream.world, note)
    scores = stream.groups(groups, config.by_documents, path)
    return Grouped(config.by, damping, scores, *n_ends)


def _scan_options(
    config: QueryConfig, store: ProjectionStore, process: Process, note: Callable[[str], None]
) -> ScanOptions:
    """Return options without a preconditioner, which is fitted after the queries are checked."""
    device, warning = choose_device(config.device, process.local_rank)
    if warning:
        note(warning)
    options = config.scan_options(store, device, note)
    if config.head_sum != HEAD_SUMS[0]:
        if store.head is None:
            raise ConfigError(f"--head_sum {config.head_sum}: {store.path} has no head rows")
        if not config.uses_head(options["score"]):
            raise ConfigError(
                f"--head_sum {config.head_sum} requires --score kfac, and {HEAD_NAME} among the "
                "--layers if there are any"
            )
    options["domains"] = config.domains_of(store)
    options["together"] = process.world_size > 1
    return options


def _note_lengths(
    store: ProjectionStore, options: ScanOptions, note: Callable[[str], None]
) -> None:
    """Say if documents of very different lengths compete; of scores that grow with length."""
    lengths = length_percentiles(store, options.get("domains"))
    if lengths is None:
        return
    short, long = lengths
    if long > _LENGTH_RATIO * max(short, 1):
        note(
            f"documents of very different lengths compete: a tenth has fewer than {short:,.0f} "
            f"target tokens, a tenth more than {long:,.0f}. --score relatif divides by each "
            "document's own influence"
        )


def _preconditioner(
    config: QueryConfig,
    kind: str | None,
    store: ProjectionStore,
    options: ScanOptions,
    note: Callable[[str], None],
) -> Preconditioner | None:
    if kind is None:
        return None
    if config.joint:
        settings = {"layers": options["layers"], "joint": True, "largest_width": MAX_JOINT_WIDTH}
        return fit_for_scan(store, kind, options, **settings)
    return fit_cached(store, kind, options, note)


def _scores_path(
    config: QueryConfig, n_queries: int, n_samples: int, note: Callable[[str], None]
) -> Path | None:
    if not config.save_scores:
        return None
    path, n_bytes = Path(config.save_scores), human_bytes(4 * n_queries * n_samples)
    note(f"{path} will hold {n_queries:,} x {n_samples:,} scores, {n_bytes}")
    return path
