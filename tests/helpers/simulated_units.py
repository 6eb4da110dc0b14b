"""Processes that commit and repair one unit of a bucket's output, for ``object_model``."""

import dataclasses

import numpy as np
from helpers.faults import IDENTITY, fake_owner, fake_rows

from gradproj.coordinator.object_commits import ObjectCommits
from gradproj.files import crc32c
from gradproj.storage.publish import Outdated
from gradproj.store.hidden_states import hidden_layout
from gradproj.store.layout import StoreConfig, plan_layout
from gradproj.store.unit_record import encode_record, is_recorded, record_name
from gradproj.store.writer import shard_chunks

LAYOUT = plan_layout(16, [6, 6], 12, StoreConfig(encoding="dense", rows_per_shard=8))
UNIT = 1
RECORD, SHARD = f"out/{record_name(UNIT)}", f"out/{LAYOUT.shard_name(UNIT)}"


def with_hidden(layout):
    return dataclasses.replace(layout, hidden_width=4)


HIDDEN_LAYOUT = with_hidden(LAYOUT)
HIDDEN_SHARD = f"out/{hidden_layout(HIDDEN_LAYOUT).shard_name(UNIT)}"


class _Began(ObjectCommits):
    """Has found nothing in place of the record, a long time ago."""

    looked = False

    def _mark(self, unit):
        self.looked, looked = True, self.looked
        return super()._mark(unit) if looked else b""


def committing(number, writer, layout=LAYOUT, hidden=None, has_rows=True, began=False):
    """A process that has computed the unit, and commits it whatever claims say: a stale owner.

    ``began``: it was asked before anything of the unit was there, and hung since.
    """

    def program(output):
        rows = fake_rows(layout, UNIT, writer)
        rows = dataclasses.replace(
            rows,
            stored=rows.stored if has_rows else None,
            hidden=None if hidden is None else np.full((8, 4), hidden, np.float16),
        )
        rows.record.stats["seconds"] = number  # records of two processes always differ
        commits = (_Began if began else ObjectCommits)(output, fake_owner(number))

        def may_publish():
            return began or not is_recorded(output, UNIT)

        committed = commits.commit(rows, layout, may_publish, lambda: None)
        if is_recorded(output, UNIT):
            commits.forget(UNIT)
        return committed

    return program


def sum_of(data):
    return {"bytes": len(data), "crc32c": crc32c(data)}


def repairing(number, layout=LAYOUT):
    """``verify --repair`` of a unit that it has found damaged."""

    def program(output):
        try:
            ObjectCommits(output, fake_owner(number)).give_up([UNIT], layout)
        except Outdated:
            return "outdated"
        return "given up"

    return program


def starting(number, layout=LAYOUT, hidden=None):
    """A job's start, which gives up what nobody can commit, and then its commit."""

    def program(output):
        commits = ObjectCommits(output, fake_owner(number))
        for unit in commits.orphans(layout, IDENTITY):
            try:
                commits.give_up([unit], layout)
            except Outdated:
                return "outdated"
        return committing(number, number, layout, hidden)(output)

    return program


def committed(writer, layout=LAYOUT, hidden=None):
    """Return the objects of a committed unit."""
    rows = fake_rows(layout, UNIT, writer)
    record, shard = rows.record, b"".join(shard_chunks(rows.stored, layout))
    objects = {SHARD: shard}
    record.shard = sum_of(shard)
    if hidden is not None:
        states = np.full((8, 4), hidden, np.float16)
        objects[HIDDEN_SHARD] = b"".join(shard_chunks(states, hidden_layout(layout)))
        record.hidden = sum_of(objects[HIDDEN_SHARD])
    return {RECORD: encode_record(record), **objects}
