"""Standard output and standard error that may lose their reader: a pipe that closes, a terminal
that hangs up, a full disk, a stream that was closed from the start.

A program's printed text is not its result, so it continues without a reader and ends with its own
exit code. Its text then goes to a log file if it has one (`go_to`), else nowhere. The exception is
a verb whose only result is its text (`text_is_the_result`): it ends. The price: a stream that
failed once is not tried again.

A character that the stream's encoding lacks is spelled out (`\\u2248` for ≈), so that no locale
ends a program. Data for another program is UTF-8 whatever the locale (`write_utf8`).
"""

from __future__ import annotations

import atexit
import io
import os
import select
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TextIO, cast

from emotion_train.errors import ReaderLeft, WrongRequest

# names the log file to processes that this one starts
LOG_VARIABLE = "EMOTION_TRAIN_OUTPUT_LOG"
_NAMES = {1: "stdout", 2: "stderr"}
_TITLES = {1: "standard output", 2: "standard error"}
# Python's error handlers that accept any character; all others may fail
_NEVER_FAIL = ("backslashreplace", "replace", "ignore", "xmlcharrefreplace", "namereplace")


class _Stream(io.FileIO):
    """File 1 or 2 of this process; a write always succeeds, if need be to another file."""

    def __init__(self, number: int, program: str) -> None:
        super().__init__(number, "w", closefd=False)
        self.number = number
        self.program = program
        self.is_result = False
        self.lost = False

    def write(self, data: object, /) -> int:
        """Write all of `data`. Raises `ReaderLeft` or `WrongRequest` where the text is the result
        and cannot be written.
        """
        view = memoryview(cast(bytes, data)).cast("B")
        done = 0
        while done < len(view):
            try:
                written = super().write(view[done:])
            except OSError as error:
                if not self.lost:
                    self._lose(error)
                elif not _to(self.number, None):  # the log file fails too
                    return len(view)
                continue
            if written is None:  # another process made it non-blocking
                select.select([], [self.number], [], 1.0)
            else:
                done += written
        return done

    def _lose(self, error: OSError) -> None:
        log = None if self.is_result else _log
        self.lost = True
        first = log is not None and not log.exists()
        if not _to(self.number, log):
            log = None
            _to(self.number, None)
        if self.is_result:
            if isinstance(error, BrokenPipeError):
                raise ReaderLeft from None
            raise WrongRequest(
                f"{_TITLES[self.number].capitalize()} cannot be written ({error.strerror}): the printed text"
                " is not whole. Free some space, or write it to another file."
            ) from None
        if log is not None and first:
            self._tell(f"{_TITLES[self.number]} cannot be written ({error.strerror})", log)

    def _tell(self, what: str, log: Path) -> None:
        """Say so once per run: at the head of the log file, and on the other stream if that has a
        reader.
        """
        line = f"{self.program}: {what}; the work continues, and its messages go to {log}\n".encode()
        other = 3 - self.number
        with suppress(OSError):
            os.write(self.number, line)
        # a stream that is not ready would block the work
        with suppress(OSError, ValueError):
            if select.select([], [other], [], 0)[1]:
                os.write(other, line)


_log: Path | None = None
_streams: dict[int, _Stream] = {}


def hold(program: str, environment: Mapping[str, str] = os.environ) -> None:
    """Make every later write to standard output and standard error succeed, and open standard files
    that were closed, so that no other file takes their numbers. Each program calls it first.
    """
    global _log
    if name := environment.get(LOG_VARIABLE):
        _log = Path(name)
    closed = _open_what_is_closed()
    atexit.register(_nothing_is_the_result)  # Python writes the remaining text after that
    for number in _NAMES:
        stream = _replaced(number, program)
        if stream is not None and number in closed:
            stream.lost = True
            _to(number, _log)


def go_to(log: Path | None) -> None:
    """Name the log file of this process, unless its parent process has named one. The file is
    created when it is needed.
    """
    global _log
    if _log is None and log is not None:
        _log = log
        for stream in _streams.values():
            if stream.lost:
                _to(stream.number, log)


def text_is_the_result() -> None:
    """Make standard output this program's only result: if its reader leaves, the program ends with
    0; if it cannot be written, with 2.
    """
    if 1 in _streams:
        _streams[1].is_result = True


def write_utf8() -> None:
    """Make standard output UTF-8, as data for another program has to be: JSON and CSV with spelled
    out characters would be other data.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")


def _nothing_is_the_result() -> None:
    for stream in _streams.values():
        stream.is_result = False


def _open_what_is_closed() -> set[int]:
    """Open the standard files that were closed, to nowhere; returns their numbers."""
    closed = set()
    for number in (0, 1, 2):  # upwards: a new file takes the lowest number that is free
        try:
            os.fstat(number)
        except OSError:
            closed.add(number)
            opened = os.open(os.devnull, os.O_RDWR)
            assert opened == number
            os.set_inheritable(number, True)
    if 0 in closed and sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), "utf-8")
    return closed


def _replaced(number: int, program: str) -> _Stream | None:
    """Put a `_Stream` below Python's own stream; None where another object replaces that, as in a
    test.
    """
    name = _NAMES[number]
    old = cast("io.TextIOWrapper | None", getattr(sys, name))
    if number in _streams or old is not getattr(sys, f"__{name}__"):
        return _streams.get(number)
    if old is not None and not isinstance(old, io.TextIOWrapper):
        return None
    stream = _Stream(number, program)
    new = _over(stream, old)
    _streams[number] = stream
    for attribute in (name, f"__{name}__"):
        setattr(sys, attribute, new)
    return stream


def _over(stream: _Stream, old: io.TextIOWrapper | None) -> TextIO:
    """A text stream with the settings of the old one, which is flushed and never used again."""
    if old is None:
        return io.TextIOWrapper(io.BufferedWriter(stream), "utf-8", _NEVER_FAIL[0], line_buffering=True)
    with suppress(OSError):
        old.flush()
    below = stream if old.write_through else io.BufferedWriter(stream)
    return io.TextIOWrapper(
        cast("io.BufferedWriter", below),
        old.encoding,
        old.errors if old.errors in _NEVER_FAIL else _NEVER_FAIL[0],
        line_buffering=old.line_buffering,
        write_through=old.write_through,
    )


def _to(number: int, log: Path | None) -> bool:
    """Redirect this file of the process, and of processes it starts, to the log, or to nowhere;
    False where that fails.
    """
    try:
        if log is None:
            opened = os.open(os.devnull, os.O_WRONLY)
        else:
            log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
            opened = os.open(log, flags, 0o600)
    except OSError:
        return False
    os.dup2(opened, number)
    os.close(opened)
    return True
