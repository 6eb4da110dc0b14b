"""The facts of tars that a scan is done with, kept so that a scan that was ended goes on."""

import time
from collections.abc import Sequence

import msgspec

from gradproj.corpus.tar.scan import TarFacts
from gradproj.files import write_and_replace
from gradproj.storage.address import Address, Location
from gradproj.storage.facts import ObjectFacts
from gradproj.storage.listing import delete_objects, read_object, write_object

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
            data = msgspec.json.encode(self._content)
            if isinstance(self._place, Address):
                write_object(self._place, data)
            else:
                write_and_replace(self._place, [data])
            self._saved_s, self._is_saved = time.monotonic(), True

    def discard(self) -> None:
        """Delete the journal; its index is written."""
        if not self._is_saved or self._place is None:
            return
        if isinstance(self._place, Address):
            delete_objects([self._place])
        else:
            self._place.unlink(missing_ok=True)

    def _load(self, domain_field: str) -> list[_Entry]:
        place = self._place
        if isinstance(place, Address):
            data = read_object(place)
        else:
            data = place.read_bytes() if place is not None and place.is_file() else None
        self._is_saved = data is not None
        try:
            journal = msgspec.json.decode(data or b"", type=_Journal)
        except msgspec.MsgspecError:
            return []
        same = journal.format == _FORMAT and journal.domain_field == domain_field
        return journal.entries if same else []
