"""The weighted loss against scikit-learn's formula and PyTorch's own weighted mean."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight

from emotion_train.model.loss import class_weights, weighted_loss_sum

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
    weights_N = weights_C[labels_N]
    mine = weighted_loss_sum(logits_NC, labels_N, weights_N) / weights_N.sum()
    torch.testing.assert_close(mine, torch.nn.functional.cross_entropy(logits_NC, labels_N, weight=weights_C))


def test_half_precision_logits_are_summed_in_float32() -> None:
    assert (
        weighted_loss_sum(
            torch.zeros(3, 2, dtype=torch.bfloat16), torch.tensor([0, 1, 1]), torch.ones(3)
        ).dtype
        == torch.float32
    )
