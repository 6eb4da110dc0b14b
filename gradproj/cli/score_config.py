"""The flags by which documents and domains are compared, for the commands that show a whole store."""

import sys
from dataclasses import dataclass, field
from typing import Any

from gradproj.analysis import DEFAULT_SCORE, MEANINGS
from gradproj.analysis.domains import DOMAIN_SCORES
from gradproj.distributed import choose_device
from gradproj.errors import ConfigError
from gradproj.query.config import WITHOUT_SUMS, wanted_layers
from gradproj.query.curvature import curvature_for
from gradproj.store import ProjectionStore

WITHOUT_CURVATURE = ("dot", "cosine")


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """By which score documents and domains are compared."""

    score: str = field(
        default="",
        metadata={
            "help": f"default {DEFAULT_SCORE}, or {WITHOUT_SUMS} while nothing of the store is merged",
            "choices": tuple(MEANINGS),
        },
    )
    damping: str = field(
        default="auto",
        metadata={"help": "of the preconditioner, relative to its mean diagonal: auto or a number"},
    )
    layers: tuple[str, ...] = field(
        default=(), metadata={"help": "these layers only, by name or whole parts of it: h.3 mlp"}
    )
    device: str = field(
        default="auto",
        metadata={"help": "where rows are compared", "choices": ("auto", "cpu", "cuda")},
    )

    def __post_init__(self) -> None:
        if self.score and self.score not in MEANINGS:
            raise ConfigError(f"--score is {self.score!r}; choose one of {', '.join(MEANINGS)}")
        if self.damping != "auto":
            try:
                float(self.damping)
            except ValueError as error:
                raise ConfigError(
                    f"--damping is {self.damping!r}; give auto or a number"
                ) from error
        if self.score in WITHOUT_CURVATURE and self.damping != "auto":
            raise ConfigError(f"--score {self.score} has no damping; leave --damping out")

    def how(
        self, store: ProjectionStore, scores: tuple[str, ...] = tuple(MEANINGS)
    ) -> dict[str, Any]:
        """The arguments of a scan of ``store``.

        Args:
            store: finished or not; where it cannot give the default score yet, another is taken.
            scores: those that the scan can give; instead of relatif, its own curvature's score is taken.
        """
        wanted = self.score or DEFAULT_SCORE
        if wanted == "relatif" and wanted not in scores:
            wanted = "kfac"
        has_sums = bool(
            store.attributes.get("covariance_tokens")
        )  # arrays that are gone are damage, and said
        if not self.score and not has_sums and wanted in ("kfac", "relatif"):
            wanted = WITHOUT_SUMS
            if self.damping != "auto":
                with_damping = ", ".join(name for name in MEANINGS if name not in WITHOUT_CURVATURE)
                raise ConfigError(f"--damping is of {with_damping}: name one by --score")
        how: dict[str, Any] = {"score": wanted, "device": choose_device(self.device, 0)[0]}
        if wanted not in WITHOUT_CURVATURE:
            how["damping"] = self.damping if self.damping == "auto" else float(self.damping)
        return how | {"layers": wanted_layers(self.layers, store)}

    def kept(self, store: ProjectionStore, how: dict[str, Any]) -> dict[str, Any]:
        """``how`` with the second moment that questions keep beside the store, where the score needs one.

        Raises:
            StoreError: the store has no row.
        """
        if how["score"] != "preconditioned":
            return how
        found = curvature_for(
            "second_moment",
            store,
            store.status_counts()["ok"],
            device=how["device"],
            progress=how.get("progress", False),
            say=lambda line: print(f"gradproj: {line}", file=sys.stderr, flush=True),
        )
        return {**how, "preconditioner": found}

    def how_by_domain(self, store: ProjectionStore) -> dict[str, Any]:
        """The same for a mean over domains."""
        return self.how(store, DOMAIN_SCORES)
