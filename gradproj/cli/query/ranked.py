"""Rankings of a store's documents: by a gradient score, by text, or by both."""

import functools
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from gradproj.analysis import Preconditioner
from gradproj.analysis.ranking import Ranker, Ranking
from gradproj.analysis.reduction import length_percentiles
from gradproj.analysis.row_blocks import scan_world
from gradproj.analysis.scan import ScanOptions, fit_for_scan
from gradproj.analysis.score_stream import ScoreStream
from gradproj.analysis.score_types import HEAD_SUMS, SCORES
from gradproj.cli.query.answer import Columns
from gradproj.cli.query.asked import Asked, ask
from gradproj.cli.query.config import MAX_JOINT_WIDTH
from gradproj.cli.query.groups import Grouped
from gradproj.cli.query.rescore import SecondStage
from gradproj.cli.query.session import Question
from gradproj.cli.query.split import split_answer
from gradproj.cli.query.text import text_scan
from gradproj.distributed import choose_device
from gradproj.errors import ConfigError
from gradproj.formatting import human_bytes
from gradproj.query.token_scores import TokenScores
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
    tokens: TokenScores | None = None
    """Set with ``--tokens``, on rank 0."""

    @property
    def n_scored(self) -> int:
        """Documents that have a score."""
        if self.grouped is not None:
            return self.grouped.scores.n_scored
        return self.rankings[0].top.n_scored


def rank_by_text(question: Question) -> Ranked:
    """Rank by shared text alone."""
    config, process = question.config, question.process
    second = SecondStage.of(config, question.store, None)
    of_rank_0 = ask(question) if process.rank == 0 else None
    asked = scan_world(question.together).broadcast(of_rank_0)
    scan = text_scan(question, second.text_index if second else None)
    scan = replace(scan, sets=asked.sets)
    question.begins(asked.subjects, None)
    found = collect(question, scan.stream(asked.texts))
    device, _ = choose_device(config.device, process.local_rank)
    options: ScanOptions = {"score": TEXT, "layers": None, "domains": scan.domains}
    options |= {"device": device, "sets": asked.sets}
    return Ranked(TEXT, options, None, asked, *found, second, scan)


def collect(
    question: Question, stream: ScoreStream, damping: float | str | None = None
) -> tuple[list[Ranking], Grouped | None]:
    """Rank documents, or the groups of ``--by``, by the scores of a stream, of this damping."""
    path = _scores_path(question, stream.n_scores)
    if question.config.by:
        return [], _grouped(question, stream, damping, path)
    return [Ranking(damping, *stream.ends(*question.n_ends, path))], None


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
    def of(cls, question: Question) -> "Gradients":
        """Project the queries and prepare all that the scan needs."""
        config, store, note = question.config, question.store, question.note
        world = scan_world(question.together)
        options = _scan_options(question)
        config.check_joint(options["layers"], store)
        second = SecondStage.of(config, store, options["layers"])
        kind = config.curvature or SCORES[options["score"]].curvature
        fit = functools.partial(_preconditioner, question, kind, options)
        # Missing token covariances show at once; a scan must wait until the queries are valid.
        fitted = fit() if kind == "kfac" else None
        asked = world.broadcast(ask(question) if question.process.rank == 0 else None)
        queries, options["sets"] = asked.rows, asked.sets
        if queries.head is not None and config.uses_head(options["score"]):
            options |= {"head": queries.head, "head_sum": config.head_sum}
        elif store.head is not None and config.uses_head(options["score"]):
            note("the queries have no head rows: scores are those of the layers alone")
        # What a long scan would wait for comes before it.
        index = second.text_index if second else None
        text = text_scan(question, index) if config.uses_text else None
        text = None if text is None else replace(text, sets=asked.sets)
        ranker = Ranker(store, *question.n_ends, options, fitted or fit(), note)
        question.begins(asked.subjects, config.dampings[0] if kind else None)
        return cls(options, kind, asked, ranker, second, text)

    @property
    def rows(self) -> np.ndarray:
        """The queries' rows ``(Q, D)``."""
        return self.asked.rows.rows


def rank_by_gradients(question: Question) -> Ranked:
    """Rank by a gradient score, alone or with text."""
    config, ours = question.config, Gradients.of(question)
    options, asked, rows, ranker = ours.options, ours.asked, ours.rows, ours.ranker
    path = _scores_path(question, len(asked.subjects.names))
    dampings = config.dampings if ours.kind else config.dampings[:1]
    both = HybridRanker(ranker, replace(ours.text, progress=False)) if ours.text else None
    with_text = both if config.score in WITH_TEXT else None
    rankings, grouped = [], None
    if config.by:
        stream = ranker.stream(rows, dampings[0])
        if with_text is not None:
            stream = with_text.stream(rows, asked.texts, dampings[0])
        damping = dampings[0] if ours.kind else None
        grouped = _grouped(question, stream, damping, path)
    elif with_text is not None:
        rankings = [with_text.rank(rows, asked.texts, c, path) for c in dampings]
    elif path is not None:
        rankings = [ranker.rank_and_save(rows, dampings[0], path)]
    else:
        rankings = ranker.rank(rows, config.dampings)
    if question.process.rank == 0 and SCORES[options["score"]].is_inner_product:
        _note_lengths(question, options)
    name = config.score or options["score"]
    found = rankings, grouped, ours.second, ours.text
    tokens = split_answer(question, ranker, asked.rows, rankings[0]) if rankings else None
    return Ranked(name, options, ours.kind, asked, *found, tokens=tokens)


def _grouped(
    question: Question, stream: ScoreStream, damping: float | str | None, path: Path | None
) -> Grouped:
    config = question.config
    groups = config.groups(question.store, config.shards, stream.world, question.note)
    scores = stream.groups(groups, config.by_documents, path)
    return Grouped(config.by, damping, scores, *question.n_ends)


def _scan_options(question: Question) -> ScanOptions:
    """Return options without a preconditioner, which is fitted after the queries are checked."""
    config, store, note = question.config, question.store, question.note
    device, warning = choose_device(config.device, question.process.local_rank)
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
    options["together"] = question.together
    return options


def _note_lengths(question: Question, options: ScanOptions) -> None:
    """Say if documents of very different lengths compete; of scores that grow with length."""
    lengths = length_percentiles(question.store, options.get("domains"))
    if lengths is None:
        return
    short, long = lengths
    if long > _LENGTH_RATIO * max(short, 1):
        question.note(
            f"documents of very different lengths compete: a tenth has fewer than {short:,.0f} "
            f"target tokens, a tenth more than {long:,.0f}. --score relatif divides by each "
            "document's own influence"
        )


def _preconditioner(
    question: Question, kind: str | None, options: ScanOptions
) -> Preconditioner | None:
    if kind is None:
        return None
    store = question.store
    if question.config.joint:
        settings = {"layers": options["layers"], "joint": True, "largest_width": MAX_JOINT_WIDTH}
        return fit_for_scan(store, kind, options, **settings)
    return question.session.preconditioner(store, kind, options, question.note)


def _scores_path(question: Question, n_queries: int) -> Path | None:
    if not question.config.save_scores:
        return None
    path, n_samples = Path(question.config.save_scores), len(question.store)
    n_bytes = human_bytes(4 * n_queries * n_samples)
    question.note(f"{path} will hold {n_queries:,} x {n_samples:,} scores, {n_bytes}")
    return path
