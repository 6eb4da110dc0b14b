"""When a Slurm job is queued again, with its output on disk and in a bucket."""

from types import SimpleNamespace

import pytest
from helpers.buckets import memory_path
from helpers.faults import fake_owner, fill, make_store

from gradproj.coordinator.failure import note_failure
from gradproj.coordinator.process_id import Owner
from gradproj.coordinator.slurm_marks import note_progress
from gradproj.errors import StoreError
from gradproj.maintenance.requeue import begin_start, end_start
from gradproj.run import commit

JOB, OTHERS = "slurm-7_3", ("slurm-7_30", "slurm-7", "local-7_3")
GOES_ON, ENDS, GAVE_UP = 3, 0, 1


@pytest.fixture(params=["disk", "bucket"])
def output(request, tmp_path, no_fsync):
    return tmp_path / "out" if request.param == "disk" else memory_path("out")


def owner(job_id=JOB):
    return Owner.this_process(job_id, 0, 0)


def unit(output):
    note_progress(output, owner())


def units_of_others(output):
    for job in OTHERS:
        note_progress(output, owner(job))


def user_error(output):
    note_failure(output, owner(), StoreError("a tar has changed"))


def user_error_of_others(output):
    for job in OTHERS:
        note_failure(output, owner(job), StoreError("a tar has changed"))


def lost(output):
    """Its node was lost: nobody judges the start."""
    raise TimeoutError


DRAINED, STOPPED = (0, True), (128 + 15, False)
CRASHED, KILLED, IN_ORDER = (1, False), (137, False), (0, False)


@pytest.mark.parametrize(
    ("starts", "code", "reason"),
    [
        ([(CRASHED,)], GAVE_UP, "ended with code 1 and without a new unit; it is not queued again"),
        ([(KILLED,)], GAVE_UP, "ended with code 137 and without a new unit"),
        ([(CRASHED, units_of_others)], GAVE_UP, "without a new unit; it is not queued again"),
        ([(CRASHED, unit)], GOES_ON, "with new units in this start: queued again"),
        ([(KILLED, unit, unit)], GOES_ON, "with new units in this start: queued again"),
        ([(CRASHED, unit), (CRASHED,)], GAVE_UP, "ended with code 1 and without a new unit"),
        ([(DRAINED,)], GOES_ON, "without a new unit in this start: queued again"),
        ([(STOPPED,)], GOES_ON, "without a new unit in this start: queued again"),
        ([(DRAINED,), (STOPPED,)], GAVE_UP, "two starts in a row ended without a new unit"),
        ([(DRAINED,), (DRAINED,), (DRAINED,)], GOES_ON, "without a new unit in this start"),
        ([(DRAINED,), (DRAINED, unit), (DRAINED,)], GOES_ON, "without a new unit in this start"),
        ([(DRAINED,), (DRAINED, unit, lost), (DRAINED,)], GOES_ON, "without a new unit in this"),
        ([(CRASHED, unit, user_error)], GAVE_UP, "an error that you can fix, see above or "),
        ([(DRAINED, user_error)], GAVE_UP, "an error that you can fix, see above or "),
        ([(CRASHED, unit, user_error_of_others)], GOES_ON, "with new units in this start"),
        ([(CRASHED, user_error), (CRASHED, unit)], GOES_ON, "with new units in this start"),
        ([(IN_ORDER,)], ENDS, "nothing is left to start; other jobs are at work on the rest"),
    ],
)  # fmt: skip
def test_a_job_is_queued_again_only_if_that_helps(output, starts, code, reason):
    make_store(output)
    for (ended, drained), *met in starts:
        assert begin_start(output, JOB).exit_code == GOES_ON
        try:
            for happens in met:
                happens(output)
        except TimeoutError:
            continue
        verdict = end_start(output, JOB, ended, drained)
    assert verdict.exit_code == code
    assert reason in verdict.reason


def test_a_complete_store_ends_the_job_before_and_after_its_ranks(output):
    layout = make_store(output)
    assert begin_start(output, JOB).exit_code == GOES_ON
    assert end_start(output, JOB, *DRAINED).exit_code == GOES_ON
    fill(output, layout, fake_owner(0))
    unit(output)
    assert end_start(output, JOB, *CRASHED).reason == "complete"
    assert begin_start(output, JOB).reason == "complete already"
    assert list((output / "logs").iterdir()) == []


def test_ranks_that_never_made_a_store_are_judged_too(output):
    assert begin_start(output, JOB).exit_code == GOES_ON
    assert "without a new unit" in end_start(output, JOB, *CRASHED).reason


@pytest.mark.parametrize("accepted", [True, False])
def test_a_unit_counts_as_progress_if_this_process_committed_it(output, accepted):
    make_store(output)
    queue = SimpleNamespace(commit=lambda rows: accepted, output=output, owner=owner())
    rows = SimpleNamespace(record=SimpleNamespace(unit=12, stats={}))
    commit(queue, SimpleNamespace(on_host=lambda: rows))
    assert end_start(output, JOB, *CRASHED).exit_code == (GOES_ON if accepted else GAVE_UP)
