"""``export``: the ok rows as files of earlier GradProjLora code, complete or not at all."""

import json
import os
import shutil
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.outputs import EMPTY, N_SAMPLES, ONE_TOKEN, copy_of, tree_of, uncommit
from helpers.stores import Output, filled, packed

from gradproj.cli.export import export_lines
from gradproj.errors import ConfigError, StoreError
from gradproj.maintenance.export import ExportConfig, original_metadata, plan_export, write_export
from gradproj.store import STATUS, ProjectionStore
from gradproj.store.layout import PACKED_BITS


def config_of(target, **settings):
    return ExportConfig(output="", to=str(target), **settings)


def export_to(target, store, **settings):
    config = config_of(target, **settings)
    return list(write_export(store, config, plan_export(store, config)))


def files_in(folder):
    names = sorted(os.listdir(folder))
    assert names[0] == "metadata.json"
    return [torch.load(folder / name, weights_only=True) for name in names[1:]]


@pytest.mark.parametrize("rows_per_file", [1, 7, 16, 68, 4096])
def test_files_hold_every_ok_row_once_and_in_order(rows_per_file, job, tmp_path):
    ok_ids = [i for i in range(N_SAMPLES) if i not in (EMPTY, ONE_TOKEN)]
    with ProjectionStore(job.output) as store:
        export_to(tmp_path / "to", store, rows_per_file=rows_per_file)
        want = store.rows(ok_ids)
    files = files_in(tmp_path / "to")
    assert [file["iter"] for file in files] == list(range(1, len(files) + 1))
    assert [file["batch_size"] for file in files] == [
        len(ok_ids[first : first + rows_per_file]) for first in range(0, len(ok_ids), rows_per_file)
    ]
    assert all(
        file["batch_idx"].dtype == torch.int64 and file["proj"].dtype == torch.float32
        for file in files
    )
    assert torch.cat([file["batch_idx"] for file in files]).tolist() == ok_ids
    np.testing.assert_array_equal(torch.cat([file["proj"] for file in files]).numpy(), want)


@pytest.mark.parametrize("encoding", PACKED_BITS)
def test_packed_rows_are_exported_decoded(tmp_path, encoding):
    output = filled(tmp_path / "out", widths=((3, 5), (1, 7)), config=packed(encoding))
    with ProjectionStore(output.path) as store:
        export_to(tmp_path / "to", store, rows_per_file=32)
    rows = torch.cat([file["proj"] for file in files_in(tmp_path / "to")]).numpy()
    np.testing.assert_array_equal(rows, output.decoded())
    about = json.loads((tmp_path / "to" / "metadata.json").read_text())
    assert (about["encoding"], about["total_proj_dim"]) == (encoding, 22)


def test_files_are_numbered_from_one_and_hold_only_their_rows(job, tmp_path):
    with ProjectionStore(job.output) as store:
        export_to(tmp_path / "to", store, rows_per_file=32)
        dim = store.dim
    names = sorted(path.name for path in (tmp_path / "to").glob("*.pt"))
    assert names == ["proj_iter_000001.pt", "proj_iter_000002.pt", "proj_iter_000003.pt"]
    last = tmp_path / "to" / names[-1]
    assert (
        last.stat().st_size < 4 * (4 * dim + 8) + 4096
    )  # a slice of a larger buffer would be saved whole


@pytest.mark.parametrize(
    ("ids", "want"),
    [
        ("10:30", [i for i in range(10, 30) if i != ONE_TOKEN]),
        (":3", [0, 1, 2]),
        ("68:", [68, 69]),
        ("16:17", [16]),
    ],
)
def test_only_selected_ids_are_written(ids, want, job, tmp_path):
    with ProjectionStore(job.output) as store:
        export_to(tmp_path / "to", store, ids=ids, rows_per_file=8)
    assert torch.cat([file["batch_idx"] for file in files_in(tmp_path / "to")]).tolist() == want


def test_metadata_has_the_originals_keys_and_the_stores_slices(job, tmp_path):
    with ProjectionStore(job.output) as store:
        export_to(tmp_path / "to", store)
        metadata = json.loads((tmp_path / "to" / "metadata.json").read_text())
        assert metadata == original_metadata(store)
        assert metadata["engine"] == "GradProjLora"
        assert (metadata["proj_seed"], metadata["proj_method"]) == (42, "rademacher")
        assert (metadata["proj_rank_total"], metadata["proj_rank_min"]) == (16, 2)
        assert metadata["total_proj_dim"] == store.dim
        rows = torch.load(tmp_path / "to" / "proj_iter_000001.pt", weights_only=True)["proj"]
        for layer, meta in zip(store.layers, metadata["layers"], strict=True):
            assert meta["name"] == layer.name
            assert (
                meta["k_total"]
                == meta["k_o"] * meta["k_i"]
                == meta["slice_end"] - meta["slice_start"]
            )
            block = rows[:2, meta["slice_start"] : meta["slice_end"]].reshape(
                2, meta["k_o"], meta["k_i"]
            )
            np.testing.assert_array_equal(block.numpy(), store.layer(layer.name)[:2])


def test_plan_counts_rows_and_files_before_writing(job, tmp_path):
    with ProjectionStore(job.output) as store:
        export = plan_export(store, config_of(tmp_path / "to", rows_per_file=30))
        first, second = export_lines(export, tmp_path / "to")
    assert first.startswith("3 files of at most 30 rows: 68 ok rows of samples 0 to 69, ")
    assert second == "left out: 1 empty, 1 no_target"
    assert not (tmp_path / "to").exists()


class EveryFifthIsEmpty:
    """Stands for a store whose columns are large."""

    dim, path, layout = 4, "store", SimpleNamespace(hidden_width=0)

    def __len__(self):
        return 2**23

    def column(self, name, start, stop):
        codes = np.full(stop - start, STATUS["ok"], np.uint8)
        codes[-start % 5 :: 5] = STATUS["empty"]
        return codes


def test_plan_and_ids_of_the_files_take_less_than_two_bytes_a_sample(tmp_path):
    store = EveryFifthIsEmpty()
    tracemalloc.start()
    try:
        export = plan_export(store, config_of(tmp_path / "to", ids="3:"))
        n_rows = sum(map(len, export.ids_of_files()))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert export.n_rows == n_rows == sum(1 for i in range(3, len(store)) if i % 5)
    assert peak < 2 * len(store)


def test_unfinished_store_exports_its_committed_rows(job, tmp_path):
    output = copy_of(job.output, tmp_path)
    uncommit(output, 1, 4)
    with ProjectionStore(output) as store:
        export = plan_export(store, config_of(tmp_path / "to"))
        export_to(tmp_path / "to", store)
    assert export.left_out == {"missing": 22, "empty": 1}
    ids = files_in(tmp_path / "to")[0]["batch_idx"].tolist()
    assert ids == [i for i in range(N_SAMPLES) if i // 16 not in (1, 4) and i != EMPTY]


@pytest.mark.parametrize("proj_dtype", ["float16", "bfloat16", "float32"])
def test_rows_are_float32_for_every_storage_type(proj_dtype, tmp_path):
    from gradproj.store.layout import StoreConfig

    output = Output(
        tmp_path / "out",
        config=StoreConfig(encoding="dense", rows_per_shard=16, proj_dtype=proj_dtype),
    ).fill()
    with ProjectionStore(output.path) as store:
        export_to(tmp_path / "to", store)
    np.testing.assert_array_equal(files_in(tmp_path / "to")[0]["proj"].numpy(), output.decoded())


def test_existing_empty_folder_is_accepted(job, tmp_path):
    (tmp_path / "to").mkdir()
    with ProjectionStore(job.output) as store:
        export_to(tmp_path / "to", store)
    assert len(files_in(tmp_path / "to")) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rows_per_file": 0}, "--rows_per_file must be at least 1, got 0"),
        ({"format": "npz"}, "--format is 'npz'; choose pt"),
        ({"ids": "3-9"}, "--ids is '3-9'; give START:STOP"),
        ({"ids": "a:9"}, "--ids is 'a:9'; give START:STOP"),
        ({"ids": "-3:9"}, "--ids is '-3:9'; give START:STOP"),
        ({"ids": "0:71"}, "--ids 0:71: the store has 70 samples, ids 0:70"),
        ({"ids": "70:"}, "--ids 70:: the store has 70 samples, ids 0:70"),
        ({"ids": "9:9"}, "--ids 9:9: START must be less than STOP"),
    ],
)
def test_invalid_value_names_its_flag(settings, message, job, tmp_path):
    with ProjectionStore(job.output) as store, pytest.raises(ConfigError) as error:
        plan_export(store, config_of(tmp_path / "to", **settings))
    assert message in str(error.value)


def test_empty_target_is_refused():
    with pytest.raises(ConfigError, match="--to is empty"):
        config_of(" ")


def test_nonempty_folder_and_file_are_refused(job, tmp_path):
    (tmp_path / "mine").write_text("precious")
    with ProjectionStore(job.output) as store:
        with pytest.raises(StoreError, match=r"--to .* is not empty; give a new folder"):
            plan_export(store, config_of(tmp_path))
        with pytest.raises(StoreError, match=r"--to .*mine is a file"):
            plan_export(store, config_of(tmp_path / "mine"))
    assert (tmp_path / "mine").read_text() == "precious"


def test_range_without_ok_rows_is_refused(job, tmp_path):
    with (
        ProjectionStore(job.output) as store,
        pytest.raises(StoreError, match="none of the samples 5 to 5 has an ok row"),
    ):
        plan_export(store, config_of(tmp_path / "to", ids="5:6"))


def test_full_disk_is_refused_before_anything_is_written(job, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with (
        ProjectionStore(job.output) as store,
        pytest.raises(StoreError, match=r"needs .* GB, and 0\.0 GB are free"),
    ):
        plan_export(store, config_of(tmp_path / "to"))


@pytest.mark.parametrize("existed", [False, True])
def test_failed_write_leaves_nothing_behind(existed, job, tmp_path, monkeypatch):
    if existed:
        (tmp_path / "to").mkdir()
    save = torch.save

    def full_disk_at_the_second(content, path):
        save(content, path)
        if content["iter"] == 2:
            raise RuntimeError(
                "[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"
            )

    monkeypatch.setattr(torch, "save", full_disk_at_the_second)
    with (
        ProjectionStore(job.output) as store,
        pytest.raises(StoreError, match=r"--to .*cannot be written"),
    ):
        export_to(tmp_path / "to", store, rows_per_file=8)
    assert list(tmp_path.iterdir()) == ([tmp_path / "to"] if existed else [])
    assert not existed or not list((tmp_path / "to").iterdir())


def test_interrupted_export_leaves_nothing_behind(job, tmp_path):
    with ProjectionStore(job.output) as store:
        config = config_of(tmp_path / "to", rows_per_file=8)
        files = write_export(store, config, plan_export(store, config))
        assert next(files).exists()
        files.close()
    assert list(tmp_path.iterdir()) == []


def test_missing_shard_is_an_error_and_not_a_file_of_nans(job, tmp_path):
    output = copy_of(job.output, tmp_path)
    (output / "projections.zarr" / "projections" / "c.2.0").unlink()
    with (
        ProjectionStore(output) as store,
        pytest.raises(StoreError, match=r"rows of unit 2 are recorded as ok but .* is gone"),
    ):
        export_to(tmp_path / "to", store)
    assert not (tmp_path / "to").exists()


def test_export_writes_nothing_into_the_output(job, tmp_path):
    before = tree_of(job.output)
    with ProjectionStore(job.output) as store:
        export_to(tmp_path / "to", store)
    assert tree_of(job.output) == before
