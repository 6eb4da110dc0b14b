"""Crashes between any two disk changes: the store opens, and the job resumes to the same bits."""

import errno
import os
import random
import re
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.corpora import make_corpus, mixed_documents
from helpers.crash_disk import Disk, put
from helpers.faults import dead_owner, fake_rows, partial_rows
from helpers.jobs import flags
from helpers.models import make_model
from helpers.outputs import flip_byte, shard_of

from gradproj.coordinator import heartbeats
from gradproj.coordinator.cleanup import remove_leftovers
from gradproj.coordinator.heartbeats import Heartbeat, RankProgress
from gradproj.coordinator.merge import finish
from gradproj.coordinator.process_id import Owner
from gradproj.coordinator.units import UnitQueue
from gradproj.job import startup
from gradproj.job.config import run_config
from gradproj.job.plan import make_plan
from gradproj.job.startup import make_output
from gradproj.maintenance import merge
from gradproj.maintenance.repair import repair
from gradproj.maintenance.verify import verify
from gradproj.store import ProjectionStore
from gradproj.store.unit_record import record_name

PART = partial_rows()


@pytest.fixture(scope="module", autouse=True)
def one_store_id():
    """Give all stores the same random id."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(startup, "new_store_id", lambda: "id")
        yield


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """The plan of a job of two units."""
    root = tmp_path_factory.mktemp("crash")
    corpus, model = make_corpus(root / "tars", mixed_documents(20)), make_model(root / "model")
    settings = {"shards": corpus, "model": model, "output_dir": root / "out", "rows_per_shard": 16}
    few = {"proj_rank_total": 4, "proj_rank_min": 1, "proj_layers": "q_proj"}
    return make_plan(run_config(flags(**settings, **few), "plan"), progress=False)


def in_folder(plan, output):
    return replace(
        plan, config=replace(plan.config, job=replace(plan.config.job, output_dir=str(output)))
    )


# --- a rank's life, with rows that need no model ---


def run(plan, owner, disk=None, stop_after=2):
    """Run a rank to its end, or to a stop within a unit. Returns whether the store is complete."""
    make_output(plan, owner)
    remove_leftovers(plan.output, owner)
    queue = UnitQueue(plan.output, plan.layout, plan.identity_hash, plan.wanted, owner)
    with Heartbeat(plan.output / "heartbeats", owner, RankProgress()):
        for done, unit in enumerate(queue.take()):
            save_part(queue.partial_log(unit, "key"), disk)
            if done == stop_after:
                break
            commit(plan, queue, unit, disk)
        complete = finish(plan.output, queue.claims, wait=True)
        queue.release()
    return complete


def save_part(log, disk):
    done, parts = log.read()
    assert all(np.array_equal(part.stored, PART.stored) for _, part in parts)
    if not done:
        log.append(0, 1, PART)
    if disk is not None:
        disk.promise(next(log.folder.iterdir()))


def commit(plan, queue, unit, disk):
    rows = fake_rows(plan.layout, unit, identity=plan.identity_hash)
    if disk is None:
        assert queue.commit(rows)
        return
    for part in queue.partial_log(unit, "key").folder.iterdir():
        disk.release(part)
    assert queue.commit(rows)
    for name in (record_name(unit), plan.layout.shard_name(unit)):
        disk.promise(plan.output / name)


def content_of(output):
    """Return the content of the store's files and of the JSON files beside it."""
    beside = [output / "metadata.json", output / "projection_stats.json"]
    files = [*(output / "projections.zarr").rglob("*"), *beside]
    return {str(path.relative_to(output)): path.read_bytes() for path in files if path.is_file()}


@pytest.fixture(scope="module")
def undisturbed(plan):
    assert run(plan, dead_owner())
    return SimpleNamespace(output=plan.output, content=content_of(plan.output))


# --- what is interrupted ---


def a_new_job(plan, disk, undisturbed, monkeypatch):
    with disk.recording():
        assert run(plan, dead_owner(), disk)


def a_new_job_without_links(plan, disk, undisturbed, monkeypatch):
    def refuse(*names):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", refuse)
        with disk.recording():
            assert run(plan, dead_owner(), disk)


def a_job_that_is_stopped(plan, disk, undisturbed, monkeypatch):
    with disk.recording():
        assert not run(plan, dead_owner(), disk, stop_after=1)


def a_lost_unit_computed_again(plan, disk, undisturbed, monkeypatch):
    shutil.copytree(undisturbed.output, plan.output)
    (plan.output / record_name(1)).unlink()
    shard_of(plan.output, 1).write_bytes(b"damaged")
    with disk.keep().recording():
        assert run(plan, dead_owner(), disk)


def a_repair(plan, disk, undisturbed, monkeypatch):
    shutil.copytree(undisturbed.output, plan.output)
    flip_byte(shard_of(plan.output, 1))
    with monkeypatch.context() as patch:
        patch.setattr(merge, "Owner", SimpleNamespace(this_process=lambda name, *_: dead_owner()))
        with disk.keep().recording():
            assert repair(verify(plan.output)).units == [1]


INTERRUPTED = {
    a_new_job: (True, 500),
    a_new_job_without_links: (False, 200),
    a_job_that_is_stopped: (False, 100),
    a_lost_unit_computed_again: (True, 300),
    a_repair: (False, 100),
}
"""Interrupted work -> (whether unflushed names are lost one by one, least number of states)."""


# --- and survived ---


class Survivor:
    """Resumes after each of many crashes."""

    def __init__(self, plan, undisturbed, folder):
        self.plan, self.undisturbed, self.folder = plan, undisturbed, folder
        self.owner, self.number, self.repairs = Owner.this_process("resumed", 0, 0), 0, False

    def output_after(self, when, state):
        """Put a crashed state on disk; check that promised files exist and that the store opens."""
        lost = [path for path, data in state.promised.items() if state.tree.get(path) != data]
        assert lost == [], when
        self.number += 1
        root = self.folder / str(self.number)
        root.mkdir()
        put(state.tree, root)
        if (root / "out" / "projections.zarr").exists():
            ProjectionStore(root / "out").status_counts()
        return root / "out"

    def resume(self, when, state):
        output = self.output_after(when, state)
        if self.repairs:
            repair(verify(output))
        assert run(in_folder(self.plan, output), self.owner), when
        assert content_of(output) == self.undisturbed.content, when
        for folder in ("claims", "heartbeats", "partial", "tmp"):
            assert list((output / folder).iterdir()) == [], f"{when}: left over in {folder}"
        shutil.rmtree(output)


@pytest.fixture
def folder():
    """A folder in memory if there is one: nothing here depends on a real disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.fixture
def survivor(plan, undisturbed, folder, monkeypatch):
    # The versions are the same in every start: looked up once.
    versions = startup.versions()
    monkeypatch.setattr(startup, "versions", lambda: versions)
    # No heartbeat of another thread in between, and no real fsync: the simulated disk records it.
    monkeypatch.setattr(heartbeats, "TICK_S", 3600.0)
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    return Survivor(plan, undisturbed, folder)


@pytest.mark.parametrize("interrupted", INTERRUPTED, ids=lambda function: function.__name__)
def test_job_survives_a_crash_between_any_two_disk_changes(
    folder, survivor, interrupted, monkeypatch
):
    one_by_one, at_least = INTERRUPTED[interrupted]
    disk = Disk(new_folder(folder), one_by_one)
    interrupted(
        in_folder(survivor.plan, disk.root / "out"), disk, survivor.undisturbed, monkeypatch
    )
    print(f"{interrupted.__name__}: {len(disk.changes)} changes, {len(disk.states)} states")
    assert len(disk.states) >= at_least
    survivor.repairs = interrupted is a_repair
    for when, state in disk.states.items():
        survivor.resume(when, state)


def test_job_survives_a_second_crash_while_resuming(folder, survivor, monkeypatch):
    chance, first = random.Random(0), Disk(new_folder(folder))
    a_new_job(
        in_folder(survivor.plan, first.root / "out"), first, survivor.undisturbed, monkeypatch
    )
    for when, state in chance.sample(list(first.states.items()), 20):
        output = survivor.output_after(when, state)
        second = Disk(output.parent, one_by_one=False).keep()
        second.promised.update(state.promised)
        with second.recording():
            assert run(in_folder(survivor.plan, output), dead_owner(), second)
        for then, left in chance.sample(list(second.states.items()), 8):
            survivor.resume(f"{when}, and {then}", left)


def new_folder(folder):
    (folder / "disk").mkdir()
    return folder / "disk"


def test_data_is_flushed_then_published_then_recorded(tmp_path, plan):
    root = tmp_path / "disk"
    root.mkdir()
    with Disk(root).recording() as disk:
        assert run(in_folder(plan, root / "out"), dead_owner())
    changes = disk.changes
    for unit in (0, 1):
        in_order = [
            rf"fsync /out/tmp/\S+/shard-{unit}",
            rf"fsync /out/tmp/\S+/record-{unit}",
            rf"link /out/projections.zarr/projections/c.{unit}.0",
            r"fsync /out/projections.zarr/projections",
            rf"link /out/units/{unit:08d}.safetensors",
            r"fsync /out/units",
            rf"unlink /out/claims/{unit:08d}.0",
        ]
        at = -1
        for step in in_order:
            matches = [i for i in range(at + 1, len(changes)) if re.fullmatch(step, changes[i])]
            assert matches, f"no {step} after {changes[at]}"
            at = matches[0]
    # The merge: columns, then sums, statistics and metadata, and last the attribute ``complete``.
    places = {
        name: max(i for i, change in enumerate(changes) if f"/{name}" in change)
        for name in LAST_WRITTEN
    }
    assert list(places.values()) == sorted(places.values()), places


LAST_WRITTEN = (
    "status/c.0",
    "token_covariance_s",
    "projection_stats.json",
    "metadata.json",
    "projections.zarr/zarr.json",
)
