"""Settings of tokenizing ahead. Imports no torch, which ``prepare`` of texts does not need."""

from dataclasses import dataclass

from gradproj.errors import ConfigError
from gradproj.flags import Flags, as_in, flag
from gradproj.model.document_tokens import DocumentRules
from gradproj.model.tokenization import SPECIAL_TOKENS


@dataclass(frozen=True, kw_only=True)
class AheadConfig(Flags, title="tokenizing ahead"):
    """The tokenizer and the rules by which ``prepare`` makes token ids of texts."""

    tokenizer: str = flag(
        "Write token ids of this model's tokenizer in place of texts; a job with another tokenizer "
        "refuses them. Inputs that are token ids are taken to be its.",
        "",
        path="DIR|NAME",
    )
    special_tokens: str = flag(
        "Special tokens put around a document: those that the tokenizer adds itself, or these.",
        "tokenizer",
        choices=SPECIAL_TOKENS,
    )
    loss_on: str = as_in(DocumentRules, "loss_on")
    chat_template: str = as_in(DocumentRules, "chat_template")
    trust_remote_code: bool = flag("Run code that comes with the tokenizer.", False)
    processes: int = flag(
        "Processes that tokenize; 0 = one per CPU.", 0, minimum=0, why="0 = one per CPU"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        fields = type(self).__dataclass_fields__
        given = [name for name in fields if getattr(self, name) != fields[name].default]
        if given and not self.tokenizer:
            raise ConfigError(f"--{given[0]} is for documents tokenized ahead: give --tokenizer")

    @property
    def rules(self) -> DocumentRules:
        """Which tokens are targets."""
        return DocumentRules(loss_on=self.loss_on, chat_template=self.chat_template)
