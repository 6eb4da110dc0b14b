"""A repair in a bucket under every interleaving: with stale owners, a job, crashes, lost replies.

A record must never lie beside rows that are not its own: a reader would decode them in silence.
"""

import pytest
from helpers.object_model import Simulation
from helpers.simulated_units import (
    HIDDEN_LAYOUT,
    HIDDEN_SHARD,
    RECORD,
    SHARD,
    committed,
    committing,
    repairing,
    starting,
    sum_of,
)

from gradproj.coordinator.object_commits import ObjectCommits, _Slot
from gradproj.errors import StoreError
from gradproj.store.unit_record import decode_record, is_given_up
from gradproj.store.writer import shard_chunks

DAMAGED_SHARD = {**committed(9), SHARD: b"damaged"}
DAMAGED_HIDDEN = {**committed(9, HIDDEN_LAYOUT, 9), HIDDEN_SHARD: b"damaged"}
DAMAGED_RECORD = {**committed(2), RECORD: committed(2)[RECORD][:-1]}
ORPHAN = {SHARD: committed(9)[SHARD]}


def refusable(program):
    """A process that may end with a line to the user."""

    def run(output):
        try:
            return program(output)
        except StoreError:
            return "refused"

    return run


def simulate(monkeypatch, start, *programs, **options):
    """Visit every state of these processes, of which any may die anywhere."""
    first = refusable(options.pop("restart", starting(7)))

    def restart(output):  # twice: the first may compute the unit before it finds a stray shard
        result = first(output)
        return first(output) if result == "refused" else result

    def check(before, after):
        record, shards = after.get(RECORD, b""), [(SHARD, "shard"), (HIDDEN_SHARD, "hidden")]
        if not record or is_given_up(record) or record == start.get(RECORD):
            # Beside a damaged unit's record nothing new may appear before it is taken away.
            assert record != start.get(RECORD) or all(
                after.get(name) == start.get(name) for name, _ in shards
            )
            return
        for name, field in shards:
            recorded, content = getattr(decode_record(record), field), after.get(name)
            if recorded is not None:
                assert content is not None
                assert recorded == sum_of(content), f"{name} is another's"

    def solo(objects, result):
        if isinstance(result, tuple) and objects.get(RECORD) != start.get(RECORD):
            assert result[0] in (True, False), "no process can finish the unit any more"
            check({}, objects)
            assert decode_record(objects[RECORD])

    programs = [refusable(program) for program in programs]
    simulation = Simulation(programs, start, check, restart=restart, **options)
    return simulation.run(monkeypatch, solo)


@pytest.mark.parametrize(
    ("start", "programs", "options"),
    [
        (DAMAGED_SHARD, [committing(0, 0, began=True), repairing(1)], {}),
        (DAMAGED_SHARD, [repairing(1), starting(2)], {}),
        (DAMAGED_RECORD, [repairing(1), starting(2)], {}),
        (DAMAGED_SHARD, [repairing(1), repairing(2)], {}),
        (ORPHAN, [committing(0, 0, began=True), starting(2)], {}),
        (
            DAMAGED_HIDDEN,
            [committing(0, 0, HIDDEN_LAYOUT, 0, began=True), repairing(1, HIDDEN_LAYOUT)],
            {"restart": starting(7, HIDDEN_LAYOUT, 7)},
        ),
        (DAMAGED_SHARD, [committing(0, 0, began=True), repairing(1)], {"some_late": True}),
    ],
    ids=[
        "a stale owner",
        "a job",
        "a job that computes the same rows",
        "another repair",
        "a shard without a record",
        "hidden states",
        "requests carried out late",
    ],
)
def test_a_repair_mixes_no_rows(monkeypatch, start, programs, options):
    done = simulate(monkeypatch, start, *programs, **options)
    assert done.n_states > 100
    assert any(RECORD in objects for objects, _ in done.ends)


@pytest.mark.chaos
@pytest.mark.parametrize("start", [DAMAGED_SHARD, DAMAGED_RECORD], ids=["shard", "record"])
def test_a_repair_a_job_and_a_stale_owner_mix_no_rows(monkeypatch, start):
    programs = [committing(0, 0, began=True), repairing(1), starting(2)]
    simulate(monkeypatch, start, *programs, most_lost=0)


@pytest.mark.chaos
@pytest.mark.parametrize("start", [DAMAGED_SHARD, DAMAGED_RECORD], ids=["shard", "record"])
def test_requests_of_a_repair_and_a_job_may_be_carried_out_late(monkeypatch, start):
    simulate(monkeypatch, start, repairing(1), starting(2), some_late=True, most_lost=2)


def shards_first(self, units, layout):
    """The repair of earlier versions: it deleted the shards, then the record."""
    for unit in units:
        self.forget(unit)
        (self.output / layout.shard_name(unit)).unlink(missing_ok=True)
        (self.output / RECORD.removeprefix("out/")).unlink(missing_ok=True)


def record_first(self, units, layout):
    for unit in units:
        self.forget(unit)
        (self.output / RECORD.removeprefix("out/")).unlink(missing_ok=True)
        (self.output / layout.shard_name(unit)).unlink(missing_ok=True)


STALE = (DAMAGED_SHARD, committing(0, 0, began=True))
SAME_ROWS = (DAMAGED_RECORD, starting(2))


@pytest.mark.parametrize(
    ("target", "name", "bug", "others"),
    [
        (ObjectCommits, "give_up", shards_first, STALE),
        (ObjectCommits, "give_up", record_first, (*STALE, starting(2))),
        (_Slot, "free", lambda self, layout: b"", STALE),
        (
            ObjectCommits,
            "_check_mark",
            lambda self, unit, mark: None,
            (DAMAGED_SHARD, starting(2), starting(3)),
        ),
        (
            _Slot,
            "suffix",
            property(lambda self: "." + self.identity),
            (DAMAGED_RECORD, committing(2, 2, began=True), committing(3, 3)),
        ),
        (
            _Slot,
            "shard",
            lambda self, stored, layout: b"".join(shard_chunks(stored, layout)),
            SAME_ROWS,
        ),
    ],
    ids=["shards first", "record first", "free names", "no look", "prepared before", "same shards"],
)
def test_planted_bugs_are_found(monkeypatch, target, name, bug, others):
    monkeypatch.setattr(target, name, bug)
    start, *programs = others
    with pytest.raises(AssertionError):
        simulate(monkeypatch, start, repairing(1), *programs, most_lost=0, most_switches=3)
