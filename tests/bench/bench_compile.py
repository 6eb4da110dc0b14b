"""``--compile`` beside the engine as it is: time of one batch of rows, and what compiling costs
before the first.

    python tests/bench/bench_compile.py [--quick] [--model gpt2|llama]

GPT-2-small's and SmolLM2-135M's shapes, 2 x 512 tokens, 16 x 16 a layer, float32 and bfloat16, one
thread, CPU seconds, in turn. Compile time is that of an empty cache, the compiler's own processes
counted: CPU seconds of the first compiled batch less those of one that is compiled already.
"""

import argparse
import os
import tempfile
from contextlib import contextmanager

import torch
from bench_engine import MODELS
from measure import Variant, interleave, print_machine, print_table
from torch import nn

from gradproj.engine.compile import check_compiler
from gradproj.engine.engine import GradProjLoraEngine
from gradproj.engine.loss import chunk_verdict, per_sample_loss


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="2 rounds instead of 7, float32 only")
    parser.add_argument("--model", choices=sorted(MODELS))
    args = parser.parse_args()
    names = [args.model] if args.model else list(MODELS)
    dtypes = [torch.float32] if args.quick else [torch.float32, torch.bfloat16]
    measure(names, dtypes, 2 if args.quick else 7)


def measure(names: list[str], dtypes: list[torch.dtype], rounds: int) -> dict[str, float]:
    """``model, dtype`` -> compiled over uncompiled CPU time.

    Raises:
        ConfigError: this machine has no compiler.
    """
    torch.set_num_threads(1)
    check_compiler("cpu")
    print_machine()
    return {
        f"{name}, {str(dtype).removeprefix('torch.')}": _ratio(name, dtype, rounds)
        for name in names
        for dtype in dtypes
    }


def _ratio(name: str, dtype: torch.dtype, rounds: int) -> float:
    model = MODELS[name]().to(dtype)
    chunk_verdict(model)
    plain, compiled = (_rows_of_a_batch(model, compiled) for compiled in (False, True))
    want = _rows(plain)
    print(
        f"\n{name}, {str(dtype).removeprefix('torch.')}, 2 x 512 tokens, CPU seconds, {rounds} "
        "rounds"
    )
    with _empty_cache():
        seconds = compiled.seconds(_cpu_seconds)
        got = _rows(compiled)
    error = ((got - want).norm(dim=1) / want.norm(dim=1)).max().item()
    times = interleave({"engine": plain, "compiled": compiled}, rounds)
    medians = print_table(times, ["engine"])
    print(
        f"compiling: {seconds - medians['compiled']:.1f} CPU s; rows differ by {error:.1e} of "
        "their length",
        flush=True,
    )
    torch.compiler.reset()
    return medians["compiled"] / medians["engine"]


def _rows(variant: Variant) -> torch.Tensor:
    with variant.setting():
        rows = variant.work()
    assert isinstance(rows, torch.Tensor)
    return rows


def _rows_of_a_batch(model: nn.Module, compiled: bool) -> Variant:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (2, 512), generator=generator)
    engine = GradProjLoraEngine(
        model, freeze_weights=True, token_covariances=True, compiled=compiled
    )

    def rows() -> torch.Tensor:
        per_sample_loss(model, ids).sum().backward()
        return engine.collect_batch()

    @contextmanager
    def attached():
        with engine:
            yield

    return Variant(rows, attached)


@contextmanager
def _empty_cache():
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        try:
            yield
        finally:
            del os.environ["TORCHINDUCTOR_CACHE_DIR"]


def _cpu_seconds() -> float:
    """Of this process and of those that it has started and that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


if __name__ == "__main__":
    main()
