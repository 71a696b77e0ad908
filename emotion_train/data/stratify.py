"""Which posts of each label go to validation and test: those with the smallest draws, in the same
share for every label.

A draw is a 64-bit hash of seed and post id, so that the answer depends on neither order nor
machine. It takes two passes over a file of 12 bytes a post, in constant memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

DRAW = np.dtype([("label", "<i4"), ("draw", "<u8")])
_BINS = 4096
_CHUNK = 1 << 20


class Thresholds(NamedTuple):
    """A post of label c goes to test below `test_C[c]`, else to validation below `validation_C[c]`,
    else to train.
    """

    test_C: Any
    validation_C: Any


def quotas(count: int, validation_fraction: float, test_fraction: float) -> tuple[int, int]:
    """How many of a label's posts go to validation and to test: the nearest numbers, but one each
    of three, and train keeps one.
    """
    wanted = [int(count * fraction + 0.5) for fraction in (validation_fraction, test_fraction)]
    if count < 3:
        return 0, 0
    validation, test = (
        max(1, number) if fraction else 0
        for number, fraction in zip(wanted, (validation_fraction, test_fraction), strict=True)
    )
    while validation + test >= count:
        validation, test = (validation - 1, test) if validation >= test else (validation, test - 1)
    return validation, test


def thresholds(draws: Path, labels: int, validation_fraction: float, test_fraction: float) -> Thresholds:
    """The thresholds that meet each label's quotas over a file of `DRAW` records."""
    histogram_CB = np.zeros((labels, _BINS), np.int64)
    for record in _chunks(draws):
        cell = record["label"].astype(np.int64) * _BINS + (record["draw"] >> np.uint64(52)).astype(np.int64)
        histogram_CB += np.bincount(cell, minlength=labels * _BINS).reshape(labels, _BINS)
    numbers_C = [quotas(int(count), validation_fraction, test_fraction) for count in histogram_CB.sum(axis=1)]
    test_C = np.array([test for _, test in numbers_C])
    both_C = np.array([validation + test for validation, test in numbers_C])
    return Thresholds(_smallest(draws, histogram_CB, test_C), _smallest(draws, histogram_CB, both_C))


def _smallest(draws: Path, histogram_CB: Any, wanted_C: Any) -> Any:
    """For each label the draw below which exactly `wanted_C` of its draws lie."""
    labels = len(wanted_C)
    below_CB = np.cumsum(histogram_CB, axis=1) - histogram_CB
    bin_C = np.array(
        [np.searchsorted(np.cumsum(histogram_CB[c]), wanted_C[c], side="right") for c in range(labels)]
    ).clip(max=_BINS - 1)
    inside: list[list[Any]] = [[] for _ in range(labels)]
    for record in _chunks(draws):
        record = record[(record["draw"] >> np.uint64(52)).astype(np.int64) == bin_C[record["label"]]]
        for label in np.unique(record["label"]):
            inside[label].append(record["draw"][record["label"] == label])
    found_C = np.zeros(labels, np.uint64)
    for label, parts in enumerate(inside):
        if wanted_C[label] > 0:
            found_C[label] = np.sort(np.concatenate(parts))[wanted_C[label] - below_CB[label, bin_C[label]]]
    return found_C


def _chunks(draws: Path) -> Any:
    with draws.open("rb") as file:
        while len(record := np.fromfile(file, DRAW, _CHUNK)):
            yield record
