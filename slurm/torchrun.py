"""torchrun with an exit code that tells: 128 + the signal's number where a signal ended it.

Plain torchrun ends with 1 for that as for a failure of its ranks, so a batch script could not know whether the ranks
were told to stop and have saved their work (queue the job again) or failed.
"""

import sys

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.run import main

if __name__ == "__main__":
    try:
        main()
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)
