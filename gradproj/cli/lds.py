"""The command ``lds``: evaluates scores against retraining and prints a table."""

import math

from gradproj.evaluation.checks import TOP
from gradproj.evaluation.config import RETRAINING, LdsConfig
from gradproj.evaluation.lds import evaluate, find_sources
from gradproj.evaluation.results import RECALL_AT as COPIES_AT
from gradproj.evaluation.results import MethodResult, Results
from gradproj.evaluation.sources import RECALL_AT, Mean, SourceResults
from gradproj.evaluation.statistics import Estimate
from gradproj.flags import parse

SOURCES_NOTE = (
    "AUPRC: area under precision against recall of a query's sources; MRR: 1 / rank of the first;",
    f"     recall@{RECALL_AT}: fraction of the sources among the {RECALL_AT} best documents",
    "+-q: standard error over the queries; differences are paired",
)
LDS_NOTE = (
    "LDS: Spearman's correlation between the summed scores of a random subset of the documents and",
    "     minus the query's loss after training on that subset; mean over the queries",
)
TOP_NOTE = (
    f"top {TOP}: distinct documents among the best {TOP} of all queries, as a fraction of the most",
    "     that are possible; bytes: of a document's rows that the method reads",
)
COPIES_NOTE = (
    "copies: recall@k and reciprocal rank of a query's first near-copy (the planted one, or",
    "     another document with as many of its 4-grams)",
)
LEFT_OUT_NOTE = (
    "left out: rise of the queries' loss (nats per token) when the method's top documents are",
    "     removed, minus the rise when as many random documents are removed",
)
ERRORS_NOTE = (
    "+-q: standard error over the queries; +-s: over the subsets (bootstrap); paired differences",
)


def lds_command(argv: list[str]) -> None:
    """Run or resume the experiment and print its table."""
    (config,) = parse(
        argv,
        "gradproj lds",
        LdsConfig,
        description="Linear datamodeling score (LDS): train a small GPT-2 on many random halves of "
        "a small corpus, or fine-tune a checkpoint (--model) on random subsets, and correlate the "
        "scores of each method with the measured losses. Prints a table and writes lds.json, a "
        "figure, losses and scores to --output_dir. With 80 trainings in bfloat16 and two workers "
        "it takes about an hour on two cores. Other experiments (--experiment) plant sources and "
        "measure how well scores find them.",
    )
    if config.experiment == RETRAINING:
        lines = table_lines(evaluate(config))
    else:
        lines = sources_table(find_sources(config))
    for line in lines:
        print(line)


def sources_table(results: SourceResults) -> list[str]:
    """Return a table with one line per method, and notes on its columns."""
    width = max(6, *(len(name) for name in results.methods))
    less = f"less {results.reference}"
    wide = max(13, len(less))
    before = results.loss_before
    was = "" if before is None else f" ({before:.3f} before training)"
    lines = [
        f"{results.experiment}: {results.n_documents:,} documents, {results.n_queries} queries "
        f"with {results.n_sources} sources each; their loss {results.loss_after:.3f} nats per "
        f"target{was}",
        "",
        f"{'method':<{width}}  {'bytes':>9}  {'AUPRC':>6} +-q    {less:>{wide}}   "
        f"{'MRR':>6} +-q    {f'recall@{RECALL_AT}':>9} +-q",
    ]
    for name, found in results.methods.items():
        size = "-" if found.row_bytes is None else f"{found.row_bytes:,}"
        over = found.over_reference
        difference = "" if over is None else f"{over.mean:+.3f} {over.error:.3f}"
        lines.append(
            f"{name:<{width}}  {size:>9}  {_mean(found.average_precision):>12}  "
            f"{difference:>{wide}}   {_mean(found.reciprocal_rank):>12}  {_mean(found.recall):>15}"
        )
    return [*lines, "", *SOURCES_NOTE]


def _mean(value: Mean) -> str:
    return f"{value.mean:.3f} {value.error:.3f}"


def table_lines(results: Results) -> list[str]:
    """Return a table with one line per method, and notes on its columns."""
    methods = results.methods
    width = max(6, *(len(name) for name in methods))
    with_copies = any(result.duplicates for result in methods.values())
    with_left = any(result.leave_out for result in methods.values())
    heads = [
        f"{'method':<{width}}",
        f"{'bytes':>9}",
        f"{'LDS':>6}",
        " +-q   +-s ",
        f"{'less ' + results.reference:>{difference_width(results)}}",
        f"top {TOP}",
    ]
    heads += [f"  copies: @1   @{COPIES_AT[1]}   MRR"] * with_copies + [
        "  left out: nats"
    ] * with_left
    ceiling = f"{results.ceiling:.3f}" if not math.isnan(results.ceiling) else "unknown (one seed)"
    trainings = f"{results.n_seeds} training{'s' if results.n_seeds > 1 else ''}"
    return [
        f"{results.n_documents:,} documents, {results.n_queries} queries; {results.n_subsets} "
        f"random subsets of {results.subset_size:,}, {trainings} of each; queries' loss "
        f"{results.mean_loss:.3f} nats per token, +-{results.loss_spread:.4f} over the subsets",
        f"noise ceiling {ceiling}; chance (shuffled documents) {results.chance[0]:+.3f} +- "
        f"{results.chance[1]:.3f}",
        *_randomized_line(results),
        "",
        "  ".join(heads).rstrip(),
        *(
            _line(name, result, width, difference_width(results), with_copies, with_left)
            for name, result in methods.items()
        ),
        "",
        *LDS_NOTE,
        *TOP_NOTE,
        *(COPIES_NOTE if with_copies else ()),
        *(LEFT_OUT_NOTE if with_left else ()),
        *ERRORS_NOTE,
    ]


def _randomized_line(results: Results) -> list[str]:
    if results.randomized is None:
        return []
    return [
        f"rank agreement of {results.reference} with the same score under random weights: "
        f"{results.randomized:+.3f}"
    ]


def difference_width(results: Results) -> int:
    """Return the width of the column of differences to the reference."""
    return max(22, len(f"less {results.reference}"))


def _line(
    name: str, result: MethodResult, width: int, wide: int, with_copies: bool, with_left: bool
) -> str:
    lds = result.lds
    cells = [
        f"{name:<{width}}",
        f"{'-' if result.row_bytes is None else f'{result.row_bytes:,}':>9}",
        f"{lds.mean:>+6.3f}",
        f"{lds.over_queries:.3f} {lds.over_subsets:.3f}",
    ]
    cells.append(f"{_difference(result.over_reference):>{wide}}")
    cells.append(f"{result.distinct_top:>6.2f}")
    if with_copies and result.duplicates:
        recall, mrr = result.duplicates.recall, result.duplicates.mrr
        cells.append(f"  {recall[COPIES_AT[0]]:>9.2f} {recall[COPIES_AT[1]]:>5.2f} {mrr:>5.2f}")
    if with_left and result.leave_out:
        cells.append(f"  {result.leave_out.mean:+.3f} +- {result.leave_out.standard_error:.3f}")
    return "  ".join(cells).rstrip()


def _difference(over: Estimate | None) -> str:
    return (
        "" if over is None else f"{over.mean:+.3f} {over.over_queries:.3f} {over.over_subsets:.3f}"
    )
