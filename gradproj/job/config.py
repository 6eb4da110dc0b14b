"""The job's settings: each stage's frozen dataclass, in one."""

import dataclasses
import typing
from typing import Any

from gradproj.corpus.config import CorpusConfig
from gradproj.corpus.documents import ReadLimits
from gradproj.engine.batching import BatchConfig
from gradproj.engine.projection import ProjectionConfig
from gradproj.flags import flag_of, in_words, parse
from gradproj.job.job_config import JobConfig
from gradproj.model.checkpoint import ModelConfig
from gradproj.store.layout import StoreConfig

__all__ = ["RunConfig", "flag_of", "parse", "run_config"]


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
