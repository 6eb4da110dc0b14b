"""Settings of ``prepare``: the inputs, and how their documents are packed."""

from dataclasses import dataclass

from gradproj.corpus.config import FIELD_REQUIRED, CorpusConfig
from gradproj.corpus.inputs.records import TokenRules
from gradproj.corpus.inputs.tokens import TOKEN_DTYPES, TOKEN_INPUTS
from gradproj.corpus.sources import source_kind
from gradproj.errors import ConfigError
from gradproj.flags import Flags, as_in, flag


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(Flags, title="tars"):
    """The inputs and how their documents are packed."""

    inputs: tuple[str, ...] = flag(
        "Documents, read in the order given: files of JSON lines (.jsonl, .ndjson or .json, "
        "perhaps with .gz, .bz2, .xz, .zst or .zstd), .parquet or .arrow, of token ids (.bin with "
        "or without .idx, .npy, .ds), - for JSON lines on standard input, "
        "hf:NAME[@CONFIG][:SPLIT] (also a local directory), a directory that save_to_disk wrote, "
        "or stdlib: (this Python's library). Files may lie at an address (s3://, gs://, az://, "
        "https://, hf://datasets/OWNER/NAME@REVISION/).",
        name="INPUT",
        positional=True,
        path="FILE",
        remote=True,
        streams=True,
        required="name at least one file, hf:NAME or stdlib:",
    )
    output_dir: str = flag(
        "Directory for the tars, on disk or in a bucket; new or empty.",
        required="name a folder for the tars",
        path="DIR",
        remote=True,
    )
    anonymous: bool = as_in(
        CorpusConfig, "anonymous", help="Read inputs of public buckets without credentials."
    )
    samples_per_shard: int = flag("Number of documents in a tar.", 10_000, minimum=1)
    text_field: str = flag(
        "Field of a record with its text; dots reach into objects.",
        "text",
        required=FIELD_REQUIRED,
        metavar="FIELD",
    )
    domain_field: str = as_in(
        CorpusConfig,
        "domain_field",
        help="Field of a record with its domain's name; without it the domain is 'unknown'.",
    )
    token_dtype: str = flag(
        "Type of the numbers of flat token ids without a header.",
        "",
        choices=TOKEN_DTYPES,
    )
    end_of_document: int | None = flag(
        "Token id that ends each document of a flat file of token ids (.bin, .npy, .ds).",
        None,
        minimum=0,
        metavar="ID",
    )
    start_of_document: int | None = flag(
        "Token id that begins each document of a flat file of token ids.",
        None,
        minimum=0,
        metavar="ID",
    )
    group_by_domain: bool = flag(
        "Make each domain one contiguous range of ids (needs twice the disk space).", False
    )
    on_bad_input: str = flag(
        "A record that cannot be used: stop (error), or count it and continue (skip).",
        "error",
        choices=("error", "skip"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds = {source_kind(location) for location in self.inputs}
        given = [
            f"--{name}"
            for name in ("token_dtype", "end_of_document", "start_of_document")
            if getattr(self, name) not in ("", None)
        ]
        if given and not kinds & TOKEN_INPUTS.keys():
            raise ConfigError(
                f"{given[0]}: none of the inputs is a file of token ids ({', '.join(TOKEN_INPUTS)})"
            )
        if len(given) > 1 and given[-2:] == ["--end_of_document", "--start_of_document"]:
            raise ConfigError("give --end_of_document or --start_of_document, not both")

    @property
    def token_rules(self) -> TokenRules:
        """Rules for flat files of token ids."""
        ends = self.end_of_document is not None
        boundary = self.end_of_document if ends else self.start_of_document
        return TokenRules(self.token_dtype, boundary, ends)
