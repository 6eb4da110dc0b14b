"""The job's settings: each stage's frozen dataclass, in one."""

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any

from gradproj.corpus.config import CorpusConfig
from gradproj.corpus.documents import ReadLimits
from gradproj.engine.batching import BatchConfig
from gradproj.engine.projection import ProjectionConfig
from gradproj.errors import ConfigError
from gradproj.flags import flag_of, in_words, parse
from gradproj.job.recorded_args import _check_device
from gradproj.model.config import ModelConfig
from gradproj.store.layout import StoreConfig

__all__ = ["RunConfig", "flag_of", "parse", "run_config"]


MOST_THREADS = 1024
"""Far above any machine's cores; OpenMP crashes at numbers beyond what the kernel allows."""


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """Settings of the job itself; none of them changes a row beyond rounding."""

    output_dir: str = field(
        metadata={"help": "folder of the store; started again on it, the job continues"}
    )
    device: str = field(
        default="auto",
        metadata={
            "help": "auto takes a GPU per rank where torch sees them",
            "choices": ("auto", "cpu", "cuda"),
        },
    )
    threads: int = field(
        default=0,
        metadata={"help": "CPU threads of a rank; 0 = torch's own choice (torchrun sets 1)"},
    )
    deterministic: bool = field(
        default=False,
        metadata={"help": "deterministic kernels on CUDA, for bitwise equal stores (slower)"},
    )
    gradient_checkpointing: bool = field(
        default=False,
        metadata={
            "help": "less memory for activations, a third more time: larger models and longer sequences fit"
        },
    )
    compile: bool = field(
        default=False,
        metadata={
            "help": "run the model's blocks through torch.compile (needs a C++ compiler; tens of seconds a rank at "
            "the start); rows are the same to rounding"
        },
    )
    proj_save_interval: int = field(
        default=0,
        metadata={
            "help": "save a unit's new rows to partial/ every so many batches; 0 = only when stopped"
        },
    )
    verbose: bool = field(default=False, metadata={"help": "log every batch to logs/"})

    def __post_init__(self) -> None:
        if not self.output_dir.strip():
            raise ConfigError("--output_dir is empty; give a folder")
        _check_device(self.device)
        if self.threads > MOST_THREADS:
            raise ConfigError(f"--threads must be at most {MOST_THREADS}, got {self.threads}")
        for name in ("threads", "proj_save_interval"):
            if getattr(self, name) < 0:
                raise ConfigError(f"--{name} must be at least 0, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything the job is told. Each stage is given its own part only."""

    corpus: CorpusConfig
    limits: ReadLimits
    model: ModelConfig
    projection: ProjectionConfig
    batch: BatchConfig
    store: StoreConfig
    job: JobConfig

    def as_flags(self) -> dict[str, Any]:
        """Flag -> value, flat: what ``run_config.json`` holds and ``--config`` takes back."""
        return {
            flag_of(f): in_words(f, getattr(section, f.name))
            for section in (getattr(self, s.name) for s in dataclasses.fields(self))
            for f in dataclasses.fields(section)
        }


def run_config(argv: list[str], prog: str) -> RunConfig:
    """The job's settings from a command line; the same flags for ``run`` and ``plan``."""
    sections = {f.name: typing.cast(type, f.type) for f in dataclasses.fields(RunConfig)}
    return RunConfig(**dict(zip(sections, parse(argv, prog, *sections.values()), strict=True)))
