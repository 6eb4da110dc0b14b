"""Are the answers right: the reference experiment of the README, on Python's own standard library.

    python tests/bench/bench_lds.py [--quick] [--workers 2] [--output_dir DIR]

The whole form is 80 trainings and takes about an hour of two cores; the quick one a tenth of that,
and can tell little more than that the scores are no chance. Called again on its folder, it goes on.
"""

import argparse
import tempfile
from pathlib import Path

from measure import print_machine

from gradproj.__main__ import main as gradproj
from gradproj.cli.lds import table_lines
from gradproj.evaluation.config import LdsConfig
from gradproj.evaluation.lds import evaluate
from gradproj.evaluation.results import Results

WHOLE = {"subsets": 40, "seeds": 2, "model_dtype": "bfloat16", "device": "cpu"}
QUICK = WHOLE | {
    "n_documents": 256,
    "n_queries": 32,
    "n_near_copies": 16,
    "pretrain": 4096,
    "subsets": 12,
    "seeds": 2,
    "leave_out": 0,
    "methods": "random,bm25,text,dot@16,kfac@16,kfac@16/signs,kfac@64/signs,kfac@64/signs+text",
}


def measure(folder: Path, quick: bool, workers: int) -> Results:
    """The experiment, or what of it is not in the folder yet."""
    tars = folder / "tars"
    if not tars.is_dir():
        assert gradproj(["prepare", "stdlib:", "--output_dir", str(tars)]) == 0
    settings = QUICK if quick else WHOLE
    output = folder / ("quick" if quick else "whole")
    return evaluate(
        LdsConfig(shards=str(tars), output_dir=str(output), workers=workers, **settings)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--output_dir", type=Path, default=Path(tempfile.gettempdir()) / "gradproj-lds"
    )
    given = parser.parse_args()
    given.output_dir.mkdir(parents=True, exist_ok=True)
    print_machine("numpy")
    for line in table_lines(measure(given.output_dir, given.quick, given.workers)):
        print(line)


if __name__ == "__main__":
    main()
