"""The error family: each error carries the exit code of the process that it ends.

Everything outside this family is a defect and ends with a traceback and exit code 1.
"""

from __future__ import annotations


class EmotionTrainError(Exception):
    """An end that is explained in words: printed without a traceback, `exit_code` is returned to the shell."""

    exit_code = 1


class WrongRequest(EmotionTrainError):
    """What was asked for cannot be done; the message says what was given, what is allowed and what to type."""

    exit_code = 2


class StorageError(WrongRequest):
    """A store refused or did not answer; the message names the URL, the likely cause and the remedy."""


class ObjectNotFound(StorageError):
    """There is no object at this URL."""


class AlreadyExists(StorageError):
    """A create-only write met an object with other bytes."""


class ObjectChanged(StorageError):
    """An object no longer has the ETag that the reader expects."""


class Fenced(EmotionTrainError):
    """Another writer has claimed this run; this one must stop without writing."""

    exit_code = 34
