"""Every interleaving of processes in a bucket, with crashes and lost replies at every request.

The code is the real one; the bucket is ``helpers.object_model``'s, with etags of contents as on S3.
"""

import dataclasses
import json

import numpy as np
import pytest
from helpers.faults import fake_owner, fake_rows
from helpers.object_model import Simulation

from gradproj.coordinator.claims import ClaimBoard
from gradproj.coordinator.object_commits import ObjectCommits
from gradproj.files import crc32c
from gradproj.storage.publish import ObjectPublisher, Outdated
from gradproj.store.hidden_states import hidden_layout
from gradproj.store.layout import StoreConfig, plan_layout
from gradproj.store.unit_record import decode_record, record_name

LAYOUT = plan_layout(16, [6, 6], 12, StoreConfig(encoding="dense", rows_per_shard=8))
UNIT = 1
RECORD, SHARD = f"out/{record_name(UNIT)}", f"out/{LAYOUT.shard_name(UNIT)}"


def with_hidden(layout):
    return dataclasses.replace(layout, hidden_width=4)


HIDDEN_LAYOUT = with_hidden(LAYOUT)
HIDDEN_SHARD = f"out/{hidden_layout(HIDDEN_LAYOUT).shard_name(UNIT)}"


def committing(number, writer, layout=LAYOUT, hidden=None, has_rows=True):
    """A process that has computed the unit, and commits it whatever claims say: a stale owner."""

    def program(output):
        rows = fake_rows(layout, UNIT, writer)
        rows = dataclasses.replace(
            rows,
            stored=rows.stored if has_rows else None,
            hidden=None if hidden is None else np.full((8, 4), hidden, np.float16),
        )
        rows.record.stats["seconds"] = number  # records of two processes always differ
        commits = ObjectCommits(output, fake_owner(number))

        def may_publish():
            return not (output / record_name(UNIT)).is_file()

        committed = commits.commit(rows, layout, may_publish, lambda: None)
        commits.forget(UNIT)
        return committed

    return program


def sum_of(data):
    return {"bytes": len(data), "crc32c": crc32c(data)}


def check_unit(before, after):
    """What is committed never changes, and is always whole."""
    for key in (RECORD, SHARD, HIDDEN_SHARD):
        assert key not in before or after.get(key) == before[key], f"{key} changed"
    if RECORD in after:
        record = decode_record(after[RECORD])
        if record.shard is not None:
            assert record.shard == sum_of(after[SHARD])
        if record.hidden is not None:
            assert record.hidden == sum_of(after[HIDDEN_SHARD])


def finishes(objects, committed):
    """Whoever is left commits the unit, whatever was left by those that died."""
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
    print(done.n_states)
    assert done.n_states > 100
    for objects, results in done.ends:
        assert sum(results) <= 1
        assert RECORD in objects
