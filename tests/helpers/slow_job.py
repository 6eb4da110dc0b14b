"""The job with one batch that takes long: ``slow_job.py FOLDER BATCHES SECONDS`` and the job's flags.

After so many batches a rank writes its pid into FOLDER, and the next batch lasts so many seconds.
"""

import itertools
import os
import sys
import time
from pathlib import Path

from gradproj import run
from gradproj.coordinator import fault_points


def main(folder: str, batches: str, seconds: str, *argv: str) -> int:
    done = itertools.count(1)

    def at(step: str) -> None:
        if step == "batch done" and next(done) == int(batches):
            Path(folder, str(os.getpid())).touch()
            time.sleep(float(seconds))

    fault_points.reach = at
    return run.main(list(argv))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
