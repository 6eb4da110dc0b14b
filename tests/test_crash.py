"""The machine crashes between any two changes of the disk; the store opens, goes on, and ends with the same bits."""

import os
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from disk import Disk, put
from faults import fake_rows, gone_owner
from jobs import flags, make_corpus, make_model, mixed_documents

from gradproj.config import run_config
from gradproj.coordinator.claims import Owner
from gradproj.coordinator.leftovers import sweep
from gradproj.coordinator.merge import finish
from gradproj.coordinator.partial import PartialRows
from gradproj.coordinator.units import UnitQueue
from gradproj.plan import make_plan
from gradproj.start import make_output
from gradproj.store import ProjectionStore
from gradproj.store.records import record_name


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """Of a job of two units."""
    root = tmp_path_factory.mktemp("crash")
    corpus, model = make_corpus(root / "tars", mixed_documents(20)), make_model(root / "model")
    settings = {"shards": corpus, "model": model, "output_dir": root / "out", "rows_per_shard": 16}
    few = {"proj_rank_total": 4, "proj_rank_min": 1, "proj_layers": "q_proj"}
    return make_plan(run_config(flags(**settings, **few), "plan"), progress=False)


def in_folder(plan, output):
    return replace(plan, config=replace(plan.config, job=replace(plan.config.job, output_dir=str(output))))


def run(plan, owner, committed=None):
    """A rank's life with rows that need no model."""
    make_output(plan, owner)
    sweep(plan.output, owner)
    queue = UnitQueue(plan.output, plan.layout, plan.identity_hash, plan.wanted, owner)
    for unit in queue.take():
        part = PartialRows(
            np.arange(3), np.ones((3, 2), np.float32), np.ones(3, np.float32), np.array([1]), {}
        )
        queue.partial_log(unit, "key").append(0, 1, part)
        queue.commit(fake_rows(plan.layout, unit, identity=plan.identity_hash))
        if committed is not None:
            committed.append(unit)
    complete = finish(plan.output, queue.claims, wait=True)
    queue.give_back()
    return complete


def content_of(output):
    """All files of the store and the copies of what it says beside it."""
    files = [
        *(output / "projections.zarr").rglob("*"),
        output / "metadata.json",
        output / "projection_stats.json",
    ]
    return {str(path.relative_to(output)): path.read_bytes() for path in files if path.is_file()}


@pytest.fixture(scope="module")
def undisturbed(plan):
    assert run(plan, gone_owner())
    return SimpleNamespace(output=plan.output, content=content_of(plan.output))


def assert_every_crash_is_survived(disk, plan, undisturbed, tmp_path, monkeypatch):
    me = Owner.this_process("resumed", 0, 0)
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    for number, (when, (tree, committed)) in enumerate(disk.states.items()):
        for unit in committed:
            for name in (record_name(unit), plan.layout.shard_name(unit)):
                want = (undisturbed.output / name).read_bytes()
                assert tree.get(f"/out/{name}") == want, f"{when}: {name} is lost"
        root = tmp_path / str(number)
        put(tree, root)
        resumed = in_folder(plan, root / "out")
        if (root / "out" / "projections.zarr").exists():
            ProjectionStore(root / "out").status_counts()
        assert run(resumed, me), when
        assert content_of(root / "out") == undisturbed.content, when
        for folder in ("claims", "heartbeats", "partial", "tmp"):
            assert list((root / "out" / folder).iterdir()) == [], f"{when}: left over in {folder}"


def test_a_crash_between_any_two_changes_of_a_new_store_is_survived(tmp_path, plan, undisturbed, monkeypatch):
    root = tmp_path / "disk"
    root.mkdir()
    with Disk(root).recording() as disk:
        assert run(in_folder(plan, root / "out"), gone_owner(), disk.promised)
    assert len(disk.states) > 100
    assert_every_crash_is_survived(disk, plan, undisturbed, tmp_path, monkeypatch)


def test_a_crash_while_a_lost_unit_of_a_finished_store_is_computed_again_is_survived(
    tmp_path, plan, undisturbed, monkeypatch
):
    root = tmp_path / "disk"
    root.mkdir()
    shutil.copytree(undisturbed.output, root / "out")
    (root / "out" / record_name(1)).unlink()
    (root / "out" / plan.layout.shard_name(1)).write_bytes(b"damaged")
    disk = Disk(root)
    disk.keep()
    with disk.recording():
        assert run(in_folder(plan, root / "out"), gone_owner(), disk.promised)
    assert len(disk.states) > 50
    assert_every_crash_is_survived(disk, plan, undisturbed, tmp_path, monkeypatch)


def test_data_is_flushed_then_published_then_its_folder_flushed_and_only_then_recorded(tmp_path, plan):
    root = tmp_path / "disk"
    root.mkdir()
    with Disk(root).recording() as disk:
        assert run(in_folder(plan, root / "out"), gone_owner())
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
            found = [i for i in range(at + 1, len(changes)) if re.fullmatch(step, changes[i])]
            assert found, f"no {step} after {changes[at]}"
            at = found[0]
    # The merge: every column, then the sums and what is told of them, and last the word that it is all there.
    places = {name: max(i for i, change in enumerate(changes) if f"/{name}" in change) for name in LAST_WORDS}
    assert list(places.values()) == sorted(places.values()), places


LAST_WORDS = (
    "status/c.0",
    "token_covariance_s",
    "projection_stats.json",
    "metadata.json",
    "projections.zarr/zarr.json",
)
