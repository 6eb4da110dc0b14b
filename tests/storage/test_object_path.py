"""Laws that hold for ``pathlib.Path`` on disk and for ``ObjectPath`` in a bucket alike."""

import os
import pickle
from pathlib import Path

import pytest
from obstore.exceptions import GenericError
from obstore.store import MemoryStore

from gradproj.errors import ConfigError, StoreError
from gradproj.storage.address import Address
from gradproj.storage.contents import read_start
from gradproj.storage.object_path import ObjectPath, object_at, path_of


@pytest.fixture(params=["disk", "memory", "s3"])
def root(request, tmp_path):
    """An empty folder of each kind, below another one."""
    if request.param == "disk":
        folder = tmp_path / "out"
        folder.mkdir()
        return folder
    if request.param == "memory":
        return ObjectPath(MemoryStore(), Address("s3", "memory")) / "out"
    return path_of(str(request.getfixturevalue("bucket"))) / "out"


def write(path, data):
    """Write a file or an object the way that needs nothing of gradproj's publishing."""
    if isinstance(path, Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    else:
        path.put([data])


class TestPathsAndObjectPaths:
    def test_names(self, root):
        path = root / "units" / "00000012.safetensors"
        assert (path.name, path.stem, path.suffix) == (
            "00000012.safetensors",
            "00000012",
            ".safetensors",
        )
        assert path.parent == root / "units"
        assert path.with_name("a").name == "a"
        assert path.with_name("a").parent == path.parent
        assert path.with_suffix(".json").name == "00000012.json"
        assert str(path.relative_to(root)) == "units/00000012.safetensors"
        assert path.is_relative_to(root)
        assert not root.is_relative_to(path)
        assert root / "units/00000012.safetensors" == path
        assert root in path.parents
        assert next(iter(path.parents)) == path.parent
        assert str(path) == f"{root}/units/00000012.safetensors"
        with pytest.raises(ValueError, match="units"):
            root.relative_to(path)

    def test_equality_order_and_hash(self, root):
        assert root / "a" == root / "a"
        assert root / "a" != root / "b"
        assert len({root / "a", root / "a", root / "b"}) == 2
        assert sorted([root / "b", root / "a"]) == [root / "a", root / "b"]

    def test_what_is_there(self, root):
        write(root / "units" / "1", b"abc")
        write(root / "units" / "deep" / "2", b"")
        assert (root / "units").is_dir()
        assert not (root / "units").is_file()
        assert (root / "units" / "1").is_file()
        assert not (root / "units" / "1").is_dir()
        assert (root / "units").exists()
        assert (root / "units" / "deep" / "2").exists()
        assert not (root / "unit").exists()
        assert not (root / "units" / "3").exists()
        assert not (root / "unit").is_dir()  # the beginning of a name is no folder
        assert (root / "units" / "1").stat().st_size == 3
        assert (root / "units" / "1").stat().st_mtime > 0

    def test_reading(self, root):
        write(root / "text", "grün\n".encode())
        assert (root / "text").read_bytes() == "grün\n".encode()
        assert (root / "text").read_text(encoding="utf-8") == "grün\n"

    def test_missing_objects_raise_what_pathlib_raises(self, root):
        missing = root / "nothing"
        for ask in (missing.read_bytes, missing.read_text, missing.stat, missing.unlink):
            with pytest.raises(FileNotFoundError) as caught:
                ask()
            assert str(caught.value.filename) == str(missing)

    def test_listing_and_glob(self, root):
        for name in ("b.json", "a.json", "c.txt", "sub/d.json", ".hidden"):
            write(root / name, b"x")
        assert sorted(path.name for path in root.iterdir()) == [
            ".hidden",
            "a.json",
            "b.json",
            "c.txt",
            "sub",
        ]
        assert sorted(root.glob("*.json")) == [root / "a.json", root / "b.json"]
        assert [path.name for path in root.glob("*/")] == ["sub"]
        assert list(root.glob("*.npz")) == []

    def test_the_start_of_a_file(self, root):
        write(root / "data", bytes(range(256)))
        assert read_start(root / "data", 3) == b"\0\1\2"
        assert read_start(root / "data", 1000) == bytes(range(256))

    def test_unlink(self, root):
        write(root / "a", b"1")
        (root / "a").unlink()
        assert not (root / "a").exists()
        (root / "a").unlink(missing_ok=True)

    def test_mkdir_may_be_repeated(self, root):
        (root / "units").mkdir(parents=True, exist_ok=True)
        (root / "units").mkdir(exist_ok=True)

    def test_path_of_returns_paths(self, root):
        assert path_of(root) == root


@pytest.fixture
def memory():
    return ObjectPath(MemoryStore(), Address("s3", "memory")) / "out"


def test_an_object_path_is_no_file_of_the_operating_system(memory):
    for use in (os.fspath, os.listdir, Path):
        with pytest.raises(TypeError):
            use(memory)


def test_keys_with_any_characters(memory):
    for name in ("a b", "ä%20+", "a#b?c&d=e"):
        (memory / name).put([name.encode()])
        assert (memory / name).read_text() == name
    assert [path.name for path in memory.iterdir()] == sorted(["a b", "ä%20+", "a#b?c&d=e"])


def test_conditional_writes(memory):
    path = memory / "a"
    assert not path.put_if_match([b"0"], {"e_tag": '"none"'})
    assert path.put_if_absent([b"1", memoryview(b"2")])
    assert not path.put_if_absent([b"3"])
    data, version = path.read_versioned()
    assert data == b"12"
    assert path.read_unless(version) is None
    assert path.put_if_match([b"4"], version)
    assert not path.put_if_match([b"5"], version)
    assert path.read_bytes() == b"4"
    again = path.read_unless(version)
    assert again is not None
    assert again[0] == b"4"


def test_an_object_that_changes_is_not_read_as_a_mix(memory):
    path = memory / "a"
    path.put([b"1" * 100])
    etag = path.head()["e_tag"]
    assert path.read_range(0, 5, etag) == b"11111"
    path.put([b"2" * 100])
    with pytest.raises(StoreError, match="has changed while it was read"):
        path.read_range(5, 50, etag)


def test_pickles_hold_the_address_alone(bucket, monkeypatch):
    path = path_of(f"{bucket}/out/units")
    data = pickle.dumps(path)
    assert b"secret" not in data
    (path / "1").put([b"abc"])
    assert (pickle.loads(data) / "1").read_bytes() == b"abc"


def test_path_of_refuses_places_without_conditional_writes():
    for text in ("hf://datasets/a/b", "https://host/out"):
        with pytest.raises(ConfigError, match="outputs lie on disk or in a bucket"):
            path_of(text)
    assert path_of("plain/folder") == Path("plain/folder")


def test_remove_tree(memory):
    for name in ("a", "sub/b", "sub/deep/c"):
        (memory / name).put([b"x"])
    (memory / "sub").remove_tree()
    assert [path.name for path in memory.iterdir()] == ["a"]


def test_an_object_in_parts_is_sent_again_when_the_reply_is_lost(memory):
    class Losing:
        n_lost = 0

        def __getattr__(self, name):
            return getattr(memory.store, name)

        def put(self, *args, **options):
            memory.store.put(*args, **options)
            if not self.n_lost:
                self.n_lost += 1
                raise GenericError("<Code>NoSuchUpload</Code> status code: 404")

    chunks, reads = [b"1" * 5_000_000, b"2" * 5_000_000, b"3" * 5_000_000], []
    path = ObjectPath(Losing(), memory)
    path.put_in_parts(lambda: reads.append(1) or iter(chunks))
    assert path.read_bytes() == b"".join(chunks)
    assert len(reads) == 2


def test_an_object_in_parts_comes_back_whole(bucket):
    chunks = [bytes([number]) * 5_000_000 for number in range(4)]
    path = object_at(bucket / "large")
    path.put_in_parts(lambda: iter(chunks))
    assert path.read_bytes() == b"".join(chunks)
    assert path.read_range(4_999_999, 5_000_001) == b"\0\1"
