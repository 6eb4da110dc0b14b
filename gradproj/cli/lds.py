"""The command ``lds``: evaluates scores against retraining; the results as a table."""

import math

from gradproj.evaluation.config import LdsConfig
from gradproj.evaluation.lds import evaluate
from gradproj.evaluation.results import RECALL_AT, MethodResult, Results
from gradproj.evaluation.statistics import Estimate
from gradproj.flags import parse

LDS_NOTE = (
    "LDS: Spearman's correlation of a half's summed scores with minus the query's loss after training on it, mean over",
    "     the queries",
)
COPIES_NOTE = (
    "copies: recall@k and 1 / rank of a query's first near-copy: that planted, or another with as many of its 4-grams",
)
LEFT_OUT_NOTE = (
    "left out: rise of the queries' loss (nats per token) without the documents that the method puts first for them,",
    "     less that without as many random ones",
)
ERRORS_NOTE = (
    "+-q: standard error over the queries; +-s: over the halves (bootstrap); differences are paired",
)


def lds_command(argv: list[str]) -> None:
    """``python -m gradproj lds --shards TARS --output_dir DIR``"""
    (config,) = parse(
        argv,
        "gradproj lds",
        LdsConfig,
        description="Hold scores against retraining on parts of a small corpus.",
    )
    for line in table_lines(evaluate(config)):
        print(line)


def table_lines(results: Results) -> list[str]:
    """What was measured, a line a method, and how to read it."""
    shown = results.methods
    width = max(6, *(len(name) for name in shown))
    with_copies = any(result.duplicates for result in shown.values())
    with_left = any(result.leave_out for result in shown.values())
    heads = [
        f"{'method':<{width}}",
        f"{'LDS':>6}",
        " +-q   +-s ",
        f"{'less ' + results.reference:>22}",
    ]
    heads += [f"  copies: @1   @{RECALL_AT[1]}   MRR"] * with_copies + [
        "  left out: nats"
    ] * with_left
    ceiling = f"{results.ceiling:.3f}" if not math.isnan(results.ceiling) else "unknown (one seed)"
    trainings = f"{results.n_seeds} training{'s' if results.n_seeds > 1 else ''}"
    return [
        f"{results.n_documents:,} documents, {results.n_queries} queries; {results.n_subsets} random halves, "
        f"{trainings} of each; queries' loss {results.mean_loss:.3f} nats per token, +-{results.loss_spread:.4f} over "
        "the halves",
        f"noise ceiling {ceiling}; chance (shuffled documents) {results.chance[0]:+.3f} +- {results.chance[1]:.3f}",
        "",
        "  ".join(heads).rstrip(),
        *(_line(name, result, width, with_copies, with_left) for name, result in shown.items()),
        "",
        *LDS_NOTE,
        *(COPIES_NOTE if with_copies else ()),
        *(LEFT_OUT_NOTE if with_left else ()),
        *ERRORS_NOTE,
    ]


def _line(name: str, result: MethodResult, width: int, with_copies: bool, with_left: bool) -> str:
    lds = result.lds
    cells = [
        f"{name:<{width}}",
        f"{lds.mean:>+6.3f}",
        f"{lds.over_queries:.3f} {lds.over_subsets:.3f}",
    ]
    cells.append(f"{_difference(result.over_reference):>22}")
    if with_copies and result.duplicates:
        found = result.duplicates
        cells.append(
            f"  {found.recall[RECALL_AT[0]]:>9.2f} {found.recall[RECALL_AT[1]]:>5.2f} {found.mrr:>5.2f}"
        )
    if with_left and result.leave_out:
        cells.append(f"  {result.leave_out.mean:+.3f} +- {result.leave_out.standard_error:.3f}")
    return "  ".join(cells).rstrip()


def _difference(over: Estimate | None) -> str:
    return (
        "" if over is None else f"{over.mean:+.3f} {over.over_queries:.3f} {over.over_subsets:.3f}"
    )
