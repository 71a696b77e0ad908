"""Models of several labels a post, and of shares, compared: the figures against scikit-learn, and
what is no comparison.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import f1_score, jaccard_score

from emotion_train.errors import WrongRequest
from emotion_train.evaluation.metrics import confusion
from emotion_train.evaluation.predictions import AnyPredictions, Predictions, SetPredictions
from emotion_train.report.figures import SplitResult
from emotion_train.report.scorecard import Seen, build_scorecard
from launch.results.comparison import Comparison, _pooled, compare
from launch.results.comparison_page import render_html
from launch.results.comparison_words import flips_words
from launch.results.differences import Group
from launch.results.same_posts import SamePosts
from launch.results.scored import Scored

LABELS = ("calm", "fear", "joy")
ROWS = 400
IDS = [f"post {row}" for row in range(ROWS)]
DRAW = np.random.default_rng(3)
TRUTH_NC = DRAW.random((ROWS, 3)) < (0.4, 0.2, 0.1)
NOISE_NC = DRAW.normal(size=(ROWS, 3))


def sets(skill: float, seed: int, truth_NC: Any = TRUTH_NC) -> SetPredictions:
    logit_NC = skill * (2 * truth_NC - 1.0) + NOISE_NC
    logit_NC = logit_NC + np.random.default_rng(seed).normal(size=logit_NC.shape) / 2
    return SetPredictions.of(IDS, truth_NC, 1 / (1 + np.exp(-logit_NC)), [0.5, 0.4, 0.6])


def one(shares: bool) -> Predictions:
    prob_NC = np.exp(NOISE_NC) / np.exp(NOISE_NC).sum(axis=1, keepdims=True)
    shares_NC = np.eye(3)[TRUTH_NC.argmax(axis=1)]
    return Predictions.of(IDS, shares_NC.argmax(axis=1), prob_NC, shares_NC=shares_NC if shares else None)


def scored(name: str, predictions: AnyPredictions, labels: tuple[str, ...] = LABELS) -> Scored:
    """As `read_scored` gives it; of its card nothing but labels and source is looked at."""
    stand_in = one(False)
    counts_CC = confusion(stand_in.truth_N, stand_in.predicted_N, 3)
    card = build_scorecard(
        SplitResult(counts_CC, stand_in),
        name="file",
        labels=labels,
        train_counts=None,
        seen=Seen(),
        remarks=[],
        samples=10,
        seed=0,
        source="posts.csv",
        run_id=name,
        base="a/b",
        precision="fp32",
    )
    return Scored(name, name, "file", card, predictions, dict(zip(IDS, IDS, strict=True)))


def compared(*models: Scored) -> Comparison:
    return compare(models, ["the file is gone"] * len(models), samples=200)


def test_figures_of_several_labels_are_those_of_scikit_learn() -> None:
    first, second = sets(0.8, 1), sets(1.6, 2)
    found = compared(scored("low", first), scored("high", second))
    assert found.targets == "several"
    (versus,) = found.versus
    for group, own in zip(found.groups, (first, second), strict=True):
        truth, answers = own.truth_NC, own.predicted_NC
        assert group.macro_f1 == pytest.approx(f1_score(truth, answers, average="macro"))
        also = group.scores.also
        assert also["micro-F1"] == pytest.approx(f1_score(truth, answers, average="micro"))
        assert also["Jaccard"] == pytest.approx(
            jaccard_score(truth, answers, average="samples", zero_division=1)
        )
        assert also["exact match"] == pytest.approx((truth == answers).all(axis=1).mean())
    assert versus.outcome == "better"
    for label, line in enumerate(versus.labels):
        assert line.support == TRUTH_NC[:, label].sum()
        assert line.second == pytest.approx(f1_score(TRUTH_NC[:, label], second.predicted_NC[:, label]))
    right = [(own.predicted_NC == TRUTH_NC).all(axis=1) for own in (first, second)]
    lost, won = int((right[0] & ~right[1]).sum()), int((~right[0] & right[1]).sum())
    assert (len(versus.flips.lost), len(versus.flips.won)) == (lost, won)
    other = ~right[0] & ~right[1] & (first.predicted_NC != second.predicted_NC).any(axis=1)
    assert len(versus.flips.other) == other.sum()
    assert tuple(versus.mcnemar) == pytest.approx((lost, won, stats.binomtest(lost, lost + won, 0.5).pvalue))


def test_a_flip_names_the_labels_and_what_is_not_there_is_none() -> None:
    truth_NC = np.array([[True, True, False]] * 8 + [[False, False, False]] * 8)
    answers_NC = np.array([[True, False, False]] * 8 + [[False, False, True]] * 8)
    prob_NC = np.where(answers_NC, 0.9, 0.2).astype(np.float32)
    ids = [f"post {row}" for row in range(16)]
    first = SetPredictions(tuple(ids), truth_NC, answers_NC, prob_NC)
    second = SetPredictions(tuple(ids), truth_NC, truth_NC, np.where(truth_NC, 0.7, 0.4).astype(np.float32))
    found = compared(scored("first", first), scored("second", second))
    flips = found.versus[0].flips
    assert not flips.lost
    assert {(flip.truth, flip.first, flip.second) for flip in flips.won} == {
        ("calm, fear", "calm", "calm, fear"),
        ("none", "joy", "none"),
    }
    # of the labels that only one of the two gives: the probability of the truth
    chances = {flip.truth: (flip.first_probability, flip.second_probability) for flip in flips.won}
    assert chances["calm, fear"] == pytest.approx((0.2, 0.7))
    assert chances["none"] == pytest.approx((0.1, 0.6))
    assert "A post is right when it gets all its labels and no other." in flips_words(found, found.versus[0])
    page = render_html(found)
    assert "Jaccard" in page
    assert "share of posts that have it" in page


def test_labels_in_another_order_are_the_same_labels() -> None:
    first = sets(1.0, 1)
    order = [2, 0, 1]  # the label of each place
    turned = SetPredictions(
        first.ids, first.truth_NC[:, order], first.predicted_NC[:, order], first.prob_NC[:, order]
    )
    found = compared(scored("first", first), scored("turned", turned, tuple(LABELS[i] for i in order)))
    assert found.versus[0].flips.total == 0
    assert found.groups[0].scores == found.groups[1].scores


def test_shares_are_compared_on_their_largest_and_by_distance() -> None:
    found = compared(scored("a", one(True)), scored("b", one(True)))
    assert found.targets == "shares"
    own = one(True)
    assert own.shares_NC is not None
    losses = found.groups[0].scores.losses
    distance = np.abs(own.prob_NC - own.shares_NC).sum(axis=1).mean() / 2
    assert losses["total variation"] == pytest.approx(distance, rel=1e-5)
    # of posts whose share is all one label's, the divergence is the log loss
    assert losses["KL divergence"] == pytest.approx(losses["log loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (one(False), "b on posts that have one label, so their figures cannot be compared"),
        (one(True), "b on posts that have shares of labels, so their figures cannot be compared"),
        (
            sets(1.0, 1, ~TRUTH_NC),
            "400 of 400 posts have another true label in b than in a, such as 'post 0'",
        ),
    ],
)
def test_what_is_no_comparison_is_refused(other: AnyPredictions, words: str) -> None:
    with pytest.raises(WrongRequest, match=words) as caught:
        compared(scored("a", sets(1.0, 1)), scored("b", other))
    assert "\n" not in str(caught.value)


def test_several_runs_say_what_at_least_half_of_them_say() -> None:
    own = [sets(1.0, seed) for seed in (1, 2, 3)]
    same = SamePosts(LABELS, tuple(IDS), TRUTH_NC, tuple(own), (), {})
    votes_NC = sum(one.predicted_NC.astype(int) for one in own)
    assert (_pooled(same, Group("all", (0, 1, 2))).answer == (votes_NC >= 2)).all()
    assert (_pooled(same, Group("two", (0, 2))).answer == (own[0].predicted_NC | own[2].predicted_NC)).all()
    assert (_pooled(same, Group("one", (1,))).answer == own[1].predicted_NC).all()
