"""The facts of tars that a scan is done with, kept so that a scan that was ended goes on."""

import time
from collections.abc import Sequence

import msgspec

from gradproj.corpus.tar.scan import TarFacts
from gradproj.storage.address import Location
from gradproj.storage.facts import ObjectFacts
from gradproj.storage.folders import read_or_none
from gradproj.storage.object_path import opened
from gradproj.storage.publish import replace

JOURNAL_SUFFIX = ".partial"
_SAVE_EVERY_S = 20.0
_FORMAT = "gradproj partial index 1"


class _Entry(msgspec.Struct):
    path: str
    version: ObjectFacts
    facts: TarFacts


class _Journal(msgspec.Struct):
    format: str
    domain_field: str
    entries: list[_Entry]


class ScanJournal:
    """A file or an object of the facts of scanned tars. ``place`` None keeps nothing.

    It is written at most every 20 seconds, so a short scan writes none.
    """

    def __init__(self, place: Location | None) -> None:
        self._place = place
        self._content = _Journal(_FORMAT, "", [])
        self._saved_s = time.monotonic()
        self._is_saved = False

    def scanned(
        self, paths: Sequence[Location], versions: Sequence[ObjectFacts], domain_field: str
    ) -> list[TarFacts | None]:
        """Return the facts of each tar that is now as it was scanned; None of the others."""
        self._content.domain_field = domain_field
        found = {}
        for entry in self._load(domain_field):
            found[entry.path, entry.version] = entry
        entries = [found.get((str(p), v)) for p, v in zip(paths, versions, strict=True)]
        self._content.entries = [entry for entry in entries if entry is not None]
        return [entry.facts if entry else None for entry in entries]

    def note(self, path: Location, version: ObjectFacts, facts: TarFacts) -> None:
        """Keep the facts of a tar."""
        self._content.entries.append(_Entry(str(path), version, facts))
        if self._place is not None and time.monotonic() - self._saved_s > _SAVE_EVERY_S:
            replace(opened(self._place), [msgspec.json.encode(self._content)])
            self._saved_s, self._is_saved = time.monotonic(), True

    def discard(self) -> None:
        """Delete the journal; its index is written."""
        if self._is_saved and self._place is not None:
            opened(self._place).unlink(missing_ok=True)

    def _load(self, domain_field: str) -> list[_Entry]:
        data = None if self._place is None else read_or_none(opened(self._place))
        self._is_saved = data is not None
        try:
            journal = msgspec.json.decode(data or b"", type=_Journal)
        except msgspec.MsgspecError:
            return []
        same = journal.format == _FORMAT and journal.domain_field == domain_field
        return journal.entries if same else []
