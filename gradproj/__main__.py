"""``python -m gradproj COMMAND``: everything but the job itself (which is ``python -m gradproj.run``)."""

import importlib
import sys
from typing import NamedTuple

from gradproj.errors import ConfigError, exit_code


class Command(NamedTuple):
    """Where a command lives: a function of the arguments after its name."""

    module: str
    function: str
    help: str


COMMANDS = {
    "prepare": Command(
        "gradproj.cli.commands", "prepare_command", "documents of any kind to WebDataset tars"
    ),
    "index": Command("gradproj.cli.commands", "index_command", "tars to a corpus index"),
    "plan": Command(
        "gradproj.cli.commands", "plan_command", "check the job's flags and say what it will take"
    ),
    "diagnose": Command(
        "gradproj.job.diagnose",
        "diagnose_command",
        "rows alone, batched, padded, in float32 and bfloat16",
    ),
    "run": Command(
        "gradproj.run", "run", "the job, as one rank; torchrun -m gradproj.run for several"
    ),
    "status": Command("gradproj.cli.commands", "status_command", "how far a store is"),
    "verify": Command("gradproj.cli.commands", "verify_command", "check every checksum of a store"),
    "merge": Command(
        "gradproj.cli.commands",
        "merge_command",
        "merge what is committed into columns and statistics",
    ),
    "export": Command(
        "gradproj.cli.commands", "export_command", "rows as the original system's .pt files"
    ),
    "tokenizer": Command(
        "gradproj.cli.training_commands", "tokenizer_command", "train a byte-level BPE on a corpus"
    ),
    "train": Command(
        "gradproj.cli.training_commands",
        "train_command",
        "train a causal language model on a corpus",
    ),
    "lds": Command(
        "gradproj.evaluation.lds",
        "lds_command",
        "hold scores against retraining on parts of a small corpus",
    ),
    "query": Command(
        "gradproj.cli.query", "query_command", "the documents that most support a query"
    ),
    "domains": Command(
        "gradproj.cli.domains",
        "domains_command",
        "gradients, cosines and influences of a store's domains",
    ),
    "report": Command("gradproj.cli.report", "report_command", "one HTML page on a store"),
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; the exit code (2 for a user's mistake)."""
    arguments = sys.argv[1:] if argv is None else argv
    return exit_code(lambda: _dispatch(arguments))


def _dispatch(arguments: list[str]) -> int | None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m gradproj COMMAND [flags]; COMMAND --help lists its flags\n")
        for name, command in COMMANDS.items():
            print(f"  {name:<10} {command.help}")
        return 0 if arguments else 2
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        raise ConfigError(f"unknown command {name!r}; choose one of {', '.join(COMMANDS)}")
    # Imported on use: `prepare` needs no torch, `export` no transformers.
    function = getattr(importlib.import_module(COMMANDS[name].module), COMMANDS[name].function)
    return function(rest)


if __name__ == "__main__":
    sys.exit(main())
