"""The posts of each label for validation and test: those with the smallest draws, in the same share
for every label.

A draw is a 64-bit hash of seed and post id, so the choice depends on neither order nor machine. It
takes two passes over a file of 12 bytes per post, in constant memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

DRAW = np.dtype([("label", "<i4"), ("draw", "<u8")])
_BITS = 12  # leading bits of a draw that name its bin in a histogram
_CELLS = 1 << 22  # of all histograms together, 32 MiB
_CHUNK = 1 << 20


class Thresholds(NamedTuple):
    """A post of label c goes to test below `test_C[c]`, else to validation below `validation_C[c]`,
    else to train.
    """

    test_C: Any
    validation_C: Any


def quotas(count: int, validation_fraction: float, test_fraction: float) -> tuple[int, int]:
    """The numbers of a label's posts for validation and test: the nearest to their fractions, but
    at least one each from three posts on, and train keeps one.
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


def thresholds(
    draws: Path,
    labels: int,
    validation_fraction: float,
    test_fraction: float,
    numbers_C: Sequence[tuple[int, int]] | None = None,
) -> Thresholds:
    """The thresholds that meet each label's quotas, or the numbers `numbers_C` for validation and
    test, over a file of `DRAW` records.
    """
    bits = min(_BITS, max(1, (_CELLS // max(1, labels)).bit_length() - 1))
    shift, bins = np.uint64(64 - bits), 1 << bits
    histogram_CB = np.zeros((labels, bins), np.int64)
    for record in _chunks(draws):
        cell = record["label"].astype(np.int64) * bins + (record["draw"] >> shift).astype(np.int64)
        histogram_CB += np.bincount(cell, minlength=labels * bins).reshape(labels, bins)
    if numbers_C is None:
        counts_C = histogram_CB.sum(axis=1)
        numbers_C = [quotas(int(count), validation_fraction, test_fraction) for count in counts_C]
    test_C = np.array([test for _, test in numbers_C])
    both_C = np.array([validation + test for validation, test in numbers_C])
    return Thresholds(
        _smallest(draws, histogram_CB, test_C, shift), _smallest(draws, histogram_CB, both_C, shift)
    )


def _smallest(draws: Path, histogram_CB: Any, wanted_C: Any, shift: Any) -> Any:
    """For each label, the draw that exactly `wanted_C` of its draws are below; the largest possible
    draw where all are wanted.
    """
    labels, bins = histogram_CB.shape
    part_C = (wanted_C > 0) & (wanted_C < histogram_CB.sum(axis=1))
    below_CB = np.cumsum(histogram_CB, axis=1) - histogram_CB
    bin_C = ((below_CB + histogram_CB) <= wanted_C[:, None]).sum(axis=1).clip(max=bins - 1)
    inside = []  # each label's draws in the bin of its threshold
    for record in _chunks(draws):
        label = record["label"]
        there = part_C[label] & ((record["draw"] >> shift).astype(np.int64) == bin_C[label])
        inside.append(record[there])
    record = np.concatenate(inside) if inside else np.empty(0, DRAW)
    record = record[np.lexsort((record["draw"], record["label"]))]
    first_C = np.searchsorted(record["label"], np.arange(labels))
    draw_C = np.where(wanted_C > 0, np.iinfo(np.uint64).max, np.uint64(0))
    wanted = np.flatnonzero(part_C)
    ranks = wanted_C[wanted] - below_CB[wanted, bin_C[wanted]]
    draw_C[wanted] = record["draw"][first_C[wanted] + ranks]
    return draw_C


def _chunks(draws: Path) -> Any:
    with draws.open("rb") as file:
        while len(record := np.fromfile(file, DRAW, _CHUNK)):
            yield record
