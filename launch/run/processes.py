"""Runs accelerate and its trainers to their end; a scheduler sees only this process.

A signal is passed to each trainer once, and to no process in between. Processes that overstay are
killed: after SIGTERM the trainers have `SAVE_S` seconds to save and `hold_s` to hold, and a fenced
trainer has `FENCED_S` to release its GPU. All trainers, and the processes they started, end with
this process, whatever ends it. The price is a look every 0.1 s.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from emotion_train.errors import Fenced, NotStarted, StorageError, WrongRequest
from emotion_train.processes.launcher_link import (
    FENCED_S,
    FOLDER_VARIABLE,
    SAVE_S,
    STOP_SIGNALS,
    adopting,
    alive,
    below,
    kill_all_of,
    kill_trainers,
    living_trainers,
    read_outcome,
    trainers_started,
)
from emotion_train.storage.patience import StoreRequest

_LOOK_EVERY_S = 0.1
_LATER_S = 2.0  # more than the trainers' own bound
_ONE_PRESS_S = 0.5  # SIGINT twice within this is one: a terminal or a supervisor may send it to a whole group
_NO_WORD = (
    "the trainer ended without a message (killed, or out of memory); the same command with the same run.id"
    " resumes from the last checkpoint"
)
_KILLED_EARLY = (
    "{by} ended the start before its trainer began (killed, or out of memory); the same command starts it"
    " again"
)
_NO_START = (
    "no trainer started on this machine; the message above says why. Each of several nodes waits"
    " distributed.timeout_s seconds for the others"
)


@dataclass
class _Signals:
    """The signals that have come so far; filled by the signal handlers."""

    first_at: float | None = None  # time.monotonic()
    # at most SIGTERM and SIGINT, in the order they came
    pass_on: list[signal.Signals] = field(default_factory=list)
    interrupted_at: float | None = None
    leave: bool = False  # a second SIGINT

    def came(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        self.first_at = now if self.first_at is None else self.first_at
        if number == signal.SIGINT:
            self.leave = self.leave or (
                self.interrupted_at is not None and now - self.interrupted_at > _ONE_PRESS_S
            )
            self.interrupted_at = now if self.interrupted_at is None else self.interrupted_at
        sent = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
        if sent not in self.pass_on:
            self.pass_on.append(sent)


def run_to_end(
    line: Sequence[str], environment: Mapping[str, str], hold_s: float, save_s: float = SAVE_S
) -> int:
    """Run the command and return the trainers' own exit code; no process of it is left when this
    returns.

    The code is 33 only where a trainer reported 33, because it promises that the newest state is
    saved. The command's own code counts where it is 2 and no trainer has started: accelerate
    refused its config file. When a signal came and the trainers failed, or were killed before they
    reported a code, the code is 1, and comes no sooner than `hold_s` seconds after the signal. A
    preempted machine is gone by then, and the scheduler starts the run again whatever the code;
    where the machine still exists, a person should look. Call this function in the main thread.
    """
    with tempfile.TemporaryDirectory(prefix="emotion-launch-") as name, _listening() as signals:
        folder = Path(name)
        before = below(os.getpid())
        with alive(folder), adopting():
            process = _start(line, {**environment, FOLDER_VARIABLE: name})
            try:
                _follow(process, folder, signals, hold_s + save_s)
            finally:
                _kill(process, folder, before)
        if signals.leave:
            say(
                "interrupted twice, all processes were killed; the same command with the same run.id resumes"
                " from the last checkpoint"
            )
            return 1
        code = read_outcome(folder)
        if code is None and process.returncode == WrongRequest.exit_code and not trainers_started(folder):
            return WrongRequest.exit_code
        if code is None:
            say(_NO_WORD if trainers_started(folder) else _why_none_started(process.returncode))
        if code in (None, 1):
            _hold(signals, hold_s)
            return 1
        return int(code)


def wait_for_answer(request: StoreRequest[object], hold_s: float) -> None:
    """Return when the store has answered or refused the request; the trainer reports a refusal
    itself.

    Raises `NotStarted` when the store has not answered in time, and when a signal comes during the
    wait: after SIGTERM no sooner than `hold_s` seconds later, after SIGINT at once. Call this
    function in the main thread.
    """
    with _listening() as signals:
        while not request.wait(_LOOK_EVERY_S):
            if signals.first_at is not None:
                _hold(signals, hold_s)
                raise NotStarted(f"{request.unanswered()} The same command starts it again.")
            if (words := request.news()) is not None:
                say(words)
    with suppress(WrongRequest, StorageError, OSError):
        request.result()


@contextmanager
def _listening() -> Iterator[_Signals]:
    """Collect `STOP_SIGNALS` instead of ending by them; a SIGHUP that nohup ignores stays
    ignored.
    """
    signals = _Signals()
    wanted = [
        number
        for number in STOP_SIGNALS
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
    ]
    before = {number: signal.signal(number, signals.came) for number in wanted}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _why_none_started(code: int) -> str:
    """What to say where no trainer registered itself, by the command's own exit code."""
    return _NO_START if code >= 0 else _KILLED_EARLY.format(by=signal.Signals(-code).name)


def _start(line: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start the command in a session of its own, with the signals blocked until `answers_signals`
    in the trainer.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        return subprocess.Popen(line, env=environment, start_new_session=True)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _follow(process: subprocess.Popen[bytes], folder: Path, signals: _Signals, bound_s: float) -> None:
    """Pass signals on until the command has ended, overstays, or is to be left at once."""
    told: set[tuple[int, signal.Signals]] = set()
    fenced_at: float | None = None
    while not signals.leave:
        for number in signals.pass_on:  # trainers that start after the signal get it too
            for trainer in living_trainers(folder):
                if (trainer, number) not in told:
                    told.add((trainer, number))
                    _send(trainer, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_LOOK_EVERY_S)
            return
        if signals.first_at is not None and time.monotonic() - signals.first_at > bound_s:
            say(f"still running {bound_s:.0f} s after the signal: killed")
            return
        if fenced_at is None and read_outcome(folder) == Fenced.exit_code:
            fenced_at = time.monotonic()
        if fenced_at is not None and time.monotonic() - fenced_at > FENCED_S + _LATER_S:
            say(f"still running {FENCED_S + _LATER_S:.0f} s after the run was taken over: killed")
            return


def _kill(process: subprocess.Popen[bytes], folder: Path, spared: frozenset[int]) -> None:
    """Kill all remaining processes except those that existed before. Torchelastic gives each
    trainer a session of its own, and a trainer may do the same for its children, so the command's
    group alone is not enough.
    """
    kill_trainers(folder)
    with suppress(ProcessLookupError):
        os.killpg(os.getpgid(process.pid), signal.SIGKILL)
    kill_all_of(folder, spared)
    process.wait()


def _send(process_id: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(process_id, number)


def _hold(signals: _Signals, hold_s: float) -> None:
    """After a SIGTERM, wait until `hold_s` seconds after the first signal, or until SIGINT."""
    if (
        signal.SIGTERM not in signals.pass_on
        or signals.first_at is None
        or signals.interrupted_at is not None
    ):
        return
    left_s = signals.first_at + hold_s - time.monotonic()
    if left_s > 0:
        say(f"preemption notice: waiting for the machine to end, {left_s:.0f} s at most")
    while time.monotonic() < signals.first_at + hold_s and signals.interrupted_at is None:
        time.sleep(_LOOK_EVERY_S)


def say(words: str) -> None:
    """Print a line of the launcher, beside what its processes print."""
    print(f"emotion-launch: {words}", file=sys.stderr, flush=True)
