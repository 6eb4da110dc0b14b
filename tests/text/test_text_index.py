"""Token files and document frequencies beside a store: content, resumption, damage, staleness."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.corpora import mixed_documents
from helpers.outputs import EMPTY, N_SAMPLES, N_UNITS, ONE_TOKEN, ROWS_PER_UNIT, cut
from helpers.text import job_tokens, ngrams

from gradproj import ProjectionStore
from gradproj.__main__ import main
from gradproj.errors import StoreError
from gradproj.job.recorded_args import RecordedRunArgs
from gradproj.model.sequences import TokenSequence
from gradproj.storage import contents
from gradproj.text import frequencies, token_files
from gradproj.text import index as index_module
from gradproj.text.frequencies import FrequencySketch, n_counters, weight_of
from gradproj.text.index import make_text_index, open_text_index
from gradproj.text.loops import distinct_hashes, ngram_hashes
from gradproj.text.ngrams import Documents, thread_pool


def make(output, **options):
    with ProjectionStore(output) as store:
        return make_text_index(store, RecordedRunArgs(output=str(output)), **options)


def files_of(index):
    return {path.name: path.read_bytes() for path in index.files.folder.iterdir()}


@pytest.fixture
def index(output):
    return make(output)


def test_token_files_hold_the_tokens_of_every_row(index, job):
    wanted = job_tokens(job)
    got = index.files.tokens_at(np.arange(N_SAMPLES))
    for sample_id, tokens in enumerate(got):
        assert tokens.tolist() == wanted.get(sample_id, [])
    assert index.facts.n_documents == len(wanted)
    assert index.facts.n_tokens == sum(map(len, wanted.values()))


def test_command_makes_the_index_once_and_describes_it(output, capsys):
    for notes in (1, 0):
        assert main(["text", str(output)]) == 0
        printed = capsys.readouterr()
        lines = [line.split()[0] for line in printed.out.splitlines()]
        assert lines == ["folder", "documents", "frequencies"]
        assert "68 documents with" in printed.out
        assert "(median), 99 % as at most 0 documents" in printed.out
        assert printed.err.count("reading the tokens of 5 of 5 units") == notes


def test_sketch_counts_the_documents_of_each_ngram(index, job):
    documents = [ngrams(tokens) for tokens in job_tokens(job).values()]
    for document in documents[:5]:
        for ngram in document:
            hashes = ngram_hashes(
                np.array(ngram, np.uint32), np.arange(len(ngram)) == len(ngram) - 1
            )[-1:]
            wanted = sum(ngram in other for other in documents)
            assert index.frequencies.counts(hashes).tolist() == [wanted]


def random_documents(n=300, length=40, vocabulary=300):
    random = np.random.default_rng(0)
    return [(random.zipf(1.3, length) % vocabulary).astype(np.uint32) for _ in range(n)]


@pytest.mark.parametrize("n_counters", [2**17, 2**12])
def test_sketch_never_counts_too_few_and_has_the_stated_error(n_counters, monkeypatch):
    monkeypatch.setattr(frequencies, "_TOKENS_AT_ONCE", 900)
    documents = Documents.of(random_documents())
    hashes = distinct_hashes(documents.tokens, documents.ends)
    distinct, exact = np.unique(hashes, return_counts=True)
    tables = []
    for n_threads in (1, 3):
        sketch = FrequencySketch(np.zeros(n_counters, np.uint32), len(documents))
        pool, _ = thread_pool()
        for part in (documents[:100], documents[100:]):
            sketch.add(part, pool, n_threads)
        tables.append(sketch.table)
    np.testing.assert_array_equal(*tables)
    error = sketch.counts(distinct) - exact
    assert error.min() >= 0
    assert np.mean(error > np.e * len(hashes) * 3 / n_counters) < np.exp(-3)
    if n_counters > 4 * len(distinct):
        assert np.mean(error == 0) > 0.9
        assert sketch.error_quantiles([0.5]) == [0]


def test_distinct_ngrams_have_distinct_hashes():
    documents = random_documents(50)
    joined = Documents.of(documents)
    hashes = distinct_hashes(joined.tokens, joined.ends)
    wanted = [set(ngrams(document.tolist())) for document in documents]
    assert len(hashes) == sum(map(len, wanted))
    assert len(np.unique(hashes)) == len(set().union(*wanted))


def test_size_of_a_sketch_follows_the_corpus_up_to_the_limit():
    assert n_counters(0, 2**31) == 2**16
    assert 8 * 10**6 <= n_counters(10**6, 2**31) < 16 * 10**6
    assert 4 * n_counters(10**11, 2**31) == 2**31
    wanted = [np.log(10) ** 3, np.log(10) ** 3, np.log(2) ** 3]
    np.testing.assert_allclose(weight_of(np.array([0, 1, 9]), 9), wanted)


def test_long_documents_in_windows_keep_each_token_once():
    unit = SimpleNamespace(
        columns={"status": np.zeros(3)},
        sequences=[
            TokenSequence.of(ids, owner=row)
            for ids, row in (([1, 2, 3], 0), ([7, 8], 2), ([3, 4], 0))
        ],
    )
    documents = token_files._whole_documents(unit)
    assert [document.tolist() for document in documents] == [[1, 2, 3, 4], [], [7, 8]]


def test_killed_pass_continues_where_it_stopped(index, output, monkeypatch):
    whole = files_of(index)
    (index.files.folder / "text.json").unlink()
    for unit in (1, 3):
        index.files.path(unit).unlink()
    written, counted = [], []
    write, add = token_files.TokenWriter.write, FrequencySketch.add

    def add_or_die(self, documents, *threads):
        if len(counted) == 2:
            raise KeyboardInterrupt
        counted.append(len(documents))
        add(self, documents, *threads)

    monkeypatch.setattr(
        token_files.TokenWriter, "write", lambda self, u: written.append(u) or write(self, u)
    )
    monkeypatch.setattr(FrequencySketch, "add", add_or_die)
    monkeypatch.setattr(index_module, "SAVE_EVERY_S", 0.0)
    with pytest.raises(KeyboardInterrupt):
        make(output)
    assert written == [1, 3]
    with ProjectionStore(output) as store:
        assert open_text_index(store) is None
    monkeypatch.setattr(
        FrequencySketch,
        "add",
        lambda self, documents, *threads: (
            counted.append(len(documents)) or add(self, documents, *threads)
        ),
    )
    again = make(output)
    assert written == [1, 3]
    assert len(counted) == N_UNITS
    assert files_of(again) == whole


def test_ranks_share_the_units(output, index, monkeypatch):
    whole = files_of(index)
    for path in index.files.folder.iterdir():
        path.unlink()
    written = []
    write = token_files.TokenWriter.write

    def other_rank_first(self, unit):
        if not written:
            written.append(unit)
            assert make(output, share=(1, 2)) is None
        else:
            written.append(unit)
        write(self, unit)

    monkeypatch.setattr(token_files.TokenWriter, "write", other_rank_first)
    again = make(output, share=(0, 2))
    # Rank 1 begins in the middle and takes all that rank 0 has not written.
    assert written == [0, 2, 3, 4, 0, 1]
    assert files_of(again) == whole


def test_index_of_another_corpus_or_tokenizer_is_made_again(output, index):
    old = index.files.folder
    for name in ("zarr.json",):
        path = output / "projections.zarr" / name
        content = json.loads(path.read_text())
        identity = content["attributes"]["identity"]
        identity["--max_document_bytes"] = 10**6
        path.write_text(json.dumps(content))
    with ProjectionStore(output) as store:
        assert open_text_index(store) is None
    new = make(output)
    assert new.files.folder != old
    assert not old.exists()


def test_damaged_files_name_the_way_out(output, index):
    cut(index.files.path(2))
    with pytest.raises(StoreError, match=r"00000002\.npz cannot be read .*gradproj text"):
        index.files.tokens_at(np.array([2 * ROWS_PER_UNIT]))
    index.files.path(2).unlink()
    whole = make(output)
    assert len(whole.files.tokens_at(np.array([2 * ROWS_PER_UNIT]))[0])
    table = index.files.folder / "document_frequencies.npy"
    data = bytearray(table.read_bytes())
    data[-1] ^= 1
    table.write_bytes(data)
    with pytest.raises(StoreError, match=r"checksum .*Delete text\.json"):
        make(output)
    table.write_bytes(data[:-4])
    with (
        ProjectionStore(output) as store,
        pytest.raises(StoreError, match=r"another size.*Delete text\.json"),
    ):
        open_text_index(store)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([1] * (ROWS_PER_UNIT - 1), f"documents, its unit has {ROWS_PER_UNIT}"),
        ([1] * ROWS_PER_UNIT, f"tokens, its documents {ROWS_PER_UNIT}"),
    ],
)
def test_token_file_of_another_length_is_damaged(output, index, lengths, message):
    tokens = np.zeros(ROWS_PER_UNIT - 1, np.uint16)
    np.savez(index.files.path(0), tokens=tokens, lengths=np.array(lengths, np.int32))
    with pytest.raises(StoreError, match=rf"00000000\.npz cannot be read .*{message}.*Delete it"):
        index.files.read(0)


@pytest.mark.parametrize("has_locks", [True, False])
def test_another_first_query_at_the_same_time_loses_nothing(output, index, monkeypatch, has_locks):
    """The other call begins before this one has counted, and then this one finishes."""
    folder, whole = index.files.folder, files_of(index)
    (folder / "text.json").unlink()
    of_other = folder / ".document_frequencies.npy.1.abcd.tmp"
    tries, notes = [], []

    def try_lock(file):
        """The other process holds the lock at first, and is done at the next look."""
        tries.append(file)
        if not has_locks:
            return None
        if len(tries) > 1:
            (folder / "text.json").write_bytes(whole["text.json"])
        return len(tries) > 1

    monkeypatch.setattr(contents, "try_lock", try_lock)
    counted = []
    add = FrequencySketch.add
    monkeypatch.setattr(
        FrequencySketch, "add", lambda self, *rest: counted.append(1) or add(self, *rest)
    )
    of_other.write_bytes(b"unfinished")
    assert make(output, note=notes.append).facts == index.facts
    assert len(counted) == (0 if has_locks else N_UNITS)
    assert of_other.is_file() != has_locks
    assert len(notes) == has_locks
    of_other.unlink(missing_ok=True)
    assert files_of(index) == whole


def test_documents_without_a_row_have_no_tokens(index):
    assert [len(t) for t in index.files.tokens_at(np.array([EMPTY, ONE_TOKEN]))] == [0, 0]
    assert len(mixed_documents(N_SAMPLES)) == N_SAMPLES
