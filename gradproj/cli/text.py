"""The command ``text``: prepare text scores of a store. Under torchrun the ranks share the reading.

It needs no group of processes: each rank writes the files that no other rank has written.
"""

from dataclasses import dataclass

from gradproj.cli.score_args import print_note
from gradproj.distributed import Process, report_errors_from_rank_0
from gradproj.flags import Flags, as_in, flag, parse
from gradproj.formatting import count, human_bytes
from gradproj.job.recorded_args import RecordedRunArgs
from gradproj.store import ProjectionStore
from gradproj.text.frequencies import MIN_COUNTERS
from gradproj.text.index import FACTS_NAME, MAX_SKETCH_BYTES, TextIndex, make_text_index


@dataclass(frozen=True, kw_only=True)
class TextConfig(Flags, title="text"):
    """A job's output directory, and the memory that counting may take."""

    output: str = as_in(RecordedRunArgs, "output", positional=True)
    model: str = as_in(RecordedRunArgs, "model")
    tokenizer: str = as_in(RecordedRunArgs, "tokenizer")
    shards: str = as_in(RecordedRunArgs, "shards")
    trust_remote_code: bool = as_in(RecordedRunArgs, "trust_remote_code")
    anonymous: bool = as_in(RecordedRunArgs, "anonymous")
    max_sketch_bytes: int = flag(
        "Most memory for the document frequencies of n-grams. A smaller corpus takes 32 to 64 "
        "bytes a token.",
        MAX_SKETCH_BYTES,
        minimum=2**20,
    )

    def inputs(self) -> RecordedRunArgs:
        """Return where the tokenizer and the tars are."""
        names = ("output", "model", "tokenizer", "shards", "trust_remote_code", "anonymous")
        return RecordedRunArgs(**{name: getattr(self, name) for name in names})


def text_command(argv: list[str]) -> None:
    """``python -m gradproj text OUTPUT``, or under ``torchrun -m gradproj text``"""
    about = (
        "Read the tokens of a store's documents from the tars and count in how many documents each "
        "1- to 4-gram occurs, for `query --score text`. Continues where an earlier call ended. "
        "query runs it by itself on first use."
    )
    process = Process.from_environment()
    with report_errors_from_rank_0(process.rank):
        (config,) = parse(argv, "gradproj text", TextConfig, description=about)
        share, inputs = (process.rank, process.world_size), config.inputs()
        inputs.apply()
        with ProjectionStore(config.output) as store:
            index = make_text_index(store, inputs, config.max_sketch_bytes, share, print_note)
    if index is not None:
        if index.facts.sketch["bytes"] > max(config.max_sketch_bytes, 4 * MIN_COUNTERS) + 2**10:
            print_note(
                f"--max_sketch_bytes limits a new sketch, and {index.files.folder} has a larger "
                f"one: delete {FACTS_NAME} there to count again"
            )
        print("\n".join(_lines(index)))


def _lines(index: TextIndex) -> list[str]:
    facts, units = index.facts, index.files.units.tolist()
    n_bytes = sum(index.files.path(unit).stat().st_size for unit in units)
    median, most = index.frequencies.error_quantiles([0.5, 0.99])
    return [
        f"folder        {index.files.folder}",
        f"documents     {count(facts.n_documents, 'document')} with {facts.n_tokens:,} tokens, "
        f"{human_bytes(n_bytes)}",
        f"frequencies   {human_bytes(facts.sketch['bytes'])}; n-grams that no document holds count "
        f"as {median:,} (median), 99 % as at most {most:,} documents",
    ]
