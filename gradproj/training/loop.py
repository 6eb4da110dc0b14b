"""A plain causal-LM training loop: documents in a seeded order, AdamW, a checkpoint that the job takes."""

import csv
import itertools
import math
import os
import shutil
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import GPT2Config, GPT2LMHeadModel

from gradproj.checkpoint import ModelConfig, fetch
from gradproj.coordinator.progress import human_seconds
from gradproj.dist import choose_device
from gradproj.errors import ModelError
from gradproj.loss import Targets, per_sample_loss
from gradproj.model import check_vocabulary, load_model, load_tokenizer, positions_of
from gradproj.store.files import explain_os_errors
from gradproj.training.config import TrainConfig
from gradproj.training.data import batches_of, make_folder, open_corpus

PROGRESS_EVERY_S = 5.0
SHOWN_STEPS = 20


@dataclass(frozen=True)
class TrainResult:
    """What a run came to."""

    loss: float
    """Mean nats per target token over the last 20 steps."""
    n_tokens: int
    seconds: float


def train(config: TrainConfig) -> TrainResult:
    """Train, and write checkpoint, tokenizer and ``loss.csv`` into ``--result_dir``.

    Equal settings, threads and device give bitwise equal weights.

    Raises:
        GradprojError: the model, the tokenizer or the corpus cannot be used.
    """
    folder = make_folder("--result_dir", config.result_dir)
    torch.manual_seed(config.seed)
    device, warning = choose_device(config.device, 0)
    if warning:
        print(warning, file=sys.stderr, flush=True)
    tokenizer, model = load_or_make_model(config)
    model.to(device).requires_grad_(True).train()
    optimizer = AdamW(_parameter_groups(model, config.weight_decay), lr=config.learning_rate)
    schedule = LambdaLR(optimizer, lambda step: _rate_at(step, config))
    curve = LossCurve(config.max_steps)
    batches = batches_of(config, open_corpus(config.shards), tokenizer)
    for batch in itertools.islice(batches, config.max_steps):
        on_device = batch.to(device)
        targets = Targets(on_device.positions, on_device.targets)
        losses = per_sample_loss(model, {"input_ids": on_device.input_ids, "targets": targets})
        loss = losses.sum() / len(targets.tokens)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip or math.inf, error_if_nonfinite=True)
        rate = float(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        curve.add(loss.item(), rate, batch.n_tokens)
    save_checkpoint(folder, model, tokenizer, curve)
    return curve.result()


def load_or_make_model(config: TrainConfig) -> tuple[Any, nn.Module]:
    """``(tokenizer, model)``: a checkpoint, an architecture, or a new GPT-2 of the given shape."""
    if config.model or config.architecture:
        files = fetch(config.model_config())
        tokenizer, model = load_tokenizer(files), load_model(files, torch.device("cpu"))
        check_vocabulary(tokenizer, model.config)
        positions = positions_of(model.config)
        if positions and config.max_length > positions:
            raise ModelError(
                f"--max_length {config.max_length} is more than the model's {positions} positions"
            )
        return tokenizer, model
    # Any model's name will do: only the tokenizer's files are looked at.
    tokenizer = load_tokenizer(
        fetch(ModelConfig(architecture="GPT2-Small", init="random", tokenizer=config.tokenizer))
    )
    shape = GPT2Config(
        vocab_size=len(tokenizer), n_positions=config.max_length, n_embd=config.n_embd, n_layer=config.n_layer,
        n_head=config.n_head, resid_pdrop=config.dropout, embd_pdrop=config.dropout, attn_pdrop=config.dropout,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return tokenizer, GPT2LMHeadModel(shape)


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Biases and norms are not decayed."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def _rate_at(step: int, config: TrainConfig) -> float:
    """The share of the highest learning rate at a step: up linearly, then down a cosine to a tenth."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    done = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * min(done, 1.0)))


class LossCurve:
    """Every step's loss, and a line about it every few seconds."""

    def __init__(self, max_steps: int) -> None:
        self._max_steps = max_steps
        self._rows: list[tuple[Any, ...]] = [("step", "tokens", "loss", "learning_rate", "seconds")]
        self._recent: deque[float] = deque(maxlen=SHOWN_STEPS)
        self._n_steps = self._n_tokens = 0
        self._started_s = self._shown_s = time.monotonic()

    def add(self, loss: float, rate: float, n_tokens: int) -> None:
        """Note a step."""
        self._n_steps += 1
        self._n_tokens += n_tokens
        self._recent.append(loss)
        now_s = time.monotonic()
        row = (self._n_steps, self._n_tokens, f"{loss:.6f}", f"{rate:.3e}", f"{now_s - self._started_s:.2f}")
        self._rows.append(row)
        if now_s - self._shown_s > PROGRESS_EVERY_S or self._n_steps in (1, self._max_steps):
            self._shown_s = now_s
            self._show(now_s - self._started_s)

    def _show(self, seconds: float) -> None:
        left = seconds / self._n_steps * (self._max_steps - self._n_steps)
        print(
            f"step {self._n_steps:,} of {self._max_steps:,}: loss {self.result().loss:.3f} nats per token, "
            f"{self._n_tokens / seconds:,.0f} tokens/s, about {human_seconds(left)} left",
            file=sys.stderr,
            flush=True,
        )

    def result(self) -> TrainResult:
        """The run so far."""
        mean = sum(self._recent) / len(self._recent)
        return TrainResult(mean, self._n_tokens, time.monotonic() - self._started_s)

    def write(self, path: Path) -> None:
        """One row a step."""
        with path.open("w", newline="") as file:
            csv.writer(file).writerows(self._rows)


def save_checkpoint(folder: Path, model: Any, tokenizer: Any, curve: LossCurve) -> None:
    """Write the checkpoint beside its place first, and put its weights there last: they say that it is whole."""
    work = folder / f".saving-{os.getpid()}"
    with explain_os_errors(folder):
        work.mkdir(parents=True)
        try:
            model.save_pretrained(work)
            tokenizer.save_pretrained(work)
            curve.write(work / "loss.csv")
            for path in sorted(work.iterdir(), key=lambda p: p.suffix == ".safetensors"):
                os.replace(path, folder / path.name)
        finally:
            shutil.rmtree(work)
