"""Real corpora, models and jobs for the tests, all made on the spot."""

import io
import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from helpers.models import FAMILIES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

import gradproj.store  # registers bfloat16 with zarr

assert gradproj.store

WORDS = re.findall(
    r"\w+",
    "the of and to in is that it was for on are as with they be at one have this from or had by hot but some what "
    "there we can out other were all your when up use word how said an each she which do their time if will way "
    "about many then them would write like so these her long make thing see him two has look more day could go",
)


def words(n: int, seed: int) -> str:
    """``n`` seeded words."""
    generator = np.random.default_rng(seed)
    return " ".join(WORDS[i] for i in generator.integers(0, len(WORDS), n))


def mixed_documents(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Documents of 1 to 60 words in three domains, in the Pile's format."""
    generator = np.random.default_rng(seed)
    return [
        {
            "text": words(int(generator.integers(1, 60)), 1000 * seed + i),
            "meta": {"pile_set_name": ("Github", "ArXiv", "Pile-CC")[i % 3]},
        }
        for i in range(n)
    ]


def make_corpus(
    folder: Path, documents: Sequence[dict[str, Any] | bytes], per_tar: int = 40
) -> Path:
    """Write documents (or raw bytes of their ``.json``) as WebDataset tars."""
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, len(documents), per_tar):
        with tarfile.open(folder / f"shard-{first // per_tar:06d}.tar", "w") as tar:
            for i, document in enumerate(documents[first : first + per_tar], first):
                data = document if isinstance(document, bytes) else json.dumps(document).encode()
                member = tarfile.TarInfo(f"{i:012d}.json")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return folder


def make_tokenizer(folder: Path, vocab_size: int = 300) -> PreTrainedTokenizerFast:
    """A byte-level BPE without special tokens in the text; ``<s>`` and ``</s>`` exist."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([words(2000, 1)], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    return fast


def make_model(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """A small random checkpoint with its tokenizer."""
    import torch

    tokenizer = make_tokenizer(folder)
    model_type, settings = FAMILIES[family]
    settings = {
        **settings,
        "vocab_size": len(tokenizer),
        "bos_token_id": 0,
        "eos_token_id": 1,
        **changes,
    }
    if "pad_token_id" in settings:
        settings["pad_token_id"] = None
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(4)
    model.save_pretrained(folder)
    return folder


def flags(**settings: Any) -> list[str]:
    """Keyword arguments as command-line flags; True is a bare flag."""
    given = []
    for name, value in settings.items():
        given += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return given


ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}


def job_command(ranks: int, **settings: Any) -> list[str]:
    """The job's command line: torchrun for several ranks, plain Python for one."""
    module = ["-m", "gradproj.run", *flags(**{"device": "cpu", **settings})]
    if ranks == 1:
        return [sys.executable, *module]
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={ranks}",
    ]
    return [*launcher, *module]


def run_job(
    ranks: int = 1, expect: int | None = 0, timeout: float = 120, **settings: Any
) -> subprocess.CompletedProcess:
    """Run the job to its end; fails the test on another exit code than ``expect`` (None: any)."""
    done = subprocess.run(
        job_command(ranks, **settings),
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert expect is None or done.returncode == expect, (
        f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    )
    return done


def arrays_of(output: Path) -> dict[str, bytes]:
    """Every array of a store, as bytes of its values read by plain zarr."""
    group = zarr.open_group(str(output / "projections.zarr"), mode="r")
    return {name: np.ascontiguousarray(array[...]).tobytes() for name, array in group.arrays()}


def assert_same_bits(a: Path, b: Path) -> None:
    """Every array of two stores is equal bit by bit."""
    first, second = arrays_of(a), arrays_of(b)
    assert sorted(first) == sorted(second)
    assert [name for name in first if first[name] != second[name]] == []
