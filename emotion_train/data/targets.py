"""The kinds of label targets: `one` label, `several` (any subset of the labels, none included), or
`shares`, a distribution over the labels such as the votes of annotators.

A post's target has the same form in all three, pairs of a label id and its share: ((3, 1.0),) for
one label, ((3, 1.0), (10, 1.0)) for several, ((3, 0.67), (10, 0.33)) for shares. Code that needs
only the pairs does not ask for the kind.

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
AUXILIARY = "auxiliary"  # posts of other labels are trained on; column `known` has their source
KNOWN = "known"
UNKNOWN_SHARE = -1.0  # in `targets_NC`: for a label that the post's source does not know
SOFT = "soft"  # training posts have shares given by models; the other splits have one label
SOURCE = "source"  # this column marks synthetic and repeated posts
_KEPT = "kept:"  # before the names of kept columns, which mean nothing to a reader
_SHARES_OFF = 1e-6  # by which a sum of shares may differ from 1


def requires(
    kind: TargetKind, weighted: bool, marked: bool = False, auxiliary: bool = False
) -> tuple[str, ...]:
    """The names of features that a data set with such targets requires: `weighted` where its posts
    have weights of their own, `marked` where posts that are not real are marked, `auxiliary` where
    there are auxiliary posts.
    """
    of_targets = [FEATURE[kind]] if kind in FEATURE else []
    more = ((WEIGHT, weighted), (SOURCE, marked), (AUXILIARY, auxiliary))
    return (*of_targets, *(name for name, present in more if present))


def kept_name(column: str) -> str:
    """The name of a kept column in a data set, which differs from all its own columns."""
    return _KEPT + column


def is_kept(name: str) -> bool:
    """Whether a column of a data set is a kept one."""
    return name.startswith(_KEPT)


def kind_of(names: Iterable[str]) -> TargetKind:
    """The kind of label targets of a data set that requires these features."""
    required = set(names)
    return next((kind for kind, name in FEATURE.items() if name in required), "one")


def is_target(target: object, kind: TargetKind, classes: int) -> bool:
    """Whether this is a post's target: label ids in ascending order with shares above 0, which add
    up to 1 unless a post may have several labels.
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
    """The label with the largest share, the first on a tie; raises `ValueError` without labels."""
    return max(target, key=lambda pair: (pair[1], -pair[0]))[0]


def dense(targets: Sequence[Target], classes: int) -> npt.NDArray[np.float64]:
    """`targets_NC`: the share of each label in each post, 0 for labels that it does not have."""
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
    """`weights_NC`: the weight of the loss of each label of each post. A step's loss is the sum of
    weight times loss, divided once by the sum of weights over the whole step.

    `weights_C` are the class weights and `weight_N` the posts' weights. One label and shares have a
    cross entropy, in which each label has its share times its class weight. Several labels have the
    mean over labels of binary cross entropies: a label of the post has its class weight, and any
    other label 1. Where `known_NC` is false, the post's source does not know the label: it has the
    weight 0, and the mean is over the other labels.
    """
    if kind == "several":
        counted_NC: npt.NDArray[np.float64] = np.where(targets_NC > 0, weights_C, 1.0)
        if known_NC is None:
            return weight_N[:, None] * counted_NC / len(weights_C)
        counted_NC = np.where(known_NC, counted_NC, 0.0) / known_NC.sum(axis=1, keepdims=True)
        return weight_N[:, None] * counted_NC
    return weight_N[:, None] * targets_NC * weights_C


def masked(targets_NC: npt.NDArray[np.float64], known_NC: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """`targets_NC` with `UNKNOWN_SHARE` for labels that the post's source does not know, which the
    loss leaves out.
    """
    return np.where(known_NC, targets_NC, UNKNOWN_SHARE)
