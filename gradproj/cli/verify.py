"""The command ``verify``: checks, recomputes and repairs an output; text or JSON."""

import json
import os
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np

from gradproj.coordinator.merge import ranges_of
from gradproj.corpus.tar.paths import INDEX_NAME
from gradproj.errors import StoreError
from gradproj.flags import parse
from gradproj.formatting import bounded, count, ranges_text
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
from gradproj.storage.object_path import path_of
from gradproj.store.layout import METADATA_NAME

if TYPE_CHECKING:
    from gradproj.maintenance.recompute import Recomputation

MAX_DAMAGE_SHOWN = 20
MAX_ROWS_SHOWN = 10
MORE = "              and {:,} more; --json lists them all"

WAYS_OUT = {
    INDEX_NAME: "restore corpus.json, or delete it: the job's command indexes the tars again "
    "and refuses another corpus",
    "projection_matrices": "restore the array projection_matrices from a copy: the rows were made "
    "with it alone",
    METADATA_NAME: "metadata.json is written again by `verify --repair`, by a merge and by the "
    "job's next start",
}
"""File name -> repair of its damage, for damage of kind ``other``."""


def verify_command(argv: list[str]) -> int:
    """Print what is damaged, recomputed and repaired, and return the exit code."""
    about = (
        "Check every checksum of an output, and records against shards and columns. Exit code 0: "
        "sound and complete; 3: sound, but incomplete; 1: damaged, or recomputed rows differ; 2: "
        "no store there, or another model than the job's. With --repair it is the state afterwards."
    )
    (config,) = parse(argv, "gradproj verify", VerifyConfig, description=about)
    config.apply()
    verification, parts = verify(config.output, checksums=config.checksums), {}
    _print(config, verification_lines(verification) if config.checksums else [])
    if config.recompute:
        # Imports torch and transformers, which nothing else here needs.
        from gradproj.maintenance.recompute import recompute, wrong_rows

        damaged = verification.damaged_units
        recomputation = recompute(config, config.recompute, config.seed, damaged)
        verification.damage += wrong_rows(recomputation, read_output(config.output))
        parts["recompute"] = asdict(recomputation)
        _print(config, recomputation_lines(recomputation))
    code = verification.exit_code
    if config.repair:
        result = repair(verification)
        code, parts["repair"] = result.exit_code, asdict(result)
        _print(config, repair_lines(result, "" if result.complete else _next_step(config.output)))
    else:
        _print(config, verdict_lines(verification, checksums=config.checksums))
    if config.as_json:
        print(json.dumps({**asdict(verification), **parts}, indent=2))
    return code


def _print(config: VerifyConfig, lines: list[str]) -> None:
    if lines and not config.as_json:
        print("\n".join(lines), flush=True)


def _next_step(output: str) -> str:
    try:
        from gradproj.job.recorded import job_command  # imports torch

        command = job_command(path_of(output))
    except StoreError:
        return "run the job's command again"
    return f"run the job's command again, with any number of ranks, as in: {command}"


def verification_lines(verification: Verification) -> list[str]:
    """Return the findings as lines of text, without a verdict."""
    megabytes, seconds = verification.n_bytes / 1e6, verification.seconds
    rows = ", ".join(f"{n:,} {name}" for name, n in verification.by_status.items())
    damages = []
    lines = [
        f"checked       {count(verification.n_records, 'record')} of {verification.n_units:,}, "
        f"{count(verification.n_shards, 'shard')}: {megabytes:,.1f} MB in {seconds:.1f} s "
        f"({megabytes / max(seconds, 1e-9):,.0f} MB/s)",
        f"rows          {rows or 'none yet'}",
    ]
    for name, ids in (("missing", verification.missing), ("non-finite", verification.non_finite)):
        if ids.n_ids:
            documents = count(ids.n_ids, "document")
            lines.append(f"{name:<13} {documents}: ids {ranges_text(ids.ranges)}")
    if verification.shards_without_record:
        units = np.array(verification.shards_without_record)
        lines.append(
            f"left over     {count(len(units), 'shard')} without a record, of units "
            f"{ranges_text(ranges_of(units))}: being committed, or left by a killed process; "
            "they do not count"
        )
    for damage in verification.damage:
        unit = "" if damage.unit is None else f"unit {damage.unit}: "
        damages.append(f"DAMAGED       {unit}{damage.path} {damage.what}")
    return lines + bounded(damages, MAX_DAMAGE_SHOWN, MORE)


def verdict_lines(verification: Verification, *, checksums: bool = True) -> list[str]:
    """Return the ways to repair damage, and the verdict as the last line."""
    return [*_ways_out(verification), f"result        {_verdict(verification, checksums)}"]


def _ways_out(verification: Verification) -> list[str]:
    lines = []
    if verification.wrong_units:
        lines.append(
            "way out       this command with --repair deletes the units of wrong rows, which the "
            "job's command then recomputes; rows that were not recomputed were not checked: a "
            "larger --recompute checks more"
        )
    if any(d.kind in ("unit", "columns") for d in verification.damage):
        lines.append(
            f"way out       `python -m gradproj verify {verification.output} --repair` deletes "
            "damaged units and merges columns again; the job's command then recomputes those "
            "units and keeps all others"
        )
    return [*lines, *other_ways_out(verification.damage)]


def other_ways_out(damage: list[Damage]) -> list[str]:
    """Return the ways to repair damage outside units."""
    names = [os.path.basename(d.path) for d in damage if d.kind == "other"]
    return [f"way out       {WAYS_OUT[name]}" for name in names if name in WAYS_OUT]


def _verdict(verification: Verification, checksums: bool) -> str:
    if verification.damage:
        return f"damaged, in {count(len(verification.damage), 'place')}"
    if not checksums:
        state = "complete" if verification.complete else "incomplete"
        return f"{state}, and no recomputed row differs; checksums were not computed"
    if verification.complete:
        return "sound and complete"
    rest = "some units are missing" if verification.missing.n_ids else "not merged yet"
    return f"sound, but incomplete: {rest}"


def recomputation_lines(recomputation: "Recomputation") -> list[str]:
    """Return the comparison with recomputed rows as lines of text."""
    r = recomputation
    others = f" and {count(r.n_others, 'document')} of another status" if r.n_others else ""
    lines = [
        f"recomputed    {count(r.n_rows, 'row')}{others} on {r.device} in {r.seconds:.1f} s, "
        f"seed {r.seed}",
        f"error         at most {r.max_error:.1e}, median {r.median_error:.1e}, relative to the "
        f"row; rounding explains {r.tolerance:.1e}",
    ]
    if r.n_without_memory:
        lines.append(
            f"not compared  {count(r.n_without_memory, 'document')} that ran out of memory"
        )
    wrong = [
        f"WRONG         sample {c.sample_id} (unit {c.unit}, key {c.key!r}, stored as {c.status}) "
        f"{c.what}"
        for c in sorted(r.wrong, key=lambda check: -check.error)
    ]
    lines += bounded(wrong, MAX_ROWS_SHOWN, MORE)
    if not wrong and r.worst:
        ids = ", ".join(f"{c.sample_id} ({c.error:.1e})" for c in r.worst[:3])
        lines.append(f"farthest      samples {ids}")
    return lines


def repair_lines(result: Repair, next_step: str) -> list[str]:
    """Return what was repaired as lines of text; ``next_step`` computes missing units."""
    lines = []
    if result.units:
        units = ranges_text([[unit, unit + 1] for unit in result.units])
        lines.append(
            f"repaired      record and shard of {count(len(result.units), 'unit')} ({units}) "
            "deleted; the job recomputes them"
        )
    if result.recovered:
        n_recovered = count(len(result.recovered), "unit")
        lines.append(f"repaired      {n_recovered} meanwhile, by another process")
    if result.merged:
        lines.append("repaired      columns, sums and statistics merged again from sound records")
    if result.orphans:
        lines.append(
            f"repaired      shards of {count(len(result.orphans), 'unit')} without a record"
        )
    for unit, owner in result.held.items():
        lines.append(f"left          unit {unit} is claimed by {owner}. Then repair again")
    lines += [f"left          {d.path} {d.what}" for d in result.left if d.unit not in result.held]
    lines += other_ways_out(result.left)
    if result.units:
        documents = count(result.n_samples, "document")
        lines.append(f"lost          the rows of {documents} in those units, nothing else")
    elif not result.left:
        lines.append("lost          nothing")
    if not result.complete:
        lines.append(f"next          {next_step}")
    state = {
        DAMAGED: "damage remains",
        INCOMPLETE: "sound, but incomplete",
        SOUND: "sound and complete",
    }
    return [*lines, f"result        {state[result.exit_code]}"]
