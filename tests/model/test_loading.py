"""Loading: every family, the skeleton, adapters, fingerprints, damaged checkpoints."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from helpers.models import FAMILIES, make_model, make_tokenizer
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from gradproj.engine.projection import ProjectionConfig, place_widths
from gradproj.engine.reach import reached_layers
from gradproj.engine.selection import find_layers
from gradproj.errors import ModelError
from gradproj.model import tokenizer_loading
from gradproj.model.checkpoint import fetch
from gradproj.model.config import ModelConfig
from gradproj.model.fingerprint import (
    config_fingerprint,
    model_identity,
    tokenizer_fingerprint,
    weights_fingerprint,
)
from gradproj.model.loading import (
    attention_note,
    load_model,
    load_model_config,
    model_skeleton,
    positions_of,
)
from gradproj.model.tokenizer_loading import load_tokenizer

CPU = torch.device("cpu")


def files_of(path, **options):
    return fetch(ModelConfig(model=str(path), **options))


def placed(model, config):
    targets = find_layers(model, config.patterns, config.include_embeddings)
    return place_widths(targets, config)


@pytest.mark.parametrize("family", FAMILIES)
def test_skeleton_has_the_layers_of_the_loaded_model(tmp_path, family):
    files = files_of(make_model(tmp_path, family))
    config = ProjectionConfig(rank_total=24, rank_min=3, include_embeddings=True)
    assert placed(model_skeleton(files), config) == placed(load_model(files, CPU), config)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loaded_model_is_frozen_in_eval_mode_and_in_model_dtype(tmp_path, dtype):
    model = load_model(files_of(make_model(tmp_path), model_dtype=dtype), CPU)
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(m.training for m in model.modules())
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}


def test_random_weights_follow_their_seed_and_keep_the_generator_state(tmp_path):
    make_model(tmp_path)
    state = torch.get_rng_state().clone()
    first, again, other = (
        load_model(files_of(tmp_path, init="random", seed=seed), CPU).lm_head.weight
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


def test_only_the_fingerprint_of_the_changed_part_changes(tmp_path):
    def fingerprints(path):
        files = files_of(path)
        return (
            weights_fingerprint(files),
            config_fingerprint(load_model_config(files)),
            tokenizer_fingerprint(load_tokenizer(files)),
        )

    path = make_model(tmp_path / "a")
    before = fingerprints(path)
    assert fingerprints(shutil.copytree(path, tmp_path / "b")) == before
    weights = load_file(tmp_path / "b" / "model.safetensors")
    weights["model.norm.weight"][3] += 1e-3
    save_file(weights, tmp_path / "b" / "model.safetensors", metadata={"format": "pt"})
    assert [a == b for a, b in zip(fingerprints(tmp_path / "b"), before, strict=True)] == [
        False,
        True,
        True,
    ]
    assert fingerprints(make_model(tmp_path / "c", rms_norm_eps=1e-3))[1] != before[1]


def test_tokenizer_fingerprint_does_not_depend_on_its_use(tmp_path):
    tokenizer = load_tokenizer(files_of(make_model(tmp_path)))
    before = tokenizer_fingerprint(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer(["a", "the of and"], truncation=True, max_length=2)
    tokenizer(["a", "the of and"], padding=True)
    tokenizer._tokenizer.no_padding()
    assert len(before) == 32
    assert tokenizer_fingerprint(load_tokenizer(files_of(tmp_path))) == before


def test_missing_weights_are_an_error(tmp_path):
    make_model(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError,
        match=r"1 of the model's weights are not in the checkpoint.*layers\.1\.mlp\.up_proj",
    ):
        load_model(files_of(tmp_path), CPU)


def test_weights_of_another_shape_are_an_error(tmp_path):
    make_model(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"] = torch.zeros(5)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.norm\.weight"):
        load_model(files_of(tmp_path), CPU)


def test_truncated_weights_are_an_error_before_loading(tmp_path):
    make_model(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged"):
        files_of(tmp_path)


def test_bidirectional_model_is_rejected(tmp_path):
    from transformers import BertConfig, BertLMHeadModel

    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=50,
    )
    make_tokenizer(tmp_path)
    BertLMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"\(BertLMHeadModel\) is not causal"):
        load_model(files_of(tmp_path), CPU)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"model_type": "vit"}', "no causal language model of type vit"),
        ('{"model_type": "deberta-v2"}', "type deberta-v2 .it may be an encoder"),
        ('{"model_type": "t5"}', "type t5 is sequence-to-sequence"),
        ('{"model_type": "bart"}', "type bart is sequence-to-sequence"),
    ],
)
def test_model_that_is_no_causal_language_model_is_rejected(config, message, tmp_path):
    make_model(tmp_path)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ModelError, match=message):
        model_skeleton(files_of(tmp_path))


def test_text_part_of_a_vision_language_checkpoint_is_a_causal_model(tmp_path):
    _, sizes = FAMILIES["llama"]
    vision = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        image_size=16, patch_size=8, projection_dim=16,
    )  # fmt: skip
    config = LlavaConfig(
        text_config={"model_type": "llama", **sizes}, image_token_index=3,
        vision_config={"model_type": "clip_vision_model", **vision},
    )  # fmt: skip
    make_tokenizer(tmp_path)
    whole = LlavaForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path)
    files = files_of(tmp_path)
    model = load_model(files, CPU)
    ids = torch.tensor([[5, 17, 9, 40]])
    with torch.no_grad():
        text = whole.model.language_model(input_ids=ids).last_hidden_state
        torch.testing.assert_close(model(input_ids=ids).logits, whole.lm_head(text))
    skeleton = model_skeleton(files)
    taken = reached_layers(skeleton, find_layers(skeleton, ["all"]), ["all"], 16)
    assert len(taken) == 14
    assert all(".language_model." in target.name for target in taken)


def test_unusable_config_is_rejected(tmp_path):
    make_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no-such-type"}')
    with pytest.raises(ModelError, match="its config cannot be used"):
        model_skeleton(files_of(tmp_path))


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
@pytest.mark.parametrize("named", ["flash_attention_2", "kernels-community/flash-attn2"])
def test_attention_that_cannot_be_used_gives_way_to_the_default(tmp_path, key, named):
    ids = torch.arange(8)[None]
    files = files_of(make_model(tmp_path))
    want, fingerprint = (
        load_model(files, CPU)(ids).logits,
        config_fingerprint(load_model_config(files)),
    )
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: named}))
    assert attention_note(files).startswith(f"transformers' default: the config names {named}, wh")
    assert torch.equal(load_model(files, CPU)(ids).logits, want)
    assert model_skeleton(files).config._attn_implementation == "sdpa"
    assert config_fingerprint(load_model_config(files)) == fingerprint
    (tmp_path / "config.json").write_text(json.dumps({**config, key: "eager"}))
    assert attention_note(files) == ""
    assert load_model(files, CPU).config._attn_implementation == "eager"


def test_packages_for_a_sentencepiece_model_are_named(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    files = replace(files_of(make_model(tmp_path / "model")), tokenizer_dir=tmp_path)
    monkeypatch.setattr(tokenizer_loading, "_is_there", lambda module: module != "sentencepiece")
    with pytest.raises(ModelError, match=r"tokenizer\.model: pip install sentencepiece, or give"):
        load_tokenizer(files)


def test_peft_adapter_loads_with_its_base(tmp_path):
    peft = pytest.importorskip("peft", reason="the peft extra is not installed")
    from transformers import AutoModelForCausalLM

    base = make_model(tmp_path / "base")
    settings = peft.LoraConfig(
        r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    adapted.save_pretrained(tmp_path / "adapter")
    files = files_of(tmp_path / "adapter")
    assert [path.parent.name for path in files.weights] == ["base", "adapter"]
    model = load_model(files, CPU)
    ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(model(input_ids=ids).logits, adapted.eval()(input_ids=ids).logits)
    config = ProjectionConfig(layers="attn", rank_total=24, rank_min=3)
    assert placed(model_skeleton(files), config) == placed(model, config)
    assert any("lora_A" in layer.name for layer in placed(model, config))
    assert load_tokenizer(files).get_vocab() == load_tokenizer(files_of(base)).get_vocab()
    before = model_identity(files, load_tokenizer(files))
    text = (tmp_path / "adapter" / "adapter_config.json").read_text()
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        text.replace('"lora_alpha": 8', '"lora_alpha": 80')
    )
    after = model_identity(files, load_tokenizer(files))
    assert {name for name in before if before[name] != after[name]} == {"--model (adapter)"}


@pytest.mark.parametrize(
    ("family", "settings", "usable"),
    [
        ("llama", {}, 64),
        ("opt", {}, 64),
        # Positions start behind that of the padding token, 3.
        ("roberta", {"is_decoder": True, "pad_token_id": 3}, 60),
        ("mpt", {"max_seq_len": 24}, 24),
        ("whisper", {"max_target_positions": 24, "pad_token_id": 0}, 24),
        ("xlnet", {}, None),
    ],
)
def test_number_of_positions_is_that_of_the_longest_sequence_that_runs(family, settings, usable):
    model_type, sizes = FAMILIES.get(family, (family, FAMILIES["llama"][1]))
    sizes = {
        "xlnet": {"d_model": 32, "n_head": 4, "n_layer": 1, "d_inner": 32},
        "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 1},
        "whisper": {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 4},
    }.get(family, sizes) | {"vocab_size": 101}
    config = CONFIG_MAPPING[model_type](**{**sizes, **settings})
    model = AutoModelForCausalLM.from_config(config).eval()
    assert positions_of(model) == usable
    if usable:
        assert model(input_ids=torch.full((1, usable), 5)).logits.shape[1] == usable
