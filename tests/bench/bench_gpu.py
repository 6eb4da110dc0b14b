"""The engine and the job on GPUs: time, memory, tokens a second, and what share of the GPU's
arithmetic that is.

    python tests/bench/bench_gpu.py [--model gpt2,llama] [--samples N] [--rounds N] [--documents N]
    [--quick] torchrun --nproc_per_node=8 tests/bench/bench_gpu.py      # the same, and the job on
    1, 2, 4 and 8 GPUs

1. Engine, float32 (TF32 off) and bfloat16, a batch of N x 1024 random tokens, in turn, CUDA events:
the stock model's plain step and frozen backward (see bench_engine.py), rows out, with
   checkpointing, with ``--compile`` where there is a compiler; peak memory over the weights.
2. Job beside engine alone: bench_job.py's two parts on this GPU, real text of 1 to 2,000 tokens, a
process each. 3. Scaling: torchrun starts the job on 1, 2, 4, ... GPUs with as many documents for
each, timed by its own
   ``projection_stats.json``, from the start of the first unit to the last one's rows on the host.

Model FLOPs of a token, with W weights in products (the head's too), L layers, attention A wide, S
tokens in a sequence: frozen backward and rows 4 W + 6 L S A, plain step 6 W + 6 L S A. (2 W
forward, 2 W to the inputs, 2 W to the weights; causal attention 2 S A forward, 4 S A backward.)
Projections and what is computed twice are not counted. Utilisation is over the data sheet's dense
peak for the dtype, float32 without TF32; ``--peak_tflops`` where the GPU is not known here.

Without a GPU: one line and exit code 2. ``--device cpu --quick`` runs the same code on a tiny
model: a trial of the script, whose figures mean nothing.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from bench_engine import gpt2, llama
from gpu_jobs import GpuJobs
from measure import Clock, Variant, interleave, print_machine, print_table
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from gradproj.engine.compile import check_compiler
from gradproj.engine.engine import GradProjLoraEngine
from gradproj.engine.loss import per_sample_loss
from gradproj.errors import ConfigError

BASES = ["plain step", "frozen backward"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PEAK_TFLOPS = {
    "H200": (67, 989),
    "H100 PCIe": (51, 756),
    "H100 NVL": (60, 835),
    "H100": (67, 989),
    "A100": (19.5, 312),
    "L40S": (91.6, 362),
    "L4": (30.3, 121),
}
"""Part of a GPU's name -> float32 and bfloat16, dense, from NVIDIA's data sheets.

The first that fits.
"""


@dataclass(frozen=True)
class Setting:
    """Cases to measure and the number of rounds."""

    device: torch.device
    models: list[str]
    samples: int
    length: int
    rounds: int
    batches: int
    """In one timed run of the engine."""
    documents: int
    """Of a GPU."""
    shape: str
    """Of the job's model, in ``documents.SHAPES``."""
    peak_tflops: float | None
    ranks: int


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--model", help=f"of {', '.join(MODELS)}; default gpt2,llama (on a CPU tiny)"
    )
    parser.add_argument("--samples", type=int, default=16, help="sequences in the engine's batch")
    parser.add_argument(
        "--rounds", type=int, default=7, help="of the engine; the job takes 3 at most"
    )
    parser.add_argument("--documents", type=int, default=16_384, help="of the job, for each GPU")
    parser.add_argument("--peak_tflops", type=float, help="this GPU's, for the utilisation")
    parser.add_argument("--quick", action="store_true", help="2 rounds, 2,048 documents")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("bench_gpu: torch sees no GPU here, and no figure is made up", file=sys.stderr)
        return 2
    if int(os.environ.get("RANK", "0")):
        return 0  # the first rank starts the jobs, on as many GPUs as there are ranks
    measure(setting_of(args))
    return 0


def setting_of(args: argparse.Namespace) -> Setting:
    """The flags, with what a CPU can do in a minute where there is one instead of a GPU."""
    cpu = args.device == "cpu"
    models = (args.model or ("tiny" if cpu else "gpt2,llama")).split(",")
    rounds, documents = (2, 2_048) if args.quick else (args.rounds, args.documents)
    return Setting(
        device=torch.device("cpu") if cpu else torch.device("cuda", 0),
        models=models,
        samples=2 if cpu else args.samples,
        length=64 if cpu else 1024,
        rounds=rounds,
        batches=1 if cpu else 5,
        documents=64 if cpu else documents,
        shape="tiny" if cpu else "gpt2",
        peak_tflops=args.peak_tflops,
        ranks=int(os.environ.get("WORLD_SIZE", "1")),
    )


def measure(setting: Setting) -> dict[str, float]:
    """All three tables; their ratios by name."""
    print_machine("zarr")
    if setting.device.type == "cuda":
        print(
            f"{torch.cuda.get_device_name(setting.device)}, CUDA {torch.version.cuda}; TF32 off",
            flush=True,
        )
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    ratios: dict[str, float] = {}
    for model_name in setting.models:
        for dtype in DTYPES:
            ratios |= measure_engine(setting, model_name, dtype)
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()  # the jobs' processes want the memory
    with tempfile.TemporaryDirectory(prefix="bench_gpu_") as folder:
        jobs = GpuJobs(folder, setting.device.type, setting.shape, setting.documents, setting.ranks)
        ratios["job / engine"] = jobs.beside_engine(min(3, setting.rounds))
        if setting.ranks > 1:
            ratios |= jobs.scaling()
    return ratios


# --- 1. the engine ---


def measure_engine(setting: Setting, model_name: str, dtype: str) -> dict[str, float]:
    """Times, rates and peaks of one model in one precision."""
    model = MODELS[model_name]().to(setting.device, DTYPES[dtype])
    timed = variants(model, setting)
    times = interleave(timed, setting.rounds)
    print(
        f"\n{model_name}, {dtype}, {setting.samples} x {setting.length} tokens a batch, "
        f"{setting.batches} batches in a run, {setting.rounds} rounds"
    )
    medians = print_table(times, BASES)
    peaks = {name: peak_bytes(variant, setting.device) for name, variant in timed.items()}
    peak, n_tokens = peak_flops(setting, dtype), setting.samples * setting.length * setting.batches
    for name, seconds in medians.items():
        flops = (
            model_flops(model, setting.length, all_weights=name == "plain step")
            * n_tokens
            / seconds
        )
        share = (
            f"{flops / peak:6.1%} of {peak / 1e12:g} TFLOP/s"
            if peak
            else "share of the peak not known"
        )
        memory = "memory not measured"
        if setting.device.type == "cuda":
            memory = (
                f"{peaks[name] / 2**20:8.0f} MiB  {peaks[name] / peaks['frozen backward']:6.3f}"
            )
        print(
            f"{name:24} {n_tokens / seconds:12,.0f} tokens/s  {flops / 1e12:8.2f} TFLOP/s  {share} "
            f" {memory}"
        )
    key, base = f"{model_name} {dtype}: ", medians["frozen backward"]
    return {
        f"{key}engine / plain step": medians["engine"] / medians["plain step"],
        f"{key}engine / frozen backward": medians["engine"] / base,
        f"{key}memory / frozen backward": peaks["engine"] / max(peaks["frozen backward"], 1),
    }


class OnDevice(Variant):
    """Timed by the GPU's own events."""

    def seconds(self, clock: Clock) -> float:
        with self.setting():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            self.work()
            stop.record()
            stop.synchronize()
            return start.elapsed_time(stop) / 1000


def variants(model: nn.Module, setting: Setting) -> dict[str, Variant]:
    """Name -> what is timed."""
    generator = torch.Generator().manual_seed(0)
    shape = (setting.samples, setting.length)
    ids = torch.randint(0, model.config.vocab_size, shape, generator=generator).to(setting.device)
    kept = GradProjLoraEngine(model, freeze_weights=True, token_covariances=True)
    again = GradProjLoraEngine(
        model, freeze_weights=True, token_covariances=True, gradient_checkpointing=True
    )
    compiled = GradProjLoraEngine(model, freeze_weights=True, token_covariances=True, compiled=True)

    def plain() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    def frozen() -> None:
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=embedded, labels=ids, use_cache=False).loss.backward()

    def rows_of(engine: GradProjLoraEngine) -> Callable[[], None]:
        def rows() -> None:
            per_sample_loss(model, ids).sum().backward()
            engine.collect_batch()

        return rows

    @contextmanager
    def weights(trained: bool) -> Iterator[None]:
        model.requires_grad_(trained)
        yield

    kind = OnDevice if setting.device.type == "cuda" else Variant

    def repeated(work: Callable[[], None], context: Callable[[], Any]) -> Variant:
        return kind(lambda: [work() for _ in range(setting.batches)], context)

    model.requires_grad_(False)
    return {
        "plain step": repeated(plain, lambda: weights(True)),
        "frozen backward": repeated(frozen, lambda: weights(False)),
        "engine": repeated(rows_of(kept), lambda: kept),
        "engine, checkpointing": repeated(rows_of(again), lambda: again),
    } | (
        {"engine, --compile": repeated(rows_of(compiled), lambda: compiled)}
        if can_compile(setting)
        else {}
    )


def can_compile(setting: Setting) -> bool:
    """Whether ``--compile`` is measured too; a line says why not."""
    try:
        check_compiler(setting.device.type)
    except ConfigError as error:
        print(error, flush=True)
        return False
    torch.compiler.reset()  # graphs of the model before would count against torch's limit
    return True


def peak_bytes(variant: Variant, device: torch.device) -> int:
    """Return the peak memory that one run adds on the GPU.

    0 on a CPU (bench_engine.py --memory measures there).
    """
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    variant.seconds(float)
    return torch.cuda.max_memory_allocated(device) - before


def model_flops(model: nn.Module, length: int, all_weights: bool) -> float:
    """Of one token, as the head of this file has it."""
    config, head = model.config, model.get_output_embeddings().weight
    inside = [p for name, p in model.named_parameters() if p.dim() == 2 and ".weight" in name]
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    weights = sum(p.numel() for p in inside if id(p) not in tables and p is not head) + head.numel()
    width = config.num_attention_heads * getattr(
        config, "head_dim", config.hidden_size // config.num_attention_heads
    )
    attention = 6 * config.num_hidden_layers * length * width
    return (6 if all_weights else 4) * weights + attention


def peak_flops(setting: Setting, dtype: str) -> float | None:
    """Of this device, or None."""
    if setting.peak_tflops or setting.device.type != "cuda":
        return setting.peak_tflops and setting.peak_tflops * 1e12
    name = torch.cuda.get_device_name(setting.device)
    known = next((peaks for part, peaks in PEAK_TFLOPS.items() if part in name), None)
    return None if known is None else 1e12 * known[list(DTYPES).index(dtype)]


def tiny() -> nn.Module:
    """For a trial of this script."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(n_layer=2, n_embd=64, n_head=2, vocab_size=1000, bos_token_id=0, eos_token_id=0)
    ).eval()


MODELS: dict[str, Callable[[], nn.Module]] = {"gpt2": gpt2, "llama": llama, "tiny": tiny}


if __name__ == "__main__":
    sys.exit(main())
