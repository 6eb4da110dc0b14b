"""A real job into a bucket, killed at one step after the other, ends in the bytes of a disk."""

import json

import pytest
from helpers.corpora import make_corpus, mixed_documents
from helpers.fault_proxy import fault_proxy, url_of
from helpers.forked_ranks import Ranks
from helpers.jobs import SMALL_JOB, arrays_of, run_job, wait_for_a_record
from helpers.launches import Launch, arrays_in_bucket

from gradproj.coordinator.merge import is_merged
from gradproj.storage.object_path import path_of
from gradproj.store.layout import FOLDERS

SETTINGS = SMALL_JOB | {"rows_per_shard": 8, "proj_save_interval": 1, "device": "cpu"}
SETTINGS |= {"basis": "eigen", "encoding": "signs", "hidden_state": "mean"}
STEPS = ("store published", "partial published", "shard published", "record published")


def test_a_token_that_expires_in_mid_run_loses_nothing(tmp_path, model_dir, bucket, s3_server):
    if bucket.scheme != "s3":
        pytest.skip("the proxy answers as S3 does")
    shards = make_corpus(tmp_path / "tars", mixed_documents(24), per_tar=20)
    output, url = path_of(f"{bucket}/out"), s3_server.url
    settings = SMALL_JOB | {"rows_per_shard": 8, "device": "cpu", "encoding": "signs"}
    settings |= {"shards": shards, "model": model_dir}
    with fault_proxy(url, seed=0, rates={}) as proxy, Ranks(tmp_path) as ranks:
        environment = s3_server.environment | {"AWS_ENDPOINT_URL": url_of(proxy)}
        launch = Launch(ranks, output, environment, **settings)
        launch.start(1)
        wait_for_a_record(output)
        proxy.refusal = "ExpiredToken"
        ended = ranks.wait_for_one()
        assert ended.status == 2
        assert "the credentials have expired; log in again" in ended.output
        assert "Traceback" not in ended.output
        kept = {path.name: path.read_bytes() for path in (output / "units").iterdir()}
        assert 0 < len(kept) < 3
        proxy.refusal = ""
        launch.finish(1)
    assert is_merged(output)
    assert (output / "logs").names()
    assert all((output / "units" / name).read_bytes() == data for name, data in kept.items())


def test_killed_job_resumes_to_the_bytes_of_a_disk(tmp_path, model_dir, bucket, s3_server):
    shards = make_corpus(tmp_path / "tars", mixed_documents(48), per_tar=20)
    settings = SETTINGS | {"shards": shards, "model": model_dir}
    run_job(1, output_dir=tmp_path / "out", **settings)
    output = path_of(f"{bucket}/some/out")
    (tmp_path / "ranks").mkdir()
    with Ranks(tmp_path / "ranks") as ranks:
        launch = Launch(ranks, output, s3_server.environment, **settings)
        for step in STEPS:
            launch.die_at(step)
        launch.start(2, stop_at="batch done")
        ranks.wait_for_all()
        assert not is_merged(output)
        launch.die_at("block merged")
        launch.finish(2)
        launch.finish(1)  # deletes what requests of the dead have left that were carried out late
    assert arrays_in_bucket(output) == arrays_of(tmp_path / "out")
    assert json.loads((output / "projection_stats.json").read_text())["complete"] is True
    # Objects: SeaweedFS lists an emptied folder for a while.
    left = {name: (output / name).keys_below() for name in (*FOLDERS, "prepared", "probe")}
    assert len(left.pop("units")) == 6
    left.pop("logs")  # maybe none: ranks were stopped before a commit, or killed
    assert not any(left.values()), left
