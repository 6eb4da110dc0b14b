"""This process's place among the ranks of a job, and what the ranks do together.

The job's ranks meet at its start only, where rank 0 checks while the others wait. Its loop has no
collective, so an uneven rank cannot make another time out, but for ranks that hold one model
together (``model_group``). torch is imported where it is used:
signals must be handled before the seconds that it takes.
"""

from gradproj.distributed.process import (
    JobName,
    Process,
    choose_device,
    launcher_died,
    launcher_rank,
    quieten_torch,
    report_errors_from_rank_0,
)
from gradproj.distributed.rendezvous import Rendezvous, process_group
from gradproj.distributed.world import World, has_process_group

__all__ = [
    "JobName",
    "Process",
    "Rendezvous",
    "World",
    "choose_device",
    "has_process_group",
    "launcher_died",
    "launcher_rank",
    "process_group",
    "quieten_torch",
    "report_errors_from_rank_0",
]
