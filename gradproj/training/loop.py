"""The training loop of ``gradproj train``: seeded data, torch's optimizers, checkpoints.

It does not know which engine runs inside it; ``GhostEngineManager`` does.
"""

import contextlib
import itertools
import math
import sys
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel

from gradproj.corpus.index_file import open_corpus
from gradproj.distributed import Process, World, choose_device, process_group
from gradproj.engine.loss import per_sample_loss
from gradproj.errors import ModelError
from gradproj.files import explain_os_errors
from gradproj.job.shutdown import StopRequest
from gradproj.model.checkpoint import fetch
from gradproj.model.config import ModelConfig
from gradproj.model.fingerprint import check_corpus_tokenizer
from gradproj.model.loading import load_model, model_quantization, positions_of
from gradproj.model.tokenizer_loading import larger_tokenizer, load_tokenizer
from gradproj.storage.results import make_folder
from gradproj.training.checkpoints import (
    Checkpoints,
    lock_result_dir,
    publish_model,
    restore_random_state,
)
from gradproj.training.config import TrainConfig
from gradproj.training.data import (
    DataPosition,
    TrainBatch,
    TrainedDocuments,
    batches_of,
    check_forms,
    check_tokens,
)
from gradproj.training.data_parallel import totals
from gradproj.training.engine_manager import GhostEngineManager
from gradproj.training.loss_curve import LossCurve, TrainResult, draw_curve
from gradproj.training.optimizer import make_optimizer, rate_at
from gradproj.training.validation import Validation

TIMEOUT = timedelta(minutes=30)
"""After which a rank that waits for another gives up."""
RANK_SEED = 1_000_003
"""Distance of the ranks' seeds. Ranks differ in what dropout draws, and in nothing else."""


def train(config: TrainConfig, stop: StopRequest | None = None) -> TrainResult:
    """Train a model; results go to ``--result_dir``.

    Equal settings, ranks, threads and device give bitwise equal weights.

    Args:
        config: the run's settings.
        stop: called after every step; if any rank's returns True, all ranks save a checkpoint and
            return early.
    """
    process, stop = Process.from_environment(), stop or StopRequest()
    device, warning = choose_device(config.device, process.local_rank)
    if warning and process.rank == 0:
        print(warning, file=sys.stderr, flush=True)
    folder = make_folder("--result_dir", config.result_dir)
    backend = "nccl" if device.type == "cuda" else "gloo"
    with process_group(process, backend, TIMEOUT) as world, lock_result_dir(folder, world):
        # A function of its own, so that nothing of the run outlives the group.
        return _train(_Run(config, folder, device, world), config, stop)


def _train(run: "_Run", config: TrainConfig, stop: StopRequest) -> TrainResult:
    stop.drain()
    with run.engine:
        for step in range(run.done + 1, config.max_steps + 1):
            run.step(step)
            stopping = bool(totals(run.world, stop())[0])
            run.save(step, at_once=stopping)
            if stopping and step < config.max_steps:
                return run.curve.result()
    run.finish()
    return run.curve.result()


class _Run:
    """Model, data and results of one run, ready for the next step."""

    def __init__(
        self, config: TrainConfig, folder: Path, device: torch.device, world: World
    ) -> None:
        self._config, self._folder, self._device, self.world = config, folder, device, world
        index = open_corpus(config.shards)
        corpora = {"shards": index.fingerprint, "val_shards": ""}
        if config.val_shards:
            corpora["val_shards"] = open_corpus(config.val_shards, flag="--val_shards").fingerprint
        self._checkpoints = Checkpoints(folder, config, world, corpora)
        saved = self._checkpoints.to_resume()
        shared, rank_state = self._checkpoints.load(saved) if saved else ({}, {})
        # Every rank draws the same weights; seeds for dropout differ, and are set below.
        torch.manual_seed(config.seed)
        self._model: Any
        self._tokenizer, self._model = load_or_make_model(config, saved)
        check_corpus_tokenizer(index.tokenization, self._tokenizer, config.rules)
        self._vocabulary = self._model.config.get_text_config().vocab_size
        larger = larger_tokenizer(len(self._tokenizer), self._vocabulary)
        if larger and world.rank == 0:
            print(f"the tokenizer has {larger}", file=sys.stderr, flush=True)
        check_forms(config, index, self._tokenizer)
        set_dropout(self._model, config.dropout)
        self._model.to(device).requires_grad_(True).train()
        if config.gradient_checkpointing:
            # The new name; older releases of transformers 5 have only the other one.
            name = "activation_checkpointing_enable"
            enable = getattr(self._model, name, self._model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        self._shared_model: nn.Module = self._model
        if world.size > 1:
            # Buffers of causal language models are constants.
            self._shared_model = DistributedDataParallel(self._model, forward_sync_buffers=False)
        self._optimizer = make_optimizer(self._model, config)
        self._validation = Validation(config, self._tokenizer, device, world)
        for batch in self._validation.batches:
            check_tokens(batch, self._vocabulary, "--val_shards")
        self.done = shared.get("step", 0)
        self.engine = GhostEngineManager(
            config, self._shared_model, self._optimizer, world, self._validation.pair,
            loss="sum", resume_step=self.done if config.resume else None,
        )  # fmt: skip
        points = shared.get("curve", [])
        self.curve = LossCurve(folder, config.max_steps, points, visible=world.rank == 0)
        self._position = DataPosition.from_dict(rank_state["data"]) if saved else DataPosition()
        self._batches = batches_of(config, index, self._tokenizer, world, self._position)
        self._documents = TrainedDocuments(index)
        if world.rank:
            torch.manual_seed(config.seed + RANK_SEED * world.rank)
        if config.resume:
            # Also without a checkpoint: an empty state cuts the rows of steps that are repeated.
            self.engine.load_state_dict(rank_state.get("engine", {}))
        if saved:
            self._optimizer.load_state_dict(shared["optimizer"])
            restore_random_state(rank_state["random"])

    def step(self, step: int) -> None:
        """Run the step's batches and the optimizer, and record the loss."""
        config, engine = self._config, self.engine
        batches = list(itertools.islice(self._batches, config.grad_accumulation))
        for batch in batches:
            check_tokens(batch, self._vocabulary, "--shards")
        counts = (sum(b.n_targets for b in batches), sum(b.n_tokens for b in batches))
        targets, n_tokens = totals(self.world, *counts)
        rate = config.learning_rate * rate_at(step - 1, config)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        # Gradients are averaged over the W ranks, so each rank divides by a W-th of all targets.
        per_rank = targets / self.world.size
        sums = [
            self._forward_backward(step, batch, per_rank, last=number == len(batches))
            for number, batch in enumerate(batches, 1)
        ]
        norm = self._clip(step)
        self._optimizer.step()
        self._optimizer.zero_grad()
        if engine.should_save_metrics(step):
            engine.save_metrics(step)
        self._position = batches[-1].position
        self._documents.add(batches)
        (loss,) = totals(self.world, torch.stack(sums).sum().item())
        self.curve.add(loss / targets, rate, norm, int(n_tokens), self._evaluate(step))

    def _forward_backward(
        self, step: int, batch: TrainBatch, n_targets: float, last: bool
    ) -> torch.Tensor:
        """Run one batch; return the detached sum of its samples' losses (nats)."""
        engine = self.engine
        X, Y = batch.input_ids.to(self._device), batch.labels.to(self._device)
        shared: Any = self._shared_model
        # The ranks exchange gradients in a step's last batch only.
        alone = not last and isinstance(shared, DistributedDataParallel)
        with shared.no_sync() if alone else contextlib.nullcontext():
            weights = None if batch.weights is None else batch.weights.to(self._device)
            more = {} if weights is None else {"weights": weights}
            engine.attach_train_batch(X, Y, step, batch.sample_ids, **more)
            inputs, labels = engine.prepare_forward_input(X, Y)
            autocast = self._config.model_dtype == "bfloat16"
            with torch.autocast(self._device.type, torch.bfloat16, enabled=autocast):
                joint = {"input_ids": inputs, "labels": labels}
                losses = per_sample_loss(shared, joint, chunked=False)
            train_losses = losses[: len(X)]  # an engine's own rows come after the batch's
            weighted = losses
            if weights is not None:
                weighted = torch.cat([train_losses * weights, losses[len(X) :]])
            (weighted.sum() / n_targets).backward()
        train_losses = train_losses.detach()
        engine.prepare_gradients()
        engine.aggregate_and_log(train_losses)
        engine.clear_gradients()
        return train_losses.sum()

    def _clip(self, step: int) -> float:
        """Clip the gradient; return its norm before clipping."""
        parameters = self._model.parameters()
        norm = nn.utils.clip_grad_norm_(parameters, self._config.clip or math.inf).item()
        if not math.isfinite(norm):
            raise ModelError(
                f"the gradient of step {step} is not finite: give a smaller --learning_rate "
                f"(now {self._config.learning_rate:g}) or a longer --warmup_steps"
            )
        return norm

    def _evaluate(self, step: int) -> float | None:
        """Return the validation loss if an evaluation is due."""
        interval = self._config.eval_interval
        due = step == self._config.max_steps or (interval and step % interval == 0)
        if not due or not self._validation.batches:
            return None
        self.engine.detach_for_evaluation()
        loss = self._validation.loss(self._model)
        self.engine.reattach_after_evaluation()
        return loss

    def save(self, step: int, at_once: bool) -> None:
        """Save a checkpoint if one is due: by interval, at the end, or before a stop."""
        interval = self._config.checkpoint_interval
        if at_once or (interval and (step % interval == 0 or step == self._config.max_steps)):
            # state_dict puts the engine's rows on disk, before the checkpoint that counts on them.
            rank_state = {"data": self._position.as_dict(), "engine": self.engine.state_dict()}
            parts = (self._model, self._tokenizer, self._optimizer)
            curve = [asdict(point) for point in self.curve.points]
            self._checkpoints.save(step, *parts, curve, rank_state)

    def finish(self) -> None:
        """Write the finished model, the curve's picture and the engine's reports."""
        if self.world.rank == 0:
            draw_curve(self.curve.points, self._folder / "loss.png")
            reports = self.engine.reports(self._documents.domain, self._documents.text)
            for name, text in reports.items():
                with explain_os_errors(self._folder / name):
                    (self._folder / name).write_text(text, encoding="utf-8")
            publish_model(self._folder, self._model, self._tokenizer)
        self.world.barrier()


def load_or_make_model(config: TrainConfig, saved: Path | None = None) -> tuple[Any, nn.Module]:
    """Return ``(tokenizer, model)``.

    The model is that of a run's checkpoint (``saved``), of ``--model``, of ``--architecture``, or a
    new GPT-2 of the configured shape.
    """
    if saved is not None or config.model or config.architecture:
        files = fetch(ModelConfig(model=str(saved)) if saved else config.model_config())
        if files.adapter_dir is not None:
            raise ModelError(
                f"--model {config.model} is a PEFT adapter, and gradproj train trains and saves "
                "whole models: merge it first (peft's merge_and_unload, then save_pretrained), or "
                "train it in a loop of your own"
            )
        if quantization := model_quantization(files):
            raise ModelError(
                f"--model {config.model} is quantized ({quantization.name}), and gradproj train "
                "trains and saves whole models: give the checkpoint that it was made from"
            )
        tokenizer, model = load_tokenizer(files), load_model(files, torch.device("cpu"))
        positions = positions_of(model)
        if positions and config.max_length > positions:
            raise ModelError(
                f"--max_length {config.max_length} is more than the model's {positions} positions"
            )
        return tokenizer, model
    # Any architecture works here: only the tokenizer's files are used.
    stand_in = ModelConfig(architecture="GPT2-Small", init="random", tokenizer=config.tokenizer)
    tokenizer = load_tokenizer(fetch(stand_in))
    shape = GPT2Config(
        vocab_size=len(tokenizer), n_positions=config.max_length,
        n_embd=config.n_embd, n_layer=config.n_layer, n_head=config.n_head,
        resid_pdrop=config.dropout, embd_pdrop=config.dropout, attn_pdrop=config.dropout,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return tokenizer, GPT2LMHeadModel(shape)


def set_dropout(model: Any, rate: float) -> None:
    """Set one dropout everywhere in a model and its config, where a checkpoint may have others."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate
        for name, value in vars(module).items():
            # Attention and some families' layers call a dropout function with their own rate.
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, rate)
    for name, value in vars(model.config).items():
        if name.endswith(("pdrop", "dropout")) and not name.startswith(("summary", "classifier")):
            setattr(model.config, name, rate if isinstance(value, int | float) else value)
