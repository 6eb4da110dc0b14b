"""The command ``merge``: columns, sums and statistics from the committed units."""

from dataclasses import dataclass

from gradproj.flags import Flags, parse
from gradproj.formatting import count, ranges_text
from gradproj.job.recorded_args import output_flag
from gradproj.job.summary import stats_lines
from gradproj.maintenance.job_output import read_output
from gradproj.maintenance.merge import merge_now


@dataclass(frozen=True, kw_only=True)
class MergeConfig(Flags, title="merge"):
    """Which output to merge."""

    output: str = output_flag()


def merge_command(argv: list[str]) -> None:
    """Merge an output and print its statistics."""
    about = "Merge committed units into columns, sums and statistics. The job does so at its end."
    (config,) = parse(argv, "gradproj merge", MergeConfig, description=about)
    stats = merge_now(read_output(config.output))
    after = read_output(config.output)
    print(f"merged        {len(after.committed):,} of {count(len(after.wanted), 'unit')}")
    print("\n".join(stats_lines(stats)))
    if len(after.missing):
        documents = count(after.layout.n_samples_in(after.missing), "document")
        ids = ranges_text(after.id_ranges(after.missing))
        print(
            f"missing       {count(len(after.missing), 'unit')}, {documents}: ids {ids}; "
            "run the job's command again to compute them"
        )
