"""Run the job with one slow batch: ``slow_job.py FOLDER BATCHES SECONDS`` and the job's flags.

After BATCHES batches a rank writes its pid into FOLDER and sleeps for SECONDS.
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
