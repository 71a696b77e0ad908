"""What posts are labelled with: `one` label, `several` (any subset of the labels, none included),
or `shares`, a distribution over the labels such as the votes of annotators.

A post's target is the same in all three, pairs of a label id and its share: ((3, 1.0),) of one
label, ((3, 1.0), (10, 1.0)) of several, ((3, 0.67), (10, 0.33)) of shares. Pages that need no more
than that do not ask which of the three it is.

Letters: N posts, C labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

TargetKind = Literal["one", "several", "shares"]
KINDS: tuple[TargetKind, ...] = get_args(TargetKind)
Target = tuple[tuple[int, float], ...]
WORDS: dict[TargetKind, str] = {"one": "one label", "several": "several labels", "shares": "shares of labels"}

# names in an index's `requires`
FEATURE: dict[TargetKind, str] = {"several": "targets:several", "shares": "targets:shares"}
WEIGHT = "weight"
AUXILIARY = "auxiliary"  # posts of other labels are trained on; column `known` says who labelled them
KNOWN = "known"
UNKNOWN_SHARE = -1.0  # in `targets_NC`: of a label that the post's source does not know
SOFT = "soft"  # training posts have shares that models gave; the others have one label
SOURCE = "source"  # posts that nobody wrote, or that stand there again, are marked in this column
_KEPT = "kept:"  # before the names of columns that came along, which mean nothing to a reader
_SHARES_OFF = 1e-6  # of 1, that shares may add up to


def requires(
    kind: TargetKind, weighted: bool, marked: bool = False, auxiliary: bool = False
) -> tuple[str, ...]:
    """The names of features of a data set with such targets; `weighted` where its posts have
    weights of their own, `marked` where those that are no real posts say so, `auxiliary` where
    posts of other labels are trained on.
    """
    found = [FEATURE[kind]] if kind in FEATURE else []
    more = ((WEIGHT, weighted), (SOURCE, marked), (AUXILIARY, auxiliary))
    return (*found, *(name for name, there in more if there))


def kept_name(column: str) -> str:
    """What a column that was kept is called in a data set, apart from its own columns."""
    return _KEPT + column


def is_kept(name: str) -> bool:
    """Whether a column of a data set is one that was kept."""
    return name.startswith(_KEPT)


def kind_of(names: Iterable[str]) -> TargetKind:
    """The targets of a data set that requires these features."""
    found = set(names)
    return next((kind for kind, name in FEATURE.items() if name in found), "one")


def is_target(target: object, kind: TargetKind, classes: int) -> bool:
    """Whether this is the target of a post: label ids in ascending order with shares above 0, which
    add up to 1 unless there are several.
    """
    if not isinstance(target, tuple):
        return False
    ids = [label for label, _ in target]
    if any(not isinstance(label, int) or not 0 <= label < classes for label in ids):
        return False
    if any(later <= earlier for earlier, later in pairwise(ids)):
        return False
    if kind == "several":
        return all(share == 1.0 for _, share in target)
    if kind == "one":
        return len(target) == 1 and target[0][1] == 1.0
    return all(share > 0 for _, share in target) and abs(sum(share for _, share in target) - 1) < _SHARES_OFF


def largest(target: Target) -> int:
    """The label of the largest share, the first of several; raises `ValueError` without labels."""
    return max(target, key=lambda pair: (pair[1], -pair[0]))[0]


def dense(targets: Sequence[Target], classes: int) -> npt.NDArray[np.float64]:
    """`targets_NC`: the share of each label in each post, 0 for those that it does not have."""
    targets_NC = np.zeros((len(targets), classes))
    for post, target in enumerate(targets):
        for label, share in target:
            targets_NC[post, label] = share
    return targets_NC


def loss_weights(
    targets_NC: npt.NDArray[np.float64],
    kind: TargetKind,
    weights_C: npt.NDArray[np.float64],
    weight_N: npt.NDArray[np.float64],
    known_NC: npt.NDArray[np.bool_] | None = None,
) -> npt.NDArray[np.float64]:
    """`weights_NC`: what the loss of each label of each post counts. A step's loss is the sum of
    weight times loss, divided once by the sum of these over the whole step.

    `weights_C` are the class weights and `weight_N` those of the posts. The loss of one label or of
    shares is a cross entropy, of which each label takes its share times its class weight. That of
    several labels is the mean over labels of binary cross entropies: a label that the post has
    counts its class weight, one that it has not counts 1. Where `known_NC` is false the post's
    source does not know the label: it counts nothing, and the mean is over the others.
    """
    if kind == "several":
        counted_NC: npt.NDArray[np.float64] = np.where(targets_NC > 0, weights_C, 1.0)
        if known_NC is None:
            return weight_N[:, None] * counted_NC / len(weights_C)
        counted_NC = np.where(known_NC, counted_NC, 0.0) / known_NC.sum(axis=1, keepdims=True)
        return weight_N[:, None] * counted_NC
    return weight_N[:, None] * targets_NC * weights_C


def masked(targets_NC: npt.NDArray[np.float64], known_NC: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """`targets_NC` that say which labels a post's source does not know: these have the share
    `UNKNOWN_SHARE`, which the loss leaves out.
    """
    return np.where(known_NC, targets_NC, UNKNOWN_SHARE)
