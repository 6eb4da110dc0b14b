"""Published files are whole or absent and have one winner; OS errors are explained."""

import errno
import os

import numpy as np
import pytest

from gradproj import files
from gradproj.errors import ConfigError, StoreError
from gradproj.files import (
    explain_os_errors,
    file_sum,
    publish_exclusively,
    replace_atomically,
    try_lock,
    write_file_durably,
)
from gradproj.storage.results import load_array, make_folder, save_array, write_result


def test_written_file_has_the_returned_sum(tmp_path):
    chunks = [b"abc", np.arange(10, dtype=np.float16).data, b""]
    returned = write_file_durably(tmp_path / "x", chunks)
    assert returned == file_sum(tmp_path / "x")
    assert returned["bytes"] == 23
    (tmp_path / "check").write_bytes(b"123456789")
    assert file_sum(tmp_path / "check")["crc32c"] == 0xE3069283  # the check value of CRC-32C


@pytest.mark.parametrize("links", ["links", "no links", "no links, no exclusive rename"])
def test_first_of_two_files_published_under_one_name_stays(tmp_path, monkeypatch, links):
    def refuse(*_):
        raise OSError(errno.EPERM, "links are missing here")

    if links != "links":
        monkeypatch.setattr(os, "link", refuse)
    if links.endswith("rename"):
        monkeypatch.setattr(files.ctypes, "CDLL", lambda *_, **__: object())
    for name in ("first", "second"):
        write_file_durably(tmp_path / name, [name.encode()])
        assert publish_exclusively(tmp_path / name, tmp_path / "final") is (name == "first")
    assert (tmp_path / "final").read_bytes() == b"first"
    assert "first" not in os.listdir(tmp_path)


def test_link_whose_reply_was_lost_counts_as_published(tmp_path):
    write_file_durably(tmp_path / "tmp", [b"mine"])
    os.link(tmp_path / "tmp", tmp_path / "final")
    assert publish_exclusively(tmp_path / "tmp", tmp_path / "final") is True
    assert os.listdir(tmp_path) == ["final"]


def test_full_disk_is_a_clear_error_and_leaves_no_partial_file(tmp_path):
    (tmp_path / "x").symlink_to("/dev/full")
    with pytest.raises(
        StoreError, match=r"cannot write .*/x: No space left on device\. Free space there"
    ):
        write_file_durably(tmp_path / "x", [b"data"])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("call", ["link", "replace"])
def test_failed_publication_leaves_no_temporary_file(tmp_path, monkeypatch, call):
    def refuse(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, call, refuse)
    write_file_durably(tmp_path / "tmp", [b"data"])
    publish = {"link": publish_exclusively, "replace": replace_atomically}[call]
    with pytest.raises(OSError, match="Input/output error"):
        publish(tmp_path / "tmp", tmp_path / "final")
    assert os.listdir(tmp_path) == []


def test_file_deleted_by_another_machine_while_written_is_not_found(tmp_path, monkeypatch):
    def stale(handle):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(os, "fsync", stale)
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: '.*/x'"):
        write_file_durably(tmp_path / "x", [b"data"])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.EDQUOT, "Your quota there is used up"),
        (errno.EROFS, "Make it writable and start again: .* Or start over in another --output_dir"),
        (
            errno.EACCES,
            "Fix the permissions and start again: .* Or start over in another --output_dir",
        ),
        (errno.EFBIG, "ulimit -f"),
    ],
)
def test_os_errors_name_the_path_and_the_way_out(code, message):
    with (
        pytest.raises(StoreError, match=rf"cannot write out/x: .*{message}"),
        explain_os_errors("out/x"),
    ):
        raise OSError(code, os.strerror(code))


def test_other_os_errors_are_not_changed():
    with pytest.raises(OSError, match="Bad file descriptor"), explain_os_errors("x"):
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))


def test_mode_is_set_whatever_the_umask(tmp_path):
    before = os.umask(0o077)
    try:
        write_file_durably(tmp_path / "private", [b"x"])
        write_file_durably(tmp_path / "shared", [b"x"], mode=0o644)
    finally:
        os.umask(before)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("private", "shared")]
    assert modes == [0o600, 0o644]


def test_second_lock_of_a_file_is_refused_until_the_first_is_closed(tmp_path):
    with (tmp_path / "lock").open("w") as first, (tmp_path / "lock").open("w") as second:
        assert try_lock(first) is True
        assert try_lock(second) is False
        first.close()
        assert try_lock(second) is True


def test_lock_without_file_locks_is_none_and_other_errors_are_raised(tmp_path, monkeypatch):
    code = errno.ENOLCK
    monkeypatch.setattr(
        files.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(code, "refused"))
    )
    with (tmp_path / "lock").open("w") as file:
        assert try_lock(file) is None
        code = errno.EIO
        with pytest.raises(OSError, match="refused"):
            try_lock(file)


def test_folder_and_result_that_cannot_be_made_name_their_flag(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=rf"^--to {folder}: .* is a file; give another path"):
            make_folder("--to", folder)
    with pytest.raises(ConfigError, match=r"^--page .*file/x: cannot write this file"):
        write_result("--page", tmp_path / "file" / "x", [b""])
    assert make_folder("--to", tmp_path / "a" / "b") == tmp_path / "a" / "b"
    write_result("--page", tmp_path / "a" / "x", [b"1", b"2"])
    assert (tmp_path / "a" / "x").read_bytes() == b"12"


def test_saved_array_is_loaded_and_a_damaged_one_is_named(tmp_path):
    array = np.arange(6).reshape(2, 3)
    save_array(tmp_path / "a.npy", array)
    np.testing.assert_array_equal(load_array(tmp_path / "a.npy"), array)
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-1])
    with pytest.raises(StoreError, match=r"a\.npy cannot be read .*Delete it"):
        load_array(tmp_path / "a.npy")
