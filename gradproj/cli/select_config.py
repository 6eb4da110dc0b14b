"""Flags of ``python -m gradproj select``."""

import re
from dataclasses import dataclass, fields
from pathlib import Path

from gradproj.cli.query.config import QueryConfig
from gradproj.cli.query.sets import SetArgs
from gradproj.cli.score_args import ScoreArgs
from gradproj.corpus.prepare_config import PrepareConfig
from gradproj.errors import ConfigError
from gradproj.flags import as_in, flag
from gradproj.job.recorded_args import RecordedRunArgs
from gradproj.store import ProjectionStore

LINES, IDS, TARS = ".jsonl", ".npy", ""
"""Forms of ``--to``, by the end of its name; a folder has none."""
_OTHER_FILES = re.compile(r"\.(json|ndjson|txt|csv|tsv|tar|parquet|npz|gz|zst|bz2|xz)$")
_TOP = re.compile(r"(\d+)|(\d+(?:\.\d+)?|\.\d+)%")
_AUTO_POOL, _MAX_POOL = 4, 20_000


@dataclass(frozen=True, kw_only=True)
class SelectConfig(ScoreArgs, SetArgs, RecordedRunArgs, title="select"):
    """Queries, how many documents they select, by which rule, and where those are written."""

    score: str = as_in(QueryConfig, "score", group="score")
    text: str = as_in(QueryConfig, "text")
    queries: str = as_in(QueryConfig, "queries")
    query_store: str = as_in(QueryConfig, "query_store")
    curvature: str = as_in(QueryConfig, "curvature")
    head_sum: str = as_in(QueryConfig, "head_sum")
    domains: tuple[str, ...] = as_in(
        QueryConfig,
        "domains",
        help=r"Select among the documents of these domains only. Write \, for a comma in a name.",
    )
    device: str = as_in(QueryConfig, "device")
    aggregate: str = as_in(
        SetArgs,
        "aggregate",
        default="",
        default_text="mean; none for --text, and for --per_query and --round_robin without "
        "--group_by",
    )
    group_by: str = as_in(
        SetArgs,
        "group_by",
        help="With --per_query or --round_robin: the queries with the same value of this field of "
        "the lines of --queries, such as task or meta.task, select together.",
    )
    top: str = flag(
        "Number of documents to select, or a percentage of those that may be selected.",
        "",
        metavar="N|P%",
    )
    tokens: int | None = flag(
        "Select the best documents that have at most so many target tokens together.",
        None,
        minimum=1,
    )
    bottom: bool = flag("Select the documents with the lowest scores, the lowest first.", False)
    per_query: bool = flag(
        "Each query, or set of --group_by, selects its own best, by an equal share of --top or "
        "--tokens.",
        False,
    )
    round_robin: bool = flag(
        "The queries, or sets of --group_by, select in turn, each its best document that none has "
        "selected yet.",
        False,
    )
    diverse: bool = flag(
        "Select one document after the other, by its score less its similarity to those selected "
        "(maximal marginal relevance), among the --pool best.",
        False,
    )
    redundancy: float = flag(
        "With --diverse: weight of the similarity, 0 to 1; the score, scaled to 0 to 1 in the "
        "pool, has the rest.",
        0.5,
        minimum=0,
        maximum=1,
    )
    pool: int = flag(
        "With --diverse: number of candidates P; memory holds P x P cosines, 4 bytes each. "
        f"Default: {_AUTO_POOL} times --top, at most {_MAX_POOL:,}.",
        0,
        minimum=1,
    )
    not_in: str = flag(
        "Documents that are not selected: .npy of ids; .jsonl with an id or key in each line, as "
        "select writes it; else one key a line.",
        "",
        path="FILE",
    )
    to: str = flag(
        "Local file or folder for the selection, best first: NAME.jsonl (rank, score and the "
        "documents' fields), NAME.npy (ids) or a new folder (tars of their members, unchanged).",
        required="name a .jsonl or .npy file, or a folder for tars",
        path="FILE|DIR",
    )
    samples_per_shard: int = as_in(PrepareConfig, "samples_per_shard")

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.top) == (self.tokens is not None):
            raise ConfigError("give --top N, --top P% or --tokens T, one of them")
        if self.top and not _TOP.fullmatch(self.top):
            raise ConfigError(f"--top is {self.top!r}; give a number (1000) or a percentage (5%)")
        if self.top and not 0 < float(self.top.rstrip("%")) <= (100 if "%" in self.top else 1e18):
            raise ConfigError(f"--top is {self.top}; give 1 or more, or a percentage up to 100%")
        rules = [name for name in ("per_query", "round_robin", "diverse") if getattr(self, name)]
        if len(rules) > 1:
            raise ConfigError(f"--{' and --'.join(rules)} are given: give one rule")
        changed = [name for name in ("redundancy", "pool") if getattr(self, name) != getattr(
            SelectConfig, name)]  # fmt: skip
        if changed and not self.diverse:
            raise ConfigError(f"--{changed[0]} is for --diverse")
        several = self.makes_lists
        if not several and (self.group_by or (self.aggregate == "none" and not self.text)):
            what = "--group_by" if self.group_by else "--aggregate none"
            raise ConfigError(f"{what} makes several lists: give --per_query or --round_robin")
        if several and self.aggregate in ("mean", "max") and not self.group_by:
            raise ConfigError(
                f"--aggregate {self.aggregate} makes one list of all queries, and --{rules[0]} "
                "takes several: add --group_by FIELD, or leave one of the two out"
            )
        if len(self.dampings) > 1:
            raise ConfigError(f"--damping is {self.damping!r}; select takes one value")
        if _OTHER_FILES.search(self.to):
            raise ConfigError(
                f"--to {self.to}: end the name in .jsonl (documents) or .npy (ids), or name a "
                "folder for tars"
            )

    @property
    def form(self) -> str:
        """``LINES``, ``IDS`` or ``TARS``."""
        suffix = Path(self.to).suffix
        return suffix if suffix in (LINES, IDS) else TARS

    @property
    def makes_lists(self) -> bool:
        """True if queries, or sets of them, choose from lists of their own."""
        return self.per_query or self.round_robin

    def query_config(self, scores: Path) -> QueryConfig:
        """Return the query that writes all scores to a file."""
        shared = {f.name for f in fields(QueryConfig)} & {f.name for f in fields(self)}
        given = {name: getattr(self, name) for name in shared}
        if not self.aggregate:
            one_each = self.text or (self.makes_lists and not self.group_by)
            given["aggregate"] = "none" if one_each else "mean"
        return QueryConfig(**given, top_k=0, bottom_k=0, save_scores=str(scores))

    def budget(self, n_allowed: int, store: ProjectionStore) -> int:
        """Return the number of documents, or of tokens with ``--tokens``.

        Raises:
            ConfigError: fewer documents may be selected.
        """
        if not n_allowed:
            raise ConfigError(
                f"no document of {store.path} may be selected: all are without a row, of other "
                "--domains or in --not_in"
            )
        if self.tokens is not None:
            return self.tokens
        if self.top.endswith("%"):
            return max(1, int(n_allowed * float(self.top[:-1]) / 100 + 1e-9))
        if int(self.top) > n_allowed:
            raise ConfigError(
                f"--top is {int(self.top):,}, and {n_allowed:,} of the {len(store):,} documents of "
                f"{store.path} may be selected: give at most that many"
            )
        return int(self.top)

    def pool_size(self, budget: int, n_allowed: int) -> int:
        """Return the number of candidates of ``--diverse``."""
        if self.tokens is not None and not self.pool:
            return min(_MAX_POOL, n_allowed)
        pool = min(self.pool or min(_AUTO_POOL * budget, _MAX_POOL), n_allowed)
        if self.tokens is None and budget > pool:
            raise ConfigError(
                f"--diverse selects {budget:,} documents from --pool {pool:,}: select fewer, or "
                f"give a --pool of at least that many (memory: {4 * budget**2 / 1e9:,.1f} GB)"
            )
        return pool
