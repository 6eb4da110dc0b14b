"""The commands around the job: from flags to the functions that do the work, and what they tell a person."""

import json
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gradproj.corpus.prepare import PrepareConfig
from gradproj.errors import ConfigError, CorpusError, StoreError
from gradproj.flags import parse

MOST_DOMAINS_SHOWN = 30


# --- the corpus ---


@dataclass(frozen=True, kw_only=True)
class PrepareFlags(PrepareConfig):
    """``PrepareConfig`` with its inputs as ``INPUT...`` rather than a flag."""

    inputs: tuple[str, ...] = field(
        metadata={
            **PrepareConfig.__dataclass_fields__["inputs"].metadata,
            "flag": "INPUT",
            "positional": True,
        }
    )


def prepare_command(argv: list[str]) -> None:
    """``python -m gradproj prepare INPUT... --output_dir DIR``"""
    from gradproj.corpus.prepare import prepare

    (config,) = parse(
        argv, "gradproj prepare", PrepareFlags, description="Documents to WebDataset tars."
    )
    started = time.monotonic()
    report = prepare(config)
    print(f"{report.summary()}\nin {time.monotonic() - started:.1f} s, to {config.output_dir}")


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """Which tars to index and where to."""

    shards: tuple[str, ...] = field(
        metadata={
            "flag": "SHARDS",
            "positional": True,
            "help": "a folder, a glob or braces (quoted), a list file, or one tar",
        }
    )
    domain_field: str = field(
        default="meta.pile_set_name", metadata={"help": "where a document names its domain, dotted"}
    )
    output: str = field(
        default="", metadata={"help": "the index; default: corpus.json beside the tars"}
    )
    processes: int = field(default=0, metadata={"help": "tars scanned at once; 0 = one per CPU"})
    replace: bool = field(
        default=False,
        metadata={"help": "scan again and put the index in the place of one of another corpus"},
    )

    def __post_init__(self) -> None:
        if len(self.shards) > 1:
            raise ConfigError(
                f"SHARDS: {len(self.shards):,} were given; quote the pattern so that the shell leaves it alone "
                "(index 'tars/*.tar'), or name the folder"
            )
        if not self.shards[0].strip():
            raise ConfigError(
                "SHARDS is empty; give a folder, a glob, braces or a list file of .tar files"
            )
        if not self.domain_field:
            raise ConfigError(
                "--domain_field is empty; name a field, with dots to reach into objects"
            )
        if self.processes < 0:
            raise ConfigError(
                f"--processes must be at least 0 (0 = one per CPU), got {self.processes}"
            )


def index_command(argv: list[str]) -> None:
    """``python -m gradproj index SHARDS``: make the corpus index, or find that it still holds."""
    from gradproj.corpus.index import (
        CorpusIndex,
        build_index,
        default_index_path,
        list_tars,
        save_index,
    )

    (config,) = parse(
        argv, "gradproj index", IndexConfig, description="The frozen index of a corpus of tars."
    )
    shards, started = config.shards[0], time.monotonic()
    paths = list_tars(shards)
    path = Path(config.output) if config.output else default_index_path(shards)
    if path is None:
        raise ConfigError(
            "--output must be given: the tars lie in several folders; name a file for the index"
        )
    known: CorpusIndex | None = None if config.replace else _known_index(path)
    if known is not None and _still_holds(known, paths, config.domain_field):
        print(f"{path} is up to date: no tar has changed since (--replace scans them again)")
        _print_index(known)
        return
    index = build_index(paths, domain_field=config.domain_field, processes=config.processes or None)
    if known is not None and known.fingerprint != index.fingerprint:
        raise CorpusError(
            f"{path} is the index of another corpus: {_about(known)}; these are {_about(index)}. "
            "Outputs made with the old one cannot be continued with a new one. Give --replace to put the new index "
            "there, or --output to keep both"
        )
    # The same documents, or --replace; otherwise the first of several builders wins.
    save_index(index, path, replace_existing=known is not None or config.replace)
    print(f"{path} {'renewed: the same corpus, touched or moved' if known else 'written'}")
    _print_index(index, time.monotonic() - started)


def _known_index(path: Path):
    from gradproj.corpus.index import load_index

    if not path.exists():
        return None
    try:
        return load_index(path)
    except CorpusError as error:
        raise CorpusError(f"{error} --replace (or name another file with --output)") from error


def _still_holds(index, paths: list[Path], domain_field: str) -> bool:
    """Whether an index is of exactly these tars, none of which was written since."""
    from gradproj.corpus.index import check_unchanged

    if index.domain_field != domain_field or [tar.path for tar in index.tars] != paths:
        return False
    try:
        for tar in index.tars:
            check_unchanged(tar)
    except CorpusError:
        return False
    return True


def _about(index) -> str:
    return (
        f"{len(index.tars):,} tars, {index.n_samples:,} documents, fingerprint {index.fingerprint}"
    )


def _print_index(index, seconds: float | None = None) -> None:
    size = sum(tar.size_bytes for tar in index.tars)
    took = (
        ""
        if seconds is None
        else f" in {seconds:.1f} s ({index.n_samples / max(seconds, 1e-9):,.0f} a second)"
    )
    print(f"tars          {len(index.tars):,}, {size / 1e6:,.1f} MB")
    print(f"documents     {index.n_samples:,}{took}")
    counts = sorted(index.domain_counts().items(), key=lambda item: -item[1])
    print(f"domains       {len(counts):,} by {index.domain_field}")
    for name, n in counts[:MOST_DOMAINS_SHOWN]:
        print(f"  {n:>12,}  {name}")
    if len(counts) > MOST_DOMAINS_SHOWN:
        print(f"  and {len(counts) - MOST_DOMAINS_SHOWN:,} smaller domains")
    print(f"fingerprint   {index.fingerprint}")


# --- before the job ---


def plan_command(argv: list[str]) -> None:
    """``python -m gradproj plan`` with the job's flags: every check the job makes, and what it will take."""
    import numpy as np

    from gradproj.distributed import choose_device
    from gradproj.job.config import run_config
    from gradproj.job.plan import make_plan
    from gradproj.job.summary import plan_lines
    from gradproj.store.unit_record import list_records

    config = run_config(argv, "gradproj plan")
    device, warning = choose_device(config.job.device, 0)
    output = Path(config.job.output_dir)
    _check_writable(output)
    plan = make_plan(config)
    if warning:
        print(warning, file=sys.stderr, flush=True)
    n_recorded = len(np.intersect1d(plan.wanted, list_records(output / "units")))
    print("\n".join([*plan_lines(plan, n_recorded), f"device        {device}"]))


def _check_writable(output: Path) -> None:
    """Refuse a folder that could not be made or written to, without making it."""
    folder = output.absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise StoreError(f"--output_dir {output}: {folder} is a file; give a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StoreError(
            f"--output_dir {output}: {folder} is not writable for you; mend its permissions or choose another folder"
        )


# --- on an output ---


def status_command(argv: list[str]) -> int:
    """``python -m gradproj status OUTPUT``: exit code 0 complete, 3 not yet, 1 not and the last start failed."""
    from gradproj.maintenance.status import StatusConfig, status_of

    about = (
        "How far a store is, from any shell. Exit code 0: complete; 3: not yet; 1: not, and the last start ended with "
        "a mistake to be mended (failed.json); 2: no store there."
    )
    (config,) = parse(argv, "gradproj status", StatusConfig, description=about)
    return status_of(config)


def verify_command(argv: list[str]) -> int:
    """``python -m gradproj verify OUTPUT``: exit code 0 sound and complete, 3 sound but incomplete, 1 damaged."""
    from gradproj.maintenance.job_output import read_output
    from gradproj.maintenance.verify import VerifyConfig, verdict_lines, verification_lines, verify

    about = (
        "Every checksum of a store again, records against shards and columns. Exit code 0: sound and complete; "
        "3: sound, but incomplete; 1: damaged, or rows that come out otherwise; 2: no store there, or not its model. "
        "After --repair it is the state that the store is in then."
    )
    (config,) = parse(argv, "gradproj verify", VerifyConfig, description=about)
    found, parts = verify(config.output, checksums=config.checksums), {}
    _say(config, verification_lines(found) if config.checksums else [])
    if config.recompute:
        # Loads torch and transformers, which nothing else here needs.
        from gradproj.maintenance.recompute import recomputation_lines, recompute, wrong_rows

        again = recompute(config, config.recompute, config.seed, found.damaged_units)
        found.damage += wrong_rows(again, read_output(config.output))
        parts["recompute"] = asdict(again)
        _say(config, recomputation_lines(again))
    code = found.exit_code
    if config.repair:
        from gradproj.maintenance.repair import repair, repair_lines

        done = repair(found)
        code, parts["repair"] = done.exit_code, asdict(done)
        _say(config, repair_lines(done, "" if done.complete else _way_on(config.output)))
    else:
        _say(config, verdict_lines(found, checksums=config.checksums))
    if config.as_json:
        print(json.dumps({**asdict(found), **parts}, indent=2))
    return code


def _say(config: Any, lines: list[str]) -> None:
    if lines and not config.as_json:
        print("\n".join(lines), flush=True)


def _way_on(output: str) -> str:
    """What to start for the units that are missing."""
    try:
        from gradproj.job.recorded import job_command

        command = job_command(Path(output))
    except StoreError:
        return "run the job's command again"
    return f"run the job's command again, with any number of ranks, as in: {command}"


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Which output to merge."""

    output: str = field(
        metadata={"flag": "OUTPUT", "positional": True, "help": "the job's --output_dir"}
    )


def merge_command(argv: list[str]) -> None:
    """``python -m gradproj merge OUTPUT``: columns, sums and statistics from the records there are."""
    from gradproj.formatting import count, ranges_text
    from gradproj.job.summary import stats_lines
    from gradproj.maintenance.job_output import read_output
    from gradproj.maintenance.merge import merge_now

    about = "Columns, sums and statistics from the units that are committed; the job does it itself at its end."
    (config,) = parse(argv, "gradproj merge", MergeConfig, description=about)
    stats = merge_now(read_output(config.output))
    after = read_output(config.output)
    print(f"merged        {len(after.committed):,} of {count(len(after.wanted), 'unit')}")
    print("\n".join(stats_lines(stats)))
    if len(after.missing):
        documents = count(after.n_samples_in(after.missing), "document")
        print(
            f"missing       {count(len(after.missing), 'unit')}, {documents}: ids "
            f"{ranges_text(after.id_ranges(after.missing))}; run the job's command again to compute them"
        )


def export_command(argv: list[str]) -> None:
    """``python -m gradproj export OUTPUT --to DIR``: ok rows as the original system's files."""
    from gradproj.formatting import shown
    from gradproj.maintenance.export import ExportConfig, export_lines, plan_export, write_export
    from gradproj.store import ProjectionStore

    about = "Rows as the original system's .pt files: float32, ok rows only, with their sample ids."
    (config,) = parse(argv, "gradproj export", ExportConfig, description=about)
    with ProjectionStore(config.output) as store:
        export = plan_export(store, config)
        print("\n".join(export_lines(export, Path(config.to))), flush=True)
        files = write_export(store, config, export)
        for last in shown(files, export.n_files + 1, "export", "files"):
            path = last
    print(f"done; {path} says what the values are")
