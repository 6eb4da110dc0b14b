"""The first tokens of a text whose first word is cut off, without a look at the rest of it.

A word is what a tokenizer's rules (BPE) are applied to alone. It usually ends at a blank, so a text
of millions of letters without one is one word, and tokenizing it takes minutes.

BPE joins, again and again, the adjacent pair of the lowest rank, the leftmost of them. No join
crosses a border of the final tokens. So the joins to the left of a border are those of the left
part alone, in the same order: the tokens of a word before a border are all the tokens of what is
before that border ("Formalizing BPE tokenization", arXiv:2309.08715). Where the whole word has
borders is not known; but a token has at most M characters, so one of M neighbouring places is a
border. If the first tokens of the word, cut off at each of these places, are the same, they are
those of the word.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any


def longest_token(tokenizer: Any) -> int:
    """Return the most characters of a token, or 0 if the argument does not hold of the tokenizer.

    It holds of BPE without dropout, suffixes of words, or unknown characters joined to one token,
    behind a normalizer that neither removes characters nor joins them.
    """
    if not tokenizer.is_fast:
        return 0
    made = json.loads(tokenizer.backend_tokenizer.to_str())
    model, normalizer = made["model"], made["normalizer"]
    if model["type"] != "BPE":
        return 0
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    is_plain = not model["dropout"] and not model["end_of_word_suffix"]
    joins_unknown = model["unk_token"] and model["fuse_unk"] and not model["byte_fallback"]
    if not is_plain or joins_unknown or not all(map(_is_safe, steps)):
        return 0
    return max(map(len, model["vocab"]), default=0)


def _is_safe(step: dict[str, Any]) -> bool:
    if step["type"] == "Replace":
        return len(step["pattern"].get("String", "")) == 1 == len(step["content"])
    return step["type"] == "Prepend"


def settled_ids(
    encode: Callable[[Sequence[str]], Any], text: str, limit: int, n: int, longest: int
) -> list[int] | None:
    """Return ids of a beginning of ``text`` whose first ``n`` are proven to be those of the whole.

    None if they cannot be proven: the word is not long, its tokens depend on where it is cut, or a
    border may lie within a character, as those of tokens of bytes may.
    As everywhere here, no rule for words is taken to look ``limit`` characters ahead of a word's
    beginning.

    Args:
        encode: texts to their encodings.
        text: of at least twice ``limit`` characters.
        limit: characters to look at.
        n: ids that are wanted.
        longest: of ``longest_token``.
    """
    if not text[limit - longest : limit + 1].isascii():
        return None
    (far,) = encode([text[: 2 * limit]])
    word = far.char_to_word(limit - longest)
    if word is None or word != far.char_to_word(limit) or word != far.char_to_word(2 * limit - 1):
        return None
    start = far.word_to_chars(word)[0]
    if limit - longest - start <= longest:  # the beginning of a word may be a word of its own
        return None
    found: list[int] | None = None
    for cut in range(limit - longest, limit + 1):
        (each,) = encode([text[:cut]])
        if each.char_to_word(cut - 1) != word or each.word_to_chars(word)[0] != start:
            return None
        if len(each.ids) <= n or (found is not None and each.ids[:n] != found[:n]):
            return None
        found = found or each.ids
    return found
