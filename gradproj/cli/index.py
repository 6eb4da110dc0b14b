"""The command ``index``: builds the index of a corpus of tars."""

import time
from dataclasses import dataclass

from gradproj.corpus.config import SHARDS_REQUIRED, CorpusConfig
from gradproj.corpus.index import CorpusIndex, build_index
from gradproj.corpus.index_file import load_index_if_any, save_index
from gradproj.corpus.prepare import domain_lines
from gradproj.corpus.tar.paths import default_index_path, list_tars
from gradproj.corpus.tar.places import check_unchanged
from gradproj.corpus.tar.scan_journal import JOURNAL_SUFFIX, ScanJournal
from gradproj.errors import ConfigError, CorpusError
from gradproj.flags import Flags, as_in, flag, parse
from gradproj.storage.address import Address, Location, parse_location


@dataclass(frozen=True, kw_only=True)
class IndexConfig(Flags, title="index"):
    """Which tars to index, and where to write the index."""

    shards: tuple[str, ...] = flag(
        "A directory, a glob or braces (quoted), a list file, or one tar; on disk or at an address "
        "(s3://, gs://, az://, https://, hf://).",
        name="SHARDS",
        positional=True,
        path="TARS",
        remote=True,
    )
    anonymous: bool = as_in(CorpusConfig, "anonymous")
    domain_field: str = as_in(CorpusConfig, "domain_field")
    index_file: str = flag(
        "File of the index; default: corpus.json beside the tars.",
        "",
        renamed_from="output",
        path="FILE",
        remote=True,
    )
    processes: int = flag(
        "Tars scanned at once; 0 = one per CPU.", 0, minimum=0, why="0 = one per CPU"
    )
    replace: bool = flag("Scan again and replace an index of another corpus.", False)

    def __post_init__(self) -> None:
        if len(self.shards) > 1:
            raise ConfigError(
                f"SHARDS: {len(self.shards):,} were given; quote the pattern so that the shell "
                "leaves it alone (index 'tars/*.tar'), or name the folder"
            )
        if not self.shards[0].strip():
            raise ConfigError(f"SHARDS is empty; {SHARDS_REQUIRED}")
        super().__post_init__()


def index_command(argv: list[str]) -> None:
    """Build the index of a corpus, unless there is one that is up to date."""
    (config,) = parse(
        argv, "gradproj index", IndexConfig, description="Build the index of a corpus of tars."
    )
    shards, started = config.shards[0], time.monotonic()
    paths = list_tars(shards, "SHARDS", config.anonymous)
    path = _index_path(config, paths)
    existing = None if config.replace else _load_existing(path)
    if existing is not None and _is_up_to_date(existing, paths, config.domain_field):
        print(f"{path} is up to date: no tar has changed since (--replace scans them again)")
        _print_index(existing)
        return
    journal = ScanJournal(path.with_name(path.name + JOURNAL_SUFFIX))
    index = build_index(
        paths,
        domain_field=config.domain_field,
        processes=config.processes or None,
        journal=journal,
    )
    if existing is not None and existing.fingerprint != index.fingerprint:
        raise CorpusError(
            f"{path} is the index of another corpus: {_summary(existing)}; these are "
            f"{_summary(index)}. Outputs made with the old index cannot be resumed with a new one. "
            "Give --replace to replace the index, or --index_file to keep both"
        )
    # Without an index of the same documents or --replace, the first of several builders wins.
    save_index(index, path, replace_existing=existing is not None or config.replace)
    journal.discard()
    print(f"{path} {'renewed: same corpus, touched or moved' if existing else 'written'}")
    _print_index(index, time.monotonic() - started)


def _index_path(config: IndexConfig, tars: list[Location]) -> Location:
    if config.index_file:
        return parse_location(config.index_file)
    path = default_index_path(tars)
    if path is None or (isinstance(path, Address) and not path.is_writable):
        why = "lie in several folders" if path is None else f"lie where none is written ({path})"
        raise ConfigError(f"--index_file must be given: the tars {why}; name a file for the index")
    return path


def _load_existing(path: Location) -> CorpusIndex | None:
    try:
        return load_index_if_any(path)
    except CorpusError as error:
        raise CorpusError(f"{error} --replace (or name another file with --index_file)") from error


def _is_up_to_date(index: CorpusIndex, paths: list[Location], domain_field: str) -> bool:
    """Return True if an index covers exactly these tars and none was written since."""
    if index.domain_field != domain_field or [tar.path for tar in index.tars] != paths:
        return False
    try:
        check_unchanged(*index.tars)
    except CorpusError:
        return False
    return True


def _summary(index: CorpusIndex) -> str:
    return (
        f"{len(index.tars):,} tars, {index.n_samples:,} documents, fingerprint {index.fingerprint}"
    )


def _print_index(index: CorpusIndex, seconds: float | None = None) -> None:
    n_bytes = sum(tar.size_bytes for tar in index.tars)
    took = (
        ""
        if seconds is None
        else f" in {seconds:.1f} s ({index.n_samples / max(seconds, 1e-9):,.0f} a second)"
    )
    print(f"tars          {len(index.tars):,}, {n_bytes / 1e6:,.1f} MB")
    print(f"documents     {index.n_samples:,}{took}")
    for line in index.unread_lines():
        print(line)
    print(f"domains       {len(index.domains):,} by {index.domain_field}")
    print("\n".join(domain_lines(index.domain_counts(), index.domain_field)))
    print(f"fingerprint   {index.fingerprint}")
