"""``python -m gradproj query``: which documents of a store support a text, a file of queries or another output most.

Queries go through the engine with the settings, weights and matrices that the store recorded; then the store is
scanned once. Under torchrun the ranks share the scan, and rank 0 makes the queries' rows and speaks.
"""

import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from gradproj.analysis import DEFAULT_SCORE, MEANINGS, Preconditioner
from gradproj.analysis.question import How
from gradproj.analysis.ranks import Share
from gradproj.answers import (
    About,
    Ends,
    check_scores_path,
    curvature_for,
    describe,
    find_ends,
    json_lines,
    overlap_lines,
    rows_of_query_store,
    save_and_find_ends,
    table_lines,
)
from gradproj.config import RunConfig
from gradproj.coordinator.config import RecordedInputs
from gradproj.dist import Process, choose_device, process_group, said_by_rank_0
from gradproj.errors import ConfigError, StoreError
from gradproj.flags import parse
from gradproj.plan import human_bytes
from gradproj.queries import Query, QueryProjector, QueryRows, read_queries
from gradproj.recorded import config_from, recorded_config, recorded_index
from gradproj.store import ProjectionStore
from gradproj.store.views import Sample
from gradproj.texts import text_of

WITHOUT_SUMS = "cosine"
"""Taken instead of a default score that needs the token covariances, while a store has none."""
K = 20
_NEED_SUMS = ("kfac", "relatif")
_DAMPED = ("kfac", "preconditioned", "relatif")
_ALONE = Process(0, 1, 0, 1)


@dataclass(frozen=True, kw_only=True)
class QueryConfig(RecordedInputs):
    """What is asked of which store."""

    text: str = field(default="", metadata={"help": "the query; it is tokenized as the documents were"})
    queries: str = field(
        default="",
        metadata={"help": 'JSONL file; a line holds "text", "prompt" and "completion", or "input_ids"'},
    )
    query_store: str = field(
        default="",
        metadata={"help": "another output of the same model and matrices, whose documents are the queries"},
    )
    score: str = field(
        default="",
        metadata={
            "help": f"what documents are ranked by; default {DEFAULT_SCORE}, or {WITHOUT_SUMS} while nothing of the "
            "store is merged",
            "choices": tuple(MEANINGS),
        },
    )
    damping: str = field(
        default="auto",
        metadata={
            "help": "of kfac, preconditioned and relatif: auto, a number (times the mean diagonal), or several with "
            "commas, which are answered one after the other and compared"
        },
    )
    top_k: int | None = field(
        default=None, metadata={"help": f"documents with the highest scores to show (default: {K})"}
    )
    bottom_k: int | None = field(
        default=None, metadata={"help": f"documents with the lowest scores to show (default: {K})"}
    )
    domains: tuple[str, ...] = field(default=(), metadata={"help": "documents of these domains only"})
    layers: tuple[str, ...] = field(
        default=(), metadata={"help": "these layers only, by name or whole parts of it: h.3 mlp"}
    )
    save_scores: str = field(
        default="", metadata={"help": "write all scores, [queries, documents] float32, to this .npy file"}
    )
    format: str = field(
        default="table",
        metadata={
            "help": "jsonl: an object for each document; what the scores mean then goes to standard error",
            "choices": ("table", "jsonl"),
        },
    )
    show_text: bool = field(default=False, metadata={"help": "show each document's beginning, from its tar"})

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [f"--{n}" for n in ("text", "queries", "query_store") if getattr(self, n)]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} are given: give one of them")
        if not given or (self.text and not self.text.strip()):
            what = "--text is empty" if self.text else "nothing to ask about"
            raise ConfigError(f'{what}; give --text "...", --queries FILE.jsonl or --query_store DIR')
        if self.score and self.score not in MEANINGS:
            raise ConfigError(f"--score is {self.score!r}; choose one of {', '.join(MEANINGS)}")
        if self.format not in ("table", "jsonl"):
            raise ConfigError(f"--format is {self.format!r}; choose table or jsonl")
        for name in ("top_k", "bottom_k"):
            if (getattr(self, name) or 0) < 0:
                raise ConfigError(f"--{name} must be at least 0, got {getattr(self, name)}")
        if self.top_k == self.bottom_k == 0 and not self.save_scores:
            raise ConfigError("--top_k and --bottom_k are 0 and no --save_scores is given: nothing to answer")
        if self.score and self.score not in _DAMPED and self.damping != "auto":
            raise ConfigError(f"--score {self.score} has no damping; leave --damping out")
        if len(self.dampings) > 1 and self.save_scores:
            raise ConfigError("--save_scores holds the scores of one --damping; ask once for each")

    @property
    def dampings(self) -> list[float | str]:
        """One or several, in the order given."""
        found: list[float | str] = []
        for word in self.damping.split(","):
            try:
                value: float | str = "auto" if word.strip() == "auto" else float(word)
            except ValueError:
                value = math.nan
            if value != "auto" and not 0 <= float(value) < math.inf:
                raise ConfigError(
                    f"--damping is {self.damping!r}; give auto or a number, 0 or more (0.01 to 1 are usual), or "
                    "several with commas: 0.01,0.1,1"
                )
            if value not in found:
                found.append(value)
        return found


@dataclass(frozen=True)
class Answer:
    """What came of it; the samples are known to rank 0 only."""

    about: About
    asked: QueryRows
    ends: list[Ends]
    """One for each damping."""
    samples: dict[int, Sample]


def query_command(argv: list[str]) -> None:
    """``python -m gradproj query OUTPUT --text "..."``, or under ``torchrun -m gradproj query``"""
    process = Process.from_environment()
    with said_by_rank_0(process.rank):
        (config,) = parse(
            argv, "gradproj query", QueryConfig, description="Which documents support a query most."
        )
        with process_group(process):
            answer = query(config, process)
    if process.rank == 0:
        for line in lines_of(config, answer):
            print(line)


def query(config: QueryConfig, process: Process = _ALONE) -> Answer:
    """Score every document of a store, in one scan for each damping and in bounded memory.

    Raises:
        StoreError: no store there, a damaged one, or none of its rows is there yet.
        ModelError: the model or the tokenizer is not the one the store was made with.
        ConfigError: a flag or a query that cannot be answered.
        CorpusError: texts are wanted, and the tars are not where the job found them.
    """
    if config.save_scores:
        check_scores_path(config.save_scores)
    share, tell = Share.of(process.world_size > 1), functools.partial(note, process)
    with ProjectionStore(config.output) as store:
        counts, n_top, n_bottom = (
            _rows_there(store),
            _k(config, store, "top_k"),
            _k(config, store, "bottom_k"),
        )
        read_text = document_texts(config.output, _texts_from(config)) if config.show_text else None
        how = _how(config, store, process, tell)
        curvature = functools.partial(
            curvature_for, how["score"], store, counts["ok"], together=how["together"], device=how["device"],
            progress=how["progress"], say=tell,
        )  # fmt: skip
        # Whether sums are there is known at once; a scan waits until the queries are known to be good.
        known = curvature() if how["score"] in _NEED_SUMS else None
        asked = share.gathered(_asked(config, store) if process.rank == 0 else None)[0]
        ends = _ends(config, store, asked, (n_top, n_bottom), how, known or curvature(), tell)
        about = About(store, how["score"], how["layers"], how["domains"], counts, ends[0].top.n_scored)
        samples = describe(store, ends, read_text) if process.rank == 0 else {}
        return Answer(about, asked, ends, samples)


def _ends(
    config: QueryConfig,
    store: ProjectionStore,
    asked: QueryRows,
    k: tuple[int, int],
    how: How,
    curvature: Preconditioner | None,
    tell: Callable[[str], None],
) -> list[Ends]:
    if not config.save_scores:
        return find_ends(asked.rows, store, *k, how, curvature, config.dampings)
    path, shape, (damping,) = Path(config.save_scores), (len(asked.rows), len(store)), config.dampings
    tell(f"{path} will hold {shape[0]:,} x {shape[1]:,} scores, {human_bytes(4 * shape[0] * shape[1])}")
    return [save_and_find_ends(asked.rows, store, *k, how, curvature, damping, path)]


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
        print(f"gradproj: {line}", file=sys.stderr, flush=True)


# ---- The flags and the store


def _rows_there(store: ProjectionStore) -> dict[str, int]:
    counts = store.status_counts()
    if not counts["ok"]:
        raise StoreError(
            f"{store.path} has no row yet ({counts['missing']:,} of {len(store):,} documents are still to be "
            "computed); start the job again on it"
        )
    return counts


def _k(config: QueryConfig, store: ProjectionStore, name: str) -> int:
    wanted = getattr(config, name)
    if wanted is not None and wanted > len(store):
        raise ConfigError(
            f"--{name} is {wanted:,}, and {store.path} has {len(store):,} documents: give at most that"
        )
    return min(K, len(store)) if wanted is None else wanted


def _how(config: QueryConfig, store: ProjectionStore, process: Process, tell: Callable[[str], None]) -> How:
    """The scans' settings, all of them set."""
    device, warning = choose_device(config.device, process.local_rank)
    if warning:
        tell(warning)
    return {
        "score": _score(config, store, tell),
        "layers": _layers(config, store),
        "domains": _domains(config, store),
        "device": device,
        "progress": sys.stderr.isatty(),
        "together": process.world_size > 1,
    }


def _score(config: QueryConfig, store: ProjectionStore, tell: Callable[[str], None]) -> str:
    if config.score:
        return config.score
    if DEFAULT_SCORE in _NEED_SUMS and not store.attributes.get("covariance_tokens"):
        if config.damping != "auto":
            raise ConfigError(f"--damping is of {', '.join(_DAMPED)}: name one by --score")
        tell(
            f"score {WITHOUT_SUMS}: {DEFAULT_SCORE} needs sums that the merge writes, and nothing is merged yet "
            f"(python -m gradproj merge {store.path.parent})"
        )
        return WITHOUT_SUMS
    return DEFAULT_SCORE


def _layers(config: QueryConfig, store: ProjectionStore) -> list[str] | None:
    """Names of the layers that are meant, in the store's order; None for all."""
    names = [layer.name for layer in store.layers]
    wanted = _words(config.layers, names)
    for word in wanted:
        if not any(_is_part(word, name) for name in names):
            folded = dict.fromkeys(".".join("*" if p.isdigit() else p for p in n.split(".")) for n in names)
            raise ConfigError(
                f"--layers: {store.path} has no layer {word!r}; it has {', '.join(folded)} (* is a number)"
            )
    chosen = [name for name in names if any(_is_part(word, name) for word in wanted)]
    return chosen if 0 < len(chosen) < len(names) else None


def _is_part(word: str, name: str) -> bool:
    """Whether whole components of a dotted name are this word's, so that h.1 is not h.10."""
    return f".{word}." in f".{name}."


def _domains(config: QueryConfig, store: ProjectionStore) -> list[str] | None:
    wanted = _words(config.domains, store.domains)
    unknown = [name for name in wanted if name not in store.domains]
    if unknown:
        known = ", ".join(store.domains) or "none"
        raise ConfigError(f"--domains: {store.path} has no domain {unknown[0]!r}; it has {known}")
    return wanted or None


def _words(given: Sequence[str], known: Sequence[str]) -> list[str]:
    """Names given one by one or with commas; a comma that belongs to a known name is no end of it."""
    parts = [[value] if value in known else value.split(",") for value in given]
    return list(dict.fromkeys(word.strip() for words in parts for word in words if word.strip()))


# ---- The queries and the documents


def _asked(config: QueryConfig, store: ProjectionStore) -> QueryRows:
    if config.query_store:
        with ProjectionStore(config.query_store) as other:
            return rows_of_query_store(other, store)
    text = Query(name="text", text=config.text, where="--text") if config.text else None
    queries = [text] if text else read_queries(config.queries)
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
