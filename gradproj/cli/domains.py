"""``python -m gradproj domains``: what a store's domains have to do with each other, as a table, JSON and a figure."""

import io
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gradproj.cli.score_config import ScoreConfig
from gradproj.errors import ConfigError, StoreError
from gradproj.flags import parse
from gradproj.report.domain_figure import draw_domains, why_no_figure
from gradproj.report.domain_summary import DomainFacts, as_json, find_facts
from gradproj.report.domain_table import table_lines
from gradproj.report.folders import make_folder, write_answer
from gradproj.store import ProjectionStore

FORMATS = ("table", "json")
JSON_NAME, MEANS_NAME, FIGURE_NAME = "domains.json", "mean_rows.npy", "domains.png"


@dataclass(frozen=True, kw_only=True)
class DomainsConfig:
    """Which store, and where the answer goes."""

    output: str = field(
        metadata={"flag": "OUTPUT", "positional": True, "help": "the job's --output_dir"}
    )
    output_dir: str = field(
        default="", metadata={"help": "folder of the answer; default OUTPUT/domains"}
    )
    format: str = field(default="table", metadata={"help": "what is printed", "choices": FORMATS})

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ConfigError(f"--format is {self.format!r}; choose one of {', '.join(FORMATS)}")

    def folder(self, store: ProjectionStore) -> Path:
        """Where the answer goes."""
        return Path(self.output_dir) if self.output_dir else store.path.parent / "domains"


def domains_command(argv: list[str]) -> None:
    """``python -m gradproj domains OUTPUT``"""
    config, asked = parse(
        argv,
        "gradproj domains",
        DomainsConfig,
        ScoreConfig,
        description="Mean gradients, cosines and influences of a store's domains.",
    )
    for line in domains(config, asked):
        print(line)


def domains(config: DomainsConfig, asked: ScoreConfig) -> list[str]:
    """Compare the domains and write the files; what is to be printed.

    Raises:
        ConfigError: the store has no domains, or an unknown layer, or the score is no mean over pairs.
        StoreError: no store there, none of its rows is there yet, or the folder cannot be written.
    """
    with ProjectionStore(config.output) as store:
        how = {**asked.how_by_domain(store), "progress": sys.stderr.isatty()}
        facts = find_facts(store, asked.kept(store, how))
        if not facts.shown:
            raise StoreError(
                f"{store.path} has no row of any domain yet ({facts.counts.total('missing'):,} of {len(store):,} "
                "documents are still to be computed); start the job again on it"
            )
        content = as_json(facts, store, MEANS_NAME)
        folder = config.folder(store)
    written = _write(folder, content, facts)
    problem = why_no_figure()
    if problem is not None:
        print(f"gradproj: {problem}", file=sys.stderr, flush=True)
    if config.format == "json":
        return [json.dumps(content, indent=2, allow_nan=False)]
    return [*table_lines(facts), "", f"written    {', '.join(written)} in {folder}"]


def _write(folder: Path, content: dict[str, Any], facts: DomainFacts) -> list[str]:
    """The names of the files."""
    means = io.BytesIO()
    np.save(means, facts.matrix.mean.astype(np.float32))
    make_folder(folder, "--output_dir")
    write_answer(folder / MEANS_NAME, [means.getvalue()], "--output_dir")
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write_answer(folder / JSON_NAME, [text.encode()], "--output_dir")
    if why_no_figure() is not None:
        return [JSON_NAME, MEANS_NAME]
    draw_domains(facts, folder / FIGURE_NAME)
    return [JSON_NAME, MEANS_NAME, FIGURE_NAME]
