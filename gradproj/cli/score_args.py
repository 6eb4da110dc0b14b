"""Flags that choose score, damping and layers, shared by ``query``, ``domains`` and ``report``."""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from gradproj.analysis.eigenbasis import has_weighted_rows
from gradproj.analysis.preconditioner_cache import fit_cached
from gradproj.analysis.reduction import DEFAULT_REDUCTION, REDUCTIONS
from gradproj.analysis.scan import ScanOptions
from gradproj.analysis.score_types import DEFAULT_SCORE, FALLBACK_SCORE, SCORES
from gradproj.engine.patterns import EXCLUDES, folded, matches
from gradproj.errors import ConfigError, StoreError
from gradproj.flags import Flags, flag, split_list
from gradproj.formatting import clean_lines, listed
from gradproj.store import ProjectionStore
from gradproj.store.head_rows import HEAD_NAME

WITH_DAMPING = [name for name, score in SCORES.items() if score.curvature]


@dataclass(frozen=True, kw_only=True)
class ScoreArgs(Flags, title="score"):
    """Which score to compute, and from which layers."""

    score: str = flag(
        f"Score of a document; default: {DEFAULT_SCORE}, or {FALLBACK_SCORE} for a store that has "
        "not been merged yet.",
        "",
        choices=SCORES,
    )
    damping: str = flag(
        f"Damping of {', '.join(WITH_DAMPING)}, as a multiple of the mean diagonal. auto is 0.03 "
        "for kfac and 0.01 for ekfac; for second moments, 0.1 in layers of fewer than 1,024 values "
        "and 1 in others. Only query takes a list, and compares the answers.",
        "auto",
        comma_separated=True,
        metavar="auto|FLOAT",
    )
    reduction: str = flag(
        "Loss of a document, whichever of the two its row is made of: summed over its target "
        "tokens or their mean. Does not change relatif and cosine.",
        DEFAULT_REDUCTION,
        choices=REDUCTIONS,
    )
    layers: tuple[str, ...] = flag(
        "Use these layers only: patterns as those of the job's --proj_layers, such as h.3,mlp.",
        (),
        metavar="NAME",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.dampings
        score = self.gradient_score
        if score and score not in WITH_DAMPING and self.damping != "auto":
            raise ConfigError(f"--score {self.score} has no damping; leave --damping out")

    @property
    def gradient_score(self) -> str:
        """``--score``, or the gradient score in it."""
        return self.score

    @property
    def dampings(self) -> list[float | str]:
        """The distinct values of ``--damping`` in the order given."""
        values: list[float | str] = []
        for word in split_list(self.damping) or ("",):
            try:
                value: float | str = "auto" if word.strip() == "auto" else float(word)
            except ValueError:
                value = math.nan
            if value != "auto" and not 0 <= float(value) < math.inf:
                raise ConfigError(
                    f"--damping is {self.damping!r}; give auto or a number, 0 or more (0.01 to 1 "
                    "are usual); query also accepts several, separated by commas: 0.01,0.1,1"
                )
            if value not in values:
                values.append(value)
        return values

    def score_for(
        self, store: ProjectionStore, note: Callable[[str], None] = lambda line: None
    ) -> str:
        """Return ``--score``, or the default that this store supports.

        ``note`` is called with a line for the user if that is not the usual default.
        """
        if self.gradient_score:
            return self.gradient_score
        # Only the attribute decides: if it is set and the arrays are gone, the scan reports damage.
        needs_sums = SCORES[DEFAULT_SCORE].curvature == "kfac" and not has_weighted_rows(store)
        if not needs_sums or store.attributes.get("covariance_tokens"):
            return DEFAULT_SCORE
        if self.damping != "auto":
            raise ConfigError(
                f"--damping applies to {', '.join(WITH_DAMPING)}: name one by --score"
            )
        merge = f" yet: python -m gradproj merge {store.path.parent} writes them"
        note(
            f"score {FALLBACK_SCORE}: {DEFAULT_SCORE} needs token covariances, which the store "
            f"does not have{merge if is_job_store(store) else ''}"
        )
        return FALLBACK_SCORE

    def scan_options(
        self,
        store: ProjectionStore,
        device: torch.device,
        note: Callable[[str], None] = lambda line: None,
    ) -> ScanOptions:
        """Return the arguments of a scan, without damping and preconditioner."""
        return {
            "score": self.score_for(store, note),
            "layers": matching_layers(self.layers, store),
            "reduction": self.reduction,
            "device": device,
            "progress": sys.stderr.isatty(),
        }

    def fitted_options(
        self, store: ProjectionStore, device: torch.device, scores: Sequence[str] = tuple(SCORES)
    ) -> ScanOptions:
        """Return the arguments of a scan with one damping, including a cached second moment.

        A score that is not among ``scores``, those the scan supports, is replaced by the inner
        product with the same curvature: relatif by kfac.

        Raises:
            StoreError: the score needs a second moment, and the store has no row.
        """
        options = self.scan_options(store, device)
        curvature = SCORES[options["score"]].curvature
        if options["score"] not in scores:
            options["score"] = next(x for x in scores if SCORES[x].curvature == curvature)
        if curvature is not None:
            if len(self.dampings) > 1:
                raise ConfigError(f"--damping is {self.damping!r}; this command takes one value")
            (options["damping"],) = self.dampings
        if options["score"] == "kfac" and store.head is not None:
            print_note("kfac without the store's head rows, which only query adds")
        if curvature == "second_moment":
            options["preconditioner"] = fit_cached(store, curvature, options, print_note)
        return options


def print_note(line: str) -> None:
    """Print a line about the answer to standard error."""
    print(f"gradproj: {clean_lines(line)}", file=sys.stderr, flush=True)


def check_has_rows(store: ProjectionStore) -> dict[str, int]:
    """Count samples by status; raise ``StoreError`` with the reason if a store has no row."""
    counts = store.status_counts()
    if counts["ok"]:
        return counts
    if counts["missing"]:
        raise StoreError(
            f"{store.path} has no row yet ({counts['missing']:,} of {len(store):,} documents are "
            "still to be computed); start the job again on it"
        )
    others = ", ".join(f"{n:,} {status}" for status, n in counts.items() if n)
    raise StoreError(
        f"{store.path} is complete and has no row, of {len(store):,} documents: {others}. Why: in "
        f"{store.path.parent}/logs. Make a new store from documents that can be used"
    )


def is_job_store(store: ProjectionStore) -> bool:
    """Return True for stores written by the job; training stores mix rows of different weights."""
    return "wanted_units" in store.attributes


def check_is_job_store(store: ProjectionStore) -> None:
    """Raise ``StoreError`` for a store whose model is not known, so that no text is a query."""
    if not is_job_store(store):
        raise StoreError(
            f"{store.path} was not written by the job and records no model, so text queries "
            "cannot be projected. Give --query_store, or use gradproj.analysis"
        )


def matching_layers(words: Sequence[str], store: ProjectionStore) -> list[str] | None:
    """Return the names of the layers that match ``--layers``, in store order; None for all."""
    names = [layer.name for layer in store.layers]
    if store.head is not None and words:
        words = [word for word in words if word.removeprefix(EXCLUDES) != HEAD_NAME]
        if not words:
            raise ConfigError(f"--layers {HEAD_NAME}: name a layer too; head rows are added to it")
    for word in words:
        if any(matches(word.removeprefix(EXCLUDES), name) for name in names):
            continue
        if word.startswith(EXCLUDES):
            print_note(f"--layers {word}: {store.path} has no such layer to leave out")
        else:
            patterns = dict.fromkeys(map(folded, names))
            raise ConfigError(
                f"--layers: {store.path} has no layer {word!r}; it has {listed(patterns)} "
                "(* is a number)"
            )
    taken = [word for word in words if not word.startswith(EXCLUDES)] or ["*"]
    left_out = [word.removeprefix(EXCLUDES) for word in words if word.startswith(EXCLUDES)]
    chosen = [
        name
        for name in names
        if any(matches(word, name) for word in taken)
        and not any(matches(word, name) for word in left_out)
    ]
    if not chosen:
        raise ConfigError(f"--layers {','.join(words)} leaves out all layers of {store.path}")
    return chosen if len(chosen) < len(names) else None
