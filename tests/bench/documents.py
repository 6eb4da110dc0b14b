"""Inputs of the benchmarks of the whole job.

Real text of mixed lengths, its tokenizer, models of random weights.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from gradproj.corpus.inputs.records import InputReader
from gradproj.corpus.sources import SOURCES

VOCABULARY = 8192
POSITIONS = 2048
LENGTHS = (1, 2000)
"""Least and most tokens of a document."""

SHAPES = {
    "tiny": {"n_layer": 2, "n_embd": 64, "n_head": 2},
    "small": {"n_layer": 6, "n_embd": 384, "n_head": 6},
    "small-untied": {"n_layer": 6, "n_embd": 384, "n_head": 6, "tie_word_embeddings": False},
    "gpt2": {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257},
}
"""Name -> shapes; ``gpt2`` is GPT-2-small's, at its full vocabulary."""


def make_documents(folder: Path, n_documents: int, seed: int = 0) -> Path:
    """``folder/documents.jsonl``: pieces of Python's standard library of log-normal length, median
    200 tokens.

    The tokenizer that ``make_model`` puts beside its weights lies in ``folder/tokenizer``.
    """
    texts = _library()
    tokenizer = _train_tokenizer(texts, folder / "tokenizer")
    generator = np.random.default_rng(seed)
    lengths = np.exp(generator.normal(np.log(200), 1.1, n_documents)).astype(int).clip(*LENGTHS)
    path = folder / "documents.jsonl"
    with path.open("w") as file:
        for length in lengths:
            text = _piece(tokenizer, texts, int(length), generator)
            file.write(json.dumps({"text": text, "meta": {"pile_set_name": "stdlib"}}) + "\n")
    return path


def make_model(folder: Path, shape: str, tokenizer: Path) -> Path:
    """A GPT-2 of random weights, safetensors, with its tokenizer; no cache in its forward pass."""
    torch.manual_seed(0)
    config = GPT2Config(
        **{"vocab_size": VOCABULARY, **SHAPES[shape]},
        n_positions=POSITIONS, bos_token_id=0, eos_token_id=0, use_cache=False,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def make_tars(documents: Path, folder: Path, n_documents: int) -> Path:
    """The first documents as WebDataset tars."""
    lines = documents.read_text().split("\n")[:n_documents]
    some = folder.with_suffix(".jsonl")
    some.write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "gradproj", "prepare", str(some), "--output_dir", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


def _library() -> list[str]:
    records = SOURCES["stdlib:"](InputReader("stdlib:"))
    return [record.value["text"] for record in records if record.value]


def _piece(
    tokenizer: Tokenizer, texts: list[str], length: int, generator: np.random.Generator
) -> str:
    """``length`` tokens from somewhere in the library.

    Cut between tokens, it may come back a token longer.
    """
    while True:
        text = texts[generator.integers(len(texts))]
        start = int(generator.integers(max(1, len(text) - 4 * length)))
        part = text[start : start + 12 * length]
        offsets = tokenizer.encode(part).offsets
        if len(offsets) >= length:
            return part[: offsets[length - 1][1]]


def _train_tokenizer(texts: list[str], folder: Path) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts[::4], trainer)
    end = "<|endoftext|>"
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, model_max_length=POSITIONS
    )
    fast.save_pretrained(folder)
    return tokenizer
