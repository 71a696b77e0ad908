"""The error family: each error carries the exit code of the process that it ends, and `exit_code`
is how a program ends with one.

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
      Published              1   told to a claim, which answers it (`emotion_train.runs.log`)
      Preempted             33   saved; start it again
      Fenced                34   another writer owns the run

None of them is 0, which only what a program does may return. Everything outside this family is a
defect and ends with a traceback and exit code 1, but for a full disk, Ctrl-C and a reader that
leaves a program whose printed text is all that it does.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable

EXIT_CODES = """exit codes:
  0   published, or done
  1   failed, a store did not answer for the time that a run waits, or stopped at once by a second
      Ctrl-C; what was committed stays
  2   wrong request: one sentence says what to type
  33  checkpointed and preempted: start it again, it goes on from there
  34  fenced: another writer owns the run; do not start it again"""


class EmotionTrainError(Exception):
    """An end that is explained in words: printed without a traceback, `exit_code` is returned to
    the shell.
    """

    exit_code = 1


class WrongRequest(EmotionTrainError):
    """What was asked for cannot be done; the message says what was given, what is allowed and what
    to type.
    """

    exit_code = 2


class StorageError(EmotionTrainError):
    """A store refused or did not answer; the message names the URL, the likely cause and the
    remedy.

    `transient`: waiting may help (no network, an overloaded or full store, an expired login), so
    that the exit code is 1; otherwise the request has to change, as after a `WrongRequest`.
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
    """What is stored is not what was committed: the same wrong bytes came by two ways
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
    """The run waited for a store and did not begin, or its machine went while it waited; nothing
    was trained, and another start does what this one would have done.
    """


class NotPublished(EmotionTrainError):
    """The run is trained and the store did not take it; the message says where it is kept and how
    it gets published.
    """


class ReaderLeft(Exception):
    """Nobody reads the text that is all the program does (`emotion_train.edges.streams`)."""


class Preempted(EmotionTrainError):
    """The machine is about to be taken; the run stopped after its newest state was saved, and
    another start resumes from there.
    """

    exit_code = 33


def exit_code(program: str, action: Callable[[], int]) -> int:
    """Run `action` and return its exit code; errors of the family become their sentence on stderr
    and their own code. A library that calls `sys.exit` in the middle has done nothing: never 0.
    """
    try:
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
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        place = error.filename or "a temporary folder"
        print(
            f"{program}: the disk is full ({place}); free some space or set TMPDIR to a larger disk.",
            file=sys.stderr,
        )
        return 2
