"""The error family: each error carries the exit code of the process that it ends, and `exit_code`
turns an error into the program's end.

    EmotionTrainError        1   an end that is explained in one sentence
      WrongRequest           2   type something else
      StorageError           2   a store refused; 1 where it did not answer (`transient`)
        ObjectNotFound
        AlreadyExists
        ObjectChanged
        Damaged
      NotStarted             1   the store did not answer for `run.start_timeout_s`
      Diverged               1   the loss is no number
      LostContact            1   another process of the run is gone
      NotPublished           1   trained, and the store did not take it
      NotInReach             1   a run or data set to compare with (`emotion_train.runs.origin`)
      NoAnswer               1   a classifier's server is silent (`emotion_train.exporting.served`)
      HostedStopped          1   an endpoint or a cap on dollars ends the asking; answers are kept
        Stopped              1   the endpoint's part of it (`emotion_train.hosted.client`)
      Published              1   told to a claim, which answers it (`emotion_train.runs.log`)
      Preempted             33   saved; start it again
      Fenced                34   another writer owns the run

None of them is 0, which only a finished action returns. Every error outside this family is a defect
and ends with exit code 1 and one sentence that says where to report it. Exceptions are a full disk,
a path that is too long, a current folder that is gone, Ctrl-C, and a reader that leaves a program
which only prints text.
`--traceback` shows the traceback of a defect; without it a temporary file keeps the traceback.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

# a full disk, an exhausted quota, a file at the limit of `ulimit -f`
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# makes child processes show tracebacks too
TRACEBACK_VARIABLE = "EMOTION_TRAIN_TRACEBACK"
_OPTION = "--traceback"
_TRACKER = "the project's issue tracker"
_OWN = ("emotion_train", "launch")  # packages whose lines a report names
_LONGEST = 300  # characters of another library's message

EXIT_CODES = """exit codes:
  0   published, or done
  1   failed, a store did not answer for the time that a run waits, or stopped at once by a second
      Ctrl-C; what was committed stays
  2   wrong request: one sentence says what to type
  33  checkpointed and preempted: start it again, it resumes from there
  34  fenced: another writer owns the run; do not start it again"""


class EmotionTrainError(Exception):
    """An end that one sentence explains: printed without a traceback, and `exit_code` is returned
    to the shell.
    """

    exit_code = 1


class WrongRequest(EmotionTrainError):
    """The request cannot be done; the message says what was given, what is allowed and what to
    type.
    """

    exit_code = 2


class StorageError(EmotionTrainError):
    """A store refused or did not answer; the message names the URL, the likely cause and the
    remedy.

    `transient`: waiting may help (no network, an overloaded or full store, an expired login), so
    the exit code is 1. Otherwise the request has to change, as after a `WrongRequest`.
    """

    exit_code = 2

    def __init__(self, message: str, *, transient: bool = False) -> None:
        super().__init__(message)
        self.transient = transient
        if transient:
            self.exit_code = EmotionTrainError.exit_code


class ObjectNotFound(StorageError):
    """There is no object at this URL."""


class AlreadyExists(StorageError):
    """A create-only write met an object with other bytes."""


class ObjectChanged(StorageError):
    """An object no longer has the ETag that the reader expects."""


class Damaged(StorageError):
    """The stored bytes are not the committed ones: two ways of reading gave the same wrong bytes
    (`emotion_train.storage.second_look`).
    """


class Diverged(EmotionTrainError):
    """The loss is no longer a number; more steps would only spend money."""


class Fenced(EmotionTrainError):
    """Another writer has claimed this run; this one must stop without writing."""

    exit_code = 34


class LostContact(EmotionTrainError):
    """Another process of this run has ended or does not answer; the run resumes from its last
    checkpoint at the next start.
    """


class NotStarted(EmotionTrainError):
    """The run waited for a store and did not begin, or a preemption notice came while it waited.
    Nothing was trained; start it again.
    """


class NotPublished(EmotionTrainError):
    """The run is trained but the store did not take it; the message says where the result is kept
    and how to publish it.
    """


class HostedStopped(EmotionTrainError):
    """A hosted model is asked nothing more: its endpoint refuses, the cap on dollars is reached, or
    a person stopped it. Answers are kept; the message says how to resume.
    """


class ReaderLeft(Exception):
    """The reader of a program that only prints text has left (`emotion_train.edges.streams`)."""


class Preempted(EmotionTrainError):
    """After a preemption notice the run saved its newest state and stopped; another start resumes
    from there.
    """

    exit_code = 33


def exit_code(program: str, action: Callable[[], int], *, show_traceback: bool = False) -> int:
    """Run `action` and return its exit code. An error of the family is printed as its sentence and
    gives its own code; any other error gives one sentence and 1. Where a library calls `sys.exit`,
    the code is never 0.
    """
    try:
        _require_current_folder()
        code = action()
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except EmotionTrainError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 1
    except SystemExit as leaving:
        if isinstance(leaving.code, str):
            print(f"{program}: {leaving.code}", file=sys.stderr)
        return leaving.code if isinstance(leaving.code, int) and leaving.code else 1
    except ReaderLeft:  # such as head
        return 0
    except BaseException as error:  # panics of native libraries are no `Exception`
        return _ended_by(program, error, show_traceback)


def guarded(program: str, make: Callable[[], T], *, show_traceback: bool = False) -> T:
    """The result of `make`, with the errors of `exit_code`, for work before it, such as reading the
    command line; `make` may leave by `sys.exit` with any code.
    """
    try:
        return make()
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:
        sys.exit(_ended_by(program, error, show_traceback))


# --- the last line of defence ---


def add_traceback_option(parser: argparse.ArgumentParser) -> None:
    """The option's line in the help; `without_traceback_option` reads it."""
    parser.add_argument(
        _OPTION, action="store_true", help="show the traceback of an unexpected error instead of a sentence"
    )


def without_traceback_option(
    words: Sequence[str], environment: Mapping[str, str] = os.environ
) -> tuple[list[str], bool]:
    """The words of a command line without `--traceback` (anywhere before a `--`), and whether it
    was given, here or to the parent process.
    """
    end = words.index("--") if "--" in words else len(words)
    rest = [word for word in words[:end] if word != _OPTION] + list(words[end:])
    return rest, len(rest) < len(words) or bool(environment.get(TRACEBACK_VARIABLE))


def _ended_by(program: str, error: BaseException, show_traceback: bool) -> int:
    """Print an unexpected error in one sentence, and return the exit code."""
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        print(f"{program}: {_full_disk(error)}", file=sys.stderr)
        return 2
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        print(f"{program}: {_long_name(error)}", file=sys.stderr)
        return 2
    try:
        _require_current_folder()
    except WrongRequest as gone:
        print(f"{program}: {gone}", file=sys.stderr)
        return gone.exit_code
    if show_traceback:
        traceback.print_exception(error)
    print(f"{program}: {_defect(error, None if show_traceback else _kept(error))}", file=sys.stderr)
    return 1


def _require_current_folder() -> None:
    try:
        os.getcwd()
    except OSError as error:
        raise WrongRequest(
            f"The current folder does not exist any more ({error.strerror}); type cd and the path of one that"
            " does, and the same command again."
        ) from None


def _full_disk(error: OSError) -> str:
    place = error.filename or "a temporary folder"
    reason = "" if error.errno == errno.ENOSPC else f": {error.strerror}"
    return f"the disk is full ({place}{reason}); free some space or set TMPDIR to a larger disk."


def _long_name(error: OSError) -> str:
    # most often a text, or a list of paths, where one path belongs
    name = f"{str(error.filename)[:60]!a} …" if error.filename else "A path"
    return f"{name} is longer than a disk takes for the name of a file; type the path of a file or folder."


def _defect(error: BaseException, file: Path | None) -> str:
    what = " ".join(f"{type(error).__name__}: {error}".removesuffix(": ").split())
    what = re.sub("//[^/@ ]*@", "//…@", what)  # no user:password of a URL
    what = what if len(what) <= _LONGEST else f"{what[:_LONGEST]} …"
    where = f" (the traceback is in {file}; {_OPTION} shows it)" if file is not None else ""
    if isinstance(error, MemoryError):
        return (
            f"This machine has no memory left ({what}, at {_place(error)}); take a larger one, or give less."
        )
    return (
        f"An unexpected error ended the work: {what}, at {_place(error)}; please report it at"
        f" {_where_to_report()}{where}."
    )


def _place(error: BaseException) -> str:
    """The line of this project nearest to the error, and its caller; the library's line where none
    of ours is involved.
    """
    frames = traceback.extract_tb(error.__traceback__)
    root = Path(__file__).resolve().parents[1]
    own = [
        frame
        for frame in frames
        if any(Path(frame.filename).is_relative_to(root / package) for package in _OWN)
        and Path(frame.filename) != Path(__file__)
    ]
    chosen = own[-1:-3:-1] or frames[-1:]
    return ", called at ".join(
        f"{'/'.join(Path(frame.filename).parts[-3:]).lstrip('/')}:{frame.lineno}" for frame in chosen
    )


def _kept(error: BaseException) -> Path | None:
    """A new file with the traceback; None where none can be written."""
    try:
        number, name = tempfile.mkstemp(prefix="emotion-train-traceback-", suffix=".txt")
        with open(number, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write("".join(traceback.format_exception(error)))
    except OSError:
        return None
    return Path(name)


def _where_to_report() -> str:
    """The issues URL in the package's metadata, else its home page, else a phrase."""
    try:
        urls = metadata.metadata("emotion-train").get_all("Project-URL") or []
    except metadata.PackageNotFoundError:
        return _TRACKER
    named = {name.strip().lower(): url.strip() for name, _, url in (line.partition(",") for line in urls)}
    for word in ("issue", "bug", "tracker", "repository", "source", "home"):
        for name, url in named.items():
            if word in name:
                return str(url)
    return _TRACKER
