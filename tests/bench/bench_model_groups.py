"""Memory and speed of ranks that hold one model together, and jobs of them under kills.

    python tests/bench/bench_model_groups.py memory [--layers 24] [--width 512] [--ranks 2]
    python tests/bench/bench_model_groups.py kills [--kills 20] [--ranks 2] [--ranks_per_model 2]

``memory`` saves a random Llama, loads it whole, in parts and offloaded, each in new processes, runs
two passes, and prints the most private memory (RssAnon, sampled) during load and passes beyond that
of the imports, and seconds. ``kills`` runs jobs under torchrun on one store, kills one rank of each
(-9) at a random moment and checks that all its processes are gone soon, that the job run last
completes the store, and that its arrays have the bits of an undisturbed job of one rank.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

PASSES, SAMPLES, LENGTH = 3, 2, 64


def anonymous_bytes():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise OSError("no RssAnon in /proc/self/status")


class Peak:
    """Samples this process's private memory until ``take``, which returns the most."""

    def __init__(self):
        self._most, self._ended = 0, False
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self):
        while not self._ended:
            self._most = max(self._most, anonymous_bytes())
            time.sleep(0.002)

    def take(self):
        most, self._most = max(self._most, anonymous_bytes()), 0
        return most


def measure(way, model, rank, n_ranks, store):
    import torch
    import torch.distributed as dist

    from gradproj import GradProjLoraEngine, per_sample_loss
    from gradproj.distributed import Process
    from gradproj.distributed.model_group import ModelGroup
    from gradproj.engine.sharded_blocks import load_in_blocks
    from gradproj.kernels.torch_setup import prepare_torch
    from gradproj.model.checkpoint import fetch
    from gradproj.model.config import ModelConfig
    from gradproj.model.loading import load_model

    prepare_torch(1, False)
    cpu, files, group = torch.device("cpu"), fetch(ModelConfig(model=model)), None
    if way == "parts":
        ranks = SimpleNamespace(store=dist.FileStore(store, n_ranks))
        group = ModelGroup(Process(rank, n_ranks, rank, n_ranks), n_ranks, ranks, cpu)
    before, peak = anonymous_bytes(), Peak()
    loaded = load_model(files, cpu) if way == "whole" else load_in_blocks(files, cpu, group)[0]
    in_load, held = peak.take() - before, anonymous_bytes() - before
    ids = torch.arange(SAMPLES * LENGTH).view(SAMPLES, LENGTH) % 100
    with GradProjLoraEngine(loaded, proj_rank_total=64, freeze_weights=True) as engine:
        seconds = []
        for _ in range(PASSES):
            started = time.perf_counter()
            per_sample_loss(loaded, ids).sum().backward()
            engine.collect_batch()
            seconds.append(time.perf_counter() - started)
        in_pass = peak.take() - before
    found = {"load": in_load, "held": held, "passes": in_pass, "seconds": min(seconds)}
    print(json.dumps(found), flush=True)
    os._exit(0)


def memory(args):
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    with tempfile.TemporaryDirectory() as folder:
        width = args.width
        config = LlamaConfig(
            hidden_size=width, intermediate_size=3 * width, num_hidden_layers=args.layers,
            num_attention_heads=8, num_key_value_heads=8, vocab_size=256,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config)
        model.config.bos_token_id = None
        n_all = 4 * sum(p.numel() for p in model.parameters())
        n_block = 4 * sum(p.numel() for p in model.model.layers[0].parameters())
        model.to(torch.bfloat16).save_pretrained(f"{folder}/model")
        from helpers.models import make_tokenizer

        make_tokenizer(Path(folder, "model"), 256 + 2)
        mb = 2**20
        print(f"weights {n_all / mb:.0f} MB in float32, a block {n_block / mb:.1f} MB")
        print("way           in load     held   in passes   seconds a pass")
        for way, n_ranks in (("whole", 1), ("offloaded", 1), ("parts", args.ranks)):
            processes = [
                subprocess.Popen(
                    [sys.executable, __file__, "measure", way, f"{folder}/model", str(rank),
                     str(n_ranks), f"{folder}/store"],
                    stdout=subprocess.PIPE, text=True,
                )
                for rank in range(n_ranks)
            ]  # fmt: skip
            for process in processes:
                got = json.loads(process.communicate()[0])
                sizes = "".join(f"{got[x] / mb:8.0f} MB" for x in ("load", "held", "passes"))
                print(f"{way:10}{sizes}   {got['seconds']:.3f}", flush=True)


def kills(args):
    from helpers.corpora import make_corpus, mixed_documents
    from helpers.jobs import ORPHAN_S, SMALL_JOB, Job, Scene, assert_same_bits, run_job
    from helpers.models import make_model

    from gradproj.coordinator.merge import is_merged

    rng = np.random.default_rng(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = make_corpus(folder / "tars", mixed_documents(args.documents), per_tar=500)
        model = make_model(folder / "model", num_hidden_layers=4)
        settings = SMALL_JOB | {"rows_per_shard": 16, "proj_save_interval": 2}
        alone = Scene(corpus, model, settings, folder / "undisturbed")
        run_job(1, **alone.flags(alone.undisturbed))
        grouped = {**settings, "ranks_per_model": args.ranks_per_model}
        scene = Scene(corpus, model, grouped, folder / "undisturbed")
        output, gone_s, done = folder / "out", [], 0
        while done < args.kills:
            if (output / "projections.zarr").exists() and is_merged(output):
                assert_same_bits(scene.undisturbed, output)
                output = folder / f"out{done}"
            job = Job(scene, output, args.ranks)
            try:
                while not job.is_at_work() and job.is_running() and rng.random() > 0.01:
                    time.sleep(0.1)  # 1 % of the looks: before the first unit
                time.sleep(rng.random() * 3)
                killed = job.is_running() and job.send(signal.SIGKILL, "worker", rng)
                seconds = job.wait_until_gone(ORPHAN_S + 60)
            finally:
                job.end()
            if killed:
                done += 1
                gone_s.append(seconds)
                print(f"kill {done}: the group was gone after {seconds:.1f} s", flush=True)
        run_job(2, ranks_per_model=2, **alone.flags(output))
        assert_same_bits(scene.undisturbed, output)
        print(f"{done} kills (seed {args.seed}): same bits; gone after at most {max(gone_s):.1f} s")


def main():
    if sys.argv[1] == "measure":
        way, model, rank, n_ranks, store = sys.argv[2:]
        measure(way, model, int(rank), int(n_ranks), store)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["memory", "kills"])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--ranks_per_model", type=int, default=2)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--documents", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    {"memory": memory, "kills": kills}[args.what](args)


if __name__ == "__main__":
    main()
