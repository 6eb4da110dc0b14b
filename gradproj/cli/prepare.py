"""The command ``prepare``: documents of any format to WebDataset tars."""

import time

from gradproj.corpus.prepare import prepare
from gradproj.corpus.prepare_config import PrepareConfig
from gradproj.corpus.sources import check_input, input_bytes
from gradproj.flags import parse
from gradproj.model.ahead_config import AheadConfig


def prepare_command(argv: list[str]) -> None:
    """Write the tars and print what they hold."""
    config, ahead = parse(
        argv,
        "gradproj prepare",
        PrepareConfig,
        AheadConfig,
        description="Convert documents to WebDataset tars.",
    )
    started = time.monotonic()
    tokenizer = None
    if ahead.tokenizer:
        from gradproj.model.tokenize_ahead import TokenizeAhead  # imports torch

        for location in config.inputs:
            check_input(location, config.anonymous)  # before a tokenizer is loaded
        sizes = [input_bytes(location, config.anonymous) for location in config.inputs]
        known = [size for size in sizes if size is not None]
        tokenizer = TokenizeAhead(ahead, sum(known) if len(known) == len(sizes) else None)
    report = prepare(config, tokenizer=tokenizer)
    print(f"{report.summary()}\nin {time.monotonic() - started:.1f} s, to {config.output_dir}")
