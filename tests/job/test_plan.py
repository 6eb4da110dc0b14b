"""``plan`` and the job's start: one clear line for each user error; the text of a good plan."""

import json
import os
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers.corpora import make_corpus, mixed_documents
from helpers.jobs import flags
from helpers.models import make_model, make_tokenizer
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from gradproj import ProjectionStore
from gradproj.coordinator.process_id import Owner
from gradproj.corpus.index import build_index
from gradproj.corpus.index_file import save_index
from gradproj.corpus.stream import read_documents
from gradproj.corpus.tar.paths import list_tars
from gradproj.errors import exit_code
from gradproj.formatting import human_bytes
from gradproj.job.config import RunConfig, run_config
from gradproj.job.plan import check_output, make_plan
from gradproj.job.startup import make_output
from gradproj.job.summary import memory_lines, plan_lines
from gradproj.job.unit_reader import UnitReader
from gradproj.store.layout import STATUS


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A valid corpus and model."""
    root = tmp_path_factory.mktemp("good")
    corpus = make_corpus(root / "tars", mixed_documents(200))
    return SimpleNamespace(corpus=corpus, model=make_model(root / "model"), root=root)


def plan_of(files, tmp_path, **changes):
    settings = {
        "shards": files.corpus,
        "model": files.model,
        "output_dir": tmp_path / "out",
        **changes,
    }
    settings = {name: value for name, value in settings.items() if value is not None}
    return make_plan(run_config(flags(**settings), "plan"), progress=False)


@pytest.fixture
def refused(files, tmp_path, capsys):
    """Make a plan that must be rejected; return the message, all of standard error."""

    def refuse(**changes):
        capsys.readouterr()
        assert exit_code(lambda: plan_of(files, tmp_path, **changes) and None) == 2
        message = capsys.readouterr().err
        assert message.startswith("gradproj: ")
        assert "Traceback" not in message
        return message.removeprefix("gradproj: ").strip()

    return refuse


WRONG_VALUES = [
    ({"shards": ""}, "--shards is empty"),
    ({"shards": "/nowhere"}, "/nowhere"),
    ({"shards": "pipe:cat x.tar"}, "pipe:"),
    ({"shards": "s3://bucket/x.tar"}, "s3:"),
    ({"output_dir": ""}, "--output_dir is empty"),
    ({"max_samples": -1}, "--max_samples must be at least 0"),
    ({"max_samples": "many"}, "--max_samples"),
    ({"domains": "Nope"}, "--domains: the corpus has no Nope; it has ArXiv, Github, Pile-CC"),
    ({"model": None}, "--model or --architecture"),
    ({"architecture": "GPT2-Small"}, "--model or --architecture"),
    ({"model": None, "architecture": "GPT5"}, "--architecture is 'GPT5'; choose one of GPT2-Small"),
    ({"model": None, "architecture": "GPT2-Small", "init": "random"}, "give --tokenizer"),
    ({"model": None, "architecture": "GPT2-Small"}, "--model gpt2: not a directory here"),
    ({"model": "/nowhere"}, "--model /nowhere: no such directory"),
    ({"model": "name/of/three"}, "--model name/of/three: no such directory"),
    ({"init": "zeros"}, "--init is 'zeros'"),
    ({"revision": "main"}, "--revision main:"),
    ({"tokenizer": "/nowhere"}, "--tokenizer /nowhere: no such directory"),
    ({"special_tokens": "all"}, "--special_tokens is 'all'"),
    ({"model_dtype": "float16"}, "--model_dtype is 'float16'; choose one of float32, bfloat16"),
    ({"proj_layers": ","}, "--proj_layers is empty"),
    ({"proj_layers": "nope"}, "no layer of the model matches 'nope'"),
    ({"proj_rank_total": 0}, "--proj_rank_total must be at least 1"),
    ({"proj_rank_total": 10}, "--proj_rank_total 10 cannot hold 8 x 8"),
    ({"proj_rank_min": 0}, "--proj_rank_min must be at least 1"),
    ({"proj_seed": "x"}, "--proj_seed"),
    ({"proj_kind": "fourier"}, "--proj_kind is 'fourier'"),
    ({"proj_dtype": "int8"}, "--proj_dtype is 'int8'"),
    ({"compressor": "lz4"}, "--compressor is 'lz4'"),
    ({"rows_per_shard": -1}, "--rows_per_shard"),
    ({"batch_size": 0}, "--batch_size must be at least 1"),
    ({"batch_tokens": -1}, "--batch_tokens must be at least 1, or auto"),
    ({"max_length": 1}, "--max_length must be at least 2"),
    ({"max_length": 65}, "--max_length 65 is more than the model's 64 positions"),
    ({"long_documents": "skip"}, "--long_documents is 'skip'"),
    ({"loss_reduction": "max"}, "--loss_reduction is 'max'"),
    ({"device": "tpu"}, "--device is 'tpu'"),
    ({"threads": -1}, "--threads must be from 0 to 1,024"),
    ({"threads": 100_000}, "--threads must be from 0 to 1,024"),
    ({"shards": "/nowhere/tars"}, "/nowhere/tars does not exist"),
    ({"ranks_per_model": 0}, "--ranks_per_model must be at least 1"),
    ({"ranks_per_model": 2, "offload": True}, "--ranks_per_model and --offload: give one of them"),
    ({"offload": True, "compile": True}, "--compile and --offload: give one of them"),
    ({"proj_save_interval": -1}, "--proj_save_interval must be at least 0"),
    ({"max_document_bytes": 0}, "--max_document_bytes must be at least 1"),
    ({"proj_layrs": "mlp"}, "unknown flag '--proj_layrs'; did you mean --proj_layers?"),
]


@pytest.mark.parametrize(
    ("changes", "message"), WRONG_VALUES, ids=lambda v: str(v) if isinstance(v, dict) else ""
)
def test_wrong_value_is_one_line_with_the_flag(refused, changes, message):
    text = refused(**changes)
    assert message in text
    assert "\n" not in text


def test_config_file_uses_flag_names_and_flags_win(files, tmp_path):
    (tmp_path / "run.toml").write_text(
        f'shards = "{files.corpus}"\nmodel = "{files.model}"\n'
        "proj_rank_total = 100\nproj_seed = 3\ndeterministic = true\n"
    )
    config = run_config(
        flags(config=tmp_path / "run.toml", output_dir=tmp_path / "out", proj_seed=4), "plan"
    )
    assert (config.projection.rank_total, config.projection.seed, config.job.deterministic) == (
        100,
        4,
        True,
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("proj_seeed = 3", "unknown key 'proj_seeed'; did you mean proj_seed?"),
        ('proj_seed = "three"', "proj_seed must be one int, got 'three'"),
        ("proj_seed = [3, 4]", "proj_seed must be one int"),
        ("deterministic = 1", "deterministic must be one bool"),
        ("proj_seed = ", "cannot be read"),
    ],
)
def test_wrong_line_of_the_config_file_is_named(refused, tmp_path, line, message):
    (tmp_path / "run.toml").write_text(line)
    assert message in refused(config=tmp_path / "run.toml")


def test_missing_config_file_is_named(refused, tmp_path):
    assert "run.toml cannot be read" in refused(config=tmp_path / "run.toml")


def test_missing_tar_is_named(refused, files, tmp_path):
    (tmp_path / "list.txt").write_text(
        f"{files.corpus}/shard-000000.tar\n{files.corpus}/shard-000009.tar\n"
    )
    assert "shard-000009.tar" in refused(shards=tmp_path / "list.txt")


def test_damaged_tar_is_named(refused, files, tmp_path):
    shutil.copytree(files.corpus, tmp_path / "tars")
    tar = tmp_path / "tars" / "shard-000002.tar"
    tar.write_bytes(tar.read_bytes()[:20_000])
    assert "shard-000002.tar" in refused(shards=tmp_path / "tars")


@pytest.mark.parametrize("relative", [False, True])
def test_tar_changed_since_indexing_is_named(refused, files, tmp_path, monkeypatch, relative):
    shutil.copytree(files.corpus, tmp_path / "tars")
    save_index(
        build_index(list_tars(str(tmp_path / "tars")), progress=False),
        tmp_path / "tars" / "corpus.json",
    )
    os.utime(tmp_path / "tars" / "shard-000003.tar", (1, 1))
    monkeypatch.chdir(tmp_path)
    message = refused(shards="tars" if relative else tmp_path / "tars")
    assert "shard-000003.tar" in message


def test_output_continues_with_touched_tars_after_reindexing(refused, files, tmp_path):
    tars = shutil.copytree(files.corpus, tmp_path / "tars")
    make_output(plan_of(files, tmp_path, shards=tars), Owner.this_process("test", 0, 0))
    os.utime(tars / "shard-000003.tar", (1, 1))
    assert "shard-000003.tar" in refused(shards=tars)
    save_index(build_index(list_tars(str(tars)), progress=False), tars / "corpus.json")
    plan_of(files, tmp_path, shards=tars)


def test_more_than_a_thousand_tars_need_an_index_first(refused, files, monkeypatch):
    monkeypatch.setattr("gradproj.job.plan.MAX_TARS_TO_INDEX", 4)
    assert f"python -m gradproj index '{files.corpus}'" in refused()


def test_empty_corpus_is_rejected(refused, tmp_path):
    make_corpus(tmp_path / "tars", [])
    (tmp_path / "tars" / "x.tar").write_bytes(bytes(10240))
    assert "hold no document" in refused(shards=tmp_path / "tars")


def test_model_without_weights_is_rejected(refused, files, tmp_path):
    shutil.copytree(files.model, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    assert "holds no weights" in refused(model=tmp_path / "model")


def test_pickled_weights_are_rejected_unless_allowed(refused, files, tmp_path):
    shutil.copytree(files.model, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "pytorch_model.bin")
    assert "--allow_pickle" in refused(model=tmp_path / "model")


def test_missing_weight_file_is_named(refused, files, tmp_path):
    shutil.copytree(files.model, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    index = {
        "weight_map": {
            "a": "model-00001-of-00002.safetensors",
            "b": "model-00002-of-00002.safetensors",
        }
    }
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model" / "model-00001-of-00002.safetensors").touch()
    assert "lacks model-00002-of-00002.safetensors" in refused(model=tmp_path / "model")


def test_tokens_without_an_embedding_are_said_and_only_their_documents_are_bad(files, tmp_path):
    tokenizer = make_tokenizer(tmp_path / "larger", vocab_size=340)
    plan = plan_of(files, tmp_path, tokenizer=tmp_path / "larger")
    assert (plan.n_tokens, plan.vocabulary) == (340, 300)
    (line,) = (line for line in plan_lines(plan, 0) if line.startswith("tokenizer"))
    assert "340 tokens, and the model's vocabulary only 300" in line
    status = UnitReader(plan.index, tokenizer, plan.unit_settings).read(0).columns["status"]
    documents = read_documents(plan.index, 0, len(status))
    tokens = [tokenizer(d.text).input_ids[: plan.config.batch.max_length] for d in documents]
    known = [max(ids, default=0) < 300 for ids in tokens]
    assert 0 < sum(known) < len(known)
    assert (status == STATUS["bad_input"]).tolist() == [not each for each in known]


def test_folder_without_a_tokenizer_is_rejected(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds no tokenizer that loads" in refused(tokenizer=tmp_path / "empty")


def test_tokenizer_without_the_requested_special_token_is_rejected(refused, tmp_path):
    make_tokenizer(tmp_path / "plain")
    settings = json.loads((tmp_path / "plain" / "tokenizer_config.json").read_text())
    del settings["bos_token"]
    (tmp_path / "plain" / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "plain" / "special_tokens_map.json").unlink(missing_ok=True)
    assert "the tokenizer has no bos token" in refused(
        tokenizer=tmp_path / "plain", special_tokens="bos"
    )


def test_foreign_folder_is_rejected_and_unchanged(refused, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    assert "is not a gradproj output: it holds thesis.tex" in refused()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_outputs_own_folders_without_a_store_are_taken(tmp_path):
    for name in ("preconditioners", "text", "curvature", "domains", "logs"):
        (tmp_path / "out" / name).mkdir(parents=True)
    check_output(tmp_path / "out")


def test_file_as_output_is_rejected(refused, tmp_path):
    (tmp_path / "out").write_text("x")
    assert "is a file; give a folder" in refused()


def test_full_disk_is_rejected_before_anything_is_written(refused, tmp_path, monkeypatch):
    monkeypatch.setattr("gradproj.job.sizes.free_bytes", lambda path: 1000)
    assert "are still needed and 1.0 kB are free" in refused()
    assert not (tmp_path / "out").exists()


def test_units_that_no_bucket_takes_are_rejected(refused, monkeypatch):
    monkeypatch.setattr("gradproj.job.sizes.in_bucket", lambda path: True)
    monkeypatch.setattr("gradproj.job.sizes.MAX_PUT_BYTES", 10_000)
    message = refused(rows_per_shard=64, proj_rank_total=24, proj_rank_min=3)
    assert "--rows_per_shard 64: a unit's rows are one object of" in message
    assert "Give --rows_per_shard 8 or fewer" in message


def test_domains_of_a_mixed_corpus_require_allow_sparse(refused, files, tmp_path):
    message = refused(domains="Github")
    assert "not grouped by domain" in message
    assert "--allow_sparse" in message
    plan = plan_of(files, tmp_path, domains="Github", allow_sparse=True)
    assert plan.wasted_bytes() == (13 * 16 - 67) * plan.row_bytes
    assert any("wasted" in line for line in plan_lines(plan, 0))


def test_plan_writes_nothing_and_prints_what_the_run_takes(files, tmp_path):
    plan = plan_of(files, tmp_path, proj_rank_total=24, proj_rank_min=3)
    assert not (tmp_path / "out").exists()
    text = "\n".join(plan_lines(plan, 0))
    assert "200 in 5 tars" in text
    assert "D = 14 layers x 24 = 336 values" in text
    assert "13 of 16 rows" in text


def test_plan_names_modules_that_share_a_weight(files, tmp_path):
    model = make_model(tmp_path / "zamba", "zamba")
    plan = plan_of(files, tmp_path, model=model, proj_layers="q_proj,gate_proj")
    names = [f"model.layers.{block}.shared_transf.self_attn.q_proj" for block in (0, 2)]
    assert plan.layers[0].name == names[0]
    assert len(plan.layers) == 2
    (line,) = [line for line in plan_lines(plan, 0) if line.startswith("shared")]
    assert f"2 layers have a weight that several modules use ({names[0]} = {names[1]})" in line


def test_plan_and_store_list_the_layers_that_are_left_out(files, tmp_path):
    plan = plan_of(files, tmp_path, proj_layers="mlp")
    text = "\n".join(plan_lines(plan, 0))
    assert "layers        6 of 14 linear layers of the blocks, 60.0 % of their weights" in text
    assert "not selected  model.layers.*.self_attn (8: 40.0 %)" in text
    make_output(plan, Owner.this_process("test", 0, 0))
    with ProjectionStore(tmp_path / "out") as store:
        selection = store.attributes["selection"]
    assert (selection["n_layers"], selection["n_selected"]) == (14, 6)
    assert [each["name"] for each in selection["not_selected"]] == ["model.layers.*.self_attn"]


def test_dashed_list_needs_no_equals_sign(files, tmp_path):
    plan = plan_of(files, tmp_path, proj_layers="-layers.0,mlp,attn")
    assert len(plan.layers) == 7


def test_layers_that_the_loss_never_reaches_are_left_out_by_name_or_refused(
    files, refused, tmp_path
):
    text = dict(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
        layer_types=["full_attention"],
    )  # fmt: skip
    vision = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        image_size=28, patch_size=14, vision_use_head=False,
    )  # fmt: skip
    config = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=319
    )
    model = Gemma3ForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "model")
    make_tokenizer(tmp_path / "model")
    message = refused(model=tmp_path / "model", proj_layers="layers")
    assert "the loss of a text never reaches 6 of 13 target layers: model.vision_tower." in message
    assert "Give --proj_layers layers,-vision_tower (it takes model.language_model." in message
    assert not (tmp_path / "out").exists()
    plan = plan_of(files, tmp_path, model=tmp_path / "model")
    assert {layer.name.partition(".layers.")[0] for layer in plan.layers} == {
        "model.language_model"
    }
    assert [(each.name, each.n) for each in plan.coverage.not_reached] == [
        ("model.vision_tower", 6)
    ]


def test_planned_bytes_are_near_the_stores(files, tmp_path):
    from helpers.jobs import run_job

    plan = plan_of(files, tmp_path)
    run_job(1, shards=files.corpus, model=files.model, output_dir=tmp_path / "out")
    written = [p.stat().st_size for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert 0.7 < plan.store_bytes() / sum(written) < 1.5
    assert 0.7 < plan.n_files() / len(written) < 1.5


def test_plan_of_a_budget_is_that_of_the_flags_that_it_prints(files, tmp_path):
    plan = plan_of(files, tmp_path, bytes_per_document="600")
    (line,) = [note for note in plan.notes if note.startswith("allocation")]
    chosen = dict(re.findall(r"--(\w+) (\S+)", line))
    assert chosen.keys() == {"proj_layers", "proj_rank_total", "encoding"}
    assert plan.identity == plan_of(files, tmp_path, dense_rows=False, **chosen).identity
    assert RunConfig.from_flags(plan.config.as_flags()) == plan.config


def make_begun_output(plan):
    """Make an output in which a rank computes its first rows."""
    make_output(plan, Owner.this_process("test", 0, 0))
    (plan.output / "partial" / "00000000").mkdir()


def test_begun_store_keeps_the_rows_of_its_shards(files, tmp_path):
    make_begun_output(plan_of(files, tmp_path, rows_per_shard=32))
    assert plan_of(files, tmp_path).layout.rows_per_shard == 32
    assert plan_of(files, tmp_path / "other").layout.rows_per_shard == 16


def test_other_identity_lists_every_difference(refused, files, tmp_path):
    make_begun_output(plan_of(files, tmp_path))
    message = refused(
        proj_seed=1, max_length=32, domains="Github", allow_sparse=True, special_tokens="bos"
    )
    assert "cannot add to" in message
    for line in (
        "--proj_seed: store 42, this run 1",
        "--max_length: store 64, this run 32",
        "--domains: store [], this run ['Github']",
        "--special_tokens: store 'tokenizer', this run 'bos'",
    ):
        assert line in message
    assert "proj_kind" not in message


def test_other_weights_are_another_identity(refused, files, tmp_path):
    make_begun_output(plan_of(files, tmp_path))
    make_model(tmp_path / "other", rms_norm_eps=1e-3)
    assert "--model (config)" in refused(model=tmp_path / "other")
    moved = shutil.copytree(files.model, tmp_path / "moved")
    assert plan_of(files, tmp_path, model=moved).identity == plan_of(files, tmp_path).identity


def test_plan_names_the_parts_of_a_gpus_memory_unless_the_job_is_one_of_the_cpu(files, tmp_path):
    plan = plan_of(files, tmp_path)
    _, line = memory_lines(plan, torch.device("cpu"))
    weights, rows = human_bytes(4 * plan.n_weights), human_bytes(plan.unit_bytes())
    assert line.startswith("GPU memory    about ")
    assert re.search(rf" a rank: weights {weights}, batch \S+ \S+, unit's rows {rows}$", line)
    _, line = memory_lines(plan_of(files, tmp_path, batch_tokens="auto"), torch.device("cuda"))
    assert line.endswith(f"unit's rows {rows}, and batches that fit what is free")
    assert len(memory_lines(plan_of(files, tmp_path, device="cpu"), torch.device("cpu"))) == 1
