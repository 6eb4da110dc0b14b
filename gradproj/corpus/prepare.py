"""Convert documents of any input to WebDataset tars, in order, all of them or none.

``sources`` reads inputs, ``packing`` converts a record to a document, ``tar.writer`` writes and
publishes tars. Equal inputs and settings give equal bytes.
"""

import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from gradproj.corpus.content import FIELDS
from gradproj.corpus.documents import UNKNOWN_DOMAIN
from gradproj.corpus.inputs.records import InputReader
from gradproj.corpus.packing import BadRecordError, PackedDocument, pack
from gradproj.corpus.prepare_config import PrepareConfig
from gradproj.corpus.sources import check_input, input_bytes, read_records
from gradproj.corpus.tar.remote_writer import tars_published
from gradproj.corpus.tar.scan import MAX_DOMAINS
from gradproj.corpus.tar.writer import DomainSpools, TarSequence
from gradproj.corpus.tokenization import Tokenization, write_tokenization
from gradproj.errors import CorpusError
from gradproj.formatting import bounded

MAX_BAD_EXAMPLES, MAX_DOMAINS_SHOWN = 10, 30
TOKENIZED_AT_ONCE, TOKENIZED_BYTES_AT_ONCE = 256, 1 << 20
BAR_INTERVAL_S, PLAIN_INTERVAL_S = 0.5, 10.0


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


Members = dict[str, bytes]
"""A sample's members in a tar, suffix -> content."""


class TokenizerAhead(Protocol):
    """Tokenizes the samples that ``prepare`` would write."""

    tokenization: Tokenization

    def __call__(self, batches: Iterator[list[Members]]) -> Iterator[list[Members | str]]:
        """Yield each batch with token ids in place of texts; a string is a sample's problem."""


def prepare(
    config: PrepareConfig, *, progress: bool = True, tokenizer: TokenizerAhead | None = None
) -> PrepareReport:
    """Write the inputs' documents as WebDataset tars into ``config.output_dir``.

    Memory use is a few documents and a counter per domain, whatever the size of the input.

    Args:
        config: the inputs and how their documents are packed.
        progress: show progress on standard error: a bar on a terminal, else a line every 10 s.
        tokenizer: writes token ids in place of texts.

    Raises:
        ConfigError: an input is of no known kind.
        CorpusError: an input is missing, damaged or empty, or has a bad line. Nothing is published.
        StoreError: the output directory is not empty or cannot be written.
    """
    for location in config.inputs:
        check_input(location, config.anonymous)
    with tars_published(config.output_dir) as (work, at_end):
        reader = _Documents(config, progress, tokenizer)
        tars = TarSequence(work / "tars", config.samples_per_shard, at_end)
        if config.group_by_domain:
            _write_grouped(reader, tars, work / "spools", progress)
        else:
            for document in reader:
                tars.add(document.members)
        tars.end_tar()
        if tokenizer is not None:
            write_tokenization(work / "tars", tokenizer.tokenization)
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


@dataclass(frozen=True, slots=True)
class _Sample:
    """A document on its way to a tar, or the problem with it."""

    place: str
    position: int
    """Bytes of the inputs read so far."""
    document: PackedDocument | None
    problem: str = ""


class _Documents:
    """Iterates over the documents of all inputs and counts domains and bad records."""

    def __init__(
        self, config: PrepareConfig, progress: bool, tokenizer: TokenizerAhead | None
    ) -> None:
        self.config, self._tokenizer = config, tokenizer
        self.domains: dict[str, int] = {}
        self.n_bad = 0
        self.bad: list[str] = []
        self._progress = progress

    def __iter__(self) -> Iterator[PackedDocument]:
        sizes = [input_bytes(each, self.config.anonymous) for each in self.config.inputs]
        file_sizes = [size for size in sizes if size is not None]
        total = sum(file_sizes) if len(file_sizes) == len(sizes) else None
        samples = self._samples(sizes)
        if self._tokenizer is not None:
            samples = _tokenized(samples, self._tokenizer)
        with closing(_Progress("prepare", total, self._progress)) as progress:
            for sample in samples:
                if sample.document is None:
                    self._take_bad(f"{sample.place}: {sample.problem}")
                    continue
                self._count(sample.document.domain)
                yield sample.document
                progress.step(sample.document.n_bytes, sample.position)

    def _samples(self, sizes: Sequence[int | None]) -> Iterator[_Sample]:
        """Read the inputs, of these sizes in bytes."""
        before = 0
        for location, size in zip(self.config.inputs, sizes, strict=True):
            text_field, domain_field = self.config.text_field, self.config.domain_field
            if location == "stdlib:":
                # These records have fixed fields, whatever the other inputs call theirs.
                text_field, domain_field = "text", "meta.pile_set_name"
            roots = {name for f in (text_field, domain_field) for name in (f, f.partition(".")[0])}
            names = (*sorted(roots), "meta", *FIELDS)
            reader = InputReader(
                location, names, self.config.token_rules, anonymous=self.config.anonymous
            )
            for record in read_records(reader):
                place = f"{location}, {record.place}"
                try:
                    document = pack(record, text_field, domain_field)
                except BadRecordError as error:
                    yield _Sample(place, before + reader.position(), None, str(error))
                else:
                    yield _Sample(place, before + reader.position(), document)
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


def _tokenized(samples: Iterable[_Sample], tokenizer: TokenizerAhead) -> Iterator[_Sample]:
    """Yield the samples in their order, with token ids in place of texts."""
    sent: deque[list[_Sample]] = deque()

    def batches() -> Iterator[list[Members]]:
        batch: list[_Sample] = []
        n_bytes = 0
        for sample in samples:
            batch.append(sample)
            n_bytes += sample.document.n_bytes if sample.document else 0
            if len(batch) == TOKENIZED_AT_ONCE or n_bytes > TOKENIZED_BYTES_AT_ONCE:
                sent.append(batch)
                yield [each.document.members for each in batch if each.document]
                batch, n_bytes = [], 0
        sent.append(batch)
        yield [each.document.members for each in batch if each.document]

    for results in tokenizer(batches()):
        left = iter(results)
        for sample in sent.popleft():
            if sample.document is None:
                yield sample
                continue
            result = next(left)
            if isinstance(result, str):
                yield replace(sample, document=None, problem=result)
            else:
                document = replace(sample.document, members=result)
                yield replace(sample, document=document)


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
