"""User errors and full disks under real launchers: one line, exit code 2, nothing lost."""

import os
import resource
import subprocess

import pytest
from helpers.forked_ranks import run_forked
from helpers.gate import Gate
from helpers.jobs import (
    ENVIRONMENT,
    PATIENCE_S,
    arrays_of,
    assert_same_bits,
    flags,
    job_command,
    run_job,
    start_at_gate,
    wait_for_a_record,
)
from helpers.outputs import tree_of

from gradproj.maintenance.verify import verify

SETTINGS = {"proj_rank_total": 24, "proj_rank_min": 3, "batch_size": 8, "max_length": 48}


def our_lines(text):
    return [line for line in text.splitlines() if line.startswith("gradproj:")]


@pytest.mark.parametrize("ranks", [1, 2])
def test_user_error_is_printed_once_and_leaves_nothing_behind(tmp_path, corpus, ranks):
    settings = {"shards": corpus, "model": tmp_path / "nowhere", "output_dir": tmp_path / "out"}
    # torchrun exits with 1 whatever its workers exit with.
    done = run_job(ranks, expect=2 if ranks == 1 else 1, **settings)
    assert our_lines(done.stderr) == [
        f"gradproj: --model {tmp_path / 'nowhere'}: no such directory"
    ]
    assert not (tmp_path / "out").exists()
    if ranks == 1:
        assert "Traceback" not in done.stderr


def test_flag_error_is_printed_once_for_all_ranks(tmp_path, corpus, model_dir):
    done = run_job(
        2, expect=1, shards=corpus, model=model_dir, output_dir=tmp_path / "out", batch_size="many"
    )
    assert our_lines(done.stderr) == ["gradproj: --batch_size: invalid int value: 'many'"]


def test_job_refused_for_other_settings_leaves_the_store_unchanged(tmp_path, corpus, model_dir):
    settings = {"shards": corpus, "model": model_dir, "output_dir": tmp_path / "out", **SETTINGS}
    run_job(1, **settings)
    before = tree_of(tmp_path / "out")
    done = run_job(1, expect=2, **{**settings, "max_length": 32})
    assert len(our_lines(done.stderr)) == 1
    assert "--max_length: store 48, this run 32" in done.stderr
    assert tree_of(tmp_path / "out") == before


def test_read_only_output_is_a_one_line_error(tmp_path, corpus, model_dir):
    if os.geteuid() == 0:
        parent = "/proc"  # root may write anywhere but into the kernel's own files
    else:
        (tmp_path / "locked").mkdir(mode=0o500)
        parent = tmp_path / "locked"
    done = run_job(
        1, expect=2, shards=corpus, model=model_dir, output_dir=f"{parent}/out", **SETTINGS
    )
    assert len(our_lines(done.stderr)) == 1
    assert "/out" in our_lines(done.stderr)[0]
    assert "Traceback" not in done.stderr


def test_file_size_limit_is_a_one_line_error_and_the_job_resumes_later(tmp_path, corpus, model_dir):
    settings = {
        "shards": corpus,
        "model": model_dir,
        "proj_dtype": "float32",
        "rows_per_shard": 64,
        **SETTINGS,
    }
    run_job(1, output_dir=tmp_path / "undisturbed", **settings)
    limit = 80_000  # above every small file of the store, below a shard of 64 rows

    done = subprocess.run(
        job_command(1, output_dir=tmp_path / "out", **settings),
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 2, done.stderr
    assert len(our_lines(done.stderr)) == 1
    assert "cannot write" in our_lines(done.stderr)[0]
    assert "Traceback" not in done.stderr
    run_job(1, output_dir=tmp_path / "out", **settings)
    assert_same_bits(tmp_path / "out", tmp_path / "undisturbed")


@pytest.fixture
def small_disk(tmp_path):
    """A separate file system of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_is_a_one_line_error_and_loses_nothing(tmp_path, corpus, model_dir, small_disk):
    settings = {"shards": corpus, "model": model_dir, "batch_size": 1, "max_length": 48}
    run_job(1, output_dir=tmp_path / "undisturbed", **settings)
    gate = Gate(tmp_path / "gate", batches=24)  # of 16 a unit
    job = start_at_gate(gate, output_dir=small_disk / "out", **settings)
    wait_for_a_record(small_disk / "out")
    fill(small_disk)
    gate.open()
    _, errors = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 2, errors
    assert len(our_lines(errors)) == 1
    assert "No space left on device. Free space there, then start again" in our_lines(errors)[0]
    kept = sorted((small_disk / "out" / "units").iterdir())
    assert 1 <= len(kept) < 13
    contents = [path.read_bytes() for path in kept]
    (small_disk / "filler").unlink()
    run_job(1, output_dir=small_disk / "out", **settings)
    assert [path.read_bytes() for path in kept] == contents
    assert_same_bits(small_disk / "out", tmp_path / "undisturbed")
    assert arrays_of(small_disk / "out")["status"] == bytes([1] * 200)


def test_folder_turned_read_only_is_a_one_line_error_and_loses_nothing(
    tmp_path, corpus, model_dir, small_disk
):
    output = small_disk / "out"
    settings = {
        "shards": corpus,
        "model": model_dir,
        "output_dir": output,
        **SETTINGS,
        "batch_size": 4,
    }
    gate = Gate(tmp_path / "gate", batches=6)  # of 4 or more a unit
    job = start_at_gate(gate, **settings)
    wait_for_a_record(output)
    # By a second mount over the first: a mount with files open for writing, such as the log, cannot
    # be made read-only.
    subprocess.run(["mount", "--bind", small_disk, small_disk], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", small_disk], check=True)
    gate.open()
    try:
        errors = job.communicate(timeout=PATIENCE_S)[1]
    finally:
        subprocess.run(["umount", small_disk], check=True)
    assert job.returncode == 2, errors
    assert len(our_lines(errors)) == 1
    assert (
        "Read-only file system. Make it writable and start again: what was finished is kept"
        in errors
    )
    assert "Traceback" not in errors
    kept = {path: path.read_bytes() for path in (output / "units").iterdir()}
    assert 1 <= len(kept) < 13
    run_job(1, **settings)
    assert {path: path.read_bytes() for path in kept} == kept
    assert verify(output).exit_code == 0


def fill(disk):
    with open(disk / "filler", "wb", buffering=0) as file:
        while True:
            try:
                file.write(bytes(4096))
            except OSError:
                return


def test_plan_prints_the_same_line_as_the_job(tmp_path, corpus, model_dir):
    settings = {
        "shards": corpus,
        "model": model_dir,
        "output_dir": tmp_path / "out",
        "proj_layers": "nope",
    }
    job = run_job(1, expect=2, **settings)
    plan = run_forked(["gradproj.__main__", "plan", *flags(**settings)])
    assert plan.returncode == 2
    assert our_lines(plan.stderr) == our_lines(job.stderr)
    assert len(our_lines(plan.stderr)) == 1
