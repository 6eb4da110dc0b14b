"""Where the job writes and on what it runs; where its inputs lie for those that come after it."""

from dataclasses import dataclass, field

from gradproj.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RecordedRunArgs:
    """An output whose job's model is needed again: where the inputs lie now, and what of them may run code.

    The output says what its job was told; it cannot say what the person who opens it trusts.
    """

    output: str = field(
        metadata={"flag": "OUTPUT", "positional": True, "help": "the job's --output_dir"}
    )
    model: str = field(
        default="", metadata={"help": "where the job's model lies now, if it has moved"}
    )
    tokenizer: str = field(
        default="", metadata={"help": "where its tokenizer lies now, if it has moved"}
    )
    shards: str = field(default="", metadata={"help": "where the tars lie now, if they have moved"})
    device: str = field(
        default="auto",
        metadata={"help": "where gradients are taken", "choices": ("auto", "cpu", "cuda")},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "run code that the recorded checkpoint brings along"}
    )
    allow_pickle: bool = field(
        default=False, metadata={"help": "load the recorded .bin weights (they can run code)"}
    )

    def __post_init__(self) -> None:
        _check_device(self.device)


def _check_device(device: str) -> None:
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device is {device!r}; choose auto, cpu or cuda")
