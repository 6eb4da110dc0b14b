"""Quantized copies of small checkpoints, made by the libraries or by hand."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

PACKED = {
    "nf4": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "nf4 twice": dict(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "fp4": dict(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "int8": dict(load_in_8bit=True),
}  # fmt: skip
"""Kind -> arguments of bitsandbytes' config."""
TORCHAO = ("Int8WeightOnly", "Float8WeightOnly", "Int8DynamicActivationInt8Weight")
SIZES = dict(hidden_size=64, intermediate_size=128, head_dim=16)
"""Of a Llama: bitsandbytes' blocks have 64 weights."""


def library_config(kind: str) -> Any:
    """Return transformers' config of a kind of ``PACKED`` or ``TORCHAO``."""
    if kind in PACKED:
        return BitsAndBytesConfig(**PACKED[kind])
    import torchao.quantization
    from transformers import TorchAoConfig

    # Version 1 of these is another tensor type, of older versions of torchao.
    return TorchAoConfig(getattr(torchao.quantization, f"{kind}Config")(version=2))


def quantize(source: Path, target: Path, kind: str, dtype: torch.dtype = torch.float32) -> Path:
    """Save a checkpoint as its library quantizes it, with its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=library_config(kind), dtype=dtype, device_map={"": "cpu"}
    )
    model.save_pretrained(target)
    _copy_tokenizer(source, target)
    return target


def _copy_tokenizer(source: Path, target: Path) -> None:
    for path in source.glob("tokenizer*"):
        shutil.copy(path, target / path.name)


def quantize_fp8(source: Path, target: Path, block: int = 32) -> dict[str, torch.Tensor]:
    """Save a checkpoint in DeepSeek's form of fp8; return the exact values of its weights."""
    tensors, exact = {}, {}
    for name, weight in load_file(source / "model.safetensors").items():
        tensors[name] = exact[name] = weight
        if weight.dim() == 2 and ".layers." in name:
            n_o, n_i = weight.shape
            blocks = weight.view(n_o // block, block, n_i // block, block)
            scale = blocks.abs().amax((1, 3), keepdim=True) / 448
            packed = (blocks / scale).to(torch.float8_e4m3fn)
            tensors[name] = packed.view(n_o, n_i)
            tensors[f"{name}_scale_inv"] = scale[:, 0, :, 0].contiguous()
            exact[name] = (packed.float() * scale).view(n_o, n_i)
    target.mkdir()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    with_settings(source, target, {"quant_method": "fp8", "weight_block_size": [block, block]})
    return exact


def with_settings(source: Path, target: Path, settings: dict[str, Any]) -> Path:
    """Save the source's config with a ``quantization_config``, and its tokenizer."""
    target.mkdir(exist_ok=True)
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    _copy_tokenizer(source, target)
    return target


_GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "model.layers": "blk",
}  # fmt: skip


def write_gguf(source: Path, path: Path, kind: str = "Q8_0") -> Path:
    """Save a Llama and its tokenizer as a GGUF file of a kind of numpy quantization."""
    import gguf

    config = json.loads((source / "config.json").read_text())
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    file = gguf.GGUFWriter(str(path), "llama")
    file.add_context_length(config["max_position_embeddings"])
    file.add_embedding_length(config["hidden_size"])
    file.add_block_count(config["num_hidden_layers"])
    file.add_feed_forward_length(config["intermediate_size"])
    file.add_head_count(heads["q_proj"])
    file.add_head_count_kv(heads["k_proj"])
    file.add_rope_dimension_count(config["head_dim"])
    file.add_key_length(config["head_dim"])
    file.add_value_length(config["head_dim"])
    file.add_layer_norm_rms_eps(config["rms_norm_eps"])
    file.add_vocab_size(config["vocab_size"])
    _add_tokenizer(file, AutoTokenizer.from_pretrained(source))
    form = getattr(gguf.GGMLQuantizationType, kind)
    for name, weight in load_file(source / "model.safetensors").items():
        for part, n_heads in heads.items():
            if part in name:  # llama.cpp's rotary positions are interleaved
                halves = weight.view(n_heads, 2, -1, weight.shape[-1])
                weight = halves.transpose(1, 2).reshape(weight.shape)
        for part, other in _GGUF_NAMES.items():
            name = name.replace(part, other)
        array = weight.numpy()
        if array.ndim == 2:
            file.add_tensor(name, gguf.quants.quantize(array, form), raw_dtype=form)
        else:
            file.add_tensor(name, array)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


def _add_tokenizer(file: Any, tokenizer: Any) -> None:
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("default")
    file.add_token_list(tokens)
    file.add_token_types([3 if token in ("<s>", "</s>") else 1 for token in tokens])
    file.add_token_merges([" ".join(merge) for merge in merges])
    file.add_bos_token_id(tokenizer.bos_token_id)
    file.add_eos_token_id(tokenizer.eos_token_id)
