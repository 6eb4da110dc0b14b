"""Small random models and tokenizers of every tested family."""

from pathlib import Path
from typing import Any

import torch
from helpers.corpora import words
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCAB = 101

_LLAMA_LIKE = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=VOCAB, max_position_embeddings=64, head_dim=8,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip

FAMILIES = {
    "gpt2": ("gpt2", dict(
        n_embd=32, n_layer=2, n_head=4, vocab_size=VOCAB, n_positions=64,
        bos_token_id=1, eos_token_id=1,
    )),
    "gpt_neox": ("gpt_neox", dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=VOCAB, max_position_embeddings=64, bos_token_id=1, eos_token_id=1,
    )),
    "llama": ("llama", _LLAMA_LIKE),
    "llama_tied": ("llama", {**_LLAMA_LIKE, "tie_word_embeddings": True, "attention_bias": True}),
    "qwen2": ("qwen2", _LLAMA_LIKE),
    "qwen3": ("qwen3", _LLAMA_LIKE),
    "opt": ("opt", dict(
        hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCAB,
        max_position_embeddings=64, word_embed_proj_dim=16, do_layer_norm_before=False,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )),
    "gemma2": ("gemma2", {
        **_LLAMA_LIKE, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0,
        "sliding_window": 8, "query_pre_attn_scalar": 8,
    }),
    "gemma3": ("gemma3_text", {**_LLAMA_LIKE, "sliding_window": 8, "query_pre_attn_scalar": 8}),
}  # fmt: skip
"""Family -> (model type, config): tied and untied heads, grouped queries, biases or none."""

_SIZES = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_attention_heads=4, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, max_position_embeddings=64,
)  # fmt: skip

UNUSUAL = {
    # The attention and MLP of one block are used by another, by names of their own.
    "zamba": ("zamba", dict(
        **_SIZES, num_hidden_layers=3, layers_block_type=["hybrid", "mamba", "hybrid"],
        n_mamba_heads=2, mamba_d_state=4, mamba_dt_rank=4, num_key_value_heads=4,
        attention_hidden_size=64,
    )),
    # Its linear layers are of a class of its own.
    "falcon": ("falcon", dict(
        **_SIZES, num_hidden_layers=2, alibi=False, new_decoder_architecture=True, num_kv_heads=2,
    )),
    # It clamps the outputs of three target layers in place.
    "olmo": ("olmo", dict(**_SIZES, num_hidden_layers=2, clip_qkv=0.5)),
    # Its logits are the head's output times a number.
    "cohere": ("cohere", dict(**_SIZES, num_hidden_layers=2, logit_scale=0.25)),
}  # fmt: skip
"""Like ``FAMILIES``: models whose layers are special in some way."""

_EXPERTS = dict(_LLAMA_LIKE, num_experts_per_tok=2, moe_intermediate_size=24)
_DEEPSEEK = dict(
    _EXPERTS, num_key_value_heads=4, head_dim=4, kv_lora_rank=8, qk_rope_head_dim=4,
    qk_nope_head_dim=4, v_head_dim=8, n_routed_experts=8, n_shared_experts=1, n_group=2,
    topk_group=1, first_k_dense_replace=1,
)  # fmt: skip

MIXTURES = {
    "mixtral": ("mixtral", dict(_EXPERTS, num_local_experts=4)),
    "qwen2_moe": ("qwen2_moe", dict(
        _EXPERTS, num_experts=4, shared_expert_intermediate_size=24, norm_topk_prob=True,
    )),
    "qwen3_moe": ("qwen3_moe", dict(_EXPERTS, num_experts=4)),
    "olmoe": ("olmoe", dict(_EXPERTS, num_experts=4, clip_qkv=0.5)),
    # Their weights are transposed, with biases; their gates' outputs alternate.
    "gpt_oss": ("gpt_oss", dict(_EXPERTS, num_local_experts=4, sliding_window=8)),
    "deepseek_v2": ("deepseek_v2", dict(
        _DEEPSEEK, q_lora_rank=None, topk_method="group_limited_greedy",
    )),
    "deepseek_v3": ("deepseek_v3", dict(_DEEPSEEK, q_lora_rank=8)),
    "glm4_moe": ("glm4_moe", dict(
        _EXPERTS, n_routed_experts=8, n_shared_experts=1, first_k_dense_replace=1, n_group=2,
        topk_group=1,
    )),
    "granitemoe": ("granitemoe", dict(_EXPERTS, num_local_experts=4)),
    # All experts get all tokens, those that are not chosen as zeros.
    "llama4": ("llama4_text", dict(
        _EXPERTS, num_local_experts=4, intermediate_size_mlp=40, attention_chunk_size=16,
        interleave_moe_layer_step=1,
    )),
}  # fmt: skip
"""Like ``FAMILIES``: mixtures of experts whose weights are fused in 3-D parameters."""

_MAMBA_2 = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=4, mamba_n_groups=1, mamba_expand=2)
_LINEAR_ATTENTION = dict(
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
    linear_value_head_dim=8,
)  # fmt: skip

HYBRIDS = {
    # A weight of theirs, dt_proj, is used without calling its layer.
    "mamba": ("mamba", dict(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4, time_step_rank=4,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )),
    "falcon_mamba": ("falcon_mamba", dict(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4, time_step_rank=4,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )),
    "jamba": ("jamba", dict(
        **_SIZES, num_hidden_layers=2, num_key_value_heads=2, attn_layer_period=2,
        attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, num_experts=4,
        mamba_d_state=4, mamba_dt_rank=4,
    )),
    "mamba2": ("mamba2", dict(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8,
        state_size=4, n_groups=1, chunk_size=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )),
    "zamba2": ("zamba2", dict(
        **_SIZES, num_hidden_layers=4, layers_block_type=["mamba", "hybrid"] * 2,
        num_key_value_heads=4, attention_head_dim=8, mamba_d_state=4, mamba_ngroups=1,
        n_mamba_heads=8, num_mem_blocks=1, chunk_size=8, adapter_rank=4,
    )),
    "bamba": ("bamba", dict(
        **_SIZES, **_MAMBA_2, num_hidden_layers=2, num_key_value_heads=2, attn_layer_indices=[1],
        mamba_chunk_size=8,
    )),
    "falcon_h1": ("falcon_h1", dict(
        **_SIZES, **_MAMBA_2, num_hidden_layers=2, num_key_value_heads=2, mamba_d_ssm=64,
        mamba_chunk_size=8, head_dim=8,
    )),
    "granitemoehybrid": ("granitemoehybrid", dict(
        **_SIZES, **_MAMBA_2, num_hidden_layers=2, num_key_value_heads=2, num_local_experts=4,
        num_experts_per_tok=2, shared_intermediate_size=24, layer_types=["mamba", "attention"],
        mamba_chunk_size=8,
    )),
    "nemotron_h": ("nemotron_h", dict(
        **_SIZES, num_key_value_heads=2, head_dim=8, hybrid_override_pattern="M-*E",
        num_hidden_layers=4, mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=4, n_groups=1,
        chunk_size=8, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=16,
    )),
    "recurrent_gemma": ("recurrent_gemma", dict(
        **_LLAMA_LIKE, lru_width=32, attention_window_size=8,
        block_types=["recurrent", "attention"],
    )),
    "qwen3_next": ("qwen3_next", dict(
        **_EXPERTS, **_LINEAR_ATTENTION, num_experts=4, shared_expert_intermediate_size=24,
        layer_types=["linear_attention", "full_attention"],
    )),
    "qwen3_5": ("qwen3_5_text", dict(
        **_LLAMA_LIKE, **_LINEAR_ATTENTION, layer_types=["linear_attention", "full_attention"],
    )),
    "lfm2": ("lfm2", dict(**_LLAMA_LIKE, layer_types=["conv", "full_attention"])),
    "rwkv": ("rwkv", dict(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, context_length=64,
        attention_hidden_size=32, intermediate_size=48, bos_token_id=1, eos_token_id=2,
    )),
    "xlstm": ("xlstm", dict(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_heads=4, chunk_size=8,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )),
}  # fmt: skip
"""Like ``FAMILIES``: state-space and other recurrent models, alone or beside attention."""

EVERY_FAMILY = FAMILIES | UNUSUAL | MIXTURES | HYBRIDS


def small_model(family: str, seed: int = 0, **changes) -> torch.nn.Module:
    """Return a float32 model of about 30,000 random weights, larger than their initial scale."""
    model_type, settings = EVERY_FAMILY[family]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**{**settings, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                continue  # decay rates: of larger ones nothing is left after a few tokens
            if parameter.dim() >= 2:
                parameter.mul_(5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


class Experts(nn.Module):
    """Every token visits both experts, ordered by which of them it prefers (transformers 4)."""

    def __init__(self, width):
        super().__init__()
        self.gate = nn.Linear(width, 2, bias=False)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(2))

    def forward(self, x):
        flat = x.view(-1, x.shape[-1])
        weights = self.gate(flat).softmax(-1)
        choices = weights.argsort(dim=-1, descending=True)
        total = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            _, token = torch.where(choices.T.eq(number))
            total = total.index_add(0, token, expert(flat[token]) * weights[token, number, None])
        return total.view_as(x)


def ragged_batch(
    lengths: list[int], seed: int = 1, pad: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return right-padded random ``(input_ids, labels)``; labels are -100 at padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((len(lengths), max(lengths)), pad)
    labels = torch.full_like(ids, -100)
    for n, length in enumerate(lengths):
        ids[n, :length] = torch.randint(3, VOCAB, (length,), generator=generator)
        labels[n, :length] = ids[n, :length]
    return ids, labels


def make_tokenizer(folder: Path, vocab_size: int = 300) -> PreTrainedTokenizerFast:
    """Save a byte-level BPE that adds no special tokens; ``<s>`` and ``</s>`` exist."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([words(2000, 1)], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    return fast


def make_model(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """Save a small random checkpoint with its tokenizer."""
    tokenizer = make_tokenizer(folder)
    model_type, settings = EVERY_FAMILY[family]
    settings = {
        **settings,
        "vocab_size": len(tokenizer),
        "bos_token_id": 0,
        "eos_token_id": 1,
        **changes,
    }
    if "pad_token_id" in settings:
        settings["pad_token_id"] = None
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(4)
    model.save_pretrained(folder)
    return folder
