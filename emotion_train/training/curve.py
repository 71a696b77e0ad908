"""The training loss by step, in a bounded number of points that a checkpoint keeps.

Every point is the mean of equally many steps. When there are too many points, each two become one,
so that a long run has between 128 and 256 points. Which steps share a point depends on their
numbers alone, and not on when the run was stopped.
"""

from __future__ import annotations

from emotion_train.runs.checkpoint import Progress

MOST_POINTS = 256


def take(progress: Progress, step: int, loss: float) -> None:
    """Add the loss of a step; steps come in order."""
    progress.curve_sum += loss
    progress.curve_steps += 1
    if progress.curve_steps < progress.curve_every:
        return
    progress.curve.append([step, progress.curve_sum / progress.curve_steps])
    progress.curve_sum, progress.curve_steps = 0.0, 0
    if len(progress.curve) >= MOST_POINTS:
        pairs = zip(progress.curve[::2], progress.curve[1::2], strict=True)
        progress.curve = [[step, (first + second) / 2] for (_, first), (step, second) in pairs]
        progress.curve_every *= 2


def points(progress: Progress) -> list[tuple[int, float]]:
    """Last step and mean loss of each point, and of the steps after the last point."""
    found = [(int(step), loss) for step, loss in progress.curve]
    if progress.curve_steps:
        found.append((progress.step, progress.curve_sum / progress.curve_steps))
    return found
