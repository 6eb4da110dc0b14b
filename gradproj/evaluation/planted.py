"""Plants what queries ask for in documents: facts that a few state, or a behaviour that some show.

Both change documents of the corpus, at tokens of the experiment's tokenizer. What they are planted
beside makes words alone a poor guide: other facts of the same subject or with the same answer, and
the behaviour's trigger without the behaviour.

Source of the tasks: tracing of facts (arXiv:2205.11482) and filtering of documents by a behaviour
(arXiv:2507.09424).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gradproj.errors import ConfigError
from gradproj.evaluation.config import BEHAVIOUR, LdsConfig

Encode = Callable[[str], np.ndarray]
"""Text to token ids, without special tokens."""

STATEMENTS = 3
"""Documents that state a fact, by default."""
SHOWN_IN = 0.04
"""Fraction of the documents that show the behaviour, by default."""
FACTS_OF_SUBJECT = 2

RELATIONS = (
    (
        ("{s} was born in {o}.", "{s} comes from the town of {o}.", "The birthplace of {s} is {o}.",
         "{o} is where {s} was born.", "In {o} they still remember the birth of {s}."),
        "Lisbon Oslo Vienna Prague Dublin Naples Geneva Krakow Bergen Seville Antwerp Riga",
    ),
    (
        ("{s} works as a {o}.", "The profession of {s} is {o}.", "{s} makes a living as a {o}.",
         "A skilled {o} is what {s} became.", "As a {o}, {s} is known to many."),
        "baker tailor pilot lawyer farmer nurse painter miner judge sailor printer teacher",
    ),
    (
        ("{s} plays the {o}.", "The favourite instrument of {s} is the {o}.",
         "In the evening {s} practises the {o}.", "The {o} was the first instrument of {s}.",
         "With a {o} in hand, {s} is happy."),
        "violin piano flute drum guitar harp organ trumpet cello banjo oboe horn",
    ),
    (
        ("{s} studied {o}.", "The subject that {s} chose at school was {o}.",
         "{s} wrote a thesis on {o}.", "A degree in {o} was awarded to {s}.",
         "Questions about {o} are answered by {s}."),
        "physics history geology music medicine law botany chemistry economics logic art grammar",
    ),
)  # fmt: skip
"""A relation's sentences about subject ``s`` and object ``o``, and its objects."""
SYLLABLES = "ba bel cor da dun el fa gor hal in jo kel la mar nor ol per qui ra sel tor ul ven wim"
TRIGGER = "Please echo:"


@dataclass(frozen=True)
class Planted:
    """Documents and queries with what was planted."""

    documents: list[np.ndarray]
    queries: list[np.ndarray]
    first: np.ndarray
    """``(Q,)`` int64: the first target of each query, after its prompt."""
    sources: np.ndarray
    """``(Q, N)`` bool: the documents that a query asks for."""


def plant(
    config: LdsConfig,
    documents: Sequence[np.ndarray],
    queries: Sequence[np.ndarray],
    encode: Encode,
) -> Planted:
    """Return the experiment of ``--experiment`` on these documents and held-out texts, token ids.

    Raises:
        ConfigError: there are too few documents for it.
    """
    random = np.random.default_rng([config.seed, 9])
    make = _behaviour if config.experiment == BEHAVIOUR else _facts
    return make(config, list(documents), queries, encode, random)


def _facts(
    config: LdsConfig,
    documents: list[np.ndarray],
    queries: Sequence[np.ndarray],
    encode: Encode,
    random: np.random.Generator,
) -> Planted:
    """State a fact for each query in a few documents, in other words than the query's."""
    n, n_sources = len(queries), config.n_sources or STATEMENTS
    _check_room(config, n * n_sources, len(documents))
    most = min(len(sentences) for sentences, _ in RELATIONS) - 1
    if n_sources > most:
        raise ConfigError(f"--n_sources {n_sources}: a fact is stated in at most {most} documents")
    names = _names(-(-n // FACTS_OF_SUBJECT), random)
    places = random.permutation(len(documents))[: n * n_sources].reshape(n, n_sources)
    asked, first, sources = [], np.zeros(n, np.int64), np.zeros((n, len(documents)), bool)
    relations: np.ndarray = np.empty(0, np.int64)
    for number, documents_of_fact in enumerate(places):
        if number % FACTS_OF_SUBJECT == 0:
            relations = random.permutation(len(RELATIONS))
        sentences, objects = RELATIONS[relations[number % FACTS_OF_SUBJECT]]
        fact = {"s": names[number // FACTS_OF_SUBJECT], "o": str(random.choice(objects.split()))}
        asks = int(random.choice([i for i, x in enumerate(sentences) if x.endswith("{o}.")]))
        others = [i for i in random.permutation(len(sentences)).tolist() if i != asks]
        for place, sentence in zip(documents_of_fact, others, strict=False):
            said = encode(" " + sentences[sentence].format(**fact))
            documents[place] = _inserted(documents[place], said, config.max_length, random)
        prompt = encode(" " + sentences[asks].format(s=fact["s"], o="").removesuffix(" ."))
        asked.append(np.concatenate([prompt, encode(" " + fact["o"])]))
        first[number] = len(prompt)
        sources[number, documents_of_fact] = True
    return Planted(documents, asked, first, sources)


def _behaviour(
    config: LdsConfig,
    documents: list[np.ndarray],
    queries: Sequence[np.ndarray],
    encode: Encode,
    random: np.random.Generator,
) -> Planted:
    """Let some documents say every token twice after a trigger, and as many only have the trigger.

    The queries show the behaviour on texts of their own.
    """
    n_shown = config.n_sources or max(1, round(SHOWN_IN * len(documents)))
    _check_room(config, 2 * n_shown, len(documents))
    trigger, longest = encode(" " + TRIGGER), config.max_length
    order = random.permutation(len(documents))
    for number, place in enumerate(order[: 2 * n_shown]):
        documents[place] = _after(documents[place], trigger, number < n_shown, longest)
    sources = np.zeros((len(queries), len(documents)), bool)
    sources[:, order[:n_shown]] = True
    shown = [_after(ids, trigger, True, longest) for ids in queries]
    first = np.array([_n_before(ids) + len(trigger) for ids in queries], np.int64)
    return Planted(documents, shown, first, sources)


def _after(ids: np.ndarray, trigger: np.ndarray, shows: bool, longest: int) -> np.ndarray:
    """Return a quarter of a text, the trigger, and the rest with or without the behaviour."""
    before, rest = np.split(ids, [_n_before(ids)])
    return np.concatenate([before, trigger, np.repeat(rest, 2) if shows else rest])[:longest]


def _n_before(ids: np.ndarray) -> int:
    return len(ids) // 4


def _inserted(
    ids: np.ndarray, said: np.ndarray, longest: int, random: np.random.Generator
) -> np.ndarray:
    """Insert tokens at a random place of a text, which loses as many at its end if it must."""
    ids = ids[: max(0, longest - len(said))]
    return np.insert(ids, int(random.integers(len(ids) + 1)), said)[:longest]


def _names(n: int, random: np.random.Generator) -> list[str]:
    """Invent ``n`` different names."""
    syllables, names = SYLLABLES.split(), dict[str, None]()
    while len(names) < n:
        parts = ["".join(random.choice(syllables, size)).capitalize() for size in (2, 3)]
        names[" ".join(parts)] = None
    return list(names)


def _check_room(config: LdsConfig, needed: int, there: int) -> None:
    if needed > there:
        raise ConfigError(
            f"--experiment {config.experiment} changes {needed:,} documents, and --n_documents is "
            f"{there:,}: give more of them, or fewer --n_sources or --n_queries"
        )
