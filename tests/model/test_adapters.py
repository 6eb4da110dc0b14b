"""PEFT adapters as ``--model``: rows as in PEFT's own model, or one line that says why not."""

import json
import shutil

import pytest
import torch
from helpers.models import make_model
from helpers.references import projected_gradient_by_autograd, relative_error, sample_loss
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from gradproj import GradProjLoraEngine
from gradproj.engine.loss import per_sample_loss
from gradproj.engine.projection import ProjectionConfig, place_widths
from gradproj.engine.selection import find_layers
from gradproj.errors import ConfigError, ModelError
from gradproj.model.checkpoint import fetch
from gradproj.model.config import ModelConfig
from gradproj.model.fingerprint import model_identity
from gradproj.model.loading import load_model, load_model_config, model_skeleton
from gradproj.model.tokenizer_loading import load_tokenizer

peft = pytest.importorskip("peft", reason="the peft extra is not installed")

CPU = torch.device("cpu")
CONFIG = ProjectionConfig(layers="mlp,attn", rank_total=24, rank_min=2)
LORA = {
    "task_type": "CAUSAL_LM",
    "r": 4,
    "target_modules": ["q_proj", "v_proj"],
    "init_lora_weights": False,
}

IN_LAYERS = {
    "lora": lambda: peft.LoraConfig(**LORA),
    "rslora": lambda: peft.LoraConfig(**LORA, use_rslora=True),
    "dora": lambda: peft.LoraConfig(**LORA, use_dora=True),
    "pissa": lambda: peft.LoraConfig(**LORA | {"init_lora_weights": "pissa"}),
    "trainable tokens": lambda: peft.LoraConfig(**LORA, trainable_token_indices=[5, 6]),
    "saved modules": lambda: peft.LoraConfig(**LORA, modules_to_save=["lm_head"]),
    "target_parameters": lambda: peft.LoraConfig(
        **LORA | {"target_modules": []}, target_parameters=["self_attn.q_proj.weight"]
    ),
    "ia3": lambda: peft.IA3Config(
        task_type="CAUSAL_LM",
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
    ),
    "loha": lambda: peft.LoHaConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], init_weights=False
    ),
    "vera": lambda: peft.VeraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "o_proj"], init_weights=False
    ),
    "norms": lambda: peft.LNTuningConfig(task_type="CAUSAL_LM"),
}

OUTSIDE = {
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "P_TUNING": lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16
    ),
    "aLoRA": lambda: peft.LoraConfig(**LORA, alora_invocation_tokens=[5]),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("base") / "model")


def adapted(base, settings):
    """Return a PEFT model in which the adapter's weights are far from their initial values."""
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def files_of(path, **options):
    return fetch(ModelConfig(model=str(path), **options))


def layers_of(model):
    return place_widths(find_layers(model, CONFIG.patterns), CONFIG)


def rows_of(model, batch, engine):
    with engine:
        per_sample_loss(model, batch).sum().backward()
        return engine.collect_batch()


def samples():
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 300, (3, 17), generator=generator)
    ids[:, 4] = 5
    labels = ids.clone()
    labels[1, 9:] = -100
    return ids, labels, [17, 9, 17]


@pytest.mark.parametrize("kind", IN_LAYERS)
def test_rows_of_an_adapter_are_those_of_its_own_model_by_autograd(kind, base, tmp_path):
    adapted(base, IN_LAYERS[kind]()).save_pretrained(tmp_path)
    whole = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path)
    files = files_of(tmp_path)
    model = load_model(files, CPU)
    assert layers_of(model_skeleton(files)) == layers_of(model)
    ids, labels, lengths = samples()
    engine = GradProjLoraEngine.from_config(model, CONFIG)
    rows = rows_of(model, {"input_ids": ids, "labels": labels}, engine)
    theirs = {f"base_model.model.{t.name}": t for t in engine.targets}
    weights = [whole.get_submodule(name).weight for name in theirs]
    for n, length in enumerate(lengths):
        whole.requires_grad_(True)
        gradients = torch.autograd.grad(sample_loss(whole, ids[n, :length]), weights)
        want = [
            (p_o.double() @ gradient.double() @ p_i.double().T).flatten()
            for gradient, (p_i, p_o) in zip(
                gradients, engine.projection_matrices.values(), strict=True
            )
        ]
        assert relative_error(rows[n], torch.cat(want)) < 1e-5


@pytest.mark.parametrize("kind", OUTSIDE)
def test_adapter_that_acts_on_the_input_is_refused_by_name(kind, base, tmp_path):
    adapted(base, OUTSIDE[kind]()).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"adapter of kind {kind}, which acts on the input"):
        files_of(tmp_path)


Q_PROJ = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "r": 4}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (lambda: peft.PolyConfig(**Q_PROJ, n_tasks=2), "kind POLY, which needs a task's number"),
        (lambda: peft.HRAConfig(**Q_PROJ), "kind HRA, which multiplies .*merge_and_unload"),
    ],
    ids=["POLY", "HRA"],
)
def test_adapter_whose_layers_have_no_gradient_of_a_text_is_refused_by_name(
    settings, message, base, tmp_path
):
    adapted(base, settings()).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=message):
        files_of(tmp_path)


def test_layers_on_an_input_that_the_batch_shares_are_named_at_once_and_exact_alone(base):
    # Two layers of a block also run on the adapter's own three vectors.
    model = adapted(
        base, peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=2)
    ).get_base_model()
    ids, _, _ = samples()
    with GradProjLoraEngine(model, "mlp,attn", 24, 2, freeze_weights=True) as engine:
        shared = {t.name for t in engine.targets if t.name.endswith(("k_proj", "v_proj"))}
        assert all(name in engine.only_alone for name in shared)
        assert "adding -k_proj,-v_proj" in engine.only_alone
        per_sample_loss(model, ids[:1]).sum().backward()
        (row,) = engine.collect_batch()
    assert relative_error(row, projected_gradient_by_autograd(model, engine, ids[0])) < 1e-5


@pytest.mark.parametrize(
    "settings",
    [
        lambda: peft.BOFTConfig(
            task_type="CAUSAL_LM", target_modules=["q_proj"], boft_block_size=4
        ),
        lambda: peft.ShiraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4),
    ],
    ids=["BOFT", "SHIRA"],
)
def test_adapter_that_cannot_be_built_without_weights_names_the_way_out(
    settings, base, tmp_path, request
):
    adapted(base, settings()).save_pretrained(tmp_path)
    kind = request.node.callspec.id
    with pytest.raises(ModelError, match=rf"kind {kind} without weights.*merge_and_unload"):
        model_skeleton(files_of(tmp_path))


@pytest.mark.parametrize("kind", [kind for kind in OUTSIDE if kind != "aLoRA"])
def test_rows_in_python_are_those_of_the_model_with_its_virtual_tokens(kind, base):
    model = adapted(base, OUTSIDE[kind]())
    ids, labels, lengths = samples()
    engine = GradProjLoraEngine(model, "mlp,attn", 24, 2, freeze_weights=True)
    rows = rows_of(model, {"input_ids": ids, "labels": labels}, engine)
    for n, length in enumerate(lengths):
        want = projected_gradient_by_autograd(model, engine, ids[n, :length])
        assert relative_error(rows[n], want) < 1e-5
    with pytest.raises(ConfigError, match="PEFT does not use position_ids"):
        per_sample_loss(model, {"input_ids": ids, "position_ids": torch.arange(17).expand(3, -1)})


def test_loss_of_an_adapter_that_looks_for_its_invocation_is_that_of_the_whole_model(base):
    model = adapted(base, OUTSIDE["aLoRA"]())
    ids, _, _ = samples()
    want = torch.stack([sample_loss(model, tokens) for tokens in ids])
    torch.testing.assert_close(per_sample_loss(model, ids), want, rtol=1e-5, atol=0)
    assert not torch.allclose(per_sample_loss(model.get_base_model(), ids), want, rtol=1e-3)


@pytest.mark.parametrize("tied", [False, True])
def test_adapter_trained_with_more_tokens_is_loaded_with_them(tied, tmp_path):
    base = make_model(tmp_path / "base", tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"])
    model.resize_token_embeddings(len(tokenizer))
    trained = peft.get_peft_model(model, peft.LoraConfig(**LORA)).eval()
    trained.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    files = files_of(tmp_path / "adapter")
    assert load_model_config(files).vocab_size == len(tokenizer)
    assert layers_of(model_skeleton(files)) == layers_of(trained.model)
    ids = tokenizer("a <|im_start|> b", return_tensors="pt").input_ids
    assert ids.max() >= len(tokenizer) - 2
    loaded = load_model(files, CPU)
    assert torch.equal(loaded(input_ids=ids).logits, trained(input_ids=ids).logits)


def test_folder_with_a_copy_of_the_bases_config_is_the_adapter_that_it_holds(base, tmp_path):
    adapted(base, IN_LAYERS["lora"]()).save_pretrained(tmp_path)
    plain = model_identity(files_of(tmp_path), load_tokenizer(files_of(tmp_path)))
    shutil.copy(base / "config.json", tmp_path)
    files = files_of(tmp_path)
    assert files.adapter_dir == tmp_path
    assert model_identity(files, load_tokenizer(files)) == plain


def test_folder_with_an_adapter_and_a_whole_model_is_refused(base, tmp_path):
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    adapted(base, IN_LAYERS["lora"]()).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"holds a whole model .* and a PEFT adapter"):
        files_of(tmp_path)


def edit_settings(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", [None, "", 5])
def test_adapter_without_a_base_is_refused(name, base, tmp_path):
    adapted(base, IN_LAYERS["lora"]()).save_pretrained(tmp_path)
    edit_settings(tmp_path, base_model_name_or_path=name)
    with pytest.raises(ModelError, match=r"base_model_name_or_path is .*; write the base model's"):
        files_of(tmp_path)


def test_damaged_settings_are_refused(base, tmp_path):
    adapted(base, IN_LAYERS["lora"]()).save_pretrained(tmp_path)
    edit_settings(tmp_path, peft_type="NO_SUCH_KIND")
    with pytest.raises(ModelError, match="PEFT cannot load the adapter"):
        files_of(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(ModelError, match="does not name the adapter's base model"):
        files_of(tmp_path)


def test_cut_weights_are_refused(base, tmp_path):
    adapted(base, IN_LAYERS["lora"]()).save_pretrained(tmp_path)
    whole = tmp_path / "adapter_model.safetensors"
    path = tmp_path / "adapter_model.bin"
    torch.save(load_file(whole), path)
    whole.unlink()
    path.write_bytes(path.read_bytes()[:1000])
    files = files_of(tmp_path, allow_pickle=True)
    with pytest.raises(ModelError, match=r"cannot load the adapter: \w+: "):
        model_skeleton(files)


def test_adapter_of_another_base_is_refused(base, tmp_path):
    adapted(base, IN_LAYERS["lora"]()).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    weights = load_file(path)
    save_file({k: v for k, v in weights.items() if "layers.1." not in k}, path)
    with pytest.raises(ModelError, match=r"lacks weights that its settings name .*layers\.1\."):
        load_model(files_of(tmp_path), CPU)
    more = {k.replace("layers.1.", "layers.7."): v.clone() for k, v in weights.items()}
    save_file(weights | more, path)
    with pytest.raises(ModelError, match=r"has weights for other layers .*layers\.7\."):
        load_model(files_of(tmp_path), CPU)


def test_adapter_on_an_adapter_is_refused(base, tmp_path):
    for name in ("first", "second"):
        adapted(base, IN_LAYERS["lora"]()).save_pretrained(tmp_path / name)
    edit_settings(tmp_path / "second", base_model_name_or_path=str(tmp_path / "first"))
    with pytest.raises(ModelError, match="first is a PEFT adapter too; merge that one"):
        files_of(tmp_path / "second")


def test_random_weights_of_an_adapter_are_refused(base, tmp_path):
    adapted(base, IN_LAYERS["lora"]()).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="--init random draws a whole model"):
        files_of(tmp_path, init="random")
