"""How a trainer and the launcher above it talk past accelerate: who the trainers are, what the run
came to, and when a signal may come.

Between them stand accelerate and torchelastic, which make 1 of every exit code, and which answer
SIGTERM by killing the trainers 30 s later (torch 2.13 can be told another number, older ones
cannot). So the launcher starts everything with `STOP_SIGNALS` blocked, signals the trainers itself,
and reads the exit code from a file. The price: what stands between is deaf to these signals and
ends by SIGKILL only.

Every process below a launcher ends with it, whatever ends it: the launcher holds a lock that the
kernel lets go with its holder, and a thread in each process waits for that lock. (A signal at the
death of a parent is heard by accelerate alone: the trainers are its children's children.) What a
trainer has started ends with the run, too, in whatever session it is: on Linux the launcher is
handed every orphan below it, and knows the others by the variable that all of them inherit.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# names the folder that the launcher made for one run on this machine
FOLDER_VARIABLE = "EMOTION_TRAIN_OUTCOME"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
FENCED_S = 10.0  # so long a fenced trainer may take to end in order and to let its GPU go
SAVE_S = 300.0  # how long a save may take after a signal, before the hold begins
_OUTCOME = "outcome"
_PUBLISHED = "published"  # stands for 0, which no exit code writes
_LAUNCHER = "launcher"
_SET_CHILD_SUBREAPER = 36  # of prctl
_KILL_S = 5.0  # so long a killed process is looked for; one in a system call may stay longer
_AGREED = (33, 34)  # all ranks end with these together


def run_as_trainer(main: Callable[[], int]) -> int:
    """The exit code for this process; without a launcher that of `main`.

    Under the launcher the code goes to the outcome file, which the first rank of this machine to
    end writes: what comes later follows from it. A 0 is not believed: that a run is published says
    `report_published` alone, and a process that ends without it has failed. 33 and 34 end the
    process with 0, so that torchelastic does not stop the other ranks, which are about to end with
    the same.
    """
    if not (name := os.environ.get(FOLDER_VARIABLE)):
        return main()
    end_with_launcher(_leave)
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
            _write_first(folder, str(code or 1))
    return 0 if code in _AGREED else code


def report_published() -> None:
    """Tell the launcher, if there is one, that the log has the run's final entry."""
    if name := os.environ.get(FOLDER_VARIABLE):
        _write_first(Path(name), _PUBLISHED)


def end_within(seconds: float, code: int) -> None:
    """End this process with that code in a while, however stuck it is; the launcher is told now.

    33 and 34 end the process as in `run_as_trainer`.
    """
    if name := os.environ.get(FOLDER_VARIABLE):
        _write_first(Path(name), str(code))
        code = 0 if code in _AGREED else code
    timer = threading.Timer(seconds, os._exit, [code])
    timer.daemon = True
    timer.start()


@contextmanager
def alive(folder: Path) -> Iterator[None]:
    """The launcher's side of `end_with_launcher`: what is below ends once this is left, in order or
    by the death of this process.
    """
    with (folder / _LAUNCHER).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def end_with_launcher(end: Callable[[Path], None]) -> None:
    """Call `end` with the launcher's folder, in a thread, once the launcher is gone. A process that
    no launcher started is left alone.
    """
    if name := os.environ.get(FOLDER_VARIABLE):
        folder = Path(name)
        threading.Thread(
            target=lambda: end(_when_launcher_is_gone(folder)), name="launcher", daemon=True
        ).start()


def _when_launcher_is_gone(folder: Path) -> Path:
    """The folder, once nobody holds its lock; the launcher removes it when it ends in order."""
    with suppress(FileNotFoundError), (folder / _LAUNCHER).open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
    return folder


def _leave(folder: Path) -> None:
    """End this trainer at once, and its hold on the GPU: what was committed stays, and the next
    start may be here already.
    """
    words = b"emotion-train: the launcher is gone, and its trainers end with it; start the run again\n"
    # a reader that does not read would hold this up
    with suppress(OSError, ValueError):
        if os.environ.get("LOCAL_RANK", "0") == "0" and select.select([], [2], [], 0)[1]:
            os.write(2, words)
    kill_below(frozenset())
    os._exit(1)


def answers_signals() -> None:
    """Let the signals come that the launcher blocked; called once handlers for them are in
    place.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def read_outcome(folder: Path) -> int | None:
    """The exit code of the run as a trainer of this machine left it, 0 only where one published;
    None when none ended in words.
    """
    try:
        left = os.readlink(folder / _OUTCOME)
    except FileNotFoundError:
        return None
    return 0 if left == _PUBLISHED else int(left) or 1


def trainers_started(folder: Path) -> bool:
    """Whether any trainer of this machine came so far as to say its name."""
    return any(folder.glob("trainer-*"))


def kill_trainers(folder: Path) -> None:
    """Kill this machine's trainers, each with what it started; torchelastic gives each a session of
    its own.
    """
    for process_id in living_trainers(folder):
        with suppress(ProcessLookupError):
            os.killpg(os.getpgid(process_id), signal.SIGKILL)


def living_trainers(folder: Path) -> list[int]:
    """Process ids of this machine's trainers that have not ended."""
    return [int(path.read_text()) for path in sorted(folder.glob("trainer-*")) if _is_locked(path)]


@contextmanager
def adopting() -> Iterator[None]:
    """Every orphan below this process becomes its child meanwhile, instead of the system's (Linux;
    elsewhere nothing changes).
    """
    _adopt(True)
    try:
        yield
    finally:
        _adopt(False)


def _adopt(orphans: bool) -> None:
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # a libc without it
            ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, int(orphans), 0, 0, 0)


def kill_all_of(folder: Path, spared: frozenset[int]) -> None:
    """Kill whatever is left of the run of this folder but this process: what has its variable, and
    what descends from this process and is not `spared`. Where there is no /proc, nothing.
    """
    _kill_until_gone(lambda: (_marked(folder) | below(os.getpid())) - spared - {os.getpid()})


def kill_below(spared: frozenset[int]) -> None:
    """Kill what this process has started, with all below it; where there is no /proc, nothing."""
    _kill_until_gone(lambda: below(os.getpid()) - spared)


def _kill_until_gone(left: Callable[[], frozenset[int]]) -> None:
    deadline = time.monotonic() + _KILL_S
    while (found := left()) and time.monotonic() < deadline:  # a killed one may just have started another
        for process_id in found:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(process_id, signal.SIGKILL)
        time.sleep(0.02)


def below(process_id: int) -> frozenset[int]:
    """The living children of a process, their children, and so on."""
    children: dict[int, list[int]] = {}
    living = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError):
            # the name stands in brackets and may hold spaces and brackets
            state, parent = path.read_bytes().rpartition(b")")[2].split()[:2]
            children.setdefault(int(parent), []).append(int(path.parent.name))
            if state not in (b"Z", b"X"):
                living.add(int(path.parent.name))
    found: set[int] = set()
    pending = [process_id]
    while pending:
        new = [child for child in children.get(pending.pop(), []) if child not in found]
        found.update(new)
        pending += new
    return frozenset(found & living)


def _marked(folder: Path) -> frozenset[int]:
    """The processes that were started with this folder in `FOLDER_VARIABLE`."""
    mark = f"{FOLDER_VARIABLE}={folder}".encode()
    found = set()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # somebody else's, or it has just ended
            if mark in path.read_bytes().split(b"\0"):
                found.add(int(path.parent.name))
    return frozenset(found)


@contextmanager
def _registered(folder: Path) -> Iterator[None]:
    """Name this process to the launcher; the lock lasts as long as the process, so a number that is
    used again misleads nobody.
    """
    local_rank = os.environ.get("LOCAL_RANK", "0")
    draft = folder / f"new-{local_rank}-{os.getpid()}"
    if not folder.exists():
        _leave(folder)
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


def _write_first(folder: Path, outcome: str) -> None:
    """A link that leads nowhere: made whole or not at all, never over another's, and also where the
    disk has no room for data.
    """
    with suppress(FileExistsError):
        os.symlink(outcome, folder / _OUTCOME)
