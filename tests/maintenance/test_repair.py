"""``verify --repair`` deletes damage and nothing else; the job's next start restores every bit."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.jobs import assert_same_bits, job_command, run_job
from helpers.outputs import (
    DAMAGES,
    N_UNITS,
    ROWS_PER_UNIT,
    SETTINGS,
    cut,
    flip_byte,
    owner_of,
    shard_of,
    tree_of,
    uncommit,
    write_claim,
)

from gradproj.__main__ import main
from gradproj.cli.verify import repair_lines
from gradproj.coordinator.merge import merge
from gradproj.errors import StoreError
from gradproj.job import recorded
from gradproj.job.config import run_config
from gradproj.maintenance.job_output import read_output
from gradproj.maintenance.repair import repair
from gradproj.maintenance.verify import verify
from gradproj.store import STATUS, ProjectionStore
from gradproj.store.unit_record import record_name


def record_of(output: Path, unit: int) -> Path:
    return output / record_name(unit)


def contents(output: Path) -> dict[str, bytes]:
    """Return the content of all records and of the store, by path."""
    paths = [
        p
        for part in ("units", "projections.zarr")
        for p in (output / part).rglob("*")
        if p.is_file()
    ]
    return {str(path.relative_to(output)): path.read_bytes() for path in paths}


@pytest.mark.parametrize("name", [name for name, damage in DAMAGES.items() if damage[1] != "other"])
def test_repair_deletes_damaged_units_and_nothing_else(name, output, job):
    happens, kind, unit, _ = DAMAGES[name]
    happens(output)
    done = repair(verify(output))
    lost = [unit] if kind == "unit" and unit < N_UNITS else []
    assert done.units == ([unit] if kind == "unit" else [])
    assert done.n_samples == ROWS_PER_UNIT * len(lost)
    assert (done.left, done.held) == ([], {})
    after = verify(output)
    assert after.damage == []
    assert after.exit_code == done.exit_code == (3 if lost else 0)
    assert read_output(output).missing.tolist() == lost
    for other in set(range(N_UNITS)) - set(lost):
        assert record_of(output, other).read_bytes() == record_of(job.output, other).read_bytes()
        assert shard_of(output, other).read_bytes() == shard_of(job.output, other).read_bytes()
    assert [shard_of(output, u).exists() for u in lost] == [False] * len(lost)
    with ProjectionStore(output) as store, ProjectionStore(job.output) as whole:
        ids = [i for i in range(len(store)) if i // ROWS_PER_UNIT not in lost]
        np.testing.assert_array_equal(store.rows(ids), whole.rows(ids))
        assert set(store.missing()) == set(range(len(store))) - set(ids)


@pytest.mark.parametrize("name", [name for name, damage in DAMAGES.items() if damage[1] == "other"])
def test_damage_that_repair_cannot_fix_is_left_with_advice(name, output):
    DAMAGES[name][0](output)
    verification = verify(output)
    done = repair(verification)
    assert done.units == []
    if "metadata" in name:
        assert (done.exit_code, verify(output).exit_code) == (0, 0)
    else:
        assert (done.exit_code, verify(output).exit_code) == (1, 1)
        assert any(line.startswith("way out       restore ") for line in repair_lines(done, ""))


SEVERAL = {
    "shards and records": {
        0: lambda o: shard_of(o, 0).write_bytes(shard_of(o, 0).read_bytes()[:100]),
        1: lambda o: record_of(o, 1).unlink(),
        3: lambda o: shard_of(o, 3).unlink(),
    },
    "bits, and a column besides": {
        2: lambda o: flip_byte(shard_of(o, 2), 1000),
        4: lambda o: cut(record_of(o, 4)),
        None: lambda o: flip_byte(o / "projections.zarr" / "loss" / "c.0", 3),
    },
}


@pytest.mark.parametrize("name", SEVERAL)
def test_repaired_and_recomputed_store_equals_the_original(name, output, job, capsys):
    damaged = [unit for unit in SEVERAL[name] if unit is not None]
    for happens in SEVERAL[name].values():
        happens(output)
    assert main(["verify", str(output)]) == 1
    printed = capsys.readouterr().out
    for unit in damaged:
        assert f"DAMAGED       unit {unit}: " in printed
    if None in SEVERAL[name]:
        assert "loss differs from the unit's record, first at sample 0" in printed
    assert main(["verify", str(output), "--repair"]) == 3
    printed = capsys.readouterr().out
    assert (
        f"record and shard of {len(damaged)} units ({', '.join(map(str, damaged))}) deleted"
        in printed
    )
    assert "in those units, nothing else" in printed
    assert (
        "next          run the job's command again, with any number of ranks, as in: python -m"
        in printed
    )
    assert main(["verify", str(output)]) == 3
    sound = {unit: os.stat(record_of(output, unit)) for unit in set(range(N_UNITS)) - set(damaged)}
    run_job(1, shards=job.corpus, model=job.model, output_dir=output, **SETTINGS)
    assert main(["verify", str(output)]) == 0
    assert_same_bits(output, job.output)
    assert {unit: os.stat(record_of(output, unit)).st_ino for unit in sound} == {
        unit: known.st_ino for unit, known in sound.items()
    }


def test_printed_command_is_the_jobs_own(job):
    words = recorded.job_command(job.output).split()
    assert words[:3] == ["python", "-m", "gradproj.run"]
    given = job_command(1, shards=job.corpus, model=job.model, output_dir=job.output, **SETTINGS)[
        3:
    ]
    settled = run_config(given, "test")
    store = replace(settled.store, rows_per_shard=ROWS_PER_UNIT)
    # What is recorded of a model without experts.
    projection = replace(settled.projection, experts="none")
    wanted = replace(settled, store=store, projection=projection)
    assert run_config(words[3:], "test") == wanted


# --- killed repairs ---

STEPS = ("unlink", "replace", "rename", "link", "fsync")
"""Functions of ``os`` that change the state after a crash."""


def in_a_child_that_dies(at: int, action, *given) -> int:
    """Run ``action(*given)`` in a child that dies at its n-th step; return the exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = at

    def stepped(act):
        def step(*args, **more):
            nonlocal left
            left -= 1
            if left < 0:
                os._exit(9)
            return act(*args, **more)

        return step

    code = 1
    try:
        for name in STEPS:
            setattr(os, name, stepped(getattr(os, name)))
        action(*given)
        code = 0
    finally:
        os._exit(code)


def test_repair_killed_at_any_step_is_finished_by_the_next(output, job, tmp_path):
    flip_byte(shard_of(output, 1), 100)
    cut(record_of(output, 2))
    with ProjectionStore(job.output) as store:
        sound = store.rows(range(3 * ROWS_PER_UNIT, 70))
    at, code = 0, 9
    while code == 9:
        again = Path(shutil.copytree(output, tmp_path / f"killed-{at}"))
        code = in_a_child_that_dies(at, repair, verify(again))
        with ProjectionStore(again) as store:
            np.testing.assert_array_equal(store.rows(range(3 * ROWS_PER_UNIT, 70)), sound)
        verification = verify(again)
        assert verification.exit_code in (1, 3)
        assert repair(verification).exit_code == 3
        assert (verify(again).damage, read_output(again).missing.tolist()) == ([], [1, 2])
        for unit in (1, 2):  # what the job's next start does
            shutil.copy(shard_of(job.output, unit), shard_of(again, unit))
            shutil.copy(record_of(job.output, unit), record_of(again, unit))
        merge(again)
        assert verify(again).exit_code == 0
        assert contents(again) == contents(job.output)
        shutil.rmtree(again)
        at += 7
    assert code == 0
    assert at > 28


def test_repair_marks_store_and_rows_then_removes_records_then_merges_then_removes_shards(
    output, monkeypatch
):
    flip_byte(shard_of(output, 1), 100)
    done = []

    def note(name):
        act = getattr(os, name)

        def noted(path, *args, **more):
            where = (
                os.readlink(f"/proc/self/fd/{path}")
                if name == "fsync"
                else os.fspath(args[0] if args else path)
            )
            done.append((name, os.path.relpath(where, output)))
            return act(path, *args, **more)

        monkeypatch.setattr(os, name, noted)

    for name in ("unlink", "replace", "fsync"):
        note(name)
    verification = verify(output)
    repair(verification)
    steps = [
        ("replace", "projections.zarr/zarr.json"),
        ("fsync", "projections.zarr"),
        ("replace", "projections.zarr/status/c.0"),
        ("fsync", "projections.zarr/status"),
        ("unlink", record_name(1)),
        ("fsync", "units"),
        ("replace", "projections.zarr/status/c.0"),
        ("fsync", "projections.zarr/status"),
        ("unlink", "projections.zarr/projections/c.1.0"),
        ("fsync", "projections.zarr/projections"),
    ]
    at = 0
    for step in steps:
        at = done.index(step, at) + 1
    before = done[: done.index(("unlink", record_name(1)))]
    marked = [step for step in before if step == ("replace", "projections.zarr/zarr.json")]
    assert len(marked) == 1


# --- repairs beside running processes ---


def test_unit_claimed_by_a_live_process_is_left_and_others_are_repaired(output, process):
    flip_byte(shard_of(output, 1), 100)
    flip_byte(shard_of(output, 3), 100)
    owner = owner_of(process, rank=3)
    write_claim(output, "00000001.0", owner)
    before = record_of(output, 1).read_bytes(), shard_of(output, 1).read_bytes()
    done = repair(verify(output))
    assert (done.units, list(done.held), done.exit_code) == ([3], [1], 1)
    assert (record_of(output, 1).read_bytes(), shard_of(output, 1).read_bytes()) == before
    text = "\n".join(repair_lines(done, "go on"))
    assert (
        f"left          unit 1 is claimed by rank 3 on {owner.host} (pid {owner.pid}, job job)"
        in text
    )
    assert str(output / "claims" / "00000001.0") in text
    process.kill()
    process.wait()
    assert repair(verify(output)).exit_code == 3
    assert read_output(output).missing.tolist() == [1, 3]
    assert verify(output).damage == []


def test_unit_claimed_on_another_host_is_left(output, process):
    flip_byte(shard_of(output, 1), 100)
    write_claim(output, "00000001.0", replace(owner_of(process), host="far", boot_id="other"))
    done = repair(verify(output))
    assert (done.units, list(done.held), done.exit_code) == ([], [1], 1)
    assert read_output(output).is_merged
    assert verify(output).exit_code == 1


def test_repair_never_runs_beside_a_merge(output, process):
    flip_byte(shard_of(output, 1), 100)
    write_claim(output, "merge.0", owner_of(process))
    before = contents(output)
    with pytest.raises(StoreError, match=r"is being merged by rank 1 on .* wait for it"):
        repair(verify(output))
    assert contents(output) == before
    assert list((output / "tmp").iterdir()) == []


def test_running_job_can_claim_repaired_units(output):
    flip_byte(shard_of(output, 1), 100)
    repair(verify(output))
    names = sorted(path.name for path in (output / "claims").glob("00000001.*"))
    assert json.loads((output / "claims" / names[-1]).read_text()) == {"released": True}


def test_unit_recommitted_since_verify_is_kept(output, job):
    flip_byte(shard_of(output, 1), 100)
    verification = verify(output)
    shutil.copy(shard_of(job.output, 1), shard_of(output, 1))
    done = repair(verification)
    assert (done.units, done.recovered, done.exit_code) == ([], [1], 0)
    assert verify(output).exit_code == 0


# --- other states of a store ---


def test_unfinished_store_is_repaired_without_a_merge(output):
    uncommit(output, 4)
    flip_byte(shard_of(output, 1), 100)
    done = repair(verify(output))
    assert (done.units, done.merged, done.exit_code) == ([1], False, 3)
    assert list((output / "projections.zarr" / "status").glob("c.*")) == []
    after = verify(output)
    assert (after.damage, after.missing.ranges) == ([], [[16, 32], [64, 70]])


def test_sound_store_is_left_unchanged(output, capsys):
    before = tree_of(output)
    assert main(["verify", str(output), "--repair"]) == 0
    assert tree_of(output) == before
    assert "lost          nothing\nresult        sound and complete\n" in capsys.readouterr().out


def test_deleted_rows_read_as_missing(output):
    flip_byte(shard_of(output, 1), 100)
    repair(verify(output))
    with ProjectionStore(output) as store:
        assert np.isnan(store.rows([16, 31], missing="nan")).all()
        assert (store.column("status", 16, 32) == STATUS["missing"]).all()


def test_unwritable_output_is_a_one_line_error(output, monkeypatch):
    flip_byte(shard_of(output, 1), 100)

    def refuse(path, *args, **more):
        raise OSError(30, "Read-only file system", str(path))

    verification = verify(output)
    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(StoreError, match=r"cannot write .*: Read-only file system"):
        repair(verification)


def test_json_lists_repaired_units(output, capsys):
    flip_byte(shard_of(output, 1), 100)
    assert main(["verify", str(output), "--repair", "--json"]) == 3
    printed = json.loads(capsys.readouterr().out)
    assert printed["repair"]["units"] == [1]
    assert printed["damage"][0]["unit"] == 1
