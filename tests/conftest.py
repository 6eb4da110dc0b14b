"""Shared by all tests: one thread, no network, small models."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)

# What outputs.py makes needs transformers and zarr: imported by the tests that ask for it.


@pytest.fixture(scope="session")
def job(tmp_path_factory):
    """``output``, ``corpus``, ``model`` of one finished job, for all tests: not to be changed."""
    from helpers.outputs import finished_job

    return finished_job(tmp_path_factory.mktemp("finished"))


@pytest.fixture
def output(job, tmp_path):
    """A copy of the finished job's output, to be changed."""
    from helpers.outputs import copy_of

    return copy_of(job.output, tmp_path)


@pytest.fixture
def process():
    """A living process of this machine, to be killed."""
    from helpers.outputs import sleeping_process

    running = sleeping_process()
    yield running
    running.kill()
    running.wait()


@pytest.fixture
def no_stale_wait(monkeypatch):
    """A foreign owner is taken for dead at the first look."""
    from gradproj.coordinator import heartbeats as heartbeats_module

    monkeypatch.setattr(heartbeats_module, "STALE_AFTER_S", 0.0)
    monkeypatch.setattr(heartbeats_module, "CONFIRM_AFTER_S", 0.0)


@pytest.fixture
def no_fsync(monkeypatch):
    """Nobody crashes here, so the flushes are only waited for."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
