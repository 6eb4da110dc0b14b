"""What a training run is told, and what of it concerns its engine."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gradproj.engine.batching import BatchConfig
from gradproj.engine.projection import ProjectionConfig
from gradproj.errors import ConfigError
from gradproj.model.config import ARCHITECTURES, ModelConfig
from gradproj.store.layout import StoreConfig

OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("cosine", "linear", "constant")
MOST_SEEDS = 2**32
PRECISIONS = ("float32", "bfloat16")

NO_PART_OF_A_RUN = frozenset(
    (
        "result_dir",
        "device",
        "resume",
        "max_steps",
        "eval_interval",
        "checkpoint_interval",
        "proj_save_interval",
    )
)
"""Settings that a resumed run may have otherwise. With more steps the schedule goes on as the longer run's."""


def _as_in(section: Any, name: str) -> Any:
    """A field of the job's, with its default and its help."""
    known = section.__dataclass_fields__[name]
    return field(
        default=known.default, metadata={k: v for k, v in known.metadata.items() if k != "flag"}
    )


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What an engine inside of a training loop is told. Any object with some of these names will do (``of``)."""

    method: str = field(
        default="Regular", metadata={"help": "Regular, GradDotProd or GradProjLora"}
    )
    result_dir: str = field(default="", metadata={"help": "folder for all results"})
    proj_layers: str = _as_in(ProjectionConfig, "layers")
    proj_rank_total: int = _as_in(ProjectionConfig, "rank_total")
    proj_rank_min: int = _as_in(ProjectionConfig, "rank_min")
    proj_seed: int = _as_in(ProjectionConfig, "seed")
    proj_kind: str = _as_in(ProjectionConfig, "kind")
    include_embeddings: bool = _as_in(ProjectionConfig, "include_embeddings")
    loss_reduction: str = _as_in(BatchConfig, "loss_reduction")
    proj_dtype: str = _as_in(StoreConfig, "proj_dtype")
    compressor: str = _as_in(StoreConfig, "compressor")
    rows_per_shard: int = field(
        default=0,
        metadata={"help": "rows of one shard; 0 = about 16 MB, and whole steps with several ranks"},
    )
    proj_save_interval: int = field(
        default=100,
        metadata={"help": "write after so many steps; 0: when a shard is full, and at checkpoints"},
    )
    batch_size: int = field(default=0, metadata={"help": "sequences in a batch of one rank"})
    grad_accumulation: int = field(default=1, metadata={"help": "batches of one rank in a step"})
    max_steps: int = field(default=0, metadata={"help": "optimizer steps"})

    def __post_init__(self) -> None:
        if self.proj_save_interval < 0:
            raise ConfigError(
                f"--proj_save_interval must be at least 0, got {self.proj_save_interval}"
            )
        if self.loss_reduction not in ("mean", "sum"):
            raise ConfigError(f"--loss_reduction is {self.loss_reduction!r}; choose mean or sum")
        # Both check their own values when they are made.
        _ = self.projection, self.store

    @classmethod
    def of(cls, config: Any) -> "EngineConfig":
        """What of these settings a loop's own config has: a mapping's keys or an object's attributes."""
        names = [f.name for f in dataclasses.fields(EngineConfig)]
        if not isinstance(config, Mapping):
            config = {name: getattr(config, name) for name in names if hasattr(config, name)}
        given = {name: config[name] for name in names if config.get(name) is not None}
        if not isinstance(given.get("proj_layers", ""), str):
            given["proj_layers"] = ",".join(given["proj_layers"])
        return EngineConfig(**given | {"result_dir": str(given.get("result_dir", ""))})

    @property
    def projection(self) -> ProjectionConfig:
        """As the job has it."""
        return ProjectionConfig(
            layers=self.proj_layers, rank_total=self.proj_rank_total, rank_min=self.proj_rank_min,
            seed=self.proj_seed, kind=self.proj_kind, include_embeddings=self.include_embeddings,
        )  # fmt: skip

    @property
    def store(self) -> StoreConfig:
        """As the job has it."""
        return StoreConfig(
            proj_dtype=self.proj_dtype,
            compressor=self.compressor,
            rows_per_shard=self.rows_per_shard,
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(EngineConfig):
    """A causal language model's training: data, model, optimizer, engine. Equal settings give equal weights."""

    shards: str = field(
        metadata={
            "help": "WebDataset tars: a folder, a glob, braces, a list file, or a corpus index (.json)"
        }
    )
    result_dir: str = field(
        default="training",
        metadata={
            "help": "folder for model, tokenizer, loss curve, checkpoints and the engine's results"
        },
    )
    model: str = field(
        default="", metadata={"help": "go on from this checkpoint (directory or hub name)"}
    )
    architecture: str = field(
        default="",
        metadata={"help": "random weights of this shape", "choices": tuple(ARCHITECTURES)},
    )
    n_layer: int = field(
        default=4, metadata={"help": "layers of a new GPT-2, without the two flags above"}
    )
    n_embd: int = field(default=256, metadata={"help": "its width"})
    n_head: int = field(default=4, metadata={"help": "its attention heads"})
    tokenizer: str = field(
        default="", metadata={"help": "directory or hub name; default: --model's own"}
    )
    max_length: int = field(
        default=256, metadata={"help": "most tokens of a sequence; a new GPT-2's positions"}
    )
    pack: bool = field(
        default=False,
        metadata={
            "help": "join documents into full sequences; default: each one's first max_length tokens"
        },
    )
    batch_size: int = field(default=2, metadata={"help": "sequences in a batch of one rank"})
    max_steps: int = field(default=100, metadata={"help": "optimizer steps"})
    optimizer: str = field(
        default="adamw",
        metadata={"help": "torch's; Shapley values are about sgd's steps", "choices": OPTIMIZERS},
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "the highest learning rate"})
    momentum: float = field(default=0.0, metadata={"help": "sgd's"})
    warmup_steps: int = field(default=20, metadata={"help": "steps to reach it, linearly"})
    schedule: str = field(
        default="cosine",
        metadata={
            "help": "after that: down to 10 % (cosine), down to 0 (linear), constant",
            "choices": SCHEDULES,
        },
    )
    weight_decay: float = field(default=0.1, metadata={"help": "on matrices only"})
    clip: float = field(default=1.0, metadata={"help": "largest norm of the gradient; 0 = any"})
    dropout: float = field(default=0.0, metadata={"help": "everywhere in the model"})
    precision: str = field(
        default="float32",
        metadata={"help": "bfloat16: autocast; the weights stay float32", "choices": PRECISIONS},
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "less memory for a third more time: the same gradients"}
    )
    eval_interval: int = field(
        default=0, metadata={"help": "evaluate after so many steps; 0 = at the end only"}
    )
    val_shards: str = field(
        default="",
        metadata={"help": "tars to evaluate on; GradDotProd compares with their first batch"},
    )
    val_batch_size: int = field(default=2, metadata={"help": "sequences of a validation batch"})
    val_batches: int = field(
        default=8, metadata={"help": "validation batches, from the first document on"}
    )
    checkpoint_interval: int = field(
        default=100,
        metadata={"help": "steps between two checkpoints, of which the newest is kept; 0 = none"},
    )
    resume: bool = field(
        default=False,
        metadata={"help": "go on from result_dir's newest checkpoint; begin where there is none"},
    )
    seed: int = field(default=0, metadata={"help": "of weights, order of documents and dropout"})
    device: str = field(
        default="auto", metadata={"help": "where to train", "choices": ("auto", "cpu", "cuda")}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_method(self)
        _check_numbers(self)
        _check_choices(self)
        _check_model(self)

    def model_config(self) -> ModelConfig:
        """The checkpoint to go on from, or the architecture to draw weights for."""
        assert self.model or self.architecture
        init = "random" if self.architecture else ""
        return ModelConfig(
            model=self.model,
            architecture=self.architecture,
            init=init,
            seed=self.seed,
            tokenizer=self.tokenizer,
        )

    def settings_of_the_run(self) -> dict[str, Any]:
        """All that every step depends on, by flag: what a resumed run must have as well."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in NO_PART_OF_A_RUN}


def _check_method(config: TrainConfig) -> None:
    if config.method == "GradDotProd" and not config.val_shards:
        raise ConfigError(
            "--method GradDotProd compares with validation documents: give --val_shards"
        )
    if config.eval_interval and not config.val_shards:
        raise ConfigError(
            f"--eval_interval {config.eval_interval} needs --val_shards to evaluate on"
        )


def _check_numbers(config: TrainConfig) -> None:
    for name in (
        "batch_size", "grad_accumulation", "max_steps", "n_layer", "n_embd", "n_head", "val_batch_size", "val_batches",
    ):  # fmt: skip
        if getattr(config, name) < 1:
            raise ConfigError(f"--{name} must be at least 1, got {getattr(config, name)}")
    if not config.result_dir.strip():
        raise ConfigError("--result_dir is empty; give a folder")
    if not 0 <= config.seed < MOST_SEEDS:
        raise ConfigError(f"--seed must be at least 0 and less than 2^32, got {config.seed}")
    for name in (
        "warmup_steps",
        "momentum",
        "weight_decay",
        "clip",
        "eval_interval",
        "checkpoint_interval",
    ):
        if not getattr(config, name) >= 0:
            raise ConfigError(f"--{name} must be at least 0, got {getattr(config, name)}")
    if not 0 < config.learning_rate < math.inf:
        raise ConfigError(
            f"--learning_rate must be more than 0, and finite, got {config.learning_rate}"
        )
    if not 0 <= config.dropout < 1:
        raise ConfigError(f"--dropout must be at least 0 and less than 1, got {config.dropout}")
    if config.momentum and config.optimizer != "sgd":
        raise ConfigError(
            f"--momentum {config.momentum:g} is for --optimizer sgd; adamw has its own"
        )
    if config.max_length < 2:
        raise ConfigError(
            f"--max_length must be at least 2 (a token and its target), got {config.max_length}"
        )
    if config.n_embd % config.n_head:
        raise ConfigError(f"--n_embd {config.n_embd} is not a multiple of --n_head {config.n_head}")


def _check_choices(config: TrainConfig) -> None:
    choices = {
        "device": ("auto", "cpu", "cuda"),
        "optimizer": OPTIMIZERS,
        "schedule": SCHEDULES,
        "precision": PRECISIONS,
    }
    for name, known in choices.items():
        if getattr(config, name) not in known:
            raise ConfigError(
                f"--{name} is {getattr(config, name)!r}; choose {', '.join(known[:-1])} or {known[-1]}"
            )


def _check_model(config: TrainConfig) -> None:
    if config.model and config.architecture:
        raise ConfigError("give --model or --architecture, not both")
    if not config.model and not config.tokenizer:
        raise ConfigError(
            "a new model has no tokenizer of its own: give --tokenizer DIR "
            "(python -m gradproj tokenizer makes one)"
        )
