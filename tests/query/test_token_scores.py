"""Scores by token and layer against autograd with a weight of its own for every position."""

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.chat import chat_tokenizer, conversation, parts_of, tokens_of
from helpers.corpora import make_corpus, mixed_documents, words
from helpers.jobs import run_job
from helpers.models import make_model
from helpers.outputs import N_SAMPLES, copy_of
from helpers.query_command import ask, write_queries
from transformers import AutoModelForCausalLM, AutoTokenizer

from gradproj import ProjectionStore
from gradproj.analysis import Preconditioner
from gradproj.cli.query import AnswerWatch, QueryConfig, Session, answer
from gradproj.query import Query, QueryProjector, token_scores
from gradproj.store.head_rows import HEAD_NAME

assert ask

A, B, C, D = (words(n, n) for n in (5, 2, 3, 30))
CHAT = conversation(A, B, C, A)
BETA, WINDOW = 0.3, 40
FORMS = [
    ({"text": D}, [(1, [[D]])]),
    ({"text": A, "weight": -2.5}, [(-2.5, [[A]])]),
    ({"messages": CHAT, "weight": 3}, [(3, parts_of("qwen", CHAT))]),
    (
        {"prompt": f"{A}\n", "chosen": B, "rejected": C},
        [(BETA / 2, [f"{A}\n", [B]]), (-BETA / 2, [f"{A}\n", [C]])],
    ),
    ({"text": B}, [(1, [[B]])]),
]
"""Fields of a document, and its texts ``(factor, parts)`` with the targets in lists."""
QUERIES = (
    {"id": "text", "text": A, "weight": 2},
    {"id": "pair", "prompt": B, "completion": f" {C}"},
)
CURVATURES = {
    "kfac": "kfac", "ekfac": "ekfac", "preconditioned": "second_moment", "relatif": "kfac",
    "dot": None, "cosine": None,
}  # fmt: skip


class Reference:
    """Rows of single positions ``R_o P_o (g_t a_t^T) P_i^T R_i^T`` in a model without gradproj."""

    def __init__(self, store, folder):
        self.store = store
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        self.targets = [self.model.get_submodule(layer.name) for layer in store.layers]
        self._known = {}

    def rows(self, ids, is_target):
        """Return ``(S, D)`` float64 of a sequence: each position's share of its gradient."""
        ids, is_target = torch.tensor(ids), torch.tensor(is_target)
        changes = []
        for target in self.targets:
            n_o, n_i = target.weight.shape
            change = torch.zeros(len(ids), n_o, n_i, dtype=torch.float64, requires_grad=True)
            target.forward = self._forward(target, change)
            changes.append(change)
        logits = self.model(input_ids=ids[None], use_cache=False).logits[0]
        loss = F.cross_entropy(logits[:-1][is_target[1:]], ids[1:][is_target[1:]], reduction="sum")
        found = []
        for layer, gradient in zip(
            self.store.layers, torch.autograd.grad(loss, changes), strict=True
        ):
            p_i, p_o = self._tensors(self.store.projection_matrices, layer.name)
            row = p_o @ gradient @ p_i.T
            if self.store.basis is not None:
                r_i, r_o = self._tensors(self.store.basis, layer.name)
                row = r_o @ row @ r_i.T
            found.append(row.flatten(1))
        return torch.cat(found, dim=1).numpy()

    @staticmethod
    def _forward(target, change):
        return lambda x: (
            F.linear(x, target.weight, target.bias) + torch.einsum("soi,nsi->nso", change, x)
        )

    @staticmethod
    def _tensors(arrays, name):
        return (torch.tensor(np.array(x), dtype=torch.float64) for x in arrays[name])

    def document(self, texts, max_length):
        """Return each token's row ``(T, D)`` of texts ``(factor, ids, mask)`` in windows.

        Tokens in no window that has a target are left out.
        """
        if str(texts) in self._known:
            return self._known[str(texts)]
        found = []
        for factor, ids, mask in texts:
            rows, covered = np.zeros((len(ids), self.store.dim)), np.zeros(len(ids), bool)
            for start in range(0, len(ids) - 1, max_length - 1):
                end = start + max_length
                targets = [False, *mask[start + 1 : end]]
                if any(targets):
                    rows[start:end] += factor * self.rows(ids[start:end], targets)
                    covered[start:end] = True
            found.append(rows[covered])
        return self._known.setdefault(str(texts), np.concatenate(found))


@pytest.fixture(scope="module")
def dense(job, tmp_path_factory):
    """A copy of the finished job: float16 rows of mean losses in no basis, cut at 24 tokens."""
    output = copy_of(job.output, tmp_path_factory.mktemp("dense"))
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    texts = {}
    with ProjectionStore(output) as store:
        for number in (0, 7, 31):
            text = mixed_documents(N_SAMPLES)[number]["text"]
            ids = tokenizer(text).input_ids[:24]
            texts[number] = [(1, ids, [True] * len(ids))]
        yield SimpleNamespace(
            output=output, store=store, reference=Reference(store, job.model),
            texts=texts, tokenizer=tokenizer, max_length=24,
        )  # fmt: skip


@pytest.fixture(scope="module")
def signs(tmp_path_factory):
    """Signs of an eigenbasis with head rows, of summed losses: every form, in windows."""
    root = tmp_path_factory.mktemp("tokens")
    tokenizer = chat_tokenizer("qwen")
    make_model(root / "model", vocab_size=len(tokenizer), max_position_embeddings=256)
    chat_tokenizer("qwen", root / "model")
    run_job(
        shards=make_corpus(root / "tars", [fields for fields, _ in FORMS]),
        model=root / "model", output_dir=root / "out", proj_rank_total=16, proj_rank_min=4,
        encoding="signs", basis="eigen", pilot_tokens=50, loss_reduction="sum", batch_size=4,
        max_length=WINDOW, long_documents="windows", preference_beta=BETA, head_rows="6x8",
    )  # fmt: skip
    texts = {
        number: [(factor, *tokens_of(tokenizer, parts)) for factor, parts in each]
        for number, (_, each) in enumerate(FORMS)
    }
    with ProjectionStore(root / "out") as store:
        yield SimpleNamespace(
            output=root / "out", store=store, reference=Reference(store, root / "model"),
            texts=texts, tokenizer=tokenizer, max_length=WINDOW,
        )  # fmt: skip


def query_texts(made):
    whole, cut = made.tokenizer(A).input_ids, made.tokenizer(f"{B} {C}").input_ids
    n = len(made.tokenizer(B).input_ids)
    return [(2, whole, [True] * len(whole))], [(1, cut, [i >= n for i in range(len(cut))])]


def plain(made, rows):
    """Return rows of plain projected gradients from rows weighted in an eigenbasis."""
    if made.store.basis is None:
        return rows
    return Preconditioner.unweighted(made.store).solve(torch.from_numpy(rows)).numpy()


def check(made, objects, score):
    """Compare the parts of hits with those of single positions."""
    queries = [Query.of(x["id"], **{k: v for k, v in x.items() if k != "id"}) for x in QUERIES]
    rows = QueryProjector(made.store, device="cpu").rows(queries)
    asked = torch.from_numpy(rows.rows.astype(np.float64))
    kind = CURVATURES[score]
    if kind is None:
        solved = torch.from_numpy(plain(made, asked.numpy()))
    else:
        solved = Preconditioner.fit(made.store, kind).solve(asked)
    is_mean = made.store.attributes["identity"]["--loss_reduction"] == "mean"
    n_checked = 0
    for hit in objects:
        if hit["id"] not in made.texts:
            continue
        query = [x["id"] for x in QUERIES].index(hit["query"])
        of_tokens = made.reference.document(made.texts[hit["id"]], made.max_length)
        row = of_tokens.sum(axis=0)
        divisor, of_query = 1.0, 1.0
        if score == "relatif":
            own = Preconditioner.fit(made.store, kind).solve(torch.from_numpy(row[None]))[0]
            divisor = np.sqrt(own.numpy() @ row)
        if score == "cosine":
            divisor = np.sqrt(plain(made, row[None])[0] @ row)
            of_query = np.sqrt(float((asked[query] * solved[query]).sum()))
        want = of_tokens @ solved[query].numpy() / divisor / of_query
        got = np.array([token["part"] for token in hit["tokens"]])
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())
        layers, total = np.array(list(hit["layers"].values())), want.sum()
        spans = [slice(x.slice_start, x.slice_end) for x in made.store.layers]
        by_layer = [row[x] @ solved[query].numpy()[x] / divisor / of_query for x in spans]
        largest = np.abs(by_layer).max()
        np.testing.assert_allclose(layers, by_layer, rtol=1e-4, atol=1e-5 * largest)
        whole = hit["recomputed_score"] - hit.get("head_score", 0.0)
        assert whole == pytest.approx(total, rel=1e-4, abs=1e-5 * largest)
        n_tokens = rows.n_tokens[query] if is_mean else 1
        texts = query_texts(made)[query]
        by_query = made.reference.document(texts, made.max_length) / n_tokens
        if kind is None:
            solved_row = plain(made, row[None])[0]
        else:
            fitted = Preconditioner.fit(made.store, kind)
            solved_row = fitted.solve(torch.from_numpy(row[None]))[0].numpy()
        want = by_query @ solved_row / divisor / of_query
        got = np.array([token["part"] for token in hit["query_tokens"]])
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())
        for parts in ("tokens", "query_tokens"):
            added = sum(token["part"] for token in hit[parts])
            assert added == pytest.approx(whole, rel=1e-5, abs=1e-7 * largest)
        assert layers.sum() == pytest.approx(whole, rel=1e-5, abs=1e-7 * largest)
        n_checked += 1
    assert n_checked >= len(made.texts)


@pytest.mark.parametrize("score", CURVATURES)
def test_parts_are_those_of_single_positions_and_sum_to_the_score(dense, ask, tmp_path, score):
    queries = write_queries(tmp_path / "q.jsonl", *QUERIES)
    words = ["--queries", queries, "--score", score, "--tokens", "--top_k", 68, "--bottom_k", 0]
    hits = ask.objects(dense.output, *words)
    check(dense, hits, score)
    for hit in hits:  # float16 rounds each value of a row by 5e-4 at most
        largest = np.abs(list(hit["layers"].values())).sum()
        assert abs(hit["score"] - hit["recomputed_score"]) < 1e-3 * largest


@pytest.mark.parametrize("score", ["kfac", "relatif", "cosine"])
def test_windows_weights_chats_and_preferences_in_an_eigenbasis(signs, ask, tmp_path, score):
    queries = write_queries(tmp_path / "q.jsonl", *QUERIES)
    words = ["--queries", queries, "--score", score, "--tokens", "--top_k", 5, "--bottom_k", 0]
    hits = ask.objects(signs.output, *words)
    check(signs, hits, score)
    assert all(("head_score" in hit) == (score == "kfac") for hit in hits)
    if score == "kfac":
        assert all(hit["head_score"] for hit in hits)
        alone = ask.objects(signs.output, *words, "--layers", f"attn,mlp,{HEAD_NAME}")
        assert [hit["head_score"] for hit in alone] == [hit["head_score"] for hit in hits]


def one_at_a_time(ask, made, path, *queries):
    """Return the hits of single queries by dot, by query and document."""
    words = ["--queries", write_queries(path, *queries), "--score", "dot", "--tokens"]
    hits = ask.objects(made.output, *words, "--top_k", 68, "--bottom_k", 0)
    return {(hit["query"], hit["id"]): hit for hit in hits}


def parts_of_hit(hit):
    return np.array([token["part"] for token in hit["tokens"]])


def test_parts_for_sets_of_queries_are_those_of_their_queries(dense, ask, tmp_path):
    control = {"id": "control", "text": B}
    single = one_at_a_time(ask, dense, tmp_path / "q.jsonl", *QUERIES, control)
    words = ["--queries", write_queries(tmp_path / "q.jsonl", *QUERIES), "--score", "dot"]
    words += ["--contrast", write_queries(tmp_path / "c.jsonl", control), "--no-unit_queries"]
    words += ["--tokens", "--top_k", 6, "--bottom_k", 0, "--aggregate"]
    for aggregate in ("mean", "max"):
        for hit in ask.objects(dense.output, *words, aggregate):
            pair = [single[query["id"], hit["id"]] for query in QUERIES]
            parts = [parts_of_hit(each) for each in pair]
            best = int(pair[1]["recomputed_score"] > pair[0]["recomputed_score"])
            want = np.mean(parts, axis=0) if aggregate == "mean" else parts[best]
            want = want - parts_of_hit(single["control", hit["id"]])
            np.testing.assert_allclose(
                parts_of_hit(hit), want, rtol=1e-4, atol=1e-5 * np.abs(want).max()
            )
            assert hit["recomputed_score"] == pytest.approx(want.sum(), rel=1e-4)
            assert "query_tokens" not in hit


def test_documents_that_do_not_fit_the_memory_take_groups_of_queries(
    dense, ask, tmp_path, monkeypatch
):
    words = ["--queries", write_queries(tmp_path / "q.jsonl", *QUERIES), "--tokens"]
    together = ask.objects(dense.output, *words, "--top_k", 3, "--bottom_k", 2)
    monkeypatch.setattr(token_scores, "_ROW_BYTES", 1)
    alone = ask.objects(dense.output, *words, "--top_k", 3, "--bottom_k", 2)
    assert [hit["id"] for hit in alone] == [hit["id"] for hit in together]
    for one, other in zip(alone, together, strict=True):
        for name in ("tokens", "query_tokens"):
            theirs = [token["part"] for token in other[name]]
            ours = [token["part"] for token in one[name]]
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())


def test_queries_of_another_store_are_not_split_and_those_of_another_model_are(
    dense, ask, tmp_path
):
    few = ["--tokens", "--top_k", 2, "--bottom_k", 0, "--score", "dot"]
    hits = ask.objects(dense.output, "--query_store", dense.output, *few)
    assert all("query_tokens" not in hit for hit in hits)
    assert all(sum(parts_of_hit(x)) == pytest.approx(x["recomputed_score"]) for x in hits)
    other = make_model(tmp_path / "other")
    model = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    model.save_pretrained(other)
    hits = ask.objects(dense.output, "--text", A, "--query_model", other, *few)
    for hit in hits:
        for name in ("tokens", "query_tokens"):
            added = sum(token["part"] for token in hit[name])
            assert added == pytest.approx(hit["recomputed_score"], rel=1e-5)


def test_table_names_the_largest_tokens_of_document_and_query(dense, ask):
    lines, _ = ask(dense.output, "--text", A, "--tokens", "--top_k", 1, "--bottom_k", 0)
    (hit,) = ask.objects(dense.output, "--text", A, "--tokens", "--top_k", 1, "--bottom_k", 0)
    for label, name in (("tokens", "tokens"), ("query's", "query_tokens")):
        (line,) = [line for line in lines if line.strip().startswith(f"{label} ")]
        largest = max(hit[name], key=lambda token: abs(token["part"]))
        assert f"{label} {largest['text'].strip()!r} {largest['part']:+.1e}" in line
    assert any(f"recomputed {hit['recomputed_score']:+.3e}" in line for line in lines)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--score", "text"], "leave --score text out"),
        (["--score", "kfac+text"], r"leave --score kfac\+text out"),
        (["--by", "domain"], "leave --by domain out"),
        (["--rescore", "3"], "leave --rescore 3 out"),
        (["--damping", "0.1,1"], "leave all values of --damping but one out"),
        (["--shards", "/nowhere"], "nowhere"),
    ],
)
def test_what_has_no_parts_is_refused_before_the_scan(dense, ask, words, message, monkeypatch):
    monkeypatch.setattr(ProjectionStore, "scan_bands", None)
    assert re.search(message, ask.mistake(dense.output, "--text", A, "--tokens", *words))


def test_documents_of_too_many_tokens_are_listed_and_not_split(dense, ask, monkeypatch):
    words = ["--text", A, "--tokens", "--score", "cosine", "--top_k", 68, "--bottom_k", 0]
    whole = ask.objects(dense.output, *words)
    monkeypatch.setattr(token_scores, "MAX_TOKENS", 6)
    hits = ask.objects(dense.output, *words)
    assert [hit["id"] for hit in hits] == [hit["id"] for hit in whole]
    long = [len(hit["tokens"]) > 6 for hit in whole]
    assert 0 < sum(long) < len(long)
    for hit, before, is_long in zip(hits, whole, long, strict=True):
        assert hit.keys() == before.keys()
        if is_long:
            assert hit["recomputed_score"] is hit["tokens"] is hit["query_tokens"] is None
        else:
            assert parts_of_hit(hit) == pytest.approx(parts_of_hit(before), rel=1e-4, abs=1e-6)
    lines, _ = ask(dense.output, *words)
    assert sum("not split" in line for line in lines) == sum(long)


def test_a_store_of_a_training_run_is_refused(dense, ask, monkeypatch):
    monkeypatch.setattr("gradproj.cli.query.split.is_job_store", lambda store: False)
    message = ask.mistake(dense.output, "--query_store", dense.output, "--tokens")
    assert "rows of a training run are of the weights of their step" in message


def test_passes_of_texts_report_to_a_watch_that_may_end_them(dense):
    config = QueryConfig(output=str(dense.output), text=A, tokens=True, top_k=3, device="cpu")
    seen = []

    class Watch(AnswerWatch):
        def advanced(self, n_done, n_total, what):
            seen.append((n_total, what))
            if (n_total, what) == (6, "texts"):  # documents: three at either end
                raise KeyError("enough")

    config = replace(config, bottom_k=3)
    with pytest.raises(KeyError, match="enough"):
        answer(config, Session(config.output), watch=Watch())
    assert seen[-1] == (6, "texts")
    assert answer(config, Session(config.output)).tokens is not None
