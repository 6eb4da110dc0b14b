"""Query rows equal plain autograd of the target tokens' loss, projected by the store's matrices."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.corpora import mixed_documents, words
from helpers.jobs import run_job
from transformers import AutoModelForCausalLM, AutoTokenizer

from gradproj import ProjectionStore
from gradproj.engine.projection import ProjectionConfig
from gradproj.engine.selection import find_layers
from gradproj.errors import ConfigError
from gradproj.query import EXCERPT_CHARACTERS, Query, QueryProjector, projector

TEXT = words(9, 5)
N_DOCUMENTS = 20
SETTINGS = {
    "proj_rank_total": 16,
    "proj_rank_min": 4,
    "proj_dtype": "float32",
    "max_samples": N_DOCUMENTS,
}
OTHERS = [
    {
        "special_tokens": "bos_eos",
        "loss_reduction": "sum",
        "include_embeddings": True,
        "proj_kind": "gaussian",
    },
    {"long_documents": "windows", "max_length": 10, "special_tokens": "bos"},
]


@pytest.fixture(scope="module")
def made(job, tmp_path_factory):
    """Return the outputs of the finished job and of one job per entry of ``OTHERS``."""
    folder = tmp_path_factory.mktemp("query_rows")
    outputs = [job.output, *(folder / f"out{number}" for number in range(len(OTHERS)))]
    for output, changes in zip(outputs[1:], OTHERS, strict=True):
        run_job(
            **{"shards": job.corpus, "model": job.model, "output_dir": output} | SETTINGS | changes
        )
    return SimpleNamespace(model=job.model, outputs=outputs)


@pytest.fixture(scope="module")
def projectors(made):
    return [QueryProjector(ProjectionStore(o), device="cpu") for o in made.outputs]


def slow_row(made, ids, first, number=0, mask=None):
    """Return ``P_o G P_i^T`` by float64 autograd, and the summed loss of ``ids[first:]``.

    With a ``mask`` the loss is of the tokens where it is true.
    """
    model = AutoModelForCausalLM.from_pretrained(made.model, dtype=torch.float64).eval()
    targets = find_layers(model, ProjectionConfig().layers.split(","))
    tokens = torch.tensor(ids)
    logits = model(input_ids=tokens[None], use_cache=False).logits[0]
    losses = F.cross_entropy(logits[first - 1 : -1], tokens[first:], reduction="none")
    loss = losses.sum() if mask is None else losses[torch.tensor(mask[first:])].sum()
    gradients = torch.autograd.grad(loss, [target.module.weight for target in targets])
    matrices = ProjectionStore(made.outputs[number]).projection_matrices
    row = []
    for target, gradient in zip(targets, gradients, strict=True):
        p_i, p_o = (torch.tensor(np.array(p), dtype=torch.float64) for p in matrices[target.name])
        row.append((p_o @ gradient @ p_i.T).flatten())
    return torch.cat(row).numpy(), loss.item()


def close(got, want, rounding=1e-5):
    return np.linalg.norm(got - want) < rounding * np.linalg.norm(want)


@pytest.mark.parametrize("number", range(1 + len(OTHERS)))
def test_row_of_a_text_equals_that_of_a_document_with_it(made, projectors, number):
    texts = [document["text"] for document in mixed_documents(N_DOCUMENTS)]
    sample_id = next(i for i, text in enumerate(texts) if 4 < len(text.split()) < 9)
    got = projectors[number].rows([Query.of("q", text=texts[sample_id])])
    with ProjectionStore(made.outputs[number]) as store:
        (want,), (sample,) = store.rows([sample_id]), store.samples([sample_id])
        rounding = {"float16": 1e-3, "float32": 1e-5}[store.layout.proj_dtype]
    assert close(got.rows[0], want, rounding)
    assert got.n_tokens.tolist() == [sample.n_tokens]
    assert got.loss[0] == pytest.approx(sample.loss, rel=1e-5)


@pytest.mark.parametrize("cut", [0, 1, 17, 18, 19, 30, len(TEXT) - 1])
def test_row_of_a_completion_equals_autograd_of_its_tokens_loss(made, projectors, cut):
    tokenizer = AutoTokenizer.from_pretrained(made.model)
    ids = tokenizer(TEXT).input_ids
    ends = [len(tokenizer.decode(ids[: i + 1])) for i in range(len(ids))]
    first = max(1, next(i for i, end in enumerate(ends) if end > cut))
    want, loss = slow_row(made, ids, first)
    got = projectors[0].rows([Query.of("q", prompt=TEXT[:cut], completion=TEXT[cut:])])
    n = len(ids) - first
    assert got.n_tokens.tolist() == [n]
    assert got.loss[0] == pytest.approx(loss / n, rel=1e-5)
    assert close(got.rows[0], want / n)


def test_some_cut_of_the_text_is_inside_a_token(made):
    tokenizer = AutoTokenizer.from_pretrained(made.model)
    apart = [tokenizer(part).input_ids for part in (TEXT[:18], TEXT[18:])]
    assert apart[0] + apart[1] != tokenizer(TEXT).input_ids


def test_slow_tokenizer_finds_the_completion_without_offsets(made, projectors, monkeypatch):
    whole = [
        Query.of(str(cut), prompt=TEXT[:cut], completion=TEXT[cut:]) for cut in range(1, len(TEXT))
    ]
    want = projectors[0].rows(whole).n_tokens
    documents = projectors[0].tokenizer._documents
    fast = documents._tokenizer

    class Slow:
        is_fast = False

        def __call__(self, text, add_special_tokens, return_offsets_mapping=False):
            assert not return_offsets_mapping
            return fast(text, add_special_tokens=add_special_tokens)

    monkeypatch.setattr(documents, "_tokenizer", Slow())
    got = projectors[0].rows(whole).n_tokens
    # It may count tokens of the prompt's end, never leave out one of the completion.
    assert (got >= want).all()
    assert (got == want).mean() > 0.8


def test_final_special_tokens_are_targets_of_a_completion(projectors):
    (whole,) = projectors[1].rows([Query.of("q", text=TEXT)]).n_tokens
    last = projectors[1].rows([Query.of("q", prompt=TEXT[:-1], completion=TEXT[-1:])])
    ids = projectors[1].tokenizer._tokenizer(TEXT).input_ids
    assert whole == len(ids) + 1  # <s> is no target, </s> is
    assert last.n_tokens.tolist() == [2]


def test_completion_over_several_windows_sums_them(made, projectors):
    tokenizer = AutoTokenizer.from_pretrained(made.model)
    text, cut = words(20, 6), 30
    ids = [tokenizer.bos_token_id, *tokenizer(text).input_ids]
    first = next(i for i in range(1, len(ids)) if len(tokenizer.decode(ids[1 : i + 1])) > cut)
    assert first > 10  # the first window is all prompt
    want, n, start = 0, len(ids) - first, 0
    while start < len(ids) - 1:
        window = ids[start : start + 10]
        if first - start < len(window):
            want = want + slow_row(made, window, max(1, first - start), number=2)[0]
        start += 9
    got = projectors[2].rows([Query.of("q", prompt=text[:cut], completion=text[cut:])])
    assert got.n_tokens.tolist() == [n]
    assert close(got.rows[0], want / n)


@pytest.mark.parametrize("number", range(1 + len(OTHERS)))
def test_rows_of_many_queries_equal_each_alone(projectors, number, monkeypatch):
    queries = [Query.of(f"t{i}", text=words(1 + i % 8, 50 + i)) for i in range(40)]
    queries += [Query.of(f"c{i}", prompt=words(i % 5, i), completion=words(3, 9)) for i in range(8)]
    queries += [Query.of(f"i{i}", input_ids=list(range(5, 7 + i))) for i in range(3)]
    passes = []
    forward_backward = QueryProjector._forward_backward
    monkeypatch.setattr(
        QueryProjector, "_forward_backward", lambda *a: passes.append(1) or forward_backward(*a)
    )
    together = projectors[number].rows(queries)
    assert len(passes) < len(queries) / 3
    assert together.names == [q.name for q in queries]
    for i, query in enumerate(queries):
        alone = projectors[number].rows([query])
        assert close(together.rows[i], alone.rows[0])
        assert together.n_tokens[i] == alone.n_tokens[0]
        assert together.loss[i] == pytest.approx(alone.loss[0], rel=1e-5)


def test_token_ids_are_used_as_given(made, projectors):
    ids = AutoTokenizer.from_pretrained(made.model)(TEXT).input_ids
    want, loss = slow_row(made, ids, 1)
    got = projectors[0].rows([Query.of("q", input_ids=ids)])
    assert close(got.rows[0], want / (len(ids) - 1))
    assert got.loss[0] == pytest.approx(loss / (len(ids) - 1), rel=1e-5)
    # No special token is added.
    assert projectors[1].rows([Query.of("q", input_ids=ids)]).n_tokens.tolist() == [len(ids) - 1]


def test_masks_and_weights_are_in_the_row_and_not_in_the_loss(made, projectors):
    ids = AutoTokenizer.from_pretrained(made.model)(TEXT).input_ids
    mask = [n % 3 == 2 for n in range(len(ids))]
    labels = [token if is_target else -100 for token, is_target in zip(ids, mask, strict=True)]
    (row, loss), n = slow_row(made, ids, 1, mask=mask), sum(mask)
    got = projectors[0].rows([Query.of("q", input_ids=ids, labels=labels, weight=-2.5)])
    assert got.n_tokens.tolist() == [n]
    assert got.loss[0] == pytest.approx(loss / n, rel=1e-5)
    assert close(got.rows[0], -2.5 * row / n)


@pytest.mark.parametrize("number", [0, 2])
def test_row_of_a_preference_is_the_gradient_of_dpos_loss_at_the_reference(
    made, projectors, number
):
    prompt, answers, weight, beta = words(3, 1), (" " + words(4, 2), " " + words(2, 3)), 3.0, 0.1
    projector = projectors[number]
    got = projector.rows(
        [Query.of("q", prompt=prompt, chosen=answers[0], rejected=answers[1], weight=weight)]
    )
    halves = [
        projector.rows([Query.of("h", prompt=prompt, completion=answer)]) for answer in answers
    ]
    n = sum(int(half.n_tokens[0]) for half in halves)
    chosen, rejected = (half.rows[0] * half.n_tokens[0] for half in halves)  # of summed losses
    # -log sigmoid(beta * (log p(chosen) - log p(rejected) - its value)) has this gradient.
    assert close(got.rows[0], weight * beta / 2 * (chosen - rejected) / n)
    assert got.n_tokens.tolist() == [n]


def test_batch_that_does_not_fit_runs_in_halves(projectors, monkeypatch):
    queries = [Query.of(str(i), text=words(6, i)) for i in range(6)]
    want = projectors[0].rows(queries).rows
    collate = projector.collate

    def small_memory(sequences, chosen):
        if len(chosen) > limit:
            raise torch.OutOfMemoryError("no memory")
        return collate(sequences, chosen)

    monkeypatch.setattr(projector, "collate", small_memory)
    limit = 2
    got = projectors[0].rows(queries).rows
    assert all(close(a, b) for a, b in zip(got, want, strict=True))
    limit = 0
    with pytest.raises(
        ConfigError, match=r"query '\d': does not fit the memory of cpu; try --device cpu"
    ):
        projectors[0].rows(queries)


def test_excerpts_are_one_line_and_mark_the_completion(projectors):
    queries = [
        Query.of("a", text="control \x1b[31m and\n\n  spaces"),
        Query.of("b", prompt="the prompt", completion=" and more"),
        Query.of("c", prompt=words(40, 3), completion=" " + words(10, 4)),
        Query.of("d", input_ids=[5, 6, 7]),
        Query.of("e", text=" " * 900 + "hello there"),
        Query.of("f", prompt="prompt" + " " * 900, completion="می\u200cخواهم"),
    ]
    excerpts = projectors[2].rows(queries).excerpts  # of windows, which have no limit
    assert excerpts[0] == "control \N{REPLACEMENT CHARACTER}[31m and spaces"
    assert excerpts[1] == "the prompt >> and more"
    assert excerpts[2].startswith("...")
    assert excerpts[2].endswith(" >> " + words(10, 4))
    assert excerpts[4] == "hello there"
    assert excerpts[5] == "prompt >> می\u200cخواهم"
    assert all(len(line) <= EXCERPT_CHARACTERS and "\n" not in line for line in excerpts)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (
            {"text": words(90, 1), "where": "q.jsonl, line 4"},
            r"q\.jsonl, line 4: \d+ tokens, and the store's rows cover the first 24 of a document",
        ),
        ({"text": "a"}, "query 'q': no target for a loss"),
        ({"input_ids": [3]}, "query 'q': no target for a loss"),
        ({"messages": [{"role": "user", "content": "a"}]}, "query 'q': a conversation, and the"),
        (
            {"input_ids": [3, 10**30]},
            "query 'q': \"input_ids\" holds 10{30}, which is not a token id",
        ),
        ({"input_ids": [3, 300]}, r"query 'q': token id 300; the model has ids from 0 to \d+"),
    ],
)
def test_unsupported_query_is_rejected_by_name(projectors, query, message):
    with pytest.raises(ConfigError, match=message):
        projectors[0].rows([Query.of("other", text=TEXT), Query.of("q", **query)])


def test_preference_for_nothing_is_rejected(projectors):
    query = Query.of("q", prompt="the of", chosen=" and", rejected=" and")
    with pytest.raises(ConfigError, match="query 'q': its gradient is zero, which ranks no"):
        projectors[0].rows([query])


def test_no_query_and_a_non_finite_gradient_are_rejected(projectors, monkeypatch):
    with pytest.raises(ConfigError, match="there is no query"):
        projectors[0].rows([])
    collect = projectors[0]._engine.collect_batch
    monkeypatch.setattr(projectors[0]._engine, "collect_batch", lambda: collect() * torch.nan)
    with pytest.raises(ConfigError, match="query 'q': its gradient is not finite"):
        projectors[0].rows([Query.of("q", text=TEXT)])
