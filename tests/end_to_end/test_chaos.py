"""Real jobs killed at random moments leave the store of an undisturbed job, bit by bit."""

import itertools
import os
import secrets
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers.chaos import PATIENCE_S, Tally, discard, fill_under_kills
from helpers.corpora import make_corpus, mixed_documents
from helpers.jobs import SMALL_JOB, Scene, run_job

SETTINGS = SMALL_JOB | {"rows_per_shard": 16}
LANES = 4
"""Stores filled side by side in the long form: a job's start and end mostly wait."""


def make_scene(folder, model_dir, n_documents):
    corpus = make_corpus(folder / "tars", mixed_documents(n_documents), per_tar=500)
    scene = Scene(corpus, model_dir, SETTINGS, folder / "undisturbed")
    run_job(1, timeout=PATIENCE_S, **scene.flags(scene.undisturbed))
    return scene


@pytest.fixture(scope="module")
def seed():
    return int(os.environ.get("CHAOS_SEED") or secrets.randbits(32))


def say(capsys, text):
    with capsys.disabled():
        print(f"\n{text}", flush=True)


def test_few_kills_of_two_jobs_leave_the_store_of_an_undisturbed_job(tmp_path, model_dir, seed):
    # 60 units, so that some are left after the kills.
    scene = make_scene(tmp_path, model_dir, 960)
    tally, started = Tally(most=2), time.monotonic()
    print(f"CHAOS_SEED={seed}")
    fill_under_kills(scene, tmp_path / "out", tally, np.random.default_rng([seed, 2]), jobs=2)
    print(tally.table(seed, time.monotonic() - started))
    assert len(tally.kills) >= 1


@pytest.mark.chaos
def test_hundreds_of_kills_leave_the_stores_of_an_undisturbed_job(
    tmp_path, model_dir, capsys, seed
):
    wanted = int(os.environ.get("CHAOS_KILLS", 300))
    scene = make_scene(tmp_path, model_dir, 6000)
    tally, started, numbers = Tally(most=10**9), time.monotonic(), itertools.count()
    say(capsys, f"CHAOS_SEED={seed}")

    def fill_one_store_after_the_other():
        while len(tally.kills) < min(wanted, tally.most):
            number = next(numbers)
            output, rng = tmp_path / f"out{number}", np.random.default_rng([seed, number])
            try:
                # Two jobs of two ranks every other time.
                fill_under_kills(scene, output, tally, rng, jobs=1 + number % 2)
            except BaseException:
                tally.most = 0  # ends the other lanes
                raise
            say(capsys, tally.table(seed, time.monotonic() - started))
            discard(output)

    with ThreadPoolExecutor(LANES) as lanes:
        for lane in [lanes.submit(fill_one_store_after_the_other) for _ in range(LANES)]:
            lane.result()
    assert len(tally.kills) >= wanted
