"""torchrun with exit code 128 + the signal's number after a signal.

Plain torchrun exits with 1 after a signal and after a failure of its ranks, so a batch script could
not tell ranks that have saved their work on request (requeue the job) from ranks that failed.
"""

import sys

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.run import main

if __name__ == "__main__":
    try:
        main()
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)
