"""The loss of a whole batch by PyTorch's own modules, for every kind of targets.

Letters: N posts, C labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from emotion_train.data.targets import Target, TargetKind


def plain_loss(
    logits_NC: torch.Tensor,
    targets: Sequence[Target],
    weight_N: torch.Tensor,
    weights_C: torch.Tensor,
    kind: TargetKind,
    known: Sequence[Sequence[int]] | None = None,
) -> torch.Tensor:
    """The loss of a batch: of its posts' weighted losses the mean by weight. `known` are the labels
    that each post's source knows.
    """
    if known is not None:
        return _of_known(logits_NC, targets, weight_N, weights_C, kind, known)
    if kind == "one":
        labels_N = torch.tensor([target[0][0] for target in targets], device=logits_NC.device)
        return torch.nn.functional.cross_entropy(logits_NC, labels_N, weights_C)
    targets_NC = torch.zeros_like(logits_NC)
    for post, target in enumerate(targets):
        for label, share in target:
            targets_NC[post, label] = share
    if kind == "shares":
        losses_N = torch.nn.functional.cross_entropy(logits_NC, targets_NC, weights_C, reduction="none")
        return (weight_N * losses_N).sum() / (weight_N * (targets_NC @ weights_C)).sum()
    losses_NC = torch.nn.functional.binary_cross_entropy_with_logits(
        logits_NC, targets_NC, pos_weight=weights_C, reduction="none"
    )
    counted_NC = torch.where(targets_NC > 0, weights_C, 1.0)
    return (weight_N * losses_NC.mean(1)).sum() / (weight_N * counted_NC.mean(1)).sum()


def _of_known(
    logits_NC: torch.Tensor,
    targets: Sequence[Target],
    weight_N: torch.Tensor,
    weights_C: torch.Tensor,
    kind: TargetKind,
    known: Sequence[Sequence[int]],
) -> torch.Tensor:
    """Post by post, on the logits of the known labels alone."""
    losses, counted = [], []
    for logits_C, target, weight, ids in zip(logits_NC, targets, weight_N, known, strict=True):
        shares_K = torch.tensor([dict(target).get(label, 0.0) for label in ids], device=logits_C.device)
        logits_K, weights_K = logits_C[list(ids)], weights_C[list(ids)]
        if kind == "several":
            losses_K = torch.nn.functional.binary_cross_entropy_with_logits(
                logits_K, shares_K, pos_weight=weights_K, reduction="none"
            )
            losses.append(weight * losses_K.mean())
            counted.append(weight * torch.where(shares_K > 0, weights_K, 1.0).mean())
        else:
            losses.append(weight * torch.nn.functional.cross_entropy(logits_K, shares_K, weights_K))
            counted.append(weight * (shares_K @ weights_K))
    return torch.stack(losses).sum() / torch.stack(counted).sum()
