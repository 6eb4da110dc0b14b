"""What a training run is told."""

from dataclasses import dataclass, field

from gradproj.checkpoint import ARCHITECTURES, ModelConfig
from gradproj.errors import ConfigError

METHODS = ("Regular",)
"""What runs inside the loop."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A causal language model's training: data, model, optimizer. Equal settings give equal weights."""

    shards: str = field(
        metadata={"help": "WebDataset tars: a folder, a glob, braces, a list file, or a corpus index (.json)"}
    )
    result_dir: str = field(metadata={"help": "folder for the checkpoint, its tokenizer and loss.csv"})
    method: str = field(default="Regular", metadata={"help": "what runs inside the loop", "choices": METHODS})
    model: str = field(default="", metadata={"help": "go on from this checkpoint (directory or hub name)"})
    architecture: str = field(
        default="", metadata={"help": "random weights of this shape", "choices": tuple(ARCHITECTURES)}
    )
    n_layer: int = field(default=4, metadata={"help": "layers of a new GPT-2, without the two flags above"})
    n_embd: int = field(default=256, metadata={"help": "its width"})
    n_head: int = field(default=4, metadata={"help": "its attention heads"})
    tokenizer: str = field(default="", metadata={"help": "directory or hub name; default: --model's own"})
    max_length: int = field(
        default=256, metadata={"help": "most tokens of a sequence; a new GPT-2's positions"}
    )
    pack: bool = field(
        default=False,
        metadata={"help": "join documents into full sequences; default: each one's first max_length tokens"},
    )
    batch_size: int = field(default=8, metadata={"help": "sequences in a batch"})
    max_steps: int = field(default=100, metadata={"help": "optimizer steps"})
    learning_rate: float = field(default=1e-3, metadata={"help": "AdamW's highest learning rate"})
    warmup_steps: int = field(
        default=20, metadata={"help": "steps to reach it, linearly; then a cosine to 10 %"}
    )
    weight_decay: float = field(default=0.1, metadata={"help": "AdamW's, on matrices only"})
    clip: float = field(default=1.0, metadata={"help": "largest norm of the gradient; 0 = any"})
    dropout: float = field(default=0.0, metadata={"help": "of a new model"})
    seed: int = field(default=0, metadata={"help": "of weights, order of documents and dropout"})
    device: str = field(
        default="auto", metadata={"help": "where to train", "choices": ("auto", "cpu", "cuda")}
    )

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"--method is {self.method!r}; choose one of {', '.join(METHODS)}")
        for name in ("batch_size", "max_steps", "n_layer", "n_embd", "n_head"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} must be at least 1, got {getattr(self, name)}")
        for name in ("warmup_steps", "weight_decay", "clip"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"--{name} must be at least 0, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ConfigError(f"--learning_rate must be more than 0, got {self.learning_rate}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"--dropout must be at least 0 and less than 1, got {self.dropout}")
        if self.max_length < 2:
            raise ConfigError(
                f"--max_length must be at least 2 (a token and its target), got {self.max_length}"
            )
        if self.n_embd % self.n_head:
            raise ConfigError(f"--n_embd {self.n_embd} is not a multiple of --n_head {self.n_head}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"--device is {self.device!r}; choose auto, cpu or cuda")
        if self.model and self.architecture:
            raise ConfigError("give --model or --architecture, not both")
        if not self.model and not self.tokenizer:
            raise ConfigError(
                "a new model has no tokenizer of its own: give --tokenizer DIR "
                "(python -m gradproj tokenizer makes one)"
            )

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
