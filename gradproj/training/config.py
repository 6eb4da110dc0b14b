"""Settings of a training run, and those of them that concern its engine."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gradproj.corpus.config import CorpusConfig
from gradproj.engine.batching import BatchConfig
from gradproj.engine.projection import ProjectionConfig
from gradproj.errors import ConfigError
from gradproj.flags import DEVICES, Flags, as_in, flag, flag_of, join_list
from gradproj.model.config import ARCHITECTURES, ModelConfig
from gradproj.model.document_tokens import DocumentRules
from gradproj.store.layout import StoreConfig

METHODS: dict[str, Callable[[Any], Any]] = {}
"""``--method`` -> function of an ``EngineContext`` that returns a ``TrainingEngine``.

Here, so that settings are checked against it; ``engine_manager`` enters this package's engines."""
OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("cosine", "linear", "constant")

NO_PART_OF_A_RUN = (
    "result_dir", "device", "resume", "max_steps", "eval_interval", "checkpoint_interval",
    "proj_save_interval",
)  # fmt: skip
"""Settings that a resumed run may change. With more steps the schedule is the longer run's."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig(Flags, title="engine"):
    """Settings of an engine; ``of`` takes them from any object with some of these names."""

    method: str = flag("Engine.", "Regular", metavar="Regular|GradDotProd|GradProjLora")
    result_dir: str = flag("Directory for all results.", "", path="DIR")
    proj_layers: str = as_in(ProjectionConfig, "layers", default="mlp,attn")
    proj_rank_total: str | int = as_in(ProjectionConfig, "rank_total")
    proj_rank_min: int = as_in(ProjectionConfig, "rank_min")
    proj_seed: int = as_in(ProjectionConfig, "seed")
    proj_kind: str = as_in(ProjectionConfig, "kind")
    include_embeddings: bool = as_in(ProjectionConfig, "include_embeddings")
    experts: str = as_in(ProjectionConfig, "experts")
    loss_reduction: str = as_in(BatchConfig, "loss_reduction", default="mean")
    encoding: str = as_in(StoreConfig, "encoding", default="dense")
    proj_dtype: str = as_in(StoreConfig, "proj_dtype")
    compressor: str = as_in(StoreConfig, "compressor")
    rows_per_shard: int = as_in(
        StoreConfig,
        "rows_per_shard",
        help="Rows of a shard; 0 = about 16 MB, and whole steps with several ranks.",
    )
    proj_save_interval: int = flag(
        "Write rows every so many steps; 0 = when a shard is full, and at checkpoints.",
        100,
        minimum=0,
    )
    batch_size: int = flag("Sequences in a batch of one rank.", 0)
    grad_accumulation: int = flag("Batches of one rank in a step.", 1)
    max_steps: int = flag("Number of optimizer steps.", 0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in METHODS:
            raise ConfigError(f"--method is {self.method!r}; choose one of {', '.join(METHODS)}")
        # Raises for layers that are empty. A number is one, whether a flag or Python gave it.
        object.__setattr__(self, "proj_rank_total", self.projection.rank_total)

    @classmethod
    def of(cls, config: Any) -> "EngineConfig":
        """Take these settings from a mapping's keys or an object's attributes, and no others."""
        names = [f.name for f in dataclasses.fields(EngineConfig)]
        if not isinstance(config, Mapping):
            config = {name: getattr(config, name) for name in names if hasattr(config, name)}
        given = {name: config[name] for name in names if config.get(name) is not None}
        if not isinstance(given.get("proj_layers", ""), str):
            given["proj_layers"] = join_list(given["proj_layers"])
        return EngineConfig(**given | {"result_dir": str(given.get("result_dir", ""))})

    @property
    def projection(self) -> ProjectionConfig:
        fields = dataclasses.fields(ProjectionConfig)
        return ProjectionConfig(**{f.name: getattr(self, flag_of(f)) for f in fields})

    @property
    def store(self) -> StoreConfig:
        fields = dataclasses.fields(StoreConfig)
        return StoreConfig(**{f.name: getattr(self, f.name) for f in fields})


@dataclass(frozen=True, kw_only=True)
class TrainConfig(EngineConfig, title="training"):
    """Settings of a training run: data, model, optimizer, engine."""

    shards: str = as_in(CorpusConfig, "shards")
    result_dir: str = flag(
        "Directory for model, tokenizer, loss curve, checkpoints and the engine's results.",
        "training",
        required="give a folder",
        path="DIR",
    )
    model: str = flag("Checkpoint to start from: a directory or hub name.", "", path="DIR|NAME")
    architecture: str = flag("Random weights of this shape.", "", choices=ARCHITECTURES)
    n_layer: int = flag("Layers of a new GPT-2 (without --model and --architecture).", 4, minimum=1)
    n_embd: int = flag("Width of a new GPT-2.", 256, minimum=1)
    n_head: int = flag("Attention heads of a new GPT-2.", 4, minimum=1)
    tokenizer: str = flag(
        "Tokenizer: a directory or hub name; default: that of --model.", "", path="DIR|NAME"
    )
    max_length: int = flag(
        "Longest sequence, in tokens; also the number of positions of a new GPT-2.",
        256,
        minimum=2,
        why="a token and its target",
    )
    loss_on: str = as_in(DocumentRules, "loss_on")
    truncate_side: str = as_in(DocumentRules, "truncate_side")
    chat_template: str = as_in(DocumentRules, "chat_template")
    pack: bool = flag(
        "Join documents into full sequences; default: the first --max_length tokens of each.", False
    )
    batch_size: int = flag("Sequences in a batch of one rank.", 2, minimum=1)
    grad_accumulation: int = flag("Batches of one rank in a step.", 1, minimum=1)
    max_steps: int = flag("Number of optimizer steps.", 100, minimum=1)
    optimizer: str = flag(
        "Optimizer of torch. Shapley values are exact for sgd steps.", "adamw", choices=OPTIMIZERS
    )
    learning_rate: float = flag("Peak learning rate.", 1e-3, above=0, below=math.inf)
    momentum: float = flag("Momentum of sgd.", 0.0, minimum=0)
    warmup_steps: int = flag("Steps of linear warm-up to the peak.", 20, minimum=0)
    schedule: str = flag(
        "Learning rate after the warm-up: decays to 10 % (cosine) or 0 (linear), or stays.",
        "cosine",
        choices=SCHEDULES,
    )
    weight_decay: float = flag("Weight decay, of matrices only.", 0.1, minimum=0)
    clip: float = flag("Largest norm of the gradient; 0 = no clipping.", 1.0, minimum=0)
    dropout: float = flag("Dropout probability throughout the model.", 0.0, minimum=0, below=1)
    model_dtype: str = as_in(
        ModelConfig,
        "model_dtype",
        help="Precision of the forward and backward pass. bfloat16 is autocast; weights stay "
        "float32.",
        renamed_from="precision",
    )
    gradient_checkpointing: bool = flag(
        "Recompute activations in the backward pass: less memory, a third more time, the same "
        "gradients.",
        False,
    )
    eval_interval: int = flag("Steps between two evaluations; 0 = at the end only.", 0, minimum=0)
    val_shards: str = flag(
        "Tars to evaluate on; GradDotProd compares with their first batch.",
        "",
        path="TARS",
        remote=True,
    )
    val_batch_size: int = flag("Sequences in a validation batch.", 2, minimum=1)
    val_batches: int = flag(
        "Number of validation batches, from the first document on.", 8, minimum=1
    )
    checkpoint_interval: int = flag(
        "Steps between two checkpoints, of which the newest is kept; 0 = none.", 100, minimum=0
    )
    resume: bool = flag(
        "Resume from the newest checkpoint in --result_dir; start afresh if there is none.", False
    )
    seed: int = flag("Seed of weights, order of documents and dropout.", 0, minimum=0, below=2**32)
    device: str = flag("Device.", "auto", choices=DEVICES)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.momentum and self.optimizer != "sgd":
            raise ConfigError(
                f"--momentum {self.momentum:g} is for --optimizer sgd; adamw has its own"
            )
        if self.n_embd % self.n_head:
            raise ConfigError(f"--n_embd {self.n_embd} is not a multiple of --n_head {self.n_head}")
        if self.method == "GradDotProd" and not self.val_shards:
            raise ConfigError(
                "--method GradDotProd compares with validation documents: give --val_shards"
            )
        if self.eval_interval and not self.val_shards:
            raise ConfigError(
                f"--eval_interval {self.eval_interval} needs --val_shards to evaluate on"
            )
        if self.model and self.architecture:
            raise ConfigError("give --model or --architecture, not both")
        if not self.model and not self.tokenizer:
            raise ConfigError(
                "a new model has no tokenizer of its own: give --tokenizer DIR "
                "(gradproj tokenizer makes one)"
            )

    @property
    def rules(self) -> DocumentRules:
        return DocumentRules(
            loss_on=self.loss_on,
            truncate_side=self.truncate_side,
            chat_template=self.chat_template,
        )

    def model_config(self) -> ModelConfig:
        """Return the checkpoint to start from, or the architecture to draw weights for."""
        assert self.model or self.architecture
        return ModelConfig(
            model=self.model, architecture=self.architecture, tokenizer=self.tokenizer,
            init="random" if self.architecture else "", seed=self.seed,
        )  # fmt: skip

    def settings_of_the_run(self) -> dict[str, Any]:
        """Return the settings that a resumed run must have too, by flag."""
        settings = dataclasses.asdict(self) | {
            "chat_template": self.rules.identity()["--chat_template"]
        }
        return {k: v for k, v in settings.items() if k not in NO_PART_OF_A_RUN}
