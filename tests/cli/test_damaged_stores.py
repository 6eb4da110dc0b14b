"""query, domains and report describe damage in one line, without a traceback."""

import json
import shutil

import numpy as np
import pytest
from helpers.outputs import ROWS_PER_UNIT, shard_of
from helpers.report_page import StrictPage

from gradproj import ProjectionStore
from gradproj.__main__ import main
from gradproj.analysis import preconditioner
from gradproj.store import STATUS

COMMANDS = ("query", "domains", "report")


@pytest.fixture
def ask(capsys, output):
    """Run a command on the copied output: ``(exit code, standard output, standard error)``."""

    def run(command, *flags):
        query_flags = (
            ["--text", "the of it was", "--top_k", "2", "--bottom_k", "0"]
            if command == "query"
            else []
        )
        code = main([command, str(output), *query_flags, "--device", "cpu", *map(str, flags)])
        return code, *capsys.readouterr()

    return run


def assert_all_report(ask, *parts, commands=COMMANDS, flags=()):
    """Check that every command exits with code 2 and one line that contains the parts."""
    for command in commands:
        code, _, message = ask(command, *flags)
        assert code == 2, command
        assert message.startswith("gradproj: "), (command, message)
        assert len(message.splitlines()) == 1, (command, message)
        for part in parts:
            assert part in message, (command, message)


def ok_in_unit(output, unit):
    with ProjectionStore(output) as store:
        status = store.column("status", unit * ROWS_PER_UNIT, (unit + 1) * ROWS_PER_UNIT)
    return int((status == STATUS["ok"]).sum())


# --- rows that are recorded and missing ---


def test_missing_shard_is_reported_in_table_json_and_page(output, ask):
    lost = ok_in_unit(output, 1)
    shard_of(output, 1).unlink()
    message = f"{lost} rows are recorded and cannot be read: python -m gradproj verify {output}"

    code, printed, _ = ask("domains")
    assert code == 0
    assert f"damaged    {message}" in printed
    got = json.loads((output / "domains" / "domains.json").read_text())
    assert (got["n_lost"], got["damage"]) == (lost, message)
    assert sum(domain["lost"] for domain in got["domains"]) == lost
    assert sum(domain["rows"] for domain in got["domains"]) == got["n_rows"] - lost

    assert ask("report")[0] == 0
    page = StrictPage((output / "report.html").read_text(encoding="utf-8"))
    assert f"Damaged: of 70 documents, {message}." in page.text
    assert ("p", "verdict open") in [(tag, a.get("class")) for tag, a in page.tags]
    assert "Complete" not in page.text.split("Damaged")[0]


def test_intact_store_has_no_damage(output, ask):
    assert "damaged" not in ask("domains")[1]
    got = json.loads((output / "domains" / "domains.json").read_text())
    assert (got["n_lost"], got["damage"]) == (0, None)


def test_store_without_any_shard_is_damaged(output, ask):
    for unit in range(5):
        shard_of(output, unit).unlink()
    assert_all_report(ask, "is damaged: ", "python -m gradproj verify", flags=("--score", "dot"))


@pytest.mark.parametrize("name", ["row_scale", "domain", "loss"])
def test_missing_column_chunk_is_named(output, ask, name):
    (output / "projections.zarr" / name / "c.0").unlink()
    assert_all_report(
        ask,
        f"{name}/c.0 is damaged: it is gone",
        "python -m gradproj verify",
        commands=COMMANDS[1:],
    )
    if name == "row_scale":
        assert_all_report(ask, f"{name}/c.0 is damaged: it is gone", commands=["query"])
    assert main(["verify", str(output)]) != 0


def test_missing_token_covariances_are_damage_and_change_no_score(output, ask):
    shutil.rmtree(output / "projections.zarr" / "token_covariance_a")
    assert_all_report(ask, "token_covariance_a", "python -m gradproj verify")


# --- damaged bytes ---


def flip(path, *places, mask=0xFF):
    data = bytearray(path.read_bytes())
    for place in places:
        data[place] ^= mask
    path.write_bytes(data)


def edit_attributes(store, **changes):
    path = store / "zarr.json"
    metadata = json.loads(path.read_text())
    metadata["attributes"] |= changes
    path.write_text(json.dumps(metadata))


DAMAGES = {
    "status bytes flipped": (
        lambda z: flip(z / "status/c.0", 0, 3),
        ["status/c.0", "is no status"],
    ),
    "sums cut": (
        lambda z: (z / "token_covariance_s/c.0").write_bytes(b"\0" * 101),
        ["token_covariance_s", "zarr cannot read it"],
    ),
    "sums gone": (
        lambda z: (z / "token_covariance_a/c.0").unlink(),
        ["token_covariance_a does not hold"],
    ),
    "a sum's sign flipped": (
        lambda z: flip(z / "token_covariance_a/c.0", np.dtype(np.float64).itemsize - 1, mask=0x80),
        ["token_covariance_a holds no token covariance of"],
    ),
    "sums counted in words": (
        lambda z: edit_attributes(z, covariance_tokens="many"),
        ["covariance_tokens is 'many'"],
    ),
    "domains fewer": (lambda z: edit_attributes(z, domains=["one"]), ["and the store names 1"]),
    "layers of nothing": (
        lambda z: edit_attributes(z, layers=[{}]),
        ["attribute layers is no list of layers"],
    ),
    "the array's metadata empty": (
        lambda z: (z / "projections/zarr.json").write_text("{}"),
        ["projections/zarr.json is damaged", "KeyError('codecs')", "Restore that file from a copy"],
    ),
    "the array's metadata a list": (
        lambda z: (z / "projections/zarr.json").write_text("[]"),
        ["projections/zarr.json is damaged"],
    ),
    "the group's metadata a list": (
        lambda z: (z / "zarr.json").write_text("[]"),
        ["zarr.json is damaged"],
    ),
    "attributes a list": (
        lambda z: (z / "zarr.json").write_text('{"attributes": []}'),
        ["its attributes are no object"],
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_one_line_with_file_and_way_out(output, ask, name):
    damage, parts = DAMAGES[name]
    damage(output / "projections.zarr")
    assert_all_report(ask, *parts, "python -m gradproj verify")


def test_output_path_that_cannot_be_created_is_named(ask):
    assert_all_report(
        ask,
        "--output_dir /proc/x: cannot make this folder",
        commands=["domains"],
        flags=["--output_dir", "/proc/x"],
    )
    assert_all_report(
        ask,
        "--page /proc/x.html: cannot write this file",
        commands=["report"],
        flags=["--page", "/proc/x.html"],
    )


# --- the cached second moment ---


def test_cached_second_moment_serves_all_commands_until_damaged(output, ask, monkeypatch):
    flags = ("--score", "preconditioned")
    fits, real = [], preconditioner.fit_second_moments
    monkeypatch.setattr(
        preconditioner, "fit_second_moments", lambda *a, **k: fits.append(1) or real(*a, **k)
    )
    first = ask("query", *flags)
    for command in ("domains", "report"):
        assert ask(command, *flags)[0] == 0
    assert len(fits) == 1

    (cached,) = (output / "preconditioners").iterdir()
    flip(cached, -3)
    code, printed, message = ask("query", *flags)
    assert code == 0
    assert "is damaged (its checksum does not match)" in message
    assert "Fitting it again" in message
    assert (printed, len(fits)) == (first[1], 2)
    assert ask("domains", *flags)[2] == ""


def test_damping_of_a_score_without_one_is_rejected(ask):
    assert_all_report(
        ask,
        "--score dot has no damping; leave --damping out",
        flags=("--score", "dot", "--damping", "0.5"),
    )
