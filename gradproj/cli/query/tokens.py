"""``query --tokens``: its flag, and its part of JSON lines and of the table."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradproj.errors import ConfigError
from gradproj.flags import Flags, flag
from gradproj.formatting import one_line
from gradproj.model.token_texts import TokenText
from gradproj.query.token_scores import MAX_TOKENS, TokenScores

_TOKENS_SHOWN, _LAYERS_SHOWN = 6, 3
_PIECE = 24
"""Most characters of a token in the table."""


@dataclass(frozen=True, kw_only=True)
class TokenArgs(Flags, title="tokens"):
    """Whether scores are shown by token."""

    tokens: bool = flag(
        "Show from which of its tokens, which tokens of the query and which layers the score of "
        "each listed document comes. Takes a forward and backward pass of each text.",
        False,
    )

    def check_tokens(self, *others: str) -> None:
        """Raise ``ConfigError`` for flags that do not go with it; empty ones are not given."""
        given = [other for other in others if other]
        if self.tokens and given:
            raise ConfigError(
                f"--tokens splits the scores of one scan by gradients, of single documents: leave "
                f"{given[0]} out"
            )


def token_fields(scores: TokenScores, number: int, sample_id: int) -> dict[str, Any]:
    """Return what the JSON line of a hit has of its tokens and layers; null if it is too long."""
    found = scores.found.get((number, sample_id))
    names = ["recomputed_score", *["head_score"] * scores.has_head, "layers", "tokens"]
    names += ["query_tokens"] * bool(scores.queries)
    fields: dict[str, Any] = dict.fromkeys(names)
    if found is None:
        return fields
    fields["recomputed_score"] = found.score
    if scores.has_head:
        fields["head_score"] = found.head
    fields["layers"] = dict(zip(scores.layers, found.layers.tolist(), strict=True))
    fields["tokens"] = _tokens(scores.documents[sample_id], found.parts)
    if found.query_parts is not None:
        fields["query_tokens"] = _tokens(scores.queries[number], found.query_parts)
    return fields


def _tokens(tokens: Sequence[TokenText], parts: np.ndarray) -> list[dict[str, Any]]:
    return [
        {"text": token.piece, "start": token.start, "end": token.end, "part": part}
        | ({} if token.piece else {"token": token.name})
        | ({"answer": token.answer} if token.answer else {})
        for token, part in zip(tokens, parts.tolist(), strict=True)
    ]


def token_lines(scores: TokenScores, number: int, sample_id: int) -> list[str]:
    """Return the lines of the table below a hit: its score, and where most of it comes from."""
    found = scores.found.get((number, sample_id))
    if found is None:
        return [f"not split: it has more than {MAX_TOKENS:,} tokens"]
    best = np.argsort(-np.abs(found.layers), kind="stable")[:_LAYERS_SHOWN].tolist()
    shown = [f"{scores.layers[i]} {found.layers[i]:+.1e}" for i in best]
    shown += [f"head {found.head:+.1e}"] * scores.has_head
    lines = [f"recomputed {found.score:+.3e}, of {', '.join(shown)}"]
    lines.append(f"tokens {_largest(scores.documents[sample_id], found.parts)}")
    if found.query_parts is not None:
        lines.append(f"query's {_largest(scores.queries[number], found.query_parts)}")
    return lines


def _largest(tokens: Sequence[TokenText], parts: np.ndarray) -> str:
    best = np.argsort(-np.abs(parts), kind="stable")[:_TOKENS_SHOWN]
    names = [one_line(tokens[i].piece, _PIECE) or tokens[i].name for i in best.tolist()]
    return ", ".join(f"{n!r} {parts[i]:+.1e}" for n, i in zip(names, best.tolist(), strict=True))
