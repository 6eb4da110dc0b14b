"""The commands ``tokenizer``, ``train`` and ``query``: from flags to the functions that do the work."""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gradproj.errors import GradprojError, ReportedError
from gradproj.flags import parse

if TYPE_CHECKING:
    from gradproj.stopping import StopRequest

LET_RANK_0_SPEAK_S = 10.0


def tokenizer_command(argv: list[str]) -> None:
    """``python -m gradproj tokenizer --shards TARS --output_dir DIR --vocab_size N``"""
    from gradproj.training.tokenizer import TokenizerConfig, train_tokenizer

    (config,) = parse(argv, "gradproj tokenizer", TokenizerConfig, description="Train a byte-level BPE.")
    n_tokens = train_tokenizer(config)
    print(f"A tokenizer of {n_tokens:,} tokens is in {config.output_dir}")


def train_command(argv: list[str]) -> int:
    """``python -m gradproj train --shards TARS --tokenizer DIR --result_dir DIR``, or ``torchrun -m gradproj train``"""
    from gradproj.dist import Process
    from gradproj.training import TrainConfig, train

    process = Process.from_environment()
    with said_by_rank_0(process.rank), stop_on_signals() as stop:
        (config,) = parse(argv, "gradproj train", TrainConfig, description="Train a causal language model.")
        result = train(config, stop)
    if process.rank == 0 and result.n_steps < config.max_steps:
        print(
            f"{stop.reason}: stopped after step {result.n_steps:,} of {config.max_steps:,}, with a checkpoint; "
            "the same command with --resume goes on"
        )
    elif process.rank == 0:
        print(
            f"Trained on {result.n_tokens:,} tokens in {result.seconds:.0f} s, loss {result.loss:.3f} nats per token; "
            f"the checkpoint is in {config.result_dir}"
        )
    # A launcher would take another code for a failure, and end the ranks that still save.
    return 0 if process.launched else stop.exit_code


@contextmanager
def stop_on_signals() -> Iterator["StopRequest"]:
    """Signals ask to stop, and a launcher's death does; what a signal did before, it does again afterwards."""
    from gradproj.dist import launcher_died, launcher_rank
    from gradproj.stopping import SIGNALS, StopRequest

    before = {number: signal.getsignal(number) for number in SIGNALS}
    stop = StopRequest().attend(launcher_rank(), launcher_died)
    stop.begin()
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def said_by_rank_0(rank: int) -> Iterator[None]:
    """A mistake that every rank sees is said by rank 0 alone."""
    try:
        yield
    except GradprojError as error:
        if rank == 0:
            raise
        # A rank that left before rank 0 had spoken would have the launcher end it unheard; when rank 0 leaves, the
        # launcher ends this sleep. A mistake of this rank alone is said after it.
        time.sleep(LET_RANK_0_SPEAK_S)
        print(f"gradproj: rank {rank}: {error}", file=sys.stderr, flush=True)
        raise ReportedError from error


def query_command(argv: list[str]) -> None:
    """``python -m gradproj query OUTPUT --text "..."``"""
    from gradproj.query import QueryConfig, query, result_lines

    (config,) = parse(
        argv, "gradproj query", QueryConfig, description="The documents of a store that most support a text."
    )
    for line in result_lines(config, query(config)):
        print(line)
