"""Settings: which documents of which tars the job projects."""

from dataclasses import dataclass

from gradproj.flags import Flags, flag, split_list
from gradproj.storage.cache import FileCache, cache_of

SHARDS_REQUIRED = "give a folder, a glob, braces or a list file of .tar files"
FIELD_REQUIRED = "name a field, with dots to reach into objects"


@dataclass(frozen=True, kw_only=True)
class CorpusConfig(Flags, title="corpus"):
    """The corpus and the part of it to project. Part of the run's identity."""

    shards: str = flag(
        "WebDataset tars: a directory, a glob, braces, a list file, or a corpus index (.json), on "
        "disk or at an address (s3://, gs://, az://, https://, hf://datasets/OWNER/NAME@REVISION/).",
        required=SHARDS_REQUIRED,
        path="TARS",
        remote=True,
    )
    anonymous: bool = flag("Read tars of public buckets without credentials.", False)
    cache_dir: str = flag(
        "Folder on local disk for whole tars of web servers that send no parts of them.",
        "",
        path="DIR",
    )
    cache_gb: float = flag("GB that --cache_dir may take.", 100.0, above=0.0)
    domain_field: str = flag(
        "Field of a document's JSON that names its domain; dots reach into objects.",
        "meta.pile_set_name",
        required=FIELD_REQUIRED,
        metavar="FIELD",
    )
    max_samples: int = flag(
        "Number of documents to project, from the first on; 0 = all.", 0, minimum=0, why="0 = all"
    )
    domains: str = flag(
        r"Project the documents of these domains only. Write \, for a comma in a name.",
        "",
        comma_separated=True,
        metavar="NAME",
    )
    allow_sparse: bool = flag(
        "Accept the disk space that --domains wastes on a corpus not grouped by domain.", False
    )

    @property
    def cache(self) -> FileCache | None:
        """The cache of whole tars; None without ``cache_dir``."""
        return cache_of(self.cache_dir, self.cache_gb)

    @property
    def chosen_domains(self) -> tuple[str, ...]:
        """The names in ``domains``, sorted; empty = all."""
        return tuple(sorted(set(split_list(self.domains))))
