"""Named steps of the commit protocol, at which tests interrupt the process."""

STEPS = (
    # start
    "empty store removed",
    "folders made",
    "index published",
    "pilot batch done",
    "pilot done",
    "store published",
    "merge undone",
    "metadata published",
    # a unit (the merge has a claim too)
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
    # merge
    "merge reopened",
    "block merged",
    "sums merged",
    "statistics written",
    "metadata written",
    "attributes updated",
    # exit
    "claim released",
    "scratch removed",
)
"""Every step, by the phase it belongs to and in the order in which a job reaches it."""


def reach(step: str) -> None:
    """Do nothing. Tests replace this function by one that kills the process at a step."""
