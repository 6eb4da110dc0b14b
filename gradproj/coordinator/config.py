"""Where the job writes and on what it runs."""

from dataclasses import dataclass, field

from gradproj.errors import ConfigError


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
    proj_save_interval: int = field(
        default=0,
        metadata={"help": "save a unit's new rows to partial/ every so many batches; 0 = only when stopped"},
    )
    verbose: bool = field(default=False, metadata={"help": "log every batch to logs/"})

    def __post_init__(self) -> None:
        if not self.output_dir.strip():
            raise ConfigError("--output_dir is empty; give a folder")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"--device is {self.device!r}; choose auto, cpu or cuda")
        for name in ("threads", "proj_save_interval"):
            if getattr(self, name) < 0:
                raise ConfigError(f"--{name} must be at least 0, got {getattr(self, name)}")
