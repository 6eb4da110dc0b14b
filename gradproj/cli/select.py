"""``python -m gradproj select``: write the documents that score highest for queries.

``query`` writes all scores to a temporary file beside ``--to``; rank 0 chooses from it and writes
the documents. Everything is in one work folder until one rename publishes it, so a selection is
whole or not there.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gradproj.analysis.row_blocks import scan_world
from gradproj.cli.query import Answer, query, stop_signals
from gradproj.cli.query.table import summary_lines
from gradproj.cli.score_args import check_has_rows, matching_layers, print_note
from gradproj.cli.select_config import IDS, LINES, SelectConfig
from gradproj.corpus.tar.writer import check_output, published
from gradproj.distributed import Process, process_group, report_errors_from_rank_0
from gradproj.errors import ConfigError
from gradproj.flags import parse
from gradproj.formatting import bounded, clean, count
from gradproj.job.recorded import recorded_index
from gradproj.selection.diverse import cosines_of, diverse
from gradproj.selection.excluded import read_excluded
from gradproj.selection.picks import Picks, best, per_query, round_robin
from gradproj.selection.score_lists import (
    ScoreLists,
    Weights,
    allowed_documents,
    one_each,
    target_tokens,
)
from gradproj.selection.writing import write_ids, write_lines, write_tars
from gradproj.storage.object_path import path_of
from gradproj.store import ProjectionStore
from gradproj.store.layer_view import Sample

_DOMAINS_SHOWN, _LISTS_SHOWN = 10, 10
_AT_ONCE = 2**18


@dataclass(frozen=True)
class Selection:
    """The documents that were selected, and the answer that they come from."""

    picks: Picks
    answer: Answer
    n_allowed: int
    """Documents that might have been selected."""
    n_tokens: int
    """Target tokens of the selection."""
    domains: dict[str, int]
    """Selected documents of each domain, most first."""
    n_tars: int = 0


def select_command(argv: list[str]) -> None:
    """``python -m gradproj select OUTPUT ...``, or under ``torchrun -m gradproj select``"""
    process = Process.from_environment()
    with report_errors_from_rank_0(process.rank):
        about = "Write the documents of a store that score highest for queries, best first."
        (config,) = parse(argv, "gradproj select", SelectConfig, description=about)
        config.apply()
        with stop_signals(process), process_group(process):
            selection = select(config, process)
    if selection is not None:
        print("\n".join(lines_of(config, selection)))


def select(config: SelectConfig, process: Process) -> Selection | None:
    """Score all documents, choose, and write; return the selection on rank 0.

    Memory: a byte for each document and 40 for each selected one. Disk, until the end: 4 bytes for
    each document and list of scores, and the selected documents once more.

    Raises:
        ConfigError: a flag that does not fit the store, or a file that cannot be read.
        StoreError: no store, a damaged one, or ``--to`` cannot be written or exists.
        CorpusError: the tars are not where the job found them, or have changed.
    """
    target = Path(os.path.realpath(config.to))
    is_file, given = config.form in (LINES, IDS), f"--to {config.to}"
    check_output(target, given, "select", is_file)
    world = scan_world(process.world_size > 1)
    with ProjectionStore(config.output) as store, ExitStack() as stack:
        check_has_rows(store)
        chooser = _Chooser.of(config, store) if process.rank == 0 else None
        if chooser is not None:
            stack.enter_context(published(config.to, "--to", "select", is_file))
        world.barrier()  # the work folder is there
        work = target.with_name(target.name + ".preparing")
        scores = work / "spools" / "scores.npy"
        answer = query(config.query_config(scores), process)
        if chooser is None:
            return None
        picks = chooser.choose(scores)
        scores.unlink()
        selection = _selection(store, picks, answer, chooser.n_allowed)
        return replace(selection, n_tars=_write(config, store, selection, work, target.name))


@dataclass(frozen=True)
class _Chooser:
    """Chooses documents by the rule of the flags."""

    config: SelectConfig
    store: ProjectionStore
    allowed: np.ndarray
    n_allowed: int
    budget: int
    pool: int

    @classmethod
    def of(cls, config: SelectConfig, store: ProjectionStore) -> "_Chooser":
        """Check, before the scan, what can be checked."""
        if config.form != IDS:
            recorded_index(path_of(config.output), config.shards)
        left_out = np.empty(0, np.int64)
        if config.not_in:
            left_out, n_unknown = read_excluded(Path(config.not_in), store)
            if n_unknown:
                print_note(f"--not_in: {count(n_unknown, 'key')} of no document of {store.path}")
        domains = config.query_config(Path("none")).domains_of(store)
        allowed = allowed_documents(store, domains, left_out)
        n_allowed = int(allowed.sum())
        budget = config.budget(n_allowed, store)
        pool = config.pool_size(budget, n_allowed) if config.diverse else 0
        return cls(config, store, allowed, n_allowed, budget, pool)

    def choose(self, scores: Path) -> Picks:
        config, store = self.config, self.store
        lists = ScoreLists(scores, self.allowed, config.bottom)
        weights = one_each if config.tokens is None else target_tokens(store)
        if config.diverse:
            picks = self._diverse(lists, weights)
        elif config.makes_lists:
            rule = per_query if config.per_query else round_robin
            picks = rule(lists, self.budget, weights)
        else:
            assert len(lists) == 1
            picks = best(lists, self.budget, weights)
        if not len(picks.chosen):
            raise ConfigError(f"--tokens {config.tokens:,}: the first document alone has more")
        return picks

    def _diverse(self, lists: ScoreLists, weights: Weights) -> Picks:
        pool = lists.first(0, self.pool)
        layers = matching_layers(self.config.layers, self.store)
        cosines = cosines_of(self.store, pool.ids, layers)
        costs = np.ones(len(pool), np.int64)
        if self.config.tokens is not None:
            costs = self.store.columns_at(["n_tokens"], pool.ids)["n_tokens"].astype(np.int64)
        places = diverse(pool, cosines, self.config.redundancy, costs, self.budget)
        if len(places) == len(pool) < self.n_allowed:
            raise ConfigError(
                f"--pool {len(pool):,} is used up before --tokens {self.budget:,}: give a larger "
                "--pool"
            )
        return Picks(pool[places], np.zeros(len(places), np.int64))


def _selection(store: ProjectionStore, picks: Picks, answer: Answer, n_allowed: int) -> Selection:
    n_tokens, counts = 0, np.zeros(len(store.domains) + 1, np.int64)
    for start in range(0, len(picks.chosen), _AT_ONCE):
        ids = picks.chosen.ids[start : start + _AT_ONCE]
        columns = store.columns_at(["n_tokens", "domain"], ids)
        store.check_domains(columns["domain"])
        n_tokens += int(columns["n_tokens"].sum(dtype=np.int64))
        counts += np.bincount(columns["domain"].astype(np.int64) + 1, minlength=len(counts))
    order = np.argsort(-counts[1:], kind="stable")
    domains = {store.domains[i]: int(counts[1 + i]) for i in order if counts[1 + i]}
    return Selection(picks, answer, n_allowed, n_tokens, domains)


def _write(
    config: SelectConfig, store: ProjectionStore, selection: Selection, work: Path, name: str
) -> int:
    """Write the selection into the work folder; return the number of tars."""
    picks, names = selection.picks, selection.answer.queries.names

    def record(place: int, sample: Sample) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "rank": place + 1,
            "score": float(f"{picks.chosen.scores[place]:.9g}"),
            "id": sample.sample_id,
            "key": sample.key,
            "domain": sample.domain,
            "n_tokens": sample.n_tokens,
        }
        if config.makes_lists:
            facts["query"] = names[picks.list_of[place]]
        return facts

    if config.form == IDS:
        write_ids(work / "tars" / name, picks)
        return 0
    index = recorded_index(path_of(config.output), config.shards)
    spool = work / "spools" / "documents"
    if config.form == LINES:
        if index.tokenization is not None:
            print_note(
                f"the lines hold token ids of {index.tokenization.name}, which a corpus made of "
                "them does not know: --to a folder of tars keeps that"
            )
        write_lines(work / "tars" / name, spool, picks, record, store, index)
        return 0
    n_per_tar = config.samples_per_shard
    return write_tars(work / "tars", spool, picks, record, store, index, n_per_tar)


def lines_of(config: SelectConfig, selection: Selection) -> Iterator[str]:
    """Yield lines that describe the scores and the selection."""
    picks, answer = selection.picks, selection.answer
    yield from summary_lines(answer)
    n, scores = len(picks.chosen), picks.chosen.scores
    end = "lowest" if config.bottom else "best"
    yield (
        f"selected {n:,} of {count(selection.n_allowed, 'document')} with "
        f"{selection.n_tokens:,} target tokens, the {end} first; scores {scores[0]:.4g} to "
        f"{scores[-1]:.4g}"
    )
    if config.makes_lists:
        counts = np.bincount(picks.list_of, minlength=len(answer.queries.names))
        shared = f"; {picks.n_shared:,} more choices of the same documents" * bool(picks.n_shared)
        yield f"queries  {len(counts):,}, of {counts.min():,} to {counts.max():,} documents{shared}"
    names = [f"{k:,} {clean(name)}" for name, k in selection.domains.items()]
    yield f"domains  {', '.join(bounded(names, _DOMAINS_SHOWN, 'and {:,} more'))}"
    tars = f" ({count(selection.n_tars, 'tar')})" if selection.n_tars else ""
    yield f"written  {config.to}{tars}"
