"""The command ``copy``: an output from a disk or a bucket to another place."""

from dataclasses import dataclass

from gradproj.flags import Flags, as_in, flag, parse
from gradproj.formatting import count, human_bytes, human_seconds
from gradproj.job.recorded_args import ReadingArgs, output_flag
from gradproj.maintenance.copy_output import copy_output
from gradproj.storage.object_path import path_of


@dataclass(frozen=True, kw_only=True)
class CopyConfig(Flags, title="copy"):
    """The output to copy, and its new place."""

    output: str = output_flag()
    to: str = flag(
        "New or empty folder or address; or that of an earlier copy, which is continued.",
        name="DEST",
        positional=True,
        required="give a folder or an address",
        path="DIR",
        remote=True,
    )
    anonymous: bool = as_in(
        ReadingArgs, "anonymous", help="Read OUTPUT in a public bucket without credentials."
    )
    read_back: bool = flag(
        "Read every copy again and compare its checksum. Costs what reading DEST costs.", True
    )


def copy_command(argv: list[str]) -> None:
    """``python -m gradproj copy OUTPUT DEST``"""
    about = "Copy an output, finished or not, between disks and buckets. Run it again to continue."
    (config,) = parse(argv, "gradproj copy", CopyConfig, description=about)
    # Not READING: it would hold for DEST as well.
    source = path_of(config.output, anonymous=config.anonymous)
    result = copy_output(source, config.to, config.read_back)
    files = f"{count(result.n_units, 'unit')} and {count(result.n_files, 'other file')}"
    print(
        f"copied        {files}: {human_bytes(result.n_bytes)} in {human_seconds(result.seconds)}, "
        f"{'each read back' if config.read_back else 'none read back'}"
    )
    if result.n_units_there:
        print(f"there already {count(result.n_units_there, 'unit')}")
    if result.n_missing:
        print(
            f"missing       {count(result.n_missing, 'unit')}, not computed yet; run the same "
            "command again when they are"
        )
