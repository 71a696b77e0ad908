"""Distances of distributions against scipy's and scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import rel_entr
from sklearn import metrics as sk

from emotion_train.evaluation.shares import share_scores


def test_distances_are_those_of_scipy_and_none_to_itself() -> None:
    generator = np.random.default_rng(0)
    shares_NC = generator.multinomial(3, [0.5, 0.3, 0.2, 0.0], 200) / 3  # three annotators
    prob_NC = generator.dirichlet(np.ones(4), 200)
    sums_C = np.array([40.0, 30.0, 29.0, 0.0])
    found = share_scores(shares_NC, prob_NC, sums_C)
    prior_NC = np.tile([40.25 / 100, 30.25 / 100, 29.25 / 100, 0.25 / 100], (200, 1))
    for kl, variation, other_NC in (
        (found.mean_kl, found.total_variation, prob_NC),
        (found.mean_kl_of_prior, found.total_variation_of_prior, prior_NC),
    ):
        assert kl == pytest.approx(rel_entr(shares_NC, other_NC).sum(axis=1).mean())
        farthest = [  # the set of labels whose two probabilities differ most
            max(abs((p - q)[list(some)].sum()) for some in ([0], [1], [2], [3], [0, 1], [0, 2], [0, 3]))
            for p, q in zip(shares_NC, other_NC, strict=True)
        ]
        assert variation == pytest.approx(np.mean(farthest))
    same = share_scores(shares_NC, shares_NC, sums_C)
    assert (same.mean_kl, same.total_variation) == (0, 0)
    assert same.mean_kl_of_prior == found.mean_kl_of_prior


def test_shares_that_are_whole_have_the_log_loss_of_one_label() -> None:
    generator = np.random.default_rng(1)
    truth_N, prob_NC = generator.integers(0, 3, 50), generator.dirichlet(np.ones(3), 50)
    prob_NC[0] = [0.0, 0.5, 0.5]
    truth_N[0] = 0  # what is so was called impossible
    found = share_scores(np.eye(3)[truth_N], prob_NC, np.bincount(truth_N, minlength=3))
    assert found.log_loss == pytest.approx(sk.log_loss(truth_N, prob_NC, labels=range(3)))
    assert found.mean_kl == pytest.approx(found.log_loss)


@pytest.mark.parametrize("shapes", [((0, 3), (0, 3), 3), ((2, 3), (2, 4), 3), ((2, 3), (2, 3), 4)])
def test_what_does_not_fit_together_is_refused(shapes: tuple[tuple[int, int], tuple[int, int], int]) -> None:
    shares, probabilities, classes = shapes
    with pytest.raises(ValueError, match="at least one post"):
        share_scores(np.zeros(shares), np.zeros(probabilities), np.ones(classes))
