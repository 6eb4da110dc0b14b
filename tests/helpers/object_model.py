"""A model of an object store, and real code run against it request by request.

A process is a function of the replies that it gets, so its state is the list of its replies: to
step it, the function runs again with these replies until it asks for one more. That needs no
threads, and every interleaving can be visited, each state once.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from hashlib import blake2b
from types import SimpleNamespace
from typing import Any

from obstore import exceptions

from gradproj.storage import stored_object
from gradproj.storage.address import Address
from gradproj.storage.failures import RETRIED, reason_of
from gradproj.storage.object_path import ObjectPath

Objects = dict[str, bytes]
Request = tuple[Any, ...]
Program = Callable[[ObjectPath], Any]
"""A process: it is given the output, works, and returns its result."""

WHEN = datetime(2026, 1, 1, tzinfo=UTC)
LOST = "lost"
"""Reply of a write that has happened and of which the process learns nothing."""


def etag_of(content: bytes) -> str:
    """Return an etag as S3 has it: equal contents have equal ones."""
    return f'"{blake2b(content, digest_size=8).hexdigest()}"'


def apply(objects: Objects, request: Request) -> tuple[Objects, Any]:
    """Carry out one request at once. Returns the objects after it, and the reply."""
    operation, key, *rest = request
    content = objects.get(key)
    if operation == "put":
        data, mode = rest
        if mode == "create" and content is not None:
            return objects, "exists"
        if isinstance(mode, tuple) and (content is None or etag_of(content) != mode[0]):
            return objects, "changed"
        return {**objects, key: data}, "done"
    if operation == "delete":
        return {name: data for name, data in objects.items() if name != key}, "done"
    if operation == "list":
        found = ((name, len(data)) for name, data in objects.items() if name.startswith(key))
        return objects, tuple(sorted(found))
    return objects, "missing" if content is None else content


class Asks(BaseException):
    """The process asks for a reply that it has not got yet."""


class ReplayedStore:
    """The part of obstore's stores that gradproj uses, with replies given in advance."""

    def __init__(self, replies: Sequence[Any]) -> None:
        self._replies = iter(replies)

    def _ask(self, *request: Any) -> Any:
        try:
            reply = next(self._replies)
        except StopIteration:
            raise Asks(request) from None
        if reply == LOST:
            raise exceptions.GenericError("error sending request")
        if reply == "missing":
            raise FileNotFoundError("not found")
        if reply == "exists":
            raise exceptions.AlreadyExistsError("status code: 412")
        if reply == "changed":
            raise exceptions.PreconditionError("status code: 412")
        return reply

    def put(self, key: str, data: bytes, mode: Any = None, use_multipart: bool = True) -> None:
        self._ask("put", key, data, (mode["e_tag"],) if isinstance(mode, dict) else mode)

    def get(self, key: str, options: dict[str, Any] | None = None) -> Any:
        content = self._ask("get", key)
        if (options or {}).get("if_none_match") == etag_of(content):
            raise exceptions.NotModifiedError("status code: 304")
        return SimpleNamespace(bytes=lambda: content, meta=_meta(key, content))

    def head(self, key: str) -> dict[str, Any]:
        return _meta(key, self._ask("get", key))

    def delete(self, key: str) -> None:
        self._ask("delete", key)

    def list(self, prefix: str | None = None, chunk_size: int = 50) -> Iterator[Any]:
        yield [{"path": name, "size": size} for name, size in self._ask("list", prefix or "")]

    def list_with_delimiter(self, prefix: str | None = None) -> dict[str, Any]:
        start = prefix or ""
        found = [(name.removeprefix(start), size) for name, size in self._ask("list", start)]
        folders = {name.partition("/")[0] for name, _ in found if "/" in name}
        return {
            "common_prefixes": sorted(start + folder for folder in folders),
            "objects": [
                {"path": start + name, "size": size} for name, size in found if "/" not in name
            ],
        }


def _meta(key: str, content: bytes) -> dict[str, Any]:
    etag = etag_of(content)
    return {
        "path": key, "size": len(content), "e_tag": etag, "version": None, "last_modified": WHEN
    }  # fmt: skip


def retry_at_once(action: Callable[[], Any], *_: object) -> Any:
    """Repeat what ``retried`` repeats, without its pauses."""
    while True:
        try:
            return action()
        except Exception as error:
            if reason_of(error) not in RETRIED:
                raise


@dataclass(frozen=True)
class State:
    """Objects, and for each process its replies so far."""

    objects: tuple[tuple[str, bytes], ...]
    replies: tuple[tuple[Any, ...], ...]
    n_lost: int = 0
    late: tuple[Request, ...] = ()
    """Requests whose replies were lost, and that are still under way."""
    last: int = -1
    n_switches: int = 0

    def moved(self, number: int, objects: Objects, reply: Any) -> "State":
        replies = list(self.replies)
        replies[number] = (*replies[number], reply)
        return replace(
            self,
            objects=tuple(sorted(objects.items())),
            replies=tuple(replies),
            n_lost=self.n_lost + (reply == LOST),
            last=number,
            n_switches=self.n_switches + (self.last not in (-1, number)),
        )


@dataclass
class Simulation:
    """Every interleaving of some processes on one store.

    Args:
        programs: the processes.
        objects: the store at the start.
        check: called with the objects of every state, after those of the state before.
        most_lost: replies that are lost in one run.
        most_switches: changes from one process to another in one run; None = any number.
        some_late: a request whose reply was lost may also be carried out at any later time.
        restart: a process that starts in any state in which all others are dead.
    """

    programs: Sequence[Program]
    objects: Objects
    check: Callable[[Objects, Objects], None]
    most_lost: int = 1
    most_switches: int | None = None
    some_late: bool = False
    restart: Program | None = None
    n_states: int = 0
    ends: list[tuple[Objects, list[Any]]] = field(default_factory=list)
    """Objects and results of every run in which all processes ended."""
    _steps: dict[Any, Any] = field(default_factory=dict)

    def step(self, number: int, replies: tuple[Any, ...]) -> tuple[str, Any]:
        """Return ``("asks", request)`` or ``("returns", result)`` of a process."""
        key = number, replies
        if key not in self._steps:
            output = ObjectPath(ReplayedStore(replies), Address("s3", "model", "out"))
            try:
                program = self.programs[number] if number >= 0 else self.restart
                self._steps[key] = "returns", program(output)
            except Asks as asks:
                self._steps[key] = "asks", asks.args[0]
        return self._steps[key]

    def run(self, monkeypatch: Any, solo: Callable[[Objects, Any], None]) -> "Simulation":
        """Visit every state. A process that is not stepped any more is one that was killed.

        ``solo`` is called with what a process leaves and returns that alone goes on from a state,
        all others being dead; of the one that restarts, the result is a tuple of one.
        """
        monkeypatch.setattr(stored_object, "retried", retry_at_once)
        first = State(tuple(sorted(self.objects.items())), ((),) * len(self.programs))
        stack, seen, restarted = [first], {first}, set()
        while stack:
            state = stack.pop()
            self.n_states += 1
            if self.restart is not None and state.objects not in restarted:
                restarted.add(state.objects)
                objects, result = self._alone(dict(state.objects), -1, ())
                solo(objects, (result,))
            nexts = [self.step(i, replies) for i, replies in enumerate(state.replies)]
            if all(kind == "returns" for kind, _ in nexts):
                self.ends.append((dict(state.objects), [result for _, result in nexts]))
            successors = list(self._late_successors(state))
            for number, (kind, request) in enumerate(nexts):
                if kind == "asks":
                    solo(*self._alone(dict(state.objects), number, state.replies[number]))
                    successors += self._successors(state, number, request)
            for after in successors:
                if after not in seen and not self._switches_too_often(after):
                    seen.add(after)
                    stack.append(after)
        return self

    def _switches_too_often(self, state: State) -> bool:
        return self.most_switches is not None and state.n_switches > self.most_switches

    def _successors(self, state: State, number: int, request: Request) -> Iterator[State]:
        before = dict(state.objects)
        after, reply = apply(before, request)
        self.check(before, after)
        moved = [state.moved(number, after, reply)]
        if request[0] == "put" and state.n_lost < self.most_lost:
            moved.append(state.moved(number, after, LOST))
            if self.some_late:
                later = state.moved(number, before, LOST)
                moved.append(replace(later, late=(*later.late, request)))
        for one in moved:
            if self.most_switches is None:  # then they do not tell two states apart
                one = replace(one, last=-1, n_switches=0)
            yield one

    def _late_successors(self, state: State) -> Iterator[State]:
        for number, request in enumerate(state.late):
            before = dict(state.objects)
            after, _ = apply(before, request)
            self.check(before, after)
            left = (*state.late[:number], *state.late[number + 1 :])
            yield replace(state, objects=tuple(sorted(after.items())), late=left)

    def _alone(
        self, objects: Objects, number: int, replies: tuple[Any, ...]
    ) -> tuple[Objects, Any]:
        for _ in range(500):
            kind, value = self.step(number, replies)
            if kind == "returns":
                return objects, value
            objects, reply = apply(objects, value)
            replies = (*replies, reply)
        raise AssertionError(f"process {number} does not end: {value}")
