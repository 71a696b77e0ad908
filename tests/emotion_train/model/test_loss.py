"""The weighted loss against scikit-learn's formula and PyTorch's own weighted mean."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight

from emotion_train.data.targets import KINDS, TargetKind, dense, loss_weights
from emotion_train.model.loss import class_weights, probabilities, weighted_loss_sum

COUNTS = [230, 134, 12, 1]


def test_balanced_is_scikit_learns_formula() -> None:
    labels = np.repeat(np.arange(4), COUNTS)
    np.testing.assert_allclose(
        class_weights(COUNTS, "balanced"), compute_class_weight("balanced", classes=np.arange(4), y=labels)
    )


@pytest.mark.parametrize(("word", "power"), [("balanced", 1.0), ("none", 0.0)])
def test_the_words_are_powers(word: str, power: float) -> None:
    np.testing.assert_allclose(class_weights(COUNTS, word), class_weights(COUNTS, power))  # type: ignore[arg-type]


def test_a_power_between_is_count_to_the_minus_p_up_to_scale() -> None:
    weights = class_weights(COUNTS, 0.25)
    np.testing.assert_allclose(weights / weights[0], (np.array(COUNTS) / COUNTS[0]) ** -0.25)
    assert (weights * COUNTS).sum() / sum(COUNTS) == pytest.approx(1)


def test_a_class_without_posts_weighs_nothing_and_changes_no_other() -> None:
    weights = class_weights([*COUNTS, 0], "balanced")
    assert weights[-1] == 0
    np.testing.assert_allclose(weights[:-1], class_weights(COUNTS, "balanced"))


def test_a_table_gives_weights_by_name_and_1_to_the_others() -> None:
    weights = class_weights(COUNTS, {"d": 8.0, "b": 0.5}, ["a", "b", "c", "d"])
    np.testing.assert_allclose(weights / weights[0], [1, 0.5, 1, 8])
    assert (weights * COUNTS).sum() / sum(COUNTS) == pytest.approx(1)


def test_the_sum_divided_once_is_pytorchs_weighted_mean() -> None:
    torch.manual_seed(0)
    logits_NC, labels_N = torch.randn(9, 4), torch.randint(4, (9,))
    weights_C = torch.tensor(class_weights(COUNTS, "balanced"), dtype=torch.float32)
    targets_NC = torch.nn.functional.one_hot(labels_N, 4).float()
    weights_NC = targets_NC * weights_C
    mine = weighted_loss_sum(logits_NC, targets_NC, weights_NC) / weights_NC.sum()
    torch.testing.assert_close(mine, torch.nn.functional.cross_entropy(logits_NC, labels_N, weight=weights_C))


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_logits_are_summed_in_float32(kind: TargetKind) -> None:
    assert (
        weighted_loss_sum(
            torch.zeros(3, 2, dtype=torch.bfloat16), torch.ones(3, 2), torch.ones(3, 2), kind
        ).dtype
        == torch.float32
    )


def sums(
    logits_NC: torch.Tensor, targets_NC: npt.NDArray[np.float64], kind: TargetKind, post_weights: list[float]
) -> tuple[torch.Tensor, float]:
    """Loss sum and weight sum as the loader and the trainer make them."""
    weights_C = class_weights(COUNTS, 0.25)
    weights_NC = loss_weights(targets_NC, kind, weights_C, np.asarray(post_weights))
    targets, weights = (torch.from_numpy(x.astype(np.float32)) for x in (targets_NC, weights_NC))
    return weighted_loss_sum(logits_NC, targets, weights, kind), float(weights_NC.sum())


POST_WEIGHTS = [1.0, 0.5, 2.0, 0.25, 1.0, 3.0]


def test_the_loss_of_several_labels_is_pytorchs_with_weights_for_what_a_post_has() -> None:
    torch.manual_seed(1)
    logits_NC = torch.randn(6, 4, requires_grad=True)
    targets_NC = dense([((0, 1.0),), (), ((1, 1.0), (3, 1.0)), ((2, 1.0),), (), ((0, 1.0), (1, 1.0))], 4)
    loss, weight = sums(logits_NC, targets_NC, "several", POST_WEIGHTS)
    weights_C = torch.tensor(class_weights(COUNTS, 0.25), dtype=torch.float32)
    y_NC = torch.from_numpy(targets_NC).float()
    # pos_weight weighs the positive term alone, as a positive's whole loss has no other
    each_NC = torch.nn.BCEWithLogitsLoss(pos_weight=weights_C, reduction="none")(logits_NC, y_NC)
    post_N = torch.tensor(POST_WEIGHTS)
    counted_NC = torch.where(y_NC > 0, weights_C, torch.ones(4))
    expected = (post_N * each_NC.mean(dim=1)).sum() / (post_N * counted_NC.mean(dim=1)).sum()
    torch.testing.assert_close(loss / weight, expected)


def test_the_loss_of_shares_is_pytorchs_for_probabilities_of_classes() -> None:
    torch.manual_seed(2)
    logits_NC = torch.randn(6, 4)
    shares_NC = torch.rand(6, 4).double()
    shares_NC /= shares_NC.sum(dim=1, keepdim=True)
    loss, weight = sums(logits_NC, shares_NC.numpy(), "shares", POST_WEIGHTS)
    weights_C = torch.tensor(class_weights(COUNTS, 0.25), dtype=torch.float32)
    each_N = torch.nn.CrossEntropyLoss(weight=weights_C, reduction="none")(logits_NC, shares_NC.float())
    post_N = torch.tensor(POST_WEIGHTS)
    of_labels_N = (shares_NC.float() * weights_C).sum(dim=1)
    torch.testing.assert_close(loss / weight, (post_N * each_N).sum() / (post_N * of_labels_N).sum())


def test_shares_of_one_label_are_that_label_to_the_bit() -> None:
    """Loss and gradient, also against the cross entropy of labels that earlier versions took."""
    torch.manual_seed(3)
    labels_N = torch.randint(4, (64,))
    one_hot_NC = np.eye(4)[labels_N.numpy()]
    weights_N = torch.tensor(class_weights(COUNTS, 0.25)[labels_N.numpy()], dtype=torch.float32)
    logits_NC, found = torch.randn(64, 4), []
    for kind in ("one", "shares", None):
        own_NC = logits_NC.clone().requires_grad_()
        if kind is None:
            losses_N = torch.nn.functional.cross_entropy(own_NC, labels_N, reduction="none")
            loss = (weights_N * losses_N).sum()
        else:
            loss, _ = sums(own_NC, one_hot_NC, kind, [1.0] * 64)
        loss.backward()
        assert own_NC.grad is not None
        found.append((loss.detach(), own_NC.grad))
    for loss, gradient in found[1:]:
        assert torch.equal(loss, found[0][0])
        assert torch.equal(gradient, found[0][1])


def test_probabilities_of_several_labels_need_not_add_up_to_1() -> None:
    logits_NC = torch.tensor([[0.0, 0.0, 2.0]])
    assert probabilities(logits_NC, "several")[0, :2].tolist() == [0.5, 0.5]
    for kind in ("one", "shares"):
        assert float(probabilities(logits_NC, kind).sum()) == pytest.approx(1)
