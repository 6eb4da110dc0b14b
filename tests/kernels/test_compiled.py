"""Compiled loops run whether or not their machine code can be kept."""

import errno

import numpy as np
import pytest
from numba import types
from numba.core.caching import CacheImpl, FunctionCache

from gradproj.kernels.compiled import compiled


def no_folder(monkeypatch):
    monkeypatch.setattr(CacheImpl, "_locator_classes", [])


def full_folder(monkeypatch):
    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(FunctionCache, "_save_overload", fail)
    monkeypatch.setattr(FunctionCache, "_load_overload", fail)


@pytest.mark.parametrize("harm", [no_folder, full_folder])
@pytest.mark.parametrize("signatures", [(), (types.float64(types.float64[:]),)])
def test_loops_run_where_no_folder_keeps_them(monkeypatch, harm, signatures):
    harm(monkeypatch)
    loop = compiled(*signatures)(lambda values: values[0] + 1.0)
    assert loop(np.ones(1)) == 2
