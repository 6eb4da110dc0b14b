"""Read a few documents before a job starts, to find a corpus that it cannot use."""

from gradproj.corpus.index import CorpusIndex
from gradproj.corpus.stream import read_documents
from gradproj.errors import CorpusError
from gradproj.formatting import count, escaped
from gradproj.job.unit_reader import UnitSettings

MAX_KINDS = 16
"""Kinds of tars from which documents are read. A kind is a set of endings of members' names."""
DOCUMENTS_AT_AN_END = 2


def check_documents(index: CorpusIndex, settings: UnitSettings) -> list[str]:
    """Read documents at both ends of the first, middle and last tar of each kind.

    Returns:
        A line for each kind of which none can be used.

    Raises:
        CorpusError: none can be used at all; names the first problem.
    """
    kinds: dict[tuple[str, ...], list[int]] = {}
    for number, tar in enumerate(index.tars):
        if tar.n_samples and tar.start_id < settings.layout.n_samples:
            kinds.setdefault(tuple(sorted(tar.members)), []).append(number)
    n_read, any_usable, first = 0, False, ""
    lines = []
    for numbers in list(kinds.values())[:MAX_KINDS]:
        chosen = {numbers[0], numbers[len(numbers) // 2], numbers[-1]}
        found = [_problems(index, number, settings) for number in sorted(chosen)]
        problems = [problem for of_tar in found for problem in of_tar]
        n_read += len(problems)
        bad = [problem for problem in problems if problem]
        any_usable |= len(bad) < len(problems)
        if bad and len(bad) == len(problems):
            tars = index.tars[numbers[0]].name
            tars += f" and {count(len(numbers) - 1, 'tar')} like it" if len(numbers) > 1 else ""
            lines.append(f"bad input     all {len(bad)} documents read of {tars}: {bad[0]}")
            first = first or bad[0]
    if first and not any_usable:
        raise CorpusError(
            f"none of the {n_read} documents read from the corpus can be used: {first}. A document "
            'is KEY.json with "text" or "input_ids", or KEY.txt; python -m gradproj prepare makes '
            "such tars"
        )
    return lines


def _problems(index: CorpusIndex, number: int, settings: UnitSettings) -> list[str]:
    """Return the problem of each document at the ends of a tar, empty for those without one."""
    tar = index.tars[number]
    stop = min(tar.start_id + tar.n_samples, settings.layout.n_samples)
    first_end = min(tar.start_id + DOCUMENTS_AT_AN_END, stop)
    last_end = max(first_end, stop - DOCUMENTS_AT_AN_END)
    problems = []
    for begin, end in ((tar.start_id, first_end), (last_end, stop)):
        for document in read_documents(index, begin, end, settings.limits):
            status, problem = settings.status_of(document)
            if status == "bad_input":
                key = escaped(document.key)
                problems.append(f"sample {document.sample_id} ({key} in {tar.path}): {problem}")
            elif status != "not_selected":
                problems.append("")
    return problems
