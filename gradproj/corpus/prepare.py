"""Convert documents of any input to WebDataset tars, in order, all of them or none.

``sources`` reads inputs, ``packing`` converts a record to a document, ``tar.writer`` writes and
publishes tars. Equal inputs and settings give equal bytes.
"""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gradproj.corpus.config import FIELD_REQUIRED, CorpusConfig
from gradproj.corpus.content import FIELDS
from gradproj.corpus.documents import UNKNOWN_DOMAIN
from gradproj.corpus.inputs.records import InputReader, TokenRules
from gradproj.corpus.inputs.tokens import TOKEN_DTYPES, TOKEN_INPUTS
from gradproj.corpus.packing import BadRecordError, PackedDocument, pack
from gradproj.corpus.sources import check_input, input_bytes, read_records, source_kind
from gradproj.corpus.tar.scan import MAX_DOMAINS
from gradproj.corpus.tar.writer import DomainSpools, TarSequence, published
from gradproj.errors import ConfigError, CorpusError
from gradproj.flags import Flags, as_in, flag
from gradproj.formatting import bounded

MAX_BAD_EXAMPLES, MAX_DOMAINS_SHOWN = 10, 30
BAR_INTERVAL_S, PLAIN_INTERVAL_S = 0.5, 10.0


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(Flags, title="tars"):
    """The inputs and how their documents are packed."""

    inputs: tuple[str, ...] = flag(
        "Documents, read in the order given: files of JSON lines (.jsonl, .ndjson or .json, "
        "perhaps with .gz, .bz2, .xz, .zst or .zstd), .parquet or .arrow, of token ids (.bin with "
        "or without .idx, .npy, .ds), - for JSON lines on standard input, "
        "hf:NAME[@CONFIG][:SPLIT] (also a local directory), a directory that save_to_disk wrote, "
        "or stdlib: (this Python's library).",
        name="INPUT",
        positional=True,
        path="FILE",
        streams=True,
        required="name at least one file, hf:NAME or stdlib:",
    )
    output_dir: str = flag(
        "Directory for the tars; new or empty.",
        required="name a folder for the tars",
        path="DIR",
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
        "Type of the numbers in flat files of token ids without a header.",
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


@dataclass(frozen=True)
class PrepareReport:
    """Counts of what ``prepare`` wrote and left out."""

    n_samples: int
    n_bad: int
    n_tars: int
    domain_field: str
    domains: dict[str, int]
    """Samples of each domain, in order of first appearance."""
    bad_examples: tuple[str, ...]
    """The first few reasons, each with its input and line."""

    def summary(self) -> str:
        """Return lines for a person: counts, the largest domains, what was left out."""
        lines = [
            f"{self.n_samples:,} documents of {len(self.domains):,} domains "
            f"in {self.n_tars:,} tars",
            *domain_lines(self.domains, self.domain_field),
        ]
        if self.n_bad:
            lines.append(
                f"{self.n_bad:,} bad inputs were left out; the first {len(self.bad_examples)}:"
            )
            lines += [f"  {example}" for example in self.bad_examples]
        return "\n".join(lines)


def domain_lines(counts: Mapping[str, int], domain_field: str) -> list[str]:
    """Return a line for each of the largest domains, and one for the rest."""
    if set(counts) == {UNKNOWN_DOMAIN}:
        missing = f"no document names a domain in the field {domain_field} (--domain_field)"
        return [f"  {counts[UNKNOWN_DOMAIN]:>12,}  {UNKNOWN_DOMAIN}: {missing}"]
    items = sorted(counts.items(), key=lambda item: -item[1])
    lines = [f"  {n:>12,}  {name}" for name, n in items]
    return bounded(lines, MAX_DOMAINS_SHOWN, "  and {:,} smaller domains")


def prepare(config: PrepareConfig, *, progress: bool = True) -> PrepareReport:
    """Write the inputs' documents as WebDataset tars into ``config.output_dir``.

    Memory use is a few documents and a counter per domain, whatever the size of the input.

    Args:
        config: the inputs and how their documents are packed.
        progress: show progress on standard error: a bar on a terminal, else a line every 10 s.

    Raises:
        ConfigError: an input is of no known kind.
        CorpusError: an input is missing, damaged or empty, or has a bad line. Nothing is published.
        StoreError: the output directory is not empty or cannot be written.
    """
    for location in config.inputs:
        check_input(location)
    with published(config.output_dir) as work:
        reader = _Documents(config, progress)
        tars = TarSequence(work / "tars", config.samples_per_shard)
        if config.group_by_domain:
            _write_grouped(reader, tars, work / "spools", progress)
        else:
            for document in reader:
                tars.add(document.members)
        tars.end_tar()
        if not tars.n_samples:
            first = (
                f"; the first of {reader.n_bad:,} bad inputs: {reader.bad[0]}" if reader.bad else ""
            )
            raise CorpusError(f"no document in {', '.join(config.inputs)}{first}")
    return PrepareReport(
        tars.n_samples,
        reader.n_bad,
        tars.n_tars,
        config.domain_field,
        reader.domains,
        tuple(reader.bad),
    )


# ---- Reading


class _Documents:
    """Iterates over the documents of all inputs and counts domains and bad records."""

    def __init__(self, config: PrepareConfig, progress: bool) -> None:
        self.config = config
        self.domains: dict[str, int] = {}
        self.n_bad = 0
        self.bad: list[str] = []
        self._progress = progress

    def __iter__(self) -> Iterator[PackedDocument]:
        sizes = [input_bytes(location) for location in self.config.inputs]
        file_sizes = [size for size in sizes if size is not None]
        total = sum(file_sizes) if len(file_sizes) == len(sizes) else None
        before = 0
        with closing(_Progress("prepare", total, self._progress)) as progress:
            for location, size in zip(self.config.inputs, sizes, strict=True):
                text_field, domain_field = self.config.text_field, self.config.domain_field
                if location == "stdlib:":
                    # These records have fixed fields, whatever the other inputs call theirs.
                    text_field, domain_field = "text", "meta.pile_set_name"
                roots = {
                    name for f in (text_field, domain_field) for name in (f, f.partition(".")[0])
                }
                names = (*sorted(roots), "meta", *FIELDS)
                reader = InputReader(location, names, self.config.token_rules)
                for record in read_records(reader):
                    try:
                        document = pack(record, text_field, domain_field)
                    except BadRecordError as error:
                        self._take_bad(f"{location}, {record.place}: {error}")
                        continue
                    self._count(document.domain)
                    yield document
                    progress.step(document.n_bytes, before + reader.position())
                before += size or 0

    def _take_bad(self, message: str) -> None:
        if self.config.on_bad_input == "error":
            raise CorpusError(
                f"{message}. Fix it, or leave such lines out with --on_bad_input skip"
            )
        self.n_bad += 1
        if len(self.bad) < MAX_BAD_EXAMPLES:
            self.bad.append(message)

    def _count(self, domain: str) -> None:
        if domain not in self.domains and len(self.domains) == MAX_DOMAINS:
            few = ", ".join(repr(name) for name in list(self.domains)[:3])
            raise CorpusError(
                f"--domain_field {self.config.domain_field} has more than {MAX_DOMAINS:,} "
                f"different values ({few}, ...), the most a store can hold; name a field with "
                "fewer, such as a source"
            )
        self.domains[domain] = self.domains.get(domain, 0) + 1


class _Progress:
    """Shows documents, MB and the fraction done on standard error."""

    def __init__(self, label: str, total_bytes: int | None, enabled: bool) -> None:
        self.label, self.total_bytes = label, total_bytes
        self.n_samples = self.n_bytes = 0
        terminal = enabled and sys.stderr.isatty()
        self._bar: Any = None
        self._interval_s = PLAIN_INTERVAL_S if enabled else float("inf")
        if terminal:
            self._interval_s = BAR_INTERVAL_S
            self._bar = tqdm(total=total_bytes, unit="B", unit_scale=True, desc=label)
        self._updated_s = self._start_s = time.monotonic()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def step(self, n_bytes: int, position: int) -> None:
        """Count one document of ``n_bytes``; ``position`` is the input bytes read so far."""
        self.n_samples += 1
        self.n_bytes += n_bytes
        now_s = time.monotonic()
        if now_s - self._updated_s < self._interval_s:
            return
        self._updated_s = now_s
        if self._bar is None:
            share = f", {100 * position / self.total_bytes:.1f} % done" if self.total_bytes else ""
            rate = self.n_samples / (now_s - self._start_s)
            print(
                f"{self.label}: {self._counts()}{share}, {rate:,.0f} documents/s",
                file=sys.stderr,
                flush=True,
            )
        else:
            self._bar.set_postfix_str(self._counts(), refresh=False)
            self._bar.update((position if self.total_bytes else self.n_bytes) - self._bar.n)

    def _counts(self) -> str:
        return f"{self.n_samples:,} documents, {self.n_bytes / 1e6:,.1f} MB"


def _write_grouped(reader: _Documents, tars: TarSequence, folder: Path, progress: bool) -> None:
    spools = DomainSpools(folder)
    for document in reader:
        spools.add(document)
    with closing(_Progress("group by domain", spools.n_bytes, progress)) as bar:
        for documents in spools.drain():
            for members in documents:
                tars.add(members)
                n_bytes = sum(map(len, members.values()))
                bar.step(n_bytes, bar.n_bytes + n_bytes)
            tars.end_tar()
