"""Fencing deletes everything that a process had prepared."""

import errno
import os

import pytest
from helpers.faults import IDENTITY, fake_owner, fake_rows, make_store

from gradproj.coordinator import fencing as fencing_module
from gradproj.coordinator import heartbeats as heartbeats_module
from gradproj.coordinator.fencing import fence, make_scratch
from gradproj.coordinator.units import UnitQueue
from gradproj.errors import StoreError


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(fencing_module, "DELETE_RETRY_S", (0.0, 0.0))
    monkeypatch.setattr(heartbeats_module, "STALE_AFTER_S", 0.0)
    monkeypatch.setattr(heartbeats_module, "CONFIRM_AFTER_S", 0.0)


@pytest.fixture
def folders(tmp_path):
    """Scratch directories of two processes; the first holds a prepared shard."""
    theirs, mine = (tmp_path / "tmp" / fake_owner(number).name for number in (0, 1))
    for number, folder in enumerate((theirs, mine)):
        make_scratch(folder, fake_owner(number))
    (theirs / "shard-3").write_bytes(b"prepared")
    return theirs, mine


def refuse(monkeypatch, name, of, times, code=errno.EBUSY):
    """Make ``os.NAME`` fail this many times for paths that start with ``of``."""
    real, left = getattr(os, name), [times]

    def failing(path, *args, **options):
        if os.fspath(path).startswith(of) and left[0]:
            left[0] -= 1
            raise OSError(code, os.strerror(code), path)
        return real(path, *args, **options)

    monkeypatch.setattr(os, name, failing)


def test_fence_deletes_the_whole_scratch_directory(folders):
    theirs, mine = folders
    assert fence(theirs, mine, fake_owner(1))
    assert not theirs.exists()
    assert [path.name for path in mine.iterdir()] == ["owner.json"]
    assert not fence(theirs, mine, fake_owner(1))


def test_fence_retries_failed_deletions(folders, monkeypatch):
    theirs, mine = folders
    refuse(monkeypatch, "unlink", "shard", times=2)
    assert fence(theirs, mine, fake_owner(1))
    assert [path.name for path in mine.iterdir()] == ["owner.json"]


@pytest.mark.parametrize(
    ("name", "of", "left"), [("unlink", "shard", "shard-3"), ("rmdir", "", "fenced-.*")]
)
def test_incomplete_fence_is_an_error(folders, monkeypatch, name, of, left):
    theirs, mine = folders
    refuse(monkeypatch, name, of, times=1000)
    with pytest.raises(
        StoreError, match=rf"files in {theirs} .*\({left}\): they could still be published\. Delete"
    ):
        fence(theirs, mine, fake_owner(1))


def test_scratch_directory_that_cannot_be_moved_is_an_error(folders, monkeypatch):
    theirs, mine = folders
    refuse(monkeypatch, "rename", os.fspath(theirs), times=1, code=errno.EACCES)
    with pytest.raises(
        StoreError, match=rf"cannot write {theirs}: Permission denied\. Fix the permissions"
    ):
        fence(theirs, mine, fake_owner(1))


def test_deleted_nfs_files_held_open_do_not_fail_the_fence(folders):
    theirs, mine = folders
    (theirs / "shard-3").rename(theirs / ".nfs0001")
    keep = os.unlink

    def silly(path, **options):
        if path != ".nfs0001":
            keep(path, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "unlink", silly)
        assert fence(theirs, mine, fake_owner(1))


def test_process_that_cannot_fence_the_previous_owner_computes_nothing(tmp_path, monkeypatch):
    layout = make_store(tmp_path, n_samples=16)
    old = UnitQueue(tmp_path, layout, IDENTITY, [0], fake_owner(0))
    assert next(old.take()) == 0
    new = UnitQueue(tmp_path, layout, IDENTITY, [0], fake_owner(1))
    with monkeypatch.context() as patch:
        refuse(patch, "rmdir", "", times=1000)
        with pytest.raises(StoreError, match="could still be published"):
            next(new.take())
    new.release()
    third = UnitQueue(tmp_path, layout, IDENTITY, [0], fake_owner(2))
    assert next(third.take()) == 0
    assert third.commit(fake_rows(layout, 0))
