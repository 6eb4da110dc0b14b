"""``verify --recompute``: rows agree with their recomputation, and changed rows are named."""

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
from helpers.corpora import make_corpus, mixed_documents
from helpers.encoding import decode, encode, encode_rows
from helpers.jobs import assert_same_bits, run_job
from helpers.models import make_model
from helpers.outputs import (
    EMPTY,
    N_SAMPLES,
    ONE_TOKEN,
    ROWS_PER_UNIT,
    SETTINGS,
    change_record,
    flip_byte,
    shard_of,
    tree_of,
    uncommit,
)
from helpers.stores import make_layers

from gradproj.__main__ import main
from gradproj.cli.verify import recomputation_lines
from gradproj.coordinator.merge import merge
from gradproj.corpus.index import build_index, check_unchanged
from gradproj.corpus.index_file import load_index, save_index
from gradproj.errors import CorpusError, ModelError, StoreError
from gradproj.files import file_sum
from gradproj.job.recorded import recorded_index
from gradproj.job.recorded_args import RecordedRunArgs
from gradproj.maintenance.job_output import read_output
from gradproj.maintenance.recompute import recompute
from gradproj.maintenance.row_tolerance import COMPUTED, ROUNDING, tolerance_of
from gradproj.maintenance.verify import verify
from gradproj.store import STATUS, ProjectionStore
from gradproj.store.encoding import decode_rows
from gradproj.store.layout import PACKED_BITS, StoreConfig, place_stored, plan_layout
from gradproj.store.unit_record import encode_record, read_record, record_name
from gradproj.store.writer import shard_chunks


def again(output, n_rows=N_SAMPLES, seed=0, skip=None, **changes):
    return recompute(
        RecordedRunArgs(output=str(output), device="cpu", **changes), n_rows, seed, skip
    )


def change_rows(output, unit, change):
    """Replace rows of a unit, with matching checksums."""
    layout = read_output(output).layout
    with ProjectionStore(output) as store:
        rows = store.rows(range(*layout.unit_range(unit)), missing="nan")
    change(rows)
    stored, scale = encode_rows(rows, layout.proj_dtype)
    shard_of(output, unit).write_bytes(
        b"".join(bytes(part) for part in shard_chunks(stored, layout))
    )
    path = output / record_name(unit)
    record = read_record(path)
    columns = {**record.columns, "row_scale": scale}
    path.write_bytes(
        encode_record(replace(record, columns=columns, shard=file_sum(shard_of(output, unit))))
    )
    merge(output)


def test_every_row_agrees_with_its_recomputation(output, capsys):
    before = tree_of(output)
    result = again(output)
    assert (result.n_rows, result.n_others, result.wrong) == (N_SAMPLES - 2, 2, [])
    assert result.median_error <= result.max_error < 0.1 * result.tolerance
    assert result.tolerance == ROUNDING["float16"] + COMPUTED["float32"]
    assert len(result.worst) == 10
    assert [c.error for c in result.worst] == sorted((c.error for c in result.worst), reverse=True)
    assert tree_of(output) == before
    assert main(["verify", str(output), "--recompute", "5", "--seed", "3", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "recomputed    5 rows" in printed
    assert printed.count("result  ") == 1
    assert printed.splitlines()[-1] == "result        sound and complete"
    assert "relative to the row; rounding explains 5.9e-04" in printed


@pytest.mark.parametrize(
    "settings",
    [
        {
            "proj_dtype": "bfloat16",
            "model_dtype": "bfloat16",
            "long_documents": "windows",
            "special_tokens": "bos_eos",
        },
        {
            "proj_dtype": "float32",
            "loss_reduction": "sum",
            "domains": "Github",
            "allow_sparse": True,
        },
    ],
    ids=["bfloat16-windows", "float32-sum-domain"],
)
def test_rows_agree_for_all_settings(settings, job, tmp_path):
    run_job(
        1,
        shards=job.corpus,
        model=job.model,
        output_dir=tmp_path / "out",
        **{**SETTINGS, **settings},
    )
    result = again(tmp_path / "out")
    assert result.wrong == []
    assert result.n_rows > 20
    assert result.max_error < 0.5 * result.tolerance


def test_rows_agree_where_a_router_has_directions_without_gradients(job, tmp_path):
    make_model(tmp_path / "model", "mixtral")
    settings = {**SETTINGS, "encoding": "signs", "basis": "eigen"}
    run_job(1, shards=job.corpus, model=tmp_path / "model", output_dir=tmp_path / "out", **settings)
    with ProjectionStore(tmp_path / "out") as store:
        name = next(x.name for x in store.layers if x.name.endswith("mlp.gate"))
        _, eigenvalues = store.basis_eigenvalues[name]
        assert eigenvalues[0] < 1e-9 * eigenvalues[-1]
    result = again(tmp_path / "out")
    assert result.n_rows > 20
    assert result.wrong == []
    assert result.max_error < 0.5 * result.tolerance


@pytest.mark.parametrize("by", [1.01, 0.99, -1.0])
def test_changed_row_under_right_checksums_is_named(by, output, capsys):
    def change(rows):
        rows[5] *= by

    change_rows(output, 2, change)
    assert verify(output).exit_code == 0
    result = again(output)
    (wrong,) = result.wrong
    assert (wrong.sample_id, wrong.unit, wrong.status) == (37, 2, "ok")
    assert wrong.error == pytest.approx(abs(1 - by), rel=0.01)
    assert result.worst[0] == wrong
    assert (
        main(["verify", str(output), "--recompute", "70", "--device", "cpu", "--no-checksums"]) == 1
    )
    assert (
        f"WRONG         sample 37 (unit 2, key {wrong.key!r}, stored as ok) is "
        in capsys.readouterr().out
    )


@pytest.mark.parametrize("also_damaged", [False, True])
def test_units_with_wrong_rows_are_repaired_and_recomputed(also_damaged, output, job, capsys):
    def change(rows):
        rows[5] *= 1.01
        rows[7] *= 0.9

    def verdict(*flags):
        code = main(["verify", str(output), "--recompute", "70", "--device", "cpu", *flags])
        printed = capsys.readouterr().out
        assert printed.count("result  ") == 1
        return code, printed, printed.splitlines()[-1]

    change_rows(output, 2, change)
    if also_damaged:
        flip_byte(shard_of(output, 0), 100)
    code, printed, last = verdict()
    assert (code, last) == (
        1,
        f"result        damaged, in {1 + also_damaged} place{'s' * also_damaged}",
    )
    assert "way out       this command with --repair deletes the units of wrong rows" in printed
    code, printed, last = verdict("--repair")
    assert (code, last) == (3, "result        sound, but incomplete")
    assert "WRONG         sample 37" in printed
    units = "2 units (0, 2)" if also_damaged else "1 unit (2)"
    assert f"repaired      record and shard of {units} deleted; the job recomputes them" in printed
    run_job(1, shards=job.corpus, model=job.model, output_dir=output, **SETTINGS)
    assert_same_bits(output, job.output)
    code, printed, last = verdict("--repair")
    assert (code, last) == (0, "result        sound and complete")


def test_nothing_is_reported_sound_without_checksums(output, capsys):
    assert (
        main(["verify", str(output), "--recompute", "3", "--no-checksums", "--device", "cpu"]) == 0
    )
    assert capsys.readouterr().out.splitlines()[-1] == (
        "result        complete, and no recomputed row differs; checksums were not computed"
    )


def test_json_lists_units_with_wrong_rows(output, capsys):
    change_rows(output, 2, lambda rows: rows.__imul__(1.01))
    assert main(["verify", str(output), "--recompute", "70", "--device", "cpu", "--json"]) == 1
    (damage,) = json.loads(capsys.readouterr().out)["damage"]
    assert (damage["kind"], damage["unit"], damage["path"]) == ("rows", 2, str(shard_of(output, 2)))
    assert damage["what"] == "holds 16 rows that come out otherwise now, first sample 32"


def test_swapped_rows_are_named(output):
    def change(rows):
        rows[[5, 6]] = rows[[6, 5]]

    change_rows(output, 1, change)
    assert {wrong.sample_id for wrong in again(output).wrong} == {21, 22}


def test_changed_status_or_column_is_named(output):
    change_record(output, 1, statuses={3: STATUS["empty"]})
    record = read_record(output / record_name(2))
    tokens = record.columns["n_tokens"].copy()
    tokens[4] += 1
    loss = record.columns["loss"].copy()
    loss[5] *= 1.01
    (output / record_name(2)).write_bytes(
        encode_record(replace(record, columns={**record.columns, "n_tokens": tokens, "loss": loss}))
    )
    merge(output)
    result = again(output)
    printed = {wrong.sample_id: wrong.what for wrong in result.wrong}
    assert printed.keys() == {19, 36, 37}
    assert printed[19] == "has status ok now"
    assert printed[36] == "has another n_tokens now"
    assert "has the loss" in printed[37]


def test_zero_row_that_changed_is_named(output):
    def change(rows):
        rows[ONE_TOKEN % ROWS_PER_UNIT, 3] = 1e-3

    change_rows(output, ONE_TOKEN // ROWS_PER_UNIT, change)
    assert [(w.sample_id, w.what) for w in again(output).wrong] == [
        (ONE_TOKEN, "has another row now")
    ]


def test_documents_that_ran_out_of_memory_are_not_compared(output):
    change_record(output, 1, statuses={3: STATUS["out_of_memory"]})
    merge(output)
    result = again(output)
    assert (result.n_without_memory, result.wrong) == (1, [])
    assert any("ran out of memory" in line for line in recomputation_lines(result))


def test_seed_selects_the_rows(output):
    first, same, other = (again(output, 10, seed) for seed in (1, 1, 2))
    ids = [sorted(c.sample_id for c in result.worst) for result in (first, same, other)]
    assert len(ids[0]) == 10
    assert ids[0] == ids[1] != ids[2]


def test_only_committed_and_undamaged_units_are_recomputed(output):
    uncommit(output, 0)
    flip_byte(shard_of(output, 1), 100)
    result = again(output, skip=verify(output).damaged_units)
    assert result.n_rows == N_SAMPLES - 2 * ROWS_PER_UNIT
    assert {check.unit for check in result.worst} <= {2, 3, 4}
    assert main(["verify", str(output), "--recompute", "3", "--device", "cpu"]) == 1
    with pytest.raises(StoreError, match="no committed unit"):
        again(output, skip={1, 2, 3, 4})


def test_unreadable_file_is_reported_as_wrong(output):
    uncommit(output)
    flip_byte(output / record_name(0))
    shard_of(output, 2).write_bytes(b"short")
    result = again(output)
    assert {wrong.unit for wrong in result.wrong} == {0, 2}
    assert all("cannot be read" in wrong.what for wrong in result.wrong)


def test_unfinished_store_whose_rows_agree_is_incomplete(output, capsys):
    uncommit(output, 1)
    flags = ["--recompute", "3", "--device", "cpu", "--json"]
    assert main(["verify", str(output), *flags, "--no-checksums"]) == 3
    printed = json.loads(capsys.readouterr().out)
    assert printed["recompute"]["n_rows"] == 3
    assert printed["recompute"]["wrong"] == []
    assert printed["n_bytes"] == 0


def test_other_weights_are_refused(output, job, tmp_path, capsys):
    model = shutil.copytree(job.model, tmp_path / "model")
    flip_byte(model / "model.safetensors")
    with pytest.raises(
        ModelError, match=r"is not what .* was made with; its --model \(weights\) changed since"
    ):
        again(output, model=str(model))
    other = make_model(tmp_path / "other", tie_word_embeddings=True)
    assert (
        main(["verify", str(output), "--recompute", "1", "--model", str(other), "--device", "cpu"])
        == 2
    )
    assert "--model (weights) and --model (config) changed since" in capsys.readouterr().err


def test_moved_inputs_are_named_and_found_by_flags(output, job, tmp_path):
    run_config = output / "run_config.json"
    flags = json.loads(run_config.read_text())
    run_config.write_text(json.dumps({**flags, "model": "gone", "shards": "gone/*.tar"}))
    with pytest.raises(
        ModelError, match=r"--model gone, as the job recorded it, .* give --model DIR"
    ):
        again(output)
    # The index has the absolute paths of the tars, although --shards was relative.
    assert again(output, 3, model=str(job.model)).wrong == []
    moved = shutil.copytree(job.corpus, tmp_path / "moved")
    index = load_index(output / "corpus.json")
    gone = replace(
        index, tars=tuple(replace(t, path=tmp_path / "gone" / t.path.name) for t in index.tars)
    )
    save_index(gone, output / "corpus.json", replace_existing=True)
    with pytest.raises(CorpusError, match="gone"):
        again(output, model=str(job.model))
    assert again(output, 3, model=str(job.model), shards=str(moved)).wrong == []
    other = make_corpus(tmp_path / "other", mixed_documents(3))
    with pytest.raises(CorpusError, match="other"):
        again(output, model=str(job.model), shards=str(other))


def test_touched_tars_are_read_after_index_as_the_message_says(output, job, tmp_path):
    moved = shutil.copytree(job.corpus, tmp_path / "tars")
    flags = json.loads((output / "run_config.json").read_text())
    (output / "run_config.json").write_text(json.dumps({**flags, "shards": str(moved)}))
    paths = sorted(moved.glob("*.tar"))
    index = load_index(output / "corpus.json").relocated(paths)
    save_index(index, output / "corpus.json", replace_existing=True)
    os.utime(paths[-1], ns=(0, 12345))
    with pytest.raises(CorpusError, match="Run `python -m gradproj index` again"):
        check_unchanged(recorded_index(output).tars[-1])
    save_index(build_index(paths, domain_field=index.domain_field), moved / "corpus.json")
    check_unchanged(recorded_index(output).tars[-1])


@pytest.mark.parametrize("name", ["trust_remote_code", "allow_pickle"])
def test_store_cannot_declare_its_checkpoint_trusted(name, output):
    path = output / "run_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: True}))
    with pytest.raises(
        ModelError, match=f"started with --{name}, which .* give --{name} here too if you trust"
    ):
        again(output)
    assert again(output, 2, **{name: True}).wrong == []


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"batch_size": "many", "shards": "x", "output_dir": "x"}', "{}"]
)
def test_unreadable_settings_are_a_one_line_error(content, output):
    (output / "run_config.json").write_text(content)
    with pytest.raises(
        StoreError, match=r"run_config.json (cannot be read|does not hold a job's settings)"
    ):
        again(output)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recompute", "-1"], "--recompute must be at least 0, got -1"),
        (["--no-checksums"], "--no-checksums leaves nothing to do"),
        (["--repair", "--no-checksums"], "--no-checksums leaves nothing to do"),
        (["--repair", "--no-checksums", "--recompute", "2"], "--repair needs the checksums"),
        (["--device", "tpu"], "--device is 'tpu'"),
    ],
)
def test_contradictory_flags_are_refused(words, message, output, capsys):
    assert main(["verify", str(output), *words]) == 2
    assert message in capsys.readouterr().err


def test_documents_without_a_gradient_are_compared_too(output):
    with ProjectionStore(output) as store:
        assert [s.status for s in store.samples([EMPTY, ONE_TOKEN])] == ["empty", "no_target"]
    assert again(output, 50).n_others >= 1


def test_tolerances_exceed_the_rounding_of_a_stored_value():
    values = np.linspace(1, 2, 1001, dtype=np.float32)[:, None]
    for dtype, most in ROUNDING.items():
        stored, scale = encode_rows(values, dtype)
        off = np.abs(decode_rows(stored, scale, dtype) - values) / values
        assert off.max() <= most
        assert dtype == "float32" or off.max() > 0.4 * most


@pytest.mark.parametrize("side", [8, 64])
@pytest.mark.parametrize("model_dtype", COMPUTED)
@pytest.mark.parametrize("encoding", PACKED_BITS)
def test_rounding_of_packed_rows_passes_and_the_row_of_another_document_does_not(
    encoding, model_dtype, side
):
    layout = plan_layout(1, [side**2] * 12, 1, StoreConfig(encoding=encoding))
    layers = place_stored(make_layers([(side, side)] * 12), layout)
    generator = np.random.default_rng(side)

    def decoded(rows):
        return decode(*encode(rows.astype(np.float32), layout, layers), layout, layers)

    def norms(rows):
        return np.linalg.norm(decoded(rows).reshape(len(rows), 12, -1), axis=2)

    def relative(a, b):
        return np.linalg.norm(a - b, axis=1) / np.linalg.norm(a, axis=1)

    # Student's distribution: a few large values, many near zero. Few layers make up the rows.
    rows = generator.standard_t(3, (20, layout.dim))
    rows[:, 3 * side**2 :] *= 1e-2
    others = 0.3 * rows + generator.permuted(rows, axis=1)
    error = generator.standard_normal(rows.shape) * np.abs(rows).mean(axis=1, keepdims=True)
    error *= COMPUTED[model_dtype] * (np.linalg.norm(rows) / np.linalg.norm(error)) / 2
    most = tolerance_of(layout, len(layers), model_dtype)
    assert relative(decoded(rows), decoded(rows + error)).max() <= most.row
    assert relative(norms(rows), norms(rows + error)).max() <= most.layer_norms
    assert relative(decoded(rows), decoded(others)).min() > most.row
    if side == 64 and model_dtype == "float32":
        assert relative(norms(rows), norms(1.01 * rows)).min() > most.layer_norms
