"""Settings of the job: one frozen dataclass per stage, in one."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from gradproj.corpus.config import CorpusConfig
from gradproj.corpus.documents import ReadLimits
from gradproj.engine.batching import BatchConfig
from gradproj.engine.head_rows import HeadConfig
from gradproj.engine.projection import JobProjectionConfig
from gradproj.errors import ConfigError, GradprojError
from gradproj.flags import DEVICES, Flags, as_in, flag, flag_of, from_recorded, parse, word_of
from gradproj.flags.paths import local_path
from gradproj.model.config import ModelConfig
from gradproj.model.document_tokens import DocumentRules
from gradproj.storage.object_path import path_of
from gradproj.store.hidden_states import HIDDEN_STATES
from gradproj.store.layout import STORE_NAME, StoreConfig
from gradproj.store.metadata import read_attributes, store_exists

FORMAT_1_DEFAULTS: Mapping[str, Any] = {
    "encoding": "dense",
    "basis": "random",
    "proj_rank_total": 256,
    "loss_reduction": "mean",
}
"""Defaults of the job that have changed since format 1."""
EARLIER_PROJ_LAYERS = "mlp,attn"
"""Default of ``--proj_layers`` before it was ``all``."""
MAX_THREADS = 1024
"""Far above any machine's cores; OpenMP crashes at numbers beyond what the kernel allows."""


@dataclass(frozen=True, kw_only=True)
class JobStoreConfig(StoreConfig):
    """Form of the job's rows. By default they are signs; those of a training run are dense."""

    encoding: str = as_in(StoreConfig, "encoding", default="signs")
    hidden_state: str = flag(
        "Also store the last layer's hidden state of each document: its mean over the target "
        "positions, or that of the last token.",
        "none",
        choices=HIDDEN_STATES,
    )


@dataclass(frozen=True, kw_only=True)
class JobConfig(Flags, title="job"):
    """Settings of the job itself; none of them changes a row beyond rounding."""

    output_dir: str = flag(
        "Output directory: the store and all about the job. Started again on it, the job resumes.",
        required="give a folder, or an address such as s3://bucket/folder",
        path="DIR",
        remote=True,
    )
    device: str = flag(
        "Device; auto takes one GPU per rank if torch sees any.", "auto", choices=DEVICES
    )
    threads: int = flag(
        "CPU threads of a rank; 0 = torch's own choice (torchrun sets 1).",
        0,
        minimum=0,
        maximum=MAX_THREADS,
    )
    deterministic: bool = flag(
        "Use deterministic CUDA kernels (slower), meant to make stores bitwise equal.", False
    )
    gradient_checkpointing: bool = flag(
        "Recompute activations in the backward pass: less memory, a third more time.", False
    )
    compile: bool = flag(
        "Run the model's blocks through torch.compile: needs a C++ compiler and tens of seconds "
        "per rank at the start; rows are equal up to rounding.",
        False,
    )
    ranks_per_model: int = flag(
        "Ranks that hold one model together, each a part of its blocks' weights, for models larger "
        "than a device.",
        1,
        minimum=1,
        metavar="G",
    )
    offload: bool = flag(
        "Keep the weights of the model's blocks in the host's memory and copy each block to the "
        "device while it runs, for models larger than one device.",
        False,
    )
    proj_save_interval: int = flag(
        "Save a unit's new rows to partial/ every so many batches; 0 = only when interrupted.",
        0,
        minimum=0,
    )
    verbose: bool = flag("Log every batch to logs/.", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        in_parts = self.ranks_per_model > 1
        if in_parts and self.offload:
            raise ConfigError("--ranks_per_model and --offload: give one of them")
        if self.compile and (in_parts or self.offload):
            name = "--ranks_per_model" if in_parts else "--offload"
            raise ConfigError(f"--compile and {name}: give one of them")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings of the job. Each stage is given its own section only."""

    corpus: CorpusConfig
    limits: ReadLimits
    model: ModelConfig
    rules: DocumentRules
    projection: JobProjectionConfig
    head: HeadConfig
    batch: BatchConfig
    store: JobStoreConfig
    job: JobConfig

    @property
    def output(self) -> Path:
        """The output directory, on disk or in a bucket."""
        return path_of(self.job.output_dir)

    @staticmethod
    def sections() -> dict[str, Any]:
        """Return the dataclass of each section by its name."""
        return {f.name: f.type for f in fields(RunConfig)}

    @staticmethod
    def from_flags(recorded: Mapping[str, Any]) -> "RunConfig":
        """Build the settings that ``as_flags`` returned. ``TypeError`` if a flag is missing.

        Format 1 recorded no flags of the rows' form.
        """
        recorded = {**FORMAT_1_DEFAULTS, **recorded}
        sections = RunConfig.sections().items()
        return RunConfig(**{name: from_recorded(section, recorded) for name, section in sections})

    def as_flags(self) -> dict[str, Any]:
        """Return flag -> value, flat: the content of ``run_config.json``. ``--config`` reads it."""
        return {
            flag_of(f): word_of(f, getattr(section, f.name))
            for section in (getattr(self, name) for name in self.sections())
            for f in fields(section)
        }


def _defaults_of_output(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return earlier defaults for an output directory whose store was begun with them, else none.

    So the command line that began such a store continues it.
    """
    try:
        text = given.get("output_dir", "")
        output = path_of(local_path(text, remote=True))
        attributes = read_attributes(output / STORE_NAME) if store_exists(output) else {}
    except GradprojError:  # opening the store reports it
        return {}
    identity = attributes.get("identity")  # opening the store reports damage
    recorded = identity.get("--proj_layers") if isinstance(identity, dict) else ""
    defaults = dict(FORMAT_1_DEFAULTS if attributes.get("format_version") == 1 else {})
    return defaults | ({"proj_layers": recorded} if recorded == EARLIER_PROJ_LAYERS else {})


def parse_run(
    argv: list[str], prog: str, *more: type, description: str | None = None
) -> tuple[Any, ...]:
    """Return the job's settings from a command line, then those of the sections ``more``."""
    sections = RunConfig.sections()
    every = (*sections.values(), *more)
    values = parse(argv, prog, *every, description=description, defaults=_defaults_of_output)
    return RunConfig(**dict(zip(sections, values, strict=False))), *values[len(sections) :]


def run_config(argv: list[str], prog: str) -> RunConfig:
    """Return the job's settings from a command line."""
    about = (
        "Project the gradients of a corpus into a store, as one rank. For several ranks: torchrun "
        "--nproc_per_node=N -m gradproj.run. To resume, run the same command again; other values "
        "of flags that rows depend on are refused (gradproj/job/README.md lists them). Exit code "
        "0: this rank is done; 2: a user's error; 128 + N: stopped by signal N (0 under torchrun); "
        "1: any other error."
    )
    return parse_run(argv, prog, description=about)[0]
