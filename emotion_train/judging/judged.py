"""What scoring some posts gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from emotion_train.report.figures import AnyResult

SEED = 42  # run.seed's default, which gives the figures of a run's report
FLOOR_MAX_ROWS = 100_000  # also of a training split that stands in for a filter


class Judged(NamedTuple):
    """The result; `train_counts` are the training posts of each of the adapter's labels, or the
    sums of their shares, where they are known. `chose`: these posts chose the thresholds.
    """

    result: AnyResult
    train_counts: Sequence[float] | None
    chose: bool
    remarks: list[str]
