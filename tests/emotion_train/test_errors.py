"""The tree at the head of errors.py is the family."""

from __future__ import annotations

import pickle
import re

import pytest

import emotion_train.runs.log
import emotion_train.runs.origin
from emotion_train import errors


def test_the_tree_of_errors_is_the_family_with_its_exit_codes() -> None:
    assert emotion_train.runs.log.Published.__bases__ == (errors.EmotionTrainError,)
    assert emotion_train.runs.origin.NotInReach.__bases__ == (errors.EmotionTrainError,)

    def lines(error: type[errors.EmotionTrainError], depth: int) -> set[tuple[int, str, int]]:
        below = [lines(one, depth + 1) for one in error.__subclasses__()]
        return {(depth, error.__name__, error.exit_code)}.union(*below)

    told: set[tuple[int, str, int]] = set()
    code = 1
    for space, name, number in re.findall(r"(?m)^    ( *)([A-Z]\w+)(?: +(\d+) .*)?$", errors.__doc__ or ""):
        code = int(number) if number else code
        told.add((len(space) // 2, name, code))
    assert told == lines(errors.EmotionTrainError, 0)


def test_a_store_that_does_not_answer_is_no_wrong_request_also_on_another_rank() -> None:
    """A scheduler that starts a run anew must not take an outage for a mistake."""
    for kind in (errors.StorageError, errors.ObjectNotFound):
        assert not issubclass(kind, errors.WrongRequest)
        for transient, code in ((True, 1), (False, 2)):
            sent = pickle.loads(pickle.dumps(kind("The network is gone.", transient=transient)))
            assert (str(sent), sent.transient, sent.exit_code) == ("The network is gone.", transient, code)


def test_a_refusal_ends_a_program_with_2_and_an_outage_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(transient: bool) -> int:
        raise errors.StorageError("s3://posts said no.", transient=transient)

    assert errors.exit_code("emotion-train", lambda: fail(False)) == 2
    assert errors.exit_code("emotion-train", lambda: fail(True)) == 1
    assert capsys.readouterr().err == "emotion-train: s3://posts said no.\n" * 2
