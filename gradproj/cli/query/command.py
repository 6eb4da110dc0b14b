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

import torch

from gradproj.analysis.reduction import DEFAULT_REDUCTION
from gradproj.analysis.scan import ScanOptions
from gradproj.analysis.score_file import check_scores_path
from gradproj.analysis.watch import watching
from gradproj.cli.query.answer import Answer, describe, listed_ids
from gradproj.cli.query.by_checkpoints import rank_by_checkpoints
from gradproj.cli.query.by_hidden import rank_by_hidden
from gradproj.cli.query.config import QueryConfig
from gradproj.cli.query.json_lines import json_lines
from gradproj.cli.query.ranked import rank_by_gradients, rank_by_text
from gradproj.cli.query.rescore import Source
from gradproj.cli.query.session import AnswerWatch, Question, Session, Texts
from gradproj.cli.query.split import check_can_split
from gradproj.cli.query.summary import Summary
from gradproj.cli.query.table import overlap_lines, summary_lines, table_lines
from gradproj.cli.query.text import text_column, text_matches
from gradproj.cli.score_args import check_has_rows, check_is_job_store, print_note
from gradproj.distributed import Process, process_group, report_errors_from_rank_0
from gradproj.errors import StoreError
from gradproj.flags import parse
from gradproj.job.recorded import config_from
from gradproj.query.hidden import HIDDEN
from gradproj.text.ranking import TEXT

_RANKERS = {TEXT: rank_by_text, HIDDEN: rank_by_hidden}
"""``--score`` -> what ranks by it; all others are of gradients."""


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
        config.apply()
        with stop_signals(process), process_group(process):
            answer = query(config, process)
    if process.rank == 0:
        for line in lines_of(config, answer):
            print(line)


@contextmanager
def stop_signals(process: Process) -> Iterator[None]:
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
    return answer(config, Session(config.output, process), functools.partial(_note, process))


def answer(
    config: QueryConfig,
    session: Session,
    note: Callable[[str], None] = lambda line: None,
    texts: Texts | None = None,
    watch: AnswerWatch | None = None,
) -> Answer:
    """Answer one of a session's questions, to the session's output; raises as ``query``.

    ``note`` is called with lines for the user, and ``watch`` while the answer is made. ``texts``
    are the queries, if not those that ``config`` names.
    """
    if config.save_scores:
        check_scores_path(config.save_scores)
    with session.open_store() as store, watching(watch):
        if not config.query_store:
            check_is_job_store(store)
        counts = check_has_rows(store)
        k, n_bottom = config.k("top_k", store), config.k("bottom_k", store)
        n_top = min(max(k, config.rescore), len(store))
        read_text = None
        if config.show_text:
            read_text = functools.partial(session.beginning, config)
        if config.tokens:
            check_can_split(config, store, session)
        question = Question(config, store, session, (n_top, n_bottom), note, texts, watch)
        rank = _RANKERS.get(config.score, rank_by_gradients)
        ranked = (rank_by_checkpoints if config.others else rank)(question)
        rankings, n_scored = ranked.rankings, ranked.n_scored
        if not n_scored and not ranked.options["domains"]:
            raise StoreError(
                f"{store.path} is damaged: {counts['ok']:,} rows are recorded, and none of them "
                f"can be read. Run `python -m gradproj verify {store.path.parent}` to see all "
                "damage"
            )
        summary = Summary(
            store, ranked.options, ranked.kind, counts, n_scored, ranked.name, config.joint,
            config.contrast, config.query_model, config.sum_of_checkpoints,
        )  # fmt: skip
        if session.process.rank:
            return Answer(summary, ranked.asked.subjects, rankings, {}, grouped=ranked.grouped)
        first_stage, columns = None, dict(ranked.columns)
        if ranked.second is not None and n_scored:
            rankings[0], first_stage = ranked.second.rescored(
                rankings[0], ranked.asked.rows, k, _source(config, ranked.options)
            )
        if config.text_scores and ranked.text:
            columns["text score"] = text_column(ranked.text, ranked.asked.texts, rankings)
        subjects, matches = ranked.asked.subjects, None
        if config.text_matches and ranked.text:
            asked = ranked.asked.texts[: len(subjects.names)]  # those of a control set follow
            matches = text_matches(question, ranked.text, asked, rankings)
        samples = describe(store, listed_ids(rankings, ranked.grouped), read_text)
        found = samples, first_stage, columns, matches, ranked.grouped, ranked.tokens
        return Answer(summary, subjects, rankings, *found)


def _source(config: QueryConfig, options: ScanOptions) -> Source:
    return Source(
        config_from(config),
        torch.device(options["device"]),
        config.shards,
        config.query_store,
        options["domains"],
        options.get("reduction", DEFAULT_REDUCTION),
    )


def lines_of(config: QueryConfig, answer: Answer) -> Iterator[str]:
    """Yield the lines for standard output; for jsonl, print the summary to standard error."""
    if config.format == "table":
        yield from table_lines(answer)
        return
    lines = summary_lines(answer)
    if len(answer.rankings) > 1:
        lines += ["", *overlap_lines(answer.rankings)]
    print("\n".join(lines), file=sys.stderr)
    yield from json_lines(answer)


def _note(process: Process, line: str) -> None:
    if process.rank == 0:
        print_note(line)
