"""The command ``diagnose``: compares rows alone, batched, padded, in float32 and bfloat16."""

import json
from dataclasses import asdict

from gradproj.job.config import parse_run
from gradproj.job.diagnose import SOUND, DiagnoseConfig, Diagnosis, diagnose
from gradproj.job.precision import Agreement
from gradproj.model.config import MODEL_DTYPES

MAX_LAYERS_SHOWN = 5


def diagnose_command(argv: list[str]) -> int:
    """Print the comparison and return the exit code."""
    about = (
        "With the job's flags: compare the rows of some documents alone, batched and beside "
        "padding, in float32 and bfloat16. Exit code 0: rows differ by rounding only; 1: by more "
        "(batching, padding or the job's precision changes them)."
    )
    config, options = parse_run(argv, "gradproj diagnose", DiagnoseConfig, description=about)
    diagnosis = diagnose(config, options.n_documents)
    print(
        json.dumps(asdict(diagnosis), indent=2)
        if options.as_json
        else "\n".join(diagnosis_lines(diagnosis))
    )
    return diagnosis.exit_code


def diagnosis_lines(diagnosis: Diagnosis) -> list[str]:
    """Return the result as lines of text: comparisons, the worst layers, the verdicts."""
    layers = [
        layer
        for dtype in MODEL_DTYPES
        for layer in [x for x in diagnosis.layers if x.dtype == dtype][:MAX_LAYERS_SHOWN]
    ]
    width = max(len(f"{layer.dtype}, {layer.layer}") for layer in diagnosis.layers)
    is_sound = diagnosis.exit_code == SOUND
    return [
        f"{len(diagnosis.sample_ids)} documents, {diagnosis.n_tokens:,} tokens, on "
        f"{diagnosis.device}; the job's precision is {diagnosis.model_dtype}. Compared with each "
        "document alone in float32:",
        "",
        f"{'':{width}}  cosine least   median   error most   median   norm most",
        *(_line(f"{c.dtype}, {c.way}", width, c.agreement) for c in diagnosis.comparisons),
        "",
        "Layers with the least cosine, in the job's batches:",
        *(_line(f"{x.dtype}, {x.layer}", width, x.agreement) for x in layers),
        "",
        *diagnosis.verdicts,
        f"result        {'nothing beyond rounding' if is_sound else 'BEYOND ROUNDING, see above'}",
    ]


def _line(name: str, width: int, agreement: Agreement) -> str:
    not_finite = f"  {agreement.n_not_finite} not finite" if agreement.n_not_finite else ""
    return (
        f"{name:{width}}  {agreement.least_cosine:12.6f} {agreement.median_cosine:8.6f}   "
        f"{agreement.most_error:10.1e} {agreement.median_error:8.1e}   "
        f"{agreement.most_norm_error:9.1e}{not_finite}"
    )
