"""``GradProjLoraEngine``: hooks on a model's layers that yield every sample's projected gradient.

The forward hook of a target layer projects its input at once and keeps only that (``k_i`` wide).
During the backward pass the gradient at the layer's output is projected and summed with it over the
sample's tokens. No weight gradient and no full-width activation exists. With frozen weights the
graph starts at the first target layer, so nothing below it is differentiated.

Source of the maths: LoGra, arXiv:2405.13954.
"""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradproj.engine.basis import RowBasis
from gradproj.engine.capture import (
    BatchCapture,
    StartGraph,
    TokenCovariances,
    TokenVisit,
    batch_shape,
    place_layers,
)
from gradproj.engine.compiled_capture import CompiledCapture
from gradproj.engine.coverage import Coverage, coverage_of
from gradproj.engine.frozen_model import FrozenModel
from gradproj.engine.inner_layers import Routes
from gradproj.engine.layers import TargetLayer, unwrap
from gradproj.engine.matrix_file import Matrices
from gradproj.engine.original_interface import OriginalInterface
from gradproj.engine.patterns import ALL
from gradproj.engine.projection import ProjectionConfig
from gradproj.engine.projection_files import RowBuffer, row_dtype
from gradproj.engine.row_check import check_rows
from gradproj.engine.targets import LOSS_WEIGHTS, loss_key
from gradproj.errors import ConfigError, GradprojError, ModelError
from gradproj.flags import flag_of


class GradProjLoraEngine(OriginalInterface):
    """Per-sample projected gradients ``P_o (sum_t g_t a_t^T) P_i^T`` of a model's layers.

    Use it as a context manager, or call ``attach`` and ``detach``. Both leave the model, its
    ``requires_grad`` flags, its training mode and the global random state as they were::

        with GradProjLoraEngine(model, freeze_weights=True) as engine:
            per_sample_loss(model, batch).sum().backward()
            rows = engine.collect_batch()          # (B, D)

    A row is the gradient of the sample's own summed loss. ``per_sample_loss`` reports how the
    losses were weighted; with another loss, pass the weighting to ``attach_train_batch(..., labels,
    loss_reduction=)``.

    Args:
        module: the model, on its device.
        proj_layers: roles, or patterns of layers' names, as ``--proj_layers``.
        proj_rank_total: most values kept per layer; or by patterns, as the flag.
        proj_rank_min: least width on a side.
        proj_seed: seed of the matrices.
        proj_dtype: dtype of the returned rows (``"float32"`` or a torch dtype).
        proj_dir: where ``collect_batch`` and ``save_projections`` write ``.pt`` files.
        proj_kind: rademacher, gaussian or orthonormal.
        include_embeddings: project the token embedding too (of a tied head, the lookup's share).
        experts: as the flag: joint, separate or none.
        proj_save_interval: with ``proj_dir``, write the rows of so many batches at a time.
        freeze_weights: while attached, no weight has a gradient; eval mode. Fast, without training.
        matrices: layer -> ``(P_i, P_o)``, tensors or arrays, to use instead of drawing them.
        basis: layer -> ``(R_i, R_o)``, for rows of ``R_o (P_o G P_i^T) R_i^T`` (``basis.py``).
        token_covariances: sum ``TokenCovariances`` as well.
        gradient_checkpointing: with ``freeze_weights``: keep only the inputs of the model's blocks
            and run each block again in the backward pass, for the same rows in less memory.
        compiled: with ``freeze_weights``: run blocks and projections through ``torch.compile``.

    Raises:
        ModelError: no such layer, or one of an unsupported type.
        ConfigError: an impossible width, dtype or kind.
    """

    def __init__(
        self,
        module: nn.Module,
        proj_layers: str | Sequence[str] = ALL,
        proj_rank_total: str | int = 256,
        proj_rank_min: int = 8,
        proj_seed: int = 42,
        proj_dtype: str | torch.dtype = torch.float32,
        proj_dir: str | Path | None = None,
        *,
        proj_kind: str = "rademacher",
        include_embeddings: bool = False,
        experts: str = "joint",
        proj_save_interval: int = 1,
        freeze_weights: bool = False,
        matrices: Matrices | None = None,
        basis: Matrices | None = None,
        token_covariances: bool = False,
        gradient_checkpointing: bool = False,
        compiled: bool = False,
    ) -> None:
        names = proj_layers if isinstance(proj_layers, str) else ",".join(proj_layers)
        config = ProjectionConfig(
            layers=names, rank_total=proj_rank_total, rank_min=proj_rank_min, seed=proj_seed,
            kind=proj_kind, include_embeddings=include_embeddings, experts=experts,
        )  # fmt: skip
        self.module = module
        self.proj_dtype = row_dtype(proj_dtype)
        self.proj_dir = None if proj_dir is None else Path(proj_dir)
        self.proj_save_interval = proj_save_interval
        if compiled and not freeze_weights:
            raise ConfigError(
                "compiled=True needs freeze_weights=True: training compiles the model itself"
            )
        self._freeze, self._compiled = freeze_weights, compiled
        self._checkpoint = gradient_checkpointing
        self._layers = place_layers(module, config, matrices)
        self._basis = None if basis is None else RowBasis(self._layers, basis)
        capture_type = CompiledCapture if compiled else BatchCapture
        self._capture = capture_type(self._layers, token_covariances)
        self._covariances = TokenCovariances.zeros(self._layers) if token_covariances else None
        self._loss_key = loss_key(module)
        self._root = torch.zeros((), device=self._layers[0].p_i.device, requires_grad=True)
        self._handles: list[Any] = []
        self._frozen: FrozenModel | None = None
        self._checked, self._unsaved = False, RowBuffer()

    @classmethod
    def from_config(
        cls,
        module: nn.Module,
        config: ProjectionConfig,
        matrices: Matrices | None = None,
        gradient_checkpointing: bool = False,
        compiled: bool = False,
        basis: Matrices | None = None,
    ) -> "GradProjLoraEngine":
        """Return an engine for the job: weights frozen; without a basis, covariances summed."""
        # The flags of the configuration are the arguments' names.
        flags = fields(ProjectionConfig)
        projection = {flag_of(field): getattr(config, field.name) for field in flags}
        projection["proj_rank_total"] = str(config.rank_totals)  # with the job's default
        return cls(
            module,
            **projection,
            matrices=matrices,
            basis=basis,
            freeze_weights=True,
            token_covariances=basis is None,
            gradient_checkpointing=gradient_checkpointing,
            compiled=compiled,
        )

    # --- layers and matrices ---

    @property
    def projection_matrices(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Layer -> ``(P_i (k_i, n_i), P_o (k_o, n_o))``, float32, on the model's device."""
        return {layer.target.name: (layer.p_i, layer.p_o) for layer in self._layers}

    @property
    def slice_ranges(self) -> dict[str, tuple[int, int]]:
        """Layer -> first and last + 1 column of its ``k_o x k_i`` values (row-major) in a row."""
        return {each.target.name: (each.columns.start, each.columns.stop) for each in self._layers}

    @property
    def total_proj_dim(self) -> int:
        """D, the length of a row."""
        return self._layers[-1].columns.stop

    @property
    def targets(self) -> list[TargetLayer]:
        return [layer.target for layer in self._layers]

    @property
    def coverage(self) -> Coverage:
        """The part of the blocks' linear layers that is projected, and what is left out."""
        return coverage_of(self.module, self.targets)

    @property
    def is_attached(self) -> bool:
        return bool(self._handles)

    @property
    def only_alone(self) -> str:
        """Why the engine refuses batches of several samples; empty if it does not."""
        return self._capture.only_alone

    @property
    def unchecked(self) -> str:
        """Why ``attach`` could not check the model's rows; empty if it could."""
        return self._capture.unchecked

    # --- attach and detach ---

    def attach(self) -> "GradProjLoraEngine":
        """Register the hooks, and check the rows of two short samples the first time.

        A second call does nothing.

        Raises:
            ModelError: the model uses a layer's weight in a way that the engine does not know, or
                the device has no memory for the check.
        """
        if self._handles:
            return self
        if self._freeze:
            self._frozen = FrozenModel(self.module, self._checkpoint, self._compiled)
        self._handles = [self.module.register_forward_pre_hook(self._on_batch, with_kwargs=True)]
        inner = unwrap(self.module)
        body = getattr(inner, "base_model", inner)
        if body is not self.module:
            # per_sample_loss calls the body and not the whole model.
            self._handles.append(body.register_forward_pre_hook(self._on_batch, with_kwargs=True))
        for index, layer in enumerate(self._layers):
            hook = self._forward_hook(index)
            self._handles.append(Routes(layer.target.uses.values()))
            for use in layer.target.uses.values():
                self._handles.append(use.register_forward_hook(hook, with_kwargs=True))
        if not self._checked:
            try:
                check_rows(self.module, self._layers, self._capture)
            except BaseException:
                self.detach()
                raise
            self._checked = True
        return self

    def detach(self) -> None:
        """Remove the hooks and restore the model."""
        for handle in self._handles:
            handle.remove()
        if self._frozen is not None:
            self._frozen.undo()
        self._handles, self._frozen = [], None
        self.clear_gradients()

    def __enter__(self) -> "GradProjLoraEngine":
        return self.attach()

    def __exit__(self, *_: object) -> None:
        self.cleanup()

    # --- hooks ---

    def _on_batch(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Note the batch's shape, to separate the samples in layers that get them flattened."""
        if self._capture.is_ignoring():
            return
        given = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        inputs = next((x for x in given if x is not None), None)
        self._capture.begin(batch_shape(inputs))
        LOSS_WEIGHTS.pop(self._loss_key, None)

    def _forward_hook(self, index: int) -> Any:
        capture = self._capture
        if isinstance(capture, CompiledCapture):
            return capture.hooks[index]

        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
            if capture.is_ignoring():
                return None
            a_p, serial = capture.project_input(index, module, args, kwargs), capture.serial
            if not output.requires_grad:
                output = StartGraph.apply(output.detach(), self._root)
            output.register_hook(lambda g: capture.take_gradient(serial, index, a_p, g))
            return output

        return hook

    # --- rows ---

    def watch(self, visit: TokenVisit | None) -> None:
        """Show the layers' projected tokens in each backward pass to a function; None ends it."""
        self._capture.visit = visit

    def set_token_mask(self, mask: Tensor | None) -> None:
        """Set the next batch's ``(N, S)`` mask: 1 at the tokens that ``TokenCovariances`` sums."""
        self._capture.token_mask = mask

    def collect_batch(self, batch_indices: Any = None) -> Tensor:
        """Return the rows of the batch whose backward pass has just run.

        Args:
            batch_indices: the samples' ids, written to the files if there is a ``proj_dir``.

        Returns:
            ``(B, D)`` in ``proj_dtype``, on the model's device; computed in float32.

        Raises:
            ModelError: no backward pass ran, a layer took no part, or the loss's weighting is
                unknown.
        """
        weighted = self._capture.rows()
        weights = self._loss_weights(weighted)
        # Allocate everything before the sums change: a batch that fails is retried in halves.
        # A sample whose loss had the weight 0 left no gradient to divide: its row is 0.
        rows = torch.where(weights == 0, 0.0, weighted / weights)
        rows = (rows if self._basis is None else self._basis.transform(rows)).to(self.proj_dtype)
        if self._covariances is not None:
            self._covariances.add(self._capture.covariances(weighted, weights))
        if self.proj_dir is not None:
            self._unsaved.add(rows, batch_indices)
            if len(self._unsaved) >= self.proj_save_interval:
                self.save_projections()
        self.clear_gradients()
        return rows

    def take_token_covariances(self) -> TokenCovariances | None:
        """Return the sums since the last call and start from zero; None if nothing is summed."""
        taken = self._covariances
        if taken is not None:
            self._covariances = TokenCovariances.zeros(self._layers)
        return taken

    def _loss_weights(self, rows: Tensor) -> Tensor:
        """Return ``(B, 1)`` or a scalar: the factor on each sample's loss before backward."""
        announced = LOSS_WEIGHTS.pop(self._loss_key, None)
        if announced is not None:
            return announced.values.to(rows).unsqueeze(1)
        if self._loss_factor is None:
            raise ModelError(
                "the engine does not know how the loss was reduced over the batch: use "
                "per_sample_loss(model, batch).sum(), or pass it by "
                "attach_train_batch(X, Y, iter_num, labels=labels, loss_reduction='mean' or 'sum')"
            )
        weight, self._loss_factor = self._loss_factor, None
        # new_full makes the number on the device; a copy from the host would wait.
        return weight.to(rows) if isinstance(weight, Tensor) else rows.new_full((), weight)

    def clear_gradients(self) -> None:
        """Drop a batch that was not collected."""
        self._capture.forget()
        self._capture.token_mask = None

    def save_projections(self, iter_num: int | None = None) -> Path | None:
        """Write all rows since the last write to one ``proj_iter_*.pt`` file. None without rows."""
        if self._unsaved and self.proj_dir is None:
            raise GradprojError(
                "save_projections: the engine was made without proj_dir, so it has nowhere to write"
            )
        return self._unsaved.write(self.proj_dir, iter_num) if self.proj_dir is not None else None

    def cleanup(self) -> None:
        """Write the remaining rows (with ``proj_dir``) and detach."""
        if self.proj_dir is not None:
            self.save_projections()
        self.detach()
