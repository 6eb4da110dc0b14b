"""Hidden states of a small job against the model in float64, one document at a time."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import zarr
from helpers.jobs import assert_same_bits, run_job
from helpers.killed_jobs import run_killed_and_resumed
from helpers.outputs import copy_of, flip_byte
from transformers import AutoModelForCausalLM, AutoTokenizer

from gradproj import ProjectionStore
from gradproj.__main__ import main
from gradproj.analysis import score
from gradproj.files import file_sum
from gradproj.job.recorded_args import RecordedRunArgs
from gradproj.maintenance.recompute import recompute
from gradproj.store import HiddenStates
from gradproj.store.hidden_states import HIDDEN_STATE, hidden_layout
from gradproj.store.metadata import read_layout
from gradproj.store.unit_record import encode_record, read_record, record_name
from gradproj.store.writer import shard_chunks

N_DOCUMENTS, MAX_LENGTH = 40, 12
SETTINGS = {
    "proj_rank_total": 16, "proj_rank_min": 4, "max_samples": N_DOCUMENTS, "rows_per_shard": 16,
    "max_length": MAX_LENGTH, "long_documents": "windows", "batch_size": 6,
}  # fmt: skip


@pytest.fixture(scope="module")
def jobs(job, tmp_path_factory):
    """``--hidden_state`` -> the settings of a finished job."""
    settings = {**SETTINGS, "shards": job.corpus, "model": job.model}
    made = {}
    for kind in ("mean", "last"):
        output = tmp_path_factory.mktemp("hidden") / "out"
        made[kind] = {**settings, "output_dir": output, "hidden_state": kind}
        run_job(**made[kind])
    return made


def states_of(settings):
    """Return the states ``(N, d)`` float64, NaN for documents without a target."""
    kind = settings["hidden_state"]
    model = AutoModelForCausalLM.from_pretrained(settings["model"]).double().eval()
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    with ProjectionStore(settings["output_dir"]) as store:
        texts = [sample.text for sample in store.samples(range(N_DOCUMENTS), text=True)]
    states = []
    for text in texts:
        ids = tokenizer(text or "").input_ids
        starts = range(0, max(len(ids) - 1, 0), MAX_LENGTH - 1)
        with torch.no_grad():
            windows = [
                model.base_model(torch.tensor([ids[start : start + MAX_LENGTH]]))[0][0]
                for start in starts
            ]
        if not windows:
            states.append(torch.full((model.config.hidden_size,), torch.nan))
        elif kind == "mean":
            states.append(torch.cat([window[:-1] for window in windows]).mean(dim=0))
        else:
            states.append(windows[-1][-1])
    return torch.stack(states).double().numpy()


def close(got, want):
    np.testing.assert_array_equal(np.isnan(got).any(axis=1), np.isnan(want).any(axis=1))
    ok = ~np.isnan(want).any(axis=1)
    errors = np.linalg.norm(got[ok] - want[ok], axis=1) / np.linalg.norm(want[ok], axis=1)
    return errors.max() < 1e-3


@pytest.mark.parametrize("kind", ["mean", "last"])
def test_states_are_those_of_the_model_in_float64(jobs, kind):
    want, path = states_of(jobs[kind]), jobs[kind]["output_dir"]
    with HiddenStates(path) as hidden, ProjectionStore(path) as store:
        assert close(hidden.rows(range(N_DOCUMENTS)), want)
        assert store.attributes[HIDDEN_STATE] == {"kind": kind}
        assert store.attributes["identity"]["--hidden_state"] == kind
        for ids, rows in hidden.scan(rows_per_block=7):
            np.testing.assert_array_equal(rows, hidden.rows(ids))
        cosines = score(want[[3, 30]], hidden, score="cosine")
        exact = want @ want[[3, 30]].T / np.linalg.norm(want, axis=1)[:, None]
        exact = (exact / np.linalg.norm(want[[3, 30]], axis=1)).T
        np.testing.assert_allclose(cosines, exact, atol=1e-3)
    array = zarr.open_group(str(path / "projections.zarr"), mode="r")[HIDDEN_STATE]
    assert array.shape == want.shape
    assert array.dtype == np.float16
    assert close(array[...].astype(np.float64), want)


def test_states_are_exported_and_in_xarray(jobs, tmp_path):
    output = jobs["mean"]["output_dir"]
    assert main(["export", str(output), "--to", str(tmp_path / "pt"), "--rows_per_file", "16"]) == 0
    with HiddenStates(output) as hidden, ProjectionStore(output) as store:
        assert len(list((tmp_path / "pt").glob("*.pt"))) > 1
        for path in (tmp_path / "pt").glob("*.pt"):
            content = torch.load(path, weights_only=True)
            states = content[HIDDEN_STATE].float().numpy()
            np.testing.assert_array_equal(states, hidden.rows(content["batch_idx"].numpy()))
        data = store.to_xarray()[HIDDEN_STATE]
        np.testing.assert_array_equal(data[3:20, 5:7], hidden.rows(range(3, 20))[:, 5:7])


def test_rows_and_columns_are_those_of_a_job_without_states(jobs, tmp_path):
    settings = jobs["mean"]
    run_job(**settings | {"output_dir": tmp_path / "out", "hidden_state": "none"})
    names = [x.name for x in (tmp_path / "out/projections.zarr").iterdir() if x.is_dir()]
    assert HIDDEN_STATE not in names
    groups = [
        zarr.open_group(str(output / "projections.zarr"), mode="r")
        for output in (tmp_path / "out", settings["output_dir"])
    ]
    for name in names:
        a, b = (np.ascontiguousarray(group[name][...]).tobytes() for group in groups)
        assert a == b, name


def test_stopped_unit_continues_with_the_same_states(jobs, tmp_path, monkeypatch):
    settings = jobs["mean"]
    again = settings | {"output_dir": tmp_path / "out", "proj_save_interval": 2}
    run_killed_and_resumed(monkeypatch, **again)
    assert_same_bits(again["output_dir"], settings["output_dir"])


def test_damaged_states_are_found_repaired_and_computed_again(jobs, tmp_path, capsys):
    settings = jobs["mean"]
    output = copy_of(settings["output_dir"], tmp_path)
    shard = output / "projections.zarr" / HIDDEN_STATE / "c.1.0"
    flip_byte(shard, 100)
    assert main(["verify", str(output)]) == 1
    assert f"{HIDDEN_STATE}/c.1.0" in capsys.readouterr().out
    assert main(["verify", str(output), "--repair"]) == 3
    assert not shard.exists()
    assert not (output / record_name(1)).exists()
    run_job(**settings | {"output_dir": output})
    assert_same_bits(output, settings["output_dir"])
    assert main(["verify", str(output)]) == 0


def test_states_of_other_documents_under_right_checksums_are_named(jobs, tmp_path):
    settings = jobs["mean"]
    output = copy_of(settings["output_dir"], tmp_path)
    inputs = RecordedRunArgs(output=str(output), device="cpu")
    assert recompute(inputs, N_DOCUMENTS, 0).wrong == []
    with HiddenStates(output) as hidden:
        states = hidden.rows(range(16, 32)).astype(np.float16)
    ok = np.flatnonzero(np.isfinite(states[:, 0]))
    states[ok[:2]] = states[ok[1::-1]]
    shard = output / "projections.zarr" / HIDDEN_STATE / "c.1.0"
    layout = hidden_layout(read_layout(output / "projections.zarr"))
    shard.write_bytes(b"".join(map(bytes, shard_chunks(states, layout))))
    record = replace(read_record(output / record_name(1)), hidden=file_sum(shard))
    (output / record_name(1)).write_bytes(encode_record(record))
    assert main(["verify", str(output)]) == 0
    wrong = [check.sample_id for check in recompute(inputs, N_DOCUMENTS, 0).wrong]
    assert wrong == sorted((16 + ok[:2]).tolist())


def test_lost_shard_of_states_stops_a_start(jobs, tmp_path):
    settings = jobs["mean"]
    output = copy_of(settings["output_dir"], tmp_path)
    (output / "projections.zarr" / HIDDEN_STATE / "c.0.0").unlink()
    done = run_job(expect=None, **settings | {"output_dir": output})
    assert done.returncode == 2
    assert f"projections or {HIDDEN_STATE}: 0" in done.stderr
