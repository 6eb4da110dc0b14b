"""Every interleaving of processes in a bucket, with crashes and lost replies at every request.

The code is the real one; the bucket is ``helpers.object_model``'s, with etags of contents as on S3.
"""

import json

import pytest
from helpers.faults import fake_owner
from helpers.object_model import Simulation
from helpers.simulated_units import (
    HIDDEN_LAYOUT,
    HIDDEN_SHARD,
    RECORD,
    SHARD,
    committing,
    sum_of,
)

from gradproj.coordinator.claims import ClaimBoard
from gradproj.coordinator.object_commits import ObjectCommits
from gradproj.storage.publish import ObjectPublisher, Outdated
from gradproj.store.unit_record import decode_record


@pytest.mark.chaos
def test_three_processes_commit_one_unit(monkeypatch):
    programs = [committing(number, number) for number in range(3)]
    done = Simulation(programs, {}, check_unit, most_lost=0).run(monkeypatch, finishes)
    for objects, results in done.ends:
        assert sum(results) <= 1
        assert RECORD in objects


def check_unit(before, after):
    """Check that a committed unit never changes, and is always whole."""
    for key in (RECORD, SHARD, HIDDEN_SHARD):
        assert key not in before or after.get(key) == before[key], f"{key} changed"
    if RECORD in after:
        record = decode_record(after[RECORD])
        if record.shard is not None:
            assert record.shard == sum_of(after[SHARD])
        if record.hidden is not None:
            assert record.hidden == sum_of(after[HIDDEN_SHARD])


def finishes(objects, committed):
    """Check that a process that is left commits the unit, whatever the dead have left."""
    assert RECORD in objects


@pytest.mark.parametrize(
    "programs",
    [
        [committing(0, 0), committing(1, 1)],
        [committing(0, 0), committing(1, 0)],
        [committing(0, 0), committing(1, 1, has_rows=False)],
        [committing(n, n, HIDDEN_LAYOUT, hidden=n) for n in range(2)],
        [committing(n, 0, HIDDEN_LAYOUT, hidden=n) for n in range(2)],
    ],
    ids=["other rows", "same rows", "no rows", "hidden states", "same rows, other hidden states"],
)
def test_two_processes_commit_one_unit(monkeypatch, programs):
    done = Simulation(programs, {}, check_unit).run(monkeypatch, finishes)
    assert done.n_states > 100
    for objects, results in done.ends:
        assert sum(results) <= 1
        assert RECORD in objects


def claiming(number):
    def program(output):
        commits = ObjectCommits(output, fake_owner(number))
        board = ClaimBoard(output / "claims", commits, lambda owner: None)
        return board.try_claim("00000001") and json.dumps(sorted(board._mine.items()))

    return program


def test_each_claim_has_one_owner(monkeypatch):
    """Three processes, each of which finds every other one stale."""
    monkeypatch.setattr(ClaimBoard, "is_stale", lambda self, claim: True)
    programs = [claiming(number) for number in range(3)]
    done = Simulation(programs, {}, lambda before, after: None).run(
        monkeypatch, lambda objects, result: None
    )
    for objects, results in done.ends:
        owned = [result for result in results if result]
        assert len(set(owned)) == len(owned) == len(objects)


FILES = ("a/c.0", "b/c.0")


def creating(number):
    def program(output):
        files = {name: f"{name} of {number}".encode() for name in (*FILES, "zarr.json")}
        return ObjectPublisher().create_tree(output / "store", files, "zarr.json")

    return program


def check_store(before, after):
    """From the moment it exists, the store is one process's, and stays as it is."""
    if "out/store/zarr.json" in after:
        creator = after["out/store/zarr.json"].split()[-1]
        for name in FILES:
            assert after[f"out/store/{name}"].split()[-1] == creator
        if "out/store/zarr.json" in before:
            assert all(before[f"out/store/{name}"] == after[f"out/store/{name}"] for name in FILES)


@pytest.mark.parametrize("n", [2, pytest.param(3, marks=pytest.mark.chaos)])
def test_a_store_is_created_by_one_process(monkeypatch, n):
    def solo(objects, created):
        assert "out/store/zarr.json" in objects

    programs = [creating(number) for number in range(n)]
    done = Simulation(programs, {}, check_store, most_lost=1 if n == 2 else 0).run(
        monkeypatch, solo
    )
    for objects, results in done.ends:
        assert sum(results) == 1
        assert sorted(objects) == sorted(f"out/store/{name}" for name in (*FILES, "zarr.json"))


def merging(number):
    """A merge as ``coordinator.merge`` does it: reopen, replace, mark as complete."""

    def program(output):
        board = ClaimBoard(
            output / "claims", ObjectCommits(output, fake_owner(number)), lambda owner: None
        )
        if not board.try_claim("merge"):
            return None

        def check():
            if not board.owns("merge"):
                raise Outdated

        publisher, mark = board.commits.publisher.guarded(check), str(number).encode()
        try:
            publisher.take(
                output / "zarr.json", lambda content: content.split(b"|")[0] + b"|" + mark
            )
            if (output / "zarr.json").read_bytes().startswith(b"complete"):
                publisher.update(output / "zarr.json", lambda content: b"incomplete|" + mark)
            for name in ("loss", "status"):
                publisher.replace(output / name, [mark])
            publisher.update(output / "zarr.json", lambda content: b"complete " + mark)
        except Outdated:
            return False
        return True

    return program


@pytest.mark.parametrize("was", [b"incomplete", b"complete old"])
def test_merges_of_two_processes_do_not_mix(monkeypatch, was):
    """The second takes the first one's claim over, which goes on at any moment."""
    monkeypatch.setattr(ClaimBoard, "is_stale", lambda self, claim: True)

    def check(before, after):
        if (state := after["out/zarr.json"]).startswith(b"complete"):
            mark = state.partition(b"|")[0].split()[-1]
            assert after["out/loss"] == after["out/status"] == mark

    def solo(objects, merged):
        assert merged is not True or objects["out/zarr.json"].startswith(b"complete")

    first = {"out/zarr.json": was, "out/loss": b"old", "out/status": b"old"}
    programs = [merging(0), merging(1)]
    done = Simulation(programs, first, check).run(monkeypatch, solo)
    assert any(results == [False, True] for _, results in done.ends)
