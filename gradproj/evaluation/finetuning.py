"""Fine-tunes a checkpoint's upper blocks and head on parts of the documents, again and again.

The frozen blocks' outputs for all documents and queries are computed once: trainings and losses
begin above them.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradproj.errors import ConfigError
from gradproj.evaluation.config import LdsConfig
from gradproj.evaluation.corpus import PAD, Experiment
from gradproj.evaluation.losses import LOSS_BATCH, load, n_targets, summed_losses
from gradproj.training.config import TrainConfig
from gradproj.training.optimizer import make_optimizer, rate_at

AGREEMENT = 1e-3
"""Largest relative difference of a loss from replayed outputs, mean over a batch."""


class Replay:
    """Frozen blocks of a model, which compute their output or return a recorded one.

    No gradient passes them. ``given`` is the recorded output ``(n, S, H)`` or None, and ``taken``
    the last computed one.
    """

    def __init__(self, blocks: list[nn.Module]) -> None:
        self.given: Tensor | None = None
        self.taken: Tensor | None = None
        self._in_tuple = False
        for block in blocks:
            # On the instance, so that attributes that models read of their blocks stay.
            forward: Any = self._around(block.forward)
            block.forward = forward

    def _around(self, forward: Callable) -> Callable:
        def replayed(*arguments: Any, **options: Any) -> Any:
            if self.given is None:
                output = forward(*arguments, **options)
                self._in_tuple = isinstance(output, tuple)
                self.taken = (output[0] if self._in_tuple else output).detach()
                return (self.taken, *output[1:]) if self._in_tuple else self.taken
            return (self.given,) if self._in_tuple else self.given

        return replayed


class Finetuning:
    """A checkpoint with documents and queries, trained on subsets from the same weights.

    Args:
        config: the experiment's settings.
        experiment: its documents ``(N, S)`` and queries ``(Q, S)``.

    Raises:
        ConfigError: the model has fewer blocks than ``--train_layers``.
    """

    def __init__(self, config: LdsConfig, experiment: Experiment) -> None:
        assert experiment.start is not None
        self._config, self._n_documents = config, len(experiment.documents)
        self._tars, self._start = str(experiment.document_tars), str(experiment.start)
        self._model = load(experiment.start, config.device)
        self._device = next(self._model.parameters()).device
        self._texts = _stacked(experiment.documents, experiment.queries)
        self._targets = n_targets(self._texts)
        frozen = frozen_blocks(self._model, config.train_layers)
        if frozen:
            _untie_head(self._model)
        self._replay, self._states = Replay(frozen), list[Tensor]()
        self._train_what_the_loss_reaches()
        if frozen:
            self._record()
        trained = [p for p in self._model.parameters() if p.requires_grad]
        self._trained = [(p, p.detach().clone()) for p in trained]

    def losses_after(self, chosen: np.ndarray, seed: int) -> np.ndarray:
        """Train on the documents of ``chosen``, ``(N,)`` bool; return the queries' losses.

        They are mean nats per target token, ``(Q,)`` float64. ``seed`` orders the documents.
        """
        with torch.no_grad():
            for parameter, at_start in self._trained:
                parameter.copy_(at_start)
        self._train(np.flatnonzero(chosen), np.random.default_rng(seed))
        queries = np.arange(self._n_documents, len(self._texts))
        with torch.no_grad():
            parts = [self._losses(rows).double().cpu() for rows in _split(queries, LOSS_BATCH)]
        return torch.cat(parts).numpy() / self._targets[queries]

    def _train(self, documents: np.ndarray, order: np.random.Generator) -> None:
        config = self._config
        n_steps = max(1, config.epochs * len(documents) // config.batch_size)
        settings = self._settings(n_steps)
        optimizer = make_optimizer(self._model, settings)
        passes = [order.permutation(documents) for _ in range(config.epochs)]
        for step, rows in enumerate(_split(np.concatenate(passes), config.batch_size)[:n_steps]):
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * rate_at(step, settings)
            (self._losses(rows).sum() / int(self._targets[rows].sum())).backward()
            nn.utils.clip_grad_norm_([p for p, _ in self._trained], settings.clip)
            optimizer.step()
            optimizer.zero_grad()

    def _settings(self, n_steps: int) -> TrainConfig:
        warmup, rate = min(20, n_steps // 10), self._config.rate
        return TrainConfig(
            shards=self._tars, model=self._start, max_steps=n_steps, warmup_steps=warmup,
            learning_rate=rate,
        )  # fmt: skip

    def _losses(self, rows: np.ndarray) -> Tensor:
        """Return the summed losses of these texts, ``(n,)``."""
        states = [self._states[row] for row in rows] if self._states else []
        self._replay.given = nn.utils.rnn.pad_sequence(states, True) if states else None
        try:
            with self._autocast():
                return summed_losses(self._model, self._ids(rows))
        finally:
            self._replay.given = None

    def _ids(self, rows: np.ndarray) -> Tensor:
        longest = self._targets[rows].max() + 1
        return torch.from_numpy(self._texts[rows, :longest]).to(self._device)

    def _autocast(self) -> torch.autocast:
        enabled = self._config.model_dtype == "bfloat16"
        return torch.autocast(self._device.type, torch.bfloat16, enabled=enabled)

    def _train_what_the_loss_reaches(self) -> None:
        """Require gradients of the weights that a loss has gradients of, above frozen blocks."""
        self._model.requires_grad_(True)
        self._losses(np.arange(1)).sum().backward()
        for parameter in self._model.parameters():
            parameter.requires_grad_(parameter.grad is not None)
            parameter.grad = None

    @torch.no_grad()
    def _record(self) -> None:
        """Compute the frozen blocks' outputs of all texts, if the losses from them agree."""
        recorded: list[Tensor] = []
        batches = _split(np.arange(len(self._texts)), self._config.batch_size)
        for rows in batches:
            with self._autocast():
                self._model.base_model(input_ids=self._ids(rows).clamp(min=0), use_cache=False)
            assert self._replay.taken is not None
            lengths = (self._targets[rows] + 1).tolist()
            recorded += [x[:n].clone() for x, n in zip(self._replay.taken, lengths, strict=True)]
        whole = self._losses(batches[0])
        self._states = recorded
        replayed = self._losses(batches[0])
        if not (replayed - whole).abs().mean() <= AGREEMENT * whole.abs().mean():
            self._states = []  # the upper blocks read more than the frozen blocks' output


_MADE: dict[str, Finetuning] = {}
"""``--output_dir`` -> this process's one ``Finetuning``: loading and recording take a while."""


def finetuning_of(config: LdsConfig, experiment: Experiment) -> Finetuning:
    """Return the experiment's ``Finetuning``, made once in a process."""
    if config.output_dir not in _MADE:
        _MADE.clear()
        _MADE[config.output_dir] = Finetuning(config, experiment)
    return _MADE[config.output_dir]


def frozen_blocks(model: Any, n_trained: int) -> list[nn.Module]:
    """Return the blocks below the upper ``n_trained``; none if 0, which trains the whole model."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    blocks = list(lists[0]) if lists else []  # the outermost one comes first
    if n_trained > len(blocks):
        raise ConfigError(
            f"--train_layers {n_trained}: the model has {len(blocks)} blocks; 0 trains all of it"
        )
    return blocks[: len(blocks) - n_trained] if n_trained else []


def _untie_head(model: Any) -> None:
    """Give the head weights of its own: the embedding, which it may share, is below the blocks."""
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())


def _stacked(documents: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Join ``(N, S)`` and ``(Q, T)`` ids into ``(N + Q, max(S, T))``."""
    width = max(documents.shape[1], queries.shape[1])
    return np.concatenate(
        [
            np.pad(ids, ((0, 0), (0, width - ids.shape[1])), constant_values=PAD)
            for ids in (documents, queries)
        ]
    )


def _split(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[begin : begin + size] for begin in range(0, len(rows), size)]
