"""``--compile``: equal rows up to rounding, a restored model, clear errors without a compiler."""

import importlib
import os
import shutil
import subprocess
import sys

import google_crc32c
import pytest
import torch
from helpers.corpora import make_corpus, mixed_documents
from helpers.jobs import ENVIRONMENT, flags
from helpers.models import make_model, ragged_batch, small_model
from torch import nn

from gradproj.engine import compile as compile_module
from gradproj.engine import warm_up
from gradproj.engine.compile import (
    check_compiler,
    compiler_errors_explained,
    nothing_compiled,
    remove_torn_libraries,
)
from gradproj.engine.engine import GradProjLoraEngine
from gradproj.engine.loss import per_sample_loss
from gradproj.engine.warm_up import compile_now
from gradproj.errors import ConfigError, ModelError
from gradproj.files import try_lock


def why_not() -> str:
    try:
        check_compiler("cpu")
    except ConfigError as error:
        return str(error)
    return ""


needs_compiler = pytest.mark.skipif(bool(why_not()), reason=why_not() or "a compiler is there")

SETTINGS = {
    "proj_rank_total": 16,
    "proj_rank_min": 2,
    "freeze_weights": True,
    "token_covariances": True,
}


def rows_of(model, batches, **changes):
    """Rows of every batch, and the covariances of all of them."""
    with GradProjLoraEngine(model, **SETTINGS, **changes) as engine:
        rows = []
        for ids, labels in batches:
            engine.set_token_mask(labels != -100)
            per_sample_loss(model, {"input_ids": ids, "labels": labels}).sum().backward()
            rows.append(engine.collect_batch())
        return torch.cat(rows), engine.take_token_covariances()


def relative_errors(got, want):
    return ((got - want).norm(dim=-1) / want.norm(dim=-1)).max().item()


def test_mask_that_waits_for_the_first_batch_has_no_part_in_the_check():
    engine = GradProjLoraEngine(small_model("llama"), **SETTINGS, compiled=True)
    mask = torch.ones(3, 5)
    engine.set_token_mask(mask)
    engine.attach()
    assert engine.unchecked == ""
    assert engine.only_alone == ""
    assert engine._capture.token_mask is mask
    engine.detach()


@needs_compiler
def test_compiled_blocks_give_equal_rows_for_all_lengths_and_restore_the_model():
    torch.compiler.reset()
    model = small_model("olmo")  # changes outputs of target layers in place
    q_proj = model.model.layers[0].self_attn.q_proj
    model.model.layers[1].self_attn.q_proj.weight = q_proj.weight  # a layer of two modules
    batches = [ragged_batch(lengths) for lengths in ([40, 30], [23, 22, 11], [50, 40, 30, 20])]
    want, want_sums = rows_of(model, batches)
    names, weights = list(model.state_dict()), [w.clone() for w in model.parameters()]
    torch._dynamo.utils.counters.clear()
    with GradProjLoraEngine(model, **SETTINGS, compiled=True) as engine:
        per_sample_loss(model, batches[0][0]).sum().backward()  # without a token mask
        engine.collect_batch()
    got, sums = rows_of(model, batches, compiled=True)
    assert relative_errors(got, want) < 1e-5
    assert relative_errors(sums.a[None], want_sums.a[None]) < 1e-5
    assert relative_errors(sums.s[None], want_sums.s[None]) < 1e-5
    assert sums.n_tokens == want_sums.n_tokens
    # Two blocks, three lengths and numbers of samples, with a mask and without: one graph below
    # which nothing has a gradient, one for the rest.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]
    assert list(model.state_dict()) == names
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), weights, strict=True))
    assert not any("forward" in vars(part) or part._forward_hooks for part in model.modules())
    # Compiled graphs are reused, with checkpointing too.
    again, _ = rows_of(model, batches, compiled=True, gradient_checkpointing=True)
    assert relative_errors(again, want) < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "gemma2", "zamba"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_capture_gives_the_rows_of_hooks(family, dtype, monkeypatch):
    """The very hooks that are compiled, without the compiler."""
    monkeypatch.setattr("gradproj.engine.frozen_model.compiled_block", lambda block: block.forward)
    model, batches = (
        small_model(family).to(dtype),
        [ragged_batch(lengths) for lengths in ([40, 30], [17])],
    )
    changes = {"include_embeddings": True} if family != "opt" else {}
    want, want_sums = rows_of(model, batches, **changes)
    got, sums = rows_of(model, batches, compiled=True, **changes)
    assert relative_errors(got, want) < 1e-6
    assert relative_errors(sums.a[None], want_sums.a[None]) < 1e-6
    assert sums.n_tokens == want_sums.n_tokens


@pytest.fixture
def uncompiled(monkeypatch):
    """A model whose tapped blocks run as they are."""
    monkeypatch.setattr("gradproj.engine.frozen_model.compiled_block", lambda block: block.forward)
    return small_model("llama")


def test_uncollected_batch_is_an_error_and_can_be_dropped(uncompiled):
    ids, _ = ragged_batch([9, 9])
    with GradProjLoraEngine(uncompiled, **SETTINGS, compiled=True) as engine:
        with pytest.raises(ModelError, match="no backward pass"):
            engine.collect_batch()
        per_sample_loss(uncompiled, ids).sum().backward()
        with pytest.raises(ModelError, match="was not collected"):
            per_sample_loss(uncompiled, ids)
        engine.clear_gradients()
        per_sample_loss(uncompiled, ids).sum().backward()
        assert engine.collect_batch().shape == (2, engine.total_proj_dim)


def test_inseparable_samples_are_an_error(uncompiled):
    ids, _ = ragged_batch([9, 9])
    with GradProjLoraEngine(uncompiled, **SETTINGS, compiled=True) as engine:
        per_sample_loss(uncompiled, ids)
        tap = engine._capture.hooks[0]
        with pytest.raises(ModelError, match="cannot be separated"):
            tap(nn.Identity(), (torch.ones(7, tap._p_i.shape[1]),), {}, torch.ones(7, 3))
        engine.clear_gradients()
        with pytest.raises(ModelError, match="got neither"):
            tap(nn.Identity(), (torch.ones(2, 9, tap._p_i.shape[1]),), {}, torch.ones(2, 9, 3))


def test_compile_now_compiles_both_shapes_and_keeps_no_sums(uncompiled, monkeypatch):
    shapes = []

    def loss(model, ids):
        shapes.append(tuple(ids.shape))
        return per_sample_loss(model, ids)

    monkeypatch.setattr(warm_up, "per_sample_loss", loss)
    with GradProjLoraEngine(uncompiled, **SETTINGS, compiled=True) as engine:
        assert compile_now(uncompiled, engine, 24) > 0
        assert shapes == [(2, 24), (1, 24)]
        assert engine.take_token_covariances().n_tokens == 0


def test_compiled_engine_requires_frozen_weights():
    with pytest.raises(ConfigError, match="freeze_weights=True"):
        GradProjLoraEngine(small_model("gpt2"), compiled=True)


def test_compiling_a_model_without_marked_blocks_is_rejected():
    model = nn.Sequential(nn.Linear(8, 8))
    engine = GradProjLoraEngine(model, "0", 4, 2, freeze_weights=True, compiled=True)
    with pytest.raises(ModelError, match="--compile: transformers marks no block of Sequential"):
        engine.attach()
    assert "forward" not in vars(model[0])


def test_compiler_failure_is_one_line_with_the_way_out():
    def broken(graph, inputs):
        raise ValueError("first line\nsecond line")

    function = torch.compile(lambda x: x + 1, backend=broken)
    with pytest.raises(ModelError) as caught, compiler_errors_explained():
        function(torch.ones(3))
    assert "\n" not in str(caught.value)
    assert "--compile: torch's compiler failed" in str(caught.value)
    assert "ValueError: first line" in str(caught.value)
    assert "leave --compile out" in str(caught.value)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of torch's compiler with an intact library."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    (tmp_path / "ab").mkdir()
    (tmp_path / "locks").mkdir()
    shutil.copy(google_crc32c._crc32c.__file__, tmp_path / "ab" / "whole.main.so")
    return tmp_path


def test_libraries_of_a_killed_compiler_are_deleted_and_others_kept(cache):
    whole = (cache / "ab" / "whole.main.so").read_bytes()
    torn = [cache / "ab" / f"{name}.so" for name in ("empty", "header", "half", "locked.main")]
    for path, size in zip(torn, (0, 40, len(whole) // 2, 40), strict=True):
        path.write_bytes(whole[:size])
    (cache / "ab" / "zeros.so").write_bytes(bytes(4096))
    with (cache / "locks" / "locked.lock").open("w") as lock:
        assert try_lock(lock)
        removed = {path.name for path in remove_torn_libraries()}
        assert removed == {"empty.so", "header.so", "half.so", "zeros.so"}
    assert {path.name for path in (cache / "ab").iterdir()} == {"whole.main.so", "locked.main.so"}
    assert [path.name for path in remove_torn_libraries()] == ["locked.main.so"]


def test_other_damage_of_the_cache_names_what_to_delete(cache):
    importlib.import_module("torch._inductor.runtime.cache_dir_utils")
    for error in (
        ImportError(f"{cache}/ab/x.so: invalid ELF header"),
        RuntimeError(f"Failed to import {cache}/ab/x.py\nSyntaxError: unterminated string"),
    ):
        expected = pytest.raises(ModelError, match=f"start again: rm -r {cache}$")
        with expected as caught, compiler_errors_explained():
            raise error
        assert "\n" not in str(caught.value)
    with pytest.raises(ImportError), compiler_errors_explained():
        raise ImportError("No module named 'peft'")


@pytest.mark.parametrize("left", [0, 12])
def test_module_of_the_cache_that_was_cut_names_what_to_delete(left, cache):
    codecache = importlib.import_module("torch._inductor.codecache")
    dynamo = importlib.import_module("torch._dynamo.exc")
    path = cache / "ab" / "cabc.py"
    path.write_text("import torch\n\ndef call(args):\n    return args\n"[:left])

    def backend(graph, inputs):
        return codecache.PyCodeCache.load_by_key_path(f"cut{left}", str(path)).call

    function = torch.compile(lambda x: x * 2 + left, backend=backend)
    expected = pytest.raises(ModelError, match=f"start again: rm -r {cache}$")
    with expected as caught, compiler_errors_explained():
        function(torch.ones(3))
    assert "has no attribute 'call'" in str(caught.value)
    assert isinstance(caught.value.__cause__, dynamo.TorchDynamoException)


def test_other_failures_pass_through_unchanged():
    with pytest.raises(RuntimeError, match="mine"), compiler_errors_explained():
        raise RuntimeError("mine")
    with pytest.raises(torch.OutOfMemoryError), compiler_errors_explained():
        raise torch.OutOfMemoryError("full")


def test_compiler_check_names_everything_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(compile_module, "_has_cpp_compiler", lambda: False)
    monkeypatch.setattr(compile_module.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(
        ConfigError, match=r"a C\+\+ compiler .* and Python's headers .*leave --compile out"
    ):
        check_compiler("cpu")


def test_plan_exits_with_2_without_a_compiler(tmp_path):
    make_corpus(tmp_path / "tars", mixed_documents(4))
    settings = {
        "shards": tmp_path / "tars",
        "output_dir": tmp_path / "out",
        "model": make_model(tmp_path / "model"),
    }
    done = subprocess.run(
        [sys.executable, "-m", "gradproj", "plan", *flags(**settings, compile=True, device="cpu")],
        env={**ENVIRONMENT, "CXX": "/nowhere/c++"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("gradproj: --compile: this machine lacks a C++ compiler")
    assert not os.path.exists(tmp_path / "out")


def test_compiled_blocks_run_uncompiled_inside_nothing_compiled():
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    function = torch.compile(lambda x: x + 1, backend=backend)
    with nothing_compiled():
        assert function(torch.ones(2)).tolist() == [2, 2]
    assert seen == []
    assert function(torch.ones(2)).tolist() == [2, 2]
    assert len(seen) == 1
