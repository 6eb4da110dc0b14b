"""``diagnose``: rows alone, batched and padded, in two precisions."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers.corpora import make_corpus
from helpers.jobs import flags
from helpers.models import make_model
from helpers.outputs import SETTINGS, tree_of

from gradproj.__main__ import main
from gradproj.job import diagnose
from gradproj.job.precision import WAYS, Agreement
from gradproj.job.summary import print_padding


def command(job, tmp_path, **settings):
    given = {
        "shards": job.corpus,
        "model": job.model,
        "device": "cpu",
        "n_documents": 6,
        **SETTINGS,
        **settings,
    }
    return ["diagnose", *flags(output_dir=tmp_path / "new", **given)]


def test_sound_model_differs_by_rounding_only(job, tmp_path, capsys):
    before = tree_of(job.corpus)
    assert main([*command(job, tmp_path), "--json"]) == 0
    diagnosis = json.loads(capsys.readouterr().out)
    assert [(c["dtype"], c["way"]) for c in diagnosis["comparisons"]] == [
        (dtype, way) for dtype in ("float32", "bfloat16") for way in WAYS
    ]
    assert len(set(diagnosis["sample_ids"])) == 6
    assert diagnosis["comparisons"][0]["agreement"]["most_error"] == 0
    assert all(c["agreement"]["most_error"] < 1e-5 for c in diagnosis["comparisons"][:3])
    rounded = [c["agreement"]["most_error"] for c in diagnosis["comparisons"][3:]]
    assert all(1e-3 < error < 1 for error in rounded)
    assert len(diagnosis["layers"]) == 2 * 14  # two blocks of seven layers, in two precisions
    assert not (tmp_path / "new").exists()
    assert tree_of(job.corpus) == before


def test_table_has_every_way_and_the_worst_layers(job, tmp_path, capsys):
    assert main(command(job, tmp_path)) == 0
    output = capsys.readouterr().out
    for way in WAYS:
        assert f"float32, {way} " in output
        assert f"bfloat16, {way} " in output
    assert "_proj " in output
    assert "float32: batching and padding move no row by more than" in output
    assert output.splitlines()[-1] == "result        nothing beyond rounding"


def wrapped_load(change, files, device):
    model = load(files, device)
    change(model)
    return model


load = diagnose.load_model


def mix_the_batch(model):
    norm = model.model.norm
    inner = norm.forward
    norm.forward = lambda x: inner(x) + 0.01 * inner(x).mean(dim=0, keepdim=True)


def see_the_padding(model):
    norm = model.model.norm
    inner = norm.forward
    norm.forward = lambda x: inner(x) * (1 + 0.001 * x.shape[1])


def test_model_that_mixes_documents_is_reported(job, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(diagnose, "load_model", partial(wrapped_load, mix_the_batch))
    assert main([*command(job, tmp_path, max_length=60), "--json"]) == 1
    diagnosis = json.loads(capsys.readouterr().out)
    errors = {
        c["way"]: c["agreement"]["most_error"]
        for c in diagnosis["comparisons"]
        if c["dtype"] == "float32"
    }
    assert errors["batched"] > 1e-4
    assert (
        "The model mixes the documents of a batch, or sees its padding" in diagnosis["verdicts"][0]
    )


def test_model_that_sees_padding_is_batched_without_it(job, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(diagnose, "load_model", partial(wrapped_load, see_the_padding))
    assert main([*command(job, tmp_path, max_length=60), "--json"]) == 0
    diagnosis = json.loads(capsys.readouterr().out)
    ways = [c["way"] for c in diagnosis["comparisons"] if c["dtype"] == "float32"]
    assert ways == ["alone", "batched"]
    assert diagnosis["verdicts"][0].startswith("the model's output depends on padding")
    assert "batching without padding moves no row by more than" in diagnosis["verdicts"][1]


def test_old_store_of_a_model_that_sees_padding_may_hold_wrong_rows(job, tmp_path, capsys):
    warnings = []
    for output, is_old in ((job.output, True), (job.output, False), (tmp_path, True)):
        print_padding(SimpleNamespace(output=output), is_old)
        warnings.append(capsys.readouterr().err)
    assert f"python -m gradproj verify {job.output} --recompute 64" in warnings[0]
    assert warnings[1:] == ["", ""]


@pytest.mark.parametrize(
    ("dtype", "code", "way_out"), [("bfloat16", 1, "Give"), ("float32", 0, "Keep")]
)
def test_failing_precision_sets_the_exit_code_only_if_the_job_uses_it(
    dtype, code, way_out, job, tmp_path, capsys
):
    # Attention logits so large that rounding them to bfloat16 moves attention to another token.
    model = make_model(tmp_path / "sharp", initializer_range=1.0)
    assert main(command(job, tmp_path, model=model, model_dtype=dtype)) == code
    output = capsys.readouterr().out
    assert "a median of 0.999 and a least of 0.9 are required. Worst: sample " in output
    assert f"{way_out} --model_dtype float32" in output
    assert ("BEYOND ROUNDING" in output) == (code == 1)


def test_windows_of_a_document_are_one_row(job, tmp_path, capsys):
    assert main([*command(job, tmp_path, long_documents="windows", max_length=8), "--json"]) == 0
    diagnosis = json.loads(capsys.readouterr().out)
    assert len(diagnosis["sample_ids"]) == 6
    assert diagnosis["n_tokens"] > 6 * 8


def test_corpus_without_rows_is_an_error(job, tmp_path, capsys):
    corpus = make_corpus(tmp_path / "empty", [{"text": ""} for _ in range(20)])
    assert main(command(job, tmp_path, shards=corpus)) == 2
    assert "documents looked at makes a row: they are empty" in capsys.readouterr().err


def test_diagnose_rejects_the_jobs_mistakes_and_its_own(job, tmp_path, capsys):
    assert main(command(job, tmp_path, n_documents=0)) == 2
    assert "--n_documents must be at least 1, got 0" in capsys.readouterr().err
    assert main(command(job, tmp_path, model=tmp_path / "nowhere")) == 2
    assert str(tmp_path / "nowhere") in capsys.readouterr().err


def test_agreement_matches_values_computed_by_hand():
    reference = torch.tensor([[3.0, 4.0], [0.0, 2.0], [1e-9, 0.0]])
    rows = torch.tensor([[3.0, 4.0], [2.0, 0.0], [0.0, 1e-9]])
    agreement = Agreement.of(rows, reference)
    # The last is too short to have a direction.
    assert (agreement.least_cosine, agreement.most_error, agreement.worst) == (
        0.0,
        pytest.approx(2**0.5),
        1,
    )
    assert agreement.most_norm_error == 0
    lost = Agreement.of(torch.full((3, 2), torch.nan), reference)
    assert (lost.n_not_finite, lost.holds) == (3, False)
    assert Agreement.of(reference, reference).holds
    assert Agreement.of(torch.zeros(2, 3), torch.zeros(2, 3)).holds
