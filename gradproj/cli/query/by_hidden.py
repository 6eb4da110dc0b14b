"""Rankings by hidden states, in stores that have them."""

import sys
from collections.abc import Callable

from gradproj.analysis.hidden_scores import hidden_stream
from gradproj.analysis.ranking import Ranking
from gradproj.analysis.row_blocks import scan_world
from gradproj.analysis.scan import ScanOptions
from gradproj.cli.query.asked import query_rows
from gradproj.cli.query.config import QueryConfig
from gradproj.cli.query.ranked import Ranked, scores_path
from gradproj.cli.query.rescore import SecondStage
from gradproj.cli.query.text import text_scan
from gradproj.distributed import Process, choose_device
from gradproj.errors import ConfigError
from gradproj.query.hidden import HIDDEN
from gradproj.store import HiddenStates, ProjectionStore


def rank_by_hidden(
    config: QueryConfig,
    store: ProjectionStore,
    process: Process,
    n_ends: tuple[int, int],
    note: Callable[[str], None],
) -> Ranked:
    """Rank by the cosine of the hidden states of query and document, about their mean.

    Raises:
        StoreError: the store has none.
        ConfigError: the queries have none, or of another kind.
    """
    together = process.world_size > 1
    device, warning = choose_device(config.device, process.local_rank)
    if warning:
        note(warning)
    with HiddenStates(store.path) as hidden:
        second = SecondStage.of(config, store, None)
        found = query_rows(config, store, note) if process.rank == 0 else None
        queries = scan_world(together).broadcast(found)
        if queries.hidden is None:
            raise ConfigError(
                f"--query_store {config.query_store} has no hidden states of the kind of "
                f"{store.path}: make it with the same --hidden_state, or give --queries"
            )
        index = second.text_index if second else None
        text = text_scan(config, store, process, note, index) if config.uses_text else None
        options: ScanOptions = {"layers": None, "domains": config.domains_of(store)}
        options["device"] = device
        path = scores_path(config, len(queries.names), len(store), note)
        progress = sys.stderr.isatty()
        how = options["domains"], device, together, progress
        stream = hidden_stream(hidden, queries.hidden, *how)
        ranking = Ranking(None, *stream.ends(*n_ends, path))
    return Ranked(HIDDEN, options, None, queries, [ranking], second, text)
