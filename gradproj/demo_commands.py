"""The commands ``tokenizer``, ``train`` and ``query``: from flags to the functions that do the work."""

from gradproj.flags import parse


def tokenizer_command(argv: list[str]) -> None:
    """``python -m gradproj tokenizer --shards TARS --output_dir DIR --vocab_size N``"""
    from gradproj.training.tokenizer import TokenizerConfig, train_tokenizer

    (config,) = parse(argv, "gradproj tokenizer", TokenizerConfig, description="Train a byte-level BPE.")
    n_tokens = train_tokenizer(config)
    print(f"A tokenizer of {n_tokens:,} tokens is in {config.output_dir}")


def train_command(argv: list[str]) -> None:
    """``python -m gradproj train --shards TARS --tokenizer DIR --result_dir DIR``"""
    from gradproj.training.config import TrainConfig
    from gradproj.training.loop import train

    (config,) = parse(argv, "gradproj train", TrainConfig, description="Train a causal language model.")
    result = train(config)
    print(
        f"Trained on {result.n_tokens:,} tokens in {result.seconds:.0f} s, loss {result.loss:.3f} nats per token; "
        f"the checkpoint is in {config.result_dir}"
    )


def query_command(argv: list[str]) -> None:
    """``python -m gradproj query OUTPUT --text "..."``"""
    from gradproj.query import QueryConfig, query, result_lines

    (config,) = parse(
        argv, "gradproj query", QueryConfig, description="The documents of a store that most support a text."
    )
    for line in result_lines(config, query(config)):
        print(line)
