"""Parts of scores by token and by layer: inner products of a text's row, before it is summed.

A row is a sum over the text's positions, so its inner product with a matrix M is too:

    <M, R_o P_o G P_i^T R_i^T> = sum_t (P_o g_t)^T K (P_i a_t),   K = R_o^T M R_i   (k_o x k_i)

Position t has the input of token t, and ``g_t`` is the gradient of the losses of all tokens after
it: those that attend to position t, and token t + 1, which it predicts. No row of a single token
exists: what is held for a text of S tokens and m matrices are ``(S, m, k_i)`` values of one layer,
some at a time.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from gradproj.engine.batching import BatchConfig, collate, fit_padding, plan_batches
from gradproj.engine.engine import GradProjLoraEngine
from gradproj.engine.inner_layers import ExpertsLayer
from gradproj.engine.matrix_file import Matrices
from gradproj.engine.run_batch import run_batch, run_in_halves
from gradproj.errors import ModelError
from gradproj.model.sequences import TokenSequence

_TOKENS_AT_ONCE = 2**9
"""Most tokens of a batch on the CPU, where larger ones are no faster, and others wait longer for
the model."""
_VALUES_AT_ONCE = 2**22
"""Values of ``(S, m, k_i)`` at once, in float64: 34 MB."""


@dataclass(frozen=True)
class SplitTexts:
    """Texts' inner products with matrices, split; of O owners of sequences."""

    parts: list[np.ndarray]
    """Of each sequence, ``(m, S)`` float64: of its owner's m matrices, by position."""
    layers: list[np.ndarray]
    """Of each owner, ``(m, L)`` float64: by layer."""
    rows: np.ndarray
    """``(O, D)`` float32: the owners' whole rows, of summed losses."""


def pulled_back(
    weights: Tensor, columns: Mapping[str, slice], basis: Matrices | None
) -> dict[str, Tensor]:
    """Return each layer's ``K (m, k_o * k_i)`` float32 of matrices in a basis.

    Args:
        weights: ``(m, W)``, of the layers of ``columns``.
        columns: layer -> its values in ``weights``.
        basis: layer -> ``(R_i, R_o)``; None if rows are in none.
    """
    found = {}
    for name, span in columns.items():
        part = weights[:, span].double()
        if basis is not None:
            r_i, r_o = (torch.from_numpy(np.array(r)).double() for r in basis[name])
            part = (r_o.mT @ part.view(-1, len(r_o), len(r_i)) @ r_i).flatten(1)
        found[name] = part.float()
    return found


def split_texts(
    model: nn.Module,
    engine: GradProjLoraEngine,
    sequences: Sequence[TokenSequence],
    matrices: Mapping[str, Tensor],
    chosen: Sequence[np.ndarray],
    batch: BatchConfig,
    turn: Callable[[], AbstractContextManager[None]] = nullcontext,
    done: Callable[[int], None] = lambda n: None,
) -> SplitTexts:
    """Run texts forward and backward once, and split their inner products with matrices.

    Args:
        model: frozen.
        engine: of the model, with the rows' projections, not attached.
        sequences: of all texts; owners are 0 to O - 1.
        matrices: layer -> ``K (M, k_o * k_i)``; layers that it lacks have no part.
        chosen: for each owner the numbers ``(m,)`` of its matrices.
        batch: the job's batch settings.
        turn: entered around each use of the model; in between others may use model and engine.
        done: called between batches with the number of sequences of the last one.

    Raises:
        ModelError: a layer's positions are not those of the tokens, or the device has no memory
            for a single sequence.
    """
    lengths = list(map(len, sequences))
    budget = batch.batch_tokens or BatchConfig().batch_tokens
    if next(model.parameters()).device.type == "cpu":
        budget = min(budget, _TOKENS_AT_ONCE)
    padding = batch.max_padding
    if len(set(lengths)) > 1:
        with turn():
            padding = fit_padding(model, batch, max(lengths)).max_padding
    pass_ = _Pass(model, engine, sequences, matrices, chosen)
    parts: list[np.ndarray] = [np.empty(0)] * len(sequences)
    layers = [np.zeros((len(numbers), len(matrices))) for numbers in chosen]
    rows = np.zeros((len(chosen), engine.total_proj_dim), np.float32)
    for planned in plan_batches(lengths, batch.batch_size, budget, padding):
        with turn(), engine:
            if engine.only_alone:
                raise ModelError(f"the parts of tokens are not known: {engine.only_alone}")
            results = list(run_in_halves(engine, planned, pass_.run))
        for numbers, result in results:
            if result is None:
                raise ModelError(
                    f"a text of {lengths[numbers[0]]:,} tokens does not fit the device's "
                    "memory: try --device cpu, or leave --tokens out"
                )
            for number, (of_tokens, of_layers, row) in zip(numbers, result, strict=True):
                owner, factor = sequences[number].owner, sequences[number].factor
                parts[number] = of_tokens * factor
                layers[owner] += of_layers * factor
                rows[owner] += row
            done(len(numbers))
    return SplitTexts(parts, layers, rows)


_Result = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Of a sequence: parts by position ``(m, S)`` and by layer ``(m, L)``, without its factor, and its
row ``(D,)`` with it."""


class _Pass:
    """The model, texts and matrices that all batches share."""

    def __init__(
        self,
        model: nn.Module,
        engine: GradProjLoraEngine,
        sequences: Sequence[TokenSequence],
        matrices: Mapping[str, Tensor],
        chosen: Sequence[np.ndarray],
    ) -> None:
        self._model, self._engine, self._sequences = model, engine, sequences
        self._device = next(model.parameters()).device
        self._matrices = {
            number: (place, matrices[layer.name])
            for place, name in enumerate(matrices)
            for number, layer in enumerate(engine.targets)
            if layer.name == name
        }
        self._n_layers = len(matrices)
        self._chosen = [torch.from_numpy(numbers) for numbers in chosen]

    def run(self, numbers: np.ndarray) -> list[_Result]:
        """Run some sequences as one batch."""
        found = [self._sequences[i] for i in numbers]
        sizes = [len(self._chosen[sequence.owner]) for sequence in found]
        zero = torch.zeros((), dtype=torch.float64, device=self._device)
        of_tokens = [zero.new_zeros(m, len(x)) for m, x in zip(sizes, found, strict=True)]
        of_layers = [zero.new_zeros(m, self._n_layers) for m in sizes]

        def visit(index: int, a: Tensor, g: Tensor) -> None:
            if index not in self._matrices:
                return
            place, matrix = self._matrices[index]
            slots = self._slots(index, a.shape[1], width)
            for n, sequence in enumerate(found):
                span = slice(len(sequence) * slots)
                used = matrix[self._chosen[sequence.owner]].to(self._device)
                products = token_products(a[n, span], g[n, span], used)
                products = products.view(len(used), len(sequence), slots).sum(dim=2)
                of_tokens[n] += products
                of_layers[n][:, place] += products.sum(dim=1)

        batch = collate(self._sequences, numbers).to(self._device)
        width = batch.input_ids.shape[1]
        self._engine.watch(visit)
        try:
            rows, _ = run_batch(self._model, self._engine, batch)
        finally:
            self._engine.watch(None)
        self._engine.take_token_covariances()  # nobody asks for them
        tensors = zip(of_tokens, of_layers, rows, strict=True)
        return [tuple(x.cpu().numpy() for x in each) for each in tensors]  # type: ignore[misc]

    def _slots(self, index: int, n_positions: int, width: int) -> int:
        """Return how many positions of a layer a token has: the experts that it is routed to."""
        layer = self._engine.targets[index]
        slots, rest = divmod(n_positions, width)
        if rest or (slots != 1 and not isinstance(layer.module, ExpertsLayer)):
            raise ModelError(
                f"layer {layer.name} works on {n_positions:,} positions for {width:,} tokens, so "
                f"the parts of tokens are not known: leave it out by --layers -{layer.name}"
            )
        return slots


def token_products(a: Tensor, g: Tensor, matrices: Tensor) -> Tensor:
    """Return ``g_t^T K a_t`` for ``a (S, k_i)``, ``g (S, k_o)`` and ``K (m, k_o * k_i)``.

    ``(m, S)`` float64.
    """
    (n_positions, k_i), k_o = a.shape, g.shape[1]
    a, g, step = a.double(), g.double(), max(1, _VALUES_AT_ONCE // (n_positions * k_i))
    parts = []
    for some in matrices.split(step):
        side_by_side = some.double().view(-1, k_o, k_i).transpose(0, 1).reshape(k_o, -1)
        left = (g @ side_by_side).view(n_positions, len(some), k_i)
        parts.append((left * a[:, None]).sum(dim=2).T)
    return torch.cat(parts) if parts else a.new_zeros(0, n_positions)
