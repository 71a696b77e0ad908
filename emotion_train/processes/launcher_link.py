"""How a trainer and the launcher above it talk past accelerate: who the trainers are, what the run
came to, and when a signal may come.

Between them stand accelerate and torchelastic, which make 1 of every exit code, and which answer
SIGTERM by killing the trainers 30 s later (torch 2.13 can be told another number, older ones
cannot). So the launcher starts everything with `STOP_SIGNALS` blocked, signals the trainers itself,
and reads the exit code from a file. The price: what stands between is deaf to these signals and
ends by SIGKILL only.
"""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# names the folder that the launcher made for one run on this machine
FOLDER_VARIABLE = "EMOTION_TRAIN_OUTCOME"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SAVE_S = 300.0  # how long a save may take after a signal, before the hold begins
_OUTCOME = "outcome"
_AGREED = (33, 34)  # all ranks end with these together


def run_as_trainer(main: Callable[[], int]) -> int:
    """The exit code for this process; without a launcher that of `main`.

    Under the launcher the code goes to the outcome file, which the first rank of this machine to
    end writes: what comes later follows from it. 33 and 34 end the process with 0, so that
    torchelastic does not stop the other ranks, which are about to end with the same.
    """
    if not (name := os.environ.get(FOLDER_VARIABLE)):
        return main()
    # once the watch has ended, a signal changes nothing; unlike SIG_IGN this loses none that wait
    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, frame: None)
    folder, code = Path(name), 1
    with _registered(folder):
        try:
            code = main()
        except SystemExit as leaving:  # argparse
            code = leaving.code if isinstance(leaving.code, int) else 1
        finally:
            _write_first(folder, code)
    return 0 if code in _AGREED else code


def answers_signals() -> None:
    """Let the signals come that the launcher blocked; called once handlers for them are in
    place.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def read_outcome(folder: Path) -> int | None:
    """The exit code that a trainer of this machine left; None when none ended in words."""
    try:
        return int(os.readlink(folder / _OUTCOME))
    except FileNotFoundError:
        return None


def trainers_started(folder: Path) -> bool:
    """Whether any trainer of this machine came so far as to say its name."""
    return any(folder.glob("trainer-*"))


def living_trainers(folder: Path) -> list[int]:
    """Process ids of this machine's trainers that have not ended."""
    return [int(path.read_text()) for path in sorted(folder.glob("trainer-*")) if _is_locked(path)]


@contextmanager
def _registered(folder: Path) -> Iterator[None]:
    """Name this process to the launcher; the lock lasts as long as the process, so a number that is
    used again misleads nobody.
    """
    local_rank = os.environ.get("LOCAL_RANK", "0")
    draft = folder / f"new-{local_rank}-{os.getpid()}"
    with draft.open("w") as file:
        file.write(str(os.getpid()))
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        draft.rename(folder / f"trainer-{local_rank}")
        yield


def _is_locked(path: Path) -> bool:
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def _write_first(folder: Path, code: int) -> None:
    """A link that leads nowhere: made whole or not at all, never over another's, and also where the
    disk has no room for data.
    """
    with suppress(FileExistsError):
        os.symlink(str(code), folder / _OUTCOME)
