"""The final merge: interrupted, waited for, and run by a host that hangs in its middle."""

import time

import pytest
from helpers.faults import IDENTITY, at_change, fake_owner, fake_rows, fill, make_store

from gradproj.coordinator.heartbeats import RankProgress
from gradproj.coordinator.merge import MergeInterrupted, finish, is_merged, merge
from gradproj.coordinator.units import UnitQueue


def two_units_of_three(output):
    """Make a store with one unit left, and a process that is about to merge it."""
    layout = make_store(output)
    old = UnitQueue(output, layout, IDENTITY, range(layout.n_units), fake_owner(0))
    units = old.take()
    for unit in (next(units), next(units)):
        old.commit(fake_rows(layout, unit))
    assert old.claims.try_claim("merge")
    return layout, old


def files_of_the_store(output):
    store = [*(output / "projections.zarr").rglob("*"), *output.glob("*.json")]
    return {path: path.read_bytes() for path in store if path.is_file()}


@pytest.mark.usefixtures("no_stale_wait", "no_fsync")
def test_merge_that_wakes_up_late_changes_nothing_in_a_complete_store(tmp_path):
    _, old = two_units_of_three(tmp_path / "count")
    with at_change(-1, lambda: None) as counter:
        merge(old.output, old.claims)
    n_changes, ended = next(counter), 0
    for paused_at in range(n_changes):
        output = tmp_path / str(paused_at)
        layout, old = two_units_of_three(output)
        whole = {}

        def others_finish(output=output, layout=layout, whole=whole):
            assert fill(output, layout, fake_owner(1), writer=1)
            whole.update(files_of_the_store(output))

        with at_change(paused_at, others_finish):
            try:
                merge(output, old.claims)
            except MergeInterrupted:
                ended += 1
        assert files_of_the_store(output) == whole, paused_at
        assert is_merged(output)
    # A merge finishes only if it hung before its last flush, with every file in place.
    assert ended == n_changes - 1


def test_stop_request_interrupts_the_merge_and_the_next_start_merges(tmp_path):
    layout = make_store(tmp_path)
    queue = UnitQueue(tmp_path, layout, IDENTITY, range(layout.n_units), fake_owner(0))
    for unit in queue.take():
        queue.commit(fake_rows(layout, unit))
    answers = iter([False, False, True, True, True])
    assert not finish(tmp_path, queue.claims, wait=True, stopping=lambda: next(answers))
    queue.release()
    assert not is_merged(tmp_path)
    assert fill(tmp_path, layout, fake_owner(1))


def test_rank_waiting_for_a_merge_obeys_a_stop_request(tmp_path):
    layout = make_store(tmp_path)
    busy = UnitQueue(tmp_path, layout, IDENTITY, range(layout.n_units), fake_owner(0))
    for unit in busy.take():
        busy.commit(fake_rows(layout, unit))
    assert busy.claims.try_claim("merge")
    mine = UnitQueue(tmp_path, layout, IDENTITY, range(layout.n_units), fake_owner(1))
    until = time.monotonic() + 0.8
    assert not finish(tmp_path, mine.claims, wait=True, stopping=lambda: time.monotonic() > until)


def test_merge_moves_the_heartbeat(tmp_path):
    layout = make_store(tmp_path)
    progress = RankProgress()
    queue = UnitQueue(tmp_path, layout, IDENTITY, range(layout.n_units), fake_owner(0))
    for unit in queue.take():
        queue.commit(fake_rows(layout, unit))
    assert finish(tmp_path, queue.claims, wait=True, progress=progress)
    assert progress.batches > layout.n_units
