"""Jobs of a quantized model: to the end, resumed, verified, queried after a move, diagnosed."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from helpers.corpora import make_corpus, mixed_documents
from helpers.jobs import assert_same_bits, flags, run_job
from helpers.models import make_model
from helpers.outputs import SETTINGS, copy_of, uncommit
from helpers.quantized import SIZES, quantize
from helpers.query_command import TEXT, QueryCommand

from gradproj.__main__ import main
from gradproj.engine.sharded_blocks import load_in_blocks
from gradproj.errors import ModelError
from gradproj.model.checkpoint import fetch
from gradproj.model.config import ModelConfig
from gradproj.store import ProjectionStore
from gradproj.training.config import TrainConfig
from gradproj.training.loop import load_or_make_model

pytest.importorskip("bitsandbytes", reason="the quantized extra is not installed")

CPU, N_SAMPLES = torch.device("cpu"), 40


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A finished job of an nf4 checkpoint, and the checkpoint that it was made from."""
    root = tmp_path_factory.mktemp("quantized")
    plain = make_model(root / "plain", **SIZES)
    model = quantize(plain, root / "model", "nf4")
    corpus = make_corpus(root / "tars", mixed_documents(N_SAMPLES))
    settings = dict(shards=corpus, model=model, **SETTINGS, rows_per_shard=16)
    done = run_job(output_dir=root / "out", **settings)
    return SimpleNamespace(output=root / "out", plain=plain, settings=settings, printed=done.stdout)


def test_job_says_that_layers_stay_packed_and_resumes_to_the_same_bits(scene, tmp_path):
    line = "quantized     bitsandbytes nf4: linear layers stay packed"
    assert line in scene.printed
    output = copy_of(scene.output, tmp_path)
    uncommit(output, 1)
    run_job(output_dir=output, **scene.settings)
    assert_same_bits(output, scene.output)
    with ProjectionStore(output) as store:
        assert store.attributes["model"]["quantization"] == "bitsandbytes nf4"


def test_rows_are_verified_and_asked_with_the_model_moved(scene, tmp_path, capsys):
    model = scene.settings["model"]
    moved = model.rename(tmp_path / "moved")
    try:
        assert main(["verify", str(scene.output), "--model", str(moved), "--recompute", "8"]) == 0
        ask = QueryCommand(capsys)
        best = ("--text", TEXT, "--model", moved, "--top_k", 3, "--bottom_k", 0)
        hits = ask.objects(scene.output, *best, "--tokens")
        assert len(hits) == 3
        for hit in hits:
            parts = [token["part"] for token in hit["tokens"]]
            assert sum(parts) == pytest.approx(hit["recomputed_score"], abs=1e-5 * max(parts))
        # Without the packed weights it is another model.
        assert "changed since" in ask.mistake(scene.output, "--text", TEXT, "--model", scene.plain)
    finally:
        moved.rename(model)


def test_quantization_on_load_is_part_of_the_identity(scene, tmp_path):
    settings = {**scene.settings, "model": scene.plain, "output_dir": tmp_path / "out"}
    run_job(quantize="int8", max_samples=16, **settings)
    refused = run_job(expect=2, max_samples=16, **settings)
    assert "--quantize" in refused.stderr


def test_plan_counts_the_blocks_of_packed_weights(scene, tmp_path, capsys):
    given = {**scene.settings, "output_dir": tmp_path / "new", "device": "cpu", "offload": True}
    assert main(["plan", *flags(**given)]) == 0
    counted = re.search(r"; ([\d.]+) kB of blocks in the host's memory", capsys.readouterr().out)
    _, blocks = load_in_blocks(fetch(ModelConfig(model=str(given["model"]))), CPU, None)
    assert float(counted[1]) == pytest.approx(sum(map(len, blocks._shares)) / 1000, rel=0.15)


@pytest.mark.parametrize(
    ("model", "options", "way", "least"),
    [("model", {}, "dequantized", 0.999), ("plain", {"quantize": "nf4"}, "unquantized", 0.8)],
)
def test_diagnose_compares_with_the_model_that_is_not_packed(
    model, options, way, least, scene, tmp_path, capsys
):
    given = {**scene.settings, "n_documents": 4, "device": "cpu", **options}
    given["model"] = scene.plain if model == "plain" else given["model"]
    code = main(["diagnose", *flags(output_dir=tmp_path / "new", **given), "--json"])
    diagnosis = json.loads(capsys.readouterr().out)
    assert code == 0, diagnosis["verdicts"]
    (compared,) = [c for c in diagnosis["comparisons"] if c["way"] == way]
    assert compared["dtype"] == "bfloat16"
    assert least < compared["agreement"]["median_cosine"] < 1
    assert any(f"cosine with the {way} model" in line for line in diagnosis["verdicts"])


def test_training_a_quantized_model_is_refused(scene, tmp_path):
    given = {"shards": str(scene.settings["shards"]), "model": str(scene.settings["model"])}
    with pytest.raises(ModelError, match=r"is quantized \(bitsandbytes nf4\)"):
        load_or_make_model(TrainConfig(result_dir=str(tmp_path / "run"), **given))
