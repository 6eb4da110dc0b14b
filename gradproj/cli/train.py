"""The command ``train``: train a causal language model on a corpus."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gradproj.distributed import Process, launcher_died, launcher_rank, report_errors_from_rank_0
from gradproj.flags import parse

if TYPE_CHECKING:
    from gradproj.job.shutdown import StopRequest


def train_command(argv: list[str]) -> int:
    """``python -m gradproj train --shards TARS --tokenizer DIR --result_dir DIR``, or ``torchrun -m gradproj train``"""
    from gradproj.training import TrainConfig, train

    process = Process.from_environment()
    with report_errors_from_rank_0(process.rank), stop_on_signals() as stop:
        (config,) = parse(
            argv, "gradproj train", TrainConfig, description="Train a causal language model."
        )
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
    from gradproj.job.shutdown import SIGNALS, StopRequest

    before = {number: signal.getsignal(number) for number in SIGNALS}
    stop = StopRequest().attend(launcher_rank(), launcher_died)
    stop.begin()
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
