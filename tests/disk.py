"""A folder as a crash of the machine would leave it: what was not flushed is lost, torn, or there by luck."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from faults import before_each_change

Tree = dict[str, bytes | None]
"""Path -> content; None for a folder."""


class Disk:
    """Follows every change below a folder, and what of it has been flushed.

    Each file and folder is held open, so that its number stays its own and a deleted file can still be read.
    """

    def __init__(self, root: Path) -> None:
        self.states: dict[str, tuple[Tree, tuple]] = {}
        """Every state that some crash could have left, by the change that it came before and how it came about;
        beside each, what had been ``promised`` by then."""
        self.promised: list = []
        """Filled by the test: what must survive from now on."""
        self._seen: set[int] = set()
        self.changes: list[str] = []
        self._root = root
        self._handles: dict[int, int] = {}
        self._names: dict[int, dict[str, int]] = {}
        self._flushed: dict[int, bytes | dict[str, int]] = {}

    @contextmanager
    def recording(self) -> Iterator["Disk"]:
        """Note the states that a crash before any change inside could leave, and the one at the end."""
        with before_each_change(self._before):
            yield self
        self._crash("the end")
        for handle in self._handles.values():
            os.close(handle)

    def keep(self) -> None:
        """Everything that is there now is flushed."""
        self._look(self._root)
        for number in self._handles:
            self._flushed[number] = self._content(number)

    def _before(self, name: str, args: tuple) -> None:
        on = os.readlink(f"/proc/self/fd/{args[0]}") if name == "fsync" else str(args[-1])
        change = f"{name} {on.removeprefix(str(self._root))}"
        self.changes.append(change)
        self._crash(change)
        if name == "fsync":
            number = os.fstat(args[0]).st_ino
            if number in self._handles:
                self._flushed[number] = self._content(number)

    def _crash(self, change: str) -> None:
        number = self._look(self._root)
        for how, names_kept, kept in (
            ("killed", True, 1.0),
            ("all that was not flushed lost", False, 0.0),
            ("contents lost", True, 0.0),
            ("contents torn", True, 0.5),
        ):
            tree = dict(self._tree(number, "", names_kept, kept))
            # What is in a scratch folder is never looked into, but for whose it is: one state stands for many.
            same = {p: None if "/tmp/" in p and not p.endswith("owner.json") else c for p, c in tree.items()}
            key = hash((tuple(sorted(same.items())), tuple(self.promised)))
            if key not in self._seen:
                self._seen.add(key)
                self.states[f"{len(self.changes)} {change}: {how}"] = tree, tuple(self.promised)

    def _look(self, path: Path | str) -> int:
        found = os.stat(path)
        if found.st_ino not in self._handles:
            self._handles[found.st_ino] = os.open(path, os.O_RDONLY)
        if stat.S_ISDIR(found.st_mode):
            with os.scandir(path) as entries:
                self._names[found.st_ino] = {entry.name: self._look(entry.path) for entry in entries}
        return found.st_ino

    def _content(self, number: int) -> bytes | dict[str, int]:
        if number in self._names:
            return dict(self._names[number])
        handle = self._handles[number]
        return os.pread(handle, os.fstat(handle).st_size, 0)

    def _tree(
        self, number: int, path: str, names_kept: bool, kept: float
    ) -> Iterator[tuple[str, bytes | None]]:
        flushed = self._flushed.get(number)
        if number not in self._names:
            content = self._content(number)
            yield (
                path,
                content
                if kept == 1
                else flushed
                if flushed is not None
                else content[: int(len(content) * kept)],
            )
            return
        yield path, None
        for name, inside in (self._names[number] if names_kept else flushed or {}).items():
            yield from self._tree(inside, f"{path}/{name}", names_kept, kept)


def put(tree: Tree, folder: Path) -> None:
    """Make the files and folders of a tree."""
    for path, content in sorted(tree.items()):
        here = Path(f"{folder}{path}")
        if content is None:
            here.mkdir(exist_ok=True)
        else:
            here.write_bytes(content)
