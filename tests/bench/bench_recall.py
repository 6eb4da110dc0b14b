"""Recall of the document that a query was cut from: recall of verbatim excerpts, by score and
damping.

    python tests/bench/bench_recall.py demo/out [--excerpts 200] [--tokens 64] [--layers mlp]
    [--quick]

OUTPUT is any job's output, such as that of ``bash launch/demo.sh``. Excerpts are drawn from the
part of a document that its row covers, with a seed; each is asked as a text, as a person would.
Found is the document, or a near copy: one that holds half of the excerpt's runs of five tokens (so
many are left of 64 tokens where every tenth is another). "strict" is the share among the first
where four fifths are asked.
"""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gradproj import ProjectionStore
from gradproj.analysis import Preconditioner, score
from gradproj.job.recorded import recorded_config, recorded_engine
from gradproj.model.tokenization import Tokenizing
from gradproj.query import Query, QueryProjector
from gradproj.store import STATUS

RUN, SHARE, STRICT_SHARE = 5, 0.5, 0.8
"""A near copy holds so large a share of an excerpt's runs of so many tokens."""
DAMPINGS = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--excerpts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", default="", help="these only: a part of their names")
    parser.add_argument("--quick", action="store_true", help="only the damping that auto takes")
    args = parser.parse_args()
    measure(args.output, args.excerpts, args.tokens, args.seed, args.layers, args.quick)


@dataclass(frozen=True)
class Excerpt:
    """Some tokens of a document, and all documents that hold them."""

    sample_id: int
    start: int
    """First token, in the document."""
    text: str
    holders: frozenset[int]
    strict_holders: frozenset[int]


def measure(
    output: Path,
    n_excerpts: int = 200,
    n_tokens: int = 64,
    seed: int = 0,
    part: str = "",
    quick: bool = False,
) -> dict[str, tuple[float, float]]:
    """``score, damping`` -> recall among the first and among the first ten."""
    with ProjectionStore(output) as store:
        run = recorded_config(output)
        excerpts = draw_excerpts(store, run, n_excerpts, n_tokens, seed)
        queries = [Query.of(str(i), text=excerpt.text) for i, excerpt in enumerate(excerpts)]
        layers = [x.name for x in store.layers if f".{part}." in f".{x.name}."] if part else None
        asked = QueryProjector(store, run, "cpu").rows(queries)
        print(
            f"{len(excerpts)} excerpts of {n_tokens} tokens, loss {asked.loss.mean():.2f} nats per "
            f"token, of {int((store.column('status') == STATUS['ok']).sum())} documents; held by "
            f"{np.mean([len(e.holders) for e in excerpts]):.2f} documents each\n"
        )
        print(
            f"{'score':<16}{'damping':>8}{'@1':>8}{'@10':>8}{'MRR':>8}{'strict':>8}   @1 by "
            "quarter of the row's part"
        )
        found = {}
        for name, damping, values in all_scores(store, asked.rows, layers, quick):
            ranks = ranks_of(values, [e.holders for e in excerpts])
            strict = np.mean(ranks_of(values, [e.strict_holders for e in excerpts]) == 1)
            at_1, at_10 = float(np.mean(ranks == 1)), float(np.mean(ranks <= 10))
            quarters = " ".join(
                f"{share:.2f}" for share in by_quarter(ranks == 1, excerpts, store, n_tokens)
            )
            shown = (
                "" if damping is None else f"{damping:g}" if isinstance(damping, float) else damping
            )
            print(
                f"{name:<16}{shown:>8}{at_1:>8.3f}{at_10:>8.3f}{np.mean(1 / ranks):>8.3f}"
                f"{strict:>8.3f}   {quarters}",
                flush=True,
            )
            found[f"{name}, {damping}"] = at_1, at_10
        return found


def all_scores(
    store: ProjectionStore, rows: np.ndarray, layers: list[str] | None, quick: bool
) -> Iterable[tuple[str, float | str | None, np.ndarray]]:
    """``(score, damping, (Q, N))``.

    Relatif's order is that of the cosine in the preconditioned space.
    """
    for name in ("dot", "cosine"):
        yield name, None, np.asarray(score(rows, store, score=name, layers=layers))
    for kind, plain in (("kfac", "kfac"), ("second_moment", "preconditioned")):
        fitted = Preconditioner.fit(store, kind)
        for damping in ("auto",) if quick else ("auto", *DAMPINGS):
            how: dict[str, Any] = {"preconditioner": fitted, "damping": damping, "layers": layers}
            yield plain, damping, np.asarray(score(rows, store, score=plain, **how))
            yield (
                f"relatif, {plain[:7]}",
                damping,
                np.asarray(score(rows, store, score="relatif", **how)),
            )


def ranks_of(values: np.ndarray, holders: Sequence[frozenset[int]]) -> np.ndarray:
    """The place, from 1, of the best document that holds each excerpt."""
    found = []
    for scores, ids in zip(np.nan_to_num(values, nan=-np.inf), holders, strict=True):
        best = scores[list(ids)].max()
        found.append(1 + int((scores > best).sum()))
    return np.array(found)


def by_quarter(
    hit: np.ndarray, excerpts: Sequence[Excerpt], store: ProjectionStore, n_tokens: int
) -> list[float]:
    """Recall of the excerpts that begin in each quarter of what they could begin in."""
    covered = 1 + store.columns_at(["n_tokens"], [e.sample_id for e in excerpts])["n_tokens"]
    place = np.array([e.start for e in excerpts]) / np.maximum(covered - n_tokens, 1)
    quarter = np.minimum(4 * place, 3).astype(int)
    return [
        float(hit[quarter == q].mean()) if (quarter == q).any() else float("nan") for q in range(4)
    ]


def draw_excerpts(
    store: ProjectionStore, run: Any, n_excerpts: int, n_tokens: int, seed: int
) -> list[Excerpt]:
    """Excerpts of documents drawn at random, each beginning at a random token of what its row
    covers.
    """
    tokenizer = recorded_engine(store, run, "cpu").tokenizer
    ids = np.flatnonzero(store.column("status") == STATUS["ok"])
    texts = {
        i: sample.text or ""
        for i, sample in zip(ids.tolist(), store.samples(ids, text=True), strict=True)
    }
    tokens = {
        i: t[: run.batch.max_length].tolist()
        for i, t in zip(
            texts,
            Tokenizing(tokenizer, run.model.special_tokens).ids(list(texts.values())),
            strict=True,
        )
    }
    runs = {i: runs_of(t) for i, t in tokens.items()}
    generator = np.random.default_rng(seed)
    long_enough = np.array([i for i, t in tokens.items() if len(t) >= n_tokens])
    excerpts: list[Excerpt] = []
    while len(excerpts) < n_excerpts:
        sample_id = int(generator.choice(long_enough))
        start = int(generator.integers(0, len(tokens[sample_id]) - n_tokens + 1))
        piece = tokens[sample_id][start : start + n_tokens]
        text = tokenizer.decode(piece, skip_special_tokens=True)
        if not text.strip() or "\N{REPLACEMENT CHARACTER}" in text:
            continue  # it would begin or end inside a character
        wanted = runs_of(piece)
        share = {i: len(wanted & known) / len(wanted) for i, known in runs.items()}
        near, strict = (
            frozenset({sample_id} | {i for i, s in share.items() if s >= least})
            for least in (SHARE, STRICT_SHARE)
        )
        excerpts.append(Excerpt(sample_id, start, text, near, strict))
    return excerpts


def runs_of(tokens: Sequence[int]) -> set[tuple[int, ...]]:
    return {tuple(tokens[i : i + RUN]) for i in range(len(tokens) - RUN + 1)}


if __name__ == "__main__":
    main()
