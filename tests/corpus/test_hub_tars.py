"""Tars of a repository of the hub: a commit is fixed once, and files come by ranges of it."""

from urllib.parse import parse_qs

import pytest
from helpers.corpora import plain_members, write_tar
from helpers.http_files import http_files

from gradproj.corpus.index import build_index
from gradproj.corpus.index_file import load_index, save_index
from gradproj.corpus.stream import read_documents
from gradproj.corpus.tar.paths import list_tars
from gradproj.corpus.tar.places import check_unchanged
from gradproj.errors import CorpusError

TOKEN = "hf_secretOfTheTests"
COMMITS = ["a" * 40, "b" * 40]
NAME = "datasets/owner/texts"


class Hub:
    """An imitation of the hub's interface, and of the server that its files are redirected to."""

    def __init__(self, site, storage):
        self.site, self.storage = site, storage
        self.head = COMMITS[0]
        site.answers[f"/api/{NAME}/revision/main"] = lambda _: {
            "id": "owner/texts",
            "sha": self.head,
        }
        site.answers["/api/datasets/owner/gone/revision/main"] = lambda _: None

    def commit(self, commit, files):
        entries = {
            name: {
                "type": "file", "path": name, "size": len(data), "oid": f"blob {hash(data)}",
                "lfs": {"oid": f"{hash(data):064x}", "size": len(data), "pointerSize": 1},
            }
            for name, data in files.items()
        }  # fmt: skip
        for name, data in files.items():
            self.storage.files[f"/{commit}/{name}"] = data
            resolve = f"/{NAME}/resolve/{commit}/{name}"
            self.site.redirects[resolve] = f"{self.storage.url}/{commit}/{name}?signed=1"
        asked = f"/api/{NAME}/paths-info/{commit}"
        self.site.answers[asked] = lambda body: [
            entries[path] for path in parse_qs(body.decode())["paths"] if path in entries
        ]
        self.site.answers[f"/api/{NAME}/tree/{commit}/data"] = lambda _: list(entries.values())
        self.head = commit


@pytest.fixture
def tars(tmp_path):
    return [
        write_tar(tmp_path / "0.tar", plain_members(70)),
        write_tar(tmp_path / "1.tar", plain_members(3, 100)),
    ]


@pytest.fixture
def hub(tars, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with http_files() as site, http_files() as storage:
        monkeypatch.setenv("HF_ENDPOINT", site.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        hub = Hub(site, storage)
        hub.commit(COMMITS[0], {f"data/{tar.name}": tar.read_bytes() for tar in tars})
        yield hub


def texts(index):
    return [(d.key, d.text) for d in read_documents(index, 0, index.n_samples)]


@pytest.mark.parametrize("path", ["", "/data/*.tar", "/data/{0,1}.tar"])
def test_tars_of_a_repository_are_those_of_its_present_commit(path, hub, tars):
    shards = f"hf://{NAME}{path or '/data'}"
    paths = list_tars(shards)
    assert [str(p) for p in paths] == [
        f"hf://{NAME}@{COMMITS[0]}/data/{number}.tar" for number in (0, 1)
    ]
    index, local = build_index(paths, progress=False), build_index(tars, progress=False)
    assert index.fingerprint == local.fingerprint
    hub.site.requests, asked = [], hub.site.requests
    check_unchanged(*index.tars)
    assert not hub.site.requests  # a commit is fixed
    hub.storage.requests.clear()
    assert texts(index) == texts(local)
    assert len(hub.storage.requests) == 2  # one a tar
    assert len([r for r in asked if r.path.startswith("/api/") and "revision" in r.path]) == 1


def test_the_token_goes_to_the_hub_and_not_to_where_it_redirects(hub, tars, tmp_path):
    index = build_index(list_tars(f"hf://{NAME}@main/data"), progress=False)
    texts(index)
    sent = [{k.lower(): v for k, v in r.headers.items()} for r in hub.site.requests]
    assert {headers["authorization"] for headers in sent} == {f"Bearer {TOKEN}"}
    assert not any("authorization" in {k.lower() for k in r.headers} for r in hub.storage.requests)
    save_index(index, tmp_path / "corpus.json")
    assert TOKEN not in (tmp_path / "corpus.json").read_text()
    # The index names the commit: a process that loads it asks the hub for nothing but the bytes.
    hub.site.requests.clear()
    assert texts(load_index(tmp_path / "corpus.json")) == texts(index)
    assert not [r for r in hub.site.requests if r.path.startswith("/api/")]


def test_a_later_commit_is_the_same_corpus_if_its_tars_are(hub, tars):
    index = build_index(list_tars(f"hf://{NAME}/data"), progress=False)
    same = {f"data/{tar.name}": tar.read_bytes() for tar in tars}
    hub.commit(COMMITS[1], {**same, "data/README.md": b"new"})
    moved = index.relocated(list_tars(f"hf://{NAME}/data"))
    assert moved.fingerprint == index.fingerprint
    assert COMMITS[1] in str(moved.tars[0].path)
    hub.commit(COMMITS[1], {**same, "data/1.tar": same["data/1.tar"][::-1]})
    with pytest.raises(CorpusError, match=r"1\.tar has another content than the indexed commit's"):
        index.relocated(list_tars(f"hf://{NAME}/data"))


def test_what_the_hub_refuses_is_one_line(hub, monkeypatch):
    missing = r"there is no such repository, or it is private; .* \(the answer was 404\)"
    with pytest.raises(CorpusError, match=missing) as error:
        list_tars("hf://datasets/owner/gone/data")
    assert TOKEN not in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(CorpusError, match=r"give hf://datasets/ORG/NAME\[@REVISION\]/PATH"):
        list_tars("hf://owner/texts/x.tar")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CorpusError, match="HF_HUB_OFFLINE is set"):
        list_tars(f"hf://{NAME}/data")
