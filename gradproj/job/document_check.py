"""Read a few documents before a job starts, to find a corpus that it cannot use."""

from gradproj.corpus.content import FORMS
from gradproj.corpus.index import CorpusIndex
from gradproj.corpus.stream import read_documents
from gradproj.errors import ConfigError, CorpusError
from gradproj.formatting import count, escaped
from gradproj.job.unit_reader import UnitReader
from gradproj.model.chat import NO_TEMPLATE

MAX_KINDS = 16
"""Kinds of tars from which documents are read. A kind is a set of endings of members' names."""
DOCUMENTS_AT_AN_END = 2
PLACES, DOCUMENTS_AT_A_PLACE = 64, 16
"""Documents that are read over the whole corpus before it is refused."""


def check_documents(index: CorpusIndex, reader: UnitReader) -> list[str]:
    """Read documents at both ends of the first, middle and last tar of each kind.

    Returns:
        A line for each kind of which some or none can be used.

    Raises:
        ConfigError: the documents of a kind are conversations, and there is no chat template.
        CorpusError: none of these can be used, nor any of about a thousand all over the corpus;
            names the first problem.
    """
    layout = reader.settings.layout
    kinds: dict[tuple[str, ...], list[int]] = {}
    for number, tar in enumerate(index.tars):
        if tar.n_samples and tar.start_id < layout.n_samples:
            kinds.setdefault(tuple(sorted(tar.members)), []).append(number)
    any_usable, first = False, ""
    lines = []
    for numbers in list(kinds.values())[:MAX_KINDS]:
        problems = []
        for number in sorted({numbers[0], numbers[len(numbers) // 2], numbers[-1]}):
            start = index.tars[number].start_id
            stop = min(start + index.tars[number].n_samples, layout.n_samples)
            first_end = min(start + DOCUMENTS_AT_AN_END, stop)
            problems += _problems(index, reader, start, first_end)
            problems += _problems(index, reader, max(first_end, stop - DOCUMENTS_AT_AN_END), stop)
        bad = [problem for problem in problems if problem]
        any_usable |= len(bad) < len(problems)
        if not bad:
            continue
        is_all = len(bad) == len(problems)
        if is_all and NO_TEMPLATE in bad[0]:
            raise ConfigError(bad[0])
        tars = index.tars[numbers[0]].name
        tars += f" and {count(len(numbers) - 1, 'tar')} like it" if len(numbers) > 1 else ""
        part = f"all {len(bad)}" if is_all else f"{len(bad)} of {len(problems)}"
        lines.append(f"bad input     {part} documents read of {tars}: {bad[0]}")
        first = first or bad[0]
    if first and not any_usable:
        _check_everywhere(index, reader, first)
    return lines


def _check_everywhere(index: CorpusIndex, reader: UnitReader, first: str) -> None:
    """Raise ``CorpusError`` with the ``first`` problem unless a usable document is found."""
    n_samples = reader.settings.layout.n_samples
    n_read = 0
    for part in range(PLACES):
        start, end = part * n_samples // PLACES, (part + 1) * n_samples // PLACES
        end = min(end, start + DOCUMENTS_AT_A_PLACE)
        problems = _problems(index, reader, start, end) if start < end else []
        n_read += len(problems)
        if not all(problems):
            return
    raise CorpusError(
        f"none of {n_read:,} documents read all over the corpus can be used: {first}. A document "
        f"is KEY.json with {FORMS}, KEY.txt or KEY.npy, with no dot in KEY (tar "
        "--transform renames members); python -m gradproj prepare makes such tars "
        "of JSON lines, Parquet and token files"
    )


def _problems(index: CorpusIndex, reader: UnitReader, start: int, stop: int) -> list[str]:
    """Return the problem of each selected document of a range, empty for those without one."""
    problems = []
    for document in read_documents(index, start, stop, reader.settings.limits):
        status, problem = reader.status_of(document)
        if status == "bad_input":
            where = f"{escaped(document.key)} in {index.tars[document.tar].path}"
            problems.append(f"sample {document.sample_id} ({where}): {problem}")
        elif status != "not_selected":
            problems.append("")
    return problems
