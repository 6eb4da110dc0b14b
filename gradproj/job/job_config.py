"""Where the job writes and on what it runs; where its inputs lie for those that come after it."""

from dataclasses import dataclass, field

from gradproj.errors import ConfigError

MOST_THREADS = 1024
"""Far above any machine's cores; OpenMP crashes at numbers beyond what the kernel allows."""


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """Settings of the job itself; none of them changes a row beyond rounding."""

    output_dir: str = field(metadata={"help": "folder of the store; started again on it, the job continues"})
    device: str = field(
        default="auto",
        metadata={
            "help": "auto takes a GPU per rank where torch sees them",
            "choices": ("auto", "cpu", "cuda"),
        },
    )
    threads: int = field(
        default=0, metadata={"help": "CPU threads of a rank; 0 = torch's own choice (torchrun sets 1)"}
    )
    deterministic: bool = field(
        default=False, metadata={"help": "deterministic kernels on CUDA, for bitwise equal stores (slower)"}
    )
    gradient_checkpointing: bool = field(
        default=False,
        metadata={
            "help": "less memory for activations, a third more time: larger models and longer sequences fit"
        },
    )
    compile: bool = field(
        default=False,
        metadata={
            "help": "run the model's blocks through torch.compile (needs a C++ compiler; tens of seconds a rank at "
            "the start); rows are the same to rounding"
        },
    )
    proj_save_interval: int = field(
        default=0,
        metadata={"help": "save a unit's new rows to partial/ every so many batches; 0 = only when stopped"},
    )
    verbose: bool = field(default=False, metadata={"help": "log every batch to logs/"})

    def __post_init__(self) -> None:
        if not self.output_dir.strip():
            raise ConfigError("--output_dir is empty; give a folder")
        _check_device(self.device)
        if self.threads > MOST_THREADS:
            raise ConfigError(f"--threads must be at most {MOST_THREADS}, got {self.threads}")
        for name in ("threads", "proj_save_interval"):
            if getattr(self, name) < 0:
                raise ConfigError(f"--{name} must be at least 0, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class RecordedInputs:
    """An output whose job's model is needed again: where the inputs lie now, and what of them may run code.

    The output says what its job was told; it cannot say what the person who opens it trusts.
    """

    output: str = field(metadata={"flag": "OUTPUT", "positional": True, "help": "the job's --output_dir"})
    model: str = field(default="", metadata={"help": "where the job's model lies now, if it has moved"})
    tokenizer: str = field(default="", metadata={"help": "where its tokenizer lies now, if it has moved"})
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
