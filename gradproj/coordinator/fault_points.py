"""The named steps of the commit protocol. The job says where it is; only tests listen."""

STEPS = (
    # the start
    "folders made",
    "index published",
    "store published",
    "merge taken back",
    "metadata published",
    # a unit, and the merge too has a claim
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
    "statistics written",
    "metadata merged",
    "attributes updated",
    # leaving
    "claim given back",
    "scratch removed",
)
"""Every step, by what it is a part of and there in the order in which a job comes to them."""


def reach(step: str) -> None:
    """Called when a step is done. Does nothing: a test puts another function here, which ends the process."""
