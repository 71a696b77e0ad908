"""Runs a command as a process of its own, which ends by itself before this one goes on."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path


def call(words: Sequence[str], environment: Mapping[str, str], cwd: Path | None = None) -> int:
    """The exit code of the command, 128 and its number where a signal ended it.

    A SIGTERM is passed on and a terminal sends an interrupt to both, so the command saves what it
    has, while this process waits with all that the command needs. Call this in the main thread.
    """
    process = subprocess.Popen(words, env=environment, cwd=cwd)
    with _passed_on(process):
        while True:
            try:
                code = process.wait()
            except KeyboardInterrupt:
                continue
            return code if code >= 0 else 128 - code


@contextmanager
def _passed_on(process: subprocess.Popen[bytes]) -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, lambda number, frame: process.send_signal(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
