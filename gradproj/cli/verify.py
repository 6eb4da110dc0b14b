"""The command ``verify``: checks, repairs and recomputes a store; text or JSON."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gradproj.coordinator.merge import ranges_of
from gradproj.errors import StoreError
from gradproj.flags import parse
from gradproj.formatting import count, ranges_text
from gradproj.maintenance.checks import Damage
from gradproj.maintenance.job_output import read_output
from gradproj.maintenance.repair import Repair, repair
from gradproj.maintenance.verify import (
    DAMAGED,
    INCOMPLETE,
    SOUND,
    Verification,
    VerifyConfig,
    verify,
)

if TYPE_CHECKING:
    from gradproj.maintenance.recompute import Recomputation

MOST_DAMAGE_SHOWN = 20
MOST_ROWS_SHOWN = 10

WAYS_OUT = {
    "corpus.json": "put corpus.json back, or delete it: the job's command indexes the tars again and refuses another "
    "corpus",
    "projection_matrices": "put the array projection_matrices back from a copy: rows were made with it alone",
    "metadata.json": "metadata.json is written again by `verify --repair`, by a merge and by the job's next start",
}
"""Damage of kind ``other``, by its file's name."""


def verify_command(argv: list[str]) -> int:
    """``python -m gradproj verify OUTPUT``: exit code 0 sound and complete, 3 sound but incomplete, 1 damaged."""
    about = (
        "Every checksum of a store again, records against shards and columns. Exit code 0: sound and complete; "
        "3: sound, but incomplete; 1: damaged, or rows that come out otherwise; 2: no store there, or not its model. "
        "After --repair it is the state that the store is in then."
    )
    (config,) = parse(argv, "gradproj verify", VerifyConfig, description=about)
    found, parts = verify(config.output, checksums=config.checksums), {}
    _say(config, verification_lines(found) if config.checksums else [])
    if config.recompute:
        # Loads torch and transformers, which nothing else here needs.
        from gradproj.maintenance.recompute import recompute, wrong_rows

        again = recompute(config, config.recompute, config.seed, found.damaged_units)
        found.damage += wrong_rows(again, read_output(config.output))
        parts["recompute"] = asdict(again)
        _say(config, recomputation_lines(again))
    code = found.exit_code
    if config.repair:
        done = repair(found)
        code, parts["repair"] = done.exit_code, asdict(done)
        _say(config, repair_lines(done, "" if done.complete else _way_on(config.output)))
    else:
        _say(config, verdict_lines(found, checksums=config.checksums))
    if config.as_json:
        print(json.dumps({**asdict(found), **parts}, indent=2))
    return code


def _say(config: Any, lines: list[str]) -> None:
    if lines and not config.as_json:
        print("\n".join(lines), flush=True)


def _way_on(output: str) -> str:
    """What to start for the units that are missing."""
    try:
        from gradproj.job.recorded import job_command

        command = job_command(Path(output))
    except StoreError:
        return "run the job's command again"
    return f"run the job's command again, with any number of ranks, as in: {command}"


def verification_lines(found: Verification) -> list[str]:
    """The findings as lines of text, without a verdict."""
    rate = found.n_bytes / 1e6 / max(found.seconds, 1e-9)
    lines = [
        f"checked       {count(found.n_records, 'record')} of {found.n_units:,}, {count(found.n_shards, 'shard')}: "
        f"{found.n_bytes / 1e6:,.1f} MB in {found.seconds:.1f} s ({rate:,.0f} MB/s)",
        f"rows          {', '.join(f'{n:,} {name}' for name, n in found.by_status.items()) or 'none yet'}",
    ]
    for name, ids in (("missing", found.missing), ("non-finite", found.non_finite)):
        if ids.n_ids:
            lines.append(
                f"{name:<13} {count(ids.n_ids, 'document')}: ids {ranges_text(ids.ranges)}"
            )
    if found.shards_without_record:
        units = np.array(found.shards_without_record)
        lines.append(
            f"left over     {count(len(units), 'shard')} without a record, of units {ranges_text(ranges_of(units))}: "
            "being committed, or left by a killed process; they count for nothing"
        )
    lines += [f"DAMAGED       {_damage_text(d)}" for d in found.damage[:MOST_DAMAGE_SHOWN]]
    if len(found.damage) > MOST_DAMAGE_SHOWN:
        lines.append(
            f"              and {len(found.damage) - MOST_DAMAGE_SHOWN:,} more; --json lists them all"
        )
    return lines


def verdict_lines(found: Verification, *, checksums: bool = True) -> list[str]:
    """What to do about damage, and the verdict as the last line; ``checksums``: whether they were computed."""
    return [*_ways_out(found), f"result        {_verdict(found, checksums)}"]


def _damage_text(damage: Damage) -> str:
    unit = "" if damage.unit is None else f"unit {damage.unit}: "
    return f"{unit}{damage.path} {damage.what}"


def _ways_out(found: Verification) -> list[str]:
    lines = []
    if found.wrong_units:
        lines.append(
            "way out       this command with --repair turns the units of wrong rows into missing ones, which the job's "
            "command then computes again; of rows that were not computed nothing is known: more --recompute tries more"
        )
    if any(d.kind in ("unit", "columns") for d in found.damage):
        lines.append(
            f"way out       `python -m gradproj verify {found.output} --repair` turns damaged units into missing ones "
            "and merges columns again; the job's command then computes those units once more and keeps all others"
        )
    return [*lines, *other_ways_out(found.damage)]


def other_ways_out(damage: list[Damage]) -> list[str]:
    """What to do about damage that no repair of units mends."""
    names = [os.path.basename(d.path) for d in damage if d.kind == "other"]
    return [f"way out       {WAYS_OUT[name]}" for name in names if name in WAYS_OUT]


def _verdict(found: Verification, checksums: bool) -> str:
    if found.damage:
        return f"damaged, in {count(len(found.damage), 'place')}"
    if not checksums:
        state = "complete" if found.complete else "incomplete"
        return f"{state}, and no wrong row among those computed again; checksums were not computed"
    if found.complete:
        return "sound and complete"
    rest = "some units are missing" if found.missing.n_ids else "not merged yet"
    return f"sound, but incomplete: {rest}"


def recomputation_lines(found: "Recomputation") -> list[str]:
    """What came of it, as lines of text."""
    others = f" and {count(found.n_others, 'document')} of another status" if found.n_others else ""
    lines = [
        f"recomputed    {count(found.n_rows, 'row')}{others} on {found.device} in {found.seconds:.1f} s, "
        f"seed {found.seed}",
        f"error         at most {found.max_error:.1e}, median {found.median_error:.1e}, relative to the row; "
        f"rounding explains {found.tolerance:.1e}",
    ]
    if found.n_without_memory:
        lines.append(
            f"not compared  {count(found.n_without_memory, 'document')} that did not fit the memory"
        )
    wrong = sorted(found.wrong, key=lambda check: -check.error)
    lines += [
        f"WRONG         sample {c.sample_id} (unit {c.unit}, key {c.key!r}, stored as {c.status}) {c.what}"
        for c in wrong[:MOST_ROWS_SHOWN]
    ]
    if len(wrong) > MOST_ROWS_SHOWN:
        lines.append(
            f"              and {len(wrong) - MOST_ROWS_SHOWN:,} more; --json lists them all"
        )
    if not wrong and found.worst:
        ids = ", ".join(f"{c.sample_id} ({c.error:.1e})" for c in found.worst[:3])
        lines.append(f"farthest      samples {ids}")
    return lines


def repair_lines(done: Repair, go_on: str) -> list[str]:
    """What was done, as lines of text; ``go_on`` is the command that computes what is missing."""
    lines = []
    if done.units:
        units = (
            f"{count(len(done.units), 'unit')} ({ranges_text([[u, u + 1] for u in done.units])})"
        )
        lines.append(
            f"repaired      record and shard of {units} removed, which the job computes again"
        )
    if done.recovered:
        lines.append(
            f"repaired      {count(len(done.recovered), 'unit')} meanwhile, by another process"
        )
    if done.merged:
        lines.append(
            "repaired      columns, sums and statistics merged again from the records there are"
        )
    for unit, owner in done.held.items():
        lines.append(f"left          unit {unit} is claimed by {owner}. Then repair again")
    lines += [f"left          {d.path} {d.what}" for d in done.left if d.unit not in done.held]
    lines += other_ways_out(done.left)
    if done.units:
        lines.append(
            f"lost          the rows of {count(done.n_samples, 'document')} in those units, nothing else"
        )
    elif not done.left:
        lines.append("lost          nothing")
    if not done.complete:
        lines.append(f"go on         {go_on}")
    state = {
        DAMAGED: "damage is left",
        INCOMPLETE: "sound, but incomplete",
        SOUND: "sound and complete",
    }
    return [*lines, f"result        {state[done.exit_code]}"]
