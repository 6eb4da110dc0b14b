"""Per-sample summed token loss without the full logits.

The loss is computed in slices of the vocabulary (``kernels/chunked_cross_entropy.py``) if that
agrees with the model's own logits, so that neither ``(N, S, V)`` logits nor their fp32 copy exist.
"""

import contextlib
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from gradproj.engine.layers import unwrap, without_wrappers
from gradproj.engine.targets import IGNORE, Announce, Targets, loss_key
from gradproj.errors import ConfigError, ModelError
from gradproj.kernels.chunked_cross_entropy import LogitsLoss, TokenLoss
from gradproj.kernels.memory import is_out_of_memory
from gradproj.kernels.transformers_patches import one_sequence_a_row
from gradproj.model.loading import positions_of
from gradproj.model.properties import (
    acts_in_layers_alone,
    adds_tokens,
    counts_padding,
    is_causal,
    measured,
    sees_left_padding,
)  # fmt: skip

PROBE_TOKENS = 24
"""Length of the batch that decides whether the chunked loss is used."""

_MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids", "token_type_ids")


def output_head(model: Any) -> nn.Module | None:
    """Return the model's vocabulary head; None if it names none."""
    try:
        return unwrap(model).get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def per_sample_loss(
    model: nn.Module, batch: Any, *, chunked: bool | None = None, causal: bool = True
) -> Tensor:
    """Return every sample's cross-entropy, summed over its target tokens.

    Args:
        model: a causal language model of transformers, also wrapped by PEFT or DDP.
        batch: ``input_ids (N, S)`` int64, or a mapping with ``input_ids`` and optionally ``labels``
            (``(N, S)``, not shifted, -100 = no target; default: every token that
            ``attention_mask`` does not hide) or ``targets`` (a ``Targets``, in place of labels).
            ``attention_mask``, ``position_ids`` and ``token_type_ids`` are the model's. A token
            after a masked one is no target: padding predicts nothing. Positions begin at a sample's
            first token that an ``(N, S)`` mask shows; a model that cannot do so is refused padding
            on the left (an adapter that drops position ids is not). Some models see padding on the
            right too (``properties.sees_padding``): give them samples of one length.
        chunked: whether to make the logits in chunks; None takes the answer of ``chunk_verdict``.
        causal: False allows a model that sees later tokens; padding then needs an attention mask.

    Returns:
        ``(N,)`` float32, nats. A sample without a target has 0.

    Raises:
        ConfigError: the batch has a key that the loss or the model does not take.
        ModelError: the model is not causal.
    """
    inputs, targets = _split_batch(batch)
    shape, inner = inputs["input_ids"].shape, unwrap(model)
    if causal and not is_causal(inner):
        raise ModelError(
            f"per_sample_loss: {type(inner).__name__} is not causal: a token changes the logits of "
            "earlier positions, so padding would change the rows. Set is_decoder in its config, "
            "or give causal=False with batches without padding or with an attention mask"
        )
    packed = "position_ids" in inputs
    if _is_whole(model):
        _number_after_padding(inner, inputs)
    elif ignored := sorted({"position_ids", "token_type_ids"} & inputs.keys()):
        raise ConfigError(  # PEFT drops them with a warning
            f"per_sample_loss: PEFT does not use {', '.join(ignored)} with this adapter; leave it "
            "out of the batch"
        )
    if chunked is None:
        chunked, _ = chunk_verdict(model)
    if chunked and head_is_bystander(head := inner.get_output_embeddings()):
        hidden = run_model(inner.base_model, inputs, packed)[0].flatten(0, 1)[targets.positions]
        losses = TokenLoss.apply(hidden, head, targets.tokens, softcap_of(inner))
    else:
        logits = run_model(model, inputs, packed).logits
        if logits.shape[1] > shape[1]:
            logits = logits[:, -shape[1] :]  # the virtual tokens of prompt learning come first
        chosen = logits.flatten(0, 1)[targets.positions].float()
        losses = LogitsLoss.apply(chosen, targets.tokens)
    spread = losses.new_zeros(shape.numel()).index_copy(0, targets.positions, losses)
    losses = spread.view(shape).sum(dim=1)
    return Announce.apply(losses, loss_key(model), targets.positions, shape[1])


def _number_after_padding(model: Any, inputs: dict[str, Tensor]) -> None:
    """Add position ids, 0 up to the first token that the mask shows, if the model ignores it.

    On batches without padding on the left they are 0, 1, 2, ..., as the model counts itself.
    """
    mask = inputs.get("attention_mask")
    if "position_ids" in inputs or mask is None or mask.shape != inputs["input_ids"].shape:
        return
    if counts_padding(model):
        has_begun = (mask != 0).cumsum(dim=1) > 0
        inputs["position_ids"] = (has_begun.cumsum(dim=1) - 1).clamp_min(0)
    elif sees_left_padding(model) and bool((mask[:, 0] == 0).any()):
        raise ConfigError(
            f"per_sample_loss: padding on the left changes what {type(model).__name__} computes, "
            "and it takes no position ids; put the padding on the right"
        )


def _split_batch(batch: Any) -> tuple[dict[str, Tensor], Targets]:
    """Return the model's inputs, and the targets."""
    batch = {"input_ids": batch} if isinstance(batch, Tensor) else batch
    given = {key: value for key, value in batch.items() if value is not None}
    unknown = sorted(set(given) - {*_MODEL_INPUTS, "labels", "targets"})
    if unknown or "input_ids" not in given:
        problem = f"does not use {', '.join(unknown)}" if unknown else "got no input_ids"
        raise ConfigError(
            f"per_sample_loss {problem}: a batch has {', '.join(_MODEL_INPUTS)}, and labels or "
            "targets; leave out what plays no part in the loss"
        )
    inputs = {key: given[key] for key in _MODEL_INPUTS if key in given}
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    if mask is not None and mask.shape != ids.shape:
        if "labels" not in given and "targets" not in given:
            raise ConfigError(
                f"per_sample_loss: an attention_mask of the shape {tuple(mask.shape)} does not say "
                f"which of the {tuple(ids.shape)} tokens are targets; give labels"
            )
        mask = None
    if "targets" in given:
        return inputs, given["targets"]
    labels = given.get("labels")
    if labels is None:
        labels = ids if mask is None else ids.masked_fill(mask == 0, IGNORE)
    return inputs, Targets.from_labels(labels, mask)


def run_model(module: Any, inputs: dict[str, Tensor], packed: bool = False) -> Any:
    """Run the model or its body, which must know every input by its name.

    Rows are ``packed`` if they may hold several sequences: the caller gave position ids.
    """
    if len(inputs) > 1:
        # transformers' models drop what they do not know without a word.
        named = inspect.signature(unwrap(module).forward).parameters
        unknown = sorted(set(inputs) - set(named)) if "input_ids" in named else []
        if unknown:
            raise ConfigError(
                f"per_sample_loss: {type(unwrap(module)).__name__} takes no {', '.join(unknown)}; "
                "leave it out of the batch"
            )
    with contextlib.nullcontext() if packed else one_sequence_a_row():
        return module(**inputs, use_cache=False)


def head_is_bystander(head: nn.Module) -> bool:
    """Return whether the head needs no gradient: neither trained nor hooked as a target layer."""
    return not head._forward_hooks and not any(p.requires_grad for p in head.parameters())


def softcap_of(model: Any) -> float | None:
    return getattr(model.config, "final_logit_softcapping", None)


def chunk_verdict(model: nn.Module) -> tuple[bool, str]:
    """Return whether the chunked loss agrees with the model's own logits, and why in words.

    Models differ in logit scales, extra heads and the like. One short batch decides, not a list of
    names, and again when the model has changed.
    """
    inner = unwrap(model)
    if not _is_whole(model):
        return False, "the adapter acts on the input, not in the layers alone"
    return (False, "the model is in training mode") if inner.training else _try_chunk(inner)


def refuse_virtual_tokens(model: nn.Module, what: str) -> None:
    """Raise ``ModelError`` for prompt learning, where the targets of the model's own loss differ.

    A sample's first token follows a virtual one, so PEFT's loss predicts it too.
    """
    outer = without_wrappers(model)
    if hasattr(outer, "get_base_model") and adds_tokens(outer):
        raise ModelError(
            f"{what}: the PEFT adapter puts virtual tokens before every sample, and its loss "
            "predicts the first token too, which no count of targets knows. Use per_sample_loss "
            "with GradProjLoraEngine, or an adapter of layers such as LoRA"
        )


def _is_whole(model: nn.Module) -> bool:
    """Return whether ``unwrap(model)`` computes all that the model does."""
    outer = without_wrappers(model)
    return not hasattr(outer, "get_base_model") or acts_in_layers_alone(outer)


@measured
@torch.no_grad()
def _try_chunk(model: Any) -> tuple[bool, str]:
    head = output_head(model)
    if type(head) is not nn.Linear:
        return False, f"the model's head is a {type(head).__name__}, not a Linear"
    if getattr(model, "base_model", model) is model:
        return False, "the model has no base model apart from its head"
    size = min(head.weight.shape[0], model.get_input_embeddings().weight.shape[0])
    n_tokens = min(PROBE_TOKENS, positions_of(model) or PROBE_TOKENS)
    ids = (torch.arange(n_tokens, device=head.weight.device) * 7919 % size).view(1, n_tokens)
    expected = run_model(model, {"input_ids": ids}).logits.float()
    try:
        hidden = run_model(model.base_model, {"input_ids": ids})[0]
    except Exception as error:  # a checkpoint's own code raises many types
        if is_out_of_memory(error):
            raise
        return False, f"the model's body cannot run alone ({type(error).__name__}: {error})"
    if hidden.shape[-1] != head.in_features:
        return False, (
            f"the model's head takes {head.in_features} values a token, its body gives "
            f"{hidden.shape[-1]}"
        )
    logits = head(hidden).float()
    cap = softcap_of(model)
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    dtype = head.weight.dtype
    most = 1e-5 if expected.dtype == dtype else 4 * torch.finfo(dtype).eps
    off = ((logits - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()
    if not off <= most:
        return False, f"logits from the hidden states differ from the model's own by {off:.1e}"
    return True, f"logits in chunks agree with the model's own to {off:.1e}"


@torch.no_grad()
def logits_are_the_heads(model: Any) -> bool:
    """Return whether a model's logits are its head's output as it is, or capped.

    For a model on the meta device, where ``chunk_verdict`` has no values to compare: a model that
    changes what its head puts out (Cohere scales it) gets False, also if it only makes a float32
    copy.
    """
    head = output_head(model)
    if type(head) is not nn.Linear or model.base_model is model:
        return False
    if softcap_of(model) is not None:
        return True
    outputs: list[Tensor] = []
    handle = head.register_forward_hook(lambda _, inputs, output: outputs.append(output))
    try:
        ids = torch.zeros(1, 2, dtype=torch.int64, device=head.weight.device)
        logits = run_model(model, {"input_ids": ids}).logits
    finally:
        handle.remove()
    return any(
        output.untyped_storage()._cdata == logits.untyped_storage()._cdata
        and not output._version  # nothing was written over it
        for output in outputs
    )
