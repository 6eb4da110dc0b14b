"""Flags of ``query`` that score sets of queries, or queries less a control set."""

from dataclasses import dataclass

from gradproj.analysis.query_sets import AGGREGATES
from gradproj.corpus.fields import check_path
from gradproj.errors import ConfigError
from gradproj.flags import Flags, flag
from gradproj.query.hidden import HIDDEN


@dataclass(frozen=True, kw_only=True)
class SetArgs(Flags, title="sets of queries"):
    """Whether queries are scored one by one or in sets, and less which control set."""

    aggregate: str = flag(
        "Score all queries as one set, or a set for each value of --group_by: by the mean or the "
        "maximum of its queries' scores.",
        AGGREGATES[0],
        choices=AGGREGATES,
    )
    group_by: str = flag(
        "With --aggregate: a set for each value of this field of the lines of --queries, such as "
        "task or meta.task.",
        "",
        metavar="FIELD",
    )
    contrast: str = flag(
        "JSONL file of control queries: their mean score is subtracted from every score.",
        "",
        path="FILE",
        streams=True,
    )
    unit_queries: bool = flag(
        "With --aggregate or --contrast: scale each query to unit length in the score's own metric "
        "first, so that long or surprising queries do not decide.",
        True,
    )

    @property
    def makes_sets(self) -> bool:
        """True if the scores are not those of single queries."""
        return self.aggregate != "none" or bool(self.contrast)

    def check_sets(self, score: str, queries: str, query_store: str, rescore: int) -> None:
        """Raise ``ConfigError`` for flags that do not go together."""
        if self.group_by:
            check_path("--group_by", self.group_by)
        if self.group_by and (self.aggregate == "none" or not queries):
            raise ConfigError("--group_by requires --queries FILE and --aggregate mean or max")
        if self.contrast and query_store:
            raise ConfigError(
                "--contrast takes a file of queries, which --query_store is not: give --queries"
            )
        if not self.unit_queries and not self.makes_sets:
            raise ConfigError("--no-unit_queries requires --aggregate or --contrast")
        if not self.unit_queries and score in ("cosine", HIDDEN):
            raise ConfigError(
                f"--score {score} scales every query to unit length: leave --no-unit_queries out"
            )
        if self.makes_sets and rescore:
            flags = "--aggregate" if self.aggregate != "none" else "--contrast"
            raise ConfigError(
                f"--rescore scores documents again for single queries: leave {flags} out"
            )
