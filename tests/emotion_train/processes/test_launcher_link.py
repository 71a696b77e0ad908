"""What a trainer leaves for the launcher, whoever ends first and however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from emotion_train.processes.launcher_link import (
    FOLDER_VARIABLE,
    STOP_SIGNALS,
    alive,
    answers_signals,
    living_trainers,
    read_outcome,
)
from tests.helpers.patience import PATIENCE_S

HEAD = """import os, signal, sys, time
from emotion_train.processes.launcher_link import (
    answers_signals, end_within, report_published, run_as_trainer
)
"""


@pytest.fixture(autouse=True)
def _launcher_lives(tmp_path: Path) -> Iterator[None]:
    with alive(tmp_path):
        yield


@contextmanager
def trainer(folder: Path | None, main: str, local_rank: int = 0) -> Iterator[subprocess.Popen[str]]:
    """A process that runs the lines of `main` as a trainer does, with the signals blocked as the
    launcher blocks them.
    """
    body = "".join(f"    {line}\n" for line in main.splitlines())
    code = f"{HEAD}def main():\n{body}sys.exit(run_as_trainer(main))\n"
    environment = {**os.environ, "LOCAL_RANK": str(local_rank)}
    if folder is not None:
        environment[FOLDER_VARIABLE] = str(folder)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    with process:
        try:
            yield process
        finally:
            process.kill()


def ended(folder: Path | None, main: str, local_rank: int = 0) -> int:
    with trainer(folder, main, local_rank) as process:
        process.communicate(timeout=PATIENCE_S)
    return process.returncode


@pytest.mark.parametrize(
    ("main", "outcome", "exit_code"),
    [
        ("report_published()\nreturn 0", 0, 0),
        ("report_published()\nraise RuntimeError('x')", 0, 1),  # what comes after changes nothing
        ("return 0", 1, 0),  # whatever ended it, nothing was published
        ("sys.exit(0)", 1, 0),
        ("end_within(0.1, 34)\ntime.sleep(600)", 34, 0),
        ("end_within(0.1, 1)\ntime.sleep(600)", 1, 1),
        ("return 1", 1, 1),
        ("return 2", 2, 2),
        ("return 33", 33, 0),  # torchelastic would stop the other ranks for another code than 0
        ("return 34", 34, 0),
        ("raise RuntimeError('x')", 1, 1),
        ("sys.exit(2)", 2, 2),
        ("sys.exit('words')", 1, 1),
        ("os.kill(os.getpid(), signal.SIGKILL)", None, -9),
    ],
)
def test_the_outcome_is_what_main_came_to(
    tmp_path: Path, main: str, outcome: int | None, exit_code: int
) -> None:
    assert ended(tmp_path, main) == exit_code
    assert read_outcome(tmp_path) == outcome
    assert [
        path.name for path in tmp_path.iterdir() if path.name not in ("outcome", "trainer-0", "launcher")
    ] == []


def test_a_full_disk_does_not_silence_the_outcome(tmp_path: Path) -> None:
    no_room = (
        "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # no file takes another"
        " byte\nreturn 33"
    )
    assert ended(tmp_path, no_room) == 0
    assert read_outcome(tmp_path) == 33


def test_without_a_launcher_the_exit_code_is_the_process_s_own() -> None:
    assert ended(None, "return 33") == 33


def test_the_first_rank_that_ends_says_what_it_came_to(tmp_path: Path) -> None:
    assert ended(tmp_path, "return 2", local_rank=1) == 2
    assert ended(tmp_path, "return 1", local_rank=0) == 1  # because its peer had gone
    assert read_outcome(tmp_path) == 2


def test_a_trainer_is_known_from_its_start_to_its_end_however_that_comes(tmp_path: Path) -> None:
    say = "print('started', flush=True)\ntime.sleep(600)\nreturn 0"
    with trainer(tmp_path, say, 0) as first, trainer(tmp_path, say, 1) as second:
        for process in (first, second):
            assert process.stdout is not None
            assert process.stdout.readline() == "started\n"
        assert living_trainers(tmp_path) == [first.pid, second.pid]
        first.kill()
        first.wait(PATIENCE_S)
        assert living_trainers(tmp_path) == [second.pid]


def test_a_signal_waits_until_the_trainer_answers_and_changes_nothing_after_the_watch(tmp_path: Path) -> None:
    main = """
print('started', flush=True)
time.sleep(0.5)
print('deaf', flush=True)
came = []
before = signal.signal(signal.SIGTERM, lambda *given: came.append(given[0]))
answers_signals()
print('came', *came, flush=True)
signal.signal(signal.SIGTERM, before)
os.kill(os.getpid(), signal.SIGTERM)
os.kill(os.getpid(), signal.SIGINT)
return 33
"""
    with trainer(tmp_path, main.strip()) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        process.terminate()
        out, err = process.communicate(timeout=PATIENCE_S)
    assert out == "deaf\ncame 15\n", err
    assert (process.returncode, read_outcome(tmp_path)) == (0, 33)


def test_letting_signals_come_that_were_never_blocked_changes_nothing() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    answers_signals()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_no_word_is_no_outcome(tmp_path: Path) -> None:
    assert read_outcome(tmp_path) is None
    assert living_trainers(tmp_path) == []
    assert ended(tmp_path, "time.sleep(0)\nreturn 0") == 0
    assert living_trainers(tmp_path) == []


LAUNCHER = """
import sys, time
from pathlib import Path
from emotion_train.processes.launcher_link import alive
with alive(Path({folder!r})):
    print('alive', flush=True)
    sys.stdin.read()
print('left', flush=True)
time.sleep(600)
"""


@contextmanager
def launcher(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the launcher's lock until its input ends or it is killed."""
    folder.mkdir()
    line = [sys.executable, "-c", LAUNCHER.format(folder=str(folder))]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "alive\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("end", ["killed", "left"])
def test_a_trainer_ends_with_its_launcher_in_the_midst_of_anything(tmp_path: Path, end: str) -> None:
    # deaf to signals, in a session of its own, in a call that does not return
    main = (
        "os.setsid()\nsignal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())\n"
        "print('started', flush=True)\ntime.sleep(600)\nreturn 0"
    )
    with launcher(tmp_path / "run") as above, trainer(tmp_path / "run", main) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        assert process.poll() is None
        if end == "killed":
            above.kill()
        else:
            assert above.stdin is not None
            above.stdin.close()
        assert process.wait(PATIENCE_S) == 1
        assert process.stderr is not None
        assert "the launcher is gone" in process.stderr.read()
    assert read_outcome(tmp_path / "run") is None


@pytest.mark.parametrize("folder_is_left", [True, False])
def test_a_trainer_that_starts_after_the_launcher_s_end_does_nothing(
    tmp_path: Path, folder_is_left: bool
) -> None:
    folder = tmp_path / "run"
    if folder_is_left:
        folder.mkdir()
        (folder / "launcher").touch()
    assert ended(folder, "time.sleep(600)\nreturn 0") == 1


def test_a_trainer_without_a_launcher_is_left_alone(tmp_path: Path) -> None:
    # nothing watches, nor has time to end it
    main = "import threading\nassert threading.active_count() == 1\ntime.sleep(1)\nreturn 0"
    assert ended(None, main) == 0


def test_a_reader_that_does_not_read_holds_no_end_up(tmp_path: Path) -> None:
    main = (
        "os.set_blocking(2, False)\n"
        "try:\n    while True: os.write(2, b'x' * 4096)\nexcept BlockingIOError: os.set_blocking(2, True)\n"
        "print('full', flush=True)\ntime.sleep(600)"
    )
    with launcher(tmp_path / "run") as above, trainer(tmp_path / "run", main) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "full\n"
        above.kill()
        assert process.wait(PATIENCE_S) == 1
