"""Macro-F1 by the values of a kept column, such as the language or the source of a post: shows
where a model is worse than its headline score.

Letters: N posts, C labels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from emotion_train.evaluation.metrics import ClassCounts, bootstrap_macro_f1
from emotion_train.evaluation.predictions import AnyPredictions, SetPredictions
from emotion_train.evaluation.sets import SetCounts
from emotion_train.report.schema import SliceFigures, Slices

FEW_POSTS = 50
_MOST_VALUES = 10
_LONGEST = 100  # characters of a value that is shown


def slices(
    predictions: AnyPredictions, values: Mapping[str, Mapping[str, str]], samples: int, seed: int
) -> tuple[Slices, ...]:
    """The figures of each column. `values` maps a column to each post's value by id, "" for a post
    without one. The ten values with most posts (ties by name) have figures of their own; the others
    are taken together.
    """
    return tuple(
        Slices(column=column, values=_of_column(predictions, value_of, samples, seed))
        for column, value_of in values.items()
    )


def _of_column(
    predictions: AnyPredictions, value_of: Mapping[str, str], samples: int, seed: int
) -> tuple[SliceFigures, ...]:
    rows_of: dict[str, list[int]] = {}
    for row, post in enumerate(predictions.ids):
        rows_of.setdefault(value_of[post], []).append(row)
    most = sorted(rows_of, key=lambda value: (-len(rows_of[value]), value))
    alone, rest = most[:_MOST_VALUES], most[_MOST_VALUES:]
    if len(rest) == 1:
        alone, rest = most, []
    figures = [
        _figures(predictions, rows_of[value], name, 1, samples, seed)
        for value, name in zip(alone, _names(alone), strict=True)
    ]
    if rest:
        rows = sorted(row for value in rest for row in rows_of[value])
        figures.append(_figures(predictions, rows, None, len(rest), samples, seed))
    return tuple(figures)


def _names(values: Sequence[str]) -> list[str]:
    """The values, long ones cut, and numbered where cutting makes them equal."""
    short = [value if len(value) <= _LONGEST else f"{value[: _LONGEST - 1]}…" for value in values]
    twice = {name for name, times in Counter(short).items() if times > 1}
    return [f"{name} ({at})" if name in twice else name for at, name in enumerate(short, 1)]


def _figures(
    predictions: AnyPredictions, rows: Sequence[int], value: str | None, values: int, samples: int, seed: int
) -> SliceFigures:
    """The figures over the labels that these posts have; other labels would count 0 for no fault of
    the model.
    """
    part = predictions.take(rows)
    classes = part.prob_NC.shape[1]
    if isinstance(part, SetPredictions):
        f1_C, has_C = SetCounts(part.counts()).f1_C, np.asarray(part.truth_NC.any(axis=0))
    else:
        f1_C = ClassCounts(part.counts()).f1_C
        has_C = np.bincount(part.truth_N, minlength=classes) > 0
    low = high = macro_f1 = 0.0
    if has_C.any():
        macro_f1 = float(f1_C[has_C].mean())
        low, high = bootstrap_macro_f1(part.truth, part.predicted, classes, samples, seed, has_C)
    return SliceFigures(
        value=value,
        values=values,
        rows=len(rows),
        labels=int(has_C.sum()),
        macro_f1=macro_f1,
        macro_f1_low=low,
        macro_f1_high=high,
    )
