"""The commands: ``gradproj COMMAND`` or ``python -m gradproj COMMAND``."""

import importlib
import sys

from gradproj.errors import ConfigError, exit_code

COMMANDS = {
    "prepare": "convert documents of any format to WebDataset tars",
    "index": "build the index of a corpus of tars",
    "plan": "check the job's flags; estimate disk and memory, and time once it has begun",
    "diagnose": "compare rows alone, batched and padded, in float32 and bfloat16",
    "run": "run the job as one rank; for several: torchrun -m gradproj.run",
    "status": "show the progress of a job from its output directory",
    "slurm": "say whether a Slurm job starts, or is queued again (slurm/common.sh asks)",
    "verify": "check every checksum of an output; repair or recompute on request",
    "merge": "merge committed units into columns and statistics",
    "copy": "copy an output between disks and buckets, or continue a copy",
    "export": "write rows as the .pt files of earlier GradProjLora code",
    "tokenizer": "train a byte-level BPE tokenizer on a corpus",
    "train": "train a causal language model on a corpus",
    "lds": "evaluate scores against retraining on parts of a small corpus",
    "text": "read tokens and count n-grams of a store, for scores by shared text",
    "curvature": "measure the exact curvature of a store's model, for query --rescore",
    "query": "find the documents with the highest and lowest scores for a query",
    "select": "write the documents that score highest for queries, as tars, lines or ids",
    "domains": "compare a store's domains: mean gradients, cosines, influences",
    "report": "write one HTML page on a store",
    "serve": "answer queries of stores in a browser and as JSON",
}
"""Name -> summary. ``NAME_command`` of ``gradproj.cli.NAME`` takes the arguments after the name."""
WITHOUT_STORE = ("prepare", "index")
"""Commands that need no zarr, and so do not import it."""


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code, 2 for a user's mistake."""
    arguments = sys.argv[1:] if argv is None else argv
    return exit_code(lambda: _dispatch(arguments))


def _dispatch(arguments: list[str]) -> int | None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: gradproj COMMAND [flags]; COMMAND --help lists its flags\n")
        for name, summary in COMMANDS.items():
            print(f"  {name:<10} {summary}")
        return 0 if arguments else 2
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        raise ConfigError(f"unknown command {name!r}; choose one of {', '.join(COMMANDS)}")
    # Imported on use: `prepare` needs no torch, `export` no transformers.
    command = getattr(importlib.import_module(f"gradproj.cli.{name}"), f"{name}_command")
    if name in WITHOUT_STORE:
        return command(rest)
    from gradproj.store.zarr_threads import few_zarr_threads

    with few_zarr_threads():
        return command(rest)


if __name__ == "__main__":
    sys.exit(main())
