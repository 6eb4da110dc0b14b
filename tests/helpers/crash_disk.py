"""States in which a machine's crash can leave a folder: unsynced data is lost, torn or kept."""

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
"""Entries of a folder: name -> inode."""


@dataclass(frozen=True)
class State:
    """The state after a crash."""

    tree: Tree
    promised: dict[str, bytes]
    """Path -> content that must be in the tree."""


class Disk:
    """Follows every change below a folder and every fsync.

    Each file and folder is held open, so that its inode is not reused and a deleted file can still
    be read.

    Args:
        root: the folder.
        one_by_one: also the states in which a single unsynced name is kept, or a single one lost.
    """

    def __init__(self, root: Path, one_by_one: bool = True) -> None:
        self.states: dict[str, State] = {}
        """Every possible state after a crash, keyed by the next change and the kind of loss."""
        self.promised: dict[str, bytes] = {}
        """Filled by the test: files that must survive from now on."""
        self.changes: list[str] = []
        self._seen: set[int] = set()
        self.root, self._one_by_one = root, one_by_one
        self._handles: dict[int, int] = {}
        self._names: dict[int, Names] = {}
        self._flushed: dict[int, bytes | Names] = {}

    @contextmanager
    def recording(self) -> Iterator["Disk"]:
        """Record the states after a crash before each change in the block, and at its end."""
        with before_each_change(self._before):
            yield self
        self._crash("the end")
        for handle in self._handles.values():
            os.close(handle)

    def keep(self) -> "Disk":
        """Count everything that exists now as synced."""
        self._look(self.root)
        for number in self._handles:
            self._flushed[number] = self._content(number)
        return self

    def promise(self, path: Path) -> None:
        """Require a file, with its present content, from now on."""
        self.promised[self._inside(path)] = path.read_bytes()

    def release(self, path: Path) -> None:
        """Stop requiring a file."""
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
        self._note(f"{change}: all unsynced data lost", root, pending, 0.0)
        for folder, name in pending if self._one_by_one and len(pending) > 1 else ():
            self._note(f"{change}: {name} lost", root, frozenset({(folder, name)}), 0.0)
            self._note(f"{change}: only {name} kept", root, pending - {(folder, name)}, 0.0)

    def _note(self, event: str, root: int, lost: frozenset[tuple[int, str]], kept: float) -> None:
        tree = dict(self._tree(root, "", lost, kept))
        # Nothing reads scratch folders but their owner file, so one state stands for many.
        same = {
            p: None if "/tmp/" in p and not p.endswith("owner.json") else c for p, c in tree.items()
        }
        key = hash((tuple(sorted(same.items())), tuple(sorted(self.promised))))
        if key not in self._seen:
            self._seen.add(key)
            self.states[f"{len(self.changes)} {event}"] = State(tree, dict(self.promised))

    def _look(self, path: Path | str) -> int:
        status = os.stat(path)
        if status.st_ino not in self._handles:
            self._handles[status.st_ino] = os.open(path, os.O_RDONLY)
        if stat.S_ISDIR(status.st_mode):
            with os.scandir(path) as entries:
                self._names[status.st_ino] = {
                    entry.name: self._look(entry.path) for entry in entries
                }
        return status.st_ino

    def _pending(self) -> Iterator[tuple[int, str]]:
        """Yield ``(folder, name)`` that a crash now could lose, or restore."""
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
        """Return a file's content: the synced one, else the kept fraction of the present one."""
        flushed, content = self._flushed.get(number), self._content(number)
        assert isinstance(content, bytes)
        if kept == 1:
            return content
        return flushed if isinstance(flushed, bytes) else content[: int(len(content) * kept)]


def put(tree: Tree, folder: Path) -> None:
    """Create the files and folders of a tree."""
    for path, content in sorted(tree.items()):
        here = Path(f"{folder}{path}")
        if content is None:
            here.mkdir(exist_ok=True)
        else:
            here.write_bytes(content)
