"""Runs the commands of the steps as processes of their own, which end with this process."""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from emotion_train.command_line import LAUNCH, TRAIN, program
from emotion_train.processes.command import call
from emotion_train.processes.imports import past_current_folder
from emotion_train.processes.launcher_link import FOLDER_VARIABLE, alive


class Stopped(Exception):
    """A step's command ended with this exit code, which becomes the exit code of the whole
    command.
    """

    def __init__(self, code: int) -> None:
        self.code = code


class Commands:
    """Runs command lines, each shown before it runs, in `environment`."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment

    def call(self, words: Sequence[str], *, cwd: Path | None = None) -> None:
        """Print the command and run it to its end; raises `Stopped` where its exit code is not 0. A
        signal ends it by itself, as `call` says.
        """
        print(f"\n$ {shlex.join(words)}", flush=True)
        if code := call(_program(words), self.environment, cwd):
            raise Stopped(code)

    def answer(self, words: Sequence[str]) -> str:
        """The output of a command; raises `Stopped` as `call` does."""
        done = subprocess.run(
            _program(words), env=self.environment, stdout=subprocess.PIPE, text=True, check=False
        )
        if done.returncode:
            raise Stopped(done.returncode)
        return done.stdout


@contextmanager
def commands() -> Iterator[Commands]:
    """A `Commands` whose trainings on this machine end with this process, whatever ends it."""
    with tempfile.TemporaryDirectory(prefix="emotion-up-") as name, alive(Path(name)):
        yield Commands({**os.environ, **past_current_folder(dict(os.environ)), FOLDER_VARIABLE: name})


def _program(words: Sequence[str]) -> list[str]:
    """The argv of a command, with our own programs started by this interpreter."""
    return [*program(words[0]), *words[1:]] if words[0] in (TRAIN, LAUNCH) else [*words]
