"""Rows of every causal family of transformers, compared with plain autograd. Measures no time.

    python tests/bench/bench_architectures.py [--families llama,falcon] [--write FILE]

Each model type of ``AutoModelForCausalLM`` (``--families`` takes those of
``AutoModelForMultimodalLM`` as well) is built tiny (random weights, two layers or one of each
kind that its config lists) and saved as a checkpoint. ``gradproj run`` with the default
``--proj_layers`` computes rows of documents of 2 to 24 tokens: one document a batch, and four of
mixed lengths. The expected rows are ``P_o G P_i^T`` with the store's matrices and ``G`` from
``weight.grad``: one document at a time, in float64, before gradproj is imported. The outcomes:

exact      the largest error of a layer's slice of a row, relative to the slice (to a hundredth of
           the row where the slice is smaller), the layers taken of the blocks', and the rest
refused    the job's message; then the same with the ``--proj_layers`` that the message advises, or
           with the first of attn, mlp and mixer that the job accepts
wrong      the error, or the end of a traceback; the exit code is then 1
not built  transformers or this script cannot make the model or its gradients

Each family has a process of its own with limits of memory and time, and takes some seconds.
"""

import argparse
import contextlib
import dataclasses
import importlib
import io
import json
import multiprocessing
import os
import re
import resource
import sys
import tarfile
import tempfile
import textwrap
import time
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
)

OUTCOMES = ("wrong", "refused", "not built", "exact")
LENGTHS = (24, 23, 17, 13, 11, 7, 5, 4, 4, 4, 3, 2)
"""Tokens of the documents. One batch of four holds four tokens: equal axes must not be confused."""
BATCH_SIZES = (1, 4)
VOCABULARY = 320
SPECIAL_IDS = 20
"""Ids below it are the configs' special tokens; no document has them."""
MAX_PARAMETERS = 4_000_000
MAX_LAYERS = 6
MAX_NOTE = 300
TOLERANCE = 1e-4
FLOAT32_FACTOR = 10
"""Also exact: within this many times the error of plain autograd in float32."""

SIZES = {
    r"(\w+_)?vocab_size(_per_layer_input)?": VOCABULARY,
    r"((num|n|decoder|encoder)_)?(hidden_|decoder_|encoder_)?layers?|depth": 2,
    r"(.*_)?(num|n)_(key_value|kv)_heads|num_attention_groups": 2,
    r"(.*_)?(head_(dim|size)|d_head)|d_kv|kv_channels|qk_\w+_dim|rotary_dim": 8,
    r"hidden_size_per_layer_input": 8,
    r"(.*_)?((num|n)_)?(attention_|key_|value_)?heads?": 4,
    r"hidden_size|d_model|n_embd|((\w+_)?(proj|embedding|model|emb|embed)_)(dim|size)|dim": 32,
    r"(.*_)?(intermediate_size|ffn_dim|ffn_hidden_size|n_inner|d_ff|(intermediate|mlp)_dim)": 48,
    r"(.*_)?(num|n)_(local_|routed_)?experts": 4,
    r"((moe|router)_)?(num_experts_per_tok(en)?|top_?k|k)|n_groups?|num_expert_group": 2,
    r"topk_group": 1,
    r"max_(position_embeddings|seq(uence)?_len(gth)?)|n_positions|model_max_length": 64,
    r".*(window(_size)?|chunk_size|block_size)": 8,
    r"index_topk": 2,
    r".*lora_rank|.*state_size|.*d_state|time_step_rank": 8,
    r"image_size": 16,
    r"patch_size": 8,
}
"""Whole name of a config's field -> its largest value in the tiny model."""

EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1]},
    "blt.*": {
        "encoder_hash_byte_group_vocab": 100, "vocab_size": VOCABULARY, "hidden_size_global": 32,
    },
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8}},
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy"},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note(_text)?": {
        "num_key_value_heads": 4, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4,
        "swa_head_dim": 8, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8,
        "swa_q_lora_rank": 8, "swa_kv_lora_rank": 8,
    },
    "dots3_note_vision_encoder": {"adapter_in_dim": 32, "adapter_out_dim": 32},
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32},
    "emu3": {"vocabulary_map": {"<image>": 9}},
    "emu3_vqgan": {"attn_resolutions": (), "base_channels": 32, "num_attention_heads": 1},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8},
    "gemma": {"num_key_value_heads": 2},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4(_unified)?_text": {"global_head_dim": 16},
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["mamba", "attention"]},
    "glm4v_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    },
    "glm4v_vision": {"out_hidden_size": 32},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_(dense|moe)|ministral": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"qk_head_dim": 16},
    "mamba2": {"num_heads": 8},
    "nemotron": {"num_key_value_heads": 2},
    "olmoe?": {"clip_qkv": 1.0},
    "phi4_multimodal_audio": {"nemo_conv_channels": 16},
    "qwen2(_5)?_vl_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    },
    "qwen4_exp(_text)?": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8,
        "indexer_budget": 8, "indexer_compress_ratio": 2,
    },
    "reformer": {
        "attn_layers": ["local", "lsh"], "axial_pos_shape": (8, 8), "axial_pos_embds_dim": (8, 24),
        "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8,
    },
    "xmod": {"default_language": "en_XX"},
    # The second hybrid layer shares the weights of the first.
    "zamba2?": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2},
}  # fmt: skip
"""Model type of a config, whole -> fields that the table above cannot know."""


@dataclasses.dataclass
class Result:
    """Outcome of one family, with a reason or the place of the error."""

    outcome: str
    note: str = ""
    error: float | None = None
    layers: str = ""
    """Of the blocks: how many layers are taken, and what is left out."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", help="comma-separated model types (default: all)")
    parser.add_argument("--write", type=Path, help="write the result to this file as well")
    parser.add_argument("--processes", type=int, default=2, help="families at once")
    parser.add_argument("--seconds", type=float, default=240, help="limit of a family's time")
    parser.add_argument("--gigabytes", type=float, default=6, help="limit of a family's memory")
    args = parser.parse_args()
    families = args.families.split(",") if args.families else causal_families()
    torch.set_num_threads(1)
    results = sweep(families, args.processes, args.seconds, args.gigabytes)
    text = "\n".join(report(results))
    print(text)
    if args.write:
        args.write.write_text(text + "\n")
    return int(any(result.outcome == "wrong" for result in results.values()))


def causal_families() -> list[str]:
    """Return the model types that ``AutoModelForCausalLM`` builds."""
    causal = set(AutoModelForCausalLM._model_mapping.keys())
    return sorted(name for name in CONFIG_MAPPING if CONFIG_MAPPING[name] in causal)


# --- one process a family ---


def sweep(
    families: Sequence[str], processes: int, seconds: float, gigabytes: float
) -> dict[str, Result]:
    """Examine the families, some at once, and report progress on stderr."""
    # A forked process has imported what all families need, and not gradproj.
    for module in ("transformers.models.llama.modeling_llama", "tokenizers", "zarr", "webdataset"):
        importlib.import_module(module)
    fork = multiprocessing.get_context("fork")
    waiting, results = list(reversed(families)), {}
    running: dict[str, tuple[Any, Any, float]] = {}
    while waiting or running:
        while waiting and len(running) < processes:
            name = waiting.pop()
            receiver, sender = fork.Pipe(duplex=False)
            process = fork.Process(target=examine_in_limits, args=(name, gigabytes, sender))
            process.start()
            sender.close()
            running[name] = process, receiver, time.monotonic() + seconds
        connection.wait([receiver for _, receiver, _ in running.values()], timeout=1)
        for name, (process, receiver, deadline) in list(running.items()):
            late = time.monotonic() > deadline
            if not receiver.poll() and not late:
                continue
            try:
                result = receiver.recv() if receiver.poll() else None
            except EOFError:
                result = None
            process.kill()
            process.join()
            reason = f"no end after {seconds:.0f} s" if late else f"exit {process.exitcode}"
            results[name] = result or Result("not built", reason)
            del running[name]
            print(f"{len(results)}/{len(families)} {name}: {results[name]}", file=sys.stderr)
    return {name: results[name] for name in families}


def examine_in_limits(family: str, gigabytes: float, sender: Any) -> None:
    limit = int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        sender.send(examine(family, Path(folder)))


def examine(family: str, folder: Path) -> Result:
    """Compare the job's rows of one family with autograd's; if refused, of other layers."""
    documents = make_documents(folder / "tars")
    try:
        save_model(family, folder / "model")
        gradients = expected_gradients(folder / "model", documents)
    except Exception as error:
        # Without a gradient to compare with, refusing the model is all the job can do.
        message = refusal(folder)
        return Result("refused", message) if message else Result("not built", last_line(error))
    result = compare(folder, documents, gradients, "")
    if result.outcome != "refused":
        return result
    for first in ("", "attn", "mlp", "mixer"):
        proj_layers, second = first, result
        for _ in range(3):
            if proj_layers:
                second = compare(folder, documents, gradients, proj_layers)
            advised = advice(second.note, proj_layers) if second.outcome == "refused" else ""
            if not advised:
                break
            proj_layers = advised
        if second.outcome == "refused":
            continue
        note = f"with --proj_layers {proj_layers} {second.outcome}"
        if second.outcome == "exact":
            return Result("refused", f"{note}. By default: {result.note}", second.error)
        return Result("wrong", f"{note}: {second.note}", second.error)
    return result


def refusal(folder: Path) -> str:
    """Return the job's message on a saved config's model; empty if it has no objection."""
    if not (folder / "model").exists():
        return ""
    try:
        return run_job(folder, folder / "refused", 1, "", init="random")
    except BaseException:
        return ""


def advice(message: str, proj_layers: str) -> str:
    """Return the ``--proj_layers`` that a message advises; empty without advice."""
    if given := re.search(r"Give (?:for example )?--proj_layers (\S+)", message):
        return given[1]
    if added := re.search(r"add (-\S+) to --proj_layers", message):
        return f"{proj_layers or 'all'},{added[1]}"
    return ""


def compare(
    folder: Path, documents: Sequence[Tensor], gradients: dict[str, Tensor], proj_layers: str
) -> Result:
    """Run a job for each batch size and compare its rows. Empty ``proj_layers``: the default."""
    worst = 0.0
    for batch_size in BATCH_SIZES:
        output = folder / f"{proj_layers}-{batch_size}"
        try:
            message = run_job(folder, output, batch_size, proj_layers)
        except BaseException as error:
            return Result("wrong", f"batch size {batch_size}: {last_line(error)}")
        if message:
            return Result("refused", message)
        error, where = largest_error(output, gradients)
        worst = max(worst, error)
        if not error <= TOLERANCE:
            single = mean_loss_gradients(folder / "model", documents, torch.float32)
            rounding, _ = largest_error(output, gradients, instead=single)
            if not error <= FLOAT32_FACTOR * rounding:
                note = f"batch size {batch_size}, {where}; float32 autograd {rounding:.0e}"
                return Result("wrong", note, error)
    return Result("exact", "", worst, selection(output))


def selection(output: Path) -> str:
    """Return how many layers of the blocks a store has, and what its job left out, with names."""
    from gradproj import ProjectionStore

    taken = ProjectionStore(output).attributes["selection"]
    left = ("not_selected", "not_reached", "not_projectable")
    names = [f"{kind.replace('_', ' ')}: {', '.join(x['name'] for x in taken[kind])}"
             for kind in left if taken[kind]]  # fmt: skip
    return f"{taken['n_selected']} of {taken['n_layers']} | {'; '.join(names)}"


def last_line(error: BaseException) -> str:
    lines = "".join(traceback.format_exception_only(error)).strip().splitlines()
    return lines[0] if lines else repr(error)


# --- the model ---


def save_model(family: str, folder: Path) -> None:
    """Save a tiny checkpoint of random weights, and a tokenizer that nothing is tokenized with."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    config = shrunk(CONFIG_MAPPING[family]())
    with contextlib.suppress(NotImplementedError, RuntimeError), torch.device("meta"):
        n_parameters = sum(p.numel() for p in auto_class(config).from_config(config).parameters())
        if n_parameters > MAX_PARAMETERS:
            raise ValueError(f"{n_parameters:,} parameters are not tiny")
    save_tokenizer(folder)
    config.save_pretrained(folder)
    torch.manual_seed(0)
    model = auto_class(config).from_config(config)
    if type(model.config) not in auto_class(model.config)._model_mapping:  # of its text alone
        model = AutoModelForMultimodalLM.from_config(config)
    randomize(model)
    model.save_pretrained(folder)


def auto_class(config: Any) -> Any:
    is_causal = type(config) in AutoModelForCausalLM._model_mapping
    return AutoModelForCausalLM if is_causal else AutoModelForMultimodalLM


def shrunk(config: Any) -> Any:
    """Return a config of the same class with small sizes and one layer of each kind."""
    # Not getattr, which refuses a field that differs by layer.
    stored, names = vars(config), [field.name for field in dataclasses.fields(config)]
    values = {name: stored.get(config.attribute_map.get(name, name)) for name in names}
    n_layers = getattr(config, "num_hidden_layers", None)
    lists = {k: v for k, v in values.items() if isinstance(v, list | tuple) and len(v) == n_layers}
    kinds = list(zip(*(map(repr, v) for v in lists.values()), strict=True))
    layers = [i for i, kind in enumerate(kinds) if kinds.index(kind) == i][:MAX_LAYERS]
    layers += [i for i in range(n_layers or 0) if i not in layers][: max(0, 2 - len(layers))]
    changes: dict[str, Any] = {}
    special = 0
    for name, value in values.items():
        if isinstance(value, PreTrainedConfig):
            changes[name] = shrunk(value)
        elif name in lists:
            changes[name] = [small(name, value[i]) for i in sorted(layers)]
        elif name == "is_decoder":
            changes[name] = True
        elif isinstance(value, int) and re.fullmatch(r".*_token_(id|index)", name):
            special += 1
            changes[name] = min(value, special)
        elif small(name, value) != value:
            changes[name] = small(name, value)
    if lists:
        changes["num_hidden_layers"] = len(layers)
    if "kv_lora_rank" in values:  # latent attention: every head has a key of its own
        changes["num_key_value_heads"] = changes.get("num_attention_heads")
    for pattern, exceptions in EXCEPTIONS.items():
        if re.fullmatch(pattern, config.model_type):
            changes |= exceptions
    return type(config)(**changes)


def small(name: str, value: Any) -> Any:
    """Return a field's value, at most that of ``SIZES``."""
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    limits = [size for pattern, size in SIZES.items() if re.fullmatch(pattern, name)]
    return min(value, limits[0]) if limits else value


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Give every matrix entries that keep a vector's length: no layer is without a gradient."""
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and not name.endswith("A_log"):
            parameter.normal_(0, parameter.shape[-1] ** -0.5)


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models

    vocabulary = {f"t{i}": i for i in range(VOCABULARY - 20)}  # classes add tokens of their own
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t3"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


# --- documents, job, expected rows ---


def make_documents(folder: Path) -> list[Tensor]:
    """Write a tar of documents of token ids, and return their tokens."""
    generator = np.random.default_rng(0)
    documents = [generator.integers(SPECIAL_IDS, VOCABULARY, length) for length in LENGTHS]
    folder.mkdir()
    with tarfile.open(folder / "0.tar", "w") as tar:
        for i, ids in enumerate(documents):
            data = json.dumps({"input_ids": ids.tolist()}).encode()
            member = tarfile.TarInfo(f"{i:04d}.json")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return [torch.from_numpy(ids) for ids in documents]


def run_job(folder: Path, output: Path, batch_size: int, proj_layers: str, init: str = "") -> str:
    """Run the job in this process; return its error message, which is empty if it succeeded."""
    from gradproj.run import main as run

    flags = {
        "shards": folder / "tars",
        "model": folder / "model",
        "output_dir": output,
        "device": "cpu",
        "batch_size": batch_size,
        "encoding": "dense",
        "basis": "random",
        "loss_reduction": "mean",
        "proj_dtype": "float32",
        "proj_rank_total": 64,
        "threads": 1,
        **({"proj_layers": proj_layers} if proj_layers else {}),
        **({"init": init} if init else {}),
    }
    screen = io.StringIO()
    with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
        code = run([word for name, value in flags.items() for word in (f"--{name}", str(value))])
    if code == 0:
        return ""
    _, found, message = screen.getvalue().rpartition("gradproj: ")
    if not found or code != 2:
        raise RuntimeError(f"exit {code}: {screen.getvalue()[-400:]}")
    return " ".join(message.split())


def expected_gradients(folder: Path, documents: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return ``mean_loss_gradients`` in float64, or in float32 of a model that mixes the two."""
    try:
        return mean_loss_gradients(folder, documents, torch.float64)
    except RuntimeError:
        return mean_loss_gradients(folder, documents, torch.float32)


def mean_loss_gradients(
    folder: Path, documents: Sequence[Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return each weight's gradients of the documents' mean losses, ``(N, *shape)``."""
    config = AutoConfig.from_pretrained(folder)
    model = auto_class(config).from_pretrained(folder, dtype=dtype).eval()
    if dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # grouped products refuse float64
    weights = dict(model.named_parameters(remove_duplicate=False))
    found: dict[str, list[Tensor]] = {name: [] for name in weights}
    for ids in documents:
        model.zero_grad()
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        F.cross_entropy(logits[:-1], ids[1:]).backward()
        for name, weight in weights.items():
            found[name].append(torch.zeros_like(weight) if weight.grad is None else weight.grad)
    return {name: torch.stack(each).double() for name, each in found.items()}


def largest_error(
    output: Path, gradients: dict[str, Tensor], instead: dict[str, Tensor] | None = None
) -> tuple[float, str]:
    """Return the largest error of a slice and where it is.

    ``instead``: gradients whose projections take the place of the store's rows.
    """
    from gradproj import ProjectionStore

    store = ProjectionStore(output)
    want = projected(store, gradients)
    rows = torch.from_numpy(store.rows(range(len(LENGTHS)))).double()
    got = rows if instead is None else projected(store, instead)
    floor = 1e-2 * want.norm(dim=1)
    worst, where = 0.0, "nowhere"
    for layer in store.layers:
        columns = slice(layer.slice_start, layer.slice_end)
        scale = torch.maximum(want[:, columns].norm(dim=1), floor)
        errors = (got - want)[:, columns].norm(dim=1) / scale
        # A NaN is the largest error of all.
        errors = errors.nan_to_num(nan=float("inf"))
        if errors.max() > worst:
            worst = errors.max().item()
            where = f"{layer.name} of a document of {LENGTHS[int(errors.argmax())]} tokens"
    return worst, where


def projected(store: Any, gradients: dict[str, Tensor]) -> Tensor:
    """Return ``P_o G P_i^T`` of all layers as rows, ``(N, D)`` float64."""
    matrices, parts = store.projection_matrices, []
    for layer in store.layers:
        p_i, p_o = (torch.from_numpy(p).double() for p in matrices[layer.name])
        if layer.type == "Experts":
            seed = store.attributes["projection"]["seed"]
            gradient = signed_sum(gradients[layer.name], layer, seed)
        else:
            gradient = gradients[f"{layer.name}.weight"]
        if layer.type == "Conv1D":
            gradient = gradient.mT
        parts.append((p_o @ gradient @ p_i.T).flatten(1))
    return torch.cat(parts, dim=1)


def signed_sum(gradient: Tensor, layer: Any, seed: int) -> Tensor:
    """Return ``sum_e G_e D_e`` ``(N, n_o, n_i)`` of all experts' gradients."""
    from gradproj.engine.projection import draw_signs

    if gradient.shape[2:] != (layer.n_o, layer.n_i):
        gradient = gradient.mT
    signs = draw_signs(seed, layer.name, gradient.shape[1], layer.n_i).double()
    return (gradient * signs.unsqueeze(1)).sum(dim=1)


# --- the result ---


def report(results: dict[str, Result]) -> Iterator[str]:
    """Yield the lines of the result: a section for each outcome."""
    counts = ", ".join(
        f"{sum(result.outcome == outcome for result in results.values())} {outcome}"
        for outcome in OUTCOMES
    )
    yield f"# Architectures: {counts}"
    yield ""
    yield (
        f"`bench_architectures.py`, torch {torch.__version__}, transformers "
        f"{transformers.__version__}."
    )
    for outcome in OUTCOMES:
        chosen = {name: each for name, each in results.items() if each.outcome == outcome}
        if not chosen:
            continue
        yield from ("", f"## {outcome.capitalize()}", "")
        if outcome == "exact":
            yield from ("| family | error | layers | left out |", "| --- | --- | --- | --- |")
            yield from (f"| {n} | {each.error:.0e} | {each.layers} |" for n, each in chosen.items())
            continue
        for name, each in chosen.items():
            error = "" if each.error is None else f"{each.error:.1e}, "
            note = textwrap.shorten(each.note, MAX_NOTE, placeholder=" ...")
            yield from textwrap.wrap(
                f"- {name}: {error}{note}", 100, subsequent_indent="  ",
                break_on_hyphens=False, break_long_words=False,
            )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
