"""The check of a model before its first batch: rows are autograd's, and go with their samples.

A layer may do more with its weight than multiply, and a model may bring a batch's tokens into
another order before a layer sees them. Neither shows in a layer's type or in a tensor's shape, so
two short samples are tried.
"""

import functools
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from gradproj.engine.capture import ONLY_ALONE, BatchCapture, PlacedLayer
from gradproj.engine.compile import nothing_compiled
from gradproj.engine.inner_layers import ExpertsLayer
from gradproj.engine.layers import every_layer, unwrap, without_wrappers
from gradproj.engine.loss import per_sample_loss
from gradproj.engine.patterns import exclusions, folded
from gradproj.engine.targets import IGNORE, LOSS_WEIGHTS, loss_key
from gradproj.errors import MixedSamplesError, ModelError
from gradproj.kernels.memory import is_out_of_memory
from gradproj.model.loading import positions_of
from gradproj.model.packed_layers import PackedLinear

log = logging.getLogger(__name__)

LENGTHS = (9, 6)
"""Of the two samples. They differ from each other and from the number of samples."""

TRIES = 3
"""A layer is at fault if it is in every try: rounding may send a token to another expert."""

TOLERANCE, LOW_PRECISION_TOLERANCE = 0.05, 0.3
"""Of a layer's part of a row, relative to its length. Faults are of the size of the row."""

CAPACITIES = ("expert_capacity", "capacity_factor", "moe_eval_capacity_token_fraction")
"""Attributes of modules that limit how many of a batch's tokens an expert takes."""

FLOOR = 1e-3
"""Of the layers' median length: shorter parts are rounding errors or exactly zero."""


def check_rows(model: nn.Module, layers: list[PlacedLayer], capture: BatchCapture) -> None:
    """Try the attached engine with two short samples, alone and together.

    Leaves weights, gradients, flags, mode and random state as they are. Notes in ``capture`` why
    samples must run alone, in which case their rows are right, or why nothing was tried: token ids
    alone do not run the model, or its weights are sharded over ranks.

    Raises:
        ModelError: a layer's part of a row is not the projected gradient of its weight, or the
            device has no memory for the samples.
    """
    inner = unwrap(model)
    if not can_try(inner):
        capture.unchecked = "it is no whole model of transformers with values"
        return
    if limit := _capacity(inner):
        capture.only_alone = (
            f"{limit} drops tokens beyond a capacity, so a sample's row depends on its batch; "
            f"{ONLY_ALONE}"
        )
        return
    wrong = mixed = {layer.target.name for layer in layers}
    for attempt in range(TRIES):
        try:
            probe = _Probe(inner, layers, capture)
            with probe.running():
                ids, labels = short_samples(inner, LENGTHS, attempt)
                wrong = wrong & probe.not_autograds(ids[:1], labels[:1])
                if not wrong:
                    mixed = mixed & probe.not_exchanged(ids, labels)
        except MixedSamplesError as error:
            capture.only_alone = str(error)
            return
        except ModelError:
            raise
        except Exception as error:  # the model needs more than token ids
            refuse_without_memory(error, layers[0].p_i.device)
            log.warning("the rows of %s are not checked: %r", type(inner).__name__, error)
            capture.unchecked = repr(error)
            return
        if not wrong and not mixed:
            return
    found = [layer.target for layer in layers if layer.target.name in (wrong or mixed)]
    names = [target.name for target in found]
    unwanted = {name for target in found for name in target.uses}
    kept = [n for each in every_layer(without_wrappers(model)) for n in each.uses]
    way_out = ",".join(exclusions(names, [name for name in kept if name not in unwanted]))
    if wrong:
        raise ModelError(
            f"the model uses the weight of {shortened(names)} in another way than output = input "
            "W^T + b, so its gradient cannot be projected; leave it out of proj_layers, by adding "
            f"{way_out}"
        )
    capture.only_alone = (
        f"{shortened(names)} works on a batch's tokens in another order than the batch's (an "
        "expert, for example) or on an input that the batch shares, so its samples cannot be "
        f"separated; {ONLY_ALONE} (adding "
        f"{way_out} to proj_layers leaves it out)"
    )


def _capacity(model: nn.Module) -> str:
    """Return the name and value of a limit on an expert's tokens in a batch; empty without one."""
    for name, module in model.named_modules():
        for key in CAPACITIES:
            value = getattr(module, key, None)
            if isinstance(value, int | float) and value > 0:
                return f"{name}.{key} = {value}"
    return ""


def refuse_without_memory(error: Exception, device: torch.device) -> None:
    """Raise ``ModelError`` if ``error`` left a model unchecked that memory would have checked."""
    if is_out_of_memory(error):
        raise ModelError(
            f"{device} has no memory to check the model with samples of {LENGTHS[0]} tokens: free "
            "memory there, or choose another device"
        ) from error


def can_try(model: nn.Module) -> bool:
    """Return whether a few tokens can be run: by a model of transformers, whole and with values."""
    return hasattr(model, "config") and not any(
        # FSDP's parameters.
        p.is_meta or hasattr(p, "device_mesh") or hasattr(p, "_local_shard")
        for p in model.parameters()
    )


def short_samples(model: Any, lengths: Sequence[int], seed: int) -> tuple[Tensor, Tensor]:
    """Return random ids and labels ``(N, S)`` of samples of these lengths."""
    weight = model.get_input_embeddings().weight
    n_tokens = min(max(lengths), positions_of(model) or max(lengths))
    seeded = torch.Generator().manual_seed(seed)
    shape = len(lengths), n_tokens
    ids = torch.randint(0, weight.shape[0], shape, generator=seeded).to(weight.device)
    labels = ids.clone()
    for n, length in enumerate(lengths):
        labels[n, length:] = IGNORE
    return ids, labels


@contextmanager
def trial_mode(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Run the model in eval mode, uncompiled, with gradients on; restore mode and random state."""
    modes = [(module, module.training) for module in model.modules()]
    random = torch.random.fork_rng([device] if device.type == "cuda" else [])
    try:
        model.eval()
        full_precision = torch.autocast(device.type, enabled=False)
        with torch.enable_grad(), full_precision, random, nothing_compiled():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def tolerance_of(model: nn.Module) -> float:
    """Return the largest relative error that rounding explains."""
    low = next(model.parameters()).element_size() < 4
    return LOW_PRECISION_TOLERANCE if low else TOLERANCE


def shortened(names: Sequence[str]) -> str:
    """Join names for a message, the first five of many."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


class _Probe:
    """Runs samples through the engine and, for the gradients of whole weights, through autograd."""

    def __init__(self, model: nn.Module, layers: list[PlacedLayer], capture: BatchCapture) -> None:
        self._model, self._layers, self._capture = model, layers, capture
        self._references: dict[str, Tensor] = {}
        self._other_experts: set[str] = set()
        users: dict[int, set[int]] = {}
        for module in model.modules():
            for parameter in module._parameters.values():
                users.setdefault(id(parameter), set()).add(id(module))
        self._weights: dict[str, Tensor] = {}
        self._packed: dict[str, tuple[str, PackedLinear]] = {}
        for layer in layers:
            name, module = layer.target.name, layer.target.module
            if isinstance(module, PackedLinear):
                # One of each kind: a copy of every weight is what packed layers spare.
                self._packed.setdefault(folded(name), (name, module))
                continue
            weight = layer.target.weight
            # Of a head tied to the embedding, autograd gives the sum of two layers.
            if weight is not None and users[id(weight)] <= set(map(id, layer.target.holders)):
                self._weights[name] = weight

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let exactly the layers' weights require a gradient, and other engines not take part."""
        with ExitStack() as stack:
            stack.enter_context(trial_mode(self._model, self._layers[0].p_i.device))
            for parameter in self._model.parameters():
                stack.callback(parameter.requires_grad_, parameter.requires_grad)
                parameter.requires_grad_(False)
            for name, packed in self._packed.values():
                self._weights[name] = stack.enter_context(packed.unpacked())
            layers_of: dict[Tensor, list[PlacedLayer]] = {}  # experts share a parameter
            for layer in self._layers:
                if layer.target.name in self._weights:
                    layers_of.setdefault(self._weights[layer.target.name], []).append(layer)
            for weight, layers in layers_of.items():
                weight.requires_grad_(True)
                hook = functools.partial(self._take_references, layers)
                stack.callback(weight.register_hook(hook).remove)
            for layer in self._layers:
                if isinstance(layer.target.module, ExpertsLayer):
                    compare = functools.partial(self._compare_experts, layer.target.name)
                    host = layer.target.module.host
                    stack.callback(host.register_forward_hook(compare, with_kwargs=True).remove)
            # A mask that waits for the first batch has that batch's shape.
            stack.callback(setattr, self._capture, "token_mask", self._capture.token_mask)
            self._capture.token_mask = None
            stack.callback(setattr, BatchCapture, "probed", BatchCapture.probed)
            BatchCapture.probed = self._capture
            stack.callback(LOSS_WEIGHTS.pop, loss_key(self._model), None)
            stack.callback(self._capture.forget)
            yield

    def not_autograds(self, ids: Tensor, labels: Tensor) -> set[str]:
        """Return the layers whose part of a sample's row differs from autograd's."""
        self._other_experts.clear()
        parts = self._parts(ids, labels)
        different = self._different(parts, {n: x[None] for n, x in self._references.items()})
        return different | self._other_experts

    def not_exchanged(self, ids: Tensor, labels: Tensor) -> set[str]:
        """Return the layers whose parts are not one a sample, or do not go with the samples."""
        self._capture.mixed.clear()
        parts = self._parts(ids, labels)
        if self._capture.mixed:
            return set(self._capture.mixed)
        exchanged = self._parts(ids.flip(0), labels.flip(0))
        return self._different(parts, {name: x.flip(0) for name, x in exchanged.items()})

    def _parts(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return each layer's part ``(N, k_o, k_i)`` of the rows."""
        batch = {"input_ids": ids, "labels": labels}
        losses = per_sample_loss(self._model, batch, causal=False)
        parts = self._capture.parts_of(losses.sum(), list({*self._weights.values()}))
        self._capture.forget()
        return {self._layers[i].target.name: part for i, part in parts.items()}

    def _take_references(self, layers: list[PlacedLayer], gradient: Tensor) -> Tensor:
        """Project a weight's gradient, and replace it by one without memory."""
        for layer in layers:
            found = layer.target.gradient_of(gradient)
            self._references[layer.target.name] = layer.p_o @ found @ layer.p_i.t()
        return gradient.new_zeros(()).expand_as(gradient)

    @torch.no_grad()
    def _compare_experts(
        self, name: str, host: nn.Module, args: tuple, kwargs: dict, output: Any
    ) -> None:
        """Note a layer whose module computes something else without its ``InnerLayer``."""
        with suppress(RuntimeError):  # torch's grouped product refuses some widths and dtypes
            want = type(host).forward(host, *args, **kwargs)
            got, want = (x[0] if isinstance(x, tuple) else x for x in (output, want))
            if not (got - want).norm() <= tolerance_of(self._model) * want.norm():
                self._other_experts.add(name)

    def _different(self, got: dict[str, Tensor], want: dict[str, Tensor]) -> set[str]:
        names = sorted(got.keys() & want.keys())  # an expert may get no token
        if not names:
            return set()
        norms = torch.stack([want[name].flatten(1).norm(dim=1) for name in names])
        errors = torch.stack([(got[name] - want[name]).flatten(1).norm(dim=1) for name in names])
        known = norms.isfinite()  # random tokens may overflow in the model itself
        floor = FLOOR * norms[known].median()  # NaN if nothing is known, and then nothing is wrong
        limits = tolerance_of(self._model) * norms.clamp_min(floor)
        wrong = (known & ~(errors <= limits)).any(dim=1).tolist()
        return {name for name, is_wrong in zip(names, wrong, strict=True) if is_wrong}
