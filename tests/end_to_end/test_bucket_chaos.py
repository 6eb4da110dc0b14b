"""Jobs into a bucket under kills (-9) and a failing network leave the bytes of an undisturbed job.

``launch/test_s3.sh`` runs it against a real S3 server. ``CHAOS_KILLS`` is the number of kills,
``CHAOS_SEED`` repeats a run's choices.
"""

import json
import os
import re
import secrets
import signal
import time
from collections import Counter

import numpy as np
import pytest
from helpers.corpora import make_corpus, mixed_documents
from helpers.fault_proxy import RATES, fault_proxy, url_of
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
N_DOCUMENTS, N_UNITS = 800, 100
START_S, UNIT_S, MERGE_S = 8.0, 0.5, 1.5
"""Longest time to a kill from a start, from a commit, and from the last one."""
LONGEST_S = 40.0
"""Longest time to a kill: ranks wait for one that was killed before all had met."""
TWO_JOBS = 0.5
"""Share of the starts in which two jobs are at work."""


class Tally:
    """Counts of kills by what was killed and when, of starts, stores and faults."""

    def __init__(self):
        self.kills, self.starts, self.stores = Counter(), Counter(), 0
        self.faults = {}

    def killed(self, what, when):
        self.kills[what, when] += 1

    def __str__(self):
        by_what, by_when = (
            dict(Counter(key[i] for key in self.kills.elements())) for i in range(2)
        )
        return (
            f"{self.kills.total()} kills {by_what} {by_when}, {dict(self.starts)} starts, "
            f"{self.stores} stores; requests: {self.faults}"
        )


class Moment:
    """The random point of a run at which to kill next: in a start, between two commits or after.

    It waits for progress, not for a time: otherwise a slow machine would only see starts killed.
    """

    def __init__(self, output, rng):
        self.output = output
        self.begun = self.n_records()
        place, left = rng.random(), N_UNITS - self.begun
        self.records, self.delay_s = None, rng.uniform(0, START_S)
        if left and place < 0.8:
            self.records = self.begun + int(rng.integers(0, min(left, 8)))
            self.delay_s = rng.uniform(0, UNIT_S)
        elif not left and place < 0.7:  # else no merge would ever end
            self.records = N_UNITS + (place < 0.4)
            self.delay_s = rng.uniform(0, MERGE_S)
        self.since = time.monotonic() if self.records is None else None
        self.latest = time.monotonic() + LONGEST_S

    def n_records(self):
        return len(list_records(self.output / "units")) if store_exists(self.output) else 0

    def has_come(self):
        if self.since is None and self.n_records() >= self.records:
            self.since = time.monotonic()
        now = time.monotonic()
        return now > self.latest or (self.since is not None and now > self.since + self.delay_s)

    @property
    def when(self):
        """Phase of the run, as the store shows it."""
        now = self.n_records()
        return "merging" if now == N_UNITS else "at work" if now > self.begun else "starting"


def torment(launches, rng, tally, most_kills):
    """Start one or two jobs of one to three ranks on one store, and kill some or all ranks."""
    ranks, output = launches[0].ranks, launches[0].output
    launches = launches[: 1 + int(rng.random() < TWO_JOBS)]
    for launch in launches:
        launch.start(int(rng.integers(1, 4)))
    tally.starts[f"{len(launches)} jobs"] += 1
    moment, ended = Moment(output, rng), []
    while ranks.pids() and tally.kills.total() < most_kills:
        time.sleep(0.1)
        ended += filter(None, map(ranks.poll, ranks.pids()))
        if ranks.pids() and moment.has_come():
            victims, when = rng.permutation(ranks.pids()), moment.when
            for pid in victims if rng.random() < 0.5 else victims[:1]:
                os.kill(int(pid), signal.SIGKILL)
                tally.killed("rank", when)
            moment = Moment(output, rng)
    return ended + ranks.wait_for_all()


def torment_torchrun(scene, launch, rng, tally, logs):
    """Start a job of two or three ranks by torchrun, and kill its launcher, a worker or all.

    Another job of one rank may be at work beside it, and is killed later.
    """
    ranks, output = launch.ranks, launch.output
    job = Job(scene, output, int(rng.integers(2, 4)), 1, launch.environment, logs)
    beside = rng.random() < TWO_JOBS
    if beside:
        launch.start(1)
    tally.starts["torchrun beside a job" if beside else "torchrun"] += 1
    ended = []
    try:
        moment = Moment(output, rng)
        while job.is_running() and not moment.has_come():
            time.sleep(0.1)
        target, when = str(rng.choice(["launcher", "worker", "job"])), moment.when
        if job.send(signal.SIGKILL, target, rng):
            tally.killed({"job": "launcher and workers"}.get(target, target), when)
        job.wait_until_gone(PATIENCE_S)
        moment = Moment(output, rng)
        while ranks.pids() and not moment.has_come():
            time.sleep(0.1)
            ended += filter(None, map(ranks.poll, ranks.pids()))
        for pid in ranks.pids():
            tally.killed("rank", moment.when)
            os.kill(pid, signal.SIGKILL)
        log = job.log.read_text(errors="replace")
        # torchrun shows a traceback of its own when a worker was killed.
        assert not re.search(r'File ".*/gradproj/|belongs to|is damaged|AssertionError', log), log
    finally:
        job.end()
    return ended + ranks.wait_for_all()


def fill(scene, launches, output, proxy, rng, tally, most_kills, logs):
    """Torment a store until it is complete; the last jobs end in order."""
    while not (store_exists(output) and is_merged(output)):
        if rng.random() < 0.25 and tally.kills.total() < most_kills:
            ended = torment_torchrun(scene, launches[0], rng, tally, logs)
        else:
            ended = torment(launches, rng, tally, most_kills)
        for rank in ended:
            # 2: another rank of the same start was killed before all had met.
            in_order = rank.status in (0, -9) or (rank.status == 2 and "rank" in rank.output)
            assert in_order, f"exit {rank.status}: {rank.output}"
            assert "Traceback" not in rank.output, rank.output
    proxy.wait_until_idle()
    launches[0].finish(1)  # deletes what the dead have left
    tally.stores += 1


def check(output, undisturbed, statistics):
    assert arrays_in_bucket(output) == undisturbed
    stats = json.loads((output / "projection_stats.json").read_text())
    assert {k: v for k, v in stats.items() if k != "timing"} == statistics
    # Not names: SeaweedFS lists folders that have become empty.
    left = {name: (output / name).keys_below() for name in (*FOLDERS, "prepared", "probe")}
    assert len(left.pop("units")) == N_UNITS
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
        while tally.kills.total() < wanted:
            output = path_of(f"{bucket}/out{tally.stores}")
            rng = np.random.default_rng([seed, tally.stores])
            launches = [Launch(ranks, output, environment, **settings) for _ in range(2)]
            fill(scene, launches, output, proxy, rng, tally, wanted, tmp_path)
            tally.faults = dict(proxy.met)
            with capsys.disabled():
                minutes = (time.monotonic() - started) / 60
                print(f"\nCHAOS_SEED={seed}, {minutes:.1f} min: {tally}", flush=True)
            check(output, undisturbed, statistics)
        assert {name for name in RATES if not proxy.met[name]} == set(), "a fault never came"
