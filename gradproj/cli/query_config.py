"""Flags of ``python -m gradproj query`` and their meaning for one store."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from gradproj.analysis.preconditioner import KINDS
from gradproj.analysis.row_blocks import width_of
from gradproj.analysis.score_types import SCORES
from gradproj.cli.score_args import ScoreArgs, split_names
from gradproj.errors import ConfigError
from gradproj.formatting import listed
from gradproj.job.recorded_args import RecordedRunArgs
from gradproj.store import ProjectionStore

DEFAULT_K = 20
MAX_JOINT_WIDTH = 4096
"""Values of a row with one second moment: 134 MB of float64, and as much again for its inverse."""
FORMATS = ("table", "jsonl")


@dataclass(frozen=True, kw_only=True)
class QueryConfig(ScoreArgs, RecordedRunArgs):
    """Queries, the store they are compared with, and the form of the answer."""

    text: str = field(
        default="", metadata={"help": "query text, tokenized in the same way as the documents"}
    )
    queries: str = field(
        default="",
        metadata={
            "help": 'JSONL file of queries; each line has "text", "prompt" and "completion", '
            'or "input_ids"'
        },
    )
    query_store: str = field(
        default="",
        metadata={
            "help": "output directory of another job with the same model and projection matrices, "
            "whose documents are the queries"
        },
    )
    curvature: str = field(
        default="",
        metadata={
            "help": "curvature of --score relatif: kfac, or second_moment (default: kfac)",
            "choices": KINDS,
        },
    )
    joint: bool = field(
        default=False,
        metadata={
            "help": "with --score preconditioned: one second moment over all layers (or those of "
            "--layers) instead of one per layer; fitted for this query and not cached"
        },
    )
    top_k: int | None = field(
        default=None,
        metadata={"help": f"number of documents with the highest scores (default: {DEFAULT_K})"},
    )
    bottom_k: int | None = field(
        default=None,
        metadata={"help": f"number of documents with the lowest scores (default: {DEFAULT_K})"},
    )
    domains: tuple[str, ...] = field(
        default=(), metadata={"help": "score only documents of these domains"}
    )
    save_scores: str = field(
        default="",
        metadata={"help": "write all scores, [queries, documents] float32, to this .npy file"},
    )
    format: str = field(
        default="table",
        metadata={
            "help": "jsonl: one object per document and query; the description of the scores then "
            "goes to standard error",
            "choices": FORMATS,
        },
    )
    show_text: bool = field(
        default=False, metadata={"help": "show the beginning of each document, from its tar"}
    )

    def __post_init__(self) -> None:
        ScoreArgs.__post_init__(self)
        RecordedRunArgs.__post_init__(self)
        given = [f"--{n}" for n in ("text", "queries", "query_store") if getattr(self, n)]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} are given: give one of them")
        if not given or (self.text and not self.text.strip()):
            problem = "--text is empty" if self.text else "there is no query"
            raise ConfigError(
                f'{problem}; give --text "...", --queries FILE.jsonl or --query_store DIR'
            )
        if self.format not in FORMATS:
            raise ConfigError(f"--format is {self.format!r}; choose {' or '.join(FORMATS)}")
        for name in ("top_k", "bottom_k"):
            if (getattr(self, name) or 0) < 0:
                raise ConfigError(f"--{name} must be at least 0, got {getattr(self, name)}")
        if self.top_k == self.bottom_k == 0 and not self.save_scores:
            raise ConfigError(
                "--top_k and --bottom_k are 0 and there is no --save_scores: nothing to answer"
            )
        if self.curvature:
            score = SCORES.get(self.score)
            if self.curvature not in KINDS or score is None or not score.any_curvature:
                raise ConfigError(
                    f"--curvature {self.curvature}: it is {' or '.join(KINDS)}, and requires "
                    "--score relatif; kfac and preconditioned have one curvature each"
                )
        if self.joint and self.score != "preconditioned":
            raise ConfigError(
                "--joint requires --score preconditioned; kfac factors belong to one layer each"
            )
        if len(self.dampings) > 1 and self.save_scores:
            raise ConfigError(
                "--save_scores takes one --damping; run the query once for each damping"
            )

    def k(self, name: str, store: ProjectionStore) -> int:
        """Return ``--top_k`` or ``--bottom_k``."""
        k = getattr(self, name)
        if k is not None and k > len(store):
            raise ConfigError(
                f"--{name} is {k:,}, and {store.path} has {len(store):,} documents: give at most "
                "that many"
            )
        return min(DEFAULT_K, len(store)) if k is None else k

    def domains_of(self, store: ProjectionStore) -> list[str] | None:
        """Return the names of ``--domains``; None for all."""
        wanted = split_names("domains", self.domains, store.domains)
        unknown = [name for name in wanted if name not in store.domains]
        if unknown:
            raise ConfigError(
                f"--domains: {store.path} has no domain {unknown[0]!r}; it has "
                f"{listed(store.domains) or 'none'}"
            )
        return wanted or None

    def check_joint(self, layers: Sequence[str] | None, store: ProjectionStore) -> None:
        """Raise ``ConfigError`` if ``--joint`` needs too large a matrix for these layers."""
        width = width_of(store, layers)
        if self.joint and width > MAX_JOINT_WIDTH:
            rows = (
                f"{store.path} has rows of {width:,} values"
                if layers is None
                else f"these layers have {width:,} values"
            )
            raise ConfigError(
                f"--joint: {rows}, and one second moment covers at most {MAX_JOINT_WIDTH:,}: "
                "name fewer --layers, or leave --joint out"
            )
