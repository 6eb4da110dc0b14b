"""Threads of zarr-python, for processes that are one of many on a machine."""

from contextlib import AbstractContextManager

import zarr


def few_zarr_threads() -> AbstractContextManager[object]:
    """Let zarr start at most two threads, until the context ends.

    Zarr's default is cores + 4 threads a process: with eight ranks on a node, hundreds. This is
    for processes of gradproj's own; a library must not change zarr's settings for its user.
    """
    return zarr.config.set({"threading.max_workers": 2, "async.concurrency": 4})
