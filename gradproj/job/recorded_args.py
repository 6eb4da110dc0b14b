"""Settings of the commands that load a job's model again from its output directory."""

from dataclasses import dataclass
from typing import Any

from gradproj.flags import DEVICES, Flags, flag
from gradproj.storage.cache import cache_of
from gradproj.storage.object_path import READING


def output_flag() -> Any:
    """Declare ``OUTPUT``, the first argument of a command that reads a job's output."""
    about = "Output directory of a job (its --output_dir)."
    return flag(about, name="OUTPUT", positional=True, path="DIR", remote=True)


@dataclass(frozen=True, kw_only=True)
class ReadingArgs(Flags, title="buckets"):
    """Ways of reading outputs in buckets."""

    anonymous: bool = flag("Read public buckets without credentials.", False)
    cache_dir: str = flag(
        "Folder on local disk that keeps shards and columns of outputs in buckets, for further "
        "commands on them.",
        "",
        path="DIR",
    )
    cache_gb: float = flag("GB that --cache_dir may take.", 100.0, above=0.0)

    def apply(self) -> None:
        """Read in this way from now on, in this process."""
        READING.anonymous = self.anonymous
        READING.cache = cache_of(self.cache_dir, self.cache_gb)


@dataclass(frozen=True, kw_only=True)
class RecordedRunArgs(ReadingArgs, title="recorded inputs"):
    """A job's output directory, and where the model and the tars of that job are now.

    The output records the job's settings. What may run code is the caller's decision.
    """

    output: str = output_flag()
    model: str = flag("The job's model, if it has moved: DIR or FILE.gguf.", "", path="DIR|FILE")
    tokenizer: str = flag("Directory of the job's tokenizer, if it has moved.", "", path="DIR")
    shards: str = flag("The job's tars, if they have moved.", "", path="TARS", remote=True)
    device: str = flag("Device on which gradients are computed.", "auto", choices=DEVICES)
    trust_remote_code: bool = flag("Run code that comes with the recorded checkpoint.", False)
    allow_pickle: bool = flag("Load the recorded .bin weights, which can run code.", False)
