"""Published files are whole or absent and have one winner; OS errors are explained."""

import errno
import os

import numpy as np
import pytest

from gradproj import files as store_files
from gradproj.errors import StoreError
from gradproj.files import explain_os_errors, file_sum, publish_exclusively, write_file_durably


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
        monkeypatch.setattr(store_files.ctypes, "CDLL", lambda *_, **__: object())
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
        (
            errno.EROFS,
            "Make it writable and start again: .* Or start over in another --output_dir",
        ),
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
