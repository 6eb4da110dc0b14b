"""Jobs of real ranks on one output, killed at named steps and started again."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch.distributed as torch_dist
import zarr
from helpers.forked_ranks import Ranks
from helpers.jobs import flags

from gradproj.storage.bucket import open_bucket
from gradproj.storage.object_path import ObjectPath


class Launch:
    """A job on one output, with any number of ranks."""

    def __init__(
        self,
        ranks: Ranks,
        output: Any,
        environment: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> None:
        self.ranks, self.output, self.environment = ranks, output, dict(environment or {})
        self.argv = ["gradproj.run", *flags(output_dir=output, **settings)]

    def start(self, world_size: int, **how: Any) -> None:
        """Start ranks like torchrun: with its variables and a rendezvous store."""
        self._meeting = torch_dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        shared = {
            "WORLD_SIZE": world_size,
            "LOCAL_WORLD_SIZE": world_size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": self._meeting.port,
            "TORCHELASTIC_USE_AGENT_STORE": True,
            "TORCHELASTIC_RESTART_COUNT": 0,
        }
        for rank in range(world_size):
            variables = {**shared, "RANK": rank, "LOCAL_RANK": rank}
            environment = {name: str(value) for name, value in variables.items()}
            environment |= self.environment
            self.ranks.start(self.argv, rank, environment=environment, **how)

    def die_at(self, step: str, world_size: int = 2, **how: Any) -> None:
        """Start the job, and kill all ranks (-9) as soon as one has reached a step."""
        self.start(world_size, kill_at=step, **how)
        self.killed_at(step)

    def killed_at(self, step: str) -> None:
        """Wait for the rank that is killed at a step, then kill all others."""
        ended = self.ranks.wait_for_one()
        # Another rank may have exited before, without work left or after the first one died.
        while ended.status != -9 and self.ranks.running():
            ended = self.ranks.wait_for_one()
        assert (ended.status, ended.steps[-1:]) == (-9, [step]), (
            f"no rank reached {step!r}\n{ended.output}"
        )
        self.ranks.kill_all()

    def finish(self, world_size: int) -> None:
        """Start the job and wait for its end, which must be one in order."""
        self.start(world_size)
        ended = self.ranks.wait_for_all()
        assert [rank.status for rank in ended] == [0] * world_size, "\n".join(
            rank.output for rank in ended
        )

    def die_merging_at(self, step: str) -> None:
        """Run the command ``merge`` and kill it at a step."""
        argv = ["gradproj.__main__", "merge", str(self.output)]
        self.ranks.start(argv, environment=self.environment, kill_at=step)
        self.killed_at(step)


def arrays_in_bucket(output: ObjectPath) -> dict[str, bytes]:
    """Return the bytes of every array, read by plain zarr from the bucket."""
    folder = output / "projections.zarr"
    store, key = open_bucket(folder)
    group = zarr.open_group(zarr.storage.ObjectStore(store, read_only=True), path=key, mode="r")
    # Not group.arrays(): of zarr 3.1.0 to 3.1.3 it misses arrays of a bucket.
    names = folder.names(folders_only=True)
    return {name: np.ascontiguousarray(group[name][...]).tobytes() for name in names}
