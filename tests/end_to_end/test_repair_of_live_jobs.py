"""Repairs of a store while its job runs; deleted files are noticed at a job's start."""

import json
import shutil

from helpers.corpora import make_corpus, mixed_documents
from helpers.forked_ranks import Ranks
from helpers.gate import Gate
from helpers.jobs import assert_same_bits, flags, run_job, start_at_gate
from helpers.outputs import flip_byte, shard_of

from gradproj.maintenance.repair import repair
from gradproj.maintenance.verify import verify
from gradproj.store.unit_record import list_records

SETTINGS = {
    "proj_rank_total": 16,
    "proj_rank_min": 2,
    "max_length": 48,
    "batch_size": 1,
    "rows_per_shard": 16,
}
N_REPAIRS = 3
BATCHES_A_REPAIR = 40
"""More than two units: one is committed and its claim is deleted while the job waits."""


def test_running_job_recomputes_units_repaired_meanwhile(tmp_path, model_dir):
    corpus = make_corpus(tmp_path / "tars", mixed_documents(200))
    settings = {"shards": corpus, "model": model_dir, **SETTINGS}
    run_job(1, output_dir=tmp_path / "undisturbed", **settings)
    output, repaired = tmp_path / "out", []
    gate = Gate(tmp_path / "gate", batches=BATCHES_A_REPAIR)
    job = start_at_gate(gate, output_dir=output, **settings)
    for number in range(N_REPAIRS):
        gate.admit(BATCHES_A_REPAIR * (number + 1))
        gate.wait_for(1, lambda: job.poll() is None, lambda: job.communicate()[0])
        recorded = list_records(output / "units").tolist()
        unit = next(unit for unit in recorded if unit not in repaired)
        flip_byte(shard_of(output, unit), 100)
        while unit not in repaired:
            done = repair(verify(output))
            # A unit whose claim is about to be deleted still belongs to its owner.
            assert (done.units, list(done.held)) in (([unit], []), ([], [unit]))
            repaired += done.units
    gate.open()
    _, errors = job.communicate()
    assert job.returncode == 0, errors
    assert verify(output).exit_code == 0
    assert_same_bits(output, tmp_path / "undisturbed")


def test_job_does_not_report_deleted_units_as_done(tmp_path, model_dir):
    corpus, output = make_corpus(tmp_path / "tars", mixed_documents(70)), tmp_path / "out"
    argv = [
        "gradproj.run",
        *flags(shards=corpus, model=model_dir, output_dir=output, device="cpu", **SETTINGS),
    ]
    store, away, units = output / "projections.zarr", tmp_path / "away", output / "units"
    with Ranks(tmp_path) as ranks:

        def start():
            ranks.start(argv)
            (ended,) = ranks.wait_for_all()
            lines = [line for line in ended.output.splitlines() if line.startswith("gradproj:")]
            return ended.status, lines, ended.output

        assert start()[0] == 0
        shutil.copytree(output, tmp_path / "undisturbed")
        # An unfinished store whose rows are all gone; it is restored afterwards.
        last = (units / "00000004.safetensors").rename(tmp_path / "last")
        store.rename(away)
        code, lines, said = start()
        assert (code, len(lines)) == (2, 1), said
        assert f"{output} holds the records of 4 units but no projections.zarr" in lines[0]
        assert not store.exists()
        away.rename(store)
        last.rename(units / "00000004.safetensors")
        # One shard.
        shard_of(output, 1).unlink()
        code, lines, said = start()
        assert (code, len(lines)) == (2, 1), said
        assert (
            "1 committed unit without a shard in projections.zarr/projections: 1. Restore the files"
            in lines[0]
        )
        assert (
            "committed unit without a shard"
            in json.loads((output / "failed.json").read_text())["error"]
        )
        assert repair(verify(output)).units == [1]
        assert start()[0] == 0
    assert verify(output).exit_code == 0
    assert_same_bits(output, tmp_path / "undisturbed")
