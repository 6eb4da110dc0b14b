"""Engines inside a training loop, beside the loop without one: CPU time of a step.

    python tests/bench/bench_training.py [--model gpt2|small] [--quick]

A step is forward, backward, clipping and AdamW, float32, one thread, on random tokens. Shapes:
GPT-2-small's with its full vocabulary at 4 x 256 tokens (and 4 x 512 with ``--length 512``), and a
small GPT-2 (4 layers of 256, vocabulary 4,096) at 8 x 128. Variants in turn:

- Regular: no engine.
- GradDotProd: a validation batch of a quarter of the training batch's tokens rides along. Its share
is work that was
  asked for, so the ratio is to Regular with so many more tokens: 1.25 times Regular's time.
- GradDotProd, torch's products: the same without oneDNN, which Regular does not use either.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from measure import Variant, interleave, print_machine, print_table
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import GPT2Config, GPT2LMHeadModel

from gradproj.training.graddotprod.engine import GradDotProdEngine

VALIDATION_SHARE = 0.25

SHAPES: dict[str, tuple[dict[str, int], int, int]] = {
    "gpt2": ({}, 4, 256),
    "small": (
        {"n_layer": 4, "n_embd": 256, "n_head": 4, "vocab_size": 4096, "n_positions": 512},
        8,
        128,
    ),
}
"""Name -> (config of a GPT-2, training samples, tokens of each)."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(SHAPES), default="gpt2")
    parser.add_argument("--length", type=int, help="tokens of a sample")
    parser.add_argument("--samples", type=int, help="training samples in a batch, a multiple of 4")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="2 rounds")
    args = parser.parse_args()
    measure(args.model, 2 if args.quick else args.rounds, args.samples, args.length)


def measure(
    model_name: str, rounds: int, samples: int | None = None, length: int | None = None
) -> dict[str, float]:
    """Each engine's time over Regular's.

    GradDotProd's over Regular's and the validation batch's share.
    """
    torch.set_num_threads(1)
    settings, n_train, n_tokens = SHAPES[model_name]
    n_train, n_tokens = samples or n_train, length or n_tokens
    torch.manual_seed(0)
    config = GPT2Config(
        **settings, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config).train()
    print_machine()
    times = interleave(variants(model, n_train, n_tokens), rounds)
    print(
        f"{model_name}, {n_train} x {n_tokens} tokens, float32, CPU seconds of a step, {rounds} "
        "rounds"
    )
    medians = print_table(times, ["Regular"])
    ratios = {name: median / medians["Regular"] for name, median in medians.items()}
    for name in ratios:
        if name.startswith("GradDotProd"):
            ratios[name] /= 1 + VALIDATION_SHARE
            print(f"{name} / (Regular x {1 + VALIDATION_SHARE}): {ratios[name]:.3f}", flush=True)
    return ratios


def variants(model: nn.Module, n_train: int, n_tokens: int) -> dict[str, Variant]:
    """Name -> a step of it."""
    generator = torch.Generator().manual_seed(0)
    size = int(model.config.vocab_size)
    train = torch.randint(0, size, (n_train, n_tokens), generator=generator)
    validation = torch.randint(
        0, size, (int(n_train * VALIDATION_SHARE), n_tokens), generator=generator
    )
    optimizer = AdamW(model.parameters(), lr=1e-4)
    dot_products = GradDotProdEngine(model, validation, learning_rate=optimizer)

    def step(x: Tensor, y: Tensor, after_backward: Callable[[], object] = lambda: None) -> None:
        model(input_ids=x, labels=y, use_cache=False).loss.backward()
        after_backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def regular() -> None:
        step(train, train)

    def with_dot_products() -> None:
        dot_products.attach_train_batch(train, train, 0, range(n_train))
        x, y = dot_products.prepare_forward_input(train, train)
        step(x, y, lambda: (dot_products.prepare_gradients(), dot_products.aggregate_and_log()))

    @contextmanager
    def without_onednn() -> Iterator[None]:
        with torch.backends.mkldnn.flags(enabled=False), dot_products:
            yield

    return {
        "Regular": Variant(regular),
        "GradDotProd": Variant(with_dot_products, lambda: dot_products),
        "GradDotProd, torch's products": Variant(with_dot_products, without_onednn),
    }


if __name__ == "__main__":
    main()
