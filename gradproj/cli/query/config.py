"""Flags of ``python -m gradproj query`` and their meaning for one store."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from gradproj.analysis.preconditioner import KINDS
from gradproj.analysis.row_blocks import width_of
from gradproj.analysis.score_types import DEFAULT_SCORE, FALLBACK_SCORE, HEAD_SUMS, SCORES
from gradproj.cli.query.checkpoints import TABLE, CheckpointArgs
from gradproj.cli.query.groups import GroupArgs
from gradproj.cli.query.rescore import RescoreArgs
from gradproj.cli.query.sets import SetArgs
from gradproj.cli.query.tokens import TokenArgs
from gradproj.cli.score_args import ScoreArgs
from gradproj.errors import ConfigError
from gradproj.flags import DEVICES, as_in, flag
from gradproj.formatting import listed
from gradproj.job.recorded_args import RecordedRunArgs
from gradproj.query.hidden import HIDDEN
from gradproj.store import ProjectionStore
from gradproj.store.head_rows import HEAD_NAME
from gradproj.text.ranking import TEXT, WITH_TEXT

DEFAULT_K = 20
MAX_JOINT_WIDTH = 4096
"""Values of a row with one second moment: 134 MB of float64, and as much again for its inverse."""


@dataclass(frozen=True, kw_only=True)
class QueryConfig(
    ScoreArgs,
    SetArgs,
    GroupArgs,
    CheckpointArgs,
    RescoreArgs,
    TokenArgs,
    RecordedRunArgs,
    title="query",
):
    """Queries, the store they are compared with, and the form of the answer."""

    score: str = as_in(
        ScoreArgs,
        "score",
        help=f"Score of a document; default: {DEFAULT_SCORE}, or {FALLBACK_SCORE} for a store that "
        "has not been merged yet. text: rare n-grams in common, without gradients; SCORE+text: "
        "z-scores of both, added; hidden: the cosine of hidden states, of a job with "
        "--hidden_state.",
        choices=(*SCORES, HIDDEN, TEXT, *WITH_TEXT),
        group="score",
    )
    text: str = flag("Query text, tokenized in the same way as the documents.", "", metavar="TEXT")
    queries: str = flag(
        "JSONL file of queries, an object a line, in any form of a document (text; prompt and "
        "completion; messages; chosen and rejected; input_ids), perhaps with a weight.",
        "",
        path="FILE",
        streams=True,
    )
    query_store: str = flag(
        "Output directory of another job with the same model, projection matrices, basis (by its "
        "--basis_from) and loss reduction; its documents are the queries.",
        "",
        path="DIR",
        remote=True,
    )
    query_model: str = flag(
        "Another checkpoint of the same layers, shapes and token ids (a fine-tuned one, or a PEFT "
        "adapter), by whose gradients the queries ask; the documents' rows stay the job's.",
        "",
        path="DIR",
    )
    curvature: str = flag("Curvature used by --score relatif; default: kfac.", "", choices=KINDS)
    head_sum: str = flag(
        "How kfac adds the score of sparse head rows, in a store that has them: plain, or equal, "
        "with the standard deviation of the layers' score. With --layers they count only if named, "
        f"as {HEAD_NAME}.",
        HEAD_SUMS[0],
        choices=HEAD_SUMS,
        group="score",
    )
    joint: bool = flag(
        "With --score preconditioned: fit one second moment over all layers (or those of --layers) "
        "instead of one per layer. It is fitted for this query and not cached.",
        False,
    )
    top_k: int | None = flag(
        f"Number of documents with the highest scores (default: {DEFAULT_K}).", None, minimum=0
    )
    bottom_k: int | None = flag(
        f"Number of documents with the lowest scores (default: {DEFAULT_K}; 0 by text).",
        None,
        minimum=0,
    )
    domains: tuple[str, ...] = flag(
        r"Score the documents of these domains only. Write \, for a comma in a name.",
        (),
        metavar="NAME",
    )
    save_scores: str = flag(
        "Write all scores, [queries, documents] float32, to this .npy file.", "", path="FILE"
    )
    format: str = flag(
        "Output format. jsonl: one object per document and query on standard output, the "
        "description of the scores on standard error.",
        "table",
        choices=("table", "jsonl"),
    )
    device: str = flag(
        "Device for the queries' gradients and for the scan.",
        "auto",
        choices=DEVICES,
        group="query",
    )
    text_scores: bool = flag("Add the text score of each listed document, as a column.", False)
    text_matches: bool = flag(
        "Show below each listed document the rarest passages that it shares with the query word "
        "for word, each with the number of documents that hold it.",
        False,
    )
    show_text: bool = flag("Print the beginning of each document's text, from its tar.", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [f"--{n}" for n in ("text", "queries", "query_store") if getattr(self, n)]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} are given: give one of them")
        if not given or (self.text and not self.text.strip()):
            problem = "--text is empty" if self.text else "there is no query"
            raise ConfigError(
                f'{problem}; give --text "...", --queries FILE.jsonl or --query_store DIR'
            )
        if self.query_model and (self.query_store or self.score == TEXT or self.rescore):
            other = "--query_store" if self.query_store else "--score text"
            other = "--rescore" if self.rescore else other
            raise ConfigError(f"--query_model projects the queries; leave out {other}")
        if self.top_k == self.bottom_k == 0 and not self.save_scores:
            raise ConfigError(
                "--top_k and --bottom_k are 0 and there is no --save_scores: nothing to answer"
            )
        if self.score in (TEXT, HIDDEN) and self.layers:
            raise ConfigError(f"--score {self.score} uses no gradients; leave --layers out")
        score = SCORES.get(self.gradient_score)
        if self.curvature and (score is None or not score.any_curvature):
            raise ConfigError(
                f"--curvature {self.curvature} requires --score relatif; the other scores "
                "have one curvature each"
            )
        if self.joint and self.gradient_score != "preconditioned":
            raise ConfigError(
                "--joint requires --score preconditioned; kfac factors belong to one layer each"
            )
        self._check_rescore()
        self.check_sets(self.gradient_score, self.queries, self.query_store, self.rescore)
        uses_text = self.score == TEXT or self.score in WITH_TEXT
        self.check_checkpoints(
            f"--score {self.score}" * (uses_text or self.score == HIDDEN),
            "--text_scores" * self.text_scores,
            "--text_matches" * self.text_matches,
            f"--rescore {self.rescore}" * bool(self.rescore),
            "--query_store" * bool(self.query_store),
            "--query_model" * bool(self.query_model),
            "--model" * bool(self.model),
            f"--damping {self.damping}" * (len(self.dampings) > 1),
            f"--by {self.by}, or --combine {TABLE}," * (bool(self.by) and self.combine == TABLE),
        )
        self.check_groups(
            f"--rescore {self.rescore}" * bool(self.rescore),
            "--text_scores" * self.text_scores,
            "--text_matches" * self.text_matches,
            f"--damping {self.damping}" * (len(self.dampings) > 1),
        )
        self.check_tokens(
            f"--score {self.score}" * (uses_text or self.score == HIDDEN),
            f"--by {self.by}" * bool(self.by),
            f"--rescore {self.rescore}" * bool(self.rescore),
            "all values of --damping but one" * (len(self.dampings) > 1),
        )
        if self.text_matches and self.aggregate != "none":
            raise ConfigError("--text_matches are those of single queries: leave --aggregate out")
        if len(self.dampings) > 1 and self.save_scores:
            raise ConfigError(
                "--save_scores takes one --damping; run the query once for each damping"
            )

    def _check_rescore(self) -> None:
        flags = ("rescore_by", "rescore_text", "rescore_memory")
        given = [f"--{name}" for name in flags if getattr(self, name)]
        given += ["--rescore_damping"] if self.rescore_damping != "auto" else []
        _ = self.exact_damping
        if given and not self.rescore:
            verb = "requires" if len(given) == 1 else "require"
            raise ConfigError(f"{' and '.join(given)} {verb} --rescore N")
        if not self.rescore:
            return
        if self.top_k is not None and self.top_k > self.rescore:
            raise ConfigError(
                f"--top_k {self.top_k} is more than --rescore {self.rescore}: only documents that "
                "were scored again are listed"
            )
        if self.bottom_k:
            raise ConfigError(
                "--rescore scores the upper end of the scan again: leave --bottom_k out"
            )
        if len(self.dampings) > 1:
            raise ConfigError("--rescore takes one --damping, that of the scan")

    def at(self, output: str) -> "QueryConfig":
        """Return the same question to one output."""
        return replace(self, output=output, others=(), combine="sum", learning_rates=())

    def uses_head(self, score: str) -> bool:
        """Return whether ``score`` counts a store's head rows."""
        return score == "kfac" and (not self.layers or HEAD_NAME in self.layers)

    @property
    def gradient_score(self) -> str:
        """``--score`` without the text that is added to it; ``text`` for text alone."""
        return self.score.removesuffix(f"+{TEXT}")

    @property
    def uses_text(self) -> bool:
        """True if text scores are needed, to rank or as a column."""
        return (
            self.text_scores or self.text_matches or self.score == TEXT or self.score in WITH_TEXT
        )

    def k(self, name: str, store: ProjectionStore) -> int:
        """Return ``--top_k`` or ``--bottom_k``."""
        k = getattr(self, name)
        if self.rescore and k is None:
            return 0 if name == "bottom_k" else min(DEFAULT_K, self.rescore, len(store))
        if k is not None and k > len(store) and not self.by:
            raise ConfigError(
                f"--{name} is {k:,}, and {store.path} has {len(store):,} documents: give at most "
                "that many"
            )
        if k is None and name == "bottom_k" and self.score == TEXT and not self.by:
            return 0  # of nearly all documents, the lowest score is 0
        return min(DEFAULT_K, len(store)) if k is None else k

    def domains_of(self, store: ProjectionStore) -> list[str] | None:
        """Return the names of ``--domains``; None for all."""
        unknown = [name for name in self.domains if name not in store.domains]
        if unknown:
            raise ConfigError(
                f"--domains: {store.path} has no domain {unknown[0]!r}; it has "
                f"{listed(store.domains) or 'none'}"
            )
        return list(dict.fromkeys(self.domains)) or None

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
