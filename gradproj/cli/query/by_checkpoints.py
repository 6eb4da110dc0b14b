"""Rankings by the sum of the scores at several checkpoints, each a store of its own."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

import numpy as np

from gradproj.analysis.checkpoints import check_same_documents, streams_of, summed
from gradproj.analysis.ranking import Ranking
from gradproj.analysis.scan import Scan
from gradproj.analysis.score_blocks import scores_at
from gradproj.cli.query.answer import Columns, listed_ids
from gradproj.cli.query.asked import read_texts
from gradproj.cli.query.checkpoints import TABLE, titles_of
from gradproj.cli.query.ranked import Gradients, Ranked, collect
from gradproj.cli.query.session import Question
from gradproj.cli.query.split import check_can_split, split_answer
from gradproj.cli.score_args import check_has_rows, check_is_job_store
from gradproj.errors import ConfigError
from gradproj.query.token_scores import TokenScores
from gradproj.store import ProjectionStore


def rank_by_checkpoints(question: Question) -> Ranked:
    """Rank by the weighted sum of gradient scores; the question's store is the first output's.

    A document without a row at one of the checkpoints has no score.

    Raises:
        ConfigError: stores that do not belong together, or whose default scores differ.
        StoreError: an output without rows, or not of the job.
    """
    config, store, is_first = question.config, question.store, question.process.rank == 0
    if question.texts is None and is_first:
        question = replace(question, texts=read_texts(config))
    with ExitStack() as stack:
        stores = [store, *(stack.enter_context(ProjectionStore(x)) for x in config.others)]
        check_same_documents(stores)
        for other in stores[1:]:
            check_is_job_store(other)
            check_has_rows(other)
            if config.tokens:
                of_other = question.at(str(other.path.parent), other)
                check_can_split(of_other.config, other, of_other.session)
        of_each = [
            Gradients.of(question.at(output, one))
            for output, one in zip(config.outputs, stores, strict=True)
        ]
        ours = of_each[0]
        if any(one.options["score"] != ours.options["score"] for one in of_each):
            raise ConfigError("the outputs have different default scores: name one by --score")
        damping = config.dampings[0] if ours.kind else None
        rankers, rows = [one.ranker for one in of_each], [one.rows for one in of_each]
        stream = summed(streams_of(rankers, rows, config.dampings[0]), config.rates)
        rankings, grouped = collect(question, stream, damping)
        columns = Columns()
        if config.combine == TABLE and is_first:
            for title, one in zip(titles_of(config.outputs), of_each, strict=True):
                columns[f"score at {title}"] = _column(one, config.dampings[0], rankings)
        tokens = None
        if config.tokens and is_first and rankings[0].top.n_scored:
            # Their models are loaded again, one after the other.
            split = (
                split_answer(question.at(output, one), its.ranker, its.asked.rows, rankings[0])
                for output, one, its in zip(config.outputs, stores, of_each, strict=True)
            )
            tokens = TokenScores.summed([x for x in split if x is not None], config.rates)
    name = config.score or ours.options["score"]
    found = rankings, grouped, None, None, columns, tokens
    return Ranked(name, ours.options, ours.kind, ours.asked, *found)


def _column(
    one: Gradients, damping: float | str, rankings: Sequence[Ranking]
) -> dict[tuple[int, int], float]:
    """Return the score of each ranked document at one checkpoint."""
    ids = listed_ids(rankings, None)
    scan = Scan.of(one.ranker.store, {**one.ranker.damped_by(damping), "together": False})
    scores = scores_at(scan, scan.prepare_queries(one.rows), np.array(ids))
    return {
        (number, i): float(value)
        for number, values in enumerate(scores)
        for i, value in zip(ids, values, strict=True)
    }
