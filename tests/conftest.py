"""Settings and fixtures of all tests: one thread, no network, a finished job."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)

# The fixtures import helpers.outputs lazily: it needs transformers and zarr.


@pytest.fixture(scope="session")
def job(tmp_path_factory):
    """``output``, ``corpus`` and ``model`` of one finished job, shared by all tests. Read only."""
    from helpers.outputs import finished_job

    return finished_job(tmp_path_factory.mktemp("finished"))


@pytest.fixture
def output(job, tmp_path):
    """A copy of the finished job's output, which a test may change."""
    from helpers.outputs import copy_of

    return copy_of(job.output, tmp_path)


@pytest.fixture
def process():
    """A running process of this machine, which a test may kill."""
    from helpers.outputs import sleeping_process

    running = sleeping_process()
    yield running
    running.kill()
    running.wait()


@pytest.fixture
def no_stale_wait(monkeypatch):
    """Claims of other hosts count as stale at the first look."""
    from gradproj.coordinator import heartbeats as heartbeats_module

    monkeypatch.setattr(heartbeats_module, "STALE_AFTER_S", 0.0)
    monkeypatch.setattr(heartbeats_module, "CONFIRM_AFTER_S", 0.0)


@pytest.fixture
def no_fsync(monkeypatch):
    """Skip fsync, for tests without a crash."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="session")
def s3_server():
    """An S3 server, which all tests share."""
    from helpers.s3 import s3_server

    with s3_server() as server:
        yield server


@pytest.fixture
def bucket(s3_server, monkeypatch):
    """The address of an empty bucket, with the environment that reaches it."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server.new_bucket()
