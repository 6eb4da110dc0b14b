"""``Session``: an output kept open for many questions, and ``Question``, one of them."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeVar

from gradproj.analysis import Preconditioner, QuerySets
from gradproj.analysis.preconditioner_cache import fit_cached, state_of
from gradproj.analysis.preconditioner_file import identity_of
from gradproj.analysis.scan import ScanOptions
from gradproj.analysis.watch import ScanWatch, present_watch
from gradproj.cli.query.config import QueryConfig
from gradproj.cli.query.subjects import Subjects
from gradproj.cli.query.turns import LOOK_AGAIN_S, Place, Turns
from gradproj.corpus.index import CorpusIndex
from gradproj.distributed import Process
from gradproj.errors import StoreError
from gradproj.job.recorded import (
    RecordedEngine,
    config_from,
    recorded_engine,
    recorded_index,
    recorded_tokenizer,
)
from gradproj.job.recorded_args import RecordedRunArgs
from gradproj.query import Query, QueryProjector
from gradproj.storage.object_path import path_of
from gradproj.store import ProjectionStore
from gradproj.store.texts import text_of

T = TypeVar("T")
WAITS = "waits for the model"
"""Progress of a question that waits while another one loads, fits or uses the model."""
BEGINNING = 1000
"""Characters of a text that are kept."""
_MOST_TEXTS = 2**13
_MOST_FITTED = 4
"""Curvatures kept: of a model with wide layers, one takes gigabytes."""

Texts = tuple[list[Query], QuerySets | None]
"""Queries, those of the control set last, and the sets that they form."""


class Session:
    """Parts that questions to one output have in common, each loaded when one needs it, and kept.

    These are the model with its engine, the curvatures, the tokenizer, and the index of the tars.
    The store itself is opened again for each question, in milliseconds: an answer counts the rows
    that a running job has added. Threads may share a session: the model works for one of them
    at a time, in ``Turns``, and their scans run side by side.
    """

    def __init__(self, output: str, process: Process | None = None) -> None:
        self.output, self.process = output, process or Process(0, 1, 0, 1)
        self._turns, self._fit_lock = Turns(), threading.RLock()
        self._load_locks: dict[tuple, threading.RLock] = {}
        self._identity: dict[str, Any] | None = None
        # Its own: the store opens while another thread loads the model or fits a curvature.
        self._identity_lock = threading.Lock()
        self._kept: dict[tuple, Any] = {}
        self._fitted: dict[tuple, Preconditioner] = {}

    def open_store(self) -> ProjectionStore:
        """Open the store as it is now.

        Raises:
            StoreError: no store, a damaged one, or another one than at the first question.
        """
        store = ProjectionStore(self.output)
        with self._identity_lock:
            self._identity = self._identity or identity_of(store)
        if self._identity != identity_of(store):
            raise StoreError(
                f"{store.path} was replaced by another store since this command opened it: start "
                "the command again"
            )
        return store

    def projector(self, config: QueryConfig, store: ProjectionStore) -> QueryProjector:
        """Return the projector with its model loaded, which works within ``model`` alone."""

        def load() -> QueryProjector:
            return QueryProjector(store, config_from(config), config.device, config.query_model)

        return self._keep(("projector", config.query_model, config.device), load)

    def model(self, place: Place | None = None) -> AbstractContextManager[None]:
        """Have the model for this thread alone; a watch may end the wait for it."""
        return self._turns.turn(place, _waits)

    def parts(self) -> Callable[[], AbstractContextManager[None]]:
        """Return ``model`` for work of many parts, between which other threads have the model."""
        place = self._turns.place()
        return lambda: self.model(place)

    def engine(self, config: QueryConfig, store: ProjectionStore) -> RecordedEngine:
        """Return the job's model with its engine; it works within ``model`` alone."""
        if not config.query_model and not config.query_store:
            return self.projector(config, store).recorded

        def load() -> RecordedEngine:
            return recorded_engine(store, config_from(config), config.device)

        return self._keep(("engine", config.device), load)

    def tokenizer(self, config: RecordedRunArgs, store: ProjectionStore) -> tuple[Any, int]:
        """Return ``(tokenizer, number of the model's token ids)``; no weight is read."""
        run = config_from(config, loads_weights=False)
        return self._keep(("tokenizer",), lambda: recorded_tokenizer(store, run))

    def index(self, config: RecordedRunArgs) -> CorpusIndex:
        """Return where the documents are; ``CorpusError`` if the tars are not there."""
        return self._keep(("index",), lambda: recorded_index(path_of(config.output), config.shards))

    def beginning(self, config: RecordedRunArgs, sample_id: int) -> str:
        """Return the beginning of a document's text; those read last are kept."""
        index = self.index(config)

        def load() -> Callable[[int], str]:
            return lru_cache(_MOST_TEXTS)(lambda i: text_of(index, i)[:BEGINNING])

        return self._keep(("texts",), load)(sample_id)

    def preconditioner(
        self,
        store: ProjectionStore,
        kind: str,
        options: ScanOptions,
        note: Callable[[str], None] = lambda line: None,
    ) -> Preconditioner:
        """Return the curvature of all layers, fitted again once the store's rows have changed."""
        key = kind, state_of(store)
        with _held(self._fit_lock):
            fitted = self._fitted.pop(key, None) or fit_cached(store, kind, options, note)
            self._fitted[key] = fitted
            while len(self._fitted) > _MOST_FITTED:
                del self._fitted[next(iter(self._fitted))]
        return fitted

    def _keep(self, key: tuple, load: Callable[[], T]) -> T:
        if key not in self._kept:  # one lock each: a model may load for minutes
            with _held(self._load_locks.setdefault(key, threading.RLock())):
                if key not in self._kept:
                    self._kept[key] = load()
        return self._kept[key]


@contextmanager
def _held(lock: threading.RLock) -> Iterator[None]:
    """Hold a lock; a watch may end the wait for it."""
    while not lock.acquire(timeout=LOOK_AGAIN_S):
        _waits()
    try:
        yield
    finally:
        lock.release()


def _waits() -> None:
    watch = present_watch()
    if watch is not None:
        watch.advanced(0, 1, WAITS)


class AnswerWatch(ScanWatch):
    """A watch of a question's scans that first gets what is asked."""

    def asked(self, subjects: Subjects, damping: float | str | None) -> None:
        """The queries are projected; the first scan's scores are of them, by this damping."""

    def scanned(self) -> None:
        """The scans are over; what follows works on listed documents alone, with the model."""


@dataclass(frozen=True)
class Question:
    """One question to one output, with what it is answered from."""

    config: QueryConfig
    store: ProjectionStore
    session: Session
    n_ends: tuple[int, int]
    """Documents, or groups, at the upper and at the lower end."""
    note: Callable[[str], None]
    """Called with a line for the user."""
    texts: Texts | None = None
    """The queries, if they were read already: a pipe is read only once."""
    watch: AnswerWatch | None = None

    def begins(self, subjects: Subjects, damping: float | str | None) -> None:
        """Tell the watch what is asked, before the scan."""
        if self.watch is not None:
            self.watch.asked(subjects, damping)

    @property
    def process(self) -> Process:
        """This process among the ranks that share the scan."""
        return self.session.process

    @property
    def together(self) -> bool:
        """Whether there are several ranks."""
        return self.process.world_size > 1

    def at(self, output: str, store: ProjectionStore) -> "Question":
        """Return the same question to one of several outputs."""
        session = Session(output, self.process)
        return replace(self, config=self.config.at(output), store=store, session=session)
