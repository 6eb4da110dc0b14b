"""A field of all documents, read from the tars once, equals reading each document's JSON alone."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.corpora import make_corpus, words

from gradproj.corpus.index import build_index
from gradproj.corpus.tar.paths import list_tars
from gradproj.errors import ConfigError, CorpusError, StoreError
from gradproj.query import field_column
from gradproj.query.field_column import groups_by_field

N, HEIGHT = 90, 16


def documents():
    made: list[dict | bytes] = [
        {"text": words(4, i), "meta": {"source": f"s{i % 7}", "year": 2000 + i % 3}}
        for i in range(N)
    ]
    made[3] = {"text": "no such field"}
    made[4] = {"text": "null", "meta": {"source": None, "year": 1.5}}
    made[5] = {"text": "a list", "meta": {"source": ["a"], "year": True}}
    made[6] = {"text": "written as JSON", "meta": json.dumps({"source": "s9, \u00fc", "year": "x"})}
    made[7] = b'{"text": "not JSON", "meta": {"source": "s1"'
    made[8] = b'{"text": NaN, "meta": {"source": "with NaN"}}'
    made[9] = {"text": "empty", "meta": {"source": ""}}
    return made


@pytest.fixture
def case(tmp_path, monkeypatch):
    """A stand-in for a store of these documents, without unit 2: no row is read here."""
    index = build_index(list_tars(str(make_corpus(tmp_path / "tars", documents()))), processes=1)
    monkeypatch.setattr(field_column, "recorded_index", lambda output, shards: index)
    attributes = {
        "identity": {"--shards (corpus index)": index.fingerprint},
        "wanted_units": [[0, 2], [3, 6]],
    }
    layout = SimpleNamespace(
        n_samples=N,
        n_units=6,
        unit_range=lambda unit: (unit * HEIGHT, min(unit * HEIGHT + HEIGHT, N)),
    )
    store = SimpleNamespace(
        path=tmp_path / "out" / "projections.zarr", attributes=attributes, layout=layout
    )
    return SimpleNamespace(store=store, index=index, folder=tmp_path / "out" / "columns")


def wanted(field):
    """Return each document's value, by the standard library."""
    values = []
    for number, document in enumerate(documents()):
        try:
            fields = json.loads(document) if isinstance(document, bytes) else document
        except ValueError:
            fields = {}
        meta = fields.get("meta") or {}
        meta = json.loads(meta) if isinstance(meta, str) else meta
        value = meta.get(field)
        kept = value is not None and value != "" and not isinstance(value, list)
        is_wanted = not 2 * HEIGHT <= number < 3 * HEIGHT
        text = str(value).lower() if isinstance(value, bool) else str(value)
        values.append(text if kept and is_wanted else None)
    return values


@pytest.mark.parametrize("field", ["source", "year"])
def test_groups_are_the_documents_values(case, field):
    notes = []
    groups = groups_by_field(case.store, f"meta.{field}", note=notes.append)
    numbers = groups.numbers(0, N)
    got = [groups.names[number] if number >= 0 else None for number in numbers]
    assert got == wanted(field)
    assert groups.names == sorted(set(filter(None, got)))
    (folder,) = case.folder.iterdir()
    assert str(folder) in notes[0]
    assert sorted(path.name for path in folder.iterdir()) == ["column.json", "column.npy"]
    again = groups_by_field(case.store, f"meta.{field}", note=notes.append)
    np.testing.assert_array_equal(again.numbers(20, 50), numbers[20:50])
    assert len(notes) == 1  # the second call reads no tar


def test_a_killed_pass_continues(case, monkeypatch):
    read, units = field_column._Column._read, []

    def until_killed(self, index, unit, values):
        if len(units) == 3:
            raise KeyboardInterrupt
        units.append(unit)
        read(self, index, unit, values)

    monkeypatch.setattr(field_column._Column, "_read", until_killed)
    with pytest.raises(KeyboardInterrupt):
        groups_by_field(case.store, "meta.source")
    (folder,) = case.folder.iterdir()
    assert not (folder / "column.json").exists()
    units.clear()
    groups = groups_by_field(case.store, "meta.source")
    assert units == [4, 5]  # those that were not read before
    got = [groups.names[i] if i >= 0 else None for i in groups.numbers(0, N)]
    assert got == wanted("source")


def test_column_that_another_process_made_meanwhile_is_taken(case, monkeypatch):
    want = groups_by_field(case.store, "meta.source").numbers(0, N).tolist()
    (folder,) = case.folder.iterdir()
    facts = (folder / "column.json").read_bytes()
    (folder / "column.json").unlink()
    read = field_column._Column._read

    def while_another_ends(self, index, unit, values):
        read(self, index, unit, values)
        (folder / f"{unit:08d}.npz").unlink()
        (folder / "column.json").write_bytes(facts)

    monkeypatch.setattr(field_column._Column, "_read", while_another_ends)
    assert groups_by_field(case.store, "meta.source").numbers(0, N).tolist() == want


def test_column_of_unknown_values_is_damaged(case):
    groups_by_field(case.store, "meta.source")
    (folder,) = case.folder.iterdir()
    column = np.load(folder / "column.npy")
    column[3] = 1000
    np.save(folder / "column.npy", column)
    with pytest.raises(StoreError, match=r"numbers values that column\.json has not\)\. Delete"):
        groups_by_field(case.store, "meta.source").numbers(0, N)


def test_a_column_of_another_corpus_is_not_read(case):
    groups_by_field(case.store, "meta.source")
    (before,) = case.folder.iterdir()
    case.store.attributes["identity"]["--shards (corpus index)"] = "another"
    groups_by_field(case.store, "meta.source")
    (after,) = case.folder.iterdir()
    assert before != after


def test_damage_and_mistakes_are_one_clear_line(case, monkeypatch):
    groups_by_field(case.store, "meta.source")
    (folder,) = case.folder.iterdir()
    with (folder / "column.npy").open("ab") as file:
        file.write(b"x")
    with pytest.raises(StoreError, match=r"column.npy has another size\). Delete it"):
        groups_by_field(case.store, "meta.source")
    with pytest.raises(
        ConfigError, match=r"no document at 64 places .* they have: text, meta.source"
    ):
        groups_by_field(case.store, "meta.sauce")
    with pytest.raises(ConfigError, match=r"--by is 'meta\.'; give field names joined by dots"):
        groups_by_field(case.store, "meta.")
    monkeypatch.setattr(field_column, "MAX_VALUES", 20)
    with pytest.raises(ConfigError, match="--by text: it has more than 20 values"):
        groups_by_field(case.store, "text")
    with case.index.tars[0].path.open("ab") as file:
        file.write(b"x")
    with pytest.raises(CorpusError, match="changed since it was indexed"):
        groups_by_field(case.store, "meta.year")
    case.store.attributes.pop("wanted_units")
    with pytest.raises(StoreError, match="was not written by the job"):
        groups_by_field(case.store, "meta.source")
