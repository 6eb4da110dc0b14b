"""Token arrays of tars are documents: through the index, the stream and back from ``prepare``."""

import io

import numpy as np
import pytest
from helpers.corpora import run_prepare, write_jsonl, write_tar
from helpers.token_corpora import DOCUMENTS, END, joined, write_megatron

from gradproj.corpus.content import Text, TokenIds
from gradproj.corpus.documents import ReadLimits
from gradproj.corpus.index_file import open_corpus
from gradproj.corpus.stream import read_documents
from gradproj.errors import ConfigError, CorpusError


def npy(values, dtype="<u2"):
    file = io.BytesIO()
    np.save(file, np.array(values, dtype))
    return file.getvalue()


def read_tar(tmp_path, members, limits=ReadLimits()):  # noqa: B008 - frozen
    index = open_corpus(str(write_tar(tmp_path / "a.tar", members)), progress=False)
    return index, list(read_documents(index, 0, index.n_samples, limits))


@pytest.mark.parametrize("dtype", ["<u2", "<u4", "<i4", "<i8"])
def test_arrays_are_documents_of_token_ids(dtype, tmp_path):
    members = [(f"{i:03d}.npy", npy(np.arange(i) + 60_000, dtype)) for i in range(130)]
    index, documents = read_tar(tmp_path, members)
    assert index.n_samples == 130
    assert not index.unread_lines()
    assert [list(d.content.ids) for d in documents] == [
        list(range(60_000, 60_000 + i)) for i in range(130)
    ]
    assert {d.content.ids.dtype for d in documents} == {np.dtype(dtype)}


def test_json_beside_an_array_gives_domain_and_weight_and_labels_the_targets(tmp_path):
    members = [
        ("a.json", b'{"meta": {"pile_set_name": "d"}, "weight": 2.5}'),
        ("a.npy", npy([5, 6, 7])),
        ("a.labels.npy", npy([-100, 6, -100], "<i4")),
        ("b.npy", npy([8])),
    ]
    index, (first, second) = read_tar(tmp_path, members)
    assert index.domain_counts() == {"d": 1, "unknown": 1}
    assert not index.unread_lines()
    assert (first.domain, first.weight, list(first.content.ids)) == ("d", 2.5, [5, 6, 7])
    assert list(first.content.labels) == [-100, 6, -100]
    assert (second.weight, second.content.labels) == (1.0, None)


def test_array_beside_a_text_is_no_content(tmp_path):
    """A tar of texts with embeddings beside them is one of texts, as it always was."""
    embedding = npy(np.zeros(4), "<f4")
    members = [("a.npy", embedding), ("a.txt", b"A"), ("b.json", b'{"text": "B"}')]
    _, (first, second) = read_tar(tmp_path, [*members, ("b.npy", embedding)])
    assert (first.content, second.content) == (Text("A"), Text("B"))


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"npy": b"junk"}, "its .npy is not in numpy's format"),
        ({"npy": npy([0.5], "<f8")}, "its .npy holds floating-point numbers"),
        ({"npy": npy([[1, 2]])}, "its .npy is an array of shape (1, 2)"),
        ({"npy": npy([-1], "<i4")}, '"input_ids" holds -1, which is not a token id'),
        ({"npy": npy([2**31], "<u4")}, '"input_ids" holds 2147483648, which is not a token id'),
        ({"npy": npy([1]), "labels.npy": b""}, "its .labels.npy is not in numpy's format"),
        ({"npy": npy([1]), "labels.npy": npy([1, 2])}, '"labels" has 2 numbers and "input_ids" 1'),
        ({"npy": npy([1, 2]), "labels.npy": npy([2, 2])}, '"labels" holds 2 at position 0'),
        ({"npy": npy([1] * 2000)}, "too large: its .npy is over 3,000 bytes"),
        ({"labels.npy": npy([1])}, "no text: it has no .json, .txt or .npy, only .labels.npy"),
    ],
)
def test_malformed_array_is_bad_input_by_name_and_the_next_document_is_read(
    members, reason, tmp_path
):
    named = [(f"a.{suffix}", data) for suffix, data in members.items()]
    _, (bad, good) = read_tar(
        tmp_path, [*named, ("b.npy", npy([5]))], ReadLimits(max_document_bytes=3000)
    )
    assert bad.content is None
    assert reason in bad.problem
    assert list(good.content.ids) == [5]


# ---- prepare


def prepared(path, out, **settings):
    run_prepare(str(path), out, **settings)
    index = open_corpus(str(out), progress=False)
    return index, list(read_documents(index, 0, index.n_samples))


@pytest.mark.parametrize("group_by_domain", [False, True])
def test_token_corpora_become_tars_of_the_same_tokens(group_by_domain, tmp_path):
    write_megatron(tmp_path / "x", DOCUMENTS, [0, 1, 2, 3, 4])
    _, documents = prepared(tmp_path / "x.bin", tmp_path / "m", group_by_domain=group_by_domain)
    assert [d.content.ids.tolist() for d in documents] == DOCUMENTS
    joined(DOCUMENTS).astype("<u4").tofile(tmp_path / "y.npy")
    flags = {"token_dtype": "uint32", "end_of_document": END, "domain_field": "file"}
    index, documents = prepared(tmp_path / "y.npy", tmp_path / "y", **flags)
    assert [d.content.ids.tolist() for d in documents] == DOCUMENTS
    assert index.domain_counts() == {"y.npy": 4}  # the file's name is there as a domain


def test_ids_above_what_a_model_can_have_are_bad_records(tmp_path):
    write_megatron(tmp_path / "x", [[1], [-5, 3]], [0, 1, 2], "<i4", 4)
    with pytest.raises(CorpusError, match=r'x\.bin, document 2: "input_ids" holds -5, which is'):
        run_prepare(str(tmp_path / "x.bin"), tmp_path / "out")


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"token_dtype": "uint16"}, "--token_dtype: none of the inputs is a file of token ids"),
        ({"end_of_document": 3}, "--end_of_document: none of the inputs is a file of token ids"),
    ],
)
def test_flags_of_token_files_without_one_are_refused(flags, reason, tmp_path):
    name = write_jsonl(tmp_path / "in.jsonl", [{"text": "a"}])
    with pytest.raises(ConfigError, match=reason):
        run_prepare(name, tmp_path / "out", **flags)


def test_a_token_either_ends_or_begins_documents(tmp_path):
    with pytest.raises(ConfigError, match="--end_of_document or --start_of_document, not both"):
        run_prepare("x.bin", tmp_path / "out", end_of_document=1, start_of_document=1)


def test_content_type_of_ids_is_the_one_of_documents(tmp_path):
    name = write_jsonl(tmp_path / "in.jsonl", [{"input_ids": [4, 5], "labels": [-100, 5]}])
    _, (document,) = prepared(name, tmp_path / "out")
    assert isinstance(document.content, TokenIds)
    assert document.content.labels.tolist() == [-100, 5]
