"""The gains and losses of training on from an adapter, on the held-out posts of that parent.

The parent's answers come from its published predictions; the run answers the same posts. A label
that the run no longer has can only be forgotten. Intervals are paired: the same posts resample
both.

Letters: C labels of both, N posts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from emotion_train.evaluation.comparison import mcnemar, paired_difference, resampled_f1
from emotion_train.evaluation.metrics import alike_N
from emotion_train.evaluation.predictions import AnyPredictions
from emotion_train.report.schema import OldLabel, OldPosts, Parent
from emotion_train.report.units import signed


def old_figures(
    parent: Parent,
    labels: Sequence[str],
    before: AnyPredictions,
    after: AnyPredictions,
    *,
    split: str,
    samples: int,
    seed: int,
) -> OldPosts:
    """The figures of the parent's answers `before`, by its labels, and the run's answers `after`,
    by `labels`, to the same posts in the same order. The true labels come from `before` alone.
    """
    assert before.ids == after.ids, "both answered the same posts in one order"
    both = [*parent.labels, *(label for label in labels if label not in parent.labels)]
    first = before.relabelled(range(len(parent.labels)), len(both))
    second = after.relabelled([both.index(label) for label in labels], len(both))
    resampled = resampled_f1(first.truth, [first.predicted, second.predicted], len(both), samples, seed)
    known = len(parent.labels)
    different = int((~alike_N(first.predicted, second.predicted)).sum())
    macro_R, macro_SR = resampled.f1_RC[:, :known].mean(axis=1), resampled.f1_SRC[:, :, :known].mean(axis=2)
    paired, _ = paired_difference(macro_R, macro_SR, [0], [1], different, seed)
    changed = mcnemar(first.truth, first.predicted, second.predicted)
    support_C = np.asarray(first.counts())
    of_labels = []
    for label, name in enumerate(parent.labels):
        drawn_S = resampled.f1_SRC[:, 1, label] - resampled.f1_SRC[:, 0, label]
        low, high = np.percentile(drawn_S, [2.5, 97.5]).tolist()
        of_labels.append(
            OldLabel(
                label=name,
                support=_support(support_C, label),
                f1_before=float(resampled.f1_RC[0, label]),
                f1=float(resampled.f1_RC[1, label]),
                difference_low=low,
                difference_high=high,
            )
        )
    return OldPosts(
        split=split,
        rows=len(before.ids),
        macro_f1_before=float(macro_R[0]),
        macro_f1=float(macro_R[1]),
        difference=paired.difference,
        difference_low=paired.low,
        difference_high=paired.high,
        gained=changed.only_second,
        forgotten=changed.only_first,
        p=changed.p,
        per_label=tuple(of_labels),
    )


def _support(counts: np.ndarray[tuple[int, int], np.dtype[np.int64]], label: int) -> int:
    """Posts that have the label, from a confusion matrix or from the three rows of `SetCounts`."""
    square = counts.shape[0] == counts.shape[1]
    return int(counts[label].sum() if square else counts[1, label])


def old_sentence(parent: Parent, old: OldPosts) -> str:
    """The sentence on the parent's posts: macro-F1 before and now, posts gained and forgotten."""
    return (
        f"On the {old.rows:,} {old.split} posts of the parent adapter {parent.name}: macro-F1"
        f" {old.macro_f1:.3f} now and {old.macro_f1_before:.3f} before, {signed(old.difference)}"
        f" [{signed(old.difference_low)} to {signed(old.difference_high)}];"
        f" {old.gained:,} posts gained, {old.forgotten:,} forgotten."
    )
