"""The check of a model before its first batch: rows are autograd's, and go with their samples.

A layer may do more with its weight than multiply, and a model may bring a batch's tokens into
another order before a layer sees them. Neither shows in a layer's type or in a tensor's shape, so
two short samples are tried.
"""

import functools
import logging
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from gradproj.engine.capture import ONLY_ALONE, BatchCapture, PlacedLayer
from gradproj.engine.compile import nothing_compiled
from gradproj.engine.loss import IGNORE, LOSS_WEIGHTS, loss_key, per_sample_loss, unwrap
from gradproj.errors import MixedSamplesError, ModelError
from gradproj.model.loading import positions_of

log = logging.getLogger(__name__)

LENGTHS = (9, 6)
"""Of the two samples. They differ from each other and from the number of samples."""

TRIES = 3
"""A layer is at fault if it is in every try: rounding may send a token to another expert."""

TOLERANCE, LOW_PRECISION_TOLERANCE = 0.01, 0.3
"""Of a layer's part of a row, relative to its length. Faults are of the size of the row."""

FLOOR = 1e-3
"""Of the layers' median length: shorter parts are rounding errors or exactly zero."""


def check_rows(model: nn.Module, layers: list[PlacedLayer], capture: BatchCapture) -> str:
    """Try the attached engine with two short samples, alone and together.

    Leaves weights, gradients, flags, mode and random state as they are. Does nothing for a model
    that token ids alone do not run.

    Returns:
        The reason why samples must run alone, in which case their rows are right; else empty.

    Raises:
        ModelError: a layer's part of a row is not the projected gradient of its weight.
    """
    inner = unwrap(model)
    if not hasattr(inner, "config") or layers[0].p_i.device.type == "meta":
        return ""
    wrong = mixed = {layer.target.name for layer in layers}
    for attempt in range(TRIES):
        try:
            with _Probe(inner, layers, capture) as probe:
                ids, labels = _two_samples(inner, attempt)
                wrong = wrong & probe.not_autograds(ids[:1], labels[:1])
                if not wrong:
                    mixed = mixed & probe.not_exchanged(ids, labels)
        except MixedSamplesError as error:
            return str(error)
        except ModelError:
            raise
        except Exception as error:  # the model needs more than token ids
            log.info("the rows of %s are not checked: %r", type(inner).__name__, error)
            return ""
        if not wrong and not mixed:
            return ""
    if wrong:
        raise ModelError(
            f"--proj_layers: {_listed(wrong)}: the model uses the weight in another way than "
            "output = input W^T + b, so its gradient cannot be projected; leave it out"
        )
    return (
        f"{_listed(mixed)}: works on a batch's tokens in another order than the batch's (an "
        f"expert, for example), so its samples cannot be separated; {ONLY_ALONE}"
    )


def _two_samples(model: nn.Module, seed: int) -> tuple[Tensor, Tensor]:
    """Return ids and labels ``(2, S)`` of two samples of different lengths."""
    weight = model.get_input_embeddings().weight  # type: ignore[operator]
    n_tokens = min(LENGTHS[0], positions_of(model.config) or LENGTHS[0])
    seeded = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, weight.shape[0], (2, n_tokens), generator=seeded).to(weight.device)
    labels = ids.clone()
    labels[1, LENGTHS[1] :] = IGNORE
    return ids, labels


def _listed(names: set[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(sorted(names)[:5]) + more


class _Probe:
    """Context in which exactly the layers' weights require a gradient, in eval mode."""

    def __init__(self, model: nn.Module, layers: list[PlacedLayer], capture: BatchCapture) -> None:
        self._model, self._layers, self._capture = model, layers, capture
        self._context = ExitStack()
        self._references: dict[str, Tensor] = {}
        users: dict[int, set[int]] = {}
        for module in model.modules():
            for parameter in module._parameters.values():
                users.setdefault(id(parameter), set()).add(id(module))
        self._weights: dict[str, nn.Parameter] = {}
        for layer in layers:
            weight = layer.target.module._parameters.get("weight")
            # Of a head tied to the embedding, autograd gives the sum of two layers.
            if weight is not None and users[id(weight)] <= set(map(id, layer.target.uses.values())):
                self._weights[layer.target.name] = weight

    def __enter__(self) -> "_Probe":
        for owner, attribute in (
            *((parameter, "requires_grad") for parameter in self._model.parameters()),
            *((module, "training") for module in self._model.modules()),
        ):
            self._context.callback(setattr, owner, attribute, getattr(owner, attribute))
            setattr(owner, attribute, False)
        for layer in self._layers:
            weight = self._weights.get(layer.target.name)
            if weight is not None:
                weight.requires_grad_(True)
                hook = functools.partial(self._take_reference, layer)
                self._context.callback(weight.register_hook(hook).remove)
        self._context.callback(setattr, BatchCapture, "probed", BatchCapture.probed)
        BatchCapture.probed = self._capture
        device = self._layers[0].p_i.device
        self._context.enter_context(torch.enable_grad())
        self._context.enter_context(nothing_compiled())
        self._context.enter_context(
            torch.random.fork_rng([device] if device.type == "cuda" else [])
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._capture.forget()
        LOSS_WEIGHTS.pop(loss_key(self._model), None)
        self._context.close()

    def not_autograds(self, ids: Tensor, labels: Tensor) -> set[str]:
        """Return the layers whose part of a sample's row differs from autograd's."""
        parts = self._parts(ids, labels)
        return self._different(parts, {n: x[None] for n, x in self._references.items()})

    def not_exchanged(self, ids: Tensor, labels: Tensor) -> set[str]:
        """Return the layers whose parts do not exchange places with the samples."""
        parts = self._parts(ids, labels)
        exchanged = self._parts(ids.flip(0), labels.flip(0))
        return self._different(parts, {name: x.flip(0) for name, x in exchanged.items()})

    def _parts(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return each layer's part ``(N, k_o, k_i)`` of the rows."""
        batch = {"input_ids": ids, "labels": labels}
        losses = per_sample_loss(self._model, batch, causal=False)
        parts = self._capture.parts_of(losses.sum(), list(self._weights.values()))
        self._capture.forget()
        return {self._layers[i].target.name: part for i, part in parts.items()}

    def _take_reference(self, layer: PlacedLayer, gradient: Tensor) -> Tensor:
        """Project a weight's gradient, and replace it by one without memory."""
        out_by_in = gradient if layer.target.rule.type_name == "Linear" else gradient.t()
        self._references[layer.target.name] = layer.p_o @ out_by_in.float() @ layer.p_i.t()
        return gradient.new_zeros(()).expand_as(gradient)

    def _different(self, got: dict[str, Tensor], want: dict[str, Tensor]) -> set[str]:
        norms = {name: want[name].flatten(1).norm(dim=1) for name in got.keys() & want.keys()}
        if not norms:
            return set()
        floor = FLOOR * torch.stack([norm.max() for norm in norms.values()]).median()
        low = next(self._model.parameters()).dtype != torch.float32
        tolerance = LOW_PRECISION_TOLERANCE if low else TOLERANCE
        return {
            name
            for name, norm in norms.items()
            if bool(
                (
                    (got[name] - want[name]).flatten(1).norm(dim=1)
                    > tolerance * norm.clamp_min(float(floor))
                ).any()
            )
        }
