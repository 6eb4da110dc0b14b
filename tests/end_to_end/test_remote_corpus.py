"""A job whose tars lie in a bucket or on a web server: the rows of the disk, or one line."""

import json

import pytest
from helpers.forked_ranks import ForkedProcess, environments
from helpers.http_files import http_files
from helpers.jobs import assert_same_bits, job_command
from helpers.outputs import N_UNITS, ROWS_PER_UNIT, SETTINGS

from gradproj.__main__ import main
from gradproj.corpus.index_file import load_index
from gradproj.storage.object_path import object_at
from gradproj.store.texts import RecordedTexts

SECRET = "SecretKeyOfTheTests"
KEYS = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


def run(environment, ranks=1, **settings):
    """Run the job; its exit code and the lines of its standard error."""
    argv = job_command(1, **SETTINGS | settings)[2:]
    started = [ForkedProcess(argv, environment=environment | own) for own in environments(ranks)]
    errors = "".join(process.communicate()[1] for process in started)
    return max(process.returncode for process in started), errors.splitlines()


def files_of(output):
    return [path.read_bytes() for path in output.rglob("*") if path.is_file()]


@pytest.fixture
def site(job):
    """A server of the job's tars; a bucket of S3 too, for what asks for no listing."""
    tars = sorted(job.corpus.glob("*.tar"))
    with http_files(files={f"/bucket/{tar.name}": tar.read_bytes() for tar in tars}) as site:
        yield site


@pytest.fixture
def from_site(site, job, tmp_path):
    """Run the job from the server, as S3."""

    def from_site(**changes):
        names = ",".join(path.rpartition("/")[2] for path in site.files)
        shards = f"s3://bucket/{{{names}}}" if "," in names else f"s3://bucket/{names}"
        settings = {"shards": shards, "model": job.model, "output_dir": tmp_path / "out"}
        environment = KEYS | {"AWS_ENDPOINT_URL": site.url}
        return run(environment, rows_per_shard=ROWS_PER_UNIT, **settings | changes)

    return from_site


def test_two_ranks_from_a_bucket_give_the_rows_of_the_disk(
    job, bucket, s3_server, tmp_path, capsys
):
    for tar in job.corpus.glob("*.tar"):
        object_at(bucket / "tars" / tar.name).put([tar.read_bytes()])
    settings = {"shards": f"{bucket}/tars", "model": job.model, "output_dir": tmp_path / "out"}
    code, errors = run(s3_server.environment, ranks=2, **settings)
    assert code == 0, errors
    assert_same_bits(tmp_path / "out", job.output)
    index = load_index(tmp_path / "out" / "corpus.json")
    assert str(index.tars[0].path).startswith(f"{bucket}/tars/")
    secret = s3_server.secret.encode()
    if len(secret) > 8:  # that of another server may be in any file
        assert not any(secret in content for content in files_of(tmp_path / "out"))
    # What reads documents later reads them from there.
    assert RecordedTexts(tmp_path / "out")(3) == RecordedTexts(job.output)(3)
    assert main(["verify", str(tmp_path / "out"), "--recompute", "3", "--device", "cpu"]) == 0
    capsys.readouterr()
    # The job goes on after the tars were written again, if they are indexed again.
    for tar in job.corpus.glob("*.tar"):
        object_at(bucket / "tars" / tar.name).put([tar.read_bytes()])
    assert main(["index", f"{bucket}/tars"]) == 0
    code, errors = run(s3_server.environment, **settings)
    assert code == 0, errors


def test_a_unit_is_one_request(site, from_site):
    code, errors = from_site()
    assert code == 0, errors
    n_tars = len(site.files)
    asked = [r.path for r in site.gets() if r.path.endswith(".tar")]
    # The index reads each tar once, the first checks read at 4 places; one unit is of two tars.
    assert len(asked) - n_tars - 4 == N_UNITS + 1


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            (403, b"<Error><Code>InvalidAccessKeyId</Code></Error>"),
            "does not accept the credentials",
        ),
        ((404, b"<Error><Code>NoSuchBucket</Code></Error>"), "there is no such bucket"),
        ((403, b""), "permission denied"),
    ],
)
def test_a_bucket_that_cannot_be_read_is_one_line(answer, words, site, from_site):
    site.faults.extend([answer] * 20)
    site.fails_head = True
    code, errors = from_site()
    assert code == 2
    assert len(errors) == 1, errors
    assert words in errors[0]
    assert SECRET not in errors[0]


GONE = [
    ((400, b"<Error><Code>ExpiredToken</Code></Error>"), "the credentials have expired"),
    ((412, b""), ".tar: changed since it was indexed: its etag or size is not"),
    ((404, b""), ".tar: changed since it was indexed: it does not exist any more"),
]


def test_a_job_that_its_tars_leave_in_mid_run_ends_with_one_line_and_goes_on_later(
    site, from_site, job, tmp_path
):
    # Before it: two small files that may lie beside the tars, the index, 4 places, 2 units.
    n_gets = 2 + len(site.files) + 4 + 2
    for answer, words in GONE:
        site.faults.extend([None] * n_gets + [answer])
        code, errors = from_site()
        assert code == 2
        said = [line for line in errors if line.startswith("gradproj: ")]
        assert len(said) == 1, errors
        assert words in said[0]
        failure = json.loads((tmp_path / "out" / "failed.json").read_text())
        assert words in json.dumps(failure)
        site.faults.clear()
        n_gets = 1 + 1  # later starts ask for the first file and for units
    assert from_site()[0] == 0
    assert_same_bits(tmp_path / "out", job.output)
