"""The command ``run``: the job, as ``python -m gradproj.run`` starts it."""


def run_command(argv: list[str]) -> None:
    """Run one rank of the job, then end the process with its exit code."""
    from gradproj.distributed import launcher_died, launcher_rank
    from gradproj.job.shutdown import StopRequest, leave

    # Signals may arrive, and the launcher may die, while the other modules are imported.
    stop = StopRequest().attend(launcher_rank(), launcher_died)
    from gradproj.run import main

    leave(main(argv, stop))
