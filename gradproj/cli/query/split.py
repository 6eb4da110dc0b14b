"""The scores of listed documents by token and layer, at one checkpoint or summed over several."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from gradproj.analysis.ranking import Ranker, Ranking
from gradproj.analysis.scan import Rows, Scan
from gradproj.cli.query.session import Question, Session
from gradproj.cli.score_args import is_job_store
from gradproj.corpus.index import CorpusIndex
from gradproj.errors import StoreError
from gradproj.job.recorded import RecordedEngine, config_from
from gradproj.job.recorded_args import RecordedRunArgs
from gradproj.job.recorded_documents import RecordedDocuments
from gradproj.query import QueryProjector, QueryRows
from gradproj.query.token_scores import TokenScores, TokenSplitter
from gradproj.store import ProjectionStore


def check_can_split(config: RecordedRunArgs, store: ProjectionStore, session: Session) -> None:
    """Raise ``CorpusError`` if the tars are not there, ``StoreError`` if no model is recorded."""
    if not is_job_store(store):
        raise StoreError(
            f"{store.path} was not written by the job: rows of a training run are of the weights "
            "of their step, so no model gives their tokens. Leave --tokens out"
        )
    session.index(config)


def splitter_of(
    inputs: RecordedRunArgs,
    store: ProjectionStore,
    made: RecordedEngine,
    index: CorpusIndex,
    projector: QueryProjector | None,
) -> TokenSplitter:
    """Return what splits scores with the job's model; queries too if there is a projector."""
    run = config_from(inputs)
    documents = RecordedDocuments(store, run, made.tokenizer, made.vocabulary, index)
    return TokenSplitter(made, documents, projector)


def split_answer(
    question: Question, ranker: Ranker, rows: QueryRows, ranking: Ranking
) -> TokenScores | None:
    """Split the scores of a question's listed documents, on rank 0, if any are listed."""
    config, store, session = question.config, question.store, question.session
    if not config.tokens or session.process.rank or not ranking.top.n_scored:
        return None
    scan, projector = ranker.without_scan(config.dampings[0]), None
    if question.watch is not None:
        question.watch.scanned()
    with session.model():
        if not config.query_store and not config.makes_sets:
            projector = session.projector(config, store)
        made, index = session.engine(config, store), session.index(config)
    splitter = splitter_of(config, store, made, index, projector)
    splitter = replace(splitter, turn=session.parts())
    return split_scores(splitter, scan, rows, [ranking.top.ids, ranking.bottom.ids])


def split_scores(
    splitter: TokenSplitter, scan: Scan, rows: QueryRows, ends: Sequence[Rows]
) -> TokenScores:
    """Split the scores of the documents at the ``ends`` ``(Q, k)`` of a ranking."""
    ids = np.concatenate([np.asarray(end) for end in ends], axis=1)
    return splitter.split(scan, rows, [np.unique(row[row >= 0]) for row in ids])
