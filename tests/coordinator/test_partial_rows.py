"""Saved rows of unfinished units."""

import numpy as np
from helpers.faults import fake_owner
from helpers.faults import partial_rows as part

from gradproj.coordinator.file_commits import FileCommits
from gradproj.coordinator.partial_rows import PartialLog


def partial_log(tmp_path, key="key"):
    (tmp_path / "partial").mkdir(exist_ok=True)
    folder = tmp_path / "partial" / "00000001"
    return PartialLog(folder, FileCommits(tmp_path, fake_owner(0)), key)


def test_partial_rows_are_read_back_exactly_and_in_order(tmp_path):
    log = partial_log(tmp_path)
    assert log.read() == (0, [])
    log.append(0, 2, part(0))
    log.append(2, 7, part(3))
    done, parts = log.read()
    assert done == 7
    assert [n_batches for n_batches, _ in parts] == [2, 7]
    for (_, got), want in zip(parts, [part(0), part(3)], strict=True):
        for name, value in vars(want).items():
            np.testing.assert_equal(getattr(got, name), value)


def test_partial_rows_of_other_settings_are_ignored(tmp_path):
    partial_log(tmp_path).append(0, 2, part(0))
    assert partial_log(tmp_path, key="other").read() == (0, [])


def test_partial_rows_are_read_up_to_the_first_damaged_file(tmp_path):
    log = partial_log(tmp_path)
    for first in (0, 2, 4):
        log.append(first, first + 2, part(first))
    damaged = sorted(log.folder.iterdir())[1]
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    assert log.read()[0] == 2
