"""Token corpora of other tools are read to the ids that were written, document by document.

The bytes are written here by the formats' specifications; the tools' own files were compared once.
"""

import itertools
import struct

import numpy as np
import pytest
from helpers.token_corpora import (
    DOCUMENTS,
    END,
    joined,
    write_datatrove,
    write_megatron,
    write_old_megatron,
)

from gradproj.corpus.inputs.records import InputReader, TokenRules
from gradproj.corpus.sources import read_records
from gradproj.errors import ConfigError, CorpusError


def read(path, fields=(), **rules):
    """Return ids of every document."""
    records = read_records(InputReader(str(path), fields, TokenRules(**rules)))
    return [record.value["input_ids"].tolist() for record in records]


# ---- Flat files


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32", "int64"])
@pytest.mark.parametrize("name", ["train.bin", "part-0.npy", "x.ds"])
def test_bare_numbers_are_split_after_the_id_that_ends_a_document(name, dtype, tmp_path):
    joined(DOCUMENTS).astype(dtype).tofile(tmp_path / name)
    assert read(tmp_path / name, dtype=dtype, boundary=END) == DOCUMENTS


def test_tokens_after_the_last_end_are_a_document_too(tmp_path):
    joined([*DOCUMENTS, [3, 4]]).astype("<u2").tofile(tmp_path / "x.bin")
    assert read(tmp_path / "x.bin", dtype="uint16", boundary=END)[-1] == [3, 4]


def test_bare_numbers_are_split_before_the_id_that_begins_a_document(tmp_path):
    documents = [[END, 5, 6], [END], [END, 7]]
    joined(documents).astype("<u2").tofile(tmp_path / "x.bin")
    rules = {"dtype": "uint16", "boundary": END, "boundary_ends": False}
    assert read(tmp_path / "x.bin", **rules) == documents


@pytest.mark.parametrize("at_once", [1, 3, 4, 100])
@pytest.mark.parametrize("ends", [True, False])
def test_documents_do_not_depend_on_the_tokens_read_at_once(at_once, ends, tmp_path, monkeypatch):
    joined(DOCUMENTS).astype("<u2").tofile(tmp_path / "x.bin")
    rules = {"dtype": "uint16", "boundary": END, "boundary_ends": ends}
    want = read(tmp_path / "x.bin", **rules)
    monkeypatch.setattr("gradproj.corpus.inputs.tokens._TOKENS_AT_ONCE", at_once)
    assert read(tmp_path / "x.bin", **rules) == want
    assert list(itertools.chain.from_iterable(want)) == joined(DOCUMENTS).tolist()


def test_array_with_numpys_header_says_its_own_type(tmp_path):
    np.save(tmp_path / "x.npy", joined(DOCUMENTS).astype("<u4"))
    assert read(tmp_path / "x.npy", boundary=END) == DOCUMENTS
    # Another type that was given for files without a header changes nothing.
    assert read(tmp_path / "x.npy", dtype="uint16", boundary=END) == DOCUMENTS


def test_rows_of_a_matrix_are_documents_unless_an_id_divides_them(tmp_path):
    rows = np.array([[1, 2, END], [3, 4, 5], [6, END, 7]], "<u2")
    np.save(tmp_path / "x.npy", rows)
    assert read(tmp_path / "x.npy") == rows.tolist()
    assert read(tmp_path / "x.npy", boundary=END) == [[1, 2, END], [3, 4, 5, 6, END], [7]]


@pytest.mark.parametrize(
    ("magic", "version", "dtype"), [(20240520, 1, "<u2"), (20240801, 7, "<u4")]
)
def test_header_of_llm_c_is_no_token(magic, version, dtype, tmp_path):
    documents = [[END, 5, 6], [END, 7]]
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, 5
    (tmp_path / "x.bin").write_bytes(header.tobytes() + joined(documents).astype(dtype).tobytes())
    assert read(tmp_path / "x.bin", boundary=END, boundary_ends=False) == documents


SMALL = (np.arange(200) % 90).astype("<u2")


@pytest.mark.parametrize(
    ("name", "raw", "rules", "reason"),
    [
        ("x.bin", SMALL.tobytes(), {"boundary": 1}, "do not say their type: give --token_dtype"),
        ("x.npy", SMALL.tobytes(), {"boundary": 1}, "do not say their type: give --token_dtype"),
        ("x.bin", SMALL.tobytes(), {"dtype": "uint16"}, "no .idx of Megatron's lies beside it"),
        ("x.npy", SMALL.tobytes(), {"dtype": "uint16"}, "flat file of token ids: give --end_of_d"),
        (
            "x.bin",
            SMALL.tobytes(),
            {"dtype": "uint16", "boundary": 91},
            "none of its 200 tokens has",
        ),
        ("x.bin", b"", {"dtype": "uint16", "boundary": 1}, "holds no token"),
        ("x.bin", b"abc", {"dtype": "uint16", "boundary": 1}, "3 bytes of tokens are not 2"),
        (
            "x.bin",
            SMALL.astype("<u4").tobytes(),
            {"dtype": "uint16", "boundary": 1},
            "read as --token_dtype uint16 it has every second token near 0",
        ),
        (
            "x.bin",
            (SMALL * 500).tobytes(),
            {"dtype": "uint32", "boundary": 1},
            "read as --token_dtype uint32 it holds the token id 32,768,000",
        ),
    ],
)
def test_flat_file_that_cannot_be_read_is_one_clear_line(name, raw, rules, reason, tmp_path):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises((ConfigError, CorpusError)) as caught:
        read(tmp_path / name, **rules)
    assert reason in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)


def test_numpy_header_of_another_type_or_length_is_one_clear_line(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros(5))
    with pytest.raises(CorpusError, match=r"x\.npy: holds floating-point numbers"):
        read(tmp_path / "x.npy", boundary=1)
    np.save(tmp_path / "x.npy", SMALL)
    (tmp_path / "x.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:-1])
    with pytest.raises(CorpusError, match="399 bytes of tokens are not 400, as uint16 of shape"):
        read(tmp_path / "x.npy", boundary=1)


# ---- datatrove


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_datatrove_files_are_split_by_their_index(dtype, tmp_path):
    documents = [*DOCUMENTS, [], [9, 9]]
    write_datatrove(tmp_path / "x.ds", documents, dtype)
    assert read(tmp_path / "x.ds") == documents


def test_loss_mask_of_datatrove_becomes_labels(tmp_path):
    write_datatrove(tmp_path / "x.ds", [[5, 6, 7], [8, 9]])
    (tmp_path / "x.ds.loss").write_bytes(struct.pack("<5?", 0, 1, 1, 1, 0))
    records = list(read_records(InputReader(str(tmp_path / "x.ds"))))
    labels = [record.value["labels"].tolist() for record in records]
    assert labels == [[-100, 6, 7], [8, -100]]


@pytest.mark.parametrize(
    ("ends", "loss", "reason"),
    [
        ([4, 5, 306, 400], None, "620 bytes are not the 400 tokens of"),
        ([4, 306, 5, 310], None, "the ends of documents do not ascend"),
        ([], None, "0 bytes are not numbers of 8 bytes"),
        (None, b"\1" * 309, "309 bytes, and the file has 310 tokens"),
    ],
)
def test_datatrove_files_that_disagree_are_one_clear_line(ends, loss, reason, tmp_path):
    documents = [*DOCUMENTS, [3]]
    write_datatrove(tmp_path / "x.ds", documents, ends=ends)
    if loss:
        (tmp_path / "x.ds.loss").write_bytes(loss)
    with pytest.raises(CorpusError, match=reason):
        read(tmp_path / "x.ds")


# ---- Megatron and GPT-NeoX


@pytest.mark.parametrize(
    ("dtype", "code"), [("u1", 1), ("<i2", 3), ("<i4", 4), ("<i8", 5), ("<u2", 8)]
)
@pytest.mark.parametrize("modes", [b"", b"\0\0\0"])
def test_megatron_corpus_is_read_in_every_integer_type(dtype, code, modes, tmp_path):
    documents = [[5, 6, 7], [9], [8] * 100]
    write_megatron(tmp_path / "x", documents, [0, 1, 2, 3], dtype, code, modes)
    assert read(tmp_path / "x.bin") == documents


@pytest.mark.parametrize("write", [write_megatron, write_old_megatron])
def test_sequences_of_a_megatron_document_are_joined(write, tmp_path):
    sequences = [[5, 6], [7], [8, 9], [1]]
    write(tmp_path / "x", sequences, [0, 2, 2, 3, 4])
    assert read(tmp_path / "x.bin") == [[5, 6, 7], [], [8, 9], [1]]


@pytest.mark.parametrize("documents", [None, [0]])
def test_each_sequence_is_a_document_if_the_index_names_none(documents, tmp_path):
    write_megatron(tmp_path / "x", DOCUMENTS, documents)
    assert read(tmp_path / "x.bin") == DOCUMENTS


def edited(path, start, stop, new):
    raw = path.read_bytes()
    path.write_bytes(raw[:start] + new + raw[stop:])


@pytest.mark.parametrize(
    ("start", "stop", "new", "reason"),
    [
        (0, 2, b"XX", "not an index of Megatron's or GPT-NeoX's"),
        (0, 9999, b"", "not an index of Megatron's or GPT-NeoX's"),
        (9, 10, b"\2", "an index of version 2; version 1 is read"),
        (17, 18, b"\6", "says that tokens are of type 6, which is not integers"),
        (20, 9999, b"", "20 bytes, and its header asks for 58"),
        (-1, 9999, b"", "81 bytes, and its header asks for 82"),
        (18, 26, b"\xff" * 8, "82 bytes, and its header asks for 221,360,928,884,514,619,"),
        (-8, 9999, b"\1" + bytes(7), "its documents do not cover its 2 sequences in order"),
        (34, 38, b"\xff\xff\0\0", "one of the two is cut short or of another corpus"),
        (34, 38, b"\xff\xff\xff\xff", "one of the two is cut short or of another corpus"),
        (42, 50, b"\xff" * 8, "one of the two is cut short or of another corpus"),
    ],
)
def test_damaged_megatron_index_is_one_clear_line(start, stop, new, reason, tmp_path):
    write_megatron(tmp_path / "x", [[5, 6, 7], [8]], [0, 1, 2])
    size = (tmp_path / "x.idx").stat().st_size
    assert size == 82
    edited(tmp_path / "x.idx", start % size, stop, new)
    with pytest.raises(CorpusError, match=reason) as caught:
        read(tmp_path / "x.bin")
    assert f"{tmp_path / 'x'}." in str(caught.value)


def test_index_of_fairseq_whose_ids_are_shifted_is_refused(tmp_path):
    write_old_megatron(tmp_path / "x", DOCUMENTS, None)
    with pytest.raises(CorpusError, match=r"fairseq's own index, whose \.bin has each id plus one"):
        read(tmp_path / "x.bin")


@pytest.mark.parametrize("name", ["x.idx", "x.ds.index", "x.ds.metadata", "x.ds.loss"])
def test_companion_of_a_token_file_is_not_an_input(name):
    with pytest.raises(ConfigError, match=r"is read with its file of tokens; .*: x\.(bin|ds)$"):
        read(name)
