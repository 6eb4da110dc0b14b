"""The command ``prepare``: documents of any format to WebDataset tars."""

import time

from gradproj.corpus.prepare import PrepareConfig, prepare
from gradproj.flags import parse


def prepare_command(argv: list[str]) -> None:
    """Write the tars and print what they hold."""
    (config,) = parse(
        argv, "gradproj prepare", PrepareConfig, description="Convert documents to WebDataset tars."
    )
    started = time.monotonic()
    report = prepare(config)
    print(f"{report.summary()}\nin {time.monotonic() - started:.1f} s, to {config.output_dir}")
