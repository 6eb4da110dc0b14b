"""Checks that the output directory still holds the store that this process began with.

A user may delete an output and begin another store under its name while an old process still runs:
one that hung, or a forgotten job. Nothing of that process may get into the new store.
"""

from pathlib import Path

from gradproj.errors import StoreError
from gradproj.storage.folders import has_folder
from gradproj.store.layout import CLAIMS_DIR, PARTIAL_DIR, STORE_NAME, UNITS_DIR
from gradproj.store.metadata import WhichStore

_START_AGAIN = "Start again: what was committed is kept."
_RESTORE_OR_DELETE = "Restore it and start again; if it is lost, delete the output and start over."
_WAYS_OUT = {
    UNITS_DIR: "Restore it and start again; without it, every unit is computed again.",
    CLAIMS_DIR: _START_AGAIN,
    PARTIAL_DIR: _START_AGAIN,
    STORE_NAME: _RESTORE_OR_DELETE,
    f"{STORE_NAME}/projections": _RESTORE_OR_DELETE,
}
"""Directory that a commit needs in the output -> what to do once it was deleted."""


class StoreReplaced(StoreError):
    """The output holds another store than at the job's start.

    Nothing may be written into it, not even a note of this error.
    """


class StoreGuard:
    """Remembers which store a process works on, from the first time it sees one."""

    def __init__(self, output: Path, identity: str) -> None:
        self._output, self._identity = output, identity
        self._read_identity = WhichStore(output / STORE_NAME)
        self._ours: tuple[object, object] | None = None
        self.check()

    def check(self) -> None:
        """Check that the store is still the same one. Passes if there was none yet.

        Raises:
            StoreReplaced: it is another one, with whatever settings.
            StoreError: it was deleted.
        """
        now = self._read_identity()
        if now is None:
            if self._ours is not None:
                raise self._deleted(STORE_NAME)
            return
        if now[0] is not None and now[0] != self._identity:
            raise self._replaced("a store with other settings")
        if self._ours is None:
            self._ours = now
        if now != self._ours:
            raise self._replaced("a new store with the same settings")

    def check_folders(self) -> None:
        """Call ``check``, and check that the directories a commit needs exist.

        Raises:
            StoreReplaced: the store is another one.
            StoreError: one was deleted.
        """
        self.check()
        for folder in _WAYS_OUT:
            if not has_folder(self._output / folder):
                raise self._deleted(folder)

    def _replaced(self, what: str) -> StoreReplaced:
        return StoreReplaced(
            f"{self._output} was replaced while this job ran: it now holds {what}. This job wrote "
            "nothing into it. To continue that store, start again with its settings; otherwise "
            "give --output_dir a new path."
        )

    def _deleted(self, folder: str) -> StoreError:
        if not self._output.exists():
            return StoreError(
                f"{self._output} was deleted while this job ran, with everything in it. Restore "
                "it and start again; if it is lost, start over."
            )
        path = self._output / folder
        return StoreError(f"{path} was deleted while this job ran. {_WAYS_OUT[folder]}")
