"""The command ``diagnose``: compares rows alone, batched, padded, in float32 and bfloat16."""

import json
from dataclasses import asdict

from gradproj.job.config import parse_run
from gradproj.job.diagnose import SOUND, DiagnoseConfig, Diagnosis, diagnose
from gradproj.job.precision import Agreement
from gradproj.model.config import MODEL_DTYPES

MOST_LAYERS_SHOWN = 5


def diagnose_command(argv: list[str]) -> int:
    """``python -m gradproj diagnose``: exit code 0 nothing beyond rounding, 1 something is, 2 a user's mistake."""
    about = (
        "With the job's flags: the same documents alone, batched, beside padding, in float32 and bfloat16. Exit code "
        "0: rows differ by rounding only; 1: by more (batching or padding changes them, or the job's precision does)."
    )
    config, options = parse_run(argv, "gradproj diagnose", DiagnoseConfig, description=about)
    found = diagnose(config, options.n_documents)
    print(
        json.dumps(asdict(found), indent=2)
        if options.as_json
        else "\n".join(diagnosis_lines(found))
    )
    return found.exit_code


def diagnosis_lines(found: Diagnosis) -> list[str]:
    """The result as lines of text: a table over the ways, the worst layers, the verdicts."""
    width = max(len(f"{each.dtype}, {each.layer}") for each in found.layers)
    head = f"{'':{width}}  cosine least   median   error most   median   norm most"
    return [
        f"{len(found.sample_ids)} documents, {found.n_tokens:,} tokens, on {found.device}; the job's precision is "
        f"{found.model_dtype}. Against each document alone in float32:",
        "",
        head,
        *(_line(f"{c.dtype}, {c.way}", width, c.agreement) for c in found.comparisons),
        "",
        "Layers with the least cosine, in the job's batches:",
        *(
            _line(f"{each.dtype}, {each.layer}", width, each.agreement)
            for dtype in MODEL_DTYPES
            for each in [each for each in found.layers if each.dtype == dtype][:MOST_LAYERS_SHOWN]
        ),
        "",
        *found.verdicts,
        f"result        {'nothing beyond rounding' if found.exit_code == SOUND else 'BEYOND ROUNDING, see above'}",
    ]


def _line(name: str, width: int, agreement: Agreement) -> str:
    lost = f"  {agreement.n_not_finite} not finite" if agreement.n_not_finite else ""
    return (
        f"{name:{width}}  {agreement.least_cosine:12.6f} {agreement.median_cosine:8.6f}   {agreement.most_error:10.1e} "
        f"{agreement.median_error:8.1e}   {agreement.most_norm_error:9.1e}{lost}"
    )
