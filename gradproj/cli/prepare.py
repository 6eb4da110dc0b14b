"""The command ``prepare``: documents of any kind to WebDataset tars."""

import time
from dataclasses import dataclass, field

from gradproj.corpus.prepare import PrepareConfig, prepare
from gradproj.flags import parse


@dataclass(frozen=True, kw_only=True)
class PrepareFlags(PrepareConfig):
    """``PrepareConfig`` with its inputs as ``INPUT...`` rather than a flag."""

    inputs: tuple[str, ...] = field(
        metadata={
            **PrepareConfig.__dataclass_fields__["inputs"].metadata,
            "flag": "INPUT",
            "positional": True,
        }
    )


def prepare_command(argv: list[str]) -> None:
    """``python -m gradproj prepare INPUT... --output_dir DIR``"""
    (config,) = parse(
        argv, "gradproj prepare", PrepareFlags, description="Documents to WebDataset tars."
    )
    started = time.monotonic()
    report = prepare(config)
    print(f"{report.summary()}\nin {time.monotonic() - started:.1f} s, to {config.output_dir}")
