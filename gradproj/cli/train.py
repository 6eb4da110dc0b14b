"""The command ``train``: trains a causal language model on a corpus."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gradproj.distributed import Process, launcher_died, launcher_rank, report_errors_from_rank_0
from gradproj.flags import parse

if TYPE_CHECKING:
    from gradproj.job.shutdown import StopRequest


def train_command(argv: list[str]) -> int:
    """Train, alone or as one rank of ``torchrun -m gradproj train``; return the exit code."""
    from gradproj.training import TrainConfig, train

    process = Process.from_environment()
    with report_errors_from_rank_0(process.rank), stop_on_signals() as stop:
        (config,) = parse(
            argv, "gradproj train", TrainConfig, description="Train a causal language model."
        )
        result = train(config, stop)
    if process.rank == 0 and result.n_steps < config.max_steps:
        print(
            f"{stop.reason}: stopped after step {result.n_steps:,} of {config.max_steps:,}, with a "
            "checkpoint; the same command with --resume resumes"
        )
    elif process.rank == 0:
        print(
            f"Trained on {result.n_tokens:,} tokens in {result.seconds:.0f} s, "
            f"loss {result.loss:.3f} nats per token; the checkpoint is in {config.result_dir}"
        )
    # A launcher treats any other code as a failure and kills the ranks that are still saving.
    return 0 if process.launched else stop.exit_code


@contextmanager
def stop_on_signals() -> Iterator["StopRequest"]:
    """Turn signals and the launcher's death into a stop request; restore handlers on exit."""
    from gradproj.job.shutdown import StopRequest

    stop = StopRequest().attend(launcher_rank(), launcher_died)
    stop.begin()
    try:
        yield stop
    finally:
        stop.release()
