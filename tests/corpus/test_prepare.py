"""Tars of `prepare`: order, grouping, equal bytes, all published or none."""

import gzip
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import textwrap
import tracemalloc

import pytest
from helpers.corpora import (
    input_record,
    line_of,
    packed_documents,
    read_back,
    run_prepare,
    write_jsonl,
)

from gradproj.corpus import prepare as prepare_module
from gradproj.corpus.prepare import prepare
from gradproj.corpus.prepare_config import PrepareConfig
from gradproj.corpus.tar import writer
from gradproj.corpus.tar.writer import tar_header
from gradproj.errors import CorpusError, StoreError

# ---- Tars


@pytest.mark.parametrize("n_bytes", [0, 1, 511, 512, 6000, 8**11 - 1])
def test_header_equals_that_of_tarfile(n_bytes):
    member = tarfile.TarInfo("000000123456.json")
    member.size = n_bytes
    assert tar_header(member.name, n_bytes) == member.tobuf(tarfile.USTAR_FORMAT)


def test_name_or_size_too_large_for_a_header_is_rejected():
    with pytest.raises(ValueError, match="does not fit"):
        tar_header("x" * 101, 1)
    with pytest.raises(ValueError, match="does not fit"):
        tar_header("x", 8**11)


def test_tar_equals_that_of_tarfile_byte_for_byte(tmp_path):
    values = [input_record("one"), input_record("zwei \u00fc"), input_record("")]
    run_prepare(write_jsonl(tmp_path / "in.jsonl", values), tmp_path / "out")
    want = io.BytesIO()
    with tarfile.open(fileobj=want, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for i, value in enumerate(values):
            payload = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
            member = tarfile.TarInfo(f"{i:012d}.json")
            member.size = len(payload)
            tar.addfile(member, io.BytesIO(payload))
    assert (tmp_path / "out" / "shard-000000.tar").read_bytes() == want.getvalue()


@pytest.mark.parametrize("grouped", [False, True])
def test_equal_inputs_give_equal_bytes(grouped, tmp_path):
    name = write_jsonl(
        tmp_path / "in.jsonl", [input_record(f"{i}", f"d{i % 4}") for i in range(50)]
    )
    for out in ("a", "b"):
        run_prepare(name, tmp_path / out, samples_per_shard=7, group_by_domain=grouped)
    names = sorted(os.listdir(tmp_path / "a"))
    assert names == sorted(os.listdir(tmp_path / "b"))
    for tar in names:
        assert (tmp_path / "a" / tar).read_bytes() == (tmp_path / "b" / tar).read_bytes()


# ---- Grouping by domain


@pytest.mark.parametrize("max_open", [1, 3, 64])
def test_grouping_makes_each_domain_one_range_of_ids_in_its_own_tars(
    max_open, tmp_path, monkeypatch
):
    monkeypatch.setattr(writer, "MAX_OPEN_SPOOLS", max_open)
    chosen = random.Random(3)
    domains = [f"dom/../{chosen.randrange(8)} \u00e9" for _ in range(200)]
    values = [input_record(f"{i}", domain) for i, domain in enumerate(domains)]
    report = run_prepare(
        write_jsonl(tmp_path / "in.jsonl", values),
        tmp_path / "out",
        samples_per_shard=10,
        group_by_domain=True,
    )
    first_seen = list(dict.fromkeys(domains))
    want = [
        value for name in first_seen for value in values if value["meta"]["pile_set_name"] == name
    ]
    assert read_back(tmp_path / "out") == [(f"{i:012d}", value) for i, value in enumerate(want)]
    assert list(report.domains.items()) == [(name, domains.count(name)) for name in first_seen]
    tars = sorted((tmp_path / "out").glob("*.tar"))
    assert len(tars) == report.n_tars == sum(-(-domains.count(name) // 10) for name in first_seen)
    for tar in tars:
        with tarfile.open(tar) as file:
            contents = [json.load(file.extractfile(member)) for member in file]
        assert len({content["meta"]["pile_set_name"] for content in contents}) == 1
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out"]


def test_grouping_hundreds_of_domains_needs_few_open_files(tmp_path):
    values = [input_record("x", f"d{i % 400}") for i in range(2000)]
    name = write_jsonl(tmp_path / "in.jsonl", values)
    code = f"""
        import resource
        from gradproj.corpus.prepare import prepare
        from gradproj.corpus.prepare_config import PrepareConfig
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
        out = {str(tmp_path / "out")!r}
        prepare(PrepareConfig(inputs=({name!r},), output_dir=out, group_by_domain=True))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
    assert len(os.listdir(tmp_path / "out")) == 400


def test_more_domains_than_a_store_can_hold_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "MAX_DOMAINS", 5)
    name = write_jsonl(tmp_path / "in.jsonl", [input_record("x", f"d{i}") for i in range(6)])
    with pytest.raises(
        CorpusError,
        match=r"--domain_field meta\.pile_set_name has more than 5 different values \('d0'",
    ):
        run_prepare(name, tmp_path / "out")


@pytest.mark.parametrize("grouped", [False, True])
def test_memory_does_not_grow_with_the_input(grouped, tmp_path):
    peaks = []
    for n_samples in (300, 3000):
        path = tmp_path / f"{n_samples}.jsonl.gz"
        with gzip.open(path, "wb", compresslevel=1) as file:
            for i in range(n_samples):
                file.write(line_of(input_record(f"{i} " * 2000, f"d{i % 5}")))
        tracemalloc.start()
        run_prepare(
            str(path), tmp_path / f"out{n_samples}", samples_per_shard=100, group_by_domain=grouped
        )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 200_000


# ---- All or nothing


def test_nonempty_output_dir_is_rejected_and_left_alone(tmp_path):
    name = write_jsonl(tmp_path / "in.jsonl", [input_record("a")])
    run_prepare(name, tmp_path / "out")
    before = (tmp_path / "out" / "shard-000000.tar").read_bytes()
    with pytest.raises(
        StoreError, match=r"has 1 tars already \(shard-000000\.tar\); .* give a new path, or remove"
    ):
        run_prepare(write_jsonl(tmp_path / "other.jsonl", [input_record("b")]), tmp_path / "out")
    assert (tmp_path / "out" / "shard-000000.tar").read_bytes() == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    with pytest.raises(StoreError, match=r"notes is not empty \(mine\.txt\)"):
        run_prepare(name, tmp_path / "notes")
    with pytest.raises(StoreError, match=r"in\.jsonl is not a folder"):
        run_prepare(name, name)
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "notes", "other.jsonl", "out"]


def test_empty_new_and_linked_output_dirs_are_filled(tmp_path):
    name = write_jsonl(tmp_path / "in.jsonl", [input_record("a")])
    (tmp_path / "empty").mkdir()
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to("target")
    for out in ("empty", "new/deep/er", "link"):
        run_prepare(name, tmp_path / out)
        assert packed_documents(tmp_path / out) == [input_record("a")]
    assert (tmp_path / "link").is_symlink()


KILLED = """
    import os, signal
    from gradproj.corpus import prepare
    from gradproj.corpus.tar import writer
    real = {where}
    def kill(*arguments):
        kill.calls += 1
        if kill.calls == {calls}:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)
    kill.calls = 0
    {where} = kill
    config = prepare.PrepareConfig(
        inputs=({name!r},), output_dir={out!r}, samples_per_shard=5, group_by_domain={grouped}
    )
    prepare.prepare(config)
"""


@pytest.mark.parametrize(
    ("where", "calls", "grouped"),
    [
        ("writer.TarSequence.add", 23, False),
        ("writer.TarSequence.add", 23, True),
        ("writer.DomainSpools.add", 23, True),
        ("writer.os.rename", 1, False),
    ],
)
def test_killed_prepare_leaves_no_output_and_the_next_completes_it(where, calls, grouped, tmp_path):
    values = [input_record(f"{i}", f"d{i % 3}") for i in range(40)]
    name, out = write_jsonl(tmp_path / "in.jsonl", values), tmp_path / "out"
    code = KILLED.format(where=where, calls=calls, name=name, out=str(out), grouped=grouped)
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.preparing"]
    run_prepare(name, out, samples_per_shard=5, group_by_domain=grouped)
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out"]
    want = sorted(values, key=lambda value: value["meta"]["pile_set_name"]) if grouped else values
    assert packed_documents(out) == want


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit])
def test_interrupted_prepare_leaves_nothing_behind(interruption, tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise interruption

    monkeypatch.setattr(writer.TarSequence, "end_tar", interrupt)
    with pytest.raises(interruption):
        run_prepare(write_jsonl(tmp_path / "in.jsonl", [input_record("a")]), tmp_path / "out")
    assert os.listdir(tmp_path) == ["in.jsonl"]


def test_concurrent_prepare_into_the_same_output_dir_is_rejected(tmp_path):
    name, out = write_jsonl(tmp_path / "in.jsonl", [input_record("a")]), tmp_path / "out"
    with writer.published(str(out)) as work:
        (work / "tars" / "shard-000000.tar").write_bytes(b"first")
        with pytest.raises(
            StoreError, match=r"another prepare is writing to .*out\.preparing; wait for it"
        ):
            run_prepare(name, out)
    assert (out / "shard-000000.tar").read_bytes() == b"first"


def test_without_file_locks_a_leftover_folder_is_rejected(tmp_path, monkeypatch):
    def no_locks(*arguments):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("gradproj.files.fcntl.flock", no_locks)
    name = write_jsonl(tmp_path / "in.jsonl", [input_record("a")])
    run_prepare(name, tmp_path / "out")
    assert packed_documents(tmp_path / "out") == [input_record("a")]
    (tmp_path / "other.preparing" / "tars").mkdir(parents=True)
    with pytest.raises(
        StoreError, match=r"was left by a prepare that was killed, or one still runs"
    ):
        run_prepare(name, tmp_path / "other")
    assert (tmp_path / "other.preparing" / "tars").exists()


def test_foreign_folder_with_the_name_of_a_leftover_is_not_deleted(tmp_path):
    name = write_jsonl(tmp_path / "in.jsonl", [input_record("a")])
    (tmp_path / "out.preparing").mkdir()
    (tmp_path / "out.preparing" / "thesis.tex").write_text("keep")
    with pytest.raises(
        StoreError, match=r"out\.preparing is not prepare's own \(it has thesis\.tex\)"
    ):
        run_prepare(name, tmp_path / "out")
    assert (tmp_path / "out.preparing" / "thesis.tex").read_text() == "keep"


def test_full_disk_is_an_error_and_nothing_is_published(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer.os, "fsync", full)
    with pytest.raises(
        StoreError, match=r"--output_dir .*out: cannot write .*: No space left on device"
    ):
        run_prepare(write_jsonl(tmp_path / "in.jsonl", [input_record("a")]), tmp_path / "out")
    assert os.listdir(tmp_path) == ["in.jsonl"]


def test_mount_point_is_rejected_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(writer.os.path, "ismount", lambda path: True)
    with pytest.raises(StoreError, match="is a mount point"):
        run_prepare(write_jsonl(tmp_path / "in.jsonl", [input_record("a")]), tmp_path / "out")


# ---- Progress


def test_progress_without_a_terminal_is_plain_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare_module, "PLAIN_INTERVAL_S", 0.0)
    name = write_jsonl(tmp_path / "in.jsonl", [input_record("a", "d")] * 3)
    config = PrepareConfig(inputs=(name,), output_dir=str(tmp_path / "out"), group_by_domain=True)
    prepare(config, progress=True)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "prepare: 3 documents, 0.0 MB, 100.0 % done, " in printed.err
    assert "group by domain: 3 documents, 0.0 MB, 100.0 % done" in printed.err
    assert "\r" not in printed.err


def test_progress_on_a_terminal_is_a_bar_unless_disabled(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(prepare_module, "BAR_INTERVAL_S", 0.0)
    name = write_jsonl(tmp_path / "in.jsonl", [input_record("a")] * 3)
    prepare(PrepareConfig(inputs=(name,), output_dir=str(tmp_path / "out")))
    assert "3 documents" in capsys.readouterr().err
    run_prepare(name, tmp_path / "quiet")
    assert capsys.readouterr().err == ""
