"""``python -m gradproj query``: rank a store's documents by a text, a query file or another store.

Queries pass through the engine with the settings, weights and matrices that the store recorded;
then the store is scanned once. Under torchrun the ranks share the scan; rank 0 projects the
queries and prints.
"""

import functools
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from gradproj.analysis import Preconditioner
from gradproj.analysis.preconditioner_cache import fit_cached
from gradproj.analysis.ranking import Ranker, Ranking
from gradproj.analysis.reduction import DEFAULT_REDUCTION, length_percentiles
from gradproj.analysis.row_blocks import scan_world
from gradproj.analysis.scan import ScanOptions, fit_for_scan
from gradproj.analysis.score_file import check_scores_path
from gradproj.analysis.score_types import SCORES
from gradproj.cli.query_by_text import query_texts, text_column, text_scan, tokenized, with_tokens
from gradproj.cli.query_config import MAX_JOINT_WIDTH, QueryConfig
from gradproj.cli.query_rescore import FirstStage, SecondStage, Source
from gradproj.cli.query_text import (
    Columns,
    Summary,
    describe,
    json_lines,
    overlap_lines,
    rescored_lines,
    table_lines,
)
from gradproj.cli.score_args import check_has_rows, is_job_store, print_note
from gradproj.distributed import Process, choose_device, process_group, report_errors_from_rank_0
from gradproj.errors import StoreError
from gradproj.flags import parse
from gradproj.formatting import human_bytes
from gradproj.job.recorded import config_from, recorded_index
from gradproj.query import Query, QueryProjector, QueryRows, check_rows_fit, read_queries
from gradproj.query.projector import query_head_bytes
from gradproj.query.query_store import rows_of_query_store
from gradproj.store import ProjectionStore
from gradproj.store.layer_view import Sample
from gradproj.store.texts import text_of
from gradproj.text.ranking import TEXT, WITH_TEXT, HybridRanker, TextRanker
from gradproj.text.scores import TextScan

_LENGTH_RATIO = 4
"""Of the 90th to the 10th percentile of documents' tokens, from which on ``query`` mentions it."""


@dataclass(frozen=True)
class Answer:
    """Rankings of all queries."""

    summary: Summary
    queries: QueryRows
    rankings: list[Ranking]
    """One per damping."""
    samples: dict[int, Sample]
    """The ranked documents; empty on ranks other than 0."""
    first_stage: FirstStage | None = None
    """Of a rescored answer, on rank 0."""
    columns: Columns = field(default_factory=dict)
    """Further columns of the ranked documents; empty on ranks other than 0."""


def query_command(argv: list[str]) -> None:
    """``python -m gradproj query OUTPUT --text "..."``, or under ``torchrun -m gradproj query``"""
    process = Process.from_environment()
    with report_errors_from_rank_0(process.rank):
        (config,) = parse(
            argv,
            "gradproj query",
            QueryConfig,
            description="Rank the documents of a store by their scores for queries. Exactly one of "
            "--text, --queries and --query_store is required.",
        )
        with _signals(process), process_group(process):
            answer = query(config, process)
    if process.rank == 0:
        for line in lines_of(config, answer):
            print(line)


@contextmanager
def _signals(process: Process) -> Iterator[None]:
    """Make SIGTERM raise, as Ctrl-C does, so that an unfinished score file is deleted.

    With several ranks both end the process: one that waits in a collective runs no handler.
    """
    number, handler = signal.SIGTERM, signal.default_int_handler
    if process.world_size > 1:
        number, handler = signal.SIGINT, signal.SIG_DFL  # type: ignore[assignment]
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def query(config: QueryConfig, process: Process) -> Answer:
    """Score every document of a store in one scan and in bounded memory.

    Raises:
        StoreError: no store, a damaged one, or one without rows.
        ModelError: the model or the tokenizer differs from the store's.
        ConfigError: a flag or a query that cannot be answered.
        CorpusError: ``--show_text``, and the tars are not where the job found them.
    """
    if config.save_scores:
        check_scores_path(config.save_scores)
    note = functools.partial(_note, process)
    with ProjectionStore(config.output) as store:
        if not config.query_store and not is_job_store(store):
            raise StoreError(
                f"{store.path} was not written by the job and records no model, so text queries "
                "cannot be projected. Give --query_store, or use gradproj.analysis"
            )
        counts = check_has_rows(store)
        k, n_bottom = config.k("top_k", store), config.k("bottom_k", store)
        n_top = min(max(k, config.rescore), len(store))
        read_text = None
        if config.show_text:
            read_text = document_texts(config.output, config.shards)
        rank = _rank_by_text if config.score == TEXT else _rank_by_gradients
        ranked = rank(config, store, process, (n_top, n_bottom), note)
        rankings, n_scored = ranked.rankings, ranked.rankings[0].top.n_scored
        if not n_scored and not ranked.options["domains"]:
            raise StoreError(
                f"{store.path} is damaged: {counts['ok']:,} rows are recorded, and none of them "
                f"can be read. Run `python -m gradproj verify {store.path.parent}` to see all "
                "damage"
            )
        summary = Summary(
            store, ranked.options, ranked.kind, counts, n_scored, ranked.name, config.joint
        )
        if process.rank:
            return Answer(summary, ranked.queries, rankings, {})
        first_stage, columns = None, Columns()
        if ranked.second is not None and n_scored:
            rankings[0], first_stage = ranked.second.rescored(
                rankings[0], ranked.queries, k, _source(config, ranked.options)
            )
        if config.text_scores and ranked.text:
            texts = query_texts(ranked.queries)
            columns["text score"] = text_column(ranked.text, texts, rankings)
        samples = describe(store, rankings, read_text)
        return Answer(summary, ranked.queries, rankings, samples, first_stage, columns)


def _source(config: QueryConfig, options: ScanOptions) -> Source:
    return Source(
        config_from(config),
        torch.device(options["device"]),
        config.shards,
        config.query_store,
        options["domains"],
        options.get("reduction", DEFAULT_REDUCTION),
    )


@dataclass(frozen=True)
class _Ranked:
    """Rankings, and the options that they were made with."""

    name: str
    """The score."""
    options: ScanOptions
    kind: str | None
    """Kind of the score's preconditioner."""
    queries: QueryRows
    rankings: list[Ranking]
    """One per damping."""
    second: SecondStage | None
    """None without ``--rescore``."""
    text: TextScan | None
    """Set if text scores are used."""


def _rank_by_text(
    config: QueryConfig,
    store: ProjectionStore,
    process: Process,
    n_ends: tuple[int, int],
    note: Callable[[str], None],
) -> _Ranked:
    world = scan_world(process.world_size > 1)
    second = SecondStage.of(config, store, None)
    queries = world.broadcast(_query_rows(config, store, note) if process.rank == 0 else None)
    path = _scores_path(config, len(queries.names), len(store), note)
    scan = text_scan(config, store, process, note, second.text_index if second else None)
    ranking = TextRanker(scan, *n_ends).rank(query_texts(queries), path)
    device, _ = choose_device(config.device, process.local_rank)
    options: ScanOptions = {"score": TEXT, "layers": None, "domains": scan.domains}
    return _Ranked(TEXT, {**options, "device": device}, None, queries, [ranking], second, scan)


def _rank_by_gradients(
    config: QueryConfig,
    store: ProjectionStore,
    process: Process,
    n_ends: tuple[int, int],
    note: Callable[[str], None],
) -> _Ranked:
    """Rank by a gradient score, alone or with text."""
    world = scan_world(process.world_size > 1)
    options = _scan_options(config, store, process, note)
    config.check_joint(options["layers"], store)
    second = SecondStage.of(config, store, options["layers"])
    kind = config.curvature or SCORES[options["score"]].curvature
    fit = functools.partial(_preconditioner, config, kind, store, options, note)
    # Missing token covariances show at once; a scan must wait until the queries are valid.
    fitted = fit() if kind == "kfac" else None
    queries = world.broadcast(_query_rows(config, store, note) if process.rank == 0 else None)
    if queries.head is not None and config.uses_head(options["score"]):
        options |= {"head": queries.head, "head_sum": config.head_sum}
    elif store.head is not None and config.uses_head(options["score"]):
        note("the queries have no head rows: scores are those of the layers alone")
    # What a long scan would wait for comes before it.
    index = second.text_index if second else None
    text = text_scan(config, store, process, note, index) if config.uses_text else None
    ranker = Ranker(store, *n_ends, options, fitted or fit(), note)
    path = _scores_path(config, len(queries.names), len(store), note)
    if config.score in WITH_TEXT and text:
        both = HybridRanker(ranker, replace(text, progress=False))
        texts = query_texts(queries)
        dampings = config.dampings if kind else config.dampings[:1]
        rankings = [both.rank(queries.rows, texts, c, path) for c in dampings]
    elif path is not None:
        (damping,) = config.dampings
        rankings = [ranker.rank_and_save(queries.rows, damping, path)]
    else:
        rankings = ranker.rank(queries.rows, config.dampings)
    if process.rank == 0 and SCORES[options["score"]].is_inner_product:
        _note_lengths(store, options, note)
    name = config.score or options["score"]
    return _Ranked(name, options, kind, queries, rankings, second, text)


def _scan_options(
    config: QueryConfig, store: ProjectionStore, process: Process, note: Callable[[str], None]
) -> ScanOptions:
    """Return options without a preconditioner, which is fitted after the queries are checked."""
    device, warning = choose_device(config.device, process.local_rank)
    if warning:
        note(warning)
    options = config.scan_options(store, device, note)
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


def lines_of(config: QueryConfig, answer: Answer) -> Iterator[str]:
    """Yield the lines for standard output; for jsonl, print the summary to standard error."""
    if config.format == "table":
        yield from table_lines(
            answer.summary,
            answer.queries,
            answer.rankings,
            answer.samples,
            answer.first_stage,
            answer.columns,
        )
        return
    lines = answer.summary.lines([ranking.damping for ranking in answer.rankings])
    if answer.first_stage is not None:
        lines += rescored_lines(answer.first_stage)
    if len(answer.rankings) > 1:
        lines += ["", *overlap_lines(answer.rankings)]
    print("\n".join(lines), file=sys.stderr)
    yield from json_lines(
        answer.queries, answer.rankings, answer.samples, answer.first_stage, answer.columns
    )


def _note(process: Process, line: str) -> None:
    if process.rank == 0:
        print_note(line)


def _query_rows(
    config: QueryConfig, store: ProjectionStore, note: Callable[[str], None]
) -> QueryRows:
    if config.query_store:
        with ProjectionStore(config.query_store) as other:
            rows = rows_of_query_store(other, store)
            return with_tokens(rows, config, other, note) if config.uses_text else rows
    if config.text:
        queries = [Query(name="text", text=config.text, where="--text")]
    else:
        queries = read_queries(config.queries)
    if config.score == TEXT:
        return tokenized(config, store, queries)
    source, head_bytes = f"--queries {config.queries}", query_head_bytes(store)
    check_rows_fit(source, len(queries), store.dim, head_bytes, "Split the file into several")
    return QueryProjector(store, config_from(config), config.device).rows(queries)


def document_texts(output: str | Path, shards: str) -> Callable[[int], str]:
    """Return a function from a sample id to its document's text, read from the tars.

    Raises:
        CorpusError: the tars are not where the job found them, nor at ``shards``, or have changed.
    """
    return functools.partial(text_of, recorded_index(Path(output), shards))
