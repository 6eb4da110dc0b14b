"""A store is repaired while its job runs: the running job computes again what was taken away."""

import subprocess
import time

from jobs import ENVIRONMENT, assert_same_bits, job_command, make_corpus, mixed_documents, run_job
from outputs import flip_byte, shard_of

from gradproj.repair import repair
from gradproj.store.records import list_records
from gradproj.verify import verify

SETTINGS = {
    "proj_rank_total": 16,
    "proj_rank_min": 2,
    "max_length": 48,
    "batch_size": 1,
    "rows_per_shard": 16,
}
N_REPAIRS = 3


def test_units_repaired_while_the_job_runs_are_computed_again_by_it(tmp_path, model_dir):
    corpus = make_corpus(tmp_path / "tars", mixed_documents(500))
    settings = {"shards": corpus, "model": model_dir, **SETTINGS}
    run_job(1, output_dir=tmp_path / "undisturbed", **settings)
    output, repaired = tmp_path / "out", []
    job = subprocess.Popen(
        job_command(1, output_dir=output, **settings),
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while job.poll() is None:
        recorded = list_records(output / "units").tolist()
        if len(repaired) < N_REPAIRS and len(recorded) > 5 * (len(repaired) + 1):
            unit = next(unit for unit in recorded if unit not in repaired)
            flip_byte(shard_of(output, unit), 100)
            done = repair(verify(output))
            # A unit whose claim is about to be deleted is still its owner's.
            assert (done.units, list(done.held)) in (([unit], []), ([], [unit]))
            repaired += done.units
        time.sleep(0.01)
    said = job.communicate()[0]
    assert job.returncode == 0, said
    assert len(repaired) == N_REPAIRS, "the job was over too soon"
    assert verify(output).exit_code == 0
    assert_same_bits(output, tmp_path / "undisturbed")
