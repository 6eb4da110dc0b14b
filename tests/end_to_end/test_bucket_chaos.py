"""Jobs into a bucket under kills (-9) and a failing network leave the bytes of an undisturbed job.

``launch/test_s3.sh`` runs it against a real S3 server. ``CHAOS_KILLS`` is the number of kills,
``CHAOS_SEED`` repeats a run's choices.
"""

import json
import os
import secrets
import signal
import time

import numpy as np
import pytest
from helpers.corpora import make_corpus, mixed_documents
from helpers.fault_proxy import fault_proxy, url_of
from helpers.forked_ranks import Ranks
from helpers.jobs import PATIENCE_S, SMALL_JOB, Job, Scene, arrays_of, run_job
from helpers.launches import Launch, arrays_in_bucket

from gradproj.coordinator.merge import is_merged
from gradproj.maintenance.verify import verify
from gradproj.storage.object_path import path_of
from gradproj.store.layout import FOLDERS
from gradproj.store.metadata import store_exists
from gradproj.store.unit_record import list_records

SETTINGS = SMALL_JOB | {"rows_per_shard": 8, "proj_save_interval": 2, "device": "cpu"}
SETTINGS |= {"encoding": "signs", "hidden_state": "mean"}
N_DOCUMENTS = 240
LONGEST_S = 8.0
"""Longest time to the next kill, if it does not wait for records."""


class Tally:
    """Counts of kills, starts, stores and faults."""

    def __init__(self):
        self.kills = self.launchers = self.starts = self.stores = 0
        self.faults = {}

    def __str__(self):
        return (
            f"{self.kills} kills ({self.launchers} of launchers) in {self.starts} starts of ranks, "
            f"{self.stores} stores; requests: "
            f"{self.faults}"
        )


def moment(output, rng):
    """Return a function that says whether the time for the next kill has come."""
    until, records = time.monotonic() + rng.uniform(0.5, LONGEST_S), np.inf
    if rng.random() < 0.7 and store_exists(output):
        # While units are committed. A merge, or a job that only waits, has its time too.
        records = len(list_records(output / "units")) + int(rng.integers(1, 8))
        until += 60
    return lambda: (
        time.monotonic() > until
        or (records < np.inf and len(list_records(output / "units")) >= records)
    )


def torment(launches, rng, tally, most_kills):
    """Start one or two jobs of one to three ranks on one store, and kill some or all ranks."""
    ranks, output = launches[0].ranks, launches[0].output
    for launch in launches[: 1 + int(rng.random() < 0.4)]:
        n = int(rng.integers(1, 4))
        launch.start(n)
        tally.starts += n
    is_time, ended = moment(output, rng), []
    while ranks.pids() and tally.kills < most_kills:
        time.sleep(0.1)
        ended += filter(None, map(ranks.poll, ranks.pids()))
        if ranks.pids() and is_time():
            victims = rng.permutation(ranks.pids())
            for pid in victims if rng.random() < 0.5 else victims[:1]:
                os.kill(int(pid), signal.SIGKILL)
                tally.kills += 1
            is_time = moment(output, rng)
    return ended + ranks.wait_for_all()


def torment_torchrun(scene, output, environment, rng, tally, logs):
    """Start a job of two or three ranks by torchrun, and kill its launcher, a worker or all."""
    job = Job(scene, output, int(rng.integers(2, 4)), 1, environment, logs)
    try:
        is_time = moment(output, rng)
        while job.is_running() and not is_time():
            time.sleep(0.1)
        target = str(rng.choice(["launcher", "worker", "job"]))
        if job.send(signal.SIGKILL, target, rng):
            tally.kills += 1
            tally.launchers += target != "worker"
        job.wait_until_gone(PATIENCE_S)
        assert "Traceback" not in job.log_text() or target == "worker", job.log_text()
    finally:
        job.end()


def fill(scene, launches, output, rng, tally, most_kills, logs):
    """Torment a store until it is complete; the last jobs end in order."""
    environment = launches[0].environment
    while not (store_exists(output) and is_merged(output)):
        if rng.random() < 0.15 and tally.kills < most_kills:
            torment_torchrun(scene, output, environment, rng, tally, logs)
            continue
        for rank in torment(launches, rng, tally, most_kills):
            # 2: another rank of the same start was killed before all had met.
            in_order = rank.status in (0, -9) or (rank.status == 2 and "rank" in rank.output)
            assert in_order, f"exit {rank.status}: {rank.output}"
            assert "Traceback" not in rank.output, rank.output
    launches[0].finish(1)  # deletes what the dead have left
    tally.stores += 1


def check(output, undisturbed, statistics):
    assert arrays_in_bucket(output) == undisturbed
    stats = json.loads((output / "projection_stats.json").read_text())
    assert {k: v for k, v in stats.items() if k != "timing"} == statistics
    left = {name: (output / name).names() for name in (*FOLDERS, "prepared", "probe")}
    assert len(left.pop("units")) == N_DOCUMENTS // 8
    left.pop("logs")
    assert not any(left.values()), left
    verification = verify(output)
    assert verification.exit_code == 0, verification.damage


@pytest.mark.s3
def test_kills_and_a_failing_network_leave_the_bytes_of_an_undisturbed_job(
    tmp_path, model_dir, s3_server, bucket, capsys
):
    seed = int(os.environ.get("CHAOS_SEED") or secrets.randbits(32))
    wanted, tally, started = int(os.environ.get("CHAOS_KILLS", 100)), Tally(), time.monotonic()
    shards = make_corpus(tmp_path / "tars", mixed_documents(N_DOCUMENTS), per_tar=100)
    settings = SETTINGS | {"shards": shards, "model": model_dir}
    run_job(1, output_dir=tmp_path / "out", **settings)
    undisturbed = arrays_of(tmp_path / "out")
    statistics = json.loads((tmp_path / "out" / "projection_stats.json").read_text())
    statistics.pop("timing")
    scene = Scene(shards, model_dir, SETTINGS, tmp_path / "out")
    (tmp_path / "ranks").mkdir()
    with fault_proxy(s3_server.url, seed) as proxy, Ranks(tmp_path / "ranks") as ranks:
        environment = s3_server.environment | {"AWS_ENDPOINT_URL": url_of(proxy)}
        while tally.kills < wanted:
            output = path_of(f"{bucket}/out{tally.stores}")
            rng = np.random.default_rng([seed, tally.stores])
            launches = [Launch(ranks, output, environment, **settings) for _ in range(2)]
            fill(scene, launches, output, rng, tally, wanted, tmp_path)
            tally.faults = dict(proxy.met)
            with capsys.disabled():
                minutes = (time.monotonic() - started) / 60
                print(f"\nCHAOS_SEED={seed}, {minutes:.1f} min: {tally}", flush=True)
            check(output, undisturbed, statistics)
