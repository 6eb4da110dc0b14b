"""The output is deleted, or replaced by another store, while a process works on it."""

import errno
import json
import os
import shutil

import numpy as np
import pytest
from helpers.faults import IDENTITY, at_change, fake_owner, fake_rows, make_store, partial_rows
from helpers.outputs import tree_of

from gradproj.coordinator.store_guard import StoreReplaced
from gradproj.coordinator.units import UnitQueue, read_unit
from gradproj.errors import StoreError
from gradproj.store.layout import FOLDERS
from gradproj.store.metadata import WhichStore
from gradproj.store.unit_record import encode_record, record_name

PART = partial_rows()
MADE = {"with other settings": "other", "with the same settings": IDENTITY}


def working(output, **how):
    """Make a process that has claimed unit 0 of two."""
    layout = make_store(output, n_samples=32)
    queue = UnitQueue(output, layout, IDENTITY, [0], fake_owner(0), **how)
    units = queue.take()
    assert next(units) == 0
    return layout, queue, units


def replace(output, identity):
    """Replace the output by another store, whose unit 0 another process has claimed."""
    shutil.rmtree(output)
    layout = make_store(output, n_samples=32, identity=identity)
    assert next(UnitQueue(output, layout, identity, [0], fake_owner(1)).take()) == 0


@pytest.mark.parametrize("made", MADE)
def test_nothing_is_written_into_a_store_that_replaces_this_one_during_a_commit(tmp_path, made):
    layout, queue, _ = working(tmp_path / "count")
    with at_change(-1, lambda: None) as counter:
        assert queue.commit(fake_rows(layout, 0))
    # Not the last change, which deletes the claim of a unit that is committed by then.
    for paused_at in range(next(counter) - 1):
        output = tmp_path / str(paused_at)
        layout, queue, _ = working(output)
        there = {}

        def begin_another(output=output, there=there):
            replace(output, MADE[made])
            there.update(tree_of(output))

        refused = pytest.raises(StoreReplaced, match="was replaced while this job ran")
        with at_change(paused_at, begin_another), refused:
            queue.commit(fake_rows(layout, 0))
        assert tree_of(output) == there, paused_at
        queue.release()
        assert tree_of(output) == there, paused_at


@pytest.mark.parametrize("made", MADE)
def test_process_notices_a_replaced_store_before_it_claims_saves_or_commits(tmp_path, made):
    output = tmp_path / "out"
    layout, queue, units = working(output)
    replace(output, MADE[made])
    there = tree_of(output)
    log = queue.partial_log(0, "key")
    for act in (
        lambda: next(units),
        lambda: log.append(0, 1, PART),
        lambda: queue.commit(fake_rows(layout, 0)),
    ):
        with pytest.raises(
            StoreReplaced, match=rf"now holds a (new )?store {made}.*This job wrote nothing into it"
        ):
            act()
    queue.release()
    assert tree_of(output) == there


def test_replaced_store_is_noticed_in_a_kept_output_directory(tmp_path):
    layout, queue, _ = working(tmp_path)
    for name in ("units", "claims", "projections.zarr"):
        shutil.rmtree(tmp_path / name)
    make_store(tmp_path, n_samples=32)
    with pytest.raises(StoreReplaced, match="a new store with the same settings"):
        queue.commit(fake_rows(layout, 0))
    for folder in ("units", "claims", "projections.zarr/projections"):
        assert [
            path.name for path in (tmp_path / folder).iterdir() if path.name != "zarr.json"
        ] == []


def test_job_does_not_begin_on_a_replaced_store(tmp_path):
    layout = make_store(tmp_path, identity="other")
    with pytest.raises(StoreReplaced, match="a store with other settings"):
        UnitQueue(tmp_path, layout, IDENTITY, [0], fake_owner(0))
    assert list((tmp_path / "tmp").iterdir()) == []


def test_merge_does_not_change_the_store_identity(tmp_path):
    layout, queue, _ = working(tmp_path)
    attributes = tmp_path / "projections.zarr" / "zarr.json"
    attributes.write_text(attributes.read_text().replace('"complete": false', '"complete": true'))
    assert queue.commit(fake_rows(layout, 0))


@pytest.mark.parametrize(
    ("times", "code", "read"),
    [(2, errno.ESTALE, True), (3, errno.ESTALE, False), (1, errno.EIO, False)],
)
def test_attributes_replaced_while_being_read_are_read_again(
    tmp_path, monkeypatch, times, code, read
):
    make_store(tmp_path)
    which, load, left = WhichStore(tmp_path / "projections.zarr"), json.loads, [times]

    def stale(file):
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(code, os.strerror(code))
        return load(file)

    monkeypatch.setattr(json, "loads", stale)
    if read:
        assert which()[0] == IDENTITY
    else:
        with pytest.raises(
            StoreError, match=rf"cannot read .*/zarr\.json \(.*{os.strerror(code)}\)"
        ):
            which()


def test_record_of_another_store_is_an_error(tmp_path):
    layout = make_store(tmp_path)
    path = tmp_path / record_name(1)
    path.write_bytes(encode_record(fake_rows(layout, 1, identity="other").record))
    with pytest.raises(
        StoreError, match=r"belongs to another store \(unit 1, settings other\).*verify .* --repair"
    ):
        read_unit(tmp_path, 1, IDENTITY)


# --- deleted directories ---


@pytest.mark.parametrize(
    ("deleted", "named", "way_out"),
    [
        ("", "", "if it is lost, start over"),
        ("projections.zarr", "projections.zarr", "if it is lost, delete the output and start over"),
        (
            "projections.zarr/projections",
            "projections.zarr/projections",
            "Restore it and start again",
        ),
        ("units", "units", "without it, every unit is computed again"),
        ("claims", "claims", "what was committed is kept"),
    ],
)
def test_commit_reports_a_deleted_directory(tmp_path, deleted, named, way_out):
    output = tmp_path / "out"
    layout, queue, _ = working(output)
    shutil.rmtree(output / deleted)
    with pytest.raises(
        StoreError, match=rf"{output / named} was deleted while this job ran.*{way_out}"
    ):
        queue.commit(fake_rows(layout, 0))
    queue.release()
    assert (output / deleted).exists() is False


@pytest.mark.parametrize("deleted", ["", "projections.zarr", "units", "claims"])
def test_claim_loop_reports_a_deleted_directory(tmp_path, deleted):
    output = tmp_path / "out"
    _, queue, _ = working(output)
    queue.wanted = np.arange(2)
    shutil.rmtree(output / deleted)
    named = rf"{output / deleted} was deleted while this job ran"
    with pytest.raises(StoreError, match=named), queue.deletions_explained():
        list(queue.take())


def test_saving_partial_rows_reports_a_deleted_directory(tmp_path):
    _, queue, _ = working(tmp_path)
    shutil.rmtree(tmp_path / "partial")
    with pytest.raises(
        StoreError,
        match=r"partial was deleted while this job ran\. Start again: what was committed",
    ):
        queue.partial_log(0, "key").append(0, 1, PART)


def test_deleted_scratch_directory_is_made_again(tmp_path):
    layout, queue, _ = working(tmp_path)
    shutil.rmtree(tmp_path / "tmp")
    assert queue.commit(fake_rows(layout, 0))
    assert set(FOLDERS) <= {path.name for path in tmp_path.iterdir()}
