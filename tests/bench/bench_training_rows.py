"""GradProjLora inside a training loop, beside the loop without it: CPU time of a step.

    python tests/bench/bench_training_rows.py [--model gpt2|small] [--quick]

A step is forward, backward, clipping and AdamW, float32, one thread, on random tokens, through the
calls of ``GhostEngineManager``; its rows are written to a store after every step. Shapes are those
of ``bench_training.py``. Variants in turn: without an engine (Regular) and with it, each with
transformers' own loss and with the ``per_sample_loss`` that ``python -m gradproj train`` takes; a
ratio is of two with one loss.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from bench_training import SHAPES
from measure import Variant, interleave, print_machine, print_table
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import GPT2Config, GPT2LMHeadModel

from gradproj import per_sample_loss
from gradproj.training import GhostEngineManager, TrainingEngine

Loss = Callable[[nn.Module, Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(SHAPES), default="gpt2")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="2 rounds")
    args = parser.parse_args()
    measure(args.model, 2 if args.quick else args.rounds)


def measure(model_name: str, rounds: int) -> dict[str, float]:
    """GradProjLora's time over Regular's, by the loss that both take (a key of ``LOSSES``)."""
    torch.set_num_threads(1)
    settings, n_samples, n_tokens = SHAPES[model_name]
    torch.manual_seed(0)
    config = GPT2Config(
        **settings, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config).train()
    print_machine()
    with tempfile.TemporaryDirectory() as folder:
        times = interleave(variants(model, n_samples, n_tokens, folder), rounds)
    print(
        f"{model_name}, {n_samples} x {n_tokens} tokens, float32, CPU seconds of a step, {rounds} "
        "rounds"
    )
    medians = print_table(times, ["Regular"])
    ratios = {name: medians[f"GradProjLora{name}"] / medians[f"Regular{name}"] for name in LOSSES}
    for name, ratio in ratios.items():
        print(f"GradProjLora{name} / Regular{name}: {ratio:.3f}", flush=True)
    return ratios


def variants(model: nn.Module, n_samples: int, n_tokens: int, folder: str) -> dict[str, Variant]:
    """Name -> a step of it."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(
        0, int(model.config.vocab_size), (n_samples, n_tokens), generator=generator
    )
    optimizer = AdamW(model.parameters(), lr=1e-4)
    regular = GhostEngineManager({"method": "Regular"}, model, optimizer)
    watching = GhostEngineManager(
        {"method": "GradProjLora", "result_dir": folder, "proj_save_interval": 1}, model, optimizer
    )
    watching.detach_for_evaluation()
    steps = iter(range(10**9))

    def step(manager: TrainingEngine, loss: Loss) -> None:
        number = next(steps)
        manager.attach_train_batch(tokens, tokens, number, range(n_samples))
        loss(model, tokens).backward()
        manager.prepare_gradients()
        manager.aggregate_and_log()
        manager.clear_gradients()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if manager.should_save_metrics(number):
            manager.save_metrics(number)

    @contextmanager
    def attached() -> Iterator[None]:
        watching.reattach_after_evaluation()
        yield
        watching.detach_for_evaluation()

    found = {}
    for name, loss in LOSSES.items():
        found[f"Regular{name}"] = Variant(lambda loss=loss: step(regular, loss))
        found[f"GradProjLora{name}"] = Variant(lambda loss=loss: step(watching, loss), attached)
    return found


def own_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """transformers' mean over all target tokens."""
    return model(input_ids=tokens, labels=tokens, use_cache=False).loss


def summed_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the mean from per-sample losses, as ``python -m gradproj train`` computes it."""
    return per_sample_loss(model, tokens, chunked=False).sum() / (tokens.numel() - len(tokens))


LOSSES: dict[str, Loss] = {"": own_loss, ", per_sample_loss": summed_loss}
"""Name of a variant's loss -> the loss function."""


if __name__ == "__main__":
    main()
