"""Documents of any form to sequences of tokens with the targets of the loss."""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from gradproj.corpus.content import (
    IGNORE,
    Completion,
    Content,
    Conversation,
    Preference,
    Text,
    TokenIds,
)
from gradproj.flags import Flags, flag
from gradproj.model.chat import LOSS_ON, NO_TEMPLATE, ChatTemplate, Spans, TurnError, chat_template
from gradproj.model.sequences import TRUNCATE_SIDES, TokenSequence, split_long
from gradproj.model.token_texts import TokenTexts
from gradproj.model.tokenization import Tokenizing


@dataclass(frozen=True, kw_only=True)
class DocumentRules(Flags, title="documents"):
    """Which tokens of a document are targets. Part of the run's identity."""

    loss_on: str = flag(
        "Targets of a conversation: all turns of the assistant, its turns after the last user's "
        "(completion), its last turn, or every token. Of a prompt with a completion: the "
        "completion, or every token (all). A plain text's targets are all its tokens.",
        "assistant",
        choices=LOSS_ON,
    )
    truncate_side: str = flag(
        "Which end of a document longer than --max_length is cut off; a BOS at its start stays.",
        "right",
        choices=TRUNCATE_SIDES,
    )
    chat_template: str = flag(
        "Jinja file of the chat template, instead of the tokenizer's own.", "", path="FILE"
    )
    preference_beta: float = flag(
        "DPO's beta: a row of a chosen and a rejected answer is DPO's gradient at its reference "
        "model, beta / 2 times the difference of the two gradients.",
        0.1,
        above=0,
    )

    def identity(self) -> dict[str, Any]:
        """Return flag -> value, with a digest of the template's file.

        ``ConfigError`` if the file cannot be read.
        """
        values = {f"--{name}": value for name, value in vars(self).items()}
        source = chat_template(None, self.chat_template)
        digest = "" if source is None else hashlib.sha256(source.encode()).hexdigest()[:32]
        return values | {"--chat_template": digest}


@dataclass(frozen=True)
class TokenizedDocument:
    """A document's sequences, or the problem with it."""

    sequences: list[TokenSequence] = field(default_factory=list)
    """None without a target."""
    problem: str = ""

    @property
    def n_targets(self) -> int:
        return sum(sequence.n_targets for sequence in self.sequences)


class _ProblemError(Exception):
    """A document that has no tokens; the message says why."""


@dataclass
class _Part:
    """A text or token ids of a document: one sequence, before it is cut."""

    factor: float
    text: str = ""
    spans: Spans | None = None
    """Characters that are targets; None for all tokens."""
    is_chat: bool = False
    ids: np.ndarray | None = None
    is_target: np.ndarray | None = None
    """``(S,)`` bool; None for all tokens."""
    first_place: int | None = None
    """Of its tokens among those of the document, if they are wanted."""


class DocumentTokenizer:
    """A tokenizer with a run's rules, for documents and for queries.

    Args:
        tokenizer: the model's.
        special_tokens: the run's ``--special_tokens``.
        rules: which tokens are targets.
        max_length: the longest sequence; 0 = documents are whole, also those without a target.
        long_documents: ``truncate`` or ``windows``.
        vocabulary: number of token ids that the model has; 0 does not check.

    Raises:
        ConfigError: ``--chat_template`` cannot be read, or is no template.
    """

    def __init__(
        self,
        tokenizer: Any,
        special_tokens: str,
        rules: DocumentRules,
        max_length: int,
        long_documents: str = "truncate",
        vocabulary: int = 0,
    ) -> None:
        self._tokenizer, self._rules, self._vocabulary = tokenizer, rules, vocabulary
        self._by_tokenizer = special_tokens == "tokenizer"
        self._before = [tokenizer.bos_token_id] if "bos" in special_tokens else []
        self._after = [tokenizer.eos_token_id] if "eos" in special_tokens else []
        self._cut = max_length, long_documents, rules.truncate_side, tokenizer.bos_token_id
        cuts_end = long_documents == "truncate" and rules.truncate_side == "right"
        self._plain = Tokenizing(tokenizer, special_tokens, max_length if cuts_end else 0)
        source = chat_template(tokenizer, rules.chat_template)
        where = f"--chat_template {rules.chat_template}" if rules.chat_template else "the tokenizer"
        self._template = (
            None if source is None else ChatTemplate(source, tokenizer.special_tokens_map, where)
        )

    @property
    def takes_chat(self) -> bool:
        """True if a conversation has tokens: there is a template, and a fast tokenizer."""
        return self._template is not None and self._tokenizer.is_fast

    def sequences(
        self, contents: Sequence[Content], weights: Sequence[float]
    ) -> list[TokenizedDocument]:
        """Return each document's sequences, whose factors hold its weight.

        A plain text is one sequence, or several windows. A preference is two, with ``+weight *
        beta / 2`` for the chosen and ``-weight * beta / 2`` for the rejected answer: with them the
        row is the gradient of ``-log sigmoid(beta * (log-ratio chosen - log-ratio rejected))`` at
        the reference model, where both log-ratios are 0 (DPO, arXiv:2305.18290, equation 7).
        Without a target in both it has no sequence.
        """
        documents: list[list[_Part] | str] = []
        for content, weight in zip(contents, weights, strict=True):
            try:
                documents.append(self._parts(content, weight))
            except (_ProblemError, TurnError) as problem:
                documents.append(str(problem))
        self._tokenize([p for parts in documents if not isinstance(parts, str) for p in parts])
        return [
            TokenizedDocument(problem=parts) if isinstance(parts, str) else self._cut_all(parts)
            for parts in documents
        ]

    def with_texts(self, content: Content, weight: float) -> tuple[TokenizedDocument, TokenTexts]:
        """Return a document's sequences, which have ``places``, and what its tokens stand for."""
        texts = TokenTexts(self._tokenizer)
        try:
            parts = self._parts(content, weight)
        except (_ProblemError, TurnError) as problem:
            return TokenizedDocument(problem=str(problem)), texts
        self._tokenize(parts)
        names = ("chosen", "rejected") if isinstance(content, Preference) else ("",)
        for part, name in zip(parts, names, strict=True):
            assert part.ids is not None
            special = self._by_tokenizer and not part.is_chat
            part.first_place = texts.add(part.ids, part.text, special, name)
        return self._cut_all(parts), texts

    def _parts(self, content: Content, weight: float) -> list[_Part]:
        if isinstance(content, Text):
            return [_Part(weight, content.text)]
        if isinstance(content, TokenIds):
            ids = np.asarray(content.ids, dtype=np.int64)
            labels = content.labels
            mask = None if labels is None else np.asarray(labels, dtype=np.int64) != IGNORE
            return [_Part(weight, ids=ids, is_target=mask)]
        if isinstance(content, Preference):
            half = weight * self._rules.preference_beta / 2
            pair = (content.chosen, half), (content.rejected, -half)
            return [part for answer, factor in pair for part in self._parts(answer, factor)]
        if isinstance(content, Completion):
            return [self._completion(content, weight)]
        if not self._tokenizer.is_fast:
            raise _ProblemError(
                "a conversation needs a fast tokenizer, which says where its tokens are in the "
                "text; the model's is a slow one"
            )
        return [self._conversation(content, weight)]

    def _completion(self, content: Completion, weight: float) -> _Part:
        whole, start = content.prompt + content.completion, len(content.prompt)
        everything = self._rules.loss_on == "all" or not start
        return _Part(weight, whole, None if everything else [(start, len(whole))])

    def _conversation(self, content: Conversation, weight: float) -> _Part:
        if self._template is None:
            raise _ProblemError(NO_TEMPLATE)
        text, spans = self._template.render(
            content.messages, content.tools, content.n_prompt, self._rules.loss_on
        )
        return _Part(weight, text, spans, is_chat=True)

    def _tokenize(self, parts: list[_Part]) -> None:
        """Fill in the token ids and targets of texts; those of one kind are tokenized together."""
        texts = [part for part in parts if part.ids is None]
        plain = [part for part in texts if part.spans is None]
        for part, ids in zip(plain, self._plain.ids([part.text for part in plain]), strict=True):
            part.ids = ids
        for is_chat in (False, True):
            marked = [p for p in texts if p.spans is not None and p.is_chat == is_chat]
            if marked:
                self._tokenize_marked(marked, is_chat)

    def _tokenize_marked(self, parts: list[_Part], is_chat: bool) -> None:
        special = self._by_tokenizer and not is_chat
        pairs = self._with_masks([(p.text, p.spans or []) for p in parts], special)
        for part, (ids, mask) in zip(parts, pairs, strict=True):
            before, after = (self._bos_of_chat(ids), []) if is_chat else (self._before, self._after)
            if not is_chat and mask.any():
                mask[np.argmax(mask) :] = True  # the tokens that end a document too
            part.ids = np.array([*before, *ids, *after], dtype=np.int64)
            part.is_target = np.concatenate(
                [np.zeros(len(before), bool), mask, np.full(len(after), mask.any())]
            )

    def _with_masks(
        self, texts: list[tuple[str, Spans]], special: bool
    ) -> list[tuple[list[int], np.ndarray]]:
        """Return each text's token ids, and which of them have a character in its spans."""
        if not self._tokenizer.is_fast:
            return [self._with_mask_slowly(text, spans[0][0], special) for text, spans in texts]
        encoded = self._tokenizer(
            [text for text, _ in texts],
            add_special_tokens=special,
            return_offsets_mapping=True,
            return_attention_mask=False,
        )
        pairs = zip(encoded.input_ids, encoded.offset_mapping, texts, strict=True)
        return [(ids, _in_spans(offsets, spans)) for ids, offsets, (_, spans) in pairs]

    def _with_mask_slowly(
        self, text: str, start: int, special: bool
    ) -> tuple[list[int], np.ndarray]:
        """Return a text's token ids, and which of them differ from those of its beginning.

        Slow tokenizers have no offsets. The first is too early if what follows changes how the
        beginning is split.
        """
        whole, alone = (
            self._tokenizer(part, add_special_tokens=special).input_ids
            for part in (text, text[:start])
        )
        n = min(len(whole), len(alone))
        first = next((i for i in range(n) if whole[i] != alone[i]), n)
        return whole, (np.arange(len(whole)) >= first) & (start < len(text))

    def _bos_of_chat(self, ids: list[int]) -> list[int]:
        """Return the BOS that a chat's tokens lack: one is there, if the rule puts one at all."""
        bos = self._tokenizer.bos_token_id
        return [bos] if self._adds_bos and ids[:1] != [bos] else []

    @functools.cached_property
    def _adds_bos(self) -> bool:
        bos = self._tokenizer.bos_token_id
        if not self._by_tokenizer or bos is None:
            return bool(self._before)
        return self._tokenizer("a").input_ids[:1] == [bos]

    def _cut_all(self, parts: list[_Part]) -> TokenizedDocument:
        whole = [sequence for part in parts if (sequence := _sequence(part)) is not None]
        if problem := self._problem_of(whole):
            return TokenizedDocument(problem=problem)
        if not self._cut[0]:
            return TokenizedDocument(whole)
        cut = [split_long(sequence, *self._cut) for sequence in whole]
        if not all(cut):  # one answer alone is no preference
            return TokenizedDocument()
        sequences = [sequence for pieces in cut for sequence in pieces]
        if len(cut) == 2 and _are_equal(*cut):
            # A preference for nothing, or for what is cut off: zero, not what rounding leaves.
            sequences = [replace(sequence, factor=0.0) for sequence in sequences]
        return TokenizedDocument(sequences)

    def _problem_of(self, sequences: list[TokenSequence]) -> str:
        largest = max((int(s.ids.max(initial=0)) for s in sequences), default=0)
        if not self._vocabulary or largest < self._vocabulary:
            return ""
        return f"token id {largest}; the model has ids from 0 to {self._vocabulary - 1}"


def _are_equal(ours: Sequence[TokenSequence], theirs: Sequence[TokenSequence]) -> bool:
    return len(ours) == len(theirs) and all(
        np.array_equal(a.ids, b.ids) and np.array_equal(a.is_target, b.is_target)
        for a, b in zip(ours, theirs, strict=True)
    )


def _sequence(part: _Part) -> TokenSequence:
    assert part.ids is not None
    n, first = len(part.ids), part.first_place
    mask = np.ones(n, bool) if part.is_target is None else part.is_target.copy()
    mask[:1] = False
    places = None if first is None else np.arange(first, first + n)
    return TokenSequence(part.ids, mask, part.factor, places=places)


def _in_spans(offsets: Sequence[tuple[int, int]], spans: Spans) -> np.ndarray:
    """Return which tokens have a character in a span, ``(S,)`` bool.

    Tokenizers cut spaces off a token's characters. One of spaces alone then has none; it counts as
    the character before its end.
    """
    starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    starts = np.minimum(starts, ends - 1)
    mask = np.zeros(len(ends), dtype=bool)
    for start, stop in spans:
        mask |= (starts < stop) & (ends > start)
    return mask
