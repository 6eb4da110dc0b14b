"""``python -m gradproj curvature``: exact curvature of a store's model, for ``query --rescore``."""

from gradproj.cli.score_args import check_has_rows, is_job_store, print_note
from gradproj.curvature.fit import CurvatureConfig, fit_curvature
from gradproj.errors import StoreError
from gradproj.flags import parse
from gradproj.formatting import count
from gradproj.store import ProjectionStore


def curvature_command(argv: list[str]) -> None:
    """Measure what is missing of the curvature, or say that nothing is."""
    (config,) = parse(
        argv,
        "gradproj curvature",
        CurvatureConfig,
        description="Measure the exact curvature of a store's model, K-FAC's factors and EK-FAC's "
        "eigenvalues, on a sample of the store's documents. Written to OUTPUT/curvature, a file "
        "per layer; a call that was interrupted is continued by the same call.",
    )
    config.apply()
    with ProjectionStore(config.output) as store:
        if not is_job_store(store):
            raise StoreError(
                f"{store.path} was not written by the job: it records no model whose curvature "
                "could be measured"
            )
        check_has_rows(store)
    folder = fit_curvature(config, print_note)
    recipe = folder.recipe()
    print(
        f"{folder.path}: {count(len(recipe['layers']), 'layer')}, from "
        f"{count(recipe['n_documents'], 'document')} of {recipe['n_tokens']:,} target tokens"
    )
