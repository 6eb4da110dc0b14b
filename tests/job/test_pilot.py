"""The pilot: which documents it takes, what it measures, and the rows in its basis."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.corpora import make_corpus, mixed_documents, words
from helpers.jobs import assert_same_bits, flags, run_job
from helpers.models import make_model
from helpers.references import projected_gradient_by_autograd, sample_loss
from transformers import AutoModelForCausalLM

from gradproj import ProjectionStore
from gradproj.coordinator.process_id import Owner
from gradproj.distributed import Process, process
from gradproj.engine.capture import TokenCovariances
from gradproj.engine.engine import GradProjLoraEngine
from gradproj.errors import ConfigError, CorpusError, ModelError, ReportedError, StoreError
from gradproj.job import pilot
from gradproj.job.config import run_config
from gradproj.job.pilot import pilot_sequences
from gradproj.job.plan import make_plan
from gradproj.job.startup import make_output, start_job
from gradproj.job.unit_reader import UnitReader
from gradproj.model.tokenizer_loading import load_tokenizer
from gradproj.query.query_store import check_comparable
from gradproj.store.basis import DAMPING

N_SAMPLES, EMPTY = 40, 5


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root, documents = tmp_path_factory.mktemp("pilot"), mixed_documents(N_SAMPLES)
    documents[EMPTY]["text"] = ""
    return {
        "shards": make_corpus(root / "tars", documents, per_tar=20),
        "model": make_model(root / "model"),
        "proj_rank_total": 24,
        "proj_rank_min": 3,
        "max_length": 24,
        "batch_size": 6,
        "rows_per_shard": 16,
        "basis": "eigen",
    }


def plan_of(inputs, output, **changes):
    settings = {**inputs, "output_dir": output, **changes}
    return make_plan(run_config(flags(**settings), "plan"), progress=False)


def chosen(plan):
    """The sample ids and the sequences of the pilot's documents."""
    reader = UnitReader(plan.index, load_tokenizer(plan.files), plan.unit_settings)
    read, ids = reader.sequences_of, []

    def noted(document):
        ids.append(document.sample_id)
        return read(document)

    reader.sequences_of = noted
    sequences, n_documents = pilot_sequences(plan, reader)
    return ids, sequences, n_documents


def owner():
    return Owner.this_process("test", 0, 0)


def test_whole_corpus_is_taken_if_it_has_fewer_tokens(inputs, tmp_path):
    ids, sequences, n_documents = chosen(plan_of(inputs, tmp_path / "out"))
    assert sorted(ids) == list(range(N_SAMPLES))
    # Empty documents and those of one token make no row.
    assert n_documents == len(sequences) < N_SAMPLES


def test_pilot_ends_with_enough_tokens_from_documents_all_over_the_corpus(inputs, tmp_path):
    ids, sequences, _ = chosen(plan_of(inputs, tmp_path / "out", pilot_tokens=100))
    n_tokens = [len(tokens) - 1 for tokens in sequences]
    assert sum(n_tokens) >= 100 > sum(n_tokens[:-1])
    assert ids == [0, 32, 16, 8, 24, 4, 36, 20, 12, 28][: len(ids)]


def test_pilot_takes_chosen_domains_and_samples_only(inputs, tmp_path):
    ids, *_ = chosen(plan_of(inputs, tmp_path / "out", max_samples=10))
    assert sorted(ids) == list(range(10))
    plan = plan_of(inputs, tmp_path / "out", domains="Github", allow_sparse=True)
    _, sequences, n_documents = chosen(plan)
    assert n_documents == len(sequences) <= -(-N_SAMPLES // 3)


def test_long_document_gives_its_share_of_windows(inputs, tmp_path):
    documents = [{"text": words(400, seed)} for seed in range(2)]
    corpus = make_corpus(tmp_path / "tars", documents)
    long = {"shards": corpus, "long_documents": "windows", "pilot_tokens": 200}
    _, sequences, n_documents = chosen(plan_of(inputs, tmp_path / "out", **long))
    assert (n_documents, len(sequences)) == (2, 10)  # 5 windows of 23 targets pass 100


def covariances_by_autograd(model, engine, sequences):
    """Each layer's mean of ``P a a^T P^T`` and ``P g g^T P^T`` over target tokens, float64."""
    sums = {name: [0.0, 0.0] for name in engine.projection_matrices}
    kept = {}

    def keep(name):
        def hook(module, args, output):
            output.retain_grad()
            kept[name] = args[0], output

        return hook

    handles = [t.module.register_forward_hook(keep(t.name)) for t in engine.targets]
    model.requires_grad_(True)
    for tokens in sequences:
        sample_loss(model, torch.from_numpy(tokens.ids)).backward()
        for name, (a, output) in kept.items():
            p_i, p_o = (p.double() for p in engine.projection_matrices[name])
            a_p, g_p = a[0, :-1].double() @ p_i.T, output.grad[0, :-1].double() @ p_o.T
            sums[name][0] += a_p.T @ a_p
            sums[name][1] += g_p.T @ g_p
    for handle in handles:
        handle.remove()
    n_tokens = sum(len(tokens) - 1 for tokens in sequences)
    return {name: [(s / n_tokens).detach().numpy() for s in pair] for name, pair in sums.items()}


def test_stored_basis_makes_the_covariances_of_the_pilots_tokens_diagonal(inputs, tmp_path):
    plan = plan_of(inputs, tmp_path / "out", pilot_tokens=150)
    assert make_output(plan, owner()) is not None
    _, sequences, n_documents = chosen(plan)
    model = AutoModelForCausalLM.from_pretrained(inputs["model"]).eval()
    with ProjectionStore(tmp_path / "out") as store:
        engine = GradProjLoraEngine.from_config(
            model, plan.config.projection, store.projection_matrices
        )
        about = store.attributes["basis"]
        assert (about["kind"], about["damping"], about["pilot_tokens"]) == ("eigen", DAMPING, 150)
        assert about["tokens"] == sum(len(tokens) - 1 for tokens in sequences)
        assert about["documents"] == n_documents
        exact = covariances_by_autograd(model, engine, sequences)
        for name, pair in exact.items():
            both = zip(pair, store.basis[name], store.basis_eigenvalues[name], strict=True)
            for covariance, r, values in both:
                want = np.diag(values / (values + DAMPING * values.mean()))
                r = r.astype(np.float64)
                np.testing.assert_allclose(r @ covariance @ r.T, want, atol=1e-4)


def test_corpus_without_a_target_token_is_an_error_with_the_way_out(inputs, tmp_path):
    corpus = make_corpus(tmp_path / "tars", [{"text": "t"}, {"text": ""}])
    plan = plan_of(inputs, tmp_path / "out", shards=corpus)
    with pytest.raises(CorpusError, match=r"no document has a target token.*--basis random"):
        make_output(plan, owner())
    assert not (tmp_path / "out" / "projections.zarr").exists()


def test_store_that_another_job_publishes_during_the_pilot_is_used(inputs, tmp_path, monkeypatch):
    plan, run_batch = plan_of(inputs, tmp_path / "out"), pilot.run_batch

    def publish_first(*args, **kwargs):
        monkeypatch.setattr(pilot, "run_batch", run_batch)
        make_output(plan, Owner.this_process("other", 0, 0))
        return run_batch(*args, **kwargs)

    monkeypatch.setattr(pilot, "run_batch", publish_first)
    assert make_output(plan, owner()) is None
    assert ProjectionStore(tmp_path / "out").basis is not None


def test_layer_whose_covariances_overflow_is_named(inputs, tmp_path):
    plan = plan_of(inputs, tmp_path / "out")
    first = plan.layers[0]
    sums = TokenCovariances(
        *(torch.ones(10**6, dtype=torch.float64) for _ in "as"), torch.tensor(9)
    )
    sums.s[first.k_o**2] = torch.inf
    with pytest.raises(
        ModelError, match=f"covariances of layer {plan.layers[1].name} are not finite"
    ):
        pilot._arrays(plan.layers, sums)


# --- whole jobs ---


@pytest.fixture(scope="module")
def jobs(inputs, tmp_path_factory):
    """Stores of one basis: exact rows, signs by one rank, and by two."""
    root = tmp_path_factory.mktemp("jobs")
    settings = {**inputs, "long_documents": "windows"}
    precise = {"encoding": "dense", "proj_dtype": "float32"}
    run_job(1, output_dir=root / "exact", **settings, **precise)
    run_job(1, output_dir=root / "signs", **settings, encoding="signs")
    run_job(2, output_dir=root / "two", **settings, encoding="signs")
    return root


def test_exact_rows_are_projected_gradients_in_the_stored_basis(inputs, jobs):
    model = AutoModelForCausalLM.from_pretrained(inputs["model"]).eval()
    plan = plan_of(inputs, jobs / "none", long_documents="windows")
    reader = UnitReader(plan.index, load_tokenizer(plan.files), plan.unit_settings)
    with ProjectionStore(jobs / "exact") as store:
        engine = GradProjLoraEngine.from_config(
            model, plan.config.projection, store.projection_matrices
        )
        prepared = reader.read_samples(0, 0, 16)
        for n in (0, 1, 7):
            windows = [each.ids for each in prepared.sequences if each.owner == n]
            parts = [
                projected_gradient_by_autograd(model, engine, torch.from_numpy(w)) for w in windows
            ]
            row = sum(parts) / sum(len(w) - 1 for w in windows)
            got = store.rows([n])[0]
            assert store.column("grad_norm")[n] == pytest.approx(np.linalg.norm(got), rel=1e-5)
            for layer in store.layers:
                r_i, r_o = store.basis[layer.name]
                place = slice(layer.slice_start, layer.slice_end)
                want = r_o @ row[place].view(layer.k_o, layer.k_i).numpy() @ r_i.T
                error = np.linalg.norm(got[place] - want.ravel()) / np.linalg.norm(want)
                assert error < 1e-4


def test_signs_are_those_of_the_exact_rows_with_their_mean_magnitude(jobs):
    exact, signs = ProjectionStore(jobs / "exact"), ProjectionStore(jobs / "signs")
    ok = np.flatnonzero(exact.column("status") == 1)
    rows, decoded = exact.rows(ok), signs.rows(ok)
    for layer in exact.layers:
        place = slice(layer.slice_start, layer.slice_end)
        scale = np.abs(rows[:, place]).mean(axis=1, keepdims=True)
        want = np.where(rows[:, place] >= 0, scale, -scale)
        np.testing.assert_allclose(decoded[:, place], want, rtol=2**-10)
    np.testing.assert_array_equal(exact.column("grad_norm"), signs.column("grad_norm"))
    assert np.isnan(signs.rows([EMPTY], missing="nan")).sum() in (0, signs.dim)


def test_stores_of_any_world_size_have_equal_bits_and_no_covariances(jobs):
    assert_same_bits(jobs / "signs", jobs / "two")
    with ProjectionStore(jobs / "signs") as store, pytest.raises(Exception, match="no array"):
        store.array("token_covariance_a")


def test_query_store_takes_its_basis_from_the_store(inputs, jobs, tmp_path):
    settings = {**inputs, "max_samples": 8, "pilot_tokens": 50}
    make_output(plan_of(settings, tmp_path / "own"), owner())
    with ProjectionStore(jobs / "signs") as store:
        with pytest.raises(ConfigError, match="--basis_from"):
            check_comparable(ProjectionStore(tmp_path / "own"), store)
        make_output(plan_of(settings, tmp_path / "taken", basis_from=jobs / "signs"), owner())
        check_comparable(ProjectionStore(tmp_path / "taken"), store)
    with pytest.raises(ConfigError, match="other layers or matrices"):
        plan_of(settings, tmp_path / "other", basis_from=jobs / "signs", proj_seed=7)
    model = make_model(tmp_path / "model", initializer_range=0.03)
    with pytest.raises(ConfigError, match=r"measured on another model \(--model \(weights\)"):
        plan_of(settings, tmp_path / "other", basis_from=jobs / "signs", model=model)


def test_store_with_another_s_basis_resumes_without_it(inputs, jobs, tmp_path):
    settings = {**inputs, "max_samples": 8, "basis_from": tmp_path / "first"}
    shutil.copytree(jobs / "signs", tmp_path / "first")
    plan = plan_of(settings, tmp_path / "out")
    make_output(plan, owner())
    shutil.rmtree(tmp_path / "first")
    assert plan_of(settings, tmp_path / "out").identity == plan.identity
    with pytest.raises(StoreError, match="first"):
        plan_of(settings, tmp_path / "new")


def test_error_of_a_group_s_member_in_the_pilot_is_reported_and_ends_it(
    inputs, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(process, "LET_RANK_0_SPEAK_S", 0)

    def load(files):
        raise ModelError("no memory to check the model")

    lockstep = SimpleNamespace(load=load, group=SimpleNamespace(number=0))
    plan = plan_of(inputs, tmp_path / "out")
    answers = iter([plan])  # rank 0 waits for the pilot and says nothing more
    ranks = SimpleNamespace(from_rank_0=lambda *_: next(answers))
    with pytest.raises(ReportedError):
        start_job(plan.config, Process(1, 2, 1, 2), ranks, lockstep=lockstep)
    assert "rank 1: no memory to check the model" in capsys.readouterr().err
