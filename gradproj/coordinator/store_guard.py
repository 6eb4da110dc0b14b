"""Whether OUTPUT still holds the store that this process began with.

A user may delete OUTPUT, and begin another store under its name, while an old process still lives: one that stood
still, or a job that was forgotten. Nothing of it may come into the other store.
"""

from pathlib import Path

from gradproj.errors import StoreError
from gradproj.store.layout import STORE_NAME
from gradproj.store.metadata import WhichStore

SHARDS = f"{STORE_NAME}/projections"

_AFTER_A_LOSS = {
    "units": "Put it back and start again; without it, every unit is computed again.",
    "claims": "Start again: what was committed is kept.",
    "partial": "Start again: what was committed is kept.",
    STORE_NAME: "Put it back and start again; if it is lost, delete the folder and begin anew.",
    SHARDS: "Put it back and start again; if it is lost, delete the folder and begin anew.",
}
"""What a commit needs in OUTPUT -> the way out once it has been deleted."""


class StoreReplaced(StoreError):
    """OUTPUT holds another store than at the job's start. Nothing may be written into it, not even this."""


class StoreGuard:
    """Remembers which store a process works on, from the first time that it sees one.

    Args:
        output: OUTPUT.
        identity: hash of this process's settings.
    """

    def __init__(self, output: Path, identity: str) -> None:
        self._output, self._identity = output, identity
        self._which = WhichStore(output / STORE_NAME)
        self._ours: tuple[object, object] | None = None
        self.check()

    def check(self) -> None:
        """Whether the store is the one that it was.

        Raises:
            Replaced: it is another one, of whatever settings.
            StoreError: it is gone.
        """
        now = self._which()
        if now is None:
            if self._ours is not None:
                raise self._deleted(STORE_NAME)
            return  # not made yet
        if now[0] is not None and now[0] != self._identity:
            raise self._replaced("another store, of other settings")
        if self._ours is None:
            self._ours = now
        if now != self._ours:
            raise self._replaced("a new store of the same settings")

    def check_folders(self) -> None:
        """As ``check``; and whether all folders are there without which a file cannot be found.

        Raises:
            StoreError: one has been deleted.
        """
        self.check()
        for folder in _AFTER_A_LOSS:
            if not (self._output / folder).is_dir():
                raise self._deleted(folder)

    def _replaced(self, what: str) -> StoreReplaced:
        return StoreReplaced(
            f"{self._output} was replaced while this job ran: it holds {what} now. Nothing of this job was written "
            "into it. To go on with that store, start again with its settings; else give --output_dir a new path."
        )

    def _deleted(self, folder: str) -> StoreError:
        if not self._output.is_dir():
            return StoreError(
                f"{self._output} was deleted while this job ran, with all that it held. Put it back and start again; "
                "if it is lost, start again to begin anew."
            )
        return StoreError(
            f"{self._output / folder} was deleted while this job ran. {_AFTER_A_LOSS[folder]}"
        )
