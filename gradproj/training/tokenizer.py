"""Trains a byte-level BPE on a corpus, with the ``tokenizers`` library."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from gradproj.corpus.config import CorpusConfig
from gradproj.corpus.index import CorpusIndex
from gradproj.corpus.index_file import open_corpus
from gradproj.corpus.stream import read_documents
from gradproj.errors import CorpusError
from gradproj.files import explain_os_errors
from gradproj.flags import Flags, as_in, flag
from gradproj.formatting import shown
from gradproj.storage.results import make_folder

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig(Flags, title="tokenizer"):
    """Settings of a tokenizer: its corpus and its size."""

    shards: str = as_in(CorpusConfig, "shards")
    output_dir: str = flag(
        "Directory for the tokenizer's files.", required="give a folder", path="DIR"
    )
    vocab_size: int = flag(
        "Number of tokens, the 256 bytes and one special token included.",
        4096,
        minimum=257,
        why="256 bytes and one special token",
    )
    max_samples: int = flag(
        "Number of documents to learn from, from the first on; 0 = all.",
        0,
        minimum=0,
        why="0 = all",
    )


def train_tokenizer(config: TokenizerConfig) -> int:
    """Train a tokenizer and write it as a directory for ``--tokenizer`` and ``--model``.

    It adds no token around a text; ``<|endoftext|>`` is its bos, eos and unknown token. The
    returned number of tokens is smaller than requested if the corpus has fewer.
    """
    folder = make_folder("--output_dir", config.output_dir)
    index = open_corpus(config.shards)
    n_samples = min(index.n_samples, config.max_samples or index.n_samples)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(index, n_samples), trainer)
    print(f"tokenizer: {tokenizer.get_vocab_size():,} tokens", file=sys.stderr, flush=True)
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    with explain_os_errors(folder):
        fast.save_pretrained(folder)
    return tokenizer.get_vocab_size()


def _texts(index: CorpusIndex, n_samples: int) -> Iterator[str]:
    has_text, problem = False, ""
    documents = read_documents(index, 0, n_samples)
    for document in shown(documents, n_samples, "tokenizer", "documents"):
        problem = problem or document.problem or ""
        if document.text:
            has_text = True
            # JSON can hold a lone surrogate, which no tokenizer takes.
            yield document.text.encode("utf-8", "replace").decode()
    if not has_text:
        raise CorpusError(
            f"none of the first {n_samples:,} documents has a text to learn tokens from"
            f"{problem and f' (the first problem: {problem})'}"
        )
    print("tokenizer: all read, merging pairs", file=sys.stderr, flush=True)
