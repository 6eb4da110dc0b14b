"""Settings of ``lds``."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from gradproj.corpus.config import SHARDS_REQUIRED
from gradproj.errors import ConfigError
from gradproj.flags import DEVICES, Flags, flag, split_list
from gradproj.model.config import MODEL_DTYPES

DEFAULT_METHODS = (
    "random,loss,grad_norm,hidden,bm25,ngram,text,"
    "kfac@16,dot@16,relatif@16,preconditioned@16,kfac@64,"
    "kfac@16/signs,kfac@32/signs,kfac@64/signs,kfac@64/signs/mean,relatif@64/signs,dot@64/signs,"
    "kfac@64/int2,kfac@64/dense,kfac@64/signs+text,kfac@16+text,kfac@64/signs/rescored50,"
    "exact_kfac,exact_ekfac,kronfluence_kfac,kronfluence_ekfac"
)
MIN_SUBSETS = 3

RETRAINING, FACTS, BEHAVIOUR = EXPERIMENTS = ("retraining", "facts", "behaviour")
OF_RETRAINING = (
    "n_near_copies", "corruption", "subset_size", "subsets", "seeds", "randomized", "leave_out",
    "leave_out_k", "leave_out_group", "leave_out_methods", "leave_out_controls", "bootstrap",
    "permutations", "train_layers",
)  # fmt: skip
"""Settings that the other experiments do not have."""

NO_PART_OF_THE_EXPERIMENT = (
    "output_dir", "store", "subsets", "seeds", "methods", "reference", "leave_out", "leave_out_k",
    "leave_out_methods", "leave_out_controls", "leave_out_group", "bootstrap", "randomized",
    "permutations", "workers",
)  # fmt: skip
"""Settings that a later call may change: finished work stays valid."""


@dataclass(frozen=True, kw_only=True)
class LdsConfig(Flags, title="experiment"):
    """A small corpus, a small model, and the scores that are compared with retraining it."""

    shards: str = flag(
        "WebDataset tars: a directory, a glob, braces, a list file, or a corpus index (.json); "
        "default: those of --store.",
        "",
        path="TARS",
        remote=True,
        group="corpus",
    )
    store: str = flag(
        "OUTPUT of a job: its tars, model and tokenizer are those that are not given.",
        "",
        path="DIR",
        remote=True,
        group="corpus",
    )
    output_dir: str = flag(
        "Directory of the experiment. Started again on it, lds resumes.",
        required="give a folder",
        path="DIR",
    )
    experiment: str = flag(
        "retraining correlates scores with the losses of models trained on random subsets. The "
        "others plant sources in the documents and measure how well scores find them: facts that a "
        "few documents state and a query asks for in other words, or a behaviour that some "
        "documents show.",
        RETRAINING,
        choices=EXPERIMENTS,
    )
    n_sources: int = flag(
        "Documents that state a fact (auto: 3), or show the behaviour (auto: 4 % of them).",
        0,
        minimum=1,
        words={"auto": 0},
        default_text="auto",
        group="corpus",
    )
    tokenizer: str = flag(
        "Tokenizer: a directory or hub name; default: one is trained on the corpus.",
        "",
        path="DIR|NAME",
        group="corpus",
    )
    vocab_size: int = flag(
        "Number of tokens of the tokenizer that is trained.", 2048, minimum=257, group="corpus"
    )
    n_documents: int = flag(
        "Number of training documents.", 1024, minimum=1, renamed_from="documents", group="corpus"
    )
    max_length: int = flag("Longest document, in tokens.", 128, minimum=2, group="corpus")
    min_length: int = flag(
        "Shortest document, in tokens: lengths are drawn evenly from here to --max_length; 0 = all "
        "have --max_length.",
        0,
        minimum=2,
        group="corpus",
    )
    windows_per_document: int = flag(
        "Largest number of consecutive training documents cut from one document of the corpus.",
        4,
        minimum=1,
        renamed_from="windows",
        group="corpus",
    )
    n_queries: int = flag(
        "Number of held-out documents whose losses are predicted.",
        64,
        minimum=1,
        renamed_from="queries",
        group="corpus",
    )
    n_near_copies: int = flag(
        "Number of further queries, each with a near-copy among the training documents.",
        32,
        minimum=0,
        renamed_from="duplicates",
        group="corpus",
    )
    corruption: float = flag(
        "Fraction of a near-copy's tokens that is replaced by random ones.",
        0.25,
        minimum=0,
        below=1,
        renamed_from="changed",
        group="corpus",
    )
    model: str = flag(
        "Checkpoint to fine-tune on each subset and to score with, a directory; default: a small "
        "GPT-2 is trained.",
        "",
        path="DIR",
        group="model and training",
    )
    train_layers: int = flag(
        "With --model: number of upper blocks that are trained, with what follows them (norm and "
        "head); 0 = the whole model.",
        0,
        minimum=0,
        group="model and training",
    )
    pretrain: int = flag(
        "Number of other documents of max_length tokens to train the model on first; every "
        "training starts from it. 0 = from random weights.",
        8192,
        minimum=0,
        group="model and training",
    )
    pretrain_epochs: int = flag(
        "Epochs over these documents.", 2, minimum=1, group="model and training"
    )
    n_layer: int = flag(
        "Layers of the GPT-2 that is trained.", 2, minimum=1, group="model and training"
    )
    n_embd: int = flag("Width of the GPT-2.", 128, minimum=1, group="model and training")
    n_head: int = flag("Attention heads of the GPT-2.", 4, minimum=1, group="model and training")
    epochs: int = flag(
        "Epochs over the training documents.", 3, minimum=1, group="model and training"
    )
    batch_size: int = flag(
        "Documents in a training step.", 8, minimum=1, group="model and training"
    )
    learning_rate: float = flag(
        "Peak learning rate of AdamW; auto = 1e-3, with --model 1e-4.",
        0.0,
        above=0,
        below=math.inf,
        words={"auto": 0.0},
        default_text="auto",
        group="model and training",
    )
    model_dtype: str = flag(
        "Precision of all trainings. bfloat16 is autocast with float32 weights, faster on CPUs "
        "that support it.",
        "float32",
        choices=MODEL_DTYPES,
        renamed_from="precision",
        group="model and training",
    )
    subset_size: int = flag(
        "Documents of a random subset; 0 = half of --n_documents.",
        0,
        minimum=1,
        group="model and training",
    )
    subsets: int = flag(
        "Number of random subsets of the documents to train on.",
        30,
        minimum=MIN_SUBSETS,
        why="a rank correlation of fewer means nothing",
        group="model and training",
    )
    seeds: int = flag(
        "Trainings of each subset; two or more give the noise ceiling.",
        2,
        minimum=1,
        group="model and training",
    )
    methods: str = flag(
        "Methods. SCORE@K or SCORE@K:DAMPING is gradproj's with K x K values per layer, or whole "
        "gradients with K = full, by default dense values of random projections of the mean loss; "
        "SCORE@K/signs (or /int2, /int4, /int8, /dense) takes the eigenbasis (then /random not) "
        "and the summed loss (then /mean not); the others are random, loss, grad_norm, hidden, "
        "bm25, ngram, text, exact_kfac, exact_ekfac (whole gradients), kronfluence_kfac, "
        "kronfluence_ekfac. /rescoredN gives the N best documents exact_ekfac's scores; A+B adds "
        "two methods' z-scores.",
        DEFAULT_METHODS,
        default_text=f"{len(split_list(DEFAULT_METHODS))} methods, see evaluation/README.md",
        comma_separated=True,
        metavar="NAME",
        group="methods",
    )
    reference: str = flag(
        "Method with which the others are compared.",
        "kfac@64/signs",
        metavar="NAME",
        group="methods",
    )
    randomized: bool = flag(
        "Compare the reference's scores with those of a model with random weights.",
        True,
        group="methods",
    )
    leave_out: int = flag(
        "Number of queries whose top documents are removed before retraining; 0 = none.",
        16,
        minimum=0,
        group="leave-out",
    )
    leave_out_k: int = flag(
        "Number of documents removed for each query.", 8, minimum=1, group="leave-out"
    )
    leave_out_group: int = flag(
        "Number of queries that share a training, which omits the documents of all of them.",
        8,
        minimum=1,
        group="leave-out",
    )
    leave_out_methods: str = flag(
        "Methods whose top documents are removed.",
        "kfac@64/signs,kfac@16,text,bm25",
        comma_separated=True,
        metavar="NAME",
        group="leave-out",
    )
    leave_out_controls: int = flag(
        "Trainings that leave out the same number of random documents, as a control.",
        3,
        minimum=1,
        group="leave-out",
    )
    bootstrap: int = flag(
        "Resamples of the subsets for standard errors.", 500, minimum=2, group="statistics"
    )
    permutations: int = flag(
        "Shuffles of the documents for the chance level.", 100, minimum=2, group="statistics"
    )
    workers: int = flag(
        "Number of trainings at once, one thread each.",
        1,
        minimum=1,
        renamed_from="jobs",
        group="machine",
    )
    seed: int = flag(
        "Seed of all draws: documents, weights, subsets, bootstrap.", 0, minimum=0, below=2**31
    )
    device: str = flag("Device.", "auto", choices=DEVICES, group="machine")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.shards.strip() and not self.store:
            raise ConfigError(f"--shards is empty; {SHARDS_REQUIRED}, or --store OUTPUT")
        if self.min_length > self.max_length:
            raise ConfigError(
                f"--min_length {self.min_length} is more than --max_length {self.max_length}"
            )
        if self.train_layers and not self.model:
            raise ConfigError("--train_layers is for the fine-tuning of a --model")
        if self.n_embd % self.n_head:
            raise ConfigError(f"--n_embd {self.n_embd} is not a multiple of --n_head {self.n_head}")
        if self.experiment == RETRAINING:
            self._check_retraining()
        else:
            self._check_planted()

    def _check_retraining(self) -> None:
        if self.n_sources:
            raise ConfigError("--n_sources is for --experiment facts or behaviour")
        if self.subset_size >= self.n_documents:
            raise ConfigError(
                f"--subset_size {self.subset_size} must be less than --n_documents "
                f"{self.n_documents}"
            )
        if self.n_documents < 2 * self.n_near_copies:
            raise ConfigError(
                f"--n_documents must be at least {2 * self.n_near_copies:,}, got "
                f"{self.n_documents}: at most half of them may be near-copies (--n_near_copies)"
            )
        if self.leave_out > self.n_queries:
            raise ConfigError(
                f"--leave_out {self.leave_out} is more than --n_queries {self.n_queries}"
            )
        if self.leave_out % self.leave_out_group:
            raise ConfigError(
                f"--leave_out {self.leave_out} is not a multiple of --leave_out_group "
                f"{self.leave_out_group}"
            )
        removed = self.leave_out_k * self.leave_out_group
        if self.leave_out and removed > self.n_documents // 2:
            raise ConfigError(
                f"--leave_out_k {self.leave_out_k} for each of --leave_out_group "
                f"{self.leave_out_group} queries are {removed:,} documents, over half of the "
                f"{self.n_documents:,}: take fewer of either"
            )

    def _check_planted(self) -> None:
        defaults = {f.name: f.default for f in fields(self)}
        for name in OF_RETRAINING:
            if getattr(self, name) not in (defaults[name], 0):
                raise ConfigError(
                    f"--{name} is of --experiment {RETRAINING}; --experiment {self.experiment} "
                    "trains one model on all documents: leave it out"
                )

    @property
    def rate(self) -> float:
        """Peak learning rate."""
        return self.learning_rate or (1e-4 if self.model else 1e-3)

    def identity(self) -> dict[str, Any]:
        """Return the settings that every call on a directory must share."""
        settings = asdict(self) | {"learning_rate": self.rate}
        return {k: v for k, v in settings.items() if k not in NO_PART_OF_THE_EXPERIMENT}
