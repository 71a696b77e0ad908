"""How a trainer and its launcher communicate past accelerate: which processes are trainers, how the
run ended, and when signals may come.

Between them run accelerate and torchelastic, which turn every exit code into 1, and answer SIGTERM
by killing the trainers 30 s later (adjustable in torch 2.13, fixed in older versions). So the
launcher starts everything with `STOP_SIGNALS` blocked, signals the trainers itself, and reads the
exit code from a file. The price: the processes between are deaf to these signals, and only SIGKILL
ends them.

Every process below a launcher ends with it, however it ends: the launcher holds a lock that the
kernel releases at its end, and a thread in each process waits for that lock. (Only accelerate would
hear a signal at the launcher's death: the trainers are its children's children.) Processes that a
trainer started end with the run too, in whatever session they are: on Linux the launcher adopts
every orphan below it, and finds the others by the variable that all of them inherit.
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
FENCED_S = 10.0  # for a fenced trainer to end in order and to release its GPU
SAVE_S = 300.0  # for a save after a signal, before the hold begins
_OUTCOME = "outcome"
_PUBLISHED = "published"  # stands for 0, which no exit code writes
_LAUNCHER = "launcher"
_SET_CHILD_SUBREAPER = 36  # of prctl
_KILL_S = 5.0  # for killed processes to go; a process in a system call may stay longer
_AGREED = (33, 34)  # all ranks end with one of these together


def run_as_trainer(main: Callable[[], int]) -> int:
    """The exit code for this process; without a launcher, the code of `main`.

    Under the launcher the code goes to the outcome file, which this machine's first rank to end
    writes: later ends follow from it. A 0 is not trusted: only `report_published` says that a run
    is published, and a process that ends without it has failed. 33 and 34 end the process with 0,
    so that torchelastic does not stop the other ranks, which are about to end with the same code.
    """
    if not (name := os.environ.get(FOLDER_VARIABLE)):
        return main()
    end_with_launcher(_leave)
    # a signal after the watch changes nothing; unlike SIG_IGN, this loses no pending signal
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
    """End this process with that code after `seconds`, however stuck it is; tell the launcher now.

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
    """The launcher's side of `end_with_launcher`: processes below end once this block is left, in
    order or by the death of this process.
    """
    with (folder / _LAUNCHER).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def end_with_launcher(end: Callable[[Path], None]) -> None:
    """Call `end` with the launcher's folder, in a thread, once the launcher is gone. Does nothing
    in a process that no launcher started.
    """
    if name := os.environ.get(FOLDER_VARIABLE):
        folder = Path(name)
        threading.Thread(
            target=lambda: end(_when_launcher_is_gone(folder)), name="launcher", daemon=True
        ).start()


def _when_launcher_is_gone(folder: Path) -> Path:
    """The folder, once its lock is free; the launcher removes the folder when it ends in order."""
    with suppress(FileNotFoundError), (folder / _LAUNCHER).open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
    return folder


def _leave(folder: Path) -> None:
    """End this trainer at once and release its GPU: committed states stay, and the next start may
    already be waiting.
    """
    message = b"emotion-train: the launcher is gone, and its trainers end with it; start the run again\n"
    # a reader that does not read would block this
    with suppress(OSError, ValueError):
        if os.environ.get("LOCAL_RANK", "0") == "0" and select.select([], [2], [], 0)[1]:
            os.write(2, message)
    kill_below(frozenset())
    os._exit(1)


def answers_signals() -> None:
    """Unblock the signals that the launcher blocked; called once their handlers are in place."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def read_outcome(folder: Path) -> int | None:
    """The exit code of the run that a trainer of this machine left, 0 only if it published; None if
    none left a code.
    """
    try:
        outcome = os.readlink(folder / _OUTCOME)
    except FileNotFoundError:
        return None
    return 0 if outcome == _PUBLISHED else int(outcome) or 1


def trainers_started(folder: Path) -> bool:
    """Whether any trainer of this machine has registered itself."""
    return any(folder.glob("trainer-*"))


def kill_trainers(folder: Path) -> None:
    """Kill this machine's trainers with the processes they started; torchelastic gives each trainer
    a session of its own.
    """
    for process_id in living_trainers(folder):
        with suppress(ProcessLookupError):
            os.killpg(os.getpgid(process_id), signal.SIGKILL)


def living_trainers(folder: Path) -> list[int]:
    """Process ids of this machine's trainers that have not ended."""
    return [int(path.read_text()) for path in sorted(folder.glob("trainer-*")) if _is_locked(path)]


@contextmanager
def adopting() -> Iterator[None]:
    """In this block, orphans below this process become its children instead of the system's (on
    Linux; elsewhere nothing changes).
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
    """Kill what is left of this folder's run, except this process and those `spared`: processes
    with its variable, and descendants of this process. Does nothing without /proc.
    """
    _kill_until_gone(lambda: (_marked(folder) | below(os.getpid())) - spared - {os.getpid()})


def kill_below(spared: frozenset[int]) -> None:
    """Kill all descendants of this process but those `spared`; does nothing without /proc."""
    _kill_until_gone(lambda: below(os.getpid()) - spared)


def _kill_until_gone(left: Callable[[], frozenset[int]]) -> None:
    deadline = time.monotonic() + _KILL_S
    while (living := left()) and time.monotonic() < deadline:  # one may have started another meanwhile
        for process_id in living:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(process_id, signal.SIGKILL)
        time.sleep(0.02)


def below(process_id: int) -> frozenset[int]:
    """The living children of a process, their children, and so on."""
    children: dict[int, list[int]] = {}
    living = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError):
            # the name is in brackets and may hold spaces and brackets itself
            state, parent = path.read_bytes().rpartition(b")")[2].split()[:2]
            children.setdefault(int(parent), []).append(int(path.parent.name))
            if state not in (b"Z", b"X"):
                living.add(int(path.parent.name))
    descendants: set[int] = set()
    pending = [process_id]
    while pending:
        new = [child for child in children.get(pending.pop(), []) if child not in descendants]
        descendants.update(new)
        pending += new
    return frozenset(descendants & living)


def _marked(folder: Path) -> frozenset[int]:
    """The processes that were started with this folder in `FOLDER_VARIABLE`."""
    mark = f"{FOLDER_VARIABLE}={folder}".encode()
    marked = set()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # another user's, or just ended
            if mark in path.read_bytes().split(b"\0"):
                marked.add(int(path.parent.name))
    return frozenset(marked)


@contextmanager
def _registered(folder: Path) -> Iterator[None]:
    """Register this process with the launcher. The lock lasts as long as the process, so a later
    process with the same number is not mistaken for it.
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
    """Write the outcome, unless another rank did, as the target of a symbolic link: it is made
    whole or not at all, even on a full disk.
    """
    with suppress(FileExistsError):
        os.symlink(outcome, folder / _OUTCOME)
