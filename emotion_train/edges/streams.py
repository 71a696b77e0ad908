"""Standard output and standard error, whose reader may leave: a pipe that closes, a terminal that
hangs up, a disk that is full, a stream that was closed from the start.

What a program prints is not its result, so it continues without a reader and ends with its own exit
code; what it says then goes to a log file where it has one (`go_to`), else nowhere. The exception
is a verb whose printed text is all there is (`text_is_the_result`): it ends. The price: a stream
that failed once is not tried again.

A character that the stream's encoding lacks is spelled out (`\\u2248` for ≈), so that no locale
ends a program; data that another program will read is UTF-8 whatever the locale (`write_utf8`).
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

# names the log file to the processes that are started below
LOG_VARIABLE = "EMOTION_TRAIN_OUTPUT_LOG"
_NAMES = {1: "stdout", 2: "stderr"}
_TITLES = {1: "standard output", 2: "standard error"}
# what cannot be encoded fails with neither of these and with every other handler of Python
_NEVER_FAIL = ("backslashreplace", "replace", "ignore", "xmlcharrefreplace", "namereplace")


class _Stream(io.FileIO):
    """File 1 or 2 of this process, which takes whatever is written, here or elsewhere."""

    def __init__(self, number: int, program: str) -> None:
        super().__init__(number, "w", closefd=False)
        self.number = number
        self.program = program
        self.is_result = False
        self.lost = False

    def write(self, data: object, /) -> int:
        """All of `data` is taken. Raises `ReaderLeft` or `WrongRequest` where it is the result and
        nobody takes it.
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
            if written is None:  # somebody made it non-blocking
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
                f"{_TITLES[self.number].capitalize()} cannot be written ({error.strerror}): what was printed"
                " is not whole. Free some space, or let it go to another file."
            ) from None
        if log is not None and first:
            self._tell(f"{_TITLES[self.number]} cannot be written ({error.strerror})", log)

    def _tell(self, what: str, log: Path) -> None:
        """Once a run: at the head of the log file, and on the other stream if that has a reader."""
        line = f"{self.program}: {what}; the work continues, and what it says goes to {log}\n".encode()
        other = 3 - self.number
        with suppress(OSError):
            os.write(self.number, line)
        # what is not ready to take it would hold the work up
        with suppress(OSError, ValueError):
            if select.select([], [other], [], 0)[1]:
                os.write(other, line)


_log: Path | None = None
_streams: dict[int, _Stream] = {}


def hold(program: str, environment: Mapping[str, str] = os.environ) -> None:
    """From here on no write to standard output or standard error fails, and what was closed is
    open, so that no file of the work takes its number. Called first thing by each program.
    """
    global _log
    if name := environment.get(LOG_VARIABLE):
        _log = Path(name)
    closed = _open_what_is_closed()
    atexit.register(_nothing_is_the_result)  # Python writes what is left after that
    for number in _NAMES:
        stream = _replaced(number, program)
        if stream is not None and number in closed:
            stream.lost = True
            _to(number, _log)


def go_to(log: Path | None) -> None:
    """Name the log file of this process, unless the process above has named one. It comes into
    being when it is needed.
    """
    global _log
    if _log is None and log is not None:
        _log = log
        for stream in _streams.values():
            if stream.lost:
                _to(stream.number, log)


def text_is_the_result() -> None:
    """What this program prints on standard output is all that it does: where nobody reads it the
    program ends, with 0; where it cannot be written, with 2.
    """
    if 1 in _streams:
        _streams[1].is_result = True


def write_utf8() -> None:
    """Standard output is UTF-8 from here on, as data for another program has to be: JSON and CSV
    with characters spelled out would be other data.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")


def _nothing_is_the_result() -> None:
    for stream in _streams.values():
        stream.is_result = False


def _open_what_is_closed() -> set[int]:
    """The standard files that were closed; they lead nowhere now."""
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
    """Python's own stream, over a `_Stream`; None where another one stands in for it, as in a
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
    """A text stream with the settings of the old one, which is empty and never used again."""
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
    """Let this file of the process, and of those that it starts, lead to the log, or nowhere; False
    where that fails.
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
