"""Laws of questions to damaged stores: damage is said by query, domains and report alike, and never a traceback."""

import json
import shutil

import pytest
from outputs import ROWS_PER_UNIT, shard_of
from report_cases import StrictPage

from gradproj import ProjectionStore
from gradproj.__main__ import main
from gradproj.store import STATUS

COMMANDS = ("query", "domains", "report")


@pytest.fixture
def ask(capsys, output):
    """Ask the copied output: ``(exit code, standard output, standard error)``."""

    def run(command, *flags):
        asked = ["--text", "the of it was", "--top_k", "2", "--bottom_k", "0"] if command == "query" else []
        code = main([command, str(output), *asked, "--device", "cpu", *map(str, flags)])
        return code, *capsys.readouterr()

    return run


def said_by_all(ask, *parts, commands=COMMANDS, flags=()):
    """Every command ends with code 2 and one line that holds the parts."""
    for command in commands:
        code, _, said = ask(command, *flags)
        assert code == 2, command
        assert said.startswith("gradproj: "), (command, said)
        assert len(said.splitlines()) == 1, (command, said)
        for part in parts:
            assert part in said, (command, said)


def ok_in_unit(output, unit):
    with ProjectionStore(output) as store:
        status = store.column("status", unit * ROWS_PER_UNIT, (unit + 1) * ROWS_PER_UNIT)
    return int((status == STATUS["ok"]).sum())


# --- rows that are recorded and gone ---


def test_rows_whose_shard_is_gone_are_damage_in_the_table_the_json_and_on_the_page(output, ask):
    lost = ok_in_unit(output, 1)
    shard_of(output, 1).unlink()
    said = f"{lost} rows are recorded and cannot be read: python -m gradproj verify {output}"

    code, printed, _ = ask("domains")
    assert code == 0
    assert f"damaged    {said}" in printed
    got = json.loads((output / "domains" / "domains.json").read_text())
    assert (got["n_lost"], got["damage"]) == (lost, said)
    assert sum(domain["lost"] for domain in got["domains"]) == lost
    assert sum(domain["rows"] for domain in got["domains"]) == got["n_rows"] - lost

    assert ask("report")[0] == 0
    page = StrictPage((output / "report.html").read_text(encoding="utf-8"))
    assert f"Damaged: of 70 documents, {said}." in page.text
    assert "Complete" not in page.text.split("Damaged")[0]


def test_a_sound_store_has_no_damage(output, ask):
    assert "damaged" not in ask("domains")[1]
    got = json.loads((output / "domains" / "domains.json").read_text())
    assert (got["n_lost"], got["damage"]) == (0, None)


def test_a_store_whose_shards_are_all_gone_answers_nothing(output, ask):
    for unit in range(5):
        shard_of(output, unit).unlink()
    said_by_all(ask, "is damaged: ", "python -m gradproj verify", flags=("--score", "dot"))


@pytest.mark.parametrize("name", ["row_scale", "domain", "loss"])
def test_a_column_s_chunk_that_is_gone_is_named(output, ask, name):
    (output / "projections.zarr" / name / "c.0").unlink()
    said_by_all(ask, f"{name}/c.0 is damaged: it is gone", "python -m gradproj verify", commands=COMMANDS[1:])
    if name == "row_scale":
        said_by_all(ask, f"{name}/c.0 is damaged: it is gone", commands=["query"])
    assert main(["verify", str(output)]) != 0


def test_token_covariances_that_are_gone_are_damage_and_no_reason_for_another_score(output, ask):
    shutil.rmtree(output / "projections.zarr" / "token_covariance_a")
    said_by_all(ask, "token_covariance_a", "python -m gradproj verify")
