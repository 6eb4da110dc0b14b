"""The command ``tokenizer``: train a byte-level BPE on a corpus."""

from gradproj.flags import parse
from gradproj.training.tokenizer import TokenizerConfig, train_tokenizer


def tokenizer_command(argv: list[str]) -> None:
    """Train a tokenizer and print its size."""
    (config,) = parse(
        argv, "gradproj tokenizer", TokenizerConfig, description="Train a byte-level BPE tokenizer."
    )
    n_tokens = train_tokenizer(config)
    print(f"A tokenizer of {n_tokens:,} tokens is in {config.output_dir}")
