"""The named steps of the commit protocol. The job says where it is; only tests listen."""

STEPS = (
    # the start
    "folders made",
    "index published",
    "store published",
    "metadata published",
    "merge taken back",
    # a unit
    "claim published",
    "old owner fenced",
    "batch done",
    "partial published",
    "shard written",
    "record written",
    "shard published",
    "record published",
    "partial removed",
    "claims removed",
    # the merge
    "merge reopened",
    "block merged",
    "sums merged",
    "attributes updated",
    "statistics written",
    "metadata merged",
    # leaving
    "claim given back",
    "scratch removed",
)
"""Every step, in the order in which an undisturbed job first comes to it (those of mishaps where they belong)."""


def at(step: str) -> None:
    """Called when a step is done. Does nothing: a test puts another function here, which ends the process."""
