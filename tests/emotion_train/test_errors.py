"""The tree at the head of errors.py is the family."""

from __future__ import annotations

import re

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
