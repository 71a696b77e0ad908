"""The class-weighted loss of a step: sum of w * loss over posts and labels, to be divided once by
the step's sum of w.

Dividing per micro-batch instead points the gradient elsewhere and cancels the weights when a
micro-batch holds one post (pytorch/pytorch#72047).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from emotion_train.config import ClassWeights
from emotion_train.data.targets import TargetKind

if TYPE_CHECKING:
    import torch


NO_LOGIT = -1e30  # whose share of a softmax is 0, and whose loss times a weight of 0 is no NaN


def class_weights(
    counts: Sequence[float], choice: ClassWeights, labels: Sequence[str] = ()
) -> npt.NDArray[np.float64]:
    """Weight of each class, `weights_C`, from its number of training posts or the sum of its shares
    in them, scaled to a mean of 1 over these.

    balanced is n / (C * count), scikit-learn's `compute_class_weight`; a number p is count^-p, so
    that p = 1 equals balanced and p = 0 equals none; a table gives weights by name in `labels`, and
    1 to the others. A class without posts weighs 0.
    """
    counts_C = np.asarray(counts, np.float64)
    present_C = counts_C > 0
    if isinstance(choice, dict):
        raw_C = np.array([choice.get(label, 1.0) for label in labels], np.float64)
    else:
        power = {"balanced": 1.0, "none": 0.0}[choice] if isinstance(choice, str) else float(choice)
        raw_C = np.where(present_C, counts_C, 1.0) ** -power
    weights_C = np.where(present_C, raw_C, 0.0)
    return np.asarray(weights_C * (counts_C.sum() / (weights_C * counts_C).sum()))


def weighted_loss_sum(
    logits_NC: torch.Tensor,
    targets_NC: torch.Tensor,
    weights_NC: torch.Tensor,
    kind: TargetKind = "one",
    masked: bool = False,
) -> torch.Tensor:
    """Sum over posts and labels of weight times loss, in float32: the binary cross entropy of each
    label where posts have `several`, else its part of the cross entropy, whose share of the post is
    in `weights_NC`. The caller divides by the sum of weights of the whole step.

    `masked`: targets below 0 mark labels that a post's source does not know; these are no part of
    its softmax and have no loss.
    """
    from torch.nn.functional import binary_cross_entropy_with_logits, log_softmax

    if kind == "several":
        losses_NC = binary_cross_entropy_with_logits(logits_NC.float(), targets_NC, reduction="none")
    else:
        logits_NC = logits_NC.float()
        if masked:
            logits_NC = logits_NC.masked_fill(targets_NC < 0, NO_LOGIT)
        losses_NC = -log_softmax(logits_NC, dim=-1)
    # label by label first: of one label that adds zeros, so the sum is that over posts, to the bit
    return (weights_NC.float() * losses_NC).sum(dim=-1).sum()


def probabilities(logits_NC: torch.Tensor, kind: TargetKind) -> torch.Tensor:
    """`prob_NC`: a sigmoid for each of several labels, else a softmax over all labels."""
    return logits_NC.sigmoid() if kind == "several" else logits_NC.softmax(dim=-1)
