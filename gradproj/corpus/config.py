"""Which documents of which tars the job projects."""

from dataclasses import dataclass, field

from gradproj.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """The corpus and the part of it that is wanted. Part of the run's identity."""

    shards: str = field(
        metadata={
            "help": "WebDataset tars: a folder, a glob, braces, a list file, or a corpus index (.json)"
        }
    )
    domain_field: str = field(
        default="meta.pile_set_name", metadata={"help": "where a document names its domain, dotted"}
    )
    max_samples: int = field(
        default=0, metadata={"help": "project the first so many documents only; 0 = all"}
    )
    domains: str = field(
        default="", metadata={"help": 'only these domains, comma-separated: "Github,ArXiv"'}
    )
    allow_sparse: bool = field(
        default=False,
        metadata={
            "help": "accept the disk space that --domains wastes on a corpus not grouped by domain"
        },
    )

    def __post_init__(self) -> None:
        if not self.shards.strip():
            raise ConfigError(
                "--shards is empty; give a folder, a glob, braces or a list file of .tar files"
            )
        if self.max_samples < 0:
            raise ConfigError(f"--max_samples must be at least 0 (0 = all), got {self.max_samples}")

    @property
    def chosen_domains(self) -> tuple[str, ...]:
        """The names in ``domains``, stripped and sorted; empty = all."""
        return tuple(sorted({name.strip() for name in self.domains.split(",") if name.strip()}))
