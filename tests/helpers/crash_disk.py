"""A folder as a crash of the machine would leave it: what was not flushed is lost, torn, or there by luck."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from helpers.faults import before_each_change

Tree = dict[str, bytes | None]
"""Path -> content; None for a folder."""

Names = dict[str, int]
"""What a folder holds: name -> number of the file or folder."""


@dataclass(frozen=True)
class State:
    """What a crash leaves."""

    tree: Tree
    promised: dict[str, bytes]
    """Path -> content of what has to be in the tree."""


class Disk:
    """Follows every change below a folder, and what of it has been flushed.

    Each file and folder is held open, so that its number stays its own and a deleted file can still be read.

    Args:
        root: the folder.
        one_by_one: also the states in which a single name was flushed by luck, or as the only one was not.
    """

    def __init__(self, root: Path, one_by_one: bool = True) -> None:
        self.states: dict[str, State] = {}
        """Every state that some crash could have left, by the change that it came before and how it came about."""
        self.promised: dict[str, bytes] = {}
        """Filled by the test: what must survive from now on."""
        self.changes: list[str] = []
        self._seen: set[int] = set()
        self.root, self._one_by_one = root, one_by_one
        self._handles: dict[int, int] = {}
        self._names: dict[int, Names] = {}
        self._flushed: dict[int, bytes | Names] = {}

    @contextmanager
    def recording(self) -> Iterator["Disk"]:
        """Note the states that a crash before any change inside could leave, and those at the end."""
        with before_each_change(self._before):
            yield self
        self._crash("the end")
        for handle in self._handles.values():
            os.close(handle)

    def keep(self) -> "Disk":
        """Everything that is there now is flushed."""
        self._look(self.root)
        for number in self._handles:
            self._flushed[number] = self._content(number)
        return self

    def promise(self, path: Path) -> None:
        """A file has to be there from now on, as it is."""
        self.promised[self._inside(path)] = path.read_bytes()

    def release(self, path: Path) -> None:
        """A file may go now."""
        self.promised.pop(self._inside(path), None)

    def _inside(self, path: object) -> str:
        return str(path).removeprefix(str(self.root))

    def _before(self, name: str, args: tuple) -> None:
        on = os.readlink(f"/proc/self/fd/{args[0]}") if name == "fsync" else args[-1]
        change = f"{name} {self._inside(on)}"
        self.changes.append(change)
        self._crash(change)
        if name == "fsync":
            number = os.fstat(args[0]).st_ino
            if number in self._handles:
                self._flushed[number] = self._content(number)

    def _crash(self, change: str) -> None:
        root = self._look(self.root)
        pending = frozenset(self._pending())
        self._note(f"{change}: killed", root, frozenset(), 1.0)
        self._note(f"{change}: contents torn", root, frozenset(), 0.5)
        self._note(f"{change}: contents lost", root, frozenset(), 0.0)
        self._note(f"{change}: all that was not flushed lost", root, pending, 0.0)
        for folder, name in pending if self._one_by_one and len(pending) > 1 else ():
            self._note(f"{change}: {name} not flushed", root, frozenset({(folder, name)}), 0.0)
            self._note(
                f"{change}: only {name} flushed by luck", root, pending - {(folder, name)}, 0.0
            )

    def _note(self, how: str, root: int, lost: frozenset[tuple[int, str]], kept: float) -> None:
        tree = dict(self._tree(root, "", lost, kept))
        # What is in a scratch folder is never looked into, but for whose it is: one state stands for many.
        same = {
            p: None if "/tmp/" in p and not p.endswith("owner.json") else c for p, c in tree.items()
        }
        key = hash((tuple(sorted(same.items())), tuple(sorted(self.promised))))
        if key not in self._seen:
            self._seen.add(key)
            self.states[f"{len(self.changes)} {how}"] = State(tree, dict(self.promised))

    def _look(self, path: Path | str) -> int:
        found = os.stat(path)
        if found.st_ino not in self._handles:
            self._handles[found.st_ino] = os.open(path, os.O_RDONLY)
        if stat.S_ISDIR(found.st_mode):
            with os.scandir(path) as entries:
                self._names[found.st_ino] = {
                    entry.name: self._look(entry.path) for entry in entries
                }
        return found.st_ino

    def _pending(self) -> Iterator[tuple[int, str]]:
        """Folders and the names in them that a crash now could lose, or bring back."""
        for folder, now in self._names.items():
            then = self._flushed_names(folder)
            for name in now.keys() | then.keys():
                if now.get(name) != then.get(name):
                    yield folder, name

    def _flushed_names(self, folder: int) -> Names:
        names = self._flushed.get(folder, {})
        assert isinstance(names, dict)
        return names

    def _content(self, number: int) -> bytes | Names:
        if number in self._names:
            return dict(self._names[number])
        handle = self._handles[number]
        return os.pread(handle, os.fstat(handle).st_size, 0)

    def _tree(
        self, number: int, path: str, lost: frozenset[tuple[int, str]], kept: float
    ) -> Iterator[tuple[str, bytes | None]]:
        if number not in self._names:
            yield path, self._data(number, kept)
            return
        yield path, None
        now, then = self._names[number], self._flushed_names(number)
        for name in now.keys() | then.keys():
            inside = (then if (number, name) in lost else now).get(name)
            if inside is not None:
                yield from self._tree(inside, f"{path}/{name}", lost, kept)

    def _data(self, number: int, kept: float) -> bytes:
        """A file's content, of which only a share was kept where it is not as it was flushed."""
        flushed, content = self._flushed.get(number), self._content(number)
        assert isinstance(content, bytes)
        if kept == 1:
            return content
        return flushed if isinstance(flushed, bytes) else content[: int(len(content) * kept)]


def put(tree: Tree, folder: Path) -> None:
    """Make the files and folders of a tree."""
    for path, content in sorted(tree.items()):
        here = Path(f"{folder}{path}")
        if content is None:
            here.mkdir(exist_ok=True)
        else:
            here.write_bytes(content)
