"""Rankings by hidden states, in stores that have them."""

import sys

from gradproj.analysis.hidden_scores import hidden_stream
from gradproj.analysis.row_blocks import scan_world
from gradproj.analysis.scan import ScanOptions
from gradproj.cli.query.asked import ask
from gradproj.cli.query.ranked import Ranked, collect
from gradproj.cli.query.rescore import SecondStage
from gradproj.cli.query.session import Question
from gradproj.cli.query.text import text_scan
from gradproj.distributed import choose_device
from gradproj.errors import ConfigError
from gradproj.query.hidden import HIDDEN
from gradproj.store import HiddenStates


def rank_by_hidden(question: Question) -> Ranked:
    """Rank by the cosine of the hidden states of query and document, about their mean.

    Raises:
        StoreError: the store has none.
        ConfigError: the queries have none, or of another kind.
    """
    config, store, process = question.config, question.store, question.process
    together = question.together
    device, warning = choose_device(config.device, process.local_rank)
    if warning:
        question.note(warning)
    with HiddenStates(store.path) as hidden:
        second = SecondStage.of(config, store, None)
        of_rank_0 = ask(question) if process.rank == 0 else None
        asked = scan_world(together).broadcast(of_rank_0)
        if asked.rows.hidden is None:
            raise ConfigError(
                f"--query_store {config.query_store} has no hidden states of the kind of "
                f"{store.path}: make it with the same --hidden_state, or give --queries"
            )
        question.begins(asked.subjects, None)
        index = second.text_index if second else None
        text = text_scan(question, index) if config.uses_text else None
        domains, sets = config.domains_of(store), asked.sets
        progress = sys.stderr.isatty()
        stream = hidden_stream(hidden, asked.rows.hidden, domains, device, together, progress, sets)
        found = collect(question, stream)
    options: ScanOptions = {"layers": None, "domains": domains, "device": device, "sets": sets}
    return Ranked(HIDDEN, options, None, asked, *found, second, text)
