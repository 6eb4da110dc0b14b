"""Untrusted tars, documents, checkpoints and stores open nothing and run nothing."""

import ast
import io
import json
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers.dynamic_module_utils
from helpers.corpora import words
from helpers.jobs import ENVIRONMENT, flags
from helpers.models import make_model
from helpers.outputs import SETTINGS

import gradproj
from gradproj.__main__ import main
from gradproj.errors import ModelError
from gradproj.maintenance.verify import verify
from gradproj.model.checkpoint import fetch
from gradproj.model.config import ModelConfig
from gradproj.model.loading import load_model, load_model_config, model_skeleton
from gradproj.model.tokenizer_loading import load_tokenizer
from gradproj.store import ProjectionStore

# --- tars ---

MARK = "xkeyx"
"""Part of every hostile key. No path that the job touches may contain it."""

KEYS = [
    f"../../{MARK}",
    f"/{MARK}/passwd",
    f"/proc/self/fd/{MARK}",
    f"a/../../../{MARK}",
    f"-rf {MARK}",
    f"$(touch {MARK})",
    f"{MARK}|id",
    f"{MARK}\\x",
    f"{MARK}%s%n{{0}}",
    f"https://{MARK}/x",
    f"{MARK} \u202e \u2028 \x1b[31m",
]

WATCHED = """
import sys
log = open(sys.argv[1], "w")
def note(event, args):
    watched = ("os.", "shutil.", "subprocess.", "socket.connect", "glob.")
    if event == "open" or event.startswith(watched):
        log.write(f"{event} {args!r}\\n")
        log.flush()
sys.addaudithook(note)
from gradproj.run import main
sys.exit(main(sys.argv[2:]))
"""
"""Runs the job and logs every file, folder, process and address that Python opens."""


def nested(depth: int) -> bytes:
    """A document whose JSON is ``depth`` deep."""
    return (
        b'{"text": "'
        + words(8, 2).encode()
        + b'", "a": '
        + b"[" * (depth - 1)
        + b"]" * (depth - 1)
        + b"}"
    )


DOCUMENTS = [
    *((key, json.dumps({"text": words(8, i)}).encode(), "ok") for i, key in enumerate(KEYS)),
    ("deep", nested(4), "ok"),
    ("too deep", nested(5), "bad_input"),
    ("far too deep", nested(100_000), "bad_input"),
    ("long", b'{"text": "' + b"a b " * 200 + b'"}', "ok"),
    ("too long", b'{"text": "' + b"a b " * 300 + b'"}', "bad_input"),
    ("path in a field", b'{"text": "a b c", "file": "/etc/xkeyx", "__url__": "/etc/xkeyx"}', "ok"),
]
LIMITS = {"max_json_depth": 4, "max_document_bytes": 1000}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """The output of a job over a hostile tar, and the log of what it touched."""
    root = tmp_path_factory.mktemp("hostile")
    (root / "tars").mkdir()
    with tarfile.open(root / "tars" / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for key, data, _ in DOCUMENTS:
            member = tarfile.TarInfo(f"{key}.json")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    settings = {**SETTINGS, **LIMITS, "shards": root / "tars", "model": make_model(root / "model")}
    before = sorted(p for p in root.rglob("*") if root / "model" not in p.parents)
    arguments = flags(output_dir=root / "out", device="cpu", **settings)
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, str(root / "log"), *arguments],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=root / "model",
    )
    assert done.returncode == 0, done.stderr
    after = sorted(
        p
        for p in root.rglob("*")
        if not {root / "model", root / "out"} & {*p.parents} and p.name not in ("out", "log")
    )
    assert after == before
    return root


def test_keys_that_look_like_paths_are_ordinary_rows(hostile):
    with ProjectionStore(hostile / "out") as store:
        samples = store.samples(range(len(store)))
    assert [(s.key, s.status) for s in samples] == [(key, status) for key, _, status in DOCUMENTS]


def test_no_key_or_field_of_a_document_is_opened_created_or_run(hostile):
    touched = (hostile / "log").read_text()
    assert str(hostile / "tars" / "a.tar") in touched
    assert str(hostile / "out" / "units") in touched
    assert [line for line in touched.splitlines() if MARK in line] == []


def test_documents_beyond_the_limits_are_bad_input_and_the_job_continues(hostile):
    with ProjectionStore(hostile / "out") as store:
        counts = store.status_counts()
        assert store.attributes["identity"]["--max_json_depth"] == LIMITS["max_json_depth"]
        assert store.attributes["identity"]["--max_document_bytes"] == LIMITS["max_document_bytes"]
    expected = [status for _, _, status in DOCUMENTS]
    assert (counts["ok"], counts["bad_input"]) == (
        expected.count("ok"),
        expected.count("bad_input"),
    )
    assert verify(hostile / "out").exit_code == 0


def test_links_in_tars_are_not_followed(tmp_path, capsys):
    (tmp_path / "secret.json").write_bytes(b'{"text": "secret words"}')
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            member = tarfile.TarInfo(f"link{kind.decode()}.json")
            member.type, member.linkname = kind, str(tmp_path / "secret.json")
            tar.addfile(member)
        member = tarfile.TarInfo("plain.json")
        member.size = 15
        tar.addfile(member, io.BytesIO(b'{"text": "a b"}'))
    code = main(["index", str(tmp_path / "a.tar"), "--index_file", str(tmp_path / "index.json")])
    printed = capsys.readouterr()
    assert (code == 2 and "link" in printed.err) or "documents     1 " in printed.out


# --- checkpoints ---


EVIL = """
from pathlib import Path
Path({mark!r}).write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class EvilConfig(LlamaConfig):
    model_type = {model_type!r}
class EvilModel(LlamaForCausalLM):
    config_class = EvilConfig
class EvilTokenizer(PreTrainedTokenizerFast):
    pass
"""


def with_code(model: Path, mark: Path, model_type: str) -> Path:
    """Add code for config, model and tokenizer to a checkpoint; it creates ``mark`` when run."""
    (model / "evil.py").write_text(EVIL.format(mark=str(mark), model_type=model_type))
    change_json(
        model / "config.json",
        model_type=model_type,
        auto_map={"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"},
    )
    change_json(
        model / "tokenizer_config.json",
        tokenizer_class="EvilTokenizer",
        auto_map={"AutoTokenizer": [None, "evil.EvilTokenizer"]},
    )
    return model


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


LOADERS = {
    "config": load_model_config,
    "tokenizer": load_tokenizer,
    "skeleton": model_skeleton,
    "model": lambda files: load_model(files, torch.device("cpu")),
}


def load_all(model: Path, **settings: bool) -> set[str]:
    """Load each part that a job loads; those that were refused."""
    refused = set()
    for name, load in LOADERS.items():
        try:
            load(fetch(ModelConfig(model=str(model), **settings)))
        except ModelError:
            refused.add(name)
    return refused


@pytest.mark.parametrize(
    ("model_type", "refused"),
    # For a type that transformers knows, its own classes are used, not the checkpoint's.
    [("evil", {"config", "tokenizer", "skeleton", "model"}), ("llama", {"tokenizer"})],
)
def test_checkpoint_code_runs_only_with_trust_remote_code(
    model_type, refused, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    monkeypatch.setattr(sys, "path", [*sys.path])
    mark = tmp_path / "mark"
    model = with_code(make_model(tmp_path / "model"), mark, model_type)
    assert load_all(model) == refused
    assert not mark.exists()
    assert load_all(model, trust_remote_code=True) == set()
    assert mark.read_text() == "ran"


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self):
        return Path.write_text, (Path(self.mark), "ran")


def test_pickle_beside_safetensors_weights_is_not_loaded(tmp_path):
    model, mark = make_model(tmp_path / "model"), tmp_path / "mark"
    for name in (
        "pytorch_model.bin",
        "adapter_model.bin",
        "optimizer.pt",
        "training_args.bin",
        "tokenizer.pkl",
    ):
        (model / name).write_bytes(pickle.dumps(Evil(mark)))
    assert load_all(model) == load_all(model, allow_pickle=True) == set()
    assert not mark.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickled_weights_are_refused_and_run_nothing_even_if_allowed(tmp_path):
    model, mark = make_model(tmp_path / "model"), tmp_path / "mark"
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(ModelError, match="a pickle, which can run code: convert it to safetensors"):
        fetch(ModelConfig(model=str(model)))
    assert load_all(model, allow_pickle=True) == {"model"}
    assert not mark.exists()
    pickle.loads(pickle.dumps(Evil(mark)))
    assert mark.read_text() == "ran"


# --- stores ---


@pytest.mark.parametrize("array", ["token_covariance_a", "projection_matrices"])
def test_store_with_an_unpickling_codec_is_not_read(array, output, tmp_path):
    folder, mark = output / "projections.zarr" / array, tmp_path / "mark"
    change_json(folder / "zarr.json", codecs=[{"name": "numcodecs.pickle", "configuration": {}}])
    for chunk in folder.glob("c.*"):
        chunk.write_bytes(pickle.dumps(Evil(mark)))
    result = verify(output)
    assert not mark.exists()
    assert [Path(d.path).name for d in result.damage] == [array]


# --- the code itself ---

SOURCES = sorted(Path(gradproj.__file__).parent.rglob("*.py"))
UNPICKLERS = {
    "pickle",
    "_pickle",
    "cPickle",
    "marshal",
    "shelve",
    "dill",
    "cloudpickle",
    "joblib",
    "pandas",
    "yaml",
}
SPEAKS_TO_ITS_OWN_RANKS = "rendezvous.py"
"""May pickle: it sends rank 0's plan to the job's other ranks through torchrun's store, like
torch.distributed's object collectives. No content of a corpus, checkpoint or store is sent."""


def calls_in(path: Path) -> list[tuple[str, ast.Call]]:
    """Return every call and the dotted name that it calls."""
    return [
        (ast.unparse(n.func), n)
        for n in ast.walk(ast.parse(path.read_text()))
        if isinstance(n, ast.Call)
    ]


def is_true(call: ast.Call, keyword: str) -> bool:
    return any(k.arg == keyword and getattr(k.value, "value", None) is True for k in call.keywords)


def is_false(call: ast.Call, keyword: str) -> bool:
    return any(k.arg == keyword and getattr(k.value, "value", None) is False for k in call.keywords)


def unsafe(name: str, call: ast.Call) -> bool:
    """Return whether a call can run the content of a file."""
    last = name.rsplit(".", 1)[-1]
    return (
        name in ("eval", "exec", "compile", "__import__", "os.system", "os.popen")
        or name in ("np.fromregex", "torch.jit.load", "torch.hub.load")
        or (name in ("np.load", "numpy.load") and not is_false(call, "allow_pickle"))
        or (name == "torch.load" and not is_true(call, "weights_only"))
        or any(k.arg == "shell" for k in call.keywords)
        or (last == "from_pretrained" and is_true(call, "trust_remote_code"))
        or is_true(call, "allow_pickle")
    )


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(SOURCES[0].parent)))
def test_sources_unpickle_evaluate_and_shell_out_nothing(path):
    tree = ast.parse(path.read_text())
    imported = {
        a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names
    }
    imported |= {
        (n.module or "").split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)
    }
    assert imported & UNPICKLERS == ({"pickle"} if path.name == SPEAKS_TO_ITS_OWN_RANKS else set())
    assert [(name, call.lineno) for name, call in calls_in(path) if unsafe(name, call)] == []


@pytest.mark.parametrize(
    "line",
    [
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "eval(text)",
        "subprocess.run(words, shell=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_unsafe_calls_are_detected(line, tmp_path):
    path = tmp_path / "a.py"
    path.write_text(line)
    ((name, call),) = calls_in(path)
    assert unsafe(name, call)
    path.write_text("torch.load(path, weights_only=True)")
    ((name, call),) = calls_in(path)
    assert not unsafe(name, call)


def test_rows_of_hostile_documents_are_finite(hostile):
    with ProjectionStore(hostile / "out") as store:
        ok = [i for i, (_, _, status) in enumerate(DOCUMENTS) if status == "ok"]
        assert np.isfinite(store.rows(ok)).all()
