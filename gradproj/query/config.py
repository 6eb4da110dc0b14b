"""The flags of ``python -m gradproj query``, and what they mean for the store that is asked."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from gradproj.analysis import DEFAULT_SCORE, MEANINGS
from gradproj.analysis.row_blocks import width_of
from gradproj.errors import ConfigError
from gradproj.formatting import listed
from gradproj.job.recorded_args import RecordedRunArgs
from gradproj.store import ProjectionStore

WITHOUT_SUMS = "cosine"
"""Taken instead of a default score that needs the token covariances, while a store has none."""
K = 20
MOST_JOINT_VALUES = 4096
"""Of rows whose second moment is one matrix: 134 MB of float64 and as much again for its inverse."""
KINDS = {"kfac": "kfac", "preconditioned": "second_moment", "relatif": "kfac"}
"""Score -> kind of the curvature that it is made with; of relatif, where no other is asked for."""


@dataclass(frozen=True, kw_only=True)
class QueryConfig(RecordedRunArgs):
    """What is asked of which store."""

    text: str = field(
        default="", metadata={"help": "the query; it is tokenized as the documents were"}
    )
    queries: str = field(
        default="",
        metadata={
            "help": 'JSONL file; a line holds "text", "prompt" and "completion", or "input_ids"'
        },
    )
    query_store: str = field(
        default="",
        metadata={
            "help": "another output of the same model and matrices, whose documents are the queries"
        },
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
    curvature: str = field(
        default="",
        metadata={
            "help": "by whose influence relatif is made: kfac, or second_moment as preconditioned (default: kfac)",
            "choices": ("kfac", "second_moment"),
        },
    )
    joint: bool = field(
        default=False,
        metadata={
            "help": "of preconditioned: one second moment of all layers, or of those that --layers names, not one of "
            "each; it is measured for this query and not kept"
        },
    )
    top_k: int | None = field(
        default=None, metadata={"help": f"documents with the highest scores to show (default: {K})"}
    )
    bottom_k: int | None = field(
        default=None, metadata={"help": f"documents with the lowest scores to show (default: {K})"}
    )
    domains: tuple[str, ...] = field(
        default=(), metadata={"help": "documents of these domains only"}
    )
    layers: tuple[str, ...] = field(
        default=(), metadata={"help": "these layers only, by name or whole parts of it: h.3 mlp"}
    )
    save_scores: str = field(
        default="",
        metadata={"help": "write all scores, [queries, documents] float32, to this .npy file"},
    )
    format: str = field(
        default="table",
        metadata={
            "help": "jsonl: an object for each document; what the scores mean then goes to standard error",
            "choices": ("table", "jsonl"),
        },
    )
    show_text: bool = field(
        default=False, metadata={"help": "show each document's beginning, from its tar"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [f"--{n}" for n in ("text", "queries", "query_store") if getattr(self, n)]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} are given: give one of them")
        if not given or (self.text and not self.text.strip()):
            what = "--text is empty" if self.text else "nothing to ask about"
            raise ConfigError(
                f'{what}; give --text "...", --queries FILE.jsonl or --query_store DIR'
            )
        if self.score and self.score not in MEANINGS:
            raise ConfigError(f"--score is {self.score!r}; choose one of {', '.join(MEANINGS)}")
        if self.format not in ("table", "jsonl"):
            raise ConfigError(f"--format is {self.format!r}; choose table or jsonl")
        for name in ("top_k", "bottom_k"):
            if (getattr(self, name) or 0) < 0:
                raise ConfigError(f"--{name} must be at least 0, got {getattr(self, name)}")
        if self.top_k == self.bottom_k == 0 and not self.save_scores:
            raise ConfigError(
                "--top_k and --bottom_k are 0 and no --save_scores is given: nothing to answer"
            )
        if self.curvature not in ("", *KINDS.values()) or (
            self.curvature and self.score != "relatif"
        ):
            raise ConfigError(
                f"--curvature {self.curvature}: it is kfac or second_moment, and of --score relatif only; kfac and "
                "preconditioned have each their own"
            )
        if self.joint and self.score != "preconditioned":
            raise ConfigError(
                "--joint is of --score preconditioned only; kfac is of one layer each"
            )
        if self.score and self.score not in KINDS and self.damping != "auto":
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


# ---- What is asked of a store


def wanted_k(config: QueryConfig, store: ProjectionStore, name: str) -> int:
    wanted = getattr(config, name)
    if wanted is not None and wanted > len(store):
        raise ConfigError(
            f"--{name} is {wanted:,}, and {store.path} has {len(store):,} documents: give at most that"
        )
    return min(K, len(store)) if wanted is None else wanted


def wanted_score(config: QueryConfig, store: ProjectionStore, tell: Callable[[str], None]) -> str:
    """The score asked for, else the default; another, which is said, where the store cannot give that yet."""
    if config.score:
        return config.score
    if KINDS.get(DEFAULT_SCORE) == "kfac" and not store.attributes.get("covariance_tokens"):
        if config.damping != "auto":
            raise ConfigError(f"--damping is of {', '.join(KINDS)}: name one by --score")
        later = (
            f" yet: python -m gradproj merge {store.path.parent} writes them"
            if is_job_store(store)
            else ""
        )
        tell(
            f"score {WITHOUT_SUMS}: {DEFAULT_SCORE} needs token covariances, which the store has not{later}"
        )
        return WITHOUT_SUMS
    return DEFAULT_SCORE


def wanted_kind(config: QueryConfig, score: str) -> str | None:
    """Of the curvature; None for a score without."""
    return config.curvature or KINDS.get(score)


def wanted_layers(given: Sequence[str], store: ProjectionStore) -> list[str] | None:
    """Names of the layers that ``--layers`` means, in the store's order; None for all."""
    names = [layer.name for layer in store.layers]
    wanted = _words("layers", given, names)
    for word in wanted:
        if not any(_is_part(word, name) for name in names):
            folded = dict.fromkeys(
                ".".join("*" if p.isdigit() else p for p in n.split(".")) for n in names
            )
            raise ConfigError(
                f"--layers: {store.path} has no layer {word!r}; it has {listed(folded)} (* is a number)"
            )
    chosen = [name for name in names if any(_is_part(word, name) for word in wanted)]
    return chosen if 0 < len(chosen) < len(names) else None


def check_joint(layers: Sequence[str] | None, store: ProjectionStore) -> None:
    """``ConfigError`` where these layers' values are too many for one matrix."""
    width = width_of(store, layers)
    if width > MOST_JOINT_VALUES:
        of = (
            f"{store.path} has rows of {width:,} values"
            if layers is None
            else f"these layers have {width:,} values"
        )
        raise ConfigError(
            f"--joint: {of}, and one second moment is made of at most {MOST_JOINT_VALUES:,}: name fewer --layers, or "
            "leave --joint out for one of each layer"
        )


def _is_part(word: str, name: str) -> bool:
    """Whether whole components of a dotted name are this word's, so that h.1 is not h.10."""
    return f".{word}." in f".{name}."


def wanted_domains(config: QueryConfig, store: ProjectionStore) -> list[str] | None:
    """Names of the domains asked for; None for all."""
    wanted = _words("domains", config.domains, store.domains)
    unknown = [name for name in wanted if name not in store.domains]
    if unknown:
        known = listed(store.domains) or "none"
        raise ConfigError(f"--domains: {store.path} has no domain {unknown[0]!r}; it has {known}")
    return wanted or None


def _words(flag: str, given: Sequence[str], known: Sequence[str]) -> list[str]:
    """Names given one by one or with commas; a comma that belongs to a known name is no end of it."""
    parts = ([value] if value in known else map(str.strip, value.split(",")) for value in given)
    found = list(dict.fromkeys(word for words in parts for word in words if word))
    if given and not found:
        raise ConfigError(
            f"--{flag} is empty; name some of the store's, or leave it out for all of them"
        )
    return found


def is_job_store(store: ProjectionStore) -> bool:
    """Of a training run's rows, each was made with the weights of its step."""
    return "wanted_units" in store.attributes
