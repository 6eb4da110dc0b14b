"""``--proj_layers``: what patterns take and leave out, and the list of the rest."""

from types import SimpleNamespace

import pytest
import torch
from helpers.models import VOCAB, ragged_batch, small_model
from helpers.references import projected_gradient_by_autograd, relative_error
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

from gradproj.engine.coverage import coverage_of
from gradproj.engine.engine import GradProjLoraEngine
from gradproj.engine.loss import per_sample_loss
from gradproj.engine.patterns import exclusions, matches
from gradproj.engine.reach import reached_layers
from gradproj.engine.selection import find_layers, idle_patterns
from gradproj.errors import ConfigError, ModelError

SMALL = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=VOCAB, max_position_embeddings=64, head_dim=8,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def model_of(model_type, device="cpu", **changes):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**{**SMALL, **changes})
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config).eval()


def names_of(model, *patterns):
    return [target.name for target in find_layers(model, patterns)]


def hybrid(device="cpu"):
    """Three blocks with linear attention for one with full attention."""
    return model_of(
        "qwen3_5_text", device, num_hidden_layers=4, linear_num_key_heads=2,
        linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
        layer_types=["linear_attention"] * 3 + ["full_attention"],
    )  # fmt: skip


def with_images(device="meta"):
    text = {**SMALL, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
    vision = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        image_size=28, patch_size=14, vision_use_head=False,
    )  # fmt: skip
    config = CONFIG_MAPPING["gemma3"](
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=98,
        boi_token_index=99, eoi_token_index=100,
    )  # fmt: skip
    with torch.device(device):
        return AutoModelForImageTextToText.from_config(config).eval()


# --- what is beside the layers ---


@pytest.mark.parametrize(
    ("model_type", "changes", "beside"),
    [
        ("cohere", {"use_qk_norm": True}, "model.layers.*.self_attn.q_norm.weight"),
        ("rwkv", {"context_length": 64, "attention_hidden_size": 32}, None),
    ],
)
def test_weights_beside_the_layers_are_left_out_and_the_rows_are_exact(model_type, changes, beside):
    model = model_of(model_type, **changes)
    ids, labels = ragged_batch([9, 5])
    with GradProjLoraEngine(model, "mlp,attn", 24, 3) as engine:
        per_sample_loss(model, {"input_ids": ids, "labels": labels}).sum().backward()
        rows = engine.collect_batch()
    for n, length in enumerate([9, 5]):
        want = projected_gradient_by_autograd(model, engine, ids[n, :length])
        assert relative_error(rows[n], want) < 1e-5
    left_out = [each.name for each in engine.coverage.not_projectable]
    assert beside is None or beside in left_out


def test_pattern_of_unprojectable_weights_alone_names_a_way_out():
    model = model_of("mixtral", "meta", num_local_experts=4)
    for patterns, way in ((["mlp"], "all"), (["mlp.experts", "attn"], "attn")):
        with pytest.raises(ModelError, match=rf"cannot project: .* Give --proj_layers {way}$"):
            find_layers(model, patterns, experts="none")


def test_layer_that_is_no_linear_map_is_left_out_by_name():
    class Quantized(nn.Linear):
        def forward(self, x):
            return super().forward(x).round()

    model = small_model("llama")
    model.model.layers[0].mlp.up_proj = Quantized(32, 48, bias=False)
    targets = find_layers(model, ["mlp"])
    assert len(targets) == 5
    (left_out,) = coverage_of(model, targets).not_projectable
    assert (left_out.name, left_out.n) == ("model.layers.*.mlp.up_proj.weight", 1)
    with pytest.raises(ModelError, match=r"cannot project: .*up_proj \(Quantized\).*--proj_layers"):
        find_layers(model, ["layers.0.mlp.up_proj"])


# --- patterns ---


def test_star_stands_for_one_component():
    model = small_model("llama")
    assert names_of(model, "model.layers.*.mlp.up_proj") == names_of(model, "up_proj")
    assert names_of(model, "*_proj") == names_of(model, "mlp", "attn")
    assert not matches("layers.*.up_proj", "model.layers.0.mlp.up_proj")


@pytest.mark.parametrize(
    ("patterns", "same_as"),
    [
        (("layers.0", "-attn"), ("layers.0.mlp",)),
        (("-o_proj", "attn"), ("q_proj", "k_proj", "v_proj")),
        (("mlp", "-layers.0"), ("layers.1.mlp",)),
        (("mlp", "-layers.*.mlp.gate_proj"), ("up_proj", "down_proj")),
    ],
)
def test_dash_leaves_out_what_it_matches(patterns, same_as):
    model = small_model("llama")
    assert names_of(model, *patterns) == names_of(model, *same_as)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("mlp", "attn", "-attn", "-mlp"), "-attn,-mlp leaves out all that 'mlp', 'attn' matches"),
        (("mlp", "attn", "-attn"), "-attn leaves out all that 'attn' .* --proj_layers mlp,-attn$"),
        (("h.*.mlp",), r"no layer of the model matches 'h\.\*\.mlp'"),
    ],
)
def test_pattern_without_effect_is_an_error(patterns, message):
    with pytest.raises(ModelError, match=message):
        find_layers(small_model("llama"), patterns)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("bert", {"is_decoder": True}),
        ("ctrl", {"n_embd": 32, "n_layer": 2, "n_head": 4, "dff": 48}),
        ("xlm", {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "causal": True}),
        ("recurrent_gemma", {"lru_width": 32}),
    ],
)
def test_roles_fit_families_with_other_names(model_type, changes):
    model = model_of(model_type, "meta", **changes)
    roles = ["attn", "mlp", "mixer", "experts", "router"]
    coverage = coverage_of(model, find_layers(model, roles))
    assert coverage.n_selected == coverage.n_layers > 0
    assert names_of(model, *roles) == names_of(model, "all")


def test_all_takes_the_blocks_and_lm_head_the_head_of_any_name():
    model = model_of("xlm", "meta", emb_dim=32, n_layers=2, n_heads=4, causal=True)
    assert names_of(model, "lm_head") == ["pred_layer.proj"]
    blocks = names_of(model, "all")
    assert len(blocks) == 12
    assert not {"pred_layer.proj", "transformer.embeddings"} & {*blocks}
    assert names_of(model, "all", "-attn", "lm_head")[-1] == "pred_layer.proj"
    assert not [name for name in names_of(model, "all", "-attn") if "attention" in name]


def test_equals_sign_begins_a_whole_name():
    model = small_model("llama")
    names = names_of(model, "layers.1")
    assert names_of(model, *(f"={name}" for name in names)) == names
    with pytest.raises(ModelError, match="no layer of the model matches '=layers"):
        find_layers(model, ["=layers.1.mlp.up_proj"])


def test_exclusion_of_nothing_is_a_line_for_people():
    model = small_model("llama")
    patterns = ["mlp", "-router", "-o_proj", "-vision_tower"]
    assert names_of(model, *patterns) == names_of(model, "mlp")
    (line,) = idle_patterns(model, patterns)
    assert line == "proj_layers   -router,-vision_tower: the model has nothing of that name"
    assert idle_patterns(model, ["mlp", "-norm"]) == []


def test_exclusions_alone_are_an_error_that_adds_the_layers():
    with pytest.raises(ConfigError, match=r"only layers to leave out.*all,-router"):
        GradProjLoraEngine(small_model("llama"), ["-router"])


def test_short_exclusions_leave_out_the_unwanted_and_keep_the_rest():
    kept = ["model.layers.0.attn.q", "model.layers.10.mlp.up"]
    unwanted = ["model.vision.0.attn.q", "model.layers.1.mlp.up", "model.layers.1.attn.q"]
    assert exclusions(unwanted, kept) == ["-vision", "-layers.1"]


# --- the list of what is left out ---


def test_coverage_names_the_mixers_that_a_hybrid_model_loses():
    model = hybrid("meta")
    coverage = coverage_of(model, find_layers(model, ["mlp", "attn"]))
    assert (coverage.n_selected, coverage.n_layers) == (16, 31)
    (mixers,) = coverage.not_selected
    assert (mixers.name, mixers.n) == ("model.layers.*.linear_attn", 15)
    sizes = {
        name: p.numel()
        for name, p in model.named_parameters()
        if ".layers." in name and p.dim() >= 2
    }
    taken = [n for name, n in sizes.items() if ".mlp." in name or ".self_attn." in name]
    assert coverage.fraction == pytest.approx(sum(taken) / sum(sizes.values()))
    assert "16 of 31 linear layers of the blocks" in coverage.lines()[0]
    # The printed name is a pattern that takes them.
    everything = coverage_of(model, find_layers(model, ["mlp", "attn", mixers.name]))
    assert everything.n_selected == 31


def test_coverage_of_a_whole_model_is_one_line():
    model = small_model("gpt2")
    coverage = coverage_of(model, find_layers(model, ["mlp", "attn"]))
    assert (coverage.fraction, coverage.not_selected, coverage.not_projectable) == (1, [], [])
    assert coverage.lines() == ["layers        all 8 linear layers of the blocks"]


def test_coverage_counts_the_blocks_that_a_number_leaves_out():
    model = small_model("gpt2")
    coverage = coverage_of(model, find_layers(model, ["h.1"]))
    assert (coverage.n_selected, coverage.n_layers) == (4, 8)
    layers = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert [each.name for each in coverage.not_selected] == [f"transformer.h.*.{x}" for x in layers]


# --- layers that the loss never reaches ---


def reached(model, *patterns, max_length=64):
    targets = find_layers(model, patterns)
    return [target.name for target in reached_layers(model, targets, patterns, max_length)]


def test_roles_leave_out_layers_without_a_gradient_and_a_name_of_them_is_an_error():
    model = with_images()
    text = names_of(model, "all", "-vision_tower")
    assert reached(model, "all") == reached(model, "mlp", "attn") == text
    unreached = find_layers(model, ["vision_tower.encoder"])
    (named,) = coverage_of(model, find_layers(model, text), unreached).not_reached
    assert (named.name, named.n) == ("model.vision_tower", 6)
    with pytest.raises(ModelError, match=r"never reaches 6 of 20 .*vision_tower") as error:
        reached(model, "mlp", "attn", "layers.0")
    assert "--proj_layers mlp,attn,layers.0,-vision_tower (it takes model.la" in str(error.value)


def test_layer_whose_weight_is_used_without_calling_it_is_left_out():
    model = model_of("mamba", "meta", state_size=4, time_step_rank=4)
    names = names_of(model, "all")
    assert reached(model, "all") == [name for name in names if "dt_proj" not in name]


def git(device):
    vision = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        image_size=16, patch_size=8,
    )  # fmt: skip
    return model_of("git", device, vision_config=vision)


def trocr(device):
    return model_of(
        "trocr", device, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48
    )


@pytest.mark.parametrize(
    ("make", "patterns", "advice"),
    [
        (git, "mlp.fc1", "all"),
        (trocr, "fc1,self_attn,encoder_attn", "fc1,self_attn,-encoder_attn"),
    ],
)
def test_advice_for_unreached_layers_is_accepted_when_followed(make, patterns, advice):
    model = make("meta")
    with pytest.raises(ModelError, match="never reaches") as error:
        reached(model, *patterns.split(","))
    advised = str(error.value).partition("--proj_layers ")[2].partition(" ")[0]
    assert advised == advice
    follow = advised.split(",")
    assert advice == "all" or reached(model, *follow) == names_of(model, *follow)
    assert reached(model, *follow)


def test_trial_reaches_every_layer_of_a_hybrid_model():
    model = hybrid("meta")
    assert len(reached(model, "layers")) == 31


class ForLongTexts(nn.Module):
    """Uses one of its layers in texts of 100 tokens and more."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.short, self.long = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, input_ids, use_cache):
        x = self.embed(input_ids)
        long = self.long(x) if input_ids.shape[1] >= 100 else 0
        return SimpleNamespace(logits=self.short(x) + long)


def test_layer_with_a_part_in_long_texts_alone_is_reached_if_the_job_has_such():
    with torch.device("meta"):
        model = ForLongTexts()
    layers = ["short", "long"]
    assert reached(model, *layers, max_length=100) == layers
    with pytest.raises(ModelError, match=r"1 of 2 target layers: long\. Give --proj_layers short,"):
        reached(model, *layers, max_length=99)
