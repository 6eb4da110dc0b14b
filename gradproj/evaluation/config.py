"""What ``python -m gradproj lds`` is told."""

from dataclasses import asdict, dataclass, field
from typing import Any

from gradproj.errors import ConfigError
from gradproj.training.config import PRECISIONS

DEFAULT_METHODS = (
    "random,loss,grad_norm,hidden,bm25,ngram,"
    "dot@16,cosine@16,relatif@16,kfac@16:0.003,kfac@16:0.01,kfac@16:0.03,kfac@16:0.1,kfac@16:1,"
    "preconditioned@16:0.01,preconditioned@16:0.1,preconditioned@16:1,"
    "dot@32,relatif@32,kfac@32:0.01,kfac@32:0.03,kfac@32:0.1,preconditioned@32:0.1,preconditioned@32:1,"
    "dot@64,relatif@64,kfac@64:0.01,kfac@64:0.03,kfac@64:0.1,preconditioned@64:0.1,preconditioned@64:1,"
    "dot@full,cosine@full,relatif@full,kfac@full:0.01,kfac@full:0.03,kfac@full:0.1,"
    "kronfluence_kfac,kronfluence_ekfac"
)
FEWEST_SUBSETS = 3

NO_PART_OF_THE_EXPERIMENT = (
    "output_dir", "subsets", "seeds", "methods", "reference", "leave_out", "leave_out_k", "leave_out_methods",
    "leave_out_controls", "leave_out_group", "bootstrap", "permutations", "jobs",
)  # fmt: skip
"""Settings that a later call may have otherwise: what is there already holds for them as well."""


@dataclass(frozen=True, kw_only=True)
class LdsConfig:
    """An experiment: a small corpus, a small model, and which scores are held against retraining it."""

    shards: str = field(
        metadata={
            "help": "WebDataset tars: a folder, a glob, braces, a list file, or a corpus index (.json)"
        }
    )
    output_dir: str = field(
        metadata={"help": "folder for all of it; called again on it, the command goes on"}
    )
    tokenizer: str = field(
        default="",
        metadata={"help": "directory or hub name; default: one is trained on the corpus"},
    )
    vocab_size: int = field(
        default=2048, metadata={"help": "tokens of the tokenizer that is trained"}
    )
    documents: int = field(default=1024, metadata={"help": "documents to train on"})
    max_length: int = field(default=128, metadata={"help": "tokens of each, no more and no fewer"})
    windows: int = field(
        default=4,
        metadata={"help": "most documents cut from one of the corpus, one after the other"},
    )
    queries: int = field(
        default=64, metadata={"help": "documents held out, whose losses are foretold"}
    )
    duplicates: int = field(
        default=32,
        metadata={"help": "more queries, of which the training documents hold a near-copy each"},
    )
    changed: float = field(
        default=0.25, metadata={"help": "share of a near-copy's tokens replaced by random ones"}
    )
    pretrain: int = field(
        default=8192,
        metadata={
            "help": "documents of max_length tokens, cut from others of the corpus, that the model is trained on "
            "before: every training starts from there; 0 = from random weights"
        },
    )
    pretrain_epochs: int = field(default=2, metadata={"help": "times that it sees these"})
    n_layer: int = field(default=2, metadata={"help": "layers of the GPT-2 that is trained"})
    n_embd: int = field(default=128, metadata={"help": "its width"})
    n_head: int = field(default=4, metadata={"help": "its attention heads"})
    epochs: int = field(default=3, metadata={"help": "times that training sees a document"})
    batch_size: int = field(default=8, metadata={"help": "documents of a training step"})
    learning_rate: float = field(default=1e-3, metadata={"help": "AdamW's highest learning rate"})
    precision: str = field(
        default="float32",
        metadata={
            "help": "of all trainings: bfloat16 is autocast, faster on CPUs that have it",
            "choices": PRECISIONS,
        },
    )
    subsets: int = field(
        default=30, metadata={"help": "random halves of the documents to train on"}
    )
    seeds: int = field(
        default=2, metadata={"help": "trainings of each subset; two or more give the noise ceiling"}
    )
    methods: str = field(
        default=DEFAULT_METHODS,
        metadata={
            "help": "comma-separated. SCORE@K or SCORE@K:DAMPING is gradproj's with K x K values a layer, or K = full "
            "for whole gradients; the others are random, loss, grad_norm, hidden, bm25, ngram, kronfluence_kfac, "
            "kronfluence_ekfac"
        },
    )
    reference: str = field(
        default="kfac@16:0.03", metadata={"help": "the method that the others are compared with"}
    )
    leave_out: int = field(
        default=16,
        metadata={"help": "queries whose top documents are removed before retraining; 0 = none"},
    )
    leave_out_k: int = field(default=8, metadata={"help": "documents removed for each"})
    leave_out_group: int = field(
        default=8,
        metadata={"help": "queries that share a training, which is without the documents of all"},
    )
    leave_out_methods: str = field(
        default="kfac@16:0.03,kfac@64:0.03,dot@16,bm25",
        metadata={"help": "whose top documents, comma-separated"},
    )
    leave_out_controls: int = field(
        default=3, metadata={"help": "trainings without as many random documents, to compare with"}
    )
    bootstrap: int = field(
        default=500, metadata={"help": "samples of the subsets for standard errors"}
    )
    permutations: int = field(
        default=100, metadata={"help": "shuffles of the documents: what chance gives"}
    )
    jobs: int = field(default=1, metadata={"help": "trainings at the same time, one thread each"})
    seed: int = field(
        default=0, metadata={"help": "of all draws: documents, weights, subsets, bootstrap"}
    )
    device: str = field(
        default="auto", metadata={"help": "where to compute", "choices": ("auto", "cpu", "cuda")}
    )

    def __post_init__(self) -> None:
        for name in (
            "documents",
            "queries",
            "windows",
            "epochs",
            "pretrain_epochs",
            "batch_size",
            "seeds",
            "jobs",
            "n_layer",
        ):
            self._at_least(name, 1)
        for name in ("duplicates", "leave_out", "pretrain"):
            self._at_least(name, 0)
        for name in ("max_length", "bootstrap", "permutations"):
            self._at_least(name, 2)
        self._at_least("subsets", FEWEST_SUBSETS, ": a rank correlation of fewer says nothing")
        self._at_least(
            "documents", 2 * self.duplicates, ": half of them at least are to be the corpus's own"
        )
        if not 0 <= self.changed < 1:
            raise ConfigError(f"--changed must be at least 0 and less than 1, got {self.changed}")
        if self.leave_out:
            self._check_leave_out()

    def _check_leave_out(self) -> None:
        for name in ("leave_out_k", "leave_out_group", "leave_out_controls"):
            self._at_least(name, 1)
        if self.leave_out > self.queries:
            raise ConfigError(
                f"--leave_out {self.leave_out} is more than the {self.queries} --queries"
            )
        if self.leave_out % self.leave_out_group:
            raise ConfigError(
                f"--leave_out {self.leave_out} queries cannot be parted into groups of --leave_out_group "
                f"{self.leave_out_group}"
            )
        removed = self.leave_out_k * self.leave_out_group
        if removed > self.documents // 2:
            raise ConfigError(
                f"--leave_out_k {self.leave_out_k} for each of --leave_out_group {self.leave_out_group} queries are "
                f"{removed:,} documents, over half of the {self.documents:,}: take fewer of either"
            )

    def _at_least(self, name: str, least: int, why: str = "") -> None:
        if getattr(self, name) < least:
            raise ConfigError(
                f"--{name} must be at least {least:,}, got {getattr(self, name)}{why}"
            )

    def experiment(self) -> dict[str, Any]:
        """Everything that corpus, weights and scores depend on, by flag."""
        return {k: v for k, v in asdict(self).items() if k not in NO_PART_OF_THE_EXPERIMENT}
