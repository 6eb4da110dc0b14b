"""One output as the server sees it: answers of ``query``, data of ``report`` and ``status``."""

import contextlib
import functools
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from gradproj.analysis import SCORES
from gradproj.analysis.document_map import document_map
from gradproj.analysis.preconditioner_cache import state_of
from gradproj.analysis.scan import ScanOptions
from gradproj.analysis.score_types import DOMAIN_SCORES
from gradproj.analysis.watch import ScanWatch, watching
from gradproj.cli.query import AnswerWatch, Session, answer
from gradproj.cli.query.answer import describe
from gradproj.cli.query.json_lines import hit_fields, json_lines
from gradproj.cli.query.subjects import Subjects
from gradproj.cli.query.table import summary_lines
from gradproj.cli.score_args import ScoreArgs, check_has_rows, is_job_store
from gradproj.cli.serve.question import NAME, Asked
from gradproj.distributed import choose_device
from gradproj.errors import ConfigError, GradprojError
from gradproj.formatting import escaped, one_line
from gradproj.job.recorded_args import RecordedRunArgs
from gradproj.kernels.memory import return_free_memory
from gradproj.maintenance.status import read_status
from gradproj.query.tokens import QueryTokenizer
from gradproj.report.document_tables import TextExcerpts
from gradproj.report.number_format import json_numbers
from gradproj.report.overview_data import overview_data
from gradproj.serve.scans import Event, ScanControl
from gradproj.store import ProjectionStore
from gradproj.store.hidden_states import HIDDEN_STATE
from gradproj.store.texts import text_of
from gradproj.text.index import open_text_index
from gradproj.text.ranking import TEXT

OUTLIERS = 10
"""Documents in a table."""
NEWS_S = 0.2
"""Seconds between partial answers."""
TEXT_CHARACTERS = 20_000
"""Of a document at a time."""
SMALL = 20_000
"""Documents of a store whose text index a question may make."""


class ControlWatch(ScanWatch):
    """Ends a scan when its control says so, and posts its progress."""

    def __init__(self, control: ScanControl) -> None:
        self._control, self._posted = control, 0.0
        self.is_at_end = False

    def advanced(self, n_done: int, n_total: int, what: str) -> None:
        self._control.check()
        self.is_at_end = n_done >= n_total
        if self.is_due():
            progress = {"done": n_done, "total": n_total, "what": what}
            self._control.post({"event": "progress", **progress})

    def is_due(self) -> bool:
        """Return True a few times a second, and at the end of a scan."""
        now = time.monotonic()
        if now - self._posted < NEWS_S and not self.is_at_end:
            return False
        self._posted = now
        return True


class PartialAnswers(AnswerWatch):
    """Posts the queries, the progress and the hits so far of one question."""

    def __init__(self, control: ScanControl, store: ProjectionStore) -> None:
        self._control, self._store = control, store
        self._progress, self._hits = ControlWatch(control), ControlWatch(control)
        self._subjects: Subjects | None = None
        self._damping: float | str | None = None

    def asked(self, subjects: Subjects, damping: float | str | None) -> None:
        self._control.check()
        self._subjects, self._damping = subjects, damping
        queries = zip(
            subjects.names, subjects.n_tokens.tolist(), subjects.loss.tolist(), subjects.excerpts,
            strict=True,
        )  # fmt: skip
        named = [
            {"query": name, "n_tokens": n, "loss": loss if loss == loss else None, "excerpt": text}
            for name, n, loss, text in queries
        ]
        self._control.post({"event": "asked", "queries": named})

    def advanced(self, n_done: int, n_total: int, what: str) -> None:
        self._progress.advanced(n_done, n_total, what)
        self._hits.is_at_end = self._progress.is_at_end

    def scanned(self) -> None:
        self._control.leave_place()

    def found(self, ends: Callable[[], tuple[Any, Any]]) -> None:
        if self._subjects is None or not self._hits.is_due():
            return
        hits = []
        for end, documents in zip(("top", "bottom"), ends(), strict=True):
            ids, scores = documents.ids[0].tolist(), documents.scores[0].tolist()
            samples = describe(self._store, [i for i in ids if i >= 0], None)
            hits += [
                hit_fields(self._subjects, 0, end, rank, score, samples[i], self._damping)
                for rank, (i, score) in enumerate(zip(ids, scores, strict=True), start=1)
                if i >= 0
            ]
        self._control.post({"event": "partial", "hits": hits})


class OutputExplorer:
    """One output that is served: see ``gradproj.serve.explorer``."""

    def __init__(self, inputs: RecordedRunArgs, title: str, most_characters: int) -> None:
        self._inputs, self.title, self._most_characters = inputs, title, most_characters
        self.session = Session(inputs.output)
        self._kept: dict[str, tuple[str, Event]] = {}
        self._takes_chat: bool | None = None
        """Whether there is a chat template; None before the model is loaded."""

    # --- questions ---

    def load(self) -> None:
        """Load model, curvature and compiled loops, so that the first answer needs none of it.

        The text index of a small store is made, too.
        """

        class FirstBlock(AnswerWatch):
            def found(self, ends: Callable[[], tuple[Any, Any]]) -> None:
                raise _Warm

        first = {"text": "a first text", "top_k": 1, "bottom_k": 0}
        with self.session.open_store() as store:
            is_small = len(store) <= SMALL and is_job_store(store)
            if is_small:
                self._answered(Asked.of({**first, "text_matches": True}, 100), AnswerWatch())
            else:
                with contextlib.suppress(_Warm):
                    self._answered(Asked.of(first, 100), FirstBlock())
            self._takes_chat = self._tokenizer(store).takes_chat

    def answer(self, question: dict[str, Any], control: ScanControl) -> Event:
        found, notes = self._ask(question, control)
        return {
            "event": "answer",
            "hits": [json.loads(line) for line in json_lines(found)],
            "summary": summary_lines(found),
            "notes": notes,
        }

    def jsonl(self, question: dict[str, Any], control: ScanControl) -> Event:
        found, _ = self._ask(question, control)
        return {"event": "answer", "lines": list(json_lines(found))}

    def _ask(self, question: dict[str, Any], control: ScanControl) -> tuple[Any, list[str]]:
        asked = Asked.of(question, self._most_characters)
        with self.session.open_store() as store:
            self._check_text_index(asked, store)
            notes: list[str] = []
            found = self._answered(asked, PartialAnswers(control, store), notes.append)
        control.check()
        if found.tokens is not None:
            return_free_memory()  # a pass leaves much of it to its thread, of which there are many
        return found, notes

    def _answered(
        self, asked: Asked, watch: AnswerWatch, note: Callable[[str], None] = lambda line: None
    ) -> Any:
        config = asked.config(**asdict(self._inputs))
        return answer(config, self.session, note, ([asked.query], None), watch)

    def _check_text_index(self, asked: Asked, store: ProjectionStore) -> None:
        flags = asked.flags
        wants = flags.get("text_matches") or flags.get("text_scores")
        wants = wants or TEXT in flags.get("score", "").split("+")
        if wants and len(store) > SMALL and open_text_index(store) is None:
            raise ConfigError(
                f"{store.path.parent} has no text index, which takes a pass over all documents: "
                f"run `gradproj text {store.path.parent}` first"
            )

    # --- the store ---

    def facts(self) -> dict[str, Any]:
        with self.session.open_store() as store:
            counts = store.status_counts()
            is_job = is_job_store(store)
            return {
                "title": self.title,
                "path": str(store.path.parent),
                "documents": len(store),
                "rows": counts["ok"],
                "missing": counts["missing"],
                "is_complete": bool(store.attributes.get("complete")),
                "takes_text": is_job,
                "takes_chat": self._takes_chat,
                "scores": list(SCORES),
                "score": ScoreArgs().score_for(store),
                "layers": [layer.name for layer in store.layers],
                "domains": store.domains,
                "has_hidden_states": bool(store.attributes.get(HIDDEN_STATE)),
                "has_text_index": is_job and (len(store) <= SMALL or _has_text_index(store)),
            }

    def document(self, sample_id: int, start: int) -> dict[str, Any]:
        with self.session.open_store() as store:
            (sample,) = store.samples([sample_id])
            problem, text, n_question = "", "", 0
            try:
                text = text_of(self._index(), sample_id)
            except (GradprojError, OSError) as error:
                problem = str(error)
            if start == 0 and text and is_job_store(store):
                with contextlib.suppress(GradprojError):  # without a model it can still be read
                    n_question = self._n_question(store, text[:TEXT_CHARACTERS])
        return {
            "id": sample_id,
            "key": escaped(sample.key),
            "domain": sample.domain,
            "status": sample.status,
            "loss": sample.loss if sample.loss == sample.loss else None,
            "n_tokens": sample.n_tokens,
            "text": text[start : start + TEXT_CHARACTERS],
            "start": start,
            "n_characters": len(text),
            "n_question": n_question,
            "problem": problem,
        }

    def overview(self, control: ScanControl) -> Event:
        def make(store: ProjectionStore) -> dict[str, Any]:
            texts = TextExcerpts(functools.partial(text_of, self._index()))
            return overview_data(store, self._scan_options(store), texts, OUTLIERS)

        return self._once_scanned("overview", make, control)

    def document_map(self, control: ScanControl) -> Event:
        def make(store: ProjectionStore) -> dict[str, Any]:
            found = document_map(store, **self._scan_options(store))
            columns = store.columns_at(["domain", "loss", "n_tokens"], found.ids)
            return {
                "ids": found.ids.tolist(),
                "x": json_numbers(found.places[:, 0]),
                "y": json_numbers(found.places[:, 1]),
                "domain": columns["domain"].tolist(),
                "loss": json_numbers(columns["loss"]),
                "n_tokens": columns["n_tokens"].tolist(),
                "domains": [one_line(name, 60) for name in store.domains],
                "explained": list(found.explained),
            }

        return self._once_scanned("map", make, control)

    def _once_scanned(
        self, name: str, make: Callable[[ProjectionStore], dict[str, Any]], control: ScanControl
    ) -> Event:
        """Return what ``make`` made of the store as it is now, kept until the store changes."""
        with self.session.open_store() as store:
            check_has_rows(store)
            state = state_of(store)
            kept_state, kept = self._kept.get(name, ("", None))
            if kept is None or kept_state != state:
                with watching(ControlWatch(control)):
                    kept = {"event": "answer", name: make(store)}
                self._kept[name] = state, kept
        return kept

    def _scan_options(self, store: ProjectionStore) -> ScanOptions:
        device, _ = choose_device(self._inputs.device, 0)
        return ScoreArgs().fitted_options(store, device, DOMAIN_SCORES)

    def _n_question(self, store: ProjectionStore, text: str) -> int:
        """Return how many characters of a document's text can be asked with."""
        with self.session.model():
            return self._tokenizer(store).characters_that_fit(text)

    def _tokenizer(self, store: ProjectionStore) -> QueryTokenizer:
        config = Asked.of({"text": NAME}, 100).config(**asdict(self._inputs))
        return self.session.projector(config, store).tokenizer

    def status(self) -> dict[str, Any]:
        return asdict(read_status(self._inputs.output))

    def _index(self) -> Any:
        return self.session.index(self._inputs)


class _Warm(GradprojError):
    """The first block was scanned."""


def _has_text_index(store: ProjectionStore) -> bool:
    try:
        return open_text_index(store) is not None
    except GradprojError:
        return False
