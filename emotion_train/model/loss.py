"""The class-weighted loss of a step: sum of w * cross entropy, to be divided once by the step's sum
of w.

Dividing per micro-batch instead points the gradient elsewhere and cancels the weights when a
micro-batch holds one post (pytorch/pytorch#72047).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from emotion_train.config import ClassWeights

if TYPE_CHECKING:
    import torch


def class_weights(
    counts: Sequence[int], choice: ClassWeights, labels: Sequence[str] = ()
) -> npt.NDArray[np.float64]:
    """Weight of each class, `weights_C`, from its number of training posts, scaled to a mean of 1
    over the posts.

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
    logits_NC: torch.Tensor, labels_N: torch.Tensor, weights_N: torch.Tensor
) -> torch.Tensor:
    """Sum over posts of weight times cross entropy, in float32. The caller divides by the sum of
    weights of the whole step.
    """
    from torch.nn.functional import cross_entropy

    losses_N = cross_entropy(logits_NC.float(), labels_N, reduction="none")
    return (weights_N.float() * losses_N).sum()
