"""bfloat16 beside float32: time of one batch of rows, and how far the rows are from float32's.

    python tests/bench/bench_bf16.py [--quick] [--model DIR]

Time: GPT-2-small's and SmolLM2-135M's shapes, 2 x 512 tokens, 16 x 16 a layer, one thread, CPU
seconds, in turn. It says something on a CPU with bfloat16 instructions only. Cosines need trained
weights: a small Llama is trained on Python's own standard library for a minute or so, or ``--model
DIR`` names a checkpoint; its tokens are those of the same text. They are taken with float32 rows of
the same weights, as of a checkpoint in bfloat16; beside them stand those with the float32 weights
before, which rounding the weights alone moves.
"""

import argparse
import sysconfig
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from bench_engine import MODELS
from measure import Variant, interleave, print_machine, print_table
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from gradproj.engine.batching import BatchConfig
from gradproj.engine.engine import GradProjLoraEngine
from gradproj.engine.loss import per_sample_loss
from gradproj.job.precision import Agreement, rows_of
from gradproj.model.sequences import TokenSequence

N_DOCUMENTS, DOCUMENT_TOKENS = 32, 256


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="2 rounds instead of 7, 150 training steps instead of 600",
    )
    parser.add_argument("--model", help="a trained checkpoint to take the cosines of")
    args = parser.parse_args()
    measure(args.quick, args.model)


def measure(quick: bool = False, checkpoint: str | None = None) -> dict[str, float]:
    """Speed of bfloat16 over float32 by model, and the rows' median and least cosine."""
    torch.set_num_threads(1)
    print_machine()
    if not has_bfloat16():
        print(
            "this CPU has no bfloat16 instructions: the ratios below say nothing of those that have"
        )
    found = {name: _speed(name, 2 if quick else 7) for name in MODELS}
    agreement = _agreement(checkpoint, 150 if quick else 600)
    return {
        **found,
        "median cosine": agreement.median_cosine,
        "least cosine": agreement.least_cosine,
    }


def has_bfloat16() -> bool:
    info = Path("/proc/cpuinfo")
    return info.exists() and "avx512_bf16" in info.read_text()


def _speed(name: str, rounds: int) -> float:
    variants = {}
    for dtype in (torch.float32, torch.bfloat16):
        variants[str(dtype).removeprefix("torch.")] = _rows_of_a_batch(MODELS[name]().to(dtype))
    times = interleave(variants, rounds)
    print(f"\n{name}, 2 x 512 tokens, CPU seconds, {rounds} rounds")
    medians = print_table(times, ["float32"])
    speed = medians["float32"] / medians["bfloat16"]
    print(f"bfloat16 is {speed:.2f} times as fast")
    return speed


def _rows_of_a_batch(model: nn.Module) -> Variant:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (2, 512), generator=generator)
    engine = GradProjLoraEngine(model, freeze_weights=True, token_covariances=True)

    def rows() -> None:
        per_sample_loss(model, ids).sum().backward()
        engine.collect_batch()

    @contextmanager
    def attached():
        with engine:
            yield

    return Variant(rows, attached)


def _agreement(checkpoint: str | None, steps: int) -> Agreement:
    if checkpoint is None:
        model, tokens = _trained_llama(steps)
    else:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        tokens = np.array(AutoTokenizer.from_pretrained(checkpoint)(_text()[:400_000])["input_ids"])
    model = model.eval().requires_grad_(False)
    starts = np.linspace(len(tokens) // 2, len(tokens) - DOCUMENT_TOKENS - 1, N_DOCUMENTS).astype(
        int
    )
    documents = [
        TokenSequence.of(tokens[start : start + DOCUMENT_TOKENS], owner=number)
        for number, start in enumerate(starts)
    ]
    rows = {}
    for name, dtype in (
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("as rounded", torch.float32),
    ):
        with GradProjLoraEngine(model.to(dtype), freeze_weights=True) as engine:
            config = BatchConfig(max_length=DOCUMENT_TOKENS)
            rows[name] = rows_of(model, engine, documents, "batched", config)
    print(
        f"\nbfloat16 rows of {N_DOCUMENTS} documents, {checkpoint or 'a Llama trained here'}: "
        "cosine"
    )
    found = {
        "with float32 on the weights as bfloat16 has them": Agreement.of(
            rows["bfloat16"], rows["as rounded"]
        ),
        "with float32 on the weights before": Agreement.of(rows["bfloat16"], rows["float32"]),
    }
    for what, agreement in found.items():
        print(
            f"{agreement.median_cosine:.5f} in the middle, {agreement.least_cosine:.5f} at least "
            f"{what}"
        )
    return next(iter(found.values()))


def _text() -> str:
    """Real text that every machine has: the standard library."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


def _trained_llama(steps: int) -> tuple[nn.Module, np.ndarray]:
    """A byte-level Llama of 4 blocks after some steps, and the bytes it was trained on (the first
    half of them).
    """
    tokens = np.frombuffer(_text().encode(), dtype=np.uint8).astype(np.int64)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=0,
    )
    model, generator = LlamaForCausalLM(config), np.random.default_rng(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        starts = generator.integers(0, len(tokens) // 2 - 129, 8)
        ids = torch.from_numpy(np.stack([tokens[start : start + 128] for start in starts]))
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / steps)
    print(f"\ntrained {steps} steps: {loss.item():.2f} nats a byte", flush=True)
    return model, tokens


if __name__ == "__main__":
    main()
