"""Properties of a model that a few tokens show, found out again when the model changes."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gradproj.errors import ModelError
from gradproj.kernels.memory import is_out_of_memory

T = TypeVar("T")


def measured(measure: Callable[[Any], T]) -> Callable[[Any], T]:
    """Cache what ``measure(model)`` returns until the model changes.

    A change is another tensor, or a write into one that torch counts (``load_state_dict``, an
    optimizer, any operation but one on ``weight.data``), or another number among the attributes of
    the model itself and of its config (``model.logit_scale``). The attributes of the modules inside
    are too many to compare in every batch. While a model trains, its weights change in every step,
    and the first result stays.
    """
    results: WeakKeyDictionary[nn.Module, tuple[tuple[list, list], T]] = WeakKeyDictionary()

    @functools.wraps(measure)
    def cached(model: Any) -> T:
        if model not in results or not model.training:
            state = _versions(model), _numbers(model)
            if model not in results or results[model][0] != state:
                results[model] = state, measure(model)
        return results[model][1]

    return cached


def _versions(model: nn.Module) -> list[tuple[int, int]]:
    """Return each weight's address and number of writes. Runs in every batch, so it is lean."""
    versions = []
    pending: list[nn.Module | None] = [model]
    while pending:
        module = pending.pop()
        if module is None:
            continue
        pending += module._modules.values()
        tensors: list[Tensor | None] = [*module._parameters.values()]
        if module._buffers:
            # Others hold no weights; rotary frequencies change with the length.
            saved = module._buffers.keys() - module._non_persistent_buffers_set
            tensors += [module._buffers[name] for name in sorted(saved)]
        for tensor in tensors:
            if tensor is not None:
                # Tensors made in inference mode count no writes.
                n_writes = 0 if tensor.is_inference() else tensor._version
                versions.append((tensor.data_ptr(), n_writes))
    return versions


def _numbers(model: Any) -> list[tuple[str, float]]:
    """Return the public numbers and switches of a model and of its config, by name."""
    attributes = [*vars(model).items()]
    attributes += getattr(getattr(model, "config", None), "__dict__", {}).items()
    return [
        (name, value)
        for name, value in attributes
        # How transformers and torch keep house (a cache, the mode) plays no part.
        if isinstance(value, int | float)
        and name[0] != "_"
        and name not in ("training", "use_cache")
    ]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off for a while, without gradients."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _ordinary_tokens(model: Any) -> tuple[Tensor, int, torch.dtype]:
    """Return ``(1, 8)`` ids that are no special tokens, the vocabulary's size and the dtype.

    They are from its middle: a model may hide its special tokens, such as padding.
    """
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    weight = next(model.parameters()) if embedding is None else embedding.weight
    size = 2 if embedding is None else len(weight)
    ids = torch.arange(size // 2, size // 2 + 8, device=weight.device).remainder(size)
    return ids.unsqueeze(0), size, weight.dtype


@measured
def is_causal(model: Any) -> bool:
    """Return whether a token changes no logits of earlier positions.

    Batches are padded on the right without an attention mask, which only a causal model allows.
    """
    ids, size, dtype = _ordinary_tokens(model)
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % size
    with _evaluating(model):
        before, after = (
            model(input_ids=x, use_cache=False).logits[0, :-1].float() for x in (ids, changed)
        )
    # In a causal model both passes do the same arithmetic on the earlier positions, so the logits
    # agree to the last bit, or to rounding where experts get another number of tokens.
    # A model whose logits are not finite may be causal.
    before, after = before.nan_to_num(), after.nan_to_num()
    return bool((before - after).abs().max() <= tolerance(dtype) * before.abs().max())


@measured
def counts_padding(model: Any) -> bool:
    """Return whether a model takes position ids, and without them counts padding on the left.

    Such a model numbers the positions 0, 1, 2, ... whatever the attention mask hides. Others count
    from the mask or begin at another number.
    """
    for module in (model, getattr(model, "base_model", model)):
        if "position_ids" not in inspect.signature(module.forward).parameters:
            return False
    ids, _, dtype = _ordinary_tokens(model)
    positions = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
    inputs = {"input_ids": ids, "attention_mask": (positions >= 3).long(), "use_cache": False}
    try:
        with _evaluating(model):
            own, counted = (
                model(**inputs, **more).logits[0, 3:].float()
                for more in ({}, {"position_ids": positions})
            )
    except Exception as error:  # a checkpoint's own code raises many types
        if is_out_of_memory(error):
            raise
        return False
    return bool((own - counted).abs().max() <= tolerance(dtype) * own.abs().max())


@measured
def sees_left_padding(model: Any) -> bool:
    """Return whether padding on the left changes later logits, although the mask hides it."""
    ids, _, dtype = _ordinary_tokens(model)
    mask = (torch.arange(ids.shape[1], device=ids.device) >= 3).long().unsqueeze(0)
    try:
        with _evaluating(model):
            padded = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0, 3:]
            alone = model(input_ids=ids[:, 3:], use_cache=False).logits[0]
    except Exception as error:  # a checkpoint's own code raises many types
        if is_out_of_memory(error):
            raise
        return False
    difference = (padded - alone).float().abs().max()
    return bool(difference > max(1e-3, 8 * tolerance(dtype)) * alone.float().abs().max())


@measured
def acts_in_layers_alone(model: Any) -> bool:
    """Return whether a ``PeftModel`` computes what the model inside it computes by itself.

    Prompt learning adds tokens; aLoRA looks for its invocation among the tokens.
    """
    if any(getattr(c, "alora_invocation_tokens", None) for c in model.peft_config.values()):
        return False
    inner = model.get_base_model()
    weight = inner.get_input_embeddings().weight
    ids = torch.arange(8, device=weight.device).remainder(min(64, len(weight))).unsqueeze(0)
    with _evaluating(model):
        whole, alone = (each(input_ids=ids, use_cache=False).logits for each in (model, inner))
    if whole.shape != alone.shape:
        return False
    return bool((whole - alone).abs().max() <= tolerance(weight.dtype) * alone.abs().max())


@measured
def adds_tokens(model: Any) -> bool:
    """Return whether a ``PeftModel`` puts virtual tokens before its input."""
    weight = model.get_base_model().get_input_embeddings().weight
    ids = torch.zeros(1, 8, dtype=torch.int64, device=weight.device)
    with _evaluating(model):
        return model(input_ids=ids, use_cache=False).logits.shape[1] > ids.shape[1]


def tolerance(dtype: torch.dtype) -> float:
    """Return the relative difference of logits that rounding explains."""
    return max(1e-5, 2 * torch.finfo(dtype).eps)


def sees_padding(model: Any, length: int) -> bool:
    """Return whether the number of tokens after a position changes a causal model's output there.

    So it does in sparse attention beyond its top k (ties between tokens fall by the length) and
    with rotary positions that change beyond some length. The beginning of a sequence of ``length``
    tokens is compared with shorter ones, relative to what rounding changes between a batch of one
    and of two. Ties are rare in a few tokens, so a ``topk`` among positions counts too. (Choices by
    ``sort`` show in the outputs only.) Where the device has no memory for it, the answer is True,
    with which every model's rows are right.

    Raises:
        ModelError: the model cannot run a sequence as long as its configuration says.
    """
    longest = max(1, length - max(1, length // 20))
    lengths = {min(8, longest), max(1, longest // 2), longest}
    vocabulary = model.get_input_embeddings().weight
    seeded = torch.Generator().manual_seed(0)
    ids = torch.randint(0, len(vocabulary), (1, length), generator=seeded).to(vocabulary.device)
    choices, outputs = [], []
    try:
        with _evaluating(model):
            for n in (length, *lengths):
                with _Choices() as chosen:
                    outputs.append(_output(model, ids[:, :n]))
                choices.append(set(chosen.sizes))
            twice = _output(model, ids[:, :longest].expand(2, -1))[:1]
    except (IndexError, RuntimeError) as error:
        if is_out_of_memory(error):
            return True
        raise ModelError(
            f"{type(model).__name__} cannot run a sequence of {n} tokens, which its configuration "
            f"allows ({error}); give a smaller --max_length"
        ) from error
    whole, *parts = outputs
    limit = 1e-4 if vocabulary.dtype == torch.float32 else 4 * torch.finfo(vocabulary.dtype).eps
    limit = max(limit, 3 * _difference(twice, whole[:, :longest]))
    return any(sizes != choices[0] for sizes in choices[1:]) or any(
        _difference(part, whole[:, : part.shape[1]]) > limit for part in parts
    )


def _difference(got: Tensor, want: Tensor) -> float:
    """Return the norm of the difference, relative to the norm of ``want``."""
    return ((got - want).norm() / want.norm().clamp_min(1e-30)).item()


class _Choices(TorchDispatchMode):
    """Context that notes from how many values each ``topk`` chooses fewer."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is torch.ops.aten.topk.default:
            values, k, dim = (*args, -1)[:3]
            if k < values.shape[dim]:
                self.sizes.append(values.shape[dim])
        return func(*args, **(kwargs or {}))


def _output(model: Any, ids: Tensor) -> Tensor:
    """Return the last hidden states, or the logits of a model whose body cannot run alone."""
    try:
        return getattr(model, "base_model", model)(input_ids=ids, use_cache=False)[0].float()
    except (TypeError, ValueError, KeyError, AttributeError):
        return model(input_ids=ids, use_cache=False)[0].float()
