"""Columns of Parquet and Arrow files of every kind become the documents of their rows."""

import numpy as np
import pyarrow
import pyarrow.ipc
import pytest
import zstandard
from helpers.corpora import line_of, packed_documents, run_prepare, slow_samples, write_jsonl
from pyarrow import parquet

from gradproj.corpus.content import Completion, Conversation, Preference, TokenIds
from gradproj.corpus.index_file import open_corpus
from gradproj.corpus.stream import read_documents
from gradproj.errors import CorpusError

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
FORMS = [
    {"prompt": "a", "completion": "b", "weight": -2.0},
    {"messages": TURNS},
    {"prompt": "p", "chosen": "yes", "rejected": "no"},
    {"input_ids": [4, 5, 6], "labels": [-100, 5, 6]},
]
WANT = [
    (Completion("a", "b"), -2.0),
    (Conversation(TURNS), 1.0),
    (Preference(Completion("p", "yes"), Completion("p", "no")), 1.0),
    (TokenIds([4, 5, 6], [-100, 5, 6]), 1.0),
]


def write_table(path, table):
    if path.suffix == ".parquet":
        try:
            parquet.write_table(table, path, row_group_size=3)
        except pyarrow.ArrowNotImplementedError as error:
            pytest.skip(f"this pyarrow cannot write such a file: {error}")
    elif path.stem == "file":
        with pyarrow.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    else:
        with pyarrow.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    return str(path)


TABLES = ["in.parquet", "file.arrow", "stream.arrow"]


def contents(out):
    index = open_corpus(str(out), progress=False)
    found = read_documents(index, 0, index.n_samples)
    return [(d.content, d.weight) for d in found]


def as_lists(content):
    if not isinstance(content, TokenIds):
        return content
    return TokenIds(list(content.ids), None if content.labels is None else list(content.labels))


@pytest.mark.parametrize("name", [*TABLES, "in.jsonl", "hf:"])
def test_every_form_of_a_document_goes_through_prepare(name, tmp_path):
    if name in TABLES:
        # One table has all columns, null where a document has another form.
        source = write_table(tmp_path / name, pyarrow.Table.from_pylist(_full_rows()))
    else:
        source = write_jsonl(tmp_path / "in.jsonl", _full_rows() if name == "hf:" else FORMS)
        source = f"hf:{tmp_path}" if name == "hf:" else source
    run_prepare(source, tmp_path / "out")
    got = [(as_lists(content), weight) for content, weight in contents(tmp_path / "out")]
    assert got == WANT


def _full_rows():
    names = dict.fromkeys(name for row in FORMS for name in row)
    return [{name: row.get(name) for name in names} for row in FORMS]


STRINGS = {
    "string": pyarrow.string(),
    "large string": pyarrow.large_string(),
    "string view": pyarrow.string_view(),
    "dictionary": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("kind", STRINGS)
def test_strings_of_every_type_are_texts_and_domains(kind, name, tmp_path):
    texts, domains = ["one", "", "thr\u00e9\u00e9", "one"], ["a", "b", "a", "a"]
    table = pyarrow.table(
        {
            "text": pyarrow.array(texts).cast(STRINGS[kind]),
            "source": pyarrow.array(domains).cast(STRINGS[kind]),
            "blob": pyarrow.array([b"\xff"] * 4, pyarrow.large_binary()),
        }
    )
    report = run_prepare(
        write_table(tmp_path / name, table), tmp_path / "out", domain_field="source"
    )
    assert report.domains == {"a": 3, "b": 1}
    assert packed_documents(tmp_path / "out") == [
        {"text": text, "meta": {"pile_set_name": domain}}
        for text, domain in zip(texts, domains, strict=True)
    ]


@pytest.mark.parametrize("name", TABLES)
def test_null_text_is_one_bad_row(name, tmp_path):
    source = write_table(tmp_path / name, pyarrow.table({"text": ["a", None, "c"]}))
    with pytest.raises(CorpusError, match=f"{name}, row 2: field 'text' is null, not a string"):
        run_prepare(source, tmp_path / "out")
    report = run_prepare(source, tmp_path / "out", on_bad_input="skip")
    assert (report.n_samples, report.n_bad) == (2, 1)


@pytest.mark.parametrize(
    "kind", [pyarrow.list_(pyarrow.uint16()), pyarrow.large_list(pyarrow.int64())]
)
def test_lists_of_numbers_are_token_ids(kind, tmp_path):
    table = pyarrow.table({"input_ids": pyarrow.array([[1, 2], [], [65535]], kind)})
    run_prepare(write_table(tmp_path / "in.parquet", table), tmp_path / "out")
    samples = slow_samples(tmp_path / "out/shard-000000.tar")
    ids = [np.frombuffer(sample["npy"][128:], "<u2").tolist() for sample in samples]
    assert ids == [[1, 2], [], [65535]]


@pytest.mark.parametrize("cut", [1, 8, 9, 300])
@pytest.mark.parametrize("name", TABLES)
def test_table_that_is_cut_short_is_an_error(name, cut, tmp_path):
    texts = [f"text {i}" for i in range(20)]
    source = write_table(tmp_path / name, pyarrow.table({"text": texts}))
    raw = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(raw[:-cut])
    with pytest.raises(CorpusError, match=r"cut short|not whole"):
        run_prepare(source, tmp_path / "out")
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(CorpusError, match=r"cut short|not whole"):
        run_prepare(source, tmp_path / "out")


def test_zstandard_windows_of_2_gib_and_several_frames_are_read(tmp_path):
    parameters = zstandard.ZstdCompressionParameters(
        window_log=31, enable_ldm=False, hash_log=6, chain_log=6, strategy=1, min_match=5
    )
    compressor = zstandard.ZstdCompressor(compression_params=parameters)
    frames = []
    for text in ("one", "two"):
        frame = compressor.compressobj()  # without a known size, the header asks for the window
        frames.append(frame.compress(line_of({"text": text})) + frame.flush())
        assert zstandard.get_frame_parameters(frames[-1]).window_size == 2**31
    (tmp_path / "in.jsonl.zst").write_bytes(b"".join(frames))
    run_prepare(str(tmp_path / "in.jsonl.zst"), tmp_path / "out")
    assert [document["text"] for document in packed_documents(tmp_path / "out")] == ["one", "two"]
