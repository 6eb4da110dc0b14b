"""``python -m gradproj query``: which documents of a store support a text, a file of queries or another output most.

Queries go through the engine with the settings, weights and matrices that the store recorded; then the store is
scanned once. Under torchrun the ranks share the scan, and rank 0 makes the queries' rows and speaks.
"""

import functools
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from gradproj.analysis import Preconditioner
from gradproj.analysis.ranking import Ranking, rank_and_save_scores, rank_documents
from gradproj.analysis.row_blocks import scan_world
from gradproj.analysis.scan import ScanOptions
from gradproj.analysis.score_file import check_scores_path
from gradproj.distributed import Process, choose_device, process_group, report_errors_from_rank_0
from gradproj.errors import StoreError
from gradproj.flags import parse
from gradproj.formatting import clean_lines, human_bytes
from gradproj.job.config import RunConfig
from gradproj.job.recorded import config_from, recorded_config, recorded_index
from gradproj.query import Query, QueryProjector, QueryRows, check_rows_fit, read_queries
from gradproj.query.answer_text import About, describe, json_lines, overlap_lines, table_lines
from gradproj.query.config import (
    MOST_JOINT_VALUES,
    QueryConfig,
    check_joint,
    is_job_store,
    wanted_domains,
    wanted_k,
    wanted_kind,
    wanted_layers,
    wanted_score,
)
from gradproj.query.curvature import curvature_for
from gradproj.query.query_store import rows_of_query_store
from gradproj.store import ProjectionStore
from gradproj.store.layer_view import Sample
from gradproj.store.texts import text_of
from gradproj.store.zarr_threads import few_zarr_threads

_ALONE = Process(0, 1, 0, 1)


@dataclass(frozen=True)
class Answer:
    """What came of it; the samples are known to rank 0 only."""

    about: About
    asked: QueryRows
    ends: list[Ranking]
    """One for each damping."""
    samples: dict[int, Sample]


def query_command(argv: list[str]) -> None:
    """``python -m gradproj query OUTPUT --text "..."``, or under ``torchrun -m gradproj query``"""
    process = Process.from_environment()
    with report_errors_from_rank_0(process.rank):
        (config,) = parse(
            argv, "gradproj query", QueryConfig, description="Which documents support a query most."
        )
        with few_zarr_threads(), process_group(process), _ended_as_by_ctrl_c(process):
            answer = query(config, process)
    if process.rank == 0:
        for line in lines_of(config, answer):
            print(line)


@contextmanager
def _ended_as_by_ctrl_c(process: Process) -> Iterator[None]:
    """SIGTERM too leaves no unfinished file. Not among ranks: one that waits for another would not mind it any more."""
    if process.world_size > 1:
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def query(config: QueryConfig, process: Process = _ALONE) -> Answer:
    """Score every document of a store, in one scan and in bounded memory.

    Raises:
        StoreError: no store there, a damaged one, or none of its rows is there yet.
        ModelError: the model or the tokenizer is not the one the store was made with.
        ConfigError: a flag or a query that cannot be answered.
        CorpusError: texts are wanted, and the tars are not where the job found them.
    """
    if config.save_scores:
        check_scores_path(config.save_scores)
    world, tell = scan_world(process.world_size > 1), functools.partial(note, process)
    with ProjectionStore(config.output) as store:
        _check_rows_can_be_made(config, store)
        counts, n_top, n_bottom = (
            _rows_there(store),
            wanted_k(config, store, "top_k"),
            wanted_k(config, store, "bottom_k"),
        )
        read_text = document_texts(config.output, _texts_from(config)) if config.show_text else None
        how = _how(config, store, process, tell)
        if config.joint:
            check_joint(how["layers"], store)
        kind = wanted_kind(config, how["score"])
        curvature = functools.partial(_curvature, config, store, how, counts["ok"], tell)
        # Whether sums are there is known at once; a scan waits until the queries are known to be good.
        known = curvature() if kind == "kfac" else None
        asked = world.broadcast(_asked(config, store) if process.rank == 0 else None)
        ends = _ends(config, store, asked, (n_top, n_bottom), how, known or curvature(), tell)
        if not ends[0].top.n_scored and not how["domains"]:
            raise StoreError(
                f"{store.path} is damaged: {counts['ok']:,} rows are recorded, and none of them can be read. "
                f"Run `python -m gradproj verify {store.path.parent}` to see all damage"
            )
        n_scored = ends[0].top.n_scored
        about = About(
            store, how["score"], kind, how["layers"], how["domains"], counts, n_scored, config.joint
        )
        samples = describe(store, ends, read_text) if process.rank == 0 else {}
        return Answer(about, asked, ends, samples)


def _curvature(
    config: QueryConfig,
    store: ProjectionStore,
    how: ScanOptions,
    n_ok: int,
    tell: Callable[[str], None],
) -> Preconditioner | None:
    together, device, progress = how["together"], how["device"], how["progress"]
    if config.joint:
        return Preconditioner.fit(
            store,
            "second_moment",
            layers=how["layers"],
            joint=True,
            largest_width=MOST_JOINT_VALUES,
            together=together,
            device=device,
            progress=progress,
        )
    kind = wanted_kind(config, how["score"])
    return curvature_for(
        kind, store, n_ok, together=together, device=device, progress=progress, say=tell
    )


def _ends(
    config: QueryConfig,
    store: ProjectionStore,
    asked: QueryRows,
    k: tuple[int, int],
    how: ScanOptions,
    curvature: Preconditioner | None,
    tell: Callable[[str], None],
) -> list[Ranking]:
    if not config.save_scores:
        return rank_documents(asked.rows, store, *k, how, curvature, config.dampings)
    path, shape, (damping,) = (
        Path(config.save_scores),
        (len(asked.rows), len(store)),
        config.dampings,
    )
    tell(
        f"{path} will hold {shape[0]:,} x {shape[1]:,} scores, {human_bytes(4 * shape[0] * shape[1])}"
    )
    return [rank_and_save_scores(asked.rows, store, *k, how, curvature, damping, path)]


def lines_of(config: QueryConfig, answer: Answer) -> Iterator[str]:
    """What is printed; of jsonl, what is said about it goes to standard error."""
    if config.format == "table":
        yield from table_lines(answer.about, answer.asked, answer.ends, answer.samples)
        return
    about = answer.about.lines([a.damping for a in answer.ends])
    if len(answer.ends) > 1:
        about += ["", *overlap_lines(answer.ends)]
    print("\n".join(about), file=sys.stderr)
    yield from json_lines(answer.asked, answer.ends, answer.samples)


def note(process: Process, line: str) -> None:
    """Said once, beside the answer."""
    if process.rank == 0:
        print(f"gradproj: {clean_lines(line)}", file=sys.stderr, flush=True)


# ---- The flags and the store


def _check_rows_can_be_made(config: QueryConfig, store: ProjectionStore) -> None:
    if not config.query_store and not is_job_store(store):
        raise StoreError(
            f"{store.path} is no job's: no model is recorded whose gradients its rows were, so a text cannot become "
            "such a row. Give --query_store, or rows of your own to gradproj.analysis"
        )


def _rows_there(store: ProjectionStore) -> dict[str, int]:
    counts = store.status_counts()
    if not counts["ok"]:
        raise StoreError(
            f"{store.path} has no row yet ({counts['missing']:,} of {len(store):,} documents are still to be "
            "computed); start the job again on it"
        )
    return counts


def _how(
    config: QueryConfig, store: ProjectionStore, process: Process, tell: Callable[[str], None]
) -> ScanOptions:
    """The scans' settings, all of them set."""
    device, warning = choose_device(config.device, process.local_rank)
    if warning:
        tell(warning)
    return {
        "score": wanted_score(config, store, tell),
        "layers": wanted_layers(config.layers, store),
        "domains": wanted_domains(config, store),
        "device": device,
        "progress": sys.stderr.isatty(),
        "together": process.world_size > 1,
    }


# ---- The queries and the documents


def _asked(config: QueryConfig, store: ProjectionStore) -> QueryRows:
    if config.query_store:
        with ProjectionStore(config.query_store) as other:
            return rows_of_query_store(other, store)
    text = Query(name="text", text=config.text, where="--text") if config.text else None
    queries = [text] if text else read_queries(config.queries)
    check_rows_fit(
        f"--queries {config.queries}", len(queries), store.dim, "Give its lines in several files"
    )
    return QueryProjector(store, config_from(config), config.device).rows(queries)


def _texts_from(config: QueryConfig) -> RunConfig:
    """The recorded settings with the tars where they lie now; no checkpoint is asked for."""
    run = recorded_config(Path(config.output))
    return replace(run, corpus=replace(run.corpus, shards=config.shards or run.corpus.shards))


def document_texts(output: str | Path, run: RunConfig) -> Callable[[int], str]:
    """A function from a sample id to its document's text, read from the tars.

    Raises:
        CorpusError: the tars are not where the job found them, or have changed.
    """
    return functools.partial(text_of, recorded_index(Path(output), run))
