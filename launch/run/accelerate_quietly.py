"""`accelerate launch`, with one line instead of a traceback for each process that ended badly: the
trainers have said why themselves.
"""

from __future__ import annotations

import logging
import signal
import sys


def main() -> int:
    from accelerate.commands.launch import main as accelerate_launch
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # a trainer's exit code, signals sent
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        accelerate_launch()
    except ChildFailedError as error:
        for rank, failure in error.failures.items():
            if failure.exitcode < 0:  # else it had the time to say why
                print(
                    f"emotion-launch: rank {rank} was ended by {signal.Signals(-failure.exitcode).name}",
                    file=sys.stderr,
                )
        return 1
    except (DistError, ConnectionError) as error:  # between nodes, before any trainer is started
        print(f"emotion-launch: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
