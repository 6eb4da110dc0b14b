"""A row is the projected gradient of its own sample, whatever else is in the batch."""

import gc

import pytest
import torch
from helpers.models import FAMILIES, VOCAB, ragged_batch, small_model
from helpers.references import projected_gradient_by_autograd, relative_error, sample_loss
from torch import nn

from gradproj.engine.engine import GradProjLoraEngine
from gradproj.engine.layers import LAYER_RULES
from gradproj.engine.loss import chunk_verdict, per_sample_loss
from gradproj.engine.selection import find_layers
from gradproj.errors import ConfigError, ModelError
from gradproj.kernels.chunked_cross_entropy import SLICE_VALUES

LENGTHS = [9, 21, 2, 14]
ENGINE = {"proj_rank_total": 24, "proj_rank_min": 3}


def rows_of(model, ids, labels, **options):
    with GradProjLoraEngine(model, **{**ENGINE, **options}) as engine:
        per_sample_loss(model, {"input_ids": ids, "labels": labels}).sum().backward()
        return engine.collect_batch(), engine


@pytest.mark.parametrize("freeze", [True, False], ids=["frozen", "trainable"])
@pytest.mark.parametrize("kind", ["rademacher", "orthonormal"])
@pytest.mark.parametrize("family", FAMILIES)
def test_row_is_the_projected_gradient_of_its_sample_alone(family, kind, freeze):
    model = small_model(family)
    ids, labels = ragged_batch(LENGTHS)
    rows, engine = rows_of(model, ids, labels, proj_kind=kind, freeze_weights=freeze)
    assert rows.shape == (4, engine.total_proj_dim)
    for n, length in enumerate(LENGTHS):
        want = projected_gradient_by_autograd(model, engine, ids[n, :length])
        assert want.norm() > 0
        assert relative_error(rows[n], want) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_row_does_not_depend_on_its_batch_or_order(family):
    model = small_model(family)
    ids, labels = ragged_batch(LENGTHS)
    rows, _ = rows_of(model, ids, labels, freeze_weights=True)
    order = [2, 0, 3, 1]
    shuffled, _ = rows_of(model, ids[order], labels[order], freeze_weights=True)
    for n, length in enumerate(LENGTHS):
        alone, _ = rows_of(
            model, ids[n : n + 1, :length], labels[n : n + 1, :length], freeze_weights=True
        )
        assert relative_error(rows[n], alone[0]) < 1e-5
        assert relative_error(shuffled[order.index(n)], alone[0]) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_chunked_loss_is_used_and_equals_the_models_own(family):
    model = small_model(family)
    assert chunk_verdict(model)[0], chunk_verdict(model)[1]
    ids, labels = ragged_batch(LENGTHS)
    losses = per_sample_loss(model.requires_grad_(False), {"input_ids": ids, "labels": labels})
    for n, length in enumerate(LENGTHS):
        torch.testing.assert_close(
            losses[n], sample_loss(model, ids[n, :length]), rtol=1e-5, atol=0
        )


def test_chunk_probe_respects_the_models_positions():
    assert chunk_verdict(small_model("gpt2", n_positions=9))[0]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_many_small_vocabulary_slices_give_the_rows_of_one(family, monkeypatch):
    model = small_model(family)
    ids, labels = ragged_batch(LENGTHS)
    whole, _ = rows_of(model, ids, labels, freeze_weights=True)
    monkeypatch.setitem(SLICE_VALUES, "cpu", 1)
    monkeypatch.setattr("gradproj.kernels.chunked_cross_entropy.MAX_TOKENS", 5)
    parts, _ = rows_of(model, ids, labels, freeze_weights=True)
    assert relative_error(parts, whole) < 1e-6


def test_unusual_head_falls_back_to_the_models_own_logits():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = small_model("llama")
    head = Doubled(32, VOCAB, bias=False)
    model.lm_head = head
    allowed, why = chunk_verdict(model)
    assert not allowed
    assert "Doubled" in why
    ids, labels = ragged_batch(LENGTHS)
    rows, engine = rows_of(model, ids, labels, freeze_weights=True)
    assert relative_error(rows[1], projected_gradient_by_autograd(model, engine, ids[1])) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_and_head_can_be_target_layers(family):
    model = small_model(family, tie_word_embeddings=False)
    head = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
    ids, labels = ragged_batch(LENGTHS, pad=5)
    rows, engine = rows_of(
        model, ids, labels, proj_layers=f"attn,{head}", include_embeddings=True, freeze_weights=True
    )
    assert {t.rule.type_name for t in engine.targets} >= {"Embedding", "Linear"}
    for n, length in enumerate(LENGTHS):
        want = projected_gradient_by_autograd(model, engine, ids[n, :length])
        assert relative_error(rows[n], want) < 1e-5


def test_tied_embedding_row_is_the_lookups_share_only():
    model = small_model("gpt2")
    untied = small_model("gpt2", tie_word_embeddings=False)
    untied.load_state_dict(model.state_dict(), strict=False)
    untied.lm_head.weight.data.copy_(model.transformer.wte.weight)
    ids, labels = ragged_batch(LENGTHS)
    options = {"proj_layers": "c_fc", "include_embeddings": True, "freeze_weights": True}
    rows, _ = rows_of(model, ids, labels, **options)
    _, engine = rows_of(untied, ids, labels, **options)
    assert relative_error(rows[1], projected_gradient_by_autograd(untied, engine, ids[1])) < 1e-5


def test_shared_layer_has_the_sum_of_its_calls():
    model = small_model("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    ids, labels = ragged_batch(LENGTHS)
    rows, engine = rows_of(model, ids, labels, proj_layers="mlp", freeze_weights=True)
    assert len(engine.targets) == 3
    assert relative_error(rows[0], projected_gradient_by_autograd(model, engine, ids[0, :9])) < 1e-5


@pytest.mark.parametrize("pattern", ["attn", "lora_A,lora_B"])
def test_peft_models_work(pattern):
    peft = pytest.importorskip("peft", reason="the peft extra is not installed")
    base = small_model("llama")
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(base, settings).eval()
    ids, labels = ragged_batch(LENGTHS)
    rows, engine = rows_of(model, ids, labels, proj_layers=pattern)
    for n, length in enumerate(LENGTHS):
        want = projected_gradient_by_autograd(model, engine, ids[n, :length])
        assert relative_error(rows[n], want) < 1e-5


def test_gradient_checkpointing_of_transformers_does_not_change_rows():
    model = small_model("llama")
    ids, labels = ragged_batch(LENGTHS)
    rows, _ = rows_of(model, ids, labels)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()  # transformers checkpoints in training mode only
    calls = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda m, a: calls.append(1))
    again, _ = rows_of(model, ids, labels)
    # Three times for the engine's check in eval mode, then twice for the batch.
    assert len(calls) == 3 + 2, "the block was not computed again"
    assert relative_error(again, rows) < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_of_the_engine_does_not_change_rows(family):
    model = small_model(family)
    ids, labels = ragged_batch(LENGTHS)
    rows, engine = rows_of(model, ids, labels, freeze_weights=True)
    calls = []
    engine.targets[0].module.register_forward_pre_hook(lambda m, a: calls.append(1))
    again, _ = rows_of(model, ids, labels, freeze_weights=True, gradient_checkpointing=True)
    # Three times for the engine's check, then for the batch.
    assert len(calls) == 2 * (3 + 1), "the block was not computed again"
    assert torch.equal(again, rows)


def test_checkpointing_a_model_without_marked_blocks_is_rejected():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    engine = GradProjLoraEngine(model, "0", 4, 2, freeze_weights=True, gradient_checkpointing=True)
    with pytest.raises(ModelError, match="transformers marks no block of Sequential"):
        engine.attach()
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("reduce", [torch.sum, torch.mean])
def test_reduction_of_per_sample_losses_is_undone(reduce):
    model = small_model("gpt2")
    ids, labels = ragged_batch(LENGTHS)
    want, _ = rows_of(model, ids, labels)
    with GradProjLoraEngine(model, **ENGINE) as engine:
        reduce(per_sample_loss(model, {"input_ids": ids, "labels": labels})).backward()
        assert relative_error(engine.collect_batch(), want) < 1e-5


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reduction_of_a_custom_loss_is_undone_when_given(reduction):
    model = small_model("gpt2")
    ids, labels = ragged_batch(LENGTHS)
    want, _ = rows_of(model, ids, labels)
    with GradProjLoraEngine(model, **ENGINE) as engine:
        engine.attach_train_batch(ids, labels, 1, loss_reduction=reduction)
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        (loss * ((labels[:, 1:] != -100).sum() if reduction == "sum" else 1)).backward()
        assert relative_error(engine.collect_batch(), want) < 1e-5


def test_missing_reduction_of_a_custom_loss_is_an_error():
    model = small_model("gpt2")
    ids, labels = ragged_batch(LENGTHS)
    with GradProjLoraEngine(model, **ENGINE) as engine:
        per_sample_loss(model, ids).sum().backward()
        engine.collect_batch()
        model(input_ids=ids, labels=labels).loss.backward()
        with pytest.raises(ModelError, match="loss_reduction='mean' or 'sum'"):
            engine.collect_batch()


@pytest.mark.parametrize("wrap", ["ddp", "compile"])
def test_wrapped_model_gives_the_rows_of_the_plain_model(wrap, tmp_path):
    model = small_model("gpt2")
    ids, labels = ragged_batch(LENGTHS)
    want, plain = rows_of(model, ids, labels)
    if wrap == "compile":
        wrapped = torch.compile(model, backend="eager")
        rows, engine = rows_of(wrapped, ids, labels)
        slice_ranges = engine.slice_ranges
    else:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
        )
        try:
            rows, engine = rows_of(nn.parallel.DistributedDataParallel(model), ids, labels)
            slice_ranges = engine.slice_ranges
        finally:
            # A wrapper that outlives the group ends it while it holds the interpreter's lock, for
            # which gloo's thread may be waiting.
            engine = None
            gc.collect()
            torch.distributed.destroy_process_group()
    assert slice_ranges == plain.slice_ranges
    assert relative_error(rows, want) < 1e-5


@pytest.mark.parametrize("freeze", [True, False])
def test_projections_stay_float32_under_autocast(freeze):
    model = small_model("llama")
    ids, labels = ragged_batch(LENGTHS)
    want, _ = rows_of(model, ids, labels)
    with GradProjLoraEngine(model, **ENGINE, freeze_weights=freeze) as engine:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = per_sample_loss(model, {"input_ids": ids, "labels": labels})
        losses.sum().backward()
        rows = engine.collect_batch()
    assert rows.dtype == torch.float32
    assert 1e-5 < relative_error(rows, want) < 0.1


def test_mean_is_undone_in_bfloat16_too():
    model = small_model("gpt2").to(torch.bfloat16).requires_grad_(False)
    ids, labels = ragged_batch(LENGTHS[:3])
    want, _ = rows_of(model, ids, labels)
    with GradProjLoraEngine(model, **ENGINE) as engine:
        per_sample_loss(model, {"input_ids": ids, "labels": labels}).mean().backward()
        rows = engine.collect_batch()
    ratio = (rows * want).sum(dim=1) / (want * want).sum(dim=1)
    torch.testing.assert_close(ratio, torch.ones(3), atol=2e-3, rtol=0)


def test_bfloat16_rows_equal_float32_rows_within_rounding():
    model = small_model("llama")
    ids, labels = ragged_batch(LENGTHS)
    want, _ = rows_of(model, ids, labels)
    rows, _ = rows_of(model.to(torch.bfloat16), ids, labels, freeze_weights=True)
    assert torch.cosine_similarity(rows, want).min() > 0.99


def test_batch_that_fails_in_collect_adds_nothing_to_the_sums(monkeypatch):
    model = small_model("gpt2")
    ids, labels = ragged_batch(LENGTHS)
    with GradProjLoraEngine(model, **ENGINE, freeze_weights=True, token_covariances=True) as engine:
        per_sample_loss(model, {"input_ids": ids, "labels": labels}).sum().backward()
        monkeypatch.setattr(
            type(engine._capture), "covariances", lambda *a: (_ for _ in ()).throw(MemoryError)
        )
        with pytest.raises(MemoryError):
            engine.collect_batch()
        assert engine.take_token_covariances().n_tokens == 0


def test_samples_without_a_target_have_zero_rows():
    model = small_model("gpt2")
    ids, labels = ragged_batch(LENGTHS)
    rows, _ = rows_of(model, ids, torch.full_like(labels, -100), freeze_weights=True)
    assert rows.shape[0] == 4
    assert not rows.any()


def test_attach_and_detach_leave_no_trace():
    model = small_model("gpt2").train()
    model.transformer.h[0].eval()
    model.transformer.wpe.weight.requires_grad_(False)
    state = torch.get_rng_state().clone()
    before = (
        [p.requires_grad for p in model.parameters()],
        [m.training for m in model.modules()],
        [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        {k: v.clone() for k, v in model.state_dict().items()},
    )
    ids, labels = ragged_batch(LENGTHS)
    rows_of(model, ids, labels, freeze_weights=True)
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    assert before[0] == [p.requires_grad for p in model.parameters()]
    assert before[1] == [m.training for m in model.modules()]
    assert before[2] == [
        (len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()
    ]
    assert all(torch.equal(v, before[3][k]) for k, v in model.state_dict().items())


def test_layer_selection_does_not_change_other_layers_values():
    model = small_model("gpt2")
    ids, labels = ragged_batch(LENGTHS)
    both, engine = rows_of(model, ids, labels)
    only, alone = rows_of(model, ids, labels, proj_layers="h.1.mlp")
    for name, (start, stop) in alone.slice_ranges.items():
        there = engine.slice_ranges[name]
        torch.testing.assert_close(only[:, start:stop], both[:, there[0] : there[1]])


def test_token_covariances_are_sums_over_real_tokens_of_single_samples():
    model = small_model("llama")
    ids, labels = ragged_batch(LENGTHS)
    mask = (labels != -100).int()
    mask[range(4), [n - 1 for n in LENGTHS]] = 0  # the last token leads to no target
    with GradProjLoraEngine(model, **ENGINE, freeze_weights=True, token_covariances=True) as engine:
        for _ in range(2):
            engine.set_token_mask(mask)
            per_sample_loss(model, {"input_ids": ids, "labels": labels}).sum().backward()
            engine.collect_batch()
        got = engine.take_token_covariances()
        assert engine.take_token_covariances().n_tokens == 0
    assert got.n_tokens == 2 * sum(n - 1 for n in LENGTHS)
    want_a, want_g = covariances_the_slow_way(
        model, engine, [ids[n, :k] for n, k in enumerate(LENGTHS)]
    )
    assert relative_error(got.a, 2 * want_a) < 1e-5
    assert relative_error(got.s, 2 * want_g) < 1e-5


def covariances_the_slow_way(model, engine, samples):
    """Inputs and output gradients kept whole by plain hooks, one sample and one token at a time."""
    kept: dict[str, list] = {t.name: [] for t in engine.targets}
    handles = [
        t.module.register_forward_hook(
            lambda m, a, out, name=t.name: kept[name].append((a[0], out))
        )
        for t in engine.targets
    ]
    for tokens in samples:
        embedded = model.get_input_embeddings()(tokens[None]).requires_grad_(True)
        logits = model(inputs_embeds=embedded, use_cache=False).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[:-1], tokens[1:], reduction="sum")
        outputs = [kept[t.name][-1][1] for t in engine.targets]
        for t, g in zip(engine.targets, torch.autograd.grad(loss, outputs), strict=True):
            kept[t.name][-1] = (kept[t.name][-1][0][0, :-1].double(), g[0, :-1].double())
    for handle in handles:
        handle.remove()
    flat_a, flat_g = [], []
    for t in engine.targets:
        p_i, p_o = (p.double() for p in engine.projection_matrices[t.name])
        flat_a.append(
            sum(
                torch.outer(p_i @ x, p_i @ x) for a, _ in kept[t.name] for x in a.detach()
            ).flatten()
        )
        flat_g.append(
            sum(torch.outer(p_o @ x, p_o @ x) for _, g in kept[t.name] for x in g).flatten()
        )
    return torch.cat(flat_a), torch.cat(flat_g)


def test_sample_with_non_finite_gradient_affects_no_other():
    model = small_model("gpt2")
    ids, labels = ragged_batch(LENGTHS)
    good, _ = rows_of(model, ids, labels)
    with GradProjLoraEngine(model, **ENGINE, token_covariances=True) as engine:
        losses = per_sample_loss(model, {"input_ids": ids, "labels": labels})
        (losses * torch.tensor([1.0, float("nan"), 1.0, 1.0])).sum().backward()
        rows = engine.collect_batch()
        covariances = engine.take_token_covariances()
    assert rows[1].isnan().all()
    assert relative_error(rows[[0, 2, 3]], good[[0, 2, 3]]) < 1e-5
    assert covariances.a.isfinite().all()
    assert covariances.s.isfinite().all()


def test_every_layer_rule_is_covered_by_a_family():
    covered = {
        t.rule.type_name
        for family in (*FAMILIES, "qwen3_moe")
        for t in find_layers(small_model(family), ["attn", "mlp"], include_embeddings=True)
    }
    assert covered == {rule.type_name for rule in LAYER_RULES.values()}


@pytest.mark.parametrize("family", FAMILIES)
def test_mlp_and_attn_match_every_dense_layer_of_every_block(family):
    model = small_model(family)
    matched = [t.name for t in find_layers(model, ["mlp", "attn"])]
    inner = [
        n
        for n, m in model.named_modules()
        if type(m).__name__ in ("Linear", "Conv1D") and "lm_head" not in n
    ]
    outside_blocks = {"embed_out", "model.decoder.project_out", "model.decoder.project_in"}
    assert matched == [n for n in inner if n not in outside_blocks]


def test_patterns_match_whole_components():
    model = small_model("gpt2", n_layer=11)
    names = {t.name for t in find_layers(model, ["h.1"])}
    assert names
    assert all(name.startswith("transformer.h.1.") for name in names)


def test_unmatched_pattern_lists_the_models_layers():
    with pytest.raises(
        ModelError, match=r"no layer of the model matches 'nope'.*transformer\.h\.\*\.mlp\.c_fc"
    ):
        GradProjLoraEngine(small_model("gpt2"), "mlp,nope")


def test_fused_expert_weights_are_named():
    model = small_model("mixtral")
    with pytest.raises(ModelError, match=r"cannot project: model\.layers\.\*\.mlp\.\S+ \(Mixtral"):
        GradProjLoraEngine(model, "mlp", experts="none")
    assert GradProjLoraEngine(model, "attn").total_proj_dim > 0


def test_unused_layer_is_an_error_not_a_zero_row():
    model = small_model("llama")
    model.model.layers[0].mlp.spare = nn.Linear(4, 4)
    ids, labels = ragged_batch(LENGTHS)
    with pytest.raises(
        ModelError, match=r"1 of \d+ target layers were never called: model\.layers\.0\.mlp\.spare"
    ):
        rows_of(model, ids, labels)


def test_collect_without_a_backward_pass_is_an_error():
    model = small_model("gpt2")
    with (
        GradProjLoraEngine(model, **ENGINE) as engine,
        pytest.raises(ModelError, match="no backward pass"),
    ):
        engine.collect_batch()


def test_uncollected_batch_is_an_error_not_lost():
    model = small_model("gpt2")
    ids, labels = ragged_batch(LENGTHS)
    batch = {"input_ids": ids, "labels": labels}
    with GradProjLoraEngine(model, **ENGINE) as engine:
        per_sample_loss(model, batch).sum().backward()
        with pytest.raises(ModelError, match="was not collected"):
            per_sample_loss(model, batch)
        engine.clear_gradients()
        first, second = per_sample_loss(model, batch), per_sample_loss(model, batch)
        with pytest.raises(ModelError, match="a batch before the last one"):
            (first.sum() + second.sum()).backward()
        engine.clear_gradients()
        per_sample_loss(model, batch).sum().backward()
        assert relative_error(engine.collect_batch(), rows_of(model, ids, labels)[0]) < 1e-5


def test_position_table_shared_by_the_batch_is_an_error():
    model = small_model("gpt2")
    ids, labels = ragged_batch(LENGTHS)
    with pytest.raises(
        ModelError, match=r"transformer\.wpe works .* the batch shares.*samples cannot be separated"
    ):
        rows_of(model, ids, labels, proj_layers="wpe")


def test_evaluation_between_batches_does_not_change_rows():
    model = small_model("gpt2")
    ids, labels = ragged_batch(LENGTHS)
    want, _ = rows_of(model, ids, labels)
    with GradProjLoraEngine(model, **ENGINE) as engine:
        engine.detach_for_evaluation()
        model(input_ids=ids[:2]).logits.sum().backward()
        engine.reattach_after_evaluation()
        per_sample_loss(model, {"input_ids": ids, "labels": labels}).sum().backward()
        with torch.no_grad():
            model(input_ids=ids[:1])
        assert torch.equal(engine.collect_batch(), want)


@pytest.mark.parametrize("interval", [1, 3])
def test_original_interface_writes_every_row_once(tmp_path, interval):
    model = small_model("gpt2")
    with GradProjLoraEngine(
        model, **ENGINE, proj_dir=tmp_path, proj_save_interval=interval
    ) as engine:
        want = []
        for step in range(4):
            ids, labels = ragged_batch(LENGTHS, seed=step)
            engine.attach_train_batch(ids, labels, step, batch_idx=[4 * step + n for n in range(4)])
            per_sample_loss(model, {"input_ids": ids, "labels": labels}).sum().backward()
            engine.prepare_gradients()
            want.append(engine.aggregate_and_log())
            engine.clear_gradients()
    files = [torch.load(f, weights_only=True) for f in sorted(tmp_path.glob("proj_iter_*.pt"))]
    assert [f["iter"] for f in files] == list(range(1, 1 + (4 if interval == 1 else 2)))
    assert torch.equal(torch.cat([f["proj"] for f in files]), torch.cat(want))
    assert torch.cat([f["batch_idx"] for f in files]).tolist() == list(range(16))


def test_second_run_continues_numbering_and_replaces_no_file(tmp_path):
    model = small_model("gpt2")
    ids, labels = ragged_batch(LENGTHS)
    for _ in range(2):
        with GradProjLoraEngine(model, **ENGINE, proj_dir=tmp_path) as engine:
            per_sample_loss(model, {"input_ids": ids, "labels": labels}).sum().backward()
            engine.collect_batch(batch_indices=[1, 2, 3, 4])
    assert [p.name for p in sorted(tmp_path.iterdir())] == [
        "proj_iter_000001.pt",
        "proj_iter_000002.pt",
    ]


@pytest.mark.parametrize("dtype", ["int8", "float99"])
def test_wrong_row_dtype_is_rejected(dtype):
    with pytest.raises(ConfigError, match=f"--proj_dtype is '{dtype}'"):
        GradProjLoraEngine(small_model("gpt2"), proj_dtype=dtype)
