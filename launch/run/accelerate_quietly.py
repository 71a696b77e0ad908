"""`accelerate launch` that prints one line instead of a traceback for each process that failed: the
trainers say why themselves.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from emotion_train.command_line import end_at_once
from emotion_train.edges.streams import hold
from emotion_train.errors import TRACEBACK_VARIABLE, exit_code
from emotion_train.processes.accelerate_refusals import REFUSALS, refusal
from emotion_train.processes.launcher_link import (
    FOLDER_VARIABLE,
    adopting,
    end_with_launcher,
    kill_all_of,
    kill_trainers,
    trainers_started,
)

_TRAINERS_S = 2.0  # time for the trainers to end by themselves when the launcher is gone


def main() -> int:
    hold("emotion-launch")
    end_at_once()
    end_with_launcher(_end)
    with adopting():
        return exit_code("emotion-launch", _launch, show_traceback=bool(os.environ.get(TRACEBACK_VARIABLE)))


def _launch() -> int:
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
    except REFUSALS as error:
        if (name := os.environ.get(FOLDER_VARIABLE)) and trainers_started(Path(name)):
            raise
        raise refusal(sys.argv, error) from error
    return 0


def _end(folder: Path) -> None:
    """End every trainer, however stuck, and remove the folder, as the launcher would have done."""
    time.sleep(_TRAINERS_S)
    kill_trainers(folder)
    kill_all_of(folder, frozenset())
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
