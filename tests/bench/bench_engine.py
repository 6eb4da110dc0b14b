"""The engine beside the bare backward pass: time and peak memory of one batch of per-sample
projected gradients.

    python tests/bench/bench_engine.py [--model gpt2|llama] [--memory] [--quick]

Shapes of GPT-2-small (full vocabulary) or SmolLM2-135M, random weights, float32, one thread, CPU
time, in turn:

- plain step: the stock model's loss forward and backward with a gradient for every weight, no
optimizer;
- frozen backward: the same with frozen weights and a gradient at the embedded tokens, which people
take for the floor;
- engine: rows out, token covariances summed, 16 x 16 a layer;
- engine, torch's products: the same without oneDNN, so with the very products that the two above
use.

``--memory``: peak resident memory over the model's own weights at 8 x 512 tokens, a process each.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from measure import Variant, interleave, print_machine, print_table
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from gradproj.engine.engine import GradProjLoraEngine
from gradproj.engine.loss import per_sample_loss

BASES = ["plain step", "frozen backward"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(MODELS), default="gpt2")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument(
        "--quick", action="store_true", help="2 rounds instead of 7; 2 x 512 tokens in memory"
    )
    parser.add_argument("--peak_of", help=argparse.SUPPRESS)
    parser.add_argument("--samples", type=int, help="samples of 512 tokens in the batch")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peak_of:
        print(json.dumps(peak_bytes(args.model, args.peak_of, args.samples)))
    elif args.memory:
        measure_memory(args.model, args.samples or (2 if args.quick else 8))
    else:
        measure_time(args.model, args.samples or 2, 2 if args.quick else 7)


def measure_time(model_name: str, n_samples: int, rounds: int) -> dict[str, float]:
    """Median CPU seconds of each variant."""
    print_machine()
    times = interleave(variants(MODELS[model_name](), n_samples), rounds)
    print(f"{model_name}, {n_samples} x 512 tokens, float32, CPU seconds, {rounds} rounds")
    return print_table(times, BASES)


def measure_memory(model_name: str, n_samples: int) -> dict[str, float]:
    """Peak bytes over the weights of each variant."""
    print_machine()
    print(f"{model_name}, {n_samples} x 512 tokens, float32: peak memory over the model's weights")
    peaks = {}
    for name in ("frozen backward", "engine", "engine, checkpointing"):
        command = [
            sys.executable,
            __file__,
            "--model",
            model_name,
            "--peak_of",
            name,
            "--samples",
            str(n_samples),
        ]
        peaks[name] = float(json.loads(subprocess.check_output(command).splitlines()[-1]))
        print(
            f"{name:22} {peaks[name] / 2**20:8.0f} MiB  "
            f"{peaks[name] / peaks['frozen backward']:6.3f}",
            flush=True,
        )
    return peaks


def variants(model: nn.Module, n_samples: int, checkpointing: bool = False) -> dict[str, Variant]:
    """Name -> what is timed."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (n_samples, 512), generator=generator)
    engine = GradProjLoraEngine(
        model, freeze_weights=True, token_covariances=True, gradient_checkpointing=checkpointing
    )

    def plain() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    def frozen() -> None:
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=embedded, labels=ids, use_cache=False).loss.backward()

    def rows() -> None:
        per_sample_loss(model, ids).sum().backward()
        engine.collect_batch()

    @contextmanager
    def all_weights(wanted: bool) -> Iterator[None]:
        model.requires_grad_(wanted)
        yield

    @contextmanager
    def attached(onednn: bool) -> Iterator[None]:
        model.requires_grad_(False)
        with torch.backends.mkldnn.flags(enabled=onednn), engine:
            yield

    return {
        "plain step": Variant(plain, lambda: all_weights(True)),
        "frozen backward": Variant(frozen, lambda: all_weights(False)),
        "engine": Variant(rows, lambda: attached(True)),
        "engine, torch's products": Variant(rows, lambda: attached(False)),
    }


def peak_bytes(model_name: str, name: str, n_samples: int) -> int:
    """The most resident memory that one run adds to a process which holds the model."""
    model = MODELS[model_name]()
    kind, checkpointing = name.removesuffix(", checkpointing"), name.endswith(", checkpointing")
    small, large = (variants(model, n, checkpointing)[kind] for n in (1, n_samples))
    small.seconds(float)  # libraries set themselves up at their first call
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak
    before = _status("VmRSS")
    large.seconds(float)
    return _status("VmHWM") - before


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        return 1024 * int(next(line for line in file if line.startswith(field)).split()[1])


def gpt2() -> nn.Module:
    """GPT-2-small's shapes."""
    return _model(GPT2LMHeadModel, GPT2Config())


def llama() -> nn.Module:
    """SmolLM2-135M's shapes."""
    return _model(
        LlamaForCausalLM,
        LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
        ),
    )


def _model(kind: type, config: object) -> nn.Module:
    torch.manual_seed(0)
    return kind(config).eval()


MODELS = {"gpt2": gpt2, "llama": llama}


if __name__ == "__main__":
    main()
