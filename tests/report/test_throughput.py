"""Times of units, and tokens a second over time."""

from types import SimpleNamespace

import numpy as np
import pytest
from helpers.report_parts import times_of
from helpers.stores import make_columns

from gradproj.errors import StoreError
from gradproj.report.throughput import UnitTimes, throughput, unit_times
from gradproj.store.unit_record import UnitRecord, encode_record, read_stats, record_name


def write_unit(output, unit, rank, started, seconds, tokens, log="rank-{:05d}.log", **more):
    stats = {
        "started_at": started,
        "seconds": seconds,
        "finished_at": started + seconds,
        "real_tokens": tokens,
    }
    stats = more.get("stats", stats)
    columns = make_columns(SimpleNamespace(key_bytes=8), 0, 4, np.ones(4))
    record = UnitRecord(unit, 4 * unit, "identity", None, columns, stats)
    (output / record_name(unit)).write_bytes(encode_record(record))
    if rank is not None:
        with (output / "logs" / log.format(rank)).open("a") as file:
            file.write(f"2026-01-01 00:00:00,000 DEBUG unit {unit}: batch 1 of 2, (2, 8) tokens\n")
            file.write(f"2026-01-01 00:00:00,000 INFO unit {unit} committed: {stats}\n")


@pytest.fixture
def folder(tmp_path):
    for name in ("units", "logs"):
        (tmp_path / name).mkdir()
    return tmp_path


def test_unit_times_come_from_the_records_and_ranks_from_the_logs(folder):
    write_unit(folder, 0, 0, 1000.25, 10, 500)
    write_unit(folder, 1, 10, 1001.5, 20, 800)
    write_unit(folder, 2, 2, 1002.0, 5, 300, log="rank-{:05d}-slurm-70_1.log")
    write_unit(folder, 3, None, 1003.0, 5, 100)
    write_unit(folder, 4, None, 0, 0, 0, stats={"seconds": 1.5})
    # A unit that was computed twice: the record is of the second time.
    write_unit(folder, 0, 10, 2000.75, 10, 500)
    times = unit_times(folder)
    assert times.ranks == ["2 of slurm-70_1", "10", "unknown"]
    assert [times.ranks[rank] for rank in times.rank] == ["10", "2 of slurm-70_1", "unknown", "10"]
    assert times.n_tokens.tolist() == [800, 300, 100, 500]
    assert times.n_untimed == 1
    assert times.working_s == 20 + 10
    assert times.rank_s == 20 + 5 + 5 + 10


def test_record_stats_are_read_without_the_columns_and_damage_is_named(folder):
    write_unit(folder, 0, 0, 1000.25, 10, 500)
    path = folder / record_name(0)
    assert read_stats(path)["real_tokens"] == 500
    data = path.read_bytes()
    path.write_bytes(data[:-20])  # the beginning is whole
    assert read_stats(path)["started_at"] == 1000.25
    for broken in (b"", b"abc", data[:40], b"\xff" * 100, (2).to_bytes(8, "little") + b"{}"):
        path.write_bytes(broken)
        with pytest.raises(StoreError, match=r"00000000\.safetensors is damaged"):
            read_stats(path)


def test_throughput_keeps_every_token_and_spreads_a_unit_s_tokens_evenly():
    speed = throughput(times_of([(100, 110, 500, 0), (105, 125, 800, 1)], 2), n_bins=25)
    seconds = speed.edges_s[-1] / 25
    assert speed.total.sum() * seconds == pytest.approx(1300)
    np.testing.assert_allclose(speed.by_rank[0], [50] * 10 + [0] * 15, atol=1e-9)
    np.testing.assert_allclose(speed.by_rank[1], [0] * 5 + [40] * 20, atol=1e-9)
    assert (speed.from_s, speed.to_s, speed.pauses) == (100, 125, [])


def test_only_long_idle_time_is_cut_out():
    day = 86400.0
    speed = throughput(
        times_of([(0, 100, 10, 0), (300, 400, 10, 0), (day, day + 100, 30, 0)], 1), n_bins=50
    )
    assert speed.pauses == [(400, day - 400)]
    assert speed.edges_s[-1] == 500
    assert speed.total.sum() * 10 == pytest.approx(50)
    assert speed.total[10:30].sum() == 0
    assert speed.total[40:].sum() * 10 == pytest.approx(30)
    assert throughput(UnitTimes(*(np.empty(0),) * 3, np.empty(0, int), [], 0)) is None
