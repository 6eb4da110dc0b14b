"""The command ``report``: one HTML page on a store: run, domains, outliers, answers to queries."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gradproj.analysis.scan import Scan, ScanOptions
from gradproj.analysis.score_types import DOMAIN_SCORES
from gradproj.analysis.scores import both_ends_of
from gradproj.cli.query.split import split_scores, splitter_of
from gradproj.cli.score_args import ScoreArgs
from gradproj.distributed import choose_device
from gradproj.errors import ConfigError, CorpusError, GradprojError
from gradproj.flags import DEVICES, flag, parse
from gradproj.formatting import human_bytes, one_line
from gradproj.job.recorded import config_from, recorded_index
from gradproj.job.recorded_args import RecordedRunArgs
from gradproj.query import Query, QueryProjector, QueryRows, read_queries
from gradproj.query.token_scores import TokenScores, TokenSplitter
from gradproj.report.build import make_page
from gradproj.report.document_tables import (
    BESIDE_CHARACTERS,
    TextExcerpts,
    documents_of,
    scaled_values,
)
from gradproj.report.number_format import digits
from gradproj.report.page import QueryAnswer, render
from gradproj.report.token_shading import Scale, query_shading, shading_of
from gradproj.storage.object_path import path_of
from gradproj.storage.results import make_folder, write_result
from gradproj.store import ProjectionStore
from gradproj.store.layout import REPORT_NAME
from gradproj.store.texts import text_of

MAX_QUERIES = 200
MAX_TOP_K = 200
QUERY_CHARACTERS = 600


@dataclass(frozen=True, kw_only=True)
class ReportConfig(ScoreArgs, RecordedRunArgs, title="page"):
    """Which store and queries the page shows, and where it goes."""

    queries: str = flag(
        "JSONL file of queries, as for `query --queries`.", "", path="FILE", streams=True
    )
    page: str = flag(
        "File of the page; default: OUTPUT/report.html.",
        "",
        renamed_from="output",
        path="FILE",
        remote=True,
    )
    top_k: int = flag(
        "Number of documents in a table.",
        10,
        minimum=1,
        maximum=MAX_TOP_K,
        why="a page is for reading",
    )

    tokens: bool = flag(
        "With --queries: shade the tokens that the scores come from, and show the layers. Takes a "
        "forward and backward pass of each listed document.",
        True,
    )
    device: str = flag(
        "Device for the queries' gradients and for the scans.",
        "auto",
        choices=DEVICES,
        group="page",
    )


def report_command(argv: list[str]) -> None:
    """``python -m gradproj report OUTPUT``"""
    (config,) = parse(
        argv,
        "gradproj report",
        ReportConfig,
        description="One HTML page on a store: run, domains, outliers, answers to queries.",
    )
    config.apply()
    path = report(config)
    print(
        f"{path} written, {human_bytes(path.stat().st_size)}; open it in any browser, it needs no "
        "other file"
    )


def report(config: ReportConfig) -> Path:
    """Write the page; return its path.

    Raises:
        ConfigError: unknown layer, invalid query, or singular curvature.
        ModelError: there are queries, and the model is not the one of the store.
        StoreError: no store, or a page that cannot be written.
    """
    with ProjectionStore(config.output) as store:
        # OUTPUT may name the store's own directory.
        config = replace(config, output=str(store.path.parent))
        path = path_of(config.page or store.path.parent / REPORT_NAME)
        if path.is_dir():
            raise ConfigError(
                f"--page {path} is a folder; name a file, such as {path / 'report.html'}"
            )
        rows = projector = None
        if config.queries:  # first: most user errors are in the queries
            queries = _queries(config)
            projector = QueryProjector(store, config_from(config), config.device)
            rows = projector.rows(queries)
        device, _ = choose_device(config.device, 0)
        options = config.fitted_options(store, device, DOMAIN_SCORES)
        query_options = options
        if config.score not in ("", options["score"]):
            query_options = config.fitted_options(store, device)
        texts = excerpts_of(config)
        answers = None
        if rows is not None:
            splitter = None
            if config.tokens and texts.read is not None and projector is not None:
                index = recorded_index(store.path.parent, config.shards)
                splitter = splitter_of(config, store, projector.recorded, index, projector)
            asked = store, rows, query_options, config.top_k, texts, splitter
            answers = functools.partial(answers_of, *asked)
        page = make_page(store, options, texts, min(config.top_k, len(store)), answers)
    make_folder("--page", path.parent)
    write_result("--page", path, [render(page)])
    return path


def excerpts_of(config: ReportConfig) -> TextExcerpts:
    """Return a reader of the documents' texts, or the reason why there is none.

    Raises:
        CorpusError: ``--shards`` was given and has no tars of the corpus.
    """
    try:
        index = recorded_index(path_of(config.output), config.shards)
    except GradprojError as error:
        if config.shards:
            raise
        is_moved = isinstance(error, CorpusError)
        way = " Give --shards where the tars are now." if is_moved else ""
        return TextExcerpts(None, f"The documents' texts are not shown: {error}.{way}")
    return TextExcerpts(functools.partial(text_of, index))


# --- queries ---


def _queries(config: ReportConfig) -> list[Query]:
    """Read the queries; ``ConfigError`` for an invalid one, or too many for a page."""
    queries: list[Query] = read_queries(config.queries)
    if len(queries) > MAX_QUERIES:
        raise ConfigError(
            f"--queries {config.queries} holds {len(queries):,} queries, and a page shows at most "
            f"{MAX_QUERIES}: take fewer, or use `query --queries ... --format jsonl`"
        )
    return queries


def answers_of(
    store: ProjectionStore,
    rows: QueryRows,
    options: ScanOptions,
    top_k: int,
    texts: TextExcerpts,
    splitter: TokenSplitter | None,
) -> tuple[list[QueryAnswer], str, str]:
    """Return the top and bottom documents of each query, the score's name, and a note."""
    k, scan = min(top_k, len(store)), Scan.of(store, options)
    prepared = scan.prepare_queries(rows.rows)
    top, bottom = both_ends_of(scan, prepared, k, k, rows.rows)
    ends = [np.asarray(end.ids) for end in (top, bottom)]
    tokens = None if splitter is None else _tokens(splitter, scan, rows, ends, texts)
    answers = []
    for q, name in enumerate(rows.names):
        ids = [of_end[q] for of_end in ends]
        values = [np.asarray(ranked.scores[q]) for ranked in (top, bottom)]
        scores, unit = scaled_values(*values, sign=True)
        shading, shaded = None, []
        if tokens is not None and len(ids[0]):
            all_values = np.concatenate(values).tolist()
            scale = Scale(all_values)
            shading = functools.partial(shading_of, tokens, q, scale)
            shaded = query_shading(tokens, q, ids[0].tolist(), scale)
        high, low = (
            documents_of(store, sample_ids, formatted, texts, BESIDE_CHARACTERS, shading)
            for sample_ids, formatted in zip(ids, scores, strict=True)
        )
        answers.append(
            QueryAnswer(
                name=one_line(name, 120),
                excerpt=one_line(rows.excerpts[q], QUERY_CHARACTERS),
                n_tokens=int(rows.n_tokens[q]),
                loss=digits(float(rows.loss[q]), 4),
                unit=unit,
                pairs=list(zip(high, low, strict=True)),
                shaded=shaded,
            )
        )
    note = f"{top.n_scored:,} of {len(store):,} documents have a score."
    if len(rows.names) > 1:
        found = np.asarray(top.ids)
        n_found, most = len(np.unique(found[found >= 0])), min(found.size, top.n_scored)
        note += (
            f" Among the {k} best of each query are {n_found:,} different documents, of at most "
            f"{most:,}; if they are few and the queries differ, the score finds the same documents "
            "whatever is asked."
        )
    return answers, options["score"], note


def _tokens(
    splitter: TokenSplitter,
    scan: Scan,
    rows: QueryRows,
    ends: Sequence[np.ndarray],
    texts: TextExcerpts,
) -> TokenScores | None:
    """Return the scores of the listed documents by token; None, with a note, if they cannot be."""
    try:
        return split_scores(splitter, scan, rows, ends)
    except (GradprojError, OSError) as error:
        texts.problem = texts.problem or f"Some texts are not shown by token: {error}"
        return None
